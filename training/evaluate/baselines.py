"""Makes the methods of an evaluation ready: trains schedulers on cached signals, and searches hyperparameters.

Baselines have their published hyperparameters as defaults; `search` tries others on validation data, so that none is
straw.
"""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_dms.configuration.configuration_dms import MODALITIES, SIGNALS
from modeling_dms.outputs import ModalitySignals
from modeling_dms.training.corruptions import CorruptionConfig, ModalityDropout
from modeling_dms.training.data import Sample
from modeling_dms.training.evaluate.credibility import ByModality, LeastLikelyDropped, LikeliestSource
from modeling_dms.training.evaluate.grid import Condition, run_condition, with_images_encoded
from modeling_dms.training.evaluate.methods import Fixed, Method, Scheduled, on_device
from modeling_dms.training.evaluate.published import AdaptVis, ContrastiveDecoding
from modeling_dms.training.evaluate.tasks import Task
from modeling_dms.training.names import check_names
from modeling_dms.weigh.losses import schedule_loss
from modeling_dms.weigh.scheduler import ModalityScheduler


ALONE = tuple(name for name in SIGNALS if name != "damage")
# the published defaults first; what `search` tries on validation data (AdaptVis: as its authors, and no sharpening)
GRIDS: dict[str, list[dict[str, float]]] = {
    "VCD": [{"alpha": a, "beta": b} for a in (1.0, 0.5, 0.2) for b in (0.1, 0.5)],
    "AdaptVis": [
        {"low": low, "high": high, "threshold": threshold}
        for threshold in (0.3, 0.6, 0.9)
        for low in (0.5, 0.8)
        for high in (1.2, 1.5, 2.0, 1.0)
    ],
    "mean prior": [{"vision": value} for value in (0.5, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)],
}
TEMPERATURES = (1.0, 0.1, 0.3, 3.0)
TARGET_TEMPERATURE = 0.1  # of the target weights of trained schedulers
# what hyperparameters are chosen under: of families that calibration sees, or that leave nothing
SEEN = (
    Condition("clean", "clean"),
    Condition("image:noise", "seen", 4),
    Condition("image:occlusion", "seen", 4),
    Condition("text:random_words", "seen", 4),
    Condition("text:missing", "seen", 5),
)


@torch.no_grad()
def record(model: PreTrainedModel, task: Task, samples: Sequence[Sample], batch_size: int = 50) -> list[Any]:
    """What a learned scheduler is given for each sample: its arguments, over all samples, in CPU memory."""
    rows: list[tuple] = []
    scheduler = _like(model, scheduler="learned")
    scheduler.register_forward_pre_hook(lambda module, args: rows.append(args))
    for start in tqdm(range(0, len(samples), batch_size), desc="signals", unit=" batches"):
        batch = with_images_encoded(model, on_device(task.collate(samples[start : start + batch_size]), model))
        Scheduled(scheduler=scheduler).decide(model, batch)
    signals = {name: torch.cat([row[0][name] for row in rows]).cpu() for name in rows[0][0]}
    mask, standard, entropy = (torch.cat([row[place] for row in rows]).cpu() for place in (1, 2, 3))
    return [ModalitySignals(**signals), mask, standard, entropy]


def fit_scheduler(
    model: PreTrainedModel,
    recorded: Sequence[Any],
    target: Tensor,
    steps: int = 1500,
    batch_size: int = 128,
    learning_rate: float = 4e-3,
    seed: int = 0,
    **choices: Any,
) -> ModalityScheduler:
    """A learned scheduler, trained by `L_schedule` on recorded signals of a frozen backbone.

    Args:
        recorded: from `record`.
        target: (n, M), target weights.
        choices: fields of DMSConfig.
    """
    signals, mask, standard, entropy = recorded
    known = cast(Any, model).dms.calibration.reliability
    spared, dropped = known.spared.cpu(), known.dropped.cpu()
    config = _config(model, scheduler="learned", **choices)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        scheduler = ModalityScheduler(config, mask.shape[1])
    optimizer = torch.optim.AdamW(scheduler.parameters(), lr=learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(target), (batch_size,), generator=generator)
        some = ModalitySignals(**{name: value[rows] for name, value in signals.items()})
        weights = scheduler(some, mask[rows], standard[rows], entropy[rows], spared, dropped)
        loss = schedule_loss(weights, target[rows], mask[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return scheduler.eval().requires_grad_(False).to(model.device)


def scorer(
    model: PreTrainedModel, task: Task, samples: Sequence[Sample], conditions: Sequence[Condition], batch_size: int
) -> Callable[[Sequence[Method]], list[float]]:
    """Methods -> for each the sum of its mean scores over conditions, whose images are encoded once for all. Those
    under which no sample can be measured are left out."""
    conditions = [condition for condition in conditions if condition.why_not(samples, 0, task) is None]

    def score(methods: Sequence[Method]) -> list[float]:
        numbered = [replace(method, name=str(number)) for number, method in enumerate(methods)]
        found = [run_condition(model, task, numbered, samples, c, 0, batch_size) for c in conditions]
        return [sum(cell.mean() for cell in cells) for cells in zip(*found, strict=True)]

    return score


def make_methods(
    model: PreTrainedModel,
    task_of: Callable[[Sequence[Sample]], Task],
    train: Sequence[Sample],
    validation: Sequence[Sample],
    names: Sequence[str],
    corruptions: CorruptionConfig,
    batch_size: int = 50,
    searched: Path | None = None,
) -> list[Method]:
    """Methods by name, those with parameters trained on `train` and the others' hyperparameters chosen on
    `validation` (the mean prior's on `train`), all under seen corruptions alone.

    Args:
        task_of: samples -> the task on them (retrieval compares the texts of all).
        names: of `METHODS`.
        searched: a file that keeps the choices. What it holds is not searched again.

    Raises:
        ValueError: for an unknown name.
    """
    check_names("method", names, METHODS)
    found: dict[str, Method] = {
        "static": Method(),
        "rule": Scheduled("rule", _like(model, scheduler="rule")),
        "rule + prior": Scheduled("rule + prior", _like(model, scheduler="rule", conflict_prior="vision")),
        "rule + text prior": Scheduled("rule + text prior", _like(model, scheduler="rule", conflict_prior="text")),
        "second look": Scheduled("second look", _like(model, scheduler="rule", conflict_prior="learned")),
        "own": Scheduled("own"),
        "by modality": ByModality(scheduler=_like(model, scheduler="rule")),
        "least likely dropped": LeastLikelyDropped(),
        "likeliest source": LikeliestSource(),
        "oracle": Method("oracle"),
    }
    wanted = [name for name in names if name.startswith("learned")]
    if wanted:
        dropped = ModalityDropout.of(train, corruptions)
        drawn = [dropped[index] for index in range(len(train))]
        recorded = record(model, task_of(train), drawn, batch_size)
        target = (-torch.tensor([sample.damage for sample in drawn]) / TARGET_TEMPERATURE).softmax(1)
        for name in tqdm(wanted, desc="schedulers", unit=""):
            alone = name.removeprefix("learned: ")
            choices = {} if alone == name else {"scheduler_signals": [alone], "kappa": 0.0}
            found[name] = Scheduled(name, fit_scheduler(model, recorded, target, **choices))
    if not train:  # nothing to be fitted
        return [found[name] for name in names]
    seen, prior = (
        scorer(model, task_of(data), data, SEEN, batch_size) for data in (validation, train[: len(validation)])
    )
    searches: dict[str, tuple[Sequence[Method], Callable[[Sequence[Method]], list[float]]]] = {
        "VCD": (_choices(ContrastiveDecoding(), "VCD"), seen),
        "AdaptVis": (_choices(AdaptVis(), "AdaptVis"), seen),
        "mean prior": (_choices(Fixed(), "mean prior"), prior),
        "entropy": (_tempered(model, "entropy"), seen),
        "energy": (_tempered(model, "energy"), seen),
    }
    # by name, the place of the chosen one
    chosen = json.loads(searched.read_text(encoding="utf-8")) if searched is not None and searched.exists() else {}
    for name in tqdm([name for name in names if name in searches], desc="searches", unit=""):
        candidates, score = searches[name]
        if name not in chosen:
            chosen[name] = candidates.index(search(candidates, score))
            if searched is not None and PartialState().is_main_process:
                part = searched.with_suffix(".part")
                part.write_text(json.dumps(chosen), encoding="utf-8")
                part.replace(searched)  # whole or not at all
        found[name] = candidates[chosen[name]]
    return [found[name] for name in names]


# those that say nothing where a sample has one image and one context
FOR_SEVERAL = ("by modality", "least likely dropped", "likeliest source")
# all that weigh several images and passages
OF_SOURCES = ("static", "rule", "own", *FOR_SEVERAL, "oracle")
UNTRAINED = (*OF_SOURCES[:-1], "rule + prior", "rule + text prior", "second look", "oracle")
METHODS = (
    *UNTRAINED[:-1],
    "learned",
    *(f"learned: {name}" for name in ALONE),
    "entropy",
    "energy",
    "mean prior",
    "VCD",
    "AdaptVis",
    "oracle",
)


def _config(model: PreTrainedModel, **choices: Any) -> Any:
    """The model's DMSConfig but for some choices."""
    config = copy.deepcopy(model.config.dms_config)
    for name, value in choices.items():
        setattr(config, name, value)  # checked as at construction
    return config


def _like(model: PreTrainedModel, **choices: Any) -> ModalityScheduler:
    """A new scheduler, of the model's configuration but for some choices."""
    return ModalityScheduler(_config(model, **choices), len(MODALITIES)).to(model.device)


def _choices(method: Method, name: str) -> list[Method]:
    return [replace(method, **choice) for choice in GRIDS[name]]


def _tempered(model: PreTrainedModel, name: str) -> list[Method]:
    return [Scheduled(name, _like(model, scheduler=name, temperature=value)) for value in TEMPERATURES]


def search(candidates: Sequence[Method], score: Callable[[Sequence[Method]], Sequence[float]]) -> Method:
    """The best of several; of equally good ones the first."""
    scores = list(score(candidates))
    return candidates[scores.index(max(scores))]
