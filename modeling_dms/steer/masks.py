"""A bias on attention keys, folded in where transformers builds its masks.

Every model of transformers asks `AttentionMaskInterface` for its masks, by the name of its attention implementation,
and tells it the absolute position of the first key: sliding windows and caches come out right. The functions
registered here are those that were there before, until `steered` says that the masks of a configuration get a bias:
the library's own, or those of another copy of this code, which checkpoints bring along.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from modeling_dms.steer.running import Running


# an additive mask holds 0, the lowest value, -inf, or a large negative number; anything above this is a soft bias
UNMASKED = -1e3
SUPPORTED = ("sdpa", "eager", "flex_attention")


@dataclass
class Steering:
    """How the weights act on a language model: a bias on its keys, or factors on the embeddings of its prompt.

    Attributes:
        configs: the very objects that the language model holds; masks of other models are left alone.
        bias: (B, P) by absolute position of the key, -inf where it is masked; later keys (generated ones) have none.
        scale: (B, P), see `scale_embeddings`.
        causal: `False` for an encoder-decoder, whose causal masks, of what it generates, stay as they are.
        masks: how many masks have got the bias.
        settle: sets the bias, which is not known yet; called when a mask is asked for.
    """

    configs: Sequence[PreTrainedConfig] = ()
    bias: Tensor | None = None
    scale: Tensor | None = None
    causal: bool = True
    masks: int = 0
    settle: Callable[[], None] | None = None


_steered: Running[Steering | None] = Running("steered", None)


def steered(steering: Steering | None) -> Any:
    """A context in which the masks of `steering.configs` are built with its bias; `None` changes nothing.

    Raises:
        ValueError: for an attention implementation that takes no bias.
    """
    check_supported(steering)
    return _steered.set(steering)


def check_supported(steering: Steering | None) -> None:
    """Raises ValueError for an attention implementation that takes no bias."""
    for config in () if steering is None or steering.bias is None else steering.configs:
        implementation = config._attn_implementation
        if implementation not in SUPPORTED:
            raise ValueError(
                f"attn_implementation={implementation!r} takes no bias on its keys, so the modality weights cannot "
                f'steer it; load the model with attn_implementation="sdpa", "eager" or "flex_attention"'
            )


def check_applied(steering: Steering | None) -> None:
    """Raises ValueError if the language model has run without building a mask that could get the bias."""
    wanted = steering is not None and steering.bias is not None
    if wanted and not steering.masks and not torch.compiler.is_compiling():
        raise ValueError(
            "the modality weights could not be applied: the language model built no attention mask of its own. "
            "A ready-made 4D `attention_mask`, continuous batching and layers without attention take no weights"
        )


def key_bias_at(bias: Tensor, keys: int, offset: int = 0, rows: int | None = None) -> Tensor:
    """The bias of so many keys from `offset` on, 0 beyond its end: (B, P) -> (rows, keys).

    Args:
        rows: B, or a multiple of it where every row stands for several, as beams do.
    """
    if rows is not None and rows != bias.shape[0]:
        bias = bias.repeat_interleave(rows // bias.shape[0], 0)
    return F.pad(bias, (0, max(0, offset + keys - bias.shape[1])))[:, offset : offset + keys]


def fold_key_bias(mask: Tensor, bias: Tensor, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Folds a key bias into an attention mask.

    Args:
        mask: (B, 1, Q, K), boolean (True = attend) or additive.
        bias: (B, P), by absolute position of the key.
        offset: absolute position of the first key.

    Returns:
        (B, 1, Q, K), additive, of `dtype`.
    """
    value = key_bias_at(bias, mask.shape[-1], offset, mask.shape[0])[:, None, None]
    keep = mask
    if mask.dtype != torch.bool:
        keep = mask > UNMASKED
        value = value + mask.masked_fill(~keep, 0).to(torch.promote_types(mask.dtype, bias.dtype))
    # never `mask + bias` alone: on fully masked rows the sum is absorbed in the forward pass, but its gradient is not
    return value.to(dtype).masked_fill(~(keep & ~value.isneginf()), torch.finfo(dtype).min)


def scale_embeddings(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """A hook in front of a language model, for `fusion="embedding"`; embeddings beyond the prompt stay as they are."""
    steering, embeddings = _steered.get(), kwargs.get("inputs_embeds")
    if steering is None or steering.scale is None or embeddings is None:
        return None
    scale = F.pad(steering.scale, (0, embeddings.shape[1] - steering.scale.shape[1]), value=1.0)
    scale = scale.repeat_interleave(len(embeddings) // len(scale), 0)
    return args, {**kwargs, "inputs_embeds": embeddings * scale[..., None].to(embeddings.dtype)}


def _bias_for(config: PreTrainedConfig | None, mask_function: Any) -> Tensor | None:
    """The bias that a mask which is asked for gets, if any; it is counted."""
    steering = _steered.get()
    if steering is None or not any(own is config for own in steering.configs):
        return None
    if steering.settle is not None:
        steering.settle()
    if steering.bias is None:
        return None
    if not steering.causal and mask_function is not bidirectional_mask_function:
        return None
    steering.masks += 1
    return steering.bias


def _additive(own: Any, fused: bool) -> Any:
    """The function `own`, for additive masks; `fused` for those of `_sdpa`."""

    def mask(*, config: PreTrainedConfig | None = None, kv_offset: int = 0, dtype: Any = torch.float32, **kwargs: Any):
        bias = _bias_for(config, kwargs.get("mask_function"))
        kwargs |= {"config": config, "kv_offset": kv_offset, "dtype": dtype}
        if bias is None:
            return own(**kwargs)
        whole = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        folded = fold_key_bias(cast(Tensor, whole), bias, dtype, kv_offset)
        if fused and folded.requires_grad:
            of_keys = key_bias_at(bias, folded.shape[-1], kv_offset, folded.shape[0])
            folded.of_keys = (own(**kwargs), of_keys)  # for `_sdpa`
        return folded

    return mask


def _block_mask(own: Any) -> Any:
    """The function `own`, for masks of flex attention, which are boolean: the bias goes along for `_flex`."""

    def mask(*, config: PreTrainedConfig | None = None, kv_offset: int = 0, **kwargs: Any) -> Any:
        bias = _bias_for(config, kwargs.get("mask_function"))
        made = own(config=config, kv_offset=kv_offset, **kwargs)
        if bias is not None:
            bias = key_bias_at(bias, kwargs["kv_length"], kv_offset, kwargs["batch_size"])
            # exp(-1e4) is 0 in every dtype, and unlike -inf it leaves a fully masked row finite
            made.of_keys = bias.to(kwargs.get("dtype", torch.float32)).clamp_min(-1e4)
        return made

    return mask


def _sdpa(own: Any) -> Any:
    """The function `own`, transformers' sdpa, with a bias that needs a gradient at the price of one that does not.

    In a mask, such a bias makes every fused kernel step aside: masks have no gradient there. As one more head
    dimension, 1 in the queries and bias / scaling in the keys, it is a part of the scores like any other.
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        of_keys = None if torch.compiler.is_compiling() else getattr(attention_mask, "of_keys", None)
        if of_keys is None:
            return own(module, query, key, value, attention_mask, **kwargs)
        attention_mask, bias = of_keys
        size, given = value.shape[-1], kwargs.pop("scaling", None)
        scaling = float(query.shape[-1] ** -0.5 if given is None else given)
        # exp(-1e3) is 0 in every dtype, and -1e3 / scaling still fits float16
        column = (bias.clamp_min(-1e3) / scaling).to(key.dtype)[:, None, :, None].expand(-1, key.shape[1], -1, -1)
        key = torch.cat([key, column], -1)
        query, value = F.pad(query, (0, 1), value=1.0), F.pad(value, (0, 1))  # kernels want one head size
        output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output[..., :size], weights

    return attention


def _flex(own: Any) -> Any:
    """The function `own`, transformers' flex attention, with the bias that its mask brings."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        of_keys = getattr(attention_mask, "of_keys", None)
        if of_keys is None:
            return own(module, query, key, value, attention_mask, **kwargs)
        bias = of_keys[:, None, None].expand(-1, query.shape[1], query.shape[2], -1)
        given = kwargs.get("position_bias")
        kwargs["position_bias"] = bias if given is None else given + bias
        return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)

    return attention


for _name, _make in (
    ("sdpa", functools.partial(_additive, fused=True)),
    ("eager", functools.partial(_additive, fused=False)),
    ("flex_attention", _block_mask),
):
    AttentionMaskInterface.register(_name, _make(AttentionMaskInterface()[_name]))
for _name, _make in (("sdpa", _sdpa), ("flex_attention", _flex)):
    AttentionInterface.register(_name, _make(AttentionInterface()[_name]))
