"""A value that belongs to the running call."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Generic, TypeVar, cast

import torch


T = TypeVar("T")


class _Unset:
    """No value, where `None` is one."""


_UNSET = _Unset()


class Running(Generic[T]):
    """Carries a value from a call to functions that the library calls in between, which cannot be given it.

    In eager mode every thread has its own, in a `ContextVar`. That cannot be traced, so code under `torch.compile` and
    `torch.export`, which may be the whole call or only what is in between, goes by plain attributes: compiled models
    serve one thread at a time.
    """

    def __init__(self, name: str, default: T):
        self.default = default
        self._in_thread: ContextVar[Any] = ContextVar(name, default=_UNSET)
        self._in_trace: Any = _UNSET
        self._last: Any = _UNSET  # that eager code has set, for compiled code within

    def get(self) -> T:
        """The value of the innermost `set` around this call, else the default."""
        value = self._in_trace
        if torch.compiler.is_compiling():
            value = self._last if value is _UNSET else value
        else:
            # behind a graph break a compiled call goes on in eager mode
            own = self._in_thread.get()
            value = value if own is _UNSET else own
        return cast(T, self.default if value is _UNSET else value)

    @contextlib.contextmanager
    def set(self, value: T) -> Iterator[T]:
        """A context in which `get` gives `value`."""
        if torch.compiler.is_compiling():
            before, self._in_trace = self._in_trace, value
            try:
                yield value
            finally:
                self._in_trace = before
            return
        token, self._last = self._in_thread.set(value), value
        try:
            yield value
        finally:
            self._in_thread.reset(token)
            # not what it was before, which may be another thread's that has ended
            self._last = self._in_thread.get()
