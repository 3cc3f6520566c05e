"""Speed, as ratios to a public peer or to a bare limit measured in the same run; see `python -m benchmarks --help`."""
