"""Run programs side by side, each with a bar."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column


@dataclass
class Job:
    """A Python program to run.

    Attributes:
        name: Shown beside its bar.
        command: Arguments of the interpreter, the script first.
        log: File that takes its output.
        total: Steps that it takes; 1 if they are not known.
        state: Returns the step that it has reached and a remark for the bar.
    """

    name: str
    command: list
    log: Path
    total: int = 1
    state: Callable[[], tuple[int, str]] = lambda: (0, '')

    def start(self, threads: int) -> subprocess.Popen:
        """Start the program, on the CPU whatever the machine has, so that figures compare."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *map(str, self.command)]
        env = os.environ | dict(OMP_NUM_THREADS=str(threads), CUDA_VISIBLE_DEVICES='')
        with self.log.open('w') as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)

    def check(self, status: int) -> None:
        """Raise SystemExit with the end of the output unless the program succeeded."""
        if status:
            end = self.log.read_text(errors='replace').splitlines(keepends=True)[-25:]
            raise SystemExit(
                f'{"".join(end)}\n{self.name} ended with status {status}. '
                f'The whole of its output is in {self.log}.'
            )


@contextmanager
def alone(path: Path):
    """Hold the lock of a file; waits, and says so, while another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f'Another demo works in {path.parent}. This one waits for its end.', flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_jobs(jobs: list[Job]) -> None:
    """Run all jobs at once, the cores divided among them.

    Raises:
        SystemExit: One failed; the others are stopped. Names the log and shows
            its end.
    """
    threads = max((os.cpu_count() or 1) // max(len(jobs), 1), 1)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    name = Column(max_width=34, no_wrap=True, overflow='ellipsis')
    texts = (
        TextColumn('{task.description:<28}', table_column=name),
        TextColumn('{task.fields[remark]}'),
    )
    running = []
    try:
        with Progress(texts[0], *columns, texts[1]) as bars:
            for job in jobs:
                bar = bars.add_task(job.name, total=job.total, remark='')
                running.append((job, job.start(threads), bar))
            while running:
                time.sleep(0.5)
                for entry in list(running):
                    job, process, bar = entry
                    step, remark = job.state()
                    bars.update(bar, completed=step, remark=remark)
                    if process.poll() is not None:
                        running.remove(entry)
                        job.check(process.returncode)
                        bars.update(bar, completed=job.total)
    finally:
        for _, process, _ in running:
            process.terminate()
        for _, process, _ in running:
            process.wait()
