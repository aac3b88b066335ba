"""longwave's classes under the test mixins of `transformers`, one test class a layout, and its own Llama beside them.

`run.py` copies this file among the mixins, which it fetches; nothing here runs by itself.
"""

from __future__ import annotations

import unittest
from typing import Any, ClassVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from longwave.config import ModelConfig, build
from longwave.hf import LongwaveConfig, LongwaveForCausalLM
from longwave.layout import parse

from .generation.test_utils import GenerationTesterMixin
from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, ids_tensor
from .test_training_mixin import TrainingTesterMixin

VOCABULARY, WIDTH, INNER, HEADS, KV_HEADS, ROWS, COLUMNS = 99, 32, 37, 4, 2, 13, 7
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "attention": {"heads": HEADS, "kv_heads": KV_HEADS},
    "mlp": {"size": INNER},
    "context_window": 512,
}
INFLLM = {"kernel_size": 2, "kernel_stride": 1, "block_size": 2, "window_size": 2, "topk": 2, "dense_len": 9}
LAYOUTS: dict[str, dict[str, Any]] = {
    "2F": {"layout": "2F"},
    "2F tied": {"layout": "2F", "tie_embeddings": True},
    "F W": {"layout": "F W", "window": {"size": 5}},
    "subllm": {"layout": "F subllm(0.64: F) F", "subllm": {"selection": "causal"}},
    "published subllm": {"layout": "F subllm(0.64: F) F"},
    "sala": {"layout": "S 2L S", "infllm": INFLLM},
    "subllm of sala": {"layout": "S subllm(0.64: L) S", "infllm": INFLLM, "subllm": {"selection": "causal"}},
}


class Sizes:
    """What the mixins ask a model's tester: the sizes, a config and inputs."""

    is_training = True
    batch_size, seq_length, vocab_size, hidden_size, intermediate_size = ROWS, COLUMNS, VOCABULARY, WIDTH, INNER
    num_attention_heads, num_key_value_heads, pad_token_id = HEADS, KV_HEADS, IDS["pad_token_id"]
    base_model_class = None

    def __init__(self, layout: str, config_class: type[PretrainedConfig], causal_lm_class: type) -> None:
        shape = LAYOUTS.get(layout, LAYOUTS["2F"])
        self.config_class, self.causal_lm_class = config_class, causal_lm_class
        self.num_hidden_layers = parse(shape["layout"]).depth
        self.shape = build(ModelConfig, {**SHAPE, **shape}, layout).to_dict()

    def get_config(self) -> PretrainedConfig:
        if self.config_class is LongwaveConfig:
            return LongwaveConfig(model=self.shape, **IDS)
        sizes = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "num_hidden_layers": 2, **IDS}
        return LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, **sizes)

    def prepare_config_and_inputs_for_common(self) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
        ids = ids_tensor([ROWS, COLUMNS], VOCABULARY)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class Mixins(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """Every mixin over one layout of one class."""

    layout = ""
    all_model_classes: ClassVar[tuple[type, ...]] = (LongwaveForCausalLM,)
    all_generative_model_classes = all_model_classes

    def setUp(self) -> None:
        model = self.all_model_classes[0]
        self.model_tester = Sizes(self.layout, model.config_class, model)
        ours = {"model": self.model_tester.shape} if model is LongwaveForCausalLM else {"num_attention_heads": 1}
        self.config_tester = ConfigTester(self, config_class=model.config_class, hidden_size=WIDTH)
        self.config_tester.inputs_dict = ours

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_num_layers_is_small(self) -> None:
        self.skipTest("some layouts need three or four blocks")


class LlamaTest(Mixins, unittest.TestCase):
    """transformers' own Llama, whose passes are the measure."""

    layout = "Llama"
    all_model_classes = all_generative_model_classes = (LlamaForCausalLM,)


for name in LAYOUTS:
    made = f"Layout{list(LAYOUTS).index(name)}Test"
    globals()[made] = type(made, (Mixins, unittest.TestCase), {"layout": name, "__module__": __name__})
del Mixins
