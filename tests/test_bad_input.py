"""Bad input is refused by name before the language model runs; a missing modality is no error."""

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Blip2Processor, CLIPImageProcessorPil

from modeling_dms._compat import CACHE
from modeling_dms.training.data import PromptCollator, Sample
from modeling_dms.training.models.loading import load, room_for_prompts
from tests import tiny


@contextlib.contextmanager
def language_model_must_not_run(model):
    """Fails if any layer of the language model is called."""

    def fail(*_):
        raise AssertionError("the language model ran")

    stack = model.get_decoder() if model.config.is_encoder_decoder is False else model.language_model.get_encoder()
    handle = stack.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def refused(model, inputs, match, *, generate=True, **kwargs):
    """`forward` and `generate` both raise a `ValueError` before the language model runs."""
    with torch.no_grad(), language_model_must_not_run(model):
        with pytest.raises(ValueError, match=match):
            model(**inputs, **kwargs)
        if generate:
            prompt = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
            with pytest.raises(ValueError, match=match):
                model.generate(**prompt, **kwargs, max_new_tokens=2)


def without_one_placeholder(inputs):
    """As a truncation leaves it: the last row has lost an image token."""
    ids = inputs["input_ids"].clone()
    place = (ids[-1] == tiny.IMAGE).nonzero()[-1, 0]
    ids[-1, place] = 50
    return {**inputs, "input_ids": ids}


def moved_placeholder(inputs):
    """As many placeholders as before, but one of them stands in another row."""
    ids = without_one_placeholder(inputs)["input_ids"]
    ids[0, (ids[0] != tiny.IMAGE).nonzero()[-1, 0]] = tiny.IMAGE
    return {**inputs, "input_ids": ids}


# ---- images and placeholders


@pytest.mark.parametrize("scheduler", ["uniform", "rule", "learned"])
@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_image_count_differs_from_the_placeholders(backbone, scheduler):
    model, inputs = tiny.shared(backbone, scheduler=scheduler), tiny.prompts(backbone, "pairs")
    pixels = inputs["pixel_values"]
    one_more = torch.cat([pixels, pixels[:1]])
    refused(model, {**inputs, "pixel_values": pixels[:2]}, r"2 image\(s\) need 8 image tokens.*\[4, 4, 4\]")
    if backbone.startswith("blip2"):  # see below
        return
    refused(model, {**inputs, "pixel_values": one_more}, r"4 image\(s\) need 16 image tokens.*\[4, 4, 4\]")
    refused(model, without_one_placeholder(inputs), r"3 image\(s\) need 12 image tokens.*\[4, 4, 3\]")
    no_placeholder = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE, 50)
    refused(model, {**inputs, "input_ids": no_placeholder}, r"3 image\(s\) need 12 image tokens.*\[0, 0, 0\]")


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_images_that_no_prompt_holds(backbone, monkeypatch):
    """What the vanilla classes answer nevertheless is answered as they do: tokens of an image in two rows and, by
    BLIP-2, image tokens that are left over."""
    warned = []
    monkeypatch.setattr("modeling_dms.steered_mixin.logger.warning_once", warned.append)
    model, vanilla = tiny.shared(backbone, scheduler="learned", stirred=True), tiny.vanilla(backbone)
    inputs = tiny.prompts(backbone, "pairs")
    cases = [moved_placeholder(inputs)]
    if backbone.startswith("blip2"):
        no_placeholder = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE, 50)
        cases += [without_one_placeholder(inputs), {**inputs, "input_ids": no_placeholder}]
        cases.append({**inputs, "pixel_values": torch.cat([inputs["pixel_values"], inputs["pixel_values"][:1]])})
    for case in cases:
        with torch.no_grad():
            out, expected = model(**case), vanilla(**case)
        assert torch.equal(out.logits, expected.logits)
        assert out.modality_weights is None
        prompt = {name: value for name, value in case.items() if name != "decoder_input_ids"}
        generated, expected = (m.generate(**prompt, max_new_tokens=2) for m in (model, vanilla))
        assert torch.equal(generated, expected)
    assert len([message for message in warned if "nothing can be observed" in message]) == 2 * len(cases)


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_a_prompt_of_special_tokens_alone_is_text(backbone):
    inputs = tiny.prompts(backbone, "pairs")
    inputs["input_ids"] = torch.full_like(inputs["input_ids"], tiny.BOS)
    del inputs["pixel_values"]
    for scheduler in ("uniform", "rule", "learned"):
        with torch.no_grad():
            out = tiny.shared(backbone, scheduler=scheduler)(**inputs)
        assert torch.equal(out.modality_weights, torch.tensor([[0.0, 1.0]] * 3))
        assert out.logits.isfinite().all()


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_placeholders_without_any_image(backbone, monkeypatch):
    """Forgotten `pixel_values` leave the embedding of the placeholder itself in the prompt: the vanilla classes answer
    that, BLIP-2 apart."""
    warned = []
    monkeypatch.setattr("modeling_dms.steered_mixin.logger.warning_once", warned.append)
    inputs = tiny.prompts(backbone, "pairs")
    del inputs["pixel_values"]
    model = tiny.shared(backbone, scheduler="learned", stirred=True)
    if backbone.startswith("blip2"):
        refused(model, inputs, "no images.*pixel_values")
        return
    with torch.no_grad():
        out, expected = model(**inputs), tiny.vanilla(backbone)(**inputs)
    assert torch.equal(out.logits, expected.logits)
    assert len(warned) == 1


def test_several_images_a_row_must_come_in_whole_numbers():
    inputs = tiny.prompts("llava-llama", "mixed", "left")
    model = tiny.shared("llava-llama")
    refused(model, {**inputs, "pixel_values": inputs["pixel_values"][:-1]}, r"4 image\(s\) need 16 image tokens")
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("backbone", [*tiny.FAMILIES, "retrieval"])
def test_pixels_that_are_not_finite(backbone, value):
    inputs = tiny.prompts(backbone, "pairs")
    inputs["pixel_values"][1, 2, 3, 4] = value
    for scheduler in ("uniform", "rule"):
        model = tiny.shared(backbone, scheduler=scheduler)
        if backbone == "retrieval":
            with pytest.raises(ValueError, match=r"image\(s\) \[1\].*NaN or Inf"):
                model(**inputs)
        else:
            refused(model, inputs, r"image\(s\) \[1\].*NaN or Inf")
            weights = torch.full((3, 2), 0.5)
            refused(model, inputs, r"image\(s\) \[1\].*NaN or Inf", modality_weights=weights)
    if backbone != "retrieval":
        labelled = tiny.prompts(backbone, "pairs", labels=3) | {"pixel_values": inputs["pixel_values"]}
        with pytest.raises(ValueError, match="NaN or Inf"):
            model(**labelled)


@pytest.mark.parametrize("size", [4, 7, 12])
@pytest.mark.parametrize("backbone", ["blip2-opt", "blip2-t5", "retrieval"])
def test_images_of_another_size_than_the_vision_models(backbone, size):
    """The vanilla class gives a smaller image the first rows of positions."""
    model, inputs = tiny.shared(backbone), tiny.prompts(backbone)
    other = {**inputs, "pixel_values": torch.zeros(3, 3, size, size)}
    said = rf"{size} x {size} pixels, config.vision_config.image_size is 8.*interpolate_pos_encoding"
    if backbone == "retrieval":
        with pytest.raises(ValueError, match=said):
            model(**other)
        return
    refused(model, other, said)
    larger = {**inputs, "pixel_values": torch.zeros(3, 3, 16, 16), "interpolate_pos_encoding": True}
    with torch.no_grad():
        assert model(**larger).logits.isfinite().all()


def test_pixels_and_encoded_images_together():
    for backbone in tiny.FAMILIES:
        model, inputs = tiny.shared(backbone), tiny.prompts(backbone, "pairs")
        with torch.no_grad():
            encoded = {"image": model.get_image_features(inputs["pixel_values"], return_dict=True)}
            with pytest.raises(ValueError, match=r"pixel_values.*mm_encoder_outputs"):
                model(**inputs, mm_encoder_outputs=encoded)


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_images_that_another_model_has_encoded(backbone, monkeypatch):
    """Nothing is known of them, so they are answered as the vanilla class answers; with the caller's weights all is
    known."""
    warned = []
    monkeypatch.setattr("modeling_dms.steered_mixin.logger.warning_once", warned.append)
    model, inputs = tiny.shared(backbone, scheduler="learned", stirred=True), tiny.prompts(backbone, "pairs")
    pixels, weights, even = inputs.pop("pixel_values"), tiny.uneven(3), torch.full((3, 2), 0.5)
    with torch.no_grad():
        encoded = model.get_image_features(pixels, return_dict=True)
        encoded.statistics = None
        out = model(**inputs, mm_encoder_outputs={"image": encoded})
        assert torch.equal(out.logits, model(**inputs, pixel_values=pixels, modality_weights=even).logits)
        assert out.modality_weights is None
        assert len(warned) == 1
        out = model(**inputs, mm_encoder_outputs={"image": encoded}, modality_weights=weights)
        expected = model(**inputs, pixel_values=pixels, modality_weights=weights)
    assert torch.equal(out.logits, expected.logits)
    assert len(warned) == 1


# ---- missing modalities


@pytest.mark.parametrize("scheduler", ["uniform", "rule", "learned", "entropy", "energy"])
@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_all_modalities_absent(backbone, scheduler):
    model, inputs = tiny.shared(backbone, scheduler=scheduler), tiny.prompts(backbone, "pairs")
    mask = torch.tensor([[True, True], [False, False], [False, True]])
    refused(model, inputs, r"\[1\].*neither vision nor text", modality_mask=mask)
    refused(model, inputs, r"\[1\].*neither", modality_mask=mask, modality_weights=torch.full((3, 2), 0.5))
    ids = torch.zeros_like(inputs["input_ids"])
    refused(model, inputs, r"\[0, 1, 2\].*neither", modality_ids=ids)


@pytest.mark.parametrize("scheduler", ["uniform", "rule", "learned", "entropy", "energy"])
@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_missing_and_blank_modalities_are_answered(backbone, scheduler):
    inputs = tiny.prompts(backbone, "mixed", "left")
    inputs["pixel_values"][0] = 0
    model = tiny.shared(backbone, scheduler=scheduler, stirred=True)
    with torch.no_grad():
        out = model(**inputs)
    weights = out.modality_weights
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    assert torch.equal(weights[1], torch.tensor([0.0, 1.0]))
    assert torch.equal(weights[3], torch.tensor([1.0, 0.0]))
    keep = inputs["attention_mask"].bool()
    assert (out.logits[keep] if out.logits.shape[:2] == keep.shape else out.logits).isfinite().all()


# ---- what the caller says of modalities


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (torch.full((2, 2), 0.5), r"\(batch, modality\) \(3, 2\), got \(2, 2\)"),
        (torch.full((3, 3), 1 / 3), r"\(3, 2\), got \(3, 3\)"),
        (torch.full((3,), 0.5), r"\(3, 2\), got \(3,\)"),
        (torch.tensor([[0.5, 0.5], [0.7, 0.7], [0.5, 0.5]]), "sum to 1"),
        (torch.tensor([[0.5, 0.5], [1.5, -0.5], [0.5, 0.5]]), "at least 0"),
        (torch.tensor([[0.5, 0.5], [float("nan"), 0.5], [0.5, 0.5]]), "at least 0"),
        (torch.zeros(3, 2), "sum to 1"),
    ],
    ids=["rows", "modalities", "flat", "sum", "negative", "nan", "zero"],
)
@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_weights_that_are_none(backbone, weights, match):
    for scheduler in ("uniform", "rule"):
        refused(tiny.shared(backbone, scheduler=scheduler), tiny.prompts(backbone), match, modality_weights=weights)


def test_weights_of_a_retrieval_batch_that_are_none():
    model, inputs = tiny.shared("retrieval"), tiny.prompts("retrieval")
    for matching in (True, False):
        for weights in (torch.full((2, 2), 0.5), torch.full((3, 2), 0.7)):
            with pytest.raises(ValueError, match="modality_weights must be"):
                model(**inputs, use_image_text_matching_head=matching, modality_weights=weights)


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_modality_ids_of_another_shape(backbone):
    model, inputs = tiny.shared(backbone), tiny.prompts(backbone)
    ids = model.infer_modality_ids(inputs["input_ids"], inputs["attention_mask"])
    for wrong in (ids[:, :-1], ids[:-1], torch.cat([ids, ids], 1)):
        refused(model, inputs, "modality_ids must have the shape of the prompt", modality_ids=wrong)
        refused(model, inputs, "modality_ids must have", modality_ids=wrong, modality_weights=torch.full((3, 2), 0.5))


@pytest.mark.parametrize("wrong", [3, -1])
@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_modality_ids_of_no_modality(backbone, wrong):
    model, inputs = tiny.shared(backbone), tiny.prompts(backbone)
    ids = model.infer_modality_ids(inputs["input_ids"], inputs["attention_mask"])
    ids[1, -1] = wrong
    refused(model, inputs, "modality_ids", modality_ids=ids, modality_weights=tiny.uneven(3))
    refused(model, inputs, "modality_ids", modality_ids=ids)


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_modality_mask_of_another_shape(backbone):
    model, inputs = tiny.shared(backbone), tiny.prompts(backbone)
    for shape in ((3, 3), (2, 2), (3,), (3, 1), (1, 2)):
        mask = torch.ones(shape, dtype=torch.bool)
        refused(model, inputs, "modality_mask must be", modality_mask=mask)


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_schedule_target_of_another_shape(backbone):
    model, inputs = tiny.shared(backbone, scheduler="learned"), tiny.prompts(backbone, labels=3)
    for target in (torch.full((3, 3), 1 / 3), torch.full((2, 2), 0.5), torch.full((3, 1), 1.0)):
        with pytest.raises(ValueError, match="schedule_target"):
            model(**inputs, schedule_target=target)


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_embeddings_without_modality_ids(backbone, monkeypatch):
    """Nothing tells what they stand for: they are answered as the vanilla class answers."""
    warned = []
    monkeypatch.setattr("modeling_dms.steered_mixin.logger.warning_once", warned.append)
    inputs, even = tiny.prompts(backbone, "pairs"), torch.full((3, 2), 0.5)
    model = tiny.shared(backbone, scheduler="learned", stirred=True)
    with torch.no_grad():
        expected = model(**inputs, modality_weights=even)
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
        out = model(**inputs, inputs_embeds=embeddings)
    assert torch.equal(out.logits, expected.logits)
    assert len(warned) == 1


# ---- decoding by hand


@pytest.mark.parametrize("backbone", tiny.DECODER_ONLY)
def test_cached_decoding_goes_on_with_the_weights_of_its_prompt(backbone):
    inputs = tiny.prompts(backbone, "pairs", "left")
    step = torch.full((3, 1), 10)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(step)], 1)
    model = tiny.shared(backbone, scheduler="learned", stirred=True)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        cache = out.get(CACHE) or out.language_model_outputs[CACHE]
        on = model(input_ids=step, attention_mask=mask, **{CACHE: cache})
        whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], step], 1), "attention_mask": mask}
        ids = torch.nn.functional.pad(out.modality_ids, (0, 1))
        expected = model(**whole, modality_ids=ids, modality_weights=out.modality_weights)
    torch.testing.assert_close(on.logits[:, -1], expected.logits[:, -1], rtol=0, atol=1e-4)
    assert torch.equal(on.modality_weights, out.modality_weights)
    assert (out.modality_weights - 0.5).abs().max() > 1e-3


@pytest.mark.parametrize("backbone", tiny.LLAVA_SHAPED)
def test_cached_decoding_of_a_static_model_needs_no_weights(backbone):
    inputs = tiny.prompts(backbone, "pairs")
    logits = []
    for model in (tiny.shared(backbone, scheduler="uniform"), tiny.vanilla(backbone)):
        with torch.no_grad():
            cache = model(**inputs, use_cache=True)[CACHE]
            logits.append(model(input_ids=torch.full((3, 1), 10), **{CACHE: cache}).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("count", [-1, 0, 1])
def test_labels_of_an_encoder_decoder_are_no_positions_of_its_prompt(count):
    """Even if there are as many."""
    model, inputs = tiny.shared("blip2-t5"), tiny.prompts("blip2-t5", "pairs", "none", labels=3)
    inputs["labels"] = torch.full((len(inputs["input_ids"]), inputs["input_ids"].shape[1] + count), 5)
    ids = model.infer_modality_ids(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])

    assert torch.equal(ids, model.infer_modality_ids(inputs["input_ids"], inputs["attention_mask"]))
    assert (model(**inputs).modality_weights > 0).all()


# ---- from files and texts to answers

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"]
SIZES = [(1, 1), (3, 3), (64, 64), (1, 2_000), (2_000, 7)]
TEXTS = ["\0", "\U0001f600 \u05e9\u05dc\u05d5\u05dd e\u0301", "\ud800", "<image>", "</s><pad>", " ", "x" * 100_000]


@pytest.fixture(scope="module", params=["demo-llava", "demo-blip2", "internvl"])
def loaded(request, tmp_path_factory):
    """A model with every signal, and a collator."""
    name = request.param
    if name == "internvl":
        name = tiny.save_internvl(tmp_path_factory.mktemp(name))
    model, processor = load(name, {"scheduler": "entropy"})
    return model.eval(), PromptCollator(processor, max_length=min(200, room_for_prompts(model, processor, 2)))


def picture(mode, size):
    gradient = np.linspace(0, 255, size[0] * size[1]).reshape(size[::-1])
    if mode == "I;16":
        return Image.fromarray((257 * gradient.round()).astype(np.uint16))
    return Image.fromarray(gradient.astype(np.uint8)).convert("RGB" if mode == "YCbCr" else "L").convert(mode)


def assert_answered(model, collator, samples):
    """Finite, weights that sum to 1, and each sample as alone."""
    with torch.no_grad():
        inputs = collator(samples)
        out = model(**inputs)
        assert out.logits.isfinite().all()
        assert out.modality_weights.isfinite().all()
        torch.testing.assert_close(out.modality_weights.sum(1), torch.ones(len(samples)))
        for index in range(0, len(samples), 7):
            alone = model(**collator([samples[index]]))
            torch.testing.assert_close(out.modality_weights[index], alone.modality_weights[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(out.logits[index, -1], alone.logits[0, -1], atol=2e-3, rtol=1e-3)
        generated = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        torch.testing.assert_close(generated.modality_weights, out.modality_weights)
    return out


@pytest.mark.parametrize("size", SIZES)
def test_images_of_every_mode_and_shape_are_answered(loaded, size):
    samples = [Sample(mode, picture(mode, size), "a red box.", "what is it?") for mode in MODES]
    out = assert_answered(*loaded, samples)
    weights = out.modality_weights
    assert (weights > 0).all()
    # 16 bits are scaled, not clipped: as 8 bits of grey
    grey, deep = MODES.index("L"), MODES.index("I;16")
    torch.testing.assert_close(weights[deep], weights[grey], atol=0.02, rtol=0)


def test_texts_of_every_kind_are_answered(loaded):
    image = picture("RGB", (64, 64))
    samples = [Sample(f"context {i}", image, text, "what is it?") for i, text in enumerate(TEXTS)]
    samples += [Sample(f"question {i}", image, "a red box.", text) for i, text in enumerate(TEXTS[:-1])]
    weights = assert_answered(*loaded, samples).modality_weights
    blank = TEXTS.index(" ")
    assert torch.equal(weights[blank], torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"'huge'.*max_length=200"):
        loaded[1]([Sample("huge", image, "a red box.", TEXTS[-1])])


def test_modalities_missing_or_blank_within_a_batch(loaded):
    image, black = picture("RGB", (64, 64)), Image.new("RGB", (64, 64))
    cases = [
        (image, "a red box."),
        (None, "a red box."),
        (image, None),
        (black, "a red box."),
        (image, " \n"),
        (black, ""),
    ]
    samples = [Sample(str(i), shown, context, "what is it?") for i, (shown, context) in enumerate(cases)]
    model, collator = loaded
    weights = assert_answered(model, collator, samples).modality_weights
    assert torch.equal(weights == 0, torch.tensor([[i is None, not (c or "").strip()] for i, c in cases]))
    with torch.no_grad():
        for sample, row in zip(samples, weights, strict=True):
            torch.testing.assert_close(model(**collator([sample])).modality_weights[0], row, atol=1e-4, rtol=0)


def test_a_prompt_that_lost_image_tokens_to_truncation_is_refused(loaded):
    model, collator = loaded
    processor = collator.processor
    text = "question: what? answer:"
    if not isinstance(processor, Blip2Processor):  # which puts its image tokens in front itself
        text = processor.image_token + text
    given = {"images": picture("RGB", (64, 64)), "text": text, "return_tensors": "pt"}
    inputs = processor(**given)
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    cut = {name: value[:, :10] if name in ("input_ids", "attention_mask") else value for name, value in inputs.items()}
    if isinstance(processor, Blip2Processor):  # the vanilla class answers that
        with torch.no_grad():
            assert model(**cut).modality_weights is None
        return
    refused(model, cut, r"image\(s\) need \d+ image tokens.*truncation cut some")


def test_a_line_of_pixels_is_no_bomb_for_a_processor_that_crops():
    """It enlarges the shorter side: 112 x 6,720,000 pixels of this one."""
    _, processor = load("demo-llava")
    processor.image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 112}, crop_size={"height": 64, "width": 64}
    )
    batch = PromptCollator(processor)([Sample("line", Image.new("RGB", (1, 60_000)), "a red box.", "what?")])
    assert batch["pixel_values"].shape == (1, 3, 64, 64)
