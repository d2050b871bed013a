"""Faults of machine and artefacts, really made: full disks, broken and malicious files. Each is told in one line, and
what was complete before stays so."""

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from modeling_dms import DMSLlavaForConditionalGeneration
from modeling_dms.training.cli import app
from modeling_dms.training.finetune.arguments import read_arguments
from modeling_dms.training.finetune.resume import last_complete_checkpoint, write_manifest
from modeling_dms.training.finetune.train import run_training
from modeling_dms.training.models.loading import CHECKPOINTS, load
from modeling_dms.training.publish.release import merge
from tests import tiny
from tests.training.conftest import calibrate_up_to


def told(*arguments):
    """The one line in which a command says what is wrong."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 1, done.output
    line = done.stderr.splitlines()[-1]  # behind the bars of progress
    assert line.startswith("error: "), done.output
    assert "Traceback" not in done.output
    return line


def asked(model):
    return ("predict", "--model", model, "--question", "what?", "--context", "a red box.")


# ---- malicious files


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "ran"


def poison(path, marker):
    torch.save({"weight": Malicious(marker)}, path)
    torch.load(path, weights_only=False)
    assert marker.exists(), "it would run"
    marker.unlink()


@pytest.mark.parametrize("way", ["alone", "indexed"])
def test_code_in_pickled_weights_does_not_run(tmp_path, marker, way):
    folder = shutil.copytree(CHECKPOINTS / "demo-llava", tmp_path / "model")
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    poison(folder / "pytorch_model.bin", marker)
    if way == "indexed":
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    told(*asked(folder))
    assert not marker.exists()


def test_code_in_a_pickled_adapter_does_not_run(tmp_path, marker):
    folder = tmp_path / "adapter"
    LoraConfig(base_model_name_or_path="demo-llava", target_modules=["q_proj"]).save_pretrained(folder)
    poison(folder / "adapter_model.bin", marker)
    assert "holds no adapter_model.safetensors" in told(*asked(folder))
    with pytest.raises(ValueError, match="safetensors only"):
        load(folder, merge=False)
    assert not marker.exists()


def command_line(data, output_dir, steps):
    fields = {"model": "demo-llava", "data": data, "output_dir": output_dir, "max_steps": steps, "save_steps": 1}
    fields |= {"calibration_samples": 0, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    fields |= {"per_device_train_batch_size": 2, "logging_steps": 1, "dms": '{"scheduler": "learned"}'}
    fields |= {"image_families": "blank", "text_families": "shuffle"}
    return [f"--{name}={value}" for name, value in fields.items()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A data set, and a run of three steps on it that has lost its last checkpoint."""
    root = tmp_path_factory.mktemp("faults")
    data = tiny.table(root / "data")
    run_training(read_arguments(None, command_line(data, root / "run", 3)))
    shutil.rmtree(root / "run" / "checkpoint-3")
    return data, root / "run"


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_code_in_the_files_of_a_run_does_not_run(finished, tmp_path, marker, file):
    data, run = finished
    run = shutil.copytree(run, tmp_path / "run")
    newest = run / "checkpoint-2"
    assert (newest / file).exists()
    poison(newest / file, marker)
    write_manifest(newest)  # whoever can write the one can write the other
    resumed = ("train", *command_line(data, run, 3), "--resume")
    if file == "training_args.bin":  # nothing reads it
        assert CliRunner().invoke(app, resumed).exit_code == 0
    else:
        assert "weights_only" in told(*resumed).lower() or "weights only" in told(*resumed).lower()
    assert not marker.exists()


# ---- broken files


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "cannot be read"


def emptied(folder):
    (folder / "model.safetensors").write_bytes(b"")
    return "cannot be read"


def rewritten(folder, change):
    path = folder / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("multi_modal_projector.linear_1.weight"))
    change(state, name)
    save_file(state, path, metadata={"format": "pt"})


def mis_shaped(folder):
    rewritten(folder, lambda state, name: state.update({name: state[name][:-1].contiguous()}))
    return "multi_modal_projector.linear_1.weight"


def incomplete(folder):
    rewritten(folder, lambda state, name: state.pop(name))
    return "multi_modal_projector.linear_1.weight"


def wrongly_typed(folder):
    path = folder / "config.json"
    written = json.loads(path.read_text())
    written["vision_config"]["hidden_size"] = "wide"
    path.write_text(json.dumps(written))
    return "'hidden_size' expected int"


def no_object(folder):
    (folder / "config.json").write_text("[1, 2]")
    return "config.json"


def no_json(folder):
    (folder / "config.json").write_text('{"model_type": "lla')
    return "config.json"


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return "tokenizer"


BROKEN = [truncated, emptied, mis_shaped, incomplete, wrongly_typed, no_object, no_json, without_tokenizer]


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_broken_checkpoint_is_refused_in_one_line(tmp_path, damage):
    folder = shutil.copytree(CHECKPOINTS / "demo-llava", tmp_path / "model")
    expected = damage(folder)
    assert expected in told(*asked(folder))


# ---- full disks


@contextlib.contextmanager
def disk(folder, kilobytes):
    """A file system of that size, at `folder`."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root alone, on Linux")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def leave(folder, kilobytes):
    """Fills the disk but for so much."""
    spare = shutil.disk_usage(folder).free - 1024 * kilobytes
    (folder / "filler").write_bytes(bytes(spare))


@torch.no_grad()
@pytest.mark.parametrize("kilobytes", [0, 4, 60, 250])
def test_a_save_on_a_full_disk_leaves_what_was_saved_before(tmp_path, kilobytes):
    """Whichever file is the first that has no room: configuration, code or weights."""
    model, inputs = tiny.build("llava-llama", scheduler="learned"), tiny.prompts("llava-llama")
    with disk(tmp_path / "disk", 2048) as root:
        folder = root / "model"
        model.save_pretrained(folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        tiny.stir(model)
        model.config.dms_config.kappa = 3.0
        leave(root, kilobytes)
        with pytest.raises(OSError, match=r"No space left"):
            model.save_pretrained(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        (root / "filler").unlink()
        old = DMSLlavaForConditionalGeneration.from_pretrained(folder)
        model.save_pretrained(folder)
        new = DMSLlavaForConditionalGeneration.from_pretrained(folder)
        assert (old.config.dms_config.kappa, new.config.dms_config.kappa) == (16.0, 3.0)
        assert not torch.equal(old(**inputs).logits, new(**inputs).logits)


def test_calibrating_onto_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    calibrate_up_to(monkeypatch, 1)
    with disk(tmp_path / "disk", 20_000) as root:
        folder = merge("demo-llava", root / "model")
        (folder / "README.md").write_text("Own words.")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        leave(root, 2_000)
        calibrated = ("calibrate", "--model", folder, "--data", "easy-vqa", "--out", folder, "--samples", 50)
        assert "No space left" in told(*calibrated)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert not load(folder)[0].dms.calibration.is_calibrated
        (root / "filler").unlink()
        done = CliRunner().invoke(app, list(map(str, calibrated)))
        assert done.exit_code == 0, done.output
        assert load(folder)[0].dms.calibration.is_calibrated
        assert (folder / "README.md").read_text() == "Own words."


def test_a_run_on_a_full_disk_goes_on_from_its_last_complete_checkpoint(tmp_path):
    data = tiny.table(tmp_path / "data")
    with disk(tmp_path / "disk", 20_000) as root:
        run = root / "run"
        assert "No space left" in told("train", *command_line(data, run, 4))
        assert not (run / "final").exists()
        complete = last_complete_checkpoint(run)
        assert complete.name == "checkpoint-2"
        assert (run / "checkpoint-3").exists()
        subprocess.run(["mount", "-o", "remount,size=100m", str(root)], check=True)
        done = CliRunner().invoke(app, ["train", *command_line(data, run, 4), "--resume"])
        assert done.exit_code == 0, done.output
        log = json.loads((run / "log.json").read_text())
        assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4]
        load(run / "final")


# ---- what is left of another save


def test_a_save_in_other_shards_leaves_none_of_those_before(tmp_path):
    model = tiny.build("llava-llama")
    for size, one_file in (("50KB", False), ("5GB", True), ("50KB", False)):
        tiny.stir(model.lm_head, seed=len(size) + one_file)
        model.save_pretrained(tmp_path, max_shard_size=size)
        (tmp_path / "notes.txt").write_text("mine")
        assert (tmp_path / "model.safetensors").exists() == one_file
        assert (tmp_path / "model.safetensors.index.json").exists() != one_file
        loaded = DMSLlavaForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
        assert Path(tmp_path / "notes.txt").exists()
