"""Every page of the documentation names what there is: files, links, options, presets, environments, sentences."""

from __future__ import annotations

import re
import shlex
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from espl_envs import registry
from espl_envs.evaluate.options import parser
from espl_train.settings import preset_descriptions
from espl_train.settings.commandline import FLAGS, SHORT, VALUES
from espl_train.settings.options import options
from espl_train.settings.subcommands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({ROOT / "README.md", ROOT / "sandboxes" / "README.md", *(ROOT / "docs").glob("*.md")})
EVALUATION = {"--intersect", "--port", "--host", "--sessions", "--json"}      # of commands beside evaluation


@cache
def sources() -> str:
    files = (path for room in ("espl_envs", "espl_train") for path in (ROOT / room).rglob("*.py"))
    return re.sub(r'"\s+f?"', "", "".join(path.read_text("utf-8") for path in files))


@pytest.fixture(params=PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page: Path, text: str) -> list[str]:
    found = []
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        known = anchors(file.read_text("utf-8")) if anchor and file.suffix == ".md" else {anchor}
        if not file.exists() or anchor not in known:
            found.append(target)
    return found


def commands(text: str) -> list[list[str]]:
    """The words of every command that a page shows, comments and continued lines aside."""
    shown = "\n".join(re.findall(r"```(?:sh)?\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [line for line in shown.splitlines() if re.match(r"\s*(espl-|torchrun|python -m espl_)", line)]
    return [shlex.split(line.replace("…", "").replace("|", " "), comments=True) for line in lines]


def unknown_options(text: str) -> list[str]:
    """Options in commands of espl-train and espl-eval that these do not have; dotted ones anywhere on the page."""
    trained = {*SHORT, *VALUES, *FLAGS, "tools", "profile", *options()}
    evaluated = {name for action in parser()._actions for name in action.option_strings} | EVALUATION
    wrong = []
    for program, *words in commands(text):
        for word in (word.partition("=")[0] for word in words if word.startswith("--")):
            training = program == "espl-train" and words[0] not in COMMANDS
            if training and word[2:] not in trained and not _entry(word):
                wrong.append(word)
            if program == "espl-eval" and word not in evaluated:
                wrong.append(word)
    dotted = re.findall(r"--([a-z_]+\.[a-z_.]+[a-z_])\b", text)
    return wrong + [name for name in dotted if name not in options() and not _entry(f"--{name}")]


def _entry(word: str) -> bool:
    return word.startswith(("--env.args", "--envs.", "--reflection.extra.", "--env.taskset"))


def unknown_names(text: str) -> list[str]:
    presets = {name for words in commands(text) for name in _after(words, "--preset") if not name.isupper()}
    ids = set(re.findall(r"\bespl/[\w-]+-v\d\b", text))
    dotted = {name for name in re.findall(r"`([a-z_]+\.(?!py`)[a-z_]+)`", text) if name.partition(".")[0] in sections()}
    return sorted({*(presets - set(preset_descriptions())), *(ids - set(registry.ids())), *(dotted - set(options()))})


def sections() -> set[str]:
    return {name.partition(".")[0] for name in options() if "." in name}


def _after(words: list[str], option: str) -> list[str]:
    return [name for a, b in pairwise(words) if a == option for name in b.split(",")]


def test_links_lead_somewhere(page: Path) -> None:
    assert not dead_links(page, page.read_text("utf-8"))


def test_options_presets_and_environments_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    assert not unknown_options(text) and not unknown_names(text)


def test_what_does_not_exist_would_be_found() -> None:
    text = (
        "see [x](nowhere.md), [y](evolution.md#nothing), `learner.rank`, `learner.rnak`, `--rating.mood happy`\n"
        "```\nespl-train --preset dapo,dpao --stpes 3 --env espl/GSM8-v0\nespl-eval --evn espl/GSM8K-v0\n```\n"
    )
    assert dead_links(ROOT / "docs" / "x.md", text) == ["nowhere.md", "evolution.md#nothing"]
    assert unknown_options(text) == ["--stpes", "--evn", "rating.mood"]
    assert unknown_names(text) == ["dpao", "espl/GSM8-v0", "learner.rnak"]


def test_every_page_of_the_documentation_can_be_found_from_the_readme() -> None:
    named = set(re.findall(r"\]\(docs/([\w-]+\.md)[)#]", (ROOT / "README.md").read_text("utf-8")))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_the_sentences_that_troubleshooting_explains_are_said() -> None:
    table = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8").partition("| said |")[2].partition("\n\n")[0]
    said = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    whole = sources().replace("no weight update: {", "no weight update: no contrast")
    assert len(said) > 10 and not [sentence for sentence in said if sentence not in whole]


def test_every_extra_is_explained() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    rows = text.partition("## Extras")[2].partition("\n## ")[0]
    named = {name for cell in re.findall(r"^\| (`.*?`) \|", rows, re.MULTILINE) for name in re.findall(r"\w+", cell)}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert named == set(extras) - {"dev"}
