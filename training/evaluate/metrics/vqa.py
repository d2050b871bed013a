"""VQA accuracy with the answer normalisation of the official tool of VQA v2 (GT-Vision-Lab/VQA, `vqaEval.py`)."""

import re
from collections.abc import Sequence

import numpy as np

from modeling_dms.training.evaluate.metrics.checks import texts_with_references


ANNOTATORS = 10
ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0", **{word: str(i) for i, word in enumerate(_NUMBER_WORDS.split())}}
# neither period, apostrophe, colon nor the signs of units and currencies
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# a contraction with any one of its apostrophes forgotten; "somebody'd" loses its own in the official table
CONTRACTIONS = {
    "somebody'd": "somebodyd",
    **{
        word[:i] + word[i + 1 :]: word
        for word in _CONTRACTED.split()
        for i, letter in enumerate(word)
        if letter == "'"
    },
}


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(text: str) -> str:
    """An answer as the official tool compares it.

    A punctuation mark is deleted where it touches a space anywhere in the text, or where the text has a comma between
    digits, and becomes a space otherwise. A period stays only before a digit. Then lower case, number words to digits
    ("none" is 0), no articles, and the apostrophes of contractions put back.
    """
    text = _on_one_line(text)
    thousands = re.search(r"\d,\d", text)
    spaces = {p: "" if thousands or f"{p} " in text or f" {p}" in text else " " for p in PUNCTUATION}
    # the official tool passes re.UNICODE, 32, where `re.sub` takes the number of replacements
    text = re.sub(r"\.(?!\d)", "", text.translate(str.maketrans(spaces)), count=32)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], normalize_unanimous: bool = False
) -> np.ndarray:
    """Accuracy of each answer: the mean, over leaving out one of n annotators, of min(1, matches of the others / 3).

    Antol et al., ICCV 2015, in the form of the official tool, which has n = 10. With fewer than four annotators it is
    matches / (n - 1), so that agreement with all of them is 1; one reference is matched (1) or not (0).

    Args:
        predictions: n answers; an empty one is wrong unless a reference normalises to nothing.
        references: the annotators' answers to each.
        normalize_unanimous: the official tool compares as written where all ten annotators wrote the same, so that
            "Yes." is wrong where they wrote "yes" (meant for text in images). True normalises these too.

    Returns:
        (n,), in [0, 1].

    Raises:
        ValueError: if there is no sample, or one without references.
    """
    texts_with_references(predictions, references)
    scores = []
    for prediction, annotated in zip(predictions, references, strict=True):
        answer, others = _on_one_line(prediction), [_on_one_line(reference) for reference in annotated]
        count = len(others)
        if normalize_unanimous or count < ANNOTATORS or len(set(others)) > 1:
            answer, others = normalize_answer(answer), [normalize_answer(other) for other in others]
        matches = others.count(answer)
        if count == 1:
            scores.append(float(matches))
            continue
        needed = min(3, count - 1)
        left_out = matches * min(1, (matches - 1) / needed) + (count - matches) * min(1, matches / needed)
        scores.append(left_out / count)
    return np.array(scores)


def answer_type(answer: str) -> str:
    """`"yes/no"`, `"number"` (digits, or a number word up to ten) or `"other"`, the types of VQA v2."""
    answer = normalize_answer(answer)
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if re.fullmatch(r"\d+(\.\d+)?", answer) else "other"


def vqa_accuracy(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    answer_types: Sequence[str] | None = None,
    normalize_unanimous: bool = False,
) -> dict[str, float]:
    """Mean of `vqa_scores`, over all and over the samples of each answer type.

    Args:
        answer_types: of the annotations, (n,); without them that of each sample's first reference.

    Returns:
        `vqa_accuracy`, and `vqa_accuracy_<type>` for every type that occurs; in [0, 1], where the official tool has
        percentages with two decimals.

    Raises:
        ValueError: as `vqa_scores`, or if the number of types differs.
    """
    scores = vqa_scores(predictions, references, normalize_unanimous)
    types = np.array([answer_type(own[0]) for own in references] if answer_types is None else list(answer_types))
    if types.shape != scores.shape:
        raise ValueError(f"{len(scores)} predictions but answer_types has the shape {types.shape}")
    by_type = {f"vqa_accuracy_{kind}": float(scores[types == kind].mean()) for kind in sorted(set(types.tolist()))}
    return {"vqa_accuracy": float(scores.mean()), **by_type}
