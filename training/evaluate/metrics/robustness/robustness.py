"""Robustness to corruption as a module of `evaluate`."""

from typing import Any

import datasets
import evaluate
import numpy as np

import modeling_dms.training.evaluate.metrics.checks as checks
import modeling_dms.training.evaluate.metrics.confidence as confidence
import modeling_dms.training.evaluate.metrics.robust as robust


_INPUTS = """
Args:
    predictions: (C, n), the method's scores under C conditions on the same n samples, 1 where an answer is right.
    references: (C, n), those of the method to compare with, such as static weights.
    clean: (n,), the method's scores without corruption.
    oracle: (C, n), scores with the best fixed weights.
    confidences: (C, n), the method's probabilities of its answers.
    weights, corrupted: (C, n), a modality's weight, and (C,), True where that modality is the corrupted one.

Returns:
    `score` and `reference_score`; `difference` of the two with `difference_interval`; `mean_corruption_error` relative
    to the references; `mcnemar_p`, one a condition, if all scores are 0 or 1. With `clean`: `multimodal_impact` and
    `relative_robustness`. With `oracle`: `oracle_gap_closed` and `oracle_gap_closed_interval`. With `confidences`:
    `aurc` and `expected_calibration_error`. With `weights` and `corrupted`: `modality_auroc`. A ratio whose
    denominator is 0 is NaN; intervals are at 95%.
"""


class Robustness(evaluate.Metric):
    """A method under corruption against another one; a prediction or reference is one condition's row of scores."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Robustness of a multimodal model to corruption, relative to another model and an oracle.",
            citation=(
                "Qiu et al., Benchmarking Robustness of Multimodal Image-Text Models under Distribution Shift, 2022; "
                "Hendrycks & Dietterich, Benchmarking Neural Network Robustness to Common Corruptions, ICLR 2019"
            ),
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("float64")),
                }
            ),
        )

    def _compute(
        self, predictions, references, clean=None, oracle=None, confidences=None, weights=None, corrupted=None
    ) -> dict[str, Any]:
        scores, others = checks.in_unit_interval(predictions=predictions, references=references)
        if scores.ndim != 2:
            raise ValueError(f"predictions has the shape {scores.shape}, not (conditions, samples)")
        if (weights is None) != (corrupted is None):
            raise ValueError("weights and corrupted go together")
        difference = robust.paired_difference(scores, others)
        result: dict[str, Any] = {
            "score": float(scores.mean()),
            "reference_score": float(others.mean()),
            "difference": difference.mean,
            "difference_interval": difference[1:],
            "mean_corruption_error": robust.mean_corruption_error(1 - scores.mean(1), 1 - others.mean(1)),
        }
        if np.isin([scores, others], (0, 1)).all():
            result["mcnemar_p"] = [robust.mcnemar(*pair) for pair in zip(scores, others, strict=True)]
        if clean is not None:
            (clean,) = checks.in_unit_interval(clean=clean)
            result["multimodal_impact"] = robust.multimodal_impact(clean.mean(), scores.mean(1))
            result["relative_robustness"] = 1 - result["multimodal_impact"]
        if oracle is not None:
            triple = (others, scores, *checks.in_unit_interval(oracle=oracle))
            result["oracle_gap_closed"] = robust.oracle_gap_closed(*triple)
            result["oracle_gap_closed_interval"] = robust.bootstrap_interval(robust.oracle_gap_closed, *triple)
        if confidences is not None:
            result["aurc"] = confidence.aurc(confidences, scores)
            result["expected_calibration_error"] = confidence.expected_calibration_error(confidences, scores)
        if corrupted is not None and weights is not None:
            (flags,) = checks.finite(corrupted=corrupted)
            by_sample = np.repeat(flags.reshape(-1, 1), scores.shape[1], axis=1)
            result["modality_auroc"] = robust.modality_auroc(weights, by_sample)
        return result
