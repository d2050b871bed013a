"""A text-only pass through the first layers of a language model, for features that the image has not touched."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn


class _Reached(Exception):  # noqa: N818
    """Raised by the deepest wanted layer: the layers behind it need not run."""


_collected: ContextVar[list[Tensor] | None] = ContextVar("text_only_states", default=None)


def _collect(module: nn.Module, args: tuple, output: Any) -> None:
    # dynamo cannot trace a ContextVar; compiled code never runs inside `text_only_states`
    if torch.compiler.is_dynamo_compiling():
        return
    states = _collected.get()
    if states is not None:
        states.append(output[0] if isinstance(output, tuple) else output)


def _stop(module: nn.Module, args: tuple, output: Any) -> None:
    # `torch.export` loses track of modules that are left by an exception; of the layers behind, which then run, it
    # keeps nothing
    if not torch.compiler.is_compiling() and _collected.get() is not None:
        raise _Reached


def layers_of(stack: nn.Module) -> nn.ModuleList:
    """The transformer layers of a language model's decoder or encoder."""
    return next(child for child in stack.children() if isinstance(child, nn.ModuleList))


def watch_layers(stack: nn.Module, depth: int) -> None:
    """Prepares the first `depth` layers for `text_only_states`. Outside of it the hooks do nothing."""
    layers = layers_of(stack)
    for layer in layers[:depth]:
        layer.register_forward_hook(_collect)
    layers[depth - 1].register_forward_hook(_stop)


@torch.compiler.disable
@torch.no_grad()
def text_only_states(run: Callable[[], Any], embeddings: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Hidden states of some of the watched layers; the model stops after the deepest. Safe to call from several
    threads.

    Args:
        run: calls the model on the text tokens alone.
        embeddings: (B, N, D), what it starts from.
        layers: 0 for the embeddings, k for what the k-th layer returns.

    Returns:
        (B, N, D_layer) each.
    """
    states = [embeddings]
    token = _collected.set(states)
    try:
        run()
    except _Reached:
        pass
    finally:
        _collected.reset(token)
    return [states[layer] for layer in layers]
