"""How far the image makes the text likelier, as evidence that a pair belongs together."""

import math

import pytest
import torch

from modeling_dms import DMSConfig
from modeling_dms.calibrate.calibration import Calibration
from modeling_dms.calibrate.fit import fit_calibration
from modeling_dms.calibrate.records import GainRecord, ModalityRecord
from tests import tiny


def records(count, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def record():
        shapes = ((2, 4), (3,), (4,), (4,), (6,))
        return ModalityRecord(*(torch.randn(count, *shape, generator=generator) for shape in shapes))

    return [record(), record()]


def fitted(gains, count=200):
    """A calibration of contents that have nothing in common, and its report."""
    calibration = Calibration(DMSConfig(subspace_size=4), [(2, 4), (2, 4)], [(6, 8, False), (10, 4, True)], [4, 4])
    present = torch.ones(count, 2, dtype=torch.bool)
    return calibration, fit_calibration(calibration, records(count), [{}, {}], present, level=1, gains=gains)


def drawn(count, apart, seed=1):
    """Gains of pairs and of mismatched ones, whose means lie `apart` standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    matched, other = torch.randn(2, count, generator=generator)
    return GainRecord(matched + apart, other, (torch.arange(count) - 1) % count)


def test_gains_that_tell_mismatched_pairs_count():
    gains = drawn(200, 3.0)
    calibration, report = fitted(gains)
    assert report.consistency.endswith(" and likelihood gain")
    assert report.mismatch_auroc > 0.95
    joint, none = calibration.joint, torch.zeros(200)
    assert joint.coefficients[1] > 0  # a higher gain is the better match
    odd, clean = (joint.p_value(joint(torch.stack([none, gain], 1))) for gain in (gains.of_other - 3, gains.gain))
    assert odd.median() < 0.01
    # a clean pair has p <= a with probability a
    for rate in (0.05, 0.2, 0.5):
        assert abs((clean <= rate).float().mean() - rate) < 0.1


UNKNOWN = GainRecord(*torch.full((2, 200), math.nan), torch.arange(200))


@pytest.mark.parametrize("gains", [None, drawn(200, 0.0), UNKNOWN])
def test_gains_that_tell_nothing_or_are_not_known_do_not(gains):
    calibration, report = fitted(gains)
    assert "gain" not in report.consistency
    assert not calibration.joint.count > 0
    assert not calibration.reads_all


def test_samples_without_an_image_are_left_out_of_the_fit():
    gains = drawn(200, 3.0)
    gains.gain[::4] = gains.of_other[::4] = math.nan
    calibration, report = fitted(gains)
    assert int(calibration.joint.count) == 150
    assert report.mismatch_auroc > 0.95


def knows_gain(model, share=0.3):
    """Lets a calibrated model take pairs for odd of which the image makes the text less likely than of most."""
    joint = model.dms.calibration.joint
    joint.coefficients.copy_(torch.tensor([0.0, 1.0]))
    joint.remember(torch.linspace(-share, share, 100)[:, None])


@pytest.mark.parametrize("backbone", ["llava-llama", "blip2-opt"])
@torch.no_grad()
def test_the_gain_is_what_both_readings_of_a_text_differ_by(backbone):
    model = tiny.build(backbone, conflict_prior="text").eval()
    model.calibrate(tiny.clean_samples(), level=2, show_progress=False)
    knows_gain(model)
    batch = tiny.clean_samples(count=8, size=8)[0]
    prompt, _, given, _ = model._clean_prompt(batch, 0)
    ids = prompt.modality_ids
    within = model._text_within(prompt, given)
    alone = model._text_features(batch["input_ids"], None, ids)
    gain = alone.surprisal - within.surprisal
    clean = {"attention_mask": torch.ones_like(ids), **given, "modality_ids": ids}
    torch.testing.assert_close(model._gain(prompt, clean), gain)
    joint = model.dms.calibration.joint
    expected = joint.p_value(joint(torch.stack([torch.zeros(8), gain], 1)))
    signals = model(**batch).modality_signals
    torch.testing.assert_close(signals.p_match, expected[:, None].expand(-1, 2))
    assert signals.p_match.unique().numel() > 1
    # each row by itself, and without an image nothing to match
    one = model(**{name: value[:1] for name, value in batch.items()}).modality_signals
    torch.testing.assert_close(one.p_match, signals.p_match[:1])
    alone = model(**batch, modality_mask=torch.tensor([[False, True]]).expand(8, -1)).modality_signals
    assert (alone.p_match == 1).all()


@torch.no_grad()
def test_a_batch_of_suspicious_texts_keeps_what_consistency_tells():
    """All of them are read alone then, too, and nobody has fitted what the gain tells."""
    model = tiny.build("llava-llama").eval()
    model.calibrate(tiny.clean_samples(), level=2, show_progress=False)
    model.dms.calibration.agreement.informative.fill_(1)
    batch = tiny.clean_samples(count=8, size=8)[0]
    expected = model(**batch).modality_signals.p_match
    model.dms.calibration.suspicious = lambda text: torch.ones(len(text.tokens), dtype=torch.bool)
    found = model(**batch).modality_signals.p_match
    assert (expected < 1).any()
    torch.testing.assert_close(found, expected)


def test_it_is_saved(tmp_path):
    model = tiny.build("llava-llama").eval()
    knows_gain(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).dms.calibration
    assert again.reads_all
    assert torch.equal(again.joint.coefficients, model.dms.calibration.joint.coefficients)


@pytest.mark.parametrize(("prior", "backbone"), [(None, "llava-llama"), ("learned", "blip2-t5")])
def test_nothing_is_read_for_it_where_nobody_asks_or_nothing_is_predicted(prior, backbone, monkeypatch):
    model = tiny.build(backbone, conflict_prior=prior).eval()
    monkeypatch.setattr(model, "_gain", lambda *_: pytest.fail("a gain was computed"))
    model.calibrate(tiny.clean_samples(), show_progress=False, max_asked=32)
    assert not model.dms.calibration.reads_all


def test_calibration_asks_for_gains_of_all_samples_and_of_all_copies(monkeypatch):
    found = []
    model = tiny.build("llava-llama", conflict_prior="learned").eval()
    monkeypatch.setattr("modeling_dms.calibrate.calibration_mixin.fit_calibration", lambda *args: found.append(args))
    batches = tiny.clean_samples()
    model.calibrate(batches, show_progress=False, max_asked=32)
    answers, gains = found[0][7], found[0][9]
    count = sum(len(batch["input_ids"]) for batch in batches)
    assert len(gains.gain) == count
    assert gains.gain.isfinite().all()
    size = len(batches[0]["input_ids"])
    assert gains.other[:size].tolist() == [size - 1, *range(size - 1)]
    first = (answers.families == -1).all(1) & (answers.sources[:, 0] == answers.sources[:, 1])
    torch.testing.assert_close(answers.gain[first], gains.gain[: int(first.sum())])
    swapped = answers.sources[:, 1] == (answers.sources[:, 0] - 1) % size
    of_texts = answers.gain[swapped & (answers.sources[:, 0] < size)][:size]
    torch.testing.assert_close(of_texts, gains.of_other[:size])


# ---- the matching head of BLIP-2's retrieval class


def pairs(count=8):
    return [tiny.image_first(batch) for batch in tiny.clean_samples(count=count, size=8)]


def head(batch):
    """The log-odds of the vanilla class."""
    logits = tiny.vanilla("retrieval")(**batch, use_image_text_matching_head=True).logits_per_image
    return logits[:, 1] - logits[:, 0]


@torch.no_grad()
def test_a_matching_head_says_how_far_pairs_belong_together():
    model = tiny.build("retrieval", conflict_prior="text").eval()
    model.calibrate(pairs(96), show_progress=False)
    knows_gain(model)
    batch = pairs()[0]
    joint = model.dms.calibration.joint
    expected = joint.p_value(joint(torch.stack([torch.zeros(8), head(batch)], 1)))
    signals = model(**batch).modality_signals
    torch.testing.assert_close(signals.p_match, expected[:, None].expand(-1, 2))
    assert signals.p_match.unique().numel() > 1
    one = model(**{name: value[:1] for name, value in batch.items()}).modality_signals
    torch.testing.assert_close(one.p_match, signals.p_match[:1])
    # it is asked about the pair as it is, whatever weighs it
    weighed = model(**batch, use_image_text_matching_head=True).modality_signals
    torch.testing.assert_close(weighed.p_match, signals.p_match)
    # one image beside several texts
    first = {**batch, "pixel_values": batch["pixel_values"][:1]}
    repeated = {**batch, "pixel_values": batch["pixel_values"][:1].expand(8, -1, -1, -1)}
    torch.testing.assert_close(model(**first).modality_signals.p_match, model(**repeated).modality_signals.p_match)


@torch.no_grad()
def test_calibration_asks_the_matching_head(monkeypatch):
    """About its pairs, and about the same images with the texts of the rows before them."""
    model = tiny.build("retrieval", conflict_prior="text").eval()
    asked, ask = [], model._log_odds

    def log_odds(*given):
        asked.append(ask(*given))
        # a head that knows
        return asked[-1] * 0.01 + (3.0 if len(asked) % 2 else -3.0)

    monkeypatch.setattr(model, "_log_odds", log_odds)
    report = model.calibrate(pairs(96), show_progress=False)
    assert report.consistency.endswith(" and matching head")
    assert report.mismatch_auroc > 0.99
    batch = pairs(96)[1]
    torch.testing.assert_close(asked[2], head(batch))
    texts = {name: batch[name].roll(1, 0) for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(asked[3], head({**batch, **texts}))


@torch.no_grad()
def test_without_a_prior_no_matching_head_is_asked(monkeypatch):
    model = tiny.build("retrieval").eval()
    monkeypatch.setattr(model, "_log_odds", None)
    report = model.calibrate(pairs(96), show_progress=False)
    assert "head" not in report.consistency
    model(**pairs()[0])
