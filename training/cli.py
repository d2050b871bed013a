"""The command line `dms`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


app = typer.Typer(no_args_is_help=True, add_completion=False, help="Dynamic Modality Scheduling for BLIP-2 and LLaVA.")


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
) -> None:
    """Corrupts images and contexts of held-out easy-VQA samples and compares static, DMS and oracle weights."""
    from modeling_dms.training.demo import run_demo

    run_demo(out, ["llava", "blip2"] if backbone == "both" else [backbone], samples, calibration_samples, write_docs)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="YAML file, or a preset: demo-scheduler, scheduler, lora, paper.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
) -> None:
    """Trains a scheduler, LoRA, or both. Any field of the file can be given as `--field value` too."""
    from modeling_dms.training.arguments import read_arguments
    from modeling_dms.training.train import run_training

    try:
        run_training(read_arguments(config, context.args), resume)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        raise _failed(error) from error


@app.command()
def predict(
    question: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[Path | None, typer.Option(help="Image file; leave out for a missing image.")] = None,
    context: Annotated[str | None, typer.Option(help="A passage that may answer the question too.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a BLIP-2, LLaVA or DMS checkpoint. Default: the demo's LLaVA."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 20,
) -> None:
    """Answers one question about an image and a context, and prints the modality weights and signals."""
    from modeling_dms.training.demo import predict_one

    try:
        predict_one(question, image, context, model, max_new_tokens)
    except (ValueError, OSError) as error:
        raise _failed(error) from error


if __name__ == "__main__":
    app()
