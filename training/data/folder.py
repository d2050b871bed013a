"""A user's own images with a JSONL, JSON or Parquet table."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_dms.training.data.samples import (
    CAPTION_QUESTION,
    TASKS,
    Sample,
    image_keys,
    split_of,
    warn_left_out,
)


logger = logging.getLogger(__name__)

COLUMNS = ("id", "image", "images", "context", "contexts", "question", "prompt", "answers", "answer", "task", "split")
SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True, eq=False)
class Table:
    """A user's table.

    Attributes:
        path: the file.
        samples: one a row.
        splits: which split each sample is in.
        images: how many different ones there are.
        ignored: columns that are not read.
        repeated: why a row is left out: an earlier one has its id.
    """

    path: Path
    samples: list[Sample]
    splits: Sequence[str | None]
    images: int
    ignored: list[str]
    repeated: dict[str, str]

    def of(self, split: str | None) -> list[Sample]:
        """The samples of a split; all for `None`.

        Raises:
            ValueError: if there is none.
        """
        found = [s for s, own in zip(self.samples, self.splits, strict=True) if split is None or own == split]
        if not found:
            there = ", ".join(sorted(map(repr, set(self.splits))))
            raise ValueError(f"{self.path}: no rows of split {split!r}, there are {there}")
        return found

    def summary(self) -> str:
        """What was found in it, in a line."""
        splits = ", ".join(f"{name} {count}" for name, count in Counter(self.splits).most_common())
        images = sum(sample.image is not None for sample in self.samples)
        contexts = sum(bool((sample.context or "").strip()) for sample in self.samples)
        answers = sum(bool(sample.answers) for sample in self.samples)
        ignored = f"; columns ignored: {', '.join(self.ignored)}" if self.ignored else ""
        return (
            f"{self.path}: {len(self.samples)} rows ({splits}); {images} with an image ({self.images} different), "
            f"{contexts} with a context, {answers} with answers{ignored}"
        )


def load_folder(path: str | Path, split: str | None = None) -> list[Sample]:
    """Reads a table, one sample a row. Images are not decoded here: a broken one is found, and named, by `load_image`.

    Columns, all but `question` optional: `id`; `image` (a path relative to the table's folder, in Parquet also bytes
    or the struct that `datasets` writes); `context`; `images` and `contexts`, lists of further ones; `question` or
    `prompt` (captions and retrieval have a default); `answers` (a list or one string) or `answer`; `task` (`"vqa"` by
    default); `split`. Others are ignored. A row without an `id` gets one from its content, so that no id changes when
    rows are added or moved. Of rows with the same id the first one stays.

    Args:
        path: a `.jsonl`, `.json` (a list of objects) or `.parquet` file, or a folder that holds exactly one.
        split: the rows whose `split` is this; in a table without that column, the rows in this part of a fixed
            division into `"train"`, `"validation"` and `"test"`. It goes by the hash of the image's content where
            there is one, so that all questions on an image stay together whatever it is called, and of the id
            otherwise. `None`: all rows.

    Raises:
        ValueError: naming file, row and column of what cannot be used; for a split without rows.
        FileNotFoundError: where there is no such file or folder.
    """
    return read_table(path).of(split)


def read_table(path: str | Path) -> Table:
    """Reads a table as `load_folder` does. Warns of repeated ids, of images in two splits, and where no row has an
    image although there are columns that are not read.

    Raises:
        ValueError, FileNotFoundError: as `load_folder`.
    """
    table = _find_table(Path(path))
    rows, columns = _read(table)
    if not rows:
        raise ValueError(f"{table}: no rows")
    samples: dict[str, Sample] = {}
    given: list[str | None] = []
    repeated: dict[str, str] = {}
    for where, row in rows:
        sample = _sample(table, where, row)
        split = _text(where, row, "split")
        if sample.id in samples:
            repeated[where] = f"{where}: the id {sample.id!r} is that of an earlier row"
            continue
        samples[sample.id] = sample
        given.append(split)
    warn_left_out(repeated.values(), len(rows), "earlier rows have their ids")

    found = list(samples.values())
    keys = image_keys(found)
    if "split" in columns:
        splits = given
        _warn_of_shared_images(table, found, keys, splits)
    else:
        splits = [split_of(key or sample.id) for key, sample in zip(keys, found, strict=True)]
    images = len(set(keys) - {None})
    ignored = [name for name in columns if name not in COLUMNS]
    if ignored and not images:
        logger.warning(
            f"{table}: no image in any row. Images are read from the column 'image'; "
            f"these columns are ignored: {', '.join(ignored)}"
        )
    return Table(table, found, splits, images, ignored, repeated)


def _warn_of_shared_images(
    table: Path, samples: list[Sample], keys: list[str | None], splits: Sequence[str | None]
) -> None:
    """The column `split` is taken at its word, but a test image that was trained on tests little."""
    places: dict[str, dict[str, Sample]] = {}
    for sample, key, split in zip(samples, keys, splits, strict=True):
        if key is not None and split is not None:
            places.setdefault(key, {})[split] = sample
    shared = [own for own in places.values() if len(own) > 1]
    if shared:
        sample = next(iter(shared[0].values()))
        name = sample.image if isinstance(sample.image, Path) else f"that of sample {sample.id!r}"
        logger.warning(
            f"{table}: {len(shared)} image(s) stand in more than one split, such as {name} in "
            f"{' and '.join(shared[0])}; what is measured on an image is worth little where it was trained on"
        )


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


def _read(table: Path) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """The rows, each with how to name it in errors, and the names of all columns."""
    suffix = table.suffix.lower()
    if suffix == ".parquet":
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError('Parquet files need the eval extra: pip install "modeling-dms[eval]"') from error
        try:
            file = parquet.ParquetFile(table)
            columns = file.schema_arrow.names
            rows = file.read([name for name in COLUMNS if name in columns]).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{table}: not a Parquet file: {error}") from error
        return [(f"{table}, row {number}", row) for number, row in enumerate(rows, 1)], columns

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
    return values, list(dict.fromkeys(name for _, row in values for name in row))


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
    answers = [answer for answer in answers if answer.strip()]
    sample_id = row.get("id")
    if sample_id is None:
        content = repr([(name, row[name]) for name in COLUMNS if row.get(name) is not None and name != "split"])
        sample_id = f"{table.stem}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    elif isinstance(sample_id, bool) or not isinstance(sample_id, str | int):
        raise ValueError(f"{where}, column 'id': expected text or an integer, got {type(sample_id).__name__}")
    # the first of several is the one image, and the one passage
    images = [_image(table, where, value) for value in [row.get("image"), *_list(row, "images")]]
    given = [image for image in images if image is not None]
    contexts = [_text(where, row, "context"), *_list(row, "contexts")]
    if not all(isinstance(context, str) for context in contexts[1:]):
        raise ValueError(f"{where}, column 'contexts': expected text or a list of texts, got {contexts[1:]!r:.100}")
    passages = [context for context in contexts if context and context.strip()]
    return Sample(
        str(sample_id),
        given[0] if given else None,
        passages[0] if passages else contexts[0],
        question or CAPTION_QUESTION,
        tuple(answers),
        task,
        images=tuple(given[1:]),
        contexts=tuple(passages[1:]),
    )


def _list(row: dict[str, Any], column: str) -> list[Any]:
    """What a column of several holds, which may be one."""
    value = row.get(column)
    return value if isinstance(value, list) else [] if value is None else [value]


def _image(table: Path, where: str, value: Any) -> Path | bytes | None:
    if isinstance(value, dict) and value.keys() >= {"bytes", "path"}:
        # what `datasets` writes: the bytes, or a path to them
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str):
        return table.parent / value if value else None
    if value is None or isinstance(value, bytes):
        return value
    raise ValueError(f"{where}, column 'image': expected a path, bytes or null, got {type(value).__name__}")
