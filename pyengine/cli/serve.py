"""``pyengine serve``: an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import sys
from typing import Annotated

import typer

from pyengine.cli import common
from pyengine.cli.options import AssistantDir, BundleDir, Position, Storage, TargetDir

EXAMPLES = (
    "pyengine serve --bundle ./pair",
    "curl -H 'content-type: application/json' http://127.0.0.1:8080/v1/chat/completions "
    '-d \'{"messages": [{"role": "user", "content": "Hello"}]}\'',
)


def run(
    target: TargetDir = None,
    assistant: AssistantDir = None,
    bundle: BundleDir = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than loopback let others in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=0, max=65535)] = 8080,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens a request may ask for.")] = 8192,
    waiting: Annotated[int, typer.Option(help="Most requests that may wait.", min=1)] = 16,
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
                    'install "pyengine[serve]"'
                )
        if max_tokens < 1:
            raise ValueError(f"[serve] max_tokens must be at least 1 but got {max_tokens}.")
        import uvicorn

        from pyengine.serve import LOOPBACK, Limits, make_app

        pair = common.load_pair(target, assistant, bundle, dtype, Position.last)
        limits = Limits(waiting=waiting, max_tokens=max_tokens)
        app = make_app(pair, limits=limits, any_host=host not in LOOPBACK)
        typer.echo(f"{pair.name} at http://{host}:{port}/v1", err=True)
        uvicorn.run(app, host=host, port=port, log_level="warning")
