"""Losses against naive loops in float64, what does not count, and where gradients go."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_dms.weigh.losses import (
    contrastive_loss,
    leave_one_out_target,
    modality_weight_consistency_loss,
    schedule_loss,
    unimodal_loss,
)


bounded = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
batches = st.integers(1, 5)
modalities = st.integers(2, 3)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_mask(seed, batch, modality):
    return normal(seed + 7, batch, modality) > -0.5


def random_weights(seed, batch, modality):
    return (2 * normal(seed + 11, batch, modality)).softmax(1)


def assert_same_value_and_gradient(loss, reference, tensor):
    """`loss` of each sample and its gradient equal those of `reference`, both functions of `tensor`."""
    single, double = tensor.clone().requires_grad_(), tensor.double().requires_grad_()
    value, expected = loss(single), torch.stack([torch.as_tensor(x).double() for x in reference(double)])
    assert value.shape == tensor.shape[:1]
    torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-4)
    # samples count differently, as they do by their number of targets
    share = torch.arange(1.0, len(value) + 1)
    (share * value).sum().backward()
    if expected.requires_grad:
        (share * expected).sum().backward()
        torch.testing.assert_close(single.grad.double(), double.grad, atol=1e-5, rtol=1e-3)
    else:
        assert not single.grad.any()


# ---- modality weight consistency


def naive_mwc(h, weights):
    batch, modality, size = h.shape
    losses = [0.0] * batch
    for b in range(batch):
        fused = [sum(weights[b, m] * h[b, m, d] for m in range(modality)) for d in range(size)]
        for m in range(modality):
            distance = sum((fused[d] - h[b, m, d]) ** 2 for d in range(size)) / size
            losses[b] = losses[b] + weights[b, m] * distance
    return losses


@bounded
@given(seed=seeds, batch=batches, modality=modalities, size=st.integers(1, 4))
def test_mwc_is_the_weighted_distance_to_the_fused_representation(seed, batch, modality, size):
    h, weights = normal(seed, batch, modality, size), random_weights(seed, batch, modality)

    assert_same_value_and_gradient(
        lambda x: modality_weight_consistency_loss(x, weights), lambda x: naive_mwc(x, weights.double()), h
    )
    assert_same_value_and_gradient(
        lambda x: modality_weight_consistency_loss(h, x), lambda x: naive_mwc(h.double(), x), weights
    )


def test_mwc_vanishes_where_modalities_agree_or_one_has_all_weight():
    h = normal(0, 3, 2, 5)
    same = h[:, :1].expand(-1, 2, -1)

    assert (modality_weight_consistency_loss(same, torch.full((3, 2), 0.5)) == 0).all()
    assert (modality_weight_consistency_loss(h, torch.tensor([[1.0, 0.0]] * 3)) == 0).all()
    assert (modality_weight_consistency_loss(h, torch.full((3, 2), 0.5)) > 0).all()


# ---- unimodal


def naive_unimodal(logits, labels, mask, ignore_index):
    losses = []
    for b in range(len(logits)):
        targets = [t for t in labels[b].tolist() if t != ignore_index]
        own = []
        for m in range(logits.shape[1]):
            if targets and mask[b, m]:
                log_p = logits[b, m] - logits[b, m].logsumexp(0)
                own.append(-sum(log_p[t] for t in targets) / len(targets))
        losses.append(sum(own) / len(own) if own else 0.0)
    return losses


@bounded
@given(
    seed=seeds,
    batch=batches,
    modality=modalities,
    length=st.integers(1, 4),
    ignore=st.sampled_from([-100, -1, 0, 4]),
)
def test_unimodal_is_the_cross_entropy_of_the_bag_of_targets(seed, batch, modality, length, ignore):
    logits, mask = 2 * normal(seed, batch, modality, 5), random_mask(seed, batch, modality)
    labels = torch.randint(0, 5, (batch, length), generator=torch.Generator().manual_seed(seed))
    labels[normal(seed + 1, batch, length) > 0] = ignore

    assert_same_value_and_gradient(
        lambda x: unimodal_loss(x, labels, mask, ignore), lambda x: naive_unimodal(x, labels, mask, ignore), logits
    )


def test_unimodal_ignores_minus_100_by_default():
    logits, labels = normal(0, 1, 2, 5), torch.tensor([[-100, 3, -100]])
    mask = torch.ones(1, 2, dtype=torch.bool)

    torch.testing.assert_close(unimodal_loss(logits, labels, mask), unimodal_loss(logits, labels[:, 1:2], mask))


@pytest.mark.parametrize("ignore", [5, 50000])
def test_unimodal_ignores_an_index_beyond_the_vocabulary(ignore):
    logits, mask = normal(0, 1, 2, 5), torch.ones(1, 2, dtype=torch.bool)
    ignored, usual = (torch.tensor([[index, 3]]) for index in (ignore, -100))

    torch.testing.assert_close(unimodal_loss(logits, ignored, mask, ignore), unimodal_loss(logits, usual, mask))


def test_unimodal_of_a_uniform_prediction_is_log_k():
    loss = unimodal_loss(torch.zeros(2, 2, 7), torch.tensor([[1, 2], [3, -100]]), torch.ones(2, 2, dtype=torch.bool))

    assert loss.tolist() == pytest.approx([math.log(7)] * 2)


def test_a_batch_without_targets_has_unimodal_loss_0():
    logits = normal(0, 2, 2, 5).requires_grad_()
    loss = unimodal_loss(logits, torch.full((2, 3), -100), torch.ones(2, 2, dtype=torch.bool))
    loss.sum().backward()

    assert loss.tolist() == [0, 0]
    assert torch.equal(logits.grad, torch.zeros_like(logits))


# ---- contrastive


def naive_contrastive(h, mask, temperature):
    losses, pairs = [0.0] * len(h), math.comb(h.shape[1], 2)
    for first in range(h.shape[1]):
        for second in range(first + 1, h.shape[1]):
            rows = [b for b in range(len(h)) if mask[b, first] and mask[b, second]]
            if len(rows) < 2:
                continue
            similar = {
                (i, j): h[i, first] @ h[j, second] / (h[i, first].norm() * h[j, second].norm()) / temperature
                for i in rows
                for j in rows
            }
            for i in rows:
                forward = torch.stack([similar[i, j] for j in rows]).logsumexp(0)
                backward = torch.stack([similar[j, i] for j in rows]).logsumexp(0)
                losses[i] = losses[i] + ((forward + backward) / 2 - similar[i, i]) / pairs
    return losses


@bounded
@given(seed=seeds, batch=st.integers(1, 5), modality=modalities, temperature=st.sampled_from([0.07, 0.5, 1.0]))
def test_contrastive_is_the_symmetric_infonce_over_complete_pairs(seed, batch, modality, temperature):
    h, mask = normal(seed, batch, modality, 6), random_mask(seed, batch, modality)

    assert_same_value_and_gradient(
        lambda x: contrastive_loss(x, mask, temperature), lambda x: naive_contrastive(x, mask, temperature), h
    )


@pytest.mark.parametrize(
    "mask",
    [[[True, True]], [[True, True], [True, False]], [[True, False], [False, True], [True, False]]],
)
def test_fewer_than_two_pairs_have_contrastive_loss_0(mask):
    h = normal(0, len(mask), 2, 4).requires_grad_()
    loss = contrastive_loss(h, torch.tensor(mask))
    loss.sum().backward()

    assert not loss.any()
    assert torch.equal(h.grad, torch.zeros_like(h))


def test_contrastive_loss_stays_finite_beside_an_empty_modality():
    h = normal(0, 3, 2, 4)
    h[2, 1] = 0
    h.requires_grad_()
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    contrastive_loss(h, mask).sum().backward()

    assert h.grad.isfinite().all()
    assert not h.grad[2].any()
    assert h.grad[:2].any()


def test_matched_pairs_have_a_lower_contrastive_loss_than_swapped_ones():
    h = normal(0, 4, 1, 8).repeat(1, 2, 1) + 0.1 * normal(1, 4, 2, 8)
    swapped = torch.stack([h[:, 0], h[:, 1].roll(1, 0)], 1)
    mask = torch.ones(4, 2, dtype=torch.bool)

    assert contrastive_loss(h, mask).max() < 0.1 < contrastive_loss(swapped, mask).min()
    torch.testing.assert_close(contrastive_loss(5 * h, mask), contrastive_loss(h, mask))


# ---- schedule


def naive_schedule(weights, target, mask):
    losses = [0.0] * len(weights)
    for b in range(len(weights)):
        if mask[b].sum() >= 2:
            losses[b] = -sum(target[b, m] * weights[b, m].log() for m in range(len(mask[b])) if mask[b, m])
    return losses


@bounded
@given(seed=seeds, batch=batches, modality=modalities)
def test_schedule_is_the_cross_entropy_where_there_is_a_choice(seed, batch, modality):
    weights, target = random_weights(seed, batch, modality), random_weights(seed + 1, batch, modality)
    mask = random_mask(seed, batch, modality)

    assert_same_value_and_gradient(
        lambda x: schedule_loss(x, target, mask), lambda x: naive_schedule(x, target.double(), mask), weights
    )


@bounded
@given(seed=seeds, batch=batches, modality=modalities)
def test_schedule_loss_is_smallest_at_the_target(seed, batch, modality):
    target, mask = random_weights(seed, batch, modality), torch.ones(batch, modality, dtype=torch.bool)
    logits = target.log().requires_grad_()
    at_target = schedule_loss(logits.softmax(1), target, mask)
    at_target.sum().backward()

    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-6, rtol=0)
    assert (at_target < schedule_loss(random_weights(seed + 1, batch, modality), target, mask)).all()


def test_schedule_loss_of_samples_with_one_modality_is_0():
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = schedule_loss(weights, torch.full((2, 2), 0.5), torch.tensor([[True, False], [False, True]]))
    loss.sum().backward()

    assert loss.tolist() == [0, 0]
    assert torch.equal(weights.grad, torch.zeros(2, 2))


def test_schedule_loss_stays_finite_at_weight_0():
    weights = torch.tensor([[1.0, 0.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    wrong, right = (schedule_loss(weights, torch.tensor([target]), mask) for target in ([0.5, 0.5], [1.0, 0.0]))
    (wrong + right).backward()

    assert wrong.isfinite()
    assert wrong > 10
    assert right.item() == 0
    assert weights.grad.isfinite().all()


# ---- leave-one-out target


@bounded
@given(seed=seeds, batch=batches, modality=modalities, tau=st.sampled_from([0.1, 1.0, 5.0]))
def test_the_modality_that_is_missed_most_should_have_most_weight(seed, batch, modality, tau):
    losses = normal(seed, batch, modality).abs()
    target = leave_one_out_target(losses, tau)
    exponential = (losses.double() / tau).exp()

    torch.testing.assert_close(target.double(), exponential / exponential.sum(1, keepdim=True), atol=1e-6, rtol=1e-5)
    assert torch.equal(target.argmax(1), losses.argmax(1))


def test_the_target_carries_no_gradient():
    losses = normal(0, 3, 2).requires_grad_()

    assert not leave_one_out_target(losses).requires_grad


# ---- training on them


@pytest.mark.parametrize("name", ["mwc", "unimodal", "contrastive"])
def test_a_few_steps_of_descent_lower_the_loss(name):
    h = normal(0, 6, 2, 8).requires_grad_()
    mask, labels = torch.ones(6, 2, dtype=torch.bool), torch.arange(6)[:, None]
    loss = {
        "mwc": lambda: modality_weight_consistency_loss(h, torch.full((6, 2), 0.5)).mean(),
        "unimodal": lambda: unimodal_loss(h, labels, mask).mean(),
        "contrastive": lambda: contrastive_loss(h, mask).mean(),
    }[name]
    optimizer = torch.optim.Adam([h], lr=0.1)
    before = loss().item()
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    assert loss().item() < before / 2
