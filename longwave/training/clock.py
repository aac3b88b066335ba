"""The time that a run took, over all its sessions, by what it went to: `times.json` in the run's folder."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from longwave import files
from longwave.errors import require, shown
from longwave.files.jsonfile import read_object

TIMES = "times.json"

Activity = Literal["training", "evaluation", "checkpoints"]


@dataclass(frozen=True)
class Seconds:
    """Seconds that passed. training: everything but the other two. checkpoints: and the writing of `model/`."""

    training: float = 0.0
    evaluation: float = 0.0
    checkpoints: float = 0.0

    @property
    def total(self) -> float:
        """All of them together."""
        return self.training + self.evaluation + self.checkpoints

    def words(self) -> str:
        """The seconds for people, by what they went to."""
        other = f"{self.evaluation:.0f} s of evaluation, {self.checkpoints:.0f} s of checkpoints"
        return f"{self.training:.0f} s of training, {other}"

    def plus(self, activity: Activity, seconds: float) -> Seconds:
        """These and so many more of one activity."""
        return dataclasses.replace(self, **{activity: getattr(self, activity) + seconds})


class Clock:
    """Counts the seconds of a session, on top of those of the sessions before it.

    logged: the seconds that the log of the run knows of. What it knows beyond the file passed after the last checkpoint
    of a session that was killed: the steps are lost, but the time passed.
    """

    def __init__(self, folder: Path, logged: float = 0.0) -> None:
        self._path, before = folder / TIMES, read_seconds(folder)
        self._passed = before.plus("training", max(0.0, logged - before.total))
        self._doing: Activity = "training"
        self._since = time.monotonic()

    @property
    def seconds(self) -> Seconds:
        """The seconds up to now."""
        now = time.monotonic()
        self._passed, self._since = self._passed.plus(self._doing, now - self._since), now
        return self._passed

    @contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        """Counts the block as this activity."""
        _, before = self.seconds, self._doing
        self._doing = activity
        try:
            yield
        finally:
            _, self._doing = self.seconds, before

    def save(self) -> None:
        """Writes the seconds up to now."""
        files.write_file(self._path, (json.dumps(dataclasses.asdict(self.seconds)) + "\n").encode())


def read_seconds(folder: Path) -> Seconds:
    """The seconds that the run in a folder took; zeros where it kept none."""
    path = folder / TIMES
    if not path.is_file():
        return Seconds()
    values = {field.name: 0.0 for field in dataclasses.fields(Seconds)} | read_object(path)
    for name, value in values.items():
        good = name in Seconds.__dataclass_fields__ and type(value) in (int, float) and value >= 0
        require(good, f"{path}: {name} = {shown(value)}: seconds by activity; remove the file to count anew")
    return Seconds(**values)
