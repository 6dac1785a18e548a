"""Forked ranks for tests; the same launcher as the benchmarks'."""

from forked_ranks import run_ranks

__all__ = ["run_ranks"]
