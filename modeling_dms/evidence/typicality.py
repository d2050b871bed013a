"""How typical a modality's features are of clean data: Gaussian statistics of a few layers, fitted without labels.

Shapes: n samples, L layers, F = 2 * D features (mean and standard deviation over a modality's tokens), K principal
    components.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


EPS = 1e-6
# how many clean samples are remembered, how many of them a sample is compared with, and how near is a copy of it
MEMORY, NEIGHBOURS, SAME = 512, 5, 1e-3


def token_statistics(states: Tensor, mask: Tensor) -> Tensor:
    """Mean and standard deviation over the tokens of each sample.

    Args:
        states: (B, N, D), one layer's hidden states.
        mask: (B, N), True for tokens that count.

    Returns:
        (B, 2 * D), float32; zeros for a sample without tokens.
    """
    states, keep = states.float().masked_fill(~mask[..., None], 0), mask[..., None].float()
    count = keep.sum(1).clamp_min(1)
    mean = (states * keep).sum(1) / count
    variance = ((states - mean[:, None]).pow(2) * keep).sum(1) / count
    return torch.cat([mean, variance.sqrt()], dim=-1)


def fit_gaussian(features: Tensor, components: int) -> dict[str, Tensor]:
    """Mean, scale, principal subspace and residual of clean features, per layer.

    Args:
        features: (n, L, F) of clean samples.
        components: K. Where n is small only the first n // 4 carry anything, the others are zero.

    Returns:
        `mean`, `scale` (L, F); `basis` (L, F, K), orthonormal or zero columns; `variance` (L, K); `residual` (L,),
        mean squared residual per feature.
    """
    samples, layers, size = features.shape
    used = max(1, min(components, samples // 4, size))
    mean = features.mean(0)
    centred = features - mean
    scale = centred.pow(2).mean(0).sqrt()
    # a feature that hardly varies on clean data must not turn rounding into distance
    scale = scale.clamp_min(EPS + 1e-2 * scale.mean(-1, keepdim=True))
    standard = (centred / scale).transpose(0, 1)  # (L, n, F)
    _, singular, right = torch.linalg.svd(standard, full_matrices=False)
    basis = torch.zeros(layers, size, components)
    basis[:, :, :used] = right[:, :used].transpose(1, 2)
    residual = (singular[:, used:].pow(2).sum(-1) / (samples * size)).clamp_min(EPS)
    variance = torch.ones(layers, components)
    variance[:, :used] = (singular[:, :used].pow(2) / samples).clamp_min(EPS)
    return {"mean": mean, "scale": scale, "basis": basis, "variance": variance, "residual": residual}


def whiten(features: Tensor, gaussian: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Coordinates in the principal subspace, and what lies outside it.

    Args:
        features: (n, L, F).
        gaussian: from `fit_gaussian`.

    Returns:
        (n, L, K), unit variance on clean data, and (n, L), the squared residual over its clean mean.
    """
    standard = (features - gaussian["mean"]) / gaussian["scale"]
    inside = torch.einsum("nlf,lfk->nlk", standard, gaussian["basis"])
    outside = standard.pow(2).sum(-1) - inside.pow(2).sum(-1)
    outside = outside.clamp_min(0) / (standard.shape[-1] * gaussian["residual"])
    return inside / gaussian["variance"].sqrt(), outside


def canonical_coordinates(features: Tensor, fitted: dict[str, Tensor]) -> Tensor:
    """What a modality says of what it shares with the other one, from its deepest layer: (n, L, F) -> (n, K).

    Args:
        fitted: from `fit_gaussian`, with `canonical` (K, K) from `fit_canonical`.
    """
    return whiten(features, fitted)[0][:, -1] @ fitted["canonical"]


def log_distances(features: Tensor, gaussian: dict[str, Tensor]) -> Tensor:
    """Logarithms of the Mahalanobis distance within the principal subspace and of the residual beyond it.

    Both appear because they fail in different places: a blank image hides in a full-covariance distance and shows in
    the residual (Lee et al., NeurIPS 2018, for the distance; Wang et al., CVPR 2022, for subspace + residual).

    Returns:
        (n, L, 2).
    """
    inside, outside = whiten(features, gaussian)
    return torch.stack([inside.pow(2).sum(-1), outside], dim=-1).clamp_min(EPS).log() / 2


def evidence(features: Tensor, fitted: dict[str, Tensor]) -> Tensor:
    """`log_distances` of all layers and, last, the logarithm of the length of the canonical coordinates.

    Of each, too little tells as much as too much: an image in fog looks like a clean one of nothing, but it has
    nothing to say that a text could agree with.

    Args:
        features: (n, L, F).
        fitted: see `canonical_coordinates`.

    Returns:
        (n, 2 L + 1).
    """
    length = canonical_coordinates(features, fitted).pow(2).sum(-1, keepdim=True).clamp_min(EPS).log() / 2
    return torch.cat([log_distances(features, fitted).flatten(1), length], dim=1)


def fit_canonical(first: Tensor, second: Tensor, shrinkage: float = 0.1) -> tuple[Tensor, Tensor]:
    """Canonical correlation analysis of two whitened views: maps into a shared space where matched pairs agree.

    Args:
        first, second: (n, K), unit variance, row i of both from the same sample.
        shrinkage: pulls the within-view covariances towards the identity.

    Returns:
        (K, K) each. Columns are scaled by the square root of the canonical correlation, so that directions in which
        the views have nothing in common do not count.
    """

    def inverse_root(view: Tensor) -> Tensor:
        covariance = view.T @ view / len(view)
        covariance = (1 - shrinkage) * covariance + shrinkage * torch.eye(view.shape[1])
        values, vectors = torch.linalg.eigh(covariance)
        return vectors @ torch.diag(values.clamp_min(EPS).rsqrt()) @ vectors.T

    left, right = inverse_root(first), inverse_root(second)
    u, correlation, v = torch.linalg.svd(left @ (first.T @ second / len(first)) @ right)
    # the largest correlation that n samples of two unrelated views of k directions show by chance carries nothing
    # (Wachter, 1980: 2 sqrt(q (1 - q)) with q = k / n)
    share = min(1.0, max(int(view.any(0).sum()) for view in (first, second)) / len(first))
    correlation = (correlation - 2 * (share * (1 - share)) ** 0.5).clamp(0, 1).sqrt()
    return left @ u * correlation, right @ v.T * correlation


def _nearest(shared: Tensor, bank: Tensor) -> Tensor:
    """Minus the mean cosine and the log of the mean Euclidean distance of the nearest neighbours in a memory bank:
    (n, K), (m, K) -> (n, 2), finite. Neither rows of zeros nor the sample itself or a copy of it are neighbours: data
    often hold several questions about one image."""
    # matrix products would round small distances differently in a batch and alone
    distance = torch.cdist(shared, bank, compute_mode="donot_use_mm_for_euclid_dist")
    others = (distance > SAME) & bank.any(1)
    cosine = (F.normalize(shared, dim=1) @ F.normalize(bank, dim=1).T).masked_fill(~others, -1)
    distance = distance.masked_fill(~others, 1 / EPS).topk(NEIGHBOURS, largest=False).values.mean(1)
    return torch.stack([-cosine.topk(NEIGHBOURS).values.mean(1), distance.clamp(EPS, 1 / EPS).log()], dim=1)


def fit_memory_bank(shared: Tensor) -> dict[str, Tensor]:
    """Remembers clean samples, and how near each other they lie.

    Args:
        shared: (n, K) canonical coordinates, of which evenly spaced ones are taken if there are more than 512.

    Returns:
        `memory_bank` (512, K), filled up with zeros; `unfamiliarity_location` and `unfamiliarity_scale` (2,).
    """
    count = min(len(shared), MEMORY)
    some = shared[torch.arange(count) * len(shared) // count]
    among = _nearest(some, some)
    return {
        "memory_bank": F.pad(some, (0, 0, 0, MEMORY - count)),
        "unfamiliarity_location": among.median(0).values,
        "unfamiliarity_scale": among.std(0).clamp_min(1e-3),
    }


def unfamiliarity(shared: Tensor, fitted: dict[str, Tensor]) -> Tensor:
    """How much farther samples lie from their nearest neighbours in the memory bank than clean samples do.

    u = (d - median of clean d) / std of clean d, where d is, of the k = 5 nearest neighbours, minus the mean cosine
    and the log of the mean Euclidean distance. Distance to the k nearest neighbours: Sun et al., "Out-of-Distribution
    Detection with Deep Nearest Neighbors", ICML 2022; in canonical coordinates, by both measures and standardised is
    our own choice. An image of unknown damage that is typical layer by layer still resembles no clean image; one that
    merely came with another image's text does.

    Args:
        shared: (n, K), from `canonical_coordinates`.
        fitted: what `fit_memory_bank` returns.

    Returns:
        (n, 2), by cosine and by Euclidean distance, cut off at -10 and 10.
    """
    deviation = _nearest(shared, fitted["memory_bank"]) - fitted["unfamiliarity_location"]
    return (deviation / fitted["unfamiliarity_scale"]).clamp(-10, 10)


def auroc(negative: Tensor, positive: Tensor) -> float:
    """Probability that a positive scores above a negative, ties counting half (Mann-Whitney)."""
    scores = torch.cat([negative, positive]).double()
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]
    n, p = len(negative), len(positive)
    return float((ranks[n:].sum() - p * (p + 1) / 2) / (n * p))


def fit_logistic(
    inputs: Tensor, targets: Tensor, sample_weights: Tensor, ridge: float = 1e-2, steps: int = 50
) -> Tensor:
    """Ridge logistic regression by Newton's method.

    Args:
        inputs: (n, P).
        targets: (n,), 0 or 1.
        sample_weights: (n,), summing to 1.
        ridge: weight of the squared coefficients (the intercept is free).

    Returns:
        (P + 1,), the coefficients and, last, the intercept.
    """
    design = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).double()
    targets, sample_weights = targets.double(), sample_weights.double()
    penalty = torch.full((design.shape[1],), ridge, dtype=torch.double)
    penalty[-1] = 1e-8
    coefficients = torch.zeros(design.shape[1], dtype=torch.double)

    def objective(value: Tensor) -> Tensor:
        logits = design @ value
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return (sample_weights * losses).sum() + (penalty * value.pow(2)).sum() / 2

    for _ in range(steps):
        p = (design @ coefficients).sigmoid()
        gradient = design.T @ (sample_weights * (p - targets)) + penalty * coefficients
        hessian = (design.T * (sample_weights * (p * (1 - p)).clamp_min(1e-9))) @ design + torch.diag(penalty)
        step, size = torch.linalg.solve(hessian, gradient), 1.0
        while objective(coefficients - size * step) > objective(coefficients) and size > 1e-4:
            size /= 2
        coefficients = coefficients - size * step
        if float((size * step).abs().max()) < 1e-8:
            break
    return coefficients.float()
