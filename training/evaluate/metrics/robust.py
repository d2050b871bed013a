"""Robustness to corruption, and whether one method differs from another.

C conditions (corruptions), n samples; a score is 1 where an answer is right and 0 where it is wrong, or between. A
ratio whose denominator is 0 is NaN. What is empty or holds NaN or infinity raises a ValueError with its name.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, rankdata

from modeling_dms.training.evaluate.metrics.checks import finite, same_shape


def relative_drop(clean: float | np.ndarray, corrupted: np.ndarray) -> np.ndarray:
    """(clean - corrupted) / clean: the share of a score that a corruption takes.

    Args:
        clean, corrupted: scores of 0 or more, of one shape or one number for all.

    Returns:
        Of the shape of `corrupted`, at most 1, negative where the corruption helps.

    Raises:
        ValueError: if a score is negative.
    """
    before, after = finite(clean=clean, corrupted=corrupted)
    if before.min() < 0 or after.min() < 0:
        raise ValueError("clean and corrupted must be scores of 0 or more")
    before, after = np.broadcast_arrays(before, after)
    return np.divide(before - after, before, out=np.full(after.shape, np.nan), where=before > 0)


def multimodal_impact(clean: float | np.ndarray, corrupted: np.ndarray) -> float:
    """MMI, the mean `relative_drop` over conditions (Qiu et al., "Benchmarking Robustness of Multimodal Image-Text
    Models under Distribution Shift", arXiv 2212.08044)."""
    return float(relative_drop(clean, corrupted).mean())


def relative_robustness(clean: float | np.ndarray, corrupted: np.ndarray) -> np.ndarray:
    """1 - `relative_drop`: the share of a score that is left (Schiappa et al., NeurIPS 2022)."""
    return 1 - relative_drop(clean, corrupted)


def mean_corruption_error(errors: np.ndarray, reference_errors: np.ndarray) -> float:
    """mCE, the mean over corruptions c of sum_s E_(s,c) / sum_s E_ref_(s,c) (Hendrycks & Dietterich, ICLR 2019).

    Args:
        errors, reference_errors: (C,) or (C, severities), error rates of the method and of the reference model.

    Returns:
        0 or more; 1 for the reference itself (the paper has 100 times this). NaN where the reference makes no error
        under some corruption.

    Raises:
        ValueError: if an error is negative.
    """
    own, reference = same_shape(errors=errors, reference_errors=reference_errors)
    if own.min() < 0 or reference.min() < 0:
        raise ValueError("errors and reference_errors must be 0 or more")
    own, reference = (array.reshape(len(array), -1).sum(1) for array in (np.atleast_1d(own), np.atleast_1d(reference)))
    return float(np.divide(own, reference, out=np.full(own.shape, np.nan), where=reference > 0).mean())


def oracle_gap_closed(static: np.ndarray, dms: np.ndarray, oracle: np.ndarray) -> float:
    """Pooled share of the oracle's gain: sum(DMS - static) / sum(oracle - static), over conditions and samples.

    Pooled, because where static is already good a single condition's gap is noise. NaN where there is no gap.

    Args:
        static, dms, oracle: (C, n) scores.
    """
    static, dms, oracle = same_shape(static=static, dms=dms, oracle=oracle)
    gap = (oracle - static).sum()
    return float((dms - static).sum() / gap) if gap > 0 else float("nan")


def modality_auroc(weights: np.ndarray, corrupted: np.ndarray) -> float:
    """How well a modality's weight tells whether it, or another modality, was corrupted: the probability that it is
    lower where it was, ties counting half (Mann-Whitney).

    Args:
        weights: (n,) or any shape, of one modality.
        corrupted: of that shape, True where that modality was corrupted, False where another was.

    Returns:
        In [0, 1]; 0.5 for weights that say nothing.

    Raises:
        ValueError: if only one of the two cases occurs.
    """
    weights, flags = same_shape(weights=weights, corrupted=corrupted)
    own = flags.ravel() != 0
    positives, negatives = int(own.sum()), int((~own).sum())
    if not positives or not negatives:
        raise ValueError("corrupted is the same for all samples: there is nothing to tell apart")
    ranks = rankdata(-weights.ravel())
    return float((ranks[own].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def bootstrap_interval(
    statistic: Callable[..., float], *arrays: np.ndarray, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval over samples (the last axis), the same resample for all arrays.

    Unlike `scipy.stats.bootstrap` it keeps a sample's conditions together and leaves out resamples where the statistic
    is NaN.

    Args:
        statistic: arrays -> number.
        arrays: (..., n) each.
    """
    arrays = tuple(map(np.atleast_1d, finite(**{f"arrays[{i}]": array for i, array in enumerate(arrays)})))
    sizes = {array.shape[-1] for array in arrays}
    if len(sizes) != 1:
        raise ValueError(f"arrays have {sorted(sizes)} samples, or there is none")
    size = sizes.pop()
    draws = np.random.default_rng(seed).integers(0, size, (resamples, size))
    values = np.array([statistic(*(array[..., draw] for array in arrays)) for draw in draws])
    values = values[~np.isnan(values)]
    if not values.size:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Difference(NamedTuple):
    """Mean difference of two methods' scores, and its interval."""

    mean: float
    low: float
    high: float


def paired_difference(first: np.ndarray, second: np.ndarray, **options) -> Difference:
    """Mean of first - second with its paired bootstrap interval.

    Args:
        first, second: (n,) or (C, n), scores of two methods on the same samples.
        options: of `bootstrap_interval`.
    """
    first, second = same_shape(first=first, second=second)
    return Difference(float((first - second).mean()), *bootstrap_interval(np.mean, first - second, **options))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Exact two-sided p-value of McNemar's test: that two methods are right equally often (McNemar, 1947).

    Of the b + c samples where just one is right, each is right on Binomial(b + c, 1/2) many.

    Args:
        first, second: (n,), 1 where an answer is right, 0 where it is wrong, under one condition: samples must be
            independent.

    Returns:
        In (0, 1]; 1 where the methods never differ.

    Raises:
        ValueError: if an array is not one-dimensional or not of zeros and ones.
    """
    first, second = same_shape(first=first, second=second)
    if first.ndim != 1 or not np.isin([first, second], (0, 1)).all():
        raise ValueError("first and second must be one-dimensional, of zeros and ones")
    wins, losses = int((first > second).sum()), int((first < second).sum())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
