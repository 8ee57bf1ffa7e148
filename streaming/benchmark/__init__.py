"""Measurements: `python -m streaming.benchmark NAME`. Figures are printed as a table and, with --json, written to a
file.
"""
