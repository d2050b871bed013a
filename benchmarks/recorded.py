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

from modeling_dms.evidence.typicality import auroc
from modeling_dms.training.evaluate.documents import table
from modeling_dms.weigh.second_look import BOTH, IMAGE_ALONE, TEXT_ALONE, Heard, compared, fit_arbiter


KINDS = ("matching", "wrong", "irrelevant")
FOLDS, SEEDS, RESAMPLED = 5, 10, 2000

HEAD = """# When a context may be wrong

Written by `python benchmarks/recorded.py` from recorded answers to {questions} questions of VQAv2, each with a context
that is true and helps, one that contradicts the image, and one that is beside the point. No model was run. A question
counts as right if the answer is one of the accepted ones, in lower case and without punctuation and articles.

*Second look* compares the answers to the image alone, to the context alone and to both, and how likely their tokens
were (`modeling_dms/weigh/second_look.py`). It believes both where they rather belong together, else the image. What
belongs together it has learned from other questions ({folds} folds, {seeds} times): from whether their context was
theirs or made to mislead, and not from any right answer. *Likelier* takes the likelier one of the answers to image and
context alone, by the mean of its tokens; *oracle* whichever of the three is right. Intervals: 95%, bootstrapped over
the questions."""


def heard(output: dict[str, Any]) -> Heard:
    return Heard(output["text"], output["logprobs"])


def read(rows: list[dict[str, Any]], model: str) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of every question and kind of context, (n, 3, P), which answers are right, (n, 3, 3) of 0 and 1, and the
    mean log-probability of their tokens, (n, 3, 3)."""
    numbers, right, sure = [], [], []
    for row in rows:
        accepted = [Heard(answer, []).words for answer in row["answers"]]
        for kind in KINDS:
            three = [heard(row["outputs"][model][name]) for name in ("image", f"text:{kind}", f"both:{kind}")]
            numbers.append(compared(*three))
            right.append([float(answer.words in accepted) for answer in three])
            sure.append([float(np.mean(answer.log_probabilities or [0.0])) for answer in three])
    shape = (len(rows), len(KINDS), -1)
    return torch.stack(numbers).view(shape), torch.tensor(right).view(shape), torch.tensor(sure).view(shape)


def looked(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The probability that they belong together, cross-fitted, and the decisions: (seeds, n, 3) each."""
    together, decided = [], []
    for seed in range(SEEDS):
        folds = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed)) % FOLDS
        one, two = torch.zeros(numbers.shape[:2]), torch.zeros(numbers.shape[:2], dtype=torch.long)
        for fold in range(FOLDS):
            known, held = numbers[folds != fold], folds == fold
            arbiter = fit_arbiter(known[:, 0], known[:, 1:].flatten(0, 1))
            one[held] = arbiter.together(numbers[held])
            two[held] = arbiter.decide(numbers[held])
        together.append(one)
        decided.append(two)
    return torch.stack(together), torch.stack(decided)


def interval(values: Tensor) -> str:
    """Mean over questions (n,) and its bootstrapped interval."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLED, len(values)))
    low, high = np.quantile(values.numpy()[drawn].mean(1), (0.025, 0.975))
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def section(rows: list[dict[str, Any]], model: str) -> list[str]:
    """A table of one model, and how well pairs are told apart."""
    numbers, right, sure = read(rows, model)
    together, decided = looked(numbers)
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
    areas = [np.mean([auroc(one[:, kind], one[:, 0]) for one in together]) for kind in (1, 2)]
    head = ("believed", *(f"{kind} context" for kind in KINDS), "mean", "less image alone")
    told = (
        f"Matching contexts are told from wrong ones with an AUROC of {areas[0]:.3f}, from irrelevant ones with "
        f"{areas[1]:.3f}."
    )
    return [f"## {model}", table(head, lines), told]


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
