"""What is trained or searched before it is compared."""

import dataclasses
from functools import partial

import pytest
import torch

from modeling_dms.training.corruptions import CorruptionConfig
from modeling_dms.training.data import PromptCollator, load_easy_vqa
from modeling_dms.training.evaluate import baselines
from modeling_dms.training.evaluate.baselines import (
    GRIDS,
    METHODS,
    fit_scheduler,
    make_methods,
    record,
    scorer,
    search,
)
from modeling_dms.training.evaluate.grid import Condition
from modeling_dms.training.evaluate.methods import Fixed, Scheduled
from modeling_dms.training.evaluate.published import AdaptVis, ContrastiveDecoding
from modeling_dms.training.evaluate.tasks import VisualQuestionAnswering
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import load


CLEAN, BLACK, TYPOS = Condition("clean", "clean"), Condition("image:black", "seen", 5), Condition("text:typos", "t", 4)


def test_a_scheduler_fitted_on_recorded_signals_weighs_as_in_the_model(vqa):
    _, task, samples = vqa
    data = load_easy_vqa("train")[::40]
    model, processor = load("demo-llava")

    calibrate(model.eval(), PromptCollator(processor), data, 60, show_progress=False)
    task = VisualQuestionAnswering(processor, task.candidates)
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


def test_hyperparameters_are_chosen_under_conditions_that_change_something(vqa):
    model, task, samples = vqa
    bare = [sample.replace(context=None) for sample in samples[:6]]
    candidates = [Fixed(vision=0.5), Fixed(vision=0.01)]
    conditions = [CLEAN, BLACK, TYPOS, Condition("text:missing", "seen", 5)]
    assert scorer(model, task, bare, conditions, 6)(candidates) == scorer(model, task, bare, [CLEAN, BLACK], 6)(
        candidates
    )


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


# ---- search


def test_search_takes_the_first_of_the_best():
    candidates = [Fixed(vision=vision) for vision in (0.5, 0.2, 0.4)]
    for score, best in ((lambda vision: 1.0, 0), (lambda vision: vision < 0.5, 1), (lambda vision: -vision, 1)):
        assert search(candidates, lambda methods, score=score: [score(m.vision) for m in methods]) is candidates[best]


@pytest.mark.parametrize("method", [ContrastiveDecoding(), AdaptVis(), Fixed()], ids=lambda method: method.name)
def test_grids_begin_with_the_defaults(method):
    grid = GRIDS[method.name]
    assert dataclasses.replace(method, **grid[0]) == method
    assert len({dataclasses.replace(method, **choice) for choice in grid}) == len(grid)
