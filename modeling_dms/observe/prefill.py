"""The language model's first pass over a prompt, from which the weights of its modalities are made."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from modeling_dms._compat import cache_of
from modeling_dms.observe.layers import Reached, Watch, watched
from modeling_dms.observe.prompt import Schedule
from modeling_dms.steer.masks import Steering, check_supported, steered
from modeling_dms.steer.running import Running


@dataclass
class Reading:
    """What a language model made of prompts.

    Attributes:
        last: (B, P, D), what the output layer reads.
        states: of the watched layers, by layer, (B, P, D) each.
    """

    last: Tensor
    states: dict[int, Tensor]


class Prefill:
    """Prompts whose weights are made while the language model reads them.

    The first pass over all of a prompt is the vanilla class's own, and tells how its text reads behind its image.
    Where the weights come out uniform that was all; otherwise the language model runs once more, with them. Some
    passes cannot be observed: of a part of the prompt, of a prompt to which candidates have been added, or with masks
    that are made before the language model is called. Their weights are made in advance, and no second look is taken.

    Args:
        steering: of the passes, its bias not known yet.
        rows, length: of the prompts, before generation repeats them for its beams.
        weigh: makes the weights, of what was read, or in advance, of `None`.
        stops: end the first pass with the language model, whatever the weights.
    """

    def __init__(
        self,
        steering: Steering,
        rows: int,
        length: int,
        weigh: Callable[[Reading | None], Schedule],
        stops: bool = False,
    ):
        self.steering, self.rows, self.length, self.weigh, self.stops = steering, rows, length, weigh, stops
        self.schedule: Schedule | None = None
        self._watch = Watch(keeps=False)
        steering.settle = self.settle

    def settle(self, reading: Reading | None = None) -> Schedule:
        """The schedule, which is made now unless it is known or a pass is being observed."""
        if self.schedule is not None or self._watch.keeps:
            return cast(Schedule, self.schedule)
        with steered(None), _prefill.set(None):
            self.schedule = self.weigh(reading)
        self.steering.bias, self.steering.settle = self.schedule.bias, None
        check_supported(self.steering)
        return self.schedule

    @contextlib.contextmanager
    def observed(self) -> Iterator[None]:
        """A context in which the language model's passes are observed, until the weights are known."""
        try:
            with steered(self.steering), _prefill.set(self), watched.set(self._watch):
                yield
        except Reached:
            if not self.stops:
                raise
        finally:
            self._watch.keeps = False

    def begin(self, kwargs: dict[str, Any]) -> None:
        """The language model is called."""
        if self.schedule is not None:
            return
        embeddings, mask, cache = kwargs.get("inputs_embeds"), kwargs.get("attention_mask"), cache_of(kwargs)
        whole = embeddings is not None and embeddings.shape[1] == self.length
        whole = whole and (cache is None or cache.get_seq_length() == 0)
        if whole and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)):
            self._watch.keeps = True
        else:
            self.settle()

    def end(self, last: Tensor, again: Callable[[], Any]) -> bool:
        """The language model has run; whether it is to run again.

        Args:
            last: what the output layer reads.
            again: runs it on the same prompts.
        """
        if not self._watch.keeps:
            return False
        self._watch.keeps = False
        each = len(last) // self.rows  # beams
        states = {layer: state[::each] for layer, state in self._watch.states.items()}
        look = self.settle(Reading(last[::each], states)).look
        self._watch.states.clear()
        if look is not None:
            read = [last[::each]]
            for bias in look.biases:
                self.steering.bias = bias
                read.append(again()[0][::each])
            with steered(None), _prefill.set(None):
                self.schedule = look.decide(read)
            self.steering.bias = self.schedule.bias
        if self.stops:
            raise Reached
        # a second look has left the cache as it read last
        return look is not None or self.steering.bias is not None


@dataclass
class Generation:
    """A running call of `generate`.

    Attributes:
        model: whose; an assistant model within the call is another.
        prompt: (B, P), the ids that it begins with, if it is given any.
        schedule: of the prompt, or the pass that makes it; `None` where nothing could be observed.
    """

    model: Any
    prompt: Tensor | None
    schedule: Schedule | Prefill | None

    def reads(self, model: Any, input_ids: Tensor | None, cache: Any) -> bool:
        """Whether a pass is one over the prompt and what follows it; guidance runs the model on another one."""
        if model is not self.model:
            return False
        # what `generate` runs itself has its cache from the start; without one, all is read anew for every token
        if cache is not None or input_ids is None or self.prompt is None:
            return True
        prompt = self.prompt.repeat_interleave(max(1, len(input_ids) // len(self.prompt)), 0)
        return torch.equal(input_ids[:, : prompt.shape[1]], prompt.to(input_ids.device))


_prefill: Running[Prefill | None] = Running("prefill", None)


def observe_prefill(stack: nn.Module) -> None:
    """Prepares a language model, whose layers are watched, for [`Prefill`]."""
    stack.register_forward_pre_hook(_begin, with_kwargs=True)
    stack.register_forward_hook(_end, with_kwargs=True)


def _begin(stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    prefill = None if torch.compiler.is_compiling() else _prefill.get()
    if prefill is not None:
        prefill.begin(kwargs)


def _end(stack: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    prefill = None if torch.compiler.is_compiling() else _prefill.get()
    if prefill is None:
        return None

    def again() -> Any:
        cache = cache_of(kwargs)
        if cache is not None:
            cache.reset()
        return stack(*args, **kwargs)

    return again() if prefill.end(output[0], again) else None
