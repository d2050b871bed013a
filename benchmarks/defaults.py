"""What the package does when nobody sets a policy, and its price: with contexts, and on plain questions.

python benchmarks/defaults.py [--models demo-llava,demo-blip2] [--samples 200] [--split test] [--out docs/defaults.md]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from modeling_dms.training.apps.demo import CONDITIONS
from modeling_dms.training.data import PromptCollator, Sample, load_easy_vqa
from modeling_dms.training.evaluate.documents import table
from modeling_dms.training.evaluate.grid import Condition
from modeling_dms.training.evaluate.metrics.robust import bootstrap_interval
from modeling_dms.training.evaluate.metrics.vqa import vqa_scores
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import load


BATCH = 50
# `conflict_prior`; static weights are uniform
POLICIES = {
    "static": None,
    "default": None,
    'believe the image (`"vision"`)': "vision",
    'believe the context (`"text"`)': "text",
    'second look (`"learned"`)': "learned",
}
GROUPS = {
    "clean": ("clean",),
    "damaged image": tuple(c.name for c in CONDITIONS if c.group == "unseen image"),
    "damaged context": tuple(c.name for c in CONDITIONS if c.group == "unseen text"),
    "another's image": ("image:mismatch",),
    "another's context": ("text:mismatch",),
}
PLAIN_KINDS = (
    *("blur", "noise", "occlusion", "pixelate", "jpeg", "posterize"),
    *("dark", "low_contrast", "fog", "color_cast", "invert", "glitch"),
)
PLAIN_SEVERITIES = (1, 3, 5)

HEAD = """# When nobody sets a policy

Written by `python benchmarks/defaults.py` from {samples} held-out images of easy-VQA, one question each. Every kind of
damage is of a family that the detectors do not know. Differences are in points, with 95% intervals, bootstrapped over
the images.

By default (`scheduler="rule"`, `conflict_prior=None`) the weights are uniform, and the answer is the backbone's own,
unless one of image and text looks damaged and the other does not. Then the damaged one is lowered, unless the other
cannot stand in for it, by what the backbone answered in calibration. Where both look sound but do not belong together
nothing is decided, since one against one cannot tell who is right; `out.reliability` falls, and so does
`signals.p_match`."""
CONTEXTS = """## Image and context

The price of not deciding stands in the lines of another's image and another's context. Which policy wins there hangs
on who is wrong, which nobody knows beforehand: to believe one side wins one of these lines and loses the other. Each
policy has a calibration of its own, as `conflict_prior` is to be set before calibrating."""
PLAIN = """## Plain questions

An image and a question, without a context; calibrated likewise. Means over severities {severities}. *Lowered all the
same*: the rule without calibration's look at whether the other input can stand in."""


def batch_of(collator: PromptCollator, samples: Sequence[Sample]) -> dict[str, Any]:
    """Prompts; without contexts, such as tools make that do not say what is context."""
    batch = collator(samples)
    if not any(sample.context for sample in samples):
        del batch["modality_ids"]
    return batch


def right(
    model: Any, collator: PromptCollator, samples: Sequence[Sample], condition: Condition, static: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Which answers are right, and of which samples the weights are not uniform: (n,) each."""
    tokenizer, scores, weighed = collator.processor.tokenizer, [], []
    for start in range(0, len(samples), BATCH):
        some = samples[start : start + BATCH]
        batch = batch_of(collator, some)
        if static:
            batch["modality_weights"] = torch.full((len(some), 2), 0.5)
        with model.families_left_out(condition.unseen_families):
            out = model.generate(**batch, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        texts = tokenizer.batch_decode(out.sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        scores += list(vqa_scores([text.strip() for text in texts], [sample.answers for sample in some]))
        weighed += (out.modality_weights[:, 0] != out.modality_weights[:, 1]).tolist()
    return np.array(scores, dtype=float), np.array(weighed, dtype=float)


def difference(own: np.ndarray, base: np.ndarray) -> str:
    """Of (conditions, n), in points, with its interval over the n samples."""
    gain = 100 * (own - base).mean(0)
    low, high = bootstrap_interval(np.mean, gain)
    return f"{gain.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def with_contexts(name: str, clean: Sequence[Sample], count: int, samples: Sequence[Sample]) -> tuple[str, str]:
    """The table, and what the calibration of the default says of lowering."""
    conditions = {c.name: c for c in CONDITIONS}
    scores: dict[tuple[str, str], list[np.ndarray]] = {}
    shares: dict[str, list[float]] = {}
    told = ""
    for policy, prior in POLICIES.items():
        model, collator, said = calibrated(name, clean, count, prior)
        told = said if policy == "default" else told
        for group, names in tqdm(GROUPS.items(), desc=policy, unit="group"):
            for kind in names:
                changed, _ = conditions[kind].apply(samples, 0)
                found, unequal = right(model, collator, changed, conditions[kind], static=policy == "static")
                scores.setdefault((group, policy), []).append(found)
                if policy == "default":
                    shares.setdefault(group, []).append(unequal.mean())
    rows = []
    for group in GROUPS:
        own = {policy: np.stack(scores[group, policy]) for policy in POLICIES}
        cells = [f"{found.mean():.3f}" for found in own.values()]
        rows.append([group, *cells, difference(own["default"], own["static"]), f"{np.mean(shares[group]):.2f}"])
    return table(("inputs", *POLICIES, "default - static, points", "not uniform"), rows), told


def without_contexts(name: str, clean: Sequence[Sample], count: int, samples: Sequence[Sample]) -> tuple[str, str]:
    """The table, and what calibration says of lowering."""
    model, collator, told = calibrated(name, clean, count)
    rows, spared = [], model.dms.calibration.reliability.spared
    found: dict[str, list[np.ndarray]] = {"static": [], "default": [], "lowered": []}
    kept = spared.clone()
    for kind in tqdm(PLAIN_KINDS, desc="without contexts", unit="kind"):
        own: dict[str, list[np.ndarray]] = {name: [] for name in found}
        for severity in PLAIN_SEVERITIES:
            condition = Condition(f"image:{kind}", "unseen image", severity)
            changed, _ = condition.apply(samples, 0)
            own["static"].append(right(model, collator, changed, condition, static=True)[0])
            own["default"].append(right(model, collator, changed, condition)[0])
            spared.zero_()
            own["lowered"].append(right(model, collator, changed, condition)[0])
            spared.copy_(kept)
        rows.append(plain_row(kind.replace("_", " "), own))
        for name, scores in own.items():
            found[name] += scores
    rows.append(plain_row("**mean**", found))
    worst = {
        name: min(100 * (a - b).mean() for a, b in zip(scores, found["static"], strict=True))
        for name, scores in found.items()
    }
    head = ("damage", "static", "default", "default - static, points", "lowered all the same - static, points")
    lost = (
        f"The largest loss of a single kind and severity: {worst['default']:+.1f} points by default, "
        f"{worst['lowered']:+.1f} lowered all the same."
    )
    return f"{table(head, rows)}\n\n{lost}", told


def plain_row(name: str, own: dict[str, list[np.ndarray]]) -> list[str]:
    static, default, lowered = (np.stack(own[key]) for key in ("static", "default", "lowered"))
    means = [f"{scores.mean():.3f}" for scores in (static, default)]
    return [name, *means, difference(default, static), difference(lowered, static)]


def done(report: Any, modality: str) -> str:
    if modality in report.spared:
        return "keeps its weight"
    return "may lose all weight" if modality in report.dropped else "is lowered"


def calibrated(
    name: str, samples: Sequence[Sample], count: int, prior: str | None = None
) -> tuple[Any, PromptCollator, str]:
    """The model, its collator, and what its calibration says of lowering."""
    model, processor = load(name, {"conflict_prior": prior})
    collator = PromptCollator(processor)
    report = calibrate(model.eval(), collator, samples, count)
    told = [
        f"{modality} {done(report, modality)} (without it {alone:.2f} of "
        f"calibration's answers are those to clean inputs, with it {both:.2f})"
        for modality, (alone, both) in report.lowering.items()
    ]
    return model, collator, f"What is flagged: {', '.join(told)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo-llava,demo-blip2")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--calibration-samples", type=int, default=300)
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, default=Path("docs/defaults.md"))
    options = parser.parse_args()
    samples, train = one_per_image(load_easy_vqa(options.split), options.samples), load_easy_vqa("train")
    parts = {CONTEXTS: [], PLAIN.format(severities=", ".join(map(str, PLAIN_SEVERITIES))): []}
    for name in options.models.split(","):
        for text, measured in zip(parts, (with_contexts, without_contexts), strict=True):
            plain = measured is without_contexts
            own, clean = ([s.replace(context=None) for s in some] if plain else some for some in (samples, train))
            shown, told = measured(name, clean, options.calibration_samples, own)
            parts[text].append(f"### {name}\n\n{shown}\n\n{told}")
    sections = [part for text, found in parts.items() for part in (text, *found)]
    options.out.write_text("\n\n".join([HEAD.format(samples=len(samples)), *sections]) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
