"""Methods: what each is by its formula, against plain loops without cache, padding or batch."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from modeling_dms.training.evaluate import methods
from modeling_dms.training.evaluate.methods import Fixed, Method, Scheduled, scheduled_by
from modeling_dms.training.evaluate.published import AdaptVis, ContrastiveDecoding
from modeling_dms.weigh.scheduler import ModalityScheduler
from tests import tiny
from tests.training.evaluate.prompts import (
    CONTINUATIONS,
    assert_close,
    plain_log_likelihood,
    prompt_of,
    rows_of,
    steered,
    whole,
)


ALL = (Method(), Fixed(vision=0.1), Scheduled(), ContrastiveDecoding(), AdaptVis(low=0.4, high=1.7, threshold=0.5))
# in an encoder-decoder no token of the prompt decides the answer, and so AdaptVis refuses it
EVERY = pytest.mark.parametrize(
    ("backbone", "method"),
    [(b, method) for b in tiny.FAMILIES for method in ALL if b != "blip2-t5" or not isinstance(method, AdaptVis)],
    ids=lambda value: getattr(value, "name", value),
)
WITH_IMAGES = pytest.mark.parametrize("backbone", ["llava-llama", "internvl-qwen3", "blip2-opt"])


def names(method):
    return method.name


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# ---- likelihoods


@pytest.mark.parametrize("rows", [64, 8])
@pytest.mark.parametrize("backbone", tiny.FAMILIES)
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


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
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


@EVERY
def test_one_token_counts_the_same_alone_and_among_longer_ones(backbone, method):
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


@EVERY
def test_a_batch_equals_its_rows(backbone, method):
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


@EVERY
def test_generation_takes_the_likeliest_token_of_each_step(backbone, method):
    model, rows, steps = steered(backbone), rows_of(prompt_of(backbone))[:2], range(3)
    if backbone == "blip2-t5":  # whose decoder reads every continuation from its beginning
        rows, steps = rows[:1], steps[-1:]
    for row in rows:
        decision = method.decide(model, row)
        tokens = method.generate(model, row, decision, max_new_tokens=3, eos_token_id=-1)[0].tolist()
        vocabulary = range(model.config.get_text_config().vocab_size)
        for step in steps:
            every = [[*tokens[:step], token] for token in vocabulary]
            assert method.log_likelihood(model, row, decision, every)[0].argmax() == tokens[step]


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
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


@pytest.mark.parametrize("backbone", [*tiny.FAMILIES, "retrieval"])
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


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
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


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
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


@pytest.mark.parametrize("backbone", [*tiny.FAMILIES, "retrieval"])
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
