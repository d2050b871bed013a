"""The images of a batch as the backbone encodes them, and which row each belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from modeling_dms.evidence.typicality import token_statistics


@dataclass
class Images:
    """Encoded images, one after the other through the rows of a batch.

    Attributes:
        outputs: what the backbone's `get_image_features` returned.
        tokens: (T, D), the image tokens that the language model reads, of all images.
        lengths: (I,), how many of them each image has. A backbone that keeps the images of a row together counts them
            as one.
        statistics: (I, L, F), of the chosen layers of the vision tower; `None` if they were not watched.
        pixels: (I, P), `pixel_statistics`; `None` where nothing asks for them.
    """

    outputs: Any
    tokens: Tensor
    lengths: Tensor
    statistics: Tensor | None
    pixels: Tensor | None = None

    @classmethod
    def of(cls, outputs: Any) -> "Images":
        """What `get_image_features` of a DMS class, or of a vanilla one, returned."""
        kept = [getattr(outputs, name, None) for name in ("statistics", "pixels")]
        pooled = there(outputs.pooler_output)
        if isinstance(pooled, Tensor):  # (I, N, D)
            lengths = torch.full((pooled.shape[0],), pooled.shape[1], device=pooled.device)
            return cls(outputs, pooled.flatten(0, 1), lengths, *kept)
        tokens = torch.cat(list(pooled))
        return cls(outputs, tokens, torch.tensor([len(p) for p in pooled], device=tokens.device), *kept)

    def expand(self, count: int) -> "Images":
        """One image for `count` texts: the same features for every pair."""
        if len(self.lengths) == count:
            return self
        repeat = count // len(self.lengths)
        kept = [k if k is None else k.repeat(repeat, *[1] * (k.ndim - 1)) for k in (self.statistics, self.pixels)]
        return Images(self.outputs, self.tokens.repeat(repeat, 1), self.lengths.repeat(repeat), *kept)

    def fit(self, placeholders: Tensor) -> bool:
        """Whether the prompts hold the tokens of these images, each image within one row.

        Args:
            placeholders: (B, P), True where the prompt holds an image token.
        """
        if torch.compiler.is_compiling():
            return True
        in_rows, ends = placeholders.sum(1), self.lengths.to(placeholders.device).cumsum(0)
        row_ends = in_rows.cumsum(0)
        # images end where rows end, and nothing is left over
        return int(row_ends[-1]) == len(self.tokens) and bool(torch.isin(row_ends[in_rows > 0], ends).all())

    def rows(self, placeholders: Tensor) -> Tensor:
        """The row of the batch that each image belongs to: (I,).

        Args:
            placeholders: (B, P), True where the prompt holds an image token.

        Raises:
            ValueError: if the tokens of images and prompts do not match.
        """
        in_rows = placeholders.sum(1)
        if not self.fit(placeholders):
            each = " or ".join(map(str, self.lengths.unique().tolist()))
            # begins as the vanilla classes say it
            raise ValueError(
                f"Image features and image tokens do not match: {len(self.lengths)} image(s) need {len(self.tokens)} "
                f"image tokens, {each} each, but the prompts hold {in_rows.tolist()} in turn: the number of images "
                "differs, truncation cut some, or the processor counts otherwise than the model (patch_size, "
                "num_query_tokens, ...)"
            )
        ends = self.lengths.to(in_rows.device).cumsum(0)
        return torch.searchsorted(in_rows.cumsum(0), ends).clamp_max(placeholders.shape[0] - 1)


def there(pooled: Any) -> Any:
    """Image tokens, (I, N, D) or (N, D) each, without the empty entries of backbones that have one a row, whether that
    holds images or not."""
    if isinstance(pooled, Tensor) or torch.compiler.is_compiling():
        return pooled
    return [tokens for tokens in pooled if len(tokens)]


def check_image_size(pixel_values: Tensor, size: int) -> None:
    """Raises ValueError for images (I, 3, H, W) of another size than a vision model has positions for: a smaller one
    would get the first of them."""
    height, width = pixel_values.shape[-2:]
    if (height, width) != (size, size):
        raise ValueError(
            f"pixel_values of {height} x {width} pixels, config.vision_config.image_size is {size}: let the processor "
            "resize to that, or pass interpolate_pos_encoding=True"
        )


def image_statistics(states: Sequence[Tensor], pooled: Any, parts: Sequence[int] | None = None) -> Tensor:
    """Token statistics of each image: (I, L, F), float32. The tiles of one image count together.

    A vision tower's states are (tiles, N, D), or (N, D) or (1, N, D), the patches of all images one after the other.
    In both an image's share is that of its image tokens, unless `parts` tells it.

    Args:
        states: of the chosen layers.
        pooled: the image tokens, (I, N', D') or (N', D') each.
        parts: how many tiles, or patches, each image has.
    """
    with torch.no_grad():
        layers = [_of_images(state, pooled, parts) for state in states]
    return torch.stack([layer.to(layers[0].device) for layer in layers], 1)


def of_images(units: Tensor, pooled: Any, parts: Sequence[int] | None = None) -> Tensor:
    """The mean over the tiles of each image: (tiles, F) -> (I, F); `pooled` and `parts` as `image_statistics`."""
    # a number of tiles that is not known while the call is traced is told by `parts`
    if isinstance(pooled, Tensor) or guard_or_false(units.shape[0] == len(pooled)):
        return units
    parts = parts_of(units.shape[0], pooled, parts)
    counts = torch.tensor(parts, device=units.device).clamp_min(1)  # a compiled program keeps empty entries
    return torch.stack([part.sum(0) for part in units.split(parts)]) / counts[:, None]


def parts_of(units: int, pooled: Any, parts: Sequence[int] | None) -> list[int]:
    """How many tiles, or patches, of so many each image has: by its share of the image tokens if nothing tells it."""
    if len(pooled) == 1:
        return [units]
    if guard_or_false(units == len(pooled)):
        return [1] * units
    if parts is not None:
        return [*parts]
    lengths = [len(tokens) for tokens in pooled]
    return [length * units // max(1, sum(lengths)) for length in lengths]


def _of_images(state: Tensor, pooled: Any, parts: Sequence[int] | None) -> Tensor:
    """One layer's statistics: (I, F)."""
    if isinstance(pooled, Tensor):
        return _statistics(state)
    # a number of tiles that is not known while the call is traced is none of patches in a row
    in_a_row = state.ndim == 2 or (len(pooled) > 1 and guard_or_false(state.shape[0] == 1))
    if not in_a_row:
        return of_images(_statistics(state), pooled, parts)
    patches = state.reshape(-1, state.shape[-1])
    return torch.cat([_statistics(part[None]) for part in patches.split(parts_of(len(patches), pooled, parts))])


def _statistics(state: Tensor) -> Tensor:
    return token_statistics(state, torch.ones(state.shape[:2], dtype=torch.bool, device=state.device))
