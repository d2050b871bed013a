"""Idefics3 with Dynamic Modality Scheduling."""

from typing import Any

from transformers import Idefics3ForConditionalGeneration
from transformers.generation import GenerationMixin

from modeling_dms.configuration.configuration_dms import DMSIdefics3Config
from modeling_dms.steered_mixin import SteeredMixin


class DMSIdefics3ForConditionalGeneration(SteeredMixin, Idefics3ForConditionalGeneration, GenerationMixin):
    """`Idefics3ForConditionalGeneration` that weighs image and text per sample."""

    config: DMSIdefics3Config
    config_class = DMSIdefics3Config
    family = "Idefics3"
    bridge = ("connector",)

    def _parts(self, pixel_values: Any = None, **kwargs: Any) -> list[int]:
        # of each row, whose images are one after the other; those that fill it up are all 0
        return (pixel_values != 0).flatten(2).any(2).sum(1).tolist()


__all__ = ["DMSIdefics3ForConditionalGeneration"]
