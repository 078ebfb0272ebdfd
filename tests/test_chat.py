"""Exact tokens: what was sampled stands in the training sequence as it was sampled, whatever it says."""

from __future__ import annotations

import re

import pytest
from chat_kit import NO_SYSTEM, NO_TOOL, SPECIAL, SYSTEM_LAST, TEMPLATES, byte_tokenizer, tokenizer_for
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Conversation, Message
from espl_envs.core.protocol import opening
from espl_envs.core.tasks import Task
from espl_envs.tools.base import tool_spec
from espl_train.chat import Chat

CHATS = {name: Chat(tokenizer_for(name)) for name in TEMPLATES}
for _chat in CHATS.values():
    _chat.check(("tool",))
MARKUP = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|eot_id|>", "<think>", "</think>", "\n", "\u0301", "🏳️‍🌈",
          "\u202e", "\x00", "espl-reply-0f9c", "<tool_response>", "{{ messages }}", "{% raw %}"]
TEXT = st.lists(st.one_of(st.text(max_size=6), st.sampled_from(MARKUP)), max_size=5).map("".join)


def system(text: str) -> Message:
    return Message("system", text)


def user(text: str) -> Message:
    return Message("user", text)


def tool(text: str) -> Message:
    return Message("tool", text)


def said(text: str) -> Message:
    return Message("assistant", text)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    texts=st.tuples(TEXT, TEXT),
    turns=st.lists(st.tuples(st.lists(st.integers(0, 262), max_size=12), st.booleans(), TEXT), min_size=1, max_size=3),
)
def test_sampled_ids_are_never_tokenised_again(
    name: str, texts: tuple[str, str], turns: list[tuple[list[int], bool, str]]
) -> None:
    """Whatever ids a model samples (halves of characters, special tokens, nothing) and whatever follows them."""
    chat = CHATS[name]
    messages: Conversation = (system(texts[0]), user(texts[1]))
    sequence = chat.open(messages)
    spans = []
    for ids, stopped, follow_up in turns:
        sampled = [i for i in ids if i not in chat.stop_ids] + [chat.stop_ids[0]] * stopped
        spans.append((len(sequence), sampled))
        sequence += sampled
        messages += (said(chat.text(sampled)),)
        new = (tool(follow_up),)
        suffix = chat.extend(messages, new, sampled=sampled)
        assert (suffix[0] == chat.stop_ids[0]) is not stopped      # every reply is ended exactly once
        sequence += suffix
        messages += new
    for start, sampled in spans:
        assert sequence[start : start + len(sampled)] == sampled


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(sorted(TEMPLATES)), content=TEXT, reply=st.text(alphabet="abc é\n", min_size=1, max_size=8))
def test_the_sequence_says_what_the_template_says(name: str, content: str, reply: str) -> None:
    """For replies that the template does not rewrite, piecewise ids decode to the template's own rendering."""
    chat, reply = CHATS[name], reply.strip() or "x"
    content = re.sub("|".join(map(re.escape, sum((s for _, s in SPECIAL.values()), ["<|endoftext|>"]))), "", content)
    content = content.strip()
    first: Conversation = (system("Be brief."), user("Hello"))
    new = (tool(content), tool("second"))
    pieces = [*chat.open(first), *chat.tokenizer(reply, add_special_tokens=False)["input_ids"],
              *chat.extend((*first, said(reply)), new, sampled=())]
    whole = chat.tokenizer.apply_chat_template(
        [m.to_openai() for m in (*first, said(reply), *new)], add_generation_prompt=True, tokenize=False
    )
    assert chat.tokenizer.decode(pieces) == whole
    assert pieces == chat.tokenizer(whole, add_special_tokens=False)["input_ids"]


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(sorted(TEMPLATES)), content=TEXT)
def test_special_tokens_spelled_out_in_a_message_are_text(name: str, content: str) -> None:
    chat = CHATS[name]
    special = set(chat.tokenizer.all_special_ids)
    plain = [i for i in chat.open((system("s"), user("x"))) if i in special]
    assert [i for i in chat.open((system(content), user(content))) if i in special] == plain
    after = [i for i in chat.extend((said("r"),), (tool("x"),)) if i in special]
    assert [i for i in chat.extend((said("r"),), (tool(content),)) if i in special] == after
    if name != "llama3":                                             # which trims
        assert content in chat.tokenizer.decode(chat.open((system(content), user("x"))))


def test_an_empty_prompt_is_rendered_identically_in_training_and_evaluation() -> None:
    """One renderer, and no system message at all where the prompt is empty."""
    task = Task("t", "train", "What is 2+2?", "4")
    chat = CHATS["llama3"]
    none = opening(task.question, "", "", "system")
    assert [message.role for message in none] == ["user"]
    trained, evaluated = chat.open(none), Chat(tokenizer_for("llama3")).open(list(none))
    assert trained == evaluated
    assert chat.tokenizer.decode(trained) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_golden_ids_of_a_turn() -> None:
    chat = CHATS["qwen2"]
    start, end = chat.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert chat.stop_ids == (end, chat.tokenizer.eos_token_id)
    assert chat.open((system("é"), user("q"))) == [
        start, *b"system\n", *"é".encode(), end, *b"\n", start, *b"user\nq", end, *b"\n", start, *b"assistant\n"
    ]
    glue = [*b"\n", start, *b"user\nmore", end, *b"\n", start, *b"assistant\n"]
    conversation = (user("q"), said("r"))
    assert chat.extend(conversation, (user("more"),), sampled=[65, end]) == glue
    assert chat.extend(conversation, (user("more"),), sampled=[65]) == [end, *glue]
    assert chat.extend(conversation, (user("more"),), sampled=[]) == [end, *glue]
    assert chat.extend(conversation, (user("more"),), sampled=[65, chat.tokenizer.eos_token_id]) == [end, *glue]
    assert chat.extend(conversation, (user("more"),)) == glue


def test_the_text_of_a_reply_is_verbatim_without_its_stop_token() -> None:
    chat = CHATS["qwen2"]
    end = chat.stop_ids[0]
    assert chat.text([*b" a  ,b \n", end]) == " a  ,b \n"
    assert chat.text([chat.tokenizer.convert_tokens_to_ids("<think>"), 65]) == "<think>A"
    assert chat.text([end]) == chat.text([]) == ""
    assert chat.text([0xF0, 0x9F, end]) == "\ufffd"


def test_a_template_that_drops_earlier_thinking_forks_where_it_does_and_nowhere_else() -> None:
    chat = Chat(tokenizer_for("qwen3"))
    chat.check()
    asked: Conversation = (system("s"), user("q"))
    thought, plain = said("<think>\nhm\n</think>\n\nr"), said("r")
    context, fork = chat.follow((*asked, thought), (user("u"),))
    assert fork
    assert context == chat.open((*asked, plain, user("u")))                     # as if it had never thought
    for reply, new in ((thought, tool("t")), (plain, user("u"))):
        context, fork = chat.follow((*asked, reply), (new,))
        assert not fork
        assert context == chat.extend((*asked, reply), (new,))
    later = (*asked, thought, user("u"), plain)
    context, fork = chat.follow(later, (user("v"),))
    assert not fork                                                             # what stands has forgotten it already
    stands = [*chat.open(later[:-1]), *chat.tokenizer("r")["input_ids"]]
    assert [*stands, *chat.extend(later, (user("v"),), sampled=())] == chat.open((*later, user("v")))


def test_a_template_that_moves_the_system_prompt_forks_at_every_turn() -> None:
    chat = Chat(byte_tokenizer(SYSTEM_LAST, "inst"))
    chat.check()
    talk = (system("s"), user("q"), said("r"))
    for new in (user("u"), tool("t")):
        assert chat.follow(talk, (new,)) == (chat.open((*talk, new)), True)


def test_templates_that_only_append_are_not_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = CHATS["qwen2"]
    chat.check()
    monkeypatch.setattr(chat, "_changes", lambda *_: pytest.fail("the whole conversation was rendered again"))
    talk, new = (user("q"), said("r")), (user("u"),)
    assert chat.follow(talk, new) == (chat.extend(talk, new), False)


def test_a_message_type_that_the_template_does_not_take_is_refused() -> None:
    chat = Chat(byte_tokenizer(NO_TOOL))
    chat.check(())
    with pytest.raises(EsplError, match=r"refuses a conversation of user, assistant, tool, tool: no tools here"):
        chat.check()
    with pytest.raises(EsplError, match="no tools here"):
        chat.follow((user("q"), said("r")), (tool("t"),))


def test_a_template_without_a_system_role_is_refused() -> None:
    with pytest.raises(EsplError, match=r"refuses a conversation of system, user: no system role here"):
        Chat(byte_tokenizer(NO_SYSTEM)).check(())


@pytest.mark.parametrize("name", ["qwen2", "llama3"])
def test_append_only_templates_pass(name: str) -> None:
    Chat(tokenizer_for(name)).check()


def test_a_model_without_chat_template_is_named() -> None:
    with pytest.raises(EsplError, match="test/chatml has no chat template"):
        Chat(byte_tokenizer(None))


def test_a_template_without_an_end_of_turn_needs_an_end_of_text() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ")
    chat = Chat(tokenizer)
    assert chat.stop_ids == (tokenizer.eos_token_id,)
    assert chat.extend((said("r"),), (user("u"),), sampled=[65]) == list(b"\nuser: u\nassistant: ")
    assert chat.extend((said("r"),), (user("u"),), sampled=[tokenizer.eos_token_id])[0] == ord("\n")
    tokenizer.eos_token = None
    with pytest.raises(EsplError, match="ends a reply"):
        Chat(tokenizer)


def test_tools_are_rendered_by_templates_that_know_them() -> None:
    chat = CHATS["qwen2"]
    spec = tool_spec("add", "Add two numbers.", {"a": {"type": "integer"}})
    assert "Add two numbers." in chat.tokenizer.decode(chat.open((user("q"),), (spec,)))
    assert chat.extend((said("r"),), (tool("4"),), (spec,)) == chat.extend((said("r"),), (tool("4"),))


def test_only_a_reply_is_extended() -> None:
    with pytest.raises(ValueError):
        CHATS["qwen2"].extend((user("q"),), (user("u"),))
    with pytest.raises(ValueError):
        CHATS["qwen2"].extend((said("r"),), ())
