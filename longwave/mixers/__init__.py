"""The token mixers by name; a new one is a file and a line here."""

from longwave.mixers.base import Mixer, Site
from longwave.mixers.full import FullAttention
from longwave.mixers.infllm import InfllmAttention
from longwave.mixers.lightning import LightningAttention
from longwave.mixers.window import WindowAttention

MIXERS: dict[str, type[Mixer]] = {
    "full": FullAttention,
    "window": WindowAttention,
    "lightning": LightningAttention,
    "infllm": InfllmAttention,
}

__all__ = ["MIXERS", "FullAttention", "InfllmAttention", "LightningAttention", "Mixer", "Site", "WindowAttention"]
