"""Idefics3 with Dynamic Modality Scheduling."""

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


__all__ = ["DMSIdefics3ForConditionalGeneration"]
