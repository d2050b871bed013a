"""`dms serve`: DMS checkpoints behind `transformers serve`, which speaks OpenAI's API."""

import socket
from collections.abc import Sequence

import typer
from transformers.cli.serve import Serve
from transformers.utils import find_adapter_config_file

from modeling_dms.training.loading import MODEL_CLASSES, located, read_config


def serve(name: str, arguments: Sequence[str] = ()) -> None:
    """Serves a checkpoint until it is interrupted.

    Args:
        name: folder or Hub id of a whole DMS checkpoint.
        arguments: options of `transformers serve`, such as `["--port", "8000"]`.

    Raises:
        ValueError: for an adapter, or a checkpoint without DMS.
        OSError: as `load`, or for a port that is taken.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(Serve)
    checkpoint = str(located(name))
    # an option that `transformers serve` does not have is wrong usage, as one of our own
    context = typer.main.get_command(app).make_context("dms serve", [checkpoint, *arguments])
    if find_adapter_config_file(checkpoint):
        raise ValueError(f"{name} is an adapter: make it a whole checkpoint by `dms merge` first")
    kind = read_config(checkpoint).model_type
    known = [model_type for model_type in MODEL_CLASSES if model_type.startswith("dms_")]
    if kind not in known:
        raise ValueError(f"{name} is a {kind!r} checkpoint, expected one of {', '.join(known)}: see `dms calibrate`")
    with context:
        host, port = context.params["host"], context.params["port"]
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host, port), family=family).close()
        except (OSError, OverflowError) as error:  # which the server would tell among other lines
            raise OSError(f"cannot listen at {host}, port {port}: {error}") from error
        context.command.invoke(context)
