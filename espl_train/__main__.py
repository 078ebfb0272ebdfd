"""`espl-train` and `python -m espl_train`, which is how torchrun starts it: the command line, and a Ctrl-C while it is
still being read."""

import sys


def main() -> int:
    """Run the command line and return its exit code."""
    try:
        from espl_train.cli import main as command
    except KeyboardInterrupt:
        print("\nespl-train: stopped; before anything was written", file=sys.stderr)
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
