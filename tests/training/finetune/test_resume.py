"""Which checkpoint a run goes on from, and that a killed run ends as if nothing had happened."""

import json
import logging
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from modeling_dms.training.cli import app
from modeling_dms.training.finetune.arguments import read_arguments
from modeling_dms.training.finetune.resume import MANIFEST, last_complete_checkpoint, whats_wrong, write_manifest
from modeling_dms.training.finetune.train import run_training
from modeling_dms.training.finetune.trainer import DMSTrainer
from modeling_dms.training.models.loading import load
from modeling_dms.training.models.request import write_request
from tests import processes, tiny


ROOT = Path(__file__).parents[3]


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


# ---- which checkpoint is of the same run


def of_run(run, step, request):
    """A checkpoint that says what it was made by."""
    folder = checkpoint(run, step, complete=False)
    write_request(folder, request)
    write_manifest(folder)
    return folder


ASKED = {"seed": 2, "rates": (0.1, 0.2), "model": {"name": "b", "sha256": ["abc"]}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "it was made with seed 1, this run asks for seed 2"),
        ({"rates": [0.1]}, r"made with rates \[0.1\], this run asks for rates \[0.1, 0.2\]"),
        ({"model": {"name": "a", "sha256": ["123"]}}, "made with model 'a', this run asks for model 'b'"),
        ({"model": {"name": "b", "sha256": ["123"]}}, "asks for model 'b', which has changed since"),
        (None, r"no request\.json in it"),
    ],
)
def test_the_newest_checkpoint_of_the_same_run_wins_over_newer_ones_of_others(tmp_path, caplog, changes, told):
    other = of_run(tmp_path, 8, None if changes is None else {**ASKED, **changes})
    with pytest.raises(ValueError, match=f"{other}: .*{told}.*another output_dir") as raised:
        last_complete_checkpoint(tmp_path, ASKED)
    assert "checkpoint-8" in str(raised.value)
    own = of_run(tmp_path, 2, ASKED)
    of_run(tmp_path, 1, ASKED)
    assert last_complete_checkpoint(tmp_path, ASKED) == own
    assert re.search(f"{other} is skipped: .*{told}", caplog.text)
    assert last_complete_checkpoint(tmp_path) == other  # who asks for none of a run takes any


def test_a_name_and_choices_of_another_version_do_not_make_another_run(tmp_path):
    newest = of_run(tmp_path, 4, {**ASKED, "model": {"name": "./b", "sha256": ["abc"]}, "gone": 1})
    assert last_complete_checkpoint(tmp_path, {**ASKED, "new": 2}) == newest


def test_an_incomplete_checkpoint_of_another_run_does_not_keep_one_from_starting(tmp_path):
    truncate(of_run(tmp_path, 8, {**ASKED, "seed": 1}))
    checkpoint(tmp_path, 9, complete=False)
    assert last_complete_checkpoint(tmp_path, ASKED) is None


# ---- killed runs

# the method of the trainer in which, and the step at which, the process kills itself
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


def trained_until(method, step, line):
    original = getattr(DMSTrainer, method)

    def killed(self, *args, **kwargs):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    setattr(DMSTrainer, method, killed)
    run_training(read_arguments(None, line))


def kill(name, folder, method, step):
    assert processes.run(trained_until, method, step, command_line(name, folder)) == [-signal.SIGKILL]
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
        ("scheduler-blip2", "compute_loss", 7, "checkpoint-6"),
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


def test_a_truncated_checkpoint_is_not_resumed_from(tmp_path, undisturbed, caplog):
    name = "joint"
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


# ---- one folder, several runs


def short(run, **changes):
    """The options of a run of four steps, on data beside its folder."""
    data = run.parent / "data"
    if not data.exists():
        tiny.table(data)
    given = {**_SHARED, **RUNS["scheduler"], "data": str(data), "output_dir": str(run), "max_steps": "4"}
    line = []
    for field, value in {**given, "logging_steps": "2", "per_device_train_batch_size": "2", **changes}.items():
        line += [f"--{field}", *([value] if isinstance(value, str) else value)]
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    run_training(read_arguments(None, short(run)))
    return run


def another_model(tmp_path):
    model, processor = load("demo-llava")
    tiny.stir(model.lm_head)
    model.save_pretrained(tmp_path / "other"), processor.save_pretrained(tmp_path / "other")
    return {"model": str(tmp_path / "other")}


def reworded(tmp_path):
    table = tmp_path / "data" / "table.jsonl"
    table.write_text(table.read_text().replace('"box"', '"circle"', 1))
    return {}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": "7"}, "seed 42, this run asks for seed 7"),
        ({"learning_rate": "2e-3"}, "learning_rate 0.001, .* learning_rate 0.002"),
        ({"max_steps": "6"}, "max_steps 4, this run asks for max_steps 6"),
        ({"per_device_train_batch_size": "4"}, "per_device_train_batch_size 2"),
        ({"image_families": ("blank",)}, r"image_families \[.*, this run asks for image_families \['blank'\]"),
        ({"dms": '{"scheduler": "learned", "kappa": 2.0}'}, "dms .*kappa"),
        (another_model, "model 'demo-llava', this run asks for model '.*other'"),
        (reworded, "data '.*data', this run asks for data '.*data'"),
    ],
)
def test_a_run_does_not_go_on_from_checkpoints_of_another(finished, tmp_path, changes, told):
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run"
    changes = changes(tmp_path) if callable(changes) else changes
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = CliRunner().invoke(app, ["train", *short(run, **changes), "--resume"])
    assert result.exit_code == 1, result.output
    error = result.stderr.splitlines()[-1]
    assert re.match(f"error: no checkpoint of this run.*{run}/checkpoint-4: it was made with .*{told}", error), error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_choices_that_the_weights_do_not_depend_on_may_differ(finished, tmp_path):
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run"
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoint-4")
    free = {"logging_steps": "1", "save_steps": "3", "save_total_limit": "2", "dataloader_num_workers": "1"}
    result = CliRunner().invoke(app, ["train", *short(run, **free, run_name="again"), "--resume"])
    assert result.exit_code == 0, result.output
    assert json.loads((run / "run.json").read_text())["steps"] == [2, 4]
    weights, expected = outcome(run)[0], outcome(finished)[0]
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def test_a_killed_run_goes_on_beside_a_finished_one(finished, tmp_path, monkeypatch):
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    alone, run = tmp_path / "alone", tmp_path / "run"
    other = {"seed": "7", "learning_rate": "2e-3"}
    run_training(read_arguments(None, short(alone, **other)))
    real = DMSTrainer.compute_loss

    def stops(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(DMSTrainer, "compute_loss", stops)
        with pytest.raises(KeyboardInterrupt):
            run_training(read_arguments(None, short(run, **other)))
    run_training(read_arguments(None, short(run, **other)), resume=True)
    weights, losses = outcome(run)
    expected, expected_losses = outcome(alone)
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert losses == expected_losses
    record = json.loads((run / "run.json").read_text())
    assert (record["steps"], record["arguments"]["seed"]) == ([2, 4], 7)


def test_the_record_and_the_card_are_of_the_run_that_is_resumed(finished, tmp_path):
    """A shorter run in its folder has left the last checkpoint of a finished one, but not its record."""
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run"
    run_training(read_arguments(None, short(run, seed="7", max_steps="2")))
    run_training(read_arguments(None, short(run)), resume=True)
    weights, expected = outcome(run)[0], outcome(finished)[0]
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert json.loads((run / "run.json").read_text())["arguments"]["seed"] == 42
    assert "| `seed` | `42` |" in (run / "final" / "README.md").read_text()


def test_a_users_own_trainer_resumes_from_its_checkpoints(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    trainer = run_training(read_arguments(None, short(tmp_path / "new")))
    trainer.args.output_dir, trainer.request = str(run), None
    trainer.args.max_steps = 6
    assert trainer.train(resume_from_checkpoint=True).global_step == 6
    assert not (run / "checkpoint-6" / "request.json").exists()
    assert last_complete_checkpoint(run) == run / "checkpoint-6"
