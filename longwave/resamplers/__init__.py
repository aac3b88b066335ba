"""The resamplers by their name in a layout; a new one is a file and a line here."""

from longwave.resamplers.subllm import Clock, Subllm

RESAMPLERS: dict[str, type[Subllm]] = {"subllm": Subllm}

__all__ = ["RESAMPLERS", "Clock", "Subllm"]
