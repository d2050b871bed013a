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
    """Answers to pairs, and which of them are those to the pair as it was, "cat": those that belong together are surer
    of both than of either alone; else the text misleads both."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        low, high = (-torch.rand(3, generator=generator)).tolist(), (-2 - torch.rand(3, generator=generator)).tolist()
        other = "cat" if together else "dog"
        rows.append(compared(Heard("cat", high), Heard(other, low), Heard(other, low if together else high)))
    return torch.stack(rows), torch.tensor([[1.0, float(together), float(together)]]).repeat(count, 1)


def test_it_learns_from_mismatches_that_were_made():
    seen = [drawn(100, 0, True), drawn(60, 1, False)]
    arbiter = fit_arbiter(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
    matched, mismatched = drawn(200, 2, True)[0], drawn(200, 3, False)[0]
    trust = arbiter.trust(torch.cat([matched, mismatched]))
    assert trust.shape == (400, 3)
    assert ((trust >= 0) & (trust <= 1)).all()
    assert (trust[:200, BOTH] > 0.5).float().mean() > 0.9
    assert (trust[200:, BOTH] < 0.5).float().mean() > 0.9
    # with a wrong text the answer to the image alone is believed
    assert (arbiter.decide(mismatched) == IMAGE_ALONE).float().mean() > 0.9
    assert (trust[200:, TEXT_ALONE] < 0.5).float().mean() > 0.9
    assert torch.equal(arbiter.decide(matched), trust[:200].argmax(1))
