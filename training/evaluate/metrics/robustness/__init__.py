"""Robustness to corruption as a module of `evaluate`."""
