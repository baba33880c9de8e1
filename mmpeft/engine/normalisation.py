"""Whether images are normalised as the backbone's pretrained weights expect."""

from torch import nn


def normalisation_fault(model: nn.Module) -> str | None:
    """A paragraph about a data preprocessor that disagrees with timm's ``pretrained_cfg``.

    Args:
        model: With a ``data_preprocessor`` of mmengine's kind, whose mean and
            std are of images in [0, 255], and a ``backbone``. Only a backbone
            that says what its weights expect, and has some to load, is looked at.

    Returns:
        None if they agree to within one grey level.
    """
    backbone, images = getattr(model, 'backbone', None), getattr(model, 'data_preprocessor', None)
    expected = getattr(backbone, 'pretrained_cfg', None)
    if not expected or not (backbone.pretrained or backbone.checkpoint):
        return None
    wanted = {key: [round(255 * x, 3) for x in expected[key]] for key in ('mean', 'std')}
    found = {key: _values(getattr(images, key, None)) for key in wanted}
    equal = all(_close(found[key], wanted[key]) for key in wanted)
    key = 'to_rgb' if hasattr(images, 'to_rgb') else 'bgr_to_rgb'  # mmpretrain's, and the others'
    rgb = getattr(images, key, getattr(images, '_channel_conversion', False))
    if equal and rgb:
        return None
    return (
        f'The weights of {backbone.name} expect images in RGB with mean={wanted["mean"]} and '
        f'std={wanted["std"]}, and model.data_preprocessor has mean={found["mean"]}, '
        f'std={found["std"]}, {key}={rgb}. Write '
        f'model.data_preprocessor=dict(mean={wanted["mean"]}, std={wanted["std"]}, '
        f'{key}=True), unless the images are in RGB already.'
    )


def _values(buffer):
    return [] if buffer is None else [round(value, 3) for value in buffer.flatten().tolist()]


def _close(a, b):
    return len(a) == len(b) and all(abs(x - y) <= 1 for x, y in zip(a, b, strict=True))
