"""SmolVLM with Dynamic Modality Scheduling."""

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


__all__ = ["DMSSmolVLMForConditionalGeneration"]
