"""KL of students from their teacher by the place in a text: `divergence_by_position.py TEACHER DATA STUDENT...`.

DATA: a prepared folder, whose held-out windows of 256 tokens are read. Prints one JSON object: the loss of each model,
and the mean KL(teacher || student) in nats of the tokens up to places 1, 2, 4, 8 and so on.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import longwave as lw
from longwave.data.packed import Batch, PackedTokens
from longwave.model import Decoder

WINDOW, TOGETHER = 256, 8


@torch.no_grad()
def logs(model: Decoder, batch: Batch) -> Tensor:
    """The logarithms of what a model expects after every token of a batch."""
    tokens, _, stream = batch.inputs(model.embed.weight.device)
    with model.mode(training=False):
        return model.logits(model.hidden(tokens, replace(stream, outputs=None))).double().log_softmax(-1)


def measured(teacher: Decoder, students: Sequence[Decoder], text: PackedTokens) -> list[dict[str, object]]:
    """Of every student, the loss and the divergence by place; the first is the teacher itself."""
    sums = [dict[int, list[float]]() for _ in students]
    losses, count = [0.0] * len(students), 0
    for start in range(0, len(text), TOGETHER):
        batch = text.batch(range(start, min(start + TOGETHER, len(text))))
        _, _, stream = batch.inputs(teacher.embed.weight.device)
        theirs, learned = logs(teacher, batch), batch.targets >= 0
        count += int(learned.sum())
        for number, student in enumerate(students):
            ours = logs(student, batch)
            losses[number] -= float(ours[learned].gather(1, batch.targets[learned].unsqueeze(1)).sum())
            apart = (theirs.exp() * (theirs - ours)).sum(1)
            for place, value in zip(stream.order.tolist(), apart.tolist(), strict=True):
                sums[number].setdefault(math.ceil(math.log2(place + 1)), []).append(value)
    return [
        {"loss": loss / count, "kl": {str(1 << octave): sum(all) / len(all) for octave, all in sorted(found.items())}}
        for loss, found in zip(losses, sums, strict=True)
    ]


def main(teacher: str, data: str, *students: str) -> None:
    """Prints the figures of all students."""
    models = [lw.load(one).eval() for one in (teacher, *students)]
    text = PackedTokens(data, "held_out", WINDOW, keep_last=True)
    found = measured(models[0], models, text)
    print(json.dumps({"teacher": found[0]} | dict(zip(students, found[1:], strict=True))))


if __name__ == "__main__":
    main(*sys.argv[1:])
