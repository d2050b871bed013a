"""The command line `dms`."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Literal, cast

import typer
from safetensors import SafetensorError


# what went wrong outside of this program: told in one line
FAULTS = (ValueError, OSError, ImportError, SafetensorError, UnpicklingError)

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Dynamic Modality Scheduling.")


@app.callback()
def _main() -> None:
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _failed(error: Exception) -> typer.Exit:
    """Prints an error in one line."""
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)
    return typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for table, numbers and picture.")] = Path("demo"),
    backbone: Annotated[Literal["llava", "blip2", "both"], typer.Option(help="Which checkpoint to run.")] = "both",
    samples: Annotated[int, typer.Option(min=50, max=880, help="Held-out samples.")] = 120,
    calibration_samples: Annotated[int, typer.Option(min=50, help="Clean samples to calibrate on.")] = 300,
    write_docs: Annotated[
        Path | None, typer.Option(help="Also write the results into the README and model card of this clone.")
    ] = None,
    web: Annotated[
        bool, typer.Option("--web", help="Serve a page instead, to try inputs and corruptions on.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="With --web: folder, Hub id or shipped name of a checkpoint. Default: demo-llava."),
    ] = None,
    port: Annotated[int | None, typer.Option(help="With --web: default is the first free one from 7860 on.")] = None,
) -> None:
    """Corrupts images and contexts of held-out easy-VQA samples and compares static, DMS and oracle weights."""
    if not web:
        if model is not None or port is not None:
            raise typer.BadParameter("--model and --port are for --web")
        from modeling_dms.training.demo import run_demo

        backbones = ["llava", "blip2"] if backbone == "both" else [backbone]
        try:
            run_demo(out, backbones, samples, calibration_samples, write_docs)
        except FAULTS as error:
            raise _failed(error) from error
        return
    from modeling_dms.training.web import serve

    try:
        serve(model or "demo-llava", port, calibration_samples)
    except FAULTS as error:
        raise _failed(error) from error


@app.command()
def assemble(
    name: Annotated[str, typer.Argument(help="llava-dinov2s-smollm2-135m or blip2-dinov2s-smollm2-135m.")],
    out: Annotated[Path, typer.Option(help="Folder that gets a folder of that name.")] = Path("bases"),
) -> None:
    """Builds a checkpoint from pretrained parts that Python packages carry; what no part has is yet to be trained."""
    from modeling_dms.training.assemble import assemble as run

    try:
        typer.echo(f"wrote {run(name, out)}")
    except FAULTS as error:
        raise _failed(error) from error


@app.command()
def release(
    run: Annotated[Path, typer.Argument(help="Folder with an adapter, of `dms train` or `dms calibrate`.")],
    base: Annotated[str, typer.Option(help="The assembled checkpoint it was trained on.")],
    out: Annotated[Path, typer.Option(help="Folder for the small adapter.")],
) -> None:
    """Makes an adapter small, and independent of where it was trained: its base is rebuilt by `dms assemble`."""
    from modeling_dms.training.release import release as write

    try:
        typer.echo(f"wrote {write(run, base, out)}")
    except FAULTS as error:
        raise _failed(error) from error


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="YAML file, or the name of a preset such as scheduler or lora.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
) -> None:
    """Trains a scheduler, LoRA, or both. Any field of the file can be given as `--field value` too."""
    from huggingface_hub.errors import HTTPError

    from modeling_dms.training.arguments import read_arguments
    from modeling_dms.training.train import run_training

    try:
        run_training(read_arguments(config, context.args), resume)
    except (*FAULTS, FloatingPointError, HTTPError) as error:
        raise _failed(error) from error


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a vanilla or DMS checkpoint, or an adapter.")],
    data: Annotated[str, typer.Option(help="As for `train`: its training split, no labels are used.")],
    out: Annotated[Path, typer.Option(help="Folder for the calibrated checkpoint.")],
    samples: Annotated[int, typer.Option(min=50, help="Clean samples, of different images.")] = 1000,
    scheduler: Annotated[
        str | None, typer.Option(help="rule, learned, ... instead of the checkpoint's; a vanilla one has the rule.")
    ] = None,
    dms: Annotated[str, typer.Option(help="Other fields of DMSConfig, as a JSON object.")] = "{}",
) -> None:
    """Fits what clean data look like, so that DMS can tell damaged images and contexts from them."""
    from modeling_dms.training.arguments import ModelArguments
    from modeling_dms.training.train import run_calibration

    try:
        choices = {**cast(dict, ModelArguments(model, dms=dms).dms), **({"scheduler": scheduler} if scheduler else {})}
        typer.echo(run_calibration(model, data, out, samples, choices))
        typer.echo(f"wrote {out}")
    except FAULTS as error:
        raise _failed(error) from error


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="Folder, Hub id or shipped name of a vanilla or DMS checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json, report.md and pictures.")],
    task: Annotated[
        str, typer.Option(help="vqa (ranks answers), vqa-generate, caption, retrieval or matching.")
    ] = "vqa",
    data: Annotated[str, typer.Option(help="As for `train`.")] = "easy-vqa",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    training_data: Annotated[
        str | None, typer.Option(help="Calibrates, and trains baselines, where `data` are for testing alone.")
    ] = None,
    corruptions: Annotated[
        str,
        typer.Option(help="Groups (seen, unseen, mismatch, both) or names such as image:fog, separated by commas."),
    ] = "seen,unseen,mismatch",
    kinds: Annotated[str | None, typer.Option(help="Only these kinds of the groups, separated by commas.")] = None,
    severities: Annotated[str, typer.Option(help="1 (mild) to 5 (strong), separated by commas.")] = "3,5",
    seeds: Annotated[int, typer.Option(help="Draws of corruptions and questions.")] = 3,
    samples: Annotated[int, typer.Option(help="Images a seed, one question each.")] = 250,
    methods: Annotated[
        str, typer.Option(help="Separated by commas; `all` for every baseline.")
    ] = "static,rule,oracle",
    calibration_samples: Annotated[
        int, typer.Option(help="Clean samples that a checkpoint without calibration is calibrated on; 0: none.")
    ] = 300,
    training_samples: Annotated[int, typer.Option(help="Samples that trained baselines see.")] = 6000,
    validation_samples: Annotated[int, typer.Option(help="Images that baselines are tuned on.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Samples at once.")] = 50,
    dtype: Annotated[str, typer.Option(help="Precision of the weights, such as bfloat16.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what the folder holds.")] = False,
) -> None:
    """Measures a checkpoint, clean and corrupted, against baselines on the same samples and corruptions."""
    try:
        from modeling_dms.training.baselines import METHODS
        from modeling_dms.training.evaluate import EvaluationConfig
        from modeling_dms.training.evaluate import evaluate as run

        chosen = _listed(methods) or []
        if chosen == ["all"]:
            chosen = [name for name in METHODS if name != "own"]
        levels = [int(part) for part in _listed(severities) or []]
        config = EvaluationConfig(
            model=model,
            out=out,
            task=task,
            data=data,
            split=split,
            training_data=training_data,
            corruptions=_listed(corruptions) or [],
            kinds=_listed(kinds),
            severities=levels,
            seeds=seeds,
            samples=samples,
            methods=chosen,
            calibration_samples=calibration_samples,
            training_samples=training_samples,
            validation_samples=validation_samples,
            batch_size=batch_size,
            dtype=dtype,
            resume=resume,
        )
        run(config)
    except FAULTS as error:
        raise _failed(error) from error


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `evaluate` wrote.")],
    out: Annotated[Path, typer.Option(help="Markdown file, in a folder above those.")],
    readme: Annotated[Path | None, typer.Option(help="File that gets a short table between its grid markers.")] = None,
) -> None:
    """Writes one document from several evaluations."""
    from modeling_dms.training.report import combine

    try:
        combine(folders, out, readme)
    except FAULTS as error:
        raise _failed(error) from error


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="A checkpoint or an adapter.")],
    results: Annotated[
        list[Path] | None, typer.Option(help="Folder or results.json of `evaluate`; may be repeated.")
    ] = None,
    run: Annotated[
        list[Path] | None, typer.Option(help="Folder of `train`; repeated in the order of the stages.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Of the weights, as the Hub names it.")] = None,
) -> None:
    """Writes the model card README.md from what is on disk; text and metadata of yours in it are kept."""
    from modeling_dms.training.card import write_card

    try:
        path = write_card(folder, results or [], run or [], metadata={"license": license})
        typer.echo(f"wrote {path}")
    except FAULTS as error:
        raise _failed(error) from error


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an adapter.")],
    out: Annotated[Path, typer.Option(help="Folder for the whole checkpoint.")],
) -> None:
    """Merges an adapter into its base: the result loads with trust_remote_code=True, without this package."""
    from modeling_dms.training.release import merge as write

    try:
        typer.echo(f"wrote {write(model, out)}")
    except FAULTS as error:
        raise _failed(error) from error


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint or an adapter.")],
    repo: Annotated[str, typer.Option(help="On the Hub: owner/name. It is created where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="For a new one.")] = False,
) -> None:
    """Uploads weights, configuration, processor, code and card to the Hugging Face Hub, in one commit."""
    from modeling_dms.training.push import push as run

    try:
        typer.echo(f"pushed: {run(folder, repo, private)}")
    except FAULTS as error:
        raise _failed(error) from error


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a DMS checkpoint.")],
) -> None:
    """Serves a checkpoint by OpenAI's API, with any option of `transformers serve`, such as `--port`."""
    from modeling_dms.training.serve import serve as run

    try:
        run(model, context.args)
    except (ValueError, OSError, ImportError) as error:
        raise _failed(error) from error


@app.command()
def predict(
    question: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[Path | None, typer.Option(help="Image file; leave out for a missing image.")] = None,
    context: Annotated[str | None, typer.Option(help="A passage that may answer the question too.")] = None,
    model: Annotated[
        str, typer.Option(help="Folder, Hub id or shipped name of a vanilla or DMS checkpoint.")
    ] = "demo-llava",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 20,
) -> None:
    """Answers one question about an image and a context, and prints the modality weights and signals."""
    from modeling_dms.training.answer import predict_one

    try:
        predict_one(question, image, context, model, max_new_tokens)
    except FAULTS as error:
        raise _failed(error) from error


if __name__ == "__main__":
    app()
