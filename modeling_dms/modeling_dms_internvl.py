"""InternVL with Dynamic Modality Scheduling."""

from transformers import InternVLForConditionalGeneration
from transformers.generation import GenerationMixin

from modeling_dms.configuration.configuration_dms import DMSInternVLConfig
from modeling_dms.steered_mixin import SteeredMixin


class DMSInternVLForConditionalGeneration(SteeredMixin, InternVLForConditionalGeneration, GenerationMixin):
    """`InternVLForConditionalGeneration` that weighs image and text per sample."""

    config: DMSInternVLConfig
    config_class = DMSInternVLConfig
    family = "InternVL"


__all__ = ["DMSInternVLForConditionalGeneration"]
