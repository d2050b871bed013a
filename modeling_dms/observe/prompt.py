"""What a prompt holds where, and the small data classes that carry it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling_dms.outputs import DMSOutput


VISION, TEXT = 1, 2  # values of `modality_ids`; 0 is neutral


@dataclass
class ModalityFeatures:
    """What the backbone knows of one modality of B samples.

    Attributes:
        tokens: (B, N, D), in the language model's space.
        mask: (B, N), True for real tokens.
        statistics: (B, L, F), mean and standard deviation over tokens of the chosen layers.
        numbers: (B, P), what tells damage beside the layers: `pixel_statistics` or `surprisal_statistics`, NaN where
            they cannot be known; `None` where there are none.
        surprisal: (B,), the mean of a text's tokens in nats; `None` where nothing predicts them.
    """

    tokens: Tensor
    mask: Tensor
    statistics: Tensor
    numbers: Tensor | None = None
    surprisal: Tensor | None = None


@dataclass
class Schedule:
    """Weights of a batch and what they were made from. It goes along with the cache of the prompt.

    Attributes:
        modality_ids: (B, P).
        modality_mask: (B, M).
        weights: (B, M).
        output: `None` where no signals were needed.
        bias: (B, P) on the prompt's keys; `None` where they are left as they are.
    """

    modality_ids: Tensor
    modality_mask: Tensor
    weights: Tensor
    output: DMSOutput | None = None
    bias: Tensor | None = None


@dataclass
class Generation:
    """A running call of `generate`.

    Attributes:
        model: whose; an assistant model within the call is another.
        prompt: (B, P), the ids that it begins with, if it is given any.
        schedule: of the prompt, `None` where nothing could be observed.
    """

    model: Any
    prompt: Tensor | None
    schedule: Schedule | None

    def reads(self, model: Any, input_ids: Tensor | None, cache: Any) -> bool:
        """Whether a pass is one over the prompt and what follows it; guidance runs the model on another one."""
        if model is not self.model:
            return False
        # what `generate` runs itself has its cache from the start; without one, all is read anew for every token
        if cache is not None or input_ids is None or self.prompt is None:
            return True
        prompt = self.prompt.repeat_interleave(max(1, len(input_ids) // len(self.prompt)), 0)
        return torch.equal(input_ids[:, : prompt.shape[1]], prompt.to(input_ids.device))


def compact(where: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the True entries of each row, moved to the left.

    Args:
        where: (B, L).

    Returns:
        Indices (B, N) and a mask (B, N) of the real ones, with N >= 1 the largest count; N = L in a
        compiled or exported program, whose shapes cannot hang on data.
    """
    count = where.sum(1)
    size = where.shape[1] if torch.compiler.is_compiling() else max(1, int(count.max()))
    order = (~where).long().argsort(dim=1, stable=True)[:, :size]
    return order, torch.arange(size, device=where.device) < count[:, None]


def take(states: Tensor, index: Tensor) -> Tensor:
    """(B, L, D), (B, N) -> (B, N, D)."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
