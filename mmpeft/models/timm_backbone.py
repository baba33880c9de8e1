"""Any timm model as a multi-level backbone of OpenMMLab."""

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from timm.models import load_state_dict as read_weights

from mmpeft.errors import DamagedFileError, MissingFileError, UsageError
from mmpeft.registry import MODELS


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """A timm network that returns one feature map for each level.

    As in the ConvNeXt recipes of mmdet and mmseg, every level ends in a
    LayerNorm over its channels. The norms ``norm<level>`` are newly initialized
    and train under every method; the network keeps timm's own parameter names
    below ``model``.

    Weights are loaded in :meth:`init_weights`, which a Runner calls before it
    trains, so that building a model to load a checkpoint fetches nothing.

    Args:
        name: A timm model, such as ``'convnextv2_base.fcmae_ft_in22k_in1k'``.
        pretrained: Load timm's pretrained weights from its hub.
        checkpoint: In place of ``pretrained``, a local file (``.pth``,
            ``.safetensors``) of the network's weights under timm's names.
        out_indices: The levels to return.
        out_norm: Put a LayerNorm on each level.
        drop_path: Stochastic depth rate of the deepest block.
        with_cp: Recompute activations in backward. timm uses the form without
            reentrance, which a frozen stem needs.
        init_cfg: As in :class:`mmengine.model.BaseModule`.
        **kwargs: For :func:`timm.create_model`.

    Raises:
        UsageError: timm does not know the name, or both ``pretrained`` and
            ``checkpoint`` are given.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        checkpoint: str | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_norm: bool = True,
        drop_path: float = 0.0,
        with_cp: bool = False,
        init_cfg: dict | None = None,
        **kwargs,
    ):
        super().__init__(init_cfg)
        if pretrained and checkpoint:
            raise UsageError(
                f'TimmBackbone {name!r} was given both pretrained=True and '
                f'checkpoint={str(checkpoint)!r}. Keep the one whose weights you want.'
            )
        if not timm.is_model(name):
            close = timm.list_models(f'*{name.split(".")[0].split("_")[0]}*')[:5]
            raise UsageError(
                f'timm {timm.__version__} has no model {name!r}. '
                f'Near it are: {", ".join(close) or "none"}. See timm.list_models().'
            )
        if drop_path:
            kwargs['drop_path_rate'] = drop_path
        self.pretrained = pretrained
        self.checkpoint = checkpoint
        self.out_indices = tuple(out_indices)
        self._create = dict(
            model_name=name, features_only=True, out_indices=self.out_indices, **kwargs
        )
        self.model = timm.create_model(pretrained=False, **self._create)
        if with_cp:
            self.model.set_grad_checkpointing(True)
        self.channels_last = str(getattr(self.model, 'output_fmt', 'NCHW')).endswith('NHWC')
        self.newly_initialized = tuple(f'norm{i}' for i in self.out_indices) if out_norm else ()
        if out_norm:
            channels = self.model.feature_info.channels()
            for level, width in zip(self.out_indices, channels, strict=True):
                self.add_module(f'norm{level}', LayerNorm2d(width, eps=1e-6))

    def init_weights(self) -> None:
        """Load the pretrained weights, if any are named.

        Raises:
            MissingFileError: ``checkpoint`` does not exist.
            DamagedFileError: It cannot be read without running code from it.
            UsageError: The file lacks weights of this network, or timm's hub gave none.
        """
        if self._is_init:
            return
        super().init_weights()
        self._is_init = True
        if self.checkpoint:
            self._load_file(Path(self.checkpoint))
        elif self.pretrained:
            self._load_hub()

    def _load_hub(self):
        name = self._create['model_name']
        try:
            source = timm.create_model(pretrained=True, **self._create)
        except Exception as error:
            raise UsageError(
                f'timm could not fetch the pretrained weights of {name!r} '
                f'({type(error).__name__}: {error}). Without a connection, download them '
                "elsewhere and set backbone.pretrained=False, backbone.checkpoint='FILE'."
            ) from error
        self.model.load_state_dict(source.state_dict())

    def _load_file(self, path):
        if not path.is_file():
            raise MissingFileError(
                f'The backbone checkpoint {str(path)!r} does not exist. Set '
                'model.backbone.checkpoint to a file with the weights of timm model '
                f'{self._create["model_name"]!r}, or to None.'
            )
        try:
            weights = read_weights(str(path), use_ema=False, weights_only=True)  # runs no code
        except Exception as error:  # its type depends on the bytes of the file
            raise DamagedFileError(
                f'{str(path)!r} is damaged or holds more than plain tensors, and was not read. '
                'Give an intact .safetensors file or a .pth of tensors '
                "(torch.save(model.state_dict(), 'FILE.pth'))."
            ) from error
        own = self.model.state_dict()
        found = {key: weights[name] for key in own if (name := _name_in(weights, key))}
        wrong = [k for k in own if k not in found or found[k].shape != own[k].shape]
        if wrong:
            raise UsageError(
                f'{str(path)!r} does not fit timm model {self._create["model_name"]!r}: '
                f'{len(wrong)} of {len(own)} tensors are missing or have another shape, such '
                f'as {", ".join(wrong[:3])}. Give the file of the same model, under timm names.'
            )
        self.model.load_state_dict(found)
        print_log(f'Loaded {len(found)} tensors of the backbone from {path}', 'current')

    def names_in_whole(self) -> dict[str, str]:
        """Paths below ``model`` of what holds tensors, and those in ``timm.create_model(name)``."""
        cut = ('features_only', 'out_indices')
        with torch.device('meta'):
            own = timm.create_model(**self._create)
            whole = timm.create_model(**{k: v for k, v in self._create.items() if k not in cut})
        weights, names = whole.state_dict(), {}
        for key in own.state_dict():
            path, _, tensor = key.rpartition('.')
            names[path] = _name_in(weights, key).removesuffix(f'.{tensor}')
        return names

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(N, 3, H, W) to a contiguous map (N, C_i, H_i, W_i) for each of ``out_indices``."""
        levels = self.model(x)
        if self.channels_last:
            levels = [level.permute(0, 3, 1, 2) for level in levels]
        norms = [getattr(self, f'norm{i}', torch.nn.Identity()) for i in self.out_indices]
        maps = (norm(level) for norm, level in zip(norms, levels, strict=True))
        # mmcv's RoIAlign reads memory as if it were contiguous, and timm's may be channels-last.
        return tuple(level.contiguous() for level in maps)


def _name_in(weights, key):
    """The name of a features-only tensor in a state dict of the whole model."""
    top, _, rest = key.partition('.')
    split = top.replace('_', '.'), top.replace('_', '.', 1)
    names = key, *(f'{each}.{rest}' for each in split), rest
    return next((name for name in names if name in weights), None)
