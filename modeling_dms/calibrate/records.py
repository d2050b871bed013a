"""What the fit of a `Calibration` reads of samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


MIN_SAMPLES = 50
# of the cross-fit: no sample is judged by a fit it took part in
FOLDS = 5
# by less do the numbers of one image differ from batch to batch
ALIKE = 1e-3


class Record:
    """Fields of n samples each; those that may be `None` are so in all records or in none."""

    def __getitem__(self, rows: Tensor) -> Self:
        return type(self)(*(None if part is None else part[rows] for part in vars(self).values()))

    @classmethod
    def cat(cls, records: Sequence[Self]) -> Self:
        """The samples of several records, one after the other."""
        parts = zip(*(vars(record).values() for record in records), strict=True)
        return cls(*(None if part[0] is None else torch.cat(part) for part in parts))


@dataclass
class ModalityRecord(Record):
    """One modality of n samples.

    Attributes:
        statistics: (n, L, F), of its layers.
        scalars: (n, 3), in the order of `SCALARS`.
        representations: (n, d_s).
        content: (n, F), see `ModalityFeatures`.
        numbers: (n, P), likewise.
    """

    statistics: Tensor
    scalars: Tensor
    representations: Tensor
    content: Tensor
    numbers: Tensor | None = None


@dataclass
class DamagedRecord(Record):
    """The same n samples, damaged.

    Attributes:
        severity: (n,), from 0 to 1.
        statistics: as those of [`ModalityRecord`]; `None` where the detector does not read the layers.
        numbers: likewise.
    """

    severity: Tensor
    statistics: Tensor | None
    numbers: Tensor | None


@dataclass
class GainRecord(Record):
    """What the backbone says of how far images and texts belong together, see `ModalityFeatures.gain`; NaN where a
    sample lacks either.

    Attributes:
        gain: (n,), of each sample.
        of_other: (n,), of its image and the text of another sample.
        other: (n,), the place of that sample.
    """

    gain: Tensor
    of_other: Tensor
    other: Tensor


def first_alike(values: Tensor) -> Tensor:
    """The first of the rows that each one equals, but for rounding: (n, F) -> (n,)."""
    # what is alike lies side by side, in whatever direction it is looked at
    order = (values @ torch.randn(values.shape[1], generator=torch.Generator().manual_seed(0))).argsort(stable=True)
    differs = (values[order].diff(dim=0).abs() > ALIKE).any(1)
    group = torch.cat([torch.zeros(1, dtype=torch.long), differs.long().cumsum(0)])[: len(values)]
    first = torch.full_like(group, len(values)).scatter_reduce(0, group, order, "amin")
    return torch.zeros_like(order).scatter(0, order, first[group])


def folds_by_image(images: ModalityRecord, present: Tensor, seed: int) -> Tensor:
    """Folds (n,) of samples, at random. Samples of one image, such as several questions about it, share one: else an
    image would be judged by what was fitted to it, and new ones would look odd beside it.

    Args:
        images: of the samples.
        present: (n,), which of them have an image.

    Raises:
        ValueError: for fewer than 50 different images.
    """
    places = present.nonzero()[:, 0]
    seen = images.content if images.numbers is None else images.numbers
    first = places[first_alike(seen[places].nan_to_num(0))]
    count = len(first.unique())
    if count < MIN_SAMPLES:
        raise ValueError(
            f"the calibration data hold {count} different images in {len(places)} samples, at least {MIN_SAMPLES} are "
            "needed"
        )
    folds = torch.randperm(len(present), generator=torch.Generator().manual_seed(seed)) % FOLDS
    folds[places] = folds[first]
    return folds
