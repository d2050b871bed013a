"""What every task of evaluation can do, and what tasks share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from modeling_dms.configuration.configuration_dms import MODALITIES
from modeling_dms.training.data import PromptCollator, Sample
from modeling_dms.training.data.collator import as_text
from modeling_dms.training.evaluate.methods import Batch, Method


class Task(Protocol):
    """A task of evaluation. Batches are answered apart from each other, the answers of a whole data set are scored
    together. A sample's answer does not depend on its batch."""

    name: str
    metric: str
    reads_contexts: ClassVar[bool] = True

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch with `sample_ids`, and, where it may hold several sources, with which are `damaged`, as methods take
        it.

        Raises:
            ValueError: naming the sample whose image cannot be read, or that cannot be asked.
        """
        ...

    def answer(self, method: Method, model: PreTrainedModel, batch: Batch, decision: Tensor) -> list[dict[str, Any]]:
        """For each sample what `scores` needs, as plain Python values."""
        ...

    def scores(self, answers: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """`score` (n,), the task's `metric`, and where the task has them `confidence` (n,) and further metrics, (n,)
        each. One number a sample, higher is better, so that samples can be resampled; from 0 to 1 but for CIDEr-D."""
        ...


@dataclass
class PromptedTask:
    """A task that asks each sample's own question.

    Attributes:
        processor: of the checkpoint.
        max_new_tokens: longest generated answer.
        max_length, whole_text: of the prompts, see `PromptCollator`.
    """

    reads_contexts: ClassVar[bool] = True

    processor: ProcessorMixin
    max_new_tokens: int = field(default=10, kw_only=True)
    max_length: int | None = field(default=None, kw_only=True)
    whole_text: bool = field(default=False, kw_only=True)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        collator = PromptCollator(
            self.processor, max_length=self.max_length, with_ids=True, whole_text=self.whole_text
        )
        batch = collator(samples)
        # which of the sources, or of image and context, are: (B, S), (B, M)
        count = max(1, int(batch["source_ids"].max())) if "source_ids" in batch else len(MODALITIES)
        damaged = torch.zeros(len(samples), count + 1, dtype=torch.bool)
        for row, sample in enumerate(samples):
            for number in sample.damaged_sources:
                if "source_ids" not in batch:
                    number = 1 if number == 1 and sample.image is not None else 2
                damaged[row, min(number, count + 1) - 1] = True  # what was cut comes last
        return {**batch, "damaged": damaged[:, :count]}

    def tokens(self, text: str) -> list[int]:
        """A text as it follows a prompt, without an end token."""
        text = as_text(self.processor, text)
        return self.processor.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]

    def longest_answer(self) -> int:
        """In tokens."""
        return self.max_new_tokens

    def generated(self, method: Method, model: PreTrainedModel, batch: Batch, decision: Tensor) -> list[str]:
        """What the model goes on with."""
        new = method.generate(model, batch, decision, max_new_tokens=self.max_new_tokens)
        return [text.strip() for text in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


def score_candidates(
    method: Method,
    model: PreTrainedModel,
    batch: Batch,
    decision: Tensor,
    candidates: Sequence[Sequence[int]],
    normalize: bool = False,
) -> Tensor:
    """Log-likelihoods of candidate answers to each prompt: (B, C).

    Args:
        candidates: C lists of token ids.
        normalize: the mean over a candidate's tokens instead of their sum.

    Raises:
        ValueError: if there is no candidate, or an empty one.
    """
    scores = method.log_likelihood(model, batch, decision, candidates)
    if normalize:
        scores = scores / torch.tensor([len(candidate) for candidate in candidates], device=scores.device)
    return scores
