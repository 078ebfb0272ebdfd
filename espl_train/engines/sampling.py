"""From logits to tokens: temperature, nucleus, inverse-CDF draws, and the log-probabilities of just that distribution.

Everything is per row and vectorised over rows. A draw consumes exactly one uniform number, so the caller decides what
randomness belongs to which token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from espl_train.transfer import upload


@dataclass(frozen=True, slots=True)
class Law:
    """How each row of a batch is sampled. `temperature` 0 is greedy, with log-probabilities at temperature 1."""

    temperature: Tensor                # (rows,)
    top_p: Tensor                      # (rows,)
    greedy: Tensor                     # (rows,) bool
    any_greedy: bool
    all_greedy: bool
    any_scaled: bool
    any_truncated: bool

    @classmethod
    def of(cls, temperature: list[float], top_p: list[float], device: torch.device) -> Law:
        """The law of a batch from its rows' settings; the flags let a step skip what no row needs."""
        greedy = [t == 0 for t in temperature]
        return cls(
            upload(torch.tensor([t or 1.0 for t in temperature], dtype=torch.float32), device),
            upload(torch.tensor(top_p, dtype=torch.float32), device),
            upload(torch.tensor(greedy), device),
            any(greedy),
            all(greedy),
            any(t not in (0, 1) for t in temperature),
            any(p < 1 and not g for p, g in zip(top_p, greedy, strict=True)),
        )


def log_probabilities(logits: Tensor, law: Law) -> Tensor:
    """Log-probabilities of the distribution that is sampled from: (rows, vocab) float32, -inf outside the nucleus."""
    logits = logits.float()
    if law.any_scaled:
        logits = logits / law.temperature[:, None]
    logp = logits.log_softmax(-1)
    if law.any_truncated:
        top_p = torch.where(law.greedy, 1.0, law.top_p)
        logp = _nucleus(logp, top_p)
    return logp


def draw(logp: Tensor, law: Law, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability. `uniform`: (rows,) float64 in (0, 1)."""
    if law.all_greedy:
        tokens = logp.argmax(-1)
    else:
        cdf = logp.exp().cumsum(-1, dtype=torch.float64)                      # (rows, vocab)
        tokens = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0]
        if law.any_greedy:
            tokens = torch.where(law.greedy, logp.argmax(-1), tokens)
    return tokens, logp.gather(1, tokens[:, None])[:, 0]


def _nucleus(logp: Tensor, top_p: Tensor) -> Tensor:
    """Keep each row's smallest set of most likely tokens that holds `top_p` of the mass; renormalise."""
    ordered, index = logp.sort(dim=-1, descending=True, stable=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    ordered = ordered.masked_fill((before >= top_p[:, None]) & (top_p[:, None] < 1), -torch.inf)
    kept = torch.empty_like(logp).scatter_(1, index, ordered)
    return kept.log_softmax(-1)
