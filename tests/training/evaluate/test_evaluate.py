"""`dms evaluate`: the grid, what is kept of it and resumed, its numbers and pictures, one process and two."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from modeling_dms.calibrate.damage import FAMILIES
from modeling_dms.training.cli import app
from modeling_dms.training.corruptions import CorruptionConfig
from modeling_dms.training.data import PromptCollator, load_easy_vqa
from modeling_dms.training.data.samples import SPLITS, split_readable
from modeling_dms.training.evaluate import baselines, grid
from modeling_dms.training.evaluate.baselines import METHODS, fit_scheduler, make_methods, record, scorer
from modeling_dms.training.evaluate.grid import ORACLE, Cell, Condition, run_condition, run_grid
from modeling_dms.training.evaluate.methods import GRIDS, AdaptVis, ContrastiveDecoding, Fixed, Method, Scheduled
from modeling_dms.training.evaluate.report import Results, render, summarize
from modeling_dms.training.evaluate.run import EvaluationConfig, conditions_of, evaluate, one_per_image
from modeling_dms.training.evaluate.tasks import VisualQuestionAnswering
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import load
from modeling_dms.weigh.scheduler import ModalityScheduler
from tests import tiny


ROOT = Path(__file__).resolve().parents[3]
CLEAN, BLACK, TYPOS = Condition("clean", "clean"), Condition("image:black", "seen", 5), Condition("text:typos", "t", 4)
ANSWERS = ["blue", "circle", "green", "no", "rectangle", "red", "triangle", "yes"]


@pytest.fixture(scope="module")
def vqa():
    """The demo's LLaVA, its task, and test samples."""
    model, processor = load("demo-llava")
    return model.eval(), VisualQuestionAnswering(processor, ANSWERS), one_per_image(load_easy_vqa("test"), 14, 0)


def same(one, two):
    assert (one.method, one.condition, one.seed) == (two.method, two.condition, two.seed)
    assert one.metrics.keys() == two.metrics.keys()
    assert all(np.array_equal(one.metrics[name], two.metrics[name]) for name in one.metrics)
    assert (one.weights is None) == (two.weights is None)
    assert one.weights is None or np.array_equal(one.weights, two.weights)


# ---- the grid


def test_every_method_sees_the_same_corrupted_samples(vqa):
    model, task, samples = vqa
    methods = [Method(), Fixed("again", 0.5), Scheduled("rule")]
    cells = run_condition(model, task, methods, samples, BLACK, seed=1, batch_size=5)
    assert [cell.method for cell in cells] == ["static", "again", "rule"]
    # not calibrated, the rule is static too
    for cell in cells[1:]:
        assert all(np.array_equal(cell.metrics[name], cells[0].metrics[name]) for name in cell.metrics)
    assert cells[0].metrics["score"].shape == (14,)
    assert cells[0].weights.shape == (14, 2)
    assert all(cell.seconds > 0 for cell in cells)


def test_methods_that_weigh_a_batch_alike_answer_it_once(vqa, monkeypatch):
    model, task, samples = vqa
    methods = [Method(), Fixed("again", 0.5), Fixed("other", 0.1), AdaptVis()]
    alone = [run_condition(model, task, [method], samples, BLACK, 1, 7)[0] for method in methods]
    real, asked = VisualQuestionAnswering.answer, []
    monkeypatch.setattr(
        VisualQuestionAnswering,
        "answer",
        lambda task, method, *args: asked.append(method.name) or real(task, method, *args),
    )
    together = run_condition(model, task, methods, samples, BLACK, 1, 7)
    assert asked == ["static", "other", "AdaptVis"] * 2
    for one, other in zip(together, alone, strict=True):
        same(one, other)


def test_schedulers_say_how_far_their_answers_can_be_relied_on(vqa, as_many_are_asked):
    _, task, samples = vqa
    model, processor = load("demo-llava")
    report = calibrate(model.eval(), PromptCollator(processor), load_easy_vqa("train"), 128)
    told = report.reliability
    assert told["second look"] > told["one look"] > told["first token's probability"] > 0.5
    scheduler = baselines._like(model, scheduler="rule", conflict_prior="learned")
    methods = [Method(), Scheduled("rule"), Scheduled("second look", scheduler)]
    static, rule, looked = run_condition(model, task, methods, samples, BLACK, 0, 5)
    assert "reliability" not in static.metrics
    for cell in (rule, looked):
        assert ((cell.metrics["reliability"] > 0) & (cell.metrics["reliability"] < 1)).all()
    # a black image is believed in neither case, and a second look leaves it no weight at all where answers differ
    assert (rule.weights[:, 0] < 0.1).mean() > 0.9
    assert set(looked.weights.round(3).ravel()) <= {0, 0.5, 1}
    assert not np.array_equal(rule.metrics["reliability"], looked.metrics["reliability"])
    again = run_condition(model, task, methods, samples, BLACK, 0, 14)
    np.testing.assert_allclose(again[2].metrics["reliability"], looked.metrics["reliability"], atol=1e-4)


def test_the_oracle_is_told_the_damaged_modality_and_takes_the_better_weights(vqa):
    model, task, samples = vqa
    for condition, side in ((BLACK, 0), (TYPOS, 1)):
        fixed = [Fixed(str(low), low if side == 0 else 1 - low) for low in (0.05, 0.01)]
        cells = run_condition(model, task, [Method(ORACLE), *fixed], samples, condition, 0, 14)
        oracle, others = cells[-1], cells[:-1]
        assert oracle.method == ORACLE
        assert oracle.metrics["score"].mean() == max(cell.metrics["score"].mean() for cell in others)
        assert (oracle.weights[:, side] < 0.06).all()
    assert run_condition(model, task, [Method(ORACLE), Method()], samples, CLEAN, 0, 14)[-1].method == "static"


def test_seeds_change_the_draws_and_nothing_else_does(vqa):
    samples = vqa[2]
    noise = Condition("image:noise", "seen", 3)
    first, again, other = (noise.apply(samples, seed)[0] for seed in (0, 0, 1))
    pixels = [[np.asarray(sample.load_image()) for sample in run] for run in (first, again, other)]
    assert all(np.array_equal(a, b) for a, b in zip(pixels[0], pixels[1], strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(pixels[0], pixels[2], strict=True))
    assert all(
        (a == b).all() for a, b in zip(pixels[0][3:], map(_pixels, noise.apply(samples[3:], 0)[0]), strict=True)
    )


def _pixels(sample):
    return np.asarray(sample.load_image())


def test_a_mismatch_takes_another_samples_image(vqa):
    samples = vqa[2]
    for name, field in (("image:mismatch", "image"), ("text:mismatch", "context")):
        for old, new in zip(samples, Condition(name, "m", 5).apply(samples, 0)[0], strict=True):
            assert getattr(new, field) != getattr(old, field)
            assert new.answers == old.answers
    none, failed = Condition("image:mismatch", "m", 5).apply(samples[:1], 0)
    assert none == []
    assert "no other sample" in failed[samples[0].id]


def test_a_sample_that_cannot_be_corrupted_is_named_and_counts_as_wrong(vqa):
    """ImageNet-C refuses images below 32 pixels."""
    model, task, samples = vqa
    small = samples[2].replace(image=samples[2].load_image().resize((16, 16)))
    mixed, condition = [*samples[:2], small, *samples[3:]], Condition("image:imagenet_c/fog", "f", 3)
    whole, _, spoilt, again = (
        run_condition(model, task, [Method()], data, c, 0, 14)[0]
        for data, c in ((samples, condition), (samples, CLEAN), (mixed, condition), (mixed, condition))
    )
    assert list(spoilt.failed) == [small.id]
    assert "16" in spoilt.failed[small.id]
    assert spoilt.metrics["score"][2] == spoilt.metrics["confidence"][2] == 0
    rest = [place for place in range(14) if place != 2]
    assert np.array_equal(spoilt.metrics["score"][rest], whole.metrics["score"][rest])
    same(spoilt, again)
    with pytest.raises(ValueError, match="no sample could be asked"):
        run_condition(model, task, [Method()], [small], condition, 0, 14)


LACKING = {
    "text:typos": ({"context": None}, "no sample has a context"),
    "text:missing": ({"context": " "}, "no sample has a context"),
    "text:mismatch": ({"context": ""}, "no sample has a context"),
    "image:fog": ({"image": None}, "no sample has an image"),
    "image:mismatch": ({"image": None}, "no sample has an image"),
    "image:fog+text:typos": ({"context": None}, "no sample has a context"),
    "image:missing": ({"context": None}, "no sample has anything left to answer from"),
    "image:black+text:missing": ({"image": None}, "no sample has an image"),
}


@pytest.mark.parametrize("name", LACKING)
def test_a_sample_that_a_condition_does_not_change_is_not_measured_under_it(vqa, name):
    """It would look robust, to damage that it never saw."""
    model, task, samples = vqa
    (change, reason), condition = LACKING[name], Condition(name, "g", 4)
    # each lacks something in its own place, first and last too
    mixed = [sample.replace(**change) if place % 3 == 0 else sample for place, sample in enumerate(samples)]
    some = [place % 3 != 0 for place in range(14)]
    changed, failed = condition.apply(mixed, 0)
    assert [sample.id for sample in changed] == [
        sample.id for sample in mixed[1:3] + mixed[4:6] + mixed[7:9] + mixed[10:12] + mixed[13:]
    ]
    assert not failed
    for new in changed:
        assert new.image is not None or new.context is not None
        assert not name.endswith("mismatch") or (new.image is not None and new.context)
    (cell,) = run_condition(model, task, [Method()], mixed, condition, 0, 5)
    (alone,) = run_condition(
        model, task, [Method()], [s for s, yes in zip(mixed, some, strict=True) if yes], condition, 0, 5
    )
    assert cell.measured.tolist() == some
    assert not cell.metrics["score"][~cell.measured].any()
    assert np.array_equal(cell.metrics["score"][some], alone.metrics["score"])
    np.testing.assert_allclose(cell.metrics["confidence"][some], alone.metrics["confidence"], atol=1e-5)
    assert cell.mean() == alone.mean()
    assert condition.why_not(mixed, 0) is None
    none = [sample.replace(**change) for sample in samples]
    assert condition.why_not(none, 0) == reason
    with pytest.raises(ValueError, match=f"no sample could be asked, {reason}"):
        run_condition(model, task, [Method()], none, condition, 0, 5)
    # other conditions take these samples as they are
    assert Condition("clean", "clean").why_not(none, 0) is None


def test_texts_alone_and_images_alone_are_mismatched_with_their_like(vqa):
    samples = vqa[2]
    for name, field, absent in (("text:mismatch", "context", "image"), ("image:mismatch", "image", "context")):
        alone = [sample.replace(**{absent: None}) for sample in samples]
        changed, failed = Condition(name, "m", 5).apply(alone, 0)
        assert not failed
        for old, new in zip(alone, changed, strict=True):
            assert getattr(new, field) is not None
            assert getattr(new, field) != getattr(old, field)
    # one picture under two names is no other image
    twins = [samples[0], samples[1].replace(image=samples[0].image.read_bytes(), context="another.")]
    assert "no other sample" in Condition("image:mismatch", "m", 5).why_not(twins, 0)


def test_hyperparameters_are_chosen_under_conditions_that_change_something(vqa):
    model, task, samples = vqa
    bare = [sample.replace(context=None) for sample in samples[:6]]
    candidates = [Fixed(vision=0.5), Fixed(vision=0.01)]
    conditions = [CLEAN, BLACK, TYPOS, Condition("text:missing", "seen", 5)]
    assert scorer(model, task, bare, conditions, 6)(candidates) == scorer(model, task, bare, [CLEAN, BLACK], 6)(
        candidates
    )


def test_samples_that_cannot_be_asked_are_named_and_count_as_wrong_in_batches_of_any_size(vqa):
    model, task, samples = vqa
    short = VisualQuestionAnswering(task.processor, ANSWERS, max_length=300)
    huge = samples[2].replace(question="x" * 100_000)
    nothing = samples[5].replace(image=None, context=None)
    mixed = [*samples[:2], huge, *samples[3:5], nothing, *samples[6:]]
    (whole,) = run_condition(model, task, [Method()], samples, CLEAN, 0, 14)
    by_size = [run_condition(model, short, [Method()], mixed, CLEAN, 0, size)[0] for size in (1, 3, 16)]
    rest = [place for place in range(14) if place not in (2, 5)]
    for cell in by_size:
        assert set(cell.failed) == {huge.id, nothing.id}
        assert huge.id in cell.failed[huge.id]
        assert "max_length=300" in cell.failed[huge.id]
        assert "neither an image nor a context" in cell.failed[nothing.id]
        assert cell.metrics["score"][[2, 5]].tolist() == [0, 0]
        assert np.array_equal(cell.metrics["score"][rest], whole.metrics["score"][rest])
        np.testing.assert_allclose(cell.metrics["confidence"][rest], whole.metrics["confidence"][rest], atol=1e-5)
    with pytest.raises(ValueError, match="no sample could be asked"):
        run_condition(model, short, [Method()], [huge, nothing], CLEAN, 0, 2)


def test_unreadable_samples_are_named(vqa, tmp_path):
    samples = vqa[2]
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = samples[0].replace(id="broken", image=tmp_path / "broken.png")
    good, failed = split_readable([*samples[:3], broken, broken.replace(id="too")], show_progress=False)
    assert good == samples[:3]
    assert list(failed) == ["broken", "too"]
    assert "'broken'" in failed["broken"]
    assert "'too'" in failed["too"]


# ---- kept and resumed


def test_a_run_that_was_stopped_goes_on_where_it_was(vqa, tmp_path, monkeypatch):
    model, task, samples = vqa
    methods, conditions = [Method(), Method(ORACLE)], [CLEAN, BLACK, TYPOS]

    def run(out, **options):
        return run_grid(model, task, methods, lambda seed: samples, conditions, (0, 1), out, 7, **options)

    undisturbed = run(tmp_path / "whole")
    real, calls = run_condition, []

    def fails(*args, **kwargs):
        calls.append(args[4])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(grid, "run_condition", fails)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part")
    resumed = run(tmp_path / "part", resume=True)
    assert len(calls) == 3 + 4  # the two that were finished are not run again
    assert len(resumed) == len(undisturbed)
    for one, two in zip(resumed, undisturbed, strict=True):
        same(one, two)
    with pytest.raises(ValueError, match="other samples"):
        run_grid(model, task, methods, lambda _: samples[1:], conditions, (0, 1), tmp_path / "part", 7, resume=True)


def test_only_the_methods_that_are_missing_are_run(vqa, tmp_path, monkeypatch):
    model, task, samples = vqa
    rule = Scheduled("rule", ModalityScheduler(model.config.dms_config, 2))

    def run(out, methods, **options):
        return run_grid(model, task, methods, lambda seed: samples, [CLEAN, BLACK], (0,), out, 7, **options)

    whole = run(tmp_path / "whole", [Method(), rule, Method(ORACLE)])
    run(tmp_path / "part", [Method()])
    real, calls = run_condition, []
    monkeypatch.setattr(grid, "run_condition", lambda *args: calls.append(args[2]) or real(*args))
    added = run(tmp_path / "part", [Method(), rule, Method(ORACLE)], resume=True)
    # an oracle is told what is damaged: in clean samples nothing is
    assert [[m.name for m in methods] for methods in calls] == [["rule"], ["rule", ORACLE]]
    for one, two in zip(added, whole, strict=True):
        same(one, two)
    fewer = run(tmp_path / "part", [rule], resume=True)
    assert len(calls) == 2
    assert [cell.method for cell in fewer] == ["rule", "rule"]
    assert len(run(tmp_path / "part", [Method(), rule], resume=True)) == 4  # nothing was thrown away


def test_what_was_searched_is_not_searched_again(vqa, tmp_path, monkeypatch):
    model, task, samples = vqa
    file, tried = tmp_path / "searched.json", []

    def searches(candidates, score):
        tried.append(candidates[0].name)
        return candidates[2]

    monkeypatch.setattr(baselines, "search", searches)

    def made(*names):
        return make_methods(
            model, lambda _: task, samples, samples, names, CorruptionConfig(), batch_size=20, searched=file
        )

    first = made("static", "mean prior")
    assert made("static", "mean prior", "energy")[:2] == first
    assert tried == ["mean prior", "energy"]
    assert first[1].vision == GRIDS["mean prior"][2]["vision"]


@pytest.mark.parametrize(
    ("group", "known"), [("unseen image", {"noise", "misspelt"}), ("both", {"noise", "misspelt"}), ("seen", set())]
)
def test_detectors_do_not_know_what_is_unseen(vqa, group, known):
    model, task, samples = vqa
    detectors, left_out = model.dms.calibration.detectors, set()

    class Watching(Method):
        def decide(self, model, batch):
            for detector, names in zip(detectors[:2], FAMILIES, strict=True):
                left_out.update(name for name, out in zip(names, detector.left_out, strict=True) if out)
            return super().decide(model, batch)

    condition = Condition("image:imagenet_c/shot_noise+text:typos", group, 3)
    run_condition(model, task, [Watching()], samples[:2], condition, 0, 2)
    assert left_out == known
    assert not any(detector.left_out.any() for detector in detectors)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """What an evaluation leaves of a model and data of its own, as options, and its folder."""
    root = tmp_path_factory.mktemp("evaluated")
    model, processor = load("demo-llava")
    for name in ("a", "b", "c"):
        model.save_pretrained(root / name), processor.save_pretrained(root / name)
        model.get_output_embeddings().weight.data.normal_()
    config = json.loads((root / "c" / "config.json").read_text())
    config["dms_config"]["kappa"] = 2.0
    shutil.copy(root / "a" / "model.safetensors", root / "c")  # the same weights
    (root / "c" / "config.json").write_text(json.dumps(config))
    rows = [json.loads(row) for row in (tiny.table(root / "data") / "table.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["split"] = ("train", "validation", "test")[number % 3]
        row["answers"] = [("red", "blue")[number % 2]]
    (root / "data" / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"model": str(root / "a"), "data": str(root / "data"), "corruptions": ["image:black"], "severities": [5]}
    options |= {"seeds": 1, "samples": 4, "calibration_samples": 0, "methods": ("static",)}
    evaluate(EvaluationConfig(out=root / "out", **options))
    return options, root / "out"


def reworded(folder):
    """The same ids, another answer."""
    table = folder / "table.jsonl"
    table.write_text(table.read_text().replace('"red"', '"green"', 1))


def redrawn(folder):
    Image.new("RGB", (32, 32)).save(folder / "2.png")  # of the test split


def another_model(model):
    return str(Path(model).parent / "b")


def another_configuration(model):
    return str(Path(model).parent / "c")


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("model", another_model, r"model '.*/a', this run asks for model '.*/b'"),
        ("model", another_configuration, r"model '.*/a', this run asks for model '.*/c'"),
        ("task", lambda task: "vqa-generate", "task 'vqa', this run asks for task 'vqa-generate'"),
        ("split", lambda split: "validation", "split 'test', this run asks for .*split 'validation'"),
        ("samples", lambda samples: 3, "samples 4, this run asks for samples 3"),
        ("dtype", lambda dtype: "bfloat16", "dtype 'auto', this run asks for dtype 'bfloat16'"),
        ("calibration_samples", lambda count: 60, "calibration_samples 0, this run asks for calibration_samples 60"),
        ("training_data", lambda data: "easy-vqa", "training_data '.*data', this run asks for .*'easy-vqa'"),
        ("families", lambda families: CorruptionConfig(image_families=("blur",)), "families .*'blur'"),
        ("reworded", reworded, "which has changed since"),
        ("redrawn", redrawn, "which has changed since"),
    ],
)
def test_results_of_another_request_are_not_resumed(evaluated, tmp_path, name, change, told):
    options, made = evaluated
    out = shutil.copytree(made, tmp_path / "out")
    if name in ("reworded", "redrawn"):
        data = shutil.copytree(options["data"], tmp_path / "data")
        change(data)
        options = {**options, "data": str(data)}
        request = json.loads((out / "request.json").read_text())
        for of in ("data", "training_data"):
            request[of]["name"] = str(data)
        (out / "request.json").write_text(json.dumps(request))
    else:
        options = {**options, name: change(options.get(name))}
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"cannot be resumed: .*{told}.*use another folder") as raised:
        evaluate(EvaluationConfig(out=out, resume=True, **options))
    assert str(out) in str(raised.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_what_was_found_for_a_request_is_resumed_with_more_of_it(evaluated, tmp_path, monkeypatch):
    options, made = evaluated
    out, model = shutil.copytree(made, tmp_path / "out"), shutil.copytree(options["model"], tmp_path / "a-copy")
    real, ran = run_condition, []
    monkeypatch.setattr(grid, "run_condition", lambda *args: ran.append((args[4], args[5])) or real(*args))
    # the same model by another name, and what may be added
    more = {"model": str(model), "seeds": 2, "severities": [4, 5], "batch_size": 2}
    evaluate(EvaluationConfig(out=out, resume=True, **options | more))
    mild = Condition("image:black", "image:black", 4)
    assert {(c.name, c.severity, seed) for c, seed in ran} == {
        ("clean", 0, 1),
        ("image:black", 5, 1),
        *((mild.name, mild.severity, seed) for seed in (0, 1)),
    }
    ran.clear()
    # trained methods ask for samples that the others did not
    trained = {"methods": ("static", "mean prior"), "training_samples": 4, "validation_samples": 4}
    evaluate(EvaluationConfig(out=out, resume=True, **options | trained))
    assert ran
    ran.clear()
    evaluate(EvaluationConfig(out=out, resume=True, **options | trained))
    with pytest.raises(ValueError, match="training_samples 4, this run asks for training_samples 3"):
        evaluate(EvaluationConfig(out=out, resume=True, **options | trained | {"training_samples": 3}))
    assert not ran


def test_a_run_that_begins_anew_leaves_no_results_of_another_request_to_resume(evaluated, tmp_path, monkeypatch):
    options, made = evaluated
    out = shutil.copytree(made, tmp_path / "out")
    (out / "searched.json").write_text('{"mean prior": 1}')
    other = {**options, "model": another_model(options["model"]), "corruptions": ["image:blur"]}

    def stops(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(grid, "run_condition", stops)
        with pytest.raises(KeyboardInterrupt):
            evaluate(EvaluationConfig(out=out, **other))
    assert not list((out / "cells").glob("*.json"))
    assert not (out / "searched.json").exists()
    with_both = {**other, "corruptions": ["image:black", "image:blur"]}
    resumed = evaluate(EvaluationConfig(out=out, resume=True, **with_both))["results"]
    assert (
        resumed["conditions"]
        == evaluate(EvaluationConfig(out=tmp_path / "alone", **with_both))["results"]["conditions"]
    )


@pytest.mark.parametrize("request_file", [None, "", "[1]", '{"model": '])
def test_results_that_say_nothing_of_their_request_are_not_resumed(evaluated, tmp_path, request_file):
    options, made = evaluated
    out = shutil.copytree(made, tmp_path / "out")
    (out / "request.json").unlink()
    if request_file is not None:
        (out / "request.json").write_text(request_file)
    with pytest.raises(ValueError, match=r"no request\.json .* version 0\.1"):
        evaluate(EvaluationConfig(out=out, resume=True, **options))
    shutil.rmtree(out / "cells")  # nothing is left to be taken
    evaluate(EvaluationConfig(out=out, resume=True, **options))


# ---- conditions and samples


def test_conditions_of_the_groups():
    config = EvaluationConfig(
        "m", Path("o"), kinds=["image:fog", "image:noise", "text:typos", "image:missing", "text:mismatch"]
    )
    found = {(c.name, c.group, c.severity) for c in conditions_of(config)}
    assert found == {
        ("clean", "clean", 0),
        ("image:noise", "seen", 3),
        ("image:noise", "seen", 5),
        ("image:missing", "seen", 5),
        ("image:fog", "unseen image", 3),
        ("image:fog", "unseen image", 5),
        ("text:typos", "unseen text", 3),
        ("text:typos", "unseen text", 5),
        ("text:mismatch", "mismatch text", 5),
    }
    config = EvaluationConfig("m", Path("o"), corruptions=["image:swirl"], severities=[2])
    assert conditions_of(config)[1:] == [Condition("image:swirl", "image:swirl", 2)]


def test_conditions_that_damage_both_modalities():
    kinds = ["image:fog", "image:jpeg", "image:swirl", "image:noise", "text:typos", "text:scramble", "text:mismatch"]
    config = EvaluationConfig("m", Path("o"), corruptions=["both"], kinds=kinds, severities=[4])
    pairs = {"image:fog+text:typos", "image:jpeg+text:scramble", "image:swirl+text:typos"}
    found = conditions_of(config)[1:]
    assert {c.name for c in found} == pairs
    assert {c.group for c in found} == {"both"}
    named = EvaluationConfig("m", Path("o"), corruptions=["image:black+text:missing"], severities=[5])
    assert conditions_of(named)[1:] == [Condition("image:black+text:missing", "image:black+text:missing", 5)]


def test_damage_to_both_modalities_is_the_damage_to_each(vqa):
    model, task, samples = vqa
    condition = Condition("image:noise+text:typos", "both", 3)
    assert condition.damaged is None
    changed, failed = condition.apply(samples, 1)
    assert not failed
    image = Condition("image:noise", "seen", 3).apply(samples, 1)[0]
    text = Condition("text:typos", "unseen text", 3).apply(samples, 1)[0]
    for both, one, other in zip(changed, image, text, strict=True):
        assert both.damage == (one.damage[0], other.damage[1]) == (0.6, 0.6)
        assert np.array_equal(both.load_image(), one.load_image())
        assert both.context == other.context
    # nobody can be told which modality to trust
    cells = run_condition(model, task, [Method(), Method(ORACLE)], samples, condition, 0, 14)
    assert [cell.method for cell in cells] == ["static"]
    swapped, _ = Condition("image:mismatch+text:mismatch", "both", 5).apply(samples, 0)
    for before, after in zip(samples, swapped, strict=True):
        other = next(s for s in samples if s.image == after.image)
        assert before.image != after.image
        assert after.context == other.context != before.context


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corruptions": ["image:rain"]}, "image:rain"),
        ({"corruptions": ["image:fog+text:rain"]}, "text:rain"),
        ({"severities": [0, 3]}, "severities"),
        ({"severities": []}, "severities"),
        ({"seeds": 0}, "seeds"),
        ({"samples": 0}, "samples"),
        ({"validation_samples": 0}, "validation_samples"),
        ({"task": "ocr"}, "unknown task 'ocr', expected one of vqa, "),
        ({"methods": ["rule", "vcd"]}, "unknown method 'vcd'"),
        ({"split": "testing"}, "unknown split 'testing', did you mean test"),
        ({"dtype": "bf16"}, "unknown dtype 'bf16'"),
        ({"kinds": ["image:pixelated"]}, "unknown kind 'image:pixelated', did you mean image:pixelate"),
        ({"kinds": ["image:fog", "typos"]}, "unknown kind 'typos', did you mean text:typos"),
        # known, but in none of the groups: nothing would be evaluated
        (
            {"kinds": ["image:fog", "text:typos"], "corruptions": ["seen"]},
            "text:typos leave nothing of seen",
        ),
        ({"kinds": ["image:fog"], "corruptions": ["both"]}, "image:fog leave nothing of both"),
    ],
)
def test_wrong_choices_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        conditions_of(EvaluationConfig("m", Path("o"), **changes))


def test_one_question_an_image_another_with_another_seed():
    data = load_easy_vqa("test")
    runs = [one_per_image(data, 40, seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert [s.image for s in runs[0]] == [s.image for s in runs[2]]
    assert sum(a.id != b.id for a, b in zip(runs[0], runs[2], strict=True)) > 20
    assert len({s.image for s in runs[0]}) == 40
    assert 0.2 < np.mean([s.answers[0] in ("yes", "no") for s in runs[0]]) < 0.5


# ---- trained and searched baselines


def test_a_scheduler_fitted_on_recorded_signals_weighs_as_in_the_model(vqa):
    model, task, samples = vqa
    data = load_easy_vqa("train")[::40]
    model, processor = load("demo-llava")
    from modeling_dms.training.data import PromptCollator
    from modeling_dms.training.models.calibrate import calibrate

    calibrate(model.eval(), PromptCollator(processor), data, 60, show_progress=False)
    task = VisualQuestionAnswering(processor, ANSWERS)
    damaged = [*samples, *BLACK.apply(samples, 0)[0], *TYPOS.apply(samples, 0)[0]]
    recorded = record(model, task, damaged, batch_size=10)
    target = (-torch.tensor([s.damage for s in damaged]) / 0.1).softmax(1)
    before = model.dms.scheduler
    fitted = fit_scheduler(model, recorded, target, steps=150, kappa=0.0)
    assert model.dms.scheduler is before
    again = fit_scheduler(model, recorded, target, steps=150, kappa=0.0)
    assert all(torch.equal(a, b) for a, b in zip(fitted.parameters(), again.parameters(), strict=True))
    method, weights = Scheduled("learned", fitted), []
    for start in range(0, len(damaged), 6):
        weights.append(method.decide(model, task.collate(damaged[start : start + 6])))
    weights = torch.cat(weights)
    known = model.dms.calibration.reliability
    torch.testing.assert_close(weights, fitted(*recorded, known.spared, known.dropped), atol=1e-5, rtol=1e-4)
    assert weights[14:28, 0].mean() < 0.2 < 0.8 < weights[28:, 0].mean()


def test_candidates_scored_together_score_as_alone(vqa):
    model, task, samples = vqa
    score = scorer(model, task, samples[:6], [CLEAN, BLACK], 4)
    candidates = [Fixed(vision=0.5), Fixed(vision=0.01), ContrastiveDecoding(), ContrastiveDecoding(alpha=0.2)]
    assert score(candidates) == [score([candidate])[0] for candidate in candidates]


def test_methods_by_name(vqa, monkeypatch):
    model, task, samples = vqa
    monkeypatch.setattr(baselines, "fit_scheduler", partial(fit_scheduler, steps=20))
    names = ["static", "rule", "mean prior", "energy", "learned: typicality", "oracle"]
    train = load_easy_vqa("train")[::200][:60]
    found = make_methods(model, lambda _: task, train, samples[:6], names, CorruptionConfig(), batch_size=20)
    assert [method.name for method in found] == names
    config = found[4].scheduler.config
    assert (config.scheduler, config.scheduler_signals, config.kappa) == ("learned", ["typicality"], 0)
    with pytest.raises(ValueError, match=r"unknown method 'magic'.*static"):
        make_methods(model, lambda _: task, [], [], ["magic"], CorruptionConfig())
    assert set(names) < set(METHODS)


# ---- tables of one modality


def evaluate_table(folder, rows, *options):
    folder.mkdir()
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        "evaluate",
        "--model=demo-llava",
        f"--data={folder}",
        f"--out={folder / 'run'}",
        "--samples=6",
        "--seeds=2",
    ]
    command += ["--severities=5", "--methods=static,rule", "--calibration-samples=0", *options]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    results = json.loads((folder / "run" / "results.json").read_text())
    measured = {row["condition"]: row["samples"] for row in results["results"]["conditions"]}
    return measured, results["run"]["conditions_left_out"], (folder / "run" / "report.md").read_text()


def rows_of(samples, **changes):
    rows = [
        {
            "id": s.id,
            "image": str(s.image),
            "context": s.context,
            "question": s.question,
            "answers": s.answers,
            **changes,
        }
        for s in samples
    ]
    return rows + [{**row, "id": f"train {row['id']}", "split": "train"} for row in rows[:2]]


NAMES = "image:black,image:missing,text:typos,text:missing,text:mismatch,image:fog+text:typos"


def test_a_table_without_contexts_is_evaluated_where_it_can_be(vqa, tmp_path, caplog):
    rows = rows_of(vqa[2], context=None, split="test")
    measured, left_out, report = evaluate_table(tmp_path / "data", rows, f"--corruptions={NAMES}")
    assert measured == {"clean": 6, "image:black": 6}
    assert left_out.pop("image:missing") == "no sample has anything left to answer from"
    assert left_out == dict.fromkeys(NAMES.split(",")[2:], "no sample has a context")
    for name, reason in left_out.items():
        assert f"left out: {name}: {reason}" in caplog.messages
        assert f"{name}: {reason}" in report
    assert "| text: typos |" not in report


def test_a_table_of_texts_is_evaluated_where_it_can_be(vqa, tmp_path, caplog):
    rows = [{**row, "file_name": row["image"], "image": None} for row in rows_of(vqa[2], split="test")]
    measured, left_out, report = evaluate_table(tmp_path / "data", rows, f"--corruptions={NAMES}")
    # without a context too nothing would be left
    assert measured == {"clean": 6, "text:typos": 6, "text:mismatch": 6}
    assert left_out.pop("text:missing") == "no sample has anything left to answer from"
    assert set(left_out.values()) == {"no sample has an image"}
    assert "no image in any row" in caplog.text
    assert "image: black" not in report


def test_conditions_that_no_sample_of_a_group_can_take_cost_no_other(vqa, tmp_path):
    """Images too small for ImageNet-C, and one scene that cannot be mismatched with itself."""
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(b"")
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [
        {"id": n, "image": f"../{n}.png", "context": "a box.", "question": "what?", "answer": "box"} for n in range(6)
    ]
    rows = [{**row, "split": split, "id": f"{split} {row['id']}"} for row in rows for split in ("train", "test")]
    names = "--corruptions=image:imagenet_c/fog,image:black,image:mismatch"
    measured, left_out, _ = evaluate_table(tmp_path / "data", rows, names)
    assert measured == {"clean": 6, "image:black": 6}
    assert "16" in left_out["image:imagenet_c/fog"]
    assert "no other sample" in left_out["image:mismatch"]


def test_where_some_samples_lack_a_modality_their_number_is_shown(vqa, tmp_path):
    rows = rows_of(vqa[2], split="test")
    for row in rows[:2]:
        row["context"] = None
    measured, left_out, report = evaluate_table(tmp_path / "data", rows, "--corruptions=text:typos,image:black")
    assert measured == {"clean": 6, "text:typos": 4, "image:black": 6}
    assert not left_out
    assert "| text: typos (4 of 6) |" in report
    assert "| image: black |" in report


# ---- numbers


def test_numbers_of_what_was_measured():
    """As if the others were not there: in means, in differences to static, and in what is clean."""
    fog, typos = Condition("image:fog", "unseen image", 5), Condition("text:typos", "unseen text", 5)
    some = np.array([True, False, True, True, False])
    scores = {
        (CLEAN, "static"): [1, 0, 1, 1, 0],
        (CLEAN, "rule"): [1, 0, 1, 1, 1],
        (fog, "static"): [0, 1, 0, 1, 1],
        (fog, "rule"): [1, 1, 0, 1, 1],
        (typos, "static"): [0, 0, 0, 1, 0],
        (typos, "rule"): [1, 0, 0, 1, 0],
    }
    cells, only = [], []
    for (condition, method), score in scores.items():
        weights = [[0.4, 0.6]] * 5
        whole = cell(method, condition, 0, score, weights, [0.9, 0.5, 0.8, 0.7, 0.6])
        if condition is typos:
            whole = replace(whole, measured=some, metrics={k: v * some for k, v in whole.metrics.items()})
        cells.append(whole)
        part = {name: values[some] for name, values in whole.metrics.items()}
        only.append(Cell(method, condition, 0, part, whole.weights[some], 0.5))
    numbers, expected = summarize(cells), summarize(only)
    found, wanted = ({(row["group"], row["method"]): row for row in of["groups"]} for of in (numbers, expected))
    for method in ("static", "rule"):
        row, other = found["unseen text", method], wanted["unseen text", method]
        for name in ("answers", "score", "aurc", "risk", "ece", "mcnemar"):
            assert row[name] == pytest.approx(other[name])
        assert row["minus_static"][0] == pytest.approx(other["minus_static"][0])
        assert found["unseen", method]["answers"] == 8
        assert found["unseen image", method]["answers"] == 5
    assert found["unseen", "rule"]["score"] == pytest.approx((4 + 2) / (5 + 3))
    assert found["unseen", "rule"]["minus_static"][0] == pytest.approx(2 / 8)
    assert found["unseen", "rule"]["minus_static"][1] >= 0
    assert numbers["against"]["minus"]["static"][0] == pytest.approx(2 / 8)
    (row,) = (row for row in numbers["robustness"] if row["method"] == "static")
    # clean: 3 of 5 for fog, 3 of 3 for typos
    assert row["relative_robustness"] == pytest.approx(np.mean([(3 / 5) / (3 / 5), (1 / 3) / (3 / 3)]))
    counts = {(row["condition"], row["method"]): row["samples"] for row in numbers["conditions"]}
    assert counts["text:typos", "rule"] == 3


def cell(method, condition, seed, score, weights=None, confidence=None):
    metrics = {"score": np.array(score, dtype=float)}
    if confidence is not None:
        metrics["confidence"] = np.array(confidence)
    return Cell(method, condition, seed, metrics, None if weights is None else np.array(weights), 0.5)


def test_numbers_by_hand():
    fog, typos = Condition("image:fog", "unseen image", 5), Condition("text:typos", "unseen text", 5)
    away, towards = [[0.1, 0.9]] * 4, [[0.9, 0.1]] * 4
    half = [[0.5, 0.5]] * 4
    cells = [
        cell("static", CLEAN, 0, [1, 1, 1, 1], half),
        cell("rule", CLEAN, 0, [1, 1, 1, 1], [*half[1:], away[0]]),
        cell("static", fog, 0, [0, 0, 1, 1], half, [0.9, 0.8, 0.7, 0.6]),
        cell("rule", fog, 0, [0, 1, 1, 1], away, [0.6, 0.7, 0.8, 0.9]),
        cell("oracle", fog, 0, [1, 1, 1, 1], away, [0.6, 0.7, 0.8, 0.9]),
        cell("static", typos, 0, [0, 1, 1, 1], half, [0.5] * 4),
        cell("rule", typos, 0, [0, 1, 1, 1], towards, [0.5] * 4),
        cell("oracle", typos, 0, [0, 1, 1, 1], towards, [0.5] * 4),
    ]
    numbers = summarize(cells)
    rows = {(row["group"], row["method"]): row for row in numbers["groups"]}
    assert rows["unseen image", "rule"]["gap_closed"][0] == pytest.approx(0.5)
    assert rows["unseen image", "rule"]["minus_static"][0] == pytest.approx(0.25)
    assert rows["unseen", "rule"]["score"] == pytest.approx(0.75)
    assert rows["unseen", "rule"]["conditions"] == 2
    assert rows["unseen text", "rule"]["gap_closed"] is None
    assert ("clean", "oracle") not in rows
    # the most confident answers are the wrong ones: worst possible order, against the best
    assert rows["unseen image", "static"]["aurc"] > rows["unseen image", "rule"]["aurc"]
    robust = {row["method"]: row for row in numbers["robustness"]}
    assert robust["rule"]["modality_auroc"] == 1
    assert robust["static"]["modality_auroc"] == 0.5
    assert (robust["static"]["clean_reweighted"], robust["rule"]["clean_reweighted"]) == (0, 1 / 4)
    assert robust["rule"]["mmi"] == pytest.approx(0.25)
    assert {row["method"]: row["ratio"] for row in numbers["cost"]} == {"static": 1, "rule": 1, "oracle": 1}
    with pytest.raises(ValueError, match="static"):
        Results([cell("rule", CLEAN, 0, [1])])


def test_reliability_orders_answers_as_a_confidence_does():
    trusted = cell("rule", CLEAN, 0, [0, 1, 1, 1])
    trusted.metrics["reliability"] = np.array([0.1, 0.2, 0.3, 0.4])
    cells = [cell("static", CLEAN, 0, [0, 1, 1, 1], None, [0.9, 0.2, 0.3, 0.4]), trusted]
    numbers = summarize(cells)
    static, rule = numbers["groups"]
    assert rule["aurc_reliability"] == pytest.approx(1 / 16)
    assert "aurc_reliability" not in static
    assert (static["risk"], rule["risk_reliability"]) == (1 / 4, 1 / 4)
    run = {"model": "m", "metric": "VQA accuracy", "command": "dms evaluate", "samples": 4, "split": "test"}
    run |= {"data": "d", "seeds": [0], "failed": {}, "chosen": {}}
    assert "risk at 80%, reliability" in render({"run": run, "results": numbers})
    assert "AURC, reliability" not in render({"run": run, "results": summarize(cells[:1])})


def test_no_error_of_a_metric_without_an_upper_end():
    fog = Condition("image:fog", "unseen image", 5)
    for highest, known in ((1, True), (2.5, False)):
        cells = [cell("static", CLEAN, 0, [highest, 0.2]), cell("static", fog, 0, [0.5, 0.1])]
        (row,) = summarize(cells)["robustness"]
        assert (row["mce"] is not None) == known
        assert row["relative_robustness"] > 0


def test_the_report_names_every_method_and_condition():
    cells = [
        cell(m, c, 0, [0, 1, 1])
        for m in ("static", "rule")
        for c in (CLEAN, Condition("image:fog", "unseen image", 5))
    ]
    run = {"model": "m", "metric": "VQA accuracy", "command": "dms evaluate", "samples": 3, "split": "test"}
    run |= {"data": "d", "seeds": [0], "failed": {"bad-7": "cannot be read"}}
    run |= {"chosen": {"static": {}, "VCD": {"alpha": 0.5, "beta": 0.1}}}
    text = render({"run": run, "results": summarize(cells)})
    for wanted in (
        "VCD: alpha 0.5, beta 0.1.",
        "| rule |",
        "image: fog",
        "bad-7",
        "1 sample(s) failed",
        "`dms evaluate`",
    ):
        assert wanted in text


# ---- the command

_COMMAND = """
evaluate --samples 11 --seeds 2 --severities 5 --batch-size 4
--kinds image:fog,text:typos,image:occlusion --methods static,rule,entropy,oracle
--training-samples 20 --validation-samples 6
"""


def results_of(command, out, processes=1):
    command = [*command, "--out", str(out)]
    if processes == 1:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output[-3000:]
    else:
        launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
        launch += [str(ROOT / "configuration/accelerate/cpu_2.yaml"), "-m", "modeling_dms.training.cli"]
        env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launch, *command]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((out / "results.json").read_text())
    costs = results["results"].pop("cost")
    assert all(row["milliseconds"] > 0 for row in costs)
    return results


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """What is run, on a checkpoint that is calibrated, and its results."""
    folder = tmp_path_factory.mktemp("evaluation")
    model, processor = load("demo-llava")
    calibrate(model.eval(), PromptCollator(processor), load_easy_vqa("train"), 60, show_progress=False)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    command = [*_COMMAND.split(), "--model", str(folder / "model")]
    return command, results_of(command, folder), folder


def test_two_processes_find_what_one_does(command, tmp_path):
    one, two = command[1], results_of(command[0], tmp_path, processes=2)
    assert one["run"].pop("processes") == 1
    assert two["run"].pop("processes") == 2
    for run in (one, two):
        run["run"].pop("command")
    assert one == two


def test_the_command_writes_results_report_and_pictures(command):
    _, results, out = command
    assert results["run"]["samples"] == 11
    assert results["run"]["versions"]["torch"] == torch.__version__
    assert {row["condition"] for row in results["results"]["conditions"]} == {
        "clean",
        "image:fog",
        "text:typos",
        "image:occlusion",
    }
    report = (out / "report.md").read_text()
    for name in ("severity", "weights", "reliability", "risk", "samples"):
        assert f"({name}.png)" in report
        with Image.open(out / f"{name}.png") as image:
            assert min(image.size) > 200


@pytest.mark.parametrize("model", ["demo-blip2", "internvl"])
def test_a_vanilla_checkpoint_is_evaluated_by_generation(tmp_path, model):
    config = EvaluationConfig(model, tmp_path, task="vqa-generate", corruptions=["image:black"], severities=[5])
    config.seeds, config.samples = 1, 4
    if model == "internvl":
        config.model = str(tiny.save_internvl(tmp_path / "internvl"))
    config.calibration_samples, config.methods = 0, ("static",)
    results = evaluate(config)
    assert [row["method"] for row in results["results"]["groups"]] == ["static", "static"]
    assert 0 <= results["results"]["groups"][0]["score"] <= 1


def test_weights_of_another_precision(tmp_path):
    config = EvaluationConfig("demo-llava", tmp_path, corruptions=["image:black"], severities=[5], seeds=1, samples=4)
    config.calibration_samples, config.dtype = 60, "bfloat16"
    results = evaluate(config)
    assert results["run"]["dtype"] == "bfloat16"
    assert {row["method"] for row in results["results"]["groups"]} == {"static", "rule", "oracle"}


@pytest.mark.parametrize(("task", "metric"), [("caption", "CIDEr-D"), ("retrieval", "R@1")])
def test_captioning_and_retrieval(tmp_path, task, metric):
    folder = tmp_path / "table"
    folder.mkdir()
    rows = []
    for number in range(40):
        Image.new("RGB", (64, 64), (6 * number, number % 7 * 30, 90)).save(folder / f"{number}.png")
        words = {"context": f"a box of kind {number}.", "answers": [f"box number {number}"]}
        rows.append(
            {
                "image": f"{number}.png",
                "question": "describe the picture.",
                "task": task,
                "split": SPLITS[number % 3],
                **words,
            }
        )
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = EvaluationConfig("demo-llava", tmp_path, task=task, data=str(folder), corruptions=["image:blur"])
    config.severities, config.seeds, config.samples, config.calibration_samples = [4], 2, 5, 0
    assert len(evaluate(EvaluationConfig(**vars(config) | {"out": tmp_path / "plain"}))["results"]["conditions"]) == 10
    # fitted to other samples, whose texts are others
    config.methods, config.training_samples, config.validation_samples = ("rule", "entropy", "oracle"), 4, 4
    results = evaluate(EvaluationConfig(**vars(config)))
    assert results["run"]["metric"] == metric
    assert {row["method"] for row in results["results"]["groups"]} == {"static", "rule", "entropy", "oracle"}
    assert {row["samples"] for row in results["results"]["conditions"]} == {5}
    assert metric in (tmp_path / "report.md").read_text()
