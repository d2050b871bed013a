"""InstructBLIP with Dynamic Modality Scheduling."""

from transformers import InstructBlipForConditionalGeneration
from transformers.generation import GenerationMixin

from modeling_dms.configuration.configuration_dms import DMSInstructBlipConfig
from modeling_dms.qformer_mixin import QFormerMixin


class DMSInstructBlipForConditionalGeneration(QFormerMixin, InstructBlipForConditionalGeneration, GenerationMixin):
    """`InstructBlipForConditionalGeneration` that weighs image and text per sample."""

    config: DMSInstructBlipConfig
    config_class = DMSInstructBlipConfig
    family = "InstructBLIP"


__all__ = ["DMSInstructBlipForConditionalGeneration"]
