"""`attn_implementation="sdpa_key_bias"`: a key bias that needs a gradient, at the price of plain sdpa.

Folded into a mask, such a bias makes every fused kernel step aside: masks have no gradient there. As one more head
dimension, 1 in the queries and bias / scaling in the keys, it is a part of the scores like any other.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


SDPA_KEY_BIAS = "sdpa_key_bias"


def sdpa_key_bias_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    key_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' sdpa, with `key_bias` (B, K) added to the scores of each key."""
    if key_bias is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    size = value.shape[-1]
    scaling = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    # exp(-1e3) is 0 in every dtype, and -1e3 / scaling still fits float16
    column = (key_bias.clamp_min(-1e3) / scaling).to(key.dtype)[:, None, :, None].expand(-1, key.shape[1], -1, -1)
    key = torch.cat([key, column], -1)
    query, value = F.pad(query, (0, 1), value=1.0), F.pad(value, (0, 1))  # kernels want one head size
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output[..., :size], None


AttentionInterface.register(SDPA_KEY_BIAS, sdpa_key_bias_forward)
AttentionMaskInterface.register(SDPA_KEY_BIAS, sdpa_mask)
