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
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_dms.training.corruptions import corrupt, self_made_families
from modeling_dms.training.corruptions.registry import FIELD_OF, INPUTS, seeded
from modeling_dms.training.data import Sample
from modeling_dms.training.data.samples import holds, image_key
from modeling_dms.training.evaluate.methods import Batch, Fixed, Method, Told, on_device, present
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
        count_of = {"image": len(sample.images) + (sample.image is not None), "text": len(sample.passages)}
        for kind in self.kinds:
            if not count_of[kind.partition(":")[0]]:
                return "an image" if kind.startswith("image") else "a context"
        missing = [kind.partition(":")[0] for kind in self.kinds if kind.endswith(":missing")]
        if missing and all(count <= missing.count(modality) for modality, count in count_of.items()):
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
        image, another context and another first answer. Of several images or passages each kind damages another one,
        drawn by the sample's id.

        Raises:
            ValueError: naming the sample that cannot be corrupted.
        """
        new, other = samples[place], None
        if any(kind.endswith(":mismatch") for kind in self.kinds):
            rest = [*samples[place + 1 :], *samples[:place]]
            other = next((o for o in rest if self.lacks(o) is None and _differ(new, o)), None)
            if other is None:
                raise ValueError(f"sample {new.id!r}: there is no other sample to mismatch it with")
        sources = _sources(new)
        others = None if other is None else _sources(other)
        drawn = seeded("source", self.name, new.id, seed)
        turns = {modality: drawn.permutation(len(own)).tolist() for modality, own in sources.items()}
        damaged = set()
        for kind in self.kinds:
            modality = kind.partition(":")[0]
            turns[modality].append(at := turns[modality].pop(0))
            field, own = FIELD_OF[modality], sources[modality]
            if other is not None and others is not None:
                # none that the sample has as well
                fits = [value for value in others[modality] if value not in own] or others[modality] or [None]
                other = other.replace(**{field: fits[at % len(fits)]})
            salt = f"@{seed}" + f"#{at}" * (at > 0)
            new = corrupt(new.replace(**{field: own[at]}), kind, max(1, self.severity), other, salt)
            own[at] = getattr(new, field)
            damaged.add((modality, at))
        there = [(m, at) for m, own in sources.items() for at, value in enumerate(own) if holds(value)]
        image, context = ([value for value in sources[m] if value is not None] or [None] for m in INPUTS)
        return new.replace(
            image=image[0],
            images=tuple(image[1:]),
            context=context[0],
            contexts=tuple(context[1:]),
            damaged_sources=tuple(number for number, place in enumerate(there, 1) if place in damaged),
        )


def _sources(sample: Sample) -> dict[str, list[Any]]:
    """By modality, all images and passages of a sample."""
    every = {"image": (sample.image, *sample.images), "text": (sample.context, *sample.contexts)}
    return {modality: [value for value in values if holds(value)] for modality, values in every.items()}


def _differ(one: Sample, other: Sample) -> bool:
    """In whatever they have: the other one has an answer, an image and a passage that the first one has not."""
    if one.answers[:1] == other.answers[:1] or (other.passages and {*other.passages} <= {*one.passages}):
        return False
    return one.image is None or image_key(one.image) != image_key(other.image)


@dataclass
class Cell:
    """What one method made of the n samples of one condition and seed.

    Attributes:
        method, condition, seed: which.
        metrics: by name, (n,) each; `score` is the task's main one, `reliability` what a method says of its answers.
            Where samples have several sources, further ones say what their weights do, see `weighed`.
        weights: (n, M), `None` for a method without, and where samples have several sources.
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


def methods_of(methods: Sequence[Method], condition: Condition, several: bool) -> list[Method]:
    """The methods of a condition: `ORACLE` in their place stands for one each of `ORACLE_WEIGHTS`, told which modality
    is damaged, or which of several sources."""
    found = [method for method in methods if method.name != ORACLE]
    if len(found) < len(methods) and has_oracle(condition, several):
        for low in ORACLE_WEIGHTS:
            name, vision = f"{ORACLE} {low}", low if condition.damaged == 0 else 1 - low
            found.append(Told(name, low) if several else Fixed(name, vision))
    return found


def has_oracle(condition: Condition, several: bool) -> bool:
    """Whether there is anything to be told: one modality that is damaged, or some of several sources."""
    return condition.damaged is not None or (several and bool(condition.kinds))


def weighed(weights: Tensor, batch: Batch) -> dict[str, list[float]]:
    """What weights of sources (B, S) do, as metrics of the samples: whether they are not all equal (`reweighted`), the
    mean weight of what is damaged, 1 being an equal share (`damaged_weight`), and whether that is below the weight of
    everything else (`damaged_lowest`); 1 and 0 where nothing is damaged, or everything."""
    there, damaged = present(batch), batch["damaged"]
    relative = weights * there.sum(1, keepdim=True)
    sound, damaged = there & ~damaged, there & damaged
    most, least = relative.masked_fill(~there, -torch.inf).amax(1), relative.masked_fill(~there, torch.inf).amin(1)
    mean = relative.masked_fill(~damaged, 0).sum(1) / damaged.sum(1).clamp_min(1)
    highest = relative.masked_fill(~damaged, -torch.inf).amax(1)
    lowest = (highest < relative.masked_fill(~sound, torch.inf).amin(1)).float()
    tells = damaged.any(1) & sound.any(1)
    return {
        "reweighted": (most - least > 1e-3).float().tolist(),
        "damaged_weight": mean.masked_fill(~tells, 1).tolist(),
        "damaged_lowest": lowest.masked_fill(~tells, 0).tolist(),
    }


@torch.no_grad()
def run_condition(
    model: PreTrainedModel,
    task: Task,
    methods: Sequence[Method],
    samples: Sequence[Sample],
    condition: Condition,
    seed: int,
    batch_size: int,
    several: bool = False,
) -> list[Cell]:
    """All methods under one condition, in all processes. Of an unseen corruption the model's detectors do not know the
    family.

    Args:
        several: whether samples may have several images or passages, see [`Cell`].

    Batches are the same whatever the number of processes, which take turns: so are the results, but for rounding.
    """
    state = PartialState()
    corrupted, failed = condition.apply(samples, seed)
    chosen = methods_of(methods, condition, several)
    own: list[tuple[int, str, list[dict[str, Any]], list | None, float, list | None, dict[str, list[float]]]] = []
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
            said = weighed(given, batch) if several and given is not None else {}
            seconds = encoding + deciding + known[1]
            own.append((number, method.name, known[0], weights, seconds, reliability, said))
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
        weights = None
        if mine[0][3] is not None and not several:
            weights = np.array([w for row in mine for w in row[3]], dtype=float)
        metrics = task.scores(answers, answered)
        if not several and mine[0][5] is not None:
            metrics["reliability"] = np.array([trust for row in mine for trust in row[5]])
        told = [name for name in mine[0][6] if condition.kinds or not name.startswith("damaged")]
        for name in told:
            metrics[name] = np.array([value for row in mine for value in row[6][name]])
        if failed or not measured.all():
            kept = [place for place, sample in enumerate(samples) if measured[place] and sample.id not in failed]
            fill = {"damaged_weight": 1.0}
            metrics = {name: _spread(of, kept, len(samples), fill.get(name, 0.0)) for name, of in metrics.items()}
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
    several: bool = False,
) -> list[Cell]:
    """All methods under all conditions and seeds.

    Args:
        samples_of: a seed -> its samples, as many for every seed.
        out: every condition that is finished is kept here; with `resume` only what it lacks is run: other conditions,
            seeds and methods. Methods go by their names.
        several: see `run_condition`.

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
        wanted = [m for m in methods if m.name != ORACLE or has_oracle(condition, several)]
        missing = [method for method in wanted if method.name not in found]
        if missing:
            new = run_condition(model, task, missing, samples, condition, seed, batch_size, several)
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
