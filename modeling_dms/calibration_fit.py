"""Fits a `Calibration` from clean samples, without labels.

Level 1 fits clean statistics. Level 2 takes the samples' self-made corruptions (`self_corruption`) and fits a logistic
map from how far a sample lies outside the clean data to "this modality is damaged". Everything is cross-fitted: no
sample is judged by statistics it took part in, so a few hundred samples serve for statistics, map and threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modeling_dms.calibration import SCALARS, Agreement, Calibration, ModalityCalibration
from modeling_dms.configuration.configuration_dms import MODALITIES, DMSConfig
from modeling_dms.typicality import auroc, fit_canonical, fit_gaussian, fit_logistic, log_distances, whiten


MIN_SAMPLES = 50
FOLDS = 5
# an area under the ROC curve closer to one half than this counts as uninformative
UNINFORMATIVE = 0.05


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
    damage_auroc: dict[str, float] = field(default_factory=dict)
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
            lines.append(f"{modality:<9} {'all combined':<22} {self.damage_auroc[modality]:>6.3f}")
            for name, value in self.families[modality].items():
                lines.append(f"{modality:<9} {'  on ' + name:<22} {value:>6.3f}")
        for modality, achieved in self.achieved_false_alarm_rate.items():
            lines.append(
                f"{modality}: {self.samples[modality]} clean samples, flagged {achieved:.3f} "
                f"(asked for {self.false_alarm_rate:.3f})"
            )
        if self.mismatch_auroc is not None:
            lines.append(f"consistency ({self.consistency}): AUROC {self.mismatch_auroc:.3f} for mismatched pairs")
        return "\n".join(lines)


@torch.no_grad()
def fit_calibration(
    calibration: Calibration,
    clean: Sequence[ModalityRecord],
    corrupted: Sequence[dict[str, ModalityRecord]],
    present: Tensor,
    level: int = 2,
) -> CalibrationReport:
    """Fits all of `calibration` from clean samples and their self-made corruptions.

    Args:
        clean: a record a modality, of the same n samples, on the CPU.
        corrupted: by modality and family, of the same samples.
        present: (n, M), which modality each sample has.
        level: 1 for clean statistics alone, 2 for the map to damage as well.

    Raises:
        ValueError: for fewer than 50 samples that have a modality, or features that are not finite. Nothing is changed
            then.
    """
    config = calibration.config
    report = CalibrationReport(false_alarm_rate=float(config.false_alarm_rate))
    folds = torch.randperm(len(present), generator=torch.Generator().manual_seed(config.mc_seed)) % FOLDS
    fitted = []
    for index, name in enumerate(MODALITIES):
        rows = present[:, index]
        if int(rows.sum()) < MIN_SAMPLES:
            raise ValueError(
                f"the calibration data hold {int(rows.sum())} samples with {name}, at least {MIN_SAMPLES} are needed"
            )
        record = clean[index][rows]
        if not (record.statistics.isfinite().all() and record.scalars.isfinite().all()):
            raise ValueError(f"the calibration data give features of {name} that are not finite")
        families = {family: values[rows] for family, values in corrupted[index].items()}
        fitted.append(_fit_modality(record, families, folds[rows], config, level, report, name))
    agreement = Agreement()
    both = present.all(1)
    if len(fitted) == 2 and int(both.sum()) >= MIN_SAMPLES:
        _fit_agreement(agreement, fitted, [record[both] for record in clean], folds[both], config, report)
    for target, source in zip((*calibration.modalities, calibration.agreement), (*fitted, agreement), strict=True):
        target.load_state_dict(source.state_dict())
    return report


def _fit_modality(
    clean: ModalityRecord,
    families: dict[str, ModalityRecord],
    folds: Tensor,
    config: DMSConfig,
    level: int,
    report: CalibrationReport,
    name: str,
) -> ModalityCalibration:
    _, layers, size = clean.statistics.shape
    modality = ModalityCalibration(layers, size, config.subspace_size)
    distances = torch.zeros(len(folds), layers, 2)
    corrupted = {family: torch.zeros_like(distances) for family in families}
    for fold in range(FOLDS):
        held = folds == fold
        gaussian = fit_gaussian(clean.statistics[~held], config.subspace_size)
        distances[held] = log_distances(clean.statistics[held], gaussian)
        for family, record in families.items():
            corrupted[family][held] = log_distances(record.statistics[held], gaussian)
    for buffer, value in fit_gaussian(clean.statistics, config.subspace_size).items():
        getattr(modality, buffer).copy_(value)
    modality.distance_location.copy_(distances.median(0).values)
    modality.distance_scale.copy_(distances.std(0).clamp_min(1e-3))
    modality.distance_low.copy_(distances.quantile(config.false_alarm_rate, 0))
    modality.distance_high.copy_(distances.quantile(1 - config.false_alarm_rate, 0))
    modality.scalar_location.copy_(clean.scalars.median(0).values)
    modality.scalar_scale.copy_(clean.scalars.std(0).clamp_min(1e-6))

    inputs = modality.detector_inputs(distances, clean.scalars)
    bad = {f: modality.detector_inputs(corrupted[f], families[f].scalars) for f in families}
    pooled, sided = torch.cat(list(bad.values())), modality.deviations
    areas = torch.tensor([auroc(inputs[:, column], pooled[:, column]) for column in range(inputs.shape[1])])
    informative = (areas - 0.5).abs() > UNINFORMATIVE
    informative[:sided] &= areas[:sided] > 0.5  # a deviation only ever speaks for damage

    def fit(rows: Tensor) -> Tensor:
        positives = torch.cat([values[rows] for values in bad.values()])
        design = torch.cat([inputs[rows], positives]) * informative
        targets = torch.cat([torch.zeros(int(rows.sum())), torch.ones(len(positives))])
        balance = torch.where(targets == 1, 0.5 / len(positives), 0.5 / int(rows.sum()))
        return fit_logistic(design, targets, balance)

    def odds_of(values: Tensor, coefficients: Tensor | None) -> Tensor:
        if coefficients is None:
            return values[:, :sided].amax(1)
        return values @ coefficients[:-1] + coefficients[-1]

    odds, bad_odds = torch.zeros(len(folds)), {family: torch.zeros(len(folds)) for family in bad}
    for fold in range(FOLDS):
        held = folds == fold
        coefficients = fit(~held) if level == 2 else None
        odds[held] = odds_of(inputs[held], coefficients)
        for family, values in bad.items():
            bad_odds[family][held] = odds_of(values[held], coefficients)
    if level == 2:
        coefficients = fit(torch.ones_like(folds, dtype=torch.bool))
        modality.coefficients.copy_(coefficients[:-1] * informative)
        modality.intercept.copy_(coefficients[-1])
    modality.level.fill_(float(level))
    modality.threshold.copy_(_upper(odds, config.false_alarm_rate))
    modality.arbitration_threshold.copy_(_upper(odds, max(config.arbitration_rate, config.false_alarm_rate)))
    alarms = [odds[folds == k] > _upper(odds[folds != k], config.false_alarm_rate) for k in range(FOLDS)]

    shares = modality.coefficients.abs()
    typicality = auroc(modality.typicality(distances), modality.typicality(torch.cat(list(corrupted.values()))))
    report.samples[name] = len(folds)
    report.achieved_false_alarm_rate[name] = float(torch.cat(alarms).float().mean())
    report.families[name] = {family: auroc(odds, values) for family, values in bad_odds.items()}
    report.signals[name] = {
        "typicality": {"auroc": typicality, "coefficient": float(shares[:sided].sum())},
        **{
            signal: {"auroc": float(areas[sided + i]), "coefficient": float(modality.coefficients[sided + i])}
            for i, signal in enumerate(SCALARS[:2])
        },
    }
    report.damage_auroc[name] = auroc(odds, torch.cat(list(bad_odds.values())))
    return modality


def _upper(values: Tensor, rate: float) -> Tensor:
    """The threshold that at most a share `rate` of the values exceeds."""
    return values.quantile(1 - rate, interpolation="higher")


def _fit_agreement(
    agreement: Agreement,
    modalities: Sequence[ModalityCalibration],
    clean: Sequence[ModalityRecord],
    folds: Tensor,
    config: DMSConfig,
    report: CalibrationReport,
) -> None:
    def deepest(record: ModalityRecord, gaussian: dict[str, Tensor]) -> Tensor:
        return whiten(record.statistics, gaussian)[0][:, -1]

    vision, text = (deepest(r, m.gaussian) for r, m in zip(clean, modalities, strict=True))
    maps = fit_canonical(vision, text)
    for modality, canonical in zip(modalities, maps, strict=True):
        modality.canonical.copy_(canonical)
    scores: dict[str, tuple[list[Tensor], list[Tensor]]] = {"canonical": ([], []), "representations": ([], [])}
    for fold in range(FOLDS):
        fit, held = folds != fold, (folds == fold).nonzero()[:, 0]
        gaussians = [fit_gaussian(record.statistics[fit], config.subspace_size) for record in clean]
        vision, text = (deepest(r[fit], g) for r, g in zip(clean, gaussians, strict=True))
        maps = fit_canonical(vision, text)
        vision, text = (deepest(r[held], g) @ m for r, g, m in zip(clean, gaussians, maps, strict=True))
        views = {"canonical": (vision, text), "representations": tuple(r.representations[held] for r in clean)}
        for kind, (first, second) in views.items():
            # matched pairs, and each image with another sample's text
            for pairs, shift in zip(scores[kind], (0, len(held) // 2), strict=True):
                pairs.append(torch.cosine_similarity(first, second.roll(shift, 0)))
    matched = {kind: torch.cat(pairs) for kind, (pairs, _) in scores.items()}
    areas = {kind: auroc(torch.cat(swapped), matched[kind]) for kind, (_, swapped) in scores.items()}
    best = max(areas, key=lambda kind: areas[kind])
    report.consistency, report.mismatch_auroc = best, areas[best]
    agreement.location.copy_(matched[best].median())
    agreement.scale.copy_(matched[best].std().clamp_min(1e-6))
    disagreement = (agreement.location - matched[best]) / agreement.scale
    agreement.threshold.copy_(_upper(disagreement, config.false_alarm_rate))
    # disagreement and suspicion together are as rare on clean samples as clear damage is
    joint = min(0.5, config.false_alarm_rate / max(config.arbitration_rate, 1e-6))
    agreement.arbitration_threshold.copy_(_upper(disagreement, max(joint, config.false_alarm_rate)))
    agreement.canonical.fill_(float(best == "canonical"))
    agreement.informative.fill_(float(areas[best] > 0.5 + UNINFORMATIVE))
