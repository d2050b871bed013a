"""`dms serve`: DMS checkpoints behind `transformers serve`, which speaks OpenAI's API."""

from collections.abc import Sequence

import typer
from transformers import AutoConfig
from transformers.cli.serve import Serve
from transformers.utils import find_adapter_config_file

from modeling_dms.training.loading import MODEL_CLASSES


def serve(name: str, arguments: Sequence[str] = ()) -> None:
    """Serves a checkpoint until it is interrupted.

    Args:
        name: folder or Hub id of a whole DMS checkpoint.
        arguments: options of `transformers serve`, such as `["--port", "8000"]`.

    Raises:
        ValueError: for an adapter, or a checkpoint without DMS.
        ImportError: naming the extra that is not installed.
    """
    if find_adapter_config_file(name):
        raise ValueError(f"{name} is an adapter: make it a whole checkpoint by `dms merge` first")
    kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    known = [model_type for model_type in MODEL_CLASSES if model_type.startswith("dms_")]
    if kind not in known:
        raise ValueError(f"{name} is a {kind!r} checkpoint, expected one of {', '.join(known)}: see `dms calibrate`")
    app = typer.Typer()
    app.command()(Serve)
    app([name, *arguments], standalone_mode=False)
