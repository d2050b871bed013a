"""Qwen2.5-VL with Dynamic Modality Scheduling."""

from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.generation import GenerationMixin

from modeling_dms.configuration.configuration_dms import DMSQwen2_5_VLConfig
from modeling_dms.steered_mixin import SteeredMixin


class DMSQwen2_5_VLForConditionalGeneration(SteeredMixin, Qwen2_5_VLForConditionalGeneration, GenerationMixin):  # noqa: N801
    """`Qwen2_5_VLForConditionalGeneration` that weighs image and text per sample."""

    config: DMSQwen2_5_VLConfig
    config_class = DMSQwen2_5_VLConfig
    family = "Qwen2.5-VL"
    bridge = ("merger",)


__all__ = ["DMSQwen2_5_VLForConditionalGeneration"]
