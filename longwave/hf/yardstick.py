"""`transformers`' own model over the weights of a longwave decoder."""

from __future__ import annotations

from typing import Any, cast

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from longwave.checkpoints import huggingface
from longwave.checkpoints.families import EMBEDDING, FAMILIES, HEAD, TABLE, family_of
from longwave.checkpoints.foreign import disassemble
from longwave.errors import UserError
from longwave.model import Decoder


def transformers_from(decoder: Decoder) -> PreTrainedModel:
    """`transformers`' own model (SDPA attention) over the very weights of a decoder, which it shares.

    UserError for a decoder that is of no family that `transformers` has.
    """
    family = family_of(decoder.config)
    if family is None or not family.in_transformers:
        known = ", ".join(one.model_type for one in FAMILIES if one.in_transformers)
        raise UserError(f"layout = {decoder.config.layout!r}: this model is none that transformers has ({known})")
    values = huggingface.config_json(family, decoder, {})
    config = AutoConfig.for_model(**values, attn_implementation="sdpa")
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    tensors = disassemble(decoder, TABLE)
    if decoder.config.tie_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return cast(Any, model).to(decoder.embed.weight.device).eval()
