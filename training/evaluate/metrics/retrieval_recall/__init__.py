"""Image-text retrieval recall as a module of `evaluate`."""
