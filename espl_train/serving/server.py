"""An OpenAI-compatible HTTP server over an engine: requests that come at once are decoded together.

`/v1/chat/completions`, `/v1/completions`, `/v1/models`, `/health`. Greedy and seeded replies are what the engine gives
for these very tokens. What a client does wrong, whatever it is, is an error in OpenAI's shape.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from aiohttp import web

from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Conversation, Message, ToolSpec
from espl_train.chat import Chat
from espl_train.engines.base import Engine, EngineError, Request, Sample
from espl_train.randomness import derive
from espl_train.serving import wire
from espl_train.serving.recall import Prompt, Recall
from espl_train.serving.wire import Answer, Choice, Refusal

MAX_BODY = 64 << 20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Offer:
    """What is served and how, where a request does not say. policy: a version of the weights, None for the base model.
    system_prompt: for conversations without one. max_tokens: of a reply, None for what the context leaves. max_total:
    of all replies of a conversation, None for no limit."""

    name: str
    policy: int | None = None
    system_prompt: str = ""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    max_total: int | None = None
    seed: int = 0


class Server:
    """Answers with `engine`. `key`: what clients have to send; empty for nothing."""

    def __init__(self, engine: Engine, chat: Chat, offer: Offer, key: str = "") -> None:
        self.engine, self.chat, self.offer, self._key = engine, chat, offer, key.encode()
        self._recall = Recall(chat, engine.release)
        self._numbers = itertools.count(1)
        self._shows: dict[tuple[ToolSpec, ...], bool] = {}
        with suppress(EsplError):
            chat.check(())                  # finds out which messages make the template change what stands

    def app(self) -> web.Application:
        """The application, to be run on a loop. Clients that hang up take their requests with them only where the
        runner says `handler_cancellation=True`."""
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._guarded])
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._text)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        return app

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The key, and every failure in OpenAI's shape."""
        try:
            if request.path != "/health" and not self._allowed(request):
                raise Refusal("the key is missing or wrong", 401, "invalid_api_key")
            return await handler(request)
        except Refusal as refused:
            return web.json_response(refused.to_json(), status=refused.status)
        except web.HTTPException as problem:
            told = Refusal(f"{request.method} {request.path}: {problem.reason}", problem.status)
            return web.json_response(told.to_json(), status=problem.status)
        except EngineError as broken:
            return web.json_response(Refusal(str(broken), 500, "engine_error").to_json(), status=500)

    def _allowed(self, request: web.Request) -> bool:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode("utf-8", "replace")
        return not self._key or hmac.compare_digest(given, self._key)

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _models(self, _: web.Request) -> web.Response:
        one = {"id": self.offer.name, "object": "model", "created": 0, "owned_by": "espl",
               "max_model_len": self.engine.context_length}
        return web.json_response({"object": "list", "data": [one]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked: wire.ChatRequest = wire.read(wire.ChatRequest, await _body(request))
        self._known(asked.model)
        messages, tools = wire.messages(asked), wire.tools(asked)
        if self.offer.system_prompt and messages[0].role != "system":
            messages = (Message("system", self.offer.system_prompt), *messages)
        prompt, number = self._prompt(messages, tools), next(self._numbers)

        def choice(index: int, sample: Sample) -> Choice:
            text, tokens, cut = self._cut(sample, asked.stops)
            said = wire.reply(text, bool(tools), f"call_{number}_{index}_")
            if not cut:
                self._recall.keep(messages, tools, prompt, said, sample.tokens, text)
            return Choice(said, "tool_calls" if said.tool_calls else "stop" if cut else sample.stop, tokens)

        samples = await self._samples(asked, prompt, number)
        choices = [choice(i, sample) for i, sample in enumerate(samples)]
        return await self._answered(
            request, asked, Answer(f"chatcmpl-{number}", self.offer.name, len(prompt.tokens), choices, True)
        )

    async def _text(self, request: web.Request) -> web.StreamResponse:
        asked: wire.TextRequest = wire.read(wire.TextRequest, await _body(request))
        self._known(asked.model)
        tokens, number = self._ids(asked.prompt), next(self._numbers)
        samples = await self._samples(asked, Prompt(tokens, ()), number)
        choices = []
        for sample in samples:
            text, count, cut = self._cut(sample, asked.stops)
            choices.append(Choice(Message("assistant", text), "stop" if cut else sample.stop, count))
        return await self._answered(
            request, asked, Answer(f"cmpl-{number}", self.offer.name, len(tokens), choices, False)
        )

    def _known(self, model: str) -> None:
        name = self.offer.name
        if model != name:
            raise Refusal(f"there is no model {model!r} here, only {name!r}", 404, "model_not_found", "model")

    def _prompt(self, messages: Conversation, tools: tuple[ToolSpec, ...]) -> Prompt:
        """Raises Refusal where the chat template does not take the conversation, or does not show the tools."""
        try:
            if tools and not self._shown(tools):
                raise Refusal(
                    f"the chat template of {self.chat.name} does not show tools: explain them in the messages",
                    param="tools",
                )
            return self._recall.prompt(messages, tools)
        except EsplError as problem:
            raise Refusal(str(problem), param="messages") from None

    def _shown(self, tools: tuple[ToolSpec, ...]) -> bool:
        if tools not in self._shows:
            if len(self._shows) > 1000:
                self._shows.clear()
            hello = (Message("user", "Hello."),)
            self._shows[tools] = self.chat.open(hello, tools) != self.chat.open(hello)
        return self._shows[tools]

    def _ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        tokenizer = self.chat.tokenizer
        if isinstance(prompt, str):
            return tuple(tokenizer(prompt, verbose=False)["input_ids"])
        if not all(0 <= token < len(tokenizer) for token in prompt):
            raise Refusal(f"'prompt' has ids outside 0..{len(tokenizer) - 1}", param="prompt")
        return tuple(prompt)

    async def _samples(self, asked: wire.Sampling, prompt: Prompt, number: int) -> list[Sample]:
        """Raises Refusal where the prompt, or what the conversation may still say, leaves no room for a reply."""
        room = self.engine.context_length - len(prompt.tokens)
        if room < 1 or not prompt.tokens:
            raise Refusal(
                f"the prompt has {len(prompt.tokens)} tokens, the maximum context length is "
                f"{self.engine.context_length} with the reply", 400, "context_length_exceeded", "messages",
            )
        offer = self.offer
        if offer.max_total is not None and (room := min(room, offer.max_total - prompt.sampled)) < 1:
            raise Refusal(
                f"the model has said {prompt.sampled} tokens in this conversation, and {offer.max_total} is what an "
                "episode of its run may have (rollout.max_total_tokens, which can be set where it is served)", 400,
                "context_length_exceeded", "messages",
            )
        seed = derive(offer.seed, "request", number) if asked.seed is None else asked.seed
        request = Request(
            tokens=prompt.tokens,
            max_new=min(room, asked.limit or offer.max_tokens or room),
            seed=seed,
            stop_ids=self.chat.stop_ids,
            temperature=offer.temperature if asked.temperature is None else asked.temperature,
            top_p=offer.top_p if asked.top_p is None else asked.top_p,
            policy=offer.policy,
            session=prompt.session if asked.n == 1 else None,
        )
        requests = [replace(request, seed=derive(seed, "choice", i)) for i in range(asked.n)]
        return list(await asyncio.gather(*map(self.engine.sample, requests)))

    def _cut(self, sample: Sample, stops: tuple[str, ...]) -> tuple[str, int, bool]:
        """The text of a reply up to the first stop text, the tokens that it took to get there, and whether it has one.
        """
        text = self.chat.text(sample.tokens)
        end = min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)
        if end is None:
            return text, len(sample.tokens), False
        low, high = 0, len(sample.tokens)           # the fewest tokens whose text has a stop text in it
        while low < high:
            middle = (low + high) // 2
            said = self.chat.text(sample.tokens[:middle])
            low, high = (low, middle) if any(stop in said for stop in stops) else (middle + 1, high)
        return text[:end], low, True

    async def _answered(self, request: web.Request, asked: wire.Sampling, answer: Answer) -> web.StreamResponse:
        if not asked.stream:
            return web.json_response(answer.to_json())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        for event in answer.events(usage=asked.stream_options is not None and asked.stream_options.include_usage):
            await response.write(event.encode())
        await response.write_eof()
        return response


async def _body(request: web.Request) -> bytes:
    """A browser asks before it sends JSON to another site, and is not answered: no page reaches this server."""
    if request.content_type != "application/json":
        raise Refusal("the content type has to be application/json", 415)
    return await request.read()
