"""Make the data of `make demo DATA=photos`: cut-outs of real photos on photographs.

    python projects/demo/photos.py --out data/photos --seed 0

The scenes are written as COCO (instances with masks), ADE20K (label images) and
DOTA (oriented boxes), in the folders that scene_files.py lists. Train and val
share no cut-out and no photograph. The same arguments and pictures give the same
bytes. The folder ``--out`` appears when all is written.
"""

import argparse
from pathlib import Path

import numpy as np
from photo_scenes import CLASSES, PHOTOGRAPHS, STAMPS, load_photos
from scene_files import made, making, write_scenes


def main():
    args = parse_args()
    wanted = {name: str(value) for name, value in vars(args).items() if name != 'out'}
    if made(args.out, wanted):
        print(f'{args.out} exists already.')
        return
    photos = load_photos(args.cutouts, args.photographs)
    with making(args.out, wanted) as root:
        for index, split in enumerate(('train', 'val')):
            rng, number = np.random.default_rng([args.seed, index]), getattr(args, split)
            write_scenes(root, split, rng, photos[split], CLASSES, number, args.size)
    print(f'Wrote {args.train} + {args.val} scenes to {args.out}.')


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, default='data/photos', help='folder to make')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--train', type=int, default=1200, help='scenes to train on')
    parser.add_argument('--val', type=int, default=150, help='scenes to validate on')
    parser.add_argument('--size', type=int, default=128, help='side of a scene in pixels')
    parser.add_argument('--cutouts', type=Path, default=STAMPS, help='folder of cut-outs')
    parser.add_argument('--photographs', type=Path, default=PHOTOGRAPHS, help='what is behind')
    return parser.parse_args()


if __name__ == '__main__':
    main()
