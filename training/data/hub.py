"""Published data sets, by their id on the Hugging Face Hub."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from modeling_dms.training.data.samples import CAPTION_QUESTION, SPLITS, Sample, StoredImage, split_of


@dataclass(frozen=True)
class HubDataset:
    """Where a data set keeps what a `Sample` holds.

    Attributes:
        task: `"vqa"` or `"caption"`.
        published_split: the one split that comes with answers; ours divide it.
        id: column that is unique to a row.
        image_id: column that ends in the image's number.
        images: the collection which those numbers belong to.
        answers: column of texts, or of annotations with an `answer` each.
        question: column, or `None` for `CAPTION_QUESTION`.
        image: column.
    """

    task: str
    published_split: str
    id: str
    image_id: str
    images: str
    answers: str
    question: str | None = None
    image: str = "image"


# Parquet-backed ids only: `datasets` no longer runs loading scripts. The COCO captions' own question is one long
# instruction, the same in every row.
HUB_DATASETS = {
    "lmms-lab/COCO-Caption": HubDataset("caption", "val", "question_id", "question_id", "coco", "answer"),
    "lmms-lab/COCO-Caption2017": HubDataset("caption", "val", "question_id", "question_id", "coco", "answer"),
    "lmms-lab/VQAv2": HubDataset("vqa", "validation", "question_id", "image_id", "coco", "answers", "question"),
    "lmms-lab/flickr30k": HubDataset("caption", "test", "img_id", "img_id", "flickr30k", "caption"),
}


def load_hub(
    name: str,
    split: str,
    streaming: bool = False,
    limit: int | None = None,
    data_files: str | Sequence[str] | None = None,
) -> Iterable[Sample]:
    """The samples of a split of a published data set, in its order.

    These ids publish a single split with answers each. It is divided by the hash of the image's number, so that all
    questions on an image stay together, and COCO's images are in the same split whichever data set brings them.

    Args:
        name: one of `HUB_DATASETS`.
        split: `"train"`, `"validation"` or `"test"`.
        streaming: a generator that downloads as it goes, instead of a list, whose images stay on disk.
        limit: take the first samples only.
        data_files: local Parquet files of the same columns, to be read instead of the Hub's.

    Raises:
        ValueError: for an unknown name or split, missing columns, or a split without samples.
        ConnectionError: if the Hub cannot be reached and the data set is not in the local cache.
        ImportError: without the `eval` extra.
    """
    if name not in HUB_DATASETS:
        raise ValueError(f"unknown data set {name!r}, expected one of {', '.join(HUB_DATASETS)}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    spec = HUB_DATASETS[name]
    asked = [spec.question] if spec.question else []
    columns = list(dict.fromkeys([spec.image, spec.id, spec.image_id, spec.answers, *asked]))
    rows = read_parquet(name, spec.published_split, columns, streaming, data_files)
    samples = islice(_samples(name, split, rows), limit)
    return samples if streaming else list(samples)


def read_parquet(
    name: str,
    split: str,
    columns: Sequence[str],
    streaming: bool = False,
    data_files: str | Sequence[str] | None = None,
) -> Iterable[dict[str, Any]]:
    """The rows of a published split, some columns of them, of which the first one holds images that stay encoded.

    Raises:
        ValueError, ConnectionError, ImportError: as `load_hub`.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'{name} needs the eval extra: pip install "modeling-dms[eval]"') from error

    try:
        if data_files is None:
            rows = datasets.load_dataset(name, split=split, streaming=streaming)
        else:
            rows = datasets.load_dataset("parquet", data_files=data_files, split="train", streaming=streaming)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except OSError as error:
        if data_files is not None:
            raise
        raise ConnectionError(
            f"{name} is neither in the local cache nor to be had from the Hub ({type(error).__name__}); "
            "`data_files` takes local Parquet files of it"
        ) from error
    missing = sorted(set(columns) - set(rows.column_names or ()))
    if missing:
        raise ValueError(f"{name}: no column {', '.join(missing)}; there are {', '.join(rows.column_names or ())}")
    # decoded by `load_image`, which names the sample of a broken image
    rows = rows.select_columns(list(columns)).cast_column(columns[0], datasets.Image(decode=False))
    return cast(Iterable[dict[str, Any]], rows)


def with_stored_images(rows: Any, column: str) -> Iterator[tuple[dict[str, Any], StoredImage | bytes | None]]:
    """Rows and the image of each, which stays where it is: of a stream in the row, of a table on disk."""
    if not hasattr(rows, "data"):
        yield from ((row, row[column] and row[column]["bytes"]) for row in rows)
        return
    missing = rows.data.column(column).is_null().to_pylist()
    for place, row in enumerate(rows.remove_columns(column)):
        yield row, None if missing[place] else StoredImage(rows, column, place)


def _samples(name: str, split: str, rows: Iterable[dict[str, Any]]) -> Iterator[Sample]:
    spec = HUB_DATASETS[name]
    found = False
    for row, image in with_stored_images(rows, spec.image):
        number = re.search(r"(\d+)(\.\w+)?$", str(row[spec.image_id]))
        if number is None:
            raise ValueError(f"{name}, column {spec.image_id!r}: expected to end in a number: {row[spec.image_id]!r}")
        if split_of(f"{spec.images}-{int(number[1])}") != split:
            continue
        found = True
        question = row[spec.question] if spec.question else CAPTION_QUESTION
        answers = [a["answer"] if isinstance(a, dict) else a for a in row[spec.answers] or ()]
        if spec.task == "vqa":
            # a stable sort: the first answer is the training target, all ten count in the score
            counts = Counter(answers)
            answers.sort(key=lambda answer: -counts[answer])
        yield Sample(f"{name}-{row[spec.id]}", image, None, question, tuple(answers), spec.task)
    if not found:
        raise ValueError(f"{name}: no samples of split {split!r}")
