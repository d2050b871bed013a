"""Which answer to believe where an image and a text may not belong together: a second look, at each of them alone.

Own. Two sources cannot settle a disagreement by a vote. But what a backbone answers to each alone and to both, and how
sure it is of every token, differs between pairs that belong together and pairs that do not; pairs that were mismatched
on purpose show how, without labels. Nothing here knows a model: recorded answers serve as well.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling_dms.evidence.typicality import fit_logistic


IMAGE_ALONE, TEXT_ALONE, BOTH = 0, 1, 2  # whose answer is believed
COMPARED = 25  # numbers of three answers
FIRST_TOKENS = 12  # of three distributions of the first token
RIDGE = 1e-2
_FARTHEST = 5.0  # standard deviations that one number counts
_ODDS = 10.0


@dataclass
class Heard:
    """An answer, and the natural logarithms of its tokens' probabilities."""

    text: str
    log_probabilities: Sequence[float]

    @property
    def words(self) -> list[str]:
        """In lower case, without punctuation and articles."""
        kept = re.sub(r"[^\w\s]", "", self.text.lower()).split()
        return [word for word in kept if word not in ("a", "an", "the")]


def compared(image: Heard, text: Heard, both: Heard) -> Tensor:
    """How sure the answers to the image alone, to the text alone and to both are, and how far they agree.

    Returns:
        (`COMPARED`,), float32 and finite, also for an answer without tokens.
    """
    found, means = [], []
    for heard in (image, text, both):
        logarithms = torch.tensor([float(value) for value in heard.log_probabilities] or [0.0])
        means.append(float(logarithms.mean()))
        found += [means[-1], float(logarithms.amin()), float(logarithms.sum()), float(logarithms[0])]
        found.append(float(torch.tensor(float(len(logarithms))).log()))
    pairs = ((image, both), (text, both), (image, text))
    same = [float(one.words == other.words) for one, other in pairs]
    shared = []
    for one, other in pairs:
        first, second = set(one.words), set(other.words)
        shared.append(len(first & second) / max(1, len(first | second)))
    found += [*same, float(all(same)), *shared]
    found += [
        means[IMAGE_ALONE] - means[BOTH],
        means[TEXT_ALONE] - means[BOTH],
        means[IMAGE_ALONE] - means[TEXT_ALONE],
    ]
    return torch.tensor(found)


def first_tokens_compared(image: Tensor, text: Tensor, both: Tensor) -> Tensor:
    """What distributions of the first token tell of each other: of the answers to the image alone, to the text alone
    and to both how sure each is, how likely each finds the others' likeliest token, and how far they overlap.

    Args:
        image, text, both: (B, K).

    Returns:
        (B, `FIRST_TOKENS`), log-odds, within +-`_ODDS`.
    """
    said = (image, text, both)
    found = [p.gather(-1, other.argmax(-1, keepdim=True))[:, 0] for p in said for other in said]
    found += [torch.minimum(one, other).sum(-1) for one, other in ((image, text), (image, both), (text, both))]
    return log_odds(torch.stack(found, -1))


def log_odds(probability: Tensor) -> Tensor:
    """log(p / (1 - p)), within +-`_ODDS`."""
    return probability.float().logit(1e-6).clamp(-_ODDS, _ODDS)


@dataclass
class Arbiter:
    """Tells pairs that belong together from mismatched ones by the numbers of `compared`.

    Attributes:
        location, scale: (P,), of the numbers.
        coefficients: (P + 1,), of the log-odds that they belong together, the intercept last.
    """

    location: Tensor
    scale: Tensor
    coefficients: Tensor

    def together(self, numbers: Tensor) -> Tensor:
        """The probability that image and text belong together, both cases being equally frequent: (n, P) -> (n,)."""
        standard = ((numbers - self.location) / self.scale).clamp(-_FARTHEST, _FARTHEST)
        return (standard @ self.coefficients[:-1] + self.coefficients[-1]).sigmoid()

    def decide(self, numbers: Tensor, otherwise: int = IMAGE_ALONE) -> Tensor:
        """Whose answer to believe: that to both where they rather belong together, else that to one: (n, P) -> (n,).

        Args:
            otherwise: `IMAGE_ALONE` or `TEXT_ALONE`, the one that is believed where they do not belong together.
        """
        return torch.where(self.together(numbers) > 0.5, BOTH, otherwise)


def fit_arbiter(matched: Tensor, mismatched: Tensor) -> Arbiter:
    """Fits an [`Arbiter`] by ridge logistic regression; no answer needs to be right.

    Args:
        matched, mismatched: (n, P) and (m, P), numbers of `compared` for pairs that belong together, and for pairs
            that were mismatched on purpose. Both count alike, however many there are of each.
    """
    both = torch.cat([matched, mismatched])
    location, scale = both.mean(0), both.std(0).clamp_min(1e-3)
    standard = ((both - location) / scale).clamp(-_FARTHEST, _FARTHEST)
    targets = torch.cat([torch.ones(len(matched)), torch.zeros(len(mismatched))])
    balance = torch.where(targets == 1, 0.5 / len(matched), 0.5 / len(mismatched))
    return Arbiter(location, scale, fit_logistic(standard, targets, balance, ridge=RIDGE))
