"""Training: arguments, stages, the trainer, and `dms train`."""
