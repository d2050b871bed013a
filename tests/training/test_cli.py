"""The command line as somebody meets it who has never seen it: what is not installed, what is mistyped, names of files
that a shell lets pass, help, and exit codes."""

import importlib.metadata
import json
import re
import runpy
import shutil
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import typer
from huggingface_hub.errors import HTTPError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainingArguments
from typer.testing import CliRunner

from modeling_dms.calibrate.damage import IMAGE_FAMILIES
from modeling_dms.training.apps import answer
from modeling_dms.training.cli import app
from modeling_dms.training.evaluate.run import EvaluationConfig, conditions_of
from modeling_dms.training.extras import COMMANDS, PACKAGES, install
from modeling_dms.training.finetune import train
from modeling_dms.training.finetune.arguments import _TYPES, COMMON, PRESETS
from modeling_dms.training.models.loading import CHECKPOINTS
from tests import tiny
from tests.test_docs import check_command, continued
from tests.test_packaging import dependencies


ROOT = Path(__file__).resolve().parents[2]
GROUP = typer.main.get_command(app)


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def told(*arguments):
    """The one line in which a command says what is wrong."""
    done = invoke(*arguments)
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert done.stdout == ""
    return line


def wrong_usage(*arguments):
    """What a command says of options that it does not take."""
    done = invoke(*arguments)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.stdout == ""
    return done.stderr.splitlines()[-1]


# ---- what is not installed


@pytest.fixture(scope="module")
def required():
    """The requirements of each extra of setup.py."""
    import setuptools

    found, before = {}, setuptools.setup
    setuptools.setup = found.update
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = before
    return {extra: list(map(Requirement, lines)) for extra, lines in found["extras_require"].items()}


def with_extras(requirement):
    """A requirement, and those of its own extras."""
    own = map(Requirement, importlib.metadata.requires(requirement.name) or [])
    asked = [r for r in own if r.marker and any(r.marker.evaluate({"extra": e}) for e in requirement.extras)]
    return {canonicalize_name(r.name) for r in (requirement, *asked)}


def test_every_command_has_an_extra():
    assert {command.split()[0] for command in COMMANDS} == set(GROUP.commands)


@pytest.mark.parametrize("extra", PACKAGES)
def test_the_packages_of_an_extra_are_those_of_setup(required, extra):
    brought = set().union(*map(with_extras, required[extra]))
    # base packages, and what is of use to another command of transformers' extra, are not looked for
    assert set(PACKAGES[extra]) <= brought
    assert {canonicalize_name(r.name) for r in required[extra]} - {"transformers"} <= set(PACKAGES[extra])
    owners = importlib.metadata.packages_distributions()
    for package, module in PACKAGES[extra].items():
        assert package in {canonicalize_name(owner) for owner in owners[module]}


def test_an_extra_holds_all_that_commands_before_it_need():
    chains = ("demo", "eval", "train", "parts"), ("demo", "web"), ("demo", "serve")
    for smaller, larger in (pair for chain in chains for pair in pairwise(chain)):
        assert PACKAGES[smaller].items() < PACKAGES[larger].items()


# all modules but those of some packages are hidden before anything is imported; then commands run one after the other
_RUN = """
import json
import sys

hidden, commands = json.load(sys.stdin)
sys.modules.update(dict.fromkeys(hidden))
from typer.testing import CliRunner

from modeling_dms.training.cli import app

found = []
for command in commands:
    done = CliRunner().invoke(app, command)
    fault = None if isinstance(done.exception, SystemExit | None) else repr(done.exception)
    found.append({"code": done.exit_code, "stderr": done.stderr, "fault": fault})
print(json.dumps(found))
"""


def run_with(packages, commands, folder):
    """What commands do where these packages, torch and transformers are installed, with all that they need."""
    allowed = dependencies("torch", "transformers", *packages) | {"modeling-dms"}
    owners = importlib.metadata.packages_distributions()
    hidden = [top for top, names in owners.items() if not {canonicalize_name(name) for name in names} & allowed]
    hidden = [top for top in hidden if top not in ("modeling_dms", "__editable___modeling_dms_finder")]
    given = json.dumps([hidden, [list(map(str, command)) for command in commands]])
    command = [sys.executable, "-W", "ignore", "-c", _RUN]
    done = subprocess.run(command, cwd=folder, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# of each command something that fails at once where all that it needs is there
GIVEN = {
    "predict": "--question what? --context a --model nowhere",
    "demo": "--port 7000",
    "demo --web": "--model nowhere",
    "calibrate": "--model nowhere --data nowhere --out out",
    "evaluate": "--model nowhere --out out",
    "report": "nowhere --out out.md",
    "train": "--config demo-scheduler --data nowhere",
    "merge": "nowhere --out out",
    "card": "nowhere",
    "push": "nowhere --repo me/x",
    "serve": "nowhere",
    "assemble": "nowhere",
    "release": "nowhere --base nowhere --out out",
}


@pytest.mark.parametrize("installed", [None, "eval"])
def test_what_is_missing_is_named_before_any_work(installed, tmp_path):
    packages = PACKAGES.get(installed, {})
    helps = [[*name.split(), "--help"] for name in ("", *GROUP.commands)]
    results = run_with(packages, [*(f"{name} {GIVEN[name]}".split() for name in COMMANDS), *helps], tmp_path)
    for (name, extra), result in zip(COMMANDS.items(), results, strict=False):
        missing = set(PACKAGES[extra]) - dependencies("torch", "transformers", *packages)
        assert result["fault"] is None, (name, result)
        if name == "demo" and not missing:  # the options are refused, behind the check
            assert result["code"] == 2
            continue
        (line,) = result["stderr"].splitlines()
        assert result["code"] == 1
        assert ("nowhere" in line) != bool(missing), (name, line)
        if missing:
            assert line.startswith(f"error: `dms {name}` needs ")
            assert line.endswith(install(extra))
            assert set(re.findall(r"[\w-]+", line)) >= missing
    assert not list(tmp_path.iterdir())
    # help can be read before anything is installed
    for result in results[len(COMMANDS) :]:
        assert (result["code"], result["stderr"], result["fault"]) == (0, "", None)


def test_the_extra_for_evaluating_is_enough(tmp_path):
    """For the commands of docs/evaluate.md and README.md that it is named for; kinds of ImageNet-C are the default."""
    config = EvaluationConfig("demo-llava", tmp_path)
    assert any("imagenet_c/" in condition.name for condition in conditions_of(config))
    data = tiny.table(tmp_path / "data", 60)
    rows = [json.loads(line) for line in (data / "table.jsonl").read_text().splitlines()]
    rows += [{**row, "id": f"test {number}", "split": "test"} for number, row in enumerate(rows[:2])]
    (data / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = f"--data {data} --out {tmp_path}"
    few = "--samples 2 --seeds 1 --severities 5 --methods static,rule --kinds image:imagenet_c/fog,text:typos"
    commands = [
        f"calibrate --model demo-llava --samples 50 {own}/model",
        f"evaluate --model {tmp_path}/model {few} {own}/results",
        f"report {tmp_path}/results --out {tmp_path}/results.md",
        f"card {tmp_path}/model --results {tmp_path}/results",
    ]
    for result in run_with(PACKAGES["eval"], [command.split() for command in commands], tmp_path):
        assert result["code"] == 0, result
    assert "imagenet_c/fog" in (tmp_path / "results" / "results.json").read_text()


# ---- what is mistyped


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--kinds", "image:fog,image:pixelte"), "unknown kind 'image:pixelte', did you mean image:pixelate"),
        (("--kinds", "fog"), "unknown kind 'fog', did you mean image:fog"),
        (
            ("--kinds", "image:fog", "--corruptions", "seen,both"),
            "the kinds image:fog leave nothing of seen, both",
        ),
        (("--kinds", ","), "--kinds: expected names"),
        (("--corruptions", "sene"), "unknown corruption 'sene', did you mean seen"),
        (("--corruptions", "image:fog+text:typo"), "unknown corruption 'text:typo', did you mean text:typos"),
        (("--corruptions", ""), "--corruptions: expected names"),
        (("--methods", "static,rul"), "unknown method 'rul', did you mean rule"),
        (("--methods", " , "), "--methods: expected names"),
        (("--severities", "3,strong"), "--severities: expected integers separated by commas, got 'strong'"),
        (("--severities", "2.5"), "--severities: expected integers separated by commas, got '2.5'"),
        (("--severities", "0"), "severities must be integers from 1 to 5, got [0]"),
        (("--severities", ""), "--severities: expected"),
        (("--task", "captions"), "unknown task 'captions', did you mean caption"),
        (("--split", "validate"), "unknown split 'validate', did you mean validation"),
        (("--seeds", "0"), "'--seeds'"),
        (("--samples", "0"), "'--samples'"),
        (("--batch-size", "-1"), "'--batch-size'"),
        (("--dtype", "gpu"), "unknown dtype 'gpu', expected one of auto, float32, bfloat16, float16"),
        (("--sample", "3"), "No such option: --sample"),
    ],
)
def test_a_choice_that_there_is_not_is_wrong_usage(given, said, tmp_path):
    assert said in wrong_usage("evaluate", "--model", "demo-llava", "--out", tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--scheduler", "lerned"), "lerned"),
        (("--dms", '{"false_alarm": 0.1}'), "unknown field of DMSConfig 'false_alarm', did you mean false_alarm_rate"),
        (("--dms", "kappa=3"), "dms must be a JSON object"),
        (("--samples", "49"), "'--samples'"),
        (("--leave-out", "noise,blurr"), "unknown family 'blurr', did you mean blur"),
    ],
)
def test_choices_of_calibration_are_checked_before_data_are_read(given, said, tmp_path):
    command = ("calibrate", "--model", "demo-llava", "--data", "nowhere", "--out", tmp_path / "out", *given)
    assert said in wrong_usage(*command)


SHIPPED = "demo-blip2, demo-llava, photographs-llava, llava-dinov2s-smollm2-135m, blip2-dinov2s-smollm2-135m"


@pytest.mark.parametrize("command", ["predict --question what? --context a --model", "merge --out out", "serve"])
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("demo-lava", f"demo-lava: there is no such folder, .*{SHIPPED}.*, and the Hub gives none: "),
        ("llava-hf/lava", f"llava-hf/lava: there is no such folder, .*{SHIPPED}.*, and the Hub gives none: "),
        ("../my-model", rf"\.\./my-model: there is no such folder, .*{SHIPPED}.* no id of the Hub \(owner/name\)"),
        ("runs/a/final", f"runs/a/final: there is no such folder, .*{SHIPPED}.* no id of the Hub"),
        ("my model", f"my model: there is no such folder, .*{SHIPPED}.* no id of the Hub"),
        ("config.json", "config.json is a file, expected the folder of a checkpoint"),
        ("empty", "the folder empty holds no config.json or adapter_config.json"),
    ],
)
def test_a_model_that_there_is_not_is_named_with_those_there_are(command, model, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "config.json").write_text("{}")
    assert re.search(said, told(*command.split(), model))


def test_a_folder_without_a_checkpoint_does_not_hide_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-llava").mkdir()
    assert "answer: " in invoke("predict", "--question", "what color is it?", "--context", "a red box.").stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [("{}", "names no base_model_name_or_path"), ("[", "is not JSON"), ("[1]", "names no base_model_name_or_path")],
)
def test_an_adapter_that_names_no_base(text, said, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert said in told("predict", "--question", "what?", "--context", "a", "--model", tmp_path)


@pytest.mark.parametrize(
    "command",
    ["card {}", "push {} --repo me/x", "report {} --out r.md", "release {} --base llava-dinov2s-smollm2-135m --out r"],
)
@pytest.mark.parametrize("name", ["empty", "absent", "results of others"])
def test_folders_that_hold_nothing(command, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "results of others").mkdir()
    (tmp_path / "results of others" / "results.json").write_text("{}")
    arguments = [part.format(name) for part in command.split()]
    assert name in told(*arguments)
    assert not (tmp_path / "r.md").exists()
    assert not (tmp_path / "r").exists()


# ---- serving


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole DMS checkpoint."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    assert invoke("merge", "demo-llava", "--out", folder).exit_code == 0
    return folder


def test_a_port_that_is_taken_is_named(whole):
    pytest.importorskip("fastapi")
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen at localhost, port {port}: " in told("serve", whole, "--port", port)
    assert "port 70000" in told("serve", whole, "--port", "70000")
    assert "cannot listen at 192.0.2.1" in told("serve", whole, "--host", "192.0.2.1")


def test_options_that_transformers_serve_does_not_have(whole):
    pytest.importorskip("fastapi")
    assert "No such option: --prot" in wrong_usage("serve", whole, "--prot", "8000")
    assert "'--port'" in wrong_usage("serve", whole, "--port", "http")


# ---- names of files and folders

NASTY = "-a, b:vqa [1]*? 50% #2 (é) 图"


def test_any_name_of_a_file_or_folder_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tiny.table(Path(NASTY), 60)
    model, out = shutil.copytree(CHECKPOINTS / "demo-llava", f"{NASTY} model"), f"{NASTY} out"
    shutil.copy(data / "7.png", f"{NASTY}.png")
    done = invoke("calibrate", "--model", model, "--data", data, "--samples", 50, "--out", out, "--leave-out", "blur")
    assert done.exit_code == 0, done.output
    # the table, beside the checkpoint too, and as a picture
    assert Path(out, "calibration.txt").read_text().rstrip() in done.output
    with Image.open(Path(out, "calibration.png")) as picture:
        assert min(picture.size) > 400
    left_out = load_file(Path(out, "model.safetensors"))["dms.calibration.detectors.0.left_out"]
    assert left_out.tolist() == [float(family == "blur") for family in IMAGE_FAMILIES]
    done = invoke("predict", "--model", out, "--image", f"{NASTY}.png", "--question", "what color is it?")
    assert done.exit_code == 0, done.output
    few = "--samples 2 --seeds 1 --corruptions image:fog --severities 5 --methods static,rule --split train"
    done = invoke("evaluate", "--model", out, "--data", data, "--out", f"{NASTY} results", *few.split())
    assert done.exit_code == 0, done.output
    assert json.loads(Path(f"{NASTY} results", "results.json").read_text())["run"]["data"] == NASTY
    done = invoke("report", "--out", f"{NASTY} pages/all.md", "--", f"{NASTY} results")
    assert done.exit_code == 0, done.output
    links = re.findall(r"\]\(([^)\s]+)\)", Path(f"{NASTY} pages/all.md").read_text())
    assert links
    assert not [link for link in links if not Path(f"{NASTY} pages", unquote(link)).exists()]
    done = invoke("card", "--results", f"{NASTY} results", "--", out)
    assert done.exit_code == 0, done.output


# ---- help


def helped(name, columns=80):
    done = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": str(columns)}, terminal_width=columns)
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", ["", *GROUP.commands])
def test_help_is_for_somebody_new(name, columns):
    text = helped(name, columns)
    lines = text.splitlines()
    # examples stand as they are typed
    assert not [line for line in lines if len(line) > columns and not re.match(r" *(dms|All:|--corr) ?", line)]
    examples = [line.strip() for line in continued(text) if line.strip().startswith("dms ")]
    assert examples
    for example in examples:
        check_command(example)
    if name:
        assert any(example.startswith(f"dms {name} ") or example == f"dms {name}" for example in examples)
        for command, extra in COMMANDS.items():
            assert (f"`dms {command}` needs: {install(extra)}" in text) == (command.split()[0] == name)
        assert lines[2].strip().endswith(".")  # what it does, in a sentence


def test_exit_codes_are_stated_once():
    said = re.findall(r"^    (\d+) +(.*)", helped(""), re.M)
    assert [int(code) for code, _ in said] == [0, 1, 2, 130]
    assert not [name for name in GROUP.commands if "130" in helped(name)]


def test_the_fields_of_a_run_and_the_presets_are_listed():
    text = helped("train", 120)
    library = set(TrainingArguments.__dataclass_fields__)
    own = {name for kind in _TYPES for name in kind.__dataclass_fields__} - library
    listed = re.findall(r"^  --(\w+) ", text, re.M)
    assert sorted({*listed} - {"config", "resume", "help"}) == sorted({*own, *COMMON})
    assert len(listed) == len(set(listed))
    assert "severity|leave_one_out|none" in text
    assert f"{len(COMMON)} of the {len(library)} fields of transformers' TrainingArguments" in text
    for preset in PRESETS.glob("*.yaml"):
        assert re.search(rf"^  {preset.stem}  +[A-Z]", text, re.M), preset.stem


# ---- exit codes


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (ValueError("one\n  two"), "one two"),
        (PermissionError(13, "Permission denied", "x.json"), "[Errno 13] Permission denied: 'x.json'"),
        (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory."),
        (MemoryError(), "MemoryError"),
        (FloatingPointError("the loss is nan"), "the loss is nan"),
        (HTTPError("the Hub\nis gone"), "the Hub is gone"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "train"])
def test_a_fault_outside_of_the_program_is_told_in_one_line(fault, said, command, monkeypatch):
    def fail(*arguments):
        raise fault

    monkeypatch.setattr(answer, "predict_one", fail)
    monkeypatch.setattr(train, "run_training", fail)
    given = {"predict": ["--question", "what?"], "train": ["--config", "demo-scheduler"]}[command]
    assert told(command, *given) == f"error: {said}"


@pytest.mark.parametrize("fault", [KeyError, TypeError, RuntimeError, AssertionError])
def test_a_fault_of_the_program_is_not_hidden(fault, monkeypatch):
    def fail(*arguments):
        raise fault

    monkeypatch.setattr(answer, "predict_one", fail)
    done = invoke("predict", "--question", "what?")
    assert isinstance(done.exception, fault)


def test_an_interrupt_is_no_fault(monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(answer, "predict_one", interrupted)
    done = invoke("predict", "--question", "what?")
    assert done.exit_code == 130
    assert "Traceback" not in done.output
    assert "error" not in done.output
