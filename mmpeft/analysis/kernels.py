"""Pictures of convolution kernels before and after training, and of their updates."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmpeft.errors import UsageError
from mmpeft.methods.spec import WeightSpec

from .updates import Update


def check_kernel(name: str, spec: WeightSpec) -> None:
    """Raise UsageError for a weight that has no 2-d kernel of more than one element."""
    if len(spec.kernel_size) != 2 or spec.kernel_size == (1, 1):
        raise UsageError(
            f'{name} has the shape {tuple(spec.shape)}, in which there is no k x k kernel to draw. '
            'Name convolutions with one.'
        )


def draw_kernels(update: Update, count: int = 8) -> Figure:
    """Small multiples of a weight's 2-d kernels: rows W, W' and dW, a column each kernel.

    W and W' share one scale of colours, dW has its own; zero is white. The kernels are those of
    the largest updates, in the order of their channels. A column's title is the channel on the
    weight's first axis, with that on its second where there are several.

    Args:
        update: Of a convolution.
        count: Columns at most.

    Raises:
        UsageError: See :func:`check_kernel`.
    """
    check_kernel(update.name, update.spec)
    weight, delta = (w.cpu().numpy() for w in (update.weight, update.delta))
    norms = np.linalg.norm(delta, axis=(2, 3))
    chosen = np.sort(np.argsort(-norms, axis=None, kind='stable')[:count])
    places = np.stack(np.unravel_index(chosen, norms.shape), 1)
    figure = Figure((1.2 * max(len(places), 3) + 1.6, 4.6), dpi=100, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(places), squeeze=False)
    rows = dict(before=weight, after=weight + delta, update=delta)
    limits = [max(np.abs(rows[name][tuple(places.T)]).max() for name in ('before', 'after'))] * 2
    limits.append(np.abs(delta[tuple(places.T)]).max())
    for row, (name, values) in enumerate(rows.items()):
        limit = limits[row] or 1.0
        for ax, place in zip(axes[row], places, strict=True):
            shown = ax.imshow(values[tuple(place)], cmap='RdBu_r', vmin=-limit, vmax=limit)
            ax.set(xticks=[], yticks=[])
            if row == 0:
                ax.set_title(', '.join(map(str, place[: 1 + (norms.shape[1] > 1)])), fontsize=9)
        axes[row, 0].set_ylabel(name, fontsize=10)
        if row != 1:
            figure.colorbar(shown, ax=axes[:2] if row == 0 else axes[2], shrink=0.85)
    figure.suptitle(f'{update.name}, {delta.shape[2]} x {delta.shape[3]}', fontsize=10)
    return figure


def as_image(figure: Figure) -> np.ndarray:
    """A figure as pixels, (H, W, 3) of uint8, RGB."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
