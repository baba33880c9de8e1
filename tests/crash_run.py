"""Kill a run at random moments while it saves, again and again: ``crash_run.py FOLDER KILLS SEED``.

A child process trains and saves a checkpoint at each iteration, resuming where
the one before it was killed (SIGKILL). What lies on the disk is looked at after
each kill. In the end the run goes on undisturbed to its next iteration, and is
compared with one that was never killed. Prints figures as JSON.
"""

import hashlib
import json
import mmap
import os
import signal
import struct
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from mmpeft.checkpoint.adapter_file import read_adapter
from mmpeft.checkpoint.safe_load import read_checkpoint
from tests.toy import by_iterations, toy_runner

SAVING, SAVED, RESUMED, NANOSECONDS = range(4)


class Shared:
    """Numbers that a child leaves behind when it is killed."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 32)

    def __getitem__(self, index):
        return struct.unpack_from('q', self.memory, 8 * index)[0]

    def __setitem__(self, index, value):
        struct.pack_into('q', self.memory, 8 * index, value)


def make_runner(folder, stop, interval=1, **changes):
    iterations = by_iterations(stop, interval)
    iterations['param_scheduler'] = [
        dict(type='LinearLR', start_factor=0.1, end=50, by_epoch=False)
    ]
    iterations['default_hooks.checkpoint'].update(max_keep_ckpts=2)
    return toy_runner(folder, dict(type='FLoRA', rank=2), **iterations, **changes)


def train_until_killed(folder, number, shared):
    runner = make_runner(folder, 10**6, resume=True, experiment_name=f'child{number}')
    save, load = runner.save_checkpoint, runner.load_or_resume

    def saving(*args, **kwargs):
        shared[SAVING], start = 1, time.perf_counter_ns()
        save(*args, **kwargs)
        shared[NANOSECONDS] = time.perf_counter_ns() - start
        shared[SAVED], shared[SAVING] = runner.iter + 1, 0

    def loading():
        load()
        shared[RESUMED] = runner.iter

    runner.save_checkpoint, runner.load_or_resume = saving, loading
    runner.train()


def kill_once(folder, number, shared, random):
    """Start a child, and kill it after its first checkpoint, mostly while it saves the next."""
    first = shared[SAVED]
    shared[SAVING] = shared[RESUMED] = 0
    child = os.fork()
    if not child:
        try:
            train_until_killed(folder, number, shared)
        finally:
            os._exit(1)

    def wait(condition):
        while not condition():
            finished, status = os.waitpid(child, os.WNOHANG)
            assert not finished, f'the child ended by itself: {status}'
            time.sleep(0.0002)

    wait(lambda: shared[SAVED] > first)
    if random.random() < 0.8:
        wait(lambda: shared[SAVING])
    time.sleep(random.uniform(0, 1.2e-9 * shared[NANOSECONDS]))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert shared[RESUMED] >= first, 'what had been saved was lost'


def check_files(folder):
    """All that has a final name is whole; returns the names of checkpoints."""
    checkpoints = sorted(folder.glob('*.pth'))
    for path in checkpoints:
        assert {'optimizer', 'message_hub', 'state_dict'} <= read_checkpoint(path).keys()
        assert path.with_suffix('.safetensors').is_file(), f'{path} has no adapter file'
    for path in folder.glob('*.safetensors'):
        read_adapter(path)
    for path in folder.glob('*.json'):
        described = json.loads(path.read_text())
        content = (folder / described['file']).read_bytes()
        assert described['sha256'] == hashlib.sha256(content).hexdigest(), path
    return [path.name for path in checkpoints]


def main(folder, kills, seed):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    folder, random, shared = Path(folder), np.random.default_rng(int(seed)), Shared()
    make_runner(folder / 'warm', 2, experiment_name='warm').train()
    run = folder / 'run'
    hits, temporary, most = 0, 0, 0
    for number in range(int(kills)):
        kill_once(run, number, shared, random)
        hits += shared[SAVING]
        temporary += any(path.name.endswith('.tmp') for path in run.iterdir())
        most = max(most, len(check_files(run)))
    last = shared[SAVED] + 5
    make_runner(run, last, resume=True, experiment_name='last').train()
    make_runner(folder / 'through', last, last, experiment_name='through').train()
    check_files(run)
    states = [read_checkpoint(folder / f'{name}/iter_{last}.pth') for name in ('run', 'through')]
    a, b = (state['state_dict'] for state in states)
    figures = dict(
        kills=int(kills),
        in_a_save=hits,
        left_temporary_files=temporary,
        iterations=last,
        most_checkpoints=most,
        temporary_at_the_end=sum(path.name.endswith('.tmp') for path in run.iterdir()),
        equals_a_run_that_was_never_killed=all(torch.equal(a[key], b[key]) for key in b),
    )
    print(json.dumps(figures))


if __name__ == '__main__':
    main(*sys.argv[1:])
