"""Any timm model as a backbone of OpenMMLab: pyramids, and plain transformers."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, LayerNorm2d, SyncBatchNormAct
from timm.models._features import FeatureGetterNet
from torch import nn

from mmpeft.errors import UsageError
from mmpeft.quantization import can_quantize, check_format, multiplies, quantize, stored_parts
from mmpeft.registry import MODELS

from .timm_weights import name_in, read_weights

# timm's arguments that let a network take images of any size, where its positions can.
ANY_SIZE = (dict(strict_img_size=False), dict(dynamic_img_size=True), {})


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """A timm network that returns one feature map for each level.

    Convolutional networks, Swin and Hiera have levels of falling resolution. A
    plain vision transformer has one resolution, that of its patches; a level is
    the output of a block, without class and register tokens, as a map. A neck,
    :class:`~mmpeft.models.SimpleFeaturePyramid` or mmseg's ``Feature2Pyramid``,
    makes a pyramid of it. Rotary and absolute positions follow the image's size.

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
            ``.safetensors``, or the ``.index.json`` of several) of the
            network's weights, in timm's layout or another that
            :func:`~.timm_weights.read_weights` takes.
        out_indices: The levels to return, (0, 1, 2, 3) if None. Of a plain
            transformer the blocks, counted from the end if negative; blocks
            behind the last one are left out.
        out_norm: Put a LayerNorm on each level.
        drop_path: Stochastic depth rate of the deepest block.
        with_cp: Recompute activations in backward. timm uses the form without
            reentrance, which a frozen stem needs.
        frozen_dtype: Hold the weights of the network's linear layers and convolutions in few
            bits, ``'int8'``, ``'fp8'`` or ``'nf4'``, as :func:`mmpeft.inject` does by its argument
            of this name. Those of a ``checkpoint`` are rounded as they are read, one after another,
            and are never whole in memory where the file is a ``.safetensors`` one. Needs
            accelerate. Only for weights that do not train.
        init_cfg: As in :class:`mmengine.model.BaseModule`.
        **kwargs: For :func:`timm.create_model`, such as ``patch_size=16`` for a
            transformer with patches of 14.

    Attributes:
        pretrained_cfg: What timm says of the weights: ``mean``, ``std``, ``license``.

    Raises:
        UsageError: timm does not know the name, both ``pretrained`` and
            ``checkpoint`` are given, ``frozen_dtype`` is unknown or of no use, the
            network has no such levels, or ``out_indices`` are in another order than the
            levels, or missing for a plain transformer.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        checkpoint: str | None = None,
        out_indices: Sequence[int] | None = None,
        out_norm: bool = True,
        drop_path: float = 0.0,
        with_cp: bool = False,
        frozen_dtype: str | None = None,
        init_cfg: dict | None = None,
        **kwargs,
    ):
        super().__init__(init_cfg)
        if pretrained and checkpoint:
            raise UsageError(
                f'TimmBackbone {name!r} was given both pretrained=True and '
                f'checkpoint={str(checkpoint)!r}. Keep the one whose weights you want.'
            )
        if frozen_dtype and init_cfg:
            raise UsageError(
                'TimmBackbone: init_cfg draws weights, which few bits do not keep. '
                'Leave out init_cfg or frozen_dtype, or give the weights as checkpoint.'
            )
        if not timm.is_model(name):
            close = timm.list_models(f'*{name.split(".")[0].split("_")[0]}*')[:5]
            raise UsageError(
                f'timm {timm.__version__} has no model {name!r}. '
                f'Near it are: {", ".join(close) or "none"}. See timm.list_models().'
            )
        if drop_path:
            kwargs['drop_path_rate'] = drop_path
        self.name = name
        self.pretrained = pretrained
        self.checkpoint = checkpoint
        self.frozen_dtype = frozen_dtype
        self._create = dict(
            model_name=name,
            features_only=True,
            out_indices=(0, 1, 2, 3) if out_indices is None else tuple(out_indices),
            **kwargs,
        )
        network = self._network() if frozen_dtype is None else self._in_few_bits(frozen_dtype)
        info = network.feature_info
        strides = {level['reduction'] for level in info.info}
        if out_indices is None and len(strides) == 1 < len(info):
            raise UsageError(
                f'{name!r} is a plain transformer, whose {len(info)} blocks have maps of the same '
                'size. Say which to return: out_indices=(-1,) for a pyramid on the last one, or '
                'several, such as (2, 5, 8, 11).'
            )
        levels = [index % len(info) for index in self._create['out_indices']]
        if levels != sorted(set(levels)):
            raise UsageError(
                f'TimmBackbone: timm returns levels from the first to the last, so out_indices='
                f'{tuple(out_indices)} has to name them once and in this order.'
            )
        # timm's wrapper of what returns its own levels has nothing but the network in it.
        self.returns_levels = isinstance(network, FeatureGetterNet)
        self.model = network.model if self.returns_levels else network
        self.pretrained_cfg = network.pretrained_cfg
        self.out_indices = tuple(i % len(info) for i in info.out_indices)
        # What divides an image's size, where positions or windows ask for it.
        pads = getattr(getattr(self.model, 'patch_embed', None), 'dynamic_img_pad', False)
        self.stride = max(strides) if self.returns_levels and not pads else 1
        if with_cp:
            self.model.set_grad_checkpointing(True)
        self._activating = [n for n, m in self.model.named_modules() if _activates(m)]
        self.channels_last = str(getattr(self.model, 'output_fmt', 'NCHW')).endswith('NHWC')
        self.newly_initialized = tuple(f'norm{i}' for i in self.out_indices) if out_norm else ()
        if out_norm:
            for level, width in zip(self.out_indices, info.channels(), strict=True):
                self.add_module(f'norm{level}', LayerNorm2d(width, eps=1e-6))

    def _network(self, **changes):
        """timm's network, for images of any size if it has a way to take them."""
        for options in ANY_SIZE:
            try:
                return timm.create_model(**options | self._create | changes)
            except TypeError as error:
                if not options or next(iter(options)) not in str(error):
                    raise
            except AssertionError as error:
                raise UsageError(
                    f'timm cannot build {self.name!r} with the levels '
                    f'out_indices={self._create["out_indices"]}: {str(error).rstrip(".")}.'
                ) from error

    def _in_few_bits(self, dtype):
        """timm's network with weights in few bits, and zeros where a file is read later."""
        check_format(dtype)
        reads = bool(self.checkpoint) and torch.get_default_device().type != 'meta'
        with _without_parameters() if reads else nullcontext():
            network = self._network()
        layers = filter(multiplies, network.modules())
        stored = {layer for layer in layers if can_quantize(layer.weight, dtype)}
        if not stored:
            raise UsageError(
                f'frozen_dtype={dtype!r}: {self.name!r} has no linear layer or convolution whose '
                'weight can be stored so. Leave frozen_dtype out.'
            )
        for layer in network.modules():
            if layer in stored:
                layer.weight = nn.Parameter(quantize(layer.weight, dtype), requires_grad=False)
            for name, value in layer._parameters.items() if reads else ():
                if value is not None:
                    empty = torch.empty_like(value, device=torch.get_default_device())
                    layer._parameters[name] = nn.Parameter(empty, value.requires_grad)
                    for part in stored_parts(empty).values():
                        nn.init.zeros_(part)
        return network

    def init_weights(self) -> None:
        """Load the pretrained weights, if any are named.

        Raises:
            MissingFileError: ``checkpoint`` does not exist.
            DamagedFileError: It cannot be read without running code from it.
            UsageError: The file lacks weights of this network, or timm's hub gave none.
        """
        if self._is_init:
            return
        if self.init_cfg or not (self.checkpoint or self.frozen_dtype):
            super().init_weights()  # draws the network's weights anew
        self._is_init = True
        if self.checkpoint:
            path = Path(self.checkpoint)
            weights = read_weights(path, self.name, self.model.state_dict(), self._whole())
            self.model.load_state_dict(weights)
            print_log(f'Loaded {len(weights)} tensors of the backbone from {path}', 'current')
        elif self.pretrained:
            self._load_hub()

    def _load_hub(self):
        try:
            source = self._network(pretrained=True)
        except Exception as error:
            raise UsageError(
                f'timm could not fetch the pretrained weights of {self.name!r} '
                f'({type(error).__name__}: {error}). Without a connection, download them '
                "elsewhere and set backbone.pretrained=False, backbone.checkpoint='FILE'."
            ) from error
        self.model.load_state_dict((source.model if self.returns_levels else source).state_dict())

    def _whole(self):
        """timm's whole network, without memory."""
        with torch.device('meta'):
            cut = ('features_only', 'out_indices')
            whole = {key: value for key, value in self._create.items() if key not in cut}
            return timm.create_model(**whole)

    def names_in_whole(self) -> dict[str, str]:
        """Paths below ``model`` of what holds tensors, and those in ``timm.create_model(name)``."""
        weights, names = self._whole().state_dict(), {}
        with torch.device('meta'):
            own = self._network()  # without adapters
        for key in (own.model if self.returns_levels else own).state_dict():
            names[key.rpartition('.')[0]] = name_in(weights, key).rpartition('.')[0]
        return names

    def train(self, mode: bool = True) -> 'TimmBackbone':
        """As of every module.

        Raises:
            UsageError: Norms that hold an activation were replaced by norms that do not.
        """
        present = dict(self.model.named_modules()) if self._activating else {}
        lost = [n for n in self._activating if n in present and _is_bare(present[n])]
        if lost:
            raise UsageError(
                f'{len(lost)} batch norms of {self.name}, such as {lost[0]}, have lost the '
                "activation that they held: mmengine's sync_bn and fuse_conv_bn replace norms "
                'without it. Remove sync_bn from the config, or do not fuse this model.'
            )
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(N, 3, H, W) to a contiguous map (N, C_i, H_i, W_i) for each of ``out_indices``.

        Raises:
            UsageError: The size is not divided by the patches of a transformer without
                timm's ``dynamic_img_pad=True``, with which H_i and W_i are rounded up.
        """
        if any(side % self.stride for side in x.shape[2:]):
            raise UsageError(
                f'{self.name} takes images whose height and width are multiples '
                f'of {self.stride}, not {tuple(x.shape[2:])}. Set pad_size_divisor={self.stride} '
                '(in mmseg size or size_divisor) in model.data_preprocessor.'
            )
        if self.returns_levels:
            levels = self.model.forward_intermediates(
                x, indices=list(self.out_indices), output_fmt='NCHW', intermediates_only=True
            )
        else:
            levels = self.model(x)
            if self.channels_last:
                levels = [level.permute(0, 3, 1, 2) for level in levels]
        norms = [getattr(self, f'norm{i}', nn.Identity()) for i in self.out_indices]
        maps = (norm(level) for norm, level in zip(norms, levels, strict=True))
        # mmcv's RoIAlign reads memory as if it were contiguous, and timm's may be channels-last.
        return tuple(level.contiguous() for level in maps)


def _activates(module):
    is_both = isinstance(module, BatchNormAct2d | FrozenBatchNormAct2d | SyncBatchNormAct)
    return is_both and not isinstance(module.act, nn.Identity)


def _is_bare(module):
    """Whether a module is a batch norm without activation, or what takes its place when fused."""
    is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Identity)
    return (is_norm or type(module).__name__ == 'SyncBatchNorm') and not _activates(module)


def _without_parameters():
    """A context in which modules are built with parameters on the meta device alone."""
    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise UsageError(
            f'TimmBackbone(frozen_dtype=...) with a checkpoint needs accelerate ({error}). Install '
            "it with pip install 'mmpeft[quantized]', or give frozen_dtype to the hook instead."
        ) from error
    return init_empty_weights(include_buffers=False)
