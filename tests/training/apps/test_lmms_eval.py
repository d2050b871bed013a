"""The lmms-eval plugin, run by that harness's own evaluator on a small local task; offline.

lmms-eval is not in the extra `dev`. In an environment of its own:

    pip install -c constraints.txt -e ".[lmms-eval]" pytest
    pip uninstall -y torchvision  # beside a CPU build of torch alone, where it breaks the imports of transformers
    pytest tests/training/apps/test_lmms_eval.py
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoConfig


pytest.importorskip("lmms_eval", reason="needs the extra lmms-eval")

import datasets
from lmms_eval import evaluator
from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from loguru import logger

from modeling_dms import DMSBlip2ForConditionalGeneration
from modeling_dms.training.apps.lmms_eval_plugin import DMS
from modeling_dms.training.corruptions import corrupt
from modeling_dms.training.data import PromptCollator, load_easy_vqa
from modeling_dms.training.data.easy_vqa import COLORS, SHAPES
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.models.loading import CHECKPOINTS, load
from tests import tiny


BACKBONES = ("llava", "blip2")
CHOICES = ["yes", "no", *SHAPES, *COLORS]
PROMPT = "{} answer:"  # the texts of the task hold context and question

UTILS = """
def images(doc):
    return [doc["image"]] if doc["image"] is not None else []


def score(doc, results):
    return {"accuracy": float(results[0] == doc["answer"])}
"""
YAML = """
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {folder}/test.parquet
  cache_dir: {folder}/cache
test_split: test
doc_to_visual: !function utils.images
doc_to_text: text
doc_to_target: answer
"""
OPEN = """
task: dms_open
output_type: generate_until
process_results: !function utils.score
generation_kwargs: {max_new_tokens: 4, until: ["\\n"], temperature: 0, top_p: 1.0, do_sample: false}
metric_list: [{metric: accuracy, aggregation: mean, higher_is_better: true}]
"""
CHOICE = f"""
task: dms_choice
output_type: multiple_choice
doc_to_choice: {CHOICES}
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def samples():
    """Held-out samples; the images of some are damaged, those of others missing."""
    chosen = one_per_image(load_easy_vqa("test"), 24)
    damaged = [corrupt(s, "image:stripes", 5) if i % 3 == 1 else s for i, s in enumerate(chosen)]
    return [s.replace(image=None) if i % 8 == 7 else s for i, s in enumerate(damaged)]


@pytest.fixture(scope="module")
def tasks(samples, tmp_path_factory):
    """A folder with the tasks `dms_open` and `dms_choice` on these samples."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"image": s.load_image(), "text": f"context: {s.context} question: {s.question}", "answer": s.answers[0]}
        for s in samples
    ]
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "answer": datasets.Value("string")}
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(folder / "test.parquet")
    (folder / "utils.py").write_text(UTILS)
    for name, text in (("open", OPEN), ("choice", CHOICE)):
        (folder / f"{name}.yaml").write_text(YAML.format(folder=folder) + text)
    return folder


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Folders of the demo's checkpoints, calibrated on whole prompts as text."""
    folders = {}
    for backbone in BACKBONES:
        model, processor = load(f"demo-{backbone}")
        clean, collator = load_easy_vqa("train")[:1920:20], PromptCollator(processor)
        batches = [without_ids(collator(clean[i : i + 32])) for i in range(0, len(clean), 32)]
        model.calibrate(batches, show_progress=False)
        folders[backbone] = tmp_path_factory.mktemp(backbone)
        model.save_pretrained(folders[backbone])
        processor.save_pretrained(folders[backbone])
    return folders


def without_ids(batch):
    return {name: value for name, value in batch.items() if name != "modality_ids"}


def run(tasks, names, pretrained, batch_size, **model_args):
    """Results and samples of lmms-eval's own evaluator."""
    given = ",".join(f"{name}={value}" for name, value in {"pretrained": pretrained, **model_args}.items())
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return evaluator.simple_evaluate(
        "dms", given, tasks=names, task_manager=manager, batch_size=batch_size, device="cpu", bootstrap_iters=0
    )


def responses(results, task):
    """Of each sample, what the model said to each of its requests."""
    return [[response for (response,) in sample["resps"]] for sample in results["samples"][task]]


def plugin(pretrained, docs=(), **model_args):
    """The plugin by itself, with documents of a task `t`."""
    lm = DMS(str(pretrained), device="cpu", **model_args)
    lm.task_dict["t"] = {"test": list(docs)}
    return lm


def requests(kind, texts, second, visuals):
    """One request for each text; `visuals` makes the images of a document."""
    return [
        Instance(kind, (text, second, visuals, index, "t", "test"), 0, {"task": "t", "doc_id": index, "repeats": 1})
        for index, text in enumerate(texts)
    ]


@pytest.fixture
def warnings():
    found = []
    sink = logger.add(found.append, level="WARNING", format="{message}")
    yield found
    logger.remove(sink)


@torch.no_grad()
def direct_answers(folder, samples):
    """Answers of `generate` to one sample at a time, and the weights."""
    model, processor = load(folder)
    answers, weights = [], []
    for sample in samples:
        inputs = without_ids(PromptCollator(processor)([sample]))
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        answers.append(processor.tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], True))
        weights.append(out.modality_weights[0])
    return answers, torch.stack(weights)


def test_the_entry_point_registers_the_model():
    assert get_model("dms") is DMS


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_evaluator_finds_the_accuracy_of_generate(backbone, calibrated, samples, tasks, warnings):
    answers, weights = direct_answers(calibrated[backbone], samples)
    together = torch.tensor([s.image is not None for s in samples])
    assert (weights[together] - 0.5).abs().max() > 0.3  # the damaged images lost weight
    accuracy = sum(a.strip() == s.answers[0] for a, s in zip(answers, samples, strict=True)) / len(samples)
    for batch_size in (1, 4):
        results = run(tasks, ["dms_open"], calibrated[backbone], batch_size, prompt=PROMPT)
        assert responses(results, "dms_open") == [[answer] for answer in answers]
        assert results["results"]["dms_open"]["accuracy,none"] == accuracy
    assert not [message for message in warnings if "calibrated" in message]


def test_two_processes_find_the_same_accuracy(calibrated, samples, tasks, tmp_path):
    answers, _ = direct_answers(calibrated["blip2"], samples)
    accuracy = sum(a.strip() == s.answers[0] for a, s in zip(answers, samples, strict=True)) / len(samples)
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, "-m", *launch, "-m", "lmms_eval"]
    command += ["--model", "dms", "--model_args", f"pretrained={calibrated['blip2']},prompt={PROMPT}"]
    command += ["--tasks", "dms_open", "--include_path", str(tasks), "--batch_size", "4"]
    command += ["--output_path", str(tmp_path / "out")]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    results = list((tmp_path / "out").rglob("*results.json"))
    assert len(results) == 1, done.stderr[-3000:]  # its exit status is 0 even where it failed
    assert json.loads(results[0].read_text())["results"]["dms_open"]["accuracy,none"] == accuracy


@torch.no_grad()
def direct_losses(folder, samples):
    """(samples, choices): mean loss of each choice after one sample's prompt, and whether it is the greedy one."""
    model, processor = load(folder)
    losses, greedy = [], []
    for sample in samples:
        for choice in CHOICES:
            batch = PromptCollator(processor, with_labels=True)([sample.replace(answers=(choice,))])
            # without the end token
            batch = {name: value[:, :-1] if value.ndim == 2 else value for name, value in batch.items()}
            out = model(**without_ids(batch))
            losses.append(out.dms_losses["task"])
            wanted, predicted = batch["labels"][:, 1:], out.logits[:, :-1].argmax(-1)
            greedy.append(bool((predicted == wanted)[wanted != -100].all()))
    return torch.tensor(losses).view(-1, len(CHOICES)), torch.tensor(greedy).view(-1, len(CHOICES))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_multiple_choice_by_loss(backbone, calibrated, samples, tasks, monkeypatch, warnings):
    losses, greedy = direct_losses(calibrated[backbone], samples)
    right = [CHOICES[best] == s.answers[0] for best, s in zip(losses.argmin(1), samples, strict=True)]

    def unwrap(output):
        """As lmms-eval's, which before it is mended makes text of a tuple of numbers."""
        return (output, None) if isinstance(output[0], float) else unwrap_generation_output(output)

    monkeypatch.setattr(evaluator, "unwrap_generation_output", unwrap)
    for batch_size in (1, 4):
        results = run(tasks, ["dms_choice"], calibrated[backbone], batch_size, prompt=PROMPT)
        found = responses(results, "dms_choice")
        got = torch.tensor([[loss for loss, _ in row] for row in found])
        torch.testing.assert_close(got, losses, atol=1e-4, rtol=1e-4)
        assert [[is_greedy for _, is_greedy in row] for row in found] == greedy.tolist()
        assert results["results"]["dms_choice"]["acc,none"] == sum(right) / len(right)
    mended = unwrap_generation_output((0.5, True))[0] == (0.5, True)
    assert mended or any("multiple_choice" in message for message in warnings)


def test_a_vanilla_checkpoint_answers_as_ever_and_is_said_to(tasks, warnings):
    name = "demo-llava"
    assert AutoConfig.from_pretrained(CHECKPOINTS / name).model_type == "llava"
    rule = responses(run(tasks, ["dms_open"], name, 4, prompt=PROMPT, scheduler="rule"), "dms_open")
    assert any(f"{name} is not calibrated" in message for message in warnings)
    warnings.clear()
    uniform = responses(run(tasks, ["dms_open"], name, 4, prompt=PROMPT, scheduler="uniform"), "dms_open")
    assert not warnings
    assert rule == uniform


def test_scheduler_and_other_fields_replace_the_checkpoints(calibrated):
    config = plugin(calibrated["llava"], scheduler="uniform", weight_floor=0.2).model.config.dms_config
    assert (config.scheduler, config.weight_floor) == ("uniform", 0.2)
    with pytest.raises(ValueError, match="unknown field"):
        plugin(calibrated["llava"], floor=0.2)


def test_encoder_decoder(tmp_path):
    _, processor = load("demo-blip2")
    tokenizer = processor.tokenizer
    processor.image_processor.size = {"height": 8, "width": 8}
    processor.num_query_tokens = tiny.IMAGE_TOKENS
    config = tiny.config("blip2-t5")
    config.image_token_index = config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config.text_config.vocab_size = len(tokenizer)
    for name in ("pad", "bos", "eos"):
        setattr(config.text_config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    config.text_config.decoder_start_token_id = tokenizer.pad_token_id
    model = DMSBlip2ForConditionalGeneration._from_config(config)
    tiny.seed_parameters(model)
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    docs = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")] + [None]
    texts = ["is there a circle?", "what color?", "is it a blue triangle?"]
    visuals = lambda doc: [] if doc is None else [doc]  # noqa: E731
    inputs = [
        processor(images=doc, text=f"question: {text} answer:", return_tensors="pt")
        for doc, text in zip(docs, texts, strict=True)
    ]
    target = torch.tensor([tokenizer(" yes", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        answers = [tokenizer.decode(model.generate(**row, max_new_tokens=5)[0], True) for row in inputs]
        losses = [float(model(**row, labels=target).dms_losses["task"]) for row in inputs]
    for batch_size in (1, 3):
        lm = plugin(tmp_path, docs, batch_size=batch_size)
        assert lm.generate_until(requests("generate_until", texts, {"max_new_tokens": 5}, visuals)) == answers
        scores = lm.loglikelihood(requests("loglikelihood", texts, " yes", visuals))
        assert [loss for loss, _ in scores] == pytest.approx(losses, abs=1e-4)


def test_a_target_may_be_a_function_of_the_document():
    lm = plugin("demo-blip2", docs=["yes", "no"])
    texts, images = ["is there a circle?"] * 2, lambda doc: [Image.new("RGB", (64, 64), "gray")]
    by_function = lm.loglikelihood(requests("loglikelihood", texts, lambda doc: doc, images))
    assert by_function[0] == lm.loglikelihood(requests("loglikelihood", texts[:1], " yes", images))[0]
    assert by_function[0] != by_function[1]


def test_stop_strings_and_sampling_options():
    lm = plugin("demo-llava", docs=["red", "red"], batch_size=2)
    texts, visuals = ["what color is the shape?", "is there a circle?"], lambda doc: [Image.new("RGB", (64, 64), doc)]

    def answers(**options):
        return lm.generate_until(requests("generate_until", texts, options, visuals))

    longest = answers(max_new_tokens=6, min_new_tokens=6, until=[], image_aspect_ratio="pad")
    stop = longest[0].split()[2]
    assert answers(max_new_tokens=6, min_new_tokens=6, until=stop) == [a.split(stop)[0] for a in longest]
    assert answers(max_new_tokens=6, min_new_tokens=6, temperature=0, top_p=0.1, do_sample=True) == longest
    torch.manual_seed(0)
    assert len({tuple(answers(max_new_tokens=6, min_new_tokens=6, temperature=5.0)) for _ in range(3)}) == 3


def test_answers_end_where_the_positions_do():
    lm = plugin("demo-blip2", docs=[None])
    (answer,) = lm.generate_until(requests("generate_until", ["what?"], {"min_new_tokens": 250}, lambda doc: None))
    assert len(answer.split()) > 100


def test_chat_template():
    lm = plugin("demo-llava", docs=[Image.new("RGB", (64, 64), "red")])
    lm.processor.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message['role'].upper() }}: "
        "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    # a placeholder in the task's own text does not count twice
    for text in ("what color?", "<image>\nwhat color?"):
        found = lm.generate_until(requests("generate_until", [text], options, lambda doc: [doc]))
        prompt = "USER: <image>\nwhat color? ASSISTANT:"
        inputs = lm.processor(images=lm.task_dict["t"]["test"][0], text=prompt, return_tensors="pt")
        direct = lm.model.generate(**inputs, **options, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert found == [lm.processor.tokenizer.decode(direct, True)]


@pytest.mark.parametrize(
    ("backbone", "visuals"),
    [("blip2", [Image.new("RGB", (8, 8))] * 2), ("llava", ["film.mp4"]), ("llava", [{"array": []}])],
)
def test_what_is_not_supported_names_the_sample(backbone, visuals):
    lm = plugin(f"demo-{backbone}", docs=[None])
    with pytest.raises(ValueError, match="'t/0'"):
        lm.generate_until(requests("generate_until", ["what?"], {}, lambda doc: visuals))
    with pytest.raises(NotImplementedError, match="rounds"):
        lm.generate_until_multi_round([])
