"""What the fit of a `Calibration` reads of samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


MIN_SAMPLES = 50
# of the cross-fit: no sample is judged by a fit it took part in
FOLDS = 5


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
