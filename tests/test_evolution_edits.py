"""Operations: tolerant reading, strict meaning, one transaction; nothing a model writes can raise or half-apply."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_train.evolution.edits import (
    KINDS,
    Edited,
    Limits,
    Operation,
    apply,
    fingerprint,
    fingerprints,
    last_id,
    unqualify,
)
from espl_train.evolution.prompts import Origin, Principle
from espl_train.evolution.rejections import Reason, Rejection, excerpt
from espl_train.evolution.replies import read_operations

BASE = (Principle("G1", "Check the sign."), Principle("G2", "Draw a figure."), Principle("G5", "Read twice."))
ADD = '[{"op": "add", "text": "Test small cases."}]'


def reason(value: object) -> Reason:
    assert isinstance(value, Rejection), value
    return value.reason


@pytest.mark.parametrize(
    "reply",
    [
        ADD,
        f"I compared the attempts.\n```json\n{ADD}\n```\nDone.",
        '[{"op": "add", "text": "Test small cases.",},]',
        '{"op": "add", "text": "Test small cases."}',
        '{"operations": [{"op": "add", "text": "Test small cases."}]}',
        f'[{{"op": "remove", "id": "G1"}}] no, rather: {ADD}',
        f"the set [1, 2] and \\frac{{1}}{{2}} say \"[{{broken\" … {ADD}",
        '[{"op": "add", "id": "G9", "text": " Test\\n small   cases. "}]',
        '[{"op": "Add", "id": 9, "text": "Test small cases."}]',
        '[{"operation": "add", "text": "Test small cases."}]',
        '{"operation": "add", "text": "Test small cases."}',
        '[{"op": "add", "text": "Test small cases."}, {"op": "add", "text": "Test small  cases."}]',
        '<think>[{"op": "remove", "id": "G1"}]? No.</think>{"result": {"operations": ' + ADD + "}}",
        f"\ufeff{ADD}\x00",
        '[{"op": "add", "text": "Test small cases.", "confidence": 1e400, "ids": [null]}]',
    ],
)
def test_an_addition_is_read_from_any_reasonable_reply(reply: str) -> None:
    assert read_operations(reply) == (Operation("add", "Test small cases."),)


def test_all_kinds_are_read() -> None:
    reply = json.dumps(
        [
            {"op": "modify", "id": "G1", "text": "a", "evidence": "seen twice"},
            {"op": "remove", "id": "G2"},
            {"op": "merge", "ids": ["G3", "G4", "G3"], "text": "b"},
        ]
    )
    assert read_operations(reply) == (
        Operation("modify", "a", ("G1",), "seen twice"),
        Operation("remove", "", ("G2",)),
        Operation("merge", "b", ("G3", "G4")),
    )


@pytest.mark.parametrize("reply", ["[]", "[ ]", "Nothing to change:\n```json\n[]\n```"])
def test_an_explicit_empty_list_is_no_rejection(reply: str) -> None:
    assert read_operations(reply) == ()


def test_objects_one_per_line_are_one_plan() -> None:
    reply = '{"op":"remove","id":"G1"}\n{"op":"remove","id":"G2"}'
    assert read_operations(reply) == (Operation("remove", "", ("G1",)), Operation("remove", "", ("G2",)))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("", Reason.EMPTY_REPLY),
        (" \n", Reason.EMPTY_REPLY),
        ("I would add a principle.", Reason.NO_JSON),
        ("[1, 2, 3]", Reason.NO_JSON),
        ('[{"op": "add", "text": "cut o', Reason.INVALID_JSON),
        ('[{"op": "add", "text": "kept"}, {"op": "modi', Reason.INVALID_JSON),
        ("[{'op': 'add', 'text': 'python'}]", Reason.INVALID_JSON),
        ('[{"op": "merge", "ids": [], "text": broken}]', Reason.INVALID_JSON),
        ('[{"op": "add" "text": "x"}] []', Reason.INVALID_JSON),
        ('[{"op": "delete", "id": "G1"}]', Reason.UNKNOWN_OPERATION),
        ('[{"op": ["add"], "text": "x"}]', Reason.UNKNOWN_OPERATION),
        ('[{"text": "x"}]', Reason.UNKNOWN_OPERATION),
        ('[{"op": "add"}]', Reason.BAD_OPERATION),
        ('[{"op": "add", "text": 7}]', Reason.BAD_OPERATION),
        ('[{"op": "add", "text": "  "}]', Reason.BAD_OPERATION),
        ('[{"op": "modify", "text": "x"}]', Reason.BAD_OPERATION),
        ('[{"op": "modify", "id": 3, "text": "x"}]', Reason.BAD_OPERATION),
        ('[{"op": "modify", "id": "[ ]", "text": "x"}]', Reason.BAD_OPERATION),
        ('[{"op": "remove", "id": "G1", "id": "G2"}]', Reason.INVALID_JSON),
        ('[{"op": "add", "op": "remove", "id": "G2", "text": "x"}]', Reason.INVALID_JSON),
        ('[{"operation": ["add"], "text": "x"}]', Reason.UNKNOWN_OPERATION),
        ('[{"op": "add", "text": "x", "size": ' + "9" * 5000 + "}]", Reason.INVALID_JSON),
        ('[{"op": "add", "text": "x", "evidence": ' + "[" * 9000 + "]" * 9000 + "}]", Reason.INVALID_JSON),
        ('[{"name": "calculator", "arguments": {"op": "add", "a": 1}}]', Reason.UNKNOWN_OPERATION),
        ('{"choices": [{"message": {"role": "assistant", "content": "hello"}}]}', Reason.UNKNOWN_OPERATION),
        ('{"jsonrpc": "2.0", "method": "add", "params": [1, 2]}', Reason.NO_JSON),
        ('{"type": "add", "text": "x"}', Reason.NO_JSON),
        ("[{\u201cop\u201d: \u201cadd\u201d, \u201ctext\u201d: \u201cx\u201d}]", Reason.NO_JSON),
        ('[{"op": "remove", "ids": ["G1", "G2"]}]', Reason.BAD_OPERATION),
        ('[{"op": "merge", "ids": ["G1", "G1"], "text": "x"}]', Reason.BAD_OPERATION),
        ("[" + ",".join(['{"op":"add","text":"x"}'] * 3) + "]", Reason.TOO_MANY_OPERATIONS),
    ],
)
def test_what_cannot_be_read_has_a_name(reply: str, expected: Reason) -> None:
    assert reason(read_operations(reply, max_operations=2)) is expected


HOSTILE = ['[{"op', '{"a":', '[{"a":[{"', '[{"op":"add","text":"x"},', "[", "[{", '{"', '[{"op":"a,]', '\\"', '"a\\']


@pytest.mark.parametrize("piece", HOSTILE)
@pytest.mark.parametrize("start", ["", '[{"', '[{"op":'])
def test_no_reply_takes_long_to_read(piece: str, start: str) -> None:
    """Patterns that backtracking or nesting would make quadratic: minutes without the bounds, moments with them."""
    assert isinstance(read_operations(start + piece * (60_000 // len(piece))), Rejection)


def test_ten_megabytes_are_read_from_their_end() -> None:
    """Linear in the length, and never more than the end of it; a plan at the beginning is not found by accident."""
    assert read_operations(10_000_000 * "x" + ADD) == (Operation("add", "Test small cases."),)
    assert reason(read_operations(ADD + '[{"op":' * 1_500_000)) is Reason.INVALID_JSON


def test_ids_may_wear_the_brackets_of_the_prompt() -> None:
    reply = '[{"op": "remove", "id": "[G1]"}, {"op": "merge", "ids": ["A.G2:", " G3"], "text": "x"}]'
    assert read_operations(reply) == (Operation("remove", "", ("G1",)), Operation("merge", "x", ("A.G2", "G3")))


def test_a_lone_surrogate_can_be_read_refused_and_logged() -> None:
    read = read_operations('[{"op": "modify", "id": "\\ud83d", "text": "half \\ud83d", "evidence": "\\udc00"}]')
    assert isinstance(read, tuple)
    refused = apply(BASE, read, Limits())
    assert reason(refused) is Reason.UNKNOWN_ID and str(refused).encode()
    json.dumps([excerpt(read[0].text), read[0].evidence]).encode()


def test_the_rest_of_a_list_whose_beginning_was_not_read_is_no_plan() -> None:
    items = ",".join('{"op": "remove", "id": "G1"}' for _ in range(2000))
    assert isinstance(read_operations(f"[{items}]", max_operations=9999), Rejection)


def test_kinds_can_be_restricted() -> None:
    refused = read_operations('[{"op": "merge", "ids": ["G1", "G2"], "text": "x"}]', allowed=("add", "modify"))
    assert reason(refused) is Reason.UNKNOWN_OPERATION


def test_nothing_is_ever_evaluated(tmp_path) -> None:  # type: ignore[no-untyped-def]
    target = tmp_path / "owned"
    assert isinstance(read_operations(f"[{{'op': open({str(target)!r}, 'w').write('x')}}]"), Rejection)
    assert not target.exists()


def test_a_plan_edits_in_place_and_gives_new_ids() -> None:
    plan = [
        Operation("modify", "Check sign and unit.", ("G1",)),
        Operation("merge", "Read twice, then draw.", ("G5", "G2")),
        Operation("add", "Stop early."),
    ]
    assert apply(BASE, plan, Limits()) == Edited(
        (
            Principle("G1", "Check sign and unit."),
            Principle("G6", "Read twice, then draw."),
            Principle("G7", "Stop early."),
        ),
        7,
        {"G1": Origin("modify", ("G1",)), "G6": Origin("merge", ("G5", "G2")), "G7": Origin("add")},
    )


def test_new_ids_never_come_back() -> None:
    first = apply(BASE, [Operation("remove", "", ("G5",))], Limits())
    assert isinstance(first, Edited) and first.last_id == 5
    second = apply(first.principles, [Operation("add", "New.")], Limits(), floor=first.last_id)
    assert isinstance(second, Edited) and second.principles[-1].id == "G6"


def test_texts_can_be_swapped_within_one_plan() -> None:
    plan = [Operation("modify", BASE[1].text, ("G1",)), Operation("modify", BASE[0].text, ("G2",))]
    edited = apply(BASE, plan, Limits())
    assert isinstance(edited, Edited) and [p.text for p in edited.principles[:2]] == [BASE[1].text, BASE[0].text]


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (Operation("remove", "", ("G9",)), Reason.UNKNOWN_ID),
        (Operation("modify", "x", ("g1",)), Reason.UNKNOWN_ID),
        (Operation("modify", "x", ("B.G1",)), Reason.FOREIGN_ID),
        (Operation("remove", "", ("G2",)), Reason.CONFLICT),
        (Operation("add", "one two three four five six"), Reason.TOO_MANY_WORDS),
        (Operation("add", " "), Reason.BAD_OPERATION),
        (Operation("add", "check  the SIGN"), Reason.DUPLICATE_PRINCIPLE),
        (Operation("add", "Something secret."), Reason.LEAKED_ANSWER),
    ],
)
def test_one_bad_operation_rejects_the_whole_plan(operation: Operation, expected: Reason) -> None:
    """Method §11 item 8: half a plan never survives, wherever the bad operation stands in it."""

    def check(text: str) -> Rejection | None:
        return Rejection(Reason.LEAKED_ANSWER) if "secret" in text else None

    good = Operation("modify", "Draw a large figure.", ("G2",))
    limits = Limits(max_words=5, check=check)
    assert reason(apply(BASE, [good, operation], limits)) is expected
    assert reason(apply(BASE, [operation, good], limits)) is expected


def test_the_number_of_principles_is_limited_after_the_whole_plan() -> None:
    limits = Limits(max_principles=3)
    assert reason(apply(BASE, [Operation("add", "x")], limits)) is Reason.TOO_MANY_PRINCIPLES
    assert isinstance(apply(BASE, [Operation("add", "x"), Operation("remove", "", ("G1",))], limits), Edited)


def test_only_the_own_set_can_be_edited() -> None:
    """Method §8: another set's principle is refused as a target, not applied to A by accident."""
    ops = (Operation("modify", "x", ("A.G1",)), Operation("remove", "", ("G2",)))
    own = ["G1", "G2"]
    assert unqualify(ops, "A", own, {"G7"}) == (Operation("modify", "x", ("G1",)), Operation("remove", "", ("G2",)))
    assert reason(unqualify(ops, "A", own, {"G2"})) is Reason.FOREIGN_ID
    assert reason(unqualify([Operation("remove", "", ("B.G1",))], "A", own, ())) is Reason.FOREIGN_ID
    assert "A.G1, A.G2" in str(unqualify([Operation("remove", "", ("A.G3",))], "A", own, ()))


def test_fingerprints_ignore_form_and_order() -> None:
    assert fingerprint("Check  the sign.") == fingerprint("check the Sign")
    assert fingerprints(BASE) == fingerprints(tuple(Principle(f"X{i}", p.text) for i, p in enumerate(reversed(BASE))))
    assert last_id([Principle("odd", "x"), Principle("G12", "y")], 3) == 12


ODD = ["Check the sign.", "a b c d e f g h i j", "Draw a figure", "\ud800", "\x00"]
TEXTS = st.text(max_size=60) | st.sampled_from(ODD)
IDS = st.sampled_from(["G1", "G2", "G5", "G6", "B.G1", "", "G99"]) | st.text(max_size=5)
ITEMS = st.fixed_dictionaries(
    {},
    optional={
        "op": st.sampled_from([*KINDS, "delete"]) | st.none() | st.integers(),
        "text": TEXTS | st.integers() | st.lists(st.none(), max_size=2),
        "id": IDS | st.none() | st.integers() | st.lists(IDS, max_size=2),
        "ids": st.lists(IDS | st.integers(), max_size=4) | IDS,
        "evidence": TEXTS | st.integers(),
    },
)
PLANS = st.lists(
    st.one_of(
        st.builds(Operation, st.just("add"), TEXTS),
        st.builds(Operation, st.just("modify"), TEXTS, st.tuples(IDS)),
        st.builds(Operation, st.just("remove"), st.just(""), st.tuples(IDS)),
        st.builds(Operation, st.just("merge"), TEXTS, st.lists(IDS, min_size=2, max_size=4, unique=True).map(tuple)),
    ),
    max_size=5,
)


def sound(value: object) -> None:
    if isinstance(value, Rejection):
        assert isinstance(value.reason, Reason)
        json.dumps(excerpt(value.detail)).encode()
    else:
        assert isinstance(value, tuple) and all(isinstance(op, Operation) and op.op in KINDS for op in value)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters() | st.sampled_from('[]{}",:opadtexid\\'), max_size=200))
def test_reading_never_raises_on_any_text(reply: str) -> None:
    sound(read_operations(reply))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20), st.lists(ITEMS, max_size=4), st.text(max_size=20), st.integers(0, 400))
def test_reading_never_raises_on_any_json(before: str, items: list[dict[str, object]], after: str, cut: int) -> None:
    text = json.dumps(items)
    sound(read_operations(before + text + after))
    sound(read_operations(before + text[:cut] + after))


@settings(max_examples=300, deadline=None)
@given(st.lists(ITEMS, min_size=1, max_size=4))
def test_a_cut_reply_is_never_read_as_part_of_a_plan(items: list[dict[str, object]]) -> None:
    whole = json.dumps([{"op": "add", "text": "x"}, *items])
    assert isinstance(read_operations(whole[:-1]), Rejection)


@settings(max_examples=500, deadline=None)
@given(PLANS)
def test_a_plan_is_applied_whole_or_not_at_all(plan: list[Operation]) -> None:
    limits = Limits(max_words=8, max_principles=4)
    result = apply(BASE, plan, limits, floor=9)
    if isinstance(result, Rejection):
        return
    ids = [p.id for p in result.principles]
    assert len(set(ids)) == len(ids) and len(fingerprints(result.principles)) == len(ids) <= 4
    gone = {i for op in plan if op.op in ("remove", "merge") for i in op.ids}
    assert not gone & set(ids)
    fresh = [i for i in ids if i not in {p.id for p in BASE}]
    assert len(fresh) == sum(op.op in ("add", "merge") for op in plan)
    assert all(int(i[1:]) > 9 for i in fresh)
    assert all(len(p.text.split()) <= 8 for p in result.principles)
