"""The machine: the devices and dtypes a model runs in, and what people want to know of both."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from longwave.errors import MachineError, UserError, shown
from longwave.units import counted
from longwave.version import __version__

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (  # of a container, by cgroup v2 and v1: the limit, the use, and the cached files in it, which can be dropped
    ("memory.max", "memory.current", "memory.stat", "file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_cache"),
)
_OPTIONAL = {"tensorboard": "track"}  # package -> the extra of ours that installs it


def device_of(name: str | torch.device) -> torch.device:
    """The device a user named: `auto`, `cpu`, `cuda` or `cuda:N`; a UserError where there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device = {shown(_word(name))}: use auto, cpu, cuda or cuda:N")
    count, there = torch.cuda.device_count(), counted(torch.cuda.device_count(), "CUDA device")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"device = {shown(_word(name))}: this machine has {there}; use cpu or auto")
    return device


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """The dtype a user named: `bf16`, or as PyTorch says it, `bfloat16` or `torch.bfloat16`."""
    for short, dtype in DTYPES.items():
        if name in (short, dtype, str(dtype), str(dtype).removeprefix("torch.")):
            return dtype
    raise UserError(f"dtype = {shown(_word(name))}: use one of {', '.join(DTYPES)}")


def _word(name: object) -> object:
    """The name of a device or dtype as a user would write it."""
    return str(name) if isinstance(name, torch.device | torch.dtype) else name


def not_finite(what: str, value: float, dtype: torch.dtype) -> MachineError:
    """The error for a number that comes out of a model as NaN or infinity."""
    kind = str(dtype).removeprefix("torch.")
    return MachineError(f"{what} = {value}: the model's weights have diverged, or {kind} overflows; try it in fp32")


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
    for package, extra in _OPTIONAL.items():
        found[package] = "installed" if find_spec(package) else f"not installed: pip install 'longwave[{extra}]'"
    return found


def versions() -> dict[str, str]:
    """The versions of longwave and of the packages whose work its results depend on."""
    found = {"longwave": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | {"tokenizers": version("tokenizers")}


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


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated, within a container's limit too; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [kernel_figure("/proc/meminfo", "MemAvailable:"), *(_within(*names) for names in _LIMITS)]
    return min((bytes for bytes in found if bytes is not None), default=None)


def _within(limit: str, used: str, statistics: str, files: str) -> int | None:
    """Bytes that a control group's limit leaves; None without a limit."""
    try:
        bound, taken = ((_CGROUP / name).read_text().strip() for name in (limit, used))
    except OSError:
        return None
    droppable = kernel_figure(_CGROUP / statistics, files, unit=1) or 0
    return int(bound) - int(taken) + droppable if bound.isdigit() else None


def kernel_figure(path: str | Path, name: str, unit: int = 1024) -> int | None:
    """The figure of one line of a kernel table such as /proc/meminfo, in bytes; None where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(words[1]) * unit for words in map(str.split, lines) if words[0] == name), None)
