"""GLM-4V with Dynamic Modality Scheduling."""

from transformers import Glm4vForConditionalGeneration
from transformers.generation import GenerationMixin

from modeling_dms.configuration.configuration_dms import DMSGlm4vConfig
from modeling_dms.steered_mixin import SteeredMixin


class DMSGlm4vForConditionalGeneration(SteeredMixin, Glm4vForConditionalGeneration, GenerationMixin):
    """`Glm4vForConditionalGeneration` that weighs image and text per sample."""

    config: DMSGlm4vConfig
    config_class = DMSGlm4vConfig
    family = "GLM-4V"
    bridge = ("downsample", "merger")


__all__ = ["DMSGlm4vForConditionalGeneration"]
