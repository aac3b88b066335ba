"""Measuring anything: seconds, peak memory, traces, the least time possible, and whether the output is right."""
