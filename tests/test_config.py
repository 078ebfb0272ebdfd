"""Settings: layers in their order, an exact round trip, and mistakes that become sentences about options."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_envs import registry
from espl_train.config import Config
from espl_train.settings import (
    ConfigError,
    differences,
    from_toml,
    help_text,
    load,
    options,
    override,
    parse,
    preset_descriptions,
    to_toml,
)

PAIRS = {
    "aimo_beyondaime": ("espl/AIMOValidationAIME-v0", "espl/BeyondAIME-v0"),
    "dapo_aime25": ("espl/DAPOMath17k-v0", "espl/AIME25-v0"),
    "aime_and_amc_to_beyondaime": ("espl/AIMEandAMC-v0", "espl/BeyondAIME-v0"),
    "hmmt": ("espl/HMMTFeb-v0", "espl/HMMTNov25-v0"),
    "search_qa": ("espl/SearchQA-v0", None),
}
REPLY_TOKENS = {"search_qa": 2048}


def from_words(*words: str) -> Config:
    request = parse(words)
    return load(request.presets, request.config, request.overrides)


def complaint(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        from_words(*words)
    return str(caught.value)


def test_nothing_given_is_the_embedded_default() -> None:
    embedded = from_words()
    assert (embedded.env.id, embedded.model.path) == ("espl/Conventions-v0", "micro")
    assert embedded == from_words("--preset", "micro") == from_words("--model", "micro")


def test_the_bundled_model_brings_its_settings_below_everything_that_is_set() -> None:
    assert from_words("--learner.learning_rate", "1e-5").learner.learning_rate == 1e-5
    assert from_words("--preset", "paper").learner.learning_rate == 4e-5
    assert from_words("--model", "somebody/else") == from_words("--model", "somebody/else", "--steps", "30")
    assert from_words("--model", "somebody/else").rollout == Config().rollout != from_words().rollout


def test_every_option_has_a_description_and_a_line_of_help() -> None:
    page = help_text(100)
    assert [key for key, option in options().items() if not option.description] == []
    assert [key for key in options() if f"--{key}" not in page] == []
    assert max(map(len, page.splitlines())) <= 120


def test_layers_win_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('preset = "paper"\n[rollout]\nsamples = 6\nproblems = 7\n')
    config = from_words("--config", str(file), "--rollout.problems", "8")
    assert (config.rollout.prompts, config.rollout.samples, config.rollout.problems) == (3, 6, 8)
    assert not config.evolution.elite


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--learner.learning_rate", "1e-4"], "learner.learning_rate", 1e-4),
        (["--learner.learning_rate=1e-4"], "learner.learning_rate", 1e-4),
        (["--steps", "1_000"], "steps", 1000),
        (["--learner.betas", "0.8,0.9"], "learner.betas", (0.8, 0.9)),
        (["--learner.betas", "[0.8, 0.9]"], "learner.betas", (0.8, 0.9)),
        (
            ["--evolution.root", '["Be brief.", "Check, then answer."]'],
            "evolution.root",
            ("Be brief.", "Check, then answer."),
        ),
        (["--evolution.root", ""], "evolution.root", ()),
        (["--tensorboard", "no"], "tensorboard", False),
        (["--learner.divide_by_std"], "learner.divide_by_std", True),
        (["--learner.divide-by-std", "--steps", "3"], "learner.divide_by_std", True),
        (["--env.args", '{"world": 3}'], "env.args", {"world": 3}),
        (["--env.args", "{ world = 3 }"], "env.args", {"world": 3}),
        (["--env.args.world", "3", "--env.args.name", "x y"], "env.args", {"world": 3, "name": "x y"}),
        (["--env", "espl/GSM8K-v0"], "env.id", "espl/GSM8K-v0"),
        (["--test-env", "espl/GSM8K-v0"], "env.test_id", "espl/GSM8K-v0"),
        (["--test-env", "x", "--env.test_id", "none"], "env.test_id", None),
        (["--model", "some/folder"], "model.path", "some/folder"),
        (["--mode=rl"], "mode", "rl"),
        (["--out", "-x"], "out", "-x"),
    ],
)
def test_values_are_read_by_the_type_of_their_option(words: list[str], key: str, value: object) -> None:
    node: Any = from_words(*words)
    for part in key.split("."):
        node = getattr(node, part)
    assert node == value


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--rollout.sampels", "3"], ["--rollout.sampels", "Did you mean --rollout.samples?"]),
        (["--rate", "3"], ["Did you mean --learner.learning_rate?"]),
        (["--learning-rate", "3"], ["Did you mean --learner.learning_rate?"]),
        (["--learner.lr", "3"], ["Did you mean --learner.learning_rate?"]),
        (["--presett", "x"], ["Did you mean --preset?"]),
        (["--dryrun"], ["Did you mean --dry-run?"]),
        (["--rollout", "3"], ["is a section", "--rollout.NAME", "samples"]),
        (["steps", "3"], ["Unexpected argument 'steps'", "Did you mean --steps?"]),
        (["--steps"], ["--steps needs a value"]),
        (["--steps", "--seed", "1"], ["--steps needs a value"]),
        (["--dry-run=yes"], ["takes no value"]),
        (["--steps", "many"], ["steps is 'many' (command line)", "whole number"]),
        (["--steps", "2.5"], ["steps is '2.5'", "whole number"]),
        (["--steps", "0"], ["steps is '0'", "must be at least 1"]),
        (["--learner.learning_rate", "nan"], ["learner.learning_rate is nan", "finite"]),
        (["--rating.mu", "inf"], ["rating.mu is inf", "finite"]),
        (["--rollout.temperature", "0"], ["must be above 0"]),
        (["--rollout.top_p", "1.5"], ["must be at most 1"]),
        (["--mode", "evo"], ["mode is 'evo'", "evolution_rl, rl, evolution"]),
        (["--mode", "evolutoin"], ["Did you mean evolution?"]),
        (["--learner.betas", "0.9"], ["learner.betas"]),
        (["--learner.betas", "0.9,1.0"], ["below 1"]),
        (["--tensorboard=maybe"], ["tensorboard is 'maybe'", "true or false"]),
        (["--env.args", "5"], ["takes a table"]),
        (["--env.id.x", "5"], ["no option --env.id.x"]),
        (["--preset", "aimo"], ["no preset 'aimo'", "paper", "Did you mean"]),
        (["--config", "/no/such.toml"], ["/no/such.toml does not exist"]),
        (["--resume", "x", "--preset", "paper"], ["own settings"]),
        (["--rollout.top_p", "0.9"], ["biases the ratios", "--mode evolution"]),
        (["--rollout.max_new_tokens", "1000"], ["max_total_tokens", "raise the total"]),
        (["--evaluation.samples", "4", "--evaluation.temperature", "0"], ["greedy samples are all the same"]),
        (["--rollout.samples", "1"], ["at least 2 samples"]),
        (["--learner.loss", "ppo", "--learner.ratio_bounds", "[0.2, 0.28]"], ["learner.ratio_bounds", "around 1"]),
        (["--learner.ratio_bounds", "[0.8, 1.2]"], ["loss 'importance_sampling' has no bounds"]),
        (["--learner.correction_bounds", "[0, 2]"], ["correction 'none' has no bounds"]),
        (["--learner.correction", "token_mask", "--learner.correction_bounds", "[2, 1]"], ["around 1"]),
        (["--learner.correction", "tis"], ["learner.correction is 'tis'", "token_truncate"]),
        (["--learner.overlong_buffer", "0"], ["above 0"]),
        (["--evolution.capacity", "2"], ["needs room for"]),
        (["--evolution.root", '["' + "word " * 40 + '"]'], ["40 words"]),
        (["--model.device", "gpu"], ["cuda:N"]),
        (["--rating.sigma", "0"], ["rating.sigma is 0", "above 0"]),
    ],
)
def test_a_mistake_is_a_sentence_that_names_the_option(words: list[str], parts: list[str]) -> None:
    text = complaint(*words)
    assert [part for part in parts if part not in text] == [], text
    assert "Traceback" not in text and "pydantic" not in text


def test_a_root_prompt_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "root.txt"
    file.write_bytes("\ufeff  Be brief. \r\n\n\tPrüfe es, dann antworte.\n".encode())
    config = from_words("--root", str(file))
    assert config.evolution.root == ("Be brief.", "Prüfe es, dann antworte.")
    assert from_toml(to_toml(config)) == config, "the run does not keep the principles themselves"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["is empty", "one principle a line"]),
        (b" \n\t\r\n", ["is empty", "leave --root away"]),
        (b"\xff\xfe\x00", ["no text in UTF-8"]),
        (b"word " * 300_000, ["more than 1,000,000 bytes", "no system prompt"]),
        (b"Be brief.\n" + b"word " * 40, ["Principle 2 ", "40 words", "evolution.max_words is 32", "shorten"]),
        (b"Be brief.\n" * 40, ["40 principles", "evolution.max_principles is 32", "shorten"]),
    ],
)
def test_a_root_prompt_file_that_is_empty_or_too_long_is_a_sentence(
    content: bytes, parts: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "root.txt"
    file.write_bytes(content)
    text = complaint("--root", str(file))
    assert [part for part in parts if part not in text] == [] and "\n" not in text, text


def test_a_root_prompt_file_that_is_not_there_or_one_of_two_roots(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in complaint("--root", str(tmp_path / "none.txt"))
    assert "cannot be read: Is a directory" in complaint("--root", str(tmp_path))
    (tmp_path / "root.txt").write_text("Be brief.")
    assert "both given" in complaint("--root", str(tmp_path / "root.txt"), "--evolution.root", "Be long.")


@pytest.mark.parametrize(
    ("toml", "parts"),
    [
        ("[rolout]\nsamples = 3", ["no option rolout", "Did you mean rollout?"]),
        ("[rollout]\nsample = 3", ["no option rollout.sample", "Did you mean rollout.samples?"]),
        ("rollout = 3", ["rollout is a section"]),
        ("steps = true", ["steps is true", "whole number"]),
        ("steps = 'x", ["not valid TOML"]),
        ("[learner]\nlearning_rate = -1.0", ["learner.learning_rate is -1.0", "above 0", "mine.toml"]),
        ("[learner]\nlearning_rate = nan", ["finite"]),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path: Path, toml: str, parts: list[str]) -> None:
    (tmp_path / "mine.toml").write_text(toml)
    text = complaint("--config", str(tmp_path / "mine.toml"))
    assert [part for part in [*parts, "mine.toml"] if part not in text] == [], text


def test_all_mistakes_are_told_at_once() -> None:
    assert len(complaint("--steps", "0", "--rollout.samples", "x", "--mode", "y").splitlines()) == 3


def test_truncated_sampling_is_allowed_where_no_weights_learn() -> None:
    assert from_words("--rollout.top_p", "0.9", "--mode", "evolution").rollout.top_p == 0.9


def test_arguments_do_not_outlive_the_environment_they_belong_to() -> None:
    config = from_words("--preset", "dapo_aime25", "--env", "espl/GSM8K-v0")
    assert config.env.args == {} and config.env.test_id == "espl/AIME25-v0"
    assert from_words("--preset", "dapo_aime25").env.args == {"limit": 100}


numbers = st.floats(min_value=1e-300, max_value=1e300)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
jsonable = st.recursive(
    st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    rate=numbers,
    mu=st.floats(-1e9, 1e9),
    args=st.dictionaries(texts, jsonable, max_size=4),
    path=texts.map(lambda text: text.replace("\0", "")),
    seed=st.integers(0, 2**62),
)
def test_config_to_toml_and_back_is_exact(rate: float, mu: float, args: dict[str, Any], path: str, seed: int) -> None:
    config = override(
        Config(),
        {
            "learner.learning_rate": rate, "rating.mu": mu, "env.args": args, "model.path": path, "seed": seed,
            "env.test_id": "x",
        },
    )
    back = from_toml(to_toml(config))
    assert back == config and math.copysign(1, back.rating.mu) == math.copysign(1, config.rating.mu)


def test_differences_name_the_options() -> None:
    assert differences(Config(), Config(steps=5, seed=1), ignore=["seed"]) == {"steps": (Config().steps, 5)}


@pytest.mark.parametrize("name", sorted(preset_descriptions()))
def test_every_preset_loads_round_trips_and_says_what_it_is(name: str) -> None:
    config = load([name])
    assert from_toml(to_toml(config)) == config
    assert len(preset_descriptions()[name]) > 20


@pytest.mark.parametrize(
    ("name", "loss", "bounds", "normalise", "divide", "extra"),
    [
        ("grpo", "ppo", (0.8, 1.2), "sequence_mean", True, {"kl": 0.04, "kl_estimator": "k3"}),
        ("dr_grpo", "ppo", (0.8, 1.2), "constant", False, {}),
        ("dapo", "ppo", (0.8, 1.28), "token_mean", True, {"overlong": "penalise"}),
        ("gspo", "gspo", (1 - 3e-4, 1 + 4e-4), "sequence_mean", True, {"correction": "token_truncate"}),
        ("cispo", "cispo", (0.0, 4.0), "token_mean", True, {}),
    ],
)
def test_published_algorithms_are_presets_of_nothing_else(
    name: str, loss: str, bounds: tuple[float, float], normalise: str, divide: bool, extra: dict[str, Any]
) -> None:
    """They change what their papers define, and so go together with any experiment."""
    plain, config = load(["dapo_aime25"]), load(["dapo_aime25", name])
    learner = config.learner
    assert learner.ratio_bounds == pytest.approx(bounds)
    assert (learner.loss, learner.baseline, learner.normalise, learner.divide_by_std) == (
        loss, "prompt", normalise, divide,
    )
    expected = {"kl": 0.0, "overlong": "keep", "correction": "none", **extra}
    assert {key: getattr(learner, key) for key in expected} == expected
    assert config.rollout.dynamic_rounds == (9 if name == "dapo" else 0)
    algorithm = {
        "rollout.dynamic_rounds", *(f"learner.{key}" for key in expected), "learner.loss", "learner.ratio_bounds",
        "learner.normalise", "learner.divide_by_std",
    }
    assert set(differences(plain, config)) <= algorithm


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_pair_presets_have_registered_ids_and_the_numbers_of_the_paper(name: str) -> None:
    config = load([name])
    assert (config.env.id, config.env.test_id) == PAIRS[name]
    assert {config.env.id, config.env.test_id or config.env.id} <= set(registry.ids())
    rollout, learner, evolution, rating = config.rollout, config.learner, config.evolution, config.rating
    assert (rollout.problems, rollout.samples, rollout.prompts) == (10, 5, 3)
    assert (rollout.temperature, rollout.top_p) == (1.0, 1.0)
    assert rollout.max_new_tokens == REPLY_TOKENS.get(name, 15000)
    assert (learner.mode, learner.rank, learner.learning_rate, learner.betas, learner.eps) == (
        "lora",
        32,
        4e-5,
        (0.9, 0.95),
        1e-8,
    )
    assert (learner.loss, learner.baseline, learner.kl) == ("importance_sampling", "prompt", 0.0)
    assert (evolution.window, evolution.crossover_probability, evolution.max_operations) == (10, 0.2, 2)
    assert (evolution.explore, evolution.elite, evolution.root_anchor, evolution.evidence_window) == (
        2.0,
        False,
        False,
        0,
    )
    assert (rating.mu, rating.sigma, rating.beta, rating.tau, rating.draw_probability) == (
        25,
        25 / 3,
        25 / 6,
        25 / 300,
        0.1,
    )
    assert (rating.delta_sigma, rating.ties, rating.inheritance) == (1.0, "tolerance", "reference")


def test_the_engine_has_a_short_form() -> None:
    assert parse(["--engine", "vllm"]).overrides == {"engine.kind": "vllm"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("preset = 5", "preset is 5 .*a name, or a list of names"), ("preset = [5]", "a name, or a list of names"),
        ("preset = {a = 1}", "a name, or a list of names"), ("a = " + "[" * 5000, "nested too deeply"),
        ('out = "a\\u0000b"', "out is .*must not hold a null character"),
        ('[reflection]\ncache_dir = "\\u0000"', "must not hold a null character"),
    ],
)  # fmt: skip
def test_files_that_nobody_should_write_are_sentences(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_toml(text)
