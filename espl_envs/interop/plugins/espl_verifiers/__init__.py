"""The plugin by which verifiers finds our environments: it takes top-level modules only. See `interop/verifiers.py`."""

from espl_envs.interop.verifiers import EsplEnv, EsplTaskset

__all__ = ["EsplEnv", "EsplTaskset"]
