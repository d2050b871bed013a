"""Published methods: what each is by its formula."""

import math
import zlib

import pytest
import torch
from transformers.models.llama import modeling_llama
from transformers.models.opt import modeling_opt

from modeling_dms.training.evaluate import published
from modeling_dms.training.evaluate.methods import Method
from modeling_dms.training.evaluate.published import AdaptVis, ContrastiveDecoding, scaled_image_attention
from tests import families, tiny
from tests.training.evaluate.prompts import (
    CONTINUATIONS,
    assert_close,
    plain_log_likelihood,
    prompt_of,
    rows_of,
    whole,
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# ---- visual contrastive decoding


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_contrast_by_alpha_0_ranks_and_generates_as_static(backbone):
    model, prompt = tiny.shared(backbone), prompt_of(backbone)
    decision = Method().decide(model, prompt)
    static = Method().logits(model, prompt, decision).log_softmax(-1)
    for beta in (0.1, 0.5, 1.0):
        method = ContrastiveDecoding(alpha=0.0, beta=beta)
        found = method.logits(model, prompt, decision)
        ordered = found.gather(1, static.argsort(1))
        assert ordered.diff(dim=1).min() > -1e-3, "in the order of the static model, up to rounding"
        generated = method.generate(model, prompt, decision, max_new_tokens=4)
        assert torch.equal(generated, Method().generate(model, prompt, decision, max_new_tokens=4))
    method = ContrastiveDecoding(alpha=0.0, beta=0.0)
    assert_close(method.logits(model, prompt, decision), static)
    expected = Method().log_likelihood(model, prompt, decision, CONTINUATIONS)
    assert_close(method.log_likelihood(model, prompt, decision, CONTINUATIONS), expected)


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_contrast_is_the_published_formula(backbone):
    """Logits of the tokens within `beta` of the likeliest, contrasted; all others impossible."""
    model, prompt = tiny.shared(backbone), prompt_of(backbone, "pairs")
    even = Method().decide(model, prompt)
    clean = Method().logits(model, prompt, even)
    ratios = (clean - clean.amax(1, keepdim=True)).exp()
    method = ContrastiveDecoding(alpha=0.7, beta=float(ratios.quantile(0.9)))
    found = method.logits(model, prompt, even)
    noisy = Method().logits(model, {**prompt, "pixel_values": method.distorted(prompt)}, even)
    assert (clean - noisy).abs().max() > 1e-2
    kept = clean >= clean.amax(1, keepdim=True) + math.log(method.beta)
    assert (kept.sum() / kept.numel() - 0.1).abs() < 0.01
    published = (1.7 * clean - 0.7 * noisy).masked_fill(~kept, -torch.inf).softmax(-1)
    assert_close(found.softmax(-1), published)
    assert found[~kept].max() < found[kept].min()


def test_contrast_of_a_continuation():
    """Each token by the formula, both images seeing what came before."""
    model, prompt = tiny.shared("llava-llama"), prompt_of("llava-llama", "pairs")
    method, tokens = ContrastiveDecoding(beta=0.0), [7, 8, 9]
    for row in rows_of(prompt):
        even = Method().decide(model, row)
        clean = whole(model, row, tokens, even)
        noisy = whole(model, {**row, "pixel_values": method.distorted(row)}, tokens, even)
        expected = plain_log_likelihood(2 * clean - noisy, tokens)
        assert_close(method.log_likelihood(model, row, even, [tokens])[0, 0], expected)


def test_noise_depends_on_the_picture_alone():
    prompt = prompt_of("llava-llama")
    method = ContrastiveDecoding()
    noisy = method.distorted(prompt)
    assert torch.equal(method.distorted(prompt), noisy)
    rows = [method.distorted(row) for row in rows_of(prompt)]
    assert [0 if row is None else len(row) for row in rows] == [1, 0, 1, 1, 2]
    assert torch.equal(torch.cat([row for row in rows if row is not None]), noisy)
    changed = prompt["pixel_values"].clone()
    changed[0, 0, 0, 0] += 1
    difference = noisy - method.distorted({**prompt, "pixel_values": changed})
    assert difference[0].abs().median() > 0.1
    assert not difference[1:].any()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next", "smolvlm"])
def test_noise_of_families_that_cut_pictures_up(family):
    """Patches in one row, tiles of pictures of different size, rows that are filled up."""
    batch = families.inputs(family)
    pixels = torch.ones_like(batch["pixel_values"])  # patches of one color are alike, and their noise is not
    if pixels.ndim == 5:
        pixels[0, -1] = 0  # a tile that fills up
    noise = ContrastiveDecoding().distorted({**batch, "pixel_values": pixels}) - pixels
    assert noise.shape == pixels.shape
    tiles = noise.flatten(0, -4) if noise.ndim == 5 else noise
    filling = (pixels.flatten(0, -4) if noise.ndim == 5 else pixels).flatten(1).amax(1) == 0
    assert not tiles[filling].any()
    assert (tiles[~filling].flatten(1).std(1) > 0.1).all()
    if noise.ndim == 2:
        assert len(noise[:4].unique(dim=0)) == 4


def test_noise_is_the_published_diffusion():
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise, beta_t from 1e-5 to 5e-3 on a sigmoid, t counted from 0."""
    prompt = prompt_of("llava-llama")
    ones = torch.ones_like(prompt["pixel_values"])
    for step in (0, 500, 999):
        kept = 1.0
        for t in range(step + 1):
            x = -6 + 12 * t / 999
            kept *= 1 - (1e-5 + (5e-3 - 1e-5) / (1 + math.exp(-x)))
        method = ContrastiveDecoding(noise_step=step)
        one = method.distorted({**prompt, "pixel_values": ones})
        noise = torch.randn(ones.shape[1:], generator=torch.Generator().manual_seed(zlib.crc32(ones[0].numpy())))
        assert_close(one, (ones * math.sqrt(kept) + noise * math.sqrt(1 - kept)))


# ---- confidence-switched attention


def scaling(own, scale, calls):
    """Eager attention whose scores for the last token of a prompt are scaled, keys by keys."""

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        if not query.shape[2] == key.shape[2] == scale.shape[1]:
            return own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        calls.append(module)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * scaling
        scores[:, :, -1] *= scale[:, None]
        if attention_mask is not None:
            scores = scores + attention_mask
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    return attend


@pytest.mark.parametrize("factor", [0.5, 1.2, 3.0])
@pytest.mark.parametrize(("backbone", "library"), [("llava-llama", modeling_llama), ("blip2-opt", modeling_opt)])
def test_factor_scales_the_scores_of_image_tokens(backbone, library, factor, monkeypatch):
    prompt = prompt_of(backbone)
    scale = torch.where(prompt["modality_ids"] == 1, factor, 1.0)
    calls = []
    eager = tiny.shared(backbone, "eager")
    even = Method().decide(eager, prompt)
    static = Method().logits(eager, prompt, even)
    with monkeypatch.context() as patch:
        patch.setattr(library, "eager_attention_forward", scaling(library.eager_attention_forward, scale, calls))
        expected = Method().logits(eager, prompt, even)
        likelihoods = Method().log_likelihood(eager, prompt, even, CONTINUATIONS)
        tokens = Method().generate(eager, prompt, even, max_new_tokens=4)
    assert len(calls) == 3 * 2, "each of the prompt's passes, in each layer"
    with_images = (scale != 1).any(1)
    assert (expected - static)[with_images].abs().amax(1).min() > 1e-3
    method = AdaptVis(low=factor, high=factor)
    for attention in ("eager", "sdpa"):
        model = tiny.shared(backbone, attention)
        decision = method.decide(model, prompt)
        assert torch.equal(decision, torch.full((len(scale), 1), factor))
        assert_close(method.logits(model, prompt, decision), expected)
        assert_close(method.log_likelihood(model, prompt, decision, CONTINUATIONS), likelihoods)
        assert torch.equal(method.generate(model, prompt, decision, max_new_tokens=4), tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", tiny.DECODER_ONLY)
def test_factor_1_is_static_bit_for_bit(backbone, attention):
    model, prompt = tiny.shared(backbone, attention), prompt_of(backbone)
    method, even = AdaptVis(low=1.0, high=1.0), Method().decide(model, prompt)
    decision = method.decide(model, prompt)
    assert torch.equal(method.logits(model, prompt, decision), Method().logits(model, prompt, even))
    expected = Method().log_likelihood(model, prompt, even, CONTINUATIONS)
    assert torch.equal(method.log_likelihood(model, prompt, decision, CONTINUATIONS), expected)
    tokens = method.generate(model, prompt, decision, max_new_tokens=4)
    assert torch.equal(tokens, Method().generate(model, prompt, even, max_new_tokens=4))
    # beside a row whose factor is another
    decision[0] = 0.3
    expected = Method().logits(tiny.shared(backbone, "sdpa"), prompt, even)
    found = method.logits(tiny.shared(backbone, "sdpa"), prompt, decision)
    assert torch.equal(found[1:], expected[1:])
    if "mistral" not in backbone:  # whose sliding window does not reach back to the image
        assert not torch.equal(found[0], expected[0])


@pytest.mark.parametrize("backbone", ["llava-llama", "internvl-qwen3", "blip2-opt"])
def test_confidence_switches_the_factor(backbone):
    model, prompt = tiny.shared(backbone), prompt_of(backbone)
    confidence = Method().logits(model, prompt, Method().decide(model, prompt)).softmax(-1).amax(-1)
    threshold = float(confidence.sort().values[1:3].mean())
    decision = AdaptVis(threshold=threshold).decide(model, prompt)
    assert decision.shape == (len(confidence), 1)
    assert torch.equal(decision[:, 0] == 0.5, confidence < threshold)
    assert set(decision[:, 0].tolist()) == {0.5, decision.max().item()}
    assert math.isclose(decision.max(), 1.2, rel_tol=1e-6)


def test_attention_is_restored():
    for attention in ("sdpa", "eager"):
        model, prompt = tiny.shared("blip2-opt", attention), prompt_of("blip2-opt")
        language = model.config.get_text_config(decoder=True)
        factor = torch.full((len(prompt["input_ids"]), 1), 0.5)
        before = Method().logits(model, prompt, Method().decide(model, prompt))

        def fail(model=model, prompt=prompt, factor=factor, language=language, attention=attention):
            with scaled_image_attention(model, prompt["modality_ids"], factor):
                assert language._attn_implementation != attention
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert language._attn_implementation == attention
        assert published._key_scale.get(None) is None
        AdaptVis().logits(model, prompt, factor)
        AdaptVis().generate(model, prompt, factor, max_new_tokens=2)
        assert language._attn_implementation == attention
        assert torch.equal(Method().logits(model, prompt, Method().decide(model, prompt)), before)
        assert not any(module._forward_hooks for name, module in model.named_modules() if "proj" in name)


def test_an_encoder_decoder_has_no_last_token_to_scale():
    with pytest.raises(ValueError, match="decoder-only"):
        AdaptVis().decide(tiny.shared("blip2-t5"), prompt_of("blip2-t5"))
