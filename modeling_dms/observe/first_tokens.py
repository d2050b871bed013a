"""How sure a model is of the first token that it generates."""

from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


def asked_for(name: str, kwargs: dict[str, Any], own: Any) -> Any:
    """What a call of `generate` asks for: by its arguments, by its `generation_config`, or by the model's `own`."""
    asked = (kwargs.get(name), *(getattr(config, name, None) for config in (kwargs.get("generation_config"), own)))
    return next((value for value in asked if value is not None), None)


class FirstTokens(LogitsProcessor):
    """Keeps the probability of the likeliest first token, and changes no score.

    Args:
        kwargs: of a call of `generate`, among whose processors this one is added unless an assistant runs first.
        own: the model's own `generation_config`.

    Attributes:
        sureness: (B,), times the beams or samples of each prompt; `None` before anything was generated.
    """

    def __init__(self, kwargs: dict[str, Any], own: Any):
        self.sureness: Tensor | None = None
        if not any(asked_for(name, kwargs, own) is not None for name in ASSISTED):
            kwargs["logits_processor"] = LogitsProcessorList([self, *(kwargs.get("logits_processor") or ())])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.sureness is None:
            self.sureness = scores.detach().float().softmax(-1).amax(-1)
        return scores
