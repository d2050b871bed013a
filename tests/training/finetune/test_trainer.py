"""Training: what moves, that it repeats, what is logged, and other trainers."""

import logging
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from modeling_dms.configuration.configuration_dms import DMSConfig
from modeling_dms.training.corruptions import EpochCallback, ModalityDropout
from modeling_dms.training.data import PromptCollator, load_samples
from modeling_dms.training.data.samples import kept, split_readable
from modeling_dms.training.finetune import train
from modeling_dms.training.finetune.arguments import DataArguments, read_arguments
from modeling_dms.training.finetune.curves import COLORS, draw_curves
from modeling_dms.training.finetune.features import FeatureCache
from modeling_dms.training.finetune.stages import prepare, targets_of
from modeling_dms.training.finetune.trainer import DMSTrainer, DMSTrainingArguments, only_targets
from modeling_dms.training.models.loading import load
from tests import families, tiny


BACKBONES = ("demo-llava", "internvl", "demo-blip2")
QUIET = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
LOSSES = ("task", "mwc", "unimodal", "consistency", "schedule")


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def samples(count=8, step=5):
    """Of several images."""
    return load_samples("easy-vqa", "train", limit=count * step)[::step]


def loaded(backbone="demo-llava", seed=0, **dms):
    torch.manual_seed(seed)  # what is new in `dms`
    if backbone == "internvl":
        with tempfile.TemporaryDirectory() as folder:
            return load(tiny.save_internvl(Path(folder)), {"scheduler": "learned", **dms})
    return load(backbone, {"scheduler": "learned", **dms})


def arguments(folder, kind=DMSTrainingArguments, **changes):
    fields = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    return kind(output_dir=str(folder), **{**QUIET, **fields, **changes})


def trainer_of(folder, model, processor, data, **changes):
    collator = PromptCollator(processor, with_labels=True, schedule_temperature=0.2, with_ids=True)
    callbacks = [EpochCallback()] if isinstance(data, ModalityDropout) else []
    return DMSTrainer(
        model=model,
        args=arguments(folder, **changes),
        data_collator=collator,
        train_dataset=data,
        callbacks=callbacks,
        processing_class=processor,
    )


def state_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def damaged(data, **changes):
    rates = {"image_rate": 0.4, "text_rate": 0.4, **changes}
    return ModalityDropout(data, image_families=["blank", "occlusion"], text_families=["shuffle", "missing"], **rates)


def losses_of(trainer, name="loss"):
    return [row[name] for row in trainer.state.log_history if name in row]


# ---- what moves

STAGES = {
    "bridge": {"stage": "bridge"},
    "scheduler": {"stage": "scheduler"},
    "backbone-lora": {"stage": "backbone", "lora_rank": 2},
    "backbone-lora_kept": {"stage": "backbone", "lora_rank": 2, "save_bridge": True},
    "joint-lora": {"stage": "joint", "lora_rank": 2},
    "joint-lora_all": {"stage": "joint", "lora_rank": 2, "lora_targets": "all"},
    "joint-lora-bridge": {"stage": "joint", "lora_rank": 2, "train_bridge": True},
    "backbone-whole": {"stage": "backbone", "lora_rank": 0},
    "joint-whole-bridge": {"stage": "joint", "lora_rank": 0, "train_bridge": True},
}
BRIDGE = {
    "demo-llava": ("multi_modal_projector",),
    "internvl": ("multi_modal_projector",),
    "demo-blip2": ("qformer", "language_projection"),
}


def meant_to_train(name, backbone, choice):
    if choice == "scheduler":
        return name.startswith("dms.scheduler.")
    if choice == "bridge":
        return any(part in name.split(".") for part in BRIDGE[backbone])
    kind, how, *bridge = choice.split("-")
    bridge = BRIDGE[backbone] if bridge else ()
    if how.startswith("lora"):
        if ".lora_" in name:
            assert "language_model" in name
            return True
        copies = (*(["dms"] if kind == "joint" else []), *bridge)
        return any(f".{part}.modules_to_save.default." in name for part in copies)
    if bridge and backbone == "demo-blip2" and name.endswith("query_tokens"):
        return True
    parts = ("language_model", "lm_head", *(["dms"] if kind == "joint" else []), *bridge)
    return any(part in name.split(".") for part in parts)


def _inside(name, modules):
    """What peft calls a weight of a module that it saves whole, while it is trained."""
    for module in modules:
        name = name.replace(f".{module}.", f".{module}.modules_to_save.default.")
    return name


# of the others what their own parts make different: InternVL has the parts of LLaVA, by other names
@pytest.mark.parametrize(
    ("backbone", "choice"),
    [
        *(("demo-llava", choice) for choice in STAGES),
        *(("demo-blip2", choice) for choice in ("bridge", "scheduler", "backbone-lora_kept")),
        *(("demo-blip2", choice) for choice in ("joint-lora-bridge", "joint-whole-bridge")),
        ("internvl", "bridge"),
        ("internvl", "joint-lora-bridge"),
    ],
)
def test_what_a_stage_trains_moves_and_nothing_else(tmp_path, backbone, choice):
    model, processor = loaded(backbone)
    model = prepare(model, **STAGES[choice])
    before = state_of(model)
    expected = {name for name in before if meant_to_train(name, backbone, choice)}
    assert expected
    assert set(trainable(model)) == expected
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # with one step LoRA's first matrix would stay, since its second one begins at zero
    trainer = trainer_of(tmp_path, model, processor, damaged(samples(12)), max_steps=2)
    trainer.train()
    after = state_of(model)
    if choice == "backbone-lora_kept":
        trainer.save_model()
        saved = load_file(tmp_path / "adapter_model.safetensors")
        kept = {name for name in saved if any(part in name.split(".") for part in BRIDGE[backbone])}
        assert kept
        assert all(torch.equal(saved[n], after[_inside(n, BRIDGE[backbone])]) for n in kept)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert sorted(moved - expected) == []
    assert sorted(expected - moved) == []
    assert all(value.isfinite().all() for value in after.values())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_scheduler_learns_at_its_own_rate(tmp_path, lora_rank):
    model, processor = loaded()
    model = prepare(model, "joint", lora_rank)
    of_scheduler = {name for name in trainable(model) if ".scheduler." in name}
    assert of_scheduler
    before = state_of(model)
    # at 0 it stays, and all else learns as it would without
    options = {"scheduler_learning_rate": 0.0, "lr_scheduler_type": "cosine"}
    trainer = trainer_of(tmp_path, model, processor, damaged(samples(12)), **options)
    trainer.train()
    trained = {name for name, value in state_of(model).items() if not torch.equal(value, before[name])}
    assert trained == {*trainable(model)} - of_scheduler
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {named[id(p)]: group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert rates == {name: 0.0 if name in of_scheduler else 1e-2 for name in trainable(model)}
    assert trainer.create_optimizer() is trainer.optimizer
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(rates)
    with pytest.raises(ValueError, match="scheduler_learning_rate must be at least 0, got -1"):
        arguments(tmp_path, scheduler_learning_rate=-1.0)


def test_nothing_to_train_is_refused():
    model, _ = loaded()
    with pytest.raises(ValueError, match="stage must be one of align, bridge, backbone, scheduler, joint, got 'all'"):
        prepare(model, "all")
    with pytest.raises(ValueError, match="train_bridge must be off"):
        prepare(model, "scheduler", train_bridge=True)
    model, _ = loaded(scheduler="rule")
    with pytest.raises(ValueError, match=r"needs DMSConfig.*'learned'.*'rule'"):
        prepare(model, "scheduler")


# ---- the same again


@pytest.mark.parametrize("backbone", BACKBONES)
def test_one_seed_trains_bit_for_bit_the_same(tmp_path, backbone):
    ends = []
    for number, seed in enumerate((0, 0, 1) if backbone == "demo-llava" else (0, 0)):
        model, processor = loaded(backbone)
        model = prepare(model, "joint", 0)
        trainer = trainer_of(tmp_path / str(number), model, processor, damaged(samples(12), seed=seed), seed=seed)
        trainer.train()
        ends.append((state_of(model), losses_of(trainer)))
    (first, losses), (second, again), *others = ends
    assert again == losses
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    for other, _ in others:
        assert [name for name in first if not torch.equal(first[name], other[name])]


@pytest.mark.parametrize("kind", [DMSTrainer, Trainer])
def test_accumulating_eight_batches_of_one_is_one_batch_of_eight(tmp_path, kind):
    """Without the consistency loss, whose negatives are those of the batch."""
    ends = []
    data = samples(16)
    for batch_size, accumulation in ((8, 1), (1, 8)):
        model, processor = loaded(lambda_consistency=0.0)
        collator = PromptCollator(processor, True, schedule_temperature=0.2, with_ids=kind is DMSTrainer)
        assert {int((row["labels"] != -100).sum()) for row in map(collator, ([s] for s in data))} == {2}
        model = prepare(model, "joint", 0)
        before = state_of(model)
        args = arguments(
            tmp_path,
            DMSTrainingArguments if kind is DMSTrainer else TrainingArguments,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",  # Adam makes much of rounding where a gradient is nearly 0
            learning_rate=0.1,
            max_steps=2,
            remove_unused_columns=False,
        )
        trainer = kind(model=model, args=args, train_dataset=data, data_collator=collator)
        trainer.train()
        names = [f"loss_{name}" for name in LOSSES if name != "consistency"] if kind is DMSTrainer else []
        ends.append((state_of(model), {name: losses_of(trainer, name) for name in ("loss", *names)}))
        still = [name for name in trainable(model) if torch.equal(before[name], ends[-1][0][name])]
        assert still == []
    for weights, logged in ends[1:]:
        for name, value in weights.items():
            torch.testing.assert_close(value, ends[0][0][name], rtol=0, atol=1e-5, msg=name)
        for name, values in logged.items():
            assert len(values) == 2
            assert values == pytest.approx(ends[0][1][name], abs=1e-4), name


# ---- losses that are not finite


def test_a_loss_that_is_not_finite_names_the_samples(tmp_path):
    model, processor = loaded()
    model = prepare(model, "scheduler")
    with torch.no_grad():
        model.dms.views[0].shared.weight[0, 0] = float("nan")
    data = samples(4)
    with pytest.raises(FloatingPointError, match="nan at step 0") as error:
        trainer_of(tmp_path, model, processor, data).train()
    assert all(sample.id in str(error.value) for sample in data)


# ---- targets


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_leave_one_out_target_is_the_loss_without_each_modality(tmp_path, backbone):
    model, processor = loaded(backbone)
    data = samples(4)
    data[1] = data[1].replace(answers=("yes",))
    trainer = trainer_of(tmp_path, prepare(model, "scheduler"), processor, data, schedule_target="leave_one_out")
    batch = trainer.data_collator(data)
    for name in ("sample_ids", "image_keys", "schedule_target"):
        batch.pop(name)
    model.train()
    target = trainer._leave_one_out(model, batch)
    assert model.training
    model.eval()
    rows = []
    for sample in data:
        alone = PromptCollator(processor, with_labels=True)([sample])
        with torch.no_grad():
            without = [model(**alone, modality_weights=torch.tensor([w])).dms_losses["task"] for w in ([0, 1], [1, 0])]
        rows.append((torch.stack(without) / 0.2).softmax(0))
    torch.testing.assert_close(target, torch.stack(rows), rtol=0, atol=2e-3)
    assert (target - 0.5).abs().max() > 0.05


def test_the_leave_one_out_target_finds_the_damaged_modality_and_is_trained_on(tmp_path):
    model, processor = loaded()
    black = Image.new("RGB", (64, 64))
    data = [s for s in samples(40, 1) if s.answers[0] not in ("yes", "no")][:8]
    assert len(data) == 8
    data = [s.replace(image=black) for s in data[:4]] + [s.replace(context="or a far he it so") for s in data[4:]]
    trainer = trainer_of(
        tmp_path,
        prepare(model, "scheduler"),
        processor,
        data,
        schedule_target="leave_one_out",
        max_steps=1,
        per_device_train_batch_size=8,
        learning_rate=0.0,
    )
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trainer.train()
    *probes, last = seen
    assert len(probes) == 2
    assert all("schedule_target" not in probe for probe in probes)
    damaged_image = (last["pixel_values"].flatten(1).std(1) == 0) | (last["pixel_values"].flatten(1).amax(1) < 0)
    assert int(damaged_image.sum()) == 4
    target = last["schedule_target"]
    assert (target[damaged_image, 0] < 0.5).all(), target
    assert (target[~damaged_image, 1] < 0.5).all(), target


def test_without_a_target_there_is_no_schedule_loss(tmp_path):
    model, processor = loaded()
    trainer = trainer_of(tmp_path, prepare(model, "scheduler"), processor, samples(4), schedule_target="none")
    trainer.train()
    assert losses_of(trainer, "loss_task")
    assert not losses_of(trainer, "loss_schedule")


def test_warm_up_holds_the_weights_uniform(tmp_path):
    model, processor = loaded()
    tiny.stir(model.dms.scheduler)
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.modality_weights.detach()))
    data = [*samples(7), samples(1)[0].replace(id="imageless", image=None)]
    trainer = trainer_of(
        tmp_path, prepare(model, "joint", 0), processor, data, scheduler_warmup_ratio=0.5, max_steps=4
    )
    trainer.train()
    assert len(seen) == 4
    for weights in seen:  # an absent image has no weight in the warm-up either
        torch.testing.assert_close(weights.sum(1), torch.ones(4))
    warm = torch.cat(seen[:2])
    assert sorted(map(tuple, warm.tolist())) == [(0.0, 1.0), *[(0.5, 0.5)] * 7]
    assert all((weights - 0.5).abs().max(1).values.min() > 1e-4 for weights in seen[2:])


# ---- logs


def test_logs_equal_a_direct_computation(tmp_path):
    model, processor = loaded()
    tiny.stir(model.dms.scheduler, std=0.1)
    model = prepare(model, "scheduler")
    data = samples(5)
    data[4] = data[4].replace(context=None)  # counts in the losses, not in the weights
    data[0] = data[0].replace(damage=(1.0, 0.0))
    trainer = trainer_of(tmp_path, model, processor, data, max_steps=1, per_device_train_batch_size=5)
    batch = trainer.data_collator(data)
    assert batch.pop("sample_ids")
    assert batch.pop("image_keys")
    with torch.no_grad():
        out = model.train()(**batch)
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert {name for name in row if name.startswith("loss_")} == {f"loss_{name}" for name in LOSSES}
    for name in LOSSES:
        assert row[f"loss_{name}"] == pytest.approx(float(out.dms_losses[name]), rel=1e-4), name
    assert row["loss"] == pytest.approx(float(out.loss), rel=1e-4)
    weights = out.modality_weights[:4]
    for index, name in enumerate(("vision", "text")):
        assert row[f"weight_{name}"] == pytest.approx(float(weights[:, index].mean()), abs=1e-5)
        spread = float(weights[:, index].std(correction=0))
        assert spread > 1e-3
        assert row[f"weight_{name}_spread"] == pytest.approx(spread, abs=1e-4)


def test_logs_of_several_steps_are_their_mean(tmp_path):
    rows = []
    for every in (1, 4):
        model, processor = loaded()
        data = damaged(samples(12))
        trainer = trainer_of(
            tmp_path, prepare(model, "scheduler"), processor, data, logging_steps=every, max_steps=4, seed=3
        )
        trainer.train()
        rows.append([row for row in trainer.state.log_history if "loss" in row])
    singles, (together,) = rows
    assert len(singles) == 4
    for name in ("loss", *(f"loss_{name}" for name in LOSSES)):
        assert together[name] == pytest.approx(np.mean([row[name] for row in singles]), rel=1e-4), name


# ---- features kept


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_feature_cache_changes_no_loss(tmp_path, backbone):
    """With the Q-Former's dropout off, which kept features are free of."""
    found, hits = [], []
    for size in (0.0, 1.0):
        model, processor = loaded(backbone)
        for module in model.modules():
            rates = [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
            for name in [*rates, *(["p"] if isinstance(module, torch.nn.Dropout) else [])]:
                setattr(module, name, 0.0)
        data = damaged(samples(8), image_rate=0.25)
        trainer = trainer_of(
            tmp_path, prepare(model, "scheduler"), processor, data, feature_cache_gb=size, max_steps=4
        )
        cache = trainer._features
        assert (cache is None) == (size == 0)
        if cache is not None:
            trainer.add_callback(_Hits(cache, hits))
        trainer.train()
        found.append({name: losses_of(trainer, f"loss_{name}") for name in LOSSES})
    for name in LOSSES:
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-4, abs=1e-6), name
    assert hits[1] > hits[0]
    assert 0 < cache.used <= cache.size


class _Hits(EpochCallback):
    def __init__(self, cache, hits):
        self.cache, self.hits = cache, hits

    def on_epoch_begin(self, *args, **kwargs):
        pass

    def on_epoch_end(self, *args, **kwargs):
        self.hits.append(self.cache.hits)


def test_a_trained_bridge_is_not_cached(tmp_path):
    for lora_rank in (0, 2):
        model, processor = loaded()
        model = prepare(model, "joint", lora_rank, train_bridge=True)
        assert trainer_of(tmp_path, model, processor, samples(4), feature_cache_gb=1.0)._features is None
    model, processor = loaded()
    model = prepare(model, "joint", 2)
    assert trainer_of(tmp_path, model, processor, samples(4), feature_cache_gb=1.0)._features is not None


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_cache_keeps_its_size_and_drops_the_longest_unused(backbone):
    model, processor = loaded(backbone)
    pixels = PromptCollator(processor)(samples(4, 9))["pixel_values"][:4]  # of an InternVL, four tiles of one image
    assert len({row.sum().item() for row in pixels}) == 4
    with torch.no_grad():
        expected = model.eval().get_image_features(pixels, return_dict=True)
    pooled = torch.stack(list(expected.pooler_output))
    model.train()
    model.dms.eval()  # an odd mix must survive
    modes = [module.training for module in model.modules()]
    one = FeatureCache(2**30)
    one.encode(model, pixels[:1], ["a"])
    cache = FeatureCache(int(one.used * 2.5))
    state = torch.get_rng_state()
    got = cache.encode(model, pixels, ["a", "b", None, "b"])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(torch.stack(list(got.pooler_output)), pooled, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.statistics, expected.statistics, rtol=0, atol=1e-5)
    assert set(cache._kept) == {"a", "b"}
    assert (cache.hits, cache.used) == (0, 2 * one.used)
    cache.encode(model, pixels[:1], ["a"])
    cache.encode(model, pixels[2:3], ["c"])  # "b" has not been used for longest
    assert set(cache._kept) == {"a", "c"}
    assert cache.used <= cache.size
    again = cache.encode(model, torch.full_like(pixels[:2], torch.nan), ["c", "a"])  # looks at no pixel
    torch.testing.assert_close(torch.stack(list(again.pooler_output)), pooled[[2, 0]], rtol=0, atol=1e-5)
    assert cache.hits == 3
    small = FeatureCache(10)
    small.encode(model, pixels, ["a", "b", "c", "d"])
    assert (small.used, len(small._kept)) == (0, 0)


# ---- whole runs


def overrides(folder, **changes):
    fields = {"model": "demo-llava", "output_dir": folder, "max_steps": 2, "calibration_samples": 0, "max_samples": 12}
    fields |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 2}
    fields |= {"image_families": "blank", "logging_steps": 1, "save_strategy": "no"}
    fields |= {"dms": '{"scheduler": "learned"}', **changes}
    return read_arguments(None, [f"--{name}={value}" for name, value in fields.items()])


def test_broken_images_are_named_left_out_and_counted(tmp_path, monkeypatch, caplog):
    data = samples(6)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(data[0].image.read_bytes()[:60])
    data[2] = data[2].replace(image=tmp_path / "empty.png")
    data[4] = data[4].replace(image=tmp_path / "cut.png")
    monkeypatch.setattr(train, "load_sources", lambda *args: data)
    with caplog.at_level(logging.WARNING):
        trainer = train.run_training(overrides(tmp_path / "run"))
    assert [s.id for s in trainer.train_dataset.samples] == [data[i].id for i in (0, 1, 3, 5)]
    named = [message for message in caplog.messages if message.startswith("left out")]
    assert len(named) == 2
    assert repr(data[2].id) in named[0]
    assert repr(data[4].id) in named[1]
    assert "2 of 6 samples left out" in caplog.text
    with pytest.raises(ValueError, match="none of the 2 samples"):
        kept([data[2], data[4]], split_readable, "their images cannot be read")


@pytest.mark.usefixtures("first_level_alone")
@pytest.mark.parametrize(
    ("stage", "warmup", "steps", "when"),
    [
        ("scheduler", 0, 1, [0]),
        ("joint", 0, 0, [0, 4]),
        ("joint", 0.5, 0, [0, 2, 4]),
        ("joint", 0.2, 3, [0, 1, 3, 4]),
    ],
)
def test_a_run_calibrates_before_and_wherever_the_backbone_moved(tmp_path, monkeypatch, stage, warmup, steps, when):
    splits = {"train": samples(75, 10), "validation": samples(80, 100)}
    monkeypatch.setattr(train, "load_sources", lambda data, split, *rest: splits[split])
    trainers, called, on, calibrate, init = [], [], [], train.calibrate, DMSTrainer.__init__

    def watched(self, *args, **kwargs):
        trainers.append(self)
        init(self, *args, **kwargs)

    def counted(*args, **kwargs):
        called.append(trainers[0].state.global_step if trainers else 0)
        on.append(next(name for name, own in splits.items() if own == args[2]))
        if len(called) == 1:  # the others would do the same
            calibrate(*args, **kwargs)

    monkeypatch.setattr(DMSTrainer, "__init__", watched)
    monkeypatch.setattr(train, "calibrate", counted)
    changes = {"calibration_samples": 60, "calibration_steps": steps, "scheduler_warmup_ratio": warmup, "max_steps": 4}
    trainer = train.run_training(
        overrides(tmp_path, stage=stage, lora_rank=2, per_device_train_batch_size=4, **changes)
    )
    assert called == when
    # the last time on what was not trained on, where that was done at all
    assert on == ["train"] * (len(when) - (len(when) > 1)) + ["validation"] * (len(when) > 1)
    assert trainer.model.dms.calibration.is_calibrated
    assert list((tmp_path / "final").glob("*model*.safetensors"))


def test_a_warm_up_with_nothing_else_to_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match="scheduler_warmup_ratio must be 0"):
        train.run_training(overrides(tmp_path, scheduler_warmup_ratio=0.5))


def test_a_target_that_no_loss_hears_is_refused(tmp_path):
    silent = '{"scheduler": "learned", "lambda_schedule": 0}'
    with pytest.raises(ValueError, match="schedule_target='severity' does nothing where lambda_schedule is 0"):
        train.run_training(overrides(tmp_path, dms=silent))


@pytest.mark.parametrize("preset", ["lora", "paper", "scheduler"])
def test_a_preset_says_all_losses(preset):
    own = read_arguments(Path(preset), ["--model=any", "--output_dir=any"])[0].dms
    # a checkpoint's own, such as those of an earlier stage, would be taken otherwise
    assert {name for name in DMSConfig().to_dict() if name.startswith("lambda_")} <= own.keys()


def test_curves_are_drawn(tmp_path):
    trainer = train.run_training(overrides(tmp_path, max_steps=4))
    with Image.open(tmp_path / "curves.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    for color in COLORS.values():
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels.astype(int) - wanted).sum(-1) < 12).sum() > 20, color
    draw_curves(trainer.state.log_history[:0], tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


# ---- other trainers


def test_plain_trainer_trains_on_the_collators_batches(tmp_path):
    model, processor = loaded()
    model = prepare(model, "joint", 2)
    before = state_of(model)
    args = arguments(tmp_path, TrainingArguments, remove_unused_columns=False)
    collator = PromptCollator(processor, with_labels=True, schedule_temperature=0.2)
    trainer = Trainer(model=model, args=args, train_dataset=damaged(samples(12)), data_collator=collator)
    trainer.train()
    assert np.isfinite(losses_of(trainer)).all()
    after = state_of(model)
    assert len(losses_of(trainer)) == 3
    assert [name for name in trainable(model) if torch.equal(after[name], before[name])] == []


TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
)


@pytest.mark.parametrize("whole", [True, False], ids=["the-models-own-loss", "trls-loss"])
def test_trl_trains_it_with_lora(tmp_path, whole):
    """`SFTTrainer` (1.16) computes its loss from the backbone and the output layer, past the model's forward: LoRA is
    trained, but `dms` takes no part. With `Trainer`'s `compute_loss` instead it does."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig

    class Own(trl.SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return Trainer.compute_loss(self, *args, **kwargs)

    model, processor = loaded()
    processor.chat_template = TEMPLATE
    rows = [
        {
            "prompt": [{"role": "user", "content": f"context: {s.context} question: {s.question} answer:"}],
            "completion": [{"role": "assistant", "content": s.answers[0]}],
            "images": [s.load_image()],
        }
        for s in samples(8)
    ]
    args = arguments(tmp_path, trl.SFTConfig, max_length=None, per_device_train_batch_size=2)
    lora = LoraConfig(r=2, target_modules=targets_of(model, "attention"), modules_to_save=["dms"])
    trainer = (Own if whole else trl.SFTTrainer)(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=processor, peft_config=lora
    )
    before = state_of(trainer.model)
    trainer.train()
    assert len(losses_of(trainer)) == 3
    assert np.isfinite(losses_of(trainer)).all()
    after = state_of(trainer.model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    lora = {name for name in trainable(trainer.model) if ".lora_" in name}
    dms = {name for name in trainable(trainer.model) if ".dms.modules_to_save.default." in name}
    assert lora
    assert dms
    assert moved == (lora | dms if whole else lora)


@pytest.mark.parametrize("family", families.FIELDS)
def test_lora_on_all_linear_layers_reaches_every_one_of_the_language_model(family):
    model = families.build(family)
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in name]
    linear = {name for name in linear if "language_model" in name or ".text_model." in name}
    adapted = prepare(model, "backbone", 2, lora_targets="all")
    assert set(adapted.targeted_module_names) == linear
    # of an adapter that is trained further the same
    assert targets_of(adapted, "all") == adapted.peft_config["default"].target_modules


def test_projections_to_queries_and_values_in_one_are_found():
    fields, cls = families.FIELDS["llava"], families.CLASSES["llava"]
    text = {**fields["text_config"], "model_type": "phi3"}
    model = cls(cls.config_class(**{**fields, "text_config": text}, dms_config={"shared_size": 8}))
    assert targets_of(model, "attention").endswith("(qkv_proj)")
    model.model.language_model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"the language model has none of .*'qkv_proj'"):
        targets_of(model, "attention")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_logits_of_targets_alone_give_the_same_loss_and_gradients(backbone):
    model, processor = loaded(backbone, scheduler="uniform")
    prepare(model, "bridge")
    batch = PromptCollator(processor, with_labels=True)(samples(4))
    few = only_targets(batch["labels"])
    assert few["logits_to_keep"].numel() < batch["labels"].shape[1] / 2
    found = []
    for extra in ({}, few):
        model.zero_grad()
        loss = model(**batch, **extra).loss
        loss.backward()
        found.append((loss, [p.grad for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_static_model_is_trained_without_losses_of_the_scheduler(tmp_path):
    model, processor = loaded(scheduler="uniform")
    trainer = trainer_of(tmp_path, prepare(model, "bridge"), processor, damaged(samples(12)))
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["weight_vision"] == 0.5
    assert not [name for name in row if name.startswith("loss_")]


def test_one_process_with_several_gpus_is_told_to_be_launched(tmp_path, monkeypatch):
    arguments = DMSTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    monkeypatch.setattr(type(arguments), "n_gpu", 2)
    with pytest.raises(ValueError, match=r"one process sees 2 GPUs.*accelerate launch"):
        DMSTrainer(model=tiny.build("llava-llama"), args=arguments)


@pytest.mark.parametrize("more", [{}, {"scheduler_warmup_ratio": 0.5}, {"schedule_target": "leave_one_out"}])
def test_several_sources_are_trained_on_and_leave_the_weights_of_modalities_alone(tmp_path, more):
    model, processor = loaded(scheduler="rule")
    data = [sample.replace(contexts=("a second passage.",)) for sample in samples(4)]
    args = DMSTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        **QUIET,
        **more,
    )
    collator = PromptCollator(processor, with_labels=True, with_ids=True, schedule_temperature=0.1)
    trainer = DMSTrainer(model=model, args=args, data_collator=collator, train_dataset=data)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    assert all(row["loss"] > 0 and row["weight_vision"] == row["weight_text"] == 0 for row in rows)


@pytest.mark.parametrize("count", [0, 20])
def test_a_validation_split_that_is_too_small_is_told(monkeypatch, caplog, count):
    collator = PromptCollator(load("demo-llava")[1])
    monkeypatch.setattr(train, "load_sources", lambda *args: samples(count, 10) if count else [])
    assert train._held_out(DataArguments(), collator) is None
    assert "the validation split does not suffice: " in caplog.text
    monkeypatch.setattr(train, "load_sources", lambda *args: samples(80, 10))
    assert len(train._held_out(DataArguments(), collator)) == 80
