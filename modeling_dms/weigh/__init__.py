"""From evidence to weights, and what they are trained by."""
