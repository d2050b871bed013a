"""Surprisal of texts: its formula, whatever is in memory at the same time, and numbers that padding does not touch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_dms.evidence import surprisal
from modeling_dms.evidence.surprisal import (
    LIMITS,
    SURPRISAL_STATISTICS,
    surprisal_statistics,
    token_surprisal,
)


bounded = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predicted(seed, batch, tokens, size=6, classes=11, scale=1.0):
    """States, targets and an output layer."""
    weight = scale * normal(seed + 1, classes, size)
    targets = torch.randint(classes, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return normal(seed, batch, tokens, size), targets, lambda states: states @ weight.T


def read(seed, batch, tokens, share=0.7):
    """Surprisal, excess and misplacement, and which tokens count, as of texts of likely and unlikely tokens."""
    mask = normal(seed + 2, batch, tokens) < math.sqrt(2) * torch.erfinv(torch.tensor(2 * share - 1)).item()
    return 4 * normal(seed + 1, 3, batch, tokens), mask


def all_of(targets):
    return torch.ones_like(targets, dtype=torch.bool)


# ---- tokens


@bounded
@given(
    seed=seeds,
    batch=st.integers(1, 4),
    tokens=st.integers(0, 9),
    classes=st.integers(2, 40),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
)
def test_surprisal_excess_and_misplacement_follow_their_formulas(seed, batch, tokens, classes, scale):
    states, targets, readout = predicted(seed, batch, tokens, classes=classes, scale=scale)
    mask = read(seed, batch, tokens)[1]
    found = token_surprisal(states, targets, mask, readout)

    assert found.shape == (3, batch, tokens)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert not found[:, ~mask].any()
    for b in range(batch):
        p = readout(states[b, mask[b]]).double().log_softmax(-1).clamp_min(-100)
        said = p[:, targets[b, mask[b]]]  # of each place, what it expects of each token
        entropy = torch.special.entr(p.exp()).sum(1)
        elsewhere = said.exp().mean(0).log()
        expected = torch.stack([-said.diagonal(), -said.diagonal() - entropy, elsewhere - said.diagonal()])
        torch.testing.assert_close(found[:, b, mask[b]].double(), expected, atol=1e-4, rtol=1e-4)


def test_where_nothing_is_expected_every_token_surprises_alike_and_none_is_misplaced():
    targets = torch.zeros(2, 3, dtype=torch.long)
    found = token_surprisal(normal(0, 2, 3, 6), targets, all_of(targets), lambda s: torch.zeros(*s.shape[:2], 50))

    torch.testing.assert_close(found[0], torch.full((2, 3), math.log(50)))
    torch.testing.assert_close(found[1:], torch.zeros(2, 2, 3), atol=1e-6, rtol=0)


def test_words_in_another_order_are_misplaced():
    """Each place expects one token, for certain: in their order all fit, exchanged none does."""
    expected = torch.eye(4)[None] * 30
    for order, sign in ([0, 1, 2, 3], -1), ([1, 0, 3, 2], 1):
        targets = torch.tensor([order])
        found = token_surprisal(torch.zeros(1, 4, 2), targets, all_of(targets), lambda _: expected)
        assert (found[2] * sign > 1).all()


def test_a_token_that_a_model_never_says_is_finite():
    targets = torch.tensor([[0, 3]])
    logits = torch.full((1, 2, 5), -torch.inf)
    logits[..., 0] = 0
    found = token_surprisal(normal(0, 1, 2, 6), targets, all_of(targets), lambda _: logits)

    torch.testing.assert_close(found[:2], torch.tensor([[[0.0, 100.0]], [[0.0, 100.0]]]))
    assert found.isfinite().all()


@pytest.mark.parametrize("chunk", [1, 2, 7, 35, 36, 1000])
def test_chunks_give_what_the_whole_gives(chunk, monkeypatch):
    states, targets, readout = predicted(0, 5, 7)
    mask = read(0, 5, 7)[1]
    whole, most = token_surprisal(states, targets, mask, readout), []

    def watched(some):
        most.append(some.shape[0] * some.shape[1])
        return readout(some)

    monkeypatch.setattr(surprisal, "_CHUNK", chunk)
    torch.testing.assert_close(token_surprisal(states, targets, mask, watched), whole, atol=1e-5, rtol=1e-5)
    assert max(most) <= max(chunk, 5)
    assert sum(most) == 35


@bounded
@given(seed=seeds, batch=st.integers(2, 5))
def test_surprisal_of_a_batch_equals_that_of_its_rows(seed, batch):
    states, targets, readout = predicted(seed, batch, 6)
    mask = read(seed, batch, 6)[1]
    rows = [token_surprisal(*(some[i : i + 1] for some in (states, targets, mask)), readout) for i in range(batch)]

    torch.testing.assert_close(
        token_surprisal(states, targets, mask, readout), torch.cat(rows, 1), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision_are_computed_with_in_single(dtype):
    states, targets, readout = predicted(0, 3, 7)
    mask = all_of(targets)
    found = token_surprisal(states, targets, mask, lambda some: readout(some).to(dtype))

    assert torch.equal(found, token_surprisal(states, targets, mask, lambda some: readout(some).to(dtype).float()))


# ---- texts


def by_hand(tokens):
    """The numbers of one text (3, n) of at least one token, all of which count."""
    count = tokens.shape[1]
    found = [math.log(count), math.sqrt(count)]
    for some, limits in zip(tokens, LIMITS, strict=True):
        found += [some.mean(), some.mean() * math.sqrt(count), some.max()]
        found += [some.pow(2).mean().sqrt(), some.std(unbiased=False)]
        for limit in limits:
            found += [(some > limit).double().mean(), (some > limit).sum()]
    return torch.tensor([float(number) for number in found], dtype=torch.double)


@bounded
@given(seed=seeds, batch=st.integers(1, 5), tokens=st.integers(0, 30), share=st.sampled_from([0.1, 0.7, 1.0]))
def test_the_numbers_are_those_of_the_tokens_that_count(seed, batch, tokens, share):
    values, mask = read(seed, batch, tokens, share)
    found = surprisal_statistics(values, mask)

    assert found.shape == (batch, SURPRISAL_STATISTICS)
    assert found.dtype == torch.float32
    for b in range(batch):
        if mask[b].any():
            torch.testing.assert_close(
                found[b].double(), by_hand(values[:, b, mask[b]].double()), atol=5e-3, rtol=1e-4
            )
        else:
            assert not found[b].any()


@bounded
@given(seed=seeds, batch=st.integers(2, 5), tokens=st.integers(1, 12), more=st.integers(0, 5))
def test_padding_and_the_other_rows_do_not_matter(seed, batch, tokens, more):
    values, mask = read(seed, batch, tokens)
    found = surprisal_statistics(values, mask)
    longer = torch.cat([mask, torch.zeros(batch, more, dtype=torch.bool)], 1)
    padded = torch.cat([values, torch.zeros(3, batch, more)], 2).where(longer, torch.nan)

    torch.testing.assert_close(surprisal_statistics(padded, longer), found, atol=1e-5, rtol=1e-5)
    shifted = surprisal_statistics(padded.roll(more, 2), longer.roll(more, 1))
    torch.testing.assert_close(shifted, found, atol=1e-5, rtol=1e-5)
    rows = [surprisal_statistics(values[:, i : i + 1], mask[i : i + 1]) for i in range(batch)]
    torch.testing.assert_close(torch.cat(rows), found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_text_without_tokens_has_numbers_0(tokens):
    found = surprisal_statistics(read(0, 2, tokens)[0], torch.zeros(2, tokens, dtype=torch.bool))
    assert torch.equal(found, torch.zeros(2, SURPRISAL_STATISTICS))


@pytest.mark.parametrize("value", [0.0, 3.0, 100.0])
def test_one_token_has_finite_numbers(value):
    found = surprisal_statistics(torch.tensor([[[value]], [[value]], [[0.0]]]), torch.tensor([[True]]))

    assert found.isfinite().all()
    assert found[0, 2] == value  # the mean


def test_as_surprising_tokens_in_a_longer_text_are_surer_evidence():
    """Of which the mean alone says nothing."""
    one = [surprisal_statistics(torch.full((3, 1, n), 9.0), torch.ones(1, n) > 0) for n in (4, 64)]

    assert one[0][0, 2] == one[1][0, 2] == 9
    torch.testing.assert_close(one[1][0, 3], 4 * one[0][0, 3])
