"""Fusion: the key bias multiplies attention by M * w_m, weight 0 is masking, uniform weights change nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from modeling_dms.steer.bias import embedding_scale, first_attended, key_bias, relative_weights
from modeling_dms.steer.masks import fold_key_bias


bounded = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
batches = st.integers(1, 4)
modalities = st.integers(2, 3)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_weights(seed, batch, modality, absent=False):
    """Rows that sum to 1; with `absent` about a third of the entries are 0, never a whole row."""
    weights = (3 * normal(seed, batch, modality)).softmax(1)
    if absent:
        gone = normal(seed + 1, batch, modality) > 0.4
        gone[torch.arange(batch), torch.arange(batch) % modality] = False
        weights = weights.masked_fill(gone, 0)
    return weights / weights.sum(1, keepdim=True)


def random_ids(seed, batch, length, modality):
    return torch.randint(0, modality + 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def causal(batch, length, padding=()):
    """(B, 1, L, L), True = attend; `padding[b]` positions on the left of row b are padding."""
    mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(batch, 1, 1, 1)
    for row, count in enumerate(padding):
        mask[row, :, :, :count] = False
    return mask


def additive(mask, dtype=torch.float32, low=None):
    low = torch.finfo(dtype).min if low is None else low
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, low)


# ---- weights to bias


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.5, 0.5], [1.0, 1.0]),
        ([0.2, 0.8], [0.4, 1.6]),
        ([1.0, 0.0], [1.0, 0.0]),
        ([0.5, 0.0, 0.5], [1.0, 0.0, 1.0]),
        ([0.1, 0.3, 0.6], [0.3, 0.9, 1.8]),
    ],
)
def test_relative_weights_count_the_modalities_that_have_weight(weights, expected):
    torch.testing.assert_close(relative_weights(torch.tensor([weights])), torch.tensor([expected]))


@pytest.mark.parametrize("modality", range(2, 9))
def test_the_bias_of_uniform_weights_is_exactly_0(modality):
    mask = torch.ones(modality, modality, dtype=torch.bool).tril()  # 1 to M modalities present
    ids = torch.arange(modality + 1).repeat(modality, 1)
    bias = key_bias(mask / mask.sum(1, keepdim=True), ids)

    present = torch.nn.functional.pad(mask, (1, 0), value=True)
    assert (bias[present] == 0).all()
    assert (bias[~present] == -torch.inf).all()


@bounded
@given(seed=seeds, batch=batches, modality=modalities, length=st.integers(1, 12))
def test_the_bias_is_the_logarithm_of_the_relative_weight(seed, batch, modality, length):
    weights, ids = random_weights(seed, batch, modality, absent=True), random_ids(seed, batch, length, modality)
    bias, scale = key_bias(weights, ids), embedding_scale(weights, ids)

    assert bias.shape == scale.shape == (batch, length)
    assert bias.dtype == scale.dtype == torch.float32
    for b in range(batch):
        count = int((weights[b] > 0).sum())
        for position, kind in enumerate(ids[b].tolist()):
            factor = 1.0 if kind == 0 else count * weights[b, kind - 1].double().item()
            expected = torch.tensor(factor, dtype=torch.double)
            torch.testing.assert_close(scale[b, position].double(), expected, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(bias[b, position].double(), expected.log(), atol=1e-6, rtol=1e-5)


@bounded
@given(seed=seeds, batch=batches, modality=modalities)
def test_bias_and_scale_of_a_batch_equal_those_of_its_rows(seed, batch, modality):
    weights, ids = random_weights(seed, batch, modality, absent=True), random_ids(seed, batch, 7, modality)
    for function in (key_bias, embedding_scale):
        rows = [function(weights[i : i + 1], ids[i : i + 1]) for i in range(batch)]
        assert torch.equal(function(weights, ids), torch.cat(rows))


@bounded
@given(seed=seeds, batch=batches, modality=modalities, length=st.integers(1, 12))
def test_the_sink_alone_keeps_a_bias_of_0_if_it_is_the_first_position_with_weight(seed, batch, modality, length):
    weights, ids = random_weights(seed, batch, modality, absent=True), random_ids(seed, batch, length, modality)
    sink = torch.randint(0, length, (batch,), generator=torch.Generator().manual_seed(seed + 2))
    bias, spared = key_bias(weights, ids), key_bias(weights, ids, sink)

    for row, spared_row, kinds, place in zip(bias, spared, ids, sink.tolist(), strict=True):
        expected = row.clone()
        if kinds[place] > 0 and row[place] > -torch.inf and not expected[:place][kinds[:place] > 0].isfinite().any():
            expected[place] = 0
        assert torch.equal(spared_row, expected)


@bounded
@given(seed=seeds, length=st.integers(2, 9))
def test_the_sink_is_the_first_token_that_is_not_padding(seed, length):
    generator = torch.Generator().manual_seed(seed)
    padding = torch.randint(0, length, (3,), generator=generator)
    ids = torch.ones(3, length, dtype=torch.long)
    keep = torch.arange(length) >= padding[:, None]
    for mask in (keep, keep.long(), keep.float()):
        assert torch.equal(first_attended(mask, ids), padding)
    assert torch.equal(first_attended(None, ids), torch.zeros(3, dtype=torch.long))


def test_gradients_of_the_bias_are_finite_beside_a_weight_of_0():
    weights = torch.tensor([[0.25, 0.75], [0.0, 1.0]], requires_grad=True)
    bias = key_bias(weights, torch.tensor([[0, 1, 2], [0, 1, 2]]))
    bias.masked_fill(bias.isneginf(), 0).sum().backward()

    torch.testing.assert_close(weights.grad, torch.tensor([[4.0, 4 / 3], [0.0, 1.0]]))


# ---- folding into masks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bool", "lowest", "-inf", "-1e9"])
def test_folding_keeps_what_was_masked_and_biases_the_rest(dtype, kind):
    keep, bias = causal(2, 5, padding=(0, 2)), normal(0, 2, 5)
    bias[1, 3] = -torch.inf
    masks = {
        "bool": keep,
        "lowest": additive(keep, dtype),
        "-inf": additive(keep, low=-torch.inf),
        "-1e9": additive(keep, low=-1e9),
    }
    folded = fold_key_bias(masks[kind], bias, dtype)

    attended = keep & ~bias.isneginf()[:, None, None]
    assert folded.dtype == dtype
    assert folded.shape == keep.shape
    assert folded.isfinite().all()
    expected = bias[:, None, None].expand_as(keep)[attended].to(dtype)
    assert torch.equal(folded[attended], expected)
    # what is masked gets no attention in this precision
    assert (folded[~attended] <= max(torch.finfo(dtype).min / 2, -1e8)).all()


def test_folding_adds_to_a_mask_that_has_biases_of_its_own():
    own = torch.tensor([[[[0.0, -0.5, 2.0, torch.finfo(torch.float32).min]]]])
    folded = fold_key_bias(own, torch.tensor([[0.25, 0.25, 0.0, 0.25]]), torch.float32)

    torch.testing.assert_close(folded[..., :3], torch.tensor([[[[0.25, -0.25, 2.0]]]]))
    assert folded[..., 3] < -1e30


@bounded
@given(prompt=st.integers(1, 6), keys=st.integers(1, 9), offset=st.integers(0, 9), seed=seeds)
def test_folding_goes_by_the_absolute_position_and_leaves_generated_keys_neutral(prompt, keys, offset, seed):
    bias = normal(seed, 2, prompt)
    folded = fold_key_bias(torch.ones(2, 1, 3, keys, dtype=torch.bool), bias, torch.float32, offset)

    assert folded.shape == (2, 1, 3, keys)
    for key in range(keys):
        position = offset + key
        expected = bias[:, position] if position < prompt else torch.zeros(2)
        assert torch.equal(folded[:, 0, :, key], expected[:, None].expand(-1, 3))


@pytest.mark.parametrize("kind", ["bool", "lowest"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fully_masked_rows_stay_finite_and_give_the_bias_no_gradient(dtype, kind):
    keep = torch.zeros(1, 1, 2, 4, dtype=torch.bool)
    bias = torch.tensor([[0.3, -0.2, 0.1, -torch.inf]], requires_grad=True)
    folded = fold_key_bias(keep if kind == "bool" else additive(keep, dtype), bias, dtype)
    attention = folded.softmax(-1).float()
    (attention * normal(0, 1, 1, 2, 4)).sum().backward()

    assert folded.isfinite().all()
    torch.testing.assert_close(attention, torch.full_like(attention, 0.25))
    assert torch.equal(bias.grad, torch.zeros(1, 4))


@bounded
@given(seed=seeds, padding=st.integers(1, 5))
def test_padding_rows_do_not_change_the_gradient_of_the_bias(seed, padding):
    length = 6
    q, k, v = (normal(seed + i, 1, 2, length, 4) for i in range(3))
    real = normal(seed + 3, 1, 2, length, 4)

    def gradient(first_row):
        bias = (0.3 * normal(seed + 4, 1, length)).requires_grad_()
        mask = fold_key_bias(causal(1, length, (padding,)), bias, torch.float32)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        (out * real)[:, :, first_row:].sum().backward()
        return bias.grad

    torch.testing.assert_close(gradient(0), gradient(padding))


# ---- what it means for attention


def attend(q, k, v, keep, factors):
    """Attention whose weights are multiplied by `factors` (B, L) before normalisation, in float64."""
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores - scores.amax(-1, keepdim=True)
    unnormalised = scores.exp() * keep * factors.double()[:, None, None]
    total = unnormalised.sum(-1, keepdim=True)
    return torch.where(total > 0, unnormalised / total.clamp_min(1e-300), 0) @ v.double()


@bounded
@given(seed=seeds, batch=batches, modality=modalities, length=st.integers(2, 10), as_bool=st.booleans())
def test_the_bias_multiplies_attention_before_normalisation(seed, batch, modality, length, as_bool):
    q, k, v = (normal(seed + i, batch, 2, length, 4) for i in range(3))
    weights, ids = random_weights(seed, batch, modality, absent=True), random_ids(seed, batch, length, modality)
    ids[:, 0] = 0  # every query has at least one key left
    keep = causal(batch, length)
    mask = fold_key_bias(keep if as_bool else additive(keep), key_bias(weights, ids), torch.float32)
    steered = scaled_dot_product_attention(q, k, v, attn_mask=mask)

    factors = torch.ones(batch, length)
    for b in range(batch):
        for m in range(modality):
            factors[b, ids[b] == m + 1] = weights[b, m] * (weights[b] > 0).sum()
    torch.testing.assert_close(steered.double(), attend(q, k, v, keep, factors), atol=1e-5, rtol=1e-4)


@bounded
@given(seed=seeds, modality=modalities, length=st.integers(2, 10), gone=st.integers(0, 2))
def test_weight_0_masks_the_modality_and_uniform_weights_change_nothing(seed, modality, length, gone):
    q, k, v = (normal(seed + i, 2, 2, length, 4) for i in range(3))
    ids = random_ids(seed, 2, length, modality)
    ids[:, 0] = 0
    weights = torch.ones(2, modality)
    weights[0, gone % modality] = 0
    weights = weights / weights.sum(1, keepdim=True)
    keep = causal(2, length)
    mask = fold_key_bias(keep, key_bias(weights, ids), torch.float32)
    steered = scaled_dot_product_attention(q, k, v, attn_mask=mask)

    without = keep.clone()
    without[0] &= ids[0] != gone % modality + 1
    plain = scaled_dot_product_attention(q, k, v, attn_mask=additive(without))
    assert torch.equal(steered, plain)


def weighed_attention(q, k, v, ids, weights, real):
    """Causal attention of the real positions (B, L) with the bias, and the gradient of a part of it by the weights."""
    weights = weights.clone().requires_grad_()
    keep = causal(*ids.shape) & real[:, None, None]
    mask = fold_key_bias(keep, key_bias(weights, ids), q.dtype)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    (out.float() * real[:, None, :, None]).pow(2).sum().backward()
    return out.detach(), weights.grad


@pytest.mark.parametrize("dtype", DTYPES)
@bounded
@given(seed=seeds, modality=modalities, length=st.integers(2, 8), left=st.integers(0, 4), right=st.integers(0, 4))
def test_padding_on_either_side_changes_nothing(dtype, seed, modality, length, left, right):
    q, k, v = (normal(seed + i, 2, 2, length, 4).to(dtype) for i in range(3))
    ids, weights = random_ids(seed, 2, length, modality), random_weights(seed, 2, modality)
    ids[:, 0] = 0
    whole = torch.ones(2, length, dtype=torch.bool)
    expected, expected_gradient = weighed_attention(q, k, v, ids, weights, whole)

    def padded(x, value):
        return F.pad(x, (left, right), value=value)

    # what stands in the padding is of no account
    rows = (F.pad(x, (0, 0, left, right), value=7.0) for x in (q, k, v))
    found, gradient = weighed_attention(*rows, padded(ids, 1), weights, padded(whole, False))
    assert found.isfinite().all()
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(found[:, :, left : left + length], expected, atol=tolerance, rtol=tolerance)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient, expected_gradient, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@bounded
@given(seed=seeds, batch=batches, modality=modalities, length=st.integers(1, 8))
def test_weights_of_any_precision_and_order(dtype, seed, batch, modality, length):
    weights = random_weights(seed, batch, modality, absent=True).to(dtype)
    ids = random_ids(seed, batch, length, modality)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    for function, nothing in ((key_bias, -torch.inf), (embedding_scale, 0.0)):
        made = function(weights, ids)
        assert made.dtype == torch.float32
        gone = F.pad(weights == 0, (1, 0)).gather(1, ids)
        assert (made[gone] == nothing).all()
        assert made[~gone].isfinite().all()
        assert torch.equal(function(weights[order], ids[order]), made[order])
