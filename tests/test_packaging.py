"""The wheel and the ways to import the package, and that imports go one way only."""

import ast
import configparser
import email
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import evaluate
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import modeling_dms


ROOT = Path(__file__).resolve().parent.parent
# where setup.py puts the folders
FOLDERS = {
    "modeling_dms": "modeling_dms",
    "configuration": "modeling_dms/configuration",
    "training": "modeling_dms/training",
}


# ---- what imports what


def sources(folder):
    """Our own sources by path; checkpoints hold exported copies."""
    paths = (path for path in sorted((ROOT / folder).rglob("*.py")) if "checkpoints" not in path.parts)
    return {path.relative_to(ROOT).as_posix(): path for path in paths}


def package_name(path):
    """`training/data/samples.py` -> `modeling_dms.training.data.samples`."""
    folder, _, rest = path.partition("/")
    return f"{FOLDERS[folder]}/{rest}".removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path):
    """Absolute names of all a file imports, also within functions and for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    here = package_name(path.relative_to(ROOT).as_posix()).split(".")
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            level = node.level - (path.name == "__init__.py")
            base = here[: len(here) - level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def touches(names, *packages):
    return {name for name in names if any(name == p or name.startswith(f"{p}.") for p in packages)}


@pytest.mark.parametrize("path", sources("modeling_dms"))
def test_the_model_does_not_know_the_training(path):
    assert not touches(
        imports(ROOT / path), "modeling_dms.training", "training", "configuration", "tests", "benchmarks"
    )


# each room may import those before it, and itself; those of the training all of the model's
MODEL_ROOMS = ("_compat", "outputs", "save", "steer", "evidence", "observe", "weigh", "calibrate", "dms")
MODEL_ROOMS += ("reliability_mixin", "sources_mixin", "mixin", "encoding_mixin", "steered_mixin", "qformer_mixin")
MODEL_ROOMS += ("shells", "auto", "__init__")
ROOMS = (
    "names",
    "extras",
    "data",
    "corruptions",
    "models",
    "evaluate",
    "publish",
    "finetune",
    "apps",
    "cli",
    "__main__",
)


@pytest.mark.parametrize("path", sources("modeling_dms"))
def test_a_room_of_the_model_imports_those_below_it(path):
    room = Path(path).relative_to("modeling_dms").parts[0].removesuffix(".py")
    above = MODEL_ROOMS[MODEL_ROOMS.index("shells" if room.startswith("modeling_dms_") else room) + 1 :]
    found = imports(ROOT / path)
    assert not touches(found, *(f"modeling_dms.{name}" for name in above))
    if not room.startswith("modeling_dms_") and room not in ("auto", "__init__"):
        assert not {name for name in found if name.startswith("modeling_dms.modeling_dms_")}


@pytest.mark.parametrize("path", sources("training"))
def test_a_room_of_the_training_imports_those_below_it(path):
    room = Path(path).relative_to("training").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    above = ROOMS[ROOMS.index(room) + 1 :]
    assert not touches(imports(ROOT / path), *(f"modeling_dms.training.{name}" for name in above))


@pytest.mark.parametrize("path", sources("configuration"))
def test_the_configuration_knows_neither(path):
    names = touches(imports(ROOT / path), "modeling_dms", "training", "configuration")
    assert not {n for n in names if not n.startswith(("modeling_dms.configuration", "modeling_dms._compat"))}


def test_what_differs_between_versions_knows_nothing_of_the_package():
    # what it imports of others, and when, tests/test_versions.py runs
    assert not touches(imports(ROOT / "modeling_dms/_compat.py"), "modeling_dms", "training", "configuration")


@pytest.mark.parametrize(
    "path", [p for room in ("evidence", "calibrate", "weigh", "steer") for p in sources(f"modeling_dms/{room}")]
)
def test_the_method_knows_no_backbone(path):
    names = imports(ROOT / path)
    backbones = [f"modeling_dms.{name}" for name in ("mixin", "modeling_dms_llava", "modeling_dms_blip_2")]
    assert not touches(names, "transformers.models", *backbones)
    assert not {name for name in names if "llava" in name.lower() or "blip" in name.lower()}


def test_training_is_reached_by_its_package_name():
    for path in sources("training").values():
        assert not touches(imports(path), "training", "configuration"), path


def test_imports_have_no_cycle():
    names = {package_name(path): imports(file) for folder in FOLDERS for path, file in sources(folder).items()}
    # importing any submodule runs the package's __init__, which gathers everything: that is no dependency on it
    graph = {name: (found & names.keys()) - {name, "modeling_dms"} for name, found in names.items()}
    done: set[str] = set()
    while ready := [name for name in graph if name not in done and graph[name] <= done]:
        done.update(ready)
    assert done == set(graph), f"in or behind a cycle: {sorted(set(graph) - done)}"


@pytest.mark.parametrize("path", sources("modeling_dms"))
def test_a_file_of_the_model_is_read_in_one_sitting(path):
    assert len((ROOT / path).read_text().splitlines()) <= 350


# ---- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy, so that nothing is written into the repository."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "checkpoints"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_source_and_no_other(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"modeling_dms/py.typed"}
    for folder, place in FOLDERS.items():
        expected |= {path.replace(folder, place, 1) for path in sources(folder)}
    code = {name for name in names if ".dist-info/" not in name}
    assert expected <= code
    assert not {name for name in code - expected if name.endswith(".py")}
    assert {name.partition("/")[0] for name in code} == {"modeling_dms"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    assert metadata["Name"] == "modeling-dms"
    assert metadata["Version"] == modeling_dms.__version__
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {requirement.name for requirement in required} == {"torch", "transformers"}
    assert {"train", "eval", "dev"} <= set(metadata.get_all("Provides-Extra"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(archive.read(f"{info}/entry_points.txt").decode())
    assert set(entry_points.sections()) == {"console_scripts", "lmms_eval.models"}
    for group in entry_points.sections():
        ((name, target),) = entry_points[group].items()
        assert name == "dms"
        assert f"{target.partition(':')[0].replace('.', '/')}.py" in archive.namelist()


# ---- ways to import it

# One process loads torch and transformers, and forks for each way: {name: sys.path entries to put first, and a module
# to import as well} -> facts.
_WAYS = """
import importlib
import importlib.util
import json
import os
import sys

import torch
from transformers import Blip2ForConditionalGeneration, LlavaForConditionalGeneration

ways = json.loads(sys.argv[1])
for name, way in ways.items():
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(read)
        facts = {}
        try:
            if not way["editable"]:
                finders = [f for f in sys.meta_path if "editable" not in f"{f} {getattr(f, '__module__', '')}"]
                sys.meta_path[:] = finders
                sys.path[:] = [p for p in sys.path if "__editable__" not in p and p != way["root"]]
                assert importlib.util.find_spec("modeling_dms") is None, "it can be imported from somewhere else"
            sys.path[:0] = way["path"]
            os.chdir(way["cwd"])
            before = {m.partition(".")[0] for m in sys.modules}
            import modeling_dms
            facts["new"] = sorted({m.partition(".")[0] for m in sys.modules} - before - set(sys.stdlib_module_names))
            if way["also"]:
                importlib.import_module(way["also"])
            facts["loaded"] = sorted(sys.modules)
            import modeling_dms.configuration, modeling_dms.training, modeling_dms.training.data
            from modeling_dms.training.evaluate.metrics import captions, confidence, retrieval, robust, vqa
            facts["files"] = [
                m.__file__ for m in (modeling_dms, modeling_dms.configuration, modeling_dms.training)
            ]
            facts["same"] = modeling_dms.configuration.DMSConfig is modeling_dms.DMSConfig
            facts["heavy"] = sorted({"easy_vqa", "matplotlib", "peft", "evaluate", "gradio"} & set(sys.modules))
        except BaseException as error:
            facts["error"] = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps(facts).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        way["facts"] = json.load(pipe)
    os.wait()
print(json.dumps({name: way["facts"] for name, way in ways.items()}))
"""


# modules of the training whose import is asked for what else it loads
ALONE = ("finetune.trainer", "corruptions")


@pytest.fixture(scope="module")
def ways(wheel, tmp_path_factory):
    target, elsewhere = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    root, installed, cwd = str(ROOT), str(target), str(elsewhere)
    asked = {
        "wheel": {"path": [installed], "cwd": cwd},
        "root": {"path": [""], "cwd": root},
        "root before wheel": {"path": [root, installed], "cwd": cwd},
        "wheel before root": {"path": [installed, root], "cwd": cwd},
        "editable": {"path": [], "cwd": cwd},
    }
    asked |= {name: {"path": [""], "cwd": root, "also": f"modeling_dms.training.{name}"} for name in ALONE}
    for way, entry in asked.items():
        entry |= {"root": root, "editable": way == "editable", "also": entry.get("also")}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, "-P", "-c", _WAYS, json.dumps(asked)]
    done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), {"wheel": target, "root": ROOT}


def is_editable():
    for distribution in importlib.metadata.distributions(name="modeling-dms"):
        installed = json.loads(distribution.read_text("direct_url.json") or "{}")
        if installed.get("dir_info", {}).get("editable"):
            return True
    return False


@pytest.mark.parametrize(
    ("way", "origin"),
    [
        ("wheel", "wheel"),
        ("root", "root"),
        ("root before wheel", "root"),
        ("wheel before root", "wheel"),
        ("editable", "root"),
    ],
)
def test_ways_to_import(ways, way, origin):
    if way == "editable" and not is_editable():
        pytest.skip("the package is not installed in editable mode here")
    facts, origins = ways[0][way], ways[1]
    assert "error" not in facts, facts.get("error")
    for path in facts["files"]:
        assert Path(path).resolve().is_relative_to(origins[origin].resolve()), path
    assert facts["same"]


@pytest.mark.parametrize("name", ["cider", "retrieval_recall", "robustness", "vqa_accuracy"])
def test_metrics_of_an_installed_wheel_load_by_path(ways, name, tmp_path):
    folder = ways[1]["wheel"] / "modeling_dms/training/evaluate/metrics" / name
    assert evaluate.load(str(folder), cache_dir=tmp_path).features


def dependencies(*names):
    """The distributions that `pip install` of some distributions brings in, without extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            required = map(Requirement, importlib.metadata.requires(name) or [])
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        waiting += [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def test_importing_brings_in_torch_and_transformers_only(ways):
    facts = ways[0]["wheel"]
    assert facts["heavy"] == []
    known, owners = dependencies("torch", "transformers"), importlib.metadata.packages_distributions()
    strangers = [top for top in facts["new"] if not {canonicalize_name(o) for o in owners.get(top, [])} & known]
    assert strangers == ["modeling_dms"]


def loaded_by(ways, module):
    facts = ways[0][module]
    assert "error" not in facts, facts.get("error")
    assert f"modeling_dms.training.{module}" in facts["loaded"]
    return facts["loaded"]


def test_the_trainer_is_imported_without_what_stands_beside_it(ways):
    rooms = touches(loaded_by(ways, "finetune.trainer"), *(f"modeling_dms.training.{name}" for name in ROOMS))
    assert not touches(
        rooms, *(f"modeling_dms.training.{name}" for name in ("evaluate", "publish", "apps", "corruptions"))
    )
    no_data_set = ("modeling_dms.training.data", *(f"modeling_dms.training.data.{n}" for n in ("samples", "collator")))
    assert touches(rooms, "modeling_dms.training.data") <= set(no_data_set)


def test_corruptions_are_imported_without_the_packages_that_some_kinds_need(ways):
    assert not {"imagecorruptions", "cv2", "numba"} & set(loaded_by(ways, "corruptions"))
