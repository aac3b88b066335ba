"""The memory of parts between calls: what they declare, how they speak to it, and where it is kept."""

from longwave.states.extents import Extents
from longwave.states.memory import Memory, NoMemory, Store
from longwave.states.pages import OutOfPages, PageOptions, Pages, Usage
from longwave.states.spec import PerSequence, PerToken, StateSpec
from longwave.states.state import Branch, Snapshot, State, memory_of

__all__ = [
    "Branch",
    "Extents",
    "Memory",
    "NoMemory",
    "OutOfPages",
    "PageOptions",
    "Pages",
    "PerSequence",
    "PerToken",
    "Snapshot",
    "State",
    "StateSpec",
    "Store",
    "Usage",
    "memory_of",
]
