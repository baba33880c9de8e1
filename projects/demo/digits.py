"""Make the demo's data: handwritten digits in four real formats.

    python projects/demo/digits.py --out data/digits --seed 0

The same scenes are written as COCO (instances with masks), ADE20K (label
images) and DOTA (oriented boxes), in the folders that scene_files.py lists.
``classification`` has scenes of one digit, four times as many. ``source`` holds
single digits, dark ink on white paper, on which the demo trains the network that
it then adapts: ``source/{train,val}.npz``.

Train and val share no scan. The same arguments give the same bytes. The folder
``--out`` appears when all is written.
"""

import argparse
from pathlib import Path

import numpy as np
from digit_scenes import CLASSES, Digits, draw_scan, load_scans
from scene_files import made, making, write_scenes, write_singles


def main():
    args = parse_args()
    wanted = {name: value for name, value in vars(args).items() if name != 'out'}
    wanted['formats'] = ['ade20k', 'classification', 'coco', 'dota']
    if made(args.out, wanted):
        print(f'{args.out} exists already.')
        return
    scans = load_scans()
    single = dict(size=40, height=(30, 40), turn=10)  # as large as the source's
    with making(args.out, wanted) as root:
        for index, split in enumerate(('train', 'val')):
            generators = (np.random.default_rng([args.seed, index, i]) for i in range(3))
            digits, number = Digits(*scans[split]), getattr(args, split)
            write_source(root, split, next(generators), scans[split], args.source)
            write_scenes(root, split, next(generators), digits, CLASSES, number, args.size)
            write_singles(root, split, next(generators), digits, 4 * number, **single)
    print(f'Wrote {args.train} + {args.val} scenes to {args.out}.')


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, default='data/digits', help='folder to make')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--train', type=int, default=1200, help='scenes to train on')
    parser.add_argument('--val', type=int, default=150, help='scenes to validate on')
    parser.add_argument('--size', type=int, default=128, help='side of a scene in pixels')
    parser.add_argument('--source', type=int, default=6000, help='single digits to train on')
    return parser.parse_args()


def write_source(root, split, rng, scans, number):
    """Write single digits, ``images`` uint8 (N, 40, 40, 3) and ``labels`` (N, )."""
    images, labels = [], []
    for _ in range(number if split == 'train' else number // 10):
        pick = rng.integers(len(scans[1]))
        images.append(draw_scan(rng, scans[0][pick]))
        labels.append(scans[1][pick])
    path = root / 'source' / f'{split}.npz'
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=np.stack(images), labels=np.array(labels))


if __name__ == '__main__':
    main()
