"""Metrics: formulas as plain functions on numpy arrays and strings, and the same as modules of `evaluate`.

The functions are in `vqa`, `captions`, `retrieval`, `robust` and `confidence`, and need no `evaluate`. Each folder is
one `evaluate.Metric`, to be loaded by its path (`evaluate.load("training/evaluate/metrics/cider")`) or imported as a
class.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from modeling_dms.training.evaluate.metrics.cider.cider import CaptionScores
    from modeling_dms.training.evaluate.metrics.retrieval_recall.retrieval_recall import RetrievalRecall
    from modeling_dms.training.evaluate.metrics.robustness.robustness import Robustness
    from modeling_dms.training.evaluate.metrics.vqa_accuracy.vqa_accuracy import VQAAccuracy

_MODULES = {
    "CaptionScores": "cider",
    "RetrievalRecall": "retrieval_recall",
    "Robustness": "robustness",
    "VQAAccuracy": "vqa_accuracy",
}

__all__ = ["CaptionScores", "RetrievalRecall", "Robustness", "VQAAccuracy"]


def __getattr__(name: str) -> type:
    """The metric classes, on first use: they import `evaluate`, which the plain functions do without."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}.{_MODULES[name]}"), name)
