"""What the fit of a `Calibration` reads of samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


MIN_SAMPLES = 50
# of the cross-fit: no sample is judged by a fit it took part in
FOLDS = 5


def _cat(records: Sequence[Any]) -> list[Any]:
    parts = zip(*(vars(record).values() for record in records), strict=True)
    return [None if part[0] is None else torch.cat(part) for part in parts]


def _of_rows(record: Any, rows: Tensor) -> list[Any]:
    return [None if part is None else part[rows] for part in vars(record).values()]


@dataclass
class ModalityRecord:
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

    def __getitem__(self, rows: Tensor) -> "ModalityRecord":
        return ModalityRecord(*_of_rows(self, rows))

    @staticmethod
    def cat(records: Sequence["ModalityRecord"]) -> "ModalityRecord":
        """The samples of several records, one after the other."""
        return ModalityRecord(*_cat(records))


@dataclass
class DamagedRecord:
    """The same n samples, damaged.

    Attributes:
        severity: (n,), from 0 to 1.
        statistics: as those of [`ModalityRecord`]; `None` where the detector does not read the layers.
        numbers: likewise.
    """

    severity: Tensor
    statistics: Tensor | None
    numbers: Tensor | None

    def __getitem__(self, rows: Tensor) -> "DamagedRecord":
        return DamagedRecord(*_of_rows(self, rows))

    @staticmethod
    def cat(records: Sequence["DamagedRecord"]) -> "DamagedRecord":
        """The samples of several records, one after the other."""
        return DamagedRecord(*_cat(records))
