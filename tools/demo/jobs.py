"""Run programs side by side, each with a bar."""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@dataclass
class Job:
    """A Python program to run.

    Attributes:
        name: Shown beside its bar.
        command: Arguments of the interpreter, the script first.
        log: File that takes its output.
        total: Steps that it takes; 1 if it does not tell.
        state: Returns the step that it has reached and a remark for the bar.
        seconds: That it took, once it has ended.
    """

    name: str
    command: list
    log: Path
    total: int = 1
    state: Callable[[], tuple[int, str]] = lambda: (0, '')
    seconds: float = 0.0

    def output_end(self):
        """The last lines of its output."""
        return ''.join(self.log.read_text(errors='replace').splitlines(keepends=True)[-25:])


def run_jobs(jobs):
    """Run all jobs at once, the cores shared out among them.

    Raises:
        SystemExit: One failed; the others are stopped. Names the log and shows
            its end.
    """
    with closing(results(jobs, len(jobs))) as ended:
        for job, code in ended:
            if code:
                raise SystemExit(
                    f'{job.output_end()}\n{job.name} ended with status {code}. '
                    f'The whole of its output is in {job.log}.'
                )


def results(jobs, at_once):
    """Run jobs, some at a time, the cores shared out among those.

    Closing the generator stops those that run.

    Args:
        jobs (list[Job]): In the order in which they start.
        at_once (int): How many run side by side.

    Yields:
        tuple[Job, int]: A job that has ended, and its status.
    """
    if not jobs:
        return
    threads = max((os.cpu_count() or 1) // at_once, 1)
    waiting, running = deque(jobs), {}
    try:
        with _bars() as bars:
            whole = None
            if len(jobs) > at_once:
                whole = bars.add_task('all', total=len(jobs), remark='')
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.popleft()
                    bar = bars.add_task(job.name, total=job.total, remark='')
                    running[bar] = job, _start(job, threads), time.monotonic()
                time.sleep(0.5)
                for bar, (job, process, start) in list(running.items()):
                    step, remark = job.state()
                    bars.update(bar, completed=step, remark=remark)
                    if process.poll() is None:
                        continue
                    job.seconds = time.monotonic() - start
                    del running[bar]
                    if whole is None:
                        bars.update(bar, completed=job.total)
                    else:
                        bars.remove_task(bar)
                        bars.advance(whole)
                    yield job, process.returncode
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
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn('{task.fields[remark]}'),
    )
