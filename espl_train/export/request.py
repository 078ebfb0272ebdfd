"""A request in OpenAI's shape that asks a model just as the run did, and the commands that host what it is sent to."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from espl_train.evolution.prompts import SystemPrompt
from espl_train.problems import text_env
from espl_train.snapshot import Snapshot

QUESTION = "PUT YOUR QUESTION HERE"
REQUEST, ADAPTER, MODEL = "request.json", "adapter", "model"
URL = "http://127.0.0.1:8000/v1/chat/completions"


def request(run: Snapshot, prompt: SystemPrompt, island: str = "") -> dict[str, Any]:
    """The body of a request: the conversation as an episode begins with it, for a question that is still to be filled
    in, and how replies were sampled in evaluations."""
    settings, env = run.config, run.config.environments[island]
    messages = text_env(env.id, env.args).opening(QUESTION, run.text(prompt.principles))
    return {
        "model": run.name,
        "messages": [message.to_openai() for message in messages],
        "temperature": settings.evaluation.temperature,
        "top_p": 1.0,
        "max_tokens": min(settings.rollout.max_new_tokens, settings.rollout.max_total_tokens),
    }


def commands(run: Snapshot, which: str, weights: str | None) -> Iterator[tuple[str, str]]:
    """(what it does, the command), to be run in the export's directory. `weights` is where they lie, from there: an
    adapter, or all weights (learner.mode full); None where nothing was trained. `which` names the prompt."""
    served = ["espl-train", "serve", str(run.folder.resolve()), "--port", "8000"]
    yield "Serve the run", shlex.join([*served, "--prompt", which])
    name = shlex.quote(run.name)
    if weights is None:
        yield "Or the model, which was not trained, with vLLM", (
            f"vllm serve {shlex.quote(_base(run))} --served-model-name {name} --port 8000"
        )
    elif run.config.learner.mode == "full":
        yield "Or the trained weights, with vLLM", f"vllm serve {_here(weights)} --served-model-name {name} --port 8000"
    else:
        yield "Or the adapter, with vLLM", (
            f"vllm serve {shlex.quote(_base(run))} --enable-lora --max-lora-rank {run.config.learner.rank} "
            f"--lora-modules {shlex.quote(f'{run.name}={_here(weights)}')} --port 8000"
        )
    yield "Ask", f"curl {URL} -H 'Content-Type: application/json' -d @{REQUEST}"


def _here(path: str) -> str:
    """A path that cannot be taken for the name of a model on the hub."""
    return path if path.startswith(".") else f"./{path}"


def _base(run: Snapshot) -> str:
    from espl_train.learner.loading import locate

    source = locate(run.config.model.path)
    return str(Path(source).resolve()) if Path(source).is_dir() else source
