"""`dms demo --web`: a page that damages an image and a context, and shows what static and dynamic weights answer."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from PIL import Image

from modeling_dms.training.apps.answer import Answer, answer, load_for_answers
from modeling_dms.training.corruptions import IMAGENET_C, NAMES, corrupt
from modeling_dms.training.data import PromptCollator, Sample, load_easy_vqa, load_example_photographs
from modeling_dms.training.data.easy_vqa import COLORS, SHAPES
from modeling_dms.training.data.samples import FIELDS
from modeling_dms.training.evaluate.run import one_per_image


INTRODUCTION = (
    "Image and context may both answer the question. Damage one of them, and see to which the model listens: *static* "
    "weighs both alike, *DMS* by how far each can be trusted. An empty line separates passages; of three or more "
    "sources, one that all others contradict shows."
)
EXAMPLES = 5
# the checkpoint that the page takes by default, and those that know nothing but shapes
PHOTOGRAPHS = "photographs-llava"
ON_SHAPES = ("demo-llava", "demo-blip2")
MAX_NEW_TOKENS = 20
MAX_CHARACTERS = 10_000  # of a text
MAX_SOURCES = 16  # images and passages
# no supported checkpoint sees more, and corruptions of a photograph's full size take seconds
MAX_SIDE = 768


@dataclass(frozen=True)
class Bar:
    """How a weight or signal is drawn.

    Attributes:
        low, high: values beyond are drawn at the edge; the bar starts at 0.
        note: what it says, and which end is good.
    """

    low: float
    high: float
    note: str


BARS = {
    "weight": Bar(0, 1, "how much is heard; equal weights are the static model"),
    "confidence": Bar(0, 1, "high is good: sure of an answer from this input alone"),
    "uncertainty": Bar(0, 0.01, "low is good: how much that varies under dropout"),
    "consistency": Bar(-1, 1, "high is good: image and context say the same"),
    "typicality": Bar(-4, 0, "0 is good: the lower, the farther outside of clean inputs"),
    "surprisal": Bar(0, 20, "low is good: how unlikely the words of the context are"),
    "p_clean": Bar(0, 1, "high is good: share of clean inputs that look as damaged"),
    "p_match": Bar(0, 1, "high is good: share of clean inputs that agree as little"),
}


@dataclass(frozen=True)
class Shown:
    """What the page shows, in the order of its outputs: the inputs as the model got them, both answers, a sentence on
    what DMS did, or on what is wrong with the input, and the bars."""

    image: Image.Image | None = None
    context: str = ""
    static: str = ""
    dms: str = ""
    sentence: str = ""
    bars: str = ""


def kinds(modality: str) -> list[str]:
    """The corruptions of `"image"` or `"text"` that need no second sample, and that this installation can make."""
    names = [name for name in NAMES if name.startswith(f"{modality}:") and not name.endswith(":mismatch")]
    if importlib.util.find_spec("imagecorruptions") is None:
        names = [name for name in names if name.partition(":")[2] not in IMAGENET_C]
    return names


def show(
    model: Any,
    collator: PromptCollator,
    image: str | None,
    images: Sequence[str],
    context: str | None,
    question: str | None,
    image_kind: str,
    image_severity: float,
    text_kind: str,
    text_severity: float,
) -> Shown:
    """Damages the inputs and answers.

    Args:
        image: path of a file.
        images: those of further ones.
        context: a passage, or several, separated by empty lines; of these the first is damaged.
        image_kind, text_kind: one of `kinds`.
        image_severity, text_severity: 0 (as given) to 5.

    Raises:
        ValueError: if an input cannot be read, corrupted or answered.
        ImportError: if the image's format needs a package that is not installed.
    """
    for name, text in (("context", context), ("question", question)):
        if len(text or "") > MAX_CHARACTERS:
            raise ValueError(f"the {name} is longer than {MAX_CHARACTERS} characters")
    # one id for all: the same severity is the same draw again
    passages = [passage for passage in re.split(r"\n\s*\n", context or "") if passage.strip()]
    paths = [Path(path) for path in (image, *images) if path is not None]
    if len(paths) + len(passages) > MAX_SOURCES:
        raise ValueError(f"there are {len(paths) + len(passages)} images and passages, more than {MAX_SOURCES}")
    loaded = [_loaded(path) for path in paths]
    sample = Sample("page", loaded[0] if loaded else None, passages[0] if passages else None, question or "")
    for kind, severity in ((image_kind, image_severity), (text_kind, text_severity)):
        if severity:
            sample = corrupt(sample, kind, int(severity))
    first = sample
    sample = sample.replace(images=tuple(loaded[1:]), contexts=tuple(passages[1:]))
    count = len(sample.source_names)
    static = answer(model, collator, sample, MAX_NEW_TOKENS, [1 / count] * count)
    dms, rate = answer(model, collator, sample, MAX_NEW_TOKENS), model.config.dms_config.alarm_rate
    said, bars = explain(dms, rate), draw_bars(dms, rate)
    if dms.reliability is not None:
        said += f" Its answer can be relied on with {dms.reliability:.2f}."
    return Shown(first.load_image(), "\n\n".join(sample.passages), static.text, dms.text, said, bars)


def _loaded(path: Path) -> Image.Image:
    """A visitor's image, made small before the next one is read."""
    if path.suffix.lower() == ".svg":  # which may draw files of this machine
        raise ValueError("the page takes no SVG: give a PNG or JPEG of it")
    try:
        picture = cast(Image.Image, Sample("page", path, None, "").load_image())
    except ValueError as error:
        raise ValueError("the image cannot be read: is it an image, and complete?") from error
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture


def explain(dms: Answer, rate: float) -> str:
    """What DMS did, in one sentence; an alarm is raised by p-values up to `rate`."""
    if dms.names != FIELDS:
        return _explain_sources(dms, rate)
    absent = next((place for place in range(2) if _is_absent(dms, place, rate)), None)
    if absent is not None:
        return f"There is no {FIELDS[absent]}: the {FIELDS[1 - absent]} alone is heard."
    if not dms.signals:
        return "The scheduler is uniform: this is the static model."
    p_clean = dms.signals["p_clean"]
    if min(p_clean) == 1:
        return "Not calibrated: DMS does not know what clean inputs look like."
    most = max(dms.weights)
    heard = "DMS takes no side."
    if most > 0.5:
        heard = f"DMS hears the {FIELDS[dms.weights.index(most)]} with {most:.2f}."
    if max(p_clean) <= rate:
        return f"Both look damaged: {heard}"
    if min(p_clean) <= rate:
        return f"The {FIELDS[p_clean.index(min(p_clean))]} looks damaged: {heard}"
    if dms.signals["p_match"][0] <= rate:
        return f"Image and context look clean but disagree: {heard}"
    if most > 0.5:  # by another scheduler than the rule
        return heard
    return "Nothing looks damaged: DMS answers as the static model does."


def _is_absent(dms: Answer, place: int, rate: float) -> bool:
    """Whether image or context is not there: damage may take all weight, too, but raises an alarm."""
    return dms.weights[place] == 0 and not (dms.signals and dms.signals["p_clean"][place] <= rate)


def _explain_sources(dms: Answer, rate: float) -> str:
    """The same of several images or passages."""
    if not dms.signals:
        return "The scheduler is uniform: this is the static model."
    most = max(dms.weights)
    sources = list(zip(dms.names, dms.weights, dms.signals["p_match"], strict=True))
    # damage may take all weight, too
    odd = [name for name, weight, p_match in sources if weight == 0 and p_match <= rate]
    low = [f"{name} ({weight:.2f})" for name, weight, _ in sources if weight < most and name not in odd]
    said = [f"All others contradict {' and '.join(odd)}: not heard."] if odd else []
    said += [f"Damage is seen in {' and '.join(low)}: heard less."] if low else []
    if not said and min(dms.signals["p_match"]) <= rate:
        return "They disagree, and no majority tells who is right: DMS takes no side."
    return " ".join(said) or "Nothing looks damaged or odd: DMS answers as the static model does."


def draw_bars(dms: Answer, rate: float) -> str:
    """Weights and signals as an HTML table of bars; p-values up to `rate` stand out."""
    values = {"weight": dms.weights, **dms.signals}
    head = "".join(f"<th>{name}</th>" for name in dms.names)
    rows = [f"<tr><th></th>{head}<th></th></tr>"]
    for name, bar in BARS.items():
        if name not in values:
            continue
        cells = ""
        for place, (source, value) in enumerate(zip(dms.names, values[name], strict=True)):
            alarm = name in ("p_clean", "p_match") and value <= rate
            absent = dms.names == FIELDS and _is_absent(dms, place, rate)
            cells += "<td>-</td>" if absent else f"<td>{_bar(bar, value, source.partition(' ')[0], alarm)}</td>"
        rows.append(f'<tr data-name="{name}"><th>{name}</th>{cells}<td>{bar.note}</td></tr>')
    return f'<table class="bars">{"".join(rows)}</table>'


def _bar(bar: Bar, value: float, modality: str, alarm: bool) -> str:
    zero, end = ((min(max(x, bar.low), bar.high) - bar.low) / (bar.high - bar.low) * 100 for x in (0, value))
    color = "alarm" if alarm else modality
    style = f"left:{min(zero, end):.1f}%;width:{abs(end - zero):.1f}%"
    digits = 4 if bar.high - bar.low < 0.1 else 2
    return (
        f'<span class="track"><i class="{color}" style="{style}"></i><b style="left:{zero:.1f}%"></b></span>'
        f'<span class="value">{value:.{digits}f}</span>'
    )


CSS = """
.answers textarea, #sentence textarea { font-size: 1.3em; font-weight: 600 }
.pixels img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain }
table.bars, table.bars tbody { display: block; border: 0 }
table.bars tr { display: flex; flex-wrap: wrap; align-items: center; border: 0; padding: 0 }
table.bars th, table.bars td { display: flex; align-items: center; flex: 1 1 110px; border: 0; padding: 2px 6px;
  font: inherit; line-height: 1.25 }
table.bars tr > :first-child { flex: 0 0 6.5em }
table.bars tr > :last-child { flex: 1 1 190px; opacity: 0.75 }
table.bars .track { position: relative; flex: 1; height: 14px; background: rgba(128, 128, 128, 0.18) }
table.bars .track i { position: absolute; top: 0; bottom: 0 }
table.bars .track b { position: absolute; top: -2px; bottom: -2px; border-left: 1px solid currentColor }
table.bars .value { flex: 0 0 4em; text-align: right; font-variant-numeric: tabular-nums }
table.bars i.image { background: #3b6fb6 }
table.bars i.context { background: #d98324 }
table.bars i.alarm { background: #c0392b }
"""


def responder(model: Any, collator: PromptCollator) -> Callable[..., tuple]:
    """`show` as the page calls it: images are gradio's descriptions of files, and what is wrong is a sentence."""

    def respond(image: dict[str, Any] | None, images: Sequence[dict[str, Any]] | None, *inputs: Any) -> tuple:
        try:
            paths = [file["path"] for file in images or ()]
            shown = show(model, collator, None if image is None else image["path"], paths, *inputs)
        except (ValueError, ImportError) as error:
            shown = Shown(sentence=f"Cannot answer: {error}.")
        return tuple(vars(shown).values())

    return respond


def gradio() -> Any:
    """The package, its telemetry switched off.

    Raises:
        ImportError: naming the extra that brings it.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ImportError('the page needs gradio: pip install "modeling-dms[web]"') from error
    return gradio


def examples_for(name: str) -> tuple[list[Sample], str]:
    """What the page of a checkpoint offers to begin with, and what that is: shapes for those that know only them."""
    if name not in ON_SHAPES:
        with contextlib.suppress(ImportError):
            return load_example_photographs(), "photographs of scikit-image, free of copyright"
    samples = one_per_image(load_easy_vqa("test"), 2 * EXAMPLES)
    # questions that a guess rarely answers
    samples = [sample for sample in samples if sample.answers[0] in (*COLORS, *SHAPES)]
    return samples[:EXAMPLES], "held-out samples of easy-VQA"


def build(gr: Any, name: str, respond: Callable[..., tuple]) -> Any:
    """The page.

    Args:
        gr: the package gradio.
        name: of the checkpoint.
        respond: see `responder`.

    Returns:
        gradio's `Blocks`.
    """
    samples, source = examples_for(name)
    examples = [[str(sample.image), sample.context, sample.question] for sample in samples]
    pictures: dict[str, Any] = {"height": 240, "buttons": [], "elem_classes": "pixels"}

    def damage(modality: str, label: str, default: str) -> tuple[Any, Any]:
        with gr.Column(min_width=200):
            names = [(_readable(kind), kind) for kind in kinds(modality)]
            kind = gr.Dropdown(names, value=default, label=f"damage to the {label}", elem_id=f"{modality}-kind")
            severity = gr.Slider(0, 5, 0, step=1, label="severity (0: none)", elem_id=f"{modality}-severity")
        return kind, severity

    with gr.Blocks(title="Dynamic Modality Scheduling", delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# Dynamic Modality Scheduling: {name}\n{INTRODUCTION}")
        with gr.Row():
            with gr.Column(scale=2):
                image = gr.Image(
                    examples[0][0], label="image", sources=["upload", "clipboard"], elem_id="image", **pictures
                )
                with gr.Accordion("further images", open=False):
                    images = gr.File(file_count="multiple", show_label=False, height=120, elem_id="images")
                context = gr.Textbox(examples[0][1], label="context", max_lines=6, elem_id="context")
                question = gr.Textbox(examples[0][2], label="question", max_lines=6, elem_id="question")
                with gr.Row():
                    damages = [
                        *damage("image", "image", "image:color_cast"),
                        *damage("text", "context", "text:typos"),
                    ]
                button = gr.Button("answer", variant="primary", elem_id="answer")
            with gr.Column(scale=3):
                with gr.Row():
                    shown = gr.Image(
                        label="image as the model sees it",
                        format="png",
                        interactive=False,
                        elem_id="shown-image",
                        **pictures,
                    )
                    with gr.Column():
                        read = gr.Textbox(label="context as the model reads it", max_lines=6, elem_id="shown-context")
                        with gr.Row(elem_classes="answers"):
                            static = gr.Textbox(label="static answers", min_width=80, elem_id="static")
                            dms = gr.Textbox(label="DMS answers", min_width=80, elem_id="dms")
                sentence = gr.Textbox(label="what DMS did", max_lines=4, elem_id="sentence")
                bars = gr.HTML(elem_id="bars")
        inputs, outputs = [image, images, context, question, *damages], [shown, read, static, dms, sentence, bars]
        chosen = gr.Examples(examples, [image, context, question], label=source)
        # a file is read by `Sample.load_image`: gradio would clip 16-bit images, and fail on what is no image
        event: dict[str, Any] = {"fn": respond, "inputs": inputs, "outputs": outputs, "preprocess": False}
        event |= {"show_progress": "minimal", "show_progress_on": sentence}
        changes = [
            image.upload,
            image.clear,
            images.upload,
            images.clear,
            context.submit,
            question.submit,
            button.click,
            page.load,
        ]
        changes += [component.input for component in damages]
        gr.on(changes, **event, trigger_mode="always_last", api_name="answer")
        chosen.load_input_event.then(**event, api_visibility="private")
    return page


def _readable(kind: str) -> str:
    return kind.partition(":")[2].replace("imagenet_c/", "ImageNet-C: ").replace("_", " ")


def serve(name: str | None, port: int | None, calibration_samples: int) -> None:
    """Loads a checkpoint and serves the page on this machine until it is interrupted.

    Args:
        name: `None` takes the shipped one that knows photographs, where the parts are installed that it is assembled
            from, else one that knows shapes.
        port: `None` takes the first free one from 7860 on.

    Raises:
        ImportError: naming the extra that brings gradio.
        OSError: if the port is taken.
    """
    gr = gradio()
    try:
        loaded = load_for_answers(name or PHOTOGRAPHS, MAX_NEW_TOKENS, calibration_samples)
    except ImportError as error:
        if name is not None:
            raise
        print(f"no photographs: {error}")
        loaded = load_for_answers(name := ON_SHAPES[0], MAX_NEW_TOKENS, calibration_samples)
    page = build(gr, name or PHOTOGRAPHS, responder(*loaded))
    options = {"css": CSS, "footer_links": [], "max_file_size": "50mb", "share": False, "ssr_mode": False}
    _, url, _ = page.launch(server_port=port, quiet=True, prevent_thread_lock=True, **options)
    print(f"open {url} in a browser; Ctrl-C ends it", flush=True)
    page.block_thread()
