"""InstructBLIP with Dynamic Modality Scheduling."""

from typing import Any

from transformers import InstructBlipForConditionalGeneration
from transformers.generation import GenerationMixin

from modeling_dms.configuration.configuration_dms import DMSInstructBlipConfig
from modeling_dms.observe.images import Images
from modeling_dms.qformer_mixin import QFormerMixin


class DMSInstructBlipForConditionalGeneration(QFormerMixin, InstructBlipForConditionalGeneration, GenerationMixin):
    """`InstructBlipForConditionalGeneration` that weighs image and text per sample."""

    config: DMSInstructBlipConfig
    config_class = DMSInstructBlipConfig
    family = "InstructBLIP"

    def _observed_images(self, inputs: dict[str, Any]) -> Images | None:
        ids, pixels = inputs.get("input_ids"), inputs.get("pixel_values")
        if ids is None or pixels is None or len(pixels) == len(ids):
            return super()._observed_images(inputs)
        # the Q-Former reads the text of those rows alone that have an image
        texts = {name: value for name, value in inputs.items() if name.startswith("qformer_") and value is not None}
        rows = self._placeholders(ids).any(1)
        inputs |= {name: value[rows] for name, value in texts.items()}
        images = super()._observed_images(inputs)
        inputs |= texts
        return images


__all__ = ["DMSInstructBlipForConditionalGeneration"]
