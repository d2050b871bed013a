"""InternVL with Dynamic Modality Scheduling: where DMS meets `InternVLForConditionalGeneration`."""

from torch import Tensor
from transformers import InternVLForConditionalGeneration
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_dms.configuration.configuration_dms import DMSInternVLConfig
from modeling_dms.llava_mixin import LlavaMixin


class DMSInternVLForConditionalGeneration(LlavaMixin, InternVLForConditionalGeneration, GenerationMixin):
    """`InternVLForConditionalGeneration` that weighs image and text per sample.

    The tiles that its processor cuts a large image into, and the frames of a video, count as images of one sample:
    together they have one weight.
    """

    config: DMSInternVLConfig
    config_class = DMSInternVLConfig

    def _projector_inputs(self, outputs: BaseModelOutputWithPooling, layers: list[int], strategy: str) -> Tensor:
        states = outputs.last_hidden_state if layers == [-1] else outputs.hidden_states[layers[0]]
        states = states[:, 1:] if strategy == "default" else states
        side = int(states.shape[1] ** 0.5)
        return self.model.pixel_shuffle(states.unflatten(1, (side, side)), self.config.downsample_ratio).flatten(1, 2)


__all__ = ["DMSInternVLForConditionalGeneration"]
