"""Applies a named corruption to a sample."""

import hashlib

import numpy as np

from modeling_dms.training.corruptions.images import IMAGE_CORRUPTIONS
from modeling_dms.training.corruptions.text import TEXT_CORRUPTIONS
from modeling_dms.training.data.samples import Sample


def _generator(name: str, severity: int, sample_id: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{name}/{severity}/{sample_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def corrupt(sample: Sample, name: str, severity: int = 3, other: Sample | None = None) -> Sample:
    """A corrupted copy of a sample; what is drawn depends on (name, severity, sample id) alone.

    Args:
        name: `"image:KIND"` or `"text:KIND"` with a kind of `IMAGE_CORRUPTIONS` or `TEXT_CORRUPTIONS`, or with
            `missing`, or with `mismatch` (the image or context of `other`).
        severity: 1 (mild) to 5 (strong).

    Raises:
        ValueError: for an unknown name, a severity outside 1..5, or a mismatch without `other`.
    """
    if severity not in range(1, 6):
        raise ValueError(f"severity must be an integer from 1 to 5, got {severity!r}")
    modality, _, kind = name.partition(":")
    field = {"image": "image", "text": "context"}.get(modality)
    known = {"image": IMAGE_CORRUPTIONS, "text": TEXT_CORRUPTIONS}.get(modality, {})
    if field is None or kind not in (*known, "missing", "mismatch"):
        names = [f"image:{k}" for k in IMAGE_CORRUPTIONS] + [f"text:{k}" for k in TEXT_CORRUPTIONS]
        names += ["image:missing", "image:mismatch", "text:missing", "text:mismatch"]
        raise ValueError(f"unknown corruption {name!r}, expected one of {', '.join(names)}")
    if kind == "missing":
        return sample.replace(**{field: None})
    if kind == "mismatch":
        if other is None:
            raise ValueError(f"corruption {name!r} needs `other`, the sample whose {field} is taken")
        return sample.replace(**{field: getattr(other, field)})
    value = sample.load_image() if modality == "image" else sample.context
    if value is None or (isinstance(value, str) and not value.strip()):
        return sample
    return sample.replace(**{field: known[kind](value, severity, _generator(name, severity, sample.id))})
