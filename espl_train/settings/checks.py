"""Checks across options, each with its reason. What concerns one option alone is said by the schema.

One thing is documented here because it surprises: in mode `rl` there is one prompt, the root, and it gets all
`rollout.prompts × rollout.samples` samples of a problem, so that the ablation costs as much as the full method.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from espl_train import schedule
from espl_train.config import LEAST_TWINS, Config, EvolutionConfig, LearnerConfig
from espl_train.settings.options import ConfigError

DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
OURS = frozenset(("messages", "model", "temperature", "max_tokens", "max_completion_tokens", "seed", "n", "stream"))

RESIDENTS = 4      # root, elite, mutation and crossover child of a step: none of them may be dropped at once

BASELINES = ("writer", "evidence", "acceptance", "mutations")
TRIALS = {
    "acceptance_problems": ("minibatch", "best"), "acceptance_samples": ("minibatch", "best"),
    "acceptance_margin": ("minibatch",),
}  # fmt: skip


def check(config: Config) -> None:
    """Raises ConfigError with one sentence per combination that cannot work."""
    problems = [
        *_sampling(config), *_learning(config), *_schedule(config), *_evolution(config), *_reflection(config),
        *_rest(config), *_environments(config),
    ]  # fmt: skip
    if problems:
        raise ConfigError("\n".join(problems))


def _sampling(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if rollout.top_p < 1 and config.mode != "evolution":
        yield (
            f"rollout.top_p is {rollout.top_p:g} in training: truncated sampling biases the ratios from the first "
            "token, because the learner's log-probabilities are over the whole vocabulary; use --rollout.top_p 1 "
            "(or --mode evolution, which does not train weights)."
        )
    if rollout.max_new_tokens > rollout.max_total_tokens:
        yield (
            f"rollout.max_new_tokens ({rollout.max_new_tokens}, per turn) is above rollout.max_total_tokens "
            f"({rollout.max_total_tokens}, per episode); raise the total or lower the turn."
        )
    evaluation = config.evaluation
    if evaluation.temperature == 0 and evaluation.samples > 1:
        yield (
            f"evaluation.samples is {evaluation.samples} at temperature 0: greedy samples are all the same; "
            "use --evaluation.samples 1 or --evaluation.temperature 1."
        )


def _learning(config: Config) -> Iterator[str]:
    rollout, learner = config.rollout, config.learner
    alone = config.mode == "rl" or config.schedule != "joint"
    per_group = rollout.samples * (rollout.prompts if alone else 1)
    if config.mode != "evolution" and per_group < 2 and learner.baseline.startswith("prompt"):
        yield (
            f"rollout.samples is {rollout.samples}: with one sample the baseline {learner.baseline!r} equals the "
            "reward and nothing is ever learnt; use at least 2 samples."
        )
    if learner.parallel == "fsdp" and config.engine.kind == "local":
        yield (
            "learner.parallel is fsdp, but engine.kind is local, which samples from whole weights on rank 0: use "
            "--engine.kind vllm, or --learner.parallel data."
        )
    if not all(0 <= beta < 1 for beta in learner.betas):
        yield f"learner.betas is {list(learner.betas)}; both must be at least 0 and below 1."
    yield from _bounds(learner)


def _bounds(learner: LearnerConfig) -> Iterator[str]:
    for key, bounds, off in (
        ("ratio_bounds", learner.ratio_bounds, learner.loss == "importance_sampling"),
        ("correction_bounds", learner.correction_bounds, learner.correction == "none"),
    ):
        owner = "loss" if key == "ratio_bounds" else "correction"
        if bounds is None:
            continue
        if off:
            yield f"learner.{key} is given, but {owner} {getattr(learner, owner)!r} has no bounds; leave it out."
        elif not 0 <= bounds[0] <= 1 <= bounds[1]:
            yield (
                f"learner.{key} is {list(bounds)}; these are bounds of the ratio itself and stand around 1, "
                "as in [0.8, 1.28]."
            )


def _schedule(config: Config) -> Iterator[str]:
    if config.schedule == "joint":
        return
    if config.budget_rollouts and config.schedule != "alternating":
        yield (
            f"schedule is {config.schedule}, which turns after a share of the steps: with budget_rollouts the run "
            "might end before its turn."
        )
    if config.mode != "evolution_rl":
        yield (
            f"schedule is {config.schedule}, which parts the steps between prompts and weights, but in mode "
            f"{config.mode} only one of them learns: use --mode evolution_rl, or leave the schedule out."
        )
        return
    breed, learn = schedule.counts(config)
    if not (breed and learn):
        idle, key = "weights" if breed else "prompts", "period" if config.schedule == "alternating" else "share"
        yield (
            f"schedule is {config.schedule} with schedule_{key} {getattr(config, f'schedule_{key}'):g}, which leaves "
            f"none of {config.steps} steps for the {idle}."
        )


def _evolution(config: Config) -> Iterator[str]:
    yield from _baselines(config)
    if config.mode == "rl":
        return
    evolution, prompts = config.evolution, config.rollout.prompts
    rare = (evolution.prune_probability > 0) + (evolution.immigrant_probability > 0)
    if not evolution.mutate and evolution.crossover_probability == 0 and not rare and config.mode == "evolution":
        yield "mode is evolution, but mutation and crossover are both off: nothing would ever change."
    more = rare + (evolution.migration > 0) + evolution.mutations - 1
    if evolution.capacity < (least := max(prompts, RESIDENTS + more)):
        yield (
            f"evolution.capacity is {evolution.capacity}, but the population needs room for {least}: the root, the "
            f"elite, {2 + more} newborn children, and the {prompts} prompts of one step."
        )
    if (count := len(evolution.root)) > evolution.max_principles:
        yield (
            f"evolution.root has {count} principles, but evolution.max_principles is {evolution.max_principles}: "
            "shorten the one or raise the other."
        )
    if evolution.answer_visibility == "none" and evolution.crossover_probability:
        yield (
            "evolution.answer_visibility is none, but crossover shows which prompt did better on which problem: use "
            "--evolution.crossover_probability 0, or answer_visibility verdict."
        )
    for number, text in enumerate(evolution.root, 1):
        if (words := len(text.split())) > evolution.max_words:
            most = evolution.max_words
            yield (
                f"Principle {number} of evolution.root has {words} words, but evolution.max_words is {most}: shorten "
                "the one or raise the other."
            )
        if not text.strip():
            yield f"Principle {number} of evolution.root is empty."


def _baselines(config: Config) -> Iterator[str]:
    """Settings of the baselines that would change nothing."""
    evolution, usual = config.evolution, EvolutionConfig()
    changed = [key for key in BASELINES if getattr(evolution, key) != getattr(usual, key)]
    if evolution.twin_problems and config.mode == "rl":
        yield "evolution.twin_problems is given, but mode is rl: there is no prompt but the root to be checked."
    if 0 < evolution.twin_problems < LEAST_TWINS:
        yield f"evolution.twin_problems is {evolution.twin_problems}: fewer than {LEAST_TWINS} say nothing; 0 is off."
    if changed and config.mode == "rl":
        yield f"evolution.{changed[0]} is {getattr(evolution, changed[0])!r}, but mode is rl, which breeds nothing."
    if evolution.writer == "placebo" and evolution.evidence == "shuffled":
        yield "evolution.writer is placebo, which reads no evidence: leave evolution.evidence = 'shuffled' out."
    for key, needed in TRIALS.items():
        if getattr(evolution, key) != getattr(usual, key) and evolution.acceptance not in needed:
            yield (
                f"evolution.{key} is given, but evolution.acceptance is {evolution.acceptance}, which has no trial "
                f"that it could be for: use --evolution.acceptance {' or '.join(needed)}."
            )
    if evolution.mutations > 1 and not evolution.mutate:
        yield f"evolution.mutations is {evolution.mutations}, but evolution.mutate is off."
    if evolution.mutations > 1 and not evolution.reflection_temperature:
        yield (
            f"evolution.mutations is {evolution.mutations} at evolution.reflection_temperature 0: they would be all "
            "the same."
        )
    if evolution.pareto_scores == "validation" and evolution.selection != "pareto":
        yield (
            f"evolution.pareto_scores is validation, but evolution.selection is {evolution.selection}: nobody would "
            "look at these scores; use --evolution.selection pareto."
        )


def _reflection(config: Config) -> Iterator[str]:
    """What is said here never repeats a value that may hold a key by mistake."""
    asked, reflector = config.reflection, config.evolution.reflector
    if reflector == "endpoint" and not (asked.base_url and asked.model):
        yield "evolution.reflector is endpoint: say which, with --reflection.base_url URL and --reflection.model NAME."
    if reflector != "endpoint":
        for name in ("base_url", "model", "extra"):
            if getattr(asked, name):
                yield f"reflection.{name} is given, but evolution.reflector is {reflector}; it takes endpoint for that."
    if not VARIABLE.fullmatch(asked.api_key_env):
        yield "reflection.api_key_env is not the NAME of an environment variable in capitals; it never takes the key."
    if any(mark in (asked.base_url or "") for mark in "@?#"):
        yield "reflection.base_url holds more than an address: a key comes from the variable that api_key_env names."
    for name in sorted(OURS & asked.extra.keys()):
        yield f"reflection.extra.{name} cannot be set there: every request has a {name} of its own."
    if asked.cache == "off" and asked.cache_dir:
        yield "reflection.cache_dir is given, but reflection.cache is off; it takes record, replay or replay_only."
    if asked.cache.startswith("replay") and not asked.cache_dir:
        yield f"reflection.cache is {asked.cache}: name what was recorded, with --reflection.cache_dir RUN/reflections."
    if asked.max_cost is not None and asked.prices is None:
        yield "reflection.max_cost needs the prices, as in --reflection.prices 2.5,10."
    if asked.prices is not None and min(asked.prices) < 0:
        yield f"reflection.prices are {list(asked.prices)}; none can be below 0."


def _rest(config: Config) -> Iterator[str]:
    if not DEVICE.fullmatch(config.model.device):
        yield f"model.device is {config.model.device!r}; it takes auto, cpu, mps, cuda or cuda:N."
    rating = config.rating
    for name in ("sigma", "beta"):
        if getattr(rating, name) <= 0:
            yield f"rating.{name} is {getattr(rating, name):g}; it must be above 0."
    for name in ("tau", "tolerance", "delta_sigma", "novelty", "drift", "difficulty", "interaction"):
        if getattr(rating, name) < 0:
            yield f"rating.{name} is {getattr(rating, name):g}; it must be at least 0."
    if not 0 <= rating.draw_probability < 1:
        yield f"rating.draw_probability is {rating.draw_probability:g}; it must be at least 0 and below 1."


def _environments(config: Config) -> Iterator[str]:
    if config.evolution.migration and len(config.environments) == 1:
        yield (
            f"evolution.migration is {config.evolution.migration:g}, but {config.env.id} is the only environment: name "
            "another one (--env A --env B), or leave migration out."
        )
    seen: dict[str, str] = {}
    for name, env in config.environments.items():
        key = f"envs.{name}" if name else "env"
        if env.test_args and env.test_id is None:
            yield f"{key}.test_args are given without {key}.test_id: name the environment that they belong to."
        if env.args.get("tools") and env.test_id is not None and "tools" not in env.test_args:
            yield (
                f"{env.id} has tools and {env.test_id}, the environment of the final test, is given none: "
                f"add --{key}.test_args.tools, with the same names or, for a test without tools, '[]'."
            )
        twin = seen.setdefault(repr((env.id, sorted(env.args.items()), env.holdout_from)), name)
        if twin != name:
            yield (
                f"{env.id} is there twice, as {twin} and as {name}, with the same arguments: name it once, with a "
                f"weight (--env {env.id}=2), or give the two different arguments."
            )
