"""LLaVA with Dynamic Modality Scheduling."""

from transformers import LlavaForConditionalGeneration
from transformers.generation import GenerationMixin

from modeling_dms.configuration.configuration_dms import DMSLlavaConfig
from modeling_dms.steered_mixin import SteeredMixin


class DMSLlavaForConditionalGeneration(SteeredMixin, LlavaForConditionalGeneration, GenerationMixin):
    """`LlavaForConditionalGeneration` that weighs image and text per sample."""

    config: DMSLlavaConfig
    config_class = DMSLlavaConfig
    family = "LLaVA"


__all__ = ["DMSLlavaForConditionalGeneration"]
