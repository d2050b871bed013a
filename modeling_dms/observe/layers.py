"""Hidden states of some layers, kept by hooks while the backbone runs as it always does."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modeling_dms.steer.running import Running


class Reached(Exception):  # noqa: N818
    """Raised where nothing behind is wanted of a pass: it need not run."""


@dataclass
class Watch:
    """States kept of a running pass, by layer; whether it ends with the deepest, and whether it keeps any."""

    states: dict[int, Tensor] = field(default_factory=dict)
    ends: bool = False
    keeps: bool = True


# the pass that leaves the states of its watched layers
watched: Running[Watch | None] = Running("watched_layers", None)


def layers_of(stack: nn.Module) -> nn.ModuleList:
    """The transformer layers of a vision tower, or of a language model's decoder or encoder."""
    return next(module for module in stack.modules() if isinstance(module, nn.ModuleList))


def watch_layers(stack: nn.Module, layers: Sequence[int]) -> None:
    """Prepares a stack for `kept_states`: layer 0 is what the first one reads, layer k what the k-th returns."""
    modules = layers_of(stack)
    for layer in layers:
        if layer == 0:
            modules[0].register_forward_pre_hook(_keep_input, with_kwargs=True)
        else:
            modules[layer - 1].register_forward_hook(partial(_keep_output, layer, layers[-1]))


def _keep_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    watch = watched.get()
    if watch is not None and watch.keeps:
        watch.states[0] = args[0] if args else kwargs["hidden_states"]


def _keep_output(layer: int, deepest: int, module: nn.Module, args: tuple, output: Any) -> None:
    watch = watched.get()
    if watch is None or not watch.keeps:
        return
    watch.states[layer] = output[0] if isinstance(output, tuple) else output
    # a compiled program cannot be left in the middle; of the layers behind, which then run, it keeps nothing
    if watch.ends and layer == deepest and not torch.compiler.is_compiling():
        raise Reached


def kept_states(run: Callable[[], Any], layers: Sequence[int]) -> tuple[list[Tensor], Any]:
    """Runs the backbone, or a part of it, and keeps the states of some watched layers: those, and what it returned."""
    watch = Watch()
    with watched.set(watch):
        returned = run()
    return [watch.states[layer] for layer in layers], returned


@torch.no_grad()
def text_only_states(run: Callable[[], Any], embeddings: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """States of the first watched layers of a language model, which stops behind the deepest of them: (B, N, D) each.

    Args:
        run: calls the model on the text tokens alone.
        embeddings: (B, N, D), what it is called on, and the state of layer 0.
    """
    watch = Watch(ends=True)
    if layers[-1] > 0:
        reached = contextlib.nullcontext() if torch.compiler.is_compiling() else contextlib.suppress(Reached)
        with watched.set(watch), reached:
            run()
    watch.states[0] = embeddings
    return [watch.states[layer] for layer in layers]
