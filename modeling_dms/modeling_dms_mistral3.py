"""Mistral 3 (Pixtral) with Dynamic Modality Scheduling."""

from typing import Any

import torch
from transformers import Mistral3ForConditionalGeneration
from transformers.generation import GenerationMixin

from modeling_dms.configuration.configuration_dms import DMSMistral3Config
from modeling_dms.steered_mixin import SteeredMixin


class DMSMistral3ForConditionalGeneration(SteeredMixin, Mistral3ForConditionalGeneration, GenerationMixin):
    """`Mistral3ForConditionalGeneration` that weighs image and text per sample."""

    config: DMSMistral3Config
    config_class = DMSMistral3Config
    family = "Mistral 3"

    def _picture_sizes(self, inputs: dict[str, Any]) -> Any:
        return torch.as_tensor(inputs["image_sizes"]).tolist()

    def _parts(self, image_sizes: Any = None, **kwargs: Any) -> list[int]:
        # the last of an odd number of rows or columns of patches is in no token
        return (torch.as_tensor(image_sizes) // self.config.vision_config.patch_size).prod(-1).tolist()


__all__ = ["DMSMistral3ForConditionalGeneration"]
