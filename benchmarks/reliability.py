"""How far `out.reliability` tells right answers from wrong ones, on clean, damaged and mismatched inputs.

    python benchmarks/reliability.py [--models demo-llava,demo-blip2] [--samples 300] [--calibrations 4]
        [--out docs/reliability.md]

Writes the page and, beside it, a picture of the same name.
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from modeling_dms.training.apps.demo import CONDITIONS
from modeling_dms.training.data import PromptCollator, Sample, load_easy_vqa
from modeling_dms.training.evaluate.documents import table
from modeling_dms.training.evaluate.grid import Condition
from modeling_dms.training.evaluate.metrics.confidence import aurc, risk_coverage
from modeling_dms.training.evaluate.metrics.vqa import vqa_scores
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import load
from modeling_dms.weigh.reliability import abstention_threshold


BATCH, RESAMPLED, SPLITS, RISKS = 50, 1000, 20, (0.05, 0.1)
PRIORS = {"one look": None, "second look": "learned"}
STATIC_MEASURES = ("max-probability", "predictive entropy", "MC dropout")
MEASURES = (*STATIC_MEASURES, "reliability, one look", "reliability, second look")
PASSES, DROPOUT = 10, 0.1  # of Monte Carlo dropout
GROUPS = {
    "clean": ("clean",),
    "damaged image": ("unseen image",),
    "damaged text": ("unseen text",),
    "mismatched": ("conflict",),
    "all damaged": ("unseen image", "unseen text"),
    "all": ("clean", "unseen image", "unseen text", "conflict"),
}

HEAD = """# How far an answer can be relied on

Written by `python benchmarks/reliability.py` from {samples} held-out images of easy-VQA, one question each, clean and
under {conditions} corruptions whose families the detectors do not know. The models were calibrated on {calibration}
clean training samples, without labels, with the policy of each look, {calibrations} times on other images. Answers are
generated greedily, and right if they are the accepted one. On photographs reliability tells right answers from wrong
ones no better than their probability does ([the study](study.md#how-far-answers-can-be-relied-on)).

`out.reliability` is the expected agreement with the answer that undamaged inputs would give. With *one look* it is
read from the first token's probability, what is flagged, and the evidence against the pair. With a *second look*
(`conflict_prior="learned"`) what is flagged is read twice more, with image and text alone, and the answer that can be
relied on most is given. *Max-probability* and *predictive entropy* are of the first token of the rule's answer; *MC
dropout* is its mean probability in {passes} passes with dropout of {dropout} in the language model, in the first
calibration alone.

The area under the risk-coverage curve (AURC) is the mean share of wrong answers over all shares of samples that are
answered, the most reliable first: lower is better. *Change* compares it with max-probability's, with 95% intervals,
bootstrapped over the images. *Risk at 80%* is the share of wrong answers among the most reliable 80%. All these are
means over the calibrations; *from, to* are the least and the largest change among them."""


def answers(
    model: Any,
    collator: PromptCollator,
    samples: Sequence[Sample],
    condition: Condition,
    drops_out: bool,
) -> np.ndarray:
    """Of each sample whether the answer is right, and max-probability, entropy, its probability under dropout (NaN
    where it is not wanted) and its reliability: (n, 5)."""
    tokenizer, found = collator.processor.tokenizer, []
    for start in range(0, len(samples), BATCH):
        batch = collator(samples[start : start + BATCH])
        with model.families_left_out(condition.unseen_families):
            out = model.generate(
                **batch, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_scores=True
            )
        given = 0 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
        texts = tokenizer.batch_decode(out.sequences[:, given:], skip_special_tokens=True)
        right = vqa_scores([text.strip() for text in texts], [s.answers for s in samples[start : start + BATCH]])
        p = out.scores[0].float().softmax(-1)
        entropy = -(p * p.clamp_min(1e-30).log()).sum(-1)
        dropout = under_dropout(model, batch, out, p) if drops_out else torch.full_like(entropy, torch.nan)
        numbers = torch.stack([p.amax(-1), -entropy, dropout, out.reliability], 1).numpy()
        found.append(np.concatenate([np.array(right)[:, None], numbers], 1))
    return np.concatenate(found)


@contextlib.contextmanager
def dropping_out(language: Any) -> Iterator[None]:
    """A language model with dropout, which its authors may have set to 0."""
    before = []
    for module in language.modules():
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                before.append((module, name, getattr(module, name)))
                setattr(module, name, DROPOUT)
    language.train()
    try:
        yield
    finally:
        language.eval()
        for module, name, value in before:
            setattr(module, name, value)


@torch.no_grad()
def under_dropout(model: Any, batch: dict[str, Any], out: Any, p: torch.Tensor) -> torch.Tensor:
    """The mean probability (B,) of the likeliest token of `p` (B, K), of passes with the weights of `out`."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    inputs |= {name: value for name, value in batch.items() if name in ("pixel_values", "modality_ids")}
    torch.manual_seed(0)
    with dropping_out(model.get_decoder()):
        drawn = [
            model(**inputs, modality_weights=out.modality_weights, logits_to_keep=1).logits[:, -1].float().softmax(-1)
            for _ in range(PASSES)
        ]
    return torch.stack(drawn).mean(0).gather(1, p.argmax(-1, keepdim=True))[:, 0]


def measured(
    model: Any, collator: PromptCollator, clean: Sequence[Sample], count: int, samples: Sequence[Sample], drops: bool
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """By condition and look what `answers` gives, with dropout for one look alone, and by look what calibration itself
    knows of its copies. For each look the model is calibrated anew, on `count` of the clean samples."""
    found: dict[str, dict[str, np.ndarray]] = {}
    kept = {}
    wanted = [c for c in CONDITIONS if c.group in GROUPS["all"]]
    for look, prior in PRIORS.items():
        model.config.dms_config.conflict_prior = model.dms.scheduler.config.conflict_prior = prior
        calibrate(model, collator, clean, count)
        trust = model.eval().dms.calibration.reliability
        kept[look] = trust.kept[: int(trust.count)].numpy().copy()
        for condition in tqdm(wanted, desc=f"{look}, conditions", unit=""):
            changed, _ = condition.apply(samples, 0)
            of = answers(model, collator, changed, condition, drops and prior is None)
            found.setdefault(condition.name, {})[look] = of
    return found, kept


def confidences(found: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By measure, the confidence in each answer and whether it is right."""
    one, second = (found[look] for look in PRIORS)
    columns = (*one[:, 1:].T, second[:, -1])
    rights = (*[one[:, 0]] * (one.shape[1] - 1), second[:, 0])
    return {measure: (c, r) for measure, c, r in zip(MEASURES, columns, rights, strict=True)}


Answered = tuple[np.ndarray, np.ndarray]  # a confidence in each answer, and whether it is right


def change(own: Sequence[Answered], base: Sequence[Answered], images: int) -> tuple[list[float], np.ndarray]:
    """The change of the AURC as a share of the base's, of each calibration, and the interval of their mean; samples of
    one image are drawn together."""
    generator, times = np.random.default_rng(0), len(own[0][0]) // images

    def ratios(rows: np.ndarray) -> list[float]:
        areas = [[aurc(c[rows], r[rows]) for c, r in some] for some in (own, base)]
        return [after / before - 1 if before > 0 else 0.0 for after, before in zip(*areas, strict=True)]

    rows = np.arange(len(own[0][0])).reshape(times, images)
    drawn = [np.mean(ratios(rows[:, generator.integers(images, size=images)].ravel())) for _ in range(RESAMPLED)]
    return ratios(rows.ravel()), np.quantile(drawn, (0.025, 0.975))


def section(
    name: str,
    calibrations: Sequence[dict[str, dict[str, np.ndarray]]],
    kept: Sequence[dict[str, np.ndarray]],
    images: int,
) -> list[str]:
    """Two tables of a model, from what `measured` gives of each calibration."""
    groups = {c.name: c.group for c in CONDITIONS}
    lines = []
    for group, of in GROUPS.items():
        names = [name for name in calibrations[0] if groups[name] in of]
        found = [
            confidences({look: np.concatenate([one[name][look] for name in names]) for look in PRIORS})
            for one in calibrations
        ]
        for measure in MEASURES:
            known = [one for one in found if not np.isnan(one[measure][0]).any()]
            own, base = [one[measure] for one in known], [one["max-probability"] for one in known]
            less = ends = ""
            if measure != "max-probability":
                each, interval = change(own, base, images)
                less = "{:+.0%} [{:+.0%}, {:+.0%}]".format(np.mean(each), *interval)
                ends = f"{min(each):+.0%}, {max(each):+.0%}" if len(each) > 1 else ""
            curves = [risk_coverage(*one) for one in own]
            at = np.mean([risk[np.searchsorted(coverage, 0.8)] for coverage, risk in curves])
            wrong = np.mean([1 - right.mean() for _, right in own])
            area = np.mean([aurc(*one) for one in own])
            lines.append([group, measure, f"{wrong:.3f}", f"{area:.4f}", less, ends, f"{at:.3f}"])
    head = ("inputs", "confidence", "wrong", "AURC", "change", "from, to", "risk at 80%")
    rows = []
    for risk in RISKS:
        for place, look in enumerate(PRIORS):
            of_look = [own[look][:, [2 * place, 2 * place + 1, -1]] for own in kept]
            shares, there = [held(own, risk) for own in of_look], []
            for own, found in zip(of_look, calibrations, strict=True):
                threshold = abstention_threshold(*torch.tensor(own).T, risk)
                of = np.concatenate([one[look] for one in found.values()])
                given = of[:, -1] >= threshold
                there.append(((given & (of[:, 0] < 0.5)).mean(), given.mean()))
            (wrong, answered), (wrong_there, answered_there) = np.mean(shares, 0), np.mean(there, 0)
            rows.append(
                [f"{risk:.0%}", look, f"{wrong:.3f}", f"{answered:.2f}"]
                + [f"{wrong_there:.3f}", f"{answered_there:.2f}"]
            )
    told = (
        "A caller that abstains below `model.abstention_threshold(risk)`. *Unlike*: the share of calibration's own "
        "copies, damaged and mismatched, that are answered otherwise than the sample as it was, which is what the "
        f"risk bounds ({SPLITS} random halves, one for the threshold and one to measure, all copies of a sample in "
        "one). *Wrong*: the share of all inputs of the table above that are answered, and not by the accepted answer."
    )
    heads = ("risk", "look", "unlike", "answered, copies", "wrong", "answered, inputs above")
    return [f"## {name}", table(head, lines), told, table(heads, rows)]


def held(own: np.ndarray, risk: float) -> tuple[float, float]:
    """The mean shares of samples that are answered wrongly, and answered, over random halves of calibration's own.

    Args:
        own: reliability, whether the answer agrees, and the sample's number, (n, 3).
    """
    shares = []
    for seed in range(SPLITS):
        drawn = np.random.default_rng(seed).permutation(np.unique(own[:, 2]))
        half = np.isin(own[:, 2], drawn[: len(drawn) // 2])
        here, there = own[half], own[~half]
        given = there[:, 0] >= abstention_threshold(*torch.tensor(here).T, risk)
        shares.append(((given & (there[:, 1] == 0)).mean(), given.mean()))
    wrong, answered = np.mean(shares, 0)
    return float(wrong), float(answered)


def draw(found: dict[str, dict[str, dict[str, np.ndarray]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {c.name: c.group for c in CONDITIONS}
    figure, axes = pyplot.subplots(1, len(found), figsize=(5 * len(found), 3.6), squeeze=False, sharey=True)
    for axis, (name, of) in zip(axes[0], found.items(), strict=True):
        names = [one for one in of if groups[one] in GROUPS["all damaged"]]
        whole = {look: np.concatenate([of[one][look] for one in names]) for look in PRIORS}
        for measure, own in confidences(whole).items():
            axis.plot(*risk_coverage(*own), label=measure, linestyle="--" if measure in STATIC_MEASURES else "-")
        axis.set(title=f"{name}, damaged inputs", xlabel="share of samples answered", xlim=(0, 1), ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of wrong answers")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo-llava,demo-blip2")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--calibrations", type=int, default=4)
    parser.add_argument("--calibration-samples", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("docs/reliability.md"))
    options = parser.parse_args()
    samples, found, sections = one_per_image(load_easy_vqa("test"), options.samples), {}, []
    train = load_easy_vqa("train")
    train = one_per_image(train, len(train))
    for name in options.models.split(","):
        model, processor = load(name)
        collator = PromptCollator(processor)
        calibrations, kept = [], []
        for number in range(options.calibrations):
            clean = train[number :: options.calibrations]
            of = measured(model, collator, clean, options.calibration_samples, samples, drops=number == 0)
            calibrations.append(of[0])
            kept.append(of[1])
        sections += section(name, calibrations, kept, len(samples))
        found[name] = calibrations[0]
    head = HEAD.format(
        samples=len(samples),
        conditions=len(next(iter(found.values()))) - 1,
        calibrations=options.calibrations,
        calibration=options.calibration_samples,
        passes=PASSES,
        dropout=DROPOUT,
    )
    picture = options.out.with_suffix(".png")
    draw(found, picture)
    shown = f"![Share of wrong answers by share of samples answered]({picture.name})"
    options.out.write_text("\n\n".join([head, shown, *sections]) + "\n", encoding="utf-8")
    print(f"wrote {options.out} and {picture}")


if __name__ == "__main__":
    main()
