"""How far `out.reliability` tells right answers from wrong ones, on clean, damaged and mismatched inputs.

    python benchmarks/reliability.py [--models demo-llava,demo-blip2] [--samples 300] [--out docs/reliability.md]

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
clean training samples, without labels. Answers are generated greedily, and right if they are the accepted one.

`out.reliability` is the expected agreement with the answer that undamaged inputs would give. With *one look* it is
read from the first token's probability and the evidence of damage. With a *second look* (`conflict_prior="learned"`)
what is flagged is read twice more, with image and text alone, and the answer that can be relied on most is given.
*Max-probability* and *predictive entropy* are of the first token of the rule's answer; *MC dropout* is its mean
probability in {passes} passes with dropout of {dropout} in the language model.

The area under the risk-coverage curve (AURC) is the mean share of wrong answers over all shares of samples that are
answered, the most reliable first: lower is better. *Change* compares it with max-probability's, with 95% intervals,
bootstrapped over the images. *Risk at 80%* is the share of wrong answers among the most reliable 80%.

All of it is of one calibration of each model. Other clean samples give a second look other figures, and the intervals
do not tell by how much: on validation images it was worse than max-probability on damaged inputs with some, and so it
was wherever calibration asked yes-or-no questions alone. Calibrate on questions like those you will ask."""


def answers(
    model: Any, collator: PromptCollator, samples: Sequence[Sample], condition: Condition, prior: str | None
) -> np.ndarray:
    """Of each sample whether the answer is right, and max-probability, entropy, its probability under dropout and its
    reliability: (n, 5). Dropout is left out of a second look."""
    model.config.dms_config.conflict_prior = model.dms.scheduler.config.conflict_prior = prior
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
        dropout = under_dropout(model, batch, out, p) if prior is None else torch.full_like(entropy, torch.nan)
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


def measured(model: Any, collator: PromptCollator, samples: Sequence[Sample]) -> dict[str, dict[str, np.ndarray]]:
    """By condition and look what `answers` gives."""
    found: dict[str, dict[str, np.ndarray]] = {}
    wanted = [c for c in CONDITIONS if c.group in GROUPS["all"]]
    for condition in tqdm(wanted, desc="conditions", unit=""):
        changed, _ = condition.apply(samples, 0)
        found[condition.name] = {
            look: answers(model, collator, changed, condition, prior) for look, prior in PRIORS.items()
        }
    return found


def confidences(found: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By measure, the confidence in each answer and whether it is right."""
    one, second = (found[look] for look in PRIORS)
    columns = (*one[:, 1:].T, second[:, -1])
    rights = (*[one[:, 0]] * (one.shape[1] - 1), second[:, 0])
    return {measure: (c, r) for measure, c, r in zip(MEASURES, columns, rights, strict=True)}


def change(own: Sequence[np.ndarray], base: Sequence[np.ndarray], images: int) -> tuple[float, float, float]:
    """The change of the AURC as a share of the base's, and its interval; samples of one image are drawn together."""
    generator, times = np.random.default_rng(0), len(own[0]) // images

    def ratio(rows: np.ndarray) -> float:
        before = aurc(base[0][rows], base[1][rows])
        return aurc(own[0][rows], own[1][rows]) / before - 1 if before > 0 else 0.0

    rows = np.arange(len(own[0])).reshape(times, images)
    drawn = [ratio(rows[:, generator.integers(images, size=images)].ravel()) for _ in range(RESAMPLED)]
    return ratio(rows.ravel()), *np.quantile(drawn, (0.025, 0.975))


def section(name: str, found: dict[str, dict[str, np.ndarray]], kept: np.ndarray, images: int) -> list[str]:
    groups = {c.name: c.group for c in CONDITIONS}
    lines = []
    for group, of in GROUPS.items():
        names = [name for name in found if groups[name] in of]
        whole = {look: np.concatenate([found[name][look] for name in names]) for look in PRIORS}
        measures = confidences(whole)
        for measure, own in measures.items():
            coverage, risk = risk_coverage(*own)
            base = measures["max-probability"]
            less = ""
            if measure != "max-probability":
                less = "{:+.0%} [{:+.0%}, {:+.0%}]".format(*change(own, base, images))
            at = float(risk[np.searchsorted(coverage, 0.8)])
            lines.append([group, measure, f"{1 - own[1].mean():.3f}", f"{aurc(*own):.4f}", less, f"{at:.3f}"])
    head = ("inputs", "confidence", "wrong", "AURC", "change", "risk at 80%")
    rows = []
    for risk in RISKS:
        for place, look in enumerate(PRIORS):
            own = kept[:, [2 * place, 2 * place + 1, -1]]
            shares, answered = [], []
            for seed in range(SPLITS):
                drawn = np.random.default_rng(seed).permutation(np.unique(own[:, 2]))
                half = np.isin(own[:, 2], drawn[: len(drawn) // 2])
                here, there = own[half], own[~half]
                threshold = abstention_threshold(*torch.tensor(here).T, risk)
                given = there[:, 0] >= threshold
                shares.append((given & (there[:, 1] == 0)).mean())
                answered.append(given.mean())
            threshold = abstention_threshold(*torch.tensor(own).T, risk)
            of = np.concatenate([one[look] for one in found.values()])
            given = of[:, -1] >= threshold
            wrong = (given & (of[:, 0] < 0.5)).mean()
            rows.append(
                [f"{risk:.0%}", look, f"{np.mean(shares):.3f}", f"{np.mean(answered):.2f}", f"{wrong:.3f}"]
                + [f"{given.mean():.2f}"]
            )
    told = (
        "A caller that abstains below `model.abstention_threshold(risk)`: the share of samples that are answered, and "
        f"answered wrongly, among those that calibration itself has damaged ({SPLITS} random halves, one for the "
        "threshold and one to measure, all copies of a sample in one), and among those above."
    )
    heads = ("risk", "look", "wrong", "answered", "wrong, above", "answered, above")
    return [f"## {name}", table(head, lines), told, table(heads, rows)]


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
    parser.add_argument("--calibration-samples", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("docs/reliability.md"))
    options = parser.parse_args()
    samples, found, sections = one_per_image(load_easy_vqa("test"), options.samples), {}, []
    for name in options.models.split(","):
        model, processor = load(name)
        collator = PromptCollator(processor)
        calibrate(model, collator, load_easy_vqa("train"), options.calibration_samples)
        found[name] = measured(model.eval(), collator, samples)
        trust = model.dms.calibration.reliability
        sections += section(name, found[name], trust.kept[: int(trust.count)].numpy(), len(samples))
    head = HEAD.format(
        samples=len(samples),
        conditions=len(next(iter(found.values()))) - 1,
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
