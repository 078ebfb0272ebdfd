"""The tools of an episode over MCP, by the official client: the specs and the scores of the environment itself."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import mcp
import pytest
import toy

from espl_envs.core import background
from espl_envs.core.messages import ToolCall
from espl_envs.interop.mcp import ANSWER, Game, Offer, ToolHost

TASK = 3


async def game(task: int = TASK) -> Game:
    env = toy.ToyEnv(tools=True, tool_syntax="native", max_turns=20)
    await env.areset(seed=0, options={"task": task})
    return Game(env)


def hosted(play: Callable[[ToolHost], Awaitable[None]]) -> None:
    async def session() -> None:
        async with ToolHost().open() as host:
            await play(host)

    background.run(session())


def said(result: Any) -> tuple[bool, str]:
    return bool(result.is_error), str(result.content[0].text)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_an_episode_over_mcp_is_the_episode(mode: str) -> None:
    async def play(host: ToolHost) -> None:
        one = await game()
        with host.offer(Offer(one.tools, one.play)) as url:
            async with mcp.Client(url, mode=mode) as client:
                listed = {tool.name: tool.input_schema for tool in (await client.list_tools()).tools}
                assert listed.pop(ANSWER) and listed == {spec.name: json.loads(spec.schema) for spec in one.env.tools}
                assert said(await client.call_tool("add", {"a": 3, "b": 3})) == (False, "6")
                assert said(await client.call_tool(ANSWER, {"text": "\\boxed{6}"}))[1].endswith("the score is 1.")
                assert said(await client.call_tool("add", {"a": 3, "b": 3})) == (True, "Error: the episode is over.")
        assert one.reward == 1.0 and one.env.messages[-3].tool_calls[0].name == "add"

    hosted(play)


def test_mistakes_are_tool_errors() -> None:
    async def play(host: ToolHost) -> None:
        one = await game()
        with host.offer(Offer(one.tools, one.play)) as url:
            async with mcp.Client(url) as client:
                for name, arguments, sentence in (
                    ("add", {"a": 1}, "the argument 'b' is missing"),
                    ("add", {"a": "x", "b": 1}, "'a' is string, expected integer"),
                    ("add", {"a": 13, "b": 1}, "13 brings bad luck"),
                    ("nothing", {}, "there is no tool named 'nothing'"),
                    (ANSWER, {}, "the argument 'text' is missing"),
                ):
                    error, text = said(await client.call_tool(name, arguments))
                    assert error and sentence in text
        assert not one.over

    hosted(play)


def test_episodes_at_once_do_not_hear_each_other() -> None:
    async def play(host: ToolHost) -> None:
        heard: dict[int, list[str]] = {}

        async def episode(number: int) -> None:
            async def answer(call: ToolCall) -> str:
                heard.setdefault(number, []).append(call.name)
                await asyncio.sleep(0)
                return f"I am {number}"

            with host.offer(Offer((toy.Adder.spec,), answer)) as url:
                async with mcp.Client(url) as client:
                    texts = {said(await client.call_tool("add", {"a": 1, "b": 1}))[1] for _ in range(3)}
            assert texts == {f"I am {number}"}

        await asyncio.gather(*map(episode, range(4)))
        assert heard == {number: ["add"] * 3 for number in range(4)}

    hosted(play)


def test_an_address_is_of_one_episode_and_ends_with_it() -> None:
    import aiohttp

    async def play(host: ToolHost) -> None:
        one = await game()
        with host.offer(Offer(one.tools, one.play)) as url:
            pass
        async with aiohttp.ClientSession() as session:
            for gone in (url, url.replace("/mcp", ""), url[:-5] + "x/mcp"):
                async with session.post(gone, json={}) as answer:
                    assert answer.status == 404 and "no such episode" in await answer.text()

    hosted(play)


def test_one_episode_over_standard_input_and_output() -> None:
    words = ["-m", "espl_envs.interop.mcp", "--env", f"toy:{toy.IDS[1]}", "--task", str(TASK), "--split", "train"]
    server = mcp.StdioServerParameters(
        command=sys.executable, args=words, env={"PYTHONPATH": str(Path(__file__).parent)}
    )

    async def play() -> None:
        async with mcp.Client(server) as client:
            assert f"What is {TASK} + {TASK}?" in str(client.instructions)
            assert said(await client.call_tool("add", {"a": 1, "b": 2})) == (False, "3")
            assert "the score is 0" in said(await client.call_tool("submit", {"answer": "7"}))[1]

    asyncio.run(play())
