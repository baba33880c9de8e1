"""Export a network with its adapters folded in to ONNX, and compare the two.

    python tools/export_onnx.py CONFIG CHECKPOINT OUT.onnx --part neck --size 800 1344

Parts:

``backbone``  the maps of the backbone
``neck``      those of the neck
``model``     of a segmentor the logits at the size of the image; of a detector
              with one dense head what that gives before boxes are decoded.
              Two-stage detectors and DETR's kin end at the neck: what follows
              depends on the data, and on operators that ONNX does not have

The graph begins after the data preprocessor; mean, std and the order of
channels that it expects are in the file's metadata. ``--dynamic`` leaves the
batch and the size of the images open. Methods that act on activations are
exported as they are.

The file is run by onnxruntime on random batches and compared with torch before
it takes its place; dynamic ones on another batch and another size too.
"""

import argparse
import json
import os
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from merge import load_adapted, plain_config
from mmengine.registry import MODELS
from torch import nn

import mmpeft
from mmpeft.analysis.comparison import BOUNDS, quantity, table
from mmpeft.engine.launch import add_arguments, check_checkpoint, load_config, run
from mmpeft.errors import UsageError

PARTS = ('backbone', 'neck', 'model')
LARGEST = 2**31 - 2**20  # bytes that one file of protobuf can hold


def parse_args():
    parser = argparse.ArgumentParser(description='Export a network to ONNX, adapters folded in')
    parser.add_argument('config', help='config that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='checkpoint with adapters')
    parser.add_argument('out', type=Path, help='file to write, OUT.onnx')
    parser.add_argument('--part', choices=PARTS, default='backbone', help='see above')
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'), help='of the images')
    parser.add_argument('--batch', type=int, default=1, help='images at once')
    parser.add_argument('--dynamic', action='store_true', help='leave batch and size open')
    parser.add_argument(
        '--bound', type=float, default=BOUNDS[torch.float32], help='largest relative difference'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace OUT if it exists')
    add_arguments(parser)
    return parser.parse_args()


class Part(nn.Module):
    """A part of a model, from preprocessed images to a tuple of tensors.

    Args:
        model: A detector or segmentor.
        part: Of ``PARTS``.

    Raises:
        UsageError: The model has no such part.
    """

    def __init__(self, model, part):
        super().__init__()
        self.model, self.part = model, part
        # A detector with a decoder, DETR's kin, gives its head queries, not maps.
        detects = hasattr(model, 'bbox_head') and not hasattr(model, 'decoder')
        dense = hasattr(model, 'decode_head') or detects
        if part == 'neck' and getattr(model, 'neck', None) is None:
            raise UsageError(f'{type(model).__name__} has no neck. Write --part backbone.')
        if part == 'model' and not dense:
            raise UsageError(
                f'{type(model).__name__} has no dense head, and what follows the neck of such a '
                'detector has no equal in ONNX. Write --part neck.'
            )

    def forward(self, images):
        """The part's outputs, of images (N, 3, H, W)."""
        if self.part == 'backbone':
            return self.model.backbone(images)
        if self.part == 'neck':
            return self.model.extract_feat(images)
        if hasattr(self.model, 'decode_head'):
            metas = [dict(img_shape=images.shape[2:])]  # mmseg looks at the first alone
            return (self.model.encode_decode(images, metas),)
        return _flat(self.model.bbox_head(self.model.extract_feat(images)))


def _flat(output):
    if isinstance(output, torch.Tensor):
        return (output,)
    return tuple(tensor for each in output for tensor in _flat(each))


def deployed(cfg, model):
    """The model to export, in float32 on the CPU.

    Args:
        cfg: Its config.
        model: With adapters; they are folded in where their method allows it.

    Raises:
        UsageError: Adapters that cannot be folded in sit on coarser weights.
    """
    if not all(record.method.merges for record in model.peft):
        coarse = {str(p.dtype) for p in model.parameters()} - {'torch.float32'}
        if coarse:
            raise UsageError(
                f'{model.peft[0].method} cannot be merged, and its base is in {coarse.pop()}. '
                "Train and export with frozen_dtype='float32'."
            )
        return model.cpu().eval().requires_grad_(False)
    mmpeft.merge(model)
    plain = plain_config(cfg)
    for key, value in dict(frozen_dtype='float32', with_cp=False).items():
        if key in plain.model.backbone:
            plain.model.backbone[key] = value
    result = MODELS.build(plain.model)
    result.load_state_dict(model.cpu().state_dict())
    return result.eval().requires_grad_(False)


def default_size(cfg):
    """Height and width of the images: of the test's crops, or as the data is padded.

    Raises:
        UsageError: The config fixes none.
    """
    test = cfg.model.get('test_cfg') or {}
    size = test.get('crop_size') or cfg.model.get('data_preprocessor', {}).get('size')
    if size is None:
        raise UsageError('the config fixes no size of the images. Write --size H W.')
    return tuple(size)


def export(part, images, path, dynamic):
    """Write a part as ONNX.

    Args:
        part (Part): In evaluation mode.
        images (Tensor): Example.
        path (Path): Of the file; large weights go beside it.
        dynamic (bool): Leave batch, height and width open.

    Raises:
        UsageError: The network cannot be exported.
    """
    shapes = None
    if dynamic:
        shapes = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
    size = sum(p.numel() * p.element_size() for p in part.parameters())
    names = [f'{part.part}{index}' for index in range(len(part(images)))]
    try:
        torch.onnx.export(
            part,
            (images,),
            path,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=['images'],
            output_names=names,
            external_data=size > LARGEST,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
        raise UsageError(
            f'torch cannot export this {part.part}: {" ".join(lines[:3])}. Try a smaller --part, '
            f'or {"without" if dynamic else "another --size or"} --dynamic.'
        ) from error


def describe(path, model):
    """Put into a file's metadata what its images have to be."""
    import onnx

    preprocessor = getattr(model, 'data_preprocessor', None)
    made = dict(bgr_to_rgb=bool(getattr(preprocessor, '_channel_conversion', False)))
    for name in ('mean', 'std'):
        value = getattr(preprocessor, name, None)
        made[name] = None if value is None else value.flatten().tolist()
    file = onnx.load(path, load_external_data=False)
    file.metadata_props.add(key='mmpeft', value=json.dumps(dict(version=mmpeft.__version__) | made))
    onnx.save(file, path)


@torch.no_grad()
def compare(part, path, batches):
    """Run a file in onnxruntime and compare it with torch.

    Args:
        part (Part): As exported.
        path (Path): Of the file.
        batches (Sequence[Tensor]): To run.

    Returns:
        list[Difference]: Of each output of each batch.

    Raises:
        UsageError: onnxruntime cannot run the file on one of them.
    """
    import onnxruntime

    found = []
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    for images in batches:
        size = 'x'.join(map(str, images.shape))
        try:
            given = session.run(None, {'images': images.numpy()})
        except Exception as error:  # what is raised depends on the operator
            raise UsageError(
                f'onnxruntime cannot run the network on images {size}: {error}. Where it was '
                'exported with --dynamic the network takes another path for some sizes: export '
                'one file a size.'
            ) from error
        for index, (one, other) in enumerate(zip(given, part(images), strict=True)):
            name = f'{part.part}{index} of {size}'
            found.append(quantity(name, [torch.from_numpy(one)], [other]))
    return found


def batches(size, batch, dynamic, step):
    """Random images: as asked for; for dynamic files also a little larger, and a lot.

    Poolings to a fixed grid hold for sizes near the one that was exported.
    """
    sizes = [(batch, 3, *size)]
    if dynamic:
        height, width = (length // step * step for length in size)
        sizes += [(batch + 2, 3, height + step, width), (1, 3, 2 * height, 2 * width + step)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in sizes]


def main():
    args = parse_args()
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        if find_spec(package) is None:
            raise UsageError(f"{package} is not installed. Write: pip install 'mmpeft[onnx]'")
    cfg = load_config(args)
    check_checkpoint(args.checkpoint)
    data = args.out.with_name(f'{args.out.name}.data')
    taken = [str(path) for path in (args.out, data) if path.exists()]
    if taken and not args.overwrite:
        raise UsageError(f'{" and ".join(taken)} exist already. Name another OUT, or --overwrite.')
    size = tuple(args.size or default_size(cfg))
    model = deployed(cfg, load_adapted(cfg, args.checkpoint))
    part = Part(model, args.part)
    step = getattr(getattr(model.backbone, 'arch', None), 'patch_size', 32)
    tried = batches(size, args.batch, args.dynamic, step)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=args.out.parent, prefix='.onnx-') as folder,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter('ignore', FutureWarning)  # torch's exporter about torch
        path = Path(folder, args.out.name)
        # Dynamic ones from a size and a number of images that the network does not know as its own.
        export(part, tried[1 if args.dynamic else 0], path, args.dynamic)
        describe(path, model)
        found = compare(part, path, tried)
        print(table(found, args.bound))
        failed = [row.name for row in found if row.exceeds(args.bound)]
        if failed:
            raise UsageError(
                f'onnxruntime computes something else than torch: {", ".join(failed)}. Nothing '
                'was written.'
            )
        for name in (data.name, args.out.name):
            if Path(folder, name).exists():
                os.replace(Path(folder, name), args.out.with_name(name))
    print(f'{args.part}: {args.out} ({args.out.stat().st_size / 2**20:.1f} MiB)')


if __name__ == '__main__':
    run(main)
