"""VQA accuracy as a module of `evaluate`."""
