"""One step of training: losses, gradients, what must not be touched, and the `Trainer`."""

import inspect

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_dms.steer import masks
from tests import tiny


LOSSES = ("mwc", "unimodal", "consistency", "schedule")
NO_LOSSES = {f"lambda_{name}": 0.0 for name in LOSSES}


def training_inputs(backbone, kind="pairs", padding="left"):
    inputs = tiny.prompts(backbone, kind, padding, labels=3)
    return inputs | {"schedule_target": tiny.uneven(len(inputs["input_ids"]))}


@pytest.mark.parametrize("kind", ["pairs", "mixed"])
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_loss_is_the_weighted_sum(backbone, kind):
    lambdas = {"lambda_mwc": 0.3, "lambda_unimodal": 0.2, "lambda_consistency": 0.7, "lambda_schedule": 1.3}
    inputs = training_inputs(backbone, kind)
    for scheduler in ("entropy", "rule", "learned"):
        model = tiny.shared(backbone, scheduler=scheduler, stirred=True, **lambdas)
        with torch.no_grad():
            out = model(**inputs)
        assert set(out.dms_losses) == {"task", *LOSSES}
        assert all(value.ndim == 0 and value.isfinite() for value in out.dms_losses.values())
        assert all(out.dms_losses[name] > 0 for name in LOSSES)
        expected = out.dms_losses["task"] + sum(lambdas[f"lambda_{name}"] * out.dms_losses[name] for name in LOSSES)
        torch.testing.assert_close(out.loss, expected)
    without = {name: value for name, value in inputs.items() if name != "schedule_target"}
    with torch.no_grad():
        assert set(model(**without).dms_losses) == {"task", "mwc", "unimodal", "consistency"}
        del without["labels"]
        if backbone == "blip2-t5":
            without["decoder_input_ids"] = torch.full((len(without["input_ids"]), 1), tiny.PAD)
        assert model(**without).dms_losses is None


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_the_static_baseline_has_no_losses_of_its_own(backbone):
    inputs = training_inputs(backbone)
    with torch.no_grad():
        out = tiny.shared(backbone, scheduler="uniform", lambda_mwc=1.0)(**inputs)
        del inputs["schedule_target"]
        expected = tiny.vanilla(backbone)(**inputs)
    assert out.dms_losses is None
    assert torch.equal(out.loss, expected.loss)


@pytest.mark.parametrize("scheduler", ["rule", "learned"])
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_without_lambdas_the_loss_is_the_vanilla_one(backbone, scheduler):
    inputs = tiny.prompts(backbone, "mixed", "left", labels=3)
    with torch.no_grad():
        out = tiny.shared(backbone, scheduler=scheduler, **NO_LOSSES)(**inputs)
        expected = tiny.vanilla(backbone)(**inputs)
    assert set(out.dms_losses) == {"task"}
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.logits, expected.logits)


@pytest.mark.parametrize("backbone", tiny.DECODER_ONLY)
def test_answers_are_neutral(backbone):
    """A label must not help to weigh its own prompt."""
    inputs = tiny.prompts(backbone, "pairs", "right", labels=3)
    model = tiny.shared(backbone, scheduler="learned", stirred=True)
    with torch.no_grad():
        out = model(**inputs)
        labelled = inputs["labels"] != -100
        assert labelled.any()
        assert not out.modality_ids[labelled].any()
        other = {**inputs, "input_ids": torch.where(labelled, 50, inputs["input_ids"])}
        assert torch.equal(model(**other).modality_weights, out.modality_weights)


# ---- gradients


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_every_dms_parameter_gets_a_gradient(backbone):
    model = tiny.build(backbone, scheduler="learned")
    model.train()
    model(**training_inputs(backbone)).loss.backward()
    for name, parameter in model.dms.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    # from a state without zeros every one of them matters
    tiny.stir(model.dms)
    model.zero_grad()
    model(**training_inputs(backbone)).loss.backward()
    for name, parameter in model.dms.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_a_frozen_base_gets_no_gradient(backbone):
    model = tiny.build(backbone, scheduler="learned", stirred=True, **NO_LOSSES)
    model.requires_grad_(False)
    model.dms.requires_grad_(True)
    model.train()
    model(**tiny.prompts(backbone, "mixed", "left", labels=3)).loss.backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("dms."):
            assert parameter.grad is None, name
    # the task loss alone reaches the scheduler, through the attention of the frozen language model
    for name, parameter in model.dms.scheduler.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("attention", "fusion"), [("sdpa", "attention"), ("eager", "attention"), ("sdpa", "embedding")]
)
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_gradient_of_the_weights_is_the_difference_quotient(backbone, attention, fusion):
    model = tiny.shared(backbone, attention, fusion=fusion, **NO_LOSSES)
    inputs = tiny.prompts(backbone, "pairs", "left", labels=3)
    score = torch.tensor([0.3, -0.4, 0.2], requires_grad=True)

    def loss(score):
        weights = torch.stack([score, torch.zeros(3)], 1).softmax(1)
        return model(**inputs, modality_weights=weights).loss

    (gradient,) = torch.autograd.grad(loss(score), score)
    step = 1e-2
    for index in range(3):
        unit = torch.zeros(3).index_fill(0, torch.tensor([index]), step)
        with torch.no_grad():
            near, far = ((loss(score + k * unit) - loss(score - k * unit)) for k in (1, 2))
        quotient = (8 * near - far) / (12 * step)  # fourth order
        torch.testing.assert_close(gradient[index], quotient, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_double_precision(backbone):
    model, inputs = tiny.build(backbone), tiny.prompts(backbone, "pairs", "left")
    weights = tiny.uneven(3)
    keep = inputs["attention_mask"].bool() if backbone != "blip2-t5" else slice(None)
    with torch.no_grad():
        single = model(**inputs, modality_weights=weights).logits[keep]
        inputs["pixel_values"] = inputs["pixel_values"].double()
        double = model.double()(**inputs, modality_weights=weights).logits[keep]
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{"use_reentrant": False}, None, {"use_reentrant": True}])
@pytest.mark.parametrize("backbone", [*tiny.FAMILIES, "llava-qwen2"])
def test_gradient_checkpointing_gives_the_same_gradients(backbone, options):
    gradients = []
    for checkpointing in (False, True):
        model = tiny.build(backbone, scheduler="learned", stirred=True)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            assert model.is_gradient_checkpointing
        model.train()
        model(**training_inputs(backbone)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        tolerance = 1e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=tolerance, msg=name)


# ---- what must not be touched


def observed(model):
    flags = {name: module.training for name, module in model.named_modules()}
    return flags, {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_forward_touches_neither_modes_nor_random_state(backbone):
    model = tiny.build(backbone, scheduler="learned", stirred=True)
    model.dms.views[0].train()  # an odd mix must survive as well
    inputs = training_inputs(backbone, "mixed")
    before, buffers = observed(model), {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(11)
    state = torch.get_rng_state()
    with torch.no_grad():
        model(**inputs)
    assert torch.equal(torch.get_rng_state(), state)
    prompt = {k: v for k, v in inputs.items() if k not in ("labels", "schedule_target")}
    model.generate(**prompt, max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert observed(model) == before
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("uncertainty", ["mutual_information", "variance"])
@pytest.mark.parametrize("backbone", [*tiny.BACKBONES, "retrieval"])
def test_monte_carlo_dropout(backbone, uncertainty):
    """It finds some uncertainty, the same every time, in train mode too; another seed finds another."""
    inputs = tiny.prompts(backbone, "pairs", "left")
    options = {"scheduler": "learned", "uncertainty": uncertainty}
    model = tiny.build(backbone, stirred=True, **options)
    other = tiny.build(backbone, stirred=True, mc_seed=1, **options)
    with torch.no_grad():
        torch.manual_seed(0)
        first = model(**inputs)
        torch.manual_seed(1)
        second = model.train()(**inputs)
        changed = other(**inputs)
    uncertainty = first.modality_signals.uncertainty
    assert (uncertainty > 0).all()
    assert torch.equal(second.modality_signals.uncertainty, uncertainty)
    assert torch.equal(second.modality_weights, first.modality_weights)
    assert not torch.equal(changed.modality_signals.uncertainty, uncertainty)


# ---- the Trainer


@pytest.mark.parametrize("backbone", ["llava-llama", "internvl-qwen3", "blip2-opt", "retrieval"])
def test_forward_repeats_the_parents_parameters(backbone):
    """The `Trainer` reads the signature: a parameter that is only in `**kwargs` is a column it drops."""
    model_class = tiny.model_class(backbone)
    own = list(inspect.signature(model_class.forward).parameters)
    parent = [
        p.name
        for p in inspect.signature(tiny.VANILLA[model_class].forward).parameters.values()
        if p.kind is not p.VAR_KEYWORD and p.name != "return_dict"
    ]
    assert own[: len(parent)] == parent
    assert {"modality_ids", "modality_mask", "modality_weights"} <= set(own[len(parent) :])
    if backbone != "retrieval":
        assert "labels" in own
        assert "schedule_target" in own


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_plain_trainer(backbone, tmp_path):
    inputs = training_inputs(backbone)
    inputs["modality_mask"] = torch.ones(3, 2, dtype=torch.bool)
    dataset = [{name: value[i] for name, value in inputs.items()} | {"junk": i} for i in range(3)]
    seen = []
    model = tiny.build(backbone, scheduler="learned")
    before = {name: p.clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset)
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    trainer.train()
    handle.remove()
    assert set(inputs) <= seen[0]
    assert "junk" not in seen[0]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert torch.tensor(trainer.evaluate()["eval_loss"]).isfinite()
    still = [n for n, p in model.named_parameters() if n.startswith("dms.") and torch.equal(p, before[n])]
    assert not still


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("backbone", tiny.DECODER_ONLY)
def test_a_bias_as_head_dimension_is_a_bias_in_the_mask(backbone, padding, monkeypatch):
    """With a missing image too, whose keys are masked."""
    inputs = tiny.prompts(backbone, "pairs", padding)
    inputs["modality_mask"] = torch.tensor([[True, True]] * (len(inputs["input_ids"]) - 1) + [[False, True]])
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :-3] = -100
    losses, gradients = [], []
    widened, sdpa = [], masks.sdpa_attention_forward
    monkeypatch.setattr(
        masks,
        "sdpa_attention_forward",
        lambda *args, **kwargs: widened.append(args[1].shape[-1]) or sdpa(*args, **kwargs),
    )
    for attention in ("eager", "sdpa"):
        model = tiny.build(backbone, attention, scheduler="learned", stirred=True)
        loss = model.train()(**inputs).loss
        loss.backward()
        losses.append(loss)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert 9 in widened  # heads of 8 numbers and the bias
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    assert gradients[0]["dms.scheduler.output.weight"].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("backbone", ["llava-llama", "internvl-qwen3", "blip2-opt"])
def test_under_gradient_accumulation_losses_count_by_their_share_of_the_targets(backbone):
    model = tiny.build(backbone, scheduler="learned", stirred=True)
    inputs = tiny.prompts(backbone, "pairs", "left", labels=3)
    targets = int((inputs["labels"][:, 1:] != -100).sum())
    whole, quarter = (model(**inputs, num_items_in_batch=count) for count in (targets, 4 * targets))
    torch.testing.assert_close(whole.loss, model(**inputs).loss)
    torch.testing.assert_close(quarter.loss, whole.loss / 4)
