"""How sure a model is of the first token that it generates."""

from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


class FirstTokens(LogitsProcessor):
    """Keeps the probability of the likeliest first token, and changes no score.

    Args:
        kwargs: of a call of `generate`, among whose processors this one is added unless an assistant runs first.

    Attributes:
        sureness: (B,), times the beams or samples of each prompt; `None` before anything was generated.
    """

    def __init__(self, kwargs: dict[str, Any]):
        self.sureness: Tensor | None = None
        if kwargs.get("assistant_model") is None and kwargs.get("prompt_lookup_num_tokens") is None:
            kwargs["logits_processor"] = LogitsProcessorList([self, *(kwargs.get("logits_processor") or ())])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.sureness is None:
            self.sureness = scores.detach().float().softmax(-1).amax(-1)
        return scores
