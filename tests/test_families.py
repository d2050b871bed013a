"""What holds for every family: uniform weights are the backbone, weight 0 masks, a batch equals its rows, cached is
uncached, and checkpoints load, calibrate, train, are saved and load again."""

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessorPil

from modeling_dms import DMSConfig, DMSModelForImageTextToText
from modeling_dms._compat import CACHE
from modeling_dms.auto import CLASSES
from modeling_dms.observe.pictures import changed_pictures
from modeling_dms.training.data import PromptCollator, Sample
from modeling_dms.training.evaluate.methods import Scheduled
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import load, room_for_prompts
from tests import families, processors, tiny


WEIGHTS = torch.tensor([[0.2, 0.8], [0.7, 0.3]])
NEW = {
    "max_new_tokens": 3,
    "min_new_tokens": 3,
    "do_sample": False,
    "suppress_tokens": [families.IMAGE, families.VIDEO],
}
everywhere = pytest.mark.parametrize("family", families.FIELDS)
attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])
# each kernel and each side once; test_identities.py takes every pair
attention_and_padding = pytest.mark.parametrize(("attention", "padding"), [("sdpa", "left"), ("eager", "right")])


def text_of(batch):
    return batch["attention_mask"].bool() & (batch["input_ids"] != families.IMAGE)


def test_every_supported_family_is_tested():
    assert set(families.FIELDS) == set(CLASSES)


@everywhere
@attention_and_padding
@torch.no_grad()
def test_uniform_weights_are_the_backbone(family, attention, padding):
    batch = families.inputs(family, padding)
    expected = families.vanilla(family, attention)(**batch).logits
    for scheduler in ("uniform", "rule"):
        out = families.shared(family, attention, scheduler=scheduler)(**batch)
        assert torch.equal(out.logits, expected)
        assert torch.equal(out.modality_weights, torch.full((2, 2), 0.5))


@everywhere
@attention_and_padding
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


@pytest.mark.parametrize(
    "family", [name for name in CLASSES if name != "instructblip"]
)  # whose vanilla class refuses it
@torch.no_grad()
def test_a_row_without_image_leaves_the_images_of_others_alone(family):
    batch, model = families.inputs(family), families.shared(family)
    longer = families.with_a_text(family, batch)
    one, other = (model._observed_images(dict(b)) for b in (batch, longer))
    for name in ("tokens", "lengths", "statistics", "pixels"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-5, atol=1e-5)
    rows, moved = (i.rows(b["input_ids"] == families.IMAGE) for i, b in ((one, batch), (other, longer)))
    assert torch.equal(moved, rows * 2)
    logits = model(**longer).logits[::2]
    torch.testing.assert_close(logits, model(**batch).logits, rtol=0, atol=1e-4)
    # one image alone beside a text
    first = families.row(family, families.inputs(family, "right"), 0)
    with_text = {
        name: torch.cat([v, torch.ones_like(v)])
        for name, v in first.items()
        if name in ("input_ids", "attention_mask")
    }
    rest = {name: torch.cat([v, torch.zeros_like(v)]) if name.endswith("type_ids") else v for name, v in first.items()}
    if family in ("smolvlm", "idefics3"):
        rest["pixel_values"] = torch.cat([first["pixel_values"], torch.zeros_like(first["pixel_values"])])
    logits = model(**{**rest, **with_text}).logits[:1]
    torch.testing.assert_close(logits, model(**first).logits, rtol=0, atol=1e-4)


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
    """A batch to calibrate on: one picture in many brightnesses, with a little noise."""
    batches = []
    for seed in range(first, first + count // 2):
        batch, picture = families.inputs(family, seed=seed), families.inputs(family)["pixel_values"]
        own = picture * (0.5 + 0.05 * (seed % 11)) + 0.05 * batch["pixel_values"]
        batches.append({**batch, "pixel_values": torch.where(picture == 0, picture, own)})
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@everywhere
@torch.no_grad()
def test_calibration_sees_damage(family):
    model = families.build(family)
    # answers are asked for of the first batch alone
    report = model.calibrate([clean(family, 24), clean(family, 26, first=12)], show_progress=False)
    assert model.dms.calibration.is_calibrated
    assert report.samples == {"vision": 50, "text": 50}
    batch = clean(family, 2, first=1000)
    out, broken = (model(**b).modality_signals.p_clean[:, 0].log().neg() for b in (batch, families.repainted(batch)))
    assert (broken > out).all()
    assert (broken > 0).all()
    assert model.dms.calibration.reliability.count > 0
    assert ((model(**batch).reliability > 0) & (model(**batch).reliability < 1)).all()


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
        assert auto._model_mapping[type(model.config)] is type(model)
    assert type(autos[0].from_pretrained(tmp_path)) is type(model)


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


def picture(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("family", [family for family in families.FIELDS if family != "mistral3"])
@torch.no_grad()
def test_its_own_processor_makes_its_inputs(family):
    """Prompts with one and with two images, of different sizes."""
    mark, several = processors.placeholder(family), family not in ("blip-2", "instructblip")
    texts = [
        f"<s> {mark} context: a red box . question: what color ? answer:",
        f"<s> {mark} {mark if several else ''} question: what is on the left ? answer:",
    ]
    images = [[picture(8, 8, 1)], [picture(16, 8, 2), picture(20, 40, 3)][: 1 + several]]
    if family not in ("gemma3", "paligemma", "smolvlm", "idefics3"):  # which take a list for each prompt
        images = [image for of_row in images for image in of_row]
    batch = processors.processor(family)(images=images, text=texts, return_tensors="pt", padding=True)
    model = families.shared(family)
    ids = model.infer_modality_ids(batch["input_ids"], batch["attention_mask"])
    assert torch.stack([(ids == 1).any(1), (ids == 2).any(1)]).all()
    answered = model.generate(**batch, **NEW)
    assert torch.equal(answered, families.vanilla(family).generate(**batch, **NEW))
    asked = {"return_dict_in_generate": True, "output_logits": True}
    weighed = model.generate(**batch, **NEW, **asked, modality_weights=WEIGHTS)
    plain = model.generate(**batch, **NEW, **asked)
    assert torch.equal(weighed.modality_weights, WEIGHTS)
    assert (weighed.logits[-1] - plain.logits[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", [family for family in families.FIELDS if family != "mistral3"])
@torch.no_grad()
def test_the_collator_makes_its_inputs(family):
    """Of samples with and without an image or a context, and images of different size."""
    words = {"question": "what is the shape ?", "answers": ("red",)}
    samples = [
        Sample(id="both", image=picture(8, 8, 1), context="a red box .", **words),
        Sample(id="image", image=picture(20, 40, 2), context=None, **words),
        Sample(id="context", image=None, context="on the left", **words),
    ]
    collator = PromptCollator(processors.processor(family))
    assert collator.split_askable(samples) == (samples, {})
    batch = collator(samples)
    texts = collator.processor.tokenizer.batch_decode(
        [ids[where == 2] for ids, where in zip(batch["input_ids"], batch["modality_ids"], strict=True)]
    )
    assert texts == ["a red box .", "", "on the left"]
    model = families.shared(family)
    assert torch.equal(batch["modality_ids"] == 1, model._placeholders(batch["input_ids"]))
    out = model(**batch)
    assert torch.equal(out.modality_weights, torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]))
    again = model(**model.with_images_encoded(batch))
    assert torch.equal(again.logits, out.logits)
    learns = PromptCollator(collator.processor, with_labels=True)(samples)
    assert (learns["labels"] != -100).sum(1).tolist() == [2, 2, 2]
    assert model(**learns).loss.isfinite()


# The processors of the others bring one for videos, which is loaded with torchvision alone. Of
# LLaVA and BLIP-2 the demo's checkpoints are loaded, calibrated and asked in tests/training.
LOADED = ("llava_next", "instructblip", "gemma3", "idefics3", "paligemma")


@pytest.mark.parametrize("family", LOADED)
@torch.no_grad()
def test_a_checkpoint_is_loaded_calibrated_and_asked_as_dms_commands_do(family, tmp_path):
    families.vanilla(family).save_pretrained(tmp_path)
    processors.processor(family).save_pretrained(tmp_path)
    model, processor = load(tmp_path)
    assert type(model) is CLASSES[family]
    collator = PromptCollator(processor, max_length=room_for_prompts(model, processor, 2))
    words = ("a red box", "the shape is on the left", "what color is the box")
    samples = [
        Sample(id=str(i), image=picture(8, 8, i), context=words[i % 3], question="what ?", answers=("red",))
        for i in range(60)
    ]
    report = calibrate(model, collator, samples, 60, show_progress=False, level=2)
    assert report.samples == {"vision": 60, "text": 60}
    batch = collator(samples[:2])
    decision = Scheduled().decide(model, batch)
    tokens = Scheduled().generate(model, batch, decision, max_new_tokens=2, min_new_tokens=2)
    assert tokens.shape == (2, 2)


# The others' vanilla classes cannot be compiled as a whole either: what their images are cut into hangs on data. It
# takes long: half of the eight are compiled in `make test`, the others with the lowest versions, in `make test-lower`.
if CACHE == "cache":
    COMPILED = ("llava", "blip-2", "gemma3", "smolvlm")
else:
    COMPILED = ("internvl", "instructblip", "paligemma", "idefics3")


@pytest.mark.parametrize("family", COMPILED)
@torch.no_grad()
def test_the_whole_call_is_one_compiled_graph(family):
    torch._dynamo.reset()
    batch = families.inputs(family)
    model = families.shared(family, scheduler="learned", stirred=True)
    expected = model(**batch)  # once uncompiled: the library installs its hooks then
    out = torch.compile(model, backend="eager", fullgraph=True)(**batch)
    torch._dynamo.reset()
    read = batch["attention_mask"].bool()
    torch.testing.assert_close(out.logits[read], expected.logits[read], rtol=0, atol=1e-4)
    torch.testing.assert_close(out.modality_weights, expected.modality_weights, rtol=0, atol=1e-5)
    assert (expected.modality_weights - 0.5).abs().max() > 1e-3


@everywhere
@torch.no_grad()
def test_beams_share_the_weights_of_their_prompt(family):
    batch = families.inputs(family)
    model = families.shared(family, scheduler="learned", stirred=True)
    asked = {"num_beams": 2, "num_return_sequences": 2, "return_dict_in_generate": True}
    out = model.generate(**batch, **NEW, **asked)
    weights = model(**batch).modality_weights
    torch.testing.assert_close(out.modality_weights, weights, rtol=0, atol=1e-5)
    given = model.generate(**batch, **NEW, **asked, modality_weights=weights)
    assert torch.equal(out.sequences, given.sequences)
    assert len(out.sequences) == 4
