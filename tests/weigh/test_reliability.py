"""Reliability: its numbers are finite whatever the inputs, a second look compares answers, abstention keeps a risk."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_dms.weigh.reliability import abstention_threshold, reliability_numbers
from modeling_dms.weigh.second_look import FIRST_TOKENS, first_tokens_compared, log_odds, one_answer


bounded = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


def drawn(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@bounded
@given(seed=seeds, words=st.integers(2, 9), sharp=st.sampled_from([0.1, 1.0, 50.0, 1e4]))
def test_any_distributions_give_finite_numbers(seed, words, sharp):
    image, text, both = (sharp * drawn(seed, 3, 4, words)).softmax(-1)
    numbers = first_tokens_compared(image, text, both)
    assert numbers.shape == (4, FIRST_TOKENS)
    assert numbers.isfinite().all()
    same = first_tokens_compared(both, both, both)
    # each is as sure of the others' token as of its own, and they overlap whole
    torch.testing.assert_close(same[:, :9], log_odds(both.amax(-1))[:, None].expand(-1, 9))
    assert (same[:, 9:] == log_odds(torch.ones(()))).all()


def test_what_is_compared_stands_where_it_is_named():
    image, text, both = torch.tensor([[[0.7, 0.2, 0.1]], [[0.1, 0.6, 0.3]], [[0.3, 0.3, 0.4]]])
    numbers = first_tokens_compared(image, text, both)[0].sigmoid()
    expected = [0.7, 0.2, 0.1, 0.1, 0.6, 0.3, 0.3, 0.3, 0.4, 0.1 + 0.2 + 0.1, 0.3 + 0.2 + 0.1, 0.1 + 0.3 + 0.3]
    torch.testing.assert_close(numbers, torch.tensor(expected))


def test_three_answers_are_one_where_they_begin_alike():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1], [0.6, 0.3, 0.1]])
    for three in itertools.product(range(3), repeat=3):
        image, text, both = (p[number : number + 1] for number in three)
        alike = len({int(p[number].argmax()) for number in three}) == 1
        assert bool(one_answer(first_tokens_compared(image, text, both))) == alike, three


def test_how_sure_it_sounds_counts_apart_where_a_source_is_flagged():
    p_values = torch.tensor([[1.0, 0.5, 1e-30], [0.01, 0.5, 1.0], [1.0, 1e-30, 1e-30], [1.0, 1.0, 0.11]])
    numbers = reliability_numbers(torch.tensor([0.5, 0.9, 0.9, 0.9]), p_values, rate=0.01)
    sure = float(log_odds(torch.tensor(0.9)))
    # the odds, image and text flagged, how far the pair is beyond a limit, and the odds under each of these
    torch.testing.assert_close(numbers[0], torch.tensor([0.0, 0, 0, 1, 0, 0, 0]))
    torch.testing.assert_close(numbers[1], torch.tensor([sure, 1, 0, 0, sure, 0, 0]))
    # what is damaged disagrees with anything, and clean pairs do so a little
    torch.testing.assert_close(numbers[2], torch.tensor([sure, 0, 1, 0, 0, sure, 0]))
    torch.testing.assert_close(numbers[3], torch.tensor([sure, 0, 0, 0, 0, 0, 0]))
    several = reliability_numbers(torch.randn(4, FIRST_TOKENS), p_values, rate=0.01)
    assert several.shape == (4, FIRST_TOKENS + 3 + 3 * FIRST_TOKENS)
    assert several.isfinite().all()


@pytest.mark.parametrize("risk", [0.05, 0.1, 0.3])
def test_no_more_than_the_risk_is_answered_wrongly(risk):
    """Over many calibration sets, and close to it, so that no more than needed is left unanswered."""
    count, shares = 200, []
    for seed in range(200):
        reliability = drawn(seed, 2 * count)
        # told less surely than it says
        agrees = (drawn(seed + 1000, 2 * count) < 0.2 + 0.8 * reliability).float()
        threshold = abstention_threshold(reliability[:count], agrees[:count], torch.arange(count), risk)
        given = reliability[count:] >= threshold
        shares.append(float((given & (agrees[count:] == 0)).float().mean()))
    mean = sum(shares) / len(shares)
    assert risk - 3 / count - 0.005 <= mean <= risk + 0.003


def test_copies_of_a_sample_count_as_one():
    """Whose answers are all wrong or all right: as many copies promise no more than one of each would."""
    count, risk, shares = 40, 0.1, []
    for seed in range(400):
        reliability = drawn(seed, 2 * count)
        agrees = (drawn(seed + 1000, 2 * count) < 0.2 + 0.8 * reliability).float()
        first = torch.arange(count)
        once = abstention_threshold(reliability[:count], agrees[:count], first, risk)
        copied = [part[:count].repeat(6) for part in (reliability, agrees, torch.arange(2 * count))]
        assert abstention_threshold(*copied, risk) == pytest.approx(once)
        given = reliability[count:] >= once
        shares.append(float((given & (agrees[count:] == 0)).float().mean()))
    assert sum(shares) / len(shares) <= risk + 0.005


def test_edges_of_abstention():
    reliability = torch.tensor([0.9, 0.8, 0.8, 0.1])
    each = torch.arange(4)
    assert abstention_threshold(reliability, torch.ones(4), each, 0.3) == 0
    # one of four and the new one: too many, whatever is answered
    assert abstention_threshold(reliability, torch.ones(4), each, 0.1) == torch.inf
    # samples of one reliability go together
    assert abstention_threshold(reliability, torch.tensor([1.0, 1, 0, 0]), each, 0.3) == pytest.approx(0.9)
    assert abstention_threshold(reliability, torch.tensor([1.0, 1, 0, 0]), each, 0.4) == pytest.approx(0.8)
    for risk in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="risk must lie between 0 and 1"):
            abstention_threshold(reliability, torch.ones(4), each, risk)
    with pytest.raises(ValueError, match="level 3"):
        abstention_threshold(torch.zeros(0), torch.zeros(0), torch.zeros(0), 0.1)
