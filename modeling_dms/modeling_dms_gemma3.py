"""Gemma 3 with Dynamic Modality Scheduling."""

from transformers import Gemma3ForConditionalGeneration
from transformers.generation import GenerationMixin

from modeling_dms.configuration.configuration_dms import DMSGemma3Config
from modeling_dms.steered_mixin import SteeredMixin


class DMSGemma3ForConditionalGeneration(SteeredMixin, Gemma3ForConditionalGeneration, GenerationMixin):
    """`Gemma3ForConditionalGeneration` that weighs image and text per sample."""

    config: DMSGemma3Config
    config_class = DMSGemma3Config
    family = "Gemma 3"


__all__ = ["DMSGemma3ForConditionalGeneration"]
