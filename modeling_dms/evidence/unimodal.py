"""Signals of how far a modality can be trusted: small pure functions on tensors, knowing no backbone.

Shapes: B samples, M modalities, K classes (the vocabulary), T Monte Carlo dropout passes. Every function treats
    samples
independently: a batch gives the same as its rows.
"""

import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def predictive_entropy(logits: Tensor, normalize: bool = True) -> Tensor:
    """Entropy H(p) of softmax(logits), in nats, or over log K in [0, 1].

    Args:
        logits: (..., K).
        normalize: divide by log K.

    Returns:
        (...), float32.
    """
    entropy = torch.special.entr(logits.float().softmax(-1)).sum(-1)
    return entropy / math.log(logits.shape[-1]) if normalize else entropy


def confidence(logits: Tensor, normalize: bool = True) -> Tensor:
    """c = 1 - H(p) (arXiv 2506.12724), with the entropy over log K by default so that c lies in [0, 1].

    Args:
        logits: (..., K).

    Returns:
        (...), float32.
    """
    if not normalize:
        return 1 - predictive_entropy(logits, normalize)
    p = logits.float().softmax(-1)
    # the sum of p is 1 but for the rounding of a large vocabulary, which cancels here
    return (p.sum(-1) - torch.special.entr(p).sum(-1) / math.log(p.shape[-1])).clamp(0, 1)


def energy(logits: Tensor) -> Tensor:
    """logsumexp of the logits, the negative free energy: higher means more trusted (QMF, Zhang et al., ICML 2023).

    Args:
        logits: (..., K).

    Returns:
        (...), float32.
    """
    return logits.float().logsumexp(-1)


def dropout_masks(samples: int, size: int, p: float, seed: int, device: torch.device | None = None) -> Tensor:
    """Inverted-dropout masks for vectorised Monte Carlo dropout: (T, size), entries 0 or 1 / (1 - p), mean 1.

    They come from a generator of their own on the CPU, so neither the caller's random state nor its train/eval mode
    matters, and the same seed gives the same masks on every device. All samples share them: the batch size cannot
    matter either.
    """
    return (_kept_units(samples, size, p, seed).float() / (1 - p)).to(device)


@torch.compiler.assume_constant_result
def _kept_units(samples: int, size: int, p: float, seed: int) -> Tensor:
    # drawn before a program of `torch.export` runs: it would go on with the generator, and draw others each time
    with _disable_current_modes() if torch.compiler.is_exporting() else nullcontext():
        return torch.rand(samples, size, generator=torch.Generator().manual_seed(seed)) >= p


def mutual_information(logits: Tensor, normalize: bool = True) -> Tensor:
    """Epistemic uncertainty of T passes: H(mean p) - mean H(p), over log K by default (BALD, Houlsby et al., 2011).

    Args:
        logits: (T, ..., K).

    Returns:
        (...), float32, at least 0.
    """
    p = logits.float().softmax(-1)
    of_mean = torch.special.entr(p.mean(0)).sum(-1)
    mean_of = torch.special.entr(p).sum(-1).mean(0)
    information = (of_mean - mean_of).clamp_min(0)
    return information / math.log(logits.shape[-1]) if normalize else information


def predictive_variance(logits: Tensor) -> Tensor:
    """Variance of the class probabilities over T passes, summed over classes (arXiv 2506.12724: variance of MC
    dropout).

    Args:
        logits: (T, ..., K).

    Returns:
        (...), float32, at least 0.
    """
    return logits.float().softmax(-1).var(0, unbiased=False).sum(-1)


def consistency(h: Tensor, modality_mask: Tensor) -> Tensor:
    """Mean cosine of each modality's representation with those of the other present modalities.

    With two modalities it is one number for both: s = cos(h_vision, h_text).

    Args:
        h: (B, M, d_s).
        modality_mask: (B, M), True where present.

    Returns:
        (B, M) in [-1, 1]; 0 where a modality is absent or alone.
    """
    unit = torch.nn.functional.normalize(h.float(), dim=-1)
    cosine = unit @ unit.transpose(1, 2)  # (B, M, M)
    # the two halves may differ in the last bit
    cosine = ((cosine + cosine.transpose(1, 2)) / 2).clamp(-1, 1)
    others = modality_mask[:, None, :] & modality_mask[:, :, None]
    others = others & ~torch.eye(h.shape[1], dtype=torch.bool, device=h.device)
    return (cosine * others).sum(-1) / others.sum(-1).clamp_min(1)
