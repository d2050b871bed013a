"""Methods under conditions: the same damaged samples for all, what is kept of them and resumed."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_dms.calibrate.damage import FAMILIES
from modeling_dms.training.data import PromptCollator, load_easy_vqa
from modeling_dms.training.data.samples import split_readable
from modeling_dms.training.evaluate import baselines, grid
from modeling_dms.training.evaluate.grid import ORACLE, Condition, collated, run_condition, run_grid
from modeling_dms.training.evaluate.methods import Fixed, Method, Scheduled
from modeling_dms.training.evaluate.published import AdaptVis
from modeling_dms.training.evaluate.tasks import ImageTextMatching, VisualQuestionAnswering
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import load
from modeling_dms.weigh.scheduler import ModalityScheduler
from tests import tiny


CLEAN, BLACK, TYPOS = Condition("clean", "clean"), Condition("image:black", "seen", 5), Condition("text:typos", "t", 4)


READS = SimpleNamespace(name="vqa", reads_contexts=True)  # a task, as far as conditions know it


def same(one, two):
    assert (one.method, one.condition, one.seed) == (two.method, two.condition, two.seed)
    assert one.metrics.keys() == two.metrics.keys()
    assert all(np.array_equal(one.metrics[name], two.metrics[name]) for name in one.metrics)
    assert (one.weights is None) == (two.weights is None)
    assert one.weights is None or np.array_equal(one.weights, two.weights)


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
    # weights and reliability are of one reading
    read = []
    hook = model.register_forward_hook(lambda *_: read.append(True))
    weights, trust = methods[1].judge(model, task.collate(samples))
    hook.remove()
    assert (len(read), weights.shape, trust.shape) == (1, (14, 2), (14,))
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
    assert condition.why_not(mixed, 0, READS) is None
    none = [sample.replace(**change) for sample in samples]
    assert condition.why_not(none, 0, READS) == reason
    with pytest.raises(ValueError, match=f"no sample could be asked, {reason}"):
        run_condition(model, task, [Method()], none, condition, 0, 5)
    # other conditions take these samples as they are
    assert Condition("clean", "clean").why_not(none, 0, READS) is None


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
    assert "no other sample" in Condition("image:mismatch", "m", 5).why_not(twins, 0, READS)


def test_samples_that_cannot_be_asked_are_named_and_count_as_wrong_in_batches_of_any_size(vqa):
    model, task, samples = vqa
    short = VisualQuestionAnswering(task.processor, task.candidates, max_length=300)
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


def test_a_batch_is_where_the_model_is(vqa):
    _, task, samples = vqa
    batch, failed = collated(task, samples[:2], torch.nn.Module.to(tiny.build("llava-llama"), "meta"))
    assert not failed
    assert {value.device.type for value in batch.values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert batch["sample_ids"] == [sample.id for sample in samples[:2]]


def test_what_detectors_know_of_a_damage_is_no_result_of_those_that_do_not(vqa, tmp_path, monkeypatch):
    """One of a seen group is not taken for the same kind by itself, which is unseen."""
    model, task, samples = vqa
    real, ran = run_condition, []
    monkeypatch.setattr(grid, "run_condition", lambda *args: ran.append(args[4].group) or real(*args))
    seen, alone = Condition("image:blur", "seen", 5), Condition("image:blur", "image:blur", 5)
    for conditions, expected in (([seen], ["seen"]), ([alone], ["image:blur"]), ([seen, alone], [])):
        run_grid(model, task, [Method()], lambda seed: samples, conditions, [0], tmp_path, resume=True)
        assert ran == expected
        ran.clear()


def test_a_second_look_that_was_not_learned_is_not_measured(vqa):
    model, task, samples = vqa
    config = copy.deepcopy(model.config.dms_config)
    config.conflict_prior = "learned"
    method = Scheduled("second look", ModalityScheduler(config, 2))
    with pytest.raises(ValueError, match="second look: the checkpoint has not learned whom to believe"):
        run_condition(model, task, [method], samples, BLACK, 0, 7)


def test_matching_reads_no_contexts(vqa):
    _, task, samples = vqa
    assert TYPOS.why_not(samples, 0, task) is None
    matching = SimpleNamespace(name="matching", reads_contexts=ImageTextMatching.reads_contexts)
    assert TYPOS.why_not(samples, 0, matching) == "task 'matching' reads no contexts"
    assert BLACK.why_not(samples, 0, matching) is None
