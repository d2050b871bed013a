"""Features of images that no trained part touches, kept from one epoch to the next."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


# hidden states, image tokens, statistics of the layers, and of the pixels where the model looks at them
_Features = tuple[Tensor, Tensor, Tensor, Tensor | None]


class FeatureCache:
    """Keeps what a frozen image encoder says of an image without dropout, the longest unused dropped first.

    Args:
        size: bytes.
    """

    def __init__(self, size: int):
        self.size, self.used, self.hits = size, 0, 0
        self._kept: OrderedDict[Hashable, _Features] = OrderedDict()

    @torch.no_grad()
    def encode(self, model: Any, pixel_values: Tensor, keys: Sequence[Hashable | None]) -> Any:
        """What `model.get_image_features` would return for a batch, as its `mm_encoder_outputs["image"]`.

        Args:
            model: a DMS model.
            pixel_values: (I, 3, H, W).
            keys: one an image; the images of a key are always the same. `None` is encoded each time.
        """
        known = {key: self._kept[key] for key in keys if key is not None and key in self._kept}
        for key in known:
            self._kept.move_to_end(key)
        self.hits += sum(key in known for key in keys)
        new = [index for index, key in enumerate(keys) if key not in known]
        rows: dict[int, _Features] = {index: known[key] for index, key in enumerate(keys) if key in known}
        if new:
            outputs = _without_dropout(model, pixel_values[new])
            self._kind, self._stacked = type(outputs), isinstance(outputs.pooler_output, Tensor)
            for position, index in enumerate(new):
                row = (
                    outputs.last_hidden_state[position],
                    outputs.pooler_output[position],
                    outputs.statistics[position],
                    None if outputs.pixels is None else outputs.pixels[position],
                )
                rows[index] = row
                if keys[index] is not None:
                    self._keep(keys[index], row)
        last, pooled, statistics, pixels = zip(*(rows[index] for index in range(len(keys))), strict=True)
        # in some families a sequence of (N, D), whose N may differ
        pooled = torch.stack(pooled) if self._stacked else pooled
        encoded = self._kind(last_hidden_state=torch.stack(last), pooler_output=pooled)
        encoded.statistics = torch.stack(statistics)
        encoded.pixels = None if pixels[0] is None else torch.stack(pixels)
        return encoded

    def _keep(self, key: Hashable, row: _Features) -> None:
        if key in self._kept:  # twice in this batch
            return
        # clones: a slice would keep the whole batch alive
        row = tuple(None if tensor is None else tensor.clone() for tensor in row)  # type: ignore[assignment]
        self._kept[key] = row
        self.used += _bytes(row)
        while self.used > self.size and self._kept:
            self.used -= _bytes(self._kept.popitem(last=False)[1])


def _without_dropout(model: Any, pixel_values: Tensor) -> Any:
    """What is kept must be neither one draw of a Q-Former's dropout for all epochs, nor take a random number that a
    resumed run, whose cache is empty, would take again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return model.get_image_features(pixel_values=pixel_values, return_dict=True)
    finally:
        for module in training:
            module.training = True


def _bytes(row: _Features) -> int:
    return sum(tensor.nbytes for tensor in row if tensor is not None)
