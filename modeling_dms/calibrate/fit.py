"""Fits a `Calibration` from clean samples, without labels.

Level 1 fits how clean samples look, level 2 what tells each family of `damage` to copies of them from clean. All is
cross-fitted: no image is judged by a fit that it took part in, so a few hundred samples serve for everything.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from modeling_dms.calibrate.calibration import Calibration
from modeling_dms.calibrate.conformal import FARTHEST, TAIL, Detector, JointAgreement
from modeling_dms.calibrate.counterfactual import Answers
from modeling_dms.calibrate.damage import FAMILIES
from modeling_dms.calibrate.fit_reliability import fit_lowering, fit_reliability
from modeling_dms.calibrate.fit_sources import fit_sources
from modeling_dms.calibrate.records import (
    FOLDS,
    MIN_SAMPLES,
    DamagedRecord,
    GainRecord,
    ModalityRecord,
    folds_by_image,
)
from modeling_dms.calibrate.report import SEVERITIES, CalibrationReport, Detection
from modeling_dms.calibrate.source_agreement import SourceRecord
from modeling_dms.calibrate.statistics import as_if_new
from modeling_dms.configuration.configuration_dms import MODALITIES
from modeling_dms.evidence.typicality import (
    auroc,
    fit_gaussian,
    fit_logistic,
    log_distances,
)


# an area under the ROC curve closer to one half than this counts as uninformative
UNINFORMATIVE = 0.05
# of the covariance of clean numbers, towards the identity
SHRINKAGE = 0.1
RIDGE = 1e-3


@torch.no_grad()
def fit_calibration(
    calibration: Calibration,
    clean: Sequence[ModalityRecord],
    damaged: Sequence[Mapping[str, DamagedRecord]],
    present: Tensor,
    level: int = 2,
    leave_out: Sequence[str] = (),
    in_prompt: ModalityRecord | None = None,
    answers: Answers | None = None,
    sources: SourceRecord | None = None,
    gains: GainRecord | None = None,
    told_by: str = "likelihood gain",
) -> CalibrationReport:
    """Fits all of `calibration` from clean samples and damaged copies of them.

    Args:
        clean: a record a modality, of the same n samples, on the CPU.
        damaged: by modality and family, of the same samples.
        present: (n, M), which modality each sample has.
        level: 1 for clean statistics alone, 2 and 3 for what tells damage as well.
        leave_out: families whose scores do not count; they are reported all the same.
        in_prompt: of the clean samples' text, as it was read within the prompts.
        answers: what the backbone answered to damaged copies, for level 3.
        sources: all sources of the same samples, where they have several of a modality.
        gains: what the backbone says of how far the samples' images and texts belong together, if that is to count.
        told_by: what the report calls that.

    Raises:
        ValueError: for fewer than 50 images or texts, or features that are not finite; nothing is changed then.
    """
    config, target, calibration = calibration.config, calibration, copy.deepcopy(calibration).cpu()
    as_if_new(calibration)
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
    folds = folds_by_image(clean[0], present[:, 0], config.mc_seed)
    p_values: list[Tensor] = []
    for index, name in enumerate(MODALITIES):
        rows, record, detector = present[:, index], clean[index][present[:, index]], calibration.detectors[index]
        judges = _fit_layers(calibration, index, record, folds[rows], level)
        distances = _distances(record.statistics, judges, folds[rows])
        numbers = calibration.numbers(index, distances, record.numbers)
        bad, severities = {}, {}
        for kind, copies in damaged[index].items():
            copies = copies[rows]
            severities[kind] = copies.severity
            away = None if copies.statistics is None else _distances(copies.statistics, judges, folds[rows])
            bad[kind] = calibration.numbers(index, away, copies.numbers)
        detector.reset()
        sound, scores = _fit_detector(detector, numbers, bad, folds[rows])
        detector.left_out.copy_(torch.tensor([float(level == 1 or kind in leave_out) for kind in FAMILIES[index]]))
        report.samples[name] = int(rows.sum())
        p_values.append(torch.ones(len(bad) + 1, len(rows)))
        unseen = _report_detection(report, name, detector, scores, severities, config.alarm_rate)
        p_values[-1][:, rows] = torch.stack([*unseen, detector.p_value(detector.largest(sound))])
    if calibration.in_prompt is not None:
        calibration.detectors[-1].reset()
    if calibration.in_prompt is not None and in_prompt is not None:
        rows = present[:, calibration.in_prompt]
        _fit_in_prompt(calibration, in_prompt[rows], folds[rows], level)
    both = present.all(1)
    calibration.agreement.reset()
    calibration.joint.reset()
    p_match: Tensor | None = None
    if int(both.sum()) >= MIN_SAMPLES:
        p_match = _fit_agreement(calibration, clean, both, folds, report, answers, gains, told_by)
    for statistics in (calibration.sources, *calibration.clean_sets):
        statistics.reset()
    if sources is not None:
        report.sources = fit_sources(calibration, sources)
    calibration.reliability.reset()
    if answers is not None:
        p_clean = [p[answers.families[:, m], answers.sources[:, m]] for m, p in enumerate(p_values)]
        p = torch.stack([*p_clean, torch.ones(len(answers.sources)) if p_match is None else p_match], 1)
        report.lowering = dict(zip(MODALITIES, fit_lowering(calibration, answers, p), strict=True))
        known = calibration.reliability
        report.spared = [name for name, kept in zip(MODALITIES, known.spared.tolist(), strict=True) if kept]
        report.dropped = [name for name, none in zip(MODALITIES, known.dropped.tolist(), strict=True) if none]
        report.reliability = fit_reliability(calibration, answers, p, folds[answers.sources[:, 0]])
    target.load_state_dict(calibration.state_dict())
    return report


def _distances(statistics: Tensor, judges: Sequence[dict[str, Tensor]], folds: Tensor) -> Tensor:
    """Log distances (n, 2 L) of each sample, by statistics of the folds (n,) that it took no part in."""
    by_fold = torch.stack([log_distances(statistics, gaussian).flatten(1) for gaussian in judges])
    return by_fold[folds, torch.arange(len(folds))]


def _fit_layers(
    calibration: Calibration, index: int, record: ModalityRecord, folds: Tensor, level: int
) -> list[dict[str, Tensor]]:
    """Fits the clean statistics of a modality's layers and scalars; those of each fold, without its samples."""
    modality, config = calibration.modalities[index], calibration.config
    for buffer, value in fit_gaussian(record.statistics, config.subspace_size).items():
        getattr(modality, buffer).copy_(value)
    judges = [fit_gaussian(record.statistics[folds != fold], config.subspace_size) for fold in range(FOLDS)]
    distances = _distances(record.statistics, judges, folds)
    modality.distance_low.copy_(distances.quantile(config.false_alarm_rate, 0))
    modality.distance_high.copy_(distances.quantile(1 - config.false_alarm_rate, 0))
    modality.scalar_location.copy_(record.scalars.median(0).values)
    modality.scalar_scale.copy_(record.scalars.std(0).clamp_min(1e-6))
    modality.level.fill_(float(level))
    return judges


def _fit_in_prompt(calibration: Calibration, record: ModalityRecord, folds: Tensor, level: int) -> None:
    """Fits what tells suspicious texts within their prompts: what damage does to standardised numbers is taken to be
    the same there as alone, so that clean samples suffice."""
    detector, alone = calibration.detectors[-1], calibration.detectors[cast(int, calibration.in_prompt)]
    judges = _fit_layers(calibration, -1, record, folds, level)
    numbers = calibration.numbers(-1, _distances(record.statistics, judges, folds), record.numbers)
    for name in ("directions", "offsets", "left_out"):
        getattr(detector, name).copy_(getattr(alone, name))
    _fit_detector(detector, numbers, {}, folds)


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Fits a detector and returns the scores (n, D + 1) of the clean samples, and by family of the damaged ones, by
    fits that they took no part in.

    Args:
        clean: numbers (n, P).
        damaged: the same by family, in the order of the detector's; empty at level 1.
        folds: (n,).
    """
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
    return normalised(scores), {kind: normalised(values) for kind, values in bad.items()}


def _report_detection(
    report: CalibrationReport,
    name: str,
    detector: Detector,
    damaged: Mapping[str, Tensor],
    severities: Mapping[str, Tensor],
    rate: float,
) -> list[Tensor]:
    """Fills in the part of one modality; `damaged` are scores (n, D + 1) by family, `severities` (n,).

    Returns:
        p-values (n,) of each family's damaged samples, by a detector that does not know the family.
    """
    clean = detector.clean[: int(detector.count)]
    report.achieved_false_alarm_rate[name] = max(1, int(rate * (len(clean) + 1))) / (len(clean) + 1)
    report.families[name], report.unseen[name] = {}, {}
    chosen, p_values = detector.left_out.clone(), {}
    for number, (kind, scores) in enumerate(damaged.items()):
        step = (severities[kind] * SEVERITIES).long().clamp(0, SEVERITIES - 1)
        for table in (report.families[name], report.unseen[name]):
            if table is report.unseen[name]:
                detector.left_out[number] = 1
            largest = detector.largest(scores)
            p_values[kind] = detector.p_value(largest)  # those of `unseen` stay
            flagged = (p_values[kind] <= rate).float()
            shares = [float(flagged[step == s].mean()) for s in range(SEVERITIES)]
            table[kind] = Detection(auroc(detector.largest(clean), largest), shares)
        detector.left_out.copy_(chosen)
    return [*p_values.values()]


def _fit_agreement(
    calibration: Calibration,
    clean: Sequence[ModalityRecord],
    both: Tensor,
    folds: Tensor,
    report: CalibrationReport,
    answers: Answers | None,
    gains: GainRecord | None,
    told_by: str,
) -> Tensor | None:
    """Fits what two modalities share, and takes what tells mismatched pairs better: that, or the representations; and
    what it tells together with the gains, where they are known.

    Args:
        both: (n,), which samples have both.
        folds: (n,).

    Returns:
        The p-values of the pairs of `answers`, by fits that their images took no part in; `None` where consistency
        tells nothing of them.
    """
    agreement, asked = calibration.agreement, torch.zeros(0) if answers is None else torch.zeros(len(answers.sources))
    # each image with its own text, with one of the same fold and, where gains are known, with that of the row before
    cosines = {kind: torch.full((3, len(both)), torch.nan) for kind in ("canonical", "representations")}
    for fold in range(FOLDS):
        held, rest = both & (folds == fold), both & (folds != fold)
        agreement.fit_shared([record.content[rest] for record in clean])
        if answers is not None:
            rows = folds[answers.sources[:, 0]] == fold
            image = agreement.shared(0, answers.image_content[rows])
            asked[rows] = torch.cosine_similarity(image, agreement.shared(1, answers.text_content[rows]))
        shared = [agreement.shared(index, record.content) for index, record in enumerate(clean)]
        views = {"canonical": shared, "representations": [record.representations for record in clean]}
        for kind, (images, texts) in views.items():
            own = texts[held]
            others = [own, own.roll(len(own) // 2, 0), *([] if gains is None else [texts[gains.other][held]])]
            for place, other in enumerate(others):
                cosines[kind][place, held] = torch.cosine_similarity(images[held], other)
    agreement.fit_shared([record.content[both] for record in clean])
    areas = {kind: auroc(found[1, both], found[0, both]) for kind, found in cosines.items()}
    best = max(areas, key=lambda kind: areas[kind])
    report.consistency, report.mismatch_auroc = best, areas[best]
    agreement.remember(-cosines[best][0, both, None])
    agreement.canonical.fill_(float(best == "canonical"))
    agreement.informative.fill_(float(areas[best] > 0.5 + UNINFORMATIVE))
    scores = None
    if gains is not None:
        own, other = torch.stack([cosines[best][0], gains.gain], 1), torch.stack([cosines[best][2], gains.of_other], 1)
        of_answers = None
        if answers is not None and answers.gain is not None:
            of_answers = torch.stack([asked, answers.gain], 1), folds[answers.sources[:, 0]]
        scores = _fit_joint(calibration.joint, own, other, folds, report, of_answers, told_by)
    if answers is None or best != "canonical":
        return None
    if scores is not None:
        return calibration.joint.p_value(scores)
    return agreement.p_value(-asked) if agreement.informative > 0 else None


def _fit_joint(
    joint: JointAgreement,
    matched: Tensor,
    swapped: Tensor,
    folds: Tensor,
    report: CalibrationReport,
    answers: tuple[Tensor, Tensor] | None,
    told_by: str,
) -> Tensor | None:
    """Fits what consistency and gain tell together, if that is more than consistency tells alone.

    Args:
        matched, swapped: both numbers (n, 2) of pairs, and of the same images with other texts; NaN where unknown.
        folds: (n,).
        answers: numbers (m, 2) of further pairs and their folds.

    Returns:
        Scores (m,) of these, by fits that their images took no part in; `None` where nothing was fitted.
    """
    known = torch.cat([matched, swapped], 1).isfinite().all(1)
    if int(known.sum()) < MIN_SAMPLES:
        return None
    scores, found = torch.zeros(2, len(folds)), None if answers is None else torch.zeros(len(answers[0]))
    for fold in range(FOLDS):
        held, rest = known & (folds == fold), known & (folds != fold)
        joint.fit_numbers(matched[rest], swapped[rest])
        scores[:, held] = torch.stack([joint(matched[held]), joint(swapped[held])])
        if answers is not None and found is not None:
            rows = answers[1] == fold
            found[rows] = joint(answers[0][rows])
    areas = auroc(swapped[known, 0], matched[known, 0]), auroc(scores[0, known], scores[1, known])
    if areas[1] <= max(areas[0], 0.5 + UNINFORMATIVE):
        joint.reset()
        return None
    joint.fit_numbers(matched[known], swapped[known])
    joint.remember(scores[0, known, None])
    report.consistency, report.mismatch_auroc = f"{report.consistency} and {told_by}", areas[1]
    return found
