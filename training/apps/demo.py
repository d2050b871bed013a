"""`dms demo`: static, DMS and oracle weights on real images, with the checkpoints this package ships."""

import json
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_dms import __version__
from modeling_dms.evidence.typicality import auroc
from modeling_dms.save.staging import check_writable
from modeling_dms.training.apps.evaluation import answer_tokens, predict
from modeling_dms.training.corruptions import corrupt
from modeling_dms.training.data import PromptCollator, Sample, load_easy_vqa
from modeling_dms.training.data.easy_vqa import COLORS, SHAPES
from modeling_dms.training.data.samples import image_key
from modeling_dms.training.evaluate.documents import write_between_markers
from modeling_dms.training.evaluate.metrics.robust import bootstrap_interval, oracle_gap_closed
from modeling_dms.training.evaluate.sheet import Panel, draw_sheet
from modeling_dms.training.models.loading import CHECKPOINTS, load


STATIC, ORACLES = (0.5, 0.5), (0.05, 0.01)
BATCH = 50


@dataclass(frozen=True)
class Condition:
    """A corruption as the demo shows it.

    Attributes:
        name: of `corrupt`, or `"clean"`.
        group: `"clean"`; `"unseen image"` and `"unseen text"`, of whose family neither training nor calibration saw
            any kind; `"seen"` by either; `"conflict"`, where both inputs look clean but disagree.
        severity: 1 to 5.
    """

    name: str
    group: str
    severity: int = 4

    @property
    def modality(self) -> int:
        """0 if the image is corrupted, 1 if the context is."""
        return int(self.name.startswith("text"))


CONDITIONS = (
    Condition("clean", "clean"),
    *(
        Condition(f"image:{kind}", "unseen image", 5)
        for kind in (
            "color_cast",
            "glitch",
            "fog",
            "low_contrast",
            "invert",
            "pixelate",
            "solarize",
            "dark",
            "jpeg",
            "jigsaw",
        )
    ),
    Condition("text:typos", "unseen text"),
    Condition("text:scramble", "unseen text"),
    Condition("image:occlusion", "seen"),
    Condition("image:clutter", "seen", 5),
    Condition("image:stripes", "seen", 5),
    Condition("image:salt_and_pepper", "seen", 5),
    Condition("image:blur", "seen"),
    Condition("text:random_words", "seen"),
    Condition("text:missing", "seen"),
    Condition("image:mismatch", "conflict"),
    Condition("image:channel_swap", "conflict"),
    Condition("text:mismatch", "conflict"),
)


@dataclass
class Row:
    """One condition's result."""

    condition: str
    group: str
    severity: int | None
    static: float
    dms: float
    oracle: float | None
    weight_vision: float
    weight_text: float


def load_demo_model(backbone: str) -> tuple[PreTrainedModel, PromptCollator]:
    """A shipped static checkpoint as a DMS model (not calibrated yet), and its collator."""
    model, processor = load(f"demo-{backbone}")
    return model.eval(), PromptCollator(processor)


def one_per_image(samples: Sequence[Sample], count: int) -> list[Sample]:
    """One question an image, two thirds of them open, of `count` images in the data's order."""
    by_image: dict[str | None, list[Sample]] = {}
    for sample in samples:
        by_image.setdefault(image_key(sample.image), []).append(sample)
    chosen = []
    for number, asked in enumerate(list(by_image.values())[:count]):
        is_open = [sample.answers[0] in (*COLORS, *SHAPES) for sample in asked]
        wanted = [sample for sample, yes in zip(asked, is_open, strict=True) if yes == (number % 3 > 0)]
        chosen.append((wanted or asked)[number % len(wanted or asked)])
    return chosen


def _scene(sample: Sample) -> set[str]:
    return {word.strip(".") for word in (sample.context or "").split()} & {*COLORS, *SHAPES}


def corrupted(samples: Sequence[Sample], condition: Condition) -> list[Sample]:
    """The samples under a condition; a mismatch takes another sample's image or context, of nothing in common."""
    if condition.name == "clean":
        return list(samples)
    out = []
    for number, sample in enumerate(samples):
        others = (samples[(number + step) % len(samples)] for step in range(1, len(samples)))
        other = next((o for o in others if not _scene(o) & _scene(sample)), None)
        out.append(corrupt(sample, condition.name, condition.severity, other))
    return out


def batches_of(collator: PromptCollator, samples: Sequence[Sample]) -> list[dict[str, torch.Tensor]]:
    """The samples in batches."""
    return [collator(samples[start : start + BATCH]) for start in range(0, len(samples), BATCH)]


def calibrate_demo(model: PreTrainedModel, collator: PromptCollator, count: int, show_progress: bool = True):
    """Calibrates on clean images, contexts and questions of the training split; answers are not looked at."""
    samples = one_per_image(load_easy_vqa("train"), count)
    return model.calibrate(batches_of(collator, samples), max_samples=count, show_progress=show_progress)


def evaluate_backbone(
    backbone: str,
    model: PreTrainedModel,
    collator: PromptCollator,
    samples: Sequence[Sample],
    calibration_samples: int,
    conditions: Sequence[Condition] | None = None,
) -> dict:
    """Calibrates a demo model and measures it under the demo's conditions (or others)."""
    conditions = CONDITIONS if conditions is None else conditions
    report = calibrate_demo(model, collator, calibration_samples)
    wanted = answer_tokens(collator, samples)
    rows, right, conflict = [], {}, {}
    for condition in tqdm(conditions, desc=f"{backbone}: conditions", unit=""):
        weights = [STATIC, None]
        if condition.group != "clean":
            weights += [(low, 1 - low) if condition.modality == 0 else (1 - low, low) for low in ORACLES]
        predictions = predict(model, batches_of(collator, corrupted(samples, condition)), weights)
        scores = [prediction.correct(wanted) for prediction in predictions]
        oracle = max(scores[2:], key=np.mean) if scores[2:] else None
        right[condition.name] = {"static": scores[0], "dms": scores[1], "oracle": oracle}
        conflict[condition.name] = -predictions[1].signals.consistency[:, 0]
        mean = predictions[1].weights.mean(0).tolist()
        rows.append(
            Row(
                condition.name,
                condition.group,
                None if condition.name == "clean" else condition.severity,
                float(scores[0].mean()),
                float(scores[1].mean()),
                None if oracle is None else float(oracle.mean()),
                *mean,
            )
        )
    closed = {}
    for group in sorted({c.group for c in conditions if c.group.startswith("unseen")}):
        arrays = [
            np.stack([right[c.name][method] for c in conditions if c.group == group])
            for method in ("static", "dms", "oracle")
        ]
        has_gap = arrays[2].sum() > arrays[0].sum()
        closed[group] = {
            "gap_closed": oracle_gap_closed(*arrays) if has_gap else None,
            "interval": bootstrap_interval(oracle_gap_closed, *arrays) if has_gap else None,
            "static": float(arrays[0].mean()),
            "dms": float(arrays[1].mean()),
            "oracle": float(arrays[2].mean()),
        }
    return {
        "backbone": backbone,
        "rows": [asdict(row) for row in rows],
        "unseen": closed,
        "mismatch_auroc": {
            name: auroc(conflict["clean"], values) for name, values in conflict.items() if name.endswith("mismatch")
        },
        "calibration": asdict(report),
    }


def table(result: dict) -> str:
    """One backbone's result as a Markdown table with the figures of merit below."""
    lines = [
        "| corrupted | kind | severity | static | DMS | oracle | weight image / context |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        oracle = "-" if row["oracle"] is None else f"{row['oracle']:.3f}"
        lines.append(
            f"| {row['condition'].replace(':', ': ').replace('_', ' ')} | {row['group']} | {row['severity'] or '-'} "
            f"| {row['static']:.3f} | {row['dms']:.3f} | {oracle} "
            f"| {row['weight_vision']:.2f} / {row['weight_text']:.2f} |"
        )
    lines.append("")
    for group, value in result["unseen"].items():
        means = f"mean accuracy static {value['static']:.3f}, DMS {value['dms']:.3f}, oracle {value['oracle']:.3f}"
        if value["gap_closed"] is None:
            lines.append(f"- {group} corruptions: no gap to close, the oracle is not above static; {means}")
            continue
        low, high = value["interval"]
        lines.append(
            f"- {group} corruptions: oracle gap closed **{value['gap_closed']:.2f}** "
            f"(95% interval {low:.2f} to {high:.2f}); {means}"
        )
    for name, area in result["mismatch_auroc"].items():
        lines.append(f"- consistency tells matched pairs from those with another {_OTHER[name]}: AUROC {area:.3f}")
    return "\n".join(lines)


_OTHER = {"image:mismatch": "sample's image", "text:mismatch": "sample's context"}
TITLES = {"llava": "LLaVA-shaped", "blip2": "BLIP-2-shaped"}


def section(result: dict, samples: int) -> str:
    """One backbone's table under its heading."""
    return f"### {TITLES[result['backbone']]} checkpoint, {samples} held-out samples\n\n{table(result)}"


def run_demo(
    out: Path, backbones: Sequence[str], count: int, calibration_samples: int, repository: Path | None = None
) -> dict:
    """Evaluates, prints the tables, writes `results.json`, `results.md` and `demo.png` into `out`.

    Args:
        repository: also write the results into the documents of this clone.

    Raises:
        OSError: if `out` cannot be written to.
    """
    started = time.time()
    check_writable(out)
    samples = one_per_image(load_easy_vqa("test"), count)
    out.mkdir(parents=True, exist_ok=True)
    results = {
        "versions": {
            "modeling_dms": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "samples": len(samples),
        "calibration_samples": calibration_samples,
        "backbones": [],
    }
    models = {backbone: load_demo_model(backbone) for backbone in backbones}
    for backbone, (model, collator) in models.items():
        result = evaluate_backbone(backbone, model, collator, samples, calibration_samples)
        results["backbones"].append(result)
        print(f"\n{section(result, len(samples))}\n", flush=True)
    picture(out / "demo.png", *models[backbones[0]], samples)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = "\n\n".join(section(result, len(samples)) for result in results["backbones"])
    (out / "results.md").write_text(text + "\n", encoding="utf-8")
    if repository is not None:
        write_between_markers(repository / "README.md", "demo", text)
        write_between_markers(repository / "model_cards" / "README.md", "training", training_table(backbones))
        for name in ("demo.png", "results.json"):
            shutil.copy(out / name, repository / "model_cards" / name)
    print(f"{out / 'demo.png'} and {out / 'results.json'} written, {time.time() - started:.0f} s in all")
    return results


def training_table(backbones: Sequence[str]) -> str:
    """What the training runs recorded, as a Markdown table."""
    records = {
        name: json.loads((CHECKPOINTS / f"demo-{name}" / "training_log.json").read_text()) for name in backbones
    }
    checks = list(next(iter(records.values()))["validation_accuracy"])
    lines = [
        f"| validation accuracy (image / context) | {' | '.join(f'`demo-{name}`' for name in backbones)} |",
        f"|---|{'---|' * len(backbones)}",
    ]
    for check in checks:
        values = [f"{record['validation_accuracy'][check]:.3f}" for record in records.values()]
        lines.append(f"| {check} | {' | '.join(values)} |")
    lines.append(f"| samples | {' | '.join(str(r['validation_samples']) for r in records.values())} |")
    lines.append(f"| steps | {' | '.join(str(r['steps']) for r in records.values())} |")
    return "\n".join(lines)


PICTURE_CONDITIONS = (
    "clean",
    "image:occlusion",
    "image:color_cast",
    "image:glitch",
    "image:low_contrast",
    "text:typos",
    "text:random_words",
    "text:mismatch",
)


def picture(path: Path, model: PreTrainedModel, collator: PromptCollator, samples: Sequence[Sample]) -> None:
    """A sheet of samples, clean and corrupted, with both answers and the weights as bars."""
    tokenizer = collator.processor.tokenizer
    pool = [sample for sample in samples if sample.answers[0] in (*COLORS, *SHAPES)][:BATCH]
    by_name = {condition.name: condition for condition in CONDITIONS}
    wanted = answer_tokens(collator, pool)
    panels = []
    for column, name in enumerate(PICTURE_CONDITIONS):
        rows = corrupted(pool, by_name[name])
        static, dms = predict(model, batches_of(collator, rows), [STATIC, None])
        # the column's own sample: no two columns show the same picture, and none is picked for its answer
        index = column * 5 % len(rows)
        answers = {
            title: (tokenizer.decode([int(p.tokens[index])]).strip(), int(p.tokens[index]) == int(wanted[index]))
            for title, p in (("static", static), ("DMS", dms))
        }
        panels.append(Panel(name, rows[index], answers, dms.weights[index].tolist()))
    draw_sheet(path, panels)
