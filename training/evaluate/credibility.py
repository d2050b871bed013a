"""Ways to weigh several sources of a prompt that DMS is compared with.

B prompts, S sources: images and passages, see `PromptCollator`. Prompts of one image and one context are weighed as
two sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from modeling_dms.observe.prompt import TEXT, VISION
from modeling_dms.training.evaluate.methods import Batch, Method, Scheduled, model_inputs, present, read
from modeling_dms.weigh.scheduler import uniform_weights


def is_image(model: PreTrainedModel, prompt: Batch) -> Tensor:
    """Which sources are images: (B, S)."""
    there = present(prompt)
    if "source_ids" not in prompt:
        return there & torch.tensor([True, False], device=there.device)
    ids = torch.where(prompt["input_ids"] == model.config.image_token_id, prompt["source_ids"], 0)
    numbers = torch.arange(1, there.shape[1] + 1, device=ids.device)
    return (ids[:, :, None] == numbers).any(1)


@dataclass(frozen=True)
class LeastLikelyDropped(Method):
    """The passage with the highest surprisal has no weight, where there are several; all else weighs alike."""

    name: str = "least likely dropped"

    def decide(self, model: PreTrainedModel, prompt: Batch) -> Tensor:
        """
        Raises:
            ValueError: for a model without signals, its scheduler being uniform, or without surprisal.
        """
        if model.config.get_text_config().is_encoder_decoder:
            raise ValueError(f"{self.name}: an encoder-decoder tells no surprisal of its prompt")
        signals = model.get_modality_weights(**model_inputs(prompt))[1]
        if signals is None:
            raise ValueError(f"{self.name}: a model with scheduler='uniform' computes no signals")
        there = present(prompt)
        texts = there & ~is_image(model, prompt)
        least = signals.surprisal.masked_fill(~texts, -torch.inf).argmax(1)
        dropped = F.one_hot(least, there.shape[1]).bool() & (texts.sum(1, keepdim=True) > 1)
        return uniform_weights(there & ~dropped)


@dataclass(frozen=True)
class LikeliestSource(Method):
    """Each source answers alone, and the one whose first token is the likeliest has all weight."""

    name: str = "likeliest source"

    @torch.no_grad()
    def decide(self, model: PreTrainedModel, prompt: Batch) -> Tensor:
        """
        Raises:
            ValueError: for a model without a language model.
        """
        there = present(prompt)
        sureness = torch.full(there.shape, -torch.inf, device=there.device)
        for number in range(there.shape[1]):
            rows = there[:, number]
            # a row without this source reads all it has, and its answer does not count
            alone = torch.where(rows[:, None], torch.eye(there.shape[1], dtype=torch.bool)[number].to(rows), there)
            first = read(model, prompt, uniform_weights(alone))[0].float().softmax(-1).amax(-1)
            sureness[:, number] = first.masked_fill(~rows, -torch.inf)
        return F.one_hot(sureness.argmax(1), there.shape[1]).float()


@dataclass(frozen=True)
class ByModality(Scheduled):
    """A scheduler's weights of image and text, all images and all passages together."""

    name: str = "by modality"

    def _joined(self, model: PreTrainedModel, prompt: Batch) -> Batch:
        if "source_ids" not in prompt:
            return prompt
        kinds = torch.where(prompt["input_ids"] == model.config.image_token_id, VISION, TEXT)
        joined = {name: value for name, value in prompt.items() if name != "source_ids"}
        return joined | {"modality_ids": torch.where(prompt["source_ids"] > 0, kinds, 0)}

    def judge(self, model: PreTrainedModel, prompt: Batch) -> tuple[Tensor, Tensor | None]:
        return super().judge(model, self._joined(model, prompt))

    def decide(self, model: PreTrainedModel, prompt: Batch) -> Tensor:
        return super().decide(model, self._joined(model, prompt))

    def weights(self, decision: Tensor) -> None:
        """None of sources."""

    def logits(self, model: PreTrainedModel, prompt: Batch, decision: Tensor) -> Tensor:
        return super().logits(model, self._joined(model, prompt), decision)

    def log_likelihood(
        self, model: PreTrainedModel, prompt: Batch, decision: Tensor, continuations: Sequence[Sequence[int]]
    ) -> Tensor:
        return super().log_likelihood(model, self._joined(model, prompt), decision, continuations)

    def generate(self, model: PreTrainedModel, prompt: Batch, decision: Tensor, **kwargs: Any) -> Tensor:
        return super().generate(model, self._joined(model, prompt), decision, **kwargs)
