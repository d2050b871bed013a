"""One way to name any data set."""

import hashlib
import os
import sys
from itertools import islice

from modeling_dms.training.data.easy_vqa import load_easy_vqa
from modeling_dms.training.data.flickr8k import is_flickr8k, load_flickr8k
from modeling_dms.training.data.folder import Table, read_table
from modeling_dms.training.data.hub import HUB_DATASETS, load_hub
from modeling_dms.training.data.noto import load_noto
from modeling_dms.training.data.openmoji import load_openmoji
from modeling_dms.training.data.samples import TASKS, Sample
from modeling_dms.training.data.stamps import load_stamps


# by name, of pictures whose names and keywords serve every task
PICTURES = {"openmoji": load_openmoji, "noto": load_noto, "stamps": load_stamps}
# an image and its texts serve both
CAPTIONED = {"caption", "retrieval"}


def opened(source: str) -> str | Table:
    """The table of a path, which is then read once for all splits; of any other source what names it."""
    return read_table(source) if os.path.exists(source) and not is_flickr8k(source) else source


def load_samples(source: str | Table, split: str, task: str | None = None, limit: int | None = None) -> list[Sample]:
    """The samples of a split of any data set.

    Those of `PICTURES` come in the order of a hash, so that the first ones are a fair sample of all: by their code
    points all flags stand together.

    Args:
        source: the path of a folder or file for `load_folder`, or of Flickr8k's files; `"easy-vqa"`, `"flickr8k"`, one
            of `PICTURES`, an id of `HUB_DATASETS`; or what `opened` makes of any of them.
        split: `"train"` (not of `noto` and `stamps`), `"validation"` or `"test"`, or what a file's own `split` column
            holds.
        task: `"vqa"`, `"caption"` or `"retrieval"`; captioned images also serve retrieval, and the other way round.
            `None`: whatever the source holds, of `easy-vqa` the questions, of photographs and `PICTURES` the captions.
        limit: take the first samples only.

    Raises:
        ValueError: for an unknown source, split or task, or where no sample is left.
        ConnectionError, FileNotFoundError, ImportError: where the source cannot be had.
    """
    if task not in (None, *TASKS):
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    source = opened(source) if isinstance(source, str) else source
    if isinstance(source, Table):
        samples = source.of(split)
    elif source == "easy-vqa":
        samples = load_easy_vqa(split, task or "vqa")
    elif source == "flickr8k" or is_flickr8k(source):
        samples = load_flickr8k(split, task or "caption", None if source == "flickr8k" else source)
    elif source in PICTURES:
        samples = sorted(PICTURES[source](split, task or "caption"), key=_drawn)
    elif source in HUB_DATASETS:
        samples = load_hub(source, split, limit=limit)
    else:
        names = ", ".join(("easy-vqa", "flickr8k", *PICTURES, *HUB_DATASETS))
        raise ValueError(f"unknown source {source!r}, expected {names}, or the path of a folder or file")
    if task is not None:
        served = CAPTIONED if task in CAPTIONED else {task}
        samples = [s if s.task == task else s.replace(task=task) for s in samples if s.task in served]
    samples = list(islice(samples, limit))
    if not samples:
        name = source.path if isinstance(source, Table) else source
        raise ValueError(f"{name}: no samples for task {task!r} in split {split!r}")
    return samples


def _drawn(sample: Sample) -> bytes:
    return hashlib.sha256(sample.id.encode()).digest()


def print_summary(source: str | Table) -> None:
    """Says on standard error what was found in a table."""
    if isinstance(source, Table):
        print(source.summary(), file=sys.stderr)


def load_sources(
    sources: str, split: str, task: str | None = None, limit: int | None = None, show_summary: bool = True
) -> list[Sample]:
    """The samples of several data sets, mixed evenly: the first hundred hold as much of each as all do.

    Args:
        sources: separated by commas, as for `load_samples`; `name:task` takes another task of one than `task`. A path
            that exists is one source, whatever its name.
        limit: of each source.
        show_summary: `print_summary` of each source.

    Raises:
        ValueError, ConnectionError, FileNotFoundError, ImportError: as `load_samples`.
    """
    placed, named = [], named_sources(sources)
    if not named:
        raise ValueError(f"expected at least one source, got {sources!r}")
    for name, wanted in named:
        source = opened(name)
        if show_summary:
            print_summary(source)
        found = load_samples(source, split, wanted or task, limit)
        placed += [((place + 0.5) / len(found), sample) for place, sample in enumerate(found)]
    return [sample for _, sample in sorted(placed, key=lambda pair: pair[0])]


def named_sources(sources: str) -> list[tuple[str, str | None]]:
    """Each source and the task it was asked for, of a list as `load_sources` takes it."""
    found = []
    parts = sources.split(",")
    while parts:
        # a path may hold commas and colons itself: the longest one that exists is meant
        ends = (end for end in range(len(parts), 1, -1) if os.path.exists(_named(",".join(parts[:end]))[0]))
        end = next(ends, 1)
        source, parts = ",".join(parts[:end]), parts[end:]
        source = source if os.path.exists(_named(source)[0]) else source.strip()
        if source:
            found.append(_named(source))
    return found


def _named(source: str) -> tuple[str, str | None]:
    name, _, wanted = source.rpartition(":")
    return (name, wanted) if name and wanted in TASKS and not os.path.exists(source) else (source, None)
