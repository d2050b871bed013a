"""What somebody with a folder of their own may get wrong, and the one line that says so. The commands themselves are
the README's, which tests/test_docs.py runs."""

import json
import re

import pytest
from typer.testing import CliRunner

from modeling_dms.training.cli import app
from tests import tiny


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
        ("no pictures", r"none of the 60 samples can be read; .*0.png cannot be read: .*No such file"),
        ("one picture", r"needs 50 different images and 50 contexts to weigh them against, got 1 and 1;"),
        ("no contexts", r"got 60 and 0; without contexts, docs/calibrate.md weighs images against questions"),
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
        case "no contexts":
            change(folder, without("context"))
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
    assert sum(text.startswith("left out: sample") and "cannot be read" in text for text in said) == 20
    assert said[-1] == "20 of 60 samples left out: their images cannot be read"


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
