"""Processors as published and fine-tuned checkpoints have them: made complete, made fit for batches, or refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, ResNetConfig
from typer.testing import CliRunner

from modeling_dms.training.cli import app
from modeling_dms.training.data import PromptCollator, Sample, load_easy_vqa
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.finetune.arguments import read_arguments
from modeling_dms.training.finetune.train import run_training
from modeling_dms.training.models.loading import CHECKPOINTS, load
from modeling_dms.training.models.processors import load_processor
from modeling_dms.training.publish.release import merge
from tests import tiny


DEMOS = ("demo-llava", "demo-blip2")
ABSENT = object()


def change(file, **fields):
    """Sets or removes fields of a JSON file."""
    written = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in written.items() if value is not ABSENT}))


@pytest.fixture
def checkpoint(tmp_path):
    """Copies a checkpoint that ships, with other fields in its files."""

    def copy(name, tokenizer=None, processor=None, config=None):
        folder = shutil.copytree(CHECKPOINTS / name, tmp_path / name)
        files = {"tokenizer_config.json": tokenizer, "processor_config.json": processor, "config.json": config}
        for file, fields in files.items():
            change(folder / file, **(fields or {}))
        return folder

    return copy


def encoder_decoder(folder):
    """A small BLIP-2 with T5, with its processor."""
    _, processor = load("demo-blip2")
    config = tiny.config("blip2-t5")
    config.text_config.vocab_size = len(processor.tokenizer)
    config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    model = tiny.model_class("blip2-t5")(config)
    model.save_pretrained(folder)
    processor.image_processor.size = {"height": 8, "width": 8}
    processor.num_query_tokens = tiny.IMAGE_TOKENS
    processor.tokenizer.padding_side = "right"
    processor.save_pretrained(folder)
    return folder


def told(*arguments):
    """The one line in which a command says what is wrong."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def saved_side(folder):
    return AutoProcessor.from_pretrained(folder).tokenizer.padding_side


# ---- padding


@pytest.mark.parametrize("name", DEMOS)
def test_shipped_processors_pad_decoder_only_models_on_the_left(name):
    assert saved_side(CHECKPOINTS / name) == "left"


@torch.no_grad()
@pytest.mark.parametrize("name", [*DEMOS, "internvl"])
def test_a_batch_of_the_processors_is_answered_as_its_rows(name, checkpoint, tmp_path):
    folder = tiny.save_internvl(tmp_path) if name == "internvl" else checkpoint(name, {"padding_side": "right"})
    model, processor = load(folder)
    token = "" if name == "demo-blip2" else processor.image_token
    samples = one_per_image(load_easy_vqa("test"), 8)
    samples = [sample.replace(context=sample.context * (1 + i % 3)) for i, sample in enumerate(samples)]

    def answers(some):
        text = [f"{token}context: {s.context} question: {s.question} answer:" for s in some]
        inputs = processor(images=[s.load_image() for s in some], text=text, padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        return processor.tokenizer.batch_decode(out[:, -2:])

    assert answers(samples) == [answers([sample])[0] for sample in samples]


def test_an_encoder_decoder_pads_as_its_processor_says(tmp_path):
    _, processor = load(encoder_decoder(tmp_path / "t5"))
    assert processor.tokenizer.padding_side == "right"


@pytest.mark.usefixtures("first_level_alone")
def test_what_commands_write_pads_on_the_left(checkpoint, tmp_path):
    folder, data = checkpoint("demo-llava", {"padding_side": "right"}), tiny.table(tmp_path / "data", 60)
    calibrated = tmp_path / "calibrated"
    command = ["calibrate", "--model", folder, "--data", data, "--out", calibrated, "--samples", "50"]
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 0, done.output
    assert saved_side(calibrated) == "left"
    run = tmp_path / "run"
    command = f"--model {folder} --data {data} --stage backbone --lora_rank 2 --calibration_samples 0 --max_steps 1 "
    command += "--save_steps 1 --use_cpu true --report_to none --disable_tqdm true --schedule_target none "
    run_training(read_arguments(None, [*command.split(), "--output_dir", str(run)]))
    for written in (run / "final", run / "checkpoint-1", merge(run / "final", tmp_path / "merged")):
        assert AutoTokenizer.from_pretrained(written).padding_side == "left", written


# ---- what is left out

LEFT_OUT = {
    "pad": ("demo-llava", {"tokenizer": {"pad_token": ABSENT}}),
    "pad-blip2": ("demo-blip2", {"tokenizer": {"pad_token": ABSENT}}),
    "patch": ("demo-llava", {"processor": {"patch_size": ABSENT}}),
    "no-patch": ("demo-llava", {"processor": {"patch_size": None}}),
    "strategy": ("demo-llava", {"processor": {"vision_feature_select_strategy": ABSENT}}),
    "additional": ("demo-llava", {"processor": {"num_additional_image_tokens": ABSENT}}),
    "all": (
        "demo-llava",
        {
            "processor": dict.fromkeys(
                ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"), ABSENT
            )
        },
    ),
    "queries": ("demo-blip2", {"processor": {"num_query_tokens": ABSENT}}),
}


@torch.no_grad()
@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_a_processor_leaves_out_is_filled_in(case, checkpoint):
    name, fields = LEFT_OUT[case]
    samples = one_per_image(load_easy_vqa("test"), 3)
    samples[0] = samples[0].replace(context=None)
    found, expected = (PromptCollator(load(each)[1])(samples) for each in (checkpoint(name, **fields), name))
    kept = expected["attention_mask"].bool()  # what pads makes no difference
    assert torch.equal(found["input_ids"][kept], expected["input_ids"][kept])
    for field in ("attention_mask", "modality_ids", "pixel_values"):
        assert torch.equal(found[field], expected[field])


def test_a_padding_token_without_an_embedding_is_none(checkpoint):
    folder = checkpoint("demo-llava")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    model, processor = load(folder)
    assert processor.tokenizer.pad_token == "</s>"
    samples = [Sample("long", None, "a red box and a blue one.", "what?"), Sample("short", None, "a box.", "what?")]
    assert model(**PromptCollator(processor)(samples)).logits.isfinite().all()


def test_a_saved_processor_is_complete(checkpoint, tmp_path):
    folder = checkpoint("demo-llava", {"pad_token": ABSENT}, {"patch_size": ABSENT})
    load(folder)[1].save_pretrained(tmp_path / "saved")
    saved = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert (saved.tokenizer.pad_token, saved.patch_size) == ("</s>", 8)


def test_an_internvl_processor_without_its_number_of_image_tokens(tmp_path):
    folder = tiny.save_internvl(tmp_path)
    change(folder / "processor_config.json", image_seq_length=ABSENT)
    assert load(folder)[1].image_seq_length == tiny.IMAGE_TOKENS


# ---- what nobody can fill in


def without_any_end(folder):
    change(folder / "tokenizer_config.json", pad_token=ABSENT, eos_token=ABSENT)
    return "lacks tokenizer.pad_token, and tokenizer.eos_token"


def without_image_token(folder):
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<image>", "<picture>"))
    change(folder / "tokenizer_config.json", image_token=ABSENT)
    return "is 3 in its model's configuration, but its tokenizer reads '<image>'"


def another_image_token(folder):
    change(folder / "config.json", image_token_index=5)
    return "is 5 in its model's configuration, but its tokenizer reads '<image>', which its processor writes, as [3]"


def without_image_processor(folder):
    (folder / "processor_config.json").unlink()
    return "preprocessor_config.json"


def no_object(folder):
    (folder / "processor_config.json").write_text("[]")
    return "cannot be read"


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    return "cannot be read"


def smaller_images(folder):
    images = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    images = {**images, "size": {"height": 32, "width": 32}}
    change(folder / "processor_config.json", image_processor=images)
    return "size"


def other_patches(folder):
    change(folder / "processor_config.json", patch_size=16, num_query_tokens=8)
    return "the processor counts otherwise than the model"


UNFIT = [
    without_any_end,
    without_image_token,
    another_image_token,
    without_image_processor,
    no_object,
    broken_tokenizer,
    smaller_images,
    other_patches,
]


@pytest.mark.parametrize("damage", UNFIT, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", DEMOS)
def test_an_unfit_processor_is_told_in_one_line(damage, name, checkpoint, tmp_path):
    folder = checkpoint(name)
    expected = damage(folder)
    data = tiny.table(tmp_path / "data", 60)
    image = data / "0.png"
    assert expected in told("predict", "--model", folder, "--question", "what?", "--image", image)
    calibrated = ("calibrate", "--model", folder, "--data", data, "--out", tmp_path / "out", "--samples", 50)
    assert expected in told(*calibrated)


@pytest.mark.parametrize("kind", ["tokenizer", "image processor"])
def test_half_a_processor_names_its_other_half(kind, checkpoint, monkeypatch):
    """Where nothing says the class of a checkpoint's processor, transformers gives a part of it."""
    folder = checkpoint("demo-llava")
    processor = AutoProcessor.from_pretrained(folder)
    half = processor.tokenizer if kind == "image processor" else processor.image_processor
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: half)
    assert f"and no {kind} beside it" in told("predict", "--model", folder, "--question", "what?", "--context", "a")


def test_patches_that_nothing_tells_the_size_of(checkpoint):
    folder = checkpoint("demo-llava", processor={"patch_size": ABSENT})
    model, _ = load(folder)
    model.config.vision_config = ResNetConfig()
    with pytest.raises(ValueError, match=r"demo-llava lacks processor.patch_size, and its model's configuration"):
        load_processor(folder, model.config)


def test_training_needs_an_end_token(checkpoint, tmp_path):
    folder = checkpoint("demo-llava", {"eos_token": ABSENT})
    run = ("--data", tiny.table(tmp_path / "data"), "--output_dir", tmp_path / "run", "--use_cpu", "true")
    assert "tokenizer.eos_token" in told("train", "--model", folder, *run)
