"""The trained scheduler against the training-free rule, on the demo's LLaVA and held-out images.

    dms train --config demo-scheduler
    python benchmarks/learned.py runs/demo-scheduler/final [--out benchmarks/learned.md]

Both have the same frozen backbone and are calibrated on the same samples. `rule + prior` believes the image where the
two disagree and neither is suspicious (`conflict_prior="vision"`): the trained scheduler has seen mismatched contexts,
the rule has to be told.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from modeling_dms.evidence.typicality import auroc
from modeling_dms.training.apps.demo import BATCH, CONDITIONS
from modeling_dms.training.data import PromptCollator, Sample, load_easy_vqa
from modeling_dms.training.data.easy_vqa import ANSWERS
from modeling_dms.training.evaluate.baselines import record
from modeling_dms.training.evaluate.documents import points, share, table
from modeling_dms.training.evaluate.grid import ORACLE, Cell, Condition, run_condition
from modeling_dms.training.evaluate.methods import Fixed, Method, Scheduled
from modeling_dms.training.evaluate.metrics.robust import paired_difference
from modeling_dms.training.evaluate.report import Results, condition_means, summarize
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.evaluate.tasks import VisualQuestionAnswering
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import load


# image, context: neither family seen in training; of 48 pairs those whose oracle was more than a point above static on
# validation images
BOTH_BAD = (
    ("image:low_contrast", 3, "text:typos", 4),
    ("image:low_contrast", 3, "text:scramble", 4),
    ("image:color_cast", 5, "text:scramble", 2),
    ("image:glitch", 5, "text:scramble", 2),
    ("image:invert", 3, "text:scramble", 2),
    ("image:invert", 3, "text:scramble", 4),
    ("image:fog", 5, "text:scramble", 2),
)
FIXED = (Method(), *(Fixed(str(weight), weight) for weight in (0.01, 0.05, 0.95, 0.99)))
GROUPS = ("clean", "unseen image", "unseen text", "both bad", "text mismatch")


def cases(samples: list[Sample]) -> list[tuple[list[Sample], Condition, Condition]]:
    """Samples, a condition to measure them under, and the condition that both make together: the demo's clean, unseen
    and mismatch conditions, and those in which both modalities are bad."""
    found = []
    for condition in CONDITIONS:
        group = "text mismatch" if condition.name == "text:mismatch" else condition.group
        if group in GROUPS:
            found.append((samples, condition, replace(condition, group=group)))
    for image, image_severity, text, text_severity in BOTH_BAD:
        bad, _ = Condition(image, "", image_severity).apply(samples, 0)
        name = f"{image} {image_severity} + {text} {text_severity}"
        found.append((bad, Condition(text, "", text_severity), Condition(name, "both bad", text_severity)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("trained", type=Path)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--samples", type=int, default=880)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    loaded = {
        "rule": load("demo-llava"),
        "rule + prior": load("demo-llava", {"conflict_prior": "vision"}),
        "learned": load(options.trained),
    }
    models, processor = {name: model.eval() for name, (model, _) in loaded.items()}, loaded["rule"][1]
    task = VisualQuestionAnswering(processor, ANSWERS)
    for name in ("rule", "rule + prior"):
        calibrate(models[name], PromptCollator(processor), load_easy_vqa("train"), 300)
    samples = one_per_image(load_easy_vqa(options.split), options.samples)
    cells: list[Cell] = []
    for some, condition, whole in tqdm(cases(samples), desc="conditions", unit=""):
        fixed = run_condition(models["rule"], task, FIXED, some, condition, 0, BATCH)
        found = [fixed[0], replace(max(fixed, key=Cell.mean), method=ORACLE)]
        for name, model in models.items():
            found += run_condition(model, task, [Scheduled(name)], some, condition, 0, BATCH)
        cells += [replace(cell, condition=whole) for cell in found]
    results, numbers = Results(cells), summarize(cells)
    titles = ("static", *models, "oracle")
    lines = []
    for (name, group, _), of in condition_means(numbers["conditions"]).items():
        means = [f"{of[title]['score']:.3f}" for title in titles]
        lines.append([name, group, *means, " / ".join(f"{of[title]['weights'][0]:.2f}" for title in models)])
    summary = []
    for group in GROUPS:
        rows = {row["method"]: row for row in numbers["groups"] if row["group"] == group}
        gaps = ["-" if group == "clean" else share(rows[name]["gap_closed"]) for name in models]
        learned, rule = (results.array(name, lambda c, g=group: c.group == g) for name in ("learned", "rule"))
        means = [f"{rows[title]['score']:.3f}" for title in titles]
        summary.append([group, *means, " / ".join(gaps), points(paired_difference(learned, rule))])
    mismatched, _ = Condition("text:mismatch", "", 4).apply(samples, 0)
    rule, learned = (
        auroc(*(-record(models[name], task, some, BATCH)[0].consistency[:, 0] for some in (samples, mismatched)))
        for name in ("rule", "learned")
    )
    text = "\n".join(
        [
            "# The trained scheduler and the rule",
            "",
            f"Written by `benchmarks/learned.py` on {len(samples)} {options.split} images, one question each. The",
            "oracle is the best of five fixed weights per condition; intervals are 95% bootstrap over samples.",
            "",
            table(("group", *titles, f"gap closed: {' / '.join(models)}", "learned - rule, points"), summary),
            "",
            f"Consistency tells mismatched contexts: AUROC {rule:.3f} (rule), {learned:.3f} (learned).",
            "",
            table(("condition", "group", *titles, f"image weight: {' / '.join(models)}"), lines),
            "",
        ]
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
