"""Measuring: how fast, beside what is possible; `docs/benchmarks.md` tells how to read it."""

import os

# Before torch is loaded: its profiler tells stderr when it starts and stops, and when memory older than a run is freed.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
