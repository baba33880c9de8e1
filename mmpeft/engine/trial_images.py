"""A batch to try a model on: of its test data, of given files, or of noise."""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, init_default_scope

from mmpeft.errors import MissingFileError, UsageError

from .data_check import missing_data


def trial_batch(cfg: Config, images: Sequence[str | Path] = (), count: int = 2) -> tuple[dict, str]:
    """Images through the test pipeline of a config.

    Args:
        cfg: With ``test_dataloader``; its package is imported and registered.
        images: Files. Without any, the first images of the test data; if that
            does not exist, noise of the size that the pipeline resizes to.
        count: How many images, unless given.

    Returns:
        A batch as a dataloader gives it, and what it is in words.

    Raises:
        UsageError: The config has no test data, or an image is missing.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    dataset = (cfg.get('test_dataloader') or {}).get('dataset')
    if dataset is None:
        raise UsageError(f'{cfg.filename} has no test_dataloader, so there are no images to try.')
    for path in images:
        if not Path(path).is_file():
            raise MissingFileError(f'There is no image {str(path)!r}.')
    if not images and not missing_data(cfg, ['test']):
        data = DATASETS.build(copy.deepcopy(dataset))
        items = [data[index] for index in range(min(count, len(data)))]
        return pseudo_collate(items), f'{len(items)} images of the test data'
    steps = _pipeline(dataset, cfg.get('default_scope'))
    with ExitStack() as stack:
        words = 'the given images'
        if not images:
            size = _size(steps, cfg.model)
            images = _noise(Path(stack.enter_context(TemporaryDirectory())), size, count)
            words = f'{count} images of noise, {size[0]}x{size[1]} (the test data is not there)'
        pipeline = Compose(steps)
        items = [pipeline(dict(img_path=str(p), img_id=i)) for i, p in enumerate(images)]
    return pseudo_collate(items), words


def _pipeline(dataset, scope):
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    # mmdet's accepts images without annotations, mmseg's does not.
    needless = 'LoadAnnotations' if scope == 'mmseg' else ''
    return [step for step in dataset['pipeline'] if step['type'].split('.')[-1] != needless]


def _size(steps, model):
    """Width and height that the first step with a scale resizes to."""
    scales = [step['scale'] for step in steps if isinstance(step.get('scale'), (tuple, list))]
    size = scales[0] if scales else model.get('data_preprocessor', {}).get('size') or (512, 512)
    size = size[0] if isinstance(size[0], (tuple, list)) else size
    return tuple(map(int, size))


def _noise(folder, size, count):
    from PIL import Image

    random = np.random.default_rng(0)
    paths = [folder / f'{index}.png' for index in range(count)]
    for path in paths:
        # Blocks and grain: on noise of single pixels most maps would be near zero.
        blocks = random.integers(0, 192, (size[1] // 16 + 1, size[0] // 16 + 1, 3))
        picture = np.kron(blocks, np.ones((16, 16, 1)))[: size[1], : size[0]]
        grain = random.integers(0, 64, picture.shape)
        Image.fromarray((picture + grain).astype(np.uint8)).save(path)
    return paths
