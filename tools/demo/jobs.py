"""Run programs side by side, each with a bar."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


@dataclass
class Job:
    """A Python program to run.

    Attributes:
        name: Shown beside its bar.
        command: Arguments of the interpreter, the script first.
        log: File that takes its output.
        total: Steps that it takes; 1 if it does not tell.
        state: Returns the step that it has reached and a remark for the bar.
    """

    name: str
    command: list
    log: Path
    total: int = 1
    state: Callable[[], tuple[int, str]] = lambda: (0, '')


def run_jobs(jobs):
    """Run all jobs at once, the cores shared out among them.

    Raises:
        SystemExit: One failed; the others are stopped. Names the log and shows
            its end.
    """
    if not jobs:
        return
    threads = max((os.cpu_count() or 1) // len(jobs), 1)
    running = {}
    try:
        with _bars() as bars:
            for job in jobs:
                running[job.name] = job, _start(job, threads), bars.add_task(
                    job.name, total=job.total, remark=''
                )  # fmt: skip
            while running:
                time.sleep(0.5)
                for job, process, bar in list(running.values()):
                    step, remark = job.state()
                    bars.update(bar, completed=step, remark=remark)
                    if process.poll() is None:
                        continue
                    del running[job.name]
                    if process.returncode:
                        raise SystemExit(_failure(job, process.returncode))
                    bars.update(bar, completed=job.total)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()


def _start(job, threads):
    job.log.parent.mkdir(parents=True, exist_ok=True)
    # The models run on the CPU whatever the machine has, so that figures compare.
    env = os.environ | dict(OMP_NUM_THREADS=str(threads), CUDA_VISIBLE_DEVICES='')
    with job.log.open('w') as log:
        return subprocess.Popen(
            [sys.executable, *map(str, job.command)], stdout=log, stderr=subprocess.STDOUT, env=env
        )


def _bars():
    return Progress(
        TextColumn('{task.description:<28}'),
        BarColumn(),
        TextColumn('{task.completed:.0f}/{task.total:.0f}'),
        TimeElapsedColumn(),
        TextColumn('{task.fields[remark]}'),
    )


def _failure(job, code):
    end = ''.join(job.log.read_text(errors='replace').splitlines(keepends=True)[-25:])
    return f'{end}\n{job.name} ended with status {code}. The whole of its output is in {job.log}.'
