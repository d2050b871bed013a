"""Applies a named corruption to a sample."""

import hashlib

import numpy as np

from modeling_dms.training.corruptions.imagenet_c import IMAGENET_C
from modeling_dms.training.corruptions.images import IMAGE_CORRUPTIONS
from modeling_dms.training.corruptions.text import TEXT_CORRUPTIONS
from modeling_dms.training.data.samples import FIELDS, Sample
from modeling_dms.training.names import check_names


# what a corruption damages, as its name says
INPUTS = ("image", "text")
# of a sample, by that
FIELD_OF: dict[str, str] = dict(zip(INPUTS, FIELDS, strict=True))
_KINDS = {"image": {**IMAGE_CORRUPTIONS, **IMAGENET_C}, "text": TEXT_CORRUPTIONS}
# every name that `corrupt` takes
NAMES = tuple(f"{modality}:{kind}" for modality in INPUTS for kind in (*_KINDS[modality], "missing", "mismatch"))


def seeded(*parts: object) -> np.random.Generator:
    """A generator of its own for these parts, the same on every machine and in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def corrupt(sample: Sample, name: str, severity: int = 3, other: Sample | None = None, salt: str = "") -> Sample:
    """A corrupted copy of a sample; what is drawn depends on (name, severity, sample id, salt) alone.

    The copy's `damage` in this modality is severity / 5, and 1 where it is missing or another sample's. A sample that
    lacks the modality is returned as it is by every kind but these two.

    Args:
        name: one of `NAMES`: `"image:KIND"` with a kind of `IMAGE_CORRUPTIONS` or `IMAGENET_C`, `"text:KIND"` with one
            of `TEXT_CORRUPTIONS`, or either with `missing` or `mismatch` (the image or context of `other`).
        severity: 1 (mild) to 5 (strong).
        other: the sample a mismatch takes the image or context of.
        salt: makes another draw for the same sample, as for another epoch.

    Raises:
        ValueError: for an unknown name, a severity outside 1..5, a mismatch without `other`, or, naming the sample, an
            image too small for the corruption.
        ImportError: for an ImageNet-C kind without the package that makes it.
    """
    if severity not in range(1, 6):
        raise ValueError(f"severity must be an integer from 1 to 5, got {severity!r}")
    check_names("corruption", [name], NAMES)
    modality, _, kind = name.partition(":")
    field = FIELD_OF[modality]
    damage = 1.0 if kind in ("missing", "mismatch") else severity / 5
    if kind == "missing":
        value = None
    elif kind == "mismatch":
        if other is None:
            raise ValueError(f"corruption {name!r} needs `other`, the sample whose {field} is taken")
        value = getattr(other, field)
    else:
        value = sample.load_image() if modality == "image" else sample.context
        if value is None or (isinstance(value, str) and not value.strip()):
            return sample
        try:
            value = _KINDS[modality][kind](value, severity, seeded(name, severity, sample.id + salt))
        except ValueError as error:
            raise ValueError(f"sample {sample.id!r}: {name} failed: {error}") from error
    # a modality corrupted twice is as bad as its worst corruption
    vision, text = sample.damage
    both = (max(vision, damage), text) if modality == "image" else (vision, max(text, damage))
    return sample.replace(**{field: value, "damage": both})
