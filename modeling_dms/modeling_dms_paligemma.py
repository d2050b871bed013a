"""PaliGemma with Dynamic Modality Scheduling."""

from transformers import PaliGemmaForConditionalGeneration
from transformers.generation import GenerationMixin

from modeling_dms.configuration.configuration_dms import DMSPaliGemmaConfig
from modeling_dms.steered_mixin import SteeredMixin


class DMSPaliGemmaForConditionalGeneration(SteeredMixin, PaliGemmaForConditionalGeneration, GenerationMixin):
    """`PaliGemmaForConditionalGeneration` that weighs image and text per sample."""

    config: DMSPaliGemmaConfig
    config_class = DMSPaliGemmaConfig
    family = "PaliGemma"


__all__ = ["DMSPaliGemmaForConditionalGeneration"]
