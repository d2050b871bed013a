"""Fusion by modality weights: an additive bias on attention keys (default), or scaled embeddings (ablation).

Identities: uniform weights change nothing; weight 0 equals masking that modality's positions out of the attention.

Under causal attention the first token is a sink (Xiao et al., ICLR 2024): heads that look for nothing put their
attention there, whatever it stands for. Weighed down with its modality it would leave them to the other tokens, so it
keeps a bias of 0 for as long as its modality has any weight. Where it is neutral (BOS), nothing needs to be spared.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_masks_for_generate

from modeling_dms._compat import CACHE
from modeling_dms.attention import SDPA_KEY_BIAS


# additive masks hold the lowest value, -inf, or a large negative number; anything above this is a soft bias
UNMASKED = -1e3


def relative_weights(weights: Tensor) -> Tensor:
    """M * w_m, where M counts the modalities whose weight is not 0: (B, M) -> (B, M), 1 everywhere if they are
    uniform.

    An absent modality has weight 0 and does not count, so the one that remains keeps the factor 1.
    """
    return weights * (weights > 0).sum(-1, keepdim=True)


def first_attended(mask: Tensor | dict[str, Tensor] | None, modality_ids: Tensor) -> Tensor:
    """The position of each row's first token that is not padding, its attention sink: (B,).

    Args:
        mask: 2D, 4D, a dictionary of 4D masks, or `None` where there is no padding.
        modality_ids: (B, L).
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return modality_ids.new_zeros(len(modality_ids))
    if mask.ndim == 4:  # what the last token sees
        mask = mask[:, 0, -1] > UNMASKED if mask.is_floating_point() else mask[:, 0, -1]
    return mask.bool().int().argmax(1).to(modality_ids.device)


def key_bias(weights: Tensor, modality_ids: Tensor, sink: Tensor | None = None) -> Tensor:
    """log(M * w_m) at the positions of modality m, 0 at neutral ones, -inf where w_m is 0.

    Args:
        weights: (B, M), rows sum to 1.
        modality_ids: (B, L), 0 neutral, m + 1 for modality m.
        sink: (B,), the position of each row's attention sink (`first_attended`), which has a bias of 0 as well unless
            its w_m is 0; `None` where attention is not causal.

    Returns:
        (B, L), float32.
    """
    factors = relative_weights(weights.float())
    positive = factors > 0
    bias = torch.where(positive, torch.where(positive, factors, 1.0).log(), -torch.inf)
    bias = F.pad(bias, (1, 0)).gather(1, modality_ids.long())
    if sink is None:
        return bias
    # the first position with weight: while decoding, a sliding window may have left the sink behind
    weighed = (modality_ids > 0) & bias.isfinite()
    first = weighed & (weighed.cumsum(1) == 1)
    places = torch.arange(bias.shape[1], device=bias.device)
    return bias.masked_fill(first & (places == sink[:, None]), 0)


def embedding_scale(weights: Tensor, modality_ids: Tensor) -> Tensor:
    """M * w_m at the positions of modality m, 1 at neutral ones: (B, L), float32."""
    return F.pad(relative_weights(weights.float()), (1, 0), value=1.0).gather(1, modality_ids.long())


def fold_key_bias(mask: Tensor, bias: Tensor, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Folds a key bias into an attention mask.

    Args:
        mask: (B, 1, Q, K), boolean (True = attend) or additive.
        bias: (B, P) by absolute key position; keys beyond P (generated ones) are neutral.
        offset: absolute position of the first key (sliding-window caches drop keys).

    Returns:
        (B, 1, Q, K), additive, of `dtype`.
    """
    keys = mask.shape[-1]
    bias = F.pad(bias, (0, max(0, offset + keys - bias.shape[-1])))[:, None, None, offset : offset + keys]
    if mask.dtype == torch.bool:
        keep, value = mask, bias
    else:
        keep = mask > UNMASKED
        value = bias + mask.masked_fill(~keep, 0).to(torch.promote_types(mask.dtype, bias.dtype))
    # never `mask + bias` alone: on fully masked rows the sum is absorbed in the forward pass, but its gradient is not
    return value.to(dtype).masked_fill(~(keep & ~bias.isneginf()), torch.finfo(dtype).min)


def check_attention(implementation: str | None) -> None:
    """Raises `ValueError` for attention kernels that take no additive bias."""
    if implementation is not None and "flash" in implementation:
        raise ValueError(
            f'attn_implementation={implementation!r} takes no additive bias, so fusion="attention" cannot steer it; '
            'load the model with attn_implementation="sdpa", "eager" or "flex_attention"'
        )


def biased_attention(
    config: PreTrainedConfig,
    bias: Tensor,
    inputs: Tensor,
    attention_mask: Tensor | dict[str, Tensor] | None,
    cache: Cache | None,
    position_ids: Tensor | None,
) -> dict[str, Any]:
    """Keyword arguments that make a decoder-only language model attend with the key bias.

    Args:
        config: the language model's configuration.
        bias: (B, P), see `key_bias`.
        inputs: (B, Q, ...), any tensor of the language model's dtype and query length.
        attention_mask: 2D, 4D, a dictionary of 4D masks, or `None`.

    Returns:
        `attention_mask`: additive (B, 1, Q, K), or a dictionary of these; with flex attention the mask as it was and
        `position_bias` (B, heads, Q, K); with `"sdpa_key_bias"`, where a gradient is needed, the mask as it was and
        `key_bias` (B, K).

    Raises:
        ValueError: for an attention implementation that takes no bias.
    """
    check_attention(config._attn_implementation)
    query_length = inputs.shape[1]
    if config._attn_implementation == "flex_attention":
        keys, first = (query_length, 0)
        if cache is not None:
            keys, first = cache.get_mask_sizes(query_length, 0)
        bias = F.pad(bias, (0, max(0, first + keys - bias.shape[-1])))
        bias = bias[:, None, None, first : first + keys].to(inputs.dtype)
        # exp(-1e4) is 0 in every dtype, and unlike -inf it leaves a fully masked row finite
        bias = bias.clamp_min(-1e4)
        heads = config.num_attention_heads
        return {"attention_mask": attention_mask, "position_bias": bias.expand(-1, heads, query_length, -1)}
    if config._attn_implementation == SDPA_KEY_BIAS and bias.requires_grad and cache is None:
        return {"attention_mask": attention_mask, "key_bias": bias}
    masks, cached = attention_mask, cast(dict[str, Any], {CACHE: cache})
    if not isinstance(masks, dict) and not (masks is not None and masks.ndim == 4):
        masks = create_masks_for_generate(
            config=config,
            inputs_embeds=inputs,
            attention_mask=masks,
            position_ids=position_ids,
            **cached,
        )

    def fold(mask: Tensor | None) -> Tensor:
        if mask is None:  # the library leaves out a purely causal mask
            causal = create_causal_mask(
                config=config,
                inputs_embeds=inputs,
                attention_mask=None,
                position_ids=position_ids,
                allow_is_causal_skip=False,
                **cached,
            )
            mask = cast(Tensor, causal)
        return fold_key_bias(mask, bias, inputs.dtype, _first_key(cache, query_length, mask.shape[-1]))

    return {"attention_mask": {k: fold(m) for k, m in masks.items()} if isinstance(masks, dict) else fold(masks)}


def _first_key(cache: Cache | None, query_length: int, keys: int) -> int:
    """Position of the first key of a mask: the layers of a hybrid cache differ, the one of the mask's length tells."""
    for layer in range(len(cache.layers) if cache is not None else 0):
        length, offset = cache.get_mask_sizes(query_length, layer)
        if length == keys:
            return offset
    return 0
