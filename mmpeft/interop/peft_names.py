"""What Hugging Face's peft calls the tensors of LoRA and DoRA, and their shapes there.

The tensors are the same on both sides and only change their shape, so that a
round trip is equal to the last bit:

    mmpeft                        peft
    lora_A (r, in k k)            lora_A.weight (r, in), of a kernel (r, in, k, k)
    lora_B (out, r)               lora_B.weight (out, r), of a kernel (out, r, 1, 1)
    magnitude (out,)              lora_magnitude_vector (out,), of a kernel (1, out, 1, 1)
    scale, or alpha / rank        lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

Factors of GPT-2's Conv1D, which stores (in, out), are those of the equal linear
layer; peft sees by the layer whether ``fan_in_fan_out`` is meant.

What trains beside the adapters is stored in peft's ``modules_to_save``. Where
peft would compute something else, conversion is refused: on grouped and
dilated kernels, inside ``nn.MultiheadAttention``, with another update than
W + dW. peft's DoRA always takes the norm as a constant in backward, which is
``detach_norm`` here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from mmpeft.errors import UsageError
from mmpeft.methods.spec import WeightSpec

PREFIX = 'base_model.model.'
"""Start of all keys that peft stores."""

SUFFIXES = dict(lora_A='lora_A.weight', lora_B='lora_B.weight', magnitude='lora_magnitude_vector')
FACTORS = {theirs.removesuffix('.weight'): own for own, theirs in SUFFIXES.items()}
"""Names of the factors, and ours by peft's, to which versions add ``.weight`` or not."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Names:
    """How the folder calls the modules of a model.

    Attributes:
        module: The module that is peft's base, such as ``'backbone.model'``;
            '' for the model.
        renamed: Paths below ``module`` with those in the folder; other modules
            have none there. The same paths if None.
    """

    module: str = ''
    renamed: Mapping[str, str] | None = None

    def theirs(self, path: str) -> str | None:
        """The folder's name of a module of the model, None if it has none."""
        prefix = f'{self.module}.' if self.module else ''
        if not path.startswith(prefix):
            return None
        inner = path.removeprefix(prefix)
        return inner if self.renamed is None else self.renamed.get(inner)

    def ours(self, path: str) -> str | None:
        """The model's name of a module of the folder, None if it has none."""
        if self.renamed is not None:
            path = {theirs: own for own, theirs in self.renamed.items()}.get(path)
        return path if path is None or not self.module else f'{self.module}.{path}'


def peft_shapes(spec: WeightSpec, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of peft's tensors for a weight, by our names of the factors."""
    ones = (1,) * len(spec.kernel_size)
    return dict(
        lora_A=(rank, *spec.shape[1:]),
        lora_B=(spec.shape[0], rank, *ones),
        magnitude=(1, spec.shape[0], *ones) if ones else (spec.shape[0],),
    )


def check_layer(model: nn.Module, path: str, tensor: str, spec: WeightSpec) -> None:
    """Refuse a weight, ``tensor`` of the layer at ``path``, on which peft computes something else.

    Raises:
        UsageError: The message says what is different there.
    """
    if spec.fan_in_fan_out:
        return
    layer = model.get_submodule(path)
    parent = model.get_submodule(path.rpartition('.')[0])
    kind = next((kind for kind in LAYERS if isinstance(layer, kind)), None)
    own = type(layer).__name__.removeprefix('Parametrized')
    reason = None
    paths = [name for name, m in model.named_modules(remove_duplicate=False) if m is layer]
    if len(paths) > 1:
        reason = f'belongs to a module that is also at {next(n for n in paths if n != path)}'
    elif kind is None or tensor != 'weight':
        reason = 'is not a linear layer or convolution of torch'
    elif own not in (kind.__name__, 'NonDynamicallyQuantizableLinear'):
        reason = f'belongs to a {own}, which may change its weight before use'
    elif isinstance(parent, nn.MultiheadAttention):
        reason = "is read directly by nn.MultiheadAttention, which bypasses peft's layer"
    elif spec.groups > 1:
        reason = 'is of a grouped convolution'
    elif kind is not nn.Linear and math.prod(spec.kernel_size) > 1 and set(layer.dilation) != {1}:
        reason = 'is of a dilated convolution'
    elif kind is not nn.Linear and layer.padding_mode != 'zeros':
        reason = f'is of a convolution with padding_mode={layer.padding_mode!r}'
    if reason:
        raise UsageError(
            f'{path}.{tensor} {reason}, where peft computes something else. Leave it out '
            '(targets.exclude), or merge (mmpeft.merge).'
        )
