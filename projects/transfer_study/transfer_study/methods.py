"""The methods that are compared, in the order in which they are run."""

from mmpeft.engine.method_argument import read_method

MAIN = ('frozen', 'full', 'bitfit', 'lora', 'flora', 'liera', 'dora')
OTHER = (
    'liera_exact',
    'liera_dora',
    'liera_pissa',
    'liera_flora',
    'pissa',
    'adalora',
    'trilora',
    'trilora_mpc_o',
    'ia3',
    'ssb',
    'ssl',
    'houlsby',
    'flora_factor',
    'lora_kernels',
    'flora_kernels',
    'lora_loralib',
    'lora_auto',
    'flora_auto',
    'liera_auto',
    'lora_sensitivity',
    'flora_sensitivity',
)
# What no file of configs/_base_/methods holds: a setting of one that is there, or other targets.
SETTINGS = dict(
    lora_kernels=('lora', {}),
    flora_kernels=('flora', {}),
    liera_exact=('liera', dict(update='lie_exact')),
    flora_factor=('flora', dict(zero='factor0')),
    lora_loralib=('lora', dict(layout='loralib')),
    lora_auto=('lora', dict(scale='auto')),
    flora_auto=('flora', dict(scale='auto')),
    liera_auto=('liera', dict(scale='auto')),
    lora_sensitivity=('lora', {}),
    flora_sensitivity=('flora', {}),
)
# Convolutions whose kernels are larger than 1x1.
TARGETS = dict.fromkeys(
    ('lora_kernels', 'flora_kernels'), dict(kinds='conv', exclude_kinds='pointwise')
)
# Whose ranks go by the sensitivity of the loss, where the others have one for all weights.
MEASURED = ('lora_sensitivity', 'flora_sensitivity')


def hook_arguments(name: str) -> dict:
    """``method``, ``targets`` and ``unfreeze`` of PEFTHook for a name above."""
    file, changes = SETTINGS.get(name, (name, {}))
    hook = read_method(file)
    targets = (hook.get('targets') or {}) | TARGETS.get(name, {})
    return hook | dict(method=hook['method'] | changes, targets=targets)


METHODS = {name: hook_arguments(name) for name in MAIN + OTHER}
