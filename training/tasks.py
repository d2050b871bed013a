"""What a model is asked, and how its answers are scored: one number a sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from modeling_dms.training.data import PromptCollator, Sample
from modeling_dms.training.methods import Batch, Method, extended


class Task(Protocol):
    """A task of evaluation. Batches are answered apart from each other, the answers of a whole data set are scored
    together."""

    name: str
    metric: str

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch with `sample_ids`, as methods take it."""
        ...

    def answer(self, method: Method, model: PreTrainedModel, batch: Batch, decision: Tensor) -> list[dict[str, Any]]:
        """For each sample what `scores` needs, as plain Python values."""
        ...

    def scores(self, answers: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """`score` (n,), from 0 to 1, and where the task has them `confidence` (n,) and further metrics, (n,) each."""
        ...


def score_candidates(
    method: Method, model: PreTrainedModel, batch: Batch, decision: Tensor, candidates: Sequence[Sequence[int]]
) -> Tensor:
    """Log-likelihoods of candidate answers, each a list of token ids, after left-padded prompts: (B, C).

    Raises:
        ValueError: for an encoder-decoder, or an empty candidate.
    """
    if model.config.is_encoder_decoder or model.config.get_text_config().is_encoder_decoder:
        raise ValueError("ranking answers needs a decoder-only language model; generate them instead")
    if not candidates or not all(candidates):
        raise ValueError("each candidate answer must have at least one token")
    if all(len(candidate) == 1 for candidate in candidates):
        logits = method.logits(model, batch, decision, logits_to_keep=1)[:, -1]
        return logits.float().log_softmax(-1)[:, [candidate[0] for candidate in candidates]]
    columns = []
    for candidate in candidates:
        tokens = torch.tensor([candidate]).expand(len(batch["input_ids"]), -1)
        longer = extended(batch, batch["input_ids"], tokens[:, :-1])
        logits = method.logits(model, longer, decision, logits_to_keep=len(candidate))
        log_p = logits[:, -len(candidate) :].float().log_softmax(-1)  # (B, N, K)
        columns.append(log_p.gather(-1, tokens[..., None].to(log_p.device)).sum((1, 2)))
    return torch.stack(columns, 1)


@dataclass
class VisualQuestionAnswering:
    """Answers by ranking a list, or by generation where there is none.

    Attributes:
        processor: of the checkpoint.
        candidates: the answers to choose from.
        max_new_tokens: longest generated answer.
    """

    processor: ProcessorMixin
    candidates: Sequence[str] | None = None
    max_new_tokens: int = 10
    name: str = "vqa"
    metric: str = "VQA accuracy"

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return PromptCollator(self.processor, with_ids=True)(samples)

    def answer(self, method: Method, model: PreTrainedModel, batch: Batch, decision: Tensor) -> list[dict[str, Any]]:
        tokenizer: PreTrainedTokenizerBase = self.processor.tokenizer
        if self.candidates is None:
            ids = method.generate(model, batch, decision, max_new_tokens=self.max_new_tokens)
            new = ids[:, -self.max_new_tokens :] if ids.shape[1] > batch["input_ids"].shape[1] else ids
            return [{"prediction": text.strip()} for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
        tokens = [tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] for answer in self.candidates]
        confidence, chosen = score_candidates(method, model, batch, decision, tokens).softmax(-1).max(-1)
        return [
            {"prediction": self.candidates[index], "confidence": value}
            for index, value in zip(chosen.tolist(), confidence.tolist(), strict=True)
        ]

    def scores(self, answers: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        right = [float(a["prediction"] == s.answers[0]) for a, s in zip(answers, samples, strict=True)]
        found = {"score": np.array(right)}
        if answers and "confidence" in answers[0]:
            found["confidence"] = np.array([answer["confidence"] for answer in answers])
        return found
