"""The documentation: its snippets run, its API pages are complete, and the site builds without warnings."""

import contextlib
import copy
import inspect
import io
import json
import os
import pydoc
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import zlib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from modeling_dms import DMSConfig
from modeling_dms.calibrate.calibration_mixin import CalibrationMixin
from modeling_dms.training.apps.answer import load_for_answers
from modeling_dms.training.cli import app
from modeling_dms.training.data import load_easy_vqa, load_folder
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.finetune.arguments import _TYPES, read_arguments
from modeling_dms.training.models import calibrate
from modeling_dms.training.models.loading import CHECKPOINTS
from tests.conftest import BATCH


ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
LANGUAGES = ("python", "bash", "yaml", "json", "text", "math", "bibtex", "")

# a page that goes on from what another one left in the folder
BEFORE = {
    "docs/fine-tune.md": "docs/calibrate.md",
    "docs/evaluate.md": "docs/fine-tune.md",
    "docs/clients.md": "docs/calibrate.md",
    "docs/publish.md": "docs/evaluate.md",
}

# in snippets, for what they name
REPLACED = {
    "llava-hf/llava-1.5-7b-hf": str(CHECKPOINTS / "demo-llava"),
    '"training/evaluate/metrics/': f'"{ROOT}/training/evaluate/metrics/',
    ".venv/bin/dms": "dms",
    ".venv/bin/python": "python",
    "max_steps=500": "max_steps=2",
    '"train"), 300)  # clean samples': '"train"), 60)  # clean samples',
}

# behind commands, so that they take seconds
SMALL = {
    "calibrate": "--samples 60 --asked 32",
    "train": "--max_steps 2 --per_device_train_batch_size 2 --max_samples 1000 --calibration_samples 0 "
    "--use_cpu true --report_to none",
    "evaluate": "--samples 3 --seeds 1 --severities 5 --kinds image:fog,text:typos --training-samples 20 "
    "--validation-samples 2",
}

# by how they begin. What is left of them is checked: options of dms, targets of make, extras of pip
NOT_RUN = {
    "make ": "makes an environment of its own",
    "git clone ": "needs the network",
    "hf auth login": "asks for a token",
    "dms push ": "needs the network",
    "cd modeling-dms": "the line before is not run",
    "python3 -m venv ": "makes an environment of its own",
    ". .venv/bin/activate": "the line before is not run",
    "pip install ": "needs the network",
    "lmms-eval ": "its package brings torchvision, see setup.py; test_lmms_eval runs the plugin",
    "dms demo --web": "serves until it is interrupted; test_web runs it",
    "dms serve my-model": "serves until it is interrupted; test_clients runs it",
    "curl http://localhost": "asks the server of the line before; test_clients asks it",
    "dms train --config llava-smollm2": "its model has 157 million parameters; test_assemble builds it",
    "dms calibrate --model runs/llava-smollm2": "needs the model of the line before",
    "dms release ": "needs the model of the line before; see test_adapters",
    "dms evaluate --model my-adapter ": "needs the model of the line before",
    "dms merge my-adapter ": "needs the model of the line before",
    "python benchmarks/static.py --photos ": "trains for hours on photographs; test_static runs its steps",
    "python benchmarks/photographs.py --photos ": "needs photographs and the models of the lines before",
    "python benchmarks/study.py --photos ": "needs photographs and the models of the lines before",
}


@dataclass
class Snippet:
    """A fenced block; `line` is that of its fence."""

    page: str
    line: int
    language: str
    title: str
    text: str


def snippets(page):
    text = PAGES[page].read_text(encoding="utf-8")
    found = re.finditer(r'^ *```(\w*)(?: title="([^"\n]+)")?\n(.*?)^ *```$', text, re.M | re.S)
    return [
        Snippet(page, text.count("\n", 0, match.start()) + 1, match[1], match[2] or "", textwrap.dedent(match[3]))
        for match in found
    ]


def commands(snippet):
    """The commands of a bash snippet, without comments."""
    lines = " ".join(shlex.join(shlex.split(line, comments=True)) + "\n" for line in continued(snippet.text))
    return [part.strip() for line in lines.split("\n") for part in line.split(" '&&' ") if part.strip()]


def continued(text):
    return text.replace("\\\n", " ").splitlines()


def replaced(text):
    for name, other in REPLACED.items():
        text = text.replace(name, other)
    return text


def reason_not_to_run(command):
    return next((prefix for prefix in NOT_RUN if f"{command} ".startswith(prefix)), None)


# ---- snippets


def check_command(command):
    """Raises unless what is not run could be."""
    program, *rest = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M), command
    elif program == "pip":
        for extra in re.findall(r"\[([\w-]+)\]", command):
            assert f'"{extra}": ' in (ROOT / "setup.py").read_text(), command
    elif program == "python":
        taken = re.findall(r'add_argument\("(--[\w-]+)"', (ROOT / rest[0]).read_text())
        assert {part for part in rest if part.startswith("--")} <= set(taken), command
    elif program == "dms":
        group = typer.main.get_command(app)
        name, chosen, arguments = group.resolve_command(typer.Context(group), rest)
        context = chosen.make_context(name, arguments)
        if name == "train":
            read_arguments(context.params["config"], context.args)


def run_command(command):
    program, *arguments = shlex.split(command)
    if program == "python":
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.setattr(sys, "argv", arguments)
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
        return
    assert program == "dms", f"neither a command of dms nor among those that are not run: {command}"
    done = CliRunner().invoke(app, [*arguments, *SMALL.get(arguments[0], "").split()])
    assert done.exit_code == 0, f"{command}\n{done.output[-2000:]}\n{done.exception!r}"


def run(snippet, following, names):
    """Runs a snippet in the current folder; `names` are those of the page's Python."""
    if snippet.language == "bash":
        for command in map(replaced, commands(snippet)):
            (check_command if reason_not_to_run(command) else run_command)(command)
    elif snippet.language == "python":
        # at its place in the page, for tracebacks
        code = "\n" * snippet.line + replaced(snippet.text)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(code, snippet.page, "exec"), names)
        if following is not None and following.title == "output":
            assert output.getvalue().rstrip() == following.text.rstrip()
    elif snippet.title.endswith(".yaml"):
        Path(snippet.title).write_text(snippet.text)
    elif snippet.title.endswith(".jsonl"):
        table = Path("example.jsonl")
        table.write_text(snippet.text)
        samples = load_folder(table)
        assert all(sample.context and sample.question and sample.answers for sample in samples)
        # all that a reader is shown is read
        assert {name for row in map(json.loads, continued(snippet.text)) for name in row} == {
            "image",
            "context",
            "question",
            "answers",
        }


def once(calibrate):
    """Calibrates a model on the same batches once, and then gives it what was found, with the views that it was found
    in: these are drawn anew wherever a checkpoint without them is loaded."""
    found = {}

    def calibrated(model, dataloader, *args, **kwargs):
        batches = list(dataloader)
        given = inspect.signature(calibrate).bind(model, batches, *args, **kwargs).arguments
        choices = [str(value) for name, value in given.items() if name not in ("self", "dataloader", "show_progress")]
        weights = {name: value for name, value in model.state_dict().items() if not name.startswith("dms.views.")}
        key = (str(model.config), *choices, *map(digest, (weights, *batches)))
        if key not in found:
            found[key] = calibrate(**given), copy.deepcopy(model.dms.state_dict())
        report, state = found[key]
        model.dms.load_state_dict(state)
        return report

    return calibrated


def digest(values):
    """Of tensors and other values by their names."""
    return tuple(
        (name, zlib.crc32(value.double().numpy(force=True).tobytes()) if torch.is_tensor(value) else str(value))
        for name, value in values.items()
    )


@pytest.fixture(scope="module")
def calibrations():
    """As readers see them, but that the demo's checkpoints, where they are loaded, are calibrated on few samples, and
    none of them twice on the same ones, on whatever page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "BATCH", BATCH)
        patch.setattr(CalibrationMixin, "calibrate", once(CalibrationMixin.calibrate))
        patch.setattr(load_for_answers, "__defaults__", (60,))
        yield


@pytest.fixture(scope="module")
def read(tmp_path_factory, calibrations):
    """Reads a page as its reader does: all its snippets, one after the other, in a folder that holds `photo.png` and
    `my_folder`. Pages that go on from one another share the folder."""
    folders = {}

    def new_folder():
        folder = tmp_path_factory.mktemp("reader")
        rows = []
        (folder / "my_folder").mkdir()
        for number, sample in enumerate(one_per_image(load_easy_vqa("test"), 90)):
            shutil.copy(sample.image, folder / "my_folder" / f"{number}.png")
            row = {"context": sample.context, "question": sample.question, "answers": sample.answers}
            rows.append(json.dumps({"image": f"{number}.png", **row}))
        (folder / "my_folder" / "table.jsonl").write_text("\n".join(rows))
        shutil.copy(folder / "my_folder" / "0.png", folder / "photo.png")
        return folder

    def read_page(page):
        if page in folders:
            return
        if page in BEFORE:
            read_page(BEFORE[page])
        folder = folders[page] = folders[BEFORE[page]] if page in BEFORE else new_folder()
        blocks, names = snippets(page), {}
        with contextlib.chdir(folder):
            for block, following in zip(blocks, [*blocks[1:], None], strict=True):
                run(block, following, names)

    return read_page


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(s.language in ("python", "bash") for s in snippets(page))]
)
def test_snippets_run(page, read):
    read(page)


def test_every_fence_is_found_and_has_a_known_language():
    # one that is not, or a misspelt one, would never be run
    for page, path in PAGES.items():
        assert len(re.findall(r"^ *```", path.read_text(), re.M)) == 2 * len(snippets(page)), page
    unknown = {(s.page, s.line, s.language) for page in PAGES for s in snippets(page) if s.language not in LANGUAGES}
    assert not unknown


def test_what_is_not_run_is_there():
    shown = [replaced(c) for page in PAGES for s in snippets(page) if s.language == "bash" for c in commands(s)]
    assert {reason_not_to_run(command) for command in shown} - {None} == set(NOT_RUN)


# ---- the notebook


@pytest.mark.usefixtures("calibrations")
def test_the_notebook_runs():
    notebook = json.loads((ROOT / "examples/quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"]]
    shown, names = [], {}
    names["display"] = lambda *values: shown.extend(values)  # what IPython brings
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for cell in cells:
            exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), names)
    assert [type(value).__name__ for value in shown] == ["Image"] * 2
    (expected,) = (snippet.text for snippet in snippets("docs/quickstart.md") if snippet.title == "output")
    assert expected.rstrip() in output.getvalue()
    assert {"AUROC", "damage"} <= set(output.getvalue().split())


# ---- what the text names


def inline_code():
    return [code for path in PAGES.values() for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", path.read_text())]


def test_options_in_the_text_exist():
    group = typer.main.get_command(app)
    known = {option for command in group.commands.values() for p in command.params for option in p.opts}
    known |= {f"--{name}" for kind in _TYPES for name in kind.__dataclass_fields__}
    named = {option for code in inline_code() for option in re.findall(r"^--[\w-]+", code)}
    assert named
    assert not named - known


def test_choices_in_the_text_are_accepted():
    choices = [code for code in inline_code() if re.fullmatch(r"DMSConfig\((?!.*\.\.\.).*\)", code)]
    assert choices
    for code in choices:
        eval(code, {"DMSConfig": DMSConfig})


def test_files_that_the_readme_links_to_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text())
    assert not [link for link in links if not (ROOT / link).exists()]


# ---- API pages


def documented():
    text = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    return re.findall(r"^::: (\S+)", text, re.M)


def test_documented_names_exist_once():
    names = documented()
    assert len(names) == len(set(names))
    assert not [name for name in names if pydoc.locate(name) is None]


@pytest.mark.parametrize("module", ["modeling_dms", "modeling_dms.training.data", "modeling_dms.training.corruptions"])
def test_public_names_are_on_the_api_pages(module):
    public = import_module(module)
    assert not [
        name for name in public.__all__ if callable(getattr(public, name)) and f"{module}.{name}" not in documented()
    ]


@pytest.mark.parametrize(
    "name",
    [
        "evidence.unimodal",
        "evidence.pixels",
        "evidence.surprisal",
        "evidence.typicality",
        "calibrate.statistics",
        "calibrate.conformal",
        "calibrate.calibration",
        "weigh.scheduler",
        "weigh.losses",
        "steer.bias",
        "steer.masks",
        "dms",
    ],
)
def test_the_method_is_on_the_api_pages(name):
    assert f"modeling_dms.{name}" in documented()


# ---- the site


def test_the_site_builds_and_needs_no_other(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "WARNING" not in done.stdout + done.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    for name, html in pages.items():
        remote = re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"', html)
        assert not remote, name
    method = pages["method/index.html"]
    assert method.count("<math") >= PAGES["docs/method.md"].read_text().count("```math")
    # what was not understood is left as it is
    assert not re.search(r"<m[ino][^>]*>\\", method)
