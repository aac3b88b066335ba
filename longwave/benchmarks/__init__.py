"""Measuring: how fast, beside what is possible; `docs/benchmarks.md` tells how to read it."""

import os

# Before torch is loaded: its profiler would otherwise say on stderr that it starts and stops, at every run.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
