"""Qwen3-VL with Dynamic Modality Scheduling."""

from transformers import Qwen3VLForConditionalGeneration
from transformers.generation import GenerationMixin

from modeling_dms.configuration.configuration_dms import DMSQwen3VLConfig
from modeling_dms.steered_mixin import SteeredMixin


class DMSQwen3VLForConditionalGeneration(SteeredMixin, Qwen3VLForConditionalGeneration, GenerationMixin):
    """`Qwen3VLForConditionalGeneration` that weighs image and text per sample."""

    config: DMSQwen3VLConfig
    config_class = DMSQwen3VLConfig
    family = "Qwen3-VL"
    bridge = ("merger", "deepstack_merger_list")


__all__ = ["DMSQwen3VLForConditionalGeneration"]
