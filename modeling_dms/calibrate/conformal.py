"""p-values: how a sample's damage, or a pair's agreement, compares with that of clean samples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from modeling_dms.calibrate.statistics import REMEMBERED, Statistics, keep_map, map_shapes, mapped, standardised
from modeling_dms.evidence.typicality import fit_canonical, fit_logistic


# how far, in clean standard deviations, one number counts
FARTHEST = 30.0
# scores are measured from the point that this share of the clean ones exceeds, by how far those do on average; and the
# least p-value there is
TAIL, LEAST_P = 0.05, 1e-30


class Conformal(Statistics):
    """Scores of clean samples that took no part in the fit of what scores them: what a score is compared with.

    Args:
        columns: C, scores of each sample.
    """

    def __init__(self, columns: int, shapes: dict[str, tuple[int, ...]]):
        super().__init__({**shapes, "clean": (REMEMBERED, columns), "count": ()})

    def remember(self, scores: Tensor) -> None:
        """Keeps scores (n, C) of clean samples, of more than it has room for some that are evenly spread."""
        kept = min(len(scores), REMEMBERED)
        self.clean.zero_()
        self.clean[:kept] = scores[torch.arange(kept) * len(scores) // max(1, kept)]
        self.count.fill_(float(kept))

    def largest(self, scores: Tensor) -> Tensor:
        """The one score that counts: (n, C) -> (n,)."""
        return scores.amax(1)

    def _ordered(self) -> Tensor:
        """Those of the clean samples, the largest first, and -inf where none is remembered."""
        places = torch.arange(len(self.clean), device=self.clean.device) < self.count
        return self.largest(self.clean).masked_fill(~places, -torch.inf).sort(descending=True).values

    def p_value(self, score: Tensor) -> Tensor:
        """The conformal p-value: the share of clean samples, this one among them, whose score is as large.

        A clean sample has p <= a with probability a at most (Vovk et al., "Algorithmic Learning in a Random World",
        2005). Beyond the n clean samples, where counting ends at 1 / (n + 1), p falls on as their tail does, which is
        taken to be exponential.

        Args:
            score: (...).

        Returns:
            (...), at least `LEAST_P`; 1 before calibration.
        """
        clean = self._ordered()
        counted = (1 + (clean >= score[..., None]).sum(-1)) / (1 + self.count)
        tail = (TAIL * self.count).long().clamp_min(1)
        excess = (clean - clean.gather(0, tail[None])).where(torch.arange(len(clean), device=clean.device) < tail, 0)
        beyond = ((score - clean[0]) * tail / excess.sum().clamp_min(1e-6)).clamp_min(0)
        p = torch.where(score > clean[0], (-beyond).exp() / (1 + self.count), counted)
        return p.clamp(LEAST_P, 1).where(self.count > 0, 1)


class Detector(Conformal):
    """Tells the damaged samples of one modality from clean ones by numbers that were read of it.

    Scores are the log-odds of each family of self-made damage and, for what resembles none of them, the logarithm of
    the Mahalanobis distance from the clean samples. Each is measured by how far clean samples reach; the largest
    counts.

    Args:
        size: P, numbers of each sample.
        families: D, of self-made damage.
        reads_layers: whether the log distances of the layers are the last of the numbers, see [`Calibration.numbers`].
    """

    def __init__(self, size: int, families: int, reads_layers: bool):
        super().__init__(
            families + 1,
            {
                "location": (size,),
                "scale": (size,),
                # of the standardised numbers; transforms clean ones into uncorrelated ones
                "whitening": (size, size),
                "directions": (families, size),
                "offsets": (families,),
                "score_location": (families + 1,),
                "score_scale": (families + 1,),
                # 1 for a family whose score does not count
                "left_out": (families,),
            },
        )
        self.reads_layers = reads_layers

    def raw_scores(self, numbers: Tensor) -> Tensor:
        """(B, P) -> (B, D + 1), of each family and, last, of the distance, each on its own scale."""
        standard = ((numbers - self.location) / self.scale).clamp(-FARTHEST, FARTHEST)
        distance = (standard @ self.whitening.T).pow(2).mean(1, keepdim=True).clamp_min(1e-6).log() / 2
        return torch.cat([standard @ self.directions.T + self.offsets, distance], 1)

    def largest(self, scores: Tensor) -> Tensor:
        used = torch.cat([self.left_out == 0, self.left_out.new_ones(1, dtype=torch.bool)])
        return scores.masked_fill(~used, -torch.inf).amax(1)

    def forward(self, numbers: Tensor) -> Tensor:
        """The score of damage: (B, P) -> (B,). Numbers that are not known (NaN) are those of the cleanest sample."""
        unknown = numbers.isnan().any(1)
        scores = (self.raw_scores(numbers.nan_to_num(0)) - self.score_location) / self.score_scale
        return self.largest(scores).masked_fill(unknown, -torch.inf)


class Agreement(Conformal):
    """What calibration knows of the consistency of clean pairs; its score is minus the consistency.

    Args:
        sizes: F of each modality's content.
        components: K.
    """

    def __init__(self, sizes: Sequence[int], components: int):
        shapes = map_shapes(sizes, components)  # to what it shares with the other modality
        # whether the consistency is the canonical one, and whether it tells mismatched pairs at all
        super().__init__(1, {**shapes, **dict.fromkeys(("canonical", "informative"), ())})

    def shared(self, index: int, content: Tensor) -> Tensor:
        """What modality `index` says of what it shares with the other one: (B, F) -> (B, K)."""
        return mapped(self, index, content)

    def fit_shared(self, contents: Sequence[Tensor]) -> None:
        """Fits what the modalities share, from the contents (n, F) of each, of the same samples."""
        first, second = (standardised(self, index, content) for index, content in enumerate(contents))
        components = self.get_buffer("0_map").shape[1]
        for index, mapping in enumerate(fit_canonical(first, second, components=components)):
            keep_map(self, index, mapping)

    def p_match(self, consistency: Tensor, modality_mask: Tensor) -> Tensor:
        """Its p-value, see [`ModalitySignals`]: (B, M). 1 before calibration, where consistency tells nothing, and
        where fewer than two modalities are present."""
        known = (self.informative > 0) & (modality_mask.sum(1, keepdim=True) > 1)
        return self.p_value(-consistency).where(known, 1)


class JointAgreement(Conformal):
    """What calibration knows of how far clean pairs agree by two numbers together: their consistency, and what the
    backbone itself says of it ([`ModalityFeatures.gain`]). Its score is minus the log-odds that a pair belongs
    together, but for a constant."""

    def __init__(self):
        super().__init__(1, {"coefficients": (2,)})

    def fit_numbers(self, matched: Tensor, swapped: Tensor) -> None:
        """Fits what both numbers are worth, from those of pairs (n, 2) and of the same images with other texts."""
        numbers = torch.cat([matched, swapped])
        location, scale = numbers.mean(0), numbers.std(0).clamp_min(1e-6)
        targets = torch.cat([torch.ones(len(matched)), torch.zeros(len(swapped))])
        even = torch.full((len(numbers),), 1 / len(numbers))
        self.coefficients.copy_(fit_logistic((numbers - location) / scale, targets, even, ridge=1e-3)[:-1] / scale)

    def forward(self, numbers: Tensor) -> Tensor:
        """The score: (n, 2) -> (n,)."""
        return -numbers @ self.coefficients
