"""Conversations that come back longer: their exact tokens, and the keys and values that an engine keeps for them.

The protocol is stateless: every turn brings the whole conversation as text. Rendering the model's own earlier replies
anew could read otherwise than what it sampled (one text, several tokenisations). A conversation that goes on from a
reply of this server therefore goes on from the very tokens, as in training.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Conversation, Message, ToolSpec
from espl_train.chat import Chat

Key = tuple[Conversation, tuple[ToolSpec, ...]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads: `tokens`, the conversation as it was sampled, and the engine's session where it goes on.
    sampled: tokens of the model's own in it, all turns together."""

    tokens: tuple[int, ...]
    messages: Conversation
    session: str | None = None
    sampled: int = 0


@dataclass(frozen=True, slots=True)
class _Kept:
    prompt: Prompt
    sampled: tuple[int, ...]
    messages: Conversation
    session: str


class Recall:
    """The last `most` replies. `release` is told of sessions that are forgotten."""

    def __init__(self, chat: Chat, release: Callable[[str], None], most: int = 4096) -> None:
        self._chat, self._release, self._most = chat, release, most
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()
        self._count = 0

    def prompt(self, messages: Conversation, tools: tuple[ToolSpec, ...] = ()) -> Prompt:
        """What the model reads of a conversation. Raises EsplError where its chat template refuses."""
        said = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=None)
        if said is not None and said + 1 < len(messages):
            kept = self._kept.get((messages[: said + 1], tools))
            if kept is not None and (found := self._onwards(kept, messages[said + 1 :], tools)) is not None:
                self._kept.move_to_end((messages[: said + 1], tools))
                return found
        return Prompt(tuple(self._chat.open(messages, tools)), messages, sampled=self._counted(messages))

    def keep(
        self, messages: Conversation, tools: tuple[ToolSpec, ...], prompt: Prompt, reply: Message,
        sampled: tuple[int, ...], text: str,
    ) -> None:
        """`reply` was sent to whoever sent `messages`; `sampled` and `text` are what it was made of."""
        self._count += 1
        whole = (*prompt.messages, Message("assistant", text))
        session = prompt.session or f"conversation-{self._count}"
        self._kept[(*messages, reply), tools] = _Kept(prompt, sampled, whole, session)
        while len(self._kept) > self._most:
            _, oldest = self._kept.popitem(last=False)
            self._release(oldest.session)

    def _onwards(self, kept: _Kept, new: Conversation, tools: tuple[ToolSpec, ...]) -> Prompt | None:
        try:
            ids, fork = self._chat.follow(kept.messages, new, tools, sampled=kept.sampled)
        except EsplError:
            return None                     # the template may still take the conversation as a whole
        tokens = tuple(ids) if fork else (*kept.prompt.tokens, *kept.sampled, *ids)
        return Prompt(tokens, (*kept.messages, *new), kept.session, kept.prompt.sampled + len(kept.sampled))

    def _counted(self, messages: Conversation) -> int:
        """The tokens of replies that are known as text alone, each with the one that ended it."""
        said = [message.content for message in messages if message.role == "assistant" and message.content]
        return sum(len(self._chat.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in said)
