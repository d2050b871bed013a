"""Weights of several sources: a majority that agrees outvotes what lies beside it, and a tie changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_dms.weigh.odd_ones import alarm_rates, odd_ones, oddness, source_weights


bounded = settings(max_examples=50, deadline=None, derandomize=True)
RATE = 0.01


def p_value(odds: torch.Tensor) -> torch.Tensor:
    """Odd from 0 on: e^-5 and less."""
    return torch.where(odds > 0, 1e-4, 0.5).where(odds.isfinite(), 1)


def groups_of(*groups: int) -> torch.Tensor:
    """Agreement of one row: 3 within a group of sources, -3 between two."""
    number = torch.tensor(groups)
    return torch.where(number[:, None] == number, 3.0, -3.0)[None]


@pytest.mark.parametrize(
    ("groups", "odd"),
    [
        ((0, 0, 0), []),
        ((0, 0, 1), [2]),
        ((1, 0, 0, 0), [0]),
        ((0, 1, 2, 0, 0), [1, 2]),
        ((0, 1, 1, 0, 0), [1, 2]),
        # as many on either side, nobody agrees, or two against one another
        ((0, 0, 1, 1), []),
        ((0, 1, 2), []),
        ((0, 1), []),
        ((0,), []),
    ],
)
def test_what_lies_beside_a_majority_is_odd(groups, odd):
    agreement = groups_of(*groups)
    p, found = odd_ones(agreement, torch.ones(1, len(groups), dtype=torch.bool), p_value, RATE)
    assert found[0].nonzero()[:, 0].tolist() == odd
    assert ((p <= RATE) >= found).all()


def test_what_is_not_compared_has_no_vote():
    agreement = groups_of(0, 0, 1, 1, 1)
    compared = torch.tensor([[True, True, True, False, False]])
    p, odd = odd_ones(agreement, compared, p_value, RATE)
    assert odd.tolist() == [[False, False, True, False, False]]
    assert (p[~compared] == 1).all()


def test_pairs_of_which_nothing_is_known_do_not_count():
    agreement = groups_of(0, 0, 0)
    agreement[:, 2] = agreement[:, :, 2] = torch.nan
    assert oddness(agreement, torch.ones(1, 3, dtype=torch.bool)).tolist() == [[-3, -3, -torch.inf]]
    _, odd = odd_ones(agreement, torch.ones(1, 3, dtype=torch.bool), p_value, RATE)
    assert not odd.any()


@given(
    st.integers(1, 6).flatmap(
        lambda count: st.tuples(
            st.lists(st.floats(-20, 20), min_size=count * count, max_size=count * count),
            st.lists(st.booleans(), min_size=count, max_size=count),
            st.permutations(range(count)),
        )
    )
)
@bounded
def test_the_order_of_sources_does_not_matter_and_odd_ones_are_fewer(drawn):
    values, compared, order = drawn
    count = len(compared)
    agreement = torch.tensor(values).view(1, count, count)
    # no two sources exactly as odd
    agreement = agreement + agreement.mT + torch.randn(count, count, generator=torch.Generator().manual_seed(count))
    agreement = (agreement + agreement.mT) / 2
    mask = torch.tensor([compared])
    p, odd = odd_ones(agreement, mask, p_value, RATE)
    assert not odd[~mask].any()
    assert 2 * int(odd.sum()) < max(1, int(mask.sum()))
    order = torch.tensor(order)
    p_there, odd_there = odd_ones(agreement[:, order][:, :, order], mask[:, order], p_value, RATE)
    assert torch.equal(odd_there, odd[:, order])
    torch.testing.assert_close(p_there, p[:, order])


@given(st.lists(st.tuples(st.floats(1e-30, 1), st.booleans(), st.booleans()), min_size=1, max_size=40))
@bounded
def test_weights_are_weights(sources):
    p_clean, odd, present = (torch.tensor([list(column)]) for column in zip(*sources, strict=True))
    present[:, 0], odd[:, 0] = True, False
    weights = source_weights(p_clean, odd, present, 0.01, 16.0, 0.01)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert (weights[~present | odd] == 0).all()
    assert (weights[present & ~odd] > 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(1))


def test_nothing_odd_and_nothing_damaged_is_uniform_bit_for_bit():
    present = torch.tensor([[True, True, True], [True, False, True]])
    ones, none = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    weights = source_weights(ones, none, present, 0.01, 16.0, 0.01)
    assert torch.equal(weights, present / present.sum(1, keepdim=True))


def test_damage_may_take_all_weight_of_a_dropped_source():
    present, none = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)
    p_clean, dropped = torch.tensor([[1e-9, 1e-9, 1.0]]), torch.tensor([[True, False, False]])
    weights = source_weights(p_clean, none, present, 0.01, 16.0, 0.01, None, dropped)
    assert weights[0, 0] == 0
    assert weights[0, 1] == pytest.approx(2 * 0.01 / 3, rel=1e-3)


def test_the_rate_of_false_alarms_is_shared():
    present = torch.tensor([[True, True, True, False], [True, True, False, False], [True, False, False, False]])
    of_each, of_odd = alarm_rates(present, 0.03)
    assert float(of_each[0]) * 3 + of_odd == pytest.approx(0.03)
    # as image and text share it
    torch.testing.assert_close(of_each[1:, 0], torch.tensor([0.015, 0.03]))
