"""``pyengine serve``: an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from pyengine.cli import common
from pyengine.cli.options import AssistantDir, BundleDir, Position, Storage, TargetDir

EXAMPLES = (
    "pyengine serve --bundle ./pair",
    "pyengine serve --port 0 --json",
    "curl -H 'content-type: application/json' http://127.0.0.1:8080/v1/chat/completions "
    '-d \'{"messages": [{"role": "user", "content": "Hello"}]}\'',
)
GRACE_S = 2  # for answers under way when the server is ended


def run(
    target: TargetDir = None,
    assistant: AssistantDir = None,
    bundle: BundleDir = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than loopback let others in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen at; 0 takes a free one.", min=0, max=65535)
    ] = 8080,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens a request may ask for.")] = 8192,
    waiting: Annotated[int, typer.Option(help="Most requests that may wait.", min=1)] = 16,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print model and URL as one line of JSON when ready.")
    ] = False,
    dtype: Storage = None,
) -> None:
    """Serve a pair to OpenAI clients: chat and text completions, streamed or whole.

    One generation at a time; a client that leaves ends its own. There is no password: keep to
    loopback, or put a proxy before it.
    """
    with common.sentences():
        for module in ("fastapi", "uvicorn"):
            if importlib.util.find_spec(module) is None:
                raise RuntimeError(
                    f"[serve] {module} must be installed but is not; run: {sys.executable} -m pip "
                    'install "pyengine-mlx[serve]"'
                )
        if max_tokens < 1:
            raise ValueError(f"[serve] max_tokens must be at least 1 but got {max_tokens}.")
        import uvicorn

        from pyengine.openai_protocol import Limits
        from pyengine.serve import LOOPBACK, make_app

        sock = listen(host, port)  # before the weights are read, so that a wrong one is told early
        pair = common.load_pair(target, assistant, bundle, dtype, Position.last)
        limits = Limits(waiting=waiting, max_tokens=max_tokens)
        app = make_app(pair, limits=limits, any_host=host not in LOOPBACK)
        name = f"[{host}]" if ":" in host else host
        with sock:
            at = f"http://{name}:{sock.getsockname()[1]}/v1"
            if as_json:
                typer.echo(json.dumps({"model": pair.name, "url": at}))
            typer.echo(f"{pair.name} at {at}; Ctrl-C ends it.", err=True)

            ended: list[int] = []

            class Server(uvicorn.Server):
                @contextmanager
                def capture_signals(self) -> Iterator[None]:
                    yield  # they are ours: its own are not in place until its end

            # Nothing is to be done when it starts and ends
            config = uvicorn.Config(
                app, log_level="warning", timeout_graceful_shutdown=GRACE_S, lifespan="off"
            )
            server = Server(config)

            def end(sig: int, _: FrameType | None) -> None:
                app.state.worker.end()
                server.should_exit = True
                ended.append(sig)

            before = {sig: signal.signal(sig, end) for sig in (signal.SIGINT, signal.SIGTERM)}
            try:
                server.run(sockets=[sock])
            finally:
                for sig, handler in before.items():
                    signal.signal(sig, handler)
            if ended:
                signal.raise_signal(ended[0])


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address of this machine.

    Raises:
        ValueError: The address is not there, or is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ValueError(
            f"[serve] {host} port {port} must be free to listen at but is not: {_reason(error)}."
        ) from error


def _reason(error: OSError) -> str:
    """Python's own word for it; asyncio's and socket's add the address again."""
    number = error.errno or 0
    return os.strerror(number) if number > 0 else str(error.strerror or error)
