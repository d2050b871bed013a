"""What the confidence in answers is worth: n samples, each with a confidence (such as the largest probability) and a
score, 1 where the answer is right and 0 where it is wrong, or between."""

import numpy as np

from modeling_dms.training.evaluate.metrics.checks import in_unit_interval, same_shape


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean error of the k most confident answers, k = 1 to n (Geifman & El-Yaniv, NeurIPS 2017).

    Answers of equal confidence count with their mean error, whatever their order.

    Args:
        confidence: (n,), any scale.
        correct: (n,), in [0, 1].

    Returns:
        coverage k / n and risk, (n,) each, in [0, 1]; the last risk is the mean error.
    """
    confidence, correct = same_shape(confidence=confidence, correct=correct)
    (correct,) = in_unit_interval(correct=correct)
    _, level, counts = np.unique(-confidence.ravel(), return_inverse=True, return_counts=True)
    error = np.bincount(level, weights=1 - correct.ravel()) / counts
    answered = np.arange(1, correct.size + 1)
    return answered / correct.size, np.cumsum(np.repeat(error, counts)) / answered


def aurc(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Area under the risk-coverage curve, the mean risk over coverages: lower is better, and confidence that says
    nothing gives the mean error (Geifman et al., ICLR 2019)."""
    return float(risk_coverage(confidence, correct)[1].mean())


def risk_at(coverage: float, confidence: np.ndarray, correct: np.ndarray) -> float:
    """Mean error of the most confident answers that make up a share `coverage` of all, in (0, 1]."""
    answered, risk = risk_coverage(confidence, correct)
    return float(risk[np.searchsorted(answered, coverage - 1e-9)])


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """ECE = sum_b |B_b| / n * |mean correct - mean confidence| over bins ((b - 1) / bins, b / bins] (Guo et al., ICML
    2017).

    Args:
        confidence: (n,), probabilities; 0 is in the first bin.
        correct: (n,), in [0, 1].

    Returns:
        In [0, 1].

    Raises:
        ValueError: if `bins` is below 1, or an argument outside [0, 1].
    """
    confidence, correct = in_unit_interval(confidence=confidence, correct=correct)
    if bins < 1:
        raise ValueError(f"bins is {bins}, not 1 or more")
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    bin_of = np.digitize(confidence.ravel(), inner, right=True)
    return float(np.abs(np.bincount(bin_of, weights=(correct - confidence).ravel())).sum() / confidence.size)
