"""Run programs side by side, each with a bar."""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
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
        total: Steps that it takes; 1 if they are not known.
        state: Returns the step that it has reached and a remark for the bar.
        seconds: That it took, once it has ended.
    """

    name: str
    command: list
    log: Path
    total: int = 1
    state: Callable[[], tuple[int, str]] = lambda: (0, '')
    seconds: float = 0.0

    def start(self, threads: int) -> subprocess.Popen:
        """Start the program, on the CPU whatever the machine has, so that figures compare."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *map(str, self.command)]
        env = os.environ | dict(OMP_NUM_THREADS=str(threads), CUDA_VISIBLE_DEVICES='')
        with self.log.open('w') as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)

    def output_end(self) -> str:
        """The last lines of its output."""
        return ''.join(self.log.read_text(errors='replace').splitlines(keepends=True)[-25:])


def run_jobs(jobs: list[Job]) -> None:
    """Run all jobs at once, the cores divided among them.

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


def results(jobs: list[Job], at_once: int) -> Iterator[tuple[Job, int]]:
    """Run jobs, some at a time, the cores divided among those.

    Closing the generator stops those that run.

    Args:
        jobs: In the order in which they start.
        at_once: How many run side by side.

    Yields:
        A job that has ended, and its status.
    """
    threads = max((os.cpu_count() or 1) // max(at_once, 1), 1)
    waiting, running = deque(jobs), []
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    texts = TextColumn('{task.description:<28}'), TextColumn('{task.fields[remark]}')
    try:
        with Progress(texts[0], *columns, texts[1]) as bars:
            whole = bars.add_task('all', total=len(jobs), remark='', visible=len(jobs) > at_once)
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.popleft()
                    bar = bars.add_task(job.name, total=job.total, remark='')
                    running.append((job, job.start(threads), bar, time.monotonic()))
                time.sleep(0.5)
                for entry in list(running):
                    job, process, bar, start = entry
                    step, remark = job.state()
                    bars.update(bar, completed=step, remark=remark)
                    if process.poll() is None:
                        continue
                    job.seconds = time.monotonic() - start
                    running.remove(entry)
                    if process.returncode == 0:
                        bars.update(bar, completed=job.total)
                    bars.update(bar, visible=len(jobs) <= at_once)
                    bars.advance(whole)
                    yield job, process.returncode
    finally:
        for _, process, _, _ in running:
            process.terminate()
        for _, process, _, _ in running:
            process.wait()
