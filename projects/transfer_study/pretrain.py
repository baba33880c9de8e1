"""Pretrain a ConvNeXt-V2 atto for the study, on images that are not the target's.

    python projects/transfer_study/pretrain.py --without fashion_mnist

It learns the features of EfficientNet-Lite0 from all sources of images but the one that is left
out. A run that was stopped goes on when it is started again.
"""

import argparse
import os

import torch
from transfer_study.backbones import BACKBONES, pretrained_path
from transfer_study.distillation import distil
from transfer_study.sources import SOURCES, Stream

SIZE = 64  # of the images, pixels


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--without', choices=SOURCES, required=True, help='the target, left out')
    parser.add_argument('--steps', type=int, default=12_000)
    parser.add_argument('--batch', type=int, default=64, help='images a step')
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    out = pretrained_path(args.without)
    if out.exists():
        print(f'{out} exists already.')
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    student, teacher = BACKBONES['convnextv2_atto'], BACKBONES['efficientnet_lite0']
    sources = [make() for name, make in SOURCES.items() if name != args.without]
    images = Stream(sources, args.steps * args.batch, SIZE, teacher.mean, teacher.std)
    distil(student.make(None), teacher.make('pretraining').eval(), images, out, args.batch)
    print(f'Wrote {out}.')


if __name__ == '__main__':
    main()
