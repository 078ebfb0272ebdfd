"""`--root FILE`: the root prompt from a text file, one principle a line. The run keeps the principles, not the path."""

from __future__ import annotations

from pathlib import Path

from espl_train.settings.options import ConfigError

MOST_BYTES = 1_000_000     # far beyond any system prompt: a wrong file is not read into memory


def read_root(file: Path) -> list[str]:
    """The principles in `file`: its lines without surrounding blanks; empty lines are left out.

    Raises ConfigError for a file that is missing, no UTF-8 text, far too large, or without a single principle. How many
    principles there may be, and how long, is checked with the other settings.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(f"--root {file} has more than {MOST_BYTES:,} bytes: that is no system prompt.")
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ConfigError(f"--root {file} is no text in UTF-8: write one principle a line.") from None
    except OSError as error:
        raise ConfigError(f"--root {file} cannot be read: {error.strerror or error}.") from None
    if principles := [line.strip() for line in lines if line.strip()]:
        return principles
    raise ConfigError(
        f"--root {file} is empty: write one principle a line, or leave --root away for an empty root prompt."
    )
