"""`espl-sandbox`: build the images, look at the machine, try a box, attack it, measure it, clean up.

0 all is well · 1 something was found (a breach, a figure out of bounds, a failed check) · 2 something that the user can
put right, said in one sentence · 130 Ctrl-C. With --json one object on stdout; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from espl_envs.core import commandline
from espl_envs.core.errors import EsplError
from espl_envs.sandbox.base import Provider
from espl_envs.sandbox.providers import NAMES, check, provider

EXAMPLES = """\
  espl-sandbox doctor                          what this machine has and lacks
  espl-sandbox build                           make the images
  espl-sandbox selftest                        start one box and try every kind of call
  espl-sandbox attack                          the whole corpus of hostile programs
  espl-sandbox attack --provider bubblewrap network "fork bomb"
  espl-sandbox bench --write                   measure, and keep the figures in benchmarks/results/
  espl-sandbox gc                              remove what dead owners left
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        arguments = _parser().parse_args(argv)
    except EsplError as error:
        return commandline.complain("espl-sandbox", str(error), 2)
    warnings.simplefilter("once", UserWarning)
    warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
    try:
        if getattr(arguments, "provider", None):
            check(arguments.provider)
        return int(asyncio.run(arguments.command(arguments)))
    except EsplError as error:
        return _complain(str(error), arguments)
    except BrokenPipeError:
        sys.stderr.close()                # whoever read our output has seen enough
        return 1
    except KeyboardInterrupt:
        _say("stopped")
        return 130


def _parser() -> commandline.Parser:
    parser = commandline.Parser(
        prog="espl-sandbox", description="The boxes in which tools run model-written code.", epilog=EXAMPLES
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str, provider: str | None = "docker") -> commandline.Parser:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(command=function)
        made.add_argument("--json", action="store_true", help="one JSON object on stdout")
        if name != "build":
            names = f"one of {', '.join(NAMES)} ({provider or 'all'})"
            made.add_argument("--provider", default=provider, metavar="NAME", help=names)
        return made

    build = command("build", _build, "build the images of the boxes, those that are missing")
    build.add_argument("images", nargs="*", metavar="IMAGE", help="names under sandboxes/, or references; default: all")
    build.add_argument("--base", help="an image to build on, or 'debootstrap'; default: whichever can be had")
    command("doctor", _doctor, "what is there, what is missing, and the remedy")
    selftest = command("selftest", _selftest, "start a box, hold it against its claims, try every kind of call")
    attack = command("attack", _attack, "let hostile programs loose in a box and see whether it holds")
    attack.add_argument("only", nargs="*", metavar="NAME", help="groups, claims, or parts of names; default: all")
    attack.add_argument("--list", action="store_true", help="list them with their forms and the claims that they test")
    bench = command("bench", _bench, "measure the figures that the sandbox must reach")
    measures = "starts, warm, calls, load, runaways, deaths; default: all"
    bench.add_argument("only", nargs="*", metavar="MEASURE", help=measures)
    bench.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/sandbox.json")
    for one in (selftest, attack):
        one.add_argument("--image", default="python", help="a name under sandboxes/, or a reference (python)")
    gc = command("gc", _gc, "remove boxes whose owner is dead or whose time is over", provider=None)
    gc.add_argument("--all", action="store_true", help="every box of ours, also of live owners")
    gc.add_argument("--images", action="store_true", help="also images that are no longer current")
    return parser


async def _build(arguments: argparse.Namespace) -> int:
    from espl_envs.sandbox import engine, images

    client = await asyncio.to_thread(engine.client, 1800)
    try:
        names = arguments.images or list(images.folders())
        if not names:
            raise EsplError("there are no image recipes here: set ESPL_SANDBOX_IMAGES to the folder sandboxes/")
        built = {}
        for name in names:
            built[name] = await asyncio.to_thread(images.build, name, base=arguments.base, say=_say, client=client)
    finally:
        client.close()
    _show(arguments, built, list(built.items()))
    return 0


async def _doctor(arguments: argparse.Namespace) -> int:
    from espl_envs.sandbox import doctor

    wanted, areas = arguments.provider, ["docker", "bubblewrap"]
    if wanted not in areas:
        raise EsplError(f"the doctor knows docker and bubblewrap; {wanted!r} needs nothing of the machine")
    findings = [finding async for finding in doctor.examine()]
    usable = [area for area in areas if doctor.works(findings, area)]
    rows: list[tuple[str, ...]] = []
    for finding in findings:
        rows.append((finding.area, finding.what, finding.state, finding.detail))
        if finding.remedy:
            rows.append(("", "", "→", finding.remedy))
    answer = {"findings": [asdict(finding) for finding in findings], "usable": usable}
    _show(arguments, answer, rows)
    if not arguments.json:
        print(f"\nproviders that work here: {', '.join(usable) or 'none'}")
    return 0 if wanted in usable else 1


async def _selftest(arguments: argparse.Namespace) -> int:
    from espl_envs.sandbox.selftest import selftest

    maker = await _provider(arguments)
    checks = []
    try:
        async for done in selftest(maker, arguments.image):
            checks.append(done)
            if not arguments.json:
                word = "ok" if done.ok else "FAILED"
                print(f"{word:7} {done.name:34} {_ms(done.seconds):>9}  {done.detail}", flush=True)
    finally:
        await maker.aclose()
    failed = [done.name for done in checks if not done.ok]
    _show(arguments, {"provider": maker.name, "checks": [asdict(done) for done in checks], "failed": failed}, ())
    return 1 if failed else 0


async def _attack(arguments: argparse.Namespace) -> int:
    from espl_envs.sandbox import attacks

    chosen = [
        attack for group, members in attacks.GROUPS.items() for attack in members
        if not arguments.only or any(w == group or w in attack.needs or w in attack.name for w in arguments.only)
    ]
    if not chosen:
        raise EsplError(f"no attack is called {' or '.join(arguments.only)}; groups are {', '.join(attacks.GROUPS)}")
    if arguments.list:
        rows = [(attack.name, " ".join(attack.forms()), ", ".join(sorted(attack.needs))) for attack in chosen]
        _show(arguments, [attack.name for attack in chosen], rows)
        return 0
    maker = await _provider(arguments)
    done: list[Any] = []
    total = sum(len(attack.forms()) for attack in chosen)

    def tell(outcome: Any) -> None:
        done.append(outcome)
        line = f"{outcome.verdict:9} {_ms(outcome.seconds):>9}  {outcome.form:6}  {outcome.attack}"
        if outcome.detail:
            line += f"\n          → {outcome.detail}"
        if not arguments.json:
            _progress("")
            print(line, flush=True)
        _progress(f"{len(done)} of {total}")

    try:
        spec = replace(attacks.SPEC, image=arguments.image)
        await attacks.run(maker, chosen, spec=spec, on_outcome=tell)
    finally:
        _progress("")
        await maker.aclose()
    counts = {word: sum(outcome.verdict == word for outcome in done) for word in ("held", "breached", "skipped")}
    answer = {"provider": maker.name, **counts, "outcomes": [asdict(outcome) for outcome in done]}
    _show(arguments, answer, [("", f"{maker.name}: " + ", ".join(f"{count} {word}" for word, count in counts.items()))])
    return 1 if counts["breached"] else 0


async def _bench(arguments: argparse.Namespace) -> int:
    from espl_envs.sandbox import bench

    if unknown := set(arguments.only) - set(bench.MEASURES):
        raise EsplError(f"no measure is called {', '.join(sorted(unknown))}; there are {', '.join(bench.MEASURES)}")
    if arguments.write and (arguments.only or arguments.provider != "docker"):
        raise EsplError("--write keeps all figures of docker: leave out --provider and the names of measures")
    target = _results() if arguments.write else None
    maker = await _provider(arguments)
    try:
        answer = await bench.measure(maker, tuple(arguments.only), _say)
    finally:
        await maker.aclose()
    rows = [("figure", "measured", "bound", "")]
    for figure in answer["figures"]:
        bound = "" if figure["bound"] is None else f"{figure['bound is']} {figure['bound']:g} {figure['unit']}".strip()
        met = {None: "", True: "met", False: "NOT MET"}[figure["met"]]
        rows.append((figure["name"], f"{figure['value']:g} {figure['unit']}".strip(), bound, met))
    _show(arguments, answer, rows)
    if target is not None:
        target.write_text(json.dumps(answer, indent=1, ensure_ascii=False) + "\n")
        _say(f"written to {target}")
    return 1 if any(figure["met"] is False for figure in answer["figures"]) else 0


async def _gc(arguments: argparse.Namespace) -> int:
    names = [arguments.provider] if arguments.provider else ["docker", "bubblewrap"]
    removed: dict[str, Any] = {}
    for name in names:
        maker = provider(name)
        try:
            removed[name] = await maker.reap(everything=arguments.all)
        except EsplError as error:
            if arguments.provider:
                raise
            removed[name] = None
            _say(f"{name}: {error}")
        finally:
            await maker.aclose()
    if arguments.images:
        removed["images"] = await asyncio.to_thread(_remove_stale_images)
    rows = [(name, "not available" if count is None else f"{count} removed") for name, count in removed.items()]
    _show(arguments, removed, rows)
    return 0


def _remove_stale_images() -> int:
    from espl_envs.sandbox import engine, images

    client = engine.client()
    try:
        stale = images.stale(client)
        for reference in stale:
            client.remove_image(reference)
        return len(stale)
    finally:
        client.close()


async def _provider(arguments: argparse.Namespace) -> Provider:
    """The asked-for provider, found to work. Raises EsplError with the remedies where it does not."""
    maker = provider(arguments.provider)
    await maker.probe()
    return maker


def _results() -> Path:
    folder = Path.cwd() / "benchmarks" / "results"
    if not folder.is_dir():
        raise EsplError("--write keeps the figures in benchmarks/results/: run it in the root of the espl repository")
    return folder / "sandbox.json"


def _show(arguments: argparse.Namespace, answer: Any, rows: Sequence[tuple[str, ...]]) -> None:
    """The answer: JSON, or rows with aligned columns (the last one as long as it likes)."""
    if arguments.json:
        print(json.dumps(answer, ensure_ascii=False))
        return
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join(cells).rstrip())


def _complain(message: str, arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps({"error": message}, ensure_ascii=False))
    _say(f"espl-sandbox: {message}")
    return 2


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _progress(text: str) -> None:
    """One line that is written over; only where somebody looks."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds else ""
