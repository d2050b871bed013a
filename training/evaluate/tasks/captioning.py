"""Image captioning."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from modeling_dms.training.data import Sample
from modeling_dms.training.evaluate.methods import Batch, Method
from modeling_dms.training.evaluate.metrics.captions import bleu, cider_d, rouge_l, simple_tokenizer
from modeling_dms.training.evaluate.tasks.base import PromptedTask


@dataclass
class Captioning(PromptedTask):
    """Describes an image, from its context too where there is one, as the data set's question asks for it."""

    max_new_tokens: int = field(default=30, kw_only=True)
    name: str = "captioning"
    metric: str = "CIDEr-D"

    def answer(self, method: Method, model: PreTrainedModel, batch: Batch, decision: Tensor) -> list[dict[str, Any]]:
        """`prediction`."""
        return [{"prediction": text} for text in self.generated(method, model, batch, decision)]

    def scores(self, answers: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """`score`: CIDEr-D in [0, 10], its idf over the references of all samples. `rouge_l` and `bleu_4` in [0, 1];
        BLEU-4 of the single caption, whose mean is not that of the corpus.

        Raises:
            ValueError: if there is no sample, or one without answers.
        """
        captions = [simple_tokenizer(answer["prediction"]) for answer in answers]
        references = [[simple_tokenizer(text) for text in sample.answers] for sample in samples]
        single = [bleu([caption], [own])[-1] for caption, own in zip(captions, references, strict=True)]
        return {
            "score": cider_d(captions, references),
            "bleu_4": np.array(single),
            "rouge_l": rouge_l(captions, references),
        }
