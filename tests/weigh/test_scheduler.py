"""Scheduler: what every rule promises of the weights, the published formulas, and when the rule may act at all."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_dms import DMSConfig
from modeling_dms.outputs import ModalitySignals
from modeling_dms.weigh.scheduler import (
    CONFLICT_FLOOR,
    GARBAGE_LEAD,
    ModalityScheduler,
    ZeroLinear,
    uniform_weights,
    weights_from_scores,
)


bounded = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
batches = st.integers(1, 5)
modalities = st.integers(2, 3)
floors = st.sampled_from([0.0, 0.01, 0.05, 0.3])
scales = st.sampled_from([1e-3, 1.0, 30.0, 1e4])

SCHEDULERS = ["uniform", "rule", "learned", "entropy", "energy"]
SIGNALS = [field.name for field in dataclasses.fields(ModalitySignals)]
RATE = DMSConfig().alarm_rate
NOTHING = -3.0  # evidence of damage and of a conflict before calibration: any below 0
VISION, TEXT = 0, 1


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_mask(seed, batch, modality):
    """At least one modality a sample."""
    mask = normal(seed + 7, batch, modality) > -0.3
    mask[torch.arange(batch), torch.arange(batch) % modality] = True
    return mask


def random_signals(seed, batch, modality, rate=RATE, **evidence):
    """Signals; `damage` and `conflict`, evidence in units of log(rate / p), give their p-values."""
    values = {name: normal(seed + i, batch, modality) for i, name in enumerate(SIGNALS)}
    for name, of in {"p_clean": "damage", "p_match": "conflict"}.items():
        values[name] = rate * (-evidence.get(of, values[name])).exp()
    return ModalitySignals(**values)


def rows(signals, index):
    return ModalitySignals(**{name: value[index] for name, value in signals.items()})


def schedule(config, signals, mask, seed=0, scheduler=None):
    """What a scheduler makes of signals, all of its other inputs being random."""
    batch, modality = mask.shape
    scheduler = scheduler or ModalityScheduler(config, modality)
    with torch.no_grad():
        return scheduler(signals, mask, normal(seed + 1, batch, modality, 3), normal(seed + 3, batch, modality).abs())


def trained(config, modality, seed=0):
    """A learned scheduler whose last layer is no longer zero."""
    scheduler = ModalityScheduler(config, modality)
    for i, parameter in enumerate(scheduler.parameters()):
        parameter.data.copy_(0.2 * normal(seed + i, *parameter.shape))
    return scheduler


def scheduler_of(config, modality):
    return trained(config, modality) if config.scheduler == "learned" else ModalityScheduler(config, modality)


def ruled(damage=(NOTHING, NOTHING), conflict=NOTHING, present=(True, True), seed=0, **config):
    """Weights (M,) that the rule gives a sample."""
    modality = len(damage)
    config = DMSConfig(scheduler="rule", **config)
    given = {"damage": torch.tensor([damage]), "conflict": torch.full((1, modality), float(conflict))}
    signals = random_signals(seed, 1, modality, config.alarm_rate, **given)
    return schedule(config, signals, torch.tensor([present]), seed)[0]


def assert_valid(weights, mask, floor=0.0):
    assert weights.shape == mask.shape
    assert weights.dtype == torch.float32
    assert (weights[~mask] == 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(len(mask)))
    assert (weights[mask] >= floor - 1e-6).all(), weights
    assert (weights <= 1 + 1e-6).all()


# ---- scores to weights


@bounded
@given(seed=seeds, batch=batches, modality=modalities, floor=floors, scale=scales)
def test_weights_sum_to_1_respect_the_floor_and_leave_out_the_absent(seed, batch, modality, floor, scale):
    scores, mask = scale * normal(seed, batch, modality), random_mask(seed, batch, modality)
    weights = weights_from_scores(scores, mask, floor)

    assert_valid(weights, mask, floor)
    for b in range(batch):
        present = mask[b]
        soft = (scores[b, present].double() - scores[b, present].double().max()).exp()
        expected = floor + (1 - int(present.sum()) * floor) * soft / soft.sum()
        torch.testing.assert_close(weights[b, present].double(), expected, atol=1e-6, rtol=1e-5)
        if present.sum() == 1:
            assert weights[b, present].item() == 1


@bounded
@given(seed=seeds, batch=batches, modality=modalities, floor=floors, scale=scales)
def test_equal_scores_give_exactly_uniform_weights(seed, batch, modality, floor, scale):
    mask = random_mask(seed, batch, modality)
    scores = (scale * normal(seed, batch, 1)).expand(-1, modality).clone()
    scores[~mask] = 1e3 * normal(seed + 1, *scores.shape)[~mask]
    weights = weights_from_scores(scores, mask, floor)

    assert torch.equal(weights, uniform_weights(mask))
    assert torch.equal(uniform_weights(mask), mask / mask.sum(1, keepdim=True))


def test_scores_that_are_all_minus_infinity_are_equal():
    mask = torch.tensor([[True, True], [True, False]])

    assert torch.equal(weights_from_scores(torch.full((2, 2), -torch.inf), mask), uniform_weights(mask))


@pytest.mark.parametrize("floor", [0.0, 0.01, 0.05])
def test_far_apart_scores_reach_the_floor(floor):
    weights = weights_from_scores(torch.tensor([[0.0, -1e4]]), torch.tensor([[True, True]]), floor)

    torch.testing.assert_close(weights, torch.tensor([[1 - floor, floor]]))


@bounded
@given(seed=seeds, batch=st.integers(2, 5), modality=modalities, floor=floors)
def test_weights_of_a_batch_equal_those_of_its_rows_in_any_order(seed, batch, modality, floor):
    scores, mask = normal(seed, batch, modality), random_mask(seed, batch, modality)
    weights = weights_from_scores(scores, mask, floor)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(weights_from_scores(scores[order], mask[order], floor), weights[order])
    for i in range(batch):
        assert torch.equal(weights_from_scores(scores[i : i + 1], mask[i : i + 1], floor)[0], weights[i])


@pytest.mark.parametrize("equal", [True, False])
def test_gradients_reach_the_scores_even_where_they_are_equal(equal):
    scores = torch.zeros(3, 2) if equal else normal(0, 3, 2)
    scores.requires_grad_()
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    weights = weights_from_scores(scores, mask, 0.05)
    weights[:, 0].sum().backward()

    assert_valid(weights.detach(), mask, 0.05)
    if equal:
        torch.testing.assert_close(weights.detach(), uniform_weights(mask))
    assert (scores.grad[:2, 0] > 0).all()
    assert (scores.grad[:2, 1] < 0).all()
    assert (scores.grad[2] == 0).all()  # nothing to choose from


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@bounded
@given(seed=seeds, batch=batches, modality=modalities, floor=floors, scale=scales)
def test_scores_of_any_precision_give_valid_weights_and_gradients(dtype, seed, batch, modality, floor, scale):
    mask = random_mask(seed, batch, modality)
    scores = (scale * normal(seed, batch, modality)).to(dtype).requires_grad_()
    weights = weights_from_scores(scores, mask, floor)
    (weights * normal(seed + 1, batch, modality)).sum().backward()

    assert_valid(weights.detach(), mask, floor)
    assert scores.grad.isfinite().all()
    assert (scores.grad[~mask] == 0).all()
    torch.testing.assert_close(weights_from_scores(scores.detach(), mask, floor), weights.detach())


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@bounded
@given(seed=seeds, batch=batches, modality=modalities)
def test_every_scheduler_takes_signals_of_any_precision(name, dtype, seed, batch, modality):
    config = DMSConfig(scheduler=name, shared_size=4, conflict_prior="text")
    mask, scheduler = random_mask(seed, batch, modality), scheduler_of(config, modality)
    signals = random_signals(seed, batch, modality)
    rounded = ModalitySignals(**{name: value.to(dtype) for name, value in signals.items()})
    weights = schedule(config, rounded, mask, seed, scheduler)
    assert_valid(weights, mask, config.weight_floor if name in ("rule", "learned") else 0)
    same = ModalitySignals(**{name: value.float() for name, value in rounded.items()})
    torch.testing.assert_close(weights, schedule(config, same, mask, seed, scheduler), atol=0.1, rtol=0)


def test_a_sample_without_any_modality_is_named():
    mask = torch.tensor([[True, False], [False, False], [True, True], [False, False]])
    with pytest.raises(ValueError, match=r"\[1, 3\].*vision.*text"):
        uniform_weights(mask)
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        weights_from_scores(torch.zeros(4, 2), mask)


# ---- every scheduler


@pytest.mark.parametrize("name", SCHEDULERS)
@bounded
@given(seed=seeds, batch=batches, modality=modalities)
def test_every_scheduler_gives_valid_weights(name, seed, batch, modality):
    config = DMSConfig(scheduler=name, shared_size=4, conflict_prior="text")
    mask = random_mask(seed, batch, modality)
    scheduler = scheduler_of(config, modality)
    weights = schedule(config, random_signals(seed, batch, modality), mask, seed, scheduler)

    assert_valid(weights, mask, config.weight_floor if name in ("rule", "learned") else 0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_names_a_sample_without_any_modality(name):
    config = DMSConfig(scheduler=name, shared_size=4)
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    with pytest.raises(ValueError, match=r"\[2\]"):
        schedule(config, random_signals(0, 3, 2), mask)


@pytest.mark.parametrize("name", SCHEDULERS)
@bounded
@given(seed=seeds, batch=st.integers(2, 5), modality=modalities)
def test_every_scheduler_treats_samples_apart(name, seed, batch, modality):
    config = DMSConfig(scheduler=name, shared_size=4, conflict_prior="vision")
    scheduler = scheduler_of(config, modality)
    signals, mask = random_signals(seed, batch, modality), random_mask(seed, batch, modality)
    own = normal(seed, batch, modality, 3)
    entropy = normal(seed, batch, modality).abs()
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weights = scheduler(signals, mask, own, entropy)
        permuted = scheduler(rows(signals, order), mask[order], own[order], entropy[order])
        torch.testing.assert_close(permuted, weights[order])
        for i in range(batch):
            row = slice(i, i + 1)
            alone = scheduler(rows(signals, row), mask[row], own[row], entropy[row])
            torch.testing.assert_close(alone, weights[row])


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "learned"])
def test_only_the_learned_scheduler_has_parameters(name):
    assert not list(ModalityScheduler(DMSConfig(scheduler=name), 2).parameters())


def test_uniform_ignores_the_signals():
    mask = torch.tensor([[True, True], [False, True]])
    weights = schedule(DMSConfig(scheduler="uniform"), random_signals(0, 2, 2, damage=torch.full((2, 2), 50.0)), mask)

    assert torch.equal(weights, torch.tensor([[0.5, 0.5], [0.0, 1.0]]))


@pytest.mark.parametrize("name", ["rule", "learned"])
@bounded
@given(seed=seeds, batch=batches, spared=st.sampled_from([VISION, TEXT]))
def test_damage_of_a_spared_modality_is_not_looked_at(name, seed, batch, spared):
    config, mask = DMSConfig(scheduler=name, shared_size=4), torch.ones(batch, 2, dtype=torch.bool)
    scheduler, others = scheduler_of(config, 2), (torch.zeros(batch, 2, 3), torch.zeros(batch, 2))
    if name == "learned":
        torch.nn.init.zeros_(scheduler.output.weight)
        torch.nn.init.zeros_(scheduler.output.bias)
    damage = normal(seed, batch, 2) * 9
    keeps = torch.tensor([float(spared == modality) for modality in range(2)])
    with torch.no_grad():
        found = scheduler(random_signals(seed, batch, 2, damage=damage), mask, *others, keeps)
        damage[:, spared] = -1.0
        expected = scheduler(random_signals(seed, batch, 2, damage=damage), mask, *others)
    assert torch.equal(found, expected)
    assert (found[:, spared] >= 0.5).all()


@pytest.mark.parametrize("spared", [VISION, TEXT])
def test_a_prior_does_not_believe_what_is_flagged_though_it_keeps_its_weight(spared):
    config, mask = DMSConfig(conflict_prior=("vision", "text")[spared]), torch.ones(1, 2, dtype=torch.bool)
    damage = torch.full((1, 2), NOTHING)
    keeps = torch.tensor([float(spared == modality) for modality in range(2)])
    for flagged, believed in ((False, True), (True, False)):
        damage[:, spared] = 9.0 if flagged else NOTHING
        signals = random_signals(0, 1, 2, config.alarm_rate, damage=damage, conflict=torch.full((1, 2), 9.0))
        weights = scheduler_of(config, 2)(signals, mask, torch.zeros(1, 2, 3), torch.zeros(1, 2), keeps)
        assert (weights[0, spared] > 0.9) == believed, weights
        assert believed or torch.equal(weights, torch.full((1, 2), 0.5))


@bounded
@given(seed=seeds, batch=batches, dropped=st.sampled_from([VISION, TEXT]))
def test_damage_may_take_all_weight_of_a_dropped_modality_alone(seed, batch, dropped):
    config, mask = DMSConfig(weight_floor=0.05), torch.ones(batch, 2, dtype=torch.bool)
    scheduler, others = scheduler_of(config, 2), (torch.zeros(batch, 2, 3), torch.zeros(batch, 2))
    loses = torch.tensor([float(dropped == modality) for modality in range(2)])
    for damaged in (VISION, TEXT):
        damage = torch.full((batch, 2), -1.0)
        damage[:, damaged] = 20 + normal(seed, batch).abs()
        signals = random_signals(seed, batch, 2, damage=damage)
        found = scheduler(signals, mask, *others, None, loses)[:, damaged]
        if damaged == dropped:
            assert (found == 0).all()
        else:
            torch.testing.assert_close(found, scheduler(signals, mask, *others)[:, damaged], rtol=0, atol=1e-6)
            assert (found >= 0.05).all()
    # what is lowered for another reason than damage keeps what it had
    believed = DMSConfig(weight_floor=0.05, conflict_prior=("vision", "text")[1 - dropped])
    conflict = random_signals(
        seed, batch, 2, damage=torch.full((batch, 2), -1.0), conflict=torch.full((batch, 2), 9.0)
    )
    found = scheduler_of(believed, 2)(conflict, mask, *others, None, loses)
    assert torch.equal(found, scheduler_of(believed, 2)(conflict, mask, *others))
    assert (found[:, dropped] > 0).all()
    # nothing is suspicious
    clean = random_signals(seed, batch, 2, damage=torch.full((batch, 2), -1.0))
    assert torch.equal(scheduler(clean, mask, *others, None, loses), torch.full((batch, 2), 0.5))


# ---- published rules


@pytest.mark.parametrize("temperature", [0.5, 1, 3.0])
@bounded
@given(seed=seeds, batch=batches, modality=modalities)
def test_entropy_and_energy_follow_the_published_formulas(temperature, seed, batch, modality):
    mask, signals = random_mask(seed, batch, modality), random_signals(seed, batch, modality)
    entropy = normal(seed + 20, batch, modality).abs()
    scores = {"entropy": -entropy, "energy": signals.energy}
    for name, score in scores.items():
        config = DMSConfig(scheduler=name, temperature=temperature)
        standard = torch.zeros(batch, modality, 3)
        weights = ModalityScheduler(config, modality)(signals, mask, standard, entropy)
        exponential = (score.double() / temperature).exp() * mask
        expected = exponential / exponential.sum(1, keepdim=True)
        torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=1e-5)


# ---- learned


@bounded
@given(seed=seeds, batch=batches, modality=modalities)
def test_the_learned_scheduler_starts_exactly_as_the_rule(seed, batch, modality):
    configs = [DMSConfig(scheduler=name, shared_size=4) for name in ("learned", "rule")]
    mask, signals = random_mask(seed, batch, modality), random_signals(seed, batch, modality)
    learned, rule = (schedule(config, signals, mask, seed) for config in configs)

    assert torch.equal(learned, rule)


@bounded
@given(seed=seeds, batch=batches, modality=modalities)
def test_without_kappa_the_learned_scheduler_starts_exactly_uniform(seed, batch, modality):
    config, mask = DMSConfig(scheduler="learned", shared_size=4, kappa=0), random_mask(seed, batch, modality)

    assert torch.equal(schedule(config, random_signals(seed, batch, modality), mask, seed), uniform_weights(mask))


@bounded
@given(seed=seeds, damaged=st.sampled_from([VISION, TEXT]), size=st.sampled_from([1.0, 1e3]))
def test_the_learned_scheduler_cannot_overrule_clear_evidence_but_decides_without(seed, damaged, size):
    """Whatever its parameters are."""
    config, mask = DMSConfig(scheduler="learned", shared_size=4), torch.ones(1, 2, dtype=torch.bool)
    scheduler = ModalityScheduler(config, 2)
    scheduler.output.bias.data[damaged], scheduler.output.bias.data[1 - damaged] = size, -size

    def weight(first, second):
        pair = torch.tensor([[first, second] if damaged == VISION else [second, first]])
        signals = random_signals(seed, 1, 2, damage=pair)
        return schedule(config, signals, mask, seed, scheduler)[0, damaged].item()

    assert weight(5.0, -1.0) < 0.02
    assert weight(-1.0, -1.0) > 0.85
    assert weight(5.0, 9.0) > 0.85


@pytest.mark.parametrize("modality", [2, 3])
def test_the_learned_scheduler_learns_from_its_start(modality):
    config = DMSConfig(scheduler="learned", shared_size=4, weight_floor=0.05)
    scheduler = ModalityScheduler(config, modality)
    optimizer = torch.optim.Adam(scheduler.parameters(), lr=0.01)
    # too little for the rule
    damage = torch.full((8, modality), -4.0)
    damage[torch.arange(8), torch.arange(8) % modality] = -0.5
    signals, mask = random_signals(0, 8, modality, damage=damage), torch.ones(8, modality, dtype=torch.bool)
    standard = normal(1, 8, modality, 3)
    for step in range(150):
        weights = scheduler(signals, mask, standard, torch.zeros(8, modality))
        torch.testing.assert_close(weights.sum(1), torch.ones(8))
        loss = weights[damage > -1].mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            torch.testing.assert_close(weights, uniform_weights(mask))
            assert scheduler.output.weight.grad.abs().max() > 0
        optimizer.step()

    assert weights[damage > -1].max() < 0.1
    assert weights.min() >= config.weight_floor - 1e-6


@pytest.mark.parametrize("name", ["consistency", "typicality", "p_clean", "p_match", "standard"])
def test_the_learned_scheduler_sees_every_input(name):
    config = DMSConfig(scheduler="learned", shared_size=4)
    scheduler, mask = trained(config, 2), torch.ones(1, 2, dtype=torch.bool)
    own = normal(1, 1, 2, 3)
    signals, others = random_signals(0, 1, 2), [own, torch.zeros(1, 2)]
    before = scheduler(signals, mask, *others)
    if name == "standard":
        changes = [(own, (0, m, i)) for m in range(2) for i in range(3)]
    else:
        changes = [(signals[name], (0, m)) for m in range(2)]
    for tensor, place in changes:
        old = tensor[place].item()
        tensor[place] += 0.5
        assert not torch.equal(scheduler(signals, mask, *others), before), place
        tensor[place] = old


def test_the_learned_scheduler_sees_the_signals_it_may():
    """Of the standardised ones the first is confidence, the second uncertainty and the third energy."""
    places = {"confidence": [0, 2], "uncertainty": [1]}
    for name in ("confidence", "uncertainty", "consistency", "typicality", "damage"):
        config = DMSConfig(scheduler="learned", shared_size=4, kappa=0, scheduler_signals=[name])
        scheduler, mask = trained(config, 2), torch.ones(1, 2, dtype=torch.bool)
        own, signals = normal(1, 1, 2, 3), random_signals(0, 1, 2)
        others = [own, torch.zeros(1, 2)]
        before = scheduler(signals, mask, *others)
        seen = {field for field in SIGNALS if changes(signals[field][:, 0], scheduler, signals, mask, others, before)}
        fields = {"consistency": {"consistency", "p_match"}, "typicality": {"typicality"}, "damage": {"p_clean"}}
        assert seen == fields.get(name, set())
        found = [i for i in range(3) if changes(own[:, 0, i], scheduler, signals, mask, others, before)]
        assert found == places.get(name, [])


def changes(part, scheduler, signals, mask, others, before):
    """Whether another value of this part of the inputs gives other weights."""
    old = part.clone()
    part += 0.5
    after = scheduler(signals, mask, *others)
    part.copy_(old)
    return not torch.equal(after, before)


def test_the_learned_scheduler_does_not_look_at_an_absent_modality():
    config = DMSConfig(scheduler="learned", shared_size=4)
    scheduler, mask = trained(config, 3), torch.tensor([[True, True, False]])
    own = normal(1, 1, 3, 3)
    signals, others = random_signals(0, 1, 3), [own, torch.zeros(1, 3)]
    before = scheduler(signals, mask, *others)
    for tensor in [*signals.values(), *others]:
        tensor[:, 2] = 1e3

    assert torch.equal(scheduler(signals, mask, *others), before)


def test_the_learned_scheduler_takes_signals_from_before_calibration():
    config = DMSConfig(scheduler="learned", shared_size=4)
    unknown = torch.full((2, 2), NOTHING)
    mask = torch.tensor([[True, True], [False, True]])
    signals = random_signals(0, 2, 2, damage=unknown, conflict=unknown)
    weights = schedule(config, signals, mask, 0, trained(config, 2))

    assert_valid(weights, mask, config.weight_floor)


@pytest.mark.parametrize("bias", [True, False])
def test_zero_linear_starts_at_zero(bias):
    assert not ZeroLinear(5, 3, bias=bias)(normal(0, 2, 5)).any()


# ---- the training-free rule

damages = st.floats(0.01, 50)
harmless = st.sampled_from([NOTHING, -5.0, -0.1])
priors = st.sampled_from([None, "vision", "text"])


@bounded
@given(seed=seeds, batch=batches, modality=modalities, prior=priors)
def test_the_rule_is_exactly_uniform_before_calibration(seed, batch, modality, prior):
    config = DMSConfig(scheduler="rule", conflict_prior=prior)
    mask, unknown = random_mask(seed, batch, modality), torch.full((batch, modality), NOTHING)
    signals = random_signals(seed, batch, modality, damage=unknown, conflict=unknown)

    assert torch.equal(schedule(config, signals, mask, seed), uniform_weights(mask))


@bounded
@given(first=harmless, second=harmless, conflict=harmless, prior=priors, seed=seeds)
def test_the_rule_leaves_samples_with_nothing_suspicious_alone(first, second, conflict, prior, seed):
    weights = ruled((first, second), conflict, conflict_prior=prior, seed=seed)

    assert torch.equal(weights, torch.tensor([0.5, 0.5]))


@bounded
@given(
    damage=damages, other=harmless, damaged=st.sampled_from([VISION, TEXT]), prior=priors, conflict=st.floats(-9, 9)
)
def test_the_damaged_modality_loses_weight_whatever_the_prior(damage, other, damaged, prior, conflict):
    pair = [other, other]
    pair[damaged] = damage
    weights = ruled(tuple(pair), conflict, conflict_prior=prior)

    assert weights[damaged] < 0.5
    torch.testing.assert_close(weights, ruled(tuple(pair), conflict))


@bounded
@given(damage=st.floats(0.05, 3), more=st.floats(0.1, 3), damaged=st.sampled_from([VISION, TEXT]))
def test_more_damage_costs_more_weight(damage, more, damaged):
    def weight(value, **config):
        pair = [NOTHING, NOTHING]
        pair[damaged] = value
        return ruled(tuple(pair), weight_floor=0.0, **config)[damaged]

    assert weight(damage + more, kappa=1.0) < weight(damage, kappa=1.0)
    assert weight(damage, kappa=2.0) < weight(damage, kappa=1.0)
    assert weight(damage, kappa=0) == 0.5


def test_intervention_starts_softly_at_the_threshold():
    weights = [ruled((damage, -1.0))[VISION].item() for damage in (0.0, 1e-3, 1e-2)]

    assert weights[0] == 0.5
    assert weights[0] > weights[1] > weights[2] > 0.45


@pytest.mark.parametrize("floor", [0.0, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("damaged", [VISION, TEXT])
def test_the_rule_reaches_the_floor_and_not_below(floor, damaged):
    pair = [-1.0, -1.0]
    pair[damaged] = 100.0
    weights = ruled(tuple(pair), weight_floor=floor)

    assert weights[damaged].item() == pytest.approx(floor, abs=1e-4)
    assert weights.sum().item() == pytest.approx(1)


@bounded
@given(first=damages, second=damages, prior=priors, conflict=st.floats(-9, 9))
def test_of_two_damaged_modalities_neither_is_preferred(first, second, prior, conflict):
    first, second = (min(value, GARBAGE_LEAD) for value in (first, second))
    assert torch.equal(ruled((first, second), conflict, conflict_prior=prior), torch.tensor([0.5, 0.5]))


@bounded
@given(damage=damages, other=harmless, worse=damages, damaged=st.sampled_from([VISION, TEXT]))
def test_evidence_counts_beside_a_clean_modality_and_how_clean_does_not_matter(damage, other, worse, damaged):
    def weights(beside):
        pair = [beside, beside]
        pair[damaged] = damage
        return ruled(tuple(pair))

    assert weights(other)[damaged] < 0.5
    assert torch.equal(weights(other), weights(NOTHING))
    if abs(worse - damage) <= GARBAGE_LEAD:
        assert torch.equal(weights(worse), torch.tensor([0.5, 0.5]))


@bounded
@given(damage=damages, more=st.floats(0.5, 30), prior=priors, garbage=st.sampled_from([VISION, TEXT]))
def test_garbage_loses_beside_what_is_damaged_too(damage, more, prior, garbage):
    pair = [damage, damage]
    pair[garbage] += GARBAGE_LEAD + more
    assert ruled(tuple(pair), conflict_prior=prior)[garbage] < 0.05
    # and where both are, neither is preferred
    assert torch.equal(ruled((30.0, 30.0 + more)), torch.tensor([0.5, 0.5])) == (more <= GARBAGE_LEAD)


def test_of_three_modalities_the_damaged_ones_lose_to_a_clean_one():
    weights = ruled((4.0, 4.0, -2.0), present=(True, True, True))
    assert weights[0] == weights[1] < 0.1 < 0.8 < weights[2]
    # one that is absent does not count as clean
    assert ruled((4.0, 2.0, NOTHING), present=(True, True, False)).tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("present", [(True, False), (False, True)])
def test_a_lone_modality_keeps_all_weight_however_damaged(present):
    pair = tuple(30.0 if here else NOTHING for here in present)
    weights = ruled(pair, present=present, conflict_prior="text")

    assert torch.equal(weights, torch.tensor(present).float())


@pytest.mark.parametrize(
    ("config", "heeded"),
    [
        ({"scheduler": "rule"}, {"p_clean"}),
        ({"scheduler": "rule", "conflict_prior": "vision"}, {"p_clean", "p_match"}),
        ({"scheduler": "learned"}, {"consistency", "typicality", "p_clean", "p_match"}),
        ({"scheduler": "uniform"}, set()),
        ({"scheduler": "entropy"}, set()),
        ({"scheduler": "energy"}, {"energy"}),
    ],
)
def test_a_scheduler_heeds_its_signals_and_no_others(config, heeded):
    config, mask = DMSConfig(shared_size=4, **config), torch.ones(64, 2, dtype=torch.bool)
    scheduler, signals = scheduler_of(config, 2), random_signals(0, 64, 2)
    before = schedule(config, signals, mask, scheduler=scheduler)
    for name in SIGNALS:
        changed = ModalitySignals(**{**signals, name: random_signals(99, 64, 2)[name]})
        after = schedule(config, changed, mask, scheduler=scheduler)
        assert torch.equal(after, before) != (name in heeded), name


@pytest.mark.parametrize("floor", [0.001, 0.05, 0.3])
def test_what_a_conflict_prior_does_not_believe_falls_below_the_floor_of_damage(floor):
    damaged = ruled((9.0, -3.0), conflict=30.0, conflict_prior="vision", weight_floor=floor)
    assert damaged[VISION].item() == pytest.approx(floor, abs=1e-4)
    mistaken = ruled((-1.0, -3.0), conflict=30.0, conflict_prior="vision", weight_floor=floor)
    assert mistaken[TEXT].item() == pytest.approx(min(floor, CONFLICT_FLOOR), abs=1e-4)
    undecided = ruled((-1.0, -3.0), conflict=30.0, weight_floor=floor)
    assert torch.equal(undecided, torch.tensor([0.5, 0.5]))


@bounded
@given(conflict=st.floats(0.01, 50), first=harmless, second=harmless)
def test_conflict_alone_moves_nothing_without_a_prior(conflict, first, second):
    assert torch.equal(ruled((first, second), conflict), torch.tensor([0.5, 0.5]))


@bounded
@given(conflict=st.floats(0.01, 50), first=harmless, second=harmless, believed=st.sampled_from(["vision", "text"]))
def test_the_prior_decides_a_conflict_of_undamaged_modalities(conflict, first, second, believed):
    index = ["vision", "text"].index(believed)
    weights = ruled((first, second), conflict, conflict_prior=believed)

    assert weights[index] > 0.5
    more = ruled((first, second), conflict + 0.1, conflict_prior=believed)
    assert more[index] >= weights[index]


@pytest.mark.parametrize(("believed", "index"), [("vision", VISION), ("text", TEXT)])
def test_the_prior_reaches_the_floor_and_grows_with_kappa(believed, index):
    def weight(conflict, kappa, floor=0.05):
        return ruled((-1.0, -1.0), conflict, conflict_prior=believed, kappa=kappa, weight_floor=floor)[index]

    assert weight(100.0, 4.0).item() == pytest.approx(0.99, abs=1e-4)
    assert weight(100.0, 4.0, floor=0.001).item() == pytest.approx(0.999, abs=1e-4)
    assert 0.5 < weight(0.1, 1.0) < weight(0.1, 2.0)
    assert weight(5.0, 0.0) == 0.5


def test_the_rule_arbitrates_three_modalities():
    weights = ruled((-1.0, 2.0, -1.0), present=(True,) * 3, weight_floor=0.05)

    assert weights[1] < 1 / 3 < weights[0]
    assert weights[0] == weights[2]
    absent = ruled((-1.0, 2.0, NOTHING), present=(True, True, False), weight_floor=0.05)
    assert absent[2] == 0
    assert absent[1] < 0.5 < absent[0]
