"""Which versions of other libraries are supported, and what is said of one that is too old."""

import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from transformers import DynamicCache
from typer.testing import CliRunner

from modeling_dms._compat import CACHE, FLOORS, require
from modeling_dms.observe.layers import kept_states
from modeling_dms.training.cli import app
from modeling_dms.training.finetune.stages import prepare
from modeling_dms.training.models.loading import load
from tests import tiny


ROOT = Path(__file__).resolve().parent.parent
OLD = {"torch": "2.9.1+cpu", "transformers": "5.19.0", "peft": "0.19.1", "accelerate": "1.9.0"}
# begins a script: there one package says that it is older than it is
_OLDER = """
import importlib.metadata
import sys

read, (package, old) = importlib.metadata.version, sys.argv[1:3]
importlib.metadata.version = lambda name: old if name == package else read(name)
"""


def error_line(package):
    """What is said of the version in `OLD`, as one line."""
    needed = f"{package}>={FLOORS[package]}"
    return f'modeling_dms needs {needed}, found {OLD[package]}: pip install "{needed}"'


@pytest.fixture
def older(monkeypatch):
    """Makes a package say that it has the version in `OLD`."""
    read = importlib.metadata.version

    def make(package):
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: OLD[package] if name == package else read(name)
        )

    return make


# ---- one statement, three files


def requirements():
    """What installing this clone asks for, of `FLOORS`, in any extra."""
    found = re.findall(r'"((?:torch|transformers|peft|accelerate)[<>=][^"]*)"', (ROOT / "setup.py").read_text())
    return [Requirement(text) for text in found]


def test_setup_asks_for_the_floors():
    asked = requirements()
    assert {r.name for r in asked} == set(FLOORS)
    for requirement in asked:
        floor = next(s.version for s in requirement.specifier if s.operator == ">=")
        assert floor == FLOORS[requirement.name]


def test_the_lower_constraints_are_the_floors():
    lines = (ROOT / "constraints-lower.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert {name: pins[name] for name in FLOORS if name != "torch"} == {
        name: f"{floor}.0" for name, floor in FLOORS.items() if name != "torch"
    }


# ---- versions that are too old


@pytest.mark.parametrize(
    ("package", "found"),
    [
        ("torch", "2.10.0+cpu"),
        ("torch", "2.10.0a0+b4e4ee8"),  # as vendors of hardware build it
        ("torch", "2.13.0"),
        ("transformers", "5.20.0"),
        ("transformers", "5.24.0.dev0"),
        ("peft", "0.100.0"),
        ("accelerate", "2.0"),
    ],
)
def test_new_enough(monkeypatch, package, found):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    require(package)


@pytest.mark.parametrize("package", FLOORS)
def test_too_old(older, package):
    older(package)
    with pytest.raises(ImportError) as raised:
        require(package)
    assert str(raised.value) == error_line(package)


def test_missing(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=r'^modeling_dms needs peft>=0.20, found none: pip install "peft>=0.20"$'):
        require("peft")


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_importing_the_package_names_it_before_anything_else_is_imported(package, tmp_path):
    script = f"""{_OLDER}
try:
    import modeling_dms
except ImportError as error:
    print(error)
assert not {{"torch", "transformers", "huggingface_hub"}} & set(sys.modules)
"""
    command = [sys.executable, "-c", script, package, OLD[package]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == error_line(package)


def test_exported_code_names_it_too(tmp_path):
    tiny.build("llava-llama").save_pretrained(tmp_path / "model")
    # as with 5.19: there is no `SubConfigSpec`
    script = f"""{_OLDER}{tiny.BLOCKED}
import transformers.configuration_utils
from transformers import AutoConfig

del transformers.configuration_utils.SubConfigSpec
try:
    AutoConfig.from_pretrained(sys.argv[3], trust_remote_code=True)
except ImportError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, "transformers", OLD["transformers"], str(tmp_path / "model")]
    env = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == error_line("transformers")


def test_adapters_need_peft(older, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "demo-llava"}')
    older("peft")
    with pytest.raises(ImportError, match="needs peft>="):
        load(tmp_path)
    with pytest.raises(ImportError, match="needs peft>="):
        prepare(tiny.build("llava-llama", scheduler="learned"), "joint", lora_rank=2)


@pytest.mark.parametrize(
    "command", ["train --config demo-scheduler --max_steps 1 --use_cpu true", "evaluate --model demo-llava"]
)
def test_training_and_evaluation_need_accelerate(older, tmp_path, command):
    older("accelerate")
    out = "--output_dir" if command.startswith("train") else "--out"
    done = CliRunner().invoke(app, [*command.split(), out, str(tmp_path / "out")])
    assert done.exit_code == 1
    assert done.output.strip().splitlines()[-1] == f"error: {error_line('accelerate')}"


# ---- what differs between versions


@pytest.mark.parametrize("backbone", ["llava-llama", "blip2-opt"])
def test_the_cache_has_the_name_of_this_transformers(backbone):
    """And the old one goes on working where it is deprecated, as in the vanilla class."""
    model, inputs = tiny.shared(backbone, scheduler="learned", stirred=True), tiny.prompts(backbone)
    logits = []
    for name in (CACHE, "past_key_values"):
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        with torch.no_grad():
            prefill = model(**inputs, **{name: cache})
            assert cache.get_seq_length() == inputs["input_ids"].shape[1]
            carried = {"modality_weights": prefill.modality_weights, "modality_ids": prefill.modality_ids}
            step = torch.full((len(inputs["input_ids"]), 1), 10)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(step)], 1)
            logits.append(model(input_ids=step, attention_mask=mask, **carried, **{name: cache}).logits)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 1
    assert torch.equal(*logits)
    assert CACHE == "past_key_values" or "past_key_values" not in inspect.signature(model.forward).parameters


def test_all_hidden_states_that_are_needed_are_kept():
    model, pixels = tiny.shared("internvl-qwen3"), tiny.prompts("internvl-qwen3")["pixel_values"]
    tower = model.model.vision_tower
    kept, _ = kept_states(lambda: tower(pixel_values=pixels), model._vision_layers)
    every = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert len(kept) == len(model._vision_layers) > 1
    for layer, states in zip(model._vision_layers, kept, strict=True):
        assert torch.equal(states, every[layer])
