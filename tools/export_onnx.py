"""Export a network with its adapters merged to ONNX, and compare the two.

    python tools/export_onnx.py CONFIG CHECKPOINT OUT.onnx --part neck --size 800 1344

Parts:

``backbone``  the maps of the backbone
``neck``      those of the neck
``model``     of a segmentor the logits at the size of the image; of a detector
              with one dense head what that gives before boxes are decoded.
              Two-stage detectors and DETR's kin end at the neck: what follows
              depends on the data, and on operators that ONNX does not have.
              Classifiers end before the head

The graph begins after the data preprocessor; mean, std and the order of
channels that it expects are in the file's metadata. ``--dynamic`` leaves the
batch and the size of the images open. Methods that act on activations are
exported as they are.

The file is run by onnxruntime on random batches and compared with torch before
it takes its place; a dynamic one on another batch and another size, too.
"""

from pathlib import Path

from mmpeft.analysis.comparison import quantity, table
from mmpeft.checkpoint.atomic import refuse_existing
from mmpeft.engine.command_line import add_arguments, parser_of, run
from mmpeft.engine.inference import init_model
from mmpeft.engine.launch import load_config
from mmpeft.engine.merging import plain_config
from mmpeft.errors import UsageError
from mmpeft.interop.onnx import (
    PARTS,
    Part,
    data_beside,
    exporting,
    image_size,
    prepared,
    random_images,
)


def parse_args():
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint with adapters, or an adapter file')
    parser.add_argument('out', type=Path, help='file to write, OUT.onnx')
    parser.add_argument('--part', choices=PARTS, default='backbone', help='see above')
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'), help='of the images')
    parser.add_argument('--batch', type=int, default=1, help='images at once')
    parser.add_argument('--dynamic', action='store_true', help='leave batch and size open')
    parser.add_argument('--bound', type=float, default=1e-4, help='largest relative difference')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT if it exists')
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = load_config(args)
    if not args.overwrite:
        refuse_existing(args.out, data_beside(args.out))
    size = tuple(args.size or image_size(cfg))
    part = Part(prepared(init_model(cfg, args.checkpoint), plain_config(cfg)), args.part)
    batches = random_images(part, size, args.batch, args.dynamic)
    with exporting(part, args.out, batches, args.dynamic) as outputs:
        found = [quantity(name, [(theirs, ours)]) for name, theirs, ours in outputs]
        print(table(found, args.bound))
        failed = [row.name for row in found if row.exceeds(args.bound)]
        if failed:
            raise UsageError(
                f'onnxruntime computes something else than torch: {", ".join(failed)}. Nothing '
                'was written.'
            )
    print(f'{args.part}: {args.out} ({args.out.stat().st_size / 2**20:.1f} MiB)')


if __name__ == '__main__':
    run(main)
