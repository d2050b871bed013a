"""What calibration fits, as buffers that travel with the checkpoint; `fit` fills them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import initialization as init

from modeling_dms.evidence.typicality import EPS
from modeling_dms.weigh.reliability import reliability_numbers
from modeling_dms.weigh.second_look import FIRST_TOKENS


SCALARS = ("confidence", "uncertainty", "energy")
# how many clean samples a p-value is counted among
REMEMBERED = 1000


class Statistics(nn.Module):
    """Buffers that travel with the checkpoint and stay float32.

    Args:
        shapes: by name; those that end in a name of `starts_at_one` are 1 before calibration, the others 0.
    """

    starts_at_one = ("scale", "variance", "residual")

    if TYPE_CHECKING:
        # buffers are tensors
        def __getattr__(self, name: str) -> Tensor: ...

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        for name, shape in shapes.items():
            # whatever precision a model is made in
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
        self.reset()

    def reset(self) -> None:
        """Back to the state before calibration."""
        for name, buffer in self.named_buffers():
            (init.ones_ if name.endswith(self.starts_at_one) else init.zeros_)(buffer)

    def _apply(self, fn, recurse=True):
        # casting a model to half precision must not blunt thresholds: buffers follow the device alone
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, old in before.items():
            if not old.is_meta:
                self._buffers[name] = old.to(device=getattr(self, name).device, dtype=torch.float32)
        return self


def as_if_new(module: nn.Module) -> nn.Module:
    """A module whose buffers `reset` may change: it leaves alone what transformers has loaded, by a mark on it."""
    for buffer in module.buffers():
        vars(buffer).pop("_is_hf_initialized", None)
    return module


def map_shapes(sizes: Sequence[int], components: int) -> dict[str, tuple[int, ...]]:
    """Buffers of location and scale of each modality's content (F,), and of its map to `components` coordinates."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, size in enumerate(sizes):
        shapes |= {f"{index}_location": (size,), f"{index}_scale": (size,), f"{index}_map": (size, components)}
    return shapes


def mapped(statistics: Statistics, index: int, content: Tensor) -> Tensor:
    """The coordinates of contents of modality `index`: (..., F) -> (..., K)."""
    location, scale = statistics.get_buffer(f"{index}_location"), statistics.get_buffer(f"{index}_scale")
    return ((content.float() - location) / scale) @ statistics.get_buffer(f"{index}_map")


def standardised(statistics: Statistics, index: int, content: Tensor) -> Tensor:
    """Contents (n, F) over their location and scale, which are kept."""
    location, scale = content.mean(0), content.std(0)
    # a feature that hardly varies on clean data must not turn rounding into disagreement
    scale = scale.clamp_min(EPS + 1e-2 * scale.mean())
    statistics.get_buffer(f"{index}_location").copy_(location)
    statistics.get_buffer(f"{index}_scale").copy_(scale)
    return (content - location) / scale


def keep_map(statistics: Statistics, index: int, mapping: Tensor) -> None:
    """Keeps a map (F, k) of at most K columns; the others are 0."""
    statistics.get_buffer(f"{index}_map").zero_()[:, : mapping.shape[1]] = mapping


class ModalityCalibration(Statistics):
    """Clean statistics of the layers of one modality, and of its scalar signals.

    Args:
        layers: L.
        size: F, statistics per layer.
        components: K.
    """

    def __init__(self, layers: int, size: int, components: int):
        super().__init__(
            {
                "mean": (layers, size),
                "scale": (layers, size),
                "basis": (layers, size, components),
                "variance": (layers, components),
                "residual": (layers,),
                "distance_low": (2 * layers,),
                "distance_high": (2 * layers,),
                "scalar_location": (len(SCALARS),),
                "scalar_scale": (len(SCALARS),),
                # 0 before calibration, then the level reached: 1 or 2
                "level": (),
            }
        )

    @property
    def fitted(self) -> dict[str, Tensor]:
        """The clean statistics, as `typicality` takes them."""
        return {name: getattr(self, name) for name in ("mean", "scale", "basis", "variance", "residual")}

    def standardize(self, scalars: Tensor) -> Tensor:
        """Scalar signals (B, 3) over their clean location and scale, cut off at 10 either way."""
        return ((scalars - self.scalar_location) / self.scalar_scale).clamp(-10, 10)

    def typicality(self, distances: Tensor) -> Tensor:
        """-log(max(1, d / q)), the lowest over layers and distances; for those below the closest clean ones likewise.

        Args:
            distances: (B, 2 L), logarithms.

        Returns:
            (B,), at most 0.
        """
        inside = torch.minimum(self.distance_high - distances, distances - self.distance_low)
        return inside.clamp_max(0).amin(1)


class Reliability(Statistics):
    """What calibration knows of how far answers can be relied on, see `weigh.reliability`.

    Args:
        modalities: M.
    """

    def __init__(self, modalities: int):
        # numbers of one look and of a second one, alone and under each alarm
        first, look = (size + (1 + size) * (modalities + 1) for size in (1, FIRST_TOKENS))
        super().__init__(
            {
                # p-value up to which a source was flagged when this was fitted
                "rate": (),
                "location": (first,),
                "scale": (first,),
                "coefficients": (first + 1,),
                # of a second look, for the answers to the image alone, to the text alone and to both
                "look_location": (look,),
                "look_scale": (look,),
                "look_coefficients": (3, look + 1),
                # 1 for a modality that keeps its weight however damaged: the other one cannot stand in for it
                "spared": (modalities,),
                # 1 for one that may lose all weight: the other one alone answers as well as with a little of it
                "dropped": (modalities,),
                # of samples that calibration damaged and took no account of: reliability, and whether the answer
                # agrees, without a second look and with it, and which sample it is a copy of
                "kept": (REMEMBERED, 5),
                "count": (),
            }
        )

    def forward(self, sureness: Tensor, p_values: Tensor) -> Tensor:
        """Of answers, (B,) in [0, 1].

        Args:
            sureness: (B,), the probability of the likeliest first token.
            p_values: (B, M + 1), of each modality, and of the pair.
        """
        return self.told(reliability_numbers(sureness, p_values, self.rate))

    def told(self, numbers: Tensor) -> Tensor:
        """The same of `reliability_numbers` (B, F)."""
        standard = (numbers - self.location) / self.scale
        return (standard @ self.coefficients[:-1] + self.coefficients[-1]).sigmoid()

    def looked(self, numbers: Tensor, p_values: Tensor) -> Tensor:
        """Of the answers to the image alone, to the text alone and to both, (B, 3) in [0, 1].

        Args:
            numbers: (B, `FIRST_TOKENS`), of `first_tokens_compared`.
            p_values: (B, M + 1), as of `forward`.
        """
        standard = reliability_numbers(numbers, p_values, self.rate) - self.look_location
        standard = standard / self.look_scale
        return (standard @ self.look_coefficients[:, :-1].T + self.look_coefficients[:, -1]).sigmoid()


class PromptKind(Statistics):
    """What of the clean prompts was the text: 1 where all of it was, as without `modality_ids`, else 0."""

    def __init__(self):
        super().__init__({"whole": ()})


class PixelRange(Statistics):
    """The lowest and the highest value that clean pictures have in each channel: of black and of white."""

    def __init__(self):
        super().__init__({"location": (3,), "scale": (3,)})

    def unit(self, pictures: Tensor) -> Tensor:
        """(n, 3, H, W), as the processor scales them -> black is 0 and white is 1."""
        return (pictures.float() - self.location.view(3, 1, 1)) / self.scale.view(3, 1, 1)

    def scaled(self, pictures: Tensor) -> Tensor:
        """The reverse of `unit`."""
        return pictures * self.scale.view(3, 1, 1) + self.location.view(3, 1, 1)
