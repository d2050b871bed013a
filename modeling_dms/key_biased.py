"""Gives a decoder-only language model a `key_bias` argument that also travels through its own `generate`."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling_dms._compat import CACHE
from modeling_dms.fusion import biased_attention


class KeyBiased:
    """Mixed in before a `...ForCausalLM` class: `forward` takes `key_bias` (B, P), see
    `modeling_dms.fusion.key_bias`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        key_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        cache = kwargs.get(CACHE)
        if key_bias is not None:
            inputs = input_ids if input_ids is not None else inputs_embeds
            inputs = torch.empty(*inputs.shape[:2], 0, dtype=self.dtype, device=inputs.device)
            if position_ids is None and self.config.model_type == "opt":
                # OPT derives its positions from a 2D mask, which the biased 4D mask no longer shows
                position_ids = _positions(inputs, attention_mask, cache)
            steered = biased_attention(self.config, key_bias, inputs, attention_mask, cache, None)
            attention_mask = steered.pop("attention_mask")
            kwargs.update(steered)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def __reduce__(self) -> tuple:
        # pickle looks classes up by name, and finds the library's under that of `key_biased`
        (language_model_class,) = set(type(self).__bases__) - {KeyBiased}
        return _blank, (language_model_class,), self.__dict__


def _blank(language_model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """An instance without its state, for pickle."""
    made = key_biased(language_model_class)
    return made.__new__(made)


def _positions(inputs: Tensor, attention_mask: Tensor | None, cache: Any) -> Tensor:
    past = cache.get_seq_length() if cache is not None else 0
    length = inputs.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        mask = attention_mask.long()
        return (mask.cumsum(-1) * mask - 1)[:, past : past + length]
    return (torch.arange(length, device=inputs.device) + past)[None]


@functools.cache
def key_biased(language_model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of the same name whose `forward`, and so `generate`, takes `key_bias`.

    `generate` accepts a keyword only if the signature of `forward` names it, so the signature is the class's own plus
    one.
    """
    own = inspect.signature(language_model_class.forward)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters.append(inspect.Parameter("key_bias", inspect.Parameter.KEYWORD_ONLY, default=None))
    parameters += [p for p in own.parameters.values() if p.kind is p.VAR_KEYWORD]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = own.bind_partial(self, *args)
        return KeyBiased.forward(self, **{k: v for k, v in bound.arguments.items() if k != "self"}, **kwargs)

    forward.__signature__ = own.replace(parameters=parameters)
    return type(language_model_class.__name__, (KeyBiased, language_model_class), {})
