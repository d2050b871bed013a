"""What each part of DMS gives on an assembled checkpoint: one choice changed at a time, on a frozen backbone.

    python benchmarks/ablations.py llava [--out docs/study/llava-ablations.md]

Every variant sees the same test images, questions and corruptions (those that benchmarks/study.py chose on validation
images). Variants differ in the weights they give, so the images of a batch are encoded once for all of them.
"""

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from study import MODELS, chosen, read
from torch import nn
from tqdm.auto import tqdm

from modeling_dms.calibrate.fit import fit_calibration
from modeling_dms.configuration.configuration_dms import MODALITIES
from modeling_dms.steer.bias import key_bias
from modeling_dms.training.corruptions import CorruptionConfig, ModalityDropout
from modeling_dms.training.corruptions.registry import seeded
from modeling_dms.training.data import PromptCollator, Sample, load_easy_vqa
from modeling_dms.training.evaluate.baselines import ALONE, fit_scheduler, record
from modeling_dms.training.evaluate.documents import table
from modeling_dms.training.evaluate.grid import ORACLE_WEIGHTS, Condition, with_images_encoded
from modeling_dms.training.evaluate.methods import Fixed, Method, Scheduled
from modeling_dms.training.evaluate.metrics.robust import bootstrap_interval, oracle_gap_closed
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.evaluate.tasks import VisualQuestionAnswering
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import load
from modeling_dms.weigh.scheduler import ModalityScheduler


SAMPLES, BATCH, SEED = 48, 16, 0
# samples of calibration: by default, and tried
CALIBRATION, SIZES = 1000, (50, 100, 300, 2000)
GROUPS = ("clean", "unseen image", "unseen text", "mismatch image", "mismatch text")


@dataclass
class Variant:
    """The released model but for some of its choices.

    Attributes:
        name: shown in the table.
        choices: fields of DMSConfig.
        dms: a `dms` calibrated otherwise, `None` for the model's own.
        scheduler: a trained one, `None` for the one that the choices give.
        spares_sink: as fusion does, or not: then a prompt's first token is weighed with its modality.
    """

    name: str
    choices: dict[str, Any] = field(default_factory=dict)
    dms: nn.Module | None = None
    scheduler: ModalityScheduler | None = None
    spares_sink: bool = True

    @contextlib.contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """The model as this variant has it."""
        own, config = model.dms, model.config.dms_config
        model.dms = own if self.dms is None else self.dms
        before = {name: getattr(config, name) for name in self.choices}
        for name, value in self.choices.items():
            setattr(config, name, value)
            # a copied `dms` has a configuration of its own
            setattr(model.dms.config, name, value)
        scheduler = model.dms.scheduler
        model.dms.scheduler = self.scheduler or ModalityScheduler(config, len(MODALITIES))
        weighed = mock.patch("modeling_dms.mixin.key_bias", lambda weights, ids, sink: key_bias(weights, ids))
        try:
            with contextlib.nullcontext() if self.spares_sink else weighed:
                yield
        finally:
            model.dms.scheduler, model.dms = scheduler, own
            for name, value in before.items():
                setattr(config, name, value)


def recalibrations(model: Any, collator: PromptCollator, train: list[Sample], most: int) -> Callable[..., nn.Module]:
    """A function that gives the `dms` calibrated otherwise; what calibration records is recorded once."""
    with mock.patch("modeling_dms.calibrate.calibration_mixin.fit_calibration") as fit:
        calibrate(model, collator, train, most, level=2)
    _, clean, damaged, present, _, _, in_prompt, *_ = fit.call_args.args

    def recalibrated(count: int = CALIBRATION, level: int = 2) -> nn.Module:
        kept, rows = copy.deepcopy(model.dms), torch.arange(min(count, len(present)))
        families = [{name: record[rows] for name, record in own.items()} for own in damaged]
        some = [record[rows] for record in clean]
        fit_calibration(kept.calibration, some, families, present[rows], level, in_prompt=in_prompt[rows])
        return kept

    return recalibrated


def variants_of(model: Any, collator: PromptCollator, task: VisualQuestionAnswering) -> list[Variant]:
    """Every variant, those that need it calibrated or trained."""
    train = load_easy_vqa("train")
    recalibrated = recalibrations(model, collator, train, max(SIZES))

    found = [Variant("rule, as released")]
    for floor in (0.001, 0.01, 0.05, 0.1, 0.2):
        found.append(Variant(f"weight floor {floor}", {"weight_floor": floor}))
    found.append(Variant("the attention sink weighed too", spares_sink=False))
    for name, choices in {
        "fusion by embedding": {"fusion": "embedding"},
        "conflict prior: vision": {"conflict_prior": "vision"},
        "conflict prior: text": {"conflict_prior": "text"},
        "kappa 4": {"kappa": 4.0},
        "false alarm rate 0.002": {"false_alarm_rate": 0.002},
        "false alarm rate 0.05": {"false_alarm_rate": 0.05},
    }.items():
        found.append(Variant(name, choices))
    for count in SIZES:
        found.append(Variant(f"calibrated on {count} samples", dms=recalibrated(count)))
    # what clean samples look like, without damaged copies
    found.append(Variant("calibration level 1 alone", dms=recalibrated(level=1)))

    some = [train[int(i)] for i in seeded("ablations").permutation(len(train))[:600]]
    dropped = ModalityDropout.of(some, CorruptionConfig(both_rate=0.15))
    drawn = [dropped[index] for index in range(len(some))]
    recorded = record(model, task, drawn, BATCH)
    target = (-torch.tensor([sample.damage for sample in drawn]) / 0.1).softmax(1)
    signals = [*ALONE, "damage"]
    for left_out in (None, *signals):
        kept = [name for name in signals if name != left_out]
        name = "learned, all signals" if left_out is None else f"learned, without {left_out}"
        # the rule's own scores, which the learned scheduler corrects, hold every signal
        choices = {"scheduler": "learned", "scheduler_signals": kept, "kappa": 0.0}
        fitted = {key: value for key, value in choices.items() if key != "scheduler"}
        found.append(Variant(name, choices, scheduler=fit_scheduler(model, recorded, target, **fitted)))
    return found


def conditions_of(scan: dict[str, Any]) -> list[Condition]:
    """Clean, the two most harmful unseen corruptions of images and of texts at severities 3 and 5, and mismatches."""
    worst = chosen(scan)
    found = [Condition("clean", "clean")]
    found += [Condition(f"{side}:mismatch", f"mismatch {side}", 5) for side in ("image", "text")]
    for side, group in (("image", "unseen image"), ("text", "unseen text")):
        found += [Condition(name, group, severity) for name in worst[side][:2] for severity in (3, 5)]
    return found


@torch.no_grad()
def measure(model: Any, task: VisualQuestionAnswering, variants: list[Variant], conditions: list[Condition]) -> dict:
    """Scores (n,) by condition and variant, `static` and `oracle` among them."""
    samples = one_per_image(load_easy_vqa("test"), SAMPLES, SEED)
    scores: dict[Condition, dict[str, np.ndarray]] = {}
    for condition in tqdm(conditions, desc="conditions", unit=""):
        damaged, _ = condition.apply(samples, SEED)
        answers: dict[str, list[dict[str, Any]]] = {}
        for start in range(0, len(damaged), BATCH):
            batch = with_images_encoded(model, task.collate(damaged[start : start + BATCH]))
            fixed: list[Method] = [Method()]
            if condition.damaged is not None:
                lows = [low if condition.damaged == 0 else 1 - low for low in ORACLE_WEIGHTS]
                fixed += [Fixed(f"oracle {low}", low) for low in lows]
            by_weights: dict[str, list[dict[str, Any]]] = {}
            for method in fixed:
                answers.setdefault(method.name, []).extend(
                    task.answer(method, model, batch, method.decide(model, batch))
                )
            for variant in variants:
                with variant.applied(model):
                    weights = Scheduled().decide(model, batch)
                    alike = f"{variant.choices.get('fusion')} {variant.spares_sink} {weights.tolist()}"
                    if alike not in by_weights:
                        by_weights[alike] = task.answer(Method(), model, batch, weights)
                    answers.setdefault(variant.name, []).extend(by_weights[alike])
        own = {name: task.scores(rows, damaged)["score"] for name, rows in answers.items()}
        oracles = [own.pop(name) for name in [*own] if name.startswith("oracle")]
        if oracles:
            own["oracle"] = max(oracles, key=np.mean)
        scores[condition] = own
    return scores


def rows_of(scores: dict[Condition, dict[str, np.ndarray]]) -> list[list[str]]:
    """A variant a row: accuracy on clean samples, and by group the accuracy and the oracle gap closed."""
    names = list(dict.fromkeys(name for own in scores.values() for name in own))
    rows = []
    for name in names:
        cells = []
        for group in GROUPS:
            arrays = {
                key: np.stack([own[key] for c, own in scores.items() if c.group == group and key in own])
                for key in ("static", name, "oracle")
                if any(c.group == group and key in own for c, own in scores.items())
            }
            if name not in arrays:
                cells.append("-")
                continue
            cell = f"{arrays[name].mean():.3f}"
            if (
                name not in ("static", "oracle")
                and "oracle" in arrays
                and arrays["oracle"].sum() > arrays["static"].sum()
            ):
                triple = (arrays["static"], arrays[name], arrays["oracle"])
                low, high = bootstrap_interval(oracle_gap_closed, *triple)
                cell += f", {oracle_gap_closed(*triple):.2f} [{low:.2f}, {high:.2f}]"
            cells.append(cell)
        rows.append([name, *cells])
    return rows


def parser_of(document: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark of one assembled checkpoint."""
    parser = argparse.ArgumentParser(description=(document or "").split("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--out", type=Path, help="Markdown file to write.")
    return parser


def scan_of(model: str) -> dict[str, Any]:
    """The scan that chose the corruptions."""
    scan = read(f"{model}-scan")
    if scan is None:
        raise ValueError(f"run `python benchmarks/study.py --only {model}-scan` first")
    return scan


def loaded(checkpoint: str | Path, dms: dict[str, Any] | None = None) -> tuple[Any, VisualQuestionAnswering]:
    """A checkpoint, and the task of answering easy-VQA's questions."""
    model, processor = load(checkpoint, dms, dtype="bfloat16")
    answers = sorted({sample.answers[0] for sample in load_easy_vqa("train")})
    return model.eval(), VisualQuestionAnswering(processor, answers)


def named(conditions: list[Condition]) -> str:
    """Damaging conditions as a list in words."""
    return ", ".join(f"{condition.name} {condition.severity}" for condition in conditions if condition.severity)


def write(text: str, path: Path | None) -> None:
    """Prints a document and writes it, if it is wanted in a file."""
    print(text)
    if path is not None:
        path.write_text(text, encoding="utf-8")


def main() -> None:
    options = parser_of(__doc__).parse_args()
    conditions = conditions_of(scan_of(options.model))
    model, task = loaded(MODELS[options.model])
    collator = PromptCollator(task.processor)
    variants = variants_of(model, collator, task)
    rows = rows_of(measure(model, task, variants, conditions))
    lines = [
        f"# Ablations on {Path(MODELS[options.model]).name}",
        "",
        f"Written by `python benchmarks/ablations.py {options.model}` on {SAMPLES} test images of easy-VQA, one",
        f"question each; {named(conditions)}. Accuracy, and the share of the oracle gap closed, with a 95% interval.",
        "",
        table(["variant", *GROUPS], rows),
        "",
    ]
    write("\n".join(lines), options.out)


if __name__ == "__main__":
    main()
