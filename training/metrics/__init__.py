"""Metrics: formulas as plain functions on numpy arrays and strings."""
