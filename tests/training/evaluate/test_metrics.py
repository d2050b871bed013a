"""Metrics against naive definitions and the official scorers, their identities and symmetries, and bad input."""

import itertools
import json
import math
import random
import statistics
from pathlib import Path

import evaluate
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_dms.training.evaluate import metrics
from modeling_dms.training.evaluate.metrics.captions import (
    bleu,
    caption_scores,
    cider_d,
    longest_common_subsequence,
    rouge_l,
    simple_tokenizer,
)
from modeling_dms.training.evaluate.metrics.confidence import aurc, expected_calibration_error, risk_at, risk_coverage
from modeling_dms.training.evaluate.metrics.retrieval import recall_at_k, retrieval_recall
from modeling_dms.training.evaluate.metrics.robust import (
    bootstrap_interval,
    mcnemar,
    mean_corruption_error,
    modality_auroc,
    multimodal_impact,
    oracle_gap_closed,
    paired_difference,
    relative_drop,
    relative_robustness,
)
from modeling_dms.training.evaluate.metrics.vqa import answer_type, normalize_answer, vqa_accuracy, vqa_scores


FOLDER = Path(metrics.__file__).parent
bounded = settings(max_examples=50, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


def generator(seed):
    return np.random.default_rng(seed)


# ---- VQA accuracy


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes", "yes"),
        (" yes\n", "yes"),
        ("yes.", "yes"),
        ("the dog", "dog"),
        ("A man and an apple", "man and apple"),
        ("two", "2"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("two dogs", "2 dogs"),
        # a mark that touches a space anywhere goes, others become a space
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("black, white", "black white"),
        ("black,white", "black white"),
        ("t-shirt", "t shirt"),
        ("- t-shirt", "tshirt"),
        ("(left)", "left"),
        ("yes!", "yes"),
        ("?", ""),
        # a comma between digits glues everything
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),
        # periods stay before digits only
        ("3.5", "3.5"),
        (".5", ".5"),
        ("5.", "5"),
        ("st. louis", "st louis"),
        ("u.s.a", "usa"),
        ("v1.x", "v1x"),
        ("." * 33, "."),
        # what is no punctuation to the official tool
        ("10:30", "10:30"),
        ("$5", "$5"),
        ("50%", "50%"),
        ("rock'n'roll", "rock'n'roll"),
        # contractions
        ("dont", "don't"),
        ("dont know", "don't know"),
        ("don't", "don't"),
        ("Isnt", "isn't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),
        ("ill", "ill"),
        ("im", "im"),
        ("a", ""),
        ("Ünïcode…", "ünïcode…"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_by_the_official_tool(answer, normal):
    assert normalize_answer(answer) == normal


def naive_vqa_score(answer, references):
    subsets = list(itertools.combinations(references, len(references) - 1))
    return sum(min(1, subset.count(answer) / 3) for subset in subsets) / len(subsets)


@pytest.mark.parametrize("matches", range(11))
def test_ten_annotators_are_left_out_one_by_one(matches):
    references = ["cat"] * matches + ["dog"] * (10 - matches)

    (score,) = vqa_scores(["cat"], [references])

    assert score == pytest.approx(naive_vqa_score("cat", references))
    # the usual table: 0, .3, .6, .9 and 1
    assert score == pytest.approx(min(1, 0.3 * matches))


@bounded
@given(count=st.integers(4, 12), data=st.data())
def test_vqa_scores_equal_the_naive_mean_whatever_the_order(count, data):
    answers = st.sampled_from(["cat", "dog", "2"])
    references = data.draw(st.lists(answers, min_size=count, max_size=count))
    answer = data.draw(answers)

    (score,) = vqa_scores([answer], [references])

    assert score == pytest.approx(naive_vqa_score(answer, references))
    assert 0 <= score <= 1
    assert vqa_scores([answer], [data.draw(st.permutations(references))]) == pytest.approx(score)


@pytest.mark.parametrize(
    ("references", "score"),
    [
        (["cat"], 1),
        (["dog"], 0),
        (["cat"] * 2, 1),
        (["cat", "dog"], 0.5),
        (["cat"] * 3, 1),
        (["cat", "dog", "dog"], 1 / 3),
    ],
)
def test_fewer_than_four_annotators(references, score):
    assert vqa_scores(["Cat."], [references]) == pytest.approx(score)


def test_ten_unanimous_annotators_are_compared_as_written_unless_told_otherwise():
    unanimous, divided = ["yes"] * 10, ["yes"] * 9 + ["no"]

    assert vqa_scores(["Yes.", "yes ", "Yes."], [unanimous, unanimous, divided]).tolist() == [0, 1, 1]
    assert vqa_scores(["Yes."], [unanimous], normalize_unanimous=True).tolist() == [1]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("Yes.", "yes/no"),
        ("no", "yes/no"),
        ("two", "number"),
        ("1,000", "number"),
        ("3.5", "number"),
        ("none", "number"),
        ("red", "other"),
        ("yes it is", "other"),
        ("2 dogs", "other"),
        ("²", "other"),
        ("nan", "other"),
        ("", "other"),
    ],
)
def test_answer_types(answer, kind):
    assert answer_type(answer) == kind


def test_accuracy_by_given_and_inferred_types():
    predictions, references = ["yes", "2", "red", "blue"], [["yes"], ["3"], ["red"], ["red"]]

    inferred = vqa_accuracy(predictions, references)
    given_types = vqa_accuracy(predictions, references, answer_types=["yes/no", "other", "other", "other"])

    assert inferred == {
        "vqa_accuracy": 0.5,
        "vqa_accuracy_yes/no": 1,
        "vqa_accuracy_number": 0,
        "vqa_accuracy_other": 0.5,
    }
    assert given_types == {
        "vqa_accuracy": 0.5,
        "vqa_accuracy_yes/no": 1,
        "vqa_accuracy_other": pytest.approx(1 / 3),
    }


def test_empty_and_huge_answers_have_a_score():
    assert vqa_scores(["", "", "猫" * 100_000], [["cat"], ["a"], ["猫"]]).tolist() == [0, 1, 0]


@pytest.mark.parametrize("metric", [vqa_accuracy, caption_scores])
@pytest.mark.parametrize(
    ("predictions", "references", "named"),
    [
        ([], [], "predictions is empty"),
        (["a"], [], "1 predictions but 0 references"),
        (["a", "b"], [["a"], []], r"references\[1\] is empty"),
        (["a", None], [["a"], ["b"]], r"predictions\[1\] is None"),
        (["a"], ["abc"], r"references\[0\] is 'abc'"),
        (["a"], [["a", 1]], r"references\[0\]"),
    ],
)
def test_texts_without_partner_are_refused(metric, predictions, references, named):
    with pytest.raises(ValueError, match=named):
        metric(predictions, references)


def test_a_type_for_every_answer():
    with pytest.raises(ValueError, match="answer_types"):
        vqa_accuracy(["a"], [["a"]], answer_types=[])


# ---- captions


words = st.sampled_from("a b c d e".split())  # noqa: SIM905
captions = st.lists(words, min_size=1, max_size=9)
corpora = st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=3)), min_size=1, max_size=5)


def official(candidates, references):
    """The COCO tool's scores on the same tokens: CIDEr-D (n,), BLEU (4,), ROUGE-L (n,)."""
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    result = {i: [" ".join(tokens)] for i, tokens in enumerate(candidates)}
    wanted = {i: [" ".join(tokens) for tokens in own] for i, own in enumerate(references)}
    return (
        Cider().compute_score(wanted, result)[1],
        Bleu(4).compute_score(wanted, result, verbose=0)[0],
        Rouge().compute_score(wanted, result)[1],
    )


@pytest.mark.filterwarnings("ignore:CIDEr-D of one sample")
@bounded
@given(corpus=corpora)
def test_caption_scores_equal_those_of_the_coco_tool(corpus):
    candidates, references = zip(*corpus, strict=True)
    for own, expected in zip(
        (cider_d(candidates, references), bleu(candidates, references), rouge_l(candidates, references)),
        official(candidates, references),
        strict=True,
    ):
        np.testing.assert_allclose(own, expected, atol=1e-9)


def test_long_captions_equal_those_of_the_coco_tool():
    draw = random.Random(0)
    vocabulary = [f"w{i}" for i in range(60)]
    references = [[draw.choices(vocabulary, k=draw.randint(5, 15)) for _ in range(5)] for _ in range(40)]
    # captions near one of their references, with some words replaced, and an empty one
    candidates = [[draw.choice(vocabulary) if draw.random() < 0.2 else word for word in own[0]] for own in references]
    candidates[3] = []

    scores = cider_d(candidates, references), bleu(candidates, references), rouge_l(candidates, references)

    assert scores[0].mean() > 1
    assert scores[1][3] > 0.1
    for own, expected in zip(scores, official(candidates, references), strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-9)


def test_known_caption_scores():
    cat, dog = "the cat sat on the mat".split(), "dogs run through green fields".split()  # noqa: SIM905
    candidates, references = [cat, dog], [[cat], [dog]]

    np.testing.assert_allclose(cider_d(candidates, references), [10, 10])
    np.testing.assert_allclose(bleu(candidates, references), np.ones(4))
    np.testing.assert_allclose(rouge_l(candidates, references), [1, 1])

    # unigrams 5 of 6, bigrams 3 of 5, trigrams 1 of 4, no 4-gram; longest common subsequence 5 of 6
    near = "the cat is on the mat".split()  # noqa: SIM905
    first, second, third, fourth = bleu([near], [[cat]])
    assert first == pytest.approx(5 / 6)
    assert second == pytest.approx((5 / 6 * 3 / 5) ** (1 / 2))
    assert third == pytest.approx((5 / 6 * 3 / 5 * 1 / 4) ** (1 / 3))
    assert 0 < fourth < 1e-3
    assert rouge_l([near], [[cat]]) == pytest.approx(5 / 6)

    # half as long: brevity penalty exp(1 - 2); precision 1, recall 1/2
    assert bleu([cat[:3]], [[cat]])[0] == pytest.approx(math.exp(-1))
    assert rouge_l([cat[:3]], [[cat]]) == pytest.approx(2.44 * 0.5 / (0.5 + 1.44))


def naive_lcs(first, second):
    subsequences = itertools.chain.from_iterable(itertools.combinations(first, n) for n in range(len(first) + 1))

    def within(part):
        rest = iter(second)
        return all(token in rest for token in part)

    return max(len(part) for part in subsequences if within(part))


@bounded
@given(first=st.lists(words, max_size=7), second=st.lists(words, max_size=7))
def test_longest_common_subsequence(first, second):
    assert longest_common_subsequence(first, second) == naive_lcs(first, second)


def naive_cider(candidates, references):
    """CIDEr-D from dense vectors over all n-grams of the corpus."""

    def grams(tokens, n):
        return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    scores = np.zeros((len(candidates), 4))
    for n in range(1, 5):
        known = sorted({g for own in [*references, candidates] for tokens in own for g in grams(tokens, n)})
        df = np.array([sum(any(g in grams(tokens, n) for tokens in own) for own in references) for g in known])
        idf = np.log(len(references) / np.maximum(df, 1))
        for i, (candidate, own) in enumerate(zip(candidates, references, strict=True)):
            c = np.array([grams(candidate, n).count(g) for g in known]) * idf
            for reference in own:
                r = np.array([grams(reference, n).count(g) for g in known]) * idf
                norm = np.linalg.norm(c) * np.linalg.norm(r)
                penalty = math.exp(-((len(candidate) - len(reference)) ** 2) / 72)
                scores[i, n - 1] += 10 * penalty * (np.minimum(c, r) @ r / norm if norm else 0) / len(own)
    return scores.mean(1)


@pytest.mark.filterwarnings("ignore:CIDEr-D of one sample")
@bounded
@given(corpus=corpora, data=st.data())
def test_cider_equals_its_definition_whatever_the_order_of_samples(corpus, data):
    candidates, references = zip(*corpus, strict=True)
    scores = cider_d(candidates, references)

    np.testing.assert_allclose(scores, naive_cider(candidates, references), atol=1e-9)
    assert (scores >= 0).all()
    assert (scores <= 10 + 1e-9).all()
    order = data.draw(st.permutations(range(len(corpus))))
    shuffled = cider_d([candidates[i] for i in order], [references[i] for i in order])
    np.testing.assert_allclose(shuffled, scores[list(order)])


def test_cider_of_one_sample_is_0_with_a_warning():
    with pytest.warns(UserWarning, match="one sample"):
        assert caption_scores(["a cat"], [["a cat"]])["cider_d"] == 0


def test_empty_captions_score_0():
    for scores in (cider_d([[], ["a"]], [[["a"]], [["b"]]]), rouge_l([[], ["a"]], [[["a"]], [["b"]]])):
        assert scores.tolist() == [0, 0]
    assert bleu([[]], [[["a", "b"]]]).max() < 1e-6
    assert bleu([[]], [[[]]]).max() < 1e-6
    assert rouge_l([["a"], []], [[[]], [[]]]).tolist() == [0, 0]
    assert caption_scores(["", "!"], [["a cat"], ["a dog", "?"]])["rouge_l"] == 0


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man's T-shirt, red.", ["a", "man", "s", "t", "shirt", "red"]),
        ("Ein grüner Käse!", ["ein", "grüner", "käse"]),
        ("cafe\u0301", ["café"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("一只猫。", ["一只猫"]),
        ("a 🐈 + b", ["a", "🐈", "+", "b"]),
        ("...", []),
    ],
)
def test_tokenizer(text, tokens):
    assert simple_tokenizer(text) == tokens


def test_caption_scores_name_their_tokenizer():
    texts, references = ["a cat", "Two dogs."], [["a cat"], ["two dogs"]]

    scores = caption_scores(texts, references)

    assert scores["tokenizer"] == "non-PTB tokenizer"
    assert scores["bleu_2"] == pytest.approx(1)
    assert scores["rouge_l"] == 1
    given_tokens = caption_scores(texts, references, tokenizer=str.split)
    assert given_tokens["tokenizer"] != scores["tokenizer"]
    assert given_tokens["rouge_l"] == 0.5


@pytest.mark.parametrize("metric", [cider_d, bleu, rouge_l])
def test_token_lists_without_partner_are_refused(metric):
    with pytest.raises(ValueError, match="empty"):
        metric([], [])
    with pytest.raises(ValueError, match=r"references\[0\]"):
        metric([["a"]], [[]])


# ---- retrieval


def naive_recall(scores, own, k):
    """Mean over all orders of the candidates, sorted stably by score."""
    orders = list(itertools.permutations(range(len(scores))))
    hits = [bool({*sorted(order, key=lambda j: -scores[j])[:k]} & {*own}) for order in orders]
    return sum(hits) / len(hits)


@bounded
@given(
    scores=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    k=st.integers(1, 6),
    data=st.data(),
)
def test_recall_is_the_mean_over_orders_of_tied_candidates(scores, k, data):
    own = data.draw(st.lists(st.integers(0, len(scores) - 1), min_size=1, max_size=3))

    recall = recall_at_k([scores], [own], [k])

    assert recall == pytest.approx(naive_recall(scores, own, k))


@bounded
@given(seed=seeds, images=st.integers(1, 6), captions=st.integers(1, 3))
def test_recall_ignores_monotone_maps_and_the_order_of_images(seed, images, captions):
    similarity = generator(seed).integers(-3, 3, (images, images * captions)).astype(float)
    texts = [list(range(i * captions, (i + 1) * captions)) for i in range(images)]
    recalls = retrieval_recall(similarity, texts)

    assert retrieval_recall(np.exp(similarity) - 7, texts) == recalls
    order = generator(seed + 1).permutation(images)
    assert retrieval_recall(similarity[order], [texts[i] for i in order]) == pytest.approx(recalls)
    for way in ("image_to_text", "text_to_image"):
        values = [recalls[f"{way}_recall@{k}"] for k in (1, 5, 10)]
        assert 0 <= values[0] <= values[1] <= values[2] <= 1


def test_recall_of_a_constant_matrix_is_chance():
    recalls = retrieval_recall(np.zeros((20, 40)), [[2 * i, 2 * i + 1] for i in range(20)])

    assert recalls["text_to_image_recall@1"] == pytest.approx(1 / 20)
    assert recalls["text_to_image_recall@5"] == pytest.approx(5 / 20)
    assert recalls["image_to_text_recall@1"] == pytest.approx(2 / 40)
    assert recalls["image_to_text_recall@10"] == pytest.approx(1 - 30 * 29 / (40 * 39))


def test_recall_of_the_ground_truth_is_1_and_of_its_opposite_0():
    matches = np.kron(np.eye(12), np.ones(5))
    texts = [np.flatnonzero(row).tolist() for row in matches]

    assert set(retrieval_recall(matches, texts).values()) == {1}
    assert set(retrieval_recall(-matches, texts).values()) == {0}


def test_fewer_candidates_than_k_and_distractors():
    similarity = [[0.1, 0.9, 0.5], [0.2, 0.8, 0.1]]

    # the second image and the texts 1 and 2 match nothing, and only get in the way
    assert retrieval_recall(similarity, [[0], []], ks=(1, 2, 3)) == {
        "image_to_text_recall@1": 0,
        "image_to_text_recall@2": 0,
        "image_to_text_recall@3": 1,
        "text_to_image_recall@1": 0,
        "text_to_image_recall@2": 1,
        "text_to_image_recall@3": 1,
    }


@pytest.mark.parametrize(
    ("similarity", "texts", "ks", "named"),
    [
        ([], [], (1,), "similarity is empty"),
        ([[0.0, math.nan]], [[0]], (1,), "similarity holds NaN"),
        ([[0.0, math.inf]], [[0]], (1,), "similarity holds NaN"),
        ([[0.0], [0.0, 1.0]], [[0], [1]], (1,), "similarity is no array"),
        ([0.0, 1.0], [[0], [1]], (1,), "similarity has the shape"),
        ([[0.0, 1.0]], [[0], [1]], (1,), "matches the length 2"),
        ([[0.0, 1.0]], [[2]], (1,), r"matches\[0\]"),
        ([[0.0, 1.0]], [[-1]], (1,), r"matches\[0\]"),
        ([[0.0, 1.0]], [[]], (1,), "matches is empty"),
        ([[0.0, 1.0]], [[0]], (0,), "ks"),
        ([[0.0, 1.0]], [[0]], (), "ks"),
    ],
)
def test_bad_similarities_are_refused(similarity, texts, ks, named):
    with pytest.raises(ValueError, match=named):
        retrieval_recall(similarity, texts, ks)


# ---- drops and errors relative to something


def test_relative_drop_and_what_is_left():
    assert relative_drop(0.8, [0.8, 0.4, 0, 1]).tolist() == pytest.approx([0, 0.5, 1, -0.25])
    assert relative_robustness(0.8, [0.8, 0.4]).tolist() == pytest.approx([1, 0.5])
    assert multimodal_impact(0.8, [0.8, 0.4]) == pytest.approx(0.25)
    assert relative_drop([0.5, 1], [0.25, 0.25]).tolist() == [0.5, 0.75]
    assert math.isnan(multimodal_impact(0, [0, 0]))


def test_corruption_error_is_summed_over_severities_before_the_ratio():
    errors, reference = [[0.1, 0.3], [0.5, 0.5]], [[0.4, 0.4], [0.5, 0.75]]

    assert mean_corruption_error(errors, reference) == pytest.approx((0.4 / 0.8 + 1 / 1.25) / 2)
    assert mean_corruption_error(reference, reference) == 1
    assert mean_corruption_error([0.1, 0.2], [0.2, 0.2]) == pytest.approx(0.75)
    assert math.isnan(mean_corruption_error([0.1, 0.2], [0.2, 0]))


@bounded
@given(seed=seeds, conditions=st.integers(1, 4), factor=st.floats(0.1, 10))
def test_ratios_have_no_unit(seed, conditions, factor):
    own, reference = generator(seed).random((2, conditions)) + 0.01
    assert mean_corruption_error(factor * own, factor * reference) == pytest.approx(
        mean_corruption_error(own, reference)
    )
    assert relative_drop(factor * reference, factor * own) == pytest.approx(relative_drop(reference, own))


# ---- the oracle's gap


def test_gap_closed_is_pooled():
    static, oracle = np.array([[0.0, 1, 1, 0], [1, 1, 1, 1]]), np.array([[1.0, 1, 1, 1], [1, 1, 1, 1]])
    half = np.array([[1.0, 1, 1, 0], [1, 1, 1, 1]])
    assert oracle_gap_closed(static, half, oracle) == 0.5
    worse = np.array([[1.0, 1, 1, 1], [0, 1, 1, 1]])
    assert oracle_gap_closed(static, worse, oracle) == 0.5
    assert np.isnan(oracle_gap_closed(oracle, oracle, oracle))
    assert np.isnan(oracle_gap_closed(oracle, static, static))


@bounded
@given(seed=seeds, conditions=st.integers(1, 3), samples=st.integers(1, 8))
def test_the_oracle_closes_the_gap_and_static_weights_none_of_it(seed, conditions, samples):
    static, dms, oracle = generator(seed).integers(0, 2, (3, conditions, samples))
    oracle = np.maximum(oracle, static)
    oracle[0, 0], static[0, 0] = 1, 0

    assert oracle_gap_closed(static, oracle, oracle) == 1
    assert oracle_gap_closed(static, static, oracle) == 0
    order = generator(seed).permutation(samples)
    assert oracle_gap_closed(static[:, order], dms[:, order], oracle[:, order]) == oracle_gap_closed(
        static, dms, oracle
    )


# ---- which modality was corrupted


@bounded
@given(
    own=st.lists(st.integers(0, 4), min_size=1, max_size=6), other=st.lists(st.integers(0, 4), min_size=1, max_size=6)
)
def test_modality_auroc_counts_pairs_with_ties_as_half(own, other):
    pairs = [(a < b) + 0.5 * (a == b) for a in own for b in other]
    weights, corrupted = np.array([*own, *other]) / 4, [True] * len(own) + [False] * len(other)

    area = modality_auroc(weights, corrupted)

    assert area == pytest.approx(statistics.mean(pairs))
    assert modality_auroc(weights**3 + 5, corrupted) == pytest.approx(area)
    assert modality_auroc(1 - weights, corrupted) == pytest.approx(1 - area)


def test_modality_auroc_wants_both_cases():
    with pytest.raises(ValueError, match="corrupted"):
        modality_auroc([0.5, 0.6], [True, True])


# ---- confidence


def naive_risks(confidence, correct):
    """Mean risks over all orders of equally confident answers."""
    risks = []
    for order in itertools.permutations(range(len(confidence))):
        ranked = sorted(order, key=lambda i: -confidence[i])
        errors = [1 - correct[i] for i in ranked]
        risks.append([sum(errors[:k]) / k for k in range(1, len(errors) + 1)])
    return np.mean(risks, axis=0)


@bounded
@given(answers=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 0.3, 1])), min_size=1, max_size=5))
def test_risk_is_the_mean_over_orders_of_tied_answers(answers):
    confidence, correct = zip(*answers, strict=True)

    coverage, risk = risk_coverage(confidence, correct)

    np.testing.assert_allclose(risk, naive_risks(confidence, correct), atol=1e-12)
    np.testing.assert_allclose(coverage, np.arange(1, len(answers) + 1) / len(answers))
    assert aurc(confidence, correct) == pytest.approx(risk.mean())
    assert aurc(np.exp(confidence), correct) == pytest.approx(aurc(confidence, correct))
    for share, at in zip(coverage, risk, strict=True):
        assert risk_at(share, confidence, correct) == at
    assert risk_at(0.5 / len(answers), confidence, correct) == risk[0]


def test_aurc_of_perfect_useless_and_inverted_confidence():
    correct = [1, 1, 0, 0]

    assert aurc([4, 3, 2, 1], correct) == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)
    assert aurc([1, 1, 1, 1], correct) == pytest.approx(0.5)
    assert aurc([1, 2, 3, 4], correct) == pytest.approx((1 + 1 + 2 / 3 + 1 / 2) / 4)


def naive_ece(confidence, correct, bins):
    total = 0.0
    for b in range(bins):
        members = [i for i, p in enumerate(confidence) if b / bins < p <= (b + 1) / bins or (p == 0 and b == 0)]
        if members:
            gap = statistics.mean(correct[i] for i in members) - statistics.mean(confidence[i] for i in members)
            total += len(members) / len(confidence) * abs(gap)
    return total


@bounded
@given(
    answers=st.lists(st.tuples(st.sampled_from([0, 0.25, 0.3, 0.5, 0.9, 1]), st.sampled_from([0, 1])), min_size=1),
    bins=st.sampled_from([1, 2, 4, 15]),
)
def test_calibration_error_is_the_weighted_gap_of_the_bins(answers, bins):
    confidence, correct = zip(*answers, strict=True)

    error = expected_calibration_error(confidence, correct, bins)

    assert error == pytest.approx(naive_ece(confidence, correct, bins))
    assert 0 <= error <= 1
    assert expected_calibration_error(confidence[::-1], correct[::-1], bins) == pytest.approx(error)


def test_calibration_error_of_certain_and_calibrated_answers():
    assert expected_calibration_error([1, 1, 0], [1, 1, 0]) == 0
    assert expected_calibration_error([1, 1], [0, 0]) == 1
    assert expected_calibration_error([0.75] * 4, [1, 1, 1, 0]) == pytest.approx(0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([0.5, 1.2], [1, 0]), "confidence is outside"),
        (([0.5, 0.2], [1, -1]), "correct is outside"),
        (([0.5], [1], 0), "bins"),
    ],
)
def test_calibration_error_wants_probabilities(arguments, named):
    with pytest.raises(ValueError, match=named):
        expected_calibration_error(*arguments)


# ---- intervals and significance


def test_bootstrap_interval_holds_the_mean_and_narrows_with_samples():
    values = (generator(0).random(100) < 0.7).astype(float)
    low, high = bootstrap_interval(np.mean, values)
    few_low, few_high = bootstrap_interval(np.mean, values[:20])

    assert low < values.mean() < high
    assert high - low < few_high - few_low


def test_bootstrap_interval_agrees_with_scipy():
    first, second = generator(0).normal(size=(2, 80))
    low, high = bootstrap_interval(lambda a, b: np.corrcoef(a, b)[0, 1], first, second, resamples=4000)
    expected = scipy.stats.bootstrap(
        (first, second),
        lambda a, b: np.corrcoef(a, b)[0, 1],
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=4000,
        rng=1,
    ).confidence_interval

    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_bootstrap_interval_leaves_out_resamples_without_a_value():
    static, oracle = np.zeros((1, 20)), np.zeros((1, 20))
    oracle[0, 0] = 1

    assert bootstrap_interval(oracle_gap_closed, static, oracle, oracle) == (1, 1)
    assert np.isnan(bootstrap_interval(oracle_gap_closed, static, static, static)).all()


def test_paired_difference_sees_what_the_samples_share():
    difficulty = generator(0).random(200)
    first, second = difficulty + 0.05, difficulty

    mean, low, high = paired_difference(first, second)

    assert (mean, low, high) == pytest.approx((0.05,) * 3)
    assert paired_difference(second, first).mean == pytest.approx(-0.05)
    assert paired_difference(first, first) == (0, 0, 0)
    # a sample's conditions stay together: copies of one condition add nothing to know
    one, copies = difficulty.round(), np.stack([difficulty.round()] * 5)
    assert paired_difference(copies, 0 * copies) == pytest.approx(paired_difference(one, 0 * one))


def naive_mcnemar(first, second):
    wins, losses = sum(a > b for a, b in zip(first, second, strict=True)), sum(np.less(first, second))
    discordant = wins + losses
    tail = sum(math.comb(discordant, i) for i in range(min(wins, losses) + 1)) / 2**discordant
    return min(1, 2 * tail)


@bounded
@given(answers=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_mcnemar_is_the_two_sided_binomial_tail(answers):
    first, second = zip(*answers, strict=True)

    p = mcnemar(first, second)

    assert p == pytest.approx(naive_mcnemar(first, second))
    assert 0 < p <= 1
    assert mcnemar(second, first) == pytest.approx(p)
    assert mcnemar(first, first) == 1


@pytest.mark.parametrize("scores", [[0, 0.5], [[0, 1]]])
def test_mcnemar_wants_one_row_of_zeros_and_ones(scores):
    with pytest.raises(ValueError, match="first and second"):
        mcnemar(scores, scores)


# ---- bad input of all array functions


ARRAY_METRICS = {
    "relative_drop": (relative_drop, ("clean", "corrupted")),
    "multimodal_impact": (multimodal_impact, ("clean", "corrupted")),
    "relative_robustness": (relative_robustness, ("clean", "corrupted")),
    "mean_corruption_error": (mean_corruption_error, ("errors", "reference_errors")),
    "oracle_gap_closed": (oracle_gap_closed, ("static", "dms", "oracle")),
    "modality_auroc": (modality_auroc, ("weights", "corrupted")),
    "risk_coverage": (risk_coverage, ("confidence", "correct")),
    "aurc": (aurc, ("confidence", "correct")),
    "expected_calibration_error": (expected_calibration_error, ("confidence", "correct")),
    "paired_difference": (paired_difference, ("first", "second")),
    "mcnemar": (mcnemar, ("first", "second")),
    "bootstrap_interval": (
        lambda first, second: bootstrap_interval(lambda a, b: (a - b).mean(), first, second),
        ("first", "second"),
    ),
}


@pytest.mark.parametrize("name", ARRAY_METRICS)
@pytest.mark.parametrize("bad", [[], [0, math.nan], [0, math.inf], [0, -math.inf], [0, None], ["x", "y"]])
def test_empty_and_not_finite_arrays_are_refused_by_name(name, bad):
    metric, arguments = ARRAY_METRICS[name]
    for i, argument in enumerate(arguments):
        given_arrays = [[0.0, 1.0]] * len(arguments)
        given_arrays[i] = bad
        with pytest.raises(ValueError, match=rf"arrays\[{i}\]" if name == "bootstrap_interval" else argument):
            metric(*given_arrays)


@pytest.mark.parametrize("name", [name for name in ARRAY_METRICS if ARRAY_METRICS[name][1][0] != "clean"])
def test_arrays_of_different_sizes_are_refused(name):
    metric, arguments = ARRAY_METRICS[name]
    with pytest.raises(ValueError, match=r"differ|samples"):
        metric(*[[0.0, 1.0]] * (len(arguments) - 1), [0.0, 1.0, 0.0])


@pytest.mark.parametrize("metric", [relative_drop, mean_corruption_error])
def test_negative_scores_are_refused(metric):
    with pytest.raises(ValueError, match="0 or more"):
        metric([0.5], [-0.5])


# ---- as modules of `evaluate`


SIMILARITY, TEXTS = [[0.9, 0.1, 0.4], [0.2, 0.8, 0.3]], [[0], [1, 2]]
SCORES = {
    "predictions": [[1, 1, 1, 0], [1, 0, 1, 1]],
    "references": [[1, 0, 0, 0], [1, 0, 1, 1]],
    "clean": [1, 1, 1, 1],
    "oracle": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "confidences": [[0.9, 0.8, 0.9, 0.2], [0.7, 0.3, 0.9, 0.6]],
    "weights": [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.6, 0.3]],
    "corrupted": [True, False],
}
MODULES = {
    "vqa_accuracy": (metrics.VQAAccuracy, {"predictions": ["Yes", "2"], "references": [["yes"], ["two", "3"]]}),
    "cider": (metrics.CaptionScores, {"predictions": ["a cat", "dogs"], "references": [["a cat"], ["two dogs"]]}),
    "retrieval_recall": (metrics.RetrievalRecall, {"predictions": SIMILARITY, "references": TEXTS, "ks": (1, 2)}),
    "robustness": (metrics.Robustness, SCORES),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_load_by_path_and_as_a_class(name, tmp_path):
    metric, inputs = MODULES[name]
    options = {key: value for key, value in inputs.items() if key not in ("predictions", "references")}

    loaded, direct = evaluate.load(str(FOLDER / name), cache_dir=tmp_path), metric(cache_dir=tmp_path)

    result = loaded.compute(**inputs)
    assert direct.compute(**inputs) == result
    for prediction, reference in zip(inputs["predictions"], inputs["references"], strict=True):
        direct.add(prediction=prediction, reference=reference)
    assert direct.compute(**options) == result
    assert json.loads(json.dumps(result)).keys() == result.keys()


@pytest.mark.parametrize("name", MODULES)
def test_modules_refuse_empty_data_and_work_on(name, tmp_path):
    metric, inputs = MODULES[name]
    instance = metric(cache_dir=tmp_path)
    with pytest.raises(ValueError, match="empty"):
        instance.compute(predictions=[], references=[])

    assert instance.compute(**inputs)


def test_modules_return_what_the_functions_do(tmp_path):
    vqa, cider, retrieval, _ = (metric(cache_dir=tmp_path).compute(**inputs) for metric, inputs in MODULES.values())

    assert vqa == vqa_accuracy(["Yes", "2"], [["yes"], ["two", "3"]])
    assert cider == caption_scores(["a cat", "dogs"], [["a cat"], ["two dogs"]])
    assert retrieval == retrieval_recall(SIMILARITY, TEXTS, ks=(1, 2))


def test_robustness_gathers_its_figures(tmp_path):
    scores, others, oracle = (np.array(SCORES[key]) for key in ("predictions", "references", "oracle"))

    result = metrics.Robustness(cache_dir=tmp_path).compute(**SCORES)

    assert result["score"] == 0.75
    assert result["reference_score"] == 0.5
    assert result["difference"] == 0.25
    assert result["difference_interval"] == paired_difference(scores, others)[1:]
    assert result["mcnemar_p"] == [mcnemar(*pair) for pair in zip(scores, others, strict=True)]
    assert result["mean_corruption_error"] == pytest.approx((1 / 3 + 1) / 2)
    assert result["multimodal_impact"] == 0.25
    assert result["relative_robustness"] == 0.75
    assert result["oracle_gap_closed"] == 0.5
    assert result["oracle_gap_closed_interval"] == bootstrap_interval(oracle_gap_closed, others, scores, oracle)
    assert result["aurc"] == aurc(SCORES["confidences"], scores)
    assert result["expected_calibration_error"] == expected_calibration_error(SCORES["confidences"], scores)
    assert result["modality_auroc"] == pytest.approx(14.5 / 16)


def test_robustness_without_options_and_with_partial_scores(tmp_path):
    result = metrics.Robustness(cache_dir=tmp_path).compute(predictions=[[0.3, 1]], references=[[0.6, 1]])

    assert result.keys() == {
        "score",
        "reference_score",
        "difference",
        "difference_interval",
        "mean_corruption_error",
    }


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"predictions": [[1, math.nan], [0, 1]]}, "predictions"),
        ({"predictions": [[1, 2, 0, 0]] * 2}, "predictions"),
        ({"predictions": [[1, 0], [0, 1]]}, "shapes differ"),
        ({"clean": [math.nan]}, "clean"),
        ({"oracle": [[1, 1, 1, 1]]}, "oracle"),
        ({"confidences": [[0.9, 0.8, 0.9, math.inf], [0.7, 0.3, 0.9, 0.6]]}, "confidence"),
        ({"corrupted": [True]}, "corrupted"),
        ({"corrupted": None}, "corrupted"),
        ({"oracle": [[1, 1, 1, 1], [1]]}, "oracle"),
    ],
)
def test_robustness_names_what_is_wrong(wrong, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        metrics.Robustness(cache_dir=tmp_path).compute(**{**SCORES, **wrong})


def test_unknown_names_of_the_package():
    with pytest.raises(AttributeError, match="Accuracy"):
        metrics.Accuracy  # noqa: B018
