"""Write the pretrained network that `make demo DATA=photos` adapts, under timm's names.

python projects/demo/pretrained.py --out work_dirs/demo/efficientnet_lite0.pth
"""

import argparse
from pathlib import Path

import torch
from material import efficientnet_lite0

from mmpeft.checkpoint.atomic import replacing


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, default='work_dirs/demo/efficientnet_lite0.pth')
    args = parser.parse_args()
    if args.out.exists():
        print(f'{args.out} exists already.')
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as temporary:
        torch.save(efficientnet_lite0(), temporary)


if __name__ == '__main__':
    main()
