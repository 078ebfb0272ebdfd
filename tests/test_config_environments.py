"""Several environments as a user writes them: on the command line, in a file, and what is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from espl_train.config import Config, EnvConfig
from espl_train.settings import ConfigError, differences, from_toml, load, override, parse, to_toml

A, B = "espl/Conventions-v0", "espl/Countdown-v0"


def words(*argv: str) -> Config:
    request = parse(argv)
    return load(request.presets, request.config, request.overrides)


def test_one_environment_is_what_it_always_was() -> None:
    assert words("--env", B).environments == {"": EnvConfig(id=B)}
    assert words("--env.args.world", "3", "--env", A).env == words("--env", A, "--env.args.world", "3").env
    assert words("--envs.only.id", B) == words("--env", B) and words("--env", f"{A}=3").shares == {"": 1.0}


def test_several_are_named_after_their_ids_and_options_follow_their_environment() -> None:
    found = words(
        "--env", f"{A}=2", "--env.args.world", "3", "--steps", "4", "--env", A, "--env.args", '{"world": 4}',
        "--tools", "python", "--env", B, "--test-env", A, "--env.test_args.world", "9",
    )  # fmt: skip
    assert found.environments == {
        "conventions": EnvConfig(id=A, args={"world": 3}, weight=2.0),
        "conventions-2": EnvConfig(id=A, args={"world": 4, "tools": ["python"]}),
        "countdown": EnvConfig(id=B, test_id=A, test_args={"world": 9}),
    }
    assert found.shares == {"conventions": 0.5, "conventions-2": 0.25, "countdown": 0.25} and found.steps == 4
    assert found.env == EnvConfig() and found.env_ids == f"{A} + {A} + {B}"


def test_whole_and_single_options_by_name() -> None:
    found = words("--envs.a.id", A, "--envs.a.args.world", "3", "--envs.b.id", B, "--envs.b.weight", "0.5")
    assert found.environments == {"a": EnvConfig(id=A, args={"world": 3}), "b": EnvConfig(id=B, weight=0.5)}
    assert words("--env", A, "--env", B, "--envs.countdown.weight", "3").shares["countdown"] == 0.75


def test_the_file_of_a_run_says_the_same() -> None:
    found = words("--env", A, "--env.args.world", "3", "--env", f"{B}=2", "--test-env", A)
    assert "[envs.countdown]" in to_toml(found) and from_toml(to_toml(found)) == found
    assert override(found, {"steps": 5}).environments == found.environments
    assert list(differences(found, override(found, {"envs.countdown.weight": 3}))) == ["envs"]


def test_whoever_names_environments_leaves_those_below_behind(tmp_path: Path) -> None:
    file = tmp_path / "two.toml"
    file.write_text(f'[envs.a]\nid = "{A}"\n[envs.b]\nid = "{B}"\nweight = 2\ntest_id = "none"\n')
    assert words("--config", str(file)).shares == {"a": 1 / 3, "b": 2 / 3}
    assert words("--config", str(file), "--envs.b.weight", "1").shares == {"a": 0.5, "b": 0.5}
    assert words("--config", str(file), "--env", B).environments == {"": EnvConfig(id=B)}
    assert list(words("--config", str(file), "--env", A, "--env", B).environments) == ["conventions", "countdown"]
    assert words("--preset", "dapo_aime25", "--env", A, "--env", B).environments["countdown"] == EnvConfig(id=B)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--env", A, "--env", A), "is there twice, as conventions and as conventions-2"),
        (("--env", f"{A}=0", "--env", B), "envs.conventions.weight is 0.0 (command line); it must be above 0."),
        (("--env", A, "--env", f"{B}=-1"), "envs.countdown.weight is -1.0"),
        (("--env", f"{A}=nan", "--env", B), "it takes a finite number"),
        (("--env", f"{A}=two", "--env", B), "'two' is no weight"),
        (("--env.args.world", "3", "--env", A, "--env", B), "--env.args.world stands before the first --env"),
        (("--env", A, "--env", B, "--envs.cuntdown.weight", "3"), "Did you mean envs.countdown?"),
        (("--env", A, "--env", B, "--envs.countdown.wieght", "3"), "Did you mean --envs.countdown.weight?"),
        (("--envs.a.id", A, "--envs.b.id", B, "--env.holdout_from", "test"), "both given"),
        (("--envs", '{"a": 1}'), "envs.a is 1 (command line); it takes a table with an id."),
        (("--envs", f'{{"a b": {{"id": "{A}"}}}}'), "a name is made of letters"),
        (("--envs.all.id", A, "--envs.b.id", B), "take another name"),
        (("--env", A, "--env", B, "--env.holdout_from", "dev"), "envs.countdown.holdout_from is 'dev'"),
        (("--env", A, "--env", B, "--env.test_args.world", "3"), "envs.countdown.test_args are given without"),
        (("--env", A, "--evolution.migration", "0.5"), "is the only environment"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(argv: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        words(*argv)
    assert said in str(refused.value) and "\n" not in str(refused.value)
