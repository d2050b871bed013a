"""What `dms train` leaves behind with LoRA, and `dms calibrate`: adapters that `load` merges into their base."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from modeling_dms.training.cli import app
from modeling_dms.training.data import PromptCollator, load_samples
from modeling_dms.training.finetune.arguments import read_arguments
from modeling_dms.training.finetune.train import run_training
from modeling_dms.training.models import assemble
from modeling_dms.training.models.loading import CHECKPOINTS, load
from modeling_dms.training.publish.release import release
from tests import tiny
from tests.training.conftest import calibrate_up_to


# InternVL has the parts of LLaVA, by other names: it is asked where a model is, not where files alone are
without_internvl = pytest.mark.parametrize("run", ["demo-llava", "demo-blip2"], indirect=True)


def train(model, folder, rank=2):
    """A short run of LoRA and bridge on a static model."""
    command = f"--model {model} --stage backbone --lora_rank {rank} --lora_targets all --train_bridge true "
    command += "--calibration_samples 0 --schedule_target none --max_samples 60 --max_steps 2 --use_cpu true "
    command += f"--per_device_train_batch_size 4 --learning_rate 0.01 --report_to none --output_dir {folder}"
    dms = json.dumps({"scheduler": "uniform", "weight_floor": 0.02, "lambda_unimodal": 0.0})
    return run_training(read_arguments(None, [*command.split(), "--dms", dms])).model.eval()


@pytest.fixture(scope="module", params=["demo-llava", "demo-blip2", "internvl"])
def run(request, tmp_path_factory):
    """The adapter of a short run, and the model it ended with."""
    folder, model = tmp_path_factory.mktemp("run"), request.param
    if model == "internvl":
        model = tiny.save_internvl(tmp_path_factory.mktemp(model))
    return folder / "final", train(model, folder)


@torch.no_grad()
def test_an_adapter_is_trained_further(run, tmp_path):
    folder, trained = run
    with torch.enable_grad():
        further = train(folder, tmp_path)
    before, after = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "final"))
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if ".dms." not in name}
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (folder, tmp_path / "final")]
    assert configs[0]["base_model_name_or_path"] == configs[1]["base_model_name_or_path"]
    model, processor = load(tmp_path / "final")
    batch = PromptCollator(processor)(load_samples("easy-vqa", "test", limit=3))
    found = model.eval()(**batch).logits
    torch.testing.assert_close(found, further(**batch).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, trained(**batch).logits, atol=1e-2)
    with pytest.raises(ValueError, match="the adapter to train further has r=2, this run asks for 3"):
        train(folder, tmp_path, rank=3)


@torch.no_grad()
def test_an_adapter_is_merged_into_its_base(run):
    folder, trained = run
    model, processor = load(folder)
    assert not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.dms_config.weight_floor == 0.02
    assert model.config.dms_config.scheduler == "uniform"
    assert load(folder, {"weight_floor": 0.03})[0].config.dms_config.weight_floor == 0.03
    # a choice that is changed later reaches all that heeds it
    for part in (model.dms, model.dms.calibration, model.dms.scheduler):
        assert part.config is model.config.dms_config
    batch = PromptCollator(processor)(load_samples("easy-vqa", "test", limit=3))
    found = model.eval()(**batch).logits
    torch.testing.assert_close(found, trained(**batch).logits, atol=1e-4, rtol=1e-4)
    base, _ = load(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
    assert not torch.allclose(found, base.eval()(**batch).logits, atol=1e-2)


@without_internvl
def test_an_adapter_that_lacks_weights_is_refused(run, tmp_path):
    folder, _ = run
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    state = load_file(folder / "adapter_model.safetensors")
    lost = "base_model.model.dms.calibration.detectors.0.score_scale"
    del state[lost]
    save_file(state, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=lost):
        load(tmp_path)


@without_internvl
@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_without_a_learned_scheduler_gets_one(run, tmp_path, merge):
    folder, _ = run
    model, _ = load(folder, {"scheduler": "learned"}, merge=merge)
    scheduler = (model if merge else model.base_model.model).dms.scheduler
    assert not scheduler.output.weight.any()  # it starts at the rule
    assert scheduler.hidden.weight.any()
    if merge:
        return
    model.save_pretrained(tmp_path)
    model.base_model.config.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    del state["base_model.model.dms.scheduler.hidden.weight"]
    save_file(state, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"dms\.scheduler\.hidden\.weight"):  # one that was there is lost
        load(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize(("run", "level"), [("demo-llava", 3), ("demo-blip2", 1)], indirect=["run"])
def test_calibrating_an_adapter_leaves_an_adapter(run, level, tmp_path, monkeypatch):
    calibrate_up_to(monkeypatch, level)
    folder, _ = run
    command = ["calibrate", "--model", str(folder), "--data", "easy-vqa", "--samples", "50", "--out", str(tmp_path)]
    command += ["--scheduler", "rule", "--dms", '{"weight_floor": 0.03}']
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "AUROC" in done.output
    assert (tmp_path / "adapter_config.json").exists()
    assert not (tmp_path / "model.safetensors").exists()
    before, processor = load(folder, {"scheduler": "rule"})
    after, _ = load(tmp_path)
    assert after.config.dms_config.scheduler == "rule"
    assert after.config.dms_config.weight_floor == 0.03
    assert not before.dms.calibration.is_calibrated
    assert after.dms.calibration.is_calibrated
    batch = PromptCollator(processor)(
        [s.replace(context="zzz qqq xxx") for s in load_samples("easy-vqa", "test", limit=3)]
    )
    batch["modality_weights"] = torch.full((3, 2), 0.5)
    torch.testing.assert_close(after.eval()(**batch).logits, before.eval()(**batch).logits)


@pytest.mark.usefixtures("first_level_alone")
def test_calibrating_a_checkpoint_saves_a_checkpoint(tmp_path):
    command = ["calibrate", "--model", "demo-llava", "--data", "easy-vqa", "--samples", "50", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert load(tmp_path)[0].dms.calibration.is_calibrated
    assert "auto_map" in json.loads((tmp_path / "config.json").read_text())
    command[4] = "nowhere"
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "unknown source 'nowhere'" in done.output


@pytest.fixture
def recipe(run, tmp_path, monkeypatch):
    """The run's base as an assembled checkpoint, in a cache of its own."""
    folder, _ = run
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    name = str(CHECKPOINTS / base) if (CHECKPOINTS / base).exists() else base

    def build():
        model = AutoModelForImageTextToText.from_pretrained(name)
        return model, AutoProcessor.from_pretrained(name)

    monkeypatch.setitem(assemble.RECIPES, "assembled-demo", assemble.Recipe(build, assemble.digest(build()[0])))
    monkeypatch.setattr(assemble, "HF_HOME", str(tmp_path / "cache"))
    return "assembled-demo"


@torch.no_grad()
def test_a_released_adapter_brings_its_base_back(run, recipe, tmp_path):
    folder, trained = run
    out = tmp_path / "released"
    done = CliRunner().invoke(app, ["release", str(folder), "--base", recipe, "--out", str(out)])
    assert done.exit_code == 0, done.output
    before, after = (load_file(place / "adapter_model.safetensors") for place in (folder, out))
    assert before.keys() == after.keys()
    for name, value in after.items():
        wanted = before[name] if "dms" in name.split(".") else before[name].bfloat16()
        assert value.dtype == wanted.dtype
        assert torch.equal(value, wanted)
    model, processor = load(out)
    assert (tmp_path / "cache" / "modeling-dms" / recipe / "config.json").exists()
    assert model.config.dms_config.weight_floor == 0.02
    batch = PromptCollator(processor)(load_samples("easy-vqa", "test", limit=3))
    found, expected = model.eval()(**batch).logits, trained(**batch).logits
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    torch.testing.assert_close(load(out)[0].eval()(**batch).logits, found)


@without_internvl
def test_another_base_is_refused(run, recipe, tmp_path, monkeypatch):
    folder, _ = run
    monkeypatch.setitem(assemble.RECIPES, recipe, assemble.Recipe(assemble.RECIPES[recipe].build, "0" * 64))
    with pytest.raises(ValueError, match="was not trained on assembled-demo"):
        release(folder, recipe, tmp_path / "out")
    with pytest.raises(ValueError, match="unknown base 'llava', expected one of "):
        release(folder, "llava", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@without_internvl
def test_an_adapter_that_version_0_1_calibrated_is_not_calibrated(run, tmp_path):
    folder, _ = run
    shutil.copytree(folder, tmp_path / "old")
    file = tmp_path / "old" / "adapter_model.safetensors"
    new = ("detectors.", "pixels.", "agreement.", "modalities.2")
    state = load_file(file)
    old = {n: v for n, v in state.items() if not any(f"dms.calibration.{part}" in n for part in new)}
    assert len(old) < len(state)
    old["base_model.model.dms.calibration.modalities.0.memory_bank"] = torch.ones(512, 64)
    save_file(old, file, {"format": "pt"})
    model, _ = load(tmp_path / "old")
    assert not model.dms.calibration.is_calibrated
