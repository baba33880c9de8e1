"""Networks as ONNX files, with adapters merged in, and the same run by onnxruntime.

The graph begins after the data preprocessor; mean, std and the order of
channels that it expects are in the file's metadata.
"""

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmpeft.errors import UsageError
from mmpeft.injection.merge import merge
from mmpeft.version import __version__

PARTS = ('backbone', 'neck', 'model')
PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')


class Part(nn.Module):
    """A part of a detector or segmentor, from preprocessed images to a tuple of tensors.

    ``'backbone'`` and ``'neck'`` give their maps; ``'model'`` of a segmentor
    the logits at the size of the image, of a detector with one dense head
    what the head gives before boxes are decoded.

    Raises:
        UsageError: The model has no such part.
    """

    def __init__(self, model: nn.Module, part: str):
        super().__init__()
        self.model, self.part = model, part
        # A detector with a decoder, DETR's kin, gives its head queries, not maps.
        detects = hasattr(model, 'bbox_head') and not hasattr(model, 'decoder')
        dense = hasattr(model, 'decode_head') or detects
        if part == 'neck' and getattr(model, 'neck', None) is None:
            raise UsageError(f'{type(model).__name__} has no neck. Write --part backbone.')
        if part == 'model' and not dense and hasattr(model, 'head'):
            smaller = 'backbone' if getattr(model, 'neck', None) is None else 'neck'
            raise UsageError(
                f'{type(model).__name__} is a classifier, and --part model is for segmentors and '
                f'one-stage detectors. Write --part {smaller}, which is what the head gets.'
            )
        if part == 'model' and not dense:
            raise UsageError(
                f'{type(model).__name__} has no dense head, and what follows the neck of such a '
                'detector has no equivalent in ONNX. Write --part neck.'
            )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The part's outputs, of images (N, 3, H, W)."""
        if self.part == 'backbone':
            return self.model.backbone(images)
        if self.part == 'neck':
            return self.model.extract_feat(images)
        if hasattr(self.model, 'decode_head'):
            metas = [dict(img_shape=images.shape[2:])]  # mmseg reads only the first
            return (self.model.encode_decode(images, metas),)
        return tuple(tree_leaves(self.model.bbox_head(self.model.extract_feat(images))))


def prepared(model: nn.Module, plain: Config) -> nn.Module:
    """The model to export, in float32 on the CPU; ``plain`` is its config without adapters.

    Adapters are merged if their methods allow it, and exported as they are otherwise.

    Raises:
        UsageError: Adapters that cannot be merged are on weights of low precision.
    """
    if not all(record.method.merges for record in getattr(model, 'peft', [])):
        low = {str(p.dtype) for p in model.parameters()} - {'torch.float32'}
        if low:
            raise UsageError(
                f'{model.peft[0].method} cannot be merged, and its base is in {low.pop()}. Train '
                "and export with frozen_dtype='float32'."
            )
        return model.cpu().eval().requires_grad_(False)
    merge(model)
    config = copy.deepcopy(plain.model)
    backbone = dict(frozen_dtype='float32', with_cp=False)
    config['backbone'].update({k: v for k, v in backbone.items() if k in config['backbone']})
    result = MODELS.build(config)
    result.load_state_dict(model.cpu().state_dict())
    return result.eval().requires_grad_(False)


def image_size(cfg: Config) -> tuple[int, int]:
    """Height and width of the images: of the test's crops, or as the data is padded.

    Raises:
        UsageError: The config fixes none.
    """
    test = cfg.model.get('test_cfg') or {}
    size = test.get('crop_size') or cfg.model.get('data_preprocessor', {}).get('size')
    if size is None:
        raise UsageError('The config fixes no size of the images. Write --size H W.')
    return tuple(size)


def random_images(part: Part, size: Sequence[int], batch: int, dynamic: bool) -> list[Tensor]:
    """Random images: of the given size; for dynamic files also a little and much larger ones.

    Poolings to a fixed grid hold for sizes near the one that was exported.
    """
    step = getattr(getattr(part.model.backbone, 'arch', None), 'patch_size', 32)
    sizes = [(batch, 3, *size)]
    if dynamic:
        height, width = (length // step * step for length in size)
        sizes += [(batch + 2, 3, height + step, width), (1, 3, 2 * height, 2 * width + step)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in sizes]


@contextmanager
def exporting(
    part: Part, out: Path, batches: Sequence[Tensor], dynamic: bool = False
) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Write a part as an ONNX file, which appears when the block ends without an error.

    Args:
        part: In evaluation mode.
        out: The file; weights too large for one go into ``OUT.data`` beside it.
        batches: From :func:`random_images`.
        dynamic: Leave batch, height and width open.

    Yields:
        As :func:`run_both`.

    Raises:
        UsageError: A package is missing, or the network cannot be exported or
            run on one of the batches.
    """
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise UsageError(f"{missing[0]} is not installed. Write: pip install 'mmpeft[onnx]'")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix='.onnx-') as folder:
        path = Path(folder, out.name)
        # A dynamic file from a size and a batch that the network does not know as its own.
        write(part, batches[1 if dynamic else 0], path, dynamic)
        yield run_both(part, path, batches)
        for file in (data_beside(path), path):
            if file.exists():
                file.replace(out.with_name(file.name))


def data_beside(path: Path) -> Path:
    """Where torch puts the weights of an ONNX file that do not fit into it."""
    return path.with_name(f'{path.name}.data')


def write(part: Part, images: Tensor, path: Path, dynamic: bool = False) -> None:
    """Write a part in evaluation mode as ONNX, by an example of images (N, 3, H, W).

    ``dynamic`` leaves batch, height and width open.

    Raises:
        UsageError: The network cannot be exported.
    """
    shapes = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),) if dynamic else None
    names = [f'{part.part}{index}' for index in range(len(part(images)))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', FutureWarning)  # of torch's exporter about torch
            program = torch.onnx.export(
                part,
                (images,),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=['images'],
                output_names=names,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
        raise UsageError(
            f'torch cannot export this {part.part}: {" ".join(lines[:3])}. Try a smaller --part, '
            f'or {"without" if dynamic else "another --size or"} --dynamic.'
        ) from error
    program.model.metadata_props['mmpeft'] = json.dumps(_needs(part.model))
    program.save(path)


def _needs(model):
    """How the images of a model are to be preprocessed."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    key = 'to_rgb' if hasattr(preprocessor, 'to_rgb') else '_channel_conversion'  # mmpretrain's
    bgr_to_rgb = bool(getattr(preprocessor, key, False))
    needs = dict(version=__version__, bgr_to_rgb=bgr_to_rgb)
    for name in ('mean', 'std'):
        value = getattr(preprocessor, name, None)
        needs[name] = None if value is None else value.flatten().tolist()
    return needs


@torch.no_grad()
def run_both(part: Part, path: Path, batches: Sequence[Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """Run images (N, 3, H, W) in onnxruntime by a file, and in torch by the part that it is of.

    Returns:
        For each output of each batch its name and what onnxruntime and torch
        computed.

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
        except Exception as error:  # its type depends on the operator
            raise UsageError(
                f'onnxruntime cannot run the network on images {size}: {error}. With --dynamic, '
                'the network takes another path for some sizes: export one file for each size.'
            ) from error
        for index, (one, other) in enumerate(zip(given, part(images), strict=True)):
            found.append((f'{part.part}{index} of {size}', torch.from_numpy(one), other))
    return found
