"""The engine: requests of token ids in, tokens out; many at once, each as if it were alone."""

from longwave.engine.engine import Engine, EngineMetrics, EngineOptions
from longwave.engine.request import Constraint, Ended, Event, QueueFull, Request
from longwave.engine.sampling import Sampling

__all__ = [
    "Constraint",
    "Ended",
    "Engine",
    "EngineMetrics",
    "EngineOptions",
    "Event",
    "QueueFull",
    "Request",
    "Sampling",
]
