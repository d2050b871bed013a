"""The command line `dms`."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, Literal, cast

import torch
import typer
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from typer.core import TyperCommand, TyperGroup

from modeling_dms.training.extras import COMMANDS, install, missing_packages, require_extra


# what went wrong outside of this program: told in one line
FAULTS = (
    ValueError,
    OSError,
    ImportError,
    FloatingPointError,
    HTTPError,
    MemoryError,
    SafetensorError,
    UnpicklingError,
    torch.OutOfMemoryError,
)


class _Commands(TyperGroup):
    """Tells a fault in one line on standard error, with exit code 1. Wrong usage is typer's to tell."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error
        except BrokenPipeError:  # whoever read the output has enough of it
            raise
        except FAULTS as error:
            typer.echo(f"error: {' '.join(str(error).split()) or type(error).__name__}", err=True)
            raise typer.Exit(1) from error


class _Command(TyperCommand):
    """Names the extra that it needs, and looks for it before any work."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        super().format_epilog(ctx, formatter)
        needs = {command: extra for command, extra in COMMANDS.items() if command.split()[0] == self.name}
        formatter.write_paragraph()
        with formatter.indentation():
            for command, extra in needs.items():
                formatter.write_text(f"`dms {command}` needs: {install(extra)}")

    def invoke(self, ctx: Any) -> Any:
        require_extra("demo --web" if ctx.params.get("web") else cast(str, self.name))
        return super().invoke(ctx)


class _Train(_Command):
    """Lists the fields of a run, which a parser of its own reads."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        if missing_packages(COMMANDS["train"]):
            with formatter.section("Fields"):
                formatter.write_text("Listed here where the packages below are installed.")
            return
        from modeling_dms.training.finetune.arguments import TRAINING_ARGUMENTS, described_fields, described_presets

        for title, rows in described_fields().items():
            with formatter.section(title):
                formatter.write_dl(rows)
        with formatter.indentation():
            formatter.write_text(f"All: {TRAINING_ARGUMENTS}")
        with formatter.section("Presets, for --config"):
            formatter.write_dl(described_presets())


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
    help="Dynamic Modality Scheduling: weighs image and text of a vision-language model, sample by sample, by how "
    "far each can be trusted.",
    epilog="""\b
First steps:
  dms predict --context "a teal circle." --question "what color is the shape?"
  dms calibrate --model demo-llava --data easy-vqa --out my-model
  dms evaluate --model my-model --out runs/my-model --samples 50 --seeds 1

\b
Exit codes:
  0    done
  1    a named fault: one line `error: ...` on standard error
  2    wrong usage: an option or a value that the command does not take
  130  interrupted by Ctrl-C""",
)
_command = partial(app.command, cls=_Command)

DATA = "easy-vqa, openmoji, flickr8k, a Hub id, or a folder or file with a table of image, context, question, answers."
CHECKPOINT = (
    "Folder, Hub id or shipped name (demo-llava, demo-blip2, photographs-llava) of a vanilla or DMS checkpoint, or an "
    "adapter."
)


@app.callback()
def _main() -> None:
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def _usage() -> Iterator[None]:
    """Within it, what is wrong is an option's value."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(" ".join(str(error).split())) from error


def _listed(option: str, text: str) -> list[str]:
    """What stands between commas, once each."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise typer.BadParameter(f"expected names or numbers separated by commas, got {text!r}", param_hint=option)
    return parts


def _number(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected integers separated by commas, got {text!r}", param_hint=option) from error


@_command(
    epilog="""\b
Examples:
  dms predict --context "a teal circle." --question "what color is the shape?"
  dms predict --model my-model --image photo.png --question "what color is the shape?\""""
)
def predict(
    question: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[list[Path], typer.Option(help="Image file; again for each further one.")] = [],  # noqa: B006
    context: Annotated[
        list[str], typer.Option(help="A passage that may answer the question too; again for each further one.")
    ] = [],  # noqa: B006
    model: Annotated[str, typer.Option(help=CHECKPOINT)] = "demo-llava",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 20,
) -> None:
    """Answers one question about an image and a context.

    Prints the answer, the weight of each image and passage, and the signals they came from. A shipped checkpoint is
    calibrated first, which takes some seconds.
    """
    from modeling_dms.training.apps.answer import predict_one

    predict_one(question, image, context, model, max_new_tokens)


@_command(
    epilog="""\b
Examples:
  dms demo
  dms demo --web --model my-model"""
)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for table, numbers and picture.")] = Path("demo"),
    backbone: Annotated[Literal["llava", "blip2", "both"], typer.Option(help="Which checkpoint to run.")] = "both",
    samples: Annotated[int, typer.Option(min=50, max=880, help="Held-out samples.")] = 100,
    calibration_samples: Annotated[int, typer.Option(min=50, help="Clean samples to calibrate on.")] = 200,
    write_docs: Annotated[
        Path | None, typer.Option(help="Also write the results into the documents of this clone.")
    ] = None,
    web: Annotated[
        bool, typer.Option("--web", help="Serve a page instead, to try inputs and corruptions on.")
    ] = False,
    model: Annotated[str | None, typer.Option(help=f"With --web: {CHECKPOINT} Default: photographs-llava.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="With --web: default is the first free one from 7860 on.")
    ] = None,
) -> None:
    """Compares static, DMS and oracle weights on corrupted images and texts.

    Takes held-out samples of easy-VQA and two small checkpoints that ship with this package.
    """
    if not web:
        if model is not None or port is not None:
            raise typer.BadParameter("--model and --port are for --web")
        from modeling_dms.training.apps.demo import run_demo

        backbones = ["llava", "blip2"] if backbone == "both" else [backbone]
        run_demo(out, backbones, samples, calibration_samples, write_docs)
        return
    if (out, backbone, samples, write_docs) != (Path("demo"), "both", 100, None):
        raise typer.BadParameter("--out, --backbone, --samples and --write-docs are not for --web")
    from modeling_dms.training.apps.web import serve

    serve(model, port, calibration_samples)


@_command(
    epilog="""\b
Examples:
  dms calibrate --model demo-llava --data easy-vqa --out my-model
  dms calibrate --model llava-hf/llava-1.5-7b-hf --data my_folder --out my-model"""
)
def calibrate(
    model: Annotated[str, typer.Option(help=CHECKPOINT)],
    data: Annotated[str, typer.Option(help=f"{DATA} Its training split, no labels are used.")],
    out: Annotated[Path, typer.Option(help="Folder for the calibrated checkpoint.")],
    samples: Annotated[int, typer.Option(min=50, help="Clean samples, of different images.")] = 1000,
    scheduler: Annotated[
        str | None, typer.Option(help="rule, learned, ... instead of the checkpoint's; a vanilla one has the rule.")
    ] = None,
    dms: Annotated[str, typer.Option(help="Other fields of DMSConfig, as a JSON object.")] = "{}",
    leave_out: Annotated[
        str, typer.Option(help="Families of self-made damage that it must not know, separated by commas: for studies.")
    ] = "",
    asked: Annotated[
        int,
        typer.Option(min=0, help="Samples that it answers as they are and damaged; 0: none, and no reliability."),
    ] = 100,
) -> None:
    """Fits what clean data look like, and how far answers can be relied on.

    Prints how much damage of each family is seen, and writes a checkpoint with the statistics in it, that table as
    calibration.txt and as a picture, calibration.png.
    """
    from modeling_dms.calibrate.damage import FAMILIES
    from modeling_dms.training.finetune.arguments import ModelArguments
    from modeling_dms.training.finetune.calibrate import run_calibration
    from modeling_dms.training.models.loading import check_dms
    from modeling_dms.training.names import check_names

    with _usage():
        choices = {**cast(dict, ModelArguments(model, dms=dms).dms), **({"scheduler": scheduler} if scheduler else {})}
        check_dms(choices)
        left_out = [family for family in leave_out.split(",") if family]
        check_names("family", left_out, [name for names in FAMILIES for name in names])
    typer.echo(run_calibration(model, data, out, samples, choices, left_out, asked))
    typer.echo(f"wrote {out}")


@_command(
    epilog="""\b
Examples:
  dms evaluate --model my-model --out runs/my-model --samples 50 --seeds 1
  dms evaluate --model my-model --data my_folder --out runs/fog \\
    --corruptions image:fog,text:typos,image:fog+text:typos --severities 1,3,5"""
)
def evaluate(
    model: Annotated[str, typer.Option(help=CHECKPOINT)],
    out: Annotated[Path, typer.Option(help="Folder for results.json, report.md and pictures.")],
    task: Annotated[
        str, typer.Option(help="vqa (ranks answers), vqa-generate, caption, retrieval or matching.")
    ] = "vqa",
    data: Annotated[str, typer.Option(help=DATA)] = "easy-vqa",
    split: Annotated[str, typer.Option(help="train, validation, test, or one that the table names.")] = "test",
    training_data: Annotated[
        str | None, typer.Option(help="Calibrates, and trains baselines, where --data is for testing alone.")
    ] = None,
    corruptions: Annotated[
        str,
        typer.Option(help="Groups (seen, unseen, mismatch, both) or names such as image:fog, separated by commas."),
    ] = "seen,unseen,mismatch",
    kinds: Annotated[str | None, typer.Option(help="Only these kinds of the groups, separated by commas.")] = None,
    severities: Annotated[str, typer.Option(help="1 (mild) to 5 (strong), separated by commas.")] = "3,5",
    seeds: Annotated[int, typer.Option(min=1, help="Draws of corruptions and questions.")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="Images a seed, one question each.")] = 250,
    methods: Annotated[
        str, typer.Option(help="Separated by commas; `all` for every baseline.")
    ] = "static,rule,oracle",
    calibration_samples: Annotated[
        int,
        typer.Option(min=0, help="Clean samples that a checkpoint without calibration is calibrated on; 0: none."),
    ] = 300,
    training_samples: Annotated[int, typer.Option(min=1, help="Samples that trained baselines see.")] = 6000,
    validation_samples: Annotated[int, typer.Option(min=1, help="Images that baselines are tuned on.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 50,
    dtype: Annotated[str, typer.Option(help="Precision of the weights: auto, float32, bfloat16, float16.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what the folder holds.")] = False,
) -> None:
    """Measures a checkpoint, clean and corrupted, against baselines.

    All methods see the same samples and corruptions. Unseen are those that `dms train` holds out by default, or, of a
    checkpoint in the folder of a run, those that this run held out.
    """
    from modeling_dms.training.corruptions import CorruptionConfig
    from modeling_dms.training.evaluate.baselines import FOR_SEVERAL, METHODS
    from modeling_dms.training.evaluate.run import BOTH_RATE, EvaluationConfig
    from modeling_dms.training.evaluate.run import evaluate as run
    from modeling_dms.training.publish.record import families_of

    chosen = _listed("--methods", methods)
    if chosen == ["all"]:
        chosen = [name for name in METHODS if name not in ("own", *FOR_SEVERAL)]
    with _usage():
        config = EvaluationConfig(
            model=model,
            out=out,
            task=task,
            data=data,
            split=split,
            training_data=training_data,
            corruptions=_listed("--corruptions", corruptions),
            kinds=None if kinds is None else _listed("--kinds", kinds),
            severities=[_number("--severities", part) for part in _listed("--severities", severities)],
            seeds=seeds,
            samples=samples,
            methods=chosen,
            calibration_samples=calibration_samples,
            training_samples=training_samples,
            validation_samples=validation_samples,
            batch_size=batch_size,
            dtype=dtype,
            resume=resume,
            families=CorruptionConfig(**{"both_rate": BOTH_RATE, **families_of(model)}),
        )
    run(config)


@_command(
    epilog="""\b
Example:
  dms report runs/my-model --out runs/results.md"""
)
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `dms evaluate` wrote.")],
    out: Annotated[Path, typer.Option(help="Markdown file, in a folder above those.")],
) -> None:
    """Writes one document from several evaluations."""
    from modeling_dms.training.evaluate.report import combine

    combine(folders, out)


@app.command(
    cls=_Train,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="""\b
Examples:
  dms train --config demo-scheduler
  dms train --config lora --model my-model --data easy-vqa --output_dir runs/lora
  dms train --config lora --model my-model --data my_folder --output_dir runs/mine --learning_rate 1e-4 --resume""",
)
def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file with fields, or the name of a preset.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
) -> None:
    """Trains a scheduler, LoRA, or both.

    Each field below can stand in the file or be given as an option, which wins.
    """
    from modeling_dms.training.finetune.arguments import read_arguments
    from modeling_dms.training.finetune.train import run_training

    with _usage():
        arguments = read_arguments(config, context.args)
    run_training(arguments, resume)


@_command(
    epilog="""\b
Example:
  dms merge runs/lora/final --out my-merged-model"""
)
def merge(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an adapter.")],
    out: Annotated[Path, typer.Option(help="Folder for the whole checkpoint.")],
) -> None:
    """Merges an adapter into its base.

    The result loads with trust_remote_code=True, without this package.
    """
    from modeling_dms.training.publish.release import merge as write

    typer.echo(f"wrote {write(model, out)}")


@_command(
    epilog="""\b
Example:
  dms card my-model --results runs/my-model --license mit"""
)
def card(
    folder: Annotated[Path, typer.Argument(help="A checkpoint or an adapter.")],
    results: Annotated[
        list[Path] | None, typer.Option(help="Folder or results.json of `dms evaluate`; may be repeated.")
    ] = None,
    run: Annotated[
        list[Path] | None, typer.Option(help="Folder of `dms train`; repeated in the order of the stages.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Of the weights, as the Hub names it.")] = None,
) -> None:
    """Writes the model card README.md from what is on disk.

    Text and metadata of yours in it are kept.
    """
    from modeling_dms.training.publish.card import write_card

    path = write_card(folder, results or [], run or [], metadata={"license": license})
    typer.echo(f"wrote {path}")


@_command(
    epilog="""\b
Example:
  dms push my-model --repo me/my-model --private

It needs a token: `hf auth login`, or HF_TOKEN."""
)
def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint or an adapter.")],
    repo: Annotated[str, typer.Option(help="On the Hub: owner/name. It is created where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="For a new one.")] = False,
) -> None:
    """Uploads a checkpoint or an adapter to the Hugging Face Hub.

    Weights, configuration, processor, code and card, in one commit.
    """
    from modeling_dms.training.publish.push import push as run

    typer.echo(f"pushed: {run(folder, repo, private)}")


@_command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="""\b
Example:
  dms serve my-model --port 8000""",
)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a whole DMS checkpoint.")],
) -> None:
    """Serves a checkpoint by OpenAI's API.

    Takes any option of `transformers serve`, such as --port; `transformers serve --help` lists them.
    """
    from modeling_dms.training.apps.serve import serve as run

    run(model, context.args)


@_command(
    epilog="""\b
Example:
  dms assemble llava-dinov2s-smollm2-135m --out bases"""
)
def assemble(
    name: Annotated[str, typer.Argument(help="llava-dinov2s-smollm2-135m or blip2-dinov2s-smollm2-135m.")],
    out: Annotated[Path, typer.Option(help="Folder that gets a folder of that name.")] = Path("bases"),
) -> None:
    """Builds a checkpoint from pretrained parts of Python packages.

    What no part has is yet to be trained.
    """
    from modeling_dms.training.models.assemble import assemble as run

    typer.echo(f"wrote {run(name, out)}")


@_command(
    epilog="""\b
Example:
  dms release runs/llava-calibrated --base llava-dinov2s-smollm2-135m --out my-adapter"""
)
def release(
    run: Annotated[Path, typer.Argument(help="Folder with an adapter, of `dms train` or `dms calibrate`.")],
    base: Annotated[str, typer.Option(help="The assembled checkpoint it was trained on.")],
    out: Annotated[Path, typer.Option(help="Folder for the small adapter.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Of its LoRA, lower than what was trained.")] = None,
) -> None:
    """Makes an adapter small, and independent of where it was trained.

    Its base is rebuilt by `dms assemble`.
    """
    from modeling_dms.training.publish.release import release as write

    typer.echo(f"wrote {write(run, base, out, rank)}")


if __name__ == "__main__":
    app()
