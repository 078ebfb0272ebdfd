"""TRL, the real trainer: completions are worth what the environment gives for them, with its tools and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import toy

from espl_envs.core.errors import EsplError
from espl_envs.interop.trl import Arena

trl = pytest.importorskip("trl", reason="the extra 'trl' is not installed")

from learner_kit import tiny_model  # noqa: E402

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 20, "b": 20}}\n</tool_call>'


def worth(env_id: str, task: int, *replies: str) -> float:
    env: Any = gymnasium.make(env_id, split="validation").unwrapped
    env.reset(options={"task": task})
    *_, (_, reward, *_) = [env.step(reply) for reply in replies]
    return float(reward)


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def test_rewards_are_the_environments() -> None:
    arena = Arena("toy:toy/Add-v0", split="validation")
    rows = arena.dataset()
    assert len(rows) == 5 and rows[1]["prompt"][-1] == {"role": "user", "content": "What is 21 + 21?"}
    texts = [r"\boxed{40}", r"\boxed{42}", r"\boxed{1}", "", r"<think>\boxed{48}"]
    rewards = arena.reward(completions=[said(text) for text in texts], task=rows["task"], prompts=None)
    assert rewards == [worth("toy/Add-v0", task, text) for task, text in zip(rows["task"], texts, strict=True)]
    assert rewards == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_a_fault_is_no_reward() -> None:
    arena = Arena("toy:toy/Add-v0", split="validation")
    assert arena.reward(completions=[said(r"\boxed{broken}"), said(r"\boxed{42}")], task=[0, 1]) == [None, 1.0]


def test_training_splits_come_first_and_games_are_refused() -> None:
    assert Arena("toy:toy/Add-v0").dataset(limit=2)["task_id"][:] == ["add-0", "add-1"]
    with pytest.raises(EsplError, match="goes on after a reply"):
        Arena("toy:toy/Patient-v0")


def test_tools_are_methods_that_transformers_describes_as_we_do() -> None:
    from transformers.utils import get_json_schema

    arena = Arena("toy:toy/AddTools-v0")
    seat = arena.tools()["environment_factory"]()
    for spec in seat._env.unwrapped.tools:
        theirs, ours = get_json_schema(getattr(seat, spec.name))["function"], json.loads(spec.schema)
        assert (theirs["name"], theirs["description"]) == (spec.name, spec.description)
        assert theirs["parameters"]["required"] == ours["required"]
        for name, rule in ours["properties"].items():
            assert theirs["parameters"]["properties"][name]["type"] == rule["type"]


def test_a_tool_that_breaks_costs_the_reward_and_one_that_ends_the_episode_gives_it() -> None:
    arena = Arena("toy:toy/AddTools-v0", split="validation")
    broken, done = (arena.tools()["environment_factory"]() for _ in range(2))
    broken.reset(task=0)
    with pytest.raises(Exception, match="burned down"):
        broken.add(a=99, b=1)
    done.reset(task=0)
    assert done.add(a="x", b=1).startswith("Error") and done.submit(answer="40") == "Submitted."
    with pytest.raises(EsplError, match="over"):
        done.add(a=1, b=1)
    rewards = arena.reward(completions=[said(r"\boxed{40}"), said("")], task=[0, 0], environments=[broken, done])
    assert rewards == [None, 1.0]


def byte_tokenizer() -> Any:
    """Every byte is a token, and the template is one with tools that TRL knows."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(word) for word in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = Path(trl.__file__).with_name("chat_templates").joinpath("qwen3.jinja").read_text("utf-8")
    return tokenizer


def trainer(arena: Arena, folder: Path, rows: Any, tokenizer: Any) -> Any:
    config = trl.GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=2, num_generations=2, max_steps=1,
        max_completion_length=512, report_to=[], use_cpu=True, logging_steps=1, bf16=False, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=4096)
    return trl.GRPOTrainer(
        model, reward_funcs=arena.reward, args=config, train_dataset=rows,
        processing_class=tokenizer, **arena.tools(),
    )  # fmt: skip


def test_the_trainers_tool_loop_plays_the_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena("toy:toy/AddTools-v0", split="validation")
    tokenizer = byte_tokenizer()
    learner = trainer(arena, tmp_path, arena.dataset(limit=1), tokenizer)
    script = [[CALL, r"\boxed{41}"], [r"\boxed{40}"]]

    def generate(prompt_ids: Any, *_: Any, **__: Any) -> Any:
        texts = script.pop(0)
        assert len(prompt_ids) == len(texts)
        ids = [tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"] for text in texts]
        return ids, None

    monkeypatch.setattr(learner, "_generate_single_turn", generate)
    seen: list[Any] = []
    original = arena.reward
    monkeypatch.setattr(learner, "reward_funcs", [lambda **given: seen.append(original(**given)) or seen[-1]])
    learner.train()
    assert seen == [[worth("toy/AddTools-v0", 0, toy.call("add", a=20, b=20), r"\boxed{40}"), 0.0]]
    assert seen == [[1.0, 0.0]] and not script
