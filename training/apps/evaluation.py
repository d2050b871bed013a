"""Answers, weights and signals of a model over samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling_dms.outputs import ModalitySignals
from modeling_dms.training.data import PromptCollator, Sample


@dataclass
class Prediction:
    """What a model said of n samples.

    Attributes:
        tokens: (n,), the most likely next token.
        weights: (n, M).
        signals: (n, M) each, `None` where the caller gave the weights.
    """

    tokens: Tensor
    weights: Tensor
    signals: ModalitySignals | None

    def correct(self, wanted: Tensor) -> np.ndarray:
        """(n,), 1 where the answer is right."""
        return (self.tokens == wanted).numpy().astype(float)


def answer_tokens(collator: PromptCollator, samples: Sequence[Sample]) -> Tensor:
    """The token that answers each sample: (n,).

    Raises:
        ValueError: naming the sample whose answer is more than one token long.
    """
    wanted = []
    for sample in samples:
        ids = collator.processor.tokenizer(f" {sample.answers[0]}", add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"sample {sample.id!r}: answer {sample.answers[0]!r} is {len(ids)} tokens long, not one")
        wanted += ids
    return torch.tensor(wanted)


@torch.no_grad()
def predict(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], weights: Sequence[Sequence[float] | None]
) -> list[Prediction]:
    """One-token answers under several weightings; the images of a batch are encoded once for all of them.

    Args:
        model: a DMS model.
        batches: from a `PromptCollator` without labels.
        weights: for each weighting (vision, text), or `None` for the scheduler's own.
    """
    rows: list[list] = [[] for _ in weights]
    for batch in batches:
        inputs: dict[str, Any] = model.with_images_encoded(batch)
        for row, weight in zip(rows, weights, strict=True):
            given = None if weight is None else torch.tensor([weight]).expand(len(batch["input_ids"]), -1)
            row.append(model(**inputs, modality_weights=given, logits_to_keep=1))
    predictions = []
    for row in rows:
        signals = None
        if row[0].modality_signals is not None:
            signals = ModalitySignals(
                **{name: torch.cat([out.modality_signals[name] for out in row]) for name in row[0].modality_signals}
            )
        tokens = torch.cat([out.logits[:, -1].argmax(-1) for out in row])
        predictions.append(Prediction(tokens, torch.cat([out.modality_weights for out in row]), signals))
    return predictions
