"""The study of the assembled checkpoints (`benchmarks/`), on the demo's LLaVA: what its tables are made of."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_dms.training.data import PromptCollator, load_easy_vqa
from modeling_dms.training.evaluate.grid import Condition
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.evaluate.tasks import VisualQuestionAnswering
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import load


sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
import ablations
import losses
import sink
import study


CLEAN, BLANK = Condition("clean", "clean"), Condition("image:black", "unseen image", 5)


@pytest.fixture(scope="module")
def calibrated():
    model, processor = load("demo-llava", {"scheduler": "rule"})
    collator = PromptCollator(processor)
    calibrate(model.eval(), collator, load_easy_vqa("train"), 60, show_progress=False, level=2)
    return model, collator


@pytest.fixture(scope="module")
def again(calibrated):
    """What makes its calibration again, with other choices."""
    return ablations.recalibrations(*calibrated, load_easy_vqa("train"), 60)


def test_a_recorded_calibration_is_the_one_that_calibrate_makes(calibrated, again):
    model, _ = calibrated
    found = again(60).calibration.state_dict()
    for name, value in model.dms.calibration.state_dict().items():
        assert torch.equal(value, found[name]), name
    assert again(60, level=1).calibration.modalities[0].level == 1
    for detector in again(60, level=1).calibration.detectors:
        assert detector.left_out.all()  # the distance from clean samples is all there is
    assert [float(detector.count) for detector in again(50).calibration.detectors] == [50, 50, 50]


def test_a_variant_leaves_the_model_as_it_was(calibrated, again):
    model, _ = calibrated
    dms, config, other = model.dms, model.config.dms_config.to_dict(), again(60)
    with ablations.Variant("", {"weight_floor": 0.2}, other).applied(model):
        assert model.dms is other
        assert model.config.dms_config.weight_floor == other.config.weight_floor == 0.2
    assert model.dms is dms
    assert model.config.dms_config.to_dict() == config


def test_a_variant_weighs_the_attention_sink_too(calibrated):
    model, _ = calibrated
    weights, ids = torch.tensor([[0.1, 0.9]]), torch.tensor([[1, 1, 1, 2]])
    spared = model._key_bias(weights, ids)
    assert spared[0, 0] == 0
    assert (spared[0, 1:] != 0).all()
    with ablations.Variant("", spares_sink=False).applied(model):
        weighed = model._key_bias(weights, ids)
    assert weighed[0, 0] == weighed[0, 1] == spared[0, 1]
    assert torch.equal(model._key_bias(weights, ids), spared)


def test_what_is_measured(calibrated, monkeypatch):
    model, collator = calibrated
    monkeypatch.setattr(ablations, "SAMPLES", 6)
    task = VisualQuestionAnswering(collator.processor, ["yes", "no", "red", "circle"])
    variants = [
        ablations.Variant("rule"),
        ablations.Variant("uniform", {"scheduler": "uniform"}),
        ablations.Variant("equal", {"weight_floor": 0.49}),
    ]
    scores = ablations.measure(model, task, variants, [CLEAN, BLANK])
    assert set(scores[CLEAN]) == {"static", "rule", "uniform", "equal"}
    assert set(scores[BLANK]) == {"static", "rule", "uniform", "equal", "oracle"}
    for own in scores.values():
        assert {values.shape for values in own.values()} == {(6,)}
        assert np.array_equal(own["uniform"], own["static"])
    head = ["variant", *ablations.GROUPS]
    for row in ablations.rows_of(scores):
        assert len(row) == len(head)
        assert row[1] == f"{scores[CLEAN][row[0]].mean():.3f}" if row[0] in scores[CLEAN] else row[1] == "-"


def test_where_attention_goes_and_what_weights_give(calibrated, monkeypatch):
    model, collator = calibrated
    task = VisualQuestionAnswering(collator.processor, ["yes", "no", "red", "circle"])
    samples = one_per_image(load_easy_vqa("validation"), 3, 0)
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    attention = sink.attention_of(model, task, samples)
    assert attention.sum() == pytest.approx(1, abs=1e-5)
    assert (attention > 0).all()
    assert model.config.get_text_config(decoder=True)._attn_implementation == implementation
    monkeypatch.setattr(sink, "WEIGHTS", (0.5, 0.01))
    accuracy = sink.accuracy_of(model, task, samples, [CLEAN, BLANK])
    # equal weights leave nothing to spare
    assert accuracy["spared"][0] == accuracy["weighed"][0]
    assert all(len(values) == 2 for values in accuracy.values())


def scan_of(losses):
    rows = [{"condition": "clean", "severity": 0, "method": "static", "score": 0.9}]
    for name, loss in losses.items():
        rows.append({"condition": name, "severity": 5, "method": "static", "score": 0.9 - loss})
    return {"results": {"conditions": rows}}


def test_only_images_that_static_does_not_cope_with_are_studied():
    scan = scan_of({"image:fog": 0.3, "image:dark": 0.05, "image:jpeg": 0.1, "text:typos": 0.0, "text:scramble": 0.2})
    assert study.chosen(scan) == {"image": ["image:fog", "image:jpeg"], "text": ["text:typos", "text:scramble"]}
    many = scan_of({f"image:{name}": 0.1 + 0.01 * place for place, name in enumerate(study.UNSEEN["image"])})
    assert study.chosen(many)["image"] == [f"image:{name}" for name in study.UNSEEN["image"][:-5:-1]]


def test_an_adapter_is_trained_further_once_and_as_told(tmp_path, monkeypatch):
    monkeypatch.setitem(losses.MODELS, "llava", "demo-llava")
    short = "--max_samples 400 --calibration_samples 50 --per_device_train_batch_size 4 --bf16 false"
    monkeypatch.setattr(losses, "TRAINING", f"{losses.TRAINING} {short}")
    final = losses.train("llava", "LoRA and scheduler, without unimodal", 2, tmp_path)
    config = load(final)[0].config.dms_config
    assert (config.scheduler, config.lambda_unimodal) == ("learned", 0)
    assert config.lambda_mwc == config.lambda_schedule == 0.1
    assert config.kappa == 0
    trained = []
    monkeypatch.setattr(losses, "run_training", lambda *_, **__: trained.append(1))
    assert losses.train("llava", "LoRA and scheduler, without unimodal", 2, tmp_path) == final
    assert not trained
    assert losses.train("llava", "LoRA and scheduler, without unimodal", 3, tmp_path) != final
    assert trained
    model, task = ablations.loaded(final)
    monkeypatch.setattr(losses, "SAMPLES", 3)
    weights = losses.image_weights(model, task, [CLEAN, BLANK])
    # kappa 0, and two steps of warm-up and learning: next to equal weights
    assert weights == ["0.50", "0.50", "-", "-", "-"]
    # whatever the losses of the checkpoint
    for name, (choices, _) in losses.WAYS.items():
        left_out = [loss for loss in losses.LOSSES if not choices[f"lambda_{loss}"]]
        assert left_out == [loss for loss in losses.LOSSES if "alone" in name or name.endswith(f"without {loss}")]
    # every way is another, and says what `dms train` takes
    assert len({str(way) for way in losses.WAYS.values()}) == len(losses.WAYS) == 7


def test_titles_tell_evaluations_apart():
    run = {"model": "runs/blip2-openmoji", "task": "caption", "data": "noto"}
    assert study.title_of({"name": "blip2-noto", "run": run}) == "blip2, captions of noto"
    run = {"model": study.MODELS["llava"], "task": "vqa", "data": "easy-vqa"}
    assert study.title_of({"name": "llava-policy", "run": run}) == "llava, VQA, policies"
