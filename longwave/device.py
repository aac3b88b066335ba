"""Where a model runs, and in what."""

from __future__ import annotations

import torch

from longwave.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def device_of(name: str) -> torch.device:
    """The device a user named: `auto`, `cpu`, `cuda` or `cuda:N`; a UserError where there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device = {name!r}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device = {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu or auto"
        )
    return device


def dtype_of(name: str) -> torch.dtype:
    """The dtype a user named."""
    if name not in DTYPES:
        raise UserError(f"dtype = {name!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[name]
