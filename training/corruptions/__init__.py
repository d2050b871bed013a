"""Corruptions of images and texts, by name and family, reproducible per (name, severity, sample id)."""

from modeling_dms.training.corruptions.dropout import EpochCallback, ModalityDropout
from modeling_dms.training.corruptions.families import (
    FAMILIES,
    CorruptionConfig,
    family_of,
    names_in,
    self_made_families,
)
from modeling_dms.training.corruptions.imagenet_c import IMAGENET_C
from modeling_dms.training.corruptions.images import IMAGE_CORRUPTIONS
from modeling_dms.training.corruptions.registry import NAMES, corrupt
from modeling_dms.training.corruptions.text import TEXT_CORRUPTIONS


__all__ = [
    "FAMILIES",
    "IMAGENET_C",
    "IMAGE_CORRUPTIONS",
    "NAMES",
    "TEXT_CORRUPTIONS",
    "CorruptionConfig",
    "EpochCallback",
    "ModalityDropout",
    "corrupt",
    "family_of",
    "names_in",
    "self_made_families",
]
