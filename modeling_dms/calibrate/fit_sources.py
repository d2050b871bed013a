"""Fits how far several sources of one sample agree, from clean samples that have several."""

import copy

import torch
from torch import Tensor

from modeling_dms.calibrate.calibration import Calibration
from modeling_dms.calibrate.conformal import Agreement
from modeling_dms.calibrate.records import FOLDS, MIN_SAMPLES, first_alike
from modeling_dms.calibrate.source_agreement import BOTH, KINDS, SourceAgreement, SourceRecord, composition
from modeling_dms.calibrate.statistics import keep_map, standardised
from modeling_dms.evidence.typicality import auroc, fit_discriminants, fit_logistic
from modeling_dms.weigh.odd_ones import oddness


# an area under the ROC curve below this tells too little of whether two sources belong together
INFORMATIVE = 0.55


def fit_sources(calibration: Calibration, records: SourceRecord) -> dict[str, float]:
    """Fits how far sources agree, from the sources of clean samples.

    Args:
        calibration: whose agreement of image and text is fitted.
        records: of n samples, in a fixed order; what stands there twice counts once.

    Returns:
        By kind of pair, how well those of one sample are told from those of two (AUROC); without kinds of which there
        are fewer than 50 samples.
    """
    sources, agreement = calibration.sources, copy.deepcopy(calibration.agreement)
    sources.reset()
    # the same sources, asked about again, are no other sample
    own = first_alike(torch.cat([content.sum(1) for content in records.contents], 1))
    records = records[own == torch.arange(len(own))]
    generator = torch.Generator().manual_seed(calibration.config.mc_seed)
    folds = torch.randperm(len(records.types), generator=generator) % FOLDS
    together: list[list[Tensor]] = [[] for _ in KINDS]
    apart: list[list[Tensor]] = [[] for _ in KINDS]
    kept = []
    for fold in range(FOLDS):
        held = records[folds == fold]
        _fit_maps(sources, records[folds != fold])
        _fit_pairs(agreement, records[folds != fold])
        kept.append(sources.cosines(agreement, held.types, held.contents))
        cosines, kinds = kept[-1]
        others = _with_others(held)
        other_cosines, other_kinds = sources.cosines(agreement, others.types, others.contents)
        count = held.types.shape[1]
        for kind in range(len(KINDS)):
            upper = torch.ones(count, count, dtype=torch.bool).triu(1)
            together[kind].append(cosines[(kinds == kind) & upper])
            # a source of the sample and one of another
            apart[kind].append(other_cosines[:, :count, count:][other_kinds[:, :count, count:] == kind])
    _fit_maps(sources, records)
    told: dict[str, float] = {}
    for kind, name in enumerate(KINDS):
        same, other = torch.cat(together[kind]), torch.cat(apart[kind])
        if len(same) < MIN_SAMPLES or len(other) < MIN_SAMPLES:
            continue
        told[name] = auroc(other, same)
        even = torch.cat([torch.full((len(same),), 0.5 / len(same)), torch.full((len(other),), 0.5 / len(other))])
        targets = torch.cat([torch.ones(len(same)), torch.zeros(len(other))])
        sources.odds[kind] = fit_logistic(torch.cat([same, other])[:, None], targets, even, ridge=1e-6)
        sources.known[kind] = float(told[name] > INFORMATIVE and sources.odds[kind, 0] > 0)
    types = torch.cat([records.types[folds == fold] for fold in range(FOLDS)])
    ratios = torch.cat([sources.ratios(*pairs) for pairs in kept])
    for number, clean in enumerate(calibration.clean_sets):
        clean.reset()
        compared = (types > 0) if number == BOTH else types == number + 1
        rows = (compared.sum(1) > 2) & (composition(types, compared) == number)
        odds = oddness(ratios[rows], compared[rows]).amax(1)
        if int(odds.isfinite().sum()) >= MIN_SAMPLES:
            clean.remember(odds[odds.isfinite()][:, None])
    return told


def _with_others(records: SourceRecord) -> SourceRecord:
    """Samples with the sources of another one behind their own."""
    shift = max(1, len(records.types) // 2)
    types = torch.cat([records.types, records.types.roll(shift, 0)], 1)
    return SourceRecord(types, [torch.cat([content, content.roll(shift, 0)], 1) for content in records.contents])


def _fit_maps(sources: SourceAgreement, records: SourceRecord) -> None:
    """Fits, by type, where sources of one sample are close, from samples that have several."""
    for index, content in enumerate(records.contents):
        of_type = records.types == index + 1
        several = of_type.sum(1) > 1
        if int(several.sum()) < MIN_SAMPLES:
            continue
        found = content[several][of_type[several]]
        sample = torch.arange(len(content))[:, None].expand_as(of_type)[several][of_type[several]]
        components = sources.get_buffer(f"{index}_map").shape[1]
        standard = standardised(sources, index, found)
        keep_map(sources, index, fit_discriminants(standard, sample, components=components))


def _fit_pairs(agreement: Agreement, records: SourceRecord) -> None:
    """Fits what images and texts share, by the first of each of the samples that have both."""
    firsts = [(records.types == index + 1).long().argmax(1) for index in range(len(records.contents))]
    both = torch.stack([(records.types == index + 1).any(1) for index in range(len(firsts))]).all(0)
    if int(both.sum()) < MIN_SAMPLES:
        return
    rows = both.nonzero()[:, 0]
    agreement.fit_shared([of[rows, first[rows]] for of, first in zip(records.contents, firsts, strict=True)])
