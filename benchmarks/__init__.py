"""Measurements beside other tools; ``python -m benchmarks --help``."""
