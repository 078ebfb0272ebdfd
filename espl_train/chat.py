"""Conversations as exact token ids: a prompt is rendered once, and what was sampled is never rendered again.

`open` renders messages through the model's own chat template; `follow` gives the ids that the template adds after a
reply. The next turn appends them to the sampled ids, so decoding and re-encoding never happens. Some templates rewrite
what stands already (most drop the thinking of earlier replies): `check` finds out at the start, by message type, and
where that happens the conversation forks: the whole prompt is rendered anew, and a new training sequence begins with
it. One renderer serves training, reflection and evaluation. Special tokens spelled out in a message's text are data:
they are encoded as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal

from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Message, ToolSpec
from espl_train.randomness import derive

FollowUp = Literal["user", "tool"]

STANDIN = "espl-reply-0f9c"            # stands for a reply where the template's text around it is wanted
DATE = "26 Jul 2024"                   # Llama 3 templates print today's date unless given one


def count_tokens(tokenizer: Any, text: str) -> int:
    """How many tokens a text is, taken alone."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class Chat:
    """The chat template and tokenizer of one model. `stop_ids` are the tokens that end a reply."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.name = str(getattr(tokenizer, "name_or_path", "") or "the model")
        if not getattr(tokenizer, "chat_template", None):
            raise EsplError(
                f"{self.name} has no chat template, so it cannot hold a conversation: "
                "choose an instruction-tuned model, or add a chat_template to its tokenizer"
            )
        special = sorted((token for token in tokenizer.all_special_tokens if token), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else None
        self._open = lru_cache(maxsize=4096)(self._render_ids)
        self._refused: dict[str, str] = {}       # follow-up → why the template does not take it
        self._rewriting: set[str] = set()        # follow-ups before which it may change what stands already
        self._checked = False
        self.stop_ids = self._find_stop_ids()

    def open(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]:
        """The ids of a prompt: the messages and the generation prompt. Raises EsplError where the template refuses."""
        return list(self._open(tuple(messages), tuple(tools)))

    def follow(
        self, messages: Sequence[Message], new: Sequence[Message], tools: Sequence[ToolSpec] = (), *,
        sampled: Sequence[int] | None = None,
    ) -> tuple[list[int], bool]:
        """What the model reads after a reply, and whether that is a fork: False: ids to append to what stands already;
        True: the whole prompt anew, because the template changes what stands.

        `messages` end with the reply. Raises EsplError where the template does not take the `new` messages.
        """
        if self._rewrites(messages, new, tools):
            return self.open((*messages, *new), tools), True
        return self.extend(messages, new, tools, sampled=sampled), False

    def extend(
        self, messages: Sequence[Message], new: Sequence[Message], tools: Sequence[ToolSpec] = (), *,
        sampled: Sequence[int] | None = None,
    ) -> list[int]:
        """The ids to append after a reply: the rest of its turn, the `new` messages and the generation prompt.

        `messages` end with the reply. `sampled` are its ids: where they do not end with the template's end-of-turn
        token, that token is part of the result (None: they do). Right where the template changes nothing that stands.
        """
        if not messages or messages[-1].role != "assistant" or not new:
            raise ValueError("extend takes a conversation that ends with the reply, and at least one new message")
        for kind in {message.role for message in new} & self._refused.keys():
            raise EsplError(self._refused[kind])
        ids = self._encode(*self._after_reply(tuple(new), tuple(tools)))
        ended = sampled is None or (len(sampled) > 0 and sampled[-1] == ids[0])
        return ids[1:] if ended and ids[0] in self.stop_ids else ids

    def text(self, tokens: Sequence[int]) -> str:
        """What a reply says: its sampled ids as text, without the stop token."""
        kept = tokens[:-1] if tokens and tokens[-1] in self.stop_ids else tokens
        return str(self.tokenizer.decode(list(kept), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def check(self, follow_ups: Iterable[FollowUp] = ("user", "tool")) -> None:
        """Prove that the template takes system prompts and what follows replies. Raises EsplError where it does not.

        `follow_ups` are the types of messages that the environment sends after a reply; none for single replies.
        What is not asked for is examined too: `follow` refuses it later. A template that changes what stands is no
        error: it makes forks.
        """
        if not self._checked:
            self._render((Message("system", "Be brief."), Message("user", "What is 2+2?")))
            kinds: tuple[FollowUp, ...] = ("user", "tool")
            for kind in kinds:
                self._examine(kind)
            self._checked = True
        for kind in follow_ups:
            if kind in self._refused:
                raise EsplError(self._refused[kind])

    def _examine(self, kind: FollowUp) -> None:
        """Find out what the template makes of messages of this type after a reply."""
        for system in ((), (Message("system", "Be brief."),)):
            for reply in ("4", "<think>\nTwo and two.\n</think>\n\nIt is 4."):
                conversation: tuple[Message, ...] = (*system, Message("user", "What is 2+2?"))
                try:
                    for turn in range(3):
                        new = (Message(kind, f"Result {turn}"), *([Message(kind, "More")] if kind == "tool" else []))
                        conversation = (*conversation, Message("assistant", reply))
                        if self._changes(conversation, new):
                            self._rewriting.add(kind)
                        conversation = (*conversation, *new)
                except EsplError as error:
                    self._refused[kind] = str(error)
                    return

    def _rewrites(self, messages: Sequence[Message], new: Sequence[Message], tools: Sequence[ToolSpec]) -> bool:
        """Whether these messages make the template change what stands: asked only of the types that may."""
        kinds = {message.role for message in new}
        return bool(kinds & self._rewriting) and not kinds & self._refused.keys() and self._changes(
            tuple(messages), tuple(new), tuple(tools)
        )

    def _changes(
        self, messages: tuple[Message, ...], new: tuple[Message, ...], tools: tuple[ToolSpec, ...] = ()
    ) -> bool:
        """Whether the whole conversation reads otherwise than its prompt, the reply that ends it, and what follows."""
        built = self._render(messages[:-1], tools) + messages[-1].content + self._after_reply(new, tools)[0]
        return self._render((*messages, *new), tools) != built

    def _render_ids(self, messages: tuple[Message, ...], tools: tuple[ToolSpec, ...]) -> tuple[int, ...]:
        hidden, table = self._hide(messages)
        return tuple(self._encode(self._render(hidden, tools), table))

    def _after_reply(
        self, new: tuple[Message, ...], tools: tuple[ToolSpec, ...] = ()
    ) -> tuple[str, dict[str, str]]:
        """The template's text between a reply and the next one, and the special tokens that were spelled out in it.

        The conversation before makes no difference (else the template rewrites), so the shortest one is rendered.
        """
        hidden, table = self._hide(new)
        whole = self._render((Message("user", "Hello"), Message("assistant", STANDIN), *hidden), tools)
        return self._split(whole), table

    def _split(self, whole: str) -> str:
        before, found, after = whole.partition(STANDIN)
        if not before or not found:
            raise EsplError(f"the chat template of {self.name} does not show what was replied")
        return after

    def _render(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), prompt: bool = True) -> str:
        import jinja2

        try:
            return str(self.tokenizer.apply_chat_template(
                [message.to_openai() for message in messages], tools=[tool.to_openai() for tool in tools] or None,
                add_generation_prompt=prompt, tokenize=False, date_string=DATE,
            ))
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message.role for message in messages)
            raise EsplError(f"the chat template of {self.name} refuses a conversation of {roles}: {error}") from error

    def _encode(self, text: str, table: dict[str, str]) -> list[int]:
        """Ids of a rendered text; what stands in `table` (placeholder → special token spelled out) becomes text."""
        ids: list[int] = []
        parts = re.split("(" + "|".join(table) + ")", text) if table else [text]
        for part in parts:
            if part:
                ids += self.tokenizer(
                    table.get(part, part), add_special_tokens=False, split_special_tokens=part in table, verbose=False
                )["input_ids"]
        return ids

    def _hide(self, messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], dict[str, str]]:
        """Put placeholders where a message spells out special tokens."""
        if self._special is None or not any(self._special.search(message.content) for message in messages):
            return messages, {}
        mark = f"espl-{derive(*(message.content for message in messages)):016x}"
        table: dict[str, str] = {}

        def placeholder(match: re.Match[str]) -> str:
            key = f"{mark}-{len(table)}-"
            table[key] = match.group()
            return key

        hidden = []
        for message in messages:
            content = self._special.sub(placeholder, message.content)
            hidden.append(Message(message.role, content, message.tool_calls, message.tool_call_id, message.name))
        return tuple(hidden), table

    def _find_stop_ids(self) -> tuple[int, ...]:
        """The template's end-of-turn token and the tokenizer's end of text."""
        turn = self._split(self._render((Message("user", "Hello"), Message("assistant", STANDIN)), prompt=False))
        ids = self._encode(turn, {}) if turn else []
        known = set(self.tokenizer.all_special_ids) | set(getattr(self.tokenizer, "added_tokens_decoder", {}))
        end = getattr(self.tokenizer, "eos_token_id", None)
        stops = tuple(dict.fromkeys(i for i in (*ids[:1], end) if i is not None and (i == end or i in known)))
        if not stops:
            raise EsplError(f"{self.name} has no token that ends a reply: its tokenizer needs an eos_token")
        return stops
