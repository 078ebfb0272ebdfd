"""An adaptor without its package is one sentence that names the extra."""

from __future__ import annotations

import importlib
import sys

import pytest

from espl_envs.core.errors import MissingExtra


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("inspect_tasks", "inspect_ai", "inspect"), ("verifiers", "verifiers.v1", "verifiers")],
)
def test_the_extra_is_named(module: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"espl_envs.interop.{module}", raising=False)
    with pytest.raises(MissingExtra, match=rf"espl\[{extra}\]"):
        importlib.import_module(f"espl_envs.interop.{module}")
