"""`transformers`' own Llama over the weights of a longwave decoder."""

from __future__ import annotations

from typing import Any, cast

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from longwave.checkpoints import llama
from longwave.checkpoints.foreign import disassemble
from longwave.model import Decoder


def llama_from(decoder: Decoder) -> LlamaForCausalLM:
    """`transformers`' own Llama (SDPA attention) over the very weights of a decoder, which it shares.

    UserError for a decoder that is no plain Llama.
    """
    config = LlamaConfig.from_dict(llama.config_json(decoder, None), attn_implementation="sdpa")
    with no_init_weights():
        model = LlamaForCausalLM(config)
    tensors = disassemble(decoder, llama.TABLE)
    if decoder.config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return cast(Any, model).to(decoder.embed.weight.device).eval()
