"""A user's own images with a JSONL, JSON or Parquet table."""

import hashlib
import json
from pathlib import Path
from typing import Any

from modeling_dms.training.data.samples import CAPTION_QUESTION, SPLITS, TASKS, Sample, split_of


COLUMNS = ("id", "image", "context", "question", "prompt", "answers", "answer", "task", "split")
SUFFIXES = (".json", ".jsonl", ".parquet")


def load_folder(path: str | Path, split: str | None = None) -> list[Sample]:
    """Reads a table, one sample a row. Images are not opened here: a broken one is found, and named, by `load_image`.

    Columns, all but `question` optional: `id`; `image` (a path relative to the table's folder, in Parquet also bytes
    or the struct that `datasets` writes); `context`; `question` or `prompt` (captions and retrieval have a default);
    `answers` (a list or one string) or `answer`; `task` (`"vqa"` by default); `split`. Others are ignored. A row
    without an `id` gets one from its content, so that no id changes when rows are added or moved.

    Args:
        path: a `.jsonl`, `.json` (a list of objects) or `.parquet` file, or a folder that holds exactly one.
        split: the rows whose `split` is this; in a table without that column, the rows in this part of a fixed
            division into `"train"`, `"validation"` and `"test"`. It goes by the hash of the image's path where there
            is one, so that all questions on an image stay together, and of the id otherwise. `None`: all rows.

    Raises:
        ValueError: naming file, row and column of what cannot be used; for a split without rows.
        FileNotFoundError: where there is no such file or folder.
    """
    table = _find_table(Path(path))
    rows = _read(table)
    if not rows:
        raise ValueError(f"{table}: no rows")
    has_splits = any("split" in row for _, row in rows)
    if split is not None and not has_splits and split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")

    samples: list[Sample] = []
    splits: dict[str, str | None] = {}
    for where, row in rows:
        sample = _sample(table, where, row)
        if sample.id in splits:
            raise ValueError(f"{where}, column 'id': {sample.id!r} is already the id of another row")
        image = row.get("image")
        grouped_by = Path(image).as_posix() if isinstance(image, str) else sample.id
        splits[sample.id] = _text(where, row, "split") if has_splits else split_of(grouped_by)
        if split is None or splits[sample.id] == split:
            samples.append(sample)
    if not samples:
        raise ValueError(f"{table}: no rows of split {split!r}, there are {sorted(map(str, set(splits.values())))}")
    return samples


def _find_table(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path}: expected a file of type {', '.join(SUFFIXES)}")
        return path
    tables = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if len(tables) != 1:
        found = ", ".join(p.name for p in tables) or "none"
        raise ValueError(f"{path}: expected exactly one file of type {', '.join(SUFFIXES)}, found {found}")
    return tables[0]


def _read(table: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows, each with how to name it in errors."""
    suffix = table.suffix.lower()
    if suffix == ".parquet":
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError('Parquet files need the eval extra: pip install "modeling-dms[eval]"') from error
        try:
            file = parquet.ParquetFile(table)
            rows = file.read([name for name in COLUMNS if name in file.schema_arrow.names]).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{table}: not a Parquet file: {error}") from error
        return [(f"{table}, row {number}", row) for number, row in enumerate(rows, 1)]

    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: not UTF-8: {error}") from error
    if suffix == ".json":
        parsed = _parse(text, str(table))
        if not isinstance(parsed, list):
            raise ValueError(f"{table}: expected a list of objects, got {type(parsed).__name__}")
        values = [(f"{table}, row {number}", row) for number, row in enumerate(parsed, 1)]
    else:
        # not splitlines(), which also splits at characters that JSON strings may hold
        lines = [(f"{table}, row {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        values = [(where, _parse(line, where)) for where, line in lines]
    for where, row in values:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object of columns, got {type(row).__name__}")
    return values


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _text(where: str, row: dict[str, Any], column: str) -> str | None:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}, column {column!r}: expected text, got {type(value).__name__}")
    return value


def _sample(table: Path, where: str, row: dict[str, Any]) -> Sample:
    task = _text(where, row, "task") or "vqa"
    if task not in TASKS:
        raise ValueError(f"{where}, column 'task': expected one of {', '.join(TASKS)}, got {task!r}")
    question = _text(where, row, "question") or _text(where, row, "prompt")
    if not question and task == "vqa":
        raise ValueError(f"{where}, column 'question' (or 'prompt'): missing or empty")
    column = "answers" if row.get("answers") is not None else "answer"
    answers = row.get(column) if row.get(column) is not None else []
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}, column {column!r}: expected text or a list of texts, got {answers!r:.100}")
    sample_id = row.get("id")
    if sample_id is None:
        content = repr([(name, row[name]) for name in COLUMNS if row.get(name) is not None and name != "split"])
        sample_id = f"{table.stem}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    elif isinstance(sample_id, bool) or not isinstance(sample_id, str | int):
        raise ValueError(f"{where}, column 'id': expected text or an integer, got {type(sample_id).__name__}")
    image = _image(table, where, row.get("image"))
    return Sample(
        str(sample_id), image, _text(where, row, "context"), question or CAPTION_QUESTION, tuple(answers), task
    )


def _image(table: Path, where: str, value: Any) -> Path | bytes | None:
    if isinstance(value, dict) and value.keys() >= {"bytes", "path"}:
        # what `datasets` writes: the bytes, or a path to them
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str):
        return table.parent / value
    if value is None or isinstance(value, bytes):
        return value
    raise ValueError(f"{where}, column 'image': expected a path, bytes or null, got {type(value).__name__}")
