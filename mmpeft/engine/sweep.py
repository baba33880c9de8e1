"""Several methods on one config, with several seeds: trained one after another, and compared."""

import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mmpeft.errors import UsageError
from mmpeft.registry import METHODS

from .building import adapt, build_model
from .config import compose, find_hook
from .method_argument import method_name, methods_in

SCORES = ('coco/bbox_mAP', 'coco/segm_mAP', 'mIoU', 'dota/mAP', 'accuracy/top1')


@dataclass(frozen=True)
class Run:
    """One training by ``tools/train.py``; its files lie in ``folder``.

    Attributes:
        config: As on the command line.
        method: As for ``--method``.
        seed: Of heads, adapters and batches.
        options: Further ``--cfg-options``, as words.
        budget: Adapter parameters of a method that a rank governs.
        parent: Folder of the sweep.
    """

    config: str
    method: str
    seed: int
    options: tuple[str, ...]
    budget: str | None
    parent: Path

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return self.parent / method_name(self.method) / f'seed{self.seed}'

    @cached_property
    def overrides(self) -> list[str]:
        """All of its ``--cfg-options``."""
        hook = find_hook(compose(self.config, self.method))
        kinds = [METHODS.get(each['type']) for each in methods_in(hook)]
        words = [*self.options, f'randomness.seed={self.seed}']
        if self.budget is not None and all(hasattr(kind, 'budget') for kind in kinds):
            words.append(f'default_hooks.peft.method.budget={self.budget}')
        return words

    def result(self) -> dict:
        """What :meth:`train` recorded; empty if it has not ended, or had other arguments."""
        record = self.folder / 'result.json'
        known = json.loads(record.read_text()) if record.is_file() else {}
        return known if known.get('arguments') == self._arguments() else {}

    def train(self, tool: Path) -> None:
        """Train, and record the scores of the last evaluation, or how it failed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / 'result.json').unlink(missing_ok=True)
        command = [sys.executable, tool, self.config, '--method', self.method]
        command += ['--work-dir', self.folder, '--cfg-options', *self.overrides]
        log, start = self.folder / 'train.log', time.time()
        with log.open('w') as file:
            words = list(map(str, command))
            code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT).returncode
        result = dict(arguments=self._arguments(), seconds=time.time() - start)
        scores = {} if code else self._scores(start)
        if scores:
            result['scores'] = scores
        else:
            last = log.read_text().strip().splitlines() or ['no output']
            result['failure'] = f'status {code}: {last[-1]}'
        (self.folder / 'result.json').write_text(json.dumps(result, indent=2))

    def _arguments(self):
        return [self.config, self.method, *self.overrides]

    def _scores(self, since):
        files = [
            p for p in self.folder.glob('*/vis_data/scalars.json') if p.stat().st_mtime > since
        ]
        lines = [json.loads(line) for p in sorted(files) for line in p.read_text().splitlines()]
        evaluations = [line for line in lines if 'loss' not in line]
        last = evaluations[-1] if evaluations else {}
        known = {name: last[name] for name in SCORES if name in last}
        return known or {k: v for k, v in last.items() if k not in ('data_time', 'time', 'step')}


def compare(runs: Sequence[Run]) -> list[dict]:
    """The runs of each method in one row: parameters, and scores as mean and deviation.

    Returns:
        The best first by its first score; methods without a finished run last.
    """
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == method]
        results = [run.result() for run in own]
        done = [result for result in results if 'scores' in result]
        scores = {
            name: [result['scores'][name] for result in done]
            for name in (done[0]['scores'] if done else ())
        }
        row = dict(
            method=method,
            parameters=_parameters(own[0]),
            runs=len(done),
            seconds=statistics.median(r['seconds'] for r in done) if done else None,
            scores={name: (statistics.mean(v), _deviation(v)) for name, v in scores.items()},
            failures=sorted({r['failure'] for r in results if 'failure' in r}),
        )
        rows.append(row)
    best = {row['method']: next(iter(row['scores'].values()), (-1.0,))[0] for row in rows}
    return sorted(rows, key=lambda row: -best[row['method']])


def markdown(rows: Sequence[dict]) -> str:
    """The rows of :func:`compare` as a table; failures below it."""
    names = next((list(row['scores']) for row in rows if row['scores']), [])
    lines = [['method', 'parameters', *names, 'runs', 'seconds']]
    lines.append(['---', *['---:'] * (len(lines[0]) - 1)])
    for row in rows:
        scores = [
            f'{mean:.3f}' + (f' ± {deviation:.3f}' if deviation is not None else '')
            for mean, deviation in (row['scores'].get(name, (float('nan'), None)) for name in names)
        ]
        seconds = '' if row['seconds'] is None else f'{row["seconds"]:.0f}'
        size = '' if row['parameters'] is None else f'{row["parameters"]:,}'
        lines.append([row['method'], size, *scores, str(row['runs']), seconds])
    text = '\n'.join(f'| {" | ".join(line)} |' for line in lines) + '\n'
    for row in rows:
        text += ''.join(f'\n{row["method"]} failed: {failure}\n' for failure in row['failures'])
    return text


def _parameters(run):
    """What trains in the target module; None where the method does not fit."""
    options = dict(word.split('=', 1) for word in run.overrides if '.budget=' in word)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            cfg = compose(run.config, run.method, options)
            summary = adapt(build_model(cfg, meta=True), cfg)
        except UsageError:
            return None
    return summary.adapters + summary.unfrozen


def _deviation(values):
    return statistics.stdev(values) if len(values) > 1 else None
