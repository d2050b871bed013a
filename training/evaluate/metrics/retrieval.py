"""Recall at k of image-text retrieval, both ways, with several texts an image."""

from collections.abc import Sequence

import numpy as np

from modeling_dms.training.evaluate.metrics.checks import finite


def recall_at_k(
    similarity: np.ndarray, matches: Sequence[Sequence[int]], ks: Sequence[int] = (1, 5, 10)
) -> np.ndarray:
    """Whether any match of each query is among the k most similar candidates.

    Where candidates tie, this is the probability of it under a random order of the tied: with t tied with the best
    match, p matches among them and r of the k places left for them, 1 - C(t - p, r) / C(t, r). Equal similarities thus
    score chance, not 1. With k candidates or fewer every query that has a match scores 1.

    Args:
        similarity: (queries, candidates), higher is more similar.
        matches: indices of each query's matching candidates. A query without any is left out.
        ks: K numbers of 1 or more.

    Returns:
        (queries with a match, K), in [0, 1], not decreasing in k.

    Raises:
        ValueError: if the similarity is not a finite matrix, `matches` does not fit it or is empty throughout, or a k
            is below 1.
    """
    (similarity,) = finite(similarity=similarity)
    if similarity.ndim != 2 or len(matches) != len(similarity):
        raise ValueError(f"similarity has the shape {similarity.shape}, matches the length {len(matches)}")
    places = np.asarray(ks, dtype=int)
    if not places.size or places.min() < 1:
        raise ValueError(f"ks is {ks}, not numbers of 1 or more")
    rows = []
    for query, (scores, own) in enumerate(zip(similarity, matches, strict=True)):
        own = sorted(set(own))
        if not own:
            continue
        if own[0] < 0 or own[-1] >= len(scores):
            raise ValueError(f"matches[{query}] is {own}, beyond {len(scores)} candidates")
        best = scores[own].max()
        above, tied, right = (scores > best).sum(), (scores == best).sum(), (scores[own] == best).sum()
        left = np.clip(places - above, 0, tied)  # (K,)
        drawn = np.arange(right)  # C(t - p, r) / C(t, r) = prod_(i < p) (t - r - i) / (t - i)
        rows.append(1 - (np.clip(tied - left[:, None] - drawn, 0, None) / (tied - drawn)).prod(1))
    if not rows:
        raise ValueError("matches is empty: no query has a match")
    return np.stack(rows)


def retrieval_recall(
    similarity: np.ndarray, texts_of_image: Sequence[Sequence[int]], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Mean `recall_at_k` of texts for images and of images for texts.

    Args:
        similarity: (images, texts).
        texts_of_image: indices of each image's texts; an image or text without a partner is a distractor only.

    Returns:
        `image_to_text_recall@k` and `text_to_image_recall@k` for every k, in [0, 1].

    Raises:
        ValueError: as `recall_at_k`.
    """
    (similarity,) = finite(similarity=similarity)
    forward = recall_at_k(similarity, texts_of_image, ks).mean(0)
    images_of_text: list[list[int]] = [[] for _ in similarity.T]
    for image, texts in enumerate(texts_of_image):
        for text in texts:
            images_of_text[text].append(image)
    backward = recall_at_k(similarity.T, images_of_text, ks).mean(0)
    return {
        f"{direction}_recall@{k}": float(value)
        for direction, recalls in (("image_to_text", forward), ("text_to_image", backward))
        for k, value in zip(ks, recalls, strict=True)
    }
