"""The token mixers, which move information between the tokens of a sequence: kinds of attention, a file for each."""

from longwave.mixers.full import AttentionConfig, FullAttention
from longwave.mixers.infllm import InfllmAttention, InfllmConfig
from longwave.mixers.lightning import LightningAttention, LightningConfig
from longwave.mixers.window import WindowAttention, WindowConfig

__all__ = [
    "AttentionConfig",
    "FullAttention",
    "InfllmAttention",
    "InfllmConfig",
    "LightningAttention",
    "LightningConfig",
    "WindowAttention",
    "WindowConfig",
]
