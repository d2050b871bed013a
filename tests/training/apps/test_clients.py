"""Programs that know transformers and not DMS: pipelines, and `transformers serve` behind the client of OpenAI."""

import base64
import functools
import io
import json
import logging
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM, pipeline
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from typer.testing import CliRunner

from modeling_dms import kept_reliability
from modeling_dms.training.apps.serve import serve
from modeling_dms.training.cli import app
from modeling_dms.training.corruptions import corrupt
from modeling_dms.training.data import as_text, load_easy_vqa
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.models.loading import CHECKPOINTS, load
from tests import tiny


ROOT = Path(__file__).resolve().parents[3]
# the processor of BLIP-2 puts its placeholders in front of any prompt by itself
PLACEHOLDER = {"demo-llava": "<image>", "demo-blip2": ""}
# which the processor of BLIP-2 does not keep
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def text_of(sample):
    return f"context: {sample.context} question: {sample.question} answer:"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints with a chat template, calibrated on such prompts: the image is weighed against the whole text."""

    @functools.cache
    def save(name):
        folder = tmp_path_factory.mktemp(name)
        model, processor = load(name)
        samples = one_per_image(load_easy_vqa("train"), 100)
        batches = [
            processor(
                images=[sample.load_image() for sample in some],
                text=[PLACEHOLDER[name] + text_of(sample) for sample in some],
                padding=True,
                return_tensors="pt",
            )
            for some in (samples[start : start + 20] for start in range(0, len(samples), 20))
        ]
        model.calibrate(batches, show_progress=False)
        processor.chat_template = TEMPLATE
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def samples():
    return one_per_image(load_easy_vqa("test"), 300)


def answers(model, processor, name, sample, **kwargs):
    inputs = processor(images=sample.load_image(), text=PLACEHOLDER[name] + text_of(sample), return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True, **kwargs)
    return processor.decode(out.sequences[0, -1:]).strip(), out.modality_weights


def relied_on(model, processor, name, sample):
    inputs = processor(images=sample.load_image(), text=PLACEHOLDER[name] + text_of(sample), return_tensors="pt")
    return float(model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True).reliability[0])


@pytest.fixture(scope="module")
def rescued(saved, samples):
    """A held-out sample under a color cast of which DMS is right and static wrong, for each checkpoint."""

    @functools.cache
    def search(name):
        model, processor = load(saved(name))
        for sample in samples:
            damaged, right = corrupt(sample, "image:color_cast", 5), sample.answers[0]
            dms, weights = answers(model, processor, name, damaged)
            static, _ = answers(model, processor, name, damaged, modality_weights=torch.full((1, 2), 0.5))
            if dms == right != static and weights[0, 0] < 0.1:
                return damaged
        raise AssertionError("there is none")

    return search


# ---- pipelines


@pytest.mark.parametrize("name", PLACEHOLDER)
def test_a_pipeline_answers_prompts(saved, samples, rescued, caplog, name):
    # that a class is not supported is only logged
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        pipe = pipeline("image-text-to-text", model=str(saved(name)))
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "not supported" not in caplog.text
    model, processor = load(saved(name))
    assert type(pipe.model) is type(model)
    damaged = rescued(name)
    for sample in (*samples[:4], damaged):
        prompt = PLACEHOLDER[name] + text_of(sample)
        with kept_reliability() as kept:
            (found,) = pipe(images=sample.load_image(), text=prompt, max_new_tokens=1, return_full_text=False)
        expected, _ = answers(model, processor, name, sample)
        assert found["generated_text"].strip() == expected
        assert [float(each) for each in kept] == [pytest.approx(relied_on(model, processor, name, sample), abs=1e-4)]
    assert expected == damaged.answers[0]


def test_a_pipeline_answers_chats(saved, samples, rescued):
    pipe = pipeline("image-text-to-text", model=str(saved("demo-llava")))
    model, processor = load(saved("demo-llava"))
    damaged = rescued("demo-llava")
    for sample in (*samples[:4], damaged):
        content = [{"type": "image", "image": sample.load_image()}, {"type": "text", "text": text_of(sample)}]
        messages = [{"role": "user", "content": content}]
        (found,) = pipe(text=messages, max_new_tokens=1)
        expected, _ = answers(model, processor, "demo-llava", sample)
        assert found["generated_text"][-1]["role"] == "assistant"
        assert found["generated_text"][-1]["content"].strip() == expected
    assert expected == damaged.answers[0]


@pytest.mark.parametrize("typed", ["<image>", "</s>", "<s><pad><image>"])
def test_typed_special_tokens_reach_pipelines_as_text(saved, samples, typed):
    pipe = pipeline("image-text-to-text", model=str(saved("demo-llava")))
    processor, sample = pipe.processor, samples[0]
    text = as_text(processor, f"{typed} {text_of(sample)}")
    content = [{"type": "image", "image": sample.load_image()}, {"type": "text", "text": text}]
    (chat,) = pipe(text=[{"role": "user", "content": content}], max_new_tokens=1)
    (prompt,) = pipe(images=sample.load_image(), text=f"<image>{text}", max_new_tokens=1, return_full_text=False)
    assert chat["generated_text"][-1]["content"] == prompt["generated_text"]
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not set(ids) & set(processor.tokenizer.all_special_ids)


# ---- serving


def test_servers_find_every_class_that_generates():
    for backbone in tiny.FAMILIES:
        config, model_class = tiny.config(backbone), tiny.model_class(backbone)
        assert type(AutoModelForMultimodalLM.from_config(config)) is model_class
        for names in (MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
            assert names[config.model_type] == model_class.__name__


@pytest.fixture(scope="module")
def client(saved, tmp_path_factory):
    """A client of a server, which ends with the tests whoever started them."""
    openai = pytest.importorskip("openai")
    for needed in ("fastapi", "uvicorn"):
        pytest.importorskip(needed)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, said = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "modeling_dms.training.cli", "serve", str(saved("demo-llava"))]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with said.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        end = time.monotonic() + 240
        while True:
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < end, said.read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
    finally:
        process.terminate()  # an interrupt is ignored by what a shell runs in the background
        process.wait(30)


def test_a_server_answers_about_an_image(client, saved, samples, rescued):
    model, processor = load(saved("demo-llava"))
    damaged = rescued("demo-llava")
    for sample in (*samples[:2], damaged):
        png = io.BytesIO()
        sample.load_image().save(png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text_of(sample)}]
        asked = {
            "model": str(saved("demo-llava")),
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 0,
        }
        completion = client.chat.completions.create(**asked)
        whole = completion.choices[0].message.content
        stream = list(client.chat.completions.create(**asked, stream=True))
        parts = [chunk.choices[0].delta.content or "" for chunk in stream]
        expected, _ = answers(model, processor, "demo-llava", sample)
        assert whole.strip() == "".join(parts).strip() == expected
        assert completion.reliability == pytest.approx(relied_on(model, processor, "demo-llava", sample), abs=1e-4)
        assert stream[-1].reliability == pytest.approx(completion.reliability, abs=1e-4)
    assert expected == damaged.answers[0]


@pytest.fixture(scope="module")
def in_process(saved):
    """A client of the server's application, run without a server."""
    for needed in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(needed)
    import uvicorn
    from fastapi.testclient import TestClient

    applications = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.Server, "run", lambda server: applications.append(server.config.app))
        serve(str(saved("demo-llava")), ["--device", "cpu"])
    with TestClient(applications[0], raise_server_exceptions=False) as client:
        yield client


def ask(client, saved, text, image=None, path="/v1/chat/completions", **fields):
    """The response to a text and an image."""
    kinds = ("input_text", "input_image") if path.endswith("responses") else ("text", "image_url")
    content = [{"type": kinds[0], "text": text}]
    if image is not None:
        png = io.BytesIO()
        image.save(png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content.insert(0, {"type": kinds[1], "image_url": url if path.endswith("responses") else {"url": url}})
    messages = [{"role": "user", "content": content}]
    asked = {"input": messages, "max_output_tokens": 1} if path.endswith("responses") else {"messages": messages}
    asked |= {} if path.endswith("responses") else {"max_tokens": 1}
    return client.post(path, json={"model": str(saved("demo-llava")), "stream": False, **asked, **fields})


def answered(response):
    assert response.status_code == 200, response.text
    said = response.json()
    return said["choices"][0]["message"]["content"] if "choices" in said else said["output"][0]["content"][0]["text"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("typed", ["<image>", "</s>", "<s><pad>", "<image><image></s>"])
def test_a_server_reads_typed_special_tokens_as_text(in_process, saved, samples, typed, path):
    processor = load(saved("demo-llava"))[1]
    sample = samples[0]
    for text in (f"{typed} {text_of(sample)}", f"what does {typed} mean?"):
        for image in (sample.load_image(), None):
            found = answered(ask(in_process, saved, text, image, path, temperature=0))
            assert found == answered(ask(in_process, saved, as_text(processor, text), image, path, temperature=0))
    as_string = [{"role": "user", "content": f"what does {typed} mean?"}]
    fields = {"instructions": typed, "input": as_string} if path.endswith("responses") else {"messages": as_string}
    answered(ask(in_process, saved, "", path=path, **fields))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_the_last_event_of_a_stream_tells_reliability(in_process, saved, samples, path):
    sample = samples[0]
    asked = (in_process, saved, text_of(sample), sample.load_image(), path)
    whole = ask(*asked, temperature=0).json()["reliability"]
    stream = ask(*asked, temperature=0, stream=True)
    events = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    told = [event.get("response", event).get("reliability") for event in events]
    assert told == [None] * (len(events) - 1) + [pytest.approx(whole, abs=1e-6)]


def test_a_whole_prompt_is_read_with_its_special_tokens(in_process, saved):
    """It cannot bring an image, which is answered as the vanilla class answers it."""
    fields = {"model": str(saved("demo-llava")), "max_tokens": 1}
    assert in_process.post("/v1/completions", json={**fields, "prompt": "what color? answer:"}).status_code == 200
    for prompt in ("<image>", "<image> what color?", "a <image> b <image>"):  # as the vanilla class answers it
        assert in_process.post("/v1/completions", json={**fields, "prompt": prompt}).status_code == 200
    # what is no chat passes by
    assert in_process.post("/v1/chat/completions", content=b"{").status_code == 422
    assert in_process.post("/v1/chat/completions", json=[1]).status_code == 422
    assert in_process.get("/v1/models").status_code == 200


@pytest.mark.parametrize("name", PLACEHOLDER)
def test_a_server_wants_a_chat_template(name, tmp_path):
    model, processor = load(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert result.exit_code == 1
    assert "has no chat template" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("processor_config.json", {"patch_size": None}, "leaves out what its model's configuration says"),
        ("processor_config.json", {"num_additional_image_tokens": None}, "leaves out what its model's configuration"),
        ("config.json", {"image_token_index": 5}, "its tokenizer reads '<image>'"),
        ("tokenizer_config.json", {"pad_token": None, "eos_token": None}, "lacks tokenizer.pad_token"),
    ],
)
def test_a_server_wants_a_processor_that_fits(saved, tmp_path, file, fields, message):
    folder = shutil.copytree(saved("demo-llava"), tmp_path / "model")
    written = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**written, **fields}))
    result = CliRunner().invoke(app, ["serve", str(folder)])
    assert result.exit_code == 1
    assert message in result.stderr.strip().splitlines()[-1]


def test_a_server_wants_a_whole_checkpoint_with_dms(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    for name, message in (
        (CHECKPOINTS / "demo-llava", "is a 'llava' checkpoint, expected one of dms_blip_2, dms_gemma3, "),
        (tmp_path, "is an adapter: make it a whole checkpoint by `dms merge` first"),
    ):
        result = CliRunner().invoke(app, ["serve", str(name)])
        assert result.exit_code == 1
        assert message in " ".join(result.output.split())
