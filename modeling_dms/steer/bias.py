"""Fusion by modality weights: an additive bias on attention keys (default), or scaled embeddings (ablation).

Identities: uniform weights change nothing; weight 0 equals masking that modality's positions out of the attention.

Under causal attention the first token is a sink (Xiao et al., ICLR 2024): heads that look for nothing put their
attention there, whatever it stands for. Weighed down with its modality it would leave them to the other tokens, so it
keeps a bias of 0 for as long as its modality has any weight. Where it is neutral (BOS), nothing needs to be spared.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def relative_weights(weights: Tensor) -> Tensor:
    """M * w_m, where M counts the modalities whose weight is not 0: (B, M) -> (B, M), 1 everywhere if they are
    uniform.

    An absent modality has weight 0 and does not count, so the one that remains keeps the factor 1.
    """
    return weights * (weights > 0).sum(-1, keepdim=True)


def first_attended(mask: Tensor | None, modality_ids: Tensor) -> Tensor:
    """The position of each row's first token that is not padding, its attention sink: (B,).

    Args:
        mask: (B, L), or `None` where there is no padding.
        modality_ids: (B, L).
    """
    if mask is None:
        return modality_ids.new_zeros(modality_ids.shape[0])
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
