"""What calibration knows: how each modality looks on clean data, and how far clean pairs agree.

Buffers that travel with the checkpoint, and what is read off them at inference. `fit` fills them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init

from modeling_dms.configuration.configuration_dms import DMSConfig
from modeling_dms.evidence.typicality import canonical_coordinates, log_distances


SCALARS = ("confidence", "uncertainty", "energy")
# how many clean samples a p-value is counted among, and how far, in clean standard deviations, one number counts
REMEMBERED, FARTHEST = 1000, 30.0


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
    canonical: Tensor
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
                "canonical": (components, components),
                # 0 before calibration, then the level reached: 1 or 2
                "level": (),
            }
        )

    @property
    def fitted(self) -> dict[str, Tensor]:
        """The clean statistics, as `typicality` takes them."""
        return {name: getattr(self, name) for name in ("mean", "scale", "basis", "variance", "residual", "canonical")}

    def standardize(self, scalars: Tensor) -> Tensor:
        """Scalar signals (B, 3) over their clean location and scale, cut off at 10 either way."""
        return ((scalars - self.scalar_location) / self.scalar_scale).clamp(-10, 10)

    def typicality(self, distances: Tensor) -> Tensor:
        """z = log(max(1, d / q)) over layers and distances, or how far below the closest clean ones.

        Args:
            distances: (B, 2 L).

        Returns:
            (B,).
        """
        far, near = distances - self.distance_high, self.distance_low - distances
        return torch.maximum(far, near).clamp_min(0).amax(1)


class Detector(Statistics):
    """Tells the damaged samples of one modality from clean ones by numbers that were read of it.

    Scores are the log-odds of each family of self-made damage and, for what resembles none of them, the logarithm of
    the Mahalanobis distance from the clean samples. Each is measured in how far clean samples spread; the largest
    counts.

    Args:
        size: P, numbers of each sample.
        families: D, of self-made damage.
    """

    location: Tensor
    scale: Tensor
    whitening: Tensor
    directions: Tensor
    offsets: Tensor
    score_location: Tensor
    score_scale: Tensor
    threshold: Tensor
    suspicion_threshold: Tensor
    clean: Tensor
    count: Tensor

    def __init__(self, size: int, families: int):
        super().__init__(
            {
                "location": (size,),
                "scale": (size,),
                # of the standardised numbers; transforms clean ones into uncorrelated ones
                "whitening": (size, size),
                "directions": (families, size),
                "offsets": (families,),
                "score_location": (families + 1,),
                "score_scale": (families + 1,),
                # beyond which a sample is flagged, alone or where the modalities disagree
                "threshold": (),
                "suspicion_threshold": (),
                # scores of clean samples that took no part in the fit, in order; of `count` of them
                "clean": (REMEMBERED,),
                "count": (),
            }
        )

    def scores(self, numbers: Tensor) -> Tensor:
        """(B, P) -> (B, D + 1), of each family and, last, of the distance."""
        standard = ((numbers - self.location) / self.scale).clamp(-FARTHEST, FARTHEST)
        distance = (standard @ self.whitening.T).pow(2).mean(1, keepdim=True).clamp_min(1e-6).log() / 2
        return torch.cat([standard @ self.directions.T + self.offsets, distance], 1)

    def forward(self, numbers: Tensor) -> Tensor:
        """The score of damage: (B, P) -> (B,)."""
        return ((self.scores(numbers) - self.score_location) / self.score_scale).amax(1)

    def p_clean(self, score: Tensor) -> Tensor:
        """The conformal p-value: the share of clean samples, this one among them, that look at least as damaged.

        A clean sample has p <= a with probability a at most (Vovk et al., "Algorithmic Learning in a Random World",
        2005). The clean samples were scored by fits that they took no part in.

        Args:
            score: (B,).

        Returns:
            (B,), above 0; 1 before calibration.
        """
        places = torch.arange(len(self.clean), device=score.device) < self.count
        above = ((self.clean >= score[:, None]) & places).sum(1)
        return (1 + above) / (1 + self.count)


class Agreement(Statistics):
    """What calibration knows of the consistency of clean pairs."""

    location: Tensor
    scale: Tensor
    threshold: Tensor
    arbitration_threshold: Tensor
    canonical: Tensor
    informative: Tensor

    def __init__(self):
        names = ("location", "scale", "threshold", "arbitration_threshold", "canonical", "informative")
        super().__init__(dict.fromkeys(names, ()))

    def conflict(self, consistency: Tensor, modality_mask: Tensor) -> Tensor:
        """Disagreement in clean standard deviations beyond the threshold: (B, M), above 0 is flagged.

        `-inf` before calibration, where consistency tells nothing, and where fewer than two modalities are present.
        """
        disagreement = (self.location - consistency) / self.scale - self.threshold
        known = (self.informative > 0) & (modality_mask.sum(1, keepdim=True) > 1)
        return torch.where(known, disagreement, -torch.inf)


class PixelRange(Statistics):
    """The lowest and the highest value that clean pictures have in each channel: of black and of white."""

    location: Tensor
    scale: Tensor

    def __init__(self):
        super().__init__({"location": (3,), "scale": (3,)})

    def unit(self, pictures: Tensor) -> Tensor:
        """(n, 3, H, W), as the processor scales them -> black is 0 and white is 1."""
        return (pictures.float() - self.location.view(3, 1, 1)) / self.scale.view(3, 1, 1)


class Calibration(nn.Module):
    """Calibrated statistics of all modalities and of their agreement.

    Args:
        sizes: (L, F) of each modality.
        evidence: (P, D) of each modality, see [`Detector`].
    """

    modalities: Sequence[ModalityCalibration]
    detectors: Sequence[Detector]

    def __init__(self, config: DMSConfig, sizes: Sequence[tuple[int, int]], evidence: Sequence[tuple[int, int]]):
        super().__init__()
        self.config = config
        modalities = [ModalityCalibration(*size, config.subspace_size) for size in sizes]
        self.modalities = nn.ModuleList(modalities)  # type: ignore[assignment]
        self.detectors = nn.ModuleList(Detector(*size) for size in evidence)  # type: ignore[assignment]
        self.agreement = Agreement()
        self.pixels = PixelRange()

    @property
    def is_calibrated(self) -> bool:
        """Whether `calibrate` has run (or a calibrated checkpoint was loaded)."""
        return all(bool(modality.level > 0) for modality in self.modalities)

    def distances(self, index: int, statistics: Tensor) -> Tensor:
        """`log_distances` of modality `index`: (B, L, F) -> (B, 2 L)."""
        return log_distances(statistics, self.modalities[index].fitted).flatten(1)

    def shared(self, index: int, statistics: Tensor) -> Tensor:
        """`canonical_coordinates` of modality `index`: (B, L, F) -> (B, K)."""
        return canonical_coordinates(statistics, self.modalities[index].fitted)
