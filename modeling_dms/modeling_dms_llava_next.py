"""LLaVA-NeXT with Dynamic Modality Scheduling."""

from typing import Any

from transformers import LlavaNextForConditionalGeneration
from transformers.generation import GenerationMixin
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from modeling_dms.configuration.configuration_dms import DMSLlavaNextConfig
from modeling_dms.steered_mixin import SteeredMixin


class DMSLlavaNextForConditionalGeneration(SteeredMixin, LlavaNextForConditionalGeneration, GenerationMixin):
    """`LlavaNextForConditionalGeneration` that weighs image and text per sample."""

    config: DMSLlavaNextConfig
    config_class = DMSLlavaNextConfig
    family = "LLaVA-NeXT"

    def _parts(self, image_sizes: Any = None, **kwargs: Any) -> list[int]:
        size, grid = self.config.vision_config.image_size, self.config.image_grid_pinpoints
        return [image_size_to_num_patches(image_size, grid, size) for image_size in image_sizes]


__all__ = ["DMSLlavaNextForConditionalGeneration"]
