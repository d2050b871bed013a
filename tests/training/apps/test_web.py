"""The page of `dms demo --web`: what it shows, bad input, several users at once, and itself in a headless browser."""

import itertools
import json
import os
import re
import shutil
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from modeling_dms.training.apps import web
from modeling_dms.training.apps.answer import Answer, answer, load_for_answers
from modeling_dms.training.cli import app
from modeling_dms.training.data import load_easy_vqa
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.models.loading import load
from tests import tiny
from tests.conftest import ask_as_many


CALIBRATION = 60
CLEAN = ("image:color_cast", 0, "text:typos", 0)
CAST = ("image:color_cast", 5, "text:typos", 0)
# a picture of the page after the browser's test, as in docs/demo-page.png
SCREENSHOT = os.environ.get("DMS_SCREENSHOT")
FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-dev-shm-usage",
    "disable-sync",
    "window-size=1360,1060",
)
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def samples():
    return one_per_image(load_easy_vqa("test"), 300)


@pytest.fixture(scope="module")
def loaded():
    with pytest.MonkeyPatch.context() as patch:
        ask_as_many(patch)  # as the server does
        return load_for_answers("demo-llava", web.MAX_NEW_TOKENS, CALIBRATION)


@pytest.fixture
def show(loaded):
    """`show` and one sample's image, context and question."""
    return lambda sample, damage=CLEAN: web.show(
        *loaded, None if sample.image is None else str(sample.image), [], sample.context, sample.question, *damage
    )


@pytest.fixture(scope="module")
def rescued(loaded, samples):
    """A held-out sample that both answer, and of which DMS is right and static wrong under a color cast; what is shown
    of it clean and damaged."""
    for sample in samples:
        inputs, right = (str(sample.image), [], sample.context, sample.question), sample.answers[0]
        clean, damaged = (web.show(*loaded, *inputs, *damage) for damage in (CLEAN, CAST))
        if clean.static == clean.dms == damaged.dms == right != damaged.static and "Nothing" in clean.sentence:
            return sample, clean, damaged
    raise AssertionError("there is none")


# ---- what is shown


def test_clean_inputs_are_shown_as_they_are_and_answered_alike(show, samples):
    shown = show(samples[1])
    assert np.array_equal(shown.image, samples[1].load_image())
    assert shown.context == samples[1].context
    assert shown.static == shown.dms == samples[1].answers[0]
    assert shown.sentence.startswith("Nothing looks damaged")
    assert shown.bars.count("<tr") == 1 + len(web.BARS)
    for name in web.BARS:
        assert f'data-name="{name}"' in shown.bars


def test_damage_changes_the_picture_and_the_weights(rescued):
    sample, _, shown = rescued
    assert not np.array_equal(shown.image, sample.load_image())
    assert shown.context == sample.context
    assert re.search(r"DMS hears the context with (0\.9\d|1\.00)", shown.sentence)


def test_a_damaged_context_is_shown(show, samples):
    shown = show(samples[1], ("image:fog", 0, "text:typos", 5))
    assert shown.context not in ("", samples[1].context)
    assert "The context looks damaged: DMS hears the image with 0.9" in shown.sentence


def test_missing_inputs(show, samples):
    sample = samples[1]
    without_image = show(sample.replace(image=None))
    assert without_image.image is None
    assert without_image.sentence.startswith("There is no image: the context alone is heard.")
    assert show(sample, ("image:missing", 1, "text:typos", 0)) == without_image
    for context in (None, "", "  "):
        assert "There is no context" in show(sample.replace(context=context)).sentence
    with pytest.raises(ValueError, match="neither an image nor a context"):
        show(sample, ("image:missing", 1, "text:missing", 1))


@pytest.mark.parametrize(
    ("weights", "p_clean", "p_match", "said"),
    [
        ([0.5, 0.5], [0.5, 0.5], 0.5, "Nothing looks damaged: DMS answers as the static model does."),
        ([0.5, 0.5], [0.5, 1.0], 0.01, "Image and context look clean but disagree: DMS takes no side."),
        ([0.99, 0.01], [0.5, 0.5], 0.01, "Image and context look clean but disagree: DMS hears the image with 0.99."),
        ([0.01, 0.99], [0.02, 0.5], 0.5, "The image looks damaged: DMS hears the context with 0.99."),
        ([0.99, 0.01], [0.5, 0.02], 0.01, "The context looks damaged: DMS hears the image with 0.99."),
        ([0.5, 0.5], [1e-30, 0.02], 0.01, "Both look damaged: DMS takes no side."),
        ([0.3, 0.7], [1e-30, 0.02], 0.5, "Both look damaged: DMS hears the context with 0.70."),
        ([0.3, 0.7], [0.5, 0.5], 0.5, "DMS hears the context with 0.70."),
        ([0.5, 0.5], [1.0, 1.0], 1.0, "Not calibrated: DMS does not know what clean inputs look like."),
        ([0.0, 1.0], [1.0, 0.02], 1.0, "There is no image: the context alone is heard."),
    ],
)
def test_the_sentence_follows_the_rule(weights, p_clean, p_match, said):
    assert web.explain(Answer("", weights, {"p_clean": p_clean, "p_match": [p_match] * 2}), 0.02) == said


def test_the_sentence_names_the_static_model():
    assert "scheduler is uniform" in web.explain(Answer("", [0.5, 0.5], {}), 0.02)


@pytest.mark.parametrize(
    ("weights", "p_match", "said"),
    [
        ([0.25] * 4, 0.5, "Nothing looks damaged or odd: DMS answers as the static model does."),
        ([0.25] * 4, 0.01, "They disagree, and no majority tells who is right: DMS takes no side."),
        ([0.4, 0.0, 0.4, 0.2], 0.01, "All others contradict context 1: not heard. Damage is seen in context 3 (0.20)"),
        ([0.0, 0.4, 0.4, 0.2], 0.5, "Damage is seen in image (0.00) and context 3 (0.20): heard less."),
    ],
)
def test_the_sentence_names_sources(weights, p_match, said):
    names = ("image", "context 1", "context 2", "context 3")
    dms = Answer("", weights, {"p_clean": [0.5] * 4, "p_match": [p_match] * 4}, None, names)
    assert web.explain(dms, 0.02).startswith(said)
    # a source that is there and not heard has a bar of its own, of length 0
    assert "width:0.0%" in web.draw_bars(dms, 0.02) or 0.0 not in weights


def test_several_images_and_passages_have_a_bar_each(loaded, samples):
    one, other = samples[1], samples[2]
    context = f"{one.context}\n \n\n{one.context}"
    shown = web.show(*loaded, str(one.image), [str(other.image)], context, one.question, *CAST)
    for name in ("image 1", "image 2", "context 1", "context 2"):
        assert f"<th>{name}</th>" in shown.bars
    assert not np.array_equal(shown.image, one.load_image())
    assert shown.context == f"{one.context}\n\n{one.context}"


def test_bars_end_at_their_edges():
    signals = {"typicality": [-9.0, -1.0], "surprisal": [0.0, float("inf")], "p_clean": [0.75, 0.01]}
    html = web.draw_bars(Answer("", [0.25, 0.75], signals), 0.02)
    assert '<i class="image" style="left:0.0%;width:25.0%">' in html
    assert '<i class="context" style="left:0.0%;width:100.0%">' in html  # inf
    assert '<i class="alarm" style="left:0.0%;width:1.0%">' in html
    # typicality is good at its right end
    assert '<i class="image" style="left:0.0%;width:100.0%"></i><b style="left:100.0%">' in html
    assert '<i class="context" style="left:75.0%;width:25.0%"></i><b style="left:100.0%">' in html
    assert '<i class="image" style="left:0.0%;width:75.0%"></i><b style="left:0.0%">' in html
    assert '<span class="value">-1.00</span>' in html
    assert "<td>-</td>" in web.draw_bars(Answer("", [0.0, 1.0], {}), 0.02)


def test_every_kind_that_is_offered_can_be_drawn(show, samples):
    for image_kind, text_kind in itertools.zip_longest(web.kinds("image"), web.kinds("text"), fillvalue="text:typos"):
        if image_kind == "image:missing" or "imagenet_c" in image_kind:  # these are slow and tested elsewhere
            continue
        assert show(samples[2], (image_kind, 3, text_kind, 0)).dms
    for kind in web.kinds("text"):
        assert show(samples[2], ("image:fog", 0, kind, 3)).dms
    assert not [name for name in web.kinds("image") + web.kinds("text") if "mismatch" in name]


# ---- bad input


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "I;16", "LA", "1", "P"])
def test_images_of_any_mode_are_answered(show, samples, tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        Image.fromarray(np.full((40, 30), 200 * 257, dtype=np.uint16)).save(path)
    else:
        samples[1].load_image().convert(mode).save(path)
    assert show(samples[1].replace(image=path)).dms


# of one that is more than 100 times as long as wide the middle is seen
@pytest.mark.parametrize(("size", "expected"), [((1, 1), (1, 1)), ((5000, 4000), (768, 614)), ((1, 3000), (1, 100))])
def test_images_of_any_size_are_answered(show, samples, tmp_path, size, expected):
    path = tmp_path / "image.png"
    Image.new("RGB", size, "teal").save(path)
    shown = show(samples[1].replace(image=path), ("image:glitch", 3, "text:typos", 0))
    assert shown.image.size == expected
    assert shown.dms


def test_what_cannot_be_answered_is_a_sentence(loaded, samples, tmp_path):
    respond = web.responder(*loaded)
    good = {"path": str(samples[1].image)}
    broken, cut = tmp_path / "broken.png", tmp_path / "cut.png"
    broken.write_bytes(b"no image at all")
    cut.write_bytes(samples[1].image.read_bytes()[:200])
    drawn, many = tmp_path / "drawn.svg", "\n\n".join(["a box."] * 16)
    drawn.write_text('<svg xmlns="http://www.w3.org/2000/svg"><image href="/a/file.png"/></svg>')
    for inputs, said in (
        ((good, "a box.", " ", *CLEAN), "the question is empty"),
        ((good, None, None, *CLEAN), "the question is empty"),
        ((None, " ", "what color?", *CLEAN), "there is neither an image nor a context"),
        (({"path": str(broken)}, "a box.", "what color?", *CLEAN), "the image cannot be read"),
        (({"path": str(cut)}, "a box.", "what color?", *CLEAN), "the image cannot be read"),
        (({"path": str(drawn)}, "a box.", "what color?", *CLEAN), "the page takes no SVG"),
        ((good, many, "what color?", *CLEAN), "there are 17 images and passages, more than 16"),
        ((good, "a box.", "color? " * 1000, *CLEAN), "image and question are not cut"),
        ((good, "a box.", "color? " * 10_000, *CLEAN), "the question is longer than 10000 characters"),
        ((good, "a box.", "what color?", "image:nothing", 3, "text:typos", 0), "unknown corruption"),
        ((good, "a box.", "what color?", "image:fog", 9, "text:typos", 0), "severity must be"),
    ):
        image, *rest = inputs
        *others, sentence, bars = respond(image, None, *rest)
        assert sentence.startswith("Cannot answer: ")
        assert said in sentence
        assert str(tmp_path) not in sentence
        assert [*others, bars] == [None, "", "", "", ""]
    *_, sentence, _ = respond(good, None, "a red box. " * 900, "what color?", *CLEAN)
    assert not sentence.startswith("Cannot answer")


# ---- other checkpoints


def test_an_uncalibrated_checkpoint_of_another_backbone(samples, tmp_path, capsys):
    """An InternVL, which makes several tiles of an image."""
    loaded = load_for_answers(str(tiny.save_internvl(tmp_path)), web.MAX_NEW_TOKENS)
    assert "not calibrated" in capsys.readouterr().out  # nor is it, as the shipped ones are, on data of another model
    shown = web.show(*loaded, str(samples[1].image), [], samples[1].context, samples[1].question, *CAST)
    assert shown.dms == shown.static
    assert shown.sentence.startswith("Not calibrated")


def test_a_checkpoint_that_generates_nothing_is_refused(tmp_path):
    model, processor = tiny.shared("retrieval"), load("demo-blip2")[1]
    processor.num_query_tokens = model.config.num_query_tokens
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DMSBlip2ForImageTextRetrieval, which generates no answers"):
        load_for_answers(str(tmp_path), web.MAX_NEW_TOKENS)


# ---- several users at once


def test_threads_get_what_they_get_alone(loaded, show, samples):
    damages = (CLEAN, CAST, ("image:fog", 0, "text:typos", 5), ("image:missing", 5, "text:typos", 2))
    asked = list(itertools.islice(zip(samples, itertools.cycle(damages), strict=False), 12))
    alone = [show(*one) for one in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: show(*one), asked))
    assert together == alone
    assert len({shown.bars for shown in alone}) > 6


# ---- the command


def test_checkpoints_and_options_that_do_not_fit_are_refused(tmp_path):
    pytest.importorskip("gradio")
    for arguments, message in (
        (["demo", "--port", "7000"], "--model and --port are for --web"),
        (["demo", "--web", "--model", str(tmp_path)], str(tmp_path)),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code
        assert message in "".join(result.output.split("\n"))
        assert "Traceback" not in result.output


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["demo", "--web"])
    assert result.exit_code == 1
    assert 'pip install "modeling-dms[web]"' in result.output


def test_static_weights_of_one_modality(loaded, samples):
    """The static model hears what is there."""
    alone = answer(*loaded, samples[1].replace(image=None), 5, (0.5, 0.5))
    assert alone.weights == [0, 1]
    assert alone.signals == {}


# ---- the page in a browser


@pytest.fixture(scope="module")
def url(loaded):
    """The page that the command serves, of a model that is calibrated already. It ends with the tests."""
    gradio = pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked, pages, url = [], [], f"http://127.0.0.1:{port}"
    command = ["demo", "--web", "--model", "demo-llava", "--port", str(port)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "load_for_answers", lambda *choices: asked.append(choices) or loaded)
        # it would wait there until it is interrupted
        patch.setattr(gradio.Blocks, "block_thread", lambda page: pages.append(page))
        result = CliRunner().invoke(app, [*command, "--calibration-samples", str(CALIBRATION)])
    assert result.exit_code == 0, result.output
    assert f"open {url}" in result.output
    assert asked == [("demo-llava", web.MAX_NEW_TOKENS, CALIBRATION)]
    yield url
    pages[0].close()


def test_the_server_gives_every_client_its_own_answer(url, loaded, samples):
    from gradio_client import Client, handle_file

    respond = web.responder(*loaded)
    asked = [(sample, damage) for sample, damage in zip(samples[:4], (CLEAN, CAST) * 2, strict=True)]
    clients = [Client(url, verbose=False) for _ in range(2)]
    jobs = [
        clients[number % 2].submit(
            handle_file(str(sample.image)), None, sample.context, sample.question, *damage, api_name="/answer"
        )
        for number, (sample, damage) in enumerate(asked)
    ]
    for job, (sample, damage) in zip(jobs, asked, strict=True):
        expected = respond({"path": str(sample.image)}, None, sample.context, sample.question, *damage)
        assert list(job.result(120)[1:]) == list(expected[1:])


@pytest.fixture(scope="module")
def browser(url, tmp_path_factory):
    if not (CHROMIUM and DRIVER) or find_spec("selenium") is None:
        pytest.skip("chromium, chromedriver or selenium is not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.get(url)
    yield driver
    driver.quit()


class Page:
    """What a user sees and does."""

    def __init__(self, driver):
        self.driver = driver

    def find(self, css):
        return self.driver.find_elements("css selector", css)

    def wait(self, condition, seconds=60):
        end = time.time() + seconds
        while not condition():
            assert time.time() < end, f"still waiting; the page says {self.said('sentence')!r}"
            time.sleep(0.1)

    def said(self, name):
        return self.driver.execute_script("return document.querySelector(arguments[0])?.value", f"#{name} textarea")

    def shows(self, shown):
        texts = ("shown-context", "static", "dms", "sentence")
        return [self.said(name) for name in texts] == [shown.context, shown.static, shown.dms, shown.sentence]

    def weights(self):
        return [float(value.text) for value in self.find('#bars tr[data-name="weight"] .value')]

    def picture(self):
        return [image.get_attribute("src") for image in self.find("#shown-image img")]

    def type(self, name, text, *, enter=True):
        from selenium.webdriver.common.keys import Keys

        (box,) = self.find(f"#{name} textarea")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text + (Keys.ENTER if enter else ""))

    def upload(self, path):
        for button in self.find("#image button[aria-label='Remove Image']"):
            button.click()
        self.wait(lambda: not self.find("#image img"))
        self.find("#image input[type=file]")[0].send_keys(str(path))
        self.wait(lambda: self.find("#image img") or self.find(".toast-body"))

    def slide(self, name, steps):
        from selenium.webdriver.common.keys import Keys

        (handle,) = self.find(f"#{name} input[type=range]")
        handle.send_keys((Keys.ARROW_RIGHT if steps > 0 else Keys.ARROW_LEFT) * abs(steps))


def test_in_a_browser(browser, rescued, tmp_path):
    page, (sample, clean, damaged) = Page(browser), rescued
    page.wait(lambda: page.said("dms"))  # it opens with a sample and its answer

    page.upload(sample.image)
    page.type("context", sample.context, enter=False)
    page.type("question", sample.question)
    page.wait(lambda: page.shows(clean))
    assert page.weights() == [0.5, 0.5]
    picture = page.picture()
    assert len(picture) == 1

    page.slide("image-severity", 5)
    page.wait(lambda: page.shows(damaged))
    assert page.said("dms") == sample.answers[0] != page.said("static")
    assert page.weights()[1] > 0.9
    assert page.picture() != picture
    if SCREENSHOT:
        page.wait(lambda: not page.find("#sentence [data-testid=status-tracker]:not(.hide)"))
        browser.save_screenshot(SCREENSHOT)

    page.slide("image-severity", -5)
    page.wait(lambda: page.shows(clean))
    page.find("#image button[aria-label='Remove Image']")[0].click()
    page.wait(lambda: "There is no image" in page.said("sentence"))
    page.type("context", " ")
    page.wait(lambda: "neither an image nor a context" in page.said("sentence"))
    assert page.said("dms") == page.said("static") == ""

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image at all")
    page.upload(broken)
    page.wait(lambda: "the image cannot be read" in page.said("sentence"))

    page.find(".gallery-item, table tbody tr.tr-body")[1].click()  # an example
    page.wait(lambda: page.said("dms"))
    assert page.weights()

    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    strangers = [address for address in asked if address.startswith("http") and "://127.0.0.1" not in address]
    assert not strangers


@pytest.mark.parametrize(
    ("name", "said"), [("demo-llava", "easy-VQA"), ("my-model", "photographs"), ("photographs-llava", "photographs")]
)
def test_the_page_begins_with_what_the_checkpoint_knows(name, said):
    samples, source = web.examples_for(name)
    assert len(samples) == web.EXAMPLES
    assert said in source
    assert all(sample.load_image() is not None and sample.context and sample.question for sample in samples)


def test_without_the_parts_the_page_is_on_shapes(monkeypatch, capsys):
    asked = []

    def load(name, *choices):
        asked.append(name)
        raise ImportError("install something") if name == "photographs-llava" else KeyboardInterrupt

    monkeypatch.setattr(web, "gradio", lambda: None)
    monkeypatch.setattr(web, "load_for_answers", load)
    with pytest.raises(KeyboardInterrupt):
        web.serve(None, None, CALIBRATION)
    assert asked == ["photographs-llava", "demo-llava"]
    assert "no photographs: install something" in capsys.readouterr().out
