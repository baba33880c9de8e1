"""Train the small network that the demo adapts, on single digits.

    python projects/demo/base.py [--network convnext] --out work_dirs/demo/base.pth

The file holds the weights as the backbone's ``checkpoint`` argument takes
them: under timm's names of a ConvNeXt-V2, or under those of InternViT.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from mmpeft.checkpoint.atomic import replacing
from mmpeft.engine.config import read_config
from mmpeft.models import InternViT

MODEL = dict(model_name='convnextv2_atto', depths=(1, 1, 4, 1))
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def main():
    args = parse_args()
    if args.out.exists():
        print(f'{args.out} exists already.')
        return
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the layers are too small for a second one to pay
    model = NETWORKS[args.network]()
    train(model, *load(args.data, 'train'), args)
    accuracy = evaluate(model, *load(args.data, 'val'))
    print(f'The base recognizes {accuracy:.1%} of the single digits of the validation set.')
    with replacing(args.out) as temporary:
        torch.save(dict(state_dict=model.state_dict(), meta=dict(accuracy=accuracy)), temporary)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--network', default='convnext', choices=NETWORKS)
    parser.add_argument('--data', type=Path, default='data/digits/source')
    parser.add_argument('--out', type=Path, default='work_dirs/demo/base.pth')
    parser.add_argument('--epochs', type=int, default=6)
    parser.add_argument('--batch-size', type=int, default=100)
    parser.add_argument('--lr', type=float, default=2e-3)
    parser.add_argument('--seed', type=int, default=0)
    return parser.parse_args()


class InternViTClassifier(nn.Module):
    """The InternViT of the demo's config with a linear layer on its mean token."""

    def __init__(self):
        super().__init__()
        arch = read_config('mmpeft::demo/_base_/internvit.py').model.backbone.arch
        self.backbone = InternViT(arch)
        self.backbone.init_weights()
        self.norm = nn.LayerNorm(arch['width'])
        self.head = nn.Linear(arch['width'], 10)

    def forward(self, images):
        return self.head(self.norm(self.backbone(images)[-1].mean((2, 3))))


NETWORKS = dict(
    convnext=partial(timm.create_model, **MODEL, num_classes=10), internvit=InternViTClassifier
)


def load(folder, split):
    """Return images, float (N, 3, H, W) and normalised, and labels, (N, )."""
    with np.load(folder / f'{split}.npz') as arrays:
        images, labels = torch.tensor(arrays['images']), torch.tensor(arrays['labels'])
    images = (images - torch.tensor(MEAN)) / torch.tensor(STD)
    return images.permute(0, 3, 1, 2).contiguous(), labels


def train(model, images, labels, args):
    """Train in place with AdamW and a learning rate that rises, then falls to zero."""
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, labels), args.batch_size, shuffle=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, epochs=args.epochs, steps_per_epoch=len(loader), pct_start=0.1
    )
    with tqdm(total=args.epochs * len(loader), desc='base') as progress:
        for _ in range(args.epochs):
            for batch, target in loader:
                loss = F.cross_entropy(model(batch), target, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
                progress.set_postfix(loss=f'{loss.item():.2f}')


@torch.no_grad()
def evaluate(model, images, labels):
    """Fraction of the images whose digit is recognized."""
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


if __name__ == '__main__':
    main()
