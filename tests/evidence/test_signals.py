"""Signals: ranges, published formulas in float64, and that no sample knows of the others."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_dms.evidence.unimodal import (
    confidence,
    consistency,
    dropout_masks,
    energy,
    mutual_information,
    predictive_entropy,
    predictive_variance,
)


bounded = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
batches = st.integers(1, 5)
modalities = st.integers(2, 3)
classes = st.integers(2, 300)
scales = st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4])


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def entropy64(p):
    return torch.special.entr(p.double()).sum(-1)


# ---- confidence, entropy, energy


@bounded
@given(seed=seeds, batch=batches, modality=modalities, k=classes, scale=scales)
def test_confidence_lies_between_0_and_1(seed, batch, modality, k, scale):
    c = confidence(scale * normal(seed, batch, modality, k))

    assert c.shape == (batch, modality)
    assert c.dtype == torch.float32
    assert ((c >= 0) & (c <= 1)).all(), c


@pytest.mark.parametrize("k", [2, 3, 257, 32000, 128256])
def test_confidence_stays_in_its_range_for_near_uniform_logits_of_large_vocabularies(k):
    c = confidence(torch.stack([torch.zeros(k), 1e-4 * normal(k, k)]))

    assert ((c >= 0) & (c <= 1)).all(), c
    torch.testing.assert_close(c, torch.zeros(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [2, 7, 32000])
@pytest.mark.parametrize("height", [1e3, 1e30])
def test_confidence_is_1_for_one_hot_predictions(k, height):
    logits = torch.zeros(2, k)
    logits[0, 0] = logits[1, k - 1] = height

    torch.testing.assert_close(confidence(logits), torch.ones(2))


@bounded
@given(seed=seeds, batch=batches, k=classes, scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_confidence_is_1_minus_the_entropy(seed, batch, k, scale):
    logits = scale * normal(seed, batch, 2, k)
    entropy = entropy64(logits.double().softmax(-1))

    in_nats, over_log_k = predictive_entropy(logits, normalize=False), predictive_entropy(logits)
    torch.testing.assert_close(in_nats.double(), entropy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(over_log_k.double(), entropy / math.log(k), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(confidence(logits).double(), 1 - entropy / math.log(k), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(confidence(logits, normalize=False).double(), 1 - entropy, atol=1e-5, rtol=1e-5)


@bounded
@given(seed=seeds, k=classes)
def test_sharper_predictions_are_more_confident(seed, k):
    logits = normal(seed, 1, k)
    c = confidence(torch.cat([0.5 * logits, logits, 2 * logits]))

    assert c[0] < c[1] < c[2]


@bounded
@given(seed=seeds, batch=batches, modality=modalities, k=classes, scale=st.sampled_from([1.0, 30.0, 300.0]))
def test_energy_is_the_logsumexp(seed, batch, modality, k, scale):
    logits = scale * normal(seed, batch, modality, k)
    top = logits.double().amax(-1)
    expected = top + (logits.double() - top[..., None]).exp().sum(-1).log()

    torch.testing.assert_close(energy(logits).double(), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(energy(logits + 3).double(), expected + 3, atol=1e-4, rtol=1e-5)


# ---- uncertainty


@bounded
@given(seed=seeds, passes=st.integers(2, 6), batch=batches, k=classes, scale=scales)
def test_mutual_information_equals_the_direct_formula(seed, passes, batch, k, scale):
    logits = scale * normal(seed, passes, batch, 2, k)
    p = logits.double().softmax(-1)
    expected = entropy64(p.mean(0)) - entropy64(p).mean(0)

    in_nats, over_log_k = mutual_information(logits, normalize=False), mutual_information(logits)
    assert in_nats.shape == (batch, 2)
    assert in_nats.dtype == torch.float32
    assert (in_nats >= 0).all()
    assert (over_log_k >= 0).all()
    torch.testing.assert_close(in_nats.double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(over_log_k.double(), expected / math.log(k), atol=1e-5, rtol=1e-4)


@bounded
@given(seed=seeds, passes=st.integers(2, 20), batch=batches, k=classes, scale=scales)
def test_passes_that_agree_are_certain(seed, passes, batch, k, scale):
    logits = (scale * normal(seed, batch, k)).expand(passes, -1, -1)
    information, variance = mutual_information(logits), predictive_variance(logits)

    assert (information >= 0).all()
    assert (variance >= 0).all()
    torch.testing.assert_close(information, torch.zeros(batch), atol=1e-5, rtol=0)
    torch.testing.assert_close(variance, torch.zeros(batch), atol=1e-6, rtol=0)


def test_passes_that_contradict_each_other_are_as_uncertain_as_can_be():
    logits = 1e4 * torch.eye(2)[:, None]  # (T, B, K), each pass certain of another class

    torch.testing.assert_close(mutual_information(logits), torch.ones(1))
    torch.testing.assert_close(predictive_variance(logits), torch.tensor([0.5]))


def test_every_pass_being_unsure_is_not_epistemic_uncertainty():
    logits = torch.zeros(5, 1, 10)

    torch.testing.assert_close(mutual_information(logits), torch.zeros(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(predictive_entropy(logits.mean(0)), torch.ones(1))


@bounded
@given(seed=seeds, passes=st.integers(2, 6), batch=batches, k=st.integers(2, 20))
def test_predictive_variance_is_the_variance_of_the_probabilities(seed, passes, batch, k):
    logits = 2 * normal(seed, passes, batch, k)
    p = logits.double().softmax(-1)
    expected = torch.zeros(batch, dtype=torch.double)
    for b in range(batch):
        for c in range(k):
            mean = sum(p[t, b, c] for t in range(passes)) / passes
            expected[b] += sum((p[t, b, c] - mean) ** 2 for t in range(passes)) / passes

    torch.testing.assert_close(predictive_variance(logits).double(), expected, atol=1e-6, rtol=1e-5)


# ---- dropout masks


@bounded
@given(seed=seeds, passes=st.integers(1, 20), size=st.integers(1, 200), p=st.sampled_from([0.1, 0.5, 0.9]))
def test_dropout_masks_depend_on_the_seed_alone(seed, passes, size, p):
    masks = dropout_masks(passes, size, p, seed)
    torch.rand(3)  # moves the caller's random state

    assert masks.shape == (passes, size)
    assert torch.equal(masks, dropout_masks(passes, size, p, seed))
    assert torch.equal(masks, dropout_masks(passes, size, p, seed, torch.device("cpu")))
    torch.testing.assert_close(masks[masks != 0], torch.full((int((masks != 0).sum()),), 1 / (1 - p)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_masks_have_mean_1_and_differ_between_passes_and_seeds(p):
    masks = dropout_masks(20, 5000, p, seed=0)

    assert masks.mean().item() == pytest.approx(1, abs=0.05)
    assert (masks == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert len(masks.unique(dim=0)) == 20
    assert not torch.equal(masks, dropout_masks(20, 5000, p, seed=1))


@bounded
@given(seed=seeds)
def test_dropout_masks_leave_the_global_random_state_alone(seed):
    before = torch.get_rng_state()
    dropout_masks(4, 50, 0.3, seed)

    assert torch.equal(before, torch.get_rng_state())


def test_no_dropout_keeps_everything():
    assert torch.equal(dropout_masks(5, 100, 0.0, seed=3), torch.ones(5, 100))


# ---- consistency


@bounded
@given(seed=seeds, batch=batches, size=st.integers(1, 300), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_two_modalities_share_one_cosine(seed, batch, size, scale):
    h = scale * normal(seed, batch, 2, size)
    s = consistency(h, torch.ones(batch, 2, dtype=torch.bool))
    a, b = h.double().unbind(1)
    expected = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))

    assert torch.equal(s[:, 0], s[:, 1])
    torch.testing.assert_close(s[:, 0].double(), expected, atol=1e-5, rtol=1e-5)


@bounded
@given(
    seed=seeds, batch=batches, modality=modalities, size=st.integers(1, 300), sign=st.sampled_from([-3.0, 1.0, 2.0])
)
def test_consistency_lies_between_minus_1_and_1(seed, batch, modality, size, sign):
    h = normal(seed, batch, modality, size)
    h[:, 1:] = sign * h[:, :1]  # parallel representations, where rounding can leave the range
    s = consistency(h, torch.ones(batch, modality, dtype=torch.bool))

    assert ((s >= -1) & (s <= 1)).all(), s
    if modality == 2 or sign > 0:
        torch.testing.assert_close(s, torch.full_like(s, math.copysign(1, sign)))


@bounded
@given(seed=seeds, batch=batches, present=st.lists(st.booleans(), min_size=3, max_size=3))
def test_consistency_averages_the_other_present_modalities(seed, batch, present):
    h, mask = normal(seed, batch, 3, 8), torch.tensor([present] * batch)
    s = consistency(h, mask)

    for b in range(batch):
        for m in range(3):
            others = [o for o in range(3) if o != m and present[o] and present[m]]
            cosines = [torch.cosine_similarity(h[b, m].double(), h[b, o].double(), dim=0) for o in others]
            expected = sum(cosines) / len(cosines) if cosines else torch.tensor(0.0)
            torch.testing.assert_close(s[b, m].double(), expected.double(), atol=1e-5, rtol=1e-5)
            if not others:
                assert s[b, m] == 0


@bounded
@given(seed=seeds, order=st.permutations(range(3)))
def test_consistency_does_not_depend_on_the_order_of_modalities(seed, order):
    h, mask = normal(seed, 4, 3, 8), normal(seed + 1, 4, 3) > -0.5

    torch.testing.assert_close(consistency(h[:, order], mask[:, order]), consistency(h, mask)[:, order])


def test_an_absent_modality_does_not_count_whatever_it_holds():
    h = normal(0, 2, 3, 8)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    other = h.clone()
    other[0, 2] = 1e6

    assert torch.equal(consistency(h, mask), consistency(other, mask))
    torch.testing.assert_close(consistency(h, mask)[0, :2], consistency(h[:1, :2], mask[:1, :2])[0])


# ---- all of them


@bounded
@given(seed=seeds, batch=st.integers(2, 5), modality=modalities, k=classes)
def test_a_batch_equals_its_rows(seed, batch, modality, k):
    logits, passes = 3 * normal(seed, batch, modality, k), 3 * normal(seed, 4, batch, modality, k)
    mask = normal(seed + 1, batch, modality) > -0.5
    for i in range(batch):
        row = slice(i, i + 1)
        for signal in (confidence, predictive_entropy, energy):
            torch.testing.assert_close(signal(logits)[row], signal(logits[row]), atol=1e-6, rtol=1e-6)
        for signal in (mutual_information, predictive_variance):
            torch.testing.assert_close(signal(passes)[row], signal(passes[:, row]), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(consistency(logits, mask)[row], consistency(logits[row], mask[row]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    logits, mask = (10 * normal(0, 3, 4, 2, 50)).to(dtype), torch.ones(4, 2, dtype=torch.bool)
    for signal in (confidence, predictive_entropy, energy, mutual_information, predictive_variance):
        torch.testing.assert_close(signal(logits), signal(logits.float()), atol=0, rtol=0)
    torch.testing.assert_close(consistency(logits[0], mask), consistency(logits[0].float(), mask), atol=0, rtol=0)
