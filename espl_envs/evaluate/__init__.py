"""Evaluation of any agent on any environment: `espl-eval`. Runs without torch."""
