"""Results of a run: a JSON line that says where it ran, then one for each variant.

Lines of several runs may stand in one file. A line of a variant holds the
seconds of every step by phase, so that tables and plots are made from it.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import mmpeft
from mmpeft.errors import MissingFileError, UsageError

FLOOR = 'floor'
PHASES = ('forward', 'backward', 'optimizer')
STEP = PHASES[:2]
MEASURES = dict(step='step', saved='saved for backward')
PACKAGES = ('torch', 'timm', 'peft', 'lycoris-lora')


@dataclass
class Result:
    """What was measured of a variant on a workload.

    Attributes:
        workload: Its name.
        text: What the workload is.
        parameters: Of its network.
        variant: Its name.
        rank: None where a rank means nothing.
        trained: Parameters that train.
        saved: Bytes that autograd keeps for backward; None in evaluation and compiled.
        operations: Of forward and backward, 2 a multiply-add; likewise.
        peak: Bytes of memory at most, on a GPU.
        rounds: Seconds of each phase in each round.
        skipped: Why it was not measured.
    """

    workload: str
    text: str
    parameters: int
    variant: str
    rank: int | None = None
    trained: int = 0
    saved: int | None = None
    operations: int | None = None
    peak: int | None = None
    rounds: dict[str, list[float]] = field(default_factory=dict)
    skipped: str = ''

    @property
    def name(self) -> str:
        """Variant and rank."""
        return self.variant if self.rank is None else f'{self.variant}@{self.rank}'

    def seconds(self, phases: Iterable[str] = STEP) -> list[float]:
        """The sum over some phases in each round."""
        measured = [self.rounds[phase] for phase in phases if phase in self.rounds]
        return [sum(values) for values in zip(*measured, strict=True)]

    def ratios(self, base: 'Result', phases: Iterable[str] = STEP) -> list[float]:
        """Seconds over those of another variant, round by round, since those of a round are near.

        Rounds that one of the two lacks are left out, and so are times of zero.
        """
        pairs = zip(self.seconds(phases), base.seconds(phases), strict=False)
        return [own / other for own, other in pairs if other > 0]

    def over(self, floor: 'Result', measure: str) -> float:
        """The median step, or the saved bytes, over the floor's; one of :data:`MEASURES`."""
        return median(self.ratios(floor)) if measure == 'step' else self.saved / floor.saved


@dataclass
class Run:
    """Results with what they were measured on.

    Attributes:
        mode: ``'train'``, ``'evaluate'`` or ``'memory'``.
        where: Machine, versions and settings.
        results: In the order of measuring.
    """

    mode: str
    where: dict
    results: list[Result] = field(default_factory=list)

    def lines(self) -> str:
        """The run as lines of JSON."""
        head = dict(mode=self.mode, **self.where)
        return ''.join(json.dumps(line) + '\n' for line in (head, *map(asdict, self.results)))

    def save(self, path: Path) -> None:
        """Write the file anew; it is whole at any time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix('.draft')
        draft.write_text(self.lines())
        os.replace(draft, path)

    def machine(self) -> str:
        """What it was measured on."""
        where = self.where
        threads = f', {where["threads"]} threads' if where['kind'] == 'cpu' else ''
        dtype = 'without autocast' if where['amp'] == 'none' else f'{where["amp"]} autocast'
        versions = ', '.join(f'{name} {where[name]}' for name in PACKAGES if name in where)
        return f'{where["device"]}{threads}, {dtype}; {versions}'

    def time(self) -> str:
        """When it was measured, and how busy the machine was."""
        load = self.where.get('load')
        return self.where['date'] + ('' if load is None else f' (load {load:.1f})')


def read(path: Path) -> list[Run]:
    """The runs in a file that measure.py wrote.

    Raises:
        MissingFileError: There is no such file.
        UsageError: It holds something else.
    """
    if not path.is_file():
        raise MissingFileError(f'There is no file {str(path)!r}.')
    runs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            data = json.loads(line)
            if 'mode' in data:
                runs.append(Run(data.pop('mode'), data))
            else:
                runs[-1].results.append(Result(**data))
        except (ValueError, TypeError, IndexError) as error:
            raise UsageError(
                f'Line {number} of {str(path)!r} was not written by measure.py: {error}'
            ) from error
    return runs


def by_workload(runs: Iterable[Run], mode: str = 'train') -> dict[str, dict[str, Result]]:
    """Results by workload and by name with rank; of equal workloads those of the last run.

    Workloads whose floor was not measured are left out.
    """
    found = {}
    for run in runs:
        if run.mode == mode:
            for name in {result.workload: None for result in run.results}:
                found[name] = {r.name: r for r in run.results if r.workload == name}
    return {n: results for n, results in found.items() if results[FLOOR].rounds}


def environment(device: str) -> dict:
    """What a run is measured on, and how busy it is."""
    versions = {name: _version(name) for name in PACKAGES}
    return dict(
        date=time.strftime('%Y-%m-%d %H:%M'),
        device=torch.cuda.get_device_name() if device != 'cpu' else _processor(),
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
        load=os.getloadavg()[0] if hasattr(os, 'getloadavg') else None,
        python=platform.python_version(),
        mmpeft=mmpeft.__version__,
        **{name: version for name, version in versions.items() if version},
        kind=device,
    )


def median(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return statistics.median(values) if values else None


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method='inclusive')
    return low, high


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor():
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.machine()
