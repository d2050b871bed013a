"""LLaVA with Dynamic Modality Scheduling: where DMS meets `LlavaForConditionalGeneration`."""

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_dms.configuration.configuration_dms import DMSLlavaConfig
from modeling_dms.llava_mixin import LlavaMixin


class DMSLlavaForConditionalGeneration(LlavaMixin, LlavaForConditionalGeneration, GenerationMixin):
    """`LlavaForConditionalGeneration` that weighs image and text per sample.

    A vanilla checkpoint loads with only `dms.*` new. Until calibrated (or with `scheduler="uniform"`) it answers
    exactly as the vanilla class.
    """

    config: DMSLlavaConfig
    config_class = DMSLlavaConfig

    def _projector_inputs(self, outputs: BaseModelOutputWithPooling, layers: list[int], strategy: str) -> Tensor:
        states = [outputs.hidden_states[layer] for layer in layers]
        return torch.cat([state[:, 1:] if strategy == "default" else state for state in states], dim=-1)


__all__ = ["DMSLlavaForConditionalGeneration"]
