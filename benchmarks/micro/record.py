"""Many runs in a few processes of one thread each. Every finished one is a line of a file: what is there is done."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.micro.runs import Job, Texts

Row = dict[str, Any]


def read(path: Path) -> dict[str, Row]:
    """The rows of a record by key; a last line that was cut off is left out."""
    rows = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["key"]] = row
    return rows


def mend(path: Path) -> None:
    """End a last line that was cut off, so that the next one begins on its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as record:
        record.seek(max(record.tell() - 1, 0))
        if record.read(1) not in (b"", b"\n"):
            record.write(b"\n")


def work(jobs: Sequence[Job], path: Path, processes: int, seconds: float = float("inf")) -> dict[str, Row]:
    """Run what the record at `path` does not hold yet, in order, and return all its rows.

    A job whose `after` is not there yet waits while others run. No job is begun once `seconds` are over.
    """
    rows, started = read(path), time.monotonic()
    mend(path)
    left = [job for job in jobs if job.key not in rows]
    total, running = len(left), dict[Future[Row], Job]()
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")      # read by torch when a worker imports it
    context = multiprocessing.get_context("spawn")
    with ended(ProcessPoolExecutor(processes, context)) as pool, path.open("a", encoding="utf-8") as record:
        while left or running:
            over = time.monotonic() - started > seconds
            while len(running) < processes and not over and (job := next_ready(left, rows)) is not None:
                left.remove(job)
                running[pool.submit(play, job, evolved(job, rows))] = job
            if not running:
                break
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                running.pop(future)
                row = future.result()
                rows[row["key"]] = row
                record.write(json.dumps(row, ensure_ascii=False) + "\n")
                record.flush()
                told(row, total - len(left) - len(running), total, time.monotonic() - started)
    return rows


@contextmanager
def ended(pool: ProcessPoolExecutor) -> Iterator[ProcessPoolExecutor]:
    """The pool; whatever ends the block early (SIGTERM, too) ends its processes with it."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with pool:
            try:
                yield pool
            except BaseException:
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)


def play(job: Job, evolved: Texts | None) -> Row:
    """One job, in a worker process: here torch is imported, once per worker."""
    import torch
    from transformers.utils import logging

    from benchmarks.micro import runs

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    return runs.run(job, evolved)


def next_ready(left: Sequence[Job], rows: dict[str, Row]) -> Job | None:
    """The first job that waits for nobody."""
    return next((job for job in left if job.after is None or job.after in rows), None)


def evolved(job: Job, rows: dict[str, Row]) -> Texts | None:
    """The principles that the job's forerunner ended with."""
    return tuple(rows[job.after]["principles"]) if job.after else None


def told(row: Row, done: int, total: int, seconds: float) -> None:
    """One line per finished run."""
    left = seconds / done * (total - done) / 60
    print(f"{done:>4}/{total}  {row['stage']:<10} {row['arm']:<18} world {row['world']:<5} d {row['declarative']:g} "
          f"p {row['procedural']:g}  test {row['test']:.3f}  {row['seconds']:5.1f} s  {left:.0f} min left", flush=True)
