"""All variants of a workload, made ready one by one and then stepped in turn."""

import gc
import time
from functools import partial

import torch
from figures import summarize
from records import Record
from rounds import in_turn, median_of
from terminal import progress
from trial import Trial
from variants import FLOOR, Variant
from workloads import Workload

from mmpeft.errors import UsageError

EXPECTED = UsageError, torch.OutOfMemoryError
AMP = dict(none=None, bfloat16=torch.bfloat16, float16=torch.float16)


def measure_workload(workload: Workload, compared: list[Variant], args, record: Record) -> None:
    """Measure variants on a workload; the record is written after every step of each.

    Args:
        workload: What to train.
        compared: The floor first.
        args: Of the command line.
        record: Gets the results under ``workloads``.
    """
    release_memory(args.device)
    entries = [(v, r) for v in compared for r in (args.ranks if v.is_ranked else [None])]
    with progress(workload.name, len(entries) * (args.rounds + 1)) as advance:
        advance('building', 0)
        network = workload.build(args.device, args.seed)
        result = dict(
            name=workload.name,
            text=workload.text,
            parameters=sum(p.numel() for p in network.parameters()),
            device=args.device,
            ranks=args.ranks,
            entries={},
            left_out={},
            failed=[],
        )
        record.data['workloads'][workload.name] = result
        steps = {}
        for variant, rank in entries:
            name = variant.name if rank is None else f'{variant.name}@{rank}'
            advance(f'{name}, warming up', 0)
            try:
                trial, result['entries'][name] = prepare(variant, rank, workload, network, args)
            except Exception as error:
                result['left_out'][name] = reason(error)
                # That a peer cannot train a network is a result as well.
                if not isinstance(error, EXPECTED) and not variant.needs:
                    result['failed'].append(f'{name} on {workload.name}')
                advance(name, args.rounds + 1)
                continue
            steps[name] = partial(median_of, trial.step, args.steps)
            record.save()
            advance(name, 1)
        if FLOOR not in steps:
            return
        for name, phases in in_turn(steps, args.rounds):
            result['entries'][name]['rounds'].append(phases)
            summarize(result)
            record.save()
            advance(name, 1)


def release_memory(device):
    """Give back what the workload before has left; some peers hold themselves in cycles."""
    gc.collect()
    if device != 'cpu':
        torch.cuda.empty_cache()


def prepare(variant: Variant, rank, workload: Workload, network, args) -> tuple[Trial, dict]:
    """A variant's trial, warmed up, and its entry.

    Raises:
        UsageError: It is not installed, or has nothing to adapt here.
    """
    if not variant.is_available:
        raise UsageError(f'{variant.needs} is not installed')
    begin = time.perf_counter()
    trial = Trial.of(
        variant,
        workload,
        network,
        rank,
        args.device,
        amp=AMP[args.amp],
        optimizes=args.optimizer == 'adamw',
    )
    seconds = time.perf_counter() - begin
    entry = dict(variant=variant.name, rank=rank, text=variant.text, building=seconds)
    return trial, entry | trial.survey() | dict(rounds=[])


def reason(error: Exception) -> str:
    """Why a variant was left out, in a line."""
    first = str(error).partition('\n')[0].rstrip('.')
    return first if isinstance(error, EXPECTED) else f'{type(error).__name__}: {first}'
