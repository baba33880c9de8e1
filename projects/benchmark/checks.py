"""What tools/gpu_check.py does: the parts, and the one file that holds what they found."""

import argparse
import json
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import measure
import torch
import variants
import workloads
from agreement import SETTINGS, Reference, compare, methods
from records import Result, Run, environment, median
from report import tables
from rich.console import Console
from rich.progress import Progress

from mmpeft.checkpoint.atomic import replacing
from mmpeft.errors import UsageError

CHOICE = 'flora', 'lora', 'liera', 'dora', 'ia3'
WAYS = 'plain', 'merged', 'branch', 'composed'
CHOICES = tuple(
    name
    for method in CHOICE
    for name in (method, *(f'{method}_{way}' for way in WAYS))
    if name in variants.VARIANTS
)
TRAINED = ('frozen', 'full', 'flora', 'lora', 'dora', 'liera', 'flora_plain', 'lora_plain')
TRAINED += (
    'liera_plain',
    'flora_composed',
    'lora_composed',
    'published_flora',
    'peft_lora',
    'peft_dora',
)
COMPILED = ('lora', 'flora', 'liera', 'lora_plain', 'flora_plain', 'liera_plain', 'dora', 'full')
COMPILED = tuple(f'{name}_compiled' for name in ('floor', *COMPILED))
NETWORKS = 'convnextv2_large-1024', 'internvit_3200', 'vit_large-224', 'resnet50-1333'
TINY = dict(depth=2, width=64, heads=2, hidden=128, image_size=28)
# Networks, a whole InternViT, single layers, and the variants of the three.
LARGE = (
    *(NETWORKS, ('6b', '6b', 448), workloads.of_layers(1024, workloads.TOKENS, 64)),
    *(('flora', 'lora'), TRAINED, CHOICES, COMPILED),
)
SMALL = (
    *(('convnextv2_atto:32x32:1',), ('tiny', TINY, 28), workloads.of_layers(64, 20, 8)[:1]),
    *(('flora',), ('full', 'flora', 'published_flora'), ('flora', 'flora_plain', 'flora_branch')),
    ('lora_compiled',),
)
# By how much a choice may be slower before it is a wrong one: less is noise.
MARGIN = 1.05


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: As ``--parts`` takes it.
        seconds: What it is expected to take on an H100.
        run: Fills a dict with what it finds, until a time of ``time.monotonic``.
    """

    name: str
    seconds: float
    run: Callable[[dict, float], None]


class Record:
    """What the parts found: a JSON file, whole at any time.

    Args:
        path: Of the file, which may exist.
        where: Machine, versions and settings.

    Raises:
        UsageError: The file is of another machine, version or setting, or no record.
    """

    def __init__(self, path: Path, where: dict):
        self.path, self.where, self.parts = path, where, {}
        if not path.exists():
            return
        try:
            known = json.loads(path.read_text())
            before, self.parts = known['where'], known['parts']
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f'--out: {str(path)!r} was not written by gpu_check.py. Name another file.'
            ) from error
        for key in ('device', 'kind', 'quick', 'torch', 'mmpeft'):
            if before.get(key) != where[key]:
                raise UsageError(
                    f'--out: {str(path)!r} is a record with {key}={before.get(key)!r}, and here it '
                    f'is {where[key]!r}. Name another file.'
                )

    def is_complete(self, name: str) -> bool:
        """Whether a part ran to its end."""
        found = self.parts.get(name, dict(error='it has not run'))
        return not found['error'] and not found['left_out']

    def save(self) -> None:
        """Replace the file."""
        with replacing(self.path) as path:
            path.write_text(json.dumps(dict(where=self.where, parts=self.parts), indent=1))


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that have no result yet.

    Args:
        arguments: Of the command line; see ``--help``.

    Returns:
        How many of the parts that were asked for found a fault of mmpeft, or broke off.
    """
    args = parse_args(arguments)
    torch.set_num_threads(1)  # many tiny references; the device does the rest
    where = environment(args.device) | dict(quick=args.quick)
    all_parts = parts_of(args.device, args.quick)
    chosen = [part for part in all_parts if part.name.startswith(tuple(args.parts))]
    if not chosen:
        names = ', '.join(part.name for part in all_parts)
        raise UsageError(f'--parts: none begins with {" or ".join(args.parts)}. There are {names}.')
    record, say = Record(args.out, where), Console(stderr=True).print
    for part in chosen:
        if args.again:
            record.parts.pop(part.name, None)
    waiting = [part for part in chosen if not record.is_complete(part.name)]
    end = time.monotonic() + 60 * args.minutes
    say(f'{where["device"]}: {len(waiting)} of {len(chosen)} parts to run, into {args.out}.')
    if args.device == 'cuda':
        expected = sum(part.seconds for part in waiting) / 60
        say(f'About {expected:.1f} minutes on an H100; {args.minutes:g} are allowed.')
    for index, part in enumerate(waiting, 1):
        run_part(part, record, end, args.device, say, f'[{index}/{len(waiting)}]')
    return summary(record, [part.name for part in chosen], args.device)


def parse_args(arguments=None) -> Namespace:
    parser = argparse.ArgumentParser(
        prog='gpu_check.py',
        description='Check mmpeft on a GPU: one command, one JSON file. '
        'Parts that have a result are skipped, so that a second call does what the first left out.',
    )
    add = parser.add_argument
    add('--device', choices=['cuda', 'cpu'], default='cuda')
    add('--quick', action='store_true', help='all parts, small: shows that the check itself runs')
    add('--minutes', type=float, default=9, help='after which no part starts (default 9)')
    add('--parts', nargs='+', default=[''], metavar='NAME', help='those whose names begin so')
    add('--again', action='store_true', help='run parts that have a result, too')
    add('--out', type=Path, default=Path('work_dirs/gpu_check.json'), metavar='FILE')
    args = parser.parse_args(arguments)
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UsageError('--device cuda: torch sees no GPU here. --device cpu --quick needs none.')
    return args


def parts_of(device: str, quick: bool) -> list[Part]:
    """All parts, in the order of running."""
    reference = Reference()
    agree = partial(agreement, reference, device, quick)
    seconds = dict(float32=40, bfloat16=40, float16=40, compiled=60)
    parts = [Part(f'agreement-{n}', seconds.get(n, 20), partial(agree, n)) for n in SETTINGS]
    train = partial(measured, device, quick)
    names, whole, layers, few, trained, choices, compiled = SMALL if quick else LARGE
    for network in map(workloads.find, names):
        parts.append(Part(f'train-{network.name}', 35, partial(train, (network,), trained)))
    for network in map(workloads.find, names):
        run = partial(train, (network,), compiled)
        parts.append(Part(f'compiled-{network.name}', 120, run))
    for dtype in ('bfloat16', 'int8', 'nf4'):
        network = workloads.of_whole_intern_vit(*whole, dtype)
        run = partial(train, (network,), few, rounds=10, steps=1)
        parts.append(Part(f'train-{network.name}', 35, run))
    for amp in ('bfloat16', 'none'):
        name = 'autocast' if amp == 'bfloat16' else 'float32'
        parts.append(Part(f'choice-{name}', 25, partial(train, layers, choices, amp=amp)))
    return parts


def run_part(part: Part, record: Record, end: float, device: str, say, number: str) -> None:
    """Run a part that fits into the time left, or note that it does not."""
    begin = time.monotonic()
    fits = end - begin > (part.seconds if device == 'cuda' else 0)
    found = record.parts.setdefault(part.name, {})
    found |= dict(error='', left_out=[] if fits else ['all of it: no time was left'])
    found['date'] = time.strftime('%Y-%m-%d %H:%M')
    if fits:
        expected = f' about {part.seconds:.0f} s on an H100' if device == 'cuda' else ''
        say(f'{number} {part.name}:{expected} ...', highlight=False)
        try:
            part.run(found, min(end, begin + part.seconds) if device == 'cuda' else end)
        except KeyboardInterrupt:
            found['error'] = 'interrupted'
            raise
        except Exception as error:  # the other parts run nevertheless
            found['error'] = text_of(error)
        finally:
            found['seconds'] = round(time.monotonic() - begin, 1)
            record.save()
    else:
        record.save()
    say(f'{number} {part.name}: {verdict(found)}', highlight=False)


def agreement(
    reference: Reference, device: str, quick: bool, name: str, found: dict, until: float
) -> None:
    """Compare all methods and kinds in one of :data:`agreement.SETTINGS`."""
    setting = SETTINGS[name]
    chosen, kinds = methods(), setting.kinds
    if quick:
        chosen = chosen[:3]
        kinds = ['linear'] if setting.compiled else ['linear', 'conv', 'vit']
        kinds = [kind for kind in kinds if kind in setting.kinds]
    cases = [(method, kind) for method in chosen for kind in kinds]
    found['tolerances'] = allowed = {kind: setting.tolerance(kind) for kind in kinds}
    differences = found.setdefault('differences', {})
    without_place = found.setdefault('without_place', [])
    found['failed'] = failed = found.get('failed', [])
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for method, kind in bar.track(cases, description=f'agreement-{name}'):
            case = f'{method} on {kind}'
            if case in differences or case in without_place:
                continue
            if time.monotonic() > until:
                found['left_out'].append(case)
                continue
            try:
                pair = reference(method, kind, setting.dtype)
                if pair is None:
                    without_place.append(case)
                    continue
                difference, tensor = compare(*pair, kind, setting, device)
            except Exception as error:
                difference, tensor = None, text_of(error)
            differences[case] = difference
            if difference is None or not difference <= allowed[kind]:
                failed.append(f'{case}: {difference} in {tensor}')
    if not differences:
        raise RuntimeError('nothing was compared')


def measured(
    device: str,
    quick: bool,
    networks: tuple,
    names: tuple[str, ...],
    found: dict,
    until: float,
    amp: str = 'bfloat16',
    rounds: int = 5,
    steps: int = 3,
) -> None:
    """Measure variants on workloads as measure.py does, and look for wrong choices of ``auto``."""
    args = Namespace(device=device, seed=0, variants=names, ranks=[16], evaluate=False)
    args.amp, args.rounds, args.steps, args.out = amp, rounds, steps, None
    if quick:
        args.rounds = args.steps = 1
    done = Unsaved('train', environment(device) | dict(amp=amp, seed=0))
    found['failed'] = []
    for index, network in enumerate(networks):
        if time.monotonic() > until:
            found['left_out'] += [other.name for other in networks[index:]]
            break
        found['failed'] += measure.measure(network, args, done)
    found |= dict(where=done.where, results=[asdict(result) for result in done.results])
    found['losses'] = losses(done.results)
    if not any(result.rounds for result in done.results):
        raise RuntimeError(f'nothing was measured: {done.results[0].skipped}')


class Unsaved(Run):
    """A run whose results the record takes when it has ended."""

    def save(self, path: None) -> None:
        """Nothing to write yet."""


def losses(results: list[Result]) -> list[str]:
    """Where ``auto`` was slower in every round than another way, and by more than noise."""
    found, measured = [], {(r.workload, r.variant): r for r in results if r.rounds}
    for (workload, variant), result in measured.items():
        for way in WAYS:
            other = measured.get((workload, f'{variant}_{way}'))
            ratios = result.ratios(other) if other else []
            if len(ratios) > 1 and median(ratios) > MARGIN and min(ratios) > 1:
                found.append(f'{variant} on {workload}: {median(ratios):.2f} of {way}')
    return found


def verdict(found: dict) -> str:
    """A part's result in a line."""
    texts = [found['error']] if found['error'] else []
    shares = [
        d / found['tolerances'][case.rpartition(' ')[2]]
        for case, d in found.get('differences', {}).items()
        if d is not None
    ]
    if shares:
        texts.append(f'{len(shares)} compared, at most {max(shares):.2f} of the tolerance')
    if 'results' in found:
        texts.append(f'{sum(bool(r["rounds"]) for r in found["results"])} measured')
    for key, text in (
        ('failed', 'failed'),
        ('losses', "'auto' loses"),
        ('left_out', 'left out'),
    ):
        if found.get(key):
            first = '; '.join(found[key][:3])
            texts.append(f'{len(found[key])} {text} ({first}{"; ..." * (len(found[key]) > 3)})')
    return ', '.join(texts) + '.'


def summary(record: Record, names: list[str], device: str) -> int:
    """Print tables, what was left out and what failed; returns the number of faulty parts."""
    found = {name: record.parts[name] for name in names}
    runs = [
        Run('train', part['where'], [Result(**result) for result in part['results']])
        for part in found.values()
        if 'results' in part
    ]
    if runs:
        print(tables(runs), end='\n\n')
    for name, part in found.items():
        print(f'{name}: {verdict(part)}')
    open_parts = [name for name in names if not record.is_complete(name)]
    if open_parts:
        print(f'\nNot complete: {", ".join(open_parts)}. The same command goes on with them.')
    print(f'\n{record.path}')
    return sum(bool(part['error'] or part.get('failed')) for part in found.values())


def text_of(error: Exception) -> str:
    """Kind and first line of an error."""
    first = str(error).partition('\n')[0].rstrip('.')
    return f'{type(error).__name__}: {first}'
