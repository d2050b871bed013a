"""What calibration knows: clean statistics of each modality (level 1), a map from them to damage (level 2), and how
far clean pairs agree.

Buffers that travel with the checkpoint, and what is read off them at inference. `calibration_fit` fills them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init

from modeling_dms.configuration.configuration_dms import DMSConfig
from modeling_dms.typicality import log_distances, whiten


SCALARS = ("confidence", "uncertainty", "energy")


class Statistics(nn.Module):
    """Buffers that travel with the checkpoint and stay float32.

    Args:
        shapes: by name; those that end in a name of `starts_at_one` are 1 before calibration, the others 0.
    """

    starts_at_one = ("scale", "variance", "residual")

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
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
    """Calibrated statistics of one modality.

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
    distance_location: Tensor
    distance_scale: Tensor
    distance_low: Tensor
    distance_high: Tensor
    scalar_location: Tensor
    scalar_scale: Tensor
    coefficients: Tensor
    intercept: Tensor
    threshold: Tensor
    arbitration_threshold: Tensor
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
                "distance_location": (layers, 2),
                "distance_scale": (layers, 2),
                "distance_low": (layers, 2),
                "distance_high": (layers, 2),
                "scalar_location": (len(SCALARS),),
                "scalar_scale": (len(SCALARS),),
                "coefficients": (4 * layers + 2,),
                "intercept": (),
                "threshold": (),
                # the lower threshold that counts where the modalities disagree
                "arbitration_threshold": (),
                "canonical": (components, components),
                # 0 before calibration, then the level reached: 1 or 2
                "level": (),
            }
        )

    @property
    def gaussian(self) -> dict[str, Tensor]:
        """The clean statistics, as `typicality` takes them."""
        return {name: getattr(self, name) for name in ("mean", "scale", "basis", "variance", "residual")}

    def standardize(self, scalars: Tensor) -> Tensor:
        """Scalar signals (B, 3) over their clean location and scale."""
        return (scalars - self.scalar_location) / self.scalar_scale

    def detector_inputs(self, distances: Tensor, scalars: Tensor) -> Tensor:
        """Inputs of the logistic map: how far too far and too close each distance is, then confidence and uncertainty.

        Args:
            distances: (B, L, 2) from `log_distances`.
            scalars: (B, 3).

        Returns:
            (B, 4 L + 2), in clean standard deviations, cut off at 10: one broken feature must not outvote the rest.
        """
        deviation = ((distances - self.distance_location) / self.distance_scale).flatten(1)
        sided = torch.cat([deviation.clamp(0, 10), (-deviation).clamp(0, 10)], dim=1)
        return torch.cat([sided, self.standardize(scalars)[:, :2].clamp(-10, 10)], dim=1)

    @property
    def deviations(self) -> int:
        """How many of the detector's inputs, the first ones, are deviations of distances: 4 L."""
        return 2 * self.distance_location.numel()

    def typicality(self, distances: Tensor) -> Tensor:
        """z = log(max(1, d / q)) over layers and distances, or how far below the closest clean ones.

        Args:
            distances: (B, L, 2).

        Returns:
            (B,).
        """
        far, near = distances - self.distance_high, self.distance_low - distances
        return torch.maximum(far, near).clamp_min(0).amax((1, 2))

    def damage(self, distances: Tensor, scalars: Tensor) -> Tensor:
        """Log-odds of damage (level 2) or the largest standardised deviation (level 1), minus the threshold: (B,).

        Above 0 is flagged; `-inf` before calibration.
        """
        inputs = self.detector_inputs(distances, scalars)
        odds = inputs @ self.coefficients + self.intercept
        deviation = inputs[:, : self.deviations].amax(1)
        value = torch.where(self.level == 2, odds, deviation) - self.threshold
        return torch.where(self.level > 0, value, -torch.inf)


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


class Calibration(nn.Module):
    """Calibrated statistics of all modalities and of their agreement.

    Args:
        sizes: (L, F) of each modality.
    """

    modalities: Sequence[ModalityCalibration]

    def __init__(self, config: DMSConfig, sizes: Sequence[tuple[int, int]]):
        super().__init__()
        self.config = config
        modalities = [ModalityCalibration(*size, config.subspace_size) for size in sizes]
        self.modalities = nn.ModuleList(modalities)  # type: ignore[assignment]
        self.agreement = Agreement()

    @property
    def is_calibrated(self) -> bool:
        """Whether `calibrate` has run (or a calibrated checkpoint was loaded)."""
        return all(bool(modality.level > 0) for modality in self.modalities)

    def distances(self, index: int, statistics: Tensor) -> Tensor:
        """`log_distances` of modality `index`: (B, L, F) -> (B, L, 2)."""
        return log_distances(statistics, self.modalities[index].gaussian)

    def shared(self, index: int, statistics: Tensor) -> Tensor:
        """Canonical coordinates of modality `index`, from its deepest layer: (B, L, F) -> (B, K)."""
        modality = self.modalities[index]
        return whiten(statistics, modality.gaussian)[0][:, -1] @ modality.canonical
