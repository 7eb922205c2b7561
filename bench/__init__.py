"""Benchmarks: every row beside its rivals in the same run. `pytest bench/`, or `ulr bench` for the table of ratios."""
