"""The trained scheduler against the training-free rule, on the demo's LLaVA and held-out images.

    dms train --config demo-scheduler
    python benchmarks/learned.py runs/demo-scheduler/final [--out benchmarks/learned.md]

Both have the same frozen backbone and are calibrated on the same samples. `rule + prior` believes the image where the
two disagree and neither is suspicious (`conflict_prior="vision"`): the trained scheduler has seen mismatched contexts,
the rule has to be told.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from modeling_dms.evidence.typicality import auroc
from modeling_dms.training.apps.demo import (
    CONDITIONS,
    STATIC,
    Condition,
    batches_of,
    calibrate_demo,
    corrupted,
    one_per_image,
)
from modeling_dms.training.apps.evaluation import answer_tokens, predict
from modeling_dms.training.data import PromptCollator, Sample, load_easy_vqa
from modeling_dms.training.evaluate.metrics.robust import bootstrap_interval, oracle_gap_closed
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
ORACLES = ((0.01, 0.99), (0.05, 0.95), (0.5, 0.5), (0.95, 0.05), (0.99, 0.01))
GROUPS = ("clean", "unseen image", "unseen text", "both bad", "text mismatch")


@dataclass
class Case:
    """Samples under one condition."""

    name: str
    group: str
    samples: list[Sample]


def cases(samples: list[Sample]) -> list[Case]:
    """The demo's clean, unseen and mismatch conditions, and those in which both modalities are bad."""
    found = []
    for condition in CONDITIONS:
        group = "text mismatch" if condition.name == "text:mismatch" else condition.group
        if group in GROUPS:
            found.append(Case(condition.name, group, corrupted(samples, condition)))
    for image, image_severity, text, text_severity in BOTH_BAD:
        bad = corrupted(samples, Condition(image, "", image_severity))
        bad = corrupted(bad, Condition(text, "", text_severity))
        found.append(Case(f"{image} {image_severity} + {text} {text_severity}", "both bad", bad))
    return found


def points(one: np.ndarray, other: np.ndarray) -> float:
    """By how many points the first is more accurate."""
    return float(100 * (one - other).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("trained", type=Path)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--samples", type=int, default=880)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    models = {
        "rule": load("demo-llava"),
        "rule + prior": load("demo-llava", {"conflict_prior": "vision"}),
        "learned": load(options.trained),
    }
    collator = PromptCollator(models["rule"][1])
    for name, (model, _) in models.items():
        model.eval()
        if name != "learned":
            calibrate_demo(model, collator, 300)
    samples = one_per_image(load_easy_vqa(options.split), options.samples)
    wanted = answer_tokens(collator, samples)
    right: dict[str, dict[str, list[np.ndarray]]] = {group: {} for group in GROUPS}
    lines, consistency = [], {}
    for case in tqdm(cases(samples), desc="conditions", unit=""):
        batches = batches_of(collator, case.samples)
        scores, weights = {}, {}
        fixed = [p.correct(wanted) for p in predict(models["rule"][0], batches, ORACLES)]
        scores["static"], scores["oracle"] = fixed[ORACLES.index(STATIC)], max(fixed, key=np.mean)
        for name, (model, _) in models.items():
            prediction = predict(model, batches, [None])[0]
            scores[name], weights[name] = prediction.correct(wanted), prediction.weights[:, 0].mean()
            consistency[name, case.name] = prediction.signals.consistency[:, 0]
        for name, score in scores.items():
            right[case.group].setdefault(name, []).append(score)
        means = " | ".join(f"{scores[n].mean():.3f}" for n in ("static", *models, "oracle"))
        shown = " / ".join(f"{weights[n]:.2f}" for n in models)
        lines.append(f"| {case.name} | {case.group} | {means} | {shown} |")
    titles = ("static", *models, "oracle")
    head = f"| condition | group | {' | '.join(titles)} | image weight: {' / '.join(models)} |"
    summary = [
        f"| group | {' | '.join(titles)} | gap closed: {' / '.join(models)} | learned - rule, points |",
        "|---" * (len(titles) + 3) + "|",
    ]
    for group, methods in right.items():
        arrays = {name: np.stack(rows) for name, rows in methods.items()}
        gaps = []
        for name in models:
            triple = (arrays["static"], arrays[name], arrays["oracle"])
            if group == "clean" or arrays["oracle"].sum() <= arrays["static"].sum():
                gaps.append("-")
                continue
            low, high = bootstrap_interval(oracle_gap_closed, *triple)
            gaps.append(f"{oracle_gap_closed(*triple):.2f} [{low:.2f}, {high:.2f}]")
        means = " | ".join(f"{arrays[name].mean():.3f}" for name in titles)
        pair = (arrays["learned"], arrays["rule"])
        low, high = bootstrap_interval(points, *pair)
        summary.append(f"| {group} | {means} | {' / '.join(gaps)} | {points(*pair):+.1f} [{low:+.1f}, {high:+.1f}] |")
    rule, learned = (
        auroc(-consistency[name, "clean"], -consistency[name, "text:mismatch"]) for name in ("rule", "learned")
    )
    text = "\n".join(
        [
            "# The trained scheduler and the rule",
            "",
            f"Written by `benchmarks/learned.py` on {len(samples)} {options.split} images, one question each. The",
            "oracle is the best of five fixed weights per condition; intervals are 95% bootstrap over samples.",
            "",
            *summary,
            "",
            f"Consistency tells mismatched contexts: AUROC {rule:.3f} (rule), {learned:.3f} (learned).",
            "",
            head,
            "|---" * (len(titles) + 3) + "|",
            *lines,
            "",
        ]
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
