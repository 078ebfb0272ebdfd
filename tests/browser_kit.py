"""A page in headless Chromium, driven over the DevTools protocol: what it did, and what it looks like from inside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from conftest import lacking

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-extensions", "--remote-debugging-port=0"),
)
WATCHED = ("Page", "Runtime", "Log", "Network")


@dataclass
class Page:
    """An open page. requests: every URL that was asked for. noise: exceptions, console and log messages, dialogs."""

    socket: aiohttp.ClientWebSocketResponse
    session: str
    requests: list[str] = field(default_factory=list)
    noise: list[str] = field(default_factory=list)
    _number: int = 0

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol; events that come meanwhile are kept."""
        self._number += 1
        await self.socket.send_json(
            {"id": self._number, "method": method, "params": params, "sessionId": self.session}
        )
        while True:
            said = await self._next()
            if said.get("id") == self._number:
                assert "error" not in said, said
                result: dict[str, Any] = said["result"]
                return result

    async def ask(self, expression: str) -> Any:
        """The value of an expression, evaluated from outside of the page's policy."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def loaded(self) -> None:
        """Wait until the page has loaded."""
        while (await self._next()).get("method") != "Page.loadEventFired":
            pass

    async def _next(self) -> dict[str, Any]:
        said: dict[str, Any] = json.loads((await self.socket.receive(timeout=60)).data)
        method, params = said.get("method"), said.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded",
                        "Page.javascriptDialogOpening"):
            self.noise.append(f"{method}: {json.dumps(params)[:300]}")
            if method == "Page.javascriptDialogOpening":
                await self.socket.send_json(
                    {"id": -1, "method": "Page.handleJavaScriptDialog", "params": {"accept": True},
                     "sessionId": self.session}
                )
        return said


@contextlib.asynccontextmanager
async def opened(file: Path) -> AsyncIterator[Page]:
    """The page in `file`, loaded; a skip where there is no Chromium."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        lacking("browser", "there is no Chromium (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        quiet = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            program, *FLAGS, f"--user-data-dir={profile}", "about:blank", stdout=quiet, stderr=quiet
        )
        try:
            address = await _address(Path(profile) / "DevToolsActivePort", process)
            async with aiohttp.ClientSession() as client, client.ws_connect(address, max_msg_size=0) as socket:
                yield await _load(socket, file)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def _address(port: Path, process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(60):
        while True:
            assert process.returncode is None, "the browser ended at once"
            lines = port.read_text().splitlines() if port.exists() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            await asyncio.sleep(0.02)


async def _load(socket: aiohttp.ClientWebSocketResponse, file: Path) -> Page:
    await socket.send_json({"id": 1, "method": "Target.createTarget", "params": {"url": "about:blank"}})
    target = (await _answer(socket, 1))["targetId"]
    flat = {"targetId": target, "flatten": True}
    await socket.send_json({"id": 2, "method": "Target.attachToTarget", "params": flat})
    page = Page(socket, (await _answer(socket, 2))["sessionId"])
    for domain in WATCHED:
        await page.call(f"{domain}.enable")
    await page.call("Page.navigate", url=file.as_uri())
    await page.loaded()
    return page


async def _answer(socket: aiohttp.ClientWebSocketResponse, number: int) -> dict[str, Any]:
    while True:
        said = json.loads((await socket.receive(timeout=60)).data)
        if said.get("id") == number:
            result: dict[str, Any] = said["result"]
            return result
