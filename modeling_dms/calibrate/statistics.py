"""What calibration knows: clean statistics of each modality (level 1), a map from them to damage (level 2), and how
far clean pairs agree.

Buffers that travel with the checkpoint, and what is read off them at inference. `calibration_fit` fills them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from modeling_dms.configuration.configuration_dms import DMSConfig
from modeling_dms.evidence.typicality import MEMORY, canonical_coordinates, evidence, unfamiliarity


# buffers of what calibration remembers of clean samples
REMEMBERED = ("memory_bank", "unfamiliarity_location", "unfamiliarity_scale")
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
    emptiness_scale: Tensor
    threshold: Tensor
    suspicion_threshold: Tensor
    canonical: Tensor
    memory_bank: Tensor
    unfamiliarity_location: Tensor
    unfamiliarity_scale: Tensor
    level: Tensor

    def __init__(self, layers: int, size: int, components: int):
        super().__init__(
            {
                "mean": (layers, size),
                "scale": (layers, size),
                "basis": (layers, size, components),
                "variance": (layers, components),
                "residual": (layers,),
                "distance_location": (2 * layers + 1,),
                "distance_scale": (2 * layers + 1,),
                "distance_low": (2 * layers + 1,),
                "distance_high": (2 * layers + 1,),
                "scalar_location": (len(SCALARS),),
                "scalar_scale": (len(SCALARS),),
                "coefficients": (4 * layers + 4,),
                "intercept": (),
                # makes a clean sample as far from being called empty as from being called damaged
                "emptiness_scale": (),
                # of the log-odds and of emptiness
                "threshold": (2,),
                # the same with unfamiliarity, where the modalities disagree
                "suspicion_threshold": (2,),
                "canonical": (components, components),
                # canonical coordinates of clean samples; all zeros if none are remembered
                "memory_bank": (MEMORY, components),
                "unfamiliarity_location": (2,),
                "unfamiliarity_scale": (2,),
                # 0 before calibration, then the level reached: 1 or 2
                "level": (),
            }
        )

    @property
    def fitted(self) -> dict[str, Tensor]:
        """The clean statistics, as `typicality` takes them."""
        return {name: getattr(self, name) for name in ("mean", "scale", "basis", "variance", "residual", "canonical")}

    def unfamiliarity(self, shared: Tensor) -> Tensor:
        """`unfamiliarity` by the memory bank: (B, K) -> (B, 2), 0 where no clean samples are remembered."""
        return self.memory_bank.any() * unfamiliarity(shared, {name: getattr(self, name) for name in REMEMBERED})

    def standardize(self, scalars: Tensor) -> Tensor:
        """Scalar signals (B, 3) over their clean location and scale."""
        return (scalars - self.scalar_location) / self.scalar_scale

    def detector_inputs(self, distances: Tensor, scalars: Tensor) -> Tensor:
        """Inputs of the logistic map: how far too far and too close each distance is, then confidence and uncertainty.

        Args:
            distances: (B, 2 L + 1) from `evidence`.
            scalars: (B, 3).

        Returns:
            (B, 4 L + 4), in clean standard deviations, cut off at 10: one broken feature must not outvote the rest.
        """
        deviation = (distances - self.distance_location) / self.distance_scale
        sided = torch.cat([deviation.clamp(0, 10), (-deviation).clamp(0, 10)], dim=1)
        return torch.cat([sided, self.standardize(scalars)[:, :2].clamp(-10, 10)], dim=1)

    def scheduler_inputs(self, distances: Tensor, scalars: Tensor, unfamiliarity: Tensor) -> Tensor:
        """What the learned scheduler sees of this modality: `detector_inputs`, and the standardised energy.

        Where clean samples are remembered, unfamiliarity takes the place of the deviations, filled up with zeros: by
        deviations a scheduler learns the damage of its training, and takes unknown damage for a clean image beside a
        wrong context.

        Args:
            distances: (B, 2 L + 1).
            scalars: (B, 3).
            unfamiliarity: (B, 2).

        Returns:
            (B, `scheduler_size`).
        """
        inputs = self.detector_inputs(distances, scalars)
        # before calibration nothing is known of how far is far
        sided = inputs[:, : self.deviations] * (self.level > 0)
        sided = torch.where(self.memory_bank.any(), F.pad(unfamiliarity, (0, self.deviations - 2)), sided)
        energy = self.standardize(scalars)[:, 2:].clamp(-10, 10)
        return torch.cat([sided, inputs[:, self.deviations :], energy], dim=1)

    @property
    def scheduler_size(self) -> int:
        """How many numbers `scheduler_inputs` returns: 4 L + 5."""
        return self.coefficients.numel() + 1

    @property
    def deviations(self) -> int:
        """How many of the detector's inputs, the first ones, are deviations of distances: 4 L + 2."""
        return 2 * self.distance_location.numel()

    def typicality(self, distances: Tensor) -> Tensor:
        """z = log(max(1, d / q)) over layers and distances, or how far below the closest clean ones.

        Args:
            distances: (B, 2 L + 1).

        Returns:
            (B,).
        """
        far, near = distances - self.distance_high, self.distance_low - distances
        return torch.maximum(far, near).clamp_min(0).amax(1)

    def criteria(self, distances: Tensor, scalars: Tensor) -> Tensor:
        """The two criteria of damage: (B, 2).

        The log-odds of damage (level 2) or the largest deviation (level 1); and emptiness, by how much the modality
        has too little to say that the other one could agree with. Emptiness stands by itself: few of the self-made
        corruptions leave a modality empty, so a map fitted on all of them would not heed it.
        """
        inputs = self.detector_inputs(distances, scalars)
        odds = inputs @ self.coefficients + self.intercept
        deviation = inputs[:, : self.deviations].amax(1)
        first = torch.where(self.level == 2, odds, deviation)
        return torch.stack([first, self.emptiness(distances)], 1)

    def emptiness(self, distances: Tensor) -> Tensor:
        """How much too short the canonical coordinates are; `-inf` where none were fitted: (B, 2 L + 1) -> (B,)."""
        short = (self.distance_location[-1] - distances[:, -1]) / self.distance_scale[-1]
        return torch.where(self.canonical.any(), short * self.emptiness_scale, -torch.inf)

    def damage(self, distances: Tensor, scalars: Tensor, unfamiliarity: Tensor) -> tuple[Tensor, Tensor]:
        """By how much the criteria exceed their thresholds; and what counts in a disagreement, where unfamiliarity is
        added to the first criterion and the thresholds are others: (B,) each.

        Args:
            unfamiliarity: (B, 2).

        Returns:
            Above 0 is flagged; `-inf` before calibration. What is damaged is suspicious too.
        """
        criteria = self.criteria(distances, scalars)
        damage = (criteria - self.threshold).amax(1)
        suspicion = (with_unfamiliarity(criteria, unfamiliarity) - self.suspicion_threshold).amax(1)
        found = (damage, torch.maximum(damage, suspicion))
        return tuple(torch.where(self.level > 0, value, -torch.inf) for value in found)  # type: ignore[return-value]

    def cleanness(self, suspicion: Tensor) -> Tensor:
        """P(clean) - P(damaged) by the log-odds behind suspicion, or how far it lies below its threshold if that is
        more: a map that tells little apart calls nothing clean.

        Args:
            suspicion: (B,).

        Returns:
            (B,), from 0 to 1.
        """
        odds = suspicion + self.suspicion_threshold[0] * (self.level == 2)
        return torch.maximum(torch.tanh(-odds / 2), -suspicion).clamp(0, 1)


def with_unfamiliarity(criteria: Tensor, unfamiliarity: Tensor) -> Tensor:
    """Criteria of damage (n, 2), the first one plus the unfamiliarity by Euclidean distance, of (n, 2)."""
    return criteria + F.pad(unfamiliarity[:, 1:], (0, 1))


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
        """`evidence` of modality `index`: (B, L, F) -> (B, 2 L + 1)."""
        return evidence(statistics, self.modalities[index].fitted)

    def shared(self, index: int, statistics: Tensor) -> Tensor:
        """`canonical_coordinates` of modality `index`: (B, L, F) -> (B, K)."""
        return canonical_coordinates(statistics, self.modalities[index].fitted)
