"""What this machine has, and which form each op will run on it, and why."""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec
from typing import Any

import torch

from longwave.ops.attention import ATTENTION
from longwave.ops.block_sparse import BLOCK_SPARSE
from longwave.ops.cross_entropy import CROSS_ENTROPY
from longwave.ops.decay_linear import DECAY_LINEAR
from longwave.ops.forms import Call, Op
from longwave.ops.linear import LINEAR
from longwave.version import __version__

_OPTIONAL = {"tensorboard": "track"}


def facts() -> dict[str, str]:
    """Label -> value, in the order in which people want to read them."""
    found = {
        "longwave": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16 matrix products": "fast" if fast_bf16() else "slow on this CPU: train in fp32",
        "devices": ", ".join(devices()),
    }
    for op in (ATTENTION, BLOCK_SPARSE, DECAY_LINEAR, LINEAR, CROSS_ENTROPY):
        found |= {f"op {op.name} on {place}": form for place, form in forms_of(op).items()}
    for package, extra in _OPTIONAL.items():
        found[package] = "installed" if find_spec(package) else f"not installed: pip install 'longwave[{extra}]'"
    return found


def forms_of(op: Op[Any]) -> dict[str, str]:
    """The form that an op runs in bf16 on every kind of device here, and why."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = {kind: op.resolve(Call(torch.device(kind), torch.bfloat16)) for kind in kinds}
    return {kind: f"{form} ({reason})" for kind, (form, reason) in found.items()}


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def devices() -> list[str]:
    """CPU and every CUDA device."""
    return ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))]


def fast_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware, which makes training in bf16 faster than in fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
