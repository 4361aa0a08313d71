"""Measurements of speed, each against a plain version in the same process: ``python -m benchmarks NAME``."""
