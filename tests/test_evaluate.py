"""`dms evaluate`: the grid, what is kept of it and resumed, its numbers and pictures, one process and two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_dms.scheduler import ModalityScheduler
from modeling_dms.training import baselines, grid
from modeling_dms.training.baselines import METHODS, fit_scheduler, make_methods, record, scorer
from modeling_dms.training.corruptions import CorruptionConfig
from modeling_dms.training.data import load_easy_vqa
from modeling_dms.training.data.samples import split_readable
from modeling_dms.training.evaluate import EvaluationConfig, conditions_of, evaluate, one_per_image
from modeling_dms.training.grid import ORACLE, Cell, Condition, run_condition, run_grid
from modeling_dms.training.loading import load
from modeling_dms.training.methods import GRIDS, AdaptVis, ContrastiveDecoding, Fixed, Method, Scheduled
from modeling_dms.training.report import Results, render, summarize
from modeling_dms.training.tasks import VisualQuestionAnswering
from tests import tiny


ROOT = Path(__file__).resolve().parent.parent
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


def test_a_sample_of_which_nothing_is_left_counts_as_wrong(vqa):
    model, task, samples = vqa
    bare = samples[1].replace(context=None)
    changed, failed = Condition("image:missing", "seen", 5).apply([samples[0], bare], 0)
    assert [sample.id for sample in changed] == [samples[0].id]
    assert "neither image nor context" in failed[bare.id]
    cell = run_condition(model, task, [Method()], [samples[0], bare], Condition("image:missing", "seen", 5), 0, 2)[0]
    assert cell.metrics["score"][1] == 0
    assert cell.weights[1].tolist() == [0.5, 0.5]


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
    rule = Scheduled("rule", ModalityScheduler(model.config.dms_config, [0, 0]))

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
    from modeling_dms.training.train import calibrate

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
    torch.testing.assert_close(weights, fitted(*recorded), atol=1e-5, rtol=1e-4)
    assert weights[14:28, 0].mean() < 0.2 < 0.8 < weights[28:, 0].mean()


def test_candidates_scored_together_score_as_alone(vqa):
    model, task, samples = vqa
    score = scorer(model, task, samples[:6], [CLEAN, BLACK], 4)
    candidates = [Fixed(vision=0.5), Fixed(vision=0.01), ContrastiveDecoding(), ContrastiveDecoding(alpha=0.2)]
    assert score(candidates) == [score([candidate])[0] for candidate in candidates]


def test_methods_by_name(vqa):
    model, task, samples = vqa
    names = ["static", "rule", "mean prior", "energy", "learned: typicality", "oracle"]
    train = load_easy_vqa("train")[::200][:60]
    found = make_methods(model, lambda _: task, train, samples[:6], names, CorruptionConfig(), batch_size=20)
    assert [method.name for method in found] == names
    config = found[4].scheduler.config
    assert (config.scheduler, config.scheduler_signals, config.kappa) == ("learned", ["typicality"], 0)
    with pytest.raises(ValueError, match=r"unknown method 'magic'.*static"):
        make_methods(model, lambda _: task, [], [], ["magic"], CorruptionConfig())
    assert set(names) < set(METHODS)


# ---- numbers


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
        cell("rule", CLEAN, 0, [1, 1, 1, 1], half),
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
    assert robust["rule"]["mmi"] == pytest.approx(0.25)
    assert {row["method"]: row["ratio"] for row in numbers["cost"]} == {"static": 1, "rule": 1, "oracle": 1}
    with pytest.raises(ValueError, match="static"):
        Results([cell("rule", CLEAN, 0, [1])])


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
evaluate --model demo-llava --samples 11 --seeds 2 --severities 5 --batch-size 4 --calibration-samples 60
--kinds image:fog,text:typos,image:occlusion --methods static,rule,entropy,oracle
"""


def run_command(out, processes=1):
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    launch += [str(ROOT / "configuration/accelerate/cpu_2.yaml")]
    command = [*(launch if processes == 2 else []), "-m", "modeling_dms.training.cli", *_COMMAND.split()]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, "--out", str(out)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((out / "results.json").read_text())
    costs = results["results"].pop("cost")
    assert all(row["milliseconds"] > 0 for row in costs)
    return results


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    return run_command(out), out


def test_two_processes_find_what_one_does(command, tmp_path):
    one, two = command[0], run_command(tmp_path, processes=2)
    assert one["run"].pop("processes") == 1
    assert two["run"].pop("processes") == 2
    for run in (one, two):
        run["run"].pop("command")
    assert one == two


def test_the_command_writes_results_report_and_pictures(command):
    results, out = command
    assert results["run"]["samples"] == 11
    assert results["run"]["versions"]["torch"] == torch.__version__
    assert {row["condition"] for row in results["results"]["conditions"]} == {
        "clean",
        "image:fog",
        "text:typos",
        "image:occlusion",
    }
    report = (out / "report.md").read_text()
    for name in ("severity", "weights", "reliability", "samples"):
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
    config = EvaluationConfig("demo-llava", tmp_path, task=task, data="openmoji", corruptions=["image:blur"])
    config.severities, config.seeds, config.samples, config.calibration_samples = [4], 2, 5, 0
    assert len(evaluate(EvaluationConfig(**vars(config) | {"out": tmp_path / "plain"}))["results"]["conditions"]) == 10
    # fitted to other samples, whose texts are others
    config.methods, config.training_samples, config.validation_samples = ("rule", "entropy", "oracle"), 4, 4
    results = evaluate(EvaluationConfig(**vars(config)))
    assert results["run"]["metric"] == metric
    assert {row["method"] for row in results["results"]["groups"]} == {"static", "rule", "entropy", "oracle"}
    assert {row["samples"] for row in results["results"]["conditions"]} == {5}
    assert metric in (tmp_path / "report.md").read_text()
