"""What calibration learns from clean samples, and how."""
