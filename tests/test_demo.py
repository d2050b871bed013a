"""The demo, its figures of merit and the command line, on the shipped checkpoints."""

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import Blip2ForConditionalGeneration, LlavaForConditionalGeneration
from typer.testing import CliRunner

from modeling_dms.training.apps import demo
from modeling_dms.training.apps.evaluation import answer_tokens, predict
from modeling_dms.training.cli import app
from modeling_dms.training.corruptions import CALIBRATION_FAMILIES, family_of
from modeling_dms.training.data import Sample, load_easy_vqa
from modeling_dms.training.models.pretrain_demo import TRAINING_CORRUPTIONS


VANILLA = {"llava": LlavaForConditionalGeneration, "blip2": Blip2ForConditionalGeneration}


@pytest.fixture(scope="module")
def samples():
    return demo.one_per_image(load_easy_vqa("test"), 60)


@pytest.fixture(scope="module", params=list(VANILLA))
def calibrated(request):
    model, collator = demo.load_demo_model(request.param)
    return request.param, model, collator, demo.calibrate_demo(model, collator, 100, show_progress=False)


def test_unseen_means_of_a_family_that_neither_training_nor_calibration_saw():
    seen = {family_of(name) for names in TRAINING_CORRUPTIONS.values() for name in names if name.startswith("image")}
    seen = {"image": seen | set(CALIBRATION_FAMILIES["image"]), "text": {*CALIBRATION_FAMILIES["text"], "missing"}}
    unseen = [c for c in demo.CONDITIONS if c.group.startswith("unseen")]
    assert len(unseen) == 12
    for condition in unseen:
        modality = condition.name.partition(":")[0]
        assert condition.group == f"unseen {modality}"
        assert family_of(condition.name) not in seen[modality]
    conflict = {c.name for c in demo.CONDITIONS if c.group == "conflict"}
    assert all(family_of(name) == "mismatch" for name in conflict)


@pytest.mark.parametrize("backbone", list(VANILLA))
def test_shipped_checkpoints_are_small_static_and_recorded(backbone):
    folder = demo.CHECKPOINTS / f"demo-{backbone}"
    assert (folder / "model.safetensors").stat().st_size < 12e6
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "dms" in key]  # noqa: SIM118
    record = json.loads((folder / "training_log.json").read_text())
    assert record["seed"] == 0
    assert "pretrain_demo" in record["command"]
    assert record["log"][-1]["step"] == record["steps"]


def test_static_weights_are_the_vanilla_checkpoint(calibrated, samples):
    backbone, model, collator, _ = calibrated
    vanilla = VANILLA[backbone].from_pretrained(demo.CHECKPOINTS / f"demo-{backbone}").eval()
    inputs = collator(samples[:8])
    static = predict(model, [inputs], [demo.STATIC])[0]
    inputs.pop("modality_ids")
    with torch.no_grad():
        assert torch.equal(vanilla(**inputs).logits[:, -1].argmax(-1), static.tokens)


def test_dms_leaves_clean_samples_alone_and_finds_damage(calibrated, samples):
    _, model, collator, report = calibrated
    wanted = answer_tokens(collator, samples)
    clean = demo.batches_of(collator, samples)
    static, dms = predict(model, clean, [demo.STATIC, None])
    assert static.correct(wanted).mean() > 0.8
    assert abs(dms.correct(wanted).mean() - static.correct(wanted).mean()) <= 0.02
    assert (dms.weights == 0.5).all(1).float().mean() > 0.9
    black = demo.corrupted(samples, demo.Condition("image:black", "seen"))
    typos = demo.corrupted(samples, demo.Condition("text:typos", "unseen text", 5))
    assert predict(model, demo.batches_of(collator, black), [None])[0].weights[:, 0].mean() < 0.2
    assert predict(model, demo.batches_of(collator, typos), [None])[0].weights[:, 1].mean() < 0.3
    assert report.mismatch_auroc > 0.85


def test_the_demo_writes_table_numbers_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CONDITIONS", demo.CONDITIONS[:3])
    monkeypatch.setattr(demo, "PICTURE_CONDITIONS", ("clean",))
    (tmp_path / "model_cards").mkdir()
    (tmp_path / "README.md").write_text("before\n<!-- demo:begin -->\nold\n<!-- demo:end -->\nafter\n")
    (tmp_path / "model_cards" / "README.md").write_text("<!-- training:begin -->\n<!-- training:end -->\n")
    result = demo.run_demo(tmp_path / "out", ["llava"], 50, 60, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "old" not in readme
    row = result["backbones"][0]["rows"][1]
    assert f"| {row['static']:.3f} | {row['dms']:.3f} | {row['oracle']:.3f} |" in readme
    written = (tmp_path / "out" / "results.json").read_text()
    assert json.loads(written)["samples"] == 50
    assert (tmp_path / "model_cards" / "results.json").read_text() == written
    assert Image.open(tmp_path / "out" / "demo.png").size[0] > 100
    with pytest.raises(ValueError, match="demo:begin"):
        demo.write_between_markers(tmp_path / "model_cards" / "README.md", "demo", "x")


def test_predict_answers_one_sample(tmp_path, samples):
    sample = next(s for s in samples if s.answers[0] in demo.COLORS)
    arguments = ["predict", "--question", sample.question, "--context", sample.context, "--image", str(sample.image)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"answer: {sample.answers[0]}" in result.output
    assert "damage" in result.output


def test_predict_reports_bad_input_in_one_line(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG nothing")
    for arguments, message in (
        (["--question", "what?", "--image", str(broken)], "broken.png"),
        (["--question", "what?"], "neither an image nor a context"),
        (["--question", " ", "--context", "a red box."], "question is empty"),
        (["--question", "what?", "--context", "x", "--model", str(tmp_path)], str(tmp_path)),
    ):
        result = CliRunner().invoke(app, ["predict", *arguments])
        assert result.exit_code == 1
        assert message in result.output
        assert "Traceback" not in result.output


def test_a_sample_whose_answer_is_longer_than_a_token_is_named():
    _, collator = demo.load_demo_model("llava")
    with pytest.raises(ValueError, match="'long'"):
        answer_tokens(collator, [Sample("long", None, "a", "b", ("a rather long answer",))])
