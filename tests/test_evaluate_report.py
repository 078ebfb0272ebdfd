"""The report opens without a network, runs nothing whatever a model wrote, and shows what the run holds."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser_kit import opened
from evaluation_kit import ENV, write_run

from espl_envs.core.messages import Message, ToolCall
from espl_envs.evaluate import report as report_module
from espl_envs.evaluate.config import Prices
from espl_envs.evaluate.plain import visible
from espl_envs.evaluate.records import Episode, Outcome, TurnUsage
from espl_envs.evaluate.report import write_report

HOSTILE = (
    "<script>document.title='owned'</script>", "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">", "\"><svg onload=document.title='owned'>", "javascript:alert(1)",
    "<a href=\"javascript:document.title='owned'\">x</a>", "'\"`{{7*7}}{% raw %}</pre></details></main>",
    "<meta http-equiv=refresh content='0;url=http://example.com/'>", "<link rel=stylesheet href=http://example.com/x.css>",
    "<style>*{background:url(http://example.com/y)}</style>", "a\0b\x1b[31m\x07\x85",
    "\u202egnp.exe\u202c \u2066x\u2069", "\ud800 alone", "&lt;b&gt;&amp;#60;script&#62;",
    "<base href=http://example.com/>", "<!--", "]]>", "\u2028\u2029\ufeff",
)
EVERYTHING = " ".join(HOSTILE)


def hostile(one: Episode) -> Episode:
    """Every text that may come from outside is hostile; every outcome occurs."""
    text = HOSTILE[one.key.task % len(HOSTILE)]
    broken = {"outcome": Outcome.AGENT_ERROR, "score": 0.0} if one.key.task == 1 else {}
    return replace(
        one, task_id=text or "x", answer=EVERYTHING, reference=EVERYTHING, error=EVERYTHING, stop_reason=text,
        started=text, info={"note": EVERYTHING}, **broken,
        messages=(
            Message("system", text), Message("user", EVERYTHING),
            Message("assistant", EVERYTHING, (ToolCall(text, text, EVERYTHING),)),
            Message("tool", EVERYTHING, tool_call_id=text, name=text), Message("assistant", text),
        ),
        turns=(TurnUsage(5, 7, 1, 0.5, 0.1, text, EVERYTHING), TurnUsage(5, 9, 0, 0.5, 0.1, "stop", "")),
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scores = {ENV: [[1.0, 0.0], [None, 0.5]] * 10, HOSTILE[2]: [[1.0, 1.0]]}
    run = write_run(tmp_path_factory.mktemp("report") / "run", scores, HOSTILE[0], change=hostile,
                    system_prompts=(EVERYTHING,), prices=Prices(1, 2, HOSTILE[0]), suite=HOSTILE[1])  # fmt: skip
    return write_report(run, allow_faults=True)


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def dangers(text: str) -> list[str]:
    """What could run, load or navigate: read by a parser, not by searching the text."""
    found = []
    for tag, attributes in Elements(text).tags:
        if tag in ("script", "img", "link", "base", "iframe", "object", "embed", "form", "video", "audio"):
            found.append(tag)
        if tag == "meta" and attributes.get("http-equiv", "Content-Security-Policy") != "Content-Security-Policy":
            found.append(str(attributes))
        found += [name for name in attributes if name.startswith("on") or name in ("src", "srcdoc", "style", "action")]
        if not str(attributes.get("href") or "#").startswith("#"):
            found.append(str(attributes["href"]))
    return found


def test_nothing_in_the_page_can_run_or_load(page: Path) -> None:
    text = page.read_text("utf-8")
    assert dangers(text) == []
    assert text.count("<style>") == 1 and "&lt;script&gt;document.title=" in text


def test_the_policy_allows_this_style_sheet_and_nothing_else(page: Path) -> None:
    text = page.read_text("utf-8")
    css = text.partition("<style>")[2].partition("</style>")[0]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    assert policy and policy[1].split("; ") == [
        "default-src 'none'", f"style-src 'sha256-{digest}'", "base-uri 'none'", "form-action 'none'"
    ]  # fmt: skip
    assert text.index("Content-Security-Policy") < text.index("<title>") < text.index("<style>")


def test_what_hides_or_reorders_text_is_made_visible(page: Path) -> None:
    text = page.read_text("utf-8")
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff]", text)
    assert "a␀b␛[31m␇⟨U+0085⟩" in text and "⟨U+202E⟩gnp.exe⟨U+202C⟩" in text and "⟨U+D800⟩ alone" in text
    assert visible("tab\tline\r\nend é 漢 שלום 👩‍👩‍👧") == "tab\tline\nend é 漢 שלום 👩‍👩‍👧"


def test_a_template_without_escaping_is_noticed(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "_template", unescaped)
    assert len(dangers(write_report(page.parent, allow_faults=True).with_name("report.html").read_text())) > 10
    monkeypatch.undo()
    write_report(page.parent, allow_faults=True)


def unescaped() -> Any:
    """The page without autoescape and without its policy."""
    made = template()
    made.environment.autoescape = False
    source = Path(report_module.__file__).with_name("report.html.j2").read_text()
    return made.environment.from_string(re.sub(r"<meta http-equiv=.Content-Security-Policy.*>", "", source))


template = report_module._template


def test_a_browser_runs_nothing_and_asks_for_nothing(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a real one, with every transcript open; the page without escaping shows that the check notices."""

    async def visit(file: Path) -> dict[str, Any]:
        async with opened(file) as seen:
            await seen.ask("document.querySelectorAll('details').forEach(one => { one.open = true })")
            await seen.ask("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            state: dict[str, Any] = await seen.ask(
                "({title: document.title, scripts: document.scripts.length, images: document.images.length,"
                " wide: document.documentElement.scrollWidth - innerWidth,"
                " episodes: document.querySelectorAll('.episode').length})"
            )
            filtered = await seen.ask(
                "document.getElementById('show-agent_error')?.click(),"
                " [...document.querySelectorAll('.episode')].filter(one => getComputedStyle(one).display != 'none')"
                ".map(one => one.classList[1])"
            )
            return {**state, "filtered": filtered, "noise": seen.noise, "requests": seen.requests}

    good = asyncio.run(visit(page))
    assert good["requests"] == [page.as_uri()] and good["noise"] == []
    assert good["title"].startswith("<script>document.title='owned'</script>: ")
    assert good["scripts"] == good["images"] == 0
    assert good["episodes"] == 42 and good["filtered"] == ["agent_error"] * 2 and good["wide"] <= 0

    monkeypatch.setattr(report_module, "_template", unescaped)
    run = write_run(tmp_path / "run", {ENV: [[1.0, 0.0]]}, change=lambda one: replace(
        one, messages=(Message("assistant", HOSTILE[0] + HOSTILE[2]),)))  # fmt: skip
    bad = asyncio.run(visit(write_report(run)))
    assert bad["title"] == "owned" and len(bad["requests"]) > 1


def text_of(page: Path) -> str:
    """The text of a page without tags, on one line."""
    kept: list[str] = []
    parser = HTMLParser()
    parser.handle_data = kept.append  # type: ignore[method-assign]
    parser.feed(page.read_text("utf-8").partition("</style>")[2])
    return " ".join(" ".join(kept).split())


def test_the_page_shows_the_run(tmp_path: Path) -> None:
    def change(one: Episode) -> Episode:
        return replace(one, turns=(TurnUsage(100, 50 * (one.key.task + 1), one.key.task, 1.5, 0.25),))

    scores = {ENV: [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]}
    run = write_run(tmp_path / "run", scores, "my-model", change, prices=Prices(1, 1))
    shown = text_of(write_report(run))
    for said in ("my-model", "0.500", "mean over 3 tasks × 2 samples", "pass@2 0.667", "pass^2 0.333", "1.50 USD",
                 "0.50 USD per right answer", "right 3", "wrong 3", "At a budget of completion tokens", "task-2",
                 "all 6", "6 all scored"):
        assert said in shown, said


def test_a_refused_headline_is_refused_on_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {ENV: [[1.0], [None], []]})
    shown = text_of(write_report(run))
    assert "No headline yet" in shown and "1 faulted and 1 missing of 3 episodes" in shown
    assert "mean over 3" not in shown
    allowed = text_of(write_report(run, allow_faults=True))
    assert "Partial: 1 faulted and 1 missing episodes are left out" in allowed and "mean over 3 tasks" in allowed
    empty = text_of(write_report(write_run(tmp_path / "empty", {ENV: [[]]})))
    assert "none of 1 episodes has a score" in empty and "There are no transcripts" in empty


def test_of_many_episodes_every_outcome_is_shown(tmp_path: Path) -> None:
    rare = {"outcome": Outcome.TRUNCATED, "score": 0.0}
    run = write_run(tmp_path / "run", {ENV: [[1.0]] * 60 + [[0.0]] * 3 + [[None]]}, change=lambda one: replace(
        one, **(rare if one.key.task == 59 else {})))  # fmt: skip
    page = write_report(run, transcripts=12)
    text = page.read_text()
    kinds = re.findall(r'<details class="episode (\w+)"', text)
    assert {kind: kinds.count(kind) for kind in kinds} == {"right": 7, "wrong": 3, "truncated": 1, "fault": 1}
    assert "12 of 64 episodes are shown" in text and len(re.findall('<a class="h', text)) == 11
    assert write_report(run, transcripts=None).read_text().count('<details class="episode') == 64


def test_long_messages_are_cut_on_the_page_and_say_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {ENV: [[1.0]]}, change=lambda one: replace(
        one, messages=(Message("assistant", "y" * 10_000_000),), answer="z" * 1_000_000))  # fmt: skip
    page = write_report(run)
    assert page.stat().st_size < 200_000 and "9,980,000 more characters are in episodes.jsonl" in page.read_text()
