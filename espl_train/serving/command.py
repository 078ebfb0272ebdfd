"""`espl-train serve RUN | MODEL`: from words to a server that listens, until somebody ends it."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import os
import secrets
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from espl_envs.core import commandline
from espl_envs.core.errors import EsplError
from espl_train.settings import parse
from espl_train.settings.subcommands import Parser

SHORTEST = 16               # characters of a key
GRACE_S = 5.0               # for requests under way, at the end


def main(words: Sequence[str]) -> int:
    """Answer requests until Ctrl-C or SIGTERM, which is how a server ends."""
    try:
        return _serve(words)
    except KeyboardInterrupt as stop:
        return commandline.exit_code(stop)


def _serve(words: Sequence[str]) -> int:
    """Comes back when it was told to describe only, else never but by an exception."""
    chosen, rest = _parser().parse_known_args(list(words))
    from espl_train.serving.exhibit import Exhibit

    exhibit = Exhibit.of(chosen.target, chosen.prompt, parse(rest).overrides)
    if chosen.describe:
        print(json.dumps(exhibit.to_json()))
        return 0
    key = _key(chosen)
    if chosen.until_eof:
        threading.Thread(target=_end_with_stdin, name="espl-eof", daemon=True).start()
    from transformers.utils import logging

    from espl_train.serving.server import Server

    logging.disable_progress_bar()
    engine, chat, offer = exhibit.load()
    try:
        asyncio.run(_listen(Server(engine, chat, offer, key), chosen.host, chosen.port, offer.name))
    finally:
        engine.close()
    return 0


def _parser() -> Parser:
    made = Parser(
        "serve", "Answer OpenAI's protocol with a run (adapter and chosen prompt) or a model (folder, hub id).",
        "Further options as of espl-train: --engine vllm, --engine.*, --model.device, --model.dtype, …",
    )
    made.add_argument("target", metavar="RUN|MODEL", help="a run directory, a model folder, 'micro' or a hub id")
    made.add_argument("--prompt", metavar="WHICH", help="of a run: best (default), root, none, or a prompt's id (with "
                      "several environments NAME/best); the system prompt of conversations that bring none")
    made.add_argument("--port", type=_port, default=0, help="0 (default): a free one, which is printed")
    made.add_argument("--host", default="127.0.0.1", help="where to listen (127.0.0.1); elsewhere needs a key")
    made.add_argument("--key", action="store_true", help="ask clients for a key: a random one, which is printed")
    made.add_argument("--key-env", metavar="VARIABLE", help="ask clients for the key in this environment variable")
    made.add_argument("--until-eof", action="store_true", help="end when standard input does, as when a parent dies")
    made.add_argument("--describe", action="store_true", help="print what would be served, as JSON, and stop")
    return made


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a whole number from 0 to 65535")
    return int(text)


def _key(chosen: argparse.Namespace) -> str:
    """What clients have to send, "" for nothing. Raises EsplError where that would be careless."""
    if chosen.key_env:
        key = os.environ.get(chosen.key_env, "")
        if len(key) < SHORTEST:
            raise EsplError(f"--key-env names {chosen.key_env}, which holds no key of {SHORTEST} or more characters")
        return key
    if chosen.key:
        key = secrets.token_urlsafe(24)
        print(f"key: {key}", flush=True)
        return key
    if not _loopback(chosen.host):
        raise EsplError(f"--host {chosen.host} can be reached from other machines: ask for a key with --key")
    return ""


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _listen(server: Any, host: str, port: int, name: str) -> None:
    from aiohttp import web

    runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=GRACE_S, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as problem:
            raise EsplError(f"cannot listen on {host}:{port}: {problem.strerror or problem}") from None
        bound = runner.addresses[0]
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        print(f"http://{shown}:{bound[1]}/v1 answers as {name}", flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def _end_with_stdin() -> None:
    """The parent holds the other end of standard input: however it dies, that ends, and so does this process."""
    with suppress(OSError, ValueError):
        while os.read(sys.stdin.fileno(), 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)

