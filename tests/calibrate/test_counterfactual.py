"""Calibration's third level: which answers are asked for, and what is made of them."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_dms import DMSConfig, DMSLlavaForConditionalGeneration
from modeling_dms.calibrate import fit
from modeling_dms.calibrate.calibration import Calibration
from modeling_dms.calibrate.counterfactual import LOWERED, NONE, Answers, Copy, swapped_images, swapped_texts
from modeling_dms.calibrate.damage import IMAGE_FAMILIES, TEXT_FAMILIES
from modeling_dms.calibrate.fit_reliability import fit_lowering, fit_reliability
from modeling_dms.observe.images import Images
from modeling_dms.observe.prompt import TEXT
from modeling_dms.training.corruptions import corrupt
from modeling_dms.training.data import PromptCollator, load_easy_vqa
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import load
from modeling_dms.weigh.second_look import BOTH, TEXT_ALONE
from tests import tiny


CONTINUING = ("llava-llama", "blip2-opt", "blip2-t5")


def calibrated(backbone, asked=64, **dms):
    model = tiny.build(backbone, false_alarm_rate=0.05, **dms).eval()
    model.calibrate(tiny.clean_samples(), show_progress=False, max_asked=asked)
    return model


@torch.no_grad()
def told(model, inputs):
    if model.config.is_encoder_decoder:
        inputs = {**inputs, "decoder_input_ids": torch.full_like(inputs["input_ids"][:, :1], tiny.PAD)}
    return model(**inputs)


# ---- pairs that do not belong together


def test_each_row_gets_the_text_of_the_row_before():
    ids = torch.tensor([[5, 1, 2, 3, 9], [5, 6, 7, 0, 9], [8, 8, 0, 0, 9]])
    text = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    found, still = swapped_texts(ids, text)
    assert found.tolist() == [[5, 8, 8, 3, 9], [5, 1, 2, 0, 9], [6, 7, 0, 0, 9]]
    assert still.long().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    _, left = swapped_texts(ids, text & (torch.arange(3) != 1)[:, None])
    assert left.any(1).tolist() == [True, False, True]  # a text never becomes none


def test_images_are_swapped_where_all_rows_have_as_many_tokens():
    pixels, grid = torch.arange(6.0).view(6, 1), torch.tensor([[1, 2, 1]] * 3)
    images = Images(None, torch.zeros(6, 2), torch.tensor([2, 2, 2]), None)
    found = swapped_images({"pixel_values": pixels, "image_grid_thw": grid, "other": 3}, images, 3)
    assert found["pixel_values"].flatten().tolist() == [4, 5, 0, 1, 2, 3]
    assert torch.equal(found["image_grid_thw"], grid)
    assert set(found) == {"pixel_values", "image_grid_thw"}
    uneven = Images(None, torch.zeros(6, 2), torch.tensor([1, 2, 3]), None)
    assert swapped_images({"pixel_values": pixels}, uneven, 3) is None
    assert swapped_images({"pixel_values": pixels}, images, 2) is None
    assert swapped_images({"pixel_values": pixels}, Images(None, None, torch.tensor([2]), None), 1) is None


# ---- what is asked


@pytest.mark.parametrize("backbone", CONTINUING)
def test_clean_samples_agree_with_themselves_and_a_text_alone_does_not_hear_the_image(backbone, monkeypatch):
    model, kept = tiny.build(backbone).eval(), []
    monkeypatch.setattr("modeling_dms.calibrate.fit.fit_reliability", lambda *args: kept.append(args[1]))
    model.calibrate(tiny.clean_samples(), show_progress=False, max_asked=32)
    (answers,) = kept
    sources, families = answers.sources, answers.families
    assert len(sources) == 6 * 32  # clean, three kinds of damage, two of mismatches
    clean = (families == NONE).all(1) & (sources[:, 0] == sources[:, 1])
    assert (answers.agrees[clean, BOTH] == 1).all()
    assert (answers.agrees[clean, 3] == 1).all()
    image = families[:, 1].eq(NONE) & (families[:, 0] != NONE)
    assert torch.equal(answers.agrees[image, TEXT_ALONE], answers.agrees[clean, TEXT_ALONE])
    assert torch.equal(sources[clean], torch.arange(32)[:, None].expand(-1, 2))
    swapped = sources[sources[:, 0] != sources[:, 1]]
    assert set((swapped[:, 0] - swapped[:, 1]).abs().tolist()) == {1, 31}
    assert int(families[:, 0].max()) < len(IMAGE_FAMILIES)
    assert int(families[:, 1].max()) < len(TEXT_FAMILIES)
    assert answers.numbers.isfinite().all()


@pytest.mark.parametrize("ending", ["the same", "another"])
@pytest.mark.parametrize("backbone", CONTINUING)
@torch.no_grad()
def test_answers_to_one_source_alone_are_shared_where_they_are_the_same(backbone, ending):
    model, batch = tiny.build(backbone).eval(), tiny.clean_samples(count=8, size=8)[0]
    ids = model.infer_modality_ids(batch["input_ids"], batch["attention_mask"])
    text = ids == TEXT
    text[:, -1] &= ending == "another"  # the last word is what the answer follows
    clean = model.with_images_encoded({**batch, "modality_ids": ids})
    other_image = model.with_images_encoded({**tiny.noisy(batch), "modality_ids": ids})
    other_text = {"input_ids": torch.where(text, batch["input_ids"].roll(1, 0), batch["input_ids"])}
    content = torch.zeros(8, 2)
    copies = [
        Copy({}, content, content),
        Copy({"mm_encoder_outputs": other_image["mm_encoder_outputs"]}, content, content, (0, NONE)),
        Copy(other_text, content, content, (NONE, 0)),
    ]
    rows = torch.ones(8, dtype=torch.bool)
    shared = model._answers(clean, copies, None, rows, 0)
    for number, copy in enumerate(copies):
        # alone but for the clean copy, which says what is true
        own = model._answers(clean, [copies[0], replace(copy, shifts=(2, 2))], None, rows, 0)
        part = slice(8 * number, 8 * number + 8)
        torch.testing.assert_close(shared.numbers[part], own.numbers[8:], rtol=0, atol=1e-4)
        assert torch.equal(shared.agrees[part], own.agrees[8:])


def test_answers_within_the_prompts_are_not_read():
    """Batches of training hold them, right-padded: what follows the question is as good as absent."""
    model = tiny.build("llava-llama").eval()
    inputs = tiny.clean_samples(count=4, size=4)[0]
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    weights = torch.full((4, 2), 0.5)
    with torch.no_grad():
        encoded = model.with_images_encoded(inputs)
        wanted = model._first_tokens(encoded, None, weights)
        longer = {**encoded}
        longer["input_ids"] = torch.cat([encoded["input_ids"], torch.full((4, 2), 7)], 1)
        longer["attention_mask"] = torch.cat([encoded["attention_mask"], torch.ones(4, 2, dtype=torch.long)], 1)
        labels = longer["input_ids"].masked_fill(torch.arange(longer["input_ids"].shape[1]) < 0, 0).clone()
        labels[:, :-2] = -100
        found = model._first_tokens(longer, labels, weights)
        padded = {**longer, "attention_mask": longer["attention_mask"].clone()}
        padded["attention_mask"][:, -2:] = 0
        torch.testing.assert_close(model._first_tokens(padded, None, weights), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


# ---- what is made of it


@pytest.mark.parametrize("backbone", CONTINUING)
@torch.no_grad()
def test_outputs_say_how_far_they_can_be_relied_on(backbone):
    model = calibrated(backbone)
    batch = tiny.clean_samples(count=8, size=8, seed=3)[0]
    out = told(model, batch)
    assert out.reliability.shape == (8,)
    assert (out.reliability >= 0).all()
    assert (out.reliability <= 1).all()
    assert out.reliability.std() > 0
    generated = model.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    torch.testing.assert_close(generated.reliability, out.reliability, rtol=1e-4, atol=1e-5)
    beams = model.generate(**batch, max_new_tokens=3, num_beams=2, do_sample=False, return_dict_in_generate=True)
    torch.testing.assert_close(beams.reliability, out.reliability, rtol=1e-4, atol=1e-5)
    for place in range(2):
        one = told(model, tiny.row(batch, place))
        torch.testing.assert_close(one.reliability[0], out.reliability[place], rtol=1e-3, atol=1e-4)
    # without a calibration of the third level, and where the prompt holds the answer, nothing is known
    assert told(tiny.build(backbone).eval(), batch).reliability is None
    assert model(**batch, labels=batch["input_ids"]).reliability is None
    assert told(model, {**batch, "modality_weights": torch.full((8, 2), 0.5)}).reliability is None
    threshold = model.abstention_threshold(0.5)
    assert 0 <= threshold <= model.abstention_threshold(0.1)


def test_it_travels_with_the_checkpoint(tmp_path):
    model = calibrated("llava-llama")
    for part in (model.dms.calibration.reliability.spared, model.dms.calibration.reliability.dropped):
        part.zero_()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    batch = tiny.clean_samples(count=8, size=8, seed=3)[0]
    assert torch.equal(told(loaded, batch).reliability, told(model, batch).reliability)
    assert loaded.abstention_threshold(0.3) == model.abstention_threshold(0.3)
    state = load_file(tmp_path / "model.safetensors")
    del state["dms.calibration.reliability.coefficients"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights.*reliability\.coefficients"):
        type(model).from_pretrained(tmp_path)


def test_a_loaded_checkpoint_that_is_calibrated_again_forgets_what_it_knew(tmp_path):
    calibrated("llava-llama").save_pretrained(tmp_path)
    loaded = DMSLlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = tiny.clean_samples(count=8, size=8, seed=3)[0]
    assert told(loaded, batch).reliability is not None
    loaded.calibrate(tiny.clean_samples(), level=1, show_progress=False)
    new = tiny.build("llava-llama", false_alarm_rate=0.05)
    new.calibrate(tiny.clean_samples(), level=1, show_progress=False)
    for name, value in new.dms.calibration.state_dict().items():
        assert torch.equal(loaded.dms.calibration.state_dict()[name], value), name
    assert told(loaded, batch).reliability is None


def test_without_an_alarm_a_second_look_is_none_in_the_promise_either(monkeypatch):
    monkeypatch.setattr(
        fit, "fit_reliability", lambda known, said, p, fold: fit_reliability(known, said, p * 0 + 1, fold)
    )
    kept = calibrated("llava-llama", conflict_prior="learned").dms.calibration.reliability
    rows = kept.kept[: int(kept.count)]
    assert len(rows) > 50
    assert torch.equal(rows[:, 2:4], rows[:, :2])


def test_batches_of_one_and_too_few_answers(as_many_are_asked):
    """In a batch of one there is no other sample to take an image or a text from; of few answers nothing is fitted."""
    model = tiny.build("llava-llama", false_alarm_rate=0.05)
    # those that are not asked, in a batch of their own
    batches = [*tiny.clean_samples(count=30, size=1), *tiny.clean_samples(count=24, seed=1)]
    report = model.calibrate(batches, show_progress=False, max_asked=30)
    assert set(report.reliability) == {"first token's probability", "one look", "second look"}
    kept = model.dms.calibration.reliability
    assert int(kept.count) == 4 * 30  # clean, image, text and both damaged
    assert all(value.isfinite().all() for value in kept.state_dict().values())
    batches = [*tiny.clean_samples(count=3, size=1), *tiny.clean_samples(count=48, size=48, seed=1)]
    report = model.calibrate(batches, show_progress=False, max_asked=3)
    assert report.reliability == {}
    assert model.dms.calibration.is_calibrated
    assert not kept.count


# ---- whether to lower what looks damaged


def fitted_lowering(better, worse, modality=0):
    """`spared` after answers to copies of which one modality is damaged and flagged; the other one alone answered some
    better than both, and some worse."""
    calibration = Calibration(DMSConfig(), [(1, 2)] * 2, [(3, 1, False)] * 2, [2, 2])
    count = better + worse + 20
    families = torch.full((count, 2), NONE)
    families[:, modality] = 0
    agrees = torch.zeros(count, 4)
    agrees[:better, 1 - modality] = 1
    agrees[better : better + worse, BOTH] = 1
    agrees[better + worse :, [1 - modality, BOTH]] = 1
    p = torch.ones(count, 3)
    p[:, modality] = 1e-6
    sources, content = torch.arange(count)[:, None].expand(-1, 2), torch.zeros(count, 2)
    answers = Answers(sources, families, torch.zeros(count, 12), agrees, torch.ones(count, 2), content, content)
    told = fit_lowering(calibration, answers, p)[modality]
    assert told == (pytest.approx((better + 20) / count), pytest.approx((worse + 20) / count))
    spared = calibration.reliability.spared.tolist()
    # what is not flagged, or not alone, says nothing
    quiet = p.clone()
    quiet[:, modality] = 1
    for other in (quiet, torch.full_like(p, 1e-6)):
        assert all(math.isnan(share) for pair in fit_lowering(calibration, answers, other) for share in pair)
        assert calibration.reliability.spared.tolist() == calibration.reliability.dropped.tolist() == [0, 0]
    return spared


@pytest.mark.parametrize("modality", [0, 1])
def test_what_looks_damaged_is_lowered_unless_the_other_cannot_stand_in(modality):
    spared = [float(modality == 0), float(modality == 1)]
    assert fitted_lowering(0, 5, modality) == spared
    assert fitted_lowering(0, 4, modality) == [0, 0]  # one in sixteen coins does
    assert fitted_lowering(5, 14, modality) == spared
    assert fitted_lowering(14, 5, modality) == [0, 0]
    assert fitted_lowering(0, 0, modality) == [0, 0]


@pytest.mark.parametrize("modality", [0, 1])
def test_damage_takes_all_weight_unless_a_little_of_it_answers_better(modality):
    """Of copies of which one modality is damaged and flagged."""
    for better, worse in ((3, 1), (1, 3), (2, 2)):
        calibration = Calibration(DMSConfig(), [(1, 2)] * 2, [(3, 1, False)] * 2, [2, 2])
        families = torch.full((20, 2), NONE)
        families[:, modality] = 0
        agrees = torch.ones(20, 4)
        agrees[:better, LOWERED] = 0
        agrees[better : better + worse, 1 - modality] = 0
        p = torch.ones(20, 3)
        p[:, modality] = 1e-6
        sources, content = torch.arange(20)[:, None].expand(-1, 2), torch.zeros(20, 2)
        answers = Answers(sources, families, torch.zeros(20, 12), agrees, torch.ones(20, 2), content, content)
        fit_lowering(calibration, answers, p)
        expected = [float(better >= worse and index == modality) for index in range(2)]
        assert calibration.reliability.dropped.tolist() == expected


def test_a_question_cannot_stand_in_for_an_image(capsys):
    """Plain questions: the image is all that answers them, and keeps its weight however damaged it looks."""
    model, processor = load("demo-llava")
    samples = [sample.replace(context=None) for sample in one_per_image(load_easy_vqa("train"), 64)]
    report = calibrate(model.eval(), PromptCollator(processor), samples, 64, show_progress=False)
    assert "no sample has a context" in capsys.readouterr().out
    alone, both = report.lowering["vision"]
    assert alone < both
    assert "vision" in report.spared
    assert "vision: what is flagged keeps its weight all the same" in str(report)
    batch = PromptCollator(processor)([corrupt(sample, "image:noise", 5) for sample in samples[:8]])
    del batch["modality_ids"]
    out = model(**batch)
    flagged = out.modality_signals.p_clean[:, 0] <= model.config.dms_config.alarm_rate
    assert flagged.any()
    assert torch.equal(out.modality_weights, torch.full((8, 2), 0.5))
    assert torch.equal(out.logits, model(**batch, modality_weights=torch.full((8, 2), 0.5)).logits)
    model.dms.calibration.reliability.spared.zero_()
    assert (model(**batch).modality_weights[flagged, 0] < 0.5).all()


def test_the_same_data_give_the_same_reliability():
    first, second = calibrated("llava-llama"), calibrated("llava-llama")
    assert first.dms.calibration.reliability.count > 0
    for name, value in first.dms.calibration.reliability.state_dict().items():
        assert torch.equal(second.dms.calibration.reliability.state_dict()[name], value), name


def test_lower_levels_and_classes_that_do_not_answer_know_nothing_of_it():
    model = tiny.build("llava-llama")
    model.calibrate(tiny.clean_samples(), level=2, show_progress=False)
    assert model.dms.calibration.is_calibrated
    assert not model.dms.calibration.reliability.count
    with pytest.raises(ValueError, match="level 3"):
        model.abstention_threshold(0.1)
    # one that was fitted before is gone: it was fitted to another calibration
    model.calibrate(tiny.clean_samples(), show_progress=False)
    assert model.dms.calibration.reliability.count > 0
    model.calibrate(tiny.clean_samples(), level=2, show_progress=False)
    assert not model.dms.calibration.reliability.count
    retrieval = tiny.build("retrieval")
    retrieval.calibrate([tiny.image_first(batch) for batch in tiny.clean_samples()], show_progress=False)
    assert retrieval.dms.calibration.is_calibrated
    assert not retrieval.dms.calibration.reliability.count


@pytest.mark.parametrize("prior", [None, "vision"])  # which weighs what the matching head says
def test_retrieval_without_an_image_token_is_calibrated_alike(prior):
    named, unnamed = (tiny.build("retrieval", conflict_prior=prior) for _ in range(2))
    # published checkpoints have no language model, but the configuration of one, with a larger vocabulary
    named.config.text_config.vocab_size = 5000
    named.config.image_token_index, unnamed.config.image_token_index = 1000, None
    batches = [tiny.image_first(batch) for batch in tiny.clean_samples()]
    for batch in batches:
        batch["input_ids"][batch["input_ids"] == tiny.IMAGE] = 1000
    texts = {"input_ids", "attention_mask"}
    alone = [{k: v[:, tiny.IMAGE_TOKENS :] if k in texts else v for k, v in batch.items()} for batch in batches]
    reports = [named.calibrate(batches, show_progress=False), unnamed.calibrate(alone, show_progress=False)]
    assert str(reports[0]) == str(reports[1])
    for (name, value), other in zip(named.dms.state_dict().items(), unnamed.dms.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True, msg=name)
    found = [model(**own[0], use_image_text_matching_head=True) for model, own in ((named, batches), (unnamed, alone))]
    assert torch.equal(found[0].modality_weights, found[1].modality_weights)
