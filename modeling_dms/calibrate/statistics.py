"""What calibration knows: how each modality looks on clean data, and how far clean pairs agree.

Buffers that travel with the checkpoint, and what is read off them at inference. `fit` fills them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init

from modeling_dms.configuration.configuration_dms import DMSConfig
from modeling_dms.evidence.typicality import log_distances
from modeling_dms.observe.prompt import ModalityFeatures
from modeling_dms.weigh.reliability import reliability_numbers
from modeling_dms.weigh.second_look import FIRST_TOKENS


SCALARS = ("confidence", "uncertainty", "energy")
# how many clean samples a p-value is counted among, and how far, in clean standard deviations, one number counts
REMEMBERED, FARTHEST = 1000, 30.0
# scores are measured from the point that this share of the clean ones exceeds, by how far those do on average; and the
# least p-value there is
TAIL, LEAST_P = 0.05, 1e-30
# share of clean texts that are odd enough within their prompts to be read once more, alone
LOOKED_AT = 0.1


class Statistics(nn.Module):
    """Buffers that travel with the checkpoint and stay float32.

    Args:
        shapes: by name; those that end in a name of `starts_at_one` are 1 before calibration, the others 0.
    """

    starts_at_one = ("scale", "variance", "residual")

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        for name, shape in shapes.items():
            # whatever precision a model is made in
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
        self.reset()

    def reset(self) -> None:
        """Back to the state before calibration."""
        for name, buffer in self.named_buffers():
            (init.ones_ if name.endswith(self.starts_at_one) else init.zeros_)(buffer)

    def _apply(self, fn, recurse=True):
        # casting a model to half precision must not blunt thresholds: buffers follow the device alone
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, old in before.items():
            if not old.is_meta:
                self._buffers[name] = old.to(device=getattr(self, name).device, dtype=torch.float32)
        return self


class ModalityCalibration(Statistics):
    """Clean statistics of the layers of one modality, and of its scalar signals.

    Args:
        layers: L.
        size: F, statistics per layer.
        components: K.
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor
    variance: Tensor
    residual: Tensor
    distance_low: Tensor
    distance_high: Tensor
    scalar_location: Tensor
    scalar_scale: Tensor
    level: Tensor

    def __init__(self, layers: int, size: int, components: int):
        super().__init__(
            {
                "mean": (layers, size),
                "scale": (layers, size),
                "basis": (layers, size, components),
                "variance": (layers, components),
                "residual": (layers,),
                "distance_low": (2 * layers,),
                "distance_high": (2 * layers,),
                "scalar_location": (len(SCALARS),),
                "scalar_scale": (len(SCALARS),),
                # 0 before calibration, then the level reached: 1 or 2
                "level": (),
            }
        )

    @property
    def fitted(self) -> dict[str, Tensor]:
        """The clean statistics, as `typicality` takes them."""
        return {name: getattr(self, name) for name in ("mean", "scale", "basis", "variance", "residual")}

    def standardize(self, scalars: Tensor) -> Tensor:
        """Scalar signals (B, 3) over their clean location and scale, cut off at 10 either way."""
        return ((scalars - self.scalar_location) / self.scalar_scale).clamp(-10, 10)

    def typicality(self, distances: Tensor) -> Tensor:
        """-log(max(1, d / q)), the lowest over layers and distances; for those below the closest clean ones likewise.

        Args:
            distances: (B, 2 L), logarithms.

        Returns:
            (B,), at most 0.
        """
        inside = torch.minimum(self.distance_high - distances, distances - self.distance_low)
        return inside.clamp_max(0).amin(1)


class Conformal(Statistics):
    """Scores of clean samples that took no part in the fit of what scores them: what a score is compared with.

    Args:
        columns: C, scores of each sample.
    """

    clean: Tensor
    count: Tensor

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

    location: Tensor
    scale: Tensor
    whitening: Tensor
    directions: Tensor
    offsets: Tensor
    score_location: Tensor
    score_scale: Tensor
    left_out: Tensor

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

    canonical: Tensor
    informative: Tensor

    def __init__(self, sizes: Sequence[int], components: int):
        shapes: dict[str, tuple[int, ...]] = {}
        for index, size in enumerate(sizes):
            # location and scale of the content, and its map to what it shares with the other modality
            shapes |= {f"{index}_location": (size,), f"{index}_scale": (size,), f"{index}_map": (size, components)}
        # whether the consistency is the canonical one, and whether it tells mismatched pairs at all
        super().__init__(1, {**shapes, **dict.fromkeys(("canonical", "informative"), ())})

    def shared(self, index: int, content: Tensor) -> Tensor:
        """What modality `index` says of what it shares with the other one: (B, F) -> (B, K)."""
        location, scale = self.get_buffer(f"{index}_location"), self.get_buffer(f"{index}_scale")
        return ((content.float() - location) / scale) @ self.get_buffer(f"{index}_map")

    def p_match(self, consistency: Tensor, modality_mask: Tensor) -> Tensor:
        """Its p-value, see [`ModalitySignals`]: (B, M). 1 before calibration, where consistency tells nothing, and
        where fewer than two modalities are present."""
        known = (self.informative > 0) & (modality_mask.sum(1, keepdim=True) > 1)
        return self.p_value(-consistency).where(known, 1)


class Reliability(Statistics):
    """What calibration knows of how far answers can be relied on, see `weigh.reliability`.

    Args:
        modalities: M.
    """

    location: Tensor
    scale: Tensor
    coefficients: Tensor
    look_location: Tensor
    look_scale: Tensor
    look_coefficients: Tensor
    kept: Tensor
    count: Tensor

    def __init__(self, modalities: int):
        first, look = 2 + modalities, FIRST_TOKENS + modalities + 1
        super().__init__(
            {
                "location": (first,),
                "scale": (first,),
                "coefficients": (first + 1,),
                # of a second look, for the answers to the image alone, to the text alone and to both
                "look_location": (look,),
                "look_scale": (look,),
                "look_coefficients": (3, look + 1),
                # of samples that calibration damaged and took no account of: reliability, and whether the answer
                # agrees, without a second look and with it, and which sample it is a copy of
                "kept": (REMEMBERED, 5),
                "count": (),
            }
        )

    def forward(self, sureness: Tensor, p_values: Tensor) -> Tensor:
        """Of answers, (B,) in [0, 1].

        Args:
            sureness: (B,), the probability of the likeliest first token.
            p_values: (B, M + 1), of each modality, and of the pair.
        """
        standard = (reliability_numbers(sureness, p_values) - self.location) / self.scale
        return (standard @ self.coefficients[:-1] + self.coefficients[-1]).sigmoid()

    def looked(self, numbers: Tensor, p_values: Tensor) -> Tensor:
        """Of the answers to the image alone, to the text alone and to both, (B, 3) in [0, 1].

        Args:
            numbers: (B, `FIRST_TOKENS`), of `first_tokens_compared`.
            p_values: (B, M + 1), as of `forward`.
        """
        standard = (reliability_numbers(numbers, p_values) - self.look_location) / self.look_scale
        return (standard @ self.look_coefficients[:, :-1].T + self.look_coefficients[:, -1]).sigmoid()


class PixelRange(Statistics):
    """The lowest and the highest value that clean pictures have in each channel: of black and of white."""

    location: Tensor
    scale: Tensor

    def __init__(self):
        super().__init__({"location": (3,), "scale": (3,)})

    def unit(self, pictures: Tensor) -> Tensor:
        """(n, 3, H, W), as the processor scales them -> black is 0 and white is 1."""
        return (pictures.float() - self.location.view(3, 1, 1)) / self.scale.view(3, 1, 1)

    def scaled(self, pictures: Tensor) -> Tensor:
        """The reverse of `unit`."""
        return pictures * self.scale.view(3, 1, 1) + self.location.view(3, 1, 1)


class Calibration(nn.Module):
    """Calibrated statistics of all modalities and of their agreement.

    Args:
        sizes: (L, F) of each modality.
        evidence: of each modality, what [`Detector`] takes.
        contents: F of each modality's content.
        in_prompt: the modality whose tokens are also read within the prompt, as the last of `modalities` and
            `detectors`; `None` for none.
    """

    modalities: Sequence[ModalityCalibration]
    detectors: Sequence[Detector]

    def __init__(
        self,
        config: DMSConfig,
        sizes: Sequence[tuple[int, int]],
        evidence: Sequence[tuple[int, int, bool]],
        contents: Sequence[int],
        in_prompt: int | None = None,
    ):
        super().__init__()
        self.config, self.in_prompt, self.count = config, in_prompt, len(sizes)
        again = [] if in_prompt is None else [in_prompt]
        of = [*range(len(sizes)), *again]
        modalities = [ModalityCalibration(*sizes[index], config.subspace_size) for index in of]
        self.modalities = nn.ModuleList(modalities)  # type: ignore[assignment]
        self.detectors = nn.ModuleList(Detector(*evidence[index]) for index in of)  # type: ignore[assignment]
        self.agreement = Agreement(contents, config.subspace_size)
        self.pixels = PixelRange()
        self.reliability = Reliability(len(sizes))

    @property
    def is_calibrated(self) -> bool:
        """Whether `calibrate` has run (or a calibrated checkpoint was loaded)."""
        return all(bool(detector.count > 0) for detector in self.detectors[: self.count])

    @property
    def reads_prompts(self) -> bool:
        """Whether it tells suspicious texts within their prompts."""
        return self.in_prompt is not None and bool(self.detectors[-1].count > 0)

    def distances(self, index: int, statistics: Tensor) -> Tensor:
        """`log_distances` of modality `index`: (B, L, F) -> (B, 2 L)."""
        return log_distances(statistics, self.modalities[index].fitted).flatten(1)

    def numbers(self, index: int, distances: Tensor | None, numbers: Tensor | None) -> Tensor:
        """What the detector of modality `index` reads: (B, P).

        Args:
            distances: (B, 2 L), of the layers; not needed where it does not read them.
            numbers: `ModalityFeatures.numbers`.
        """
        parts = [numbers, distances if self.detectors[index].reads_layers else None]
        return torch.cat([part for part in parts if part is not None], 1)

    def _scores(self, index: int, features: ModalityFeatures) -> tuple[Tensor, Tensor]:
        """The score of damage (B,), and the distances (B, 2 L)."""
        distances = self.distances(index, features.statistics.float())
        return self.detectors[index](self.numbers(index, distances, features.numbers)), distances

    def suspicious(self, features: ModalityFeatures) -> Tensor:
        """Which texts, read within their prompts, are to be read alone: (B,), bool."""
        return self.detectors[-1].p_value(self._scores(-1, features)[0]) <= LOOKED_AT

    def judge(self, index: int, features: ModalityFeatures) -> tuple[Tensor, Tensor]:
        """`typicality` and `p_clean` of modality `index`, (B,) each, see [`ModalitySignals`].

        A text that was read within its prompt is judged by that, unless it was suspicious and read alone as well. Both
        p-values are one: of clean texts a share of `LOOKED_AT` is suspicious, and the p-values of the others are above
        that.
        """
        which = -1 if features.in_prompt else index
        score, distances = self._scores(which, features)
        found = [self.modalities[which].typicality(distances), self.detectors[which].p_value(score)]
        if features.closer is not None:
            rows, alone = features.closer
            found = [
                every.index_copy(0, rows, own) for every, own in zip(found, self.judge(index, alone), strict=True)
            ]
        return tuple(found)  # type: ignore[return-value]
