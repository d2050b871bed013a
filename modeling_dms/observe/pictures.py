"""Pixels as pictures, in whatever layout a processor gives them to its model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def pictures_of(pixel_values: Tensor, *layout: Any) -> list[Tensor]:
    """The pictures in groups of one size, (n, 3, H, W) each, one after the other; `layout` as `changed_pictures`."""
    found: list[Tensor] = []

    def keep(pictures: Tensor) -> Tensor:
        found.append(pictures)
        return pictures

    changed_pictures(pixel_values, keep, *layout)
    return found


def changed_pictures(
    pixel_values: Tensor,
    change: Callable[[Tensor], Tensor],
    grid: Tensor | None = None,
    vision: Any = None,
    sizes: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Applies `change` to pictures (n, 3, H, W) and gives the pixels back in their own layout.

    Args:
        pixel_values: (I, 3, H, W); (B, N, 3, H, W), where missing pictures are all zeros and stay so; or flattened
            patches (P, 3 * t * p * p) in the order of Qwen's processors.
        grid: (I, 3), frames, rows and columns of patches of each image, for flattened patches.
        vision: the vision tower's configuration, for the same.
        sizes: height and width of each picture, where smaller ones are padded on the right and below.
    """
    if pixel_values.ndim == 4 and sizes is None:
        return change(pixel_values)
    if pixel_values.ndim == 4 and sizes is not None:
        out = pixel_values.clone()
        for number, (height, width) in enumerate(sizes):
            own = slice(number, number + 1), slice(None), slice(height), slice(width)
            out[own] = change(pixel_values[own])
        return out
    if pixel_values.ndim == 5:
        pictures = pixel_values.flatten(0, 1)
        there = pictures.flatten(1).any(1)
        out = pictures.clone()
        changed = change(pictures[there])
        # one that is blank by now is still no missing one
        out[there] = changed.masked_fill(~changed.flatten(1).any(1)[:, None, None, None], torch.finfo(out.dtype).eps)
        return out.unflatten(0, pixel_values.shape[:2])
    frames, size, merge = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
    found = []
    for patches, (t, rows, columns) in zip(pixel_values.split(grid.prod(1).tolist()), grid.tolist(), strict=True):
        # patches stand in blocks that are merged into one token
        blocks = patches.view(t, rows // merge, columns // merge, merge, merge, -1, frames, size, size)
        pictures = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t * frames, -1, rows * size, columns * size)
        # a still picture is repeated
        pictures = change(pictures[::frames]).repeat_interleave(frames, 0)
        blocks = pictures.view(t, frames, -1, rows // merge, merge, size, columns // merge, merge, size)
        found.append(blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(patches.shape))
    return torch.cat(found)
