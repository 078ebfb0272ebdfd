"""Orders that are no advice: to the reflecting model, to the grader, or to fool the one who scores.

A principle stands in front of every later reflection as data; one that talks to the reflector is an attempt to breed
by command. Phrases are matched, so this catches the open attempts only: an exploit in other words is found by its
effects (the root plays in every batch, validation problems are others), never by its text.
"""

from __future__ import annotations

import re

from espl_train.evolution.guards import disguises
from espl_train.evolution.guards.writing import plain
from espl_train.evolution.rejections import Reason, Rejection, excerpt

_THESE = r"(?:(?:all|any|the|these|those|your|of|every|other|my|its)\s+)*"
_BEFORE = r"(?:previous|prior|above|earlier|preceding|existing|foregoing|system|original|former)"
ORDERS = re.compile(
    "|".join(
        (
            # to forget what was said
            rf"\b(?:ignore|disregard|forget|override|bypass|discard|skip)\s+{_THESE}{_BEFORE}\s+"
            r"(?:\w+\s+)?(?:instruction|prompt|rule|principle|message|direction|guideline|order|command|text|context)s?",
            rf"\b(?:ignore|disregard|forget|override)\s+{_THESE}(?:instructions|principles|system prompt|rules above)",
            # to the one who writes edits
            r"\b(?:reviewer|reflector|critic|editor|summari[sz]er|judge|grader|evaluator|verifier)s?\b[\s,:]*(?:must|should|"
            r"shall|please|will|never|always|output|reply|return|answer|keep|mark|accept|give|write)\b",
            r"\b(?:output|reply with|respond with|answer with)\s+(?:only\s+)?(?:the\s+)?(?:an\s+)?"
            r"(?:\[\s*\]|empty (?:json )?(?:list|array)|\[?\s*\{\s*[\"']?op\b)",
            r"[\"']op[\"']\s*:",
            r"\b(?:do not|don't|never|must not)\s+(?:ever\s+)?(?:remove|edit|modify|delete|merge|change|replace)\s+"
            r"(?:g\d+|(?:this|these|any)\s+(?:principle|rule|line|entry|set)s?)\b",
            r"\b(?:copy|repeat|keep|preserve)\s+this\s+(?:principle|rule|line|sentence|text)\b",
            r"</?\s*(?:data|evidence|attempt|instructions?|prompt)\b[^>]{0,60}>?",
            r"(?:^|[.!?\"'(]\s*)(?:system|assistant|user|developer)\s*:",
            r"\byou are now\b|\bnew (?:system )?instructions?\s*:",
            r"\bact as (?:the |a )?(?:system|developer|admin|grader)\b",
            # to be scored without having solved anything
            r"\b(?:submit|read|open|find|use|print|copy|look at|cat|access|with)\b[^.]{0,30}"
            r"\b(?:hidden|secret|private)\s+(?:test|unit test|grader|check|answer|solution)s?\b",
            r"\b(?:print|return|output|copy|echo|submit|write|read|look up|find|use|guess)\s+{0}"
            r"(?:expected\s+(?:output|answer)|"
            r"(?:reference|gold|golden|ground[- ]truth|official)\s+(?:output|answer|result|solution|value|query))s?\b"
            r"(?!\s+(?:format|type|shape|schema))".replace("{0}", _THESE),
            r"\bhard-?cod(?:e|ed|ing)\b(?=.{0,40}\b(?:answer|output|test|case|result|value)s?\b)",
            r"\b(?:special-?cas(?:e|ing)|detect|recogni[sz]e|memori[sz]e)\s+{0}(?:test|expected|training)\s+"
            r"(?:case|input|output|answer|problem|question)s?".replace("{0}", _THESE),
            r"\b(?:fool|trick|deceive|manipulate|exploit|game|cheat|hack|convince|overwrite|(?:monkey-?)?patch|disable)"
            r"\s+{0}(?:grader|judge|scorer|verifier|checker|evaluat(?:or|ion)|reward|test harness|tests|assert\w*|user)"
            r"\b".replace("{0}", _THESE),
            r"\b(?:sys\.exit|os\._exit|exit)\s*\(\s*0\s*\)",
            r"\b__eq__\b|\balways (?:return|evaluate to|compare) (?:true|equal)\b",
        )
    ),
    re.IGNORECASE,
)
CONSTANT = re.compile(
    r"^\W*(?:always|just|simply|only|invariably)\s+(?:answer|reply|respond|output|say|submit|guess|choose|pick|print|return)"
    r"(?:\s+(?:with|option|choice|the letter))*\s+[\"'(\\]*(?:boxed\{)?(?:[a-h]|-?\d+|yes|no|true|false)\b[\"')}]*"
    r"\s*(?:[.!]|$|to (?:every|all|any)|for (?:every|all|any)|regardless|no matter|whatever)",
    re.IGNORECASE,
)


def refused(text: str) -> Rejection | None:
    """Why `text` is an order and no advice, or None."""
    bare = plain(text)
    for reading in (bare, *disguises.decoded(bare)):
        if (found := ORDERS.search(reading) or CONSTANT.search(reading)) is not None:
            return Rejection(Reason.ORDER, f"no advice but an order or a trick: {excerpt(found[0].strip(), 80)}")
    return None
