"""What calibration learns from clean samples, without labels: clean statistics (level 1) and a map from them to damage
(level 2).

Level 2 corrupts the calibration samples itself (`self_corruption`) and fits a logistic map from how far a sample lies
outside the clean data to "this modality is damaged". Everything is cross-fitted: no sample is judged by statistics it
took part in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import initialization as init

from modeling_dms.configuration.configuration_dms import MODALITIES, DMSConfig
from modeling_dms.typicality import auroc, fit_canonical, fit_gaussian, fit_logistic, log_distances, whiten


MIN_SAMPLES = 50
FOLDS = 5
# an area under the ROC curve closer to one half than this counts as uninformative
UNINFORMATIVE = 0.05
SCALARS = ("confidence", "uncertainty", "energy")


@dataclass
class ModalityRecord:
    """One modality of n samples: statistics (n, L, F), scalar signals (n, 3) in the order of `SCALARS`, h (n, d_s)."""

    statistics: Tensor
    scalars: Tensor
    representations: Tensor

    def __getitem__(self, rows: Tensor) -> "ModalityRecord":
        return ModalityRecord(self.statistics[rows], self.scalars[rows], self.representations[rows])

    @staticmethod
    def cat(records: Sequence["ModalityRecord"]) -> "ModalityRecord":
        """The samples of several records, one after the other."""
        return ModalityRecord(
            torch.cat([r.statistics for r in records]),
            torch.cat([r.scalars for r in records]),
            torch.cat([r.representations for r in records]),
        )


@dataclass
class CalibrationReport:
    """What `calibrate` found. Print it for a table.

    Attributes:
        samples: clean samples used, by modality.
        signals: by modality, by signal: `auroc` of clean against self-made corruptions, and `coefficient`, its share
            of the logistic map (the sum of its absolute coefficients).
        families: by modality, by corruption family: AUROC of the damage log-odds.
        false_alarm_rate: the rate asked for.
        achieved_false_alarm_rate: by modality, measured on clean samples that set neither statistics nor threshold.
        mismatch_auroc: how well the consistency tells a matched pair from another sample's text.
        consistency: `"canonical"` or `"representations"`, whichever told them apart better.
    """

    samples: dict[str, int] = field(default_factory=dict)
    signals: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    families: dict[str, dict[str, float]] = field(default_factory=dict)
    false_alarm_rate: float = 0.0
    achieved_false_alarm_rate: dict[str, float] = field(default_factory=dict)
    mismatch_auroc: float | None = None
    consistency: str = "representations"

    def __str__(self) -> str:
        lines = [f"{'modality':<9} {'signal':<22} {'AUROC':>6} {'coefficient':>12}"]
        for modality, signals in self.signals.items():
            for name, row in signals.items():
                lines.append(f"{modality:<9} {name:<22} {row['auroc']:>6.3f} {row['coefficient']:>12.3f}")
            for name, value in self.families.get(modality, {}).items():
                lines.append(f"{modality:<9} {'  damage by ' + name:<22} {value:>6.3f}")
        for modality, achieved in self.achieved_false_alarm_rate.items():
            lines.append(
                f"{modality}: {self.samples[modality]} clean samples, flagged {achieved:.3f} "
                f"(asked for {self.false_alarm_rate:.3f})"
            )
        if self.mismatch_auroc is not None:
            lines.append(f"consistency ({self.consistency}): AUROC {self.mismatch_auroc:.3f} for mismatched pairs")
        return "\n".join(lines)


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
        inputs = detector_inputs(self, distances, scalars)
        odds = inputs @ self.coefficients + self.intercept
        deviation = inputs[:, : -len(SCALARS) + 1].amax(1)
        value = torch.where(self.level == 2, odds, deviation) - self.threshold
        return torch.where(self.level > 0, value, -torch.inf)


def detector_inputs(calibration: ModalityCalibration, distances: Tensor, scalars: Tensor) -> Tensor:
    """Inputs of the logistic map: how far too far and too close every distance is, then confidence and uncertainty.

    Args:
        distances: (B, L, 2) from `log_distances`.
        scalars: (B, 3).

    Returns:
        (B, 4 L + 2), in clean standard deviations, cut off at 10 so that one broken feature cannot outvote the others.
    """
    deviation = ((distances - calibration.distance_location) / calibration.distance_scale).flatten(1)
    sided = torch.cat([deviation.clamp(0, 10), (-deviation).clamp(0, 10)], dim=1)
    return torch.cat([sided, calibration.standardize(scalars)[:, :2].clamp(-10, 10)], dim=1)


class Agreement(Statistics):
    """What calibration knows of the consistency of clean pairs."""

    def __init__(self):
        super().__init__(dict.fromkeys(("location", "scale", "threshold", "canonical", "informative"), ()))

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

    def __init__(self, config: DMSConfig, sizes: Sequence[tuple[int, int]]):
        super().__init__()
        self.config = config
        self.modalities = nn.ModuleList(ModalityCalibration(*size, config.subspace_size) for size in sizes)
        self.agreement = Agreement()

    @property
    def is_calibrated(self) -> bool:
        """Whether `fit` has run (or a calibrated checkpoint was loaded)."""
        return all(bool(modality.level > 0) for modality in self.modalities)

    def distances(self, index: int, statistics: Tensor) -> Tensor:
        """`log_distances` of modality `index`: (B, L, F) -> (B, L, 2)."""
        return log_distances(statistics, self.modalities[index].gaussian)

    def shared(self, index: int, statistics: Tensor) -> Tensor:
        """Canonical coordinates of modality `index`, from its deepest layer: (B, L, F) -> (B, K)."""
        modality = self.modalities[index]
        return whiten(statistics, modality.gaussian)[0][:, -1] @ modality.canonical

    @torch.no_grad()
    def fit(
        self,
        clean: Sequence[ModalityRecord],
        corrupted: Sequence[dict[str, ModalityRecord]],
        present: Tensor,
        level: int = 2,
    ) -> CalibrationReport:
        """Fits everything from clean samples and their self-made corruptions.

        Args:
            clean: a record a modality, of the same n samples.
            corrupted: by modality and family, of the same samples.
            present: (n, M), which modality each sample has.
            level: 1 for clean statistics alone, 2 for the map to damage as well.

        Raises:
            ValueError: for fewer than 50 samples that have a modality, or features that are not finite.
        """
        report = CalibrationReport(false_alarm_rate=float(self.config.false_alarm_rate))
        generator = torch.Generator().manual_seed(self.config.mc_seed)
        folds = torch.randperm(len(present), generator=generator) % FOLDS
        for index, modality in enumerate(self.modalities):
            rows = present[:, index]
            if int(rows.sum()) < MIN_SAMPLES:
                raise ValueError(
                    f"the calibration data hold {int(rows.sum())} samples with {MODALITIES[index]}, "
                    f"at least {MIN_SAMPLES} are needed"
                )
            finite = clean[index][rows].statistics.isfinite().all() and clean[index][rows].scalars.isfinite().all()
            if not finite:
                raise ValueError(f"the calibration data give features of {MODALITIES[index]} that are not finite")
            families = {name: record[rows] for name, record in corrupted[index].items()}
            _fit_modality(modality, clean[index][rows], families, folds[rows], self.config, level, report, index)
        both = present.all(1)
        if len(self.modalities) == 2 and int(both.sum()) >= MIN_SAMPLES:
            self._fit_agreement([record[both] for record in clean], folds[both], report)
        return report

    def _fit_agreement(self, clean: Sequence[ModalityRecord], folds: Tensor, report: CalibrationReport) -> None:
        vision, text = clean
        other = torch.roll(torch.arange(len(folds)), len(folds) // 2)
        maps = fit_canonical(
            *(whiten(r.statistics, m.gaussian)[0][:, -1] for r, m in zip(clean, self.modalities, strict=True))
        )
        for modality, canonical in zip(self.modalities, maps, strict=True):
            modality.canonical.copy_(canonical)
        candidates = {"canonical": ([], []), "representations": ([], [])}
        order = []
        for fold in range(FOLDS):
            fit, held = folds != fold, folds == fold
            gaussians = [fit_gaussian(record.statistics[fit], self.config.subspace_size) for record in clean]
            seen = [whiten(r.statistics[fit], g)[0][:, -1] for r, g in zip(clean, gaussians, strict=True)]
            left, right = fit_canonical(*seen)
            first = whiten(vision.statistics[held], gaussians[0])[0][:, -1] @ left
            for kind, rows in enumerate((held, other[held])):
                second = whiten(text.statistics[rows], gaussians[1])[0][:, -1] @ right
                candidates["canonical"][kind].append(torch.cosine_similarity(first, second))
                cosine = torch.cosine_similarity(vision.representations[held], text.representations[rows])
                candidates["representations"][kind].append(cosine)
            order.append(held.nonzero()[:, 0])
        scores = {name: (torch.cat(matched), torch.cat(swapped)) for name, (matched, swapped) in candidates.items()}
        areas = {name: auroc(swapped, matched) for name, (matched, swapped) in scores.items()}
        best = max(areas, key=lambda name: areas[name])
        report.consistency, report.mismatch_auroc = best, areas[best]
        matched = scores[best][0]
        scale = matched.std().clamp_min(1e-6)
        self.agreement.location.copy_(matched.median())
        self.agreement.scale.copy_(scale)
        disagreement = (matched.median() - matched) / scale
        self.agreement.threshold.copy_(disagreement.quantile(1 - self.config.false_alarm_rate, interpolation="higher"))
        self.agreement.canonical.fill_(float(best == "canonical"))
        self.agreement.informative.fill_(float(areas[best] > 0.5 + UNINFORMATIVE))


def _fit_modality(
    modality: ModalityCalibration,
    clean: ModalityRecord,
    families: dict[str, ModalityRecord],
    folds: Tensor,
    config: DMSConfig,
    level: int,
    report: CalibrationReport,
    index: int,
) -> None:
    distances = torch.zeros(len(folds), *modality.distance_location.shape)
    corrupted = {name: torch.zeros_like(distances) for name in families}
    for fold in range(FOLDS):
        held = folds == fold
        gaussian = fit_gaussian(clean.statistics[~held], config.subspace_size)
        distances[held] = log_distances(clean.statistics[held], gaussian)
        for name, record in families.items():
            corrupted[name][held] = log_distances(record.statistics[held], gaussian)

    modality.reset()
    for name, value in fit_gaussian(clean.statistics, config.subspace_size).items():
        getattr(modality, name).copy_(value)
    modality.distance_location.copy_(distances.median(0).values)
    modality.distance_scale.copy_(distances.std(0).clamp_min(1e-3))
    tail = max(0.01, float(config.false_alarm_rate))
    modality.distance_low.copy_(distances.quantile(tail, 0))
    modality.distance_high.copy_(distances.quantile(1 - tail, 0))
    modality.scalar_location.copy_(clean.scalars.median(0).values)
    modality.scalar_scale.copy_(clean.scalars.std(0).clamp_min(1e-6))

    inputs = detector_inputs(modality, distances, clean.scalars)
    bad = {name: detector_inputs(modality, corrupted[name], families[name].scalars) for name in families}
    areas = torch.tensor([auroc(inputs[:, i], torch.cat(list(bad.values()))[:, i]) for i in range(inputs.shape[1])])
    informative = (areas - 0.5).abs() > UNINFORMATIVE
    informative[: -len(SCALARS) + 1] &= areas[: -len(SCALARS) + 1] > 0.5  # a deviation only ever speaks for damage

    def fit(rows: Tensor) -> Tensor:
        positives = torch.cat([values[rows] for values in bad.values()])
        design = torch.cat([inputs[rows], positives]) * informative
        targets = torch.cat([torch.zeros(int(rows.sum())), torch.ones(len(positives))])
        balance = torch.where(targets == 1, 0.5 / len(positives), 0.5 / int(rows.sum()))
        return fit_logistic(design, targets, balance)

    def score(values: Tensor, coefficients: Tensor | None) -> Tensor:
        if coefficients is None:
            return values[:, : -len(SCALARS) + 1].amax(1)
        return values @ coefficients[:-1] + coefficients[-1]

    odds = torch.zeros(len(folds))
    bad_odds = {name: torch.zeros(len(folds)) for name in bad}
    for fold in range(FOLDS):
        held = folds == fold
        coefficients = fit(~held) if level == 2 else None
        odds[held] = score(inputs[held], coefficients)
        for name in bad:
            bad_odds[name][held] = score(bad[name][held], coefficients)
    if level == 2:
        coefficients = fit(torch.ones_like(folds, dtype=torch.bool))
        modality.coefficients.copy_(coefficients[:-1] * informative)
        modality.intercept.copy_(coefficients[-1])
    modality.level.fill_(float(level))
    quantile = 1 - config.false_alarm_rate
    modality.threshold.copy_(odds.quantile(quantile, interpolation="higher"))
    alarms = [odds[folds == k] > odds[folds != k].quantile(quantile, interpolation="higher") for k in range(FOLDS)]

    name = MODALITIES[index]
    report.samples[name] = len(folds)
    report.achieved_false_alarm_rate[name] = float(torch.cat(alarms).float().mean())
    report.families[name] = {family: auroc(odds, values) for family, values in bad_odds.items()}
    typical = [modality.typicality(d) for d in (distances, torch.cat(list(corrupted.values())))]
    sided, shares = 4 * modality.distance_location.shape[0], modality.coefficients.abs()
    report.signals[name] = {
        "typicality": {"auroc": auroc(*typical), "coefficient": float(shares[:sided].sum())},
        "confidence": {"auroc": float(areas[sided]), "coefficient": float(shares[sided])},
        "uncertainty": {"auroc": float(areas[sided + 1]), "coefficient": float(shares[sided + 1])},
        "damage": {"auroc": auroc(odds, torch.cat(list(bad_odds.values()))), "coefficient": 1.0},
    }
