"""`dms demo`: what `dms evaluate` measures, under fixed conditions, of the checkpoints that this package ships."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_dms._compat import require
from modeling_dms.evidence.typicality import auroc
from modeling_dms.save.staging import check_writable
from modeling_dms.training.data import PromptCollator, Sample, load_easy_vqa, load_example_photographs
from modeling_dms.training.data.easy_vqa import ANSWERS, COLORS, SHAPES
from modeling_dms.training.evaluate.baselines import record
from modeling_dms.training.evaluate.documents import table, write_between_markers
from modeling_dms.training.evaluate.grid import ORACLE, Condition, run_condition
from modeling_dms.training.evaluate.methods import Method, Scheduled
from modeling_dms.training.evaluate.report import condition_means, summarize
from modeling_dms.training.evaluate.run import one_per_image, sample_panels
from modeling_dms.training.evaluate.sheet import Panel, draw_sheet
from modeling_dms.training.evaluate.tasks import Task, VisualQuestionAnswering
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import CHECKPOINTS, load
from modeling_dms.training.models.request import versions


METHODS = (Method(), Scheduled("rule"), Method(ORACLE))
BATCH = 100
# groups: of an "unseen" family neither training nor calibration saw any kind; in a "conflict" both inputs look clean
# but disagree
UNSEEN = (
    *("image:color_cast", "image:glitch", "image:fog", "image:low_contrast", "image:invert", "image:pixelate"),
    *("image:solarize", "image:dark", "image:jpeg", "image:jigsaw"),
)
CONDITIONS = (
    Condition("clean", "clean"),
    *(Condition(name, "unseen image", 5) for name in UNSEEN),
    Condition("text:typos", "unseen text", 4),
    Condition("text:scramble", "unseen text", 4),
    Condition("image:mismatch", "conflict", 4),
    Condition("text:mismatch", "conflict", 4),
)
PICTURED = ("clean", "image:fog", "image:color_cast", "text:scramble", "text:mismatch")
PHOTOGRAPHED = (
    Condition("clean", "clean"),
    Condition("image:fog", "unseen image", 5),
    Condition("image:pixelate", "unseen image", 5),
    Condition("image:glitch", "unseen image", 5),
    Condition("text:scramble", "unseen text", 5),
)
# of the sheet of samples
COLUMNS = len(PHOTOGRAPHED)
MISMATCHES = {"image:mismatch": "sample's image", "text:mismatch": "sample's context"}
# groups of a short table, and what they are called there
SUMMARISED = {
    "clean": "clean",
    "unseen image": "damaged image",
    "unseen text": "damaged text",
    "conflict": "another sample's image or text",
}
TITLES = {"llava": "LLaVA-shaped", "blip2": "BLIP-2-shaped"}


def measure(model: PreTrainedModel, task: Task, samples: Sequence[Sample]) -> dict[str, Any]:
    """What `dms evaluate` would report, and how well consistency tells matched pairs from those that are not."""
    cells = [
        cell
        for condition in tqdm(CONDITIONS, desc="conditions", unit="")
        for cell in run_condition(model, task, METHODS, samples, condition, 0, BATCH)
    ]
    consistency = {
        c.name: record(model, task, c.apply(samples, 0)[0], BATCH)[0].consistency[:, 0]
        for c in CONDITIONS
        if c.name in ("clean", *MISMATCHES)
    }
    areas = {name: auroc(-consistency["clean"], -consistency[name]) for name in MISMATCHES if name in consistency}
    return {**summarize(cells), "mismatch_auroc": areas}


def section(result: dict[str, Any], samples: int) -> str:
    """One backbone's numbers: a heading, a table in Markdown, and the figures of merit below."""
    rows = []
    for (name, group, severity), of in condition_means(result["conditions"]).items():
        scores = [f"{of[method.name]['score']:.3f}" if method.name in of else "-" for method in METHODS]
        weights = " / ".join(f"{weight:.2f}" for weight in of["rule"]["weights"])
        rows.append([name.replace(":", ": ").replace("_", " "), group, str(severity or "-"), *scores, weights])
    head = ("corrupted", "kind", "severity", "static", "DMS", "oracle", "weight image / context")
    title = f"### {TITLES[result['backbone']]} checkpoint, {samples} held-out samples"
    lines = [title, "", table(head, rows), ""]
    for group in ("unseen image", "unseen text"):
        of = {row["method"]: row for row in result["groups"] if row["group"] == group}
        if not of:
            continue
        gap = "no gap to close, the oracle is not above static"
        if of["rule"]["gap_closed"] is not None:
            gap = "oracle gap closed **{:.2f}** (95% interval {:.2f} to {:.2f})".format(*of["rule"]["gap_closed"])
        means = (f"{name} {of[method.name]['score']:.3f}" for name, method in zip(head[3:], METHODS, strict=False))
        lines.append(f"- {group} corruptions: {gap}; mean accuracy {', '.join(means)}")
    for name, area in result["mismatch_auroc"].items():
        lines.append(f"- consistency tells matched pairs from those with another {MISMATCHES[name]}: AUROC {area:.3f}")
    return "\n".join(lines)


def summary(found: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> str:
    """Several checkpoints' numbers in a short table.

    Args:
        found: what each is called, and its groups of `summarize`.
    """
    rows = []
    for title, groups in found:
        for group, shown in SUMMARISED.items():
            of = {row["method"]: row for row in groups if row["group"] == group}
            if not of:
                continue
            scores = [f"{of[method.name]['score']:.3f}" if method.name in of else "" for method in METHODS]
            gap = of["rule"]["gap_closed"]
            closed = "" if gap is None else "{:.2f} [{:.2f}, {:.2f}]".format(*gap)
            rows.append([title, shown, *scores, closed])
    return table(("checkpoint", "inputs", "static", "DMS", "oracle", "gap closed"), rows)


def photographs() -> list[Panel]:
    """Photographs, clean and damaged, and what a checkpoint that was trained on photographs makes of them; none where
    the parts are missing that it is assembled from."""
    try:
        samples = load_example_photographs()
        model, processor = load("photographs-llava")
    except ImportError as error:
        print(f"the picture shows no photographs: {error}")
        return []
    task = VisualQuestionAnswering(processor, ("yes", "no"))
    return sample_panels(model.eval(), task, METHODS, samples, PHOTOGRAPHED, COLUMNS)


def run_demo(
    out: Path, backbones: Sequence[str], count: int, calibration_samples: int, repository: Path | None = None
) -> dict[str, Any]:
    """Evaluates, prints the tables, writes `results.json`, `results.md` and `demo.png` into `out`.

    Args:
        repository: also write the results into the documents of this clone.

    Raises:
        OSError: if `out` cannot be written to.
    """
    started = time.time()
    require("accelerate")
    check_writable(out)
    samples = one_per_image(load_easy_vqa("test"), count)
    out.mkdir(parents=True, exist_ok=True)
    found, sections, panels = [], [], []
    for backbone in backbones:
        model, processor = load(f"demo-{backbone}")
        task = VisualQuestionAnswering(processor, ANSWERS)
        report = calibrate(model, PromptCollator(processor), load_easy_vqa("train"), calibration_samples)
        result = {"backbone": backbone, **measure(model, task, samples), "calibration": asdict(report)}
        found.append(result)
        sections.append(section(result, len(samples)))
        if backbone == backbones[0]:
            pool = [sample for sample in samples if sample.answers[0] in (*COLORS, *SHAPES)][:BATCH]
            pictured = [condition for condition in CONDITIONS if condition.name in PICTURED]
            panels = sample_panels(model, task, METHODS, pool, pictured, COLUMNS)
    draw_sheet(out / "demo.png", [*photographs(), *panels], COLUMNS)
    short = summary([(TITLES[result["backbone"]], result["groups"]) for result in found])
    print(f"\nAccuracy on {len(samples)} held-out samples:\n\n{short}\n", flush=True)
    results = {
        "versions": versions(),
        "samples": len(samples),
        "calibration_samples": calibration_samples,
        "backbones": found,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = "\n\n".join(sections)
    (out / "results.md").write_text(text + "\n", encoding="utf-8")
    if repository is not None:
        write_between_markers(repository / "docs" / "demo.md", "demo", f"{short}\n\n{text}")
        write_between_markers(repository / "model_cards" / "README.md", "training", training_table(backbones))
        shutil.copy(out / "demo.png", repository / "docs" / "demo.png")
        shutil.copy(out / "results.json", repository / "model_cards" / "results.json")
    print(f"samples in {out / 'demo.png'}, all tables in {out / 'results.md'}; {time.time() - started:.0f} s in all")
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
