"""Caption scores as in the COCO caption evaluation (`pycocoevalcap`, 104 MB with its Java archives): CIDEr-D, BLEU and
ROUGE-L of lists of tokens.

n samples; `candidates` is a list of n token lists, `references` one of n lists of token lists. All raise a ValueError
if there is no sample, or one without references.
"""

import math
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from modeling_dms.training.evaluate.metrics.checks import texts_with_references, with_references


ORDERS = 4
Tokens = Sequence[str]


def simple_tokenizer(text: str) -> list[str]:
    """Lower case, punctuation (Unicode categories P*) to spaces, split at spaces: no Penn Treebank tokenizer.

    The COCO tool's PTB tokenizer keeps "t-shirt" whole and splits "dog's" into "dog 's", so scores differ a little
    from published ones. In a script without spaces a sentence is one token.
    """
    text = unicodedata.normalize("NFC", text).lower()
    return "".join(" " if unicodedata.category(c).startswith("P") else c for c in text).split()


def ngrams(tokens: Tokens) -> Counter[tuple[str, ...]]:
    """Counts of all n-grams, n = 1 to 4."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(tokens) - n + 1))


def cider_d(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], sigma: float = 6.0) -> np.ndarray:
    """CIDEr-D (Vedantam et al., CVPR 2015): 10 times the mean over references and n = 1 to 4 of

        exp(-(l_c - l_r)^2 / (2 sigma^2)) * min(g_c, g_r) . g_r / (|g_c| |g_r|)

    with l the length and g the counts of n-grams times their idf = log(samples / samples with it in a reference).

    Returns:
        (n,), in [0, 10]; 0 for an empty caption. With one sample every idf, hence the score, is 0: a warning says so.
    """
    with_references(candidates, references)
    if len(candidates) == 1:
        warnings.warn("CIDEr-D of one sample is 0: idf needs several", stacklevel=2)
    frequency = Counter(gram for own in references for gram in set().union(*map(ngrams, own)))

    def vector(tokens: Tokens) -> dict[tuple[str, ...], float]:
        grams = ngrams(tokens).items()
        return {gram: count * math.log(len(references) / max(1, frequency[gram])) for gram, count in grams}

    def similarity(candidate: dict, reference: dict) -> float:
        dot, candidate_square, reference_square = np.zeros((3, ORDERS))
        for gram, value in candidate.items():
            candidate_square[len(gram) - 1] += value**2
        for gram, value in reference.items():
            reference_square[len(gram) - 1] += value**2
            dot[len(gram) - 1] += min(candidate.get(gram, 0), value) * value
        norm = np.sqrt(candidate_square * reference_square)
        return float(np.divide(dot, norm, out=np.zeros(ORDERS), where=norm > 0).mean())

    scores = []
    for candidate, own in zip(candidates, references, strict=True):
        of_candidate = vector(candidate)
        total = 0.0
        for reference in own:
            penalty = math.exp(-((len(candidate) - len(reference)) ** 2) / (2 * sigma**2))
            total += penalty * similarity(of_candidate, vector(reference))
        scores.append(10 * total / len(own))
    return np.array(scores)


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """BLEU-1 to BLEU-4 of the corpus (Papineni et al., ACL 2002): brevity penalty times the geometric mean of the
    clipped precisions, against the reference length closest to the candidate's (the shorter of two).

    Returns:
        (4,), in [0, 1]. An n-gram order without a match counts as 1e-15 matches, as in the COCO tool, which leaves
        BLEU-4 near 1e-4 instead of 0.
    """
    with_references(candidates, references)
    guessed, correct = np.zeros((2, ORDERS))
    length = closest = 0
    for candidate, own in zip(candidates, references, strict=True):
        allowed: Counter[tuple[str, ...]] = Counter()
        for reference in own:
            allowed |= ngrams(reference)
        grams = ngrams(candidate)
        for gram, count in grams.items():
            guessed[len(gram) - 1] += count
            correct[len(gram) - 1] += min(count, allowed[gram])
        length += len(candidate)
        closest += min((abs(len(reference) - len(candidate)), len(reference)) for reference in own)[1]
    precision = (correct + 1e-15) / (guessed + 1e-9)
    ratio = (length + 1e-15) / (closest + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return brevity * np.cumprod(precision) ** (1 / np.arange(1, ORDERS + 1))


def longest_common_subsequence(first: Tokens, second: Tokens) -> int:
    """Length of the longest sequence of tokens that both have in this order."""
    row = [0] * (len(second) + 1)
    for token in first:
        best = [0]
        for (diagonal, above), other in zip(pairwise(row), second, strict=True):
            best.append(diagonal + 1 if token == other else max(above, best[-1]))
        row = best
    return row[-1]


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], beta: float = 1.2) -> np.ndarray:
    """ROUGE-L (Lin, ACL 2004) as in the COCO tool: (1 + beta^2) P R / (R + beta^2 P), of the best precision P and the
    best recall R over references of the longest common subsequence.

    Returns:
        (n,), in [0, 1]; 0 for an empty caption.
    """
    with_references(candidates, references)
    scores = []
    for candidate, own in zip(candidates, references, strict=True):
        common = [longest_common_subsequence(candidate, reference) for reference in own]
        if not any(common):
            scores.append(0.0)
            continue
        precision = max(common) / len(candidate)
        recall = max(count / max(1, len(reference)) for count, reference in zip(common, own, strict=True))
        scores.append((1 + beta**2) * precision * recall / (recall + beta**2 * precision))
    return np.array(scores)


def caption_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: Callable[[str], list[str]] = simple_tokenizer,
) -> dict[str, float | str]:
    """Scores of a corpus of captions.

    Args:
        predictions: n captions; an empty one scores 0.
        references: one or more for each.
        tokenizer: `str.split` for texts that are PTB tokens already.

    Returns:
        `cider_d` in [0, 10] and `rouge_l` in [0, 1], means over samples; `bleu_1` to `bleu_4` in [0, 1]; and
        `tokenizer`, to be told with them.

    Raises:
        ValueError: if there is no sample, or one without references.
    """
    texts_with_references(predictions, references)
    candidates = [tokenizer(text) for text in predictions]
    tokens = [[tokenizer(text) for text in own] for own in references]
    return {
        "cider_d": float(cider_d(candidates, tokens).mean()),
        **{f"bleu_{n}": float(value) for n, value in enumerate(bleu(candidates, tokens), 1)},
        "rouge_l": float(rouge_l(candidates, tokens).mean()),
        "tokenizer": "non-PTB tokenizer" if tokenizer is simple_tokenizer else "the caller's",
    }
