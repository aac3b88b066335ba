"""The brackets of a layout by their name: resamplers, and whatever else runs other layers in a way of its own."""

from longwave.resamplers.base import Bracket, Clock, Kept, Resampler, Selection
from longwave.resamplers.subllm import Subllm, SubllmConfig

BRACKETS: dict[str, type[Bracket]] = {"subllm": Subllm}

__all__ = ["BRACKETS", "Bracket", "Clock", "Kept", "Resampler", "Selection", "SubllmConfig"]
