"""Fits how far answers can be relied on, and whether it helps to lower what looks damaged."""

import math

import torch
from torch import Tensor

from modeling_dms.calibrate.calibration import Calibration
from modeling_dms.calibrate.counterfactual import LOWERED, NONE, Answers
from modeling_dms.calibrate.records import FOLDS, MIN_SAMPLES
from modeling_dms.calibrate.statistics import Reliability
from modeling_dms.evidence.typicality import auroc
from modeling_dms.weigh.reliability import reliability_numbers
from modeling_dms.weigh.second_look import BOTH, SURE_ALONE, believed, fit_arbiter


# the level of the test that the other modality cannot stand in
SURE = 0.05


def fit_lowering(calibration: Calibration, answers: Answers, p: Tensor) -> list[tuple[float, float]]:
    """Has each modality keep its weight, however damaged, for which the other one cannot stand in: a question cannot
    answer itself. To lower one is to move towards the answer to the other alone; where that is as good as the answer
    with `weight_floor` left to it, damage may take all weight.

    Args:
        p: (m, M + 1), the p-values of each source and of the pair.

    Returns:
        Of each modality, how often the other alone, and how often both, gave the answer to the sample as it was, where
        it was damaged and flagged and the other was neither; NaN where there were none.
    """
    found, flagged, damaged = [], p[:, :-1] <= calibration.config.alarm_rate, answers.families != NONE
    for modality in range(flagged.shape[1]):
        rows = (flagged & damaged)[:, modality] & (flagged.sum(1) == 1) & (damaged.sum(1) == 1)
        alone, both = answers.agrees[rows, 1 - modality], answers.agrees[rows, BOTH]
        dropped = bool(rows.any()) and alone.sum() >= answers.agrees[rows, LOWERED].sum()
        calibration.reliability.dropped[modality] = float(dropped)
        spared = chance(int((alone < both).sum()), int((alone != both).sum())) < SURE
        calibration.reliability.spared[modality] = float(spared)
        found.append((float(alone.mean()), float(both.mean())))
    return found


def chance(heads: int, tosses: int) -> float:
    """That of so many tosses of a fair coin so many heads come, or more: a one-sided sign test."""
    return sum(math.comb(tosses, count) for count in range(heads, tosses + 1)) / 2**tosses


def fit_reliability(calibration: Calibration, answers: Answers, p: Tensor, fold: Tensor) -> dict[str, float]:
    """Fits how far answers can be relied on, by answers to samples that were damaged or mismatched on purpose.

    Args:
        p: (m, M + 1), the p-values of each source and of the pair.
        fold: (m,).

    Returns:
        How well answers that agree are told from others, by what; nothing where too few were asked to fit anything.
    """
    reliability, rate = calibration.reliability, calibration.config.alarm_rate
    swapped = answers.sources[:, 0] != answers.sources[:, 1]
    flagged = (p[:, :-1] <= rate).sum(1)
    # the rule lowers what is flagged alone
    lowered = (p[:, :-1] <= rate) & (reliability.spared == 0) & (flagged == 1)[:, None]
    rows, which = torch.arange(len(p)), lowered.long().argmax(1)
    heard = torch.where(reliability.dropped[which] > 0, 1 - which, LOWERED).where(lowered.any(1), BOTH)
    # of the answers to one side alone, how sure it is stands among the numbers
    alone = answers.numbers[:, SURE_ALONE].sigmoid()
    agrees, sureness = answers.agrees[rows, heard], torch.cat([alone, answers.sureness], 1)[rows, heard]
    # a second look is fitted to what is flagged, or does not belong together, and falls on what raises an alarm
    looks, falls, kept = (flagged > 0) | swapped, (p <= rate).any(1), torch.zeros(len(p), 4)
    if int(looks.sum()) < MIN_SAMPLES:
        return {}
    reliability.rate.fill_(rate)
    first = _fit_one_look(reliability, reliability_numbers(sureness, p, rate), agrees, fold)
    for held in _held(fold):
        seen = looks & ~held
        numbers = reliability_numbers(answers.numbers, p, rate)
        _fit_odds(reliability, "look_", numbers[seen], answers.agrees[seen, :3])
        best, which_answer = believed(reliability.looked(answers.numbers, p), answers.numbers)
        second = torch.where(falls, answers.agrees[rows, which_answer], agrees)
        kept[held] = torch.stack([first, agrees, torch.where(falls, best, first), second], 1)[held]
    # all copies of a sample together
    sample = answers.sources[:, 0].float()
    chosen = sample.argsort(stable=True)[: len(reliability.kept)]
    reliability.kept.zero_()[: len(chosen)] = torch.cat([kept, sample[:, None]], 1)[chosen]
    reliability.count.fill_(float(len(chosen)))

    return {
        "first token's probability": _told(sureness, agrees),
        "one look": _told(kept[:, 0], kept[:, 1]),
        "second look": _told(kept[:, 2], kept[:, 3]),
    }


def _told(confidence: Tensor, right: Tensor) -> float:
    """How well right answers are told from wrong ones."""
    return auroc(confidence[right == 0], confidence[right == 1])


def _held(fold: Tensor) -> list[Tensor]:
    """Which rows (m,) are held out of each fit, and none of the last one."""
    return [*(fold == number for number in range(FOLDS)), torch.zeros(len(fold), dtype=torch.bool)]


def _fit_one_look(reliability: Reliability, numbers: Tensor, agrees: Tensor, fold: Tensor) -> Tensor:
    """Fits reliability after one look: to all numbers (m, F), or, where these tell no more, to how sure the answer is.

    Returns:
        It, (m,), by fits that a row took no part in.
    """
    best, most = torch.zeros(len(numbers)), -1.0
    # how sure the answer is comes first; what is always 0 has no say
    for some in (numbers * (torch.arange(numbers.shape[1]) == 0), numbers):
        before = {name: buffer.clone() for name, buffer in reliability.state_dict().items()}
        found = torch.zeros(len(numbers))
        for held in _held(fold):
            _fit_odds(reliability, "", some[~held], agrees[~held, None])
            found[held] = reliability.told(some[held])
        if not (area := _told(found, agrees)) <= most:  # NaN where all answers are alike
            best, most = found, area
        else:
            reliability.load_state_dict(before)
    return best


def _fit_odds(reliability: Reliability, name: str, numbers: Tensor, agrees: Tensor) -> None:
    """Logistic regressions of agreement (n, A) on numbers (n, F)."""
    for part, value in vars(fit_arbiter(numbers, agrees)).items():
        reliability.get_buffer(f"{name}{part}").copy_(value.squeeze(0) if part == "coefficients" else value)
