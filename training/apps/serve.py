"""`dms serve`: DMS checkpoints behind `transformers serve`, which speaks OpenAI's API."""

import asyncio
import contextvars
import functools
import json
import socket
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import Future
from typing import Any

import typer
from transformers import ProcessorMixin
from transformers.cli.serve import Serve
from transformers.utils import find_adapter_config_file

from modeling_dms.auto import CLASSES
from modeling_dms.reliability_mixin import kept_reliability
from modeling_dms.training.data import as_text
from modeling_dms.training.models.loading import located, read_config
from modeling_dms.training.models.processors import load_processor, read_processor


# fields of a request that a chat template writes into the prompt; `prompt` is a whole prompt, special tokens included
WRITTEN = ("messages", "input", "instructions", "tools", "chat_template_kwargs")

# kinds of responses
WHOLE, STREAMED = b"application/json", b"text/event-stream"


def serve(name: str, arguments: Sequence[str] = ()) -> None:
    """Serves a checkpoint until it is interrupted. Special tokens that are typed into a chat are read as text, and a
    request that the processor or the model refuses is answered by status 400 and what is wrong with it. A response has
    a field `reliability`, where something is known of it; of a streamed one, its last event has it.

    Args:
        name: folder or Hub id of a whole DMS checkpoint.
        arguments: options of `transformers serve`, such as `["--port", "8000"]`.

    Raises:
        ValueError: for an adapter, a checkpoint without DMS, or a processor that does not fit, is not complete, or has
            no chat template.
        OSError: as `load`, or for a port that is taken.
    """

    class Prepared(Serve):
        def start_server(self) -> None:
            prepare(self.server.config.app, self._generation_state, processor)
            self.server.run()

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(Prepared)
    checkpoint = str(located(name))
    # an option that `transformers serve` does not have is wrong usage, as one of our own; told not to block, `Serve`
    # leaves it to `start_server` to run the application
    context = typer.main.get_command(app).make_context("dms serve", [checkpoint, *arguments, "--non-blocking"])
    if find_adapter_config_file(checkpoint):
        raise ValueError(f"{name} is an adapter: make it a whole checkpoint by `dms merge` first")
    config = read_config(checkpoint)
    known = [cls.config_class.model_type for cls in CLASSES.values()]
    if config.model_type not in known:
        expected = ", ".join(known)
        raise ValueError(
            f"{name} is a {config.model_type!r} checkpoint, expected one of {expected}: see `dms calibrate`"
        )
    host, port = context.params["host"], context.params["port"]
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:  # which the server would tell among other lines
        raise OSError(f"cannot listen at {host}, port {port}: {error}") from error
    written, processor = read_processor(checkpoint), load_processor(checkpoint, config)
    if processor.to_dict() != written.to_dict():  # the server reads the files by itself
        raise ValueError(
            f"the processor of {name} leaves out what its model's configuration says: save there the one that "
            "`modeling_dms.training.models.loading.load` gives"
        )
    if processor.chat_template is None:
        raise ValueError(
            f"the {type(processor).__name__} of {name} has no chat template, which makes prompts of chats: set "
            "processor.chat_template and save it there (BLIP-2's keeps none)"
        )
    with context:
        context.command.invoke(context)


def prepare(app: Any, state: Any, processor: ProcessorMixin) -> None:
    """Makes the application of `transformers serve` read typed special tokens as text, answer by 400 what is refused,
    and tell how far answers can be relied on.

    Args:
        state: its `GenerationState`, whose managers run the model in a thread of its own.
    """
    from fastapi import Request
    from fastapi.responses import JSONResponse

    def refused(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, 400)

    app.add_exception_handler(ValueError, refused)
    app.add_middleware(TypedTokens, processor=processor)
    app.add_middleware(Reliability)
    get_manager = state.get_manager

    @functools.wraps(get_manager)
    def in_context(*args: Any, **kwargs: Any) -> Any:
        """The manager, whose thread sees the context of the request that it works for."""
        manager = get_manager(*args, **kwargs)
        for name in ("submit", "async_submit"):  # of answers that are streamed, and of whole ones
            submit = getattr(type(manager), name, None)
            if submit is not None:
                setattr(manager, name, functools.partial(_submitted, functools.partial(submit, manager)))
        return manager

    state.get_manager = in_context


_running: contextvars.ContextVar[list[Future]] = contextvars.ContextVar("running")


def _submitted(submit: Callable, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """What `submit` gives for a function that sees the context it is called in."""
    future = submit(contextvars.copy_context().run, function, *args, **kwargs)
    if isinstance(future, Future) and (running := _running.get(None)) is not None:
        running.append(future)
    return future


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class TypedTokens:
    """ASGI middleware: special tokens in the texts of a request's chat become text, see `as_text`."""

    def __init__(self, app: Callable, processor: ProcessorMixin):
        self.app, self.processor = app, processor

    async def __call__(self, scope: Message, receive: Receive, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        message, body = {"more_body": True}, b""
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        first = [{**message, "body": self.read(body)}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        return await self.app(scope, replay, send)

    def read(self, body: bytes) -> bytes:
        """A request's body, its texts as text; one that is not a JSON object as it is."""
        try:
            request = json.loads(body)
        except ValueError:
            return body
        if not isinstance(request, dict):
            return body
        written = {field: self._as_text(request[field]) for field in WRITTEN if field in request}
        return json.dumps({**request, **written}).encode()

    def _as_text(self, value: Any) -> Any:
        match value:
            case str():
                return as_text(self.processor, value)
            case list():
                return [self._as_text(item) for item in value]
            case dict():
                return {key: self._as_text(item) for key, item in value.items()}
        return value


class Reliability:
    """ASGI middleware: adds `reliability`, how far an answer can be relied on, to a JSON response, or to the last
    event of a streamed one."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        with kept_reliability() as kept:
            running: list[Future] = []
            token = _running.set(running)
            start: Message = {}
            body = b""

            def told() -> dict[str, float]:
                return {"reliability": float(kept[-1][0])} if kept and kept[-1] is not None else {}

            async def tell(message: Message) -> None:
                nonlocal start, body
                if message["type"] == "http.response.start":
                    start = message
                    if self._kind(start) != WHOLE:
                        await send(start)
                elif self._kind(start) == STREAMED and _ends(message.get("body", b"")):
                    # the last word is sent before `generate` returns
                    await asyncio.gather(*map(asyncio.wrap_future, running), return_exceptions=True)
                    lines = message["body"].split(b"\n")
                    await send({**message, "body": b"\n".join(_with(line, told()) for line in lines)})
                elif self._kind(start) != WHOLE:
                    await send(message)
                else:
                    body += message.get("body", b"")
                    if not message.get("more_body"):
                        if told():
                            body = json.dumps({**json.loads(body), **told()}).encode()
                            others = [header for header in start["headers"] if header[0] != b"content-length"]
                            start["headers"] = [*others, (b"content-length", str(len(body)).encode())]
                        await send(start)
                        await send({**message, "body": body})

            try:
                return await self.app(scope, receive, tell)
            finally:
                _running.reset(token)

    def _kind(self, start: Message) -> bytes:
        """The kind of a response, without its encoding."""
        return dict(start["headers"]).get(b"content-type", b"").split(b";")[0]


def _event(line: bytes) -> dict[str, Any]:
    """What a line of a stream of events holds."""
    try:
        event = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: {") else {}
    except ValueError:
        return {}
    return event


def _is_last(event: dict[str, Any]) -> bool:
    """Whether an event ends an answer."""
    ended = any(choice.get("finish_reason") for choice in event.get("choices") or ())
    return ended or event.get("type") == "response.completed"


def _ends(body: bytes) -> bool:
    return any(_is_last(_event(line)) for line in body.split(b"\n"))


def _with(line: bytes, fields: dict[str, float]) -> bytes:
    """The line of an event, with fields in the answer that it ends."""
    event = _event(line)
    if not _is_last(event):
        return line
    event.get("response", event).update(fields)
    return b"data: " + json.dumps(event).encode()
