"""SmolVLM with Dynamic Modality Scheduling."""

from typing import Any

from transformers import SmolVLMForConditionalGeneration
from transformers.generation import GenerationMixin

from modeling_dms.configuration.configuration_dms import DMSSmolVLMConfig
from modeling_dms.steered_mixin import SteeredMixin


class DMSSmolVLMForConditionalGeneration(SteeredMixin, SmolVLMForConditionalGeneration, GenerationMixin):
    """`SmolVLMForConditionalGeneration` that weighs image and text per sample."""

    config: DMSSmolVLMConfig
    config_class = DMSSmolVLMConfig
    family = "SmolVLM"
    bridge = ("connector",)

    def _parts(self, pixel_values: Any = None, **kwargs: Any) -> list[int]:
        # of each row, whose images are one after the other; those that fill it up are all 0
        return (pixel_values != 0).flatten(2).any(2).sum(1).tolist()


__all__ = ["DMSSmolVLMForConditionalGeneration"]
