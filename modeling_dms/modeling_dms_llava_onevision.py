"""LLaVA-OneVision with Dynamic Modality Scheduling."""

from typing import Any

from transformers import LlavaOnevisionForConditionalGeneration
from transformers.generation import GenerationMixin
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from modeling_dms.configuration.configuration_dms import DMSLlavaOnevisionConfig
from modeling_dms.steered_mixin import SteeredMixin


class DMSLlavaOnevisionForConditionalGeneration(SteeredMixin, LlavaOnevisionForConditionalGeneration, GenerationMixin):
    """`LlavaOnevisionForConditionalGeneration` that weighs image and text per sample."""

    config: DMSLlavaOnevisionConfig
    config_class = DMSLlavaOnevisionConfig
    family = "LLaVA-OneVision"

    def _parts(self, image_sizes: Any = None, batch_num_images: Any = None, **kwargs: Any) -> list[int]:
        size, grid = self.config.vision_config.image_size, self.config.image_grid_pinpoints
        alone = [True] * len(image_sizes)  # several images in a prompt are not cut
        if batch_num_images is not None:
            alone = [count == 1 for count in batch_num_images for _ in range(count)]
        return [
            image_size_to_num_patches(image_size, grid, size) if cut else 1
            for image_size, cut in zip(image_sizes, alone, strict=True)
        ]


__all__ = ["DMSLlavaOnevisionForConditionalGeneration"]
