"""Checkpoints that load anywhere, saved so that nothing is lost."""
