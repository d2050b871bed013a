"""Evaluations of samples with several images and passages: what is damaged, how each source is weighed, the report."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_dms.training.corruptions import corrupt
from modeling_dms.training.data import PromptCollator, load_easy_vqa
from modeling_dms.training.data.easy_vqa import CONTEXTS
from modeling_dms.training.evaluate.credibility import ByModality, LeastLikelyDropped, LikeliestSource
from modeling_dms.training.evaluate.grid import Condition, run_condition
from modeling_dms.training.evaluate.methods import Method, Scheduled, Told, model_inputs, present, read
from modeling_dms.training.evaluate.run import EvaluationConfig, _check_several, evaluate, one_per_image
from modeling_dms.training.models.loading import load


ODD = Condition("text:mismatch", "mismatch text", 5)


def with_passages(samples, count=3):
    """Samples with so many passages, which say the same in different words."""
    found = []
    for number, sample in enumerate(samples):
        color, shape = re.search(r"\ba (\w+) (\w+)", sample.context).groups()
        texts = [CONTEXTS[(number + k) % 5].format(color=color, shape=shape) for k in range(count)]
        found.append(sample.replace(context=texts[0], contexts=tuple(texts[1:])))
    return found


@pytest.fixture(scope="module")
def several(vqa):
    """The demo's LLaVA, calibrated on samples with three passages, its task, and test samples with three."""
    _, task, samples = vqa
    model, processor = load("demo-llava")
    collator = PromptCollator(processor)
    clean = with_passages(one_per_image(load_easy_vqa("train"), 150))
    model.eval().calibrate((collator(clean[s : s + 25]) for s in range(0, 150, 25)), 1, show_progress=False)
    return model, task, with_passages(samples)


@pytest.fixture(scope="module")
def batch(several):
    _, task, samples = several
    return task.collate(ODD.apply(samples[:6], 0)[0])


def test_a_condition_damages_one_of_several_sources(several):
    samples = several[2]
    changed, failed = ODD.apply(samples, 0)
    places = set()
    for old, new in zip(samples, changed, strict=True):
        differ = [
            number for number, pair in enumerate(zip(old.passages, new.passages, strict=True), 2) if len({*pair}) > 1
        ]
        assert new.damaged_sources == tuple(differ)
        assert len(differ) == 1
        assert new.image is old.image
        assert new.damage == (0, 1)
        places |= {*differ}
    assert not failed
    assert places == {2, 3, 4}
    again, other = (ODD.apply(samples, seed)[0] for seed in (0, 1))
    assert again == changed != other


def test_joined_kinds_damage_different_sources(several):
    changed, _ = Condition("text:mismatch+text:typos", "x", 5).apply(several[2], 0)
    assert all(len(sample.damaged_sources) == 2 for sample in changed)
    both, _ = Condition("image:noise+text:typos", "x", 5).apply(several[2], 0)
    assert all(sample.damaged_sources[0] == 1 and len(sample.damaged_sources) == 2 for sample in both)
    # more kinds than images: one after the other
    twice, _ = Condition("image:noise+image:black", "x", 5).apply(several[2], 0)
    assert all(sample.damaged_sources == (1,) for sample in twice)


def test_a_missing_source_leaves_the_others_their_numbers(several):
    changed, _ = Condition("image:missing+text:typos", "x", 5).apply(several[2], 0)
    for sample in changed:
        assert sample.image is None
        assert len(sample.passages) == 3
        assert [number for number, text in enumerate(sample.passages, 1) if number in sample.damaged_sources]
        assert {*sample.damaged_sources} <= {1, 2, 3}
    fewer, _ = Condition("text:missing", "x", 5).apply(several[2], 0)
    assert all(len(sample.passages) == 2 and sample.damaged_sources == () for sample in fewer)
    gone = Condition("text:missing+text:missing+text:missing+image:missing", "x", 5)
    assert gone.lacks(several[2][0]) == "anything left to answer from"


def test_single_sources_are_damaged_as_ever(vqa):
    samples = vqa[2]
    for name in ("text:typos", "image:noise+text:scramble", "text:missing"):
        for old, new in zip(samples, Condition(name, "x", 4).apply(samples, 1)[0], strict=True):
            for kind in name.split("+"):
                old = corrupt(old, kind, 4, salt="@1")
            assert (new.context, new.damage) == (old.context, old.damage)
            assert np.array_equal(np.asarray(new.load_image()), np.asarray(old.load_image()))


def test_the_oracle_is_told_the_source(several, batch):
    model, _, _ = several
    damaged = batch["damaged"]
    assert damaged.shape == (6, 4)
    assert (damaged.sum(1) == 1).all()
    assert not damaged[:, 0].any()
    for low in (0.05, 0.0):
        weights = Told(low=low).decide(model, batch)
        torch.testing.assert_close(weights.sum(1), torch.ones(6))
        torch.testing.assert_close(
            weights[damaged] / weights[~damaged].view(6, 3)[:, 0], torch.full((6,), low / (1 - low))
        )
    nothing = {**batch, "damaged": torch.ones_like(damaged)}
    torch.testing.assert_close(Told().decide(model, nothing), torch.full((6, 4), 0.25))


def test_equal_weights_of_sources_are_the_backbone(several, batch):
    model, _task, _samples = several
    plain = {name: value for name, value in model_inputs(batch).items() if name != "source_ids"}
    static = Method().logits(model, batch, Method().decide(model, batch))
    alike = model(**plain, modality_weights=torch.full((6, 2), 0.5)).logits[:, -1]
    torch.testing.assert_close(static, alike, rtol=0, atol=1e-5)


def test_what_has_no_weight_is_not_read(several):
    model, task, samples = several
    texts = [f"there is a {words} in the picture." for words in ("blue circle", "red circle", "red triangle")]
    batches = [task.collate([samples[0].replace(contexts=(text, samples[0].contexts[1]))]) for text in texts]
    same = [batch for batch in batches if batch["input_ids"].shape == batches[0]["input_ids"].shape]
    assert len(same) > 1
    ids = [[7, 8, 9], [11], [13, 14]]
    for weights, equal in ((torch.tensor([[1 / 3, 1 / 3, 0, 1 / 3]]), True), (torch.full((1, 4), 0.25), False)):
        found = [Method().log_likelihood(model, batch, weights, ids) for batch in same]
        assert torch.allclose(found[0], found[1], atol=1e-4) is equal


def test_rows_with_other_sources_beside_them_answer_as_alone(several):
    model, task, samples = several
    mixed = [samples[0], with_passages([samples[1]], 1)[0], with_passages([samples[2]], 2)[0].replace(image=None)]
    mixed = [sample.replace(damaged_sources=(1,)) for sample in mixed]
    together = task.collate(mixed)
    assert present(together).sum(1).tolist() == [4, 2, 2]
    ids = [[7, 8, 9], [11]]
    for method in (Method(), Told(low=0.05), LikeliestSource(), LeastLikelyDropped(), Scheduled()):
        decision = method.decide(model, together)
        found = method.log_likelihood(model, together, decision, ids)
        for row, sample in enumerate(mixed):
            alone = task.collate([sample])
            own = method.decide(model, alone)
            torch.testing.assert_close(decision[row, : own.shape[1]], own[0], rtol=0, atol=1e-4)
            torch.testing.assert_close(found[row], method.log_likelihood(model, alone, own, ids)[0], rtol=0, atol=1e-3)


def test_the_likeliest_source_has_all_weight(several, batch):
    model, _, _ = several
    decision = LikeliestSource().decide(model, batch)
    assert (decision.sum(1) == 1).all()
    assert ((decision == 0) | (decision == 1)).all()
    alone = [read(model, batch, torch.eye(4)[[k] * 6])[0].softmax(-1).amax(-1) for k in range(4)]
    assert torch.equal(decision.argmax(1), torch.stack(alone, 1).argmax(1))


def test_the_passage_with_the_highest_surprisal_is_dropped(several, batch):
    model, _, samples = several
    decision = LeastLikelyDropped().decide(model, batch)
    surprisal = model.get_modality_weights(**model_inputs(batch))[1].surprisal
    assert torch.equal((decision == 0).float().argmax(1), 1 + surprisal[:, 1:].argmax(1))
    assert (decision[:, 0] > 0).all()
    # one passage alone is kept
    one = several[1].collate(with_passages(samples[:2], 1))
    torch.testing.assert_close(LeastLikelyDropped().decide(model, one), torch.full((2, 2), 0.5))


def test_by_modality_all_passages_are_one_text(several, batch):
    model, _, _ = several
    method = ByModality()
    kinds = torch.where(batch["input_ids"] == model.config.image_token_id, 1, 2)
    joined = {name: value for name, value in batch.items() if name != "source_ids"}
    joined["modality_ids"] = torch.where(batch["source_ids"] > 0, kinds, 0)
    decision = method.decide(model, batch)
    assert torch.equal(decision, Scheduled().decide(model, joined))
    assert decision.shape == (6, 2)
    assert torch.equal(method.logits(model, batch, decision), Scheduled().logits(model, joined, decision))
    for ids in ([[7, 8]], [[9]]):
        both = (
            method.log_likelihood(model, batch, decision, ids),
            Scheduled().log_likelihood(model, joined, decision, ids),
        )
        assert torch.equal(*both)
    kwargs = {"max_new_tokens": 2}
    assert torch.equal(
        method.generate(model, batch, decision, **kwargs), Scheduled().generate(model, joined, decision, **kwargs)
    )
    assert method.weights(decision) is None


def test_weights_of_sources_are_told_as_metrics(several):
    model, task, samples = several
    methods = [Method(), Scheduled("rule"), Method("oracle")]
    clean = run_condition(model, task, methods, samples, Condition("clean", "clean"), 0, 5, True)
    assert [cell.method for cell in clean] == ["static", "rule"]
    assert all("reweighted" in cell.metrics and "damaged_weight" not in cell.metrics for cell in clean)
    static, rule, oracle = run_condition(model, task, methods, samples, ODD, 0, 5, True)
    assert static.weights is rule.weights is oracle.weights is None
    assert static.mean("damaged_weight") == pytest.approx(1)
    assert not static.metrics["damaged_lowest"].any()
    assert static.mean("reweighted") == 0
    assert oracle.mean("reweighted") == 1
    assert oracle.mean("damaged_lowest") == 1
    assert oracle.mean("damaged_weight") < 0.2
    # what two passages and the image contradict shows
    assert rule.mean("damaged_lowest") > 0.7
    assert rule.mean("damaged_weight") < 0.4


@pytest.fixture
def folder(several, tmp_path):
    """A table with images and passages, and a checkpoint that knows sources."""
    model, task, samples = several
    model.save_pretrained(tmp_path / "model"), task.processor.save_pretrained(tmp_path / "model")
    rows = []
    for number, sample in enumerate(samples):
        sample.load_image().save(tmp_path / f"{number}.png")
        row = {"image": f"{number}.png", "context": sample.context, "contexts": list(sample.contexts)}
        row |= {"question": sample.question, "answers": list(sample.answers)}
        rows.append({**row, "split": ("train", "test")[number % 2]})
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_an_evaluation_of_several_sources(folder):
    options = {"model": str(folder / "model"), "data": str(folder), "seeds": 1, "samples": 5, "severities": [5]}
    options |= {"corruptions": ["mismatch", "text:mismatch+text:mismatch"], "kinds": ["text:mismatch"]}
    methods = ["static", "rule", "by modality", "least likely dropped", "likeliest source", "oracle"]
    results = evaluate(EvaluationConfig(out=folder / "out", methods=methods, **options))
    rows = {(row["group"], row["method"]): row for row in results["results"]["groups"]}
    assert rows["mismatch text", "oracle"]["damaged_lowest"] == 1
    assert rows["clean", "static"]["reweighted"] == 0
    assert rows["mismatch text", "rule"]["damaged_weight"] < rows["mismatch text", "static"]["damaged_weight"] == 1
    report = (folder / "out" / "report.md").read_text()
    assert "## Several sources" in report
    assert "| mismatch text | likeliest source |" in report
    assert (folder / "out" / "samples.png").stat().st_size > 10_000
    json.loads((folder / "out" / "results.json").read_text(), parse_constant=pytest.fail)  # no NaN


def test_methods_that_weigh_one_of_each_are_refused(folder):
    options = {"model": str(folder / "model"), "data": str(folder), "out": folder / "out", "corruptions": ()}
    with pytest.raises(ValueError, match="VCD, second look weigh one of each: methods of several are static, rule"):
        evaluate(EvaluationConfig(methods=("static", "VCD", "second look"), **options))


def test_tasks_of_one_of_each_and_methods_of_several_are_refused():
    with pytest.raises(ValueError, match="task 'retrieval' reads one of each"):
        _check_several(EvaluationConfig(model="", out=Path(), task="retrieval", data="flickr8k"), True)
    with pytest.raises(ValueError, match="likeliest source weigh several images or passages, of which no"):
        _check_several(EvaluationConfig(model="", out=Path(), methods=("static", "likeliest source")), False)


def test_what_is_left_of_two_sources_is_sound(several):
    """A missing passage of two leaves an image and a passage, neither of which is damaged."""
    _, task, samples = several
    (left,) = Condition("text:missing", "x", 5).apply(with_passages(samples[:1], 2), 0)[0]
    assert not task.collate([left])["damaged"].any()
    assert not task.collate([left, samples[1]])["damaged"].any()
    (only,) = Condition("image:missing+text:typos", "x", 5).apply(with_passages(samples[:1], 1), 0)[0]
    assert task.collate([only])["damaged"].tolist() == [[False, True]]


def test_a_mismatch_takes_a_passage_that_the_sample_lacks(several):
    samples = several[2]
    first = samples[0].replace(answers=("a",))
    other = samples[1].replace(context=first.passages[0], contexts=(first.passages[1], "a teal dog."), answers=("b",))
    changed, failed = ODD.apply([first, other], 0)
    assert not failed
    assert "a teal dog." in changed[0].passages
    shared = other.replace(contexts=(first.passages[1],))
    assert set(ODD.apply([first, shared], 0)[1]) == {first.id}
