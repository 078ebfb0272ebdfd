"""Why something that a model wrote was not taken: every refusal has a name, is counted and can be read in the log.

A `Rejection` is a value, not an exception: text from a model is expected to be wrong now and then.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """The names that refusals are counted under."""

    EMPTY_REPLY = "empty_reply"                  # reading a reply
    NO_JSON = "no_json"
    INVALID_JSON = "invalid_json"
    BAD_OPERATION = "bad_operation"
    UNKNOWN_OPERATION = "unknown_operation"
    TOO_MANY_OPERATIONS = "too_many_operations"
    UNKNOWN_ID = "unknown_id"                    # applying a plan
    FOREIGN_ID = "foreign_id"
    CONFLICT = "conflict"
    TOO_MANY_WORDS = "too_many_words"
    TOO_MANY_PRINCIPLES = "too_many_principles"
    TOO_MANY_TOKENS = "too_many_tokens"
    DUPLICATE_PRINCIPLE = "duplicate_principle"
    ECHO = "echo"
    LEAKED_ANSWER = "leaked_answer"              # the guard
    LEAKED_PROBLEM = "leaked_problem"
    CONTROL_CHARACTER = "control_character"
    SPECIAL_TOKEN = "special_token"
    CANARY = "canary"
    ORDER = "order"
    TOO_LONG = "too_long"
    COMPLETION_FAILED = "completion_failed"      # the call itself
    DEADLINE = "deadline"
    BUDGET = "budget"
    NO_CONTRAST = "no_contrast"                  # breeding: why there is no child
    NO_MIXED_PROBLEM = "no_mixed_problem"
    NO_SUGGESTION = "no_suggestion"
    NO_RIVAL = "no_rival"
    NO_OTHER_WINNER = "no_other_winner"
    TOO_FEW_PRINCIPLES = "too_few_principles"
    NO_TRIAL = "no_trial"
    NO_MIGRANT = "no_migrant"
    ALL_NEEDED = "all_needed"
    NOT_BETTER = "not_better"
    UNCHANGED = "unchanged"
    DUPLICATE_PROMPT = "duplicate_prompt"
    NOT_DRAWN = "not_drawn"
    SWITCHED_OFF = "switched_off"
    CROWDED = "crowded"
    REVIEW = "review"                            # a person said no


@dataclass(frozen=True, slots=True)
class Rejection:
    """A refusal: its name for the counters, one sentence for the log and for the repair call."""

    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


def excerpt(text: str, limit: int = 160) -> str:
    """The beginning of a model's text, safe to log and to encode whatever it holds."""
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return shown.encode("utf-8", "backslashreplace").decode()
