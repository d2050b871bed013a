"""Tasks: answers of a batch against those of each sample alone, and scores against numbers made by hand."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Blip2Processor, CLIPImageProcessorPil, PreTrainedTokenizerFast

from modeling_dms.training.corruptions import corrupt
from modeling_dms.training.data import PromptCollator, Sample, load_easy_vqa
from modeling_dms.training.evaluate.methods import Fixed, Method, Scheduled
from modeling_dms.training.evaluate.metrics.captions import cider_d, simple_tokenizer
from modeling_dms.training.evaluate.published import AdaptVis, ContrastiveDecoding
from modeling_dms.training.evaluate.tasks import (
    Captioning,
    ImageTextMatching,
    ImageTextRetrieval,
    Task,
    VisualQuestionAnswering,
    score_candidates,
)
from modeling_dms.training.evaluate.tasks.retrieval import NOT_MATCHED
from modeling_dms.training.models.loading import load
from tests import tiny


# of all kinds, of which test_methods tests every one: by weights of its own, from two passes, and inside attention
METHODS = (Scheduled(), ContrastiveDecoding(), AdaptVis(low=0.4, threshold=0.9))
FEWER = pytest.mark.parametrize("method", [Fixed(vision=0.1), ContrastiveDecoding()], ids=lambda method: method.name)
CANDIDATES = ["yes", "no", "teal circle", "rectangle", "blue", "a red triangle"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["demo-llava", "demo-blip2"])
def loaded(request):
    return load(request.param, {"scheduler": "entropy"})


@pytest.fixture(scope="module")
def samples():
    """Questions on distinct images; some lack image or context."""
    chosen = load_easy_vqa("test")[3::40][:6]
    chosen[1] = chosen[1].replace(image=None)
    chosen[4] = chosen[4].replace(context=None)
    return chosen


def answered(task, method, model, samples):
    batch = task.collate(samples)
    return task.answer(method, model, batch, method.decide(model, batch))


def assert_rows(task, method, model, samples, tolerance=1e-5):
    """Whatever a sample's batch, its answer is the same."""
    together = answered(task, method, model, samples)
    assert len(together) == len(samples)
    for sample, found in zip(samples, together, strict=True):
        (alone,) = answered(task, method, model, [sample])
        assert alone.keys() == found.keys()
        for name, value in alone.items():
            if isinstance(value, str):
                assert found[name] == value
            else:
                np.testing.assert_allclose(found[name], value, atol=tolerance * max(1, np.abs(value).max()))
    return together


def test_every_task_is_one(loaded, samples):
    processor = loaded[1]
    tasks: list[Task] = [
        VisualQuestionAnswering(processor),
        Captioning(processor),
        ImageTextRetrieval(processor, samples),
        ImageTextMatching(processor, samples),
    ]
    assert len({task.metric for task in tasks}) == 3
    for task in tasks[:3]:
        assert task.collate(samples)["sample_ids"] == [sample.id for sample in samples]


# ---- questions


def test_candidates_are_scored_by_their_tokens(loaded, samples):
    model, processor = loaded
    task = VisualQuestionAnswering(processor, candidates=CANDIDATES)
    tokens = [task.tokens(text) for text in CANDIDATES]
    assert {len(line) for line in tokens} > {1}
    batch = task.collate(samples)
    method = Fixed(vision=0.2)
    decision = method.decide(model, batch)
    sums = score_candidates(method, model, batch, decision, tokens)
    means = score_candidates(method, model, batch, decision, tokens, normalize=True)
    torch.testing.assert_close(means * torch.tensor([len(line) for line in tokens]), sums)
    found = task.answer(method, model, batch, decision)
    assert [answer["prediction"] for answer in found] == [CANDIDATES[i] for i in sums.argmax(1).tolist()]
    np.testing.assert_allclose([answer["confidence"] for answer in found], sums.softmax(1).amax(1), rtol=1e-6)


def test_a_text_follows_a_prompt_as_in_training(loaded):
    processor = loaded[1]
    sample = Sample("a", None, "a teal circle.", "what is it?", ("teal circle",))
    trained = PromptCollator(processor, with_labels=True)([sample])
    asked = VisualQuestionAnswering(processor).collate([sample])
    ids = asked["input_ids"][0].tolist() + VisualQuestionAnswering(processor).tokens("teal circle")
    assert trained["input_ids"][0].tolist() == [*ids, processor.tokenizer.eos_token_id]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_answers_do_not_depend_on_the_batch(loaded, samples, method):
    model, processor = loaded
    ranked = assert_rows(VisualQuestionAnswering(processor, candidates=CANDIDATES), method, model, samples)
    assert {answer["prediction"] for answer in ranked} <= set(CANDIDATES)
    generated = assert_rows(VisualQuestionAnswering(processor), method, model, samples)
    # the demo's models end after one word: nothing of the prompt, nor of the padding, is in the answer
    assert all(answer["prediction"].isalpha() for answer in generated)


def test_demo_answers_are_right(loaded):
    model, processor = loaded
    clean = load_easy_vqa("test")[3::60]
    for task in (VisualQuestionAnswering(processor), VisualQuestionAnswering(processor, candidates=["yes", "no"])):
        chosen = [s for s in clean if task.candidates is None or s.answers[0] in task.candidates]
        scores = task.scores(answered(task, Method(), model, chosen), chosen)
        assert scores["score"].shape == (len(chosen),)
        assert scores["score"].mean() > 0.9
        assert set(scores) == {"score"} | ({"confidence"} if task.candidates else set())


def test_answers_are_scored_by_the_annotators(loaded):
    task = VisualQuestionAnswering(loaded[1], candidates=["Two.", "two", "three"])
    annotated = Sample("a", None, "c", "q", ("2",) * 2 + ("three",) * 8)
    single = Sample("b", None, "c", "q", ("The Three",))
    answers = [{"prediction": p, "confidence": 0.5} for p in ("Two.", "two", "three", "three")]
    found = task.scores(answers, [annotated, annotated, annotated, single])
    np.testing.assert_allclose(found["score"], [0.6, 0.6, 1, 1])
    assert found["confidence"].tolist() == [0.5] * 4
    with pytest.raises(ValueError, match="empty"):
        task.scores(answers[:1], [annotated.replace(answers=())])


# ---- captions


@FEWER
def test_captions_do_not_depend_on_the_batch(loaded, samples, method, monkeypatch):
    model, processor = loaded
    # the demo's models would end after a word
    language = model.language_model if hasattr(model, "language_projection") else model
    monkeypatch.setattr(language.generation_config, "suppress_tokens", [processor.tokenizer.eos_token_id])
    described = [sample.replace(question="describe the picture.") for sample in samples]
    task = Captioning(processor, max_new_tokens=5)
    assert task.tokens("a b") == VisualQuestionAnswering(processor).tokens("a b")
    found = assert_rows(task, method, model, described)
    assert {len(task.tokens(answer["prediction"])) for answer in found} - {0, 1}


def test_caption_scores(loaded):
    texts = [
        ("a red ball on a table", "the red ball lies there"),
        ("two dogs run over grass",),
        ("a tall green tree",),
    ]
    samples = [Sample(str(i), None, "c", "q", answers) for i, answers in enumerate(texts)]
    said = ["A red ball, on a table.", "two dogs", ""]
    found = Captioning(loaded[1]).scores([{"prediction": text} for text in said], samples)
    assert {name: values.shape for name, values in found.items()} == dict.fromkeys(
        ("score", "bleu_4", "rouge_l"), (3,)
    )
    tokens = [[simple_tokenizer(text) for text in own] for own in texts]
    expected = cider_d([simple_tokenizer(text) for text in said], tokens)
    np.testing.assert_allclose(found["score"], expected)
    assert found["score"].argmin() == 2
    assert found["bleu_4"][0] == pytest.approx(1)
    assert found["rouge_l"][0] == pytest.approx(1)
    assert found["bleu_4"][2] < 1e-3
    assert found["rouge_l"][2] == 0
    # idf is that of the references of all samples
    more = [*samples, Sample("x", None, "c", "q", ("a red ball",))]
    again = Captioning(loaded[1]).scores([{"prediction": text} for text in [*said, ""]], more)
    assert again["score"][0] != pytest.approx(found["score"][0])
    with pytest.raises(ValueError, match="empty"):
        Captioning(loaded[1]).scores([{"prediction": "a"}], [samples[0].replace(answers=())])


# ---- retrieval


def captioned(samples):
    """Samples with several texts each, some shared."""
    texts = [("a teal circle", "teal circle."), ("a red circle",), ("a blue triangle", "it is blue", "triangle")]
    texts += [("teal circle.", "circle"), ("rectangle",), ("a black rectangle",)]
    return [s.replace(answers=own, task="retrieval") for s, own in zip(samples, texts, strict=True)]


@FEWER
def test_similarity_is_the_mean_log_likelihood(loaded, samples, method):
    model, processor = loaded
    pairs = captioned(samples)
    task = ImageTextRetrieval(processor, pairs)
    assert len(task.texts) == len(set(task.texts)) == 9
    found = assert_rows(task, method, model, pairs, 2e-5)
    tokens = [processor.tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in task.texts]
    # with both, without an image, without a context
    for sample, answer in [(pairs[place], found[place]) for place in (0, 1, 4)]:
        batch = task.collate([sample])
        decision = method.decide(model, batch)
        for line, similarity in zip(tokens, answer["similarity"], strict=True):
            alone = method.log_likelihood(model, batch, decision, [line])[0, 0] / len(line)
            assert similarity == pytest.approx(float(alone), rel=1e-4, abs=1e-4)


def test_the_context_names_the_text(loaded):
    """With image and context the text is found, with another context alone it is not. The demo's models know one-word
    answers, so these are the texts."""
    model, processor = loaded
    by_color = {}
    for sample in load_easy_vqa("test"):
        if sample.question.startswith("what color"):
            by_color.setdefault(sample.answers[0], sample)
    chosen = list(by_color.values())
    task = ImageTextRetrieval(processor, chosen)
    found = task.scores(answered(task, Method(), model, chosen), chosen)
    assert found["score"].mean() == 1
    assert found["text_to_image_recall@1"].mean() > 0.8
    blank = [corrupt(sample, "image:missing") for sample in chosen]
    wrong = [s.replace(context=o.context) for s, o in zip(blank, [*chosen[1:], chosen[0]], strict=True)]
    assert task.scores(answered(task, Method(), model, wrong), wrong)["score"].mean() == 0


def test_recalls_by_hand(loaded):
    texts = [("a", "b"), ("c",), ("d", "c")]
    samples = [Sample(str(i), None, "c", "q", own) for i, own in enumerate(texts)]
    task = ImageTextRetrieval(loaded[1], samples)
    assert task.texts == ["a", "b", "c", "d"]
    assert task.texts_of == {"0": [0, 1], "1": [2], "2": [3, 2]}
    similarity = [[3.0, 9.0, 4.0, 1.0], [5.0, 2.0, 4.0, 1.0], [0.0, 2.0, 4.0, 8.0]]
    found = task.scores([{"similarity": row} for row in similarity], samples)
    assert found["score"].tolist() == [1, 0, 1]
    # of "a" image 1 is the most similar, of "b" 0, of "d" 2; of "c" all are, and two of three match
    np.testing.assert_allclose(found["text_to_image_recall@1"], [0.5, 2 / 3, (1 + 2 / 3) / 2])
    assert set(found) == {
        "score",
        *(f"image_to_text_recall@{k}" for k in (5, 10)),
        *(f"text_to_image_recall@{k}" for k in (1, 5, 10)),
    }
    for name, values in found.items():
        assert values.shape == (3,), name
        if name.endswith(("5", "10")):
            assert values.tolist() == [1, 1, 1], name
    # some of the images, all of the texts: by id, whatever was done to the samples
    part = [corrupt(samples[2], "text:missing"), samples[0]]
    found = task.scores([{"similarity": similarity[2]}, {"similarity": similarity[0]}], part)
    assert found["score"].tolist() == [1, 1]
    np.testing.assert_allclose(found["text_to_image_recall@1"], [(1 + 0.5) / 2, (1 + 1) / 2])


def test_texts_that_cannot_be_compared(loaded):
    sample = Sample("a", None, "c", "q", ("x",))
    with pytest.raises(ValueError, match="'a' has no text"):
        ImageTextRetrieval(loaded[1], [sample.replace(answers=())])
    with pytest.raises(ValueError, match="two samples have the id 'a'"):
        ImageTextRetrieval(loaded[1], [sample, sample])
    with pytest.raises(ValueError, match="'b' is not of the data set"):
        ImageTextRetrieval(loaded[1], [sample]).scores([{"similarity": [1.0]}], [sample.replace(id="b")])


def test_corrupted_samples_are_compared_with_the_same_texts(loaded, samples):
    model, processor = loaded
    pairs = captioned(samples)
    task = ImageTextRetrieval(processor, pairs)
    noisy = [corrupt(sample, "image:blur", 5) for sample in pairs]
    noisy = [corrupt(sample, "text:typos", 5) for sample in noisy]
    clean, other = answered(task, Method(), model, pairs), answered(task, Method(), model, noisy)
    assert np.abs(np.array(clean[0]["similarity"]) - other[0]["similarity"]).max() > 1e-3
    assert task.scores(other, noisy)["score"].shape == (6,)


# ---- matching


def tiny_processor(placeholders):
    """Words w4 to w97 in the vocabulary of the tiny retrieval model."""
    words = {"[UNK]": 0, "[PAD]": tiny.PAD, "[CLS]": tiny.BOS, "[SEP]": tiny.EOS, "<image>": tiny.IMAGE}
    tokenizer = Tokenizer(models.WordLevel(words | {f"w{i}": i for i in range(4, tiny.IMAGE)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", tiny.BOS), ("[SEP]", tiny.EOS)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return Blip2Processor(
        CLIPImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names),
        num_query_tokens=tiny.IMAGE_TOKENS if placeholders else None,
    )


@pytest.fixture(scope="module", params=[True, False], ids=["placeholders", "no-placeholders"])
def matching(request):
    """A model whose own weights are not uniform, a vanilla one, a processor and samples."""
    model, reference = tiny.shared("retrieval", scheduler="learned", stirred=True), tiny.vanilla("retrieval")
    if not request.param:
        model, reference = copy.deepcopy(model), copy.deepcopy(reference)
        model.config.image_token_index = reference.config.image_token_index = None
    random = np.random.default_rng(0)
    samples = []
    for number in range(4):
        image = Image.fromarray(random.integers(0, 256, (12, 10, 3), dtype=np.uint8))
        texts = tuple(
            " ".join(f"w{i}" for i in random.integers(4, tiny.IMAGE, random.integers(1, 7)))
            for _ in range(number % 2 + 1)
        )
        samples.append(Sample(str(number), image, None, "q", texts, "retrieval"))
    return model, reference, tiny_processor(request.param), samples


def pair_of(model, processor, sample, text):
    """One image and one text as the vanilla class takes them."""
    inputs = dict(processor(images=sample.load_image(), text=text, return_tensors="pt"))
    assert (model.config.image_token_index is None) == (tiny.IMAGE not in inputs["input_ids"])
    return inputs


def test_static_matching_is_the_vanilla_class(matching):
    model, reference, processor, samples = matching
    task = ImageTextMatching(processor, samples, rows=3)
    found = assert_rows(task, Method(), model, samples)
    for sample, answer in zip(samples, found, strict=True):
        for text, similarity in zip(task.texts, answer["similarity"], strict=True):
            inputs = pair_of(reference, processor, sample, text)
            contrasted = reference(**inputs).logits_per_image[0, 0]
            match = reference(**inputs, use_image_text_matching_head=True).logits_per_image[0, 1]
            assert similarity == pytest.approx(float(contrasted + match), abs=1e-4)


def test_only_the_best_texts_are_matched(matching):
    model, _, processor, samples = matching
    every = answered(ImageTextMatching(processor, samples), Method(), model, samples)
    found = answered(ImageTextMatching(processor, samples, matched=2), Method(), model, samples)
    none = answered(ImageTextMatching(processor, samples, matched=0), Method(), model, samples)
    for all_matched, best, contrasted in zip(every, found, none, strict=True):
        all_matched, best, contrasted = (np.array(a["similarity"]) for a in (all_matched, best, contrasted))
        assert contrasted.min() > -NOT_MATCHED - 1
        assert contrasted.max() < 1 - NOT_MATCHED
        first = contrasted.argsort()[-2:]
        np.testing.assert_allclose(best[first], all_matched[first], atol=1e-4)
        rest = contrasted.argsort()[:-2]
        np.testing.assert_allclose(best[rest], contrasted[rest], atol=1e-4)
        assert best[first].min() > best[rest].max()


def test_pairs_are_weighed_one_by_one(matching):
    model, _, processor, samples = matching
    task = ImageTextMatching(processor, samples)
    static = answered(task, Method(), model, samples)
    asked = {"use_image_text_matching_head": True}
    for method, given in ((Fixed(vision=0.1), torch.tensor([[0.1, 0.9]])), (Scheduled(), None)):
        found = assert_rows(task, method, model, samples)
        for sample, answer, even in zip(samples, found, static, strict=True):
            difference = np.array(answer["similarity"]) - even["similarity"]
            assert np.abs(difference).max() > 1e-4
            for text, value in zip(task.texts, difference, strict=True):
                inputs = pair_of(model, processor, sample, text)
                weighed = model(**inputs, **asked, modality_weights=given).logits_per_image[0, 1]
                plain = model(**inputs, **asked, modality_weights=torch.tensor([[0.5, 0.5]])).logits_per_image[0, 1]
                assert value == pytest.approx(float(weighed - plain), abs=1e-4)


def test_the_decision_of_a_batch_is_that_of_its_own_pairs(matching):
    model, _, processor, samples = matching
    task = ImageTextMatching(processor, samples)
    batch = task.collate(samples)
    decision = Scheduled().decide(model, batch)
    for sample, weights in zip(samples, decision, strict=True):
        own = model(**pair_of(model, processor, sample, sample.answers[0])).modality_weights[0]
        torch.testing.assert_close(weights, own)
    flipped = task.answer(Scheduled(), model, batch, decision.flip(1))
    assert flipped == task.answer(Scheduled(), model, batch, decision)


def test_a_missing_image_matches_by_chance(matching):
    model, _, processor, samples = matching
    task = ImageTextMatching(processor, samples)
    missing = [corrupt(samples[0], "image:missing"), *samples[1:]]
    batch = task.collate(missing)
    assert torch.equal(Scheduled().decide(model, batch)[0], torch.tensor([0.0, 1.0]))
    found = assert_rows(task, Scheduled(), model, missing)
    (same,) = set(found[0]["similarity"])
    assert same < min(min(answer["similarity"]) for answer in found[1:])
    scores = task.scores(found, missing)
    assert scores["score"][0] == pytest.approx(1 / len(task.texts))
    assert scores["text_to_image_recall@1"][0] == 0


def test_long_texts_lose_their_end(matching):
    model, _, processor, samples = matching
    long = samples[0].replace(answers=(" ".join(["w7"] * 200),))
    short = samples[0].replace(answers=("w7 w7 w7",))
    found = [answered(ImageTextMatching(processor, [s], max_length=5), Method(), model, [s]) for s in (long, short)]
    assert found[0] == found[1]


@pytest.mark.parametrize("method", [ContrastiveDecoding(), AdaptVis()], ids=lambda method: method.name)
def test_methods_without_weights_cannot_steer_matching(matching, method):
    model, _, processor, samples = matching
    task = ImageTextMatching(processor, samples)
    batch = task.collate(samples)
    with pytest.raises(ValueError, match=r"no modality weights"):
        task.answer(method, model, batch, torch.full((4, 2), 0.5))
