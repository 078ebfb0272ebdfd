"""What a configuration would do, found out before anything is written or any weight is read.

`inspect` opens the environments and the tokenizer and asks for the boxes: unknown ids, missing data, empty splits,
models without a chat template and a Docker that is not there end here, before there is a run directory. `--dry-run`
prints the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from espl_envs.core.errors import EsplError
from espl_train import forecast
from espl_train.config import Config
from espl_train.evolution.guards import Guard, Leaks
from espl_train.evolution.prompts import Principle
from espl_train.evolution.templates import TemplateSet
from espl_train.problems import ProblemSets
from espl_train.reflecting.choice import inspect as reflection
from espl_train.sandboxes import check, equipped, parameters, wanted
from espl_train.settings.options import hint, nearest


@dataclass(frozen=True, slots=True)
class Plan:
    """What would happen, as (what, in words) rows; and what the guards of the run need not learn once more, by the name
    of the environment: `leaks`."""

    rows: tuple[tuple[str, str], ...]
    leaks: Mapping[str, Leaks] = field(default_factory=dict)

    def plus(self, rows: tuple[tuple[str, str], ...]) -> Plan:
        """The plan with more rows."""
        return replace(self, rows=(*self.rows, *rows))

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in self.rows)


def settled(config: Config) -> Config:
    """`config` with what this machine decides written down: a run keeps its precision wherever it goes on."""
    from espl_train.learner.loading import precision

    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": precision(config.model)})})


def inspect(config: Config, run: Path | None = None, dry: bool = False) -> Plan:
    """Check `config` against the run directory, the installed environments, the data, the model and the sandbox. Raises
    EsplError for what is missing, and builds the sandbox image where a run needs one and there is none (`dry`: says
    that it would).

    `run` is the directory of a run that would be continued.
    """
    from espl_train.learner.loading import load_tokenizer

    directory = tuple(_directory(config, run, dry))
    _all_arguments(config)
    sets = {name: ProblemSets.of(equipped(config, env)) for name, env in config.environments.items()}
    _names(config)
    tokenizer, settings = load_tokenizer(config.model), _settings(config)
    templates = TemplateSet.load(config.model.templates or str(getattr(settings, "espl_templates", "english")))
    cheap = (*_environment(config, sets), *_model(config, settings, tokenizer, templates))
    leaks = _guarded(config, sets, tokenizer)
    asked = reflection(config) if config.mode != "rl" else ()
    sizes = [{problems.part: len(problems) for problems in parts} for parts in sets.values()]
    work = forecast.rows(config, sizes, templates)
    return Plan((*cheap, *_boxes(config, sets, dry), *asked, *work, *directory), leaks)


def _all_arguments(config: Config) -> None:
    for name, env in config.environments.items():
        key = f"envs.{name}" if name else "env"
        _arguments(env.id, env.args, f"{key}.args")
        if env.test_id is not None:
            _arguments(env.test_id, env.test_args, f"{key}.test_args")


def _environment(config: Config, sets: Mapping[str, ProblemSets]) -> Iterator[tuple[str, str]]:
    for name, env in config.environments.items():
        share = f"{name}: {config.shares[name]:.0%} of the problems, " if name else ""
        yield "environment", share + env.id + (f", tested on {env.test_id}" if env.test_id else "")
        for problems in sets[name]:
            yield f"  {problems.part}", str(problems)


def _arguments(env_id: str, args: dict[str, Any], key: str) -> None:
    """Raises EsplError for a keyword argument that the environment's class and its bases do not have."""
    known = parameters(env_id)
    for argument in args:
        if known is not None and argument not in known:
            close = hint(nearest(argument, known), f"--{key}.")
            raise EsplError(f"{env_id} has no argument {argument!r}; it takes {', '.join(sorted(known))}.{close}")


def _boxes(config: Config, sets: Mapping[str, ProblemSets], dry: bool) -> Iterator[tuple[str, str]]:
    """Every kind of box that some environment wants. Raises EsplError where they are too few, or of several makers."""
    needs = [found for parts in sets.values() if (found := wanted(problems.env for problems in parts)) is not None]
    makers = {settings.provider or config.sandbox.provider for settings in needs}
    if len(makers) > 1:
        raise EsplError(f"the environments want boxes from {' and '.join(sorted(makers))}: a run has one provider")
    if len(needs) > config.sandbox.max_live:
        raise EsplError(f"{len(needs)} environments need boxes, but sandbox.max_live allows {config.sandbox.max_live}")
    for settings in {repr((need.provider, need.spec)): need for need in needs}.values():
        yield from check(settings, config.sandbox, dry)


def _names(config: Config) -> None:
    """Raises EsplError for a loss, a normalisation or a baseline that there is not, and for a device that is not here.
    """
    from espl_train.learner.advantages import BASELINES
    from espl_train.learner.loading import pick_device
    from espl_train.learner.losses import LOSSES, NORMALISATIONS
    from espl_train.learner.naming import choose

    choose(LOSSES, config.learner.loss, "learner.loss")
    choose(NORMALISATIONS, config.learner.normalise, "learner.normalise")
    choose(BASELINES, config.learner.baseline, "learner.baseline")
    pick_device(config.model.device)


def _settings(config: Config) -> Any:
    from transformers import AutoConfig

    from espl_train.learner.loading import locate

    return AutoConfig.from_pretrained(locate(config.model.path), revision=config.model.revision)


def _model(config: Config, settings: Any, tokenizer: Any, templates: TemplateSet) -> Iterator[tuple[str, str]]:
    from espl_train.engines import choice
    from espl_train.learner.loading import pick_device, precision
    from espl_train.overlap import check as check_overlap

    device = pick_device(config.model.device)
    check_overlap(config, choice.concurrent(config, device.type))
    engine, room = choice.inspect(config, settings), choice.context_of(config, settings)
    if config.rollout.max_new_tokens >= room:
        raise EsplError(
            f"rollout.max_new_tokens is {config.rollout.max_new_tokens}, but {config.model.path} reads {room} tokens "
            "in all; lower it or take a model with a longer context"
        )
    kind = getattr(settings, "model_type", "unknown")
    yield "model", f"{config.model.path} ({kind}, {precision(config.model)}, {device})"
    yield "tokens", f"a vocabulary of {len(tokenizer):,}, a context of {room:,}"
    yield "engine", engine
    if config.evolution.writer == "placebo":
        templates.placebo()
    yield "templates", f"{templates.folder.name}: {templates.description}".rstrip(": ")
    yield from _root(config, templates, tokenizer)
    trained = {"lora": f"LoRA of rank {config.learner.rank}", "full": "all weights"}[config.learner.mode]
    yield "weights", f"{trained}, {config.learner.loss}" if config.mode != "evolution" else "frozen"


def _root(config: Config, templates: TemplateSet, tokenizer: Any) -> Iterator[tuple[str, str]]:
    """How long system prompts may become. Raises EsplError for a root prompt that is longer."""
    from espl_train.chat import count_tokens

    limit, root = config.evolution.max_prompt_tokens, config.evolution.root
    if not limit or config.mode == "rl":
        return
    tokens = count_tokens(tokenizer, templates.system([Principle(f"G{i}", text) for i, text in enumerate(root, 1)]))
    if tokens > limit:
        raise EsplError(
            f"evolution.root is {tokens} tokens long, but evolution.max_prompt_tokens is {limit}: shorten the one or "
            "raise the other"
        )
    yield "prompts", f"at most {limit:,} tokens; the root prompt has {tokens:,}"


def _guarded(config: Config, sets: Mapping[str, ProblemSets], tokenizer: Any) -> dict[str, Leaks]:
    """Raises EsplError for a root prompt that could not be bred: principles that the guard of children refuses. Returns
    what was learnt for that of each environment's training problems; nothing where there is nothing to be judged."""
    root = config.evolution.root
    if not root or config.mode == "rl":
        return {}
    guard = Guard(config.evolution.max_words, tokenizer.all_special_tokens)
    others = {name: Guard(config.evolution.max_words) for name in sets}
    for name, parts in sets.items():
        others[name].learn(parts.train.tasks)
    guard.heed(others.values())
    for number, text in enumerate(root, 1):
        if (refused := guard.check(text)) is not None:
            raise EsplError(f"Principle {number} of evolution.root is refused by the guard: {refused.detail}")
    if (refused := guard.check_prompt(root, root)) is not None:
        raise EsplError(f"The principles of evolution.root are refused together by the guard: {refused.detail}")
    return {name: other.leaks for name, other in others.items()}


def _directory(config: Config, run: Path | None, dry: bool) -> Iterator[tuple[str, str]]:
    """Where the run is written to. Raises RunError where there is something else already, or somebody at work."""
    from espl_train.runs.directory import default_path, refuse_busy, refuse_taken, saved

    if run is not None:
        if not dry:
            refuse_busy(run)
        done = saved(run)
        stands = "from its beginning: nothing is saved yet" if done is None else f"{done} of {config.steps} steps done"
        yield "run directory", f"{run} (continued, {stands})"
        return
    path = Path(config.out) if config.out else default_path(config)
    refuse_taken(path, config)
    yield "run directory", str(path)
