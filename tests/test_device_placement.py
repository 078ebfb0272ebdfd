"""Learner and local engine on a device that is not the CPU: what `device_checks.py` finds there, in a process of its
own, on a device that computes on the CPU and is as strict as a GPU (`pretend_device.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CHECKS = 15


def test_learner_and_local_engine_work_on_a_device_and_do_not_wait_for_it_needlessly() -> None:
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, HERE / "device_checks.py"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == CHECKS
    wrong = {name: said for name, said in found.items() if said != "passed"}
    assert not wrong, "\n\n".join(f"{name}\n{said}" for name, said in wrong.items())
