"""`espl-eval serve`: one environment behind an OpenEnv server, on this machine only unless told otherwise."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator, Sequence
from functools import partial

from espl_envs.core.errors import EsplError, MissingExtra
from espl_envs.evaluate import options, plan


def main(argv: Sequence[str]) -> int:
    """Serve until interrupted. Raises EsplError for what the user can put right; returns the exit code."""
    chosen = _parser().parse_args(list(argv))
    arguments = options.env_arguments(chosen.env_args, [chosen.env])[chosen.env]
    with _package():
        import uvicorn
        from openenv.core.env_server import create_fastapi_app

        from espl_envs.interop.openenv import server
    arena = plan.arena(chosen.env, arguments, chosen.split).config
    make = partial(server.Served, arena.id, arena.split, arena.kwargs)
    app = create_fastapi_app(
        make, server.Reply, server.View, max_concurrent_envs=chosen.sessions, env_name=server.public_name(arena.id),
        state_cls=server.Standing,
    )  # fmt: skip
    with _bound(chosen.host, chosen.port) as listener:
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"{arena.id}, split {arena.split} ({arena.size:,} tasks), is served on {address}", file=sys.stderr,
              flush=True)
        try:
            uvicorn.Server(uvicorn.Config(app, log_level="warning", ws_max_size=2**26)).run([listener])
        except KeyboardInterrupt:
            return 130
    return 0


def _parser() -> options.Parser:
    parser = options.Parser(prog="espl-eval serve", description="Serve an environment by OpenEnv's protocol.")
    parser.add_argument("--env", metavar="ID", required=True, help="the environment")
    parser.add_argument("--env.args", dest="env_args", metavar="NAME=VALUE", nargs="+", action="extend", default=[],
                        help="arguments of the environment")
    parser.add_argument("--split", choices=plan.splits(),
                        help="where resets without a split draw from (test, else validation, else train)")
    parser.add_argument("--host", metavar="NAME", default="127.0.0.1", help="127.0.0.1: only this machine (default)")
    parser.add_argument("--port", metavar="N", type=int, default=8000, help="0 takes a free one (8000)")
    parser.add_argument("--sessions", metavar="N", type=int, default=64, help="episodes at once (64)")
    return parser


@contextlib.contextmanager
def _package() -> Iterator[None]:
    try:
        yield
    except ImportError as missing:
        raise MissingExtra("openenv", f"OpenEnv (no module {missing.name})") from missing


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as problem:
        raise EsplError(f"cannot listen on {host}:{port}: {problem}; --port 0 takes a free port") from problem
    with listener:
        yield listener
