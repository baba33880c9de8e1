"""One trial of classification: a backbone, a method, a rate and a scale, trained and scored.

The head is converged on the frozen features first, then head and adapters train together.
BatchNorm keeps its pretrained statistics in every method, full fine-tuning included.
"""

import copy
import math
import time

import material
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmpeft
from mmpeft.methods.ranked import Ranked

from .backbones import BACKBONES
from .methods import MEASURED, METHODS
from .stamps import stamps
from .trial import Trial

BATCH, EVAL_BATCH = 32, 256
MEASURED_ON = 8  # batches
HEAD_RATE = 1e-3
TRAIN, VAL = 800, 200


def fashion_mnist_1k(trial: Trial) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (N, 28, 28) uint8 and labels (N,) to train on, and those to score."""
    images, labels = material.fashion_mnist('train')
    chosen = np.random.default_rng(trial.seed).permutation(len(images))[: TRAIN + VAL]
    train, held = chosen, material.fashion_mnist('t10k')
    if trial.stage == 'tune':
        train, held = chosen[:TRAIN], (images[chosen[TRAIN:]], labels[chosen[TRAIN:]])
    pairs = (images[train], labels[train]), held
    return tuple((torch.tensor(x), torch.tensor(y, dtype=torch.long)) for x, y in pairs)


SETS = dict(fashion_mnist_1k=(fashion_mnist_1k, 10), stamps=(stamps, 8))


def prepare(images: Tensor, trial: Trial) -> Tensor:
    """uint8 (N, H, W), gray, or (N, 3, H, W) to the network's input (N, 3, size, size).

    Its memory format is channels last.
    """
    backbone = BACKBONES[trial.backbone]
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (backbone.mean, backbone.std))
    maps = (with_channels(images).float() - mean) / std
    size = (trial.size, trial.size)
    maps = F.interpolate(maps, size, mode='bilinear', antialias=True).expand(-1, 3, -1, -1)
    return maps.contiguous(memory_format=torch.channels_last)


def with_channels(images: Tensor) -> Tensor:
    """(N, H, W) to (N, 1, H, W); images that have channels as they are."""
    return images if images.ndim == 4 else images[:, None]


@torch.no_grad()
def outputs(net: nn.Module, images: Tensor, trial: Trial) -> Tensor:
    """The network's outputs for all images, in evaluation mode."""
    return torch.cat([net(prepare(part, trial)) for part in images.split(EVAL_BATCH)])


def converge_head(features: Tensor, labels: Tensor, classes: int, ridge: float) -> nn.Linear:
    """The linear head of least cross-entropy + ridge / 2 * ||W||^2, by L-BFGS."""
    head = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=500, tolerance_change=1e-9, line_search_fn='strong_wolfe'
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels) + ridge / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head


def sized(hook: dict, trial: Trial, net: nn.Module) -> tuple[dict, dict]:
    """The method of a method file at the trial's budget and scale, and its targets."""
    method, targets = dict(hook['method']), dict(hook.get('targets') or {}, module='features')
    kind = mmpeft.METHODS.get(method['type'])
    if trial.budget and issubclass(kind, Ranked):
        method = {k: v for k, v in method.items() if k != 'rank'} | dict(budget=trial.budget)
    if trial.scale != 1:
        probe = copy.deepcopy(net)
        mmpeft.inject(probe, method, targets)
        method['scale'] = probe.peft[0].method.scaling * trial.scale
    return method, targets


def augment(images: Tensor) -> Tensor:
    """Mirrored at random and shifted by up to a fourteenth, uint8 (N, H, W) or (N, 3, H, W)."""
    n, height, width = len(images), *images.shape[-2:]
    reach = height // 14
    padded = F.pad(images, (reach, reach, reach, reach))
    rows = torch.randint(2 * reach + 1, (n, 1, 1)) + torch.arange(height)[:, None]
    columns = torch.arange(width).expand(n, 1, width)
    columns = torch.where(torch.rand(n, 1, 1) < 0.5, columns.flip(2), columns)
    columns = columns + torch.randint(2 * reach + 1, (n, 1, 1))
    padded = with_channels(padded)
    channels = torch.arange(padded.shape[1])[:, None, None]
    chosen = torch.arange(n)[:, None, None, None]
    return padded[chosen, channels, rows[:, None], columns[:, None]].view_as(images)


def train(net: nn.Module, images: Tensor, labels: Tensor, trial: Trial, score) -> list[dict]:
    """Train head and adapters; returns loss and ``score()`` of each epoch."""
    trained = [p for p in net.features.parameters() if p.requires_grad]
    groups = [dict(params=trained, lr=trial.rate)] if trained else []
    groups += [dict(params=net.head.parameters(), lr=HEAD_RATE)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = trial.epochs * math.ceil(len(images) / BATCH)
    warm_up = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * i / steps)),
    )
    history = []
    with mmpeft.monitor(net, optimizer, steps, add_penalty=True):
        for _ in range(trial.epochs):
            losses = []
            for chosen in torch.randperm(len(images)).split(BATCH):
                logits = net(prepare(augment(images[chosen]), trial))
                loss = F.cross_entropy(logits, labels[chosen])
                loss = loss + trial.ridge / 2 * net.head.weight.square().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            history.append(dict(loss=float(np.mean(losses)), **score()))
    return history


def classify(trial: Trial) -> dict:
    """Run a trial of classification on one thread.

    Returns:
        ``accuracy`` and ``loss`` on the images held out, after the last epoch; ``history``;
        ``parameters`` of the adapters, ``seconds`` of one core; or ``failed``, with the reason.
    """
    torch.manual_seed(trial.seed)
    torch.set_num_threads(1)
    start = time.process_time()
    read, classes = SETS[trial.task]
    (images, labels), (held_images, held_labels) = read(trial)
    features = BACKBONES[trial.backbone].make(trial.task).eval()
    head = converge_head(outputs(features, images, trial), labels, classes, trial.ridge)
    net = nn.Sequential()
    net.add_module('features', features)
    net.add_module('head', head)
    record = dict(parameters=0, failed=None, history=[])

    def score():
        logits = outputs(net, held_images, trial)
        return dict(
            accuracy=(logits.argmax(1) == held_labels).float().mean().item(),
            held_loss=F.cross_entropy(logits, held_labels).item(),
        )

    if trial.epochs:
        method, targets = sized(METHODS[trial.method], trial, net)
        measured = None
        if trial.method in MEASURED:
            batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
            measured = mmpeft.sensitivity(
                net,
                method,
                batches[:MEASURED_ON],
                lambda net, batch: F.cross_entropy(net(prepare(batch[0], trial)), batch[1]),
                targets,
            )
        mmpeft.inject(net, method, targets, sensitivity=measured)
        trained = [p.numel() for p in net.features.parameters() if p.requires_grad]
        record |= dict(parameters=sum(trained), method=repr(net.peft[0].method))
        net.eval()  # BatchNorm's statistics are the pretrained ones
        each = score if trial.stage == 'tune' else dict
        try:
            record['history'] = train(net, images, labels, trial, each)
        except mmpeft.errors.TrainingError as error:
            record['failed'] = str(error)
    record |= score()
    record['seconds'] = round(time.process_time() - start, 1)
    return record
