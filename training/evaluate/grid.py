"""Runs methods over samples, corruptions and seeds: every method sees the same samples and the same draws."""

import contextlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_dms.training.corruptions import corrupt, self_made_families
from modeling_dms.training.data import Sample
from modeling_dms.training.data.samples import image_key
from modeling_dms.training.evaluate.methods import Batch, Fixed, Method, on_device
from modeling_dms.training.evaluate.tasks import Task


ORACLE = "oracle"
ORACLE_WEIGHTS = (0.05, 0.01, 0.0)  # of the damaged modality


@dataclass(frozen=True)
class Condition:
    """How samples are corrupted.

    Attributes:
        name: of `corrupt`, several joined by `+`, or `"clean"`.
        group: what the report puts together: `"clean"`, `"seen"`, `"unseen image"`, `"unseen text"`, `"mismatch"`, ...
        severity: 1 to 5; 0 for clean.
    """

    name: str
    group: str
    severity: int = 0

    @property
    def damaged(self) -> int | None:
        """Which modality alone: 0 vision, 1 text."""
        sides = {int(name.startswith("text")) for name in self.kinds}
        return sides.pop() if len(sides) == 1 else None

    @property
    def kinds(self) -> list[str]:
        """The names of all corruptions, one after the other."""
        return [] if self.name == "clean" else self.name.split("+")

    @property
    def unseen_families(self) -> list[str]:
        """Of calibration's self-made damage, those that the detectors must not know, so that the corruptions are
        unseen; none in the group `"seen"`."""
        names = [] if self.group == "seen" else self.kinds
        return [family for name in names for family in self_made_families(name)]

    def lacks(self, sample: Sample) -> str | None:
        """What a sample needs to be measured under this condition and does not have: it would stay as it is, and look
        robust, or leave nothing to ask. `None` where it has all."""
        there = {"image": sample.image is not None, "text": bool((sample.context or "").strip())}
        for kind in self.kinds:
            if not there[kind.partition(":")[0]]:
                return "an image" if kind.startswith("image") else "a context"
        missing = {kind.partition(":")[0] for kind in self.kinds if kind.endswith(":missing")}
        if missing and not any(is_there for modality, is_there in there.items() if modality not in missing):
            return "anything left to answer from"
        return None

    def apply(self, samples: Sequence[Sample], seed: int) -> tuple[list[Sample], dict[str, str]]:
        """Corrupted copies of the samples that lack nothing, and of those that cannot be corrupted the error by id."""
        changed, failed = [], {}
        for place, sample in enumerate(samples):
            if self.lacks(sample) is None:
                try:
                    changed.append(self._corrupted(samples, place, seed))
                except ValueError as error:
                    failed[sample.id] = str(error)
        return changed, failed

    def why_not(self, samples: Sequence[Sample], seed: int, task: Task) -> str | None:
        """Why no sample can be measured under this condition; `None` where one can."""
        reason = None
        if not task.reads_contexts and any(kind.startswith("text") for kind in self.kinds):
            return f"task {task.name!r} reads no contexts"
        for place, sample in enumerate(samples):
            what = self.lacks(sample)
            if what is not None:
                reason = reason or f"no sample has {what}"
                continue
            try:
                self._corrupted(samples, place, seed)
            except ValueError as error:
                reason = str(error)
            else:
                return None
        return reason

    def _corrupted(self, samples: Sequence[Sample], place: int, seed: int) -> Sample:
        """The corrupted copy of one of the samples. A mismatch takes the image or context of the next one with another
        image, another context and another first answer.

        Raises:
            ValueError: naming the sample that cannot be corrupted.
        """
        new, other = samples[place], None
        if any(kind.endswith(":mismatch") for kind in self.kinds):
            rest = [*samples[place + 1 :], *samples[:place]]
            other = next((o for o in rest if self.lacks(o) is None and _differ(o, new)), None)
            if other is None:
                raise ValueError(f"sample {new.id!r}: there is no other sample to mismatch it with")
        for kind in self.kinds:
            new = corrupt(new, kind, max(1, self.severity), other, f"@{seed}")
        return new


def _differ(one: Sample, other: Sample) -> bool:
    """In whatever they have."""
    if one.answers[:1] == other.answers[:1] or (one.context is not None and one.context == other.context):
        return False
    return one.image is None or image_key(one.image) != image_key(other.image)


@dataclass
class Cell:
    """What one method made of the n samples of one condition and seed.

    Attributes:
        method, condition, seed: which.
        metrics: by name, (n,) each; `score` is the task's main one, `reliability` what a method says of its answers.
        weights: (n, M), `None` for a method without.
        seconds: for encoding, deciding and answering, of all processes together; images are encoded once for all
            methods, and answers of methods that weigh a whole batch alike found once, and counted for each.
        failed: errors by id of samples that could not be corrupted or asked: their metrics are 0, their weights equal.
        measured: (n,), whether the condition changes a sample, see `Condition.lacks`; all by default. Where it does
            not, metrics are 0, and count nowhere.
    """

    method: str
    condition: Condition
    seed: int
    metrics: dict[str, np.ndarray]
    weights: np.ndarray | None
    seconds: float
    failed: dict[str, str] = field(default_factory=dict)
    measured: np.ndarray = field(default=None)  # type: ignore[assignment]

    def __post_init__(self):
        if self.measured is None:
            self.measured = np.ones(len(self.metrics["score"]), dtype=bool)

    def mean(self, metric: str = "score") -> float:
        """Over the samples that were measured."""
        return float(self.metrics[metric][self.measured].mean())


def with_images_encoded(model: PreTrainedModel, batch: Batch) -> Batch:
    """The batch with its images encoded, once for all methods."""
    if batch.get("pixel_values") is None or not hasattr(model, "generate"):
        return batch
    # some methods change the pixels
    return {**model.with_images_encoded(batch), "pixel_values": batch["pixel_values"]}


def collated(task: Task, samples: Sequence[Sample], model: PreTrainedModel) -> tuple[Batch | None, dict[str, str]]:
    """A batch of the samples that the task takes, where the model is, `None` without any, and of the others the error
    by id."""
    try:
        return on_device(task.collate(samples), model), {}
    except ValueError:
        failed = {}
        for sample in samples:
            try:
                task.collate([sample])
            except ValueError as error:
                failed[sample.id] = str(error)
        rest = [sample for sample in samples if sample.id not in failed]
        return on_device(task.collate(rest), model) if rest else None, failed


def methods_of(methods: Sequence[Method], condition: Condition) -> list[Method]:
    """The methods of a condition: `ORACLE` in their place stands for one each of `ORACLE_WEIGHTS`, told which modality
    is damaged."""
    found = [method for method in methods if method.name != ORACLE]
    if len(found) < len(methods) and condition.damaged is not None:
        for low in ORACLE_WEIGHTS:
            found.append(Fixed(f"{ORACLE} {low}", low if condition.damaged == 0 else 1 - low))
    return found


@torch.no_grad()
def run_condition(
    model: PreTrainedModel,
    task: Task,
    methods: Sequence[Method],
    samples: Sequence[Sample],
    condition: Condition,
    seed: int,
    batch_size: int,
) -> list[Cell]:
    """All methods under one condition, in all processes. Of an unseen corruption the model's detectors do not know the
    family.

    Batches are the same whatever the number of processes, which take turns: so are the results, but for rounding.
    """
    state = PartialState()
    corrupted, failed = condition.apply(samples, seed)
    chosen = methods_of(methods, condition)
    own: list[tuple[int, str, list[dict[str, Any]], list | None, float, list | None]] = []
    unfit: list[tuple[str, str]] = []
    starts = range(0, len(corrupted), batch_size)
    for number, start in enumerate(starts):
        if number % state.num_processes != state.process_index:
            continue
        batch, errors = collated(task, corrupted[start : start + batch_size], model)
        unfit += errors.items()
        if batch is None:
            continue
        began = time.perf_counter()
        batch = with_images_encoded(model, batch)
        encoding = time.perf_counter() - began
        by_weights: dict[str, tuple[list[dict[str, Any]], float]] = {}
        for method in chosen:
            began = time.perf_counter()
            vanilla = not hasattr(model, "families_left_out")
            with contextlib.nullcontext() if vanilla else model.families_left_out(condition.unseen_families):
                decision, trust = method.judge(model, batch)
                deciding = time.perf_counter() - began
            weights = None if (given := method.weights(decision)) is None else given.tolist()
            # methods that have weights answer by these alone
            known = None if weights is None else by_weights.get(str(weights))
            if known is None:
                began = time.perf_counter()
                known = task.answer(method, model, batch, decision), time.perf_counter() - began
                if weights is not None:
                    by_weights[str(weights)] = known
            reliability = None if trust is None else trust.tolist()
            own.append((number, method.name, known[0], weights, encoding + deciding + known[1], reliability))
    rows = sorted(gather_object(own), key=lambda row: row[0])
    failed |= dict(gather_object(unfit))
    if not rows:
        reason = next(iter(failed.values()), condition.why_not(samples, seed, task))
        raise ValueError(f"{condition.name}: no sample could be asked, {reason}")
    answered = [sample for sample in corrupted if sample.id not in failed]
    measured = np.array([condition.lacks(sample) is None for sample in samples])
    cells = []
    for method in chosen:
        mine = [row for row in rows if row[1] == method.name]
        answers = [answer for row in mine for answer in row[2]]
        weights = None if mine[0][3] is None else np.array([w for row in mine for w in row[3]], dtype=float)
        metrics = task.scores(answers, answered)
        if mine[0][5] is not None:
            metrics["reliability"] = np.array([trust for row in mine for trust in row[5]])
        if failed or not measured.all():
            kept = [place for place, sample in enumerate(samples) if measured[place] and sample.id not in failed]
            metrics = {name: _spread(values, kept, len(samples), 0.0) for name, values in metrics.items()}
            weights = None if weights is None else _spread(weights, kept, len(samples), 1 / weights.shape[1])
        seconds = sum(row[4] for row in mine)
        cells.append(Cell(method.name, condition, seed, metrics, weights, seconds, failed, measured))
    if any(cell.method.startswith(f"{ORACLE} ") for cell in cells):
        both = [cell for cell in cells if cell.method.startswith(f"{ORACLE} ")]
        best = max(both, key=Cell.mean)
        cells = [cell for cell in cells if cell not in both]
        cells.append(replace(best, method=ORACLE))
    return cells


def _spread(values: np.ndarray, places: Sequence[int], count: int, fill: float) -> np.ndarray:
    """The values at their places among `count`, others being `fill`."""
    whole = np.full((count, *values.shape[1:]), fill)
    whole[list(places)] = values
    return whole


def run_grid(
    model: PreTrainedModel,
    task: Task,
    methods: Sequence[Method],
    samples_of: Any,
    conditions: Sequence[Condition],
    seeds: Sequence[int],
    out: Path,
    batch_size: int = 50,
    resume: bool = False,
) -> list[Cell]:
    """All methods under all conditions and seeds.

    Args:
        samples_of: a seed -> its samples, as many for every seed.
        out: every condition that is finished is kept here; with `resume` only what it lacks is run: other conditions,
            seeds and methods. Methods go by their names.

    Raises:
        ValueError: where `resume` meets results of other samples.
    """
    state, cells = PartialState(), []
    folder = out / "cells"
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    progress = tqdm(
        [(seed, condition) for seed in seeds for condition in conditions],
        desc="conditions",
        unit="",
        disable=not state.is_local_main_process,
    )
    for seed, condition in progress:
        samples = samples_of(seed)
        # by the group too: it decides which damage the detectors know
        named = re.sub(r"[^\w+]+", "-", f"{condition.group} {condition.name} {condition.severity} {seed}")
        path = folder / f"{named}.json"
        ids = [sample.id for sample in samples]
        state.wait_for_everyone()
        found: dict[str, Cell] = {}
        if resume and path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["samples"] != ids:
                raise ValueError(f"{path} holds results of other samples: use another folder")
            found = {cell["method"]: _read(cell, condition, seed) for cell in kept["cells"]}
        wanted = [m for m in methods if m.name != ORACLE or condition.damaged is not None]
        missing = [method for method in wanted if method.name not in found]
        if missing:
            new = run_condition(model, task, missing, samples, condition, seed, batch_size)
            found |= {cell.method: cell for cell in new}
            if state.is_main_process:
                part = path.with_suffix(".part")
                written = {"samples": ids, "cells": [_written(cell) for cell in found.values()]}
                part.write_text(json.dumps(written), encoding="utf-8")
                part.replace(path)  # whole or not at all
        cells += [found[method.name] for method in wanted]
    return cells


def _written(cell: Cell) -> dict[str, Any]:
    return {
        "method": cell.method,
        "metrics": {name: values.tolist() for name, values in cell.metrics.items()},
        "weights": None if cell.weights is None else cell.weights.tolist(),
        "seconds": cell.seconds,
        "failed": cell.failed,
        "measured": cell.measured.tolist(),
    }


def _read(kept: dict[str, Any], condition: Condition, seed: int) -> Cell:
    return Cell(
        kept["method"],
        condition,
        seed,
        {name: np.array(values) for name, values in kept["metrics"].items()},
        None if kept["weights"] is None else np.array(kept["weights"]),
        kept["seconds"],
        kept["failed"],
        np.array(kept["measured"]),
    )
