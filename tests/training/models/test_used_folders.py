"""Folders that are written to again: what was saved last is what loads, whatever was there before."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from modeling_dms.training.cli import app
from modeling_dms.training.finetune.trainer import DMSTrainer, DMSTrainingArguments
from modeling_dms.training.models.loading import load
from modeling_dms.training.models.request import checkpoint_digest
from modeling_dms.training.publish import release as releasing
from tests import tiny


pytestmark = pytest.mark.usefixtures("first_level_alone")


def command(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def works(*arguments):
    done = command(*arguments)
    assert done.exit_code == 0, done.output
    return done


def told(*arguments):
    """The one line in which a command says what is wrong."""
    done = command(*arguments)
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.output
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: "), done.output
    return line


def save_adapter(folder, base="demo-llava"):
    """An adapter of rank 2 that changes what its base answers."""
    model, processor = load(base)
    targets = r".*language_model.*\.(q_proj|v_proj)"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=["dms"]))
    tiny.stir(adapted, seed=3)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    adapted.base_model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def is_adapter(folder):
    whole, adapter = (folder / name for name in ("model.safetensors", "adapter_model.safetensors"))
    assert whole.exists() != adapter.exists()
    assert adapter.exists() == (folder / "adapter_config.json").exists()
    return adapter.exists()


def lora_run(folder, *more):
    data = folder.parent / "data"
    if not data.exists():
        tiny.table(data)
    options = "--model demo-llava --max_steps 1 --save_steps 1 --per_device_train_batch_size 2 --calibration_samples 0"
    options += " --use_cpu true --report_to none --disable_tqdm true --image_families blank --text_families shuffle"
    return ["train", *options.split(), "--data", str(data), "--output_dir", str(folder), *more]


LORA = ("--stage", "backbone", "--lora_rank", "2", "--schedule_target", "none", "--dms", '{"scheduler": "uniform"}')
SCHEDULER = ("--stage", "scheduler", "--dms", '{"scheduler": "learned"}')
WHOLE = ("--stage", "backbone", "--lora_rank", "0", *LORA[4:])


# ---- a whole checkpoint where an adapter was, and the reverse


def test_a_calibrated_checkpoint_replaces_an_adapter(tmp_path):
    folder = save_adapter(tmp_path / "model")
    works("calibrate", "--model", "demo-llava", "--data", "easy-vqa", "--samples", 60, "--out", folder)
    assert not is_adapter(folder)
    assert load(folder)[0].dms.calibration.is_calibrated


def test_a_calibrated_adapter_replaces_a_whole_checkpoint(tmp_path):
    adapter, folder = save_adapter(tmp_path / "adapter"), tmp_path / "model"
    load("demo-llava")[0].save_pretrained(folder, max_shard_size="1MB")
    works("calibrate", "--model", adapter, "--data", "easy-vqa", "--samples", 60, "--out", folder)
    assert not list(folder.glob("model*.safetensors*"))
    model, before = load(folder)[0], load(adapter)[0]
    assert model.dms.calibration.is_calibrated
    for (name, value), other in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(value, other), name


@torch.no_grad()
def test_an_adapter_is_merged_in_its_place(tmp_path):
    folder = save_adapter(tmp_path / "model")
    expected = load(folder)[0].state_dict()
    works("merge", folder, "--out", folder)
    assert not is_adapter(folder)
    found = load(folder)[0].state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("way", ["the model's", "the trainer's"])
def test_saves_of_a_users_own_code_replace_an_adapter(tmp_path, way):
    folder = save_adapter(tmp_path / "model")
    model, processor = load("demo-llava")
    tiny.stir(model.lm_head, seed=1)
    if way == "the model's":
        model.save_pretrained(folder)
    else:
        arguments = DMSTrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
        DMSTrainer(model, arguments, processing_class=processor).save_model(str(folder))
    assert not is_adapter(folder)
    assert torch.equal(load(folder)[0].lm_head.weight, model.lm_head.weight)


def test_runs_of_every_kind_in_one_folder(tmp_path):
    run = tmp_path / "run"
    for options, adapted in ((LORA, True), (SCHEDULER, False), (LORA, True), (WHOLE, False)):
        works(*lora_run(run, *options))
        for folder in (run / "final", run / "checkpoint-1"):
            assert is_adapter(folder) == adapted
            load(folder)
        assert not list(run.rglob(".saving-*"))


def test_a_released_adapter_replaces_a_whole_checkpoint(tmp_path, monkeypatch):
    from modeling_dms.training.models import assemble

    adapter, folder = save_adapter(tmp_path / "adapter"), tmp_path / "model"
    load("demo-llava")[0].save_pretrained(folder)
    recipe = assemble.Recipe(lambda: load("demo-llava"), assemble.digest(load("demo-llava")[0], without=("dms",)))
    monkeypatch.setitem(releasing.RECIPES, "assembled-demo", recipe)
    works("release", adapter, "--base", "assembled-demo", "--out", folder)
    assert is_adapter(folder)


def test_a_save_that_fails_leaves_the_adapter(tmp_path, monkeypatch):
    folder = save_adapter(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model, processor = load("demo-llava")

    def fails(*args, **kwargs):
        raise OSError("No space left")

    monkeypatch.setattr(type(processor), "save_pretrained", fails)
    assert "No space left" in told("merge", "demo-llava", "--out", folder)
    arguments = DMSTrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
    with pytest.raises(OSError, match="No space left"):
        DMSTrainer(model, arguments, processing_class=processor).save_model(str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_adapter_is_not_saved_over_its_base(tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    works("merge", "demo-llava", "--out", base)
    works(*lora_run(run, *WHOLE))
    adapter = save_adapter(tmp_path / "adapter", base)
    before = (base / "model.safetensors").read_bytes()
    for refused, place in (
        (("calibrate", "--model", adapter, "--data", "easy-vqa", "--samples", 60, "--out", base), base),
        (lora_run(run, *LORA, "--model", str(run / "final")), run / "final"),
        (lora_run(run, *LORA, "--model", str(run / "checkpoint-1")), run / "checkpoint-1"),
    ):
        assert f"{place} is the base" in told(*refused)
    assert (base / "model.safetensors").read_bytes() == before
    assert not is_adapter(run / "final")


# ---- folders that cannot be written to

COMMANDS = {
    "assemble": ("assemble", "llava-dinov2s-smollm2-135m", "--out"),
    "calibrate": ("calibrate", "--model", "demo-llava", "--data", "easy-vqa", "--out"),
    "demo": ("demo", "--backbone", "llava", "--samples", 50, "--out"),
    "evaluate": ("evaluate", "--model", "demo-llava", "--out"),
    "merge": ("merge", "demo-llava", "--out"),
    "release": ("release", "absent", "--base", "llava-dinov2s-smollm2-135m", "--out"),
    "train": ("train", "--model", "demo-llava", "--output_dir"),
}

# how the work of each begins
WORK = (
    "models.assemble.vision_tower",
    "apps.demo.load",
    "apps.demo.load_easy_vqa",
    "evaluate.run.load",
    "evaluate.run.load_samples",
    "publish.release.load",
    "finetune.calibrate.load",
    "finetune.calibrate.load_sources",
    "finetune.train.load",
    "finetune.train.load_sources",
)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_cannot_be_written_to_is_found_before_the_work(tmp_path, monkeypatch, name):
    def works(*args, **kwargs):
        raise AssertionError("the work has begun")

    for function in WORK:
        monkeypatch.setattr(f"modeling_dms.training.{function}", works)
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper" / "out", Path("/proc/nowhere/out")):
        assert f"{place} cannot be written to" in told(*COMMANDS[name], place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- cards of the model that was there


OWN = "\nMy own words.\n"


def with_results(folder, evaluated):
    """A card of results, and own text behind it."""
    path = folder / "README.md"
    works("card", folder, "--results", evaluated)
    text = path.read_text()
    assert "## Results" in text
    path.write_text(text + OWN)
    return path


def results_of(folder, name):
    """Results of an evaluation, as if of a checkpoint."""
    written = Path(__file__).parents[3] / "docs" / "results" / "photographs-llava" / "results.json"
    results = json.loads(written.read_text())
    results["run"] |= {"model": str(folder), "model_sha256": checkpoint_digest(folder)}
    name.write_text(json.dumps(results))
    return name


@pytest.mark.parametrize("way", ["calibrate", "merge", "train"])
def test_a_card_shows_no_results_of_the_model_before(tmp_path, way):
    run = tmp_path / "run"
    folder = run / "final" if way == "train" else tmp_path / "model"
    save_adapter(folder)
    path = with_results(folder, results_of(folder, tmp_path / "results.json"))
    assert ModelCard.load(path).data.library_name == "peft"
    if way == "calibrate":
        works("calibrate", "--model", "demo-llava", "--data", "easy-vqa", "--samples", 60, "--out", folder)
    elif way == "merge":
        works("merge", folder, "--out", folder)
    else:
        works(*lora_run(run, *SCHEDULER))
    card = ModelCard.load(path)
    assert "## Results" not in card.text
    assert not card.data.eval_results
    assert card.text.endswith(OWN)
    assert card.data.library_name == "transformers"
    assert f"# {run.name if way == 'train' else folder.name}\n" in card.text
    assert "This is an adapter" not in card.text


def test_an_own_card_is_kept_where_an_adapter_is_saved(tmp_path):
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    (run / "final" / "README.md").write_text(f"---\nlicense: mit\n---\n{OWN}")
    works(*lora_run(run, *LORA))
    card = ModelCard.load(run / "final" / "README.md")
    assert "My own words." in card.text
    assert card.data.license == "mit"
    assert load_file(run / "final" / "adapter_model.safetensors")
