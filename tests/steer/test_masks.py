"""The bias in the masks that transformers builds: by absolute position, of one model, in every thread by itself."""

import threading

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache, T5Config
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, create_sliding_window_causal_mask

from modeling_dms._compat import CACHE
from modeling_dms.steer.masks import Steering, check_applied, steered


LOWEST = torch.finfo(torch.float32).min
BIAS = torch.tensor([[0.5, -0.5, 0.25, 1.0, -1.0, 2.0]])


def language(implementation="sdpa", **fields):
    """Configuration of a tiny language model."""
    config_class = MistralConfig if fields else LlamaConfig
    config = config_class(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, **fields)
    config._attn_implementation = implementation
    return config


def causal_mask(config, length, mask=None, cache=None, dtype=torch.float32, make=create_causal_mask):
    return make(
        config=config, inputs_embeds=torch.empty(1, length, 0, dtype=dtype), attention_mask=mask, **{CACHE: cache}
    )


def filled(cache, length):
    cache.update(torch.zeros(1, 2, length, 4), torch.zeros(1, 2, length, 4), 0)
    return cache


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "sdpa_paged", "my_kernel"])
def test_kernels_without_a_bias_are_refused(implementation):
    with pytest.raises(ValueError, match=rf"{implementation}.*sdpa.*eager.*flex_attention"):
        steered(Steering([language(implementation)], BIAS))
    steered(None)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_prompt_attends_with_the_bias(implementation, padding):
    config = language(implementation)
    mask = None if padding == 0 else torch.tensor([[0, 0, 1, 1, 1, 1]])
    with steered(Steering([config], BIAS)) as steering:
        found = causal_mask(config, 6, mask)
    keep = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].clone()
    keep[..., :padding] = False
    expected = BIAS[:, None, None].masked_fill(~keep, LOWEST)
    assert torch.equal(found[:, :, padding:], expected[:, :, padding:])
    assert steering.masks == 1


def test_other_models_and_later_masks_are_left_alone():
    config, other = language(), language()
    plain = causal_mask(config, 6)
    with steered(Steering([config], BIAS)):
        assert causal_mask(other, 6) is plain is None
        assert causal_mask(config, 6) is not None
    assert causal_mask(config, 6) is None


def test_decoding_reuses_the_bias_and_the_new_key_is_neutral():
    config = language()
    with steered(Steering([config], BIAS)):
        for mask in (None, torch.ones(1, 7, dtype=torch.long)):
            row = causal_mask(config, 1, mask, filled(DynamicCache(config=config), 6))[0, 0, 0]
            assert torch.equal(row, torch.cat([BIAS[0], torch.zeros(1)]))


def test_decoding_with_a_static_cache_masks_its_empty_places():
    config = language()
    cache = filled(StaticCache(config=config, max_cache_len=10), 6)
    with steered(Steering([config], BIAS)):
        row = causal_mask(config, 1, torch.ones(1, 7, dtype=torch.long), cache)[0, 0, 0]
    assert torch.equal(row[:7], torch.cat([BIAS[0], torch.zeros(1)]))
    assert (row[7:] == LOWEST).all()


def test_a_sliding_cache_that_dropped_keys_keeps_the_bias_in_place():
    config = language(sliding_window=4)
    cache = filled(DynamicCache(config=config), 6)
    with steered(Steering([config], BIAS)):
        mask = causal_mask(config, 1, torch.ones(1, 7), cache, make=create_sliding_window_causal_mask)
    assert torch.equal(mask[0, 0, 0], torch.cat([BIAS[0, 3:], torch.zeros(1)]))


def test_flex_attention_gets_a_finite_bias_beside_its_own_mask():
    config, bias = language("flex_attention"), BIAS.clone()
    bias[0, 1] = -torch.inf
    with steered(Steering([config], bias)) as steering:
        mask = causal_mask(config, 6, dtype=torch.float16)
    assert steering.masks == 1
    assert mask.of_keys.dtype == torch.float16
    assert mask.of_keys[0, 1].float().exp() == 0
    assert torch.equal(mask.of_keys[0, [0, 2, 3, 4, 5]].float(), BIAS[0, [0, 2, 3, 4, 5]])


def test_of_an_encoder_decoder_only_what_it_was_given_is_weighed():
    config = T5Config(d_model=8, num_heads=2, is_decoder=True)
    config._attn_implementation = "eager"
    states = torch.empty(1, 6, 0)
    with steered(Steering([config], BIAS, causal=False)):
        own = causal_mask(config, 3)
        cross = create_bidirectional_mask(
            config=config, inputs_embeds=states[:, :3], attention_mask=None, encoder_hidden_states=states
        )
    assert set(own.unique().tolist()) == {0.0, LOWEST}
    assert torch.equal(cross, BIAS[:, None, None].expand(1, 1, 3, 6))


def test_beams_share_the_bias_of_their_prompt():
    config, bias = language(), torch.cat([BIAS, -BIAS])
    with steered(Steering([config], bias)):
        mask = create_causal_mask(
            config=config, inputs_embeds=torch.empty(6, 6, 0), attention_mask=None, **{CACHE: None}
        )
    assert torch.equal(mask[:, 0, -1], bias.repeat_interleave(3, 0))


def test_every_thread_has_a_bias_of_its_own():
    config, found, barrier = language(), {}, threading.Barrier(2)

    def run(name, bias):
        with steered(Steering([config], bias)):
            barrier.wait()
            found[name] = causal_mask(config, 6)[0, 0, -1]
            barrier.wait()

    threads = [threading.Thread(target=run, args=args) for args in (("one", BIAS), ("other", 2 * BIAS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found["one"], BIAS[0])
    assert torch.equal(found["other"], 2 * BIAS[0])


def test_weights_that_no_mask_took_are_an_error():
    config = language()
    with steered(Steering([config], BIAS)) as steering:
        causal_mask(config, 6, torch.zeros(1, 1, 6, 6))  # a mask of the caller's own
    with pytest.raises(ValueError, match=r"could not be applied.*4D"):
        check_applied(steering)
    check_applied(None)
