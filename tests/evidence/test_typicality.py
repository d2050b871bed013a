"""Typicality: padding does not count, outliers lie far, canonical directions generalise, the fits match references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_dms.evidence.typicality import (
    auroc,
    fit_canonical,
    fit_discriminants,
    fit_gaussian,
    fit_logistic,
    log_distances,
    token_statistics,
    whiten,
)


bounded = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- statistics of tokens


@bounded
@given(seed=seeds, batch=st.integers(1, 5), tokens=st.integers(1, 6), size=st.integers(1, 4))
def test_token_statistics_are_mean_and_deviation_of_the_real_tokens(seed, batch, tokens, size):
    states, mask = 3 * normal(seed, batch, tokens, size) + 1, normal(seed + 1, batch, tokens) > 0
    statistics = token_statistics(states, mask)

    assert statistics.shape == (batch, 2 * size)
    for b in range(batch):
        real = states[b, mask[b]].double()
        expected = torch.zeros(2 * size, dtype=torch.double)
        if len(real):
            expected = torch.cat([real.mean(0), real.std(0, unbiased=False)])
        torch.testing.assert_close(statistics[b].double(), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(token_statistics(states[b : b + 1], mask[b : b + 1])[0], statistics[b])


@pytest.mark.parametrize("garbage", [7.0, 1e30, torch.inf, torch.nan])
def test_what_stands_at_padding_does_not_matter(garbage):
    states, mask = normal(0, 2, 5, 3), torch.tensor([[True, True, True, False, False], [False] * 5])
    padded = states.masked_fill(~mask[..., None], garbage)

    assert torch.equal(token_statistics(padded, mask), token_statistics(states, mask))


def test_more_padding_changes_nothing():
    states, mask = normal(0, 2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
    longer = torch.cat([states, normal(1, 2, 4, 3)], 1)
    longer_mask = torch.cat([mask, torch.zeros(2, 4, dtype=torch.bool)], 1)

    torch.testing.assert_close(token_statistics(longer, longer_mask), token_statistics(states, mask))


def test_a_sample_without_tokens_has_statistics_0():
    statistics = token_statistics(normal(0, 2, 3, 4), torch.tensor([[False] * 3, [True] * 3]))

    assert torch.equal(statistics[0], torch.zeros(8))
    assert statistics[1].any()


def test_one_token_has_deviation_0():
    state = normal(0, 1, 1, 4)

    assert torch.equal(token_statistics(state, torch.tensor([[True]]))[0], torch.cat([state[0, 0], torch.zeros(4)]))


def test_token_statistics_of_half_precision_are_computed_in_single():
    states, mask = normal(0, 2, 50, 3).bfloat16(), torch.ones(2, 50, dtype=torch.bool)
    statistics = token_statistics(states, mask)

    assert statistics.dtype == torch.float32
    assert torch.equal(statistics, token_statistics(states.float(), mask))


# ---- Gaussian


def low_rank(seed, samples, layers=2, size=20, rank=4):
    """Features that vary in a few directions far more than in the rest: (n, L, F)."""
    mixing = normal(99, layers, rank, size)
    return torch.einsum("nlr,lrf->nlf", 3 * normal(seed, samples, layers, rank), mixing) + normal(
        seed + 1, samples, layers, size
    )


def test_the_fitted_gaussian_describes_clean_data():
    clean, components = low_rank(0, 400), 4
    gaussian = fit_gaussian(clean, components)
    identity = torch.eye(components).expand(2, -1, -1)

    torch.testing.assert_close(gaussian["mean"], clean.mean(0))
    basis = gaussian["basis"]
    torch.testing.assert_close(basis.transpose(1, 2) @ basis, identity, atol=1e-4, rtol=0)
    inside, outside = whiten(clean, gaussian)
    assert inside.shape == (400, 2, components)
    assert outside.shape == (400, 2)
    covariance = torch.einsum("nlk,nlj->lkj", inside, inside) / 400
    torch.testing.assert_close(covariance, identity, atol=1e-3, rtol=0)
    torch.testing.assert_close(outside.mean(0), torch.ones(2), atol=1e-3, rtol=0)
    # held-out clean data look the same: nothing was learned by heart
    inside, outside = whiten(low_rank(10, 400), gaussian)
    torch.testing.assert_close(inside.pow(2).mean((0, 2)), torch.ones(2), atol=0.2, rtol=0)
    torch.testing.assert_close(outside.mean(0), torch.ones(2), atol=0.2, rtol=0)


@bounded
@given(samples=st.integers(2, 30), components=st.sampled_from([1, 8, 64]), size=st.sampled_from([3, 20]), seed=seeds)
def test_few_samples_fit_few_components_and_stay_finite(samples, components, size, seed):
    clean = normal(seed, samples, 2, size)
    gaussian = fit_gaussian(clean, components)

    assert gaussian["basis"].shape == (2, size, components)
    assert gaussian["variance"].shape == (2, components)
    for name, value in gaussian.items():
        assert value.isfinite().all(), name
    used = max(1, min(components, samples // 4, size))
    assert gaussian["basis"][..., :used].any(1).all()
    assert not gaussian["basis"][..., used:].any()
    distances = log_distances(normal(seed + 1, 5, 2, size), gaussian)
    assert distances.shape == (5, 2, 2)
    assert distances.isfinite().all()
    far, near = (log_distances(scale * normal(seed + 2, 1, 2, size), gaussian).amax() for scale in (1e3, 1))
    assert far > near


def test_where_no_residual_is_left_rounding_is_no_distance():
    """As many components as features, or features that lie in fewer directions than there are components."""
    features = normal(0, 1000, 2, 4)
    flat = features.clone()
    flat[..., 3] = flat[..., 0] - flat[..., 2]
    for clean, components in ((features, 4), (flat, 3)):
        gaussian = fit_gaussian(clean, components)
        assert (gaussian["residual"] == 1).all()
        outside = log_distances(50 * clean, gaussian)[..., 1]
        assert (outside == outside[0]).all()
    # what leaves those directions shows
    assert (log_distances(flat + torch.eye(4)[3], gaussian)[..., 1] > outside[0] + 3).all()


def test_no_direction_is_narrower_than_the_residual():
    gaussian = fit_gaussian(normal(0, 40, 1, 30), 10)

    assert (gaussian["variance"] >= gaussian["residual"][:, None]).all()


def test_clean_samples_that_are_all_alike_give_finite_distances():
    same = normal(0, 1, 2, 10)
    gaussian = fit_gaussian(same.expand(60, -1, -1), 8)
    distances = log_distances(torch.cat([same, normal(1, 3, 2, 10)]), gaussian)

    assert distances.isfinite().all()
    assert (distances[1:] > distances[0]).all()


def test_a_feature_that_never_varies_does_not_turn_rounding_into_distance():
    clean = normal(0, 100, 1, 10)
    clean[..., 3] = 5.0
    gaussian, sample = fit_gaussian(clean, 4), normal(1, 20, 1, 10)
    sample[..., 3] = 5.0
    rounded = sample.clone()
    rounded[..., 3] += 1e-6

    torch.testing.assert_close(log_distances(rounded, gaussian), log_distances(sample, gaussian), atol=1e-3, rtol=0)


def test_outliers_lie_farther_in_the_part_in_which_they_are_outliers():
    gaussian, clean = fit_gaussian(low_rank(0, 400), 4), low_rank(10, 100)
    distances = log_distances(clean, gaussian)
    scale, basis = gaussian["scale"], gaussian["basis"]
    direction = normal(1, 2, 20)
    direction = direction - torch.einsum("lfk,lk->lf", basis, torch.einsum("lfk,lf->lk", basis, direction))
    inside = clean + 30 * basis[..., 0] * scale
    beyond = clean + 10 * direction * scale

    assert (log_distances(inside, gaussian)[..., 0] > distances[..., 0].amax(0)).all()
    assert (log_distances(beyond, gaussian)[..., 1] > distances[..., 1].amax(0)).all()
    torch.testing.assert_close(log_distances(inside, gaussian)[..., 1], distances[..., 1], atol=1e-3, rtol=0)
    torch.testing.assert_close(log_distances(beyond, gaussian)[..., 0], distances[..., 0], atol=1e-3, rtol=0)


def test_the_centre_lies_closer_than_any_clean_sample():
    clean = low_rank(0, 400)
    gaussian = fit_gaussian(clean, 4)

    assert (log_distances(gaussian["mean"][None], gaussian) < log_distances(clean, gaussian).amin(0)).all()


def test_log_distances_are_logarithms_of_mahalanobis_distance_and_residual():
    gaussian, features = fit_gaussian(low_rank(0, 400), 4), low_rank(10, 7)
    distances = log_distances(features, gaussian)
    for layer in range(2):
        g = {name: value[layer].double() for name, value in gaussian.items()}
        for sample in range(7):
            standard = (features[sample, layer].double() - g["mean"]) / g["scale"]
            inside = g["basis"].T @ standard
            mahalanobis = (inside.pow(2) / g["variance"]).sum().sqrt()
            residual = ((standard - g["basis"] @ inside).pow(2).mean() / g["residual"]).sqrt()
            expected = torch.stack([mahalanobis, residual]).log()
            torch.testing.assert_close(distances[sample, layer].double(), expected, atol=1e-4, rtol=1e-4)


@bounded
@given(seed=seeds, batch=st.integers(2, 5))
def test_distances_of_a_batch_equal_those_of_its_rows(seed, batch):
    gaussian, features = fit_gaussian(low_rank(0, 60), 8), low_rank(seed, batch)
    rows = torch.cat([log_distances(features[i : i + 1], gaussian) for i in range(batch)])

    torch.testing.assert_close(log_distances(features, gaussian), rows)


# ---- canonical correlation


def views(seed, samples, size=40, shared=3):
    """Two views (n, F) of the same few latent causes; without them, unrelated."""
    causes = normal(seed, samples, max(1, shared))
    return [
        (causes @ normal(100 + i, max(1, shared), size) if shared else 0) + 0.5 * normal(seed + 1 + i, samples, size)
        for i in range(2)
    ]


def mismatch_auroc(samples, components, shared, seed=0):
    """How well fitted canonical maps tell matched from mismatched pairs of held-out samples."""
    fitted, held_out = views(seed, samples, shared=shared), views(seed + 50, 500, shared=shared)
    maps = fit_canonical(*fitted, components=components)
    assert all(m.shape == (40, min(samples, components)) for m in maps)
    first, second = (view @ m for view, m in zip(held_out, maps, strict=True))
    matched = torch.cosine_similarity(first, second)
    return auroc(torch.cosine_similarity(first, second.roll(1, 0)), matched)


@pytest.mark.parametrize(("samples", "components"), [(800, 8), (800, 64), (200, 64), (100, 64), (60, 64), (40, 64)])
def test_canonical_directions_tell_held_out_pairs_from_mismatched_ones(samples, components):
    assert mismatch_auroc(samples, components, shared=3) > 0.85


@pytest.mark.parametrize(("samples", "components"), [(800, 8), (200, 64)])
def test_unrelated_views_have_nothing_in_common(samples, components):
    assert mismatch_auroc(samples, components, shared=0) == pytest.approx(0.5, abs=0.07)


def test_canonical_directions_weigh_by_what_the_views_share():
    causes = normal(0, 1200, 1)
    first, second = normal(1, 1200, 4), normal(2, 1200, 4)
    first[:, 2:3] = 0.9 * causes + 0.44 * first[:, 2:3]
    second[:, 0:1] = -0.9 * causes + 0.44 * second[:, 0:1]
    left, right = fit_canonical(first, second)

    # one direction counts, and it is the one that both have, sign included
    strength = left.norm(dim=0)
    assert strength[0] > 10 * strength[1:].max()
    assert left[:, 0].abs().argmax() == 2
    assert right[:, 0].abs().argmax() == 0
    both = torch.stack([(first @ left)[:, 0], (second @ right)[:, 0]])
    assert torch.corrcoef(both)[0, 1] > 0.5


def test_canonical_directions_remove_what_hides_the_shared_cause():
    cause, nuisance = normal(0, 1200, 1), normal(1, 1200, 1)
    first = torch.cat([(cause + nuisance) / 2**0.5, nuisance, normal(2, 1200, 2)], 1)
    second = torch.cat([cause, normal(3, 1200, 3)], 1)
    left, _ = fit_canonical(first, second)

    found = (first @ left)[:, 0]
    assert torch.corrcoef(torch.stack([found, cause[:, 0]]))[0, 1].abs() > 0.9


def test_canonical_directions_of_views_longer_than_the_samples_are_many():
    """Their kernels have full rank: without the ridge any two views would have everything in common."""
    fitted, held_out = views(0, 100, size=400), views(50, 500, size=400)
    left, right = fit_canonical(*fitted)
    first, second = held_out[0] @ left, held_out[1] @ right
    swapped = torch.cosine_similarity(first, second.roll(1, 0))
    assert auroc(swapped, torch.cosine_similarity(first, second)) > 0.95


# ---- area under the ROC curve


@bounded
@given(
    negative=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    positive=st.lists(st.integers(0, 5), min_size=1, max_size=12),
)
def test_auroc_counts_pairs_with_ties_as_half(negative, positive):
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for n in negative for p in positive]
    area = auroc(torch.tensor(negative).float(), torch.tensor(positive).float())

    assert area == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize(
    ("negative", "positive", "area"),
    [([0.0, 1.0], [2.0, 3.0], 1.0), ([2.0, 3.0], [0.0, 1.0], 0.0), ([1.0, 1.0], [1.0], 0.5)],
)
def test_auroc_of_separated_and_equal_scores(negative, positive, area):
    assert auroc(torch.tensor(negative), torch.tensor(positive)) == area


# ---- logistic regression


def labelled(seed, samples, direction, intercept=0.0):
    inputs = normal(seed, samples, len(direction))
    p = (inputs @ direction + intercept).sigmoid()
    return inputs, (torch.rand(samples, generator=torch.Generator().manual_seed(seed + 1)) < p).float()


def fit_by_lbfgs(inputs, targets, sample_weights, ridge):
    coefficients = torch.zeros(inputs.shape[1], dtype=torch.double, requires_grad=True)
    intercept = torch.zeros((), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [coefficients, intercept],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        logits = inputs.double() @ coefficients + intercept
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.double(), reduction="none")
        loss = (sample_weights.double() * losses).sum() + ridge / 2 * coefficients.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.cat([coefficients, intercept[None]]).detach()


@bounded
@given(seed=seeds, samples=st.integers(20, 100), size=st.integers(1, 5), ridge=st.sampled_from([1e-3, 1e-2, 1.0]))
def test_the_logistic_fit_matches_lbfgs(seed, samples, size, ridge):
    inputs, targets = labelled(seed, samples, normal(seed + 2, size), 0.5)
    targets[:2] = torch.tensor([0.0, 1.0])
    weights = normal(seed + 3, samples).abs() + 0.1
    weights = weights / weights.sum()
    fitted = fit_logistic(inputs, targets, weights, ridge)

    assert fitted.shape == (size + 1,)
    torch.testing.assert_close(fitted.double(), fit_by_lbfgs(inputs, targets, weights, ridge), atol=1e-3, rtol=1e-3)


def test_the_logistic_fit_recovers_the_coefficients_that_made_the_labels():
    truth = torch.tensor([2.0, -1.0, 0.0])
    inputs, targets = labelled(0, 20000, truth, intercept=-0.7)
    fitted = fit_logistic(inputs, targets, torch.full((20000,), 1 / 20000), ridge=1e-6)

    torch.testing.assert_close(fitted, torch.tensor([2.0, -1.0, 0.0, -0.7]), atol=0.1, rtol=0)


def test_separable_classes_give_finite_coefficients_that_separate():
    inputs = torch.tensor([[-20.0, 0.3], [-1.0, -0.5], [1.0, 0.4], [30.0, -0.2]])
    targets = torch.tensor([0.0, 0.0, 1.0, 1.0])
    fitted = fit_logistic(inputs, targets, torch.full((4,), 0.25))

    assert fitted.isfinite().all()
    assert torch.equal((inputs @ fitted[:-1] + fitted[-1] > 0).float(), targets)


def test_the_logistic_fit_converges_where_full_newton_steps_diverge():
    inputs = torch.tensor([[4.0], [-44.3], [0.4], [61.2]])
    targets, weights = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([0.005, 0.125, 0.596, 0.274])
    fitted = fit_logistic(inputs, targets, weights, ridge=1e-3)

    torch.testing.assert_close(fitted.double(), fit_by_lbfgs(inputs, targets, weights, 1e-3), atol=1e-2, rtol=0)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_the_intercept_is_free_of_the_ridge(share):
    targets = torch.tensor([0.0, 1.0])
    fitted = fit_logistic(torch.zeros(2, 1), targets, torch.tensor([1 - share, share]), ridge=10.0)

    assert fitted[-1].sigmoid().item() == pytest.approx(share, rel=1e-3)
    assert fitted[0] == 0


def test_samples_of_weight_0_do_not_count():
    inputs, targets = labelled(0, 40, torch.tensor([1.0, -1.0]))
    weights = torch.full((40,), 1 / 30)
    weights[30:] = 0

    torch.testing.assert_close(
        fit_logistic(inputs, targets, weights), fit_logistic(inputs[:30], targets[:30], weights[:30])
    )


@pytest.mark.parametrize("size", [12, 400])
def test_discriminants_bring_groups_together(size):
    """Also where there are fewer vectors than numbers, and groups of one."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(60).repeat_interleave(3)[:-2]
    # what tells groups apart lies in four of the numbers, among others that vary more
    values = 3 * torch.randn(len(groups), size, generator=generator)
    values[:, :4] = torch.randn(60, 4, generator=generator)[groups] + 0.3 * torch.randn(
        len(groups), 4, generator=generator
    )
    standard = (values - values.mean(0)) / values.std(0)
    mapping = fit_discriminants(standard, groups, components=8)
    assert mapping.shape == (size, 8)
    assert mapping.isfinite().all()
    mapped = torch.nn.functional.normalize(standard @ mapping, dim=-1)
    cosine = mapped @ mapped.T
    same = (groups[:, None] == groups) & ~torch.eye(len(groups), dtype=torch.bool)
    plain = torch.nn.functional.normalize(standard, dim=-1)
    plain = plain @ plain.T
    told, before = (auroc(of[groups[:, None] != groups], of[same]) for of in (cosine, plain))
    assert told > 0.9
    assert told > before
