"""Pushing to a server on this machine that speaks the Hub's endpoints, and loading from it without this package."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard, constants, file_download
from huggingface_hub.utils import close_session
from safetensors.torch import load_file
from transformers.utils import hub as transformers_hub
from typer.testing import CliRunner

from modeling_dms.training.cli import app
from modeling_dms.training.data import PromptCollator, load_samples
from modeling_dms.training.finetune.trainer import DMSTrainer, DMSTrainingArguments
from modeling_dms.training.models.loading import CHECKPOINTS, load
from modeling_dms.training.models.request import checkpoint_digest, model_request
from modeling_dms.training.publish.release import merge
from tests import hub_server, tiny


REPO = "me/my-model"

# What runs where `modeling_dms` cannot be imported.
_ELSEWHERE = (
    tiny.BLOCKED
    + """

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

inputs = torch.load(sys.argv[1], weights_only=True)
logits = {}
for repo in sys.argv[3:]:
    model, info = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        logits[repo] = model(**inputs).logits
processor = AutoProcessor.from_pretrained(sys.argv[3])
logits["token"] = torch.tensor(processor.tokenizer.encode("<image>"))
torch.save(logits, sys.argv[2])
"""
)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_server.Hub() as server:
        point_at(server.url, monkeypatch, tmp_path)
        yield server
    close_session()


def point_at(url, monkeypatch, tmp_path):
    """Makes `huggingface_hub` of this process call another server, with a token, and without the Xet protocol."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    close_session()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The demo's LLaVA as a DMS checkpoint, with its processor."""
    folder = tmp_path_factory.mktemp("saved") / "demo"
    return merge("demo-llava", folder)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "demo")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def push(*arguments):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


@torch.no_grad()
def test_what_was_pushed_loads_without_this_package(hub, folder, tmp_path):
    (folder / "training_args.bin").write_bytes(b"a pickle")
    before = contents(folder)
    done = push(folder, "--repo", REPO, "--private")
    assert done.exit_code == 0, done.output
    repository = hub.repositories[REPO]
    assert done.output.strip() == f"pushed: {hub.url}/{REPO}/commit/{repository.sha}"
    assert contents(folder) == before
    assert repository.private
    (commit,) = repository.commits
    assert commit["files"] == sorted({*before, "README.md"} - {"training_args.bin"})
    assert ModelCard(repository.files["README.md"].decode()).data.library_name == "transformers"
    assert f'name = "{REPO.split("/")[1]}"' in repository.files["README.md"].decode()

    # a folder without code gets it; a model pushes itself
    model, processor = load(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    assert push(folder, "--repo", "me/bare").exit_code == 0
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    model.push_to_hub("me/itself")
    processor.push_to_hub("me/itself")
    model.save_pretrained(tmp_path / "pushed", push_to_hub=True, repo_id="me/saved")
    processor.push_to_hub("me/saved")

    inputs = dict(PromptCollator(processor)(load_samples("easy-vqa", "test", limit=2)))
    expected = model.eval()(**inputs).logits
    script, given, found = tmp_path / "script.py", tmp_path / "inputs.pt", tmp_path / "logits.pt"
    script.write_text(_ELSEWHERE)
    torch.save(inputs, given)
    home = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    env = {**os.environ, **home, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for name in ("PYTHONPATH", "HF_TOKEN", "HF_MODULES_CACHE", "HF_HUB_CACHE"):
        env.pop(name, None)
    repos = [REPO, "me/bare", "me/itself", "me/saved"]
    command = [sys.executable, "-I", str(script), str(given), str(found), *repos]
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    logits = torch.load(found, weights_only=True)
    for repo in repos:
        torch.testing.assert_close(logits[repo], expected, atol=1e-5, rtol=1e-5)
    assert logits["token"].tolist() == processor.tokenizer.encode("<image>")


def test_a_card_keeps_its_own_text_wherever_it_lies(hub, folder):
    assert push(folder, "--repo", REPO).exit_code == 0
    files = hub.repositories[REPO].files
    # someone edits it on the Hub
    card = ModelCard(files["README.md"].decode())
    card.text += "\nWritten on the Hub.\n"
    card.data["license"] = "mit"
    card.data["language"] = "en"
    hub.repositories[REPO].commit({"README.md": str(card).encode()})
    assert push(folder, "--repo", REPO).exit_code == 0
    card = ModelCard(files["README.md"].decode())
    assert card.text.endswith("<!-- dms:end -->\n\nWritten on the Hub.\n")
    assert (card.data.license, card.data.language) == ("mit", "en")
    # the folder's own text and fields win, others of the Hub's stay
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- mine\n---\nOwn words.\n")
    assert push(folder, "--repo", REPO).exit_code == 0
    card = ModelCard(files["README.md"].decode())
    assert card.text.startswith("Own words.\n\n<!-- dms:begin -->\n# my-model\n")
    assert (card.data.license, card.data.language) == ("apache-2.0", "en")
    assert {"dms", "mine"} <= set(card.data.tags)
    assert (folder / "README.md").read_text() == "---\nlicense: apache-2.0\ntags:\n- mine\n---\nOwn words.\n"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("no token", "pushing needs a token"),
        ("wrong token", "401"),
        ("unreachable", "nothing was pushed to me/my-model"),
        ("/api/repos/create", "500"),
        ("/api/models/me/my-model/commit", "500"),
        ("/objects", "nothing was pushed to me/my-model"),
        ("bad card", 'Invalid metadata in README.md. - "base_model" with value "no id" is not valid'),
        ("no checkpoint", "holds no config.json"),
    ],
)
def test_faults_are_told_in_one_line_and_lose_nothing(fault, told, hub, folder, tmp_path, monkeypatch):
    if fault == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif fault == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif fault == "unreachable":
        point_at("http://127.0.0.1:9", monkeypatch, tmp_path)
    elif fault == "bad card":
        (folder / "README.md").write_text("---\nbase_model: no id\n---\nx")
    elif fault == "no checkpoint":
        (folder / "config.json").unlink()
    else:
        hub.faults[fault] = 400 if fault == "/objects" else 500
    before = contents(folder)
    done = push(folder, "--repo", REPO)
    assert done.exit_code == 1
    assert told in done.output
    assert done.output.startswith("error: ")
    assert len(done.output.strip().splitlines()) == 1
    assert contents(folder) == before
    assert all(not repository.commits for repository in hub.repositories.values())


def test_a_trainer_pushes_the_same_card(hub, folder, tmp_path):
    model, processor = load(folder)
    out = tmp_path / "run"
    arguments = DMSTrainingArguments(output_dir=str(out), hub_model_id=REPO, use_cpu=True, report_to=[])
    trainer = DMSTrainer(model=model, args=arguments, processing_class=processor)
    trainer.push_to_hub(license="mit", language="en", tags="mine")
    repository = hub.repositories[REPO]
    card = ModelCard(repository.files["README.md"].decode())
    assert {"model.safetensors", "config.json", "tokenizer.json", "modeling_dms_llava.py"} <= set(repository.files)
    assert push(folder, "--repo", "you/my-model").exit_code == 0
    other = ModelCard(hub.repositories["you/my-model"].files["README.md"].decode())
    assert card.text == other.text
    assert card.data.to_dict() == {**other.data.to_dict(), "license": "mit", "language": "en", "tags": card.data.tags}
    assert card.data.tags == [*other.data.tags, "mine"]


def test_a_run_is_pushed_after_all_is_written(hub, tmp_path):
    out = tmp_path / "my-run"
    command = f"--output_dir {out} --model demo-llava --stage bridge --calibration_samples 0 --schedule_target none "
    command += f"--data {tiny.table(tmp_path / 'data')} --max_steps 1 --per_device_train_batch_size 4 --use_cpu true "
    command += "--report_to none --save_strategy no --push_to_hub true"
    hub.faults["/api/models/me/my-run/commit"] = 500
    arguments = ["train", *command.split(), "--dms", '{"scheduler": "uniform"}']
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "error: nothing was pushed to me/my-run" in done.output
    assert "Traceback" not in done.output
    written = {path.name for path in out.rglob("*")}
    assert {"model.safetensors", "README.md", "log.json", "run.json", "curves.png", "my-run-curves.png"} <= written
    hub.faults.clear()
    assert push(out / "final", "--repo", "me/my-run").exit_code == 0
    files = hub.repositories["me/my-run"].files
    assert files["README.md"] == (out / "final" / "README.md").read_bytes()
    assert files["my-run-curves.png"] == (out / "curves.png").read_bytes()
    assert b"1 steps on 12 samples" in files["README.md"]


@torch.no_grad()
def test_an_adapter_is_loaded_from_the_hub(hub, folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, _ = load(folder, {"scheduler": "uniform", "weight_floor": 0.03})
    model.config.save_pretrained(tmp_path / "adapter")
    targets = r".*language_model.*\.(q_proj|v_proj)"
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert push(tmp_path / "adapter", "--repo", REPO).exit_code == 0
    files = hub.repositories[REPO].files
    assert "config.json" in files
    assert not [name for name in files if name.endswith(".py")]
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft"
    assert card.data.base_model is None  # a folder here
    assert "[More Information Needed]" not in card.text
    loaded, _ = load(REPO, merge=False)
    assert loaded.get_base_model().config.dms_config.weight_floor == 0.03
    assert model_request(REPO)["sha256"] == [checkpoint_digest(place) for place in (tmp_path / "adapter", folder)]
    for name, value in loaded.state_dict().items():
        if "lora" in name:
            assert torch.equal(value, state[name.replace(".default", "")])


def test_a_checkpoint_on_the_hub_is_the_folder_that_was_pushed(hub, folder):
    assert push(folder, "--repo", REPO).exit_code == 0
    load(REPO)
    asked = model_request(REPO)
    assert asked == {"name": REPO, "sha256": [checkpoint_digest(folder)]}
    hub.repositories[REPO].files["config.json"] += b"\n"  # a later commit, which is not what was loaded
    assert model_request(REPO) == asked


def test_file_download_knows_the_endpoint_of_these_tests(hub):
    assert file_download.hf_hub_url(REPO, "x").startswith(hub.url)


@pytest.mark.parametrize(
    ("base", "named"), [(str(CHECKPOINTS / "demo-llava"), "demo-llava"), ("me/base", "me/base"), ("here/base", None)]
)
def test_the_base_of_an_adapter_is_named_as_it_is_called_anywhere(hub, tmp_path, monkeypatch, caplog, base, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "base").mkdir(parents=True)
    folder = tmp_path / "adapter"
    tiny.build("llava-llama", scheduler="rule").config.save_pretrained(folder)
    described = {"base_model_name_or_path": base, "r": 2, "lora_alpha": 2, "modules_to_save": ["dms"]}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    done = push(folder, "--repo", REPO)
    assert done.exit_code == 0, done.output
    pushed = json.loads(hub.repositories[REPO].files["adapter_config.json"])
    assert pushed == {**described, "base_model_name_or_path": named or base}
    assert json.loads((folder / "adapter_config.json").read_text()) == described
    assert ("somebody else's repository" in caplog.text) == (named is None)
