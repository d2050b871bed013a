"""Methods: what each is by its formula, against plain loops without cache, padding or batch."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama import modeling_llama
from transformers.models.opt import modeling_opt

from modeling_dms.training.evaluate import methods
from modeling_dms.training.evaluate.methods import (
    GRIDS,
    AdaptVis,
    ContrastiveDecoding,
    Fixed,
    Method,
    Scheduled,
    scaled_image_attention,
    scheduled_by,
    search,
)
from modeling_dms.weigh.scheduler import ModalityScheduler
from tests import tiny


CONTINUATIONS = [[7, 8, 9], [11], [7, 12], [13, 14, 15, 16]]
ALL = (Method(), Fixed(vision=0.1), Scheduled(), ContrastiveDecoding(), AdaptVis(low=0.4, high=1.7, threshold=0.5))
WITH_IMAGES = pytest.mark.parametrize("backbone", ["llava-llama", "internvl-qwen3", "blip2-opt"])


def names(method):
    return method.name


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def assert_close(actual, expected, tolerance=1e-5):
    """Equal up to rounding, measured against the largest value."""
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def prompt_of(backbone, kind="mixed", padding="left"):
    """A batch as a collator makes it, with rows that lack image or text."""
    inputs = tiny.prompts(backbone, kind, padding)
    inputs.pop("decoder_input_ids", None)
    ids = tiny.shared(backbone).infer_modality_ids(inputs["input_ids"], inputs["attention_mask"])
    return {**inputs, "modality_ids": ids, "sample_ids": [f"sample-{i}" for i in range(len(ids))]}


def row_of(prompt, index):
    """One sample without its padding."""
    tensors = {name: value for name, value in prompt.items() if name != "sample_ids"}
    return {**tiny.row(tensors, index), "sample_ids": [prompt["sample_ids"][index]]}


def rows_of(prompt):
    return [row_of(prompt, index) for index in range(len(prompt["input_ids"]))]


def steered(backbone):
    """A model whose own weights are not uniform."""
    return tiny.shared(backbone, scheduler="learned", stirred=True)


def usable(backbone, method):
    return not (backbone == "blip2-t5" and isinstance(method, AdaptVis))


def whole(model, prompt, tokens, weights):
    """Logits (1, N + 1, K) behind a single prompt and each of the tokens, in one pass without a cache."""
    inputs = {name: value for name, value in prompt.items() if name != "sample_ids"}
    if model.config.get_text_config().is_encoder_decoder:
        return model(**inputs, modality_weights=weights, decoder_input_ids=torch.tensor([[tiny.PAD, *tokens]])).logits
    longer = {"input_ids": tokens, "attention_mask": [1] * len(tokens), "modality_ids": [0] * len(tokens)}
    for name, more in longer.items():
        inputs[name] = torch.cat([inputs[name], torch.tensor([more], dtype=torch.long)], 1)
    return model(**inputs, modality_weights=weights).logits[:, -len(tokens) - 1 :]


def plain_log_likelihood(logits, tokens):
    return sum(line.log_softmax(-1)[token] for line, token in zip(logits[0], tokens, strict=False))


# ---- likelihoods


@pytest.mark.parametrize("rows", [64, 8])
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_log_likelihood_is_that_of_a_plain_loop(backbone, rows, monkeypatch):
    monkeypatch.setattr(methods, "ROWS", rows)
    model, prompt = steered(backbone), prompt_of(backbone)
    for method in (Method(), Fixed(vision=0.1), Scheduled()):
        decision = method.decide(model, prompt)
        found = method.log_likelihood(model, prompt, decision, CONTINUATIONS)
        expected = [
            [plain_log_likelihood(whole(model, row, tokens, weights), tokens) for tokens in CONTINUATIONS]
            for row, weights in zip(rows_of(prompt), decision.split(1), strict=True)
        ]
        assert_close(found, torch.tensor(expected))
        single = zip(rows_of(prompt), decision.split(1), strict=True)
        first = [whole(model, row, [], weights)[0, -1] for row, weights in single]
        assert_close(method.logits(model, prompt, decision), torch.stack(first))


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_log_likelihood_is_minus_the_loss_of_labels(backbone):
    model = tiny.shared(backbone, scheduler="uniform")
    for row in rows_of(prompt_of(backbone)):
        for tokens in CONTINUATIONS:
            found = Method().log_likelihood(model, row, Method().decide(model, row), [tokens])
            if backbone == "blip2-t5":
                given, labels = row, torch.tensor([tokens])
            else:
                given = {**row, "input_ids": torch.cat([row["input_ids"], torch.tensor([tokens])], 1)}
                given["attention_mask"] = torch.ones_like(given["input_ids"])
                given["modality_ids"] = F.pad(row["modality_ids"], (0, len(tokens)))
                labels = F.pad(torch.tensor([tokens]), (row["input_ids"].shape[1], 0), value=-100)
            given = {name: value for name, value in given.items() if name != "sample_ids"}
            loss = model(**given, labels=labels).loss
            assert_close(found[0, 0], -loss * len(tokens))


@pytest.mark.parametrize("method", ALL, ids=names)
@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_one_token_counts_the_same_alone_and_among_longer_ones(backbone, method):
    if not usable(backbone, method):
        return
    model, prompt = steered(backbone), prompt_of(backbone)
    decision = method.decide(model, prompt)
    log_p = method.logits(model, prompt, decision).log_softmax(-1)
    alone = method.log_likelihood(model, prompt, decision, [[11], [13]])
    assert torch.equal(alone, log_p[:, [11, 13]])
    among = method.log_likelihood(model, prompt, decision, [[11, 5, 6], [11], [13, 4]])
    assert_close(among[:, 1], alone[:, 0])


def test_continuations_without_tokens():
    model, prompt = tiny.shared("llava-llama"), prompt_of("llava-llama")
    for continuations in ([], [[5], []]):
        with pytest.raises(ValueError, match="at least one token"):
            Method().log_likelihood(model, prompt, Method().decide(model, prompt), continuations)


# ---- what holds for every method


@pytest.mark.parametrize("method", ALL, ids=names)
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_a_batch_equals_its_rows(backbone, method):
    if not usable(backbone, method):
        return
    model, prompt = steered(backbone), prompt_of(backbone)
    decision = method.decide(model, prompt)
    logits = method.logits(model, prompt, decision)
    likelihoods = method.log_likelihood(model, prompt, decision, CONTINUATIONS)
    tokens = method.generate(model, prompt, decision, max_new_tokens=4, eos_token_id=-1)
    assert tokens.shape == (len(decision), 4)
    for index, row in enumerate(rows_of(prompt)):
        alone = method.decide(model, row)
        assert_close(alone, decision[index : index + 1])
        assert_close(method.logits(model, row, alone)[0], logits[index], 2e-5)
        assert_close(method.log_likelihood(model, row, alone, CONTINUATIONS)[0], likelihoods[index], 2e-5)
        assert torch.equal(method.generate(model, row, alone, max_new_tokens=4, eos_token_id=-1)[0], tokens[index])


@pytest.mark.parametrize("method", ALL, ids=names)
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_generation_takes_the_likeliest_token_of_each_step(backbone, method):
    if not usable(backbone, method):
        return
    model = steered(backbone)
    for row in rows_of(prompt_of(backbone))[:2]:
        decision = method.decide(model, row)
        tokens = method.generate(model, row, decision, max_new_tokens=3, eos_token_id=-1)[0].tolist()
        vocabulary = range(model.config.get_text_config().vocab_size)
        for step in range(3):
            every = [[*tokens[:step], token] for token in vocabulary]
            assert method.log_likelihood(model, row, decision, every)[0].argmax() == tokens[step]


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_generation_gives_new_tokens_alone_and_pads_what_ended(backbone):
    model, prompt = tiny.shared(backbone), prompt_of(backbone)
    decision = Method().decide(model, prompt)
    free = Method().generate(model, prompt, decision, max_new_tokens=4, eos_token_id=-1)
    end = int(free[0, 1])
    assert (free[1:, :2] != end).any(), "another row must go on for this test to say anything"
    for method in (Method(), ContrastiveDecoding(alpha=0.0)):
        tokens = method.generate(model, prompt, decision, max_new_tokens=4, eos_token_id=end, pad_token_id=tiny.PAD)
        for line, expected in zip(tokens.tolist(), free.tolist(), strict=True):
            kept = expected[: expected.index(end) + 1] if end in expected else expected
            assert line == [*kept, *[tiny.PAD] * (4 - len(kept))]


@pytest.mark.parametrize("method", ALL, ids=names)
@WITH_IMAGES
def test_images_encoded_beforehand(backbone, method):
    model, prompt = steered(backbone), prompt_of(backbone)
    encoded = model.get_image_features(
        pixel_values=prompt["pixel_values"], output_hidden_states=True, return_dict=True
    )
    given = {**prompt, "mm_encoder_outputs": {"image": encoded}}
    decision = method.decide(model, given)
    assert_close(decision, method.decide(model, prompt))
    assert_close(method.logits(model, given, decision), method.logits(model, prompt, decision))
    tokens = method.generate(model, given, decision, max_new_tokens=2)
    assert torch.equal(tokens, method.generate(model, prompt, decision, max_new_tokens=2))


@pytest.mark.parametrize("method", ALL, ids=names)
@WITH_IMAGES
def test_batches_without_any_image(backbone, method):
    model = steered(backbone)
    inputs = tiny.batch([(7,), (3,)], "left")
    ids = model.infer_modality_ids(inputs["input_ids"], inputs["attention_mask"])
    prompt = {**inputs, "modality_ids": ids, "sample_ids": ["a", "b"]}
    decision, static = method.decide(model, prompt), Method().decide(model, prompt)
    expected = Method().log_likelihood(model, prompt, static, [[5], [6], [7]])
    found = method.log_likelihood(model, prompt, decision, [[5], [6], [7]])
    assert torch.equal(found.argsort(1), expected.argsort(1))
    tokens = method.generate(model, prompt, decision, max_new_tokens=3)
    assert torch.equal(tokens, Method().generate(model, prompt, static, max_new_tokens=3))


@pytest.mark.parametrize("method", [Method(), ContrastiveDecoding(), AdaptVis()], ids=names)
def test_models_without_a_language_model(method):
    model = tiny.shared("retrieval")
    prompt = {**tiny.prompts("retrieval"), "sample_ids": ["a", "b", "c"]}
    prompt["modality_ids"] = (prompt["input_ids"] == tiny.IMAGE).long()
    with pytest.raises(ValueError, match="no language model"):
        method.logits(model, prompt, method.decide(model, prompt))


# ---- weights


@pytest.mark.parametrize("backbone", [*tiny.BACKBONES, "retrieval"])
def test_static_and_fixed_weights(backbone):
    model = tiny.shared(backbone)
    prompt = tiny.prompts(backbone) if backbone == "retrieval" else prompt_of(backbone)
    static = Method().decide(model, prompt)
    assert torch.equal(static, torch.full((len(prompt["input_ids"]), 2), 0.5))
    assert torch.equal(Fixed(vision=0.5).decide(model, prompt), static)
    assert_close(Fixed(vision=0.1).decide(model, prompt)[-1], torch.tensor([0.1, 0.9]))
    assert Method().weights(static) is static
    assert ContrastiveDecoding().weights(static) is None
    assert AdaptVis().weights(static[:, :1]) is None


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_static_is_the_vanilla_class(backbone):
    prompt = prompt_of(backbone)
    inputs = {name: prompt[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    decoder = {}
    if backbone == "blip2-t5":
        decoder["decoder_input_ids"] = torch.full((len(prompt["input_ids"]), 1), tiny.PAD)
    expected = tiny.vanilla(backbone)(**inputs, **decoder).logits[:, -1]
    for scheduler in ("uniform", "rule", "entropy"):
        model = tiny.shared(backbone, scheduler=scheduler)
        assert_close(Method().logits(model, prompt, Method().decide(model, prompt)), expected)


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_fixed_weights_leave_samples_of_one_modality_alone(backbone):
    model, prompt = tiny.shared(backbone), prompt_of(backbone)
    even, uneven = Method(), Fixed(vision=0.1)
    ids = prompt["modality_ids"]
    both = ((ids == 1).any(1) & (ids == 2).any(1)).tolist()
    assert True in both
    assert False in both
    one = even.log_likelihood(model, prompt, even.decide(model, prompt), CONTINUATIONS)
    other = uneven.log_likelihood(model, prompt, uneven.decide(model, prompt), CONTINUATIONS)
    tokens = [m.generate(model, prompt, m.decide(model, prompt), max_new_tokens=4) for m in (even, uneven)]
    for index, differs in enumerate(both):
        if differs:
            assert (one[index] - other[index]).abs().max() > 1e-3
        else:
            assert_close(one[index], other[index])
            assert torch.equal(tokens[0][index], tokens[1][index])


@pytest.mark.parametrize("backbone", [*tiny.BACKBONES, "retrieval"])
def test_scheduled_by_none_are_the_weights_of_the_forward_pass(backbone):
    for dms in ({"scheduler": "learned", "stirred": True}, {"scheduler": "entropy"}, {"scheduler": "uniform"}):
        model = tiny.shared(backbone, **dms)
        prompt = tiny.prompts(backbone) if backbone == "retrieval" else prompt_of(backbone)
        inputs = {name: value for name, value in prompt.items() if name != "sample_ids"}
        if backbone == "blip2-t5":
            inputs["decoder_input_ids"] = torch.full((len(prompt["input_ids"]), 1), tiny.PAD)
        out = model(**inputs)
        weights, signals = model.get_modality_weights(
            **{name: value for name, value in inputs.items() if name != "decoder_input_ids"}
        )
        assert torch.equal(weights, out.modality_weights)
        assert (signals is None) == (out.modality_signals is None)
        for name in signals or {}:
            assert torch.equal(signals[name], out.modality_signals[name]), name
        assert torch.equal(Scheduled().decide(model, prompt), weights)
        if backbone != "retrieval":
            assert_close(Scheduled().logits(model, prompt, weights), out.logits[:, -1])


@WITH_IMAGES
def test_scheduled_by_another_scheduler(backbone):
    model, prompt = tiny.shared(backbone, scheduler="rule"), prompt_of(backbone)
    other = tiny.shared(backbone, scheduler="entropy")
    expected = Scheduled().decide(other, prompt)
    assert (expected[:1] - 0.5).abs().min() > 1e-4
    assert torch.equal(Scheduled("entropy", other.dms.scheduler).decide(model, prompt), expected)
    assert torch.equal(Scheduled().decide(model, prompt)[:1], torch.full((1, 2), 0.5))
    hot = ModalityScheduler(dataclasses.replace(other.config.dms_config, temperature=100.0), 2)
    assert (Scheduled("entropy", hot).decide(model, prompt)[:1] - 0.5).abs().max() < (expected[:1] - 0.5).abs().max()
    static = tiny.shared(backbone, scheduler="uniform")
    with pytest.raises(ValueError, match="no signals"):
        Scheduled("entropy", other.dms.scheduler).decide(static, prompt)


def test_scheduled_by_restores():
    model, other = tiny.shared("llava-llama"), tiny.shared("llava-llama", scheduler="entropy").dms.scheduler
    own, state = model.dms.scheduler, list(model.state_dict())

    def fail():
        with scheduled_by(model, other):
            assert model.dms.scheduler is other
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert model.dms.scheduler is own
    assert list(model.state_dict()) == state
    with scheduled_by(model, None):
        assert model.dms.scheduler is own


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


def test_noise_depends_on_the_sample_alone():
    prompt = prompt_of("llava-llama")
    method = ContrastiveDecoding()
    noisy = method.distorted(prompt)
    assert torch.equal(method.distorted(prompt), noisy)
    rows = [method.distorted(row) for row in rows_of(prompt)]
    assert [0 if row is None else len(row) for row in rows] == [1, 0, 1, 1, 2]
    assert torch.equal(torch.cat([row for row in rows if row is not None]), noisy)
    noise = noisy - method.distorted({**prompt, "sample_ids": ["x", *prompt["sample_ids"][1:]]})
    assert noise[0].abs().min() > 0
    assert not noise[1:].any()


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
        zero = method.distorted({**prompt, "pixel_values": 0 * ones})
        assert_close(one - zero, ones * math.sqrt(kept))
        assert math.isclose(zero.std(), math.sqrt(1 - kept), rel_tol=0.1)


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


@WITH_IMAGES
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
        assert methods._key_scale.get(None) is None
        AdaptVis().logits(model, prompt, factor)
        AdaptVis().generate(model, prompt, factor, max_new_tokens=2)
        assert language._attn_implementation == attention
        assert torch.equal(Method().logits(model, prompt, Method().decide(model, prompt)), before)
        assert not any(module._forward_hooks for name, module in model.named_modules() if "proj" in name)


def test_an_encoder_decoder_has_no_last_token_to_scale():
    with pytest.raises(ValueError, match="decoder-only"):
        AdaptVis().decide(tiny.shared("blip2-t5"), prompt_of("blip2-t5"))


# ---- search


def test_search_takes_the_first_of_the_best():
    candidates = [Fixed(vision=vision) for vision in (0.5, 0.2, 0.4)]
    for score, best in ((lambda vision: 1.0, 0), (lambda vision: vision < 0.5, 1), (lambda vision: -vision, 1)):
        assert search(candidates, lambda methods, score=score: [score(m.vision) for m in methods]) is candidates[best]


@pytest.mark.parametrize("method", [ContrastiveDecoding(), AdaptVis(), Fixed()], ids=names)
def test_grids_begin_with_the_defaults(method):
    grid = GRIDS[method.name]
    assert dataclasses.replace(method, **grid[0]) == method
    assert len({dataclasses.replace(method, **choice) for choice in grid}) == len(grid)
