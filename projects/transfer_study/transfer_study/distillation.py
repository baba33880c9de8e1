"""A network learns another one's features from images without labels.

Both see the same mixtures of images, and the student predicts the teacher's features, standardized
(Beyer et al., "Knowledge distillation: a good teacher is patient and consistent",
arXiv:2106.05237, with features in place of class probabilities).
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mmpeft.checkpoint.atomic import replacing

RATE, DECAY = 1e-3, 0.05
FIRST = 16  # batches that the teacher's features are standardized by
SMALLEST = 1e-3  # standard deviation that a feature is divided by


def mixed(images: Tensor, step: int) -> Tensor:
    """Each image of a batch (N, 3, H, W) mixed with another one, by a share of its own."""
    generator = torch.Generator().manual_seed(step)
    share = torch.rand(len(images), 1, 1, 1, generator=generator)
    return torch.lerp(images.flip(0), images, share)


def distil(
    student: nn.Module,
    teacher: nn.Module,
    images: Dataset,
    out: Path,
    batch: int = 64,
    save_every: float = 300.0,
    workers: int = 1,
) -> list[float]:
    """Train a student, and write its state when it is done.

    A run that was stopped goes on where it last saved, as if it had not been stopped.

    Args:
        student: Maps (N, 3, H, W) to features (N, ``num_features``), from which a linear head
            predicts the teacher's.
        teacher: Maps them to features (N, C).
        images: Prepared images (3, H, W), each seen once; their number decides the steps.
        out: The student's state, without the head. What a run goes on from lies beside it.
        batch: Images a step.
        save_every: Seconds.
        workers: Processes that make images.

    Returns:
        Each step's loss: the mean squared error of standardized features, 1 for their mean.

    Raises:
        SystemExit: The saved run is one of other steps or batches.
    """
    steps = len(images) // batch
    setting = dict(steps=steps, batch=batch)
    part = out.with_suffix('.part.pth')
    saved = torch.load(part, weights_only=True) if part.exists() else dict(setting=setting)
    if saved['setting'] != setting:
        raise SystemExit(f'{part} is of a run with {saved["setting"]}. Remove it or go on so.')
    mean, std = saved.get('statistics') or statistics(teacher, images, batch, workers)
    net = nn.Sequential(student, nn.Linear(student.num_features, len(mean))).train()
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    parts = dict(net=net, optimizer=optimizer, schedule=schedule)
    losses = saved.get('losses', [])
    if losses:
        for name, item in parts.items():
            item.load_state_dict(saved[name])

    def save() -> None:
        state = {name: item.state_dict() for name, item in parts.items()}
        state |= dict(setting=setting, statistics=(mean, std), losses=losses)
        with replacing(part) as temporary:
            torch.save(state, temporary)

    start, first, saved_at = time.monotonic(), len(losses), time.monotonic()
    order = range(first * batch, steps * batch)
    for maps in DataLoader(images, batch, sampler=order, num_workers=workers):
        maps = mixed(maps, len(losses))
        with torch.no_grad():
            expected = (teacher(maps) - mean) / std
        loss = F.mse_loss(net(maps), expected)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if time.monotonic() - saved_at >= save_every:
            save()
            saved_at = time.monotonic()
        if len(losses) % 50 == 0:
            pace = (time.monotonic() - start) / (len(losses) - first)
            recent = math.fsum(losses[-50:]) / 50
            left = f'{pace * (steps - len(losses)) / 60:.0f} minutes left'
            print(f'step {len(losses)} of {steps}, loss {recent:.4f}, {left}', flush=True)
    with replacing(out) as temporary:
        torch.save(student.state_dict(), temporary)
    part.unlink(missing_ok=True)
    return losses


@torch.no_grad()
def statistics(
    teacher: nn.Module, images: Dataset, batch: int, workers: int
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of the teacher's features over the first batches."""
    numbers = range(min(FIRST * batch, len(images)))
    loader = DataLoader(images, batch, sampler=numbers, num_workers=workers)
    features = torch.cat([teacher(mixed(maps, step)) for step, maps in enumerate(loader)])
    return features.mean(0), features.std(0).clamp_min(SMALLEST)
