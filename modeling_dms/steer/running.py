"""A value that belongs to the running call."""

from contextvars import ContextVar, Token
from types import TracebackType
from typing import Generic, TypeVar

import torch


T = TypeVar("T")


class Running(Generic[T]):
    """Carries a value from a call to functions that the library calls in between, which cannot be given it.

    In eager mode every thread has its own. A `ContextVar` cannot be traced, so code under `torch.compile` and
    `torch.export`, which runs in one thread while it is traced, keeps the value in a plain attribute.
    """

    def __init__(self, name: str, default: T):
        self._variable: ContextVar[T] = ContextVar(name, default=default)
        self._traced = default

    def get(self) -> T:
        """The value of the innermost `set` around this call, else the default."""
        return self._traced if torch.compiler.is_compiling() else self._variable.get()

    def set(self, value: T) -> "_Set[T]":
        """A context in which `get` gives `value`."""
        return _Set(self, value)


class _Set(Generic[T]):
    def __init__(self, running: Running[T], value: T):
        self.running, self.value = running, value
        self.before: T | None = None
        self.token: Token[T] | None = None

    def __enter__(self) -> T:
        if torch.compiler.is_compiling():
            self.before = self.running._traced
            self.running._traced = self.value
        else:
            self.token = self.running._variable.set(self.value)
        return self.value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.compiler.is_compiling():
            self.running._traced = self.before  # type: ignore[assignment]
        else:
            self.running._variable.reset(self.token)  # type: ignore[arg-type]
