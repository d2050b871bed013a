"""Whom to believe when a context may be wrong, on recorded answers of published models; no model is run.

    python benchmarks/recorded.py --answers answers.jsonl [--out docs/recorded.md]

The file has one question a line: `answers` that are right, and by model `outputs` to the image alone (`image`), to a
context alone (`text:KIND`) and to both (`both:KIND`), each with its `text` and its tokens' `logprobs`, as a part of
"Words or Vision: Do Vision-Language Models Have Blind Faith in Text?" (CVPR 2025, arXiv 2503.02199) is distributed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling_dms.training.evaluate.documents import table
from modeling_dms.weigh.second_look import BOTH, IMAGE_ALONE, TEXT_ALONE, Heard, compared, fit_arbiter


KINDS = ("matching", "wrong", "irrelevant")
FOLDS, SEEDS, RESAMPLED = 5, 10, 2000

HEAD = """# When a context may be wrong

Written by `python benchmarks/recorded.py` from answers of LLaVA-1.5-7B and 1.6-7B that the authors of "Words or
Vision: Do Vision-Language Models Have Blind Faith in Text?" ([arXiv 2503.02199](https://arxiv.org/abs/2503.02199))
recorded: to {questions} questions of VQAv2, each with a context that is true and helps, one that contradicts the
image, and one that is beside the point. No model was run. A question counts as right if the answer is one of the
accepted ones, in lower case and without punctuation and articles.

*Second look* compares the answers to the image alone, to the context alone and to both, and how likely their tokens
were (`compared` in `modeling_dms/weigh/second_look.py`; a model that runs compares the first tokens of its answers
alone). It picks the answer that it expects the model to give beside a matching context. It was fitted to that on the
other questions ({folds} folds, {seeds} times), with all three kinds of contexts in equal shares, as they are tested,
and without any right answer. *Likelier* takes the likelier one of the answers to image and context alone, by the mean
of its tokens; *oracle* whichever of the three is right. Intervals: 95%, bootstrapped over the questions."""


def heard(output: dict[str, Any]) -> Heard:
    return Heard(output["text"], output["logprobs"])


def read(rows: list[dict[str, Any]], model: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers of every question and kind of context, (n, 3, P), which answers are right, and which are that to image
    and matching context, (n, 3, 3) of 0 and 1 each, and the mean log-probability of their tokens, (n, 3, 3)."""
    numbers, right, agrees, sure = [], [], [], []
    for row in rows:
        accepted = [Heard(answer, []).words for answer in row["answers"]]
        own = heard(row["outputs"][model]["both:matching"]).words
        for kind in KINDS:
            three = [heard(row["outputs"][model][name]) for name in ("image", f"text:{kind}", f"both:{kind}")]
            numbers.append(compared(*three))
            right.append([float(answer.words in accepted) for answer in three])
            agrees.append([float(answer.words == own) for answer in three])
            sure.append([float(np.mean(answer.log_probabilities or [0.0])) for answer in three])
    shape = (len(rows), len(KINDS), -1)
    answered = [torch.tensor(found).view(shape) for found in (right, agrees, sure)]
    return torch.stack(numbers).view(shape), answered[0], answered[1], answered[2]


def looked(numbers: Tensor, agrees: Tensor) -> Tensor:
    """Whose answer is believed, cross-fitted: (seeds, n, 3)."""
    decided = torch.zeros(SEEDS, *numbers.shape[:2], dtype=torch.long)
    for seed in range(SEEDS):
        folds = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed)) % FOLDS
        for fold in range(FOLDS):
            held = folds == fold
            arbiter = fit_arbiter(*(of[~held].flatten(0, 1) for of in (numbers, agrees)))
            decided[seed, held] = arbiter.decide(numbers[held].flatten(0, 1)).view(-1, len(KINDS))
    return decided


def interval(values: Tensor) -> str:
    """Mean over questions (n,) and its bootstrapped interval."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLED, len(values)))
    low, high = np.quantile(values.numpy()[drawn].mean(1), (0.025, 0.975))
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def section(rows: list[dict[str, Any]], model: str) -> list[str]:
    """A table of one model."""
    numbers, right, agrees, sure = read(rows, model)
    decided = looked(numbers, agrees)
    likelier = torch.where(sure[..., IMAGE_ALONE] >= sure[..., TEXT_ALONE], IMAGE_ALONE, TEXT_ALONE)
    chosen = {
        "image alone": right[..., IMAGE_ALONE],
        "context alone": right[..., TEXT_ALONE],
        "both": right[..., BOTH],
        "likelier": right.gather(2, likelier[..., None])[..., 0],
        "second look": torch.stack([right.gather(2, one[..., None])[..., 0] for one in decided]).mean(0),
        "oracle": right.amax(2),
    }
    lines = []
    for name, found in chosen.items():
        difference = "" if name == "image alone" else interval((found - chosen["image alone"]).mean(1))
        lines.append(
            [name, *(f"{found[:, kind].mean():.3f}" for kind in range(3)), interval(found.mean(1)), difference]
        )
    head = ("believed", *(f"{kind} context" for kind in KINDS), "mean", "difference from image alone")
    return [f"## {model}", table(head, lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, required=True, help="answers.jsonl")
    parser.add_argument("--out", type=Path, default=Path("docs/recorded.md"))
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.answers.read_text(encoding="utf-8").splitlines()]
    parts = [HEAD.format(questions=len(rows), folds=FOLDS, seeds=SEEDS)]
    for model in rows[0]["outputs"]:
        parts += section(rows, model)
    options.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
