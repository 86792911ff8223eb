"""``pyengine serve``: a server for clients of OpenAI's and Anthropic's protocols."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import socket
import sys
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyengine.cli import common
from pyengine.cli.hosts import HostFile
from pyengine.cli.options import (
    AssistantDir,
    BundleDir,
    DFlashDir,
    DrafterName,
    EarlyExitFile,
    OpsName,
    Position,
    Storage,
    TargetDir,
    Tree,
)

if TYPE_CHECKING:
    from pyengine.serve.queue import Worker

EXAMPLES = (
    "pyengine serve --bundle ./pair",
    "pyengine serve --port 0 --json",
    "pyengine serve --early-exit exit.json",
    "pyengine serve --drafter dflash --tree 7",
    "curl -H 'content-type: application/json' http://127.0.0.1:8080/v1/chat/completions "
    '-d \'{"messages": [{"role": "user", "content": "Hello"}]}\'',
)
KEY = "PYENGINE_API_KEY"
CHUNK_S = 5  # for the work under way when the server has ended


class LogLevel(str, Enum):
    """How much is logged."""

    error = "error"
    info = "info"
    debug = "debug"


def run(
    target: TargetDir = None,
    assistant: AssistantDir = None,
    dflash: DFlashDir = None,
    bundle: BundleDir = None,
    hostfile: HostFile = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; a non-loopback address exposes the server.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 picks a free one.", min=0, max=65535)
    ] = 8080,
    max_tokens: Annotated[
        int,
        typer.Option(help="Maximum number of new tokens per request, and the default."),
    ] = 8192,
    drafter: DrafterName = None,
    tree: Tree = None,
    early_exit: EarlyExitFile = None,
    streams: Annotated[
        int,
        typer.Option(
            help="Maximum number of texts generated at once; memory may allow fewer.",
            min=1,
            max=128,
        ),
    ] = 8,
    cache_gb: Annotated[
        float | None,
        typer.Option(
            help="Memory for keys and values, in GB; by default what is free.",
            show_default=False,
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps prompts' keys and values for the next start.",
            show_default=False,
            file_okay=False,
        ),
    ] = None,
    cache_dir_gb: Annotated[
        float, typer.Option(help="Most GB of that folder; what was used longest ago goes first.")
    ] = 20.0,
    waiting: Annotated[
        int, typer.Option(help="Maximum number of waiting requests; further ones get 429.", min=1)
    ] = 16,
    any_model: Annotated[
        bool,
        typer.Option(
            "--any-model", help="Accept any model name; by default unknown names get 404."
        ),
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name to accept besides loopback, as behind a proxy; may be repeated."
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=KEY,
            help="Key that requests must carry, as a bearer token or in x-api-key.",
            show_default=False,
        ),
    ] = None,
    no_api_key: Annotated[
        bool,
        typer.Option("--no-api-key", help="Serve without a key on an address that others reach."),
    ] = False,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Origin of web pages that may ask, or * for all; may be repeated.",
        ),
    ] = None,
    no_cached_tokens: Annotated[
        bool,
        typer.Option(
            "--no-cached-tokens", help="Do not report how many prompt tokens were cached."
        ),
    ] = False,
    no_page: Annotated[
        bool, typer.Option("--no-page", help="Do not serve the chat page at `/`.")
    ] = False,
    log_level: Annotated[
        LogLevel,
        typer.Option(help="What to log: errors, a line per request too, or its settings as well."),
    ] = LogLevel.info,
    quiet: Annotated[bool, typer.Option("--quiet", help="The same as --log-level error.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print model and URL as one line of JSON when ready.")
    ] = False,
    dtype: Storage = None,
    ops: OpsName = None,
) -> None:
    """Serve a pair to clients of OpenAI's and Anthropic's APIs, streamed or whole.

    `/v1/chat/completions`, `/v1/completions`, `/v1/responses`, `/v1/messages`, `/v1/models`.

    Several texts are generated at once, each the one it is alone: `pyengine generate` with the
    request's settings, the seed in its usage and `--verify coupled` repeats it. When a client
    disconnects, its generation ends. On an address that others reach a key is needed, better in
    PYENGINE_API_KEY than in the process list; nothing is encrypted, which a proxy can do.

    A stream sends its headers at once, and a comment after every five seconds of silence. An answer
    that is not streamed sends nothing before its end, so use streams where a proxy times out. A
    request's head must arrive within 10 s and its body within 60 s; an answer that is not read for
    20 s is dropped.

    `/` is a page to chat with the pair that shows each round; it asks nobody but this server.
    `/health` and `/metrics` (for Prometheus) tell what runs, waits and was made.

    Whatever prompts begin alike share what was processed of them, within the memory that running
    texts leave; `--cache-dir` keeps it for the next start. `cached_tokens` and the time to the
    first token tell a client whether somebody else's prompt began like its own.

    With `--tree` the drafts of every round are a tree, and no text differs. A request that no tree
    goes with gets 400 and why: another rule than coupled, penalties, a form of the answer (a JSON
    schema, `regex`, `grammar`, a tool that is strict or must be called). Clients that send forms
    want a server without `--tree`.

    With `--early-exit` every answer is approximate and says so in `early_exit`. The certificate's
    sampler and length are the defaults, other ones get 400, and nothing is drafted or shared.
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
        from pyengine.ranks.launched import follows
        from pyengine.serve.access import check_key, check_origins
        from pyengine.serve.front import allowed_names, is_loopback
        from pyengine.serve.http import Server, open_files
        from pyengine.serve.protocols.ask import Limits
        from pyengine.serve.server import make_app
        from pyengine.task import check_drafter, early_exit_of

        for name, size in (("--cache-gb", cache_gb), ("--cache-dir-gb", cache_dir_gb)):
            if size is not None and not 0.001 <= size <= 1e6:
                raise ValueError(f"[serve] {name} must be 0.001 to 1000000 but got {size}.")

        # Before the weights are read, so that a wrong argument is told early
        open_files()
        check_drafter(drafter)
        certificate = early_exit_of(early_exit, None, drafter)
        limits = Limits(
            waiting=waiting,
            streams=streams,
            cache_bytes=None if cache_gb is None else int(cache_gb * 1e9),
            cache_dir=cache_dir,
            cache_dir_bytes=int(cache_dir_gb * 1e9),
            max_tokens=max_tokens,
            any_model=any_model,
            cached_tokens=not no_cached_tokens,
            drafter=drafter,
            tree=tree,
            early_exit=certificate,
        )
        common.check_dflash(dflash, assistant, drafter)
        allowed_names(allow_host or [])
        check_key(api_key)
        check_origins(cors or [])
        if api_key is not None and no_api_key:
            raise ValueError(f"[serve] --no-api-key must not go with --api-key or {KEY}.")
        load = partial(
            common.load_pair, target, assistant, bundle, dtype, Position.last, ops, dflash
        )
        if follows():
            load()  # ends the process with its group: rank 0 alone listens
        sock = listen(host, port)
        address, number = sock.getsockname()[:2]
        alone = is_loopback(address)
        if not (alone or api_key or no_api_key):
            raise ValueError(
                f"[serve] {host} must be served with --api-key or {KEY}, since others reach it, or "
                "with --no-api-key, but got neither."
            )
        pair = load()
        if cache_dir is not None:
            from pyengine.checkpoint.fingerprint import fingerprint

            with common.waiting("Hashing the weights") as tell:
                fingerprint(pair, cache_dir, tell)
        if certificate is not None:
            with common.waiting("Hashing the weights") as tell:
                certificate.check_pair(pair, tell)
        app = make_app(
            pair,
            limits=limits,
            any_host=not alone and not allow_host,
            hosts=allow_host or [],
            key=api_key,
            origins=cors or [],
            page=not no_page,
        )
        log_to_stderr(LogLevel.error if quiet else log_level)
        with sock:
            at = f"http://{f'[{host}]' if ':' in host else host}:{number}/v1"
            if as_json:
                mode = {} if certificate is None else {"early_exit": certificate.told()}
                typer.echo(json.dumps({"model": pair.name, "url": at, **mode}))
            chat = "" if no_page else f", chat page at {at.removesuffix('v1')}"
            typer.echo(f"{pair.name} at {at}{chat}; Ctrl-C ends it.", err=True)
            if certificate is not None:
                typer.echo(f"{certificate.label}.", err=True)
            if not alone and api_key is None:
                typer.echo(
                    f"Warning: anybody who can reach {host} can use the server: there is no key "
                    "and no encryption.",
                    err=True,
                )
            elif not alone:
                typer.echo(
                    f"Warning: what goes to and from {host} is not encrypted, the key included.",
                    err=True,
                )
            server = Server(app, sock, on_end=app.state.worker.end)
            server.run()
            leave(server.ended_by, app.state.worker)


def log_to_stderr(level: LogLevel) -> None:
    """One line per request, and traces of what fails."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("pyengine.serve.server")
    log.addHandler(handler)
    log.setLevel(level.value.upper())
    log.propagate = False


def leave(sig: int | None, worker: Worker) -> None:
    """End as the signal would have.

    MLX's evaluations cannot be broken off, and Python's own end under one of them aborts. So the
    chunk under way is waited for, and if that takes too long the process ends without Python's.
    """
    try:
        ended = worker.join(CHUNK_S)
    except KeyboardInterrupt:
        ended = False
    if not ended and sig == signal.SIGINT:
        typer.echo("Interrupted.", err=True)
        sys.stdout.flush()
        os._exit(common.INTERRUPTED)
    if sig is not None:
        signal.raise_signal(sig)


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
            f"[serve] {host} port {port} must be free to listen on but is not: {_reason(error)}."
        ) from error


def _reason(error: OSError) -> str:
    """Python's own word for it; asyncio's and socket's add the address again."""
    number = error.errno or 0
    return os.strerror(number) if number > 0 else str(error.strerror or error)
