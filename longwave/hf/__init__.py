"""longwave models as Hugging Face `transformers` models; no other package here uses the model classes of transformers.

After `import longwave.hf`, `AutoModelForCausalLM.from_pretrained(DIR)` loads what `longwave.checkpoints.save` wrote,
with `generate`, a cache, a loss, and what `Trainer`, PEFT, TRL and lm-eval need. Without the import,
`trust_remote_code=True` finds it through a small module that every longwave folder carries.

- `model.py`: the model classes; `pretrained.py`: what they share; `padding.py`: padded batches to streams and back.
- `cache.py`: longwave's state as a `transformers` cache.
- `folder.py`: loading and saving, always through `longwave.checkpoints`.
- `config.py`: the content of `config.json`. `training.py`: the callback that tells a model the optimizer step.
- `yardstick.py`: `transformers`' own model with a decoder's weights, with which benchmarks compare.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from longwave.checkpoints import native
from longwave.hf.cache import LongwaveCache
from longwave.hf.config import LongwaveConfig
from longwave.hf.model import LongwaveForCausalLM, LongwaveForSequenceClassification, LongwaveModel
from longwave.hf.training import StepCallback
from longwave.hf.yardstick import Yardstick, transformers_from

AutoConfig.register(native.MODEL_TYPE, LongwaveConfig)
for auto, names, model in (
    (AutoModel, MODEL_MAPPING_NAMES, LongwaveModel),
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, LongwaveForCausalLM),
    (
        AutoModelForSequenceClassification,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        LongwaveForSequenceClassification,
    ),
):
    auto.register(LongwaveConfig, model)
    # Trainer's label smoothing shifts the labels only for classes in this table, which registering does not add to.
    names[native.MODEL_TYPE] = model.__name__

__all__ = [
    "LongwaveCache",
    "LongwaveConfig",
    "LongwaveForCausalLM",
    "LongwaveForSequenceClassification",
    "LongwaveModel",
    "StepCallback",
    "Yardstick",
    "transformers_from",
]
