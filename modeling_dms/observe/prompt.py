"""What a prompt holds where, and the small data classes that carry it."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling_dms.observe.images import Images
from modeling_dms.outputs import Weighed


VISION, TEXT = 1, 2  # values of `modality_ids`; 0 is neutral
# what the calls of a DMS class take beside those of its vanilla class
OWN = ("modality_ids", "modality_mask", "modality_weights", "source_ids", "source_types", "schedule_target")


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
        content: (B, F), what is compared with that of the other modality.
        in_prompt: whether it was read within the prompt, and not alone.
        closer: of a text read within its prompt, the rows (b,) that were read alone as well: those that looked
            suspicious, or all.
        matched: (B,), the log-odds that a text belongs to its image, by a matching head of the backbone's own; `None`
            where it has none, or nobody has asked.
    """

    tokens: Tensor
    mask: Tensor
    statistics: Tensor
    content: Tensor
    numbers: Tensor | None = None
    surprisal: Tensor | None = None
    in_prompt: bool = False
    closer: "tuple[Tensor, ModalityFeatures] | None" = None
    matched: Tensor | None = None

    @property
    def gain(self) -> Tensor | None:
        """What the backbone itself says of how far the images and texts belong together, (B,): `matched`, or by how
        much likelier its prompt, and so its image, makes each token of a text on average, in nats. `None` without a
        matching head, unless all texts have been read both ways.

        The latter is the logarithm of what VisualGPTScore (Lin et al., 2023) compares, p(text | image) / p(text).
        """
        if self.matched is not None:
            return self.matched
        if self.closer is None or self.surprisal is None or len(self.closer[0]) < len(self.surprisal):
            return None
        alone = self.closer[1].surprisal
        return None if alone is None else alone - self.surprisal


@dataclass
class Prompt:
    """Prompts whose modalities are told apart.

    Attributes:
        input_ids: (B, P), or `None` where `embeddings` (B, P, D) are given.
        attention_mask: (B, P), or `None`.
        modality_ids: (B, P).
        modality_mask: (B, M).
        placeholders: (B, P), where image tokens stand.
        owner: (I,), the row that each image belongs to.
        given: (B, M), the caller's weights.
        source_types: (B, S), `VISION` or `TEXT` or, where there is no such source, 0. Given, `modality_ids` are the
            numbers of sources, and M is S.
    """

    input_ids: Tensor | None
    embeddings: Tensor | None
    attention_mask: Tensor | None
    modality_ids: Tensor
    modality_mask: Tensor
    placeholders: Tensor
    images: Images | None
    owner: Tensor | None
    given: Tensor | None
    source_types: Tensor | None = None


@dataclass
class Schedule:
    """Weights of a batch and what they were made from. It goes along with the cache of the prompt.

    Attributes:
        modality_ids: (B, P).
        modality_mask: (B, M).
        weights: (B, M).
        output: `None` where no signals were needed.
        bias: (B, P) on the prompt's keys; `None` where they are left as they are.
        look: how to take a second look; `None` where none is to be taken.
        reliability: (B,), NaN where no second look has told it.
    """

    modality_ids: Tensor
    modality_mask: Tensor
    weights: Tensor
    output: Weighed | None = None
    bias: Tensor | None = None
    look: "SecondLook | None" = None
    reliability: Tensor | None = None


@dataclass
class SecondLook:
    """Further passes over prompts, each with one modality alone, that decide which of them to believe.

    Attributes:
        biases: (B, P) of each pass.
        decide: makes a schedule of what the output layer reads (B, P, D), in the first pass and in each of these.
    """

    biases: Sequence[Tensor]
    decide: Callable[[Sequence[Tensor]], Schedule]


def by_name(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names, of those given by place in this order.

    Raises:
        TypeError: for one given twice, or more by place than there are names.
    """
    if len(args) > len(names):
        raise TypeError(f"at most {len(names)} arguments can be given by place, got {len(args)}")
    placed = dict(zip(names, args, strict=False))
    for name in placed:
        if name in kwargs:
            raise TypeError(f"argument {name!r} is given twice, by place and by name")
    return {**placed, **kwargs}


def with_own_parameters(method: Callable, vanilla: Callable, own: Sequence[str] = OWN) -> Callable:
    """`method` with the signature of the vanilla one and `own` behind it: `Trainer` and `generate` look there for what
    a model takes."""

    @functools.wraps(method)
    def call(self, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    signature = inspect.signature(vanilla)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in own]
    parameters += [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


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


def take(states: Tensor, index: Tensor, rows: Tensor | None = None) -> Tensor:
    """(B, L, D), (B, N) -> (B, N, D); (b, N) -> (b, N, D) of some rows (b,), of which one may come several times."""
    if rows is not None:
        return states[rows[:, None], index]
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
