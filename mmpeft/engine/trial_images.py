"""A batch to try a model on: of its test data, of given files, or of noise."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, init_default_scope

from mmpeft.errors import MissingFileError, UsageError

from .config import class_name
from .data_check import missing_data


def trial_batch(cfg: Config, images: Sequence[str | Path] = ()) -> tuple[dict, str]:
    """Images through the test pipeline of a config.

    Args:
        cfg: With ``test_dataloader``; its package is imported and registered.
        images: Files. Without any, the first two images of the test data; if that
            does not exist, two of noise of the size that the pipeline resizes to.

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
        items = [data[index] for index in range(min(2, len(data)))]
        return pseudo_collate(items), f'{len(items)} images of the test data'
    steps = _pipeline(dataset, cfg.get('default_scope'))
    if images:
        words, items = 'the given images', [dict(img_path=str(path)) for path in images]
    else:
        width, height = _size(steps, cfg.model)
        words = f'2 images of noise, {width}x{height} (the test data is not there)'
        shapes = dict(img_shape=(height, width), ori_shape=(height, width))
        items = [dict(shapes, img=_noise(width, height, seed)) for seed in range(2)]
        del steps[0]  # which reads a file, and gives such a dict
    pipeline = Compose(steps)
    return pseudo_collate([pipeline(dict(each, img_id=i)) for i, each in enumerate(items)]), words


def _pipeline(dataset, scope):
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    # mmdet's accepts images without annotations, mmseg's does not.
    needless = 'LoadAnnotations' if scope == 'mmseg' else ''
    steps = dataset['pipeline']
    return [step for step in steps if class_name(step) != needless]


def _size(steps, model):
    """Width and height that the first step with a scale resizes to."""
    scales = [step['scale'] for step in steps if isinstance(step.get('scale'), (tuple, list))]
    size = scales[0] if scales else model.get('data_preprocessor', {}).get('size') or (512, 512)
    size = size[0] if isinstance(size[0], (tuple, list)) else size
    return tuple(map(int, size))


def _noise(width, height, seed):
    """Blocks and grain: on noise of single pixels most maps would be near zero."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 192, (height // 16 + 1, width // 16 + 1, 3))
    picture = np.kron(blocks, np.ones((16, 16, 1)))[:height, :width]
    return (picture + random.integers(0, 64, picture.shape)).astype(np.uint8)
