"""Corruptions of images and texts, by name, reproducible per (name, severity, sample id)."""

from modeling_dms.training.corruptions.images import IMAGE_CORRUPTIONS
from modeling_dms.training.corruptions.registry import corrupt
from modeling_dms.training.corruptions.text import TEXT_CORRUPTIONS


__all__ = ["IMAGE_CORRUPTIONS", "TEXT_CORRUPTIONS", "corrupt"]
