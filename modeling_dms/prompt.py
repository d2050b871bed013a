"""What a prompt holds where, and the small data classes that carry it from the backbone to the method."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling_dms.outputs import DMSOutput


VISION, TEXT = 1, 2  # values of `modality_ids`; 0 is neutral
CACHED_WITHOUT_WEIGHTS = (
    "decoding with a cache needs the `modality_weights` and `modality_ids` that the prefill returned: without them "
    "the new tokens would attend to the prompt unweighted"
)


@dataclass
class EncodedImages:
    """Images as the backbone encodes them.

    Attributes:
        outputs: what the backbone's `get_image_features` returned.
        tokens: (I, N, D), projected into the language model's space.
        states: (I, N', D') each, hidden states of the chosen layers of the vision tower; `None` if they were not kept.
        encode: dropout masks (T, size) on the inputs of the projector / Q-Former -> (T, I, N, D).
        encoder_size: size of these inputs.
    """

    outputs: Any
    tokens: Tensor
    states: list[Tensor] | None
    encode: Callable[[Tensor], Tensor]
    encoder_size: int

    def expand(self, count: int) -> "EncodedImages":
        """One image for `count` texts: the same features for every pair."""
        if len(self.tokens) == count:
            return self
        repeat = count // len(self.tokens)
        states = None if self.states is None else [s.repeat(repeat, 1, 1) for s in self.states]
        encode = self.encode
        return EncodedImages(
            self.outputs,
            self.tokens.repeat(repeat, 1, 1),
            states,
            lambda masks: encode(masks).repeat(1, repeat, 1, 1),
            self.encoder_size,
        )


@dataclass
class Schedule:
    """Weights of a batch and what they were made from.

    Attributes:
        modality_ids: (B, L).
        modality_mask: (B, M).
        weights: (B, M).
        embeddings: (B, L, D), text embeddings with the image tokens filled in.
        output: `None` where no signals were needed.
    """

    modality_ids: Tensor
    modality_mask: Tensor
    weights: Tensor
    embeddings: Tensor
    output: DMSOutput | None


def compact(where: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the True entries of each row, moved to the left.

    Args:
        where: (B, L).

    Returns:
        Indices (B, N) and a mask (B, N) of the real ones, with N >= 1 the largest count; in a program of
        `torch.export`, whose shapes cannot hang on data, N = L.
    """
    count = where.sum(1)
    size = where.shape[1] if torch.compiler.is_exporting() else max(1, int(count.max()))
    order = (~where).long().argsort(dim=1, stable=True)[:, :size]
    return order, torch.arange(size, device=where.device) < count[:, None]


def take(states: Tensor, index: Tensor) -> Tensor:
    """(B, L, D), (B, N) -> (B, N, D)."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
