"""Exported checkpoints load with `trust_remote_code=True` where the package is not installed."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from tests import tiny


BACKBONES = ("llava-llama", "internvl-qwen3", "blip2-t5", "blip2-opt", "retrieval")

# What runs where `modeling_dms` cannot be imported: loads every directory, each with a copy of the code, then answers
# the same inputs and saves again.
_ELSEWHERE = (
    tiny.BLOCKED
    + """
try:
    import modeling_dms
except ImportError:
    pass
else:
    raise SystemExit("modeling_dms can be imported: this test tests nothing")

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

jobs = torch.load(sys.argv[1], weights_only=True)
models, results = {}, {}
for backbone, job in jobs.items():
    auto = AutoModel if backbone == "retrieval" else AutoModelForImageTextToText
    config = AutoConfig.from_pretrained(job["directory"], trust_remote_code=True)
    model, info = auto.from_pretrained(job["directory"], trust_remote_code=True, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert type(config).__module__.startswith("transformers_modules."), type(config)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        # `tests.tiny.realigned` says why
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.clone()
    models[backbone] = model
for backbone, job in jobs.items():
    model = models[backbone]
    with torch.no_grad():
        out = model(**job["inputs"])
        weighed = model(**job["inputs"], modality_weights=job["weights"])
    result = {
        "class": type(model).__name__,
        "logits": out["logits_per_image" if backbone == "retrieval" else "logits"],
        "weighed": weighed["logits_per_image" if backbone == "retrieval" else "logits"],
        "weights": out.modality_weights,
    }
    if backbone != "retrieval":
        job["inputs"].pop("decoder_input_ids", None)
        result["generated"] = model.generate(**job["inputs"], max_new_tokens=3)
    model.save_pretrained(job["again"])
    results[backbone] = result
torch.save(results, sys.argv[2])
assert not any(name.split(".")[0] == "modeling_dms" for name in sys.modules)

# both copies of the code in one process
sys.meta_path.pop(0)
import modeling_dms

for backbone, job in jobs.items():
    model = getattr(modeling_dms, results[backbone]["class"]).from_pretrained(job["directory"])
    assert type(model).__module__.startswith("modeling_dms."), type(model)
    assert type(model.config).__module__.startswith("modeling_dms."), type(model.config)
    if backbone != "retrieval":
        with torch.no_grad():
            generated = model.generate(**job["inputs"], max_new_tokens=3)
        assert torch.equal(generated, results[backbone]["generated"])
"""
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Saved checkpoints, what their models say, and the same said elsewhere by them and by what is saved there."""
    root = tmp_path_factory.mktemp("export")
    expected, jobs = {}, {}
    for backbone in BACKBONES:
        model = tiny.build(backbone, scheduler="learned", stirred=True)
        if backbone != "retrieval":
            model.calibrate(tiny.clean_samples(), level=2, show_progress=False)
        model.save_pretrained(root / backbone)
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
        if backbone != "retrieval":
            prompt = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
            expected[backbone]["generated"] = model.generate(**prompt, max_new_tokens=3)
        jobs[backbone] = {
            "directory": str(root / backbone),
            "again": str(root / f"{backbone}-again"),
            "inputs": inputs,
            "weights": weights,
        }
    first = run_elsewhere(root, "first", jobs)
    for backbone, job in jobs.items():
        job["directory"], job["again"] = job["again"], str(root / f"{backbone}-third")
    second = run_elsewhere(root, "second", jobs)
    return root, expected, {"exported": first, "saved again": second}


def run_elsewhere(root, name, jobs):
    """Runs `_ELSEWHERE` isolated, with caches of its own. Returns its results, or what went wrong."""
    elsewhere = root / f"{name}-cwd"
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
        return f"{name}: {done.stderr[-3000:]}"
    return torch.load(results, weights_only=True)


@pytest.mark.parametrize("which", ["exported", "saved again"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_same_answers_without_the_package(exported, backbone, which):
    _, expected, found = exported
    assert isinstance(found[which], dict), found[which]
    assert found[which][backbone].keys() == expected[backbone].keys()
    assert (expected[backbone]["weights"] - 0.5).abs().max() > 1e-3
    for name, value in expected[backbone].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[which][backbone][name], value), name
        else:
            assert found[which][backbone][name] == value


@pytest.mark.parametrize("copy", ["", "-again"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_exported_code_is_flat_and_complete(exported, backbone, copy):
    directory = exported[0] / f"{backbone}{copy}"
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
