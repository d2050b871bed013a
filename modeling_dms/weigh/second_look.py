"""Which answer to believe where an image and a text may not belong together: a second look, at each of them alone.

Own. Two sources cannot settle a disagreement by a vote. But what a backbone answers to each alone and to both, and how
sure it is of every token, differs between pairs that belong together and pairs that do not. Pairs that were mismatched
or damaged on purpose show how: which of the three answers agrees with that to the pair as it was, without labels.
Nothing here knows a model: recorded answers serve as well.
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
SURE_ALONE = (0, 4)  # of these, how sure the answers to the image and to the text alone are
# of the few answers that trust is fitted to
RIDGE = 0.1
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


def one_answer(numbers: Tensor) -> Tensor:
    """Where all three answers begin with the same token: (B,) bool, by `first_tokens_compared` (B, `FIRST_TOKENS`)."""
    to_both = numbers[:, 3 * BOTH : 3 * BOTH + 3]  # how likely that distribution finds each one's likeliest token
    return (to_both == to_both[:, BOTH:]).all(1)


def believed(trust: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Which of three answers is believed, and how far it can be relied on: the one with the most trust, or that to
    both where all are the same and nothing is to be decided.

    Args:
        trust: (B, 3), how far each answer can be relied on.
        numbers: (B, `FIRST_TOKENS`), of `first_tokens_compared`.

    Returns:
        Trust (B,) and which answer (B,).
    """
    best, which = trust.max(1)
    same = one_answer(numbers)
    return trust[:, BOTH].where(same, best), which.masked_fill(same, BOTH)


def log_odds(probability: Tensor) -> Tensor:
    """log(p / (1 - p)), within +-`_ODDS`."""
    return probability.float().logit(1e-6).clamp(-_ODDS, _ODDS)


@dataclass
class Arbiter:
    """Tells from P numbers how far each of A answers can be relied on.

    Attributes:
        location, scale: (P,), of the numbers.
        coefficients: (A, P + 1), of the log-odds that an answer agrees, the intercept last.
    """

    location: Tensor
    scale: Tensor
    coefficients: Tensor

    def trust(self, numbers: Tensor) -> Tensor:
        """The expected agreement of each answer with that to the pair as it was, in [0, 1]: (n, P) -> (n, A)."""
        standard = (numbers - self.location) / self.scale
        return (standard @ self.coefficients[:, :-1].T + self.coefficients[:, -1]).sigmoid()

    def decide(self, numbers: Tensor) -> Tensor:
        """Whose answer to believe, `IMAGE_ALONE`, `TEXT_ALONE` or `BOTH` of three: (n, P) -> (n,)."""
        return self.trust(numbers).argmax(1)


def fit_arbiter(numbers: Tensor, agrees: Tensor) -> Arbiter:
    """Fits an [`Arbiter`] by ridge logistic regressions; no answer needs to be right.

    Args:
        numbers: (n, P), of pairs that belong together and of pairs that were mismatched or damaged on purpose.
        agrees: (n, A), 1 where an answer is that to the pair as it was, else 0.
    """
    location, scale = numbers.mean(0), numbers.std(0).clamp_min(1e-3)
    even = torch.full((len(numbers),), 1 / len(numbers))
    fits = [fit_logistic((numbers - location) / scale, right, even, ridge=RIDGE) for right in agrees.T]
    return Arbiter(location, scale, torch.stack(fits))
