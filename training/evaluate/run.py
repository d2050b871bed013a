"""`dms evaluate`: how good and how robust a checkpoint is, against baselines on the same samples and corruptions."""

import functools
import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin

from modeling_dms._compat import require
from modeling_dms.save.staging import check_writable
from modeling_dms.training.corruptions import NAMES, CorruptionConfig, names_in
from modeling_dms.training.corruptions.registry import INPUTS, seeded
from modeling_dms.training.data import PromptCollator, Sample, load_samples
from modeling_dms.training.data.flickr8k import is_flickr8k
from modeling_dms.training.data.folder import Table
from modeling_dms.training.data.samples import (
    SPLITS,
    TESTED,
    UNANSWERED,
    UNASKABLE,
    UNREADABLE,
    image_key,
    image_keys,
    kept,
    split_answered,
    split_apart,
    split_readable,
)
from modeling_dms.training.data.sources import opened, print_summary
from modeling_dms.training.evaluate.baselines import FOR_SEVERAL, METHODS, OF_SOURCES, UNTRAINED, make_methods
from modeling_dms.training.evaluate.grid import Cell, Condition, collated, run_grid
from modeling_dms.training.evaluate.methods import Method
from modeling_dms.training.evaluate.pictures import draw
from modeling_dms.training.evaluate.report import DMS, render, summarize
from modeling_dms.training.evaluate.sheet import Panel, draw_sheet
from modeling_dms.training.evaluate.tasks import (
    Captioning,
    ImageTextMatching,
    ImageTextRetrieval,
    Task,
    VisualQuestionAnswering,
)
from modeling_dms.training.models.calibrate import calibrate, reads_whole_prompts
from modeling_dms.training.models.loading import DTYPES, load, room_for_prompts
from modeling_dms.training.models.request import (
    data_request,
    model_request,
    read_request,
    versions,
    whats_different,
    write_request,
)
from modeling_dms.training.names import check_names


logger = logging.getLogger(__name__)

# between the samples of a sheet
STRIDE = 7
CORRUPTIONS = ("seen", "unseen", "mismatch", "both")
BOTH_RATE = 0.15  # of the samples that trained baselines see
# by name: the kind of samples it takes
TASKS = {"vqa": "vqa", "vqa-generate": "vqa", "caption": "caption", "retrieval": "retrieval", "matching": "retrieval"}


@dataclass
class EvaluationConfig:
    """What is evaluated, and on what.

    Attributes:
        model: folder, Hub id or shipped name of a vanilla or DMS checkpoint.
        out: everything is written here.
        task: `"vqa"` (ranking the training split's answers), `"vqa-generate"`, `"caption"`, `"retrieval"` (by
            likelihood) or `"matching"` (by a BLIP-2 retrieval checkpoint).
        data, split: as `load_samples` takes them.
        training_data: what calibration, trained baselines and the list of answers take; by default `data`.
        corruptions: groups of `CORRUPTIONS`, or names such as `"image:fog"` or `"image:fog+text:typos"`, which make a
            group of their own. `"both"` takes every unseen image corruption with an unseen one of the context.
        kinds: names that the groups are restricted to; all kinds of their families by default.
        severities: 1 to 5.
        seeds: how many draws of corruptions and questions.
        samples: images a seed; one question each.
        methods: of `METHODS`.
        calibration_samples: a checkpoint that is not calibrated is calibrated on so many clean training samples.
        training_samples: that trained baselines see.
        validation_samples: that the baselines' hyperparameters are chosen on.
        dtype: of the weights, as `from_pretrained` takes it.
        resume: go on from what `out` holds: only conditions, seeds and methods that it lacks are run, and no
            hyperparameters are searched again. All else must be as it was.
    """

    model: str
    out: Path
    task: str = "vqa"
    data: str = "easy-vqa"
    split: str = "test"
    training_data: str | None = None
    corruptions: Sequence[str] = ("seen", "unseen", "mismatch")
    kinds: Sequence[str] | None = None
    severities: Sequence[int] = (3, 5)
    seeds: int = 3
    samples: int = 250
    methods: Sequence[str] = ("static", "rule", "oracle")
    calibration_samples: int = 300
    training_samples: int = 6000
    validation_samples: int = 100
    batch_size: int = 50
    dtype: str = "auto"
    resume: bool = False
    families: CorruptionConfig = field(default_factory=lambda: CorruptionConfig(both_rate=BOTH_RATE))

    def __post_init__(self):
        check_names("task", [self.task], TASKS)
        check_names("method", self.methods, METHODS)
        check_names("dtype", [self.dtype], DTYPES)
        # a table may have splits of its own
        if not Path(self.data).exists():
            check_names("split", [self.split], SPLITS)
        for name in ("seeds", "samples", "training_samples", "validation_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if "static" not in self.methods:
            self.methods = ("static", *self.methods)
        conditions_of(self)  # raises


def conditions_of(config: EvaluationConfig) -> list[Condition]:
    """Clean, and every kind of the chosen groups at every severity; what leaves nothing at the highest alone.

    Raises:
        ValueError: for an unknown corruption or kind, kinds that leave nothing of the groups, or a severity outside
            1..5.
    """
    check_names("kind", config.kinds or (), NAMES)
    if not config.severities or not set(config.severities) <= set(range(1, 6)):
        raise ValueError(f"severities must be integers from 1 to 5, got {list(config.severities)}")
    found = [Condition("clean", "clean")]
    highest = max(config.severities)
    for wanted in config.corruptions:
        if wanted not in CORRUPTIONS:
            # one that stands alone may be meant for a group
            check_names("corruption", wanted.split("+"), NAMES if "+" in wanted else (*CORRUPTIONS, *NAMES))
            found += [Condition(wanted, wanted, severity) for severity in config.severities]
            continue
        names = {modality: _kinds_of(config, wanted, modality) for modality in INPUTS}
        if wanted == "both":
            if all(names.values()):
                pairs = [f"{name}+{text}" for name, text in zip(names["image"], cycle(names["text"]), strict=False)]
                found += [Condition(pair, "both", severity) for pair in pairs for severity in config.severities]
            continue
        for modality, own in names.items():
            group = f"unseen {modality}" if wanted == "unseen" else wanted
            for name in own:
                whole = name.endswith((":missing", ":mismatch", ":black", ":channel_swap"))
                found += [
                    Condition(name, f"{group} {modality}" if wanted == "mismatch" else group, severity)
                    for severity in ((highest,) if whole else config.severities)
                ]
    if config.kinds is not None and config.corruptions and len(found) == 1:
        raise ValueError(f"the kinds {', '.join(config.kinds)} leave nothing of {', '.join(config.corruptions)}")
    return found


def _kinds_of(config: EvaluationConfig, group: str, modality: str) -> list[str]:
    """The corruptions of a modality in a group of `CORRUPTIONS`."""
    families = config.families.families(modality, "seen" if group == "seen" else "held out")
    families = [name for name in families if (name == "mismatch") == (group == "mismatch")]
    return [name for name in names_in(modality, families) if config.kinds is None or name in config.kinds]


def one_per_image(samples: Sequence[Sample], count: int, seed: int = 0) -> list[Sample]:
    """One sample of each of `count` images, evenly spread over the data, two of three not yes/no questions where there
    are others."""
    by_image: dict[str, list[Sample]] = {}
    for sample in samples:
        by_image.setdefault(image_key(sample.image) or sample.id, []).append(sample)
    chosen, images = [], list(by_image.values())
    count = min(count, len(images))
    for number in range(count):
        own = images[number * len(images) // count]
        closed = [sample for sample in own if sample.answers[:1] in (("yes",), ("no",))]
        wanted = closed if number % 3 == 0 else [sample for sample in own if sample not in closed]
        pool = wanted or own
        chosen.append(pool[int(seeded(own[0].id, seed).integers(len(pool)))])
    return chosen


def begin(out: Path, request: dict[str, Any], resume: bool) -> None:
    """Makes the folder of an evaluation ready, in all processes: with `resume` for going on, else it forgets what
    another evaluation has kept there.

    Raises:
        ValueError: if `resume` meets what was found for another request.
    """
    state = PartialState()
    kept = [path for path in (out / "searched.json", *(out / "cells").glob("*.json")) if path.exists()]
    if resume and kept:
        different = whats_different(out, request)
        if different:
            raise ValueError(
                f"{out} cannot be resumed: {different}; use another folder, or leave out --resume to begin anew"
            )
        request = {**cast(dict, read_request(out)), **request}
    state.wait_for_everyone()
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        for path in [] if resume else kept:
            path.unlink()
        write_request(out, request)
    state.wait_for_everyone()


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Runs the whole evaluation; returns and writes `results.json`, `report.md` and the pictures.

    Raises:
        ValueError: for choices that are refused, data none of which can be read, or a folder to resume that holds
            what was found for another model, other data or other choices.
        OSError: if `out` cannot be written to.
    """
    began = time.time()
    require("accelerate")
    check_writable(config.out)
    # told so, accelerate takes gloo; otherwise several processes on CPUs know nothing of each other
    state = PartialState(cpu=not torch.accelerator.is_available())
    conditions = conditions_of(config)
    kind = TASKS[config.task]
    data = opened(config.data)
    training_data = data if config.training_data in (None, config.data) else opened(config.training_data)
    tables = [table for table in dict.fromkeys((data, training_data)) if isinstance(table, Table)]
    if state.is_local_main_process:
        for table in tables:
            print_summary(table)
    train, test = load_samples(training_data, "train", kind), load_samples(data, config.split, kind)
    several = any(sample.has_several for sample in test)
    _check_several(config, several)
    needs_training = any(name not in UNTRAINED for name in config.methods)
    validation = load_samples(training_data, "validation", kind) if needs_training else []
    model, processor = load(config.model, dtype=config.dtype)
    model.eval().to(cast(Any, state.device))
    scheduler = model.config.dms_config.scheduler
    if several and scheduler not in ("rule", "uniform"):
        raise ValueError(
            f"samples have several images or passages, which scheduler='rule' weighs: the checkpoint has {scheduler!r}"
        )
    trained_on = config.training_data or config.data
    # a batch's size changes no more than the rounding: a run that is out of memory goes on with smaller ones
    asked = {
        "model": model_request(config.model),
        "data": data_request(config.data, test),
        "training_data": data_request(trained_on, train),
        **{name: getattr(config, name) for name in ("task", "split", "samples", "dtype")},
        "families": asdict(config.families),
    }
    if not model.dms.calibration.is_calibrated:
        asked["calibration_samples"] = config.calibration_samples
    if needs_training:
        asked |= {"training_samples": config.training_samples, "validation_samples": config.validation_samples}
        asked["validation_data"] = data_request(trained_on, validation)
    begin(config.out, asked, config.resume)

    def task_of(samples: Sequence[Sample]) -> Task:
        task = _task(config, processor, train, samples)
        if not isinstance(task, ImageTextMatching):
            task.whole_text = reads_whole_prompts(model)
            task.max_length = room_for_prompts(model, processor, task.longest_answer())
        return task

    failed: dict[str, str] = {}  # of the evaluated split
    left_out = {row: why for table in tables for row, why in table.repeated.items()}
    readable = functools.partial(split_readable, show_progress=state.is_local_main_process)

    def usable(samples: list[Sample], errors: dict[str, str]) -> list[Sample]:
        """Those that can be asked and scored."""
        samples = kept(samples, split_answered, UNANSWERED, errors)
        task = task_of(samples)
        if isinstance(task, ImageTextMatching):  # which cuts its texts
            return samples
        collator = PromptCollator(processor, max_length=task.max_length)
        return kept(samples, collator.split_askable, UNASKABLE, errors)

    test = usable(kept(test, readable, UNREADABLE, failed), failed)
    calibrates = config.calibration_samples > 0 and not model.dms.calibration.is_calibrated

    @functools.cache
    def samples_of(seed: int) -> list[Sample]:
        # what is retrieved is the same for every seed
        return one_per_image(test, config.samples, 0 if kind == "retrieval" else seed)

    fitted = []
    if calibrates or needs_training:
        evaluated = {key for seed in range(config.seeds) for key in image_keys(samples_of(seed))}
        evaluated |= {image_key(image) for seed in range(config.seeds) for s in samples_of(seed) for image in s.images}
        apart = functools.partial(split_apart, keys=evaluated)
        fitted = kept(kept(train, apart, TESTED, left_out), readable, UNREADABLE, left_out)
    if calibrates:
        collator = PromptCollator(processor, max_length=room_for_prompts(model, processor, 0))
        clean = kept(fitted, collator.split_askable, UNASKABLE, left_out)
        calibrate(model, collator, clean, config.calibration_samples, state.is_local_main_process)
    _check_calibration(config, model, test)
    if needs_training:
        fitted = usable(fitted, left_out)
        validation = kept(kept(validation, apart, TESTED, left_out), readable, UNREADABLE, left_out)
        validation = usable(validation, left_out)
        validation = one_per_image(validation, config.validation_samples, 0)

    task = task_of(samples_of(0))
    conditions_left_out: dict[str, str] = {}
    for condition in [*conditions]:
        reasons = [condition.why_not(samples_of(seed), seed, task) for seed in range(config.seeds)]
        if any(reasons):
            conditions.remove(condition)
            conditions_left_out[condition.name] = next(filter(None, reasons))
    for name, reason in conditions_left_out.items():
        logger.warning(f"left out: {name}: {reason}")

    some = [fitted[int(i)] for i in seeded("training").permutation(len(fitted))[: config.training_samples]]
    methods = make_methods(
        model,
        task_of,
        some if needs_training else [],
        validation,
        config.methods,
        config.families,
        batch_size=config.batch_size,
        searched=config.out / "searched.json",
    )

    cells = run_grid(
        model,
        task,
        methods,
        samples_of,
        conditions,
        range(config.seeds),
        config.out,
        config.batch_size,
        config.resume,
        several,
    )
    results = {
        "run": {
            **{f.name: _plain(getattr(config, f.name)) for f in fields(config) if f.name not in ("out", "resume")},
            # by its name, wherever its files lie
            "data": "flickr8k" if is_flickr8k(config.data) else config.data,
            "model_sha256": asked["model"]["sha256"][0],
            "metric": task.metric,
            "scheduler": model.config.dms_config.scheduler,
            "calibrated_for_it": calibrates,
            "seeds": list(range(config.seeds)),
            "samples": len(samples_of(0)),
            "left_out": left_out,
            "conditions_left_out": conditions_left_out,
            "failed": failed | {id_: error for cell in cells for id_, error in cell.failed.items()},
            "chosen": {method.name: _plain(method) for method in methods},
            "command": shlex.join(["dms", *sys.argv[1:]]),
            "processes": state.num_processes,
            "versions": versions(),
        },
        "results": summarize(cells),
    }
    if state.is_main_process:
        write(config, results, cells, model, task, methods, samples_of(0))
        print(f"{config.out / 'report.md'} written, {time.time() - began:.0f} s in all")
    state.wait_for_everyone()
    return results


def _check_several(config: EvaluationConfig, several: bool) -> None:
    """
    Args:
        several: whether samples have several images or passages.

    Raises:
        ValueError: for methods, or a task, that such samples are not for, or that are for nothing else.
    """
    idle = [name for name in config.methods if name in FOR_SEVERAL]
    if idle and not several:
        raise ValueError(f"{', '.join(idle)} weigh several images or passages, of which no sample has any")
    if not several:
        return
    unfit = [name for name in config.methods if name not in OF_SOURCES]
    if unfit:
        raise ValueError(
            f"samples have several images or passages, and {', '.join(unfit)} weigh one of each: methods of several "
            f"are {', '.join(OF_SOURCES)}"
        )
    if TASKS[config.task] == "retrieval":
        raise ValueError(f"samples have several images or passages, and task {config.task!r} reads one of each")


def _check_calibration(config: EvaluationConfig, model: PreTrainedModel, samples: Sequence[Sample]) -> None:
    """Adds the checkpoint's own scheduler to the methods where it is neither uniform nor the rule, leaves a second
    look out that was not learned, and warns where contexts are missing that calibration had."""
    dms = cast(Any, model).dms
    if model.config.dms_config.scheduler not in ("rule", "uniform") and "own" not in config.methods:
        config.methods = [*config.methods, "own"]
    if "second look" in config.methods and not dms.calibration.reliability.count > 0:
        logger.warning("left out: second look: the checkpoint has not learned whom to believe (`dms calibrate`)")
        config.methods = [name for name in config.methods if name != "second look"]
    if any(s.has_several for s in samples) and not any(bool(clean.count > 0) for clean in dms.calibration.clean_sets):
        logger.warning("calibrated on single images and passages: how far several agree is not known to the rule")
    contexts = any(sample.passages for sample in samples)
    if dms.calibration.is_calibrated and not contexts and not reads_whole_prompts(model):
        logger.warning(
            "no sample has a context, but the calibration's had: images are weighed against nothing; calibrate on "
            "samples without contexts to weigh them against the questions"
        )


def write(
    config: EvaluationConfig,
    results: dict[str, Any],
    cells: Sequence[Cell],
    model: PreTrainedModel,
    task: Task,
    methods: Sequence[Method],
    samples: Sequence[Sample],
) -> None:
    """`results.json`, `report.md` and the pictures."""
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    shown = [m.name for m in methods if not m.name.startswith(("learned: ", "rule +"))]
    pictures = draw(results, cells, out, shown)
    if panels := sample_panels(model, task, methods, samples, [c.condition for c in cells]):
        draw_sheet(out / "samples.png", panels)
        pictures.append(out / "samples.png")
    text = render(results)
    text += "\n" + "\n\n".join(f"![{path.stem}]({path.name})" for path in pictures) + "\n"
    (out / "report.md").write_text(text, encoding="utf-8")
    print(text)


@torch.no_grad()
def sample_panels(
    model: PreTrainedModel,
    task: Task,
    methods: Sequence[Method],
    samples: Sequence[Sample],
    conditions: Sequence[Condition],
    count: int = 8,
) -> list[Panel]:
    """Samples under different conditions, answered by static and the first DMS method; none for a task that ranks no
    answers."""
    dms = next((method for name in DMS for method in methods if method.name == name), None)
    strongest: dict[str, Condition] = {}
    for condition in conditions:
        known = strongest.setdefault(condition.name, condition)
        strongest[condition.name] = max(known, condition, key=lambda c: c.severity)
    chosen = list(strongest.values())
    # evenly over the groups, which stand one after the other
    places = np.linspace(0, len(chosen) - 1, min(count, len(chosen))).round().astype(int)
    chosen = [chosen[place] for place in places]
    if dms is None or task.name != "vqa":
        return []
    panels = []
    for place, condition in enumerate(chosen):
        # the column's own sample: none is picked for its answer
        pool = condition.apply(samples, 0)[0]
        sample = pool[place * STRIDE % len(pool)]
        batch, _ = collated(task, [sample], model)
        if batch is None:
            continue
        answers, weights = {}, []
        for title, method in (("static", Method()), ("DMS", dms)):
            decision = method.decide(model, batch)
            answer = task.answer(method, model, batch, decision)
            answers[title] = (answer[0]["prediction"], bool(task.scores(answer, [sample])["score"][0] > 0.5))
            weights = decision[0].tolist()
        # passages may have been cut, and a question be weighed beside images
        weights = (weights + [0.0] * len(sample.source_names))[: len(sample.source_names)]
        panels.append(Panel(condition.name, sample, answers, weights))
    return panels


def _task(
    config: EvaluationConfig, processor: ProcessorMixin, train: Sequence[Sample], samples: Sequence[Sample]
) -> Captioning | ImageTextMatching | ImageTextRetrieval | VisualQuestionAnswering:
    if config.task == "caption":
        return Captioning(processor)
    if config.task == "retrieval":
        return ImageTextRetrieval(processor, samples)
    if config.task == "matching":
        return ImageTextMatching(processor, samples)
    answers = sorted({sample.answers[0] for sample in train if sample.answers})
    if config.task == "vqa" and not answers:
        raise ValueError(
            "task 'vqa' ranks the training split's answers, and there are none; 'vqa-generate' needs none"
        )
    return VisualQuestionAnswering(processor, None if config.task == "vqa-generate" else answers)


def _plain(value: Any) -> Any:
    """As JSON takes it."""
    if isinstance(value, CorruptionConfig):
        return asdict(value)
    if isinstance(value, Method):
        kept = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in ("name", "scheduler")}
        scheduler = getattr(value, "scheduler", None)
        if scheduler is not None and value.name in ("entropy", "energy"):
            kept["temperature"] = scheduler.config.temperature
        return kept
    return list(value) if isinstance(value, tuple) else value
