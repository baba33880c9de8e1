"""Figures from the rounds of a workload, and those that are to be reached."""

from dataclasses import dataclass

from rounds import ratios, spread, totals

FLOOR = 'floor'
PHASES = dict(
    forward=('forward',),
    backward=('backward',),
    step=('forward', 'backward'),
    with_optimizer=('forward', 'backward', 'optimizer'),
)


def summarize(workload: dict) -> None:
    """Add medians and ratios to the floor to all entries of a workload, in place."""
    floor = workload['entries'][FLOOR]['rounds']
    for entry in workload['entries'].values():
        rounds = entry['rounds']
        entry['seconds'] = {k: spread(totals(rounds, v)) for k, v in PHASES.items()}
        entry['ratios'] = {k: spread(ratios(rounds, floor, v)) for k, v in PHASES.items()}


@dataclass(frozen=True)
class Goal:
    """A ratio between two variants of a workload and the most that it may be.

    Attributes:
        text: What is compared.
        of: Entry such as ``flora@16``; without a rank, at the rank in question.
        to: Likewise.
        most: To reach.
        measure: ``'step'``, or ``'saved'`` for the bytes saved beyond the
            floor's.
        start: Only workloads whose name starts with this.
        device: Only there.
    """

    text: str
    of: str
    to: str
    most: float
    measure: str = 'step'
    start: str = ''
    device: str = ''

    def is_meant(self, workload: dict) -> bool:
        """Whether it holds for a workload, on the device that this was measured on."""
        return workload['name'].startswith(self.start) and self.device in ('', workload['device'])

    def measured(self, workload: dict, rank: int | None) -> float | None:
        """The figure; None where one of the two was not measured."""
        entries = workload['entries']
        of, to, floor = (entry_of(entries, name, rank) for name in (self.of, self.to, FLOOR))
        if of is None or to is None or floor is None:
            return None
        if self.measure == 'saved':
            extra = to['saved'] - floor['saved']
            return (of['saved'] - floor['saved']) / extra if extra > 0 else None
        found = spread(ratios(of['rounds'], to['rounds'], PHASES[self.measure]))
        return found and found['median']


GOALS = (
    Goal('FLoRA over the floor', 'flora', FLOOR, 1.12, start='convnext', device='cpu'),
    Goal('FLoRA over the floor', 'flora', FLOOR, 1.20, start='resnet', device='cpu'),
    Goal('FLoRA over the floor', 'flora', FLOOR, 1.08, device='cuda'),
    Goal("FLoRA on all layers against peft's LoRA on matrices", 'flora', 'peft_lora', 1.0),
    Goal('LoRA over the floor', 'lora', FLOOR, 1.12),
    Goal('DoRA over the floor', 'dora', FLOOR, 1.30),
    Goal('LieRA against full fine-tuning', 'liera', 'full', 0.80),
    Goal('LieRA, exact against first order', 'liera_exact', 'liera', 1.05),
    Goal('FLoRA, rank 128 against rank 8', 'flora@128', 'flora@8', 1.10),
    Goal(
        "FLoRA on matrices, bytes saved beyond the floor against peft's LoRA",
        'flora_linear',
        'peft_lora',
        0.8,
        measure='saved',
    ),
    Goal('LoRA on matrices, likewise', 'lora_linear', 'peft_lora', 0.8, measure='saved'),
)


def entry_of(entries: dict, name: str, rank: int | None) -> dict | None:
    """The entry of a variant, at a rank if it has one."""
    return entries.get(name) or entries.get(f'{name}@{rank}')


def goals_of(workloads: dict) -> list[dict]:
    """The goals that there are figures for, on the workloads that have a name."""
    found = []
    for name, workload in workloads.items():
        for goal in GOALS:
            if ':' in name or not goal.is_meant(workload):
                continue
            for rank in [None] if '@' in goal.of else workload['ranks']:
                value = goal.measured(workload, rank)
                if value is not None:
                    found.append(
                        dict(
                            text=goal.text,
                            workload=name,
                            rank=rank,
                            measured=value,
                            most=goal.most,
                            reached=value <= goal.most,
                        )
                    )
    return found
