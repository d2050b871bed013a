"""Exported checkpoints load with `trust_remote_code=True` where the package is not installed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny


BACKBONES = ("llava-llama", "internvl-qwen3", "blip2-t5", "blip2-opt", "retrieval")
WHICH = ("exported", "saved again")

# What runs where `modeling_dms` cannot be imported: loads every checkpoint, each with a copy of the code, answers the
# same inputs, saves again, and does the same with what it has saved.
_ELSEWHERE = (
    tiny.BLOCKED
    + """
try:
    import modeling_dms
except ImportError:
    pass
else:
    raise SystemExit("modeling_dms can be imported: this test tests nothing")

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText


def loaded(backbone, directory):
    auto = AutoModel if backbone == "retrieval" else AutoModelForImageTextToText
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    model, info = auto.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
    for made in (model, config, model.config, model.dms):
        assert type(made).__module__.split(".")[:2] == ["transformers_modules", Path(directory).name], type(made)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        # `tests.tiny.realigned` says why
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.clone()
    return model


def answers(backbone, model, job):
    with torch.no_grad():
        out = model(**job["inputs"])
        weighed = model(**job["inputs"], modality_weights=job["weights"])
    found = {
        "class": type(model).__name__,
        "logits": out["logits_per_image" if backbone == "retrieval" else "logits"],
        "weighed": weighed["logits_per_image" if backbone == "retrieval" else "logits"],
        "weights": out.modality_weights,
    }
    if backbone != "retrieval":
        found["generated"] = model.generate(**job["prompt"], max_new_tokens=3)
    return found


jobs = torch.load(sys.argv[1], weights_only=True)
results = {"exported": {}, "saved again": {}}
# all are loaded before one answers: each answers by its own code
models = {backbone: loaded(backbone, job["exported"]) for backbone, job in jobs.items()}
for backbone, model in models.items():
    results["exported"][backbone] = answers(backbone, model, jobs[backbone])
    model.save_pretrained(jobs[backbone]["saved again"])
for backbone, job in jobs.items():
    results["saved again"][backbone] = answers(backbone, loaded(backbone, job["saved again"]), job)
torch.save(results, sys.argv[2])
assert not any(name.split(".")[0] == "modeling_dms" for name in sys.modules)

# both copies of the code in one process
sys.meta_path.pop(0)
import modeling_dms

for which, found in results.items():
    for backbone, job in jobs.items():
        model = getattr(modeling_dms, found[backbone]["class"]).from_pretrained(job[which])
        assert type(model).__module__.startswith("modeling_dms."), type(model)
        assert type(model.config).__module__.startswith("modeling_dms."), type(model.config)
        if backbone != "retrieval":
            with torch.no_grad():
                generated = model.generate(**job["prompt"], max_new_tokens=3)
            assert torch.equal(generated, found[backbone]["generated"])
"""
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Directories of checkpoints, what their models say, and the same said elsewhere by them and by what is saved
    there."""
    root = tmp_path_factory.mktemp("export")
    expected, jobs = {}, {}
    for backbone in BACKBONES:
        model = tiny.build(backbone, scheduler="learned", stirred=True)
        if backbone != "retrieval":
            model.dms.calibration.load_state_dict(tiny.calibration_of(backbone))
        # of these names the library makes those of modules
        folder = root / backbone.replace("-", "_")
        folders = {"exported": str(folder), "saved again": f"{folder}_again"}
        model.save_pretrained(folder)
        inputs = tiny.prompts(backbone, "mixed", "left")
        weights = tiny.uneven(len(inputs["input_ids"]))
        with torch.no_grad():
            out, weighed = model(**inputs), model(**inputs, modality_weights=weights)
        field = "logits_per_image" if backbone == "retrieval" else "logits"
        expected[backbone] = {
            "class": type(model).__name__,
            "logits": out[field],
            "weighed": weighed[field],
            "weights": out.modality_weights,
        }
        prompt = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
        if backbone != "retrieval":
            expected[backbone]["generated"] = model.generate(**prompt, max_new_tokens=3)
        jobs[backbone] = {**folders, "inputs": inputs, "prompt": prompt, "weights": weights}
    return jobs, expected, run_elsewhere(root, jobs)


def run_elsewhere(root, jobs):
    """Runs `_ELSEWHERE` isolated, with caches of its own. Returns its results, or what went wrong."""
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    script, given, results = elsewhere / "script.py", elsewhere / "jobs.pt", elsewhere / "results.pt"
    script.write_text(_ELSEWHERE)
    torch.save(jobs, given)
    caches = {"HF_HOME": str(elsewhere / "home"), "HF_MODULES_CACHE": str(elsewhere / "modules")}
    env = {**os.environ, **caches, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, "-I", str(script), str(given), str(results)]
    done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr[-3000:]
    return torch.load(results, weights_only=True)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_same_answers_without_the_package(exported, backbone, which):
    _, expected, found = exported
    assert isinstance(found, dict), found
    assert found[which][backbone].keys() == expected[backbone].keys()
    assert (expected[backbone]["weights"] - 0.5).abs().max() > 1e-3
    for name, value in expected[backbone].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[which][backbone][name], value), name
        else:
            assert found[which][backbone][name] == value


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_exported_code_is_flat_and_complete(exported, backbone, which):
    directory = Path(exported[0][backbone][which])
    modules = {path.stem: path.read_text() for path in directory.glob("*.py")}
    assert not [path for path in directory.iterdir() if path.is_dir()]
    for name, text in modules.items():
        assert "modeling_dms." not in re.sub(r"`.*?`", "", text), name
        siblings = re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE)
        assert set(siblings) <= set(modules), name
        assert not re.search(r"^\s*(from|import) (modeling_dms|configuration|training)\b", text, re.MULTILINE), name
    family = {"llava": "llava", "internvl": "internvl"}.get(backbone.partition("-")[0], "blip_2")
    assert {name for name in modules if name.startswith("modeling_dms_")} == {f"modeling_dms_{family}"}
    auto_class = "AutoModel" if backbone == "retrieval" else "AutoModelForImageTextToText"
    auto_map = json.loads((directory / "config.json").read_text())["auto_map"]
    assert auto_map[auto_class] == f"modeling_dms_{family}.{tiny.model_class(backbone).__name__}"
    assert auto_map["AutoConfig"].startswith("configuration_dms.DMS")


def test_only_the_main_process_writes(tmp_path):
    tiny.build("llava-llama").save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.py"))
