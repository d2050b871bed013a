"""`calibrate`: what it promises of weights before and after, what it leaves alone, what it refuses.

The data are those of `tiny.clean_samples`: structured, so that damage can be told from them, also by random weights.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modeling_dms import DMSConfig
from modeling_dms.calibrate.calibration import Calibration
from modeling_dms.calibrate.conformal import LEAST_P, Conformal
from modeling_dms.calibrate.damage import FAMILIES
from modeling_dms.calibrate.fit import fit_calibration
from modeling_dms.calibrate.records import DamagedRecord, ModalityRecord
from modeling_dms.calibrate.report import SEVERITIES, CalibrationReport, Detection
from modeling_dms.observe.prompt import ModalityFeatures
from modeling_dms.weigh.scheduler import GARBAGE_LEAD
from tests import tiny


bounded = settings(max_examples=25, deadline=None, derandomize=True)
RATE = 0.05
# one of each kind: how the other text models attend, test_identities.py and test_generation.py test
ALL = (*tiny.FAMILIES, "retrieval")


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
    return model, model.calibrate(samples(backbone), level=2, show_progress=False)


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
        assert (out.modality_signals.p_clean == 1).all()
        assert (out.modality_signals.p_match == 1).all()


@pytest.mark.parametrize("backbone", ALL)
def test_clean_samples_stay_uniform(backbone, calibrated):
    model, report = calibrated(backbone)
    assert model.dms.calibration.is_calibrated
    inputs = fresh(backbone)
    out = answer(model, inputs)
    uniform = (out.modality_weights == 0.5).all(1)
    assert uniform.float().mean() >= 0.75
    flagged = (out.modality_signals.p_clean <= RATE / 2).float().mean(0)
    assert (flagged <= RATE + 0.15).all()
    assert all(0 < rate <= RATE / 2 for rate in report.achieved_false_alarm_rate.values())

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
    assert (noisy.modality_signals.p_clean[:, 0] <= RATE / 2).float().mean() > 0.9
    garbled = answer(model, random_words(fresh(backbone)))
    assert garbled.modality_weights[:, 1].mean() < clean[:, 1].mean() - 0.1
    for weights in (clean, noisy.modality_weights, garbled.modality_weights):
        torch.testing.assert_close(weights.sum(1), torch.ones(128))
        assert weights.min() >= model.config.dms_config.weight_floor - 1e-6
    blank = {**fresh(backbone), "pixel_values": torch.zeros(128, 3, 8, 8)}
    assert answer(model, blank).modality_weights[:, 0].mean() < clean[:, 0].mean() - 0.1
    assert report.families["vision"]["noise"].flagged[-1] > 0.8
    assert report.families["vision"]["noise"].auroc > 0.8


@pytest.mark.parametrize("backbone", ["llava-llama", "blip2-opt", "blip2-t5"])
def test_garbage_loses_its_weight(backbone, calibrated):
    model, _ = calibrated(backbone)
    inputs = fresh(backbone, count=32)
    pixels = inputs["pixel_values"]
    drawn = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    for garbage in (30 * drawn, pixels + 30, pixels - 30, 30 * drawn.sign(), torch.full_like(pixels, 1e4)):
        out = answer(model, {**inputs, "pixel_values": garbage})
        assert (out.modality_weights[:, 0] < 0.1).float().mean() > 0.9
        # far enough to lose beside a text that is flagged, too
        assert (out.modality_signals.p_clean[:, 0] < RATE / 2 * math.exp(-GARBAGE_LEAD)).float().mean() > 0.9
    ids = inputs["input_ids"]
    words = (ids >= 10) & (ids != tiny.IMAGE)
    out = answer(model, {**inputs, "input_ids": torch.where(words, 60, ids)})
    assert (out.modality_weights[:, 1] < 0.5).float().mean() > 0.9


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
        for name in ("typicality", "p_clean", "confidence", "uncertainty"):
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
    for modality, detector in zip(model.dms.calibration.modalities, model.dms.calibration.detectors, strict=True):
        assert float(modality.level) == 1
        assert detector.left_out.all()
    blank = {**fresh(backbone), "pixel_values": torch.zeros(128, 3, 8, 8)}
    clean, empty = answer(model, fresh(backbone)), answer(model, blank)
    assert (clean.modality_weights == 0.5).all(1).float().mean() >= 0.75
    assert (empty.modality_weights[:, 0] < 0.5).float().mean() > 0.9
    noisy = answer(model, tiny.noisy(fresh(backbone)))
    assert (noisy.modality_signals.typicality[:, 0] < 0).float().mean() > 0.9
    assert not report.families["vision"]
    assert "vision" in str(report)


def test_other_schedulers_see_what_was_calibrated():
    model, _ = calibrate("llava-llama", scheduler="learned", stirred=True)
    before = tiny.build("llava-llama", scheduler="learned", stirred=True, false_alarm_rate=RATE)
    inputs = tiny.noisy(fresh("llava-llama", count=8))
    assert not torch.allclose(answer(model, inputs).modality_weights, answer(before, inputs).modality_weights)


# ---- missing modalities


@pytest.mark.parametrize("backbone", ["llava-llama", "blip2-opt", "blip2-t5"])
def test_missing_modalities_mixed_in(backbone):
    model = tiny.build(backbone, false_alarm_rate=RATE)
    batches = tiny.clean_samples(count=120, missing=True)
    report = model.calibrate(batches, level=2, show_progress=False)
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
    readable = both & (noisy.modality_signals.p_clean[:, 1] > RATE / 2)
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
    report = model.calibrate(batches, level=2, show_progress=False)
    assert report.samples == {"vision": 90, "text": 120}
    blank = {**fresh("llava-llama"), "pixel_values": torch.zeros(128, 3, 8, 8)}
    assert (answer(model, blank).modality_signals.p_clean[:, 0] <= RATE / 2).float().mean() > 0.9


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
    model.calibrate(batches, level=2, show_progress=False)
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


def test_a_second_calibration_starts_anew(calibrated):
    model, _ = calibrated("llava-llama")
    again = tiny.build("llava-llama", false_alarm_rate=RATE)
    again.calibrate((tiny.noisy(batch) for batch in tiny.clean_samples()), level=2, show_progress=False)
    assert not torch.equal(buffers(again)["modalities.0.mean"], buffers(model)["modalities.0.mean"])
    again.calibrate(tiny.clean_samples(), level=2, show_progress=False)
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
        assert torch.equal(out.modality_signals.p_clean, expected.modality_signals.p_clean)


def test_a_calibration_of_version_0_1_is_none(calibrated, tmp_path, caplog):
    """It lacks what the detectors read today: the checkpoint loads, says what to do, and weighs nothing."""
    backbone = "llava-llama"
    model, _ = calibrated(backbone)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    new = ("detectors.", "pixels.", "agreement.count", "agreement.clean")
    old = {n: v for n, v in state.items() if not any(f"dms.calibration.{part}" in n for part in new)}
    old |= {"dms.calibration.modalities.0.memory_bank": torch.ones(512, 64)}
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = tiny.realigned(type(model).from_pretrained(tmp_path))
    assert not loaded.dms.calibration.is_calibrated
    with caplog.at_level("WARNING"):
        out = answer(loaded, tiny.noisy(fresh(backbone)))
    assert "calibrated by modeling_dms 0.1" in caplog.text
    assert (out.modality_weights == 0.5).all()
    loaded.calibrate(samples(backbone), level=2, show_progress=False)
    assert (answer(loaded, tiny.noisy(fresh(backbone))).modality_weights[:, 0] < 0.5).float().mean() > 0.9


def test_it_streams_and_stops():
    served = []

    def stream():
        for seed in range(9):
            served.append(seed)
            yield tiny.clean_samples(count=32, seed=seed)[0]

    report = tiny.build("llava-llama").calibrate(stream(), level=2, max_samples=64, show_progress=False)
    assert report.samples == {"vision": 64, "text": 64}
    assert len(served) == 2


# ---- families of damage that are left out


def test_a_family_is_left_out_by_calibration_or_afterwards_alike(calibrated):
    model, _ = calibrated("llava-llama")
    out = ("noise", "shuffle")
    twin = tiny.build("llava-llama", false_alarm_rate=RATE)
    report = twin.calibrate(samples("llava-llama"), level=2, show_progress=False, leave_out=out)
    inputs = tiny.noisy(random_words(fresh("llava-llama")), 0.1)
    whole, without = answer(model, inputs), answer(twin, inputs)
    with model.families_left_out(out):
        afterwards = answer(model, inputs)
    assert torch.equal(without.modality_signals.p_clean, afterwards.modality_signals.p_clean)
    assert not torch.equal(without.modality_signals.p_clean, whole.modality_signals.p_clean)
    assert torch.equal(answer(model, inputs).modality_signals.p_clean, whole.modality_signals.p_clean)
    assert report.families["vision"]["noise"] == report.unseen["vision"]["noise"]
    assert report.families["vision"]["blur"] != report.unseen["vision"]["blur"]


def test_unknown_families_are_refused(calibrated):
    refused(
        tiny.build("llava-llama"),
        tiny.clean_samples(),
        "leave_out must be some of noise.*got rain",
        leave_out=["rain"],
    )
    with pytest.raises(ValueError, match="got rain"), calibrated("llava-llama")[0].families_left_out(["rain"]):
        pass


# ---- the report


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_report(backbone, calibrated):
    _, report = calibrated(backbone)
    assert report.samples == {"vision": 96, "text": 96}
    assert (report.false_alarm_rate, report.alarm_rate) == (RATE, RATE / 2)
    for modality, names in zip(("vision", "text"), FAMILIES, strict=True):
        for families in (report.families[modality], report.unseen[modality]):
            assert list(families) == list(names)
            for found in families.values():
                assert 0 <= found.auroc <= 1
                assert len(found.flagged) == SEVERITIES
                assert all(0 <= share <= 1 for share in found.flagged)
        assert report.achieved_false_alarm_rate[modality] == 2 / 97
    assert report.families["vision"]["blank"].auroc > 0.99
    assert 0 <= report.mismatch_auroc <= 1
    table = str(report).splitlines()
    for modality, names in zip(("vision", "text"), FAMILIES, strict=True):
        for name in names:
            assert sum(line.split()[:2] == [modality, name] for line in table) == 1
        assert any(line.startswith(modality) and "96 clean samples" in line and "2.50%" in line for line in table)
        blind = [line for line in table if line.startswith(f"{modality}: mostly blind to ")]
        assert bool(blind) == bool(report.blind(modality))


def test_the_report_says_what_it_is_blind_to():
    sharp, dull = Detection(0.99, [0.2, 0.5, 0.9, 1.0, 1.0]), Detection(0.8, [0.0, 0.0, 0.1, 0.2, 0.4])
    report = CalibrationReport(
        {"vision": 100}, {"vision": {"noise": sharp, "color": dull}}, {"vision": {"noise": dull, "color": dull}}
    )
    assert report.blind("vision") == ["color"]
    assert "vision: mostly blind to color" in str(report)


def several_times(batches, times):
    return [{name: value.repeat_interleave(times, 0) for name, value in batch.items()} for batch in batches]


@torch.no_grad()
def test_several_questions_about_one_image_do_not_make_new_images_look_odd():
    """No image is judged by what was fitted to it. It was: of images four times each, 58% of new ones fell to 5%."""
    model = tiny.build("llava-llama").eval()
    model.calibrate(several_times(tiny.clean_samples(count=60, size=30), 4), level=2, show_progress=False)
    found = [model(**batch).modality_signals.p_clean for batch in tiny.clean_samples(count=300, size=50, seed=11)]
    flagged = torch.cat(found) <= torch.tensor([[0.05], [0.2]])[:, None]
    assert (flagged.float().mean(1) < torch.tensor([[0.15], [0.3]])).all()


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
    model.calibrate(tiny.clean_samples(count=50), level=2, show_progress=False)
    refused(model, tiny.clean_samples(count=49), "49 samples")
    refused(model, several_times(tiny.clean_samples(count=49), 2), "49 different images in 98 samples.*50")


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
    refused(tiny.build("llava-llama"), tiny.clean_samples(), "level must be 1, 2 or 3, got 4", level=4)


def test_images_that_do_not_fit_the_prompts():
    batches = tiny.clean_samples()
    batches[0]["pixel_values"] = batches[0]["pixel_values"][:-1]
    refused(tiny.build("llava-llama"), batches, "image tokens")


# ---- the p-value


P = 6


def records(count, seed, shift=0.0):
    """Numbers of two modalities with heavy tails: shifted ones are damaged."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def record():
        numbers = normal(count, P) / (0.3 + normal(count, 1).abs()) + shift
        return ModalityRecord(normal(count, 2, 4), normal(count, 3), normal(count, 4), normal(count, 4), numbers)

    return [record(), record()]


def fitted_on(clean, damaged, **config):
    """A calibration whose first family of each modality is what `damaged` holds, and the others the same."""
    severity = torch.linspace(0, 1, len(damaged[0].numbers))
    families = [
        {name: DamagedRecord(severity, record.statistics, record.numbers) for name in names}
        for names, record in zip(FAMILIES, damaged, strict=True)
    ]
    sizes = [(P, len(FAMILIES[0]), False), (P + 4, len(FAMILIES[1]), True)]
    calibration = Calibration(DMSConfig(subspace_size=4, **config), [(2, 4), (2, 4)], sizes, [4, 4], in_prompt=1)
    present = torch.ones(len(severity), 2, dtype=torch.bool)
    # within its prompt a text says half of the same
    report = fit_calibration(calibration, clean[:2], families, present, in_prompt=clean[2] if clean[2:] else None)
    return calibration, report


def in_prompt(record, seed):
    """A record of texts as they are read within their prompts: half of it is as alone, half is chance."""
    other = records(len(record.numbers), seed)[1]
    return replace(other, numbers=(record.numbers + other.numbers) / 2)


def alarms(calibration, clean):
    """Which samples are flagged for their image, their text, or their disagreement: (n, 3)."""
    rate, flags = calibration.config.alarm_rate, []
    for index, (detector, record) in enumerate(zip(calibration.detectors[:2], clean, strict=True)):
        score = detector(calibration.numbers(index, calibration.distances(index, record.statistics), record.numbers))
        flags.append(detector.p_value(score) <= rate)
    views = [record.representations for record in clean]
    if calibration.agreement.canonical:
        views = [calibration.agreement.shared(index, record.content) for index, record in enumerate(clean)]
    flags.append(calibration.agreement.p_value(-torch.cosine_similarity(*views)) <= rate)
    return torch.stack(flags, 1)


def test_clean_samples_are_flagged_as_rarely_as_asked_for():
    """Of any alarm, over 10 random splits: the mean share lies within its binomial interval of the rate, and does not
    fall far below it either."""
    rate, count = 0.06, 400
    pool = records(2 * count, 0)
    shares = []
    for seed in range(10):
        order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(seed))
        fitting, rest = ([record[rows] for record in pool] for rows in (order[:count], order[count:]))
        calibration, _ = fitted_on(
            fitting, records(count, 100 + seed, 2.0), false_alarm_rate=rate, conflict_prior="vision"
        )
        # the representations hold no agreement: what they say is a third alarm of the same rate all the same
        shares.append(alarms(calibration, rest).any(1).float().mean())
    mean = float(torch.stack(shares).mean())
    deviation = (rate * (1 - rate) / (2 * count)) ** 0.5
    assert rate - 3 * deviation - rate**2 <= mean <= rate + 2 * deviation


def test_a_p_value_counts_the_clean_samples_that_look_as_damaged():
    conformal = Conformal(1, {})
    scores = torch.tensor([0.5, 3.0, 1.0, 2.0])
    assert torch.equal(conformal.p_value(scores), torch.ones(4))
    conformal.remember(torch.arange(9.0)[:, None])
    torch.testing.assert_close(conformal.p_value(scores), torch.tensor([9, 7, 9, 8]) / 10)
    torch.testing.assert_close(conformal.p_value(scores[:, None].expand(4, 2))[:, 1], conformal.p_value(scores))
    assert conformal.p_value(torch.tensor([torch.inf, -torch.inf])).tolist() == pytest.approx([LEAST_P, 1.0])
    # of more than it has room for, some from the first to the last
    many = Conformal(1, {})
    many.remember(torch.arange(2500.0)[:, None])
    assert int(many.count) == 1000
    assert float(many.p_value(torch.tensor(1250.0))) == pytest.approx(0.5, abs=0.002)


@bounded
@given(seed=st.integers(0, 2**31), count=st.integers(20, 900))
def test_a_p_value_falls_on_beyond_the_clean_samples_as_their_tail_does(seed, count):
    """Of exponential scores it is the true one, e^-s, but for what so few samples tell of it."""
    generator = torch.Generator().manual_seed(seed)
    conformal = Conformal(1, {})
    clean = torch.rand(count, 1, generator=generator).log().neg()
    conformal.remember(clean)
    scores = torch.linspace(0, 200, 2001)
    found = conformal.p_value(scores)
    assert (found.diff() <= 0).all()
    assert LEAST_P <= found.amin() <= found.amax() <= 1
    outside = scores > clean.amax()
    assert torch.equal(found <= 1 / (count + 1), outside)
    above = found[outside]
    assert (above.diff()[:-1][above[1:-1] > LEAST_P] < 0).all()
    if count > 600:
        slope = -(above[1] / above[0]).log() / 0.1
        assert 0.4 < slope < 2.5


def test_the_p_values_of_both_ways_to_read_a_text_are_one():
    """Those of suspicious texts come from reading them alone, the others from within the prompt: of clean ones a share
    of at most a lies below any a, and damaged ones are told as well as alone."""
    clean, damaged = records(1000, 0), records(1000, 1, 2.0)
    calibration, _ = fitted_on([*clean, in_prompt(clean[1], 7)], damaged)

    def judged(record, seed):
        within = in_prompt(record, seed)
        features = ModalityFeatures(None, None, within.statistics, within.content, within.numbers, in_prompt=True)
        rows = calibration.suspicious(features).nonzero()[:, 0]
        own = record[rows]
        features.closer = (rows, ModalityFeatures(None, None, own.statistics, own.content, own.numbers))
        return calibration.judge(1, features), len(rows)

    count = 4000
    (_, p_clean), again = judged(records(count, 2)[1], 8)
    assert 0.07 < again / count < 0.13
    for rate in (0.01, 0.05, 0.09, 0.11, 0.2, 0.5):
        # of 1000 remembered samples and 4000 new ones
        deviation = (rate * (1 - rate) * (1 / 1000 + 1 / count)) ** 0.5
        assert float((p_clean <= rate).float().mean()) <= rate + 3 * deviation
    record, rate = records(count, 3, 6.0)[1], calibration.config.alarm_rate
    (_, p_clean), _ = judged(record, 9)
    _, alone = calibration.judge(1, ModalityFeatures(None, None, record.statistics, record.content, record.numbers))
    assert (p_clean <= rate).float().mean() > 0.9 * (alone <= rate).float().mean() > 0.3


def test_numbers_that_are_not_known_are_no_alarm():
    calibration, _ = fitted_on(records(100, 0), records(100, 1, 2.0))
    detector = calibration.detectors[0]
    numbers = records(3, 2, 50.0)[0].numbers
    numbers[1] = torch.nan
    score = detector(numbers)
    assert score[1] == -torch.inf
    assert detector.p_value(score)[1] == 1
    assert (detector.p_value(score[[0, 2]]) <= 0.01).all()


def test_what_resembles_no_family_is_told_by_its_distance():
    clean, damaged = records(300, 0), records(300, 1, 2.0)
    calibration, _ = fitted_on(clean, damaged)
    detector = calibration.detectors[0]
    opposite = records(300, 2, -20.0)[0].numbers
    families = ((detector.raw_scores(opposite) - detector.score_location) / detector.score_scale)[:, :-1].amax(1)
    assert (detector.p_value(families) > 0.01).float().mean() > 0.9
    assert (detector.p_value(detector(opposite)) <= 0.01).float().mean() > 0.9
