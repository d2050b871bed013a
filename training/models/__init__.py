"""Checkpoints: loaded, assembled, calibrated, and told apart."""
