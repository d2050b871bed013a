"""Samples, images of every mode, corruptions and the collator."""

import dataclasses
import functools
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from modeling_dms.training.corruptions import IMAGE_CORRUPTIONS, TEXT_CORRUPTIONS, corrupt
from modeling_dms.training.data import PromptCollator, Sample, load_easy_vqa
from modeling_dms.training.data.collator import as_text
from modeling_dms.training.data.samples import image_key, to_rgb
from modeling_dms.training.models.loading import CHECKPOINTS
from tests import tiny


QUESTION = "what color is the shape?"
CONTEXT = "the picture shows a teal circle."


def image(seed=0, size=(64, 64)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def outcome(function, *given):
    """What it returns, or the message of its `ValueError`; any other error fails the test."""
    try:
        return function(*given), ""
    except ValueError as error:
        return None, str(error)


@functools.cache
def collator_of(backbone):
    if backbone == "internvl":
        return PromptCollator(tiny.internvl_processor(64))
    return PromptCollator(AutoProcessor.from_pretrained(CHECKPOINTS / f"demo-{backbone}"))


@pytest.fixture(params=["llava", "internvl", "blip2"])
def collator(request):
    return collator_of(request.param)


def test_easy_vqa_splits_share_no_image_and_contexts_answer():
    splits = {name: load_easy_vqa(name) for name in ("train", "validation", "test")}
    every = [sample for samples in splits.values() for sample in samples]
    assert len({sample.id for sample in every}) == len(every)
    images = [{sample.image for sample in samples} for samples in splits.values()]
    assert len(set.union(*images)) == sum(map(len, images))
    assert [len(i) for i in images] == [3_359, 183, 880]
    for sample in splits["test"]:
        if sample.answers[0] not in ("yes", "no"):
            assert sample.answers[0] in sample.context.rstrip(".").split()
    with pytest.raises(ValueError, match="validation"):
        load_easy_vqa("dev")


@pytest.mark.parametrize("task", ["caption", "retrieval"])
def test_easy_vqa_captions_say_what_the_questions_ask(task):
    asked = {}
    for sample in load_easy_vqa("test"):
        asked.setdefault(sample.image, []).append(sample)
    captions = load_easy_vqa("test", task)
    assert [sample.image for sample in captions] == list(asked)
    assert {sample.task for sample in captions} == {task}
    for sample in captions:
        caption = sample.answers[0].split()
        assert sample.context == asked[sample.image][0].context
        assert all(q.answers[0] in caption for q in asked[sample.image] if q.answers[0] not in ("yes", "no"))
    with pytest.raises(ValueError, match="caption"):
        load_easy_vqa("test", "ocr")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I", "I;16", "F", "YCbCr", "HSV"])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (200, 1)])
def test_every_mode_becomes_rgb(mode, size):
    source = Image.new("L", size, 200)
    if mode == "I;16":
        source = Image.fromarray(np.full(size[::-1], 200 * 257, dtype=np.uint16))
    else:
        source = source.convert("RGB").convert(mode) if mode in ("HSV", "YCbCr") else source.convert(mode)
    rgb = to_rgb(source)
    assert rgb.mode == "RGB"
    assert rgb.size == size
    if mode not in ("1", "P", "PA"):
        assert abs(int(np.asarray(rgb).mean()) - 200) <= 2


def test_transparency_lies_over_white():
    assert to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 255))).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_phone_photo_is_seen_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for data, size in ((exif.tobytes(), (20, 40)), (b"Exif\0\0broken", (40, 20)), (exif.tobytes()[:16], (40, 20))):
        Image.new("RGB", (40, 20)).save(tmp_path / "photo.jpg", exif=data)
        assert Sample("photo", tmp_path / "photo.jpg", None, "").load_image().size == size


@functools.cache
def encoded(kind="PNG"):
    buffer = io.BytesIO()
    image().save(buffer, kind)
    return buffer.getvalue()


def bomb(side=20_000):
    """A complete PNG of black pixels, small as a file: a bit each."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes((1 + side // 8) * side), 1)),
        (b"IEND", b""),
    ]
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "missing", "bomb"])
def test_a_broken_image_names_its_sample(tmp_path, damage):
    path = tmp_path / "picture.png"
    content = {"empty": b"", "text": b"not an image", "truncated": encoded()[:200], "bomb": bomb(), "missing": None}
    if content[damage] is not None:
        path.write_bytes(content[damage])
        assert path.stat().st_size < 1e6
        with pytest.raises(ValueError, match="sample-8"):
            Sample("sample-8", content[damage], None, QUESTION).load_image()
    with pytest.raises(ValueError, match=r"sample-7.*picture\.png"):
        Sample("sample-7", path, None, QUESTION).load_image()


Image.init()  # else it knows those that were used
FORMATS = [kind for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "QOI", "AVIF", "DDS") if kind in Image.SAVE]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(FORMATS),
    kept=st.none() | st.integers(0, 400),
    changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=8),
)
def test_a_damaged_file_is_an_image_or_names_its_sample(kind, kept, changes):
    content = bytearray(encoded(kind)[:kept])
    for place, value in changes:
        if place < len(content):
            content[place] = value
    found, error = outcome(Sample("sample-7", bytes(content), None, QUESTION).load_image)
    assert "sample-7" in error if found is None else found.mode == "RGB"


def test_of_an_endless_image_the_middle_is_seen():
    """A processor that enlarges the shorter side to 336 makes 20 GB of the last one."""
    for size, expected in (((300, 3), (300, 3)), ((1_000, 3), (300, 3)), ((1, 60_000), (1, 100))):
        wide = Image.new("RGB", size, "red")
        wide.paste("blue", (size[0] // 2 - 1, size[1] // 2 - 1, size[0] // 2 + 1, size[1] // 2 + 1))
        found = Sample("s", wide, None, QUESTION).load_image()
        assert found.size == expected
        assert found.getpixel((found.width // 2, found.height // 2)) == (0, 0, 255)


@pytest.mark.parametrize("name", IMAGE_CORRUPTIONS)
def test_image_corruptions_are_reproducible_and_keep_the_size(name):
    sample = Sample("a", image(size=(40, 30)), CONTEXT, QUESTION)
    for severity in (1, 3, 5):
        once, again = (corrupt(sample, f"image:{name}", severity).image for _ in range(2))
        assert once.size == (40, 30)
        assert once.mode == "RGB"
        assert np.array_equal(np.asarray(once), np.asarray(again))
        assert not np.array_equal(np.asarray(once), np.asarray(sample.image))
    other = corrupt(sample.replace(id="b"), f"image:{name}", 3).image
    deterministic = {"black", "blur", "invert", "dark", "low_contrast", "pixelate", "solarize", "channel_swap"}
    deterministic |= {"overexposed", "jpeg", "posterize"}
    same = np.array_equal(np.asarray(other), np.asarray(corrupt(sample, f"image:{name}", 3).image))
    assert same == (name in deterministic)


@pytest.mark.parametrize("name", TEXT_CORRUPTIONS)
def test_text_corruptions_are_reproducible_and_differ_by_sample(name):
    samples = [Sample(str(i), None, CONTEXT, QUESTION) for i in range(8)]
    texts = [corrupt(sample, f"text:{name}", 4).context for sample in samples]
    assert texts == [corrupt(sample, f"text:{name}", 4).context for sample in samples]
    assert len(set(texts)) > 1
    assert all(text.strip() for text in texts)
    assert sum(text != CONTEXT for text in texts) >= 7
    assert corrupt(samples[0].replace(context="  "), f"text:{name}").context == "  "
    assert corrupt(samples[0].replace(context="ключ ключ ключ 🔑"), f"text:{name}", 5).context.strip()


def test_missing_and_mismatch():
    sample, other = Sample("a", image(0), CONTEXT, QUESTION), Sample("b", image(1), "a red box.", QUESTION)
    assert corrupt(sample, "image:missing").image is None
    assert corrupt(sample, "text:missing").context is None
    assert corrupt(sample, "image:mismatch", other=other).image is other.image
    assert corrupt(sample, "text:mismatch", other=other).context == other.context
    for arguments in (("image:mismatch",), ("image:nonsense",), ("video:blur",), ("image:blur", 6)):
        with pytest.raises(ValueError, match=r"other|unknown|severity"):
            corrupt(sample, *arguments)


def test_collator_marks_image_context_and_nothing_else(collator):
    sample = Sample("a", image(), CONTEXT, QUESTION, ("teal",))
    batch = collator([sample])
    ids, kinds = batch["input_ids"][0], batch["modality_ids"][0]
    tokenizer = collator.processor.tokenizer
    assert tokenizer.decode(ids[kinds == 2]).strip() == CONTEXT
    assert set(ids[kinds == 1].tolist()) == {tokenizer.convert_tokens_to_ids(str(collator.processor.image_token))}
    assert QUESTION in tokenizer.decode(ids[kinds == 0])


def test_collator_pads_and_mixes_missing_modalities(collator):
    samples = [
        Sample("a", image(0), CONTEXT, QUESTION, ("teal",)),
        Sample("b", None, "a much longer passage about a red triangle in the picture.", QUESTION, ("red",)),
        Sample("c", image(1), None, QUESTION, ("blue",)),
        Sample("d", image(2), "", "", ("blue",)),
        Sample("e", image(2), "日本語 🔑 " * 30, "é?" * 50, ("blue",)),
    ]
    batch = collator(samples)
    assert len(batch["pixel_values"]) == 4
    assert (batch["modality_ids"] == 2).any(1).tolist() == [True, True, False, False, True]
    assert (batch["modality_ids"] == 1).any(1).tolist() == [True, False, True, True, True]
    assert batch["attention_mask"][:, -1].all()  # padded on the left
    single = collator(samples[:1])
    length = single["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][0, -length:], single["input_ids"][0])


def test_collator_labels_the_answer_alone(collator):
    sample = Sample("a", image(), CONTEXT, QUESTION, ("teal",))
    batch = PromptCollator(collator.processor, with_labels=True)([sample, sample.replace(context="teal")])
    tokenizer = collator.processor.tokenizer
    for ids, labels, kinds in zip(batch["input_ids"], batch["labels"], batch["modality_ids"], strict=True):
        marked = labels != -100
        assert tokenizer.decode(labels[marked]) == " teal</s>"
        assert torch.equal(ids[marked], labels[marked])
        assert (kinds[marked] == 0).all()
    with pytest.raises(ValueError, match="'x'"):
        PromptCollator(collator.processor, with_labels=True)([Sample("x", None, CONTEXT, QUESTION)])


@pytest.mark.parametrize("with_labels", [False, True])
def test_max_length_cuts_the_end_of_the_context_alone(collator, with_labels):
    sample = Sample("long", image(), " ".join(["the picture shows a teal circle."] * 5), QUESTION, ("teal",))
    short = Sample("short", image(1), "a circle.", QUESTION, ("teal",))
    whole = PromptCollator(collator.processor, with_labels)([sample])
    length = whole["input_ids"].shape[1] - 13
    cut = PromptCollator(collator.processor, with_labels, max_length=length)([sample, short])
    assert cut["input_ids"].shape[1] == length
    ids, modality = whole["input_ids"][0], whole["modality_ids"][0]
    gone = (modality == 2).nonzero()[-13:, 0]
    keep = torch.ones_like(ids, dtype=torch.bool).index_fill(0, gone, False)
    for name in whole:
        if name != "pixel_values":
            assert torch.equal(cut[name][0], whole[name][0][keep]), name
    assert int((modality == 2).sum()) > 14  # some of the context is left
    # a row that is short enough stays as it was
    alone = PromptCollator(collator.processor, with_labels)([short])
    for name in ("input_ids", "modality_ids"):
        assert torch.equal(cut[name][1][cut["attention_mask"][1].bool()], alone[name][0])


@pytest.mark.parametrize("with_labels", [False, True])
def test_max_length_never_cuts_image_question_or_answer(collator, with_labels):
    sample = Sample("long-one", image(), CONTEXT, QUESTION, ("teal",))
    whole = PromptCollator(collator.processor, with_labels)([sample])
    bare = int((whole["modality_ids"] != 2).sum())
    least = PromptCollator(collator.processor, with_labels, max_length=bare)([sample])
    assert least["input_ids"].shape[1] == bare
    assert not (least["modality_ids"] == 2).any()
    assert int((least["modality_ids"] == 1).sum()) == int((whole["modality_ids"] == 1).sum())
    with pytest.raises(ValueError, match=rf"'long-one' has .*max_length={bare - 1}"):
        PromptCollator(collator.processor, with_labels, max_length=bare - 1)([sample])
    contextless = sample.replace(context=None)
    length = PromptCollator(collator.processor, with_labels)([contextless])["input_ids"].shape[1]
    with pytest.raises(ValueError, match=r"'long-one'.* 0 of them context"):
        PromptCollator(collator.processor, with_labels, max_length=length - 1)([contextless])


@pytest.mark.parametrize("with_labels", [False, True])
def test_what_a_call_would_refuse_is_known_before(collator, with_labels):
    """Also of samples whose image takes more tokens than another's, as InternVL's tiles do."""
    texts = ("what?", QUESTION, "what? " * 4, "<image>" * 3)
    sizes = ((64, 64), (200, 64), (64, 200))
    asked = [
        Sample(f"{size} {question} {context}", image(size=size), context, question, ("teal",))
        for size in sizes
        for question in texts
        for context in (None, CONTEXT * 9)
    ]
    asked += [
        Sample("no image", None, CONTEXT, QUESTION, ("teal",)),
        Sample("nothing", None, " ", QUESTION, ("teal",)),
    ]
    asked.append(Sample("no answer", image(), CONTEXT, QUESTION))
    bare = PromptCollator(collator.processor, with_labels)([asked[2]])["input_ids"].shape[1]
    for max_length in (None, bare - 1, bare, bare + 1):
        strict = PromptCollator(collator.processor, with_labels, max_length)
        good, failed = strict.split_askable(asked)
        errors = {sample.id: outcome(strict, [sample])[1] for sample in asked}
        assert [sample.id for sample in good] == [name for name, error in errors.items() if not error]
        assert list(failed) == [name for name, error in errors.items() if error]
        assert all(repr(name) in error for name, error in failed.items())
        assert max_length is None or 0 < len(good) < len(asked) - 2


def test_what_the_trainer_reads(collator, tmp_path):
    path = tmp_path / "drawn.png"
    image().save(path)
    samples = [
        Sample("file", path, CONTEXT, QUESTION, ("teal",)),
        Sample("damaged-file", path, CONTEXT, QUESTION, ("teal",), damage=(0.6, 0.0)),
        Sample("no-image", None, CONTEXT, QUESTION, ("teal",), damage=(1.0, 0.0)),
        Sample("in-memory", image(), CONTEXT, QUESTION, ("teal",), damage=(0.0, 1.0)),
        Sample("same-file", path, None, QUESTION, ("teal",), damage=(0.0, 1.0)),
        Sample("its-bytes", path.read_bytes(), None, QUESTION, ("teal",)),
    ]
    batch = PromptCollator(collator.processor, True, schedule_temperature=0.5, with_ids=True)(samples)
    assert batch["sample_ids"] == [sample.id for sample in samples]
    # one a picture, not one a sample
    file, in_memory = (f"{image_key(shown)}#0" for shown in (path, image()))
    assert batch["image_keys"] == [file, None, in_memory, file, file]
    assert len(batch["pixel_values"]) == 5
    target = batch["schedule_target"]
    assert target.dtype == torch.float32
    torch.testing.assert_close(target.sum(1), torch.ones(6))
    assert torch.equal(target[0], torch.tensor([0.5, 0.5]))
    odds = [np.exp(0.0), np.exp(-0.6 / 0.5), np.exp(-1 / 0.5), np.exp(1 / 0.5), np.exp(1 / 0.5), np.exp(0.0)]
    torch.testing.assert_close(target[:, 0] / target[:, 1], torch.tensor(odds, dtype=torch.float32))
    # a model takes tensors alone
    plain = PromptCollator(collator.processor, True, schedule_temperature=0.5)(samples)
    assert set(batch) - set(plain) == {"sample_ids", "image_keys"}
    assert all(isinstance(value, torch.Tensor) for value in plain.values())
    assert set(plain) - set(PromptCollator(collator.processor, True)(samples)) == {"schedule_target"}


def test_tiles_of_a_large_image():
    """InternVL's processor cuts an image into tiles: each has placeholders, pixels and a key of its own."""
    processor = tiny.internvl_processor(32)
    samples = [
        Sample("wide", image(size=(64, 32)), CONTEXT, QUESTION),
        Sample("small", image(1, (32, 32)), CONTEXT, ""),
    ]
    batch = PromptCollator(processor, with_ids=True)(samples)
    tiles = (batch["modality_ids"] == 1).sum(1) // tiny.IMAGE_TOKENS
    assert tiles.tolist() == [3, 1]  # two and the whole image, scaled down
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
    assert len(batch["image_keys"]) == 4
    expected = processor(images=[s.image for s in samples], text=[processor.image_token] * 2)["pixel_values"]
    assert torch.equal(batch["pixel_values"], torch.tensor(np.stack(expected)))


# ---- texts that nobody expects

SPECIAL = ["<image>", "<IMG_CONTEXT>", "<img>", "</img>", "<video>", "<s>", "</s>", "<pad>"]
UNUSUAL = [
    "\0",
    "\ud83d",
    "\udc00\ud83d",
    "\U0001f600",
    "\u05e9\u05dc\u05d5\u05dd",
    "e\u0301",
    "\u202e",
    "\u200b",
    "\n",
]


def assert_aligned(collator, batch, images):
    """As many image tokens as the images need, all of them marked as such, and nothing else is."""
    tokenizer = collator.processor.tokenizer
    marked = batch["input_ids"] == tokenizer.convert_tokens_to_ids(str(collator.processor.image_token))
    assert torch.equal(marked, batch["modality_ids"] == 1)
    alone = collator([Sample("alone", image(), CONTEXT, QUESTION)])
    assert int(marked.sum()) == images * int((alone["modality_ids"] == 1).sum())
    special = torch.isin(batch["input_ids"], torch.tensor(tokenizer.all_special_ids))
    assert not (special & (batch["modality_ids"] == 2)).any()
    assert len(batch.get("pixel_values", [])) == images * len(alone["pixel_values"])


@pytest.mark.parametrize("typed", SPECIAL)
def test_typed_special_tokens_are_text(collator, typed):
    """A placeholder in a sample's text is no image, an end token ends nothing."""
    labelled = dataclasses.replace(collator, with_labels=True)
    samples = [
        Sample("a", image(), f"a {typed} box.", QUESTION, ("box",)),
        Sample("b", image(1), CONTEXT, f"{typed}what {typed * 3}?", ("box",)),
        Sample("c", None, typed * 16, typed, (f"{typed} box",)),
        Sample("d", image(2), CONTEXT, QUESTION, ("box",)),
    ]
    for make in (collator, labelled):
        batch = make(samples)
        assert_aligned(collator, batch, 3)
        alone = make(samples[3:])
        length = alone["input_ids"].shape[1]
        place = slice(None, length) if make is labelled else slice(-length, None)
        assert torch.equal(batch["input_ids"][3, place], alone["input_ids"][0])
    text = collator.processor.tokenizer.decode(collator(samples[:1])["input_ids"][0])
    assert as_text(collator.processor, f"a {typed} box.") in text
    ends = labelled(samples)["labels"] == collator.processor.tokenizer.eos_token_id
    assert ends.sum(1).tolist() == [1, 1, 1, 1]


TEXTS = st.lists(st.sampled_from([*SPECIAL, *UNUSUAL, "context: ", "answer:"]) | st.text(max_size=6), max_size=6)
IMAGES = st.none() | st.tuples(
    st.sampled_from(["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"]),
    st.sampled_from([(1, 1), (3, 3), (1, 300), (64, 64), (130, 2)]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(which=st.sampled_from(["llava", "internvl", "blip2"]), context=TEXTS, question=TEXTS, picture=IMAGES)
def test_any_text_and_image_are_aligned_or_refused_by_name(which, context, question, picture):
    collator = collator_of(which)
    shown = None if picture is None else Image.new(picture[0], picture[1])
    sample = Sample("sample-7", shown, "".join(context), "".join(question))
    plain = Sample("plain", None, CONTEXT, QUESTION)
    batch, error = outcome(collator, [sample, plain])
    if batch is None:
        assert "sample-7" in error
        assert shown is None
        return
    tokenizer = collator.processor.tokenizer
    placeholders = batch["input_ids"] == tokenizer.convert_tokens_to_ids(str(collator.processor.image_token))
    assert torch.equal(placeholders, batch["modality_ids"] == 1)
    assert (shown is not None) == bool(placeholders[0].any())
    assert not placeholders[1].any()
    read = tokenizer.decode(batch["input_ids"][0][batch["modality_ids"][0] == 2]).split()
    assert "".join(read) == "".join(as_text(collator.processor, sample.context).split())


def test_halves_of_surrogate_pairs_are_replaced_in_every_text(collator):
    whole, half = "\ud83d\ude00", "\ud83d"
    sample = Sample(half, None, f"{whole} {half}", half, (half, "b"))
    assert sample == Sample("\ufffd", None, "\U0001f600 \ufffd", "\ufffd", ("\ufffd", "b"))
    assert collator([sample])["input_ids"].shape[0] == 1


def test_a_huge_question_is_named(collator):
    sample = Sample("sample-7", image(), CONTEXT, "x" * 100_000)
    assert collator([sample])["input_ids"].shape[1] > 1_000
    with pytest.raises(ValueError, match=r"sample-7.*max_length=300"):
        dataclasses.replace(collator, max_length=300)([sample])
    cut = dataclasses.replace(collator, max_length=300)([sample.replace(context="x" * 100_000, question=QUESTION)])
    assert cut["input_ids"].shape[1] == 300


def test_a_sample_of_nothing_is_named(collator):
    for context in (None, "", " \n"):
        with pytest.raises(ValueError, match=r"sample-7.*neither an image nor a context"):
            collator([Sample("a", None, CONTEXT, QUESTION), Sample("sample-7", None, context, QUESTION)])
