"""A world small enough to think about: a random Qwen2 of 20k parameters, and rollouts written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from espl_train.config import LearnerConfig
from espl_train.learner.policy import Policy
from espl_train.records import Group, Rollout, RolloutKey, StopReason, Turn

torch.set_num_threads(1)

VOCABULARY = 61
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Qwen2ForCausalLM:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(Qwen2Config(**{**settings, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():    # the default 0.02 gives a distribution that is nearly uniform
                if parameter.dim() > 1:
                    parameter.mul_(8)
    return model.to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_folder(folder: Path, **changes: Any) -> Path:
    tiny_model(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_policy(adapter: float = 0.0, seed: int = 0, **settings: Any) -> Policy:
    """A policy on the tiny model; `adapter` > 0 moves the trained weights away from the base by that much noise."""
    config = LearnerConfig(**{"rank": 4, "alpha": 8, "learning_rate": 1e-3, **settings})
    policy = Policy(tiny_model(), tiny_tokenizer(), config, seed=seed)
    if adapter:
        shake(policy, adapter)
    return policy


def shake(policy: Policy, size: float, seed: int = 7) -> None:
    random = torch.Generator().manual_seed(seed)
    state = policy.state()
    policy.load_state({k: v + size * torch.randn(v.shape, generator=random).to(v.dtype) for k, v in state.items()})


def rollout(
    reward: float = 0.0,
    turns: Sequence[tuple[Sequence[int], Sequence[int]]] = (((2, 3), (4, 5)),),
    logprobs: Sequence[Sequence[float]] | None = None,
    prompt: str = "root",
    task: int = 0,
    sample: int = 0,
    faulted: bool = False,
) -> Rollout:
    given = logprobs or [[-1.0] * len(tokens) for _, tokens in turns]
    played = tuple(Turn(tuple(c), tuple(t), tuple(p)) for (c, t), p in zip(turns, given, strict=True))
    stop = StopReason.FAULT if faulted else StopReason.ANSWER
    return Rollout(RolloutKey(0, prompt, task, sample), f"t{task}", played, (), reward, stop, policy=0)


def group(*rollouts: Rollout, advantages: Sequence[float] = ()) -> Group:
    key = rollouts[0].key
    return Group(key.prompt, key.task, f"t{key.task}", rollouts, tuple(advantages))


def random_groups(seed: int, count: int = 3, samples: int = 4, advantages: bool = True) -> list[Group]:
    """Groups of one- and two-turn rollouts with ragged lengths, random rewards and behaviour log-probabilities."""
    random = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=random))
        return torch.randint(2, VOCABULARY, (length,), generator=random).tolist()

    groups = []
    for task in range(count):
        played = []
        for sample in range(samples):
            turns = [(ids(2, 6), ids(1, 8)) for _ in range(1 + sample % 2)]
            old = [(-4 + torch.rand(len(t), generator=random)).tolist() for _, t in turns]
            played.append(rollout(float(sample % 2), turns, old, prompt=f"p{task % 2}", task=task, sample=sample))
        values = torch.randn(samples, generator=random).tolist() if advantages else []
        groups.append(group(*played, advantages=values))
    return groups


def related_groups(seed: int, count: int = 4, samples: int = 4) -> list[Group]:
    """Groups whose rollouts begin alike, as those of a run do: a common head for all, a prompt for each group; some
    samples say the same at first, two in a group say exactly the same."""
    random = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (length,), generator=random).tolist()

    head, groups = ids(17), []
    for task in range(count):
        prompt, start = [*head, *ids(3 + task)], ids(2)
        played = []
        for sample in range(samples):
            first = [*start, *ids(1 + (3 * sample + task) % 7)] if sample % 3 else ids(1 + 2 * task)
            turns = [(prompt, first), *([(ids(2), ids(3))] if sample % 2 else [])]
            if sample == samples - 1:
                turns = [(turn.context, turn.tokens) for turn in played[0].turns]
            old = [(-4 + torch.rand(len(t), generator=random)).tolist() for _, t in turns]
            played.append(rollout(float(sample % 2), turns, old, prompt=f"p{task % 2}", task=task, sample=sample))
        groups.append(group(*played, advantages=torch.randn(samples, generator=random).tolist()))
    return groups
