"""What somebody with a folder of their own may get wrong, and the one line that says so. The commands themselves are
the README's, which tests/test_docs.py runs."""

import json
import re
import shutil

import pytest
from PIL import Image
from typer.testing import CliRunner

from modeling_dms.training.cli import app
from modeling_dms.training.data.samples import SPLITS
from tests import tiny
from tests.training.conftest import calibrate_up_to


def change(folder, changed):
    """Rewrites a table row by row."""
    table = folder / "table.jsonl"
    rows = [changed(json.loads(line)) for line in table.read_text().splitlines()]
    table.write_text("\n".join(map(json.dumps, rows)))


def without(column):
    return lambda row: {name: value for name, value in row.items() if name != column}


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("no folder", r"unknown source '.*/data', expected .* or the path of a folder or file"),
        ("no table", r"data: expected exactly one file of type .json, .jsonl, .parquet, found none"),
        ("no questions", r"table.jsonl, row 1, column 'question' \(or 'prompt'\): missing or empty"),
        (
            "no pictures",
            r"none of the 60 samples can be used: their images cannot be read; .*0.png cannot be read: .*No such file",
        ),
        ("one picture", r"needs 50 different images and 50 contexts to weigh them against, got 1 and 1;"),
        ("copies", r"needs 50 different images and 50 contexts to weigh them against, got 1 and 1; .*column 'split'"),
        (
            "no split",
            r"got (4\d) and \1; these are of the training split, .* four of five images .* without a column 'split'",
        ),
        ("questions too long", r"none of the 60 samples can be used: they cannot be asked; sample .* max_length=512"),
        ("no images", r"got 0 and 1; without images there is nothing to weigh$"),
        ("few contexts", r"got 60 and 30; without any contexts, images would be weighed against questions"),
        ("no model", r"error: nowhere: "),
    ],
)
def test_a_mistake_is_named_in_one_line(mistake, said, tmp_path):
    folder = tmp_path / "data"
    if mistake != "no folder":
        tiny.table(folder, 60)
    match mistake:
        case "no table":
            (folder / "table.jsonl").unlink()
        case "no questions":
            change(folder, without("question"))
        case "no pictures":
            for picture in folder.glob("*.png"):
                picture.unlink()
        case "one picture":
            change(folder, lambda row: {**row, "image": "0.png", "id": row["image"]})
        case "copies":
            for number in range(1, 60):
                shutil.copy(folder / "0.png", folder / f"{number}.png")
        case "no split":
            change(folder, without("split"))
        case "questions too long":
            change(folder, lambda row: {**row, "question": "what? " * 600})
        case "no images":
            change(folder, without("image"))
        case "few contexts":
            change(folder, lambda row: row if int(row["image"][:-4]) < 30 else without("context")(row))
    model = "nowhere" if mistake == "no model" else "demo-llava"
    command = ["calibrate", "--model", model, "--data", str(folder), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(said, last), last
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_missing_are_named_and_left_out(tmp_path, caplog):
    folder = tiny.table(tmp_path / "data", 60)
    for number in range(20):
        (folder / f"{number}.png").unlink()
    command = ["calibrate", "--model", "demo-llava", "--data", str(folder), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "got 40 and 40" in done.stderr
    said = [record.getMessage() for record in caplog.records]
    # a few show what is wrong, thousands would hide it
    assert sum(text.startswith("left out: sample") and "cannot be read" in text for text in said) == 5
    assert said[-1] == "20 of 60 samples left out: their images cannot be read"


BAD = {
    "unreadable": {"image": "nowhere.png"},
    "unanswered": {"answers": []},
    "blank": {"answers": ["", " "]},
    "too long": {"question": "what? " * 600},
    "of nothing": {"image": None, "context": " "},
    "repeated": {"id": "2"},
}


def spoilt(folder, splits):
    """A table of good rows, and in each split one of every kind of `BAD`."""
    rows = []
    for split, count in splits.items():
        for number in range(count):
            name = f"{split}-{number}.png"
            Image.new("RGB", (64, 64), (3 * number, SPLITS.index(split) * 80, 0)).save(folder / name)
            answers = ["box" if number % 2 else "circle"]
            row = {"image": name, "context": f"a {answers[0]}.", "question": "what?", "answers": answers}
            rows.append({"id": str(len(rows)), "split": split, **row})
        good = rows[-1]
        rows += [{**good, "id": f"{split} {kind}", "question": f"what {kind}?", **bad} for kind, bad in BAD.items()]
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_training_goes_on_without_the_samples_that_cannot_be_used(tmp_path, caplog):
    spoilt(tmp_path, {"train": 8})
    arguments = {
        "model": "demo-llava",
        "data": tmp_path,
        "output_dir": tmp_path / "run",
        "max_steps": 8,
        "use_cpu": True,
    }
    arguments |= {
        "config": "scheduler",
        "calibration_samples": 0,
        "per_device_train_batch_size": 2,
        "report_to": "none",
    }
    done = CliRunner().invoke(app, ["train", *(f"--{name}={value}" for name, value in arguments.items())])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "run" / "run.json").read_text())["samples"] == 8
    said = "\n".join(record.getMessage() for record in caplog.records)
    for kind in ("unreadable", "unanswered", "blank", "too long", "of nothing"):
        assert f"left out: sample 'train {kind}'" in said
    assert "left out: " + str(tmp_path / "table.jsonl") + ", row 14: the id '2'" in said
    for count, why in ((2, "they have no answer"), (1, "their images cannot be read"), (2, "they cannot be asked")):
        assert re.search(rf"{count} of \d+ samples left out: {why}", said)


def test_an_evaluation_goes_on_without_the_samples_that_cannot_be_used(tmp_path, monkeypatch, caplog):
    """Of no split that it uses: the checkpoint is calibrated, and baselines are trained and searched."""
    calibrate_up_to(monkeypatch, 1)
    spoilt(tmp_path, {"train": 60, "validation": 4, "test": 4})
    out = tmp_path / "run"
    options = {"samples": 9, "seeds": 1, "severities": 5, "corruptions": "image:black", "methods": "static,energy"}
    options |= {"model": "demo-llava", "data": tmp_path, "out": out, "validation_samples": 4}
    done = CliRunner().invoke(app, ["evaluate", *(f"--{k.replace('_', '-')}={v}" for k, v in options.items())])
    assert done.exit_code == 0, done.output
    run = json.loads((out / "results.json").read_text())["run"]
    assert run["samples"] == 4
    kinds = [kind for kind in BAD if kind != "repeated"]
    assert set(run["failed"]) == {f"test {kind}" for kind in kinds}
    repeated = {f"{tmp_path / 'table.jsonl'}, row {row}" for row in (66, 76, 86)}
    assert set(run["left_out"]) == {f"{s} {kind}" for s in ("train", "validation") for kind in kinds} | repeated
    for errors in (run["failed"], run["left_out"]):
        for name, error in errors.items():
            assert name in error
    assert "5 sample(s) failed" in (out / "report.md").read_text()


@pytest.mark.parametrize("command", ["calibrate", "train", "evaluate"])
def test_every_command_says_once_what_it_found_in_the_table(tmp_path, monkeypatch, command):
    calibrate_up_to(monkeypatch, 1)
    folder = tiny.table(tmp_path / "data", 55)
    change(folder, lambda row: {**row, "note": "-", "split": "test" if row["image"] == "0.png" else "train"})
    out, data = str(tmp_path / "out"), ["--model", "demo-llava", "--data", str(folder)]
    options = {
        "calibrate": f"--out {out}",
        "train": f"--output_dir {out} --config scheduler --max_steps 1 --use_cpu true",
        "evaluate": f"--out {out} --samples 1 --corruptions image:black --seeds 1 --methods static",
    }
    done = CliRunner().invoke(app, [command, *data, *options[command].split()])
    assert done.exit_code == 0, done.output
    said = "55 rows (train 54, test 1); 55 with an image (55 different), 55 with a context, 55 with answers"
    assert done.stderr.count(f"{folder / 'table.jsonl'}: {said}; columns ignored: note\n") == 1


def test_a_picture_to_ask_about_must_exist(tmp_path):
    command = ["predict", "--image", str(tmp_path / "none.png"), "--question", "what?"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert "none.png cannot be read" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("predict --model demo-llava --max-new-tokens 100000", "100000 new tokens do not fit: .* room for 512,"),
        ("predict --model demo-llava --max-new-tokens 512", "512 new tokens do not fit: .* room for 512,"),
        ("predict --model demo-blip2 --max-new-tokens 300", "300 new tokens do not fit: .* room for 256,"),
        ("train --model demo-blip2 --data easy-vqa --max_length 257", "max_length=257: demo-blip2 has room for 256"),
    ],
)
def test_more_tokens_than_the_model_has_room_for(command, said, tmp_path):
    asked = {
        "predict": ["--question", "what?", "--context", "a box."],
        "train": ["--output_dir", str(tmp_path / "run")],
    }
    done = CliRunner().invoke(app, [*command.split(), *asked[command.split()[0]]])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert re.search(f"error: .*{said}", done.stderr.strip().splitlines()[-1])
