"""`calibrate`: what it promises of weights before and after, what it leaves alone, what it refuses.

The data are those of `tiny.clean_samples`: structured, so that damage can be told from them, also by random weights.
"""

import copy
import math

import pytest
import torch

from modeling_dms import DMSConfig
from modeling_dms.calibrate import fit
from modeling_dms.calibrate.fit import ModalityRecord, fit_calibration
from modeling_dms.calibrate.statistics import REMEMBERED, Calibration
from modeling_dms.evidence import typicality
from tests import tiny


RATE = 0.05
ALL = (*tiny.BACKBONES, "retrieval")


def samples(backbone, **kwargs):
    batches = tiny.clean_samples(**kwargs)
    return [tiny.image_first(batch) for batch in batches] if backbone == "retrieval" else batches


@torch.no_grad()
def answer(model, inputs):
    if model.config.is_encoder_decoder:
        inputs = {**inputs, "decoder_input_ids": torch.full((len(inputs["input_ids"]), 1), tiny.PAD)}
    return model(**inputs)


def calibrate(backbone, **dms):
    model = tiny.build(backbone, false_alarm_rate=RATE, **dms)
    return model, model.calibrate(samples(backbone), show_progress=False)


@pytest.fixture(scope="module")
def calibrated():
    """Calibrated models with their reports, by backbone; not to be changed."""
    made = {}

    def get(backbone):
        if backbone not in made:
            made[backbone] = calibrate(backbone)
        return made[backbone]

    return get


def fresh(backbone, count=128, **kwargs):
    """One batch of clean samples that calibration has not seen."""
    return samples(backbone, count=count, size=count, seed=5, **kwargs)[0]


def random_words(inputs, seed=3):
    """Every word of the text replaced by one that clean texts never hold."""
    ids = inputs["input_ids"]
    drawn = torch.randint(50, 90, ids.shape, generator=torch.Generator().manual_seed(seed))
    return {**inputs, "input_ids": torch.where((ids >= 10) & (ids != tiny.IMAGE), drawn, ids)}


# ---- weights before and after


@pytest.mark.parametrize("backbone", ALL)
def test_before_calibration_nothing_is_suspicious(backbone):
    model = tiny.shared(backbone)
    assert not model.dms.calibration.is_calibrated
    for inputs in (fresh(backbone), tiny.noisy(fresh(backbone)), random_words(fresh(backbone))):
        out = answer(model, inputs)
        assert torch.equal(out.modality_weights, torch.full((128, 2), 0.5))
        assert not out.modality_signals.typicality.any()
        assert out.modality_signals.damage.isneginf().all()
        assert out.modality_signals.conflict.isneginf().all()


@pytest.mark.parametrize("backbone", ALL)
def test_clean_samples_stay_uniform(backbone, calibrated):
    model, report = calibrated(backbone)
    assert model.dms.calibration.is_calibrated
    inputs = fresh(backbone)
    out = answer(model, inputs)
    uniform = (out.modality_weights == 0.5).all(1)
    assert uniform.float().mean() >= 0.75
    flagged = (out.modality_signals.damage > 0).float().mean(0)
    assert (flagged <= RATE + 0.15).all()
    assert all(abs(rate - RATE) <= 0.05 for rate in report.achieved_false_alarm_rate.values())

    # what is not flagged is answered bit for bit by the backbone
    kept = {name: value[uniform] for name, value in inputs.items()}
    out, vanilla = answer(model, kept), answer(tiny.vanilla(backbone), kept)
    field = "logits_per_image" if backbone == "retrieval" else "logits"
    assert torch.equal(out[field], vanilla[field])


@pytest.mark.parametrize("backbone", ALL)
def test_damaged_modalities_lose_weight(backbone, calibrated):
    model, report = calibrated(backbone)
    clean = answer(model, fresh(backbone)).modality_weights
    noisy = answer(model, tiny.noisy(fresh(backbone)))
    assert noisy.modality_weights[:, 0].mean() < clean[:, 0].mean() - 0.2
    assert (noisy.modality_weights[:, 0] < 0.5).float().mean() > 0.9
    assert (noisy.modality_signals.damage[:, 0] > 0).float().mean() > 0.9
    garbled = answer(model, random_words(fresh(backbone)))
    assert garbled.modality_weights[:, 1].mean() < clean[:, 1].mean() - 0.1
    for weights in (clean, noisy.modality_weights, garbled.modality_weights):
        torch.testing.assert_close(weights.sum(1), torch.ones(128))
        assert weights.min() >= model.config.dms_config.weight_floor - 1e-6
    blank = {**fresh(backbone), "pixel_values": torch.zeros(128, 3, 8, 8)}
    assert answer(model, blank).modality_weights[:, 0].mean() < clean[:, 0].mean() - 0.1
    assert report.families["vision"]["noise"] > 0.8


def test_the_rule_of_a_batch_equals_its_rows(calibrated):
    for backbone in ("llava-llama", "blip2-opt"):
        model, _ = calibrated(backbone)
        inputs = tiny.noisy(fresh(backbone, count=12, missing=True), strength=0.5)
        out = answer(model, inputs)
        for index in range(12):
            alone = answer(model, tiny.row(inputs, index))
            torch.testing.assert_close(out.modality_weights[index], alone.modality_weights[0], rtol=0, atol=1e-4)


def test_an_image_twice_is_as_typical_as_once(calibrated):
    model, _ = calibrated("llava-llama")
    once = tiny.batch([("i", 6), ("i", 6)])
    twice = tiny.batch([("i", "i", 6), ("i", "i", 6)])
    for strength in (0.05, 0.5):
        pixels = torch.cat([batch["pixel_values"] for batch in tiny.clean_samples(count=2, seed=5)])
        pixels = tiny.noisy({"pixel_values": pixels}, strength)["pixel_values"]
        single = answer(model, {**once, "pixel_values": pixels}).modality_signals
        double = answer(model, {**twice, "pixel_values": pixels.repeat_interleave(2, 0)}).modality_signals
        for name in ("typicality", "damage", "confidence", "uncertainty"):
            torch.testing.assert_close(double[name][:, 0], single[name][:, 0], rtol=1e-3, atol=1e-4, msg=name)
    assert single.typicality[:, 0].any()


@pytest.mark.parametrize("prior", ["vision", "text"])
def test_conflict_prior_decides_between_clean_modalities(prior, calibrated):
    model, report = calibrate("blip2-opt", conflict_prior=prior)
    assert report.mismatch_auroc > 0.6
    inputs = fresh("blip2-opt")
    # each image with the text of a sample whose text names another pattern
    mismatched = {**inputs, "pixel_values": inputs["pixel_values"].roll(1, 0)}
    different = inputs["input_ids"][:, 5] != inputs["input_ids"][:, 5].roll(1, 0)
    believed = ["vision", "text"].index(prior)
    matched, swapped = (answer(model, given).modality_weights[different, believed] for given in (inputs, mismatched))
    assert swapped.mean() > matched.mean()
    plain = answer(calibrated("blip2-opt")[0], mismatched).modality_weights
    assert swapped.mean() > plain[different, believed].mean()


@pytest.mark.parametrize("backbone", ["llava-llama", "blip2-t5"])
def test_level_1(backbone):
    model = tiny.build(backbone, false_alarm_rate=RATE)
    report = model.calibrate(samples(backbone), level=1, show_progress=False)
    assert model.dms.calibration.is_calibrated
    for modality in model.dms.calibration.modalities:
        assert float(modality.level) == 1
        assert not modality.coefficients.any()
    clean, noisy = answer(model, fresh(backbone)), answer(model, tiny.noisy(fresh(backbone)))
    assert (clean.modality_weights == 0.5).all(1).float().mean() >= 0.75
    assert (noisy.modality_weights[:, 0] < 0.5).float().mean() > 0.9
    assert (noisy.modality_signals.typicality[:, 0] > 0).float().mean() > 0.9
    assert "vision" in str(report)


def test_other_schedulers_see_what_was_calibrated():
    model, _ = calibrate("llava-llama", scheduler="learned", stirred=True)
    before = tiny.build("llava-llama", scheduler="learned", stirred=True, false_alarm_rate=RATE)
    inputs = tiny.noisy(fresh("llava-llama", count=8))
    assert not torch.allclose(answer(model, inputs).modality_weights, answer(before, inputs).modality_weights)


# ---- missing modalities


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_missing_modalities_mixed_in(backbone):
    model = tiny.build(backbone, false_alarm_rate=RATE)
    batches = tiny.clean_samples(count=120, missing=True)
    report = model.calibrate(batches, show_progress=False)
    assert report.samples == {"vision": 80, "text": 80}
    inputs = fresh(backbone, count=30, missing=True)
    out = answer(model, inputs)
    is_image, is_word = inputs["input_ids"] == tiny.IMAGE, inputs["input_ids"] >= 10
    present = torch.stack([is_image.any(1), (is_word & ~is_image).any(1)], 1)
    assert torch.equal(out.modality_weights > 0, present)
    assert torch.equal(out.modality_weights[1], torch.tensor([0.0, 1.0]))
    assert torch.equal(out.modality_weights[2], torch.tensor([1.0, 0.0]))
    both = present.all(1)
    assert (out.modality_weights[both] == 0.5).all(1).float().mean() > 0.6
    noisy = answer(model, tiny.noisy(inputs))
    # of a text that is flagged too, at this rate of false alarms, neither is preferred
    readable = both & (noisy.modality_signals.suspicion[:, 1] < 0)
    assert readable.sum() > 0.7 * both.sum()
    assert (noisy.modality_weights[readable, 0] < 0.5).float().mean() > 0.9
    assert torch.equal(noisy.modality_weights[~both], out.modality_weights[~both])


def test_modality_mask_leaves_stand_ins_out():
    """A blank image that is declared missing must not count as clean."""
    batches = tiny.clean_samples(count=120)
    for batch in batches:
        absent = torch.arange(len(batch["input_ids"])) % 4 == 0
        batch["pixel_values"][absent] = 0
        batch["modality_mask"] = torch.stack([~absent, torch.ones_like(absent)], 1)
    model = tiny.build("llava-llama", false_alarm_rate=RATE)
    report = model.calibrate(batches, show_progress=False)
    assert report.samples == {"vision": 90, "text": 120}
    blank = {**fresh("llava-llama"), "pixel_values": torch.zeros(128, 3, 8, 8)}
    assert (answer(model, blank).modality_signals.damage[:, 0] > 0).float().mean() > 0.9


# ---- what it leaves alone, and that it is reproducible


def buffers(model):
    return dict(model.dms.calibration.named_buffers())


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_everything_else_is_untouched():
    model = tiny.build("llava-llama", stirred=True).train()
    model.dms.views[1].eval()
    model.model.vision_tower.requires_grad_(False)
    flags = {name: module.training for name, module in model.named_modules()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    batches = tiny.clean_samples()
    for batch in batches:
        batch["labels"] = batch["input_ids"].masked_fill(torch.arange(batch["input_ids"].shape[1]) < 9, -100)
    copies = [{name: value.clone() for name, value in batch.items()} for batch in batches]
    torch.manual_seed(4)
    state = torch.get_rng_state()
    model.calibrate(batches, show_progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(not buffer.requires_grad for buffer in model.buffers())
    assert_same(dict(model.named_parameters()), parameters)
    for batch, before in zip(batches, copies, strict=True):
        assert_same(batch, before)
    assert torch.is_grad_enabled()


def test_labelled_positions_are_no_text():
    """An answer must not be part of what a clean prompt looks like."""
    batches = tiny.clean_samples()
    labelled = []
    for batch in batches:
        answered = torch.randint(50, 90, (len(batch["input_ids"]), 2), generator=torch.Generator().manual_seed(0))
        ids = torch.cat([batch["input_ids"], answered], 1)
        labels = torch.cat([torch.full_like(batch["input_ids"], -100), answered], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(answered)], 1)
        labelled.append({**batch, "input_ids": ids, "attention_mask": mask, "labels": labels})
    first, second = tiny.build("llava-llama"), tiny.build("llava-llama")
    first.calibrate(batches, show_progress=False)
    second.calibrate(labelled, show_progress=False)
    for name, value in buffers(first).items():
        torch.testing.assert_close(buffers(second)[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("backbone", ["llava-llama", "blip2-t5"])
def test_calibration_is_deterministic(backbone, calibrated):
    model, report = calibrated(backbone)
    torch.manual_seed(123)
    again, again_report = calibrate(backbone)
    assert_same(buffers(again), buffers(model))
    assert str(again_report) == str(report)
    # a second calibration starts anew
    again.calibrate((tiny.noisy(batch) for batch in samples(backbone)), show_progress=False)
    assert not torch.equal(buffers(again)["modalities.0.mean"], buffers(model)["modalities.0.mean"])
    again.calibrate(samples(backbone), show_progress=False)
    assert_same(buffers(again), buffers(model))


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_calibration_is_saved(backbone, calibrated, tmp_path):
    model, _ = calibrated(backbone)
    model.save_pretrained(tmp_path)
    loaded = tiny.realigned(type(model).from_pretrained(tmp_path))
    assert loaded.dms.calibration.is_calibrated
    assert_same(buffers(loaded), buffers(model))
    for inputs in (fresh(backbone), tiny.noisy(fresh(backbone), strength=0.3)):
        expected, out = answer(model, inputs), answer(loaded, inputs)
        assert torch.equal(out.modality_weights, expected.modality_weights)
        for name in ("damage", "suspicion"):
            assert torch.equal(out.modality_signals[name], expected.modality_signals[name]), name


def test_it_streams_and_stops():
    served = []

    def stream():
        for seed in range(9):
            served.append(seed)
            yield tiny.clean_samples(count=32, seed=seed)[0]

    report = tiny.build("llava-llama").calibrate(stream(), max_samples=64, show_progress=False)
    assert report.samples == {"vision": 64, "text": 64}
    assert len(served) == 2


# ---- the images that it remembers


def forgetful(model):
    """The model as if its calibration remembered no image."""
    twin = copy.deepcopy(model)
    twin.dms.calibration.modalities[0].memory_bank.zero_()
    return twin


def inputs_that_disagree(backbone):
    """Clean, damaged and mismatched samples in one batch."""
    clean = fresh(backbone)
    swapped = {**clean, "pixel_values": clean["pixel_values"].roll(1, 0)}
    kinds = (
        clean,
        tiny.noisy(clean, 0.03),
        tiny.noisy(clean, 0.3),
        swapped,
        tiny.noisy(swapped, 0.3),
        random_words(clean),
    )
    return {name: torch.cat([kind[name] for kind in kinds]) for name in clean}


@pytest.mark.parametrize("scheduler", ["uniform", "entropy", "energy"])
def test_other_schedulers_do_not_look_at_them(scheduler):
    model, _ = calibrate("blip2-opt", scheduler=scheduler)
    inputs = inputs_that_disagree("blip2-opt")
    out, other = answer(model, inputs), answer(forgetful(model), inputs)
    assert torch.equal(out.modality_weights, other.modality_weights)
    assert torch.equal(out.logits, other.logits)


@pytest.mark.parametrize("choice", [{}, {"scheduler": "learned"}, {"conflict_prior": "text"}])
def test_they_count_where_the_modalities_disagree(choice):
    model, _ = calibrate("blip2-opt", **choice)
    inputs = inputs_that_disagree("blip2-opt")
    out, other = answer(model, inputs), answer(forgetful(model), inputs)
    signals = out.modality_signals
    changed = (out.modality_weights != other.modality_weights).any(1)
    assert changed.any()
    assert (signals.disagreement[changed] > 0).all()
    assert torch.equal(signals.damage, other.modality_signals.damage)
    # no text is remembered
    assert torch.equal(signals.suspicion[:, 1], other.modality_signals.suspicion[:, 1])
    assert (signals.suspicion >= signals.damage).all()


def test_the_learned_scheduler_sees_unfamiliarity_in_place_of_deviations():
    model, _ = calibrate("llava-llama", scheduler="learned")
    modality = model.dms.calibration.modalities[0]
    statistics = 3 * torch.randn(5, *modality.mean.shape, generator=torch.Generator().manual_seed(0))
    distances, scalars = model.dms.calibration.distances(0, statistics), torch.zeros(5, 3)
    strange = modality.unfamiliarity(model.dms.calibration.shared(0, statistics))
    inputs = modality.scheduler_inputs(distances, scalars, strange)
    before = forgetful(model).dms.calibration.modalities[0].scheduler_inputs(distances, scalars, strange)
    assert inputs.shape == before.shape == (5, modality.scheduler_size)
    assert torch.equal(inputs[:, :2], strange)
    assert not inputs[:, 2 : modality.deviations].any()
    assert torch.equal(inputs[:, modality.deviations :], before[:, modality.deviations :])
    assert torch.equal(before[:, :-3], modality.detector_inputs(distances, scalars)[:, : modality.deviations])


def test_no_calibration_image_is_its_own_neighbour(monkeypatch):
    judged = []

    def watch(shared, fitted):
        bank = fitted["memory_bank"]
        judged.append(torch.cdist(shared, bank[bank.any(1)]).amin(1))
        return typicality.unfamiliarity(shared, fitted)

    monkeypatch.setattr(fit, "unfamiliarity", watch)
    calibration = fitted_on(records(400, 0))
    nearest = torch.cat(judged)
    assert len(nearest) == 400
    assert nearest.min() > 1e-4
    vision, text = calibration.modalities
    assert int(vision.memory_bank.any(1).sum()) == 400
    assert not text.memory_bank.any()
    for name in REMEMBERED:
        assert getattr(vision, name).isfinite().all()


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.4])
def test_suspicious_images_are_as_rare_as_asked_for(rate):
    clean = records(400, 0)
    calibration = fitted_on(clean, arbitration_rate=rate)

    def flagged(record):
        return float((damage_of(calibration, 0, record)[1] > 0).float().mean())

    assert flagged(records(800, 5)[0]) == pytest.approx(rate, abs=0.06)
    # a thing between the strong and the weak ones that are common
    assert flagged(records(400, 6, shared=0.0)[0]) > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_suspicion_of_a_batch_is_finite_and_equals_that_of_its_rows(dtype, calibrated):
    model = copy.deepcopy(calibrated("llava-llama")[0]).to(dtype)
    assert model.dms.calibration.modalities[0].memory_bank.dtype == torch.float32
    inputs = {name: value[::53] for name, value in inputs_that_disagree("llava-llama").items()}
    out = answer(model, inputs).modality_signals.suspicion
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    if dtype == torch.float32:
        rows = [answer(model, tiny.row(inputs, i)).modality_signals.suspicion for i in range(len(out))]
        torch.testing.assert_close(torch.cat(rows), out, atol=1e-3, rtol=1e-3)


# ---- the report


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_report(backbone, calibrated):
    _, report = calibrated(backbone)
    assert report.samples == {"vision": 96, "text": 96}
    assert report.false_alarm_rate == RATE
    for modality in ("vision", "text"):
        assert {"typicality", "confidence", "uncertainty"} <= set(report.signals[modality])
        for row in report.signals[modality].values():
            assert 0 <= row["auroc"] <= 1
            assert math.isfinite(row["coefficient"])
        assert 0 <= report.achieved_false_alarm_rate[modality] <= 0.15
        assert all(0 <= value <= 1 for value in report.families[modality].values())
    assert set(report.families["vision"]) == {"noise", "blank", "blur", "occlusion"}
    assert set(report.families["text"]) == {"word_drop", "random_words", "shuffle"}
    assert report.signals["vision"]["typicality"]["auroc"] > 0.7
    assert report.signals["vision"]["typicality"]["coefficient"] > 0
    assert 0 <= report.mismatch_auroc <= 1
    table = str(report).splitlines()
    assert table[0].split() == ["modality", "signal", "AUROC", "coefficient"]
    assert len(table) > 10
    for modality in ("vision", "text"):
        assert any(line.startswith(modality) and "typicality" in line for line in table)
    assert any("96 clean samples" in line and "0.050" in line for line in table)


def test_an_uninformative_signal_gets_coefficient_0(calibrated):
    found = 0
    for backbone in tiny.BACKBONES:
        for rows in calibrated(backbone)[1].signals.values():
            for name in ("confidence", "uncertainty"):
                if abs(rows[name]["auroc"] - 0.5) < 0.04:
                    assert rows[name]["coefficient"] == 0
                    found += 1
    assert found, "no signal of these models is uninformative: this test tests nothing"


# ---- what it refuses


def refused(model, dataloader, match, **kwargs):
    """`calibrate` raises, and leaves the model as it was."""
    flags, before = [m.training for m in model.modules()], {name: b.clone() for name, b in model.named_buffers()}
    with pytest.raises(ValueError, match=match):
        model.calibrate(dataloader, show_progress=False, **kwargs)
    assert [m.training for m in model.modules()] == flags
    assert_same(dict(model.named_buffers()), before)


def test_too_few_samples():
    model = tiny.build("llava-llama").train()
    refused(model, tiny.clean_samples(count=49), "49 samples with vision.*50")
    few = tiny.clean_samples(count=64)
    few[1]["modality_mask"] = torch.tensor([[True, False]] * 32)
    refused(model, few, "32 samples with text.*50")
    model.calibrate(tiny.clean_samples(count=50), show_progress=False)
    refused(model, tiny.clean_samples(count=49), "49 samples")


def test_no_samples():
    refused(tiny.build("llava-llama"), [], "empty")
    refused(tiny.build("llava-llama"), iter(()), "empty")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backbone", ["llava-llama", "blip2-opt", "retrieval"])
def test_pixels_that_are_not_finite(backbone, value):
    batches = samples(backbone)
    batches[1]["pixel_values"][5, 0, 3, 3] = value
    refused(tiny.build(backbone).train(), batches, r"\[5\].*NaN or Inf")


def test_unknown_level():
    refused(tiny.build("llava-llama"), tiny.clean_samples(), "level must be 1 or 2, got 3", level=3)


def test_images_that_do_not_fit_the_prompts():
    batches = tiny.clean_samples()
    batches[0]["pixel_values"] = batches[0]["pixel_values"][:-1]
    refused(tiny.build("llava-llama"), batches, "image tokens")


def records(count, seed, shared=1.0):
    """Two modalities of 3 layers that share one direction, of which `shared` remains in the first."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    common, basis = normal(count, 1, 2), torch.randn(2, 2, 12, generator=torch.Generator().manual_seed(1))
    # what is shared is strong or weak, never absent
    common = common + 2 * common.sign()
    views = [
        scale * common @ axes + 0.3 * normal(count, 3, 12) for scale, axes in zip((shared, 1.0), basis, strict=True)
    ]
    return [ModalityRecord(view, normal(count, 3), normal(count, 4)) for view in views]


def fitted_on(clean, **config):
    """A calibration on `records`, and copies of them with noise."""
    noisy = [{"noise": ModalityRecord(r.statistics + 3, r.scalars, r.representations)} for r in clean]
    calibration = Calibration(DMSConfig(subspace_size=8, **config), [(3, 12), (3, 12)])
    fit_calibration(calibration, clean, noisy, torch.ones(len(clean[0].scalars), 2, dtype=torch.bool))
    return calibration


def damage_of(calibration, index, record):
    """Damage and suspicion (n,) of a record of modality `index`."""
    modality = calibration.modalities[index]
    strange = modality.unfamiliarity(calibration.shared(index, record.statistics))
    return modality.damage(calibration.distances(index, record.statistics), record.scalars, strange)


def test_a_modality_with_nothing_to_say_is_damaged():
    """As near to the center as can be, and so typical by every other measure."""
    clean = records(400, 0)
    # self-made corruptions that leave nothing empty
    noisy = [{"noise": ModalityRecord(r.statistics + 3, r.scalars, r.representations)} for r in clean]
    calibration = Calibration(DMSConfig(subspace_size=8), [(3, 12), (3, 12)])
    report = fit_calibration(calibration, clean, noisy, torch.ones(400, 2, dtype=torch.bool))
    vision = calibration.modalities[0]

    fresh, empty = records(400, 5)[0], records(400, 6, shared=0.0)[0]
    flagged, suspected = ((values > 0).float().mean() for values in damage_of(calibration, 0, fresh))
    assert flagged <= 0.04
    assert flagged <= suspected <= 0.2
    assert (damage_of(calibration, 0, empty)[0] > 0).float().mean() > 0.9
    assert report.achieved_false_alarm_rate["vision"] <= 0.03
    # without the criterion nobody would have noticed
    criteria = vision.criteria(calibration.distances(0, empty.statistics), empty.scalars)
    assert (criteria[:, 0] > vision.threshold[0]).float().mean() < 0.2


def test_an_empty_modality_is_found_though_the_map_found_nothing():
    clean = records(400, 0)
    same = [{"nothing": record} for record in clean]
    calibration = Calibration(DMSConfig(subspace_size=8), [(3, 12), (3, 12)])
    fit_calibration(calibration, clean, same, torch.ones(400, 2, dtype=torch.bool))
    vision = calibration.modalities[0]
    assert not vision.coefficients.any()
    for record, low, high in ((records(400, 5)[0], 0, 0.04), (records(400, 6, shared=0.0)[0], 0.9, 1)):
        damage, _ = damage_of(calibration, 0, record)
        assert low <= (damage > 0).float().mean() <= high


@pytest.mark.parametrize("count", [100, 400, 2000])
def test_clean_samples_are_clean_beyond_doubt_however_many_were_calibrated_on(count):
    """More samples bring clean log-odds nearer to the threshold; that must not make them doubtful."""
    calibration = fitted_on(records(count, 0))
    vision = calibration.modalities[0]
    for record, low, high in ((records(400, 5)[0], 0.9, 1), (records(400, 6, shared=0.0)[0], 0, 0.1)):
        cleanness = vision.cleanness(damage_of(calibration, 0, record)[1])
        assert ((cleanness >= 0) & (cleanness <= 1)).all()
        assert low <= cleanness.mean() <= high


def test_cleanness_is_how_much_likelier_clean_is_than_damaged():
    modality = fitted_on(records(200, 0)).modalities[0]
    odds = torch.tensor([-9.0, -1.0, -0.1, 0.0, 1.0])
    modality.suspicion_threshold[0] = -4  # of a map that tells damage clearly: what exceeds it is still clean
    expected = ((-odds).sigmoid() - odds.sigmoid()).clamp_min(0)
    torch.testing.assert_close(modality.cleanness(odds + 4), expected.where(odds > -4, 1), atol=1e-3, rtol=0)
    modality.suspicion_threshold[0] = 4  # of one that tells little: what lies below it is clean all the same
    torch.testing.assert_close(modality.cleanness(odds), (-odds).clamp(0, 1))
    modality.level.fill_(1)  # a deviation is no log-odds
    modality.suspicion_threshold[0] = -4
    torch.testing.assert_close(modality.cleanness(odds), (-odds).clamp(0, 1))
    assert modality.cleanness(torch.tensor([-torch.inf])) == 1


def test_without_pairs_nothing_is_empty():
    clean = records(120, 0)
    present = torch.ones(120, 2, dtype=torch.bool)
    present[:60, 0] = present[60:, 1] = False
    noisy = [{"noise": ModalityRecord(r.statistics + 3, r.scalars, r.representations)} for r in clean]
    calibration = Calibration(DMSConfig(subspace_size=8), [(3, 12), (3, 12)])
    fit_calibration(calibration, clean, noisy, present)
    for index, modality in enumerate(calibration.modalities):
        distances = calibration.distances(index, clean[index].statistics)
        assert modality.emptiness(distances).eq(-torch.inf).all()
        for values in damage_of(calibration, index, clean[index]):
            assert values.isfinite().all()
