"""What holds for every family: uniform weights are the backbone, weight 0 masks, a batch equals its rows, cached is
uncached, and checkpoints load, calibrate, train, are saved and load again."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessorPil

from modeling_dms import DMSConfig, DMSModelForImageTextToText
from modeling_dms.auto import CLASSES
from modeling_dms.observe.pixels import changed_pictures
from tests import families, tiny


ATTENTION = ("sdpa", "eager")
PADDING = ("left", "right")
WEIGHTS = torch.tensor([[0.2, 0.8], [0.7, 0.3]])
NEW = {
    "max_new_tokens": 3,
    "min_new_tokens": 3,
    "do_sample": False,
    "suppress_tokens": [families.IMAGE, families.VIDEO],
}
everywhere = pytest.mark.parametrize("family", families.FIELDS)
attention = pytest.mark.parametrize("attention", ATTENTION)


def text_of(batch):
    return batch["attention_mask"].bool() & (batch["input_ids"] != families.IMAGE)


def test_every_supported_family_is_tested():
    assert set(families.FIELDS) == set(CLASSES)


@everywhere
@attention
@pytest.mark.parametrize("padding", PADDING)
@torch.no_grad()
def test_uniform_weights_are_the_backbone(family, attention, padding):
    batch = families.inputs(family, padding)
    expected = families.vanilla(family, attention)(**batch).logits
    for scheduler in ("uniform", "rule"):
        out = families.shared(family, attention, scheduler=scheduler)(**batch)
        assert torch.equal(out.logits, expected)
        assert torch.equal(out.modality_weights, torch.full((2, 2), 0.5))


@everywhere
@attention
@pytest.mark.parametrize("padding", PADDING)
@torch.no_grad()
def test_weight_0_makes_the_text_independent_of_the_pixels(family, attention, padding):
    batch = families.inputs(family, padding)
    model, text = families.shared(family, attention), text_of(batch)
    blind = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    one, other = (model(**b, modality_weights=blind).logits for b in (batch, families.repainted(batch)))
    torch.testing.assert_close(one[text], other[text], rtol=0, atol=1e-5)
    one, other = (model(**b, modality_weights=WEIGHTS).logits for b in (batch, families.repainted(batch)))
    assert (one[text] - other[text]).abs().max() > 0.1


@everywhere
@attention
@torch.no_grad()
def test_a_batch_equals_its_rows(family, attention):
    batch = families.inputs(family, "right")
    model = families.shared(family, attention)
    whole = model(**batch, modality_weights=WEIGHTS).logits
    for index in range(2):
        alone = model(**families.row(family, batch, index), modality_weights=WEIGHTS[index : index + 1]).logits
        expected = whole[index, batch["attention_mask"][index].bool()]
        torch.testing.assert_close(alone[0], expected, rtol=0, atol=1e-5 * float(expected.abs().max().clamp_min(1)))


@everywhere
@torch.no_grad()
def test_statistics_of_a_batch_are_those_of_its_rows(family):
    batch, model = families.inputs(family), families.shared(family)

    def statistics(inputs):
        images = {name: inputs[name] for name in model._image_parameters if name in inputs}
        return model.get_image_features(**images, return_dict=True).statistics

    rows = torch.cat([statistics(families.row(family, batch, index)) for index in range(2)])
    torch.testing.assert_close(statistics(batch), rows, rtol=1e-4, atol=1e-4)


@everywhere
@attention
@torch.no_grad()
def test_cached_generation_is_uncached_generation(family, attention):
    batch = families.inputs(family)
    model, asked = families.shared(family, attention), {"return_dict_in_generate": True, "output_logits": True}
    if "token_type_ids" in batch and family == "paligemma":
        # without a cache PaliGemma takes generated tokens for a part of the prompt, vanilla or not
        batch.pop("token_type_ids")
    cached = model.generate(**batch, **NEW, **asked, modality_weights=WEIGHTS)
    uncached = model.generate(**batch, **NEW, **asked, modality_weights=WEIGHTS, use_cache=False)
    assert torch.equal(cached.modality_weights, WEIGHTS)
    for one, other in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    uniform = model.generate(**batch, **NEW, **asked)
    assert (uniform.logits[-1] - cached.logits[-1]).abs().max() > 0.01
    vanilla = families.vanilla(family, attention).generate(**batch, **NEW)
    assert torch.equal(uniform.sequences, vanilla)


@everywhere
@torch.no_grad()
def test_a_vanilla_checkpoint_loads_is_saved_and_loads_again(family, tmp_path):
    vanilla, batch = families.vanilla(family), families.inputs(family)
    vanilla.save_pretrained(tmp_path / "vanilla")
    model = DMSModelForImageTextToText.from_pretrained(tmp_path / "vanilla", dms_config=DMSConfig(**tiny._DMS))
    assert type(model) is CLASSES[family]
    expected = vanilla(**batch).logits
    torch.testing.assert_close(model.eval()(**batch).logits, expected, rtol=0, atol=1e-5)
    tiny.stir(model.dms)
    model.save_pretrained(tmp_path / "dms")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "dms").eval()
    assert type(again) is CLASSES[family]
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def clean(family, count, first=0):
    """Batches to calibrate on: one picture in many brightnesses, with a little noise."""
    batches = []
    for seed in range(first, first + count // 2):
        batch, picture = families.inputs(family, seed=seed), families.inputs(family)["pixel_values"]
        own = picture * (0.5 + 0.05 * (seed % 11)) + 0.05 * batch["pixel_values"]
        batches.append({**batch, "pixel_values": torch.where(picture == 0, picture, own)})
    return batches


@everywhere
@torch.no_grad()
def test_calibration_sees_damage(family):
    model = families.build(family)
    report = model.calibrate(clean(family, 160), show_progress=False)
    assert model.dms.calibration.is_calibrated
    assert report.samples == {"vision": 160, "text": 160}
    batch = clean(family, 2, first=1000)[0]
    out, broken = (model(**b).modality_signals.damage[:, 0] for b in (batch, families.repainted(batch)))
    assert (broken > out).all()
    assert (broken > 0).all()


def test_flattened_patches_are_put_together_as_the_processor_took_them_apart():
    picture = torch.arange(3 * 56 * 84.0).view(3, 56, 84)
    processor = Qwen2VLImageProcessorPil(do_resize=False, do_rescale=False, do_normalize=False, do_convert_rgb=False)
    made = processor([picture.numpy().astype("float32")], return_tensors="pt", input_data_format="channels_first")
    vision = families.shared("qwen2_5_vl").config.vision_config
    seen = []

    def change(pictures):
        seen.append(pictures)
        return pictures + 1

    out = changed_pictures(made["pixel_values"], change, made["image_grid_thw"], vision)
    assert torch.equal(seen[0], picture[None])
    assert torch.equal(out, made["pixel_values"] + 1)


@everywhere
def test_lora_and_the_scheduler_learn(family):
    model = families.build(family, scheduler="learned")
    target = r".*(language_model|text_model).*\.(q_proj|v_proj)"
    trained = get_peft_model(model, LoraConfig(r=2, target_modules=target, modules_to_save=["dms"]))
    batch = families.inputs(family, "right")
    labels = batch["input_ids"].masked_fill(~text_of(batch), -100)
    labels[:, :-3] = -100
    labels[0, -4:-1] = batch["input_ids"][0, -4:-1]
    labels = labels.masked_fill(~text_of(batch), -100)
    target_weights = torch.tensor([[0.1, 0.9], [0.9, 0.1]])
    out = trained(**batch, labels=labels, schedule_target=target_weights)
    assert set(out.dms_losses) == {"task", "mwc", "unimodal", "consistency", "schedule"}
    out.loss.backward()
    still = [name for name, p in trained.named_parameters() if "lora_B" in name and not p.grad.abs().sum()]
    assert not still
    assert any(p.grad is not None and p.grad.abs().sum() for n, p in trained.named_parameters() if ".dms." in n)


@everywhere
@torch.no_grad()
def test_shift_labels_stand_for_the_labels(family):
    """Where a sequence is divided over processes, `Trainer` shifts the labels before that and passes both."""
    model, batch = families.shared(family, scheduler="learned"), families.inputs(family)
    labels = batch["input_ids"].clone()
    labels[:, :-3] = -100
    expected = model(**batch, labels=labels).dms_losses
    out = model(**batch, labels=labels.flip(0, 1), shift_labels=F.pad(labels, (-1, 1), value=-100)).dms_losses
    for name in set(expected) - {"task"}:
        torch.testing.assert_close(out[name], expected[name])


@everywhere
def test_every_auto_class_of_the_vanilla_class_knows_it(family, tmp_path):
    model = families.shared(family)
    model.save_pretrained(tmp_path)
    vanilla = getattr(transformers, type(model).__name__.removeprefix("DMS"))
    autos = [getattr(transformers, name) for name in dir(transformers) if name.startswith("AutoModelFor")]
    of_vanilla = [getattr(auto, "_model_mapping", {}).get(model.config_class.__bases__[-1], None) for auto in autos]
    autos = [auto for auto, found in zip(autos, of_vanilla, strict=True) if found is vanilla]
    assert AutoModelForImageTextToText in autos
    for auto in autos:
        assert type(auto.from_pretrained(tmp_path)) is type(model)


@everywhere
@torch.no_grad()
def test_rows_without_an_image(family):
    """As the vanilla class answers them; the text has all the weight."""
    batch = families.inputs(family)
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == families.IMAGE, 7)
    text = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    if family == "instructblip":
        text |= {name: value for name, value in batch.items() if name.startswith("qformer")}
    out = families.shared(family)(**text)
    assert torch.equal(out.modality_weights, torch.tensor([[0.0, 1.0]] * 2))
    if family not in ("blip-2", "instructblip"):  # they cannot go without
        assert torch.equal(out.logits, families.vanilla(family)(**text).logits)
