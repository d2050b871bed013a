"""Fits a `Calibration` from clean samples, without labels.

Level 1 fits how clean samples look. Level 2 takes damaged copies of them (`damage`) and fits what tells each family of
damage from clean. Everything is cross-fitted: no sample is judged by a fit it took part in, so a few hundred samples
serve for statistics, detectors and thresholds.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modeling_dms.calibrate.statistics import FARTHEST, REMEMBERED, Agreement, Calibration, Detector
from modeling_dms.configuration.configuration_dms import MODALITIES, DMSConfig
from modeling_dms.evidence.typicality import (
    auroc,
    canonical_coordinates,
    fit_canonical,
    fit_gaussian,
    fit_logistic,
    log_distances,
    whiten,
)


MIN_SAMPLES = 50
FOLDS = 5
SEVERITIES = 5  # steps of a report
# an area under the ROC curve closer to one half than this counts as uninformative
UNINFORMATIVE = 0.05
# a family of which fewer are flagged even at the strongest step is one that the detector is blind to
BLIND = 0.5
# of the covariance of clean numbers, towards the identity
SHRINKAGE = 0.1
# clean scores are measured by how far this share of them reaches beyond the median
TAIL = 0.9
# the score of a family that nothing was fitted for
NEVER = -1e6


@dataclass
class ModalityRecord:
    """One modality of n samples.

    Attributes:
        statistics: (n, L, F), of its layers.
        scalars: (n, 3), in the order of `SCALARS`.
        representations: (n, d_s).
        pixels: (n, P), of images alone.
    """

    statistics: Tensor
    scalars: Tensor
    representations: Tensor
    pixels: Tensor | None = None

    @property
    def seen(self) -> Tensor:
        """What the detector's numbers are made of: the pixels' statistics, or those of the layers."""
        return self.statistics if self.pixels is None else self.pixels

    def __getitem__(self, rows: Tensor) -> "ModalityRecord":
        return ModalityRecord(*(None if part is None else part[rows] for part in vars(self).values()))  # type: ignore

    @staticmethod
    def cat(records: Sequence["ModalityRecord"]) -> "ModalityRecord":
        """The samples of several records, one after the other."""
        parts = zip(*(vars(record).values() for record in records), strict=True)
        return ModalityRecord(*(None if part[0] is None else torch.cat(part) for part in parts))


@dataclass
class DamagedRecord:
    """The same n samples, damaged.

    Attributes:
        seen: as that of [`ModalityRecord`].
        severity: (n,), from 0 to 1.
    """

    seen: Tensor
    severity: Tensor

    @staticmethod
    def cat(records: Sequence["DamagedRecord"]) -> "DamagedRecord":
        """The samples of several records, one after the other."""
        return DamagedRecord(torch.cat([r.seen for r in records]), torch.cat([r.severity for r in records]))


@dataclass
class Detection:
    """How well a family of self-made damage is told from clean samples.

    Attributes:
        auroc: area under the ROC curve of the detector's score.
        flagged: share of the damaged samples that is flagged, by five steps of severity, mild to strong.
    """

    auroc: float
    flagged: list[float]


@dataclass
class CalibrationReport:
    """What `calibrate` found. Print it for a table.

    Attributes:
        samples: clean samples used, by modality.
        families: by modality, by family of damage: a [`Detection`] by the fitted detector.
        unseen: the same by one that this family was left out of.
        false_alarm_rate: the rate asked for, of both modalities together.
        achieved_false_alarm_rate: by modality, measured on clean samples that set neither statistics nor threshold.
        mismatch_auroc: how well the consistency tells a matched pair from another sample's text.
        consistency: `"canonical"` or `"representations"`, whichever told them apart better.
    """

    samples: dict[str, int] = field(default_factory=dict)
    families: dict[str, dict[str, Detection]] = field(default_factory=dict)
    unseen: dict[str, dict[str, Detection]] = field(default_factory=dict)
    false_alarm_rate: float = 0.0
    achieved_false_alarm_rate: dict[str, float] = field(default_factory=dict)
    mismatch_auroc: float | None = None
    consistency: str = "representations"

    def blind(self, modality: str) -> list[str]:
        """The families of which even strong damage is mostly not flagged."""
        return [name for name, found in self.families.get(modality, {}).items() if found.flagged[-1] < BLIND]

    def __str__(self) -> str:
        steps = " ".join(f"{step:>4}" for step in range(1, SEVERITIES + 1))
        lines = [f"{'':<9} {'':<14} {'share flagged at severity':<26} {'':>6}   when left out of calibration"]
        lines += [f"{'modality':<9} {'damage':<14} {steps}   {'AUROC':>6}   {steps}   {'AUROC':>6}"]
        for modality, families in self.families.items():
            for name, found in families.items():
                shown = [
                    " ".join(f"{share:>4.2f}" for share in row.flagged) + f"   {row.auroc:>6.3f}"
                    for row in (found, self.unseen[modality][name])
                ]
                lines.append(f"{modality:<9} {name:<14} {'   '.join(shown)}")
        for modality, achieved in self.achieved_false_alarm_rate.items():
            lines.append(
                f"{modality}: {self.samples[modality]} clean samples, flagged {achieved:.3f} "
                f"(asked for {self.false_alarm_rate / len(MODALITIES):.3f})"
            )
        for modality in self.families:
            if self.blind(modality):
                lines.append(f"{modality}: mostly blind to {', '.join(self.blind(modality))}")
        if self.mismatch_auroc is not None:
            lines.append(f"consistency ({self.consistency}): AUROC {self.mismatch_auroc:.3f} for mismatched pairs")
        return "\n".join(lines)


@torch.no_grad()
def fit_calibration(
    calibration: Calibration,
    clean: Sequence[ModalityRecord],
    damaged: Sequence[Mapping[str, DamagedRecord]],
    present: Tensor,
    level: int = 2,
    leave_out: Sequence[str] = (),
) -> CalibrationReport:
    """Fits all of `calibration` from clean samples and damaged copies of them.

    Args:
        clean: a record a modality, of the same n samples, on the CPU.
        damaged: by modality and family, of the same samples.
        present: (n, M), which modality each sample has.
        level: 1 for clean statistics alone, 2 for what tells damage as well.
        leave_out: families that nothing is fitted for; they are reported all the same.

    Raises:
        ValueError: for fewer than 50 samples that have a modality, or features that are not finite. Nothing is changed
            then.
    """
    config, target, calibration = calibration.config, calibration, copy.deepcopy(calibration).cpu()
    for index, name in enumerate(MODALITIES):
        rows = present[:, index]
        if int(rows.sum()) < MIN_SAMPLES:
            raise ValueError(
                f"the calibration data hold {int(rows.sum())} samples with {name}, at least {MIN_SAMPLES} are needed"
            )
        record = clean[index][rows]
        if not (record.statistics.isfinite().all() and record.scalars.isfinite().all()):
            raise ValueError(f"the calibration data give features of {name} that are not finite")
    report = CalibrationReport(false_alarm_rate=float(config.false_alarm_rate))
    folds = torch.randperm(len(present), generator=torch.Generator().manual_seed(config.mc_seed)) % FOLDS
    fits = [_fit_statistics(clean, present & (folds != fold)[:, None], config) for fold in range(FOLDS)]
    last = _fit_statistics(clean, present, config)
    for index, name in enumerate(MODALITIES):
        rows, record, modality = present[:, index], clean[index], calibration.modalities[index]
        of_fold, own = [fit[index] for fit in fits], folds[rows]

        def judged(seen: Tensor, numbers=_NUMBERS[index], of_fold=of_fold, own=own, rows=rows) -> Tensor:
            """What each sample looks like to statistics that it took no part in."""
            by_fold = [numbers(seen[rows], gaussian) for gaussian in of_fold]
            return torch.stack(by_fold)[own, torch.arange(len(own))]

        for buffer, value in last[index].items():
            getattr(modality, buffer).copy_(value)
        distances = _distances(record.statistics[rows], of_fold[0])
        for fold, gaussian in enumerate(of_fold):
            distances[own == fold] = _distances(record.statistics[rows], gaussian)[own == fold]
        modality.distance_low.copy_(distances.quantile(config.false_alarm_rate, 0))
        modality.distance_high.copy_(distances.quantile(1 - config.false_alarm_rate, 0))
        modality.scalar_location.copy_(record.scalars[rows].median(0).values)
        modality.scalar_scale.copy_(record.scalars[rows].std(0).clamp_min(1e-6))
        modality.level.fill_(float(level))
        bad = {n: DamagedRecord(judged(d.seen), d.severity[rows]) for n, d in damaged[index].items()}
        report.samples[name] = int(rows.sum())
        used = [family if level == 2 and family not in leave_out else None for family in bad]
        _fit_detector(calibration.detectors[index], judged(record.seen), bad, used, own, config, report, name)
    both = present.all(1)
    calibration.agreement.reset()
    if len(MODALITIES) == 2 and int(both.sum()) >= MIN_SAMPLES:
        shared = []
        for index in range(2):
            by_fold = [canonical_coordinates(clean[index].statistics[both], fit[index]) for fit in fits]
            shared.append(torch.stack(by_fold)[folds[both], torch.arange(int(both.sum()))])
        representations = [record.representations[both] for record in clean]
        _fit_agreement(calibration.agreement, shared, representations, folds[both], config, report)
    target.load_state_dict(calibration.state_dict())
    return report


def _distances(statistics: Tensor, gaussian: dict[str, Tensor]) -> Tensor:
    return log_distances(statistics, gaussian).flatten(1)


# of each modality: what was seen of it -> the numbers that its detector reads
_NUMBERS = (lambda seen, gaussian: seen, _distances)


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
    return fitted


def _fit_scores(detector: Detector, clean: Tensor, damaged: Sequence[Tensor | None]) -> None:
    """What turns numbers (n, P) into scores; a family that is left out, as `None`, never scores."""
    detector.location.copy_(clean.mean(0))
    spread = clean.std(0)
    # a number that hardly varies on clean data must not turn rounding into damage
    detector.scale.copy_(spread.clamp_min(1e-4))
    standard = ((clean - detector.location) / detector.scale).clamp(-FARTHEST, FARTHEST)
    covariance = (1 - SHRINKAGE) * torch.cov(standard.T).reshape(clean.shape[1], -1)
    covariance = covariance + SHRINKAGE * torch.eye(clean.shape[1])
    detector.whitening.copy_(torch.linalg.inv(torch.linalg.cholesky(covariance.double())))
    for number, numbers in enumerate(damaged):
        if numbers is None:
            detector.directions[number], detector.offsets[number] = 0, NEVER
            continue
        bad = ((numbers - detector.location) / detector.scale).clamp(-FARTHEST, FARTHEST)
        targets = torch.cat([torch.zeros(len(standard)), torch.ones(len(bad))])
        balance = torch.where(targets == 1, 0.5 / len(bad), 0.5 / len(standard))
        coefficients = fit_logistic(torch.cat([standard, bad]), targets, balance)
        detector.directions[number], detector.offsets[number] = coefficients[:-1], coefficients[-1]


def _fit_detector(
    detector: Detector,
    clean: Tensor,
    damaged: Mapping[str, DamagedRecord],
    used: Sequence[str | None],
    folds: Tensor,
    config: DMSConfig,
    report: CalibrationReport,
    name: str,
) -> None:
    """
    Args:
        clean: numbers (n, P).
        damaged: by family, in the order of the detector's.
        used: the same families, `None` in place of those that nothing is fitted for.
        folds: (n,).
    """
    kinds = list(damaged)

    def of(rows: Tensor) -> list[Tensor | None]:
        return [None if kind is None else damaged[kind].seen[rows] for kind in used]

    scratch = Detector(*reversed(detector.directions.shape))
    scores = torch.zeros(len(clean), len(kinds) + 1)
    bad = {kind: torch.zeros_like(scores) for kind in kinds}
    for fold in range(FOLDS):
        held = folds == fold
        _fit_scores(scratch, clean[~held], of(~held))
        scores[held] = scratch.scores(clean[held])
        for kind in kinds:
            bad[kind][held] = scratch.scores(damaged[kind].seen[held])
    _fit_scores(detector, clean, of(torch.ones_like(folds, dtype=torch.bool)))
    location, scale = scores.median(0).values, (scores.quantile(TAIL, 0) - scores.median(0).values).clamp_min(1e-3)
    unused = torch.tensor([*(kind is None for kind in used), False])
    detector.score_location.copy_(location.masked_fill(unused, 0))
    detector.score_scale.copy_(scale.masked_fill(unused, 1))

    def largest(values: Tensor, without: int | None = None) -> Tensor:
        values = (values - detector.score_location) / detector.score_scale
        return values.amax(1) if without is None else values.index_fill(1, torch.tensor([without]), NEVER).amax(1)

    rate = config.false_alarm_rate / len(MODALITIES)
    found = largest(scores)
    detector.threshold.copy_(_upper(found, rate))
    detector.suspicion_threshold.copy_(_upper(found, max(config.arbitration_rate, rate)))
    ordered = found.sort().values
    kept = min(len(ordered), REMEMBERED)
    detector.clean.zero_()
    detector.clean[:kept] = ordered[torch.arange(kept) * len(ordered) // kept]
    detector.count.fill_(float(kept))
    alarms = [found[folds == fold] > _upper(found[folds != fold], rate) for fold in range(FOLDS)]
    report.achieved_false_alarm_rate[name] = float(torch.cat(alarms).float().mean())
    report.families[name], report.unseen[name] = {}, {}
    for number, kind in enumerate(kinds):
        for without, table in ((None, report.families[name]), (number, report.unseen[name])):
            table[kind] = _detection(largest(scores, without), largest(bad[kind], without), damaged[kind].severity, rate)


def _detection(clean: Tensor, damaged: Tensor, severity: Tensor, rate: float) -> Detection:
    flagged = (damaged > _upper(clean, rate)).float()
    step = (severity * SEVERITIES).long().clamp(0, SEVERITIES - 1)
    shares = [float(flagged[step == number].mean()) for number in range(SEVERITIES)]
    return Detection(auroc(clean, damaged), shares)


def _upper(values: Tensor, rate: float) -> Tensor:
    """The threshold that values of the same distribution exceed with probability `rate` at most, or as rarely as so
    few tell: the k-th largest of n, with k = rate * (n + 1)."""
    return values.sort(descending=True).values[max(1, int(rate * (len(values) + 1))) - 1]


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
