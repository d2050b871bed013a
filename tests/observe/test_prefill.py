"""The observed prefill: it is the answer where nothing is suspicious, texts are read alone where they are, and prompts
once more where their weights are not uniform."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from transformers import StaticCache

from modeling_dms.auto import CLASSES
from modeling_dms.weigh.second_look import BOTH, IMAGE_ALONE, TEXT_ALONE
from tests import families, tiny


# whose masks are made before the language model is called: their weights are made in advance
MASKED_OUTSIDE = ("gemma3", "paligemma")
FAMILIES = tuple(CLASSES)
ALONE = [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]


def known(model, image=False, text=False, suspicious=False):
    """As if all clean samples that calibration remembers had the same score; flagged is what exceeds it, which all
    rows do or none."""
    calibration = model.dms.calibration
    for detector, flagged in zip(calibration.detectors, (image, text, suspicious or text), strict=True):
        detector.count.fill_(len(detector.clean))
        detector.clean.fill_(-0.5 if flagged else 1.0)
    return model


@contextlib.contextmanager
def readings(model):
    """How many rows and positions the language model is given in each call."""
    found = []
    handle = model._text_stack().register_forward_pre_hook(
        lambda module, args, kwargs: found.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    try:
        yield found
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def models():
    """Models by family, not to be changed but by `known`."""
    made = {}

    def get(family, **how):
        if family not in made:
            made[family] = families.build(family)
        return known(made[family], **how)

    return get


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_where_nothing_is_suspicious_the_prefill_is_the_answer(family, models):
    model, batch = models(family), families.inputs(family)
    with readings(model) as found:
        outputs = model(**batch)
    vanilla = families.vanilla(family)
    vanilla.load_state_dict({n: v for n, v in model.state_dict().items() if not n.startswith("dms.")})
    assert torch.equal(outputs.logits, vanilla(**batch).logits)
    assert (outputs.modality_weights == 0.5).all()
    if family not in MASKED_OUTSIDE:
        assert found == [tuple(batch["input_ids"].shape)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_flagged_image_steers_the_pass_and_what_is_generated(family, models):
    model, batch = models(family, image=True), families.inputs(family)
    with readings(model) as found:
        outputs = model(**batch)
    weights = outputs.modality_weights
    assert (weights[:, 0] < 0.5).all()
    assert torch.equal(outputs.logits, model(**batch, modality_weights=weights).logits)
    if family not in MASKED_OUTSIDE:
        assert found == [tuple(batch["input_ids"].shape)] * 2
    asked = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    for how in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        by_itself = model.generate(**batch, **asked, **how)
        given = model.generate(**batch, modality_weights=weights, **asked, **how)
        assert torch.equal(by_itself.sequences, given.sequences), how
        assert torch.equal(by_itself.modality_weights, weights), how
        assert torch.equal(by_itself.modality_signals.p_clean, outputs.modality_signals.p_clean)


@pytest.mark.parametrize("backbone", ["llava-llama", "blip2-opt"])
@torch.no_grad()
def test_only_suspicious_texts_are_read_alone(backbone):
    model = tiny.build(backbone, false_alarm_rate=0.05)
    model.calibrate(tiny.clean_samples(), level=2, show_progress=False)
    batch = tiny.clean_samples(count=24, size=24, seed=3)[0]
    batch["input_ids"][:6, -6:] = 60 + torch.arange(6)  # words that clean texts never hold
    with readings(model) as found:
        outputs = model(**batch)
    assert found[0] == found[2] == tuple(batch["input_ids"].shape)
    assert 6 <= found[1][0] <= 12
    assert (outputs.modality_weights[:6, 1] < 0.5).sum() >= 5
    weights, signals = model.get_modality_weights(**batch)
    assert torch.equal(weights, outputs.modality_weights)
    assert torch.equal(signals.p_clean, outputs.modality_signals.p_clean)
    # alone, all of them are
    with torch.enable_grad():
        p_clean = model(**batch).modality_signals.p_clean
    assert torch.equal(p_clean[:6], signals.p_clean[:6])


@torch.no_grad()
def test_a_pass_that_is_not_the_whole_prompt_has_its_weights_in_advance():
    """Chunks of the prompt, and a prompt to which candidates have been added."""
    model = known(tiny.build("llava-llama"), image=True)
    batch = tiny.row(tiny.prompts("llava-llama"), 0)
    asked = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(**batch, **asked)
    assert not torch.equal(plain, known(model).generate(**batch, **asked))
    known(model, image=True)
    assert torch.equal(model.generate(**batch, **asked, prompt_lookup_num_tokens=2), plain)
    assert torch.equal(model.generate(**batch, **asked, use_cache=False), plain)
    weights = model(**batch).modality_weights
    for how in ({"prefill_chunk_size": 4}, {"guidance_scale": 1.5}, {"do_sample": True, "num_return_sequences": 3}):
        drawn = []
        for given in ({}, {"modality_weights": weights}):
            torch.manual_seed(0)
            drawn.append(model.generate(**batch, **{**asked, **how}, **given))
        assert torch.equal(*drawn), how


@torch.no_grad()
def test_offloaded_parts_are_brought_in_for_the_second_reading():
    model, batch = known(tiny.build("llava-llama"), image=True), tiny.prompts("llava-llama")
    wanted = model(**batch)
    found = cpu_offload(known(tiny.build("llava-llama"), image=True))(**batch)
    assert torch.equal(found.modality_weights, wanted.modality_weights)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_cache_holds_the_second_reading_alone():
    model, batch = known(tiny.build("llava-llama"), image=True), tiny.prompts("llava-llama")
    wanted = model(**batch)
    for cache in (wanted.past_key_values, StaticCache(config=model.config.get_text_config(), max_cache_len=40)):
        if isinstance(cache, StaticCache):
            assert torch.allclose(model(**batch, past_key_values=cache).logits, wanted.logits, atol=1e-5)
        assert int(cache.get_seq_length()) == batch["input_ids"].shape[1]


@pytest.mark.parametrize("compiled", ["whole", "layer"])
@torch.no_grad()
def test_a_compiled_language_model_is_steered_all_the_same(compiled):
    torch._dynamo.reset()
    model, batch = known(tiny.build("llava-llama"), image=True), tiny.prompts("llava-llama")
    wanted = model(**batch)
    stack = model._text_stack()
    (stack if compiled == "whole" else stack.layers[0]).compile(backend="eager")
    found = model(**batch)
    torch.testing.assert_close(found.modality_weights, wanted.modality_weights)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_threads_observe_their_own_prompts():
    model = tiny.calibrated("llava-llama")
    clean, damaged = tiny.clean_samples(count=4, size=4, seed=3)[0], tiny.noisy(tiny.clean_samples(4, 4, 3)[0])
    batches = [clean, damaged] * 8
    wanted = [model(**batch) for batch in batches[:2]] * 8
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(lambda batch: model(**batch), batches), wanted, strict=True):
            assert torch.equal(found.modality_weights, expected.modality_weights)
            assert torch.equal(found.logits, expected.logits)


@torch.no_grad()
def test_a_pass_that_fails_leaves_nothing_behind():
    model, batch = known(tiny.build("llava-llama"), image=True), tiny.prompts("llava-llama")
    wanted = model(**batch)
    handle = (
        model._text_stack().layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("gone")))
    )
    with pytest.raises(KeyError, match="gone"):
        model(**batch)
    handle.remove()
    assert torch.equal(model(**batch).logits, wanted.logits)


# ---- a second look


def trusting(model, believed):
    """As if the third level of calibration had found that one of the three answers can always be relied on."""
    trust = model.dms.calibration.reliability
    trust.count.fill_(1)
    trust.look_coefficients.zero_()[:, -1] = torch.tensor([float(answer == believed) for answer in range(3)])
    model.config.dms_config.conflict_prior = model.dms.scheduler.config.conflict_prior = "learned"
    return model


@pytest.mark.parametrize("family", MASKED_OUTSIDE)
@torch.no_grad()
def test_weights_that_are_made_in_advance_are_those_of_the_rule_alone(family):
    """Whichever answer could be relied on: there is no second look."""
    batch, found = families.inputs(family), []
    for believed in (None, IMAGE_ALONE, TEXT_ALONE, BOTH):
        model = known(families.build(family), image=True)
        found.append((model if believed is None else trusting(model, believed))(**batch).modality_weights)
    assert (found[0][:, 0] < 0.5).all()
    for weights in found[1:]:
        assert torch.equal(weights, found[0])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MASKED_OUTSIDE])
@torch.no_grad()
def test_a_second_look_takes_the_answer_that_can_be_relied_on_most(family):
    batch = families.inputs(family)
    asked = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    for believed, weights in {IMAGE_ALONE: [1.0, 0.0], TEXT_ALONE: [0.0, 1.0], BOTH: [0.5, 0.5]}.items():
        model = trusting(known(families.build(family), image=True), believed)
        with readings(model) as found:
            outputs = model(**batch)
        # of both, of each alone, and of what is believed
        assert found == [tuple(batch["input_ids"].shape)] * 4
        given = torch.tensor([weights] * 2)
        places = model._answer_places(batch["input_ids"], batch["attention_mask"])
        said = [model(**batch, modality_weights=torch.tensor([w] * 2)).logits for w in ALONE]
        alone = [logits[torch.arange(2), places].argmax(-1) for logits in said]
        agree = torch.stack([one == alone[0] for one in alone]).all(0)
        given[agree] = 0.5
        assert torch.equal(outputs.modality_weights, given)
        assert torch.equal(outputs.logits, model(**batch, modality_weights=given).logits)
        expected = torch.where(agree & (believed != BOTH), 0.5, torch.tensor(1.0).sigmoid())
        torch.testing.assert_close(outputs.reliability, expected)
        by_itself, wanted = model.generate(**batch, **asked), model.generate(**batch, modality_weights=given, **asked)
        assert torch.equal(by_itself.sequences, wanted.sequences)
        torch.testing.assert_close(by_itself.reliability, expected)
        assert torch.equal(model.get_modality_weights(**batch)[0], given)


@torch.no_grad()
def test_no_second_look_is_taken_at_what_is_fine_or_has_one_modality():
    model = trusting(known(tiny.build("llava-llama")), IMAGE_ALONE)
    batch = tiny.prompts("llava-llama")
    with readings(model) as found:
        assert (model(**batch).modality_weights == 0.5).all()
    assert len(found) == 1
    alone = {name: value for name, value in batch.items() if name != "pixel_values"}
    alone["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == tiny.IMAGE, 20)
    with readings(known(model, text=True)) as found:
        assert (model(**alone).modality_weights == torch.tensor([0.0, 1.0])).all()
    assert len(found) <= 2  # the text read alone
