"""Visual question answering."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from modeling_dms.training.data import Sample
from modeling_dms.training.evaluate.methods import Batch, Method
from modeling_dms.training.evaluate.metrics.vqa import vqa_scores
from modeling_dms.training.evaluate.tasks.base import PromptedTask, score_candidates


@dataclass
class VisualQuestionAnswering(PromptedTask):
    """Answers by ranking a list by likelihood, or by generation where there is none. Scored by VQA accuracy, with the
    official normalisation, against all of a sample's answers.

    Attributes:
        candidates: the answers to choose from.
    """

    candidates: Sequence[str] | None = None
    name: str = "vqa"
    metric: str = "VQA accuracy"

    def longest_answer(self) -> int:
        if self.candidates is None:
            return self.max_new_tokens
        return max((len(self.tokens(answer)) for answer in self.candidates), default=0)

    def answer(self, method: Method, model: PreTrainedModel, batch: Batch, decision: Tensor) -> list[dict[str, Any]]:
        """`prediction`, and its `confidence` among the candidates if there are any."""
        if self.candidates is None:
            return [{"prediction": text} for text in self.generated(method, model, batch, decision)]
        tokens = [self.tokens(answer) for answer in self.candidates]
        confidence, chosen = score_candidates(method, model, batch, decision, tokens).softmax(-1).max(-1)
        return [
            {"prediction": self.candidates[index], "confidence": value}
            for index, value in zip(chosen.tolist(), confidence.tolist(), strict=True)
        ]

    def scores(self, answers: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """
        Raises:
            ValueError: if there is no sample, or one without answers.
        """
        predictions = [answer["prediction"] for answer in answers]
        found = {"score": vqa_scores(predictions, [sample.answers for sample in samples])}
        if self.candidates is not None:
            found["confidence"] = np.array([answer["confidence"] for answer in answers])
        return found
