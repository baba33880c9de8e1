"""Methods of parameter-efficient fine-tuning, one file each."""

from .base import Adapter, DeltaMethod, Method, RankMethod
from .bitfit import BitFit
from .dora import DoRA
from .ends import Frozen, Full
from .flora import FLoRA
from .liera import LieRA
from .lora import LoRA

__all__ = [
    'Adapter',
    'BitFit',
    'DeltaMethod',
    'DoRA',
    'FLoRA',
    'Frozen',
    'Full',
    'LieRA',
    'LoRA',
    'Method',
    'RankMethod',
]
