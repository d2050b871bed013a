"""Mistral 3 (Pixtral) with Dynamic Modality Scheduling."""

from transformers import Mistral3ForConditionalGeneration
from transformers.generation import GenerationMixin

from modeling_dms.configuration.configuration_dms import DMSMistral3Config
from modeling_dms.steered_mixin import SteeredMixin


class DMSMistral3ForConditionalGeneration(SteeredMixin, Mistral3ForConditionalGeneration, GenerationMixin):
    """`Mistral3ForConditionalGeneration` that weighs image and text per sample."""

    config: DMSMistral3Config
    config_class = DMSMistral3Config
    family = "Mistral 3"


__all__ = ["DMSMistral3ForConditionalGeneration"]
