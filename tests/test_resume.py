"""Which checkpoint a run goes on from, and that a killed run ends as if nothing had happened."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from modeling_dms.training.arguments import read_arguments
from modeling_dms.training.cli import app
from modeling_dms.training.resume import MANIFEST, last_complete_checkpoint, whats_wrong, write_manifest
from modeling_dms.training.train import run_training


ROOT = Path(__file__).parent.parent


# ---- which checkpoint is complete


def checkpoint(run, step, complete=True):
    folder = run / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "inner" / "shard.bin").write_bytes(b"")
    if complete:
        write_manifest(folder)
    return folder


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return r"model\.safetensors has 1023 bytes instead of 1024"


def remove(folder):
    (folder / "inner" / "shard.bin").unlink()
    return r"inner/shard\.bin is missing"


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    return r"model\.safetensors is damaged"


def remove_the_manifest(folder):
    (folder / MANIFEST).unlink()
    return "not saved to its end"


def leave_a_draft(folder):
    (folder / MANIFEST).rename(folder / f"{MANIFEST}.tmp")
    return "not saved to its end"


def truncate_the_manifest(folder):
    path = folder / MANIFEST
    path.write_text(path.read_text()[:40])
    return f"{MANIFEST} cannot be read"


def empty_the_manifest(folder):
    (folder / MANIFEST).write_text("")
    return f"{MANIFEST} cannot be read"


def zero_the_manifest(folder):
    """What a power cut leaves of a file on many file systems."""
    (folder / MANIFEST).write_bytes(b"\0" * 100)
    return f"{MANIFEST} cannot be read"


def another_manifest(folder):
    (folder / MANIFEST).write_text('["model.safetensors"]')
    return f"{MANIFEST} cannot be read"


def binary_manifest(folder):
    (folder / MANIFEST).write_bytes(b"\xff\xfe{}")
    return f"{MANIFEST} cannot be read"


DAMAGES = [
    truncate,
    remove,
    flip_a_bit,
    remove_the_manifest,
    leave_a_draft,
    truncate_the_manifest,
    empty_the_manifest,
    zero_the_manifest,
    another_manifest,
    binary_manifest,
]


def test_the_manifest_lists_every_file(tmp_path):
    folder = checkpoint(tmp_path, 1)
    listed = json.loads((folder / MANIFEST).read_text())
    assert set(listed) == {"model.safetensors", "trainer_state.json", "inner/shard.bin"}
    assert listed["model.safetensors"]["size"] == 1024
    assert whats_wrong(folder) is None
    assert not (folder / f"{MANIFEST}.tmp").exists()
    # written again it does not list itself
    write_manifest(folder)
    assert whats_wrong(folder) is None


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, caplog, damage):
    older, newer = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    assert last_complete_checkpoint(tmp_path) == newer
    problem = damage(newer)
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(tmp_path) == older
    (warning,) = caplog.messages
    assert str(newer) in warning
    assert re.search(problem, warning)


def test_several_newer_broken_ones_are_each_named(tmp_path, caplog):
    folders = {step: checkpoint(tmp_path, step) for step in (1, 2, 9, 10, 11)}
    for step, damage in {11: truncate, 10: remove_the_manifest, 9: flip_a_bit}.items():
        damage(folders[step])
    truncate(folders[1])  # older than the one that is found: nobody asks
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(tmp_path) == folders[2]
    assert len(caplog.messages) == 3
    for step, message in zip((11, 10, 9), caplog.messages, strict=True):
        assert f"{folders[step]} is skipped" in message


def test_numbers_are_compared_as_numbers(tmp_path):
    for step in (9, 10, 100):
        checkpoint(tmp_path, step)
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-100"
    truncate(tmp_path / "checkpoint-100")
    assert last_complete_checkpoint(str(tmp_path)).name == "checkpoint-10"


def test_without_a_complete_checkpoint(tmp_path, caplog):
    assert last_complete_checkpoint(tmp_path / "absent") is None
    assert last_complete_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 3, complete=False)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert last_complete_checkpoint(tmp_path) is None
    assert len(caplog.messages) == 2


# ---- killed runs

# the method of the trainer in which, and the step at which, the process kills itself
_KILLED = """
import os, signal, sys

from modeling_dms.training.arguments import read_arguments
from modeling_dms.training.train import run_training
from modeling_dms.training.trainer import DMSTrainer

name, step = sys.argv[1], int(sys.argv[2])
original = getattr(DMSTrainer, name)

def killed(self, *args, **kwargs):
    if self.state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)

setattr(DMSTrainer, name, killed)
run_training(read_arguments(None, sys.argv[3:]))
"""

# 6 steps an epoch
_SHARED = {
    "max_samples": "24",
    "calibration_samples": "0",
    "image_families": ("blank", "occlusion", "missing"),
    "text_families": ("shuffle", "missing"),
    "use_cpu": "true",
    "report_to": "none",
    "disable_tqdm": "true",
    "max_steps": "9",
    "save_steps": "2",
    "logging_steps": "1",
    "per_device_train_batch_size": "4",
    "learning_rate": "1e-3",
    "dms": '{"scheduler": "learned"}',
}
RUNS = {
    "scheduler": {"model": "demo-llava", "stage": "scheduler", "feature_cache_gb": "1"},
    # the Q-Former has dropout
    "scheduler-blip2": {"model": "demo-blip2", "stage": "scheduler", "feature_cache_gb": "1"},
    "joint": {"model": "demo-llava", "stage": "joint", "lora_rank": "2", "save_total_limit": "1"},
}


def command_line(name, folder):
    line = []
    for field, value in {**_SHARED, **RUNS[name], "output_dir": str(folder)}.items():
        line += [f"--{field}", *([value] if isinstance(value, str) else value)]
    return line


def outcome(folder):
    """Weights and losses of a finished run."""
    final = folder / "final"
    files = [*final.glob("model*.safetensors"), *final.glob("adapter_model.safetensors")]
    losses = [row["loss"] for row in json.loads((folder / "log.json").read_text()) if "loss" in row]
    return load_file(files[0]), losses


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    made = {}

    def run(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            run_training(read_arguments(None, command_line(name, folder)))
            made[name] = outcome(folder)
        return made[name]

    return run


def kill(name, folder, method, step):
    command = [sys.executable, "-c", _KILLED, method, str(step), *command_line(name, folder)]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert not (folder / "final").exists()


def check_resumed(name, folder, undisturbed):
    result = CliRunner().invoke(app, ["train", *command_line(name, folder), "--resume"])
    assert result.exit_code == 0, result.stderr
    expected, losses = undisturbed(name)
    weights, resumed_losses = outcome(folder)
    assert weights.keys() == expected.keys()
    different = [key for key, value in weights.items() if not torch.equal(value, expected[key])]
    assert not different
    assert resumed_losses == losses
    assert len(losses) == 9


@pytest.mark.parametrize(
    ("name", "method", "step", "complete"),
    [
        ("scheduler", "compute_loss", 5, "checkpoint-4"),
        ("scheduler", "_save_rng_state", 4, "checkpoint-2"),
        ("scheduler-blip2", "compute_loss", 7, "checkpoint-6"),
        ("joint", "compute_loss", 7, "checkpoint-6"),
        # with a limit of one the older checkpoint must outlive the save
        ("joint", "_save_optimizer_and_scheduler", 4, "checkpoint-2"),
    ],
)
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path, undisturbed, name, method, step, complete):
    kill(name, tmp_path, method, step)
    if method.startswith("_save"):
        broken = tmp_path / f"checkpoint-{step}"
        assert list(broken.glob("*model*.safetensors"))
        assert not (broken / MANIFEST).exists()
    assert last_complete_checkpoint(tmp_path) == tmp_path / complete
    check_resumed(name, tmp_path, undisturbed)


@pytest.mark.parametrize("name", ["scheduler", "joint"])
def test_a_truncated_checkpoint_is_not_resumed_from(tmp_path, undisturbed, caplog, name):
    run_training(read_arguments(None, [*command_line(name, tmp_path), "--save_total_limit", "3"]))
    shutil.rmtree(tmp_path / "final")
    file = next((tmp_path / "checkpoint-9").glob("*model.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    file = next((tmp_path / "checkpoint-8").glob("*model.safetensors"))
    file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])
    check_resumed(name, tmp_path, undisturbed)
    skipped = [message for message in caplog.messages if "is skipped" in message]
    assert len(skipped) == 2
    assert all("bytes instead of" in message for message in skipped)


def test_resuming_where_nothing_was_saved_starts_anew(tmp_path, undisturbed):
    check_resumed("scheduler", tmp_path, undisturbed)


def test_resuming_a_finished_run_changes_nothing(tmp_path, undisturbed):
    run_training(read_arguments(None, command_line("joint", tmp_path)))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-9"]
    check_resumed("joint", tmp_path, undisturbed)


def test_a_different_seed_ends_elsewhere(tmp_path, undisturbed):
    """The comparisons above can fail."""
    run_training(read_arguments(None, [*command_line("scheduler", tmp_path), "--seed", "43"]))
    weights, losses = outcome(tmp_path)
    expected, expected_losses = undisturbed("scheduler")
    assert losses != expected_losses
    assert not torch.equal(weights["dms.scheduler.output.weight"], expected["dms.scheduler.output.weight"])
