"""How sure a model is of the first token that it generates."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


class FirstTokens(LogitsProcessor):
    """Keeps the probability of the likeliest first token, and changes no score.

    Attributes:
        sureness: (B,), times the beams or samples of each prompt; `None` before anything was generated.
    """

    def __init__(self) -> None:
        self.sureness: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.sureness is None:
            self.sureness = scores.detach().float().softmax(-1).amax(-1)
        return scores

    @classmethod
    @contextlib.contextmanager
    def kept(cls, kwargs: dict[str, Any]) -> Iterator["FirstTokens"]:
        """One among the processors of a call of `generate`, but where an assistant runs first."""
        first = cls()
        if kwargs.get("assistant_model") is None and kwargs.get("prompt_lookup_num_tokens") is None:
            kwargs["logits_processor"] = LogitsProcessorList([first, *(kwargs.get("logits_processor") or ())])
        yield first
