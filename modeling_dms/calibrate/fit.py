"""Fits a `Calibration` from clean samples, without labels.

Level 1 fits how clean samples look. Level 2 takes damaged copies of them (`damage`) and fits what tells each family of
damage from clean. Everything is cross-fitted: no sample is judged by a fit it took part in, so a few hundred samples
serve for statistics, detectors and thresholds.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling_dms.calibrate.damage import FAMILIES
from modeling_dms.calibrate.report import SEVERITIES, CalibrationReport, Detection
from modeling_dms.calibrate.statistics import FARTHEST, Agreement, Calibration, Detector
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
# an area under the ROC curve closer to one half than this counts as uninformative
UNINFORMATIVE = 0.05
# of the covariance of clean numbers, towards the identity
SHRINKAGE = 0.1
# scores are measured from the point that this share of the clean ones exceeds, by how far those do on average
TAIL = 0.05
RIDGE = 1e-3


def _cat(records: Sequence[Any]) -> list[Any]:
    parts = zip(*(vars(record).values() for record in records), strict=True)
    return [None if part[0] is None else torch.cat(part) for part in parts]


def _of_rows(record: Any, rows: Tensor) -> list[Any]:
    return [None if part is None else part[rows] for part in vars(record).values()]


@dataclass
class ModalityRecord:
    """One modality of n samples.

    Attributes:
        statistics: (n, L, F), of its layers.
        scalars: (n, 3), in the order of `SCALARS`.
        representations: (n, d_s).
        numbers: (n, P), see `ModalityFeatures`.
    """

    statistics: Tensor
    scalars: Tensor
    representations: Tensor
    numbers: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> "ModalityRecord":
        return ModalityRecord(*_of_rows(self, rows))

    @staticmethod
    def cat(records: Sequence["ModalityRecord"]) -> "ModalityRecord":
        """The samples of several records, one after the other."""
        return ModalityRecord(*_cat(records))


@dataclass
class DamagedRecord:
    """The same n samples, damaged.

    Attributes:
        severity: (n,), from 0 to 1.
        statistics: as those of [`ModalityRecord`]; `None` where the detector does not read the layers.
        numbers: likewise.
    """

    severity: Tensor
    statistics: Tensor | None
    numbers: Tensor | None

    def __getitem__(self, rows: Tensor) -> "DamagedRecord":
        return DamagedRecord(*_of_rows(self, rows))

    @staticmethod
    def cat(records: Sequence["DamagedRecord"]) -> "DamagedRecord":
        """The samples of several records, one after the other."""
        return DamagedRecord(*_cat(records))


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
        leave_out: families whose scores do not count; they are reported all the same.

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
        if not all(part is None or bool(part.isfinite().all()) for part in vars(record).values()):
            raise ValueError(f"the calibration data give features of {name} that are not finite")
    report = CalibrationReport(false_alarm_rate=float(config.false_alarm_rate), alarm_rate=config.alarm_rate)
    folds = torch.randperm(len(present), generator=torch.Generator().manual_seed(config.mc_seed)) % FOLDS
    fits = [_fit_statistics(clean, present & (folds != fold)[:, None], config) for fold in range(FOLDS)]
    last = _fit_statistics(clean, present, config)
    for index, name in enumerate(MODALITIES):
        rows, record, modality = present[:, index], clean[index], calibration.modalities[index]
        detector = calibration.detectors[index]
        judges, own = [fit[index] for fit in fits], folds[rows]
        for buffer, value in last[index].items():
            getattr(modality, buffer).copy_(value)
        distances = _distances(record.statistics[rows], judges, own)
        modality.distance_low.copy_(distances.quantile(config.false_alarm_rate, 0))
        modality.distance_high.copy_(distances.quantile(1 - config.false_alarm_rate, 0))
        modality.scalar_location.copy_(record.scalars[rows].median(0).values)
        modality.scalar_scale.copy_(record.scalars[rows].std(0).clamp_min(1e-6))
        modality.level.fill_(float(level))
        numbers = calibration.numbers(index, distances, record[rows].numbers)
        bad, severities = {}, {}
        for kind, copies in damaged[index].items():
            copies = copies[rows]
            severities[kind] = copies.severity
            away = None if copies.statistics is None else _distances(copies.statistics, judges, own)
            bad[kind] = calibration.numbers(index, away, copies.numbers)
        scores = _fit_detector(detector, numbers, bad, own)
        detector.left_out.copy_(torch.tensor([float(level == 1 or kind in leave_out) for kind in FAMILIES[index]]))
        report.samples[name] = int(rows.sum())
        _report_detection(report, name, detector, scores, severities, config.alarm_rate)
    both = present.all(1)
    calibration.agreement.reset()
    if len(MODALITIES) == 2 and int(both.sum()) >= MIN_SAMPLES:
        shared = []
        for index in range(2):
            by_fold = [canonical_coordinates(clean[index].statistics[both], fit[index]) for fit in fits]
            shared.append(torch.stack(by_fold)[folds[both], torch.arange(int(both.sum()))])
        representations = [record.representations[both] for record in clean]
        _fit_agreement(calibration.agreement, shared, representations, folds[both], report)
    target.load_state_dict(calibration.state_dict())
    return report


def _distances(statistics: Tensor, judges: Sequence[dict[str, Tensor]], folds: Tensor) -> Tensor:
    """Log distances (n, 2 L) of each sample, by statistics of the folds (n,) that it took no part in."""
    by_fold = torch.stack([log_distances(statistics, gaussian).flatten(1) for gaussian in judges])
    return by_fold[folds, torch.arange(len(folds))]


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


def _fit_scores(detector: Detector, clean: Tensor, damaged: Sequence[Tensor]) -> None:
    """What turns numbers (n, P) into scores; the search begins where the detector is."""
    detector.location.copy_(clean.mean(0))
    # a number that hardly varies on clean data must not turn rounding into damage
    detector.scale.copy_(clean.std(0).clamp_min(1e-4))
    standard = ((clean - detector.location) / detector.scale).clamp(-FARTHEST, FARTHEST)
    covariance = (1 - SHRINKAGE) * torch.cov(standard.T).reshape(clean.shape[1], -1)
    covariance = covariance + SHRINKAGE * torch.eye(clean.shape[1])
    detector.whitening.copy_(torch.linalg.inv(torch.linalg.cholesky(covariance.double())))
    for number, numbers in enumerate(damaged):
        bad = ((numbers - detector.location) / detector.scale).clamp(-FARTHEST, FARTHEST)
        targets = torch.cat([torch.zeros(len(standard)), torch.ones(len(bad))])
        balance = torch.where(targets == 1, 0.5 / len(bad), 0.5 / len(standard))
        start = torch.cat([detector.directions[number], detector.offsets[number, None]])
        coefficients = fit_logistic(torch.cat([standard, bad]), targets, balance, ridge=RIDGE, start=start)
        detector.directions[number], detector.offsets[number] = coefficients[:-1], coefficients[-1]


def _fit_detector(
    detector: Detector, clean: Tensor, damaged: Mapping[str, Tensor], folds: Tensor
) -> dict[str, Tensor]:
    """Fits a detector and returns the scores (n, D + 1) of the damaged samples by fits that they took no part in.

    Args:
        clean: numbers (n, P).
        damaged: the same by family, in the order of the detector's; empty at level 1.
        folds: (n,).
    """
    detector.reset()
    _fit_scores(detector, clean, list(damaged.values()))
    scratch = copy.deepcopy(detector)
    scores = torch.zeros(len(clean), *detector.score_location.shape)
    bad = {kind: torch.zeros_like(scores) for kind in damaged}
    for fold in range(FOLDS):
        held = folds == fold
        _fit_scores(scratch, clean[~held], [numbers[~held] for numbers in damaged.values()])
        scores[held] = scratch.raw_scores(clean[held])
        for kind, numbers in damaged.items():
            bad[kind][held] = scratch.raw_scores(numbers[held])
    location = scores.quantile(1 - TAIL, 0)
    scale = (scores - location).clamp_min(0).sum(0) / (scores > location).sum(0).clamp_min(1)
    detector.score_location.copy_(location)
    detector.score_scale.copy_(scale.clamp_min(1e-3))

    def normalised(values: Tensor) -> Tensor:
        return (values - detector.score_location) / detector.score_scale

    detector.remember(normalised(scores))
    return {kind: normalised(values) for kind, values in bad.items()}


def _report_detection(
    report: CalibrationReport,
    name: str,
    detector: Detector,
    damaged: Mapping[str, Tensor],
    severities: Mapping[str, Tensor],
    rate: float,
) -> None:
    """Fills in the part of one modality; `damaged` are scores (n, D + 1) by family, `severities` (n,)."""
    clean = detector.clean[: int(detector.count)]
    report.achieved_false_alarm_rate[name] = max(1, int(rate * (len(clean) + 1))) / (len(clean) + 1)
    report.families[name], report.unseen[name] = {}, {}
    chosen = detector.left_out.clone()
    for number, (kind, scores) in enumerate(damaged.items()):
        step = (severities[kind] * SEVERITIES).long().clamp(0, SEVERITIES - 1)
        for table in (report.families[name], report.unseen[name]):
            if table is report.unseen[name]:
                detector.left_out[number] = 1
            largest = detector.largest(scores)
            flagged = (largest > detector.threshold(rate)).float()
            shares = [float(flagged[step == s].mean()) for s in range(SEVERITIES)]
            table[kind] = Detection(auroc(detector.largest(clean), largest), shares)
        detector.left_out.copy_(chosen)


def _fit_agreement(
    agreement: Agreement,
    shared: Sequence[Tensor],
    representations: Sequence[Tensor],
    folds: Tensor,
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
    agreement.scale.copy_(matched[best].std().clamp_min(1e-6))
    agreement.remember(-matched[best][:, None])
    agreement.canonical.fill_(float(best == "canonical"))
    agreement.informative.fill_(float(areas[best] > 0.5 + UNINFORMATIVE))
