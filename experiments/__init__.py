"""Experiments with the package: `python -m experiments.run` trains and compares losses."""
