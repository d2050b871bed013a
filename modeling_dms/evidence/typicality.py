"""How typical a modality's features are of clean data: Gaussian statistics of a few layers, fitted without labels.

Shapes: n samples, L layers, F = 2 * D features (mean and standard deviation over a modality's tokens), K principal
    components.
"""

import torch
from torch import Tensor


EPS = 1e-6
NEWTON_STEPS = 50  # at most


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
        mean squared residual per feature, 1 where there is none.
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
    residual = singular[:, used:].pow(2).sum(-1) / (samples * size)
    # nothing but rounding must not turn into distance either
    residual = residual.where(residual > EPS, 1)
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
    beyond = standard - torch.einsum("nlk,lfk->nlf", inside, gaussian["basis"])
    outside = beyond.pow(2).mean(-1) / gaussian["residual"]
    return inside / gaussian["variance"].sqrt(), outside


def log_distances(features: Tensor, gaussian: dict[str, Tensor]) -> Tensor:
    """Logarithms of the Mahalanobis distance within the principal subspace and of the residual beyond it.

    Both appear because they fail in different places: a blank image hides in a full-covariance distance and shows in
    the residual (Lee et al., NeurIPS 2018, for the distance; Wang et al., CVPR 2022, for subspace + residual).

    Returns:
        (n, L, 2).
    """
    inside, outside = whiten(features, gaussian)
    return torch.stack([inside.pow(2).sum(-1), outside], dim=-1).clamp_min(EPS).log() / 2


def fit_canonical(first: Tensor, second: Tensor, ridge: float = 1.0, components: int = 64) -> tuple[Tensor, Tensor]:
    """Regularised canonical correlation analysis of two standardised views, by their kernels (Hardoon et al., 2004).

    Args:
        first, second: (n, F), of any size each; row i of both is from the same sample.
        ridge: in units of the mean eigenvalue of a view's kernel.
        components: K at most.

    Returns:
        Maps (F, K) each into a shared space where matched pairs agree. Columns are scaled by what the views have in
        common along them, so that directions in which they have nothing do not count.
    """

    def kernel(view: Tensor) -> tuple[Tensor, Tensor]:
        products = (view @ view.T / view.shape[1]).double()
        damped = products + ridge * products.diagonal().mean().clamp_min(EPS) * torch.eye(
            len(view), dtype=torch.double
        )
        inverse = torch.linalg.inv(damped)
        return inverse, inverse @ products

    (left, of_first), (right, of_second) = kernel(first), kernel(second)
    u, common, v = torch.linalg.svd(of_first @ of_second)
    u, common, v = u[:, :components], common[:components].clamp(0, 1), v[:components].T
    return tuple(
        ((view / view.shape[1]).T.double() @ (inverse @ side * common)).float()
        for view, inverse, side in ((first, left, u), (second, right, v))
    )  # type: ignore[return-value]


def fit_discriminants(values: Tensor, groups: Tensor, shrinkage: float = 0.3, components: int = 64) -> Tensor:
    """Linear discriminant analysis (Fisher, 1936; Rao, 1948) of standardised vectors, of groups of any number.

    Args:
        values: (n, F).
        groups: (n,), numbers of the groups that they belong to.
        shrinkage: added to the covariance within groups, in units of its mean variance.
        components: K at most.

    Returns:
        (F, K), into a space where vectors of one group are close. Columns are scaled by the share of the variance that
        is between groups, so that directions that tell no groups apart do not count.
    """
    _, number, count = groups.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(count), values.shape[1]).index_add_(0, number, values) / count[:, None]
    inner = (values - means[number]).double()
    within = inner.T @ inner / max(1, len(values) - len(count))
    # the means of small groups vary by what varies within
    centred = (means - means.mean(0)).double()
    between = centred.T @ centred / max(1, len(count) - 1) - within * (1 / count.double()).mean()
    within = within + shrinkage * within.diagonal().mean().clamp_min(EPS) * torch.eye(len(within), dtype=torch.double)
    lower = torch.linalg.cholesky(within)
    half = torch.linalg.solve_triangular(lower, between, upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.T.contiguous(), upper=False)
    variances, directions = torch.linalg.eigh((whitened + whitened.T) / 2)
    variances, directions = variances.flip(0)[:components].clamp_min(0), directions.flip(1)[:, :components]
    mapping = torch.linalg.solve_triangular(lower.T, directions, upper=True)
    return (mapping * (variances / (1 + variances)).sqrt()).float()


def auroc(negative: Tensor, positive: Tensor) -> float:
    """Probability that a positive scores above a negative, ties counting half (Mann-Whitney)."""
    scores = torch.cat([negative, positive]).double()
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]
    n, p = len(negative), len(positive)
    return float((ranks[n:].sum() - p * (p + 1) / 2) / (n * p))


def fit_logistic(
    inputs: Tensor,
    targets: Tensor,
    sample_weights: Tensor,
    ridge: float = 1e-2,
    start: Tensor | None = None,
) -> Tensor:
    """Ridge logistic regression by Newton's method.

    Args:
        inputs: (n, P).
        targets: (n,), 0 or 1.
        sample_weights: (n,), summing to 1.
        ridge: weight of the squared coefficients (the intercept is free).
        start: (P + 1,), where the search begins; what it finds does not hang on it.

    Returns:
        (P + 1,), the coefficients and, last, the intercept.
    """
    design = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).double()
    targets, sample_weights = targets.double(), sample_weights.double()
    penalty = torch.full((design.shape[1],), ridge, dtype=torch.double)
    penalty[-1] = 1e-8
    coefficients = torch.zeros(design.shape[1], dtype=torch.double) if start is None else start.double()

    def objective(value: Tensor) -> Tensor:
        logits = design @ value
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return (sample_weights * losses).sum() + (penalty * value.pow(2)).sum() / 2

    reached = objective(coefficients)
    for _ in range(NEWTON_STEPS):
        p = (design @ coefficients).sigmoid()
        gradient = design.T @ (sample_weights * (p - targets)) + penalty * coefficients
        hessian = (design.T * (sample_weights * (p * (1 - p)).clamp_min(1e-9))) @ design + torch.diag(penalty)
        step, size = torch.linalg.solve(hessian, gradient), 1.0
        while (found := objective(coefficients - size * step)) > reached and size > 1e-4:
            size /= 2
        coefficients, reached = coefficients - size * step, found
        if float((size * step).abs().max()) < 1e-5:  # the next step would be the square of that
            break
    return coefficients.float()
