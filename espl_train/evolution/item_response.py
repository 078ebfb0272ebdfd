"""Item-response ratings: a reward is a matter of the prompt, of how far the policy is, and of the problem.

    P(success of prompt i on problem q at step t) = logistic(skill_i + ability_t - difficulty_q + e_iqt)

in logits (the Rasch model with a drifting policy; Rasch 1960, Fischer and Molenaar 1995). The beliefs are Gaussian:

- The root is the yardstick: its skill is 0. A child's skill is the mean of its parents' plus N(0, novelty²). So skills
  are correlated along the family tree, and a game of a child says something of its parents; the joint covariance is
  kept, and a prompt that left is marginalised.
- ability_t is a random walk, N(0, drift²) per iteration, from N(0, sigma²) at the first one. Skills and difficulties
  drift too, on their own, N(0, tau²) per iteration: the policy learns what this prompt needs, and this problem.
- difficulty_q ~ N(0, difficulty²), remembered for every problem that was ever played.
- e_iqt ~ N(0, interaction²), one per prompt and problem of a batch: a prompt does not help evenly. Without it, N
  samples of one problem would count as much as N problems.

Rewards in [0, 1] count as fractional successes (the quasi-likelihood of Papke and Wooldridge 1996). The posterior of a
batch is Laplace's approximation in the space of its (prompt, problem) cells: Newton's method for a Gaussian-process
classifier in the form that inverts nothing ill-conditioned (Rasmussen and Williams 2006, algorithm 3.1), so that a step
costs O((M·B)³). Between batches it is projected: skills and ability stay joint, each difficulty keeps its own mean and
variance (assumed-density filtering).

On the outside everything is on the scale of the other ratings: mu + beta · logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from espl_envs.core.errors import EsplError
from espl_train.config import RatingConfig
from espl_train.evolution.prompts import Rating
from espl_train.evolution.ratings import ROUNDING, Match

NEWTON_STEPS, HALVINGS, CONVERGED = 60, 30, 1e-12


@dataclass(frozen=True, slots=True)
class Difficulty:
    """What is remembered of a problem, in logits, as it was after the batch of `step`."""

    mean: float
    variance: float
    step: int


@dataclass(frozen=True, eq=False)
class ItemResponse:
    """`Beliefs` of the model above. `mean` and `covariance` are of the ability, then of the skills of `prompts`: all
    that live but the root. `step` is that of the last batch, None before the first."""

    config: RatingConfig
    root: str
    prompts: tuple[str, ...]
    mean: np.ndarray             # [1 + P] logits
    covariance: np.ndarray       # [1 + P, 1 + P]
    problems: Mapping[int, Difficulty]
    step: int | None = None

    @classmethod
    def start(cls, config: RatingConfig, root: str) -> ItemResponse:
        """Before the first batch: only the root, and a policy of unknown ability."""
        variance = (config.sigma / config.beta) ** 2
        return cls(config, root, (), np.zeros(1), np.full((1, 1), variance), {})

    def rating(self, prompt: str) -> Rating:
        """The skill measured against the root, which is (mu, 0) for ever."""
        return self._outside(self._place(prompt)) if prompt != self.root else Rating(self.config.mu, 0.0)

    @property
    def ability(self) -> Rating:
        """Of the policy with the root prompt, on the scale of the ratings: mu is even odds on an average problem."""
        return self._outside(0)

    def after(self, match: Match) -> ItemResponse:
        """Counts every reward of the batch, whoever else played that problem. Raises EsplError for rewards outside
        [0, 1]."""
        cells = [(prompt, q, row) for prompt, rows in match.rewards.items() for q, row in rows.items()]
        if not cells:
            return self
        counts = np.array([float(len(row)) for _, _, row in cells])
        successes = np.array([_successes(prompt, q, row) for prompt, q, row in cells])
        drifted = self._at(match.step)
        tasks = list(dict.fromkeys(q for _, q, _ in cells))
        known = [drifted._difficulty(q, match.step) for q in tasks]
        easy, spread = -np.array([d.mean for d in known]), np.array([d.variance for d in known])

        of_latent = np.zeros((len(cells), len(self.mean)))       # which cell holds what
        of_task = np.zeros((len(cells), len(tasks)))
        for c, (prompt, q, _) in enumerate(cells):
            of_latent[c, 0] = 1.0
            if prompt != self.root:
                of_latent[c, self._place(prompt)] = 1.0
            of_task[c, tasks.index(q)] = 1.0

        latent, task = drifted.covariance @ of_latent.T, spread[:, None] * of_task.T
        kernel = of_latent @ latent + of_task @ task + np.eye(len(cells)) * self._logits("interaction") ** 2
        gradient, root_information = laplace(of_latent @ drifted.mean + of_task @ easy, kernel, successes, counts)

        shrink = root_information @ latent.T                     # [C, 1 + P]
        covariance = drifted.covariance - shrink.T @ shrink
        variances = np.maximum(spread - np.square(root_information @ task.T).sum(axis=0), ROUNDING)
        means = easy + task @ gradient
        found = {
            q: Difficulty(-float(m), float(v), match.step) for q, m, v in zip(tasks, means, variances, strict=True)
        }
        return replace(
            drifted, mean=drifted.mean + latent @ gradient, covariance=(covariance + covariance.T) / 2,
            problems={**self.problems, **found}, step=match.step,
        )

    def born(self, child: str, parents: Sequence[str]) -> ItemResponse:
        """With a skill that is the mean of the parents' plus noise, and correlated with all that they are.

        A child of nobody is like one of the root, whose skill is what all others are measured from.
        """
        weights = np.zeros(len(self.mean))
        for parent in parents:
            if parent != self.root:
                weights[self._place(parent)] += 1 / len(parents)
        shared = self.covariance @ weights
        own = weights @ shared + self._logits("novelty") ** 2
        covariance = np.block([[self.covariance, shared[:, None]], [shared[None, :], np.full((1, 1), own)]])
        mean = np.append(self.mean, weights @ self.mean)
        return replace(self, prompts=(*self.prompts, child), mean=mean, covariance=covariance)

    def without(self, prompt: str) -> ItemResponse:
        """What it taught about the others stays."""
        place = self._place(prompt)
        kept = [i for i in range(len(self.mean)) if i != place]
        prompts = tuple(p for p in self.prompts if p != prompt)
        return replace(self, prompts=prompts, mean=self.mean[kept], covariance=self.covariance[np.ix_(kept, kept)])

    def draw(self, prompts: Sequence[str], random: np.random.Generator) -> np.ndarray:
        """One joint draw of skills. [len(prompts)]"""
        noise = _factor(self.covariance) @ random.standard_normal(len(self.mean))
        skills = {self.root: 0.0, **dict(zip(self.prompts, (self.mean + noise)[1:].tolist(), strict=True))}
        return self.config.mu + self.config.beta * np.array([skills[p] for p in prompts])

    def details(self) -> dict[str, Any]:
        """How far the policy is."""
        return {"ability": {"mu": self.ability.mu, "sigma": self.ability.sigma}}

    def to_json(self) -> dict[str, Any]:
        """Everything; of the covariance its lower triangle."""
        return {
            "prompts": list(self.prompts),
            "mean": self.mean.tolist(),
            "covariance": [row[: i + 1] for i, row in enumerate(self.covariance.tolist())],
            "problems": [[q, d.mean, d.variance, d.step] for q, d in self.problems.items()],
            "step": self.step,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], config: RatingConfig, root: str) -> ItemResponse:
        """The beliefs that `to_json` wrote down."""
        covariance = np.zeros((len(data["mean"]), len(data["mean"])))
        for i, row in enumerate(data["covariance"]):
            covariance[i, : i + 1] = covariance[: i + 1, i] = row
        problems = {q: Difficulty(mean, variance, step) for q, mean, variance, step in data["problems"]}
        return cls(config, root, tuple(data["prompts"]), np.array(data["mean"]), covariance, problems, data["step"])

    def _place(self, prompt: str) -> int:
        return 1 + self.prompts.index(prompt)

    def _logits(self, setting: str) -> float:
        return float(getattr(self.config, setting)) / self.config.beta

    def _outside(self, place: int) -> Rating:
        config, variance = self.config, max(float(self.covariance[place, place]), 0.0)
        return Rating(config.mu + config.beta * float(self.mean[place]), config.beta * variance**0.5)

    def _at(self, step: int) -> ItemResponse:
        """The beliefs when `step` begins: as many iterations of drift as passed."""
        passed = max(step - self.step, 0) if self.step is not None else 0
        added = np.full(len(self.mean), self._logits("tau") ** 2)
        added[0] = self._logits("drift") ** 2
        return replace(self, covariance=self.covariance + np.diag(passed * added))

    def _difficulty(self, problem: int, step: int) -> Difficulty:
        unknown = self._logits("difficulty") ** 2
        known = self.problems.get(problem)
        if known is None:
            return Difficulty(0.0, unknown, step)
        variance = known.variance + max(step - known.step, 0) * self._logits("tau") ** 2
        return replace(known, variance=min(variance, max(unknown, known.variance)))


def laplace(
    prior: np.ndarray, kernel: np.ndarray, successes: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The mode of logits f ~ N(prior, kernel) given `successes` out of `counts`, one entry per cell.

    Returns the gradient g of the log-likelihood there, for which f = prior + kernel @ g, and V with V'V = (kernel +
    W^-1)^-1, W the curvature: the posterior covariance is kernel - (V kernel)'(V kernel).
    """
    weights = np.zeros_like(prior)

    def objective(w: np.ndarray) -> float:
        f = prior + kernel @ w
        return float(successes @ f - counts @ np.logaddexp(0.0, f) - 0.5 * w @ (kernel @ w))

    def curvature(f: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        chance = 0.5 * (1 + np.tanh(0.5 * f))
        information = counts * chance * (1 - chance)
        root = np.sqrt(information)
        triangle = np.linalg.cholesky(np.eye(len(f)) + root[:, None] * kernel * root)
        return chance, root, triangle

    best = objective(weights)
    for _ in range(NEWTON_STEPS):
        f = prior + kernel @ weights
        chance, root, triangle = curvature(f)
        b = root**2 * (f - prior) + successes - counts * chance
        inner = np.linalg.solve(triangle.T, np.linalg.solve(triangle, root * (kernel @ b)))
        direction = b - root * inner - weights
        scale = 1.0
        for _ in range(HALVINGS):
            value = objective(weights + scale * direction)
            if value >= best:
                break
            scale /= 2
        else:
            break                        # rounding is all that is left
        weights, gained, best = weights + scale * direction, value - best, value
        if gained <= CONVERGED * (1 + abs(best)):
            break
    _, root, triangle = curvature(prior + kernel @ weights)
    return weights, np.linalg.solve(triangle, np.diag(root))


def _successes(prompt: str, problem: int, rewards: Sequence[float]) -> float:
    for reward in rewards:
        if not -ROUNDING <= reward <= 1 + ROUNDING:
            raise EsplError(
                f"rating.kind item_response reads rewards as successes between 0 and 1, and {prompt} got {reward:g} on "
                f"problem {problem} of the training split: use --rating.kind trueskill, which only compares them"
            )
    return float(sum(min(max(reward, 0.0), 1.0) for reward in rewards))


def _factor(covariance: np.ndarray) -> np.ndarray:
    """A square root of a covariance that may be singular: a drift or a novelty of 0 makes it so."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0.0))
