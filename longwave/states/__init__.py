"""What parts remember of a sequence between calls: what they declare, and where it is kept."""

from longwave.states.extents import Extents
from longwave.states.spec import PerSequence, PerToken, StateSpec
from longwave.states.state import Snapshot, State

__all__ = ["Extents", "PerSequence", "PerToken", "Snapshot", "State", "StateSpec"]
