"""What calibration knows of several sources of one sample: how far two of them agree, and how odd clean ones look."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling_dms.calibrate.conformal import Agreement, Conformal
from modeling_dms.calibrate.statistics import Statistics, map_shapes, mapped


# kinds of pairs, by the types of both (`VISION` and `TEXT` are 1 and 2): sum of the types - 2
IMAGES, IMAGE_AND_TEXT, TEXTS = 0, 1, 2
KINDS = ("image-image", "image-text", "text-text")
# what sources a set has: clean ones of images and texts are less alike than those of one type
COMPOSITIONS = ("images", "texts", "both")
BOTH = 2


@dataclass
class SourceRecord:
    """All sources of n samples.

    Attributes:
        types: (n, S), `VISION`, `TEXT` or, where there is none, 0.
        contents: by type, (n, S, F), see `ModalityFeatures`; 0 for sources of the other type.
    """

    types: Tensor
    contents: Sequence[Tensor]

    @staticmethod
    def cat(records: Sequence["SourceRecord"]) -> "SourceRecord":
        """The samples of several records, whose S may differ."""
        most = max(record.types.shape[1] for record in records)

        def padded(tensor: Tensor) -> Tensor:
            return F.pad(tensor, [0, 0] * (tensor.ndim - 2) + [0, most - tensor.shape[1]])

        types = torch.cat([padded(record.types) for record in records])
        contents = [
            torch.cat([padded(of) for of in some]) for some in zip(*(r.contents for r in records), strict=True)
        ]
        return SourceRecord(types, contents)

    def __getitem__(self, rows: Tensor) -> "SourceRecord":
        return SourceRecord(self.types[rows], [content[rows] for content in self.contents])


class SourceAgreement(Statistics):
    """How far two sources belong together.

    Args:
        sizes: F of each modality's content.
        components: K.
    """

    def __init__(self, sizes: Sequence[int], components: int):
        shapes = map_shapes(sizes, components)  # to where sources of one sample are close
        # of each kind of pair, the log-likelihood ratio by the cosine: slope and offset
        super().__init__({**shapes, "odds": (len(KINDS), 2), "known": (len(KINDS),)})

    def cosines(self, agreement: Agreement, types: Tensor, contents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Of all pairs of sources the cosine (B, S, S) of what both say of what they share, and the kind (B, S, S), -1
        where there is no pair.

        Args:
            agreement: of images and texts.
            types, contents: see [`SourceRecord`].
        """
        is_of = [types == index + 1 for index in range(len(contents))]
        shared = torch.stack([agreement.shared(index, content) for index, content in enumerate(contents)])
        among = torch.stack([mapped(self, index, content) for index, content in enumerate(contents)])
        own = torch.stack(is_of)[..., None]
        crossed, alike = (F.normalize((of * own).sum(0), dim=-1) for of in (shared, among))
        kind = types[:, :, None] + types[:, None] - 2
        there = (types[:, :, None] > 0) & (types[:, None] > 0)
        there = there & ~torch.eye(types.shape[1], dtype=torch.bool, device=types.device)
        cosine = torch.where(kind == IMAGE_AND_TEXT, crossed @ crossed.mT, alike @ alike.mT)
        return cosine, kind.masked_fill(~there, -1)

    def ratios(self, cosine: Tensor, kind: Tensor) -> Tensor:
        """The log-likelihood ratio of each pair, that it belongs together: (B, S, S), NaN where nothing tells."""
        chosen = kind.clamp_min(0)
        ratio = self.odds[chosen, 0] * cosine + self.odds[chosen, 1]
        return ratio.masked_fill((kind < 0) | (self.known[chosen] == 0), torch.nan)


def composition(types: Tensor, compared: Tensor) -> Tensor:
    """Which of `COMPOSITIONS` the sources are that are compared: (B, S), (B, S) -> (B,)."""
    image, text = (((types == kind) & compared).any(1) for kind in (1, 2))
    return torch.where(image & text, BOTH, text.long())


def p_odd(clean: Sequence[Conformal], oddness: Tensor, which: Tensor) -> Tensor:
    """p-values of the oddness (B, S) of sources, among sets of the same composition (B,)."""
    found = torch.stack([of.p_value(oddness) for of in clean])
    return found[which, torch.arange(len(which), device=which.device)]
