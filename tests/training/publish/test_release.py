"""Adapters of a lower rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_dms.training.publish.release import of_rank


def adapter(rank, rows=40, columns=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.lora_A.weight": torch.randn(rank, columns, generator=generator),
        "a.lora_B.weight": torch.randn(rows, rank, generator=generator),
        "b.weight": torch.randn(3, generator=generator),
    }


def product(state):
    return state["a.lora_B.weight"] @ state["a.lora_A.weight"]


@given(st.integers(2, 6), st.data(), st.floats(0.1, 4))
def test_a_lower_rank_keeps_the_first_singular_vectors(rank, data, scale):
    lower = data.draw(st.integers(1, rank - 1))
    before = adapter(rank)
    after = of_rank(before, scale, lower)
    assert after.keys() == before.keys()
    assert after["a.lora_A.weight"].shape == (lower, 24)
    assert torch.equal(after["b.weight"], before["b.weight"])
    u, size, vh = torch.linalg.svd(scale * product(before), full_matrices=False)
    expected = u[:, :lower] * size[:lower] @ vh[:lower]
    torch.testing.assert_close(product(after), expected, rtol=0, atol=1e-4 * float(size[0]))


@pytest.mark.parametrize("rank", [0, 4, 5])
def test_a_rank_that_is_not_lower_is_refused(rank):
    with pytest.raises(ValueError, match="from 1 to 3"):
        of_rank(adapter(4), 1.0, rank)
