"""The output layer that the unimodal views are read with: whole, or on some tokens alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from modeling_dms.dms import read_out
from tests import tiny


sizes = st.integers(1, 5)


@settings(max_examples=50, deadline=None)
@given(passes=sizes, batch=sizes, modalities=sizes, size=sizes, vocabulary=sizes, with_bias=st.booleans())
def test_some_tokens_are_read_as_the_whole_is(passes, batch, modalities, size, vocabulary, with_bias):
    weight = torch.randn(vocabulary, size)
    bias = torch.randn(vocabulary) if with_bias else None
    states = torch.randn(passes, batch, modalities, size)
    tokens = torch.randint(vocabulary, (batch, modalities, 3))
    whole = read_out(states, weight, bias)
    torch.testing.assert_close(whole, F.linear(states, weight, bias))
    some = read_out(states, weight, bias, tokens)
    torch.testing.assert_close(some, whole.gather(-1, tokens.expand(passes, -1, -1, -1)))


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_a_wrapped_output_layer_reads_the_same(backbone):
    model = tiny.build(backbone)
    states, tokens = torch.randn(4, 3, 2, model._token_size), torch.randint(20, (3, 2, 5))
    plain = [model._readout(states), model._readout(states, tokens)]

    class Wrapped(nn.Linear):
        """Stands for a quantised layer: a subclass whose weight must not be read."""

    model.get_output_embeddings().__class__ = Wrapped
    torch.testing.assert_close([model._readout(states), model._readout(states, tokens)], plain)


def uncertainty(backbone, **choices):
    torch.manual_seed(0)
    model = tiny.build(backbone, **choices)
    nn.init.normal_(model.get_output_embeddings().weight)
    with torch.no_grad():
        return model(**tiny.prompts(backbone)).modality_signals.uncertainty


@pytest.mark.parametrize("measure", ["mutual_information", "variance"])
def test_all_tokens_are_the_whole_vocabulary(measure):
    vocabulary = tiny.build("llava-llama").config.text_config.vocab_size
    exact = uncertainty("llava-llama", mc_tokens=vocabulary, uncertainty=measure)
    torch.testing.assert_close(uncertainty("llava-llama", mc_tokens=10**6, uncertainty=measure), exact)
    few = uncertainty("llava-llama", mc_tokens=2, uncertainty=measure)
    assert few.isfinite().all()
    assert not torch.allclose(few, exact)
