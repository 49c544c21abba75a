"""Measurements of quality, speed and memory; each module is a command: `python -m benchmarks.<name>`."""
