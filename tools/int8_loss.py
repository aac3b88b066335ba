"""The loss of models on held-out text with weights in fp32, bf16 and int8: `int8_loss.py DATA WINDOW MODEL...`.

DATA: a prepared folder, of which the first 24 held-out windows of WINDOW tokens are read. Prints a line of JSON each.
"""

from __future__ import annotations

import json
import sys

import longwave as lw
from longwave.costs import count
from longwave.data.packed import PackedTokens
from longwave.evaluation.held_out import held_out_loss

WINDOWS = 24


def main(folder: str, window: str, *models: str) -> None:
    """Measures every model in every type."""
    data = PackedTokens(folder, "held_out", int(window))
    for path in models:
        losses = {
            dtype: held_out_loss(lw.load(path, dtype=dtype).eval(), data, windows=WINDOWS).loss
            for dtype in ("fp32", "bf16", "int8")
        }
        model = lw.load(path)
        changes = {
            "int8_to_bf16": losses["int8"] / losses["bf16"] - 1,
            "bf16_to_fp32": losses["bf16"] / losses["fp32"] - 1,
        }
        print(json.dumps({"layout": model.config.layout, "parameters": count(model), **losses, **changes}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
