"""Fits a `Calibration` from clean samples, without labels.

Level 1 fits clean statistics. Level 2 takes the samples' self-made corruptions (`self_corruption`) and fits a logistic
map from how far a sample lies outside the clean data to "this modality is damaged". Everything is cross-fitted: no
sample is judged by statistics it took part in, so a few hundred samples serve for statistics, map and threshold.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modeling_dms.calibrate.statistics import SCALARS, Agreement, Calibration, ModalityCalibration, with_unfamiliarity
from modeling_dms.configuration.configuration_dms import MODALITIES, DMSConfig
from modeling_dms.evidence.typicality import (
    auroc,
    canonical_coordinates,
    evidence,
    fit_canonical,
    fit_gaussian,
    fit_logistic,
    fit_memory_bank,
    unfamiliarity,
    whiten,
)


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
    for index, name in enumerate(MODALITIES):
        rows = present[:, index]
        if int(rows.sum()) < MIN_SAMPLES:
            raise ValueError(
                f"the calibration data hold {int(rows.sum())} samples with {name}, at least {MIN_SAMPLES} are needed"
            )
        record = clean[index][rows]
        if not (record.statistics.isfinite().all() and record.scalars.isfinite().all()):
            raise ValueError(f"the calibration data give features of {name} that are not finite")
    folds = torch.randperm(len(present), generator=torch.Generator().manual_seed(config.mc_seed)) % FOLDS
    # what each sample looks like to statistics that it took no part in
    judged: list[Judged] = [Judged(len(folds), corrupted[m]) for m in range(len(MODALITIES))]
    for fold in range(FOLDS):
        held = folds == fold
        for index, fitted in enumerate(_fit_statistics(clean, present & ~held[:, None], config)):
            judged[index].add(held, fitted, clean[index], corrupted[index])
    modalities = []
    for index, (name, fitted) in enumerate(zip(MODALITIES, _fit_statistics(clean, present, config), strict=True)):
        rows = present[:, index]
        families = {family: values[rows] for family, values in corrupted[index].items()}
        seen = judged[index][rows]
        modalities.append(
            _fit_modality(fitted, seen, clean[index][rows], families, folds[rows], config, level, report, name)
        )
    agreement = Agreement()
    both = present.all(1)
    if len(modalities) == 2 and int(both.sum()) >= MIN_SAMPLES:
        shared = [modality.shared[both] for modality in judged]
        representations = [record.representations[both] for record in clean]
        _fit_agreement(agreement, shared, representations, folds[both], config, report)
    for target, source in zip((*calibration.modalities, calibration.agreement), (*modalities, agreement), strict=True):
        target.load_state_dict(source.state_dict())
    return report


def _fit_statistics(clean: Sequence[ModalityRecord], rows: Tensor, config: DMSConfig) -> list[dict[str, Tensor]]:
    """Clean statistics of each modality from some of its samples (n, M), and what it shares with the other one."""
    fitted = [
        fit_gaussian(record.statistics[chosen], config.subspace_size)
        for record, chosen in zip(clean, rows.unbind(1), strict=True)
    ]
    both = rows.all(1)
    for gaussian in fitted:
        gaussian["canonical"] = torch.zeros(config.subspace_size, config.subspace_size)
    if len(fitted) == 2 and int(both.sum()) >= MIN_SAMPLES * (FOLDS - 1) // FOLDS:
        views = [whiten(r.statistics[both], g)[0][:, -1] for r, g in zip(clean, fitted, strict=True)]
        for gaussian, canonical in zip(fitted, fit_canonical(views[0], views[1]), strict=True):
            gaussian["canonical"] = canonical
    # of images alone: to judge texts the same way gained nothing on validation data
    fitted[0] |= fit_memory_bank(canonical_coordinates(clean[0].statistics[rows[:, 0]], fitted[0]))
    return fitted


class Judged:
    """Distances (n, P) of n samples of one modality and of their corruptions, canonical coordinates (n, K) and
    unfamiliarity (n, 2), 0 where no samples are remembered."""

    def __init__(self, count: int, families: Iterable[str]):
        self.count = count
        self.clean, self.shared, self.unfamiliarity = torch.zeros(0), torch.zeros(0), torch.zeros(count, 2)
        self.corrupted: dict[str, Tensor] = dict.fromkeys(families, torch.zeros(0))

    def add(
        self,
        held: Tensor,
        fitted: dict[str, Tensor],
        clean: ModalityRecord,
        corrupted: dict[str, ModalityRecord],
    ) -> None:
        """Fills in the samples `held` (n,), judged by statistics fitted on others."""

        def put(old: Tensor, new: Tensor) -> Tensor:
            old = old if len(old) else new.new_zeros(self.count, new.shape[1])
            return old.index_put((held.nonzero()[:, 0],), new)

        self.clean = put(self.clean, evidence(clean.statistics[held], fitted))
        shared = canonical_coordinates(clean.statistics[held], fitted)
        self.shared = put(self.shared, shared)
        if "memory_bank" in fitted:
            self.unfamiliarity = put(self.unfamiliarity, unfamiliarity(shared, fitted))
        for family, record in corrupted.items():
            self.corrupted[family] = put(self.corrupted[family], evidence(record.statistics[held], fitted))

    def __getitem__(self, rows: Tensor) -> "Judged":
        part = Judged(int(rows.sum()), self.corrupted)
        part.clean, part.shared, part.unfamiliarity = self.clean[rows], self.shared[rows], self.unfamiliarity[rows]
        part.corrupted = {family: values[rows] for family, values in self.corrupted.items()}
        return part


def _fit_modality(
    fitted: dict[str, Tensor],
    judged: Judged,
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
    for buffer, value in fitted.items():
        getattr(modality, buffer).copy_(value)
    distances, corrupted = judged.clean, judged.corrupted
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

    def criteria(values: Tensor, distances: Tensor, coefficients: Tensor | None) -> Tensor:
        odds = values[:, :sided].amax(1) if coefficients is None else values @ coefficients[:-1] + coefficients[-1]
        return torch.stack([odds, modality.emptiness(distances)], 1)

    found, bad_found = torch.zeros(len(folds), 2), {family: torch.zeros(len(folds), 2) for family in bad}
    for fold in range(FOLDS):
        held = folds == fold
        coefficients = fit(~held) if level == 2 else None
        found[held] = criteria(inputs[held], distances[held], coefficients)
        for family, values in bad.items():
            bad_found[family][held] = criteria(values[held], corrupted[family][held], coefficients)
    if level == 2:
        coefficients = fit(torch.ones_like(folds, dtype=torch.bool))
        modality.coefficients.copy_(coefficients[:-1] * informative)
        modality.intercept.copy_(coefficients[-1])
    modality.level.fill_(float(level))
    if found[:, 1].isfinite().all():
        margin = (_joint(found, config.false_alarm_rate) - found.median(0).values).clamp_min(1e-3)
        if margin[0] > 1e-3:  # else the map found nothing to scale by
            modality.emptiness_scale.copy_(margin[0] / margin[1])
        for values in (found, *bad_found.values()):
            values[:, 1] *= modality.emptiness_scale
    modality.threshold.copy_(_joint(found, config.false_alarm_rate))
    rate = max(config.arbitration_rate, config.false_alarm_rate)
    modality.suspicion_threshold.copy_(_joint(with_unfamiliarity(found, judged.unfamiliarity), rate))
    alarms = [(found[folds == k] > _joint(found[folds != k], config.false_alarm_rate)).any(1) for k in range(FOLDS)]
    odds = (found - modality.threshold).amax(1)
    bad_odds = {family: (values - modality.threshold).amax(1) for family, values in bad_found.items()}

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


def _joint(values: Tensor, rate: float) -> Tensor:
    """Thresholds (2,) of two criteria (n, 2), equally rare, of which a share `rate` of the samples exceeds any."""
    for single in torch.linspace(rate, rate / 2, 11).tolist():
        thresholds = torch.stack([_upper(column, single) for column in values.unbind(1)])
        if (values > thresholds).any(1).float().mean() <= rate:
            break
    # a criterion that nothing was fitted for is -inf throughout
    return thresholds.nan_to_num(nan=0.0, neginf=0.0)


def _upper(values: Tensor, rate: float) -> Tensor:
    """The threshold that at most a share `rate` of the values exceeds."""
    return values.quantile(1 - rate, interpolation="higher")


def _fit_agreement(
    agreement: Agreement,
    shared: Sequence[Tensor],
    representations: Sequence[Tensor],
    folds: Tensor,
    config: DMSConfig,
    report: CalibrationReport,
) -> None:
    scores: dict[str, tuple[list[Tensor], list[Tensor]]] = {"canonical": ([], []), "representations": ([], [])}
    for fold in range(FOLDS):
        held = folds == fold
        for kind, views in (("canonical", shared), ("representations", representations)):
            first, second = (view[held] for view in views)
            # matched pairs, and each image with another sample's text
            for pairs, shift in zip(scores[kind], (0, len(first) // 2), strict=True):
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
