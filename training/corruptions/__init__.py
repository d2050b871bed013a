"""Corruptions of images and texts, by name and family, reproducible per (name, severity, sample id)."""

from modeling_dms.training.corruptions.imagenet_c import IMAGENET_C
from modeling_dms.training.corruptions.images import IMAGE_CORRUPTIONS
from modeling_dms.training.corruptions.registry import NAMES, corrupt
from modeling_dms.training.corruptions.text import TEXT_CORRUPTIONS


__all__ = [
    "IMAGENET_C",
    "IMAGE_CORRUPTIONS",
    "NAMES",
    "TEXT_CORRUPTIONS",
    "corrupt",
]
