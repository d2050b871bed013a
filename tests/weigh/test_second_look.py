"""The second look: numbers of any answers, no labels, and decisions that follow them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_dms.weigh.second_look import BOTH, COMPARED, IMAGE_ALONE, TEXT_ALONE, Heard, compared, fit_arbiter


answers = st.builds(Heard, st.text(max_size=12), st.lists(st.floats(-50, 0, allow_nan=False), max_size=6).map(tuple))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(image=answers, text=answers, both=answers)
def test_any_answers_give_finite_numbers(image, text, both):
    numbers = compared(image, text, both)
    assert numbers.shape == (COMPARED,)
    assert numbers.isfinite().all()


def test_case_punctuation_and_articles_are_no_disagreement():
    sure = [-0.1, -0.2]
    one = compared(Heard("A red circle.", sure), Heard("the Red circle", sure), Heard("red circle", sure))
    other = compared(*[Heard("red circle", sure)] * 3)
    assert torch.equal(one, other)
    assert one[15:22].tolist() == [1] * 7
    apart = compared(Heard("red circle", sure), Heard("blue circle", sure), Heard("blue circle", sure))
    assert apart[15:19].tolist() == [0, 1, 0, 0]
    assert apart[19:22].tolist() == pytest.approx([1 / 3, 1, 1 / 3])


def drawn(count, seed, together):
    """Answers to pairs: those that belong together agree more, and are surer of both than of either alone."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        low, high = (-torch.rand(3, generator=generator)).tolist(), (-2 - torch.rand(3, generator=generator)).tolist()
        agree = bool(torch.rand((), generator=generator) < (0.8 if together else 0.2))
        both = Heard("cat", low if together else high)
        rows.append(compared(Heard("cat" if agree else "dog", high), Heard("cat", low), both))
    return torch.stack(rows)


def test_it_learns_from_mismatches_that_were_made():
    arbiter = fit_arbiter(drawn(100, 0, True), drawn(60, 1, False))
    matched, mismatched = drawn(200, 2, True), drawn(200, 3, False)
    assert (arbiter.together(matched) > 0.5).float().mean() > 0.9
    assert (arbiter.together(mismatched) < 0.5).float().mean() > 0.9
    for side in (IMAGE_ALONE, TEXT_ALONE):
        decided = arbiter.decide(torch.cat([matched, mismatched]), side)
        assert set(decided.tolist()) == {BOTH, side}
        assert torch.equal(decided == BOTH, arbiter.together(torch.cat([matched, mismatched])) > 0.5)


def test_how_many_of_each_there_are_does_not_lean_it():
    matched, mismatched = drawn(100, 0, True), drawn(100, 1, False)
    once, often = fit_arbiter(matched, mismatched), fit_arbiter(matched, mismatched.repeat(5, 1))
    numbers = torch.cat([drawn(50, 2, True), drawn(50, 3, False)])
    assert ((once.together(numbers) > 0.5) == (often.together(numbers) > 0.5)).float().mean() > 0.95
