"""OpenEnv, both ways (extra `openenv`): our environments behind its server, its environments behind our interface.

    espl-eval serve --env espl/GSM8K-v0 --port 8000         # then: openenv validate --url http://localhost:8000
    env = gym.make("espl_envs.interop.openenv:espl/OpenEnv-v0", base_url="http://localhost:8000")
"""

from collections.abc import Sequence

import gymnasium

if "espl/OpenEnv-v0" not in gymnasium.registry:
    gymnasium.register("espl/OpenEnv-v0", "espl_envs.interop.openenv.client:OpenEnvEnv")


def main(argv: Sequence[str]) -> int:
    """`espl-eval serve`."""
    from espl_envs.interop.openenv.command import main

    return main(argv)
