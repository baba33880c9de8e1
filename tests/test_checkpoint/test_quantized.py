"""Files of adapters on frozen weights in few bits, and what serves them."""

import pytest
import torch

import mmpeft
from mmpeft.checkpoint.fingerprint import fingerprint
from mmpeft.errors import UsageError
from mmpeft.quantization import Quantized, quantize
from tests.test_injection.test_quantized import BOTH, adapted, images, net, noisy

LORA = dict(type='LoRA', rank=2)


@pytest.fixture
def file(tmp_path):
    model = noisy(adapted(LORA))
    return model, mmpeft.save_adapter(model, tmp_path / 'a.safetensors')


def empty():
    """The quantized base without adapters."""
    return mmpeft.remove(adapted(LORA))


def test_an_adapter_file_is_of_what_is_stored(file):
    """It has no frozen weight in it, and names the format in its fingerprint."""
    model, path = file
    assert path.stat().st_size < 20000
    loaded = mmpeft.load_adapter(empty(), path)
    assert torch.equal(loaded(images()), model(images()))
    assert fingerprint(model).startswith('nf4-') and fingerprint(loaded) == fingerprint(model)
    mmpeft.inject(exact := net(), LORA, BOTH, unfreeze='head')
    message = "frozen weights in nf4, .* weights that are not in few bits. Set frozen_dtype='nf4' "
    with pytest.raises(UsageError, match=message):
        mmpeft.load_adapter(exact, path)
    with pytest.raises(UsageError, match="in nf4, .* weights in int8. Set frozen_dtype='nf4'"):
        mmpeft.load_adapter(adapted(LORA, 'int8'), path)
    plain = mmpeft.save_adapter(exact, path.with_name('plain.safetensors'))
    with pytest.raises(UsageError, match='not in few bits, .* in nf4. Leave frozen_dtype out'):
        mmpeft.load_adapter(adapted(LORA), plain)
    mmpeft.load_adapter(exact, path, check_base=False)
    assert (exact(images()) - model(images())).norm() < 0.2 * model(images()).norm()


def test_a_plain_checkpoint_is_rounded_into_the_base(file):
    model, _ = file
    other = net().state_dict() | {'fc1.weight': torch.randn(128, 64)}
    mmpeft.load_base(model, other)
    stored = model.fc1.parametrizations.weight.original
    assert torch.equal(stored, quantize(other['fc1.weight'], 'nf4'))
    with pytest.raises(UsageError, match='of another shape'):
        mmpeft.load_base(model, other | {'fc1.weight': torch.randn(64, 64)})


def test_the_whole_state_dict(file, tmp_path):
    model, _ = file
    torch.save(model.state_dict(), tmp_path / 'whole.pth')
    other = adapted(LORA)
    other.load_state_dict(torch.load(tmp_path / 'whole.pth', weights_only=True))
    assert torch.equal(other(images()), model(images()))


def test_a_library(file):
    model, path = file
    base = empty()
    library = mmpeft.AdapterLibrary(base)
    library.load('a', path)
    library.inject('b', LORA, dict(kinds=('linear',)))
    expected = model(images())
    for _ in range(2):
        assert torch.equal(library.use('a')(images()), expected)
        plain = library.use(None)(images())
        assert isinstance(base.fc1.weight, Quantized)
        assert torch.equal(library.use('b')(images()), plain)
    library.combine('c', dict(a=0.5, b=1.0))
    assert library.use('c')(images()).isfinite().all()


def test_models_share_a_base():
    models = dict(a=noisy(adapted(LORA)), b=adapted(LORA))
    expected = models['a'](images())
    freed = mmpeft.share_base(models)
    first, second = (m.fc1.parametrizations.weight.original for m in models.values())
    assert freed > first.nbytes and torch.equal(models['a'](images()), expected)
    assert first.quantized_data.data_ptr() == second.quantized_data.data_ptr()
    with pytest.raises(UsageError, match="is in nf4 in 'a' and in int8 in 'b'"):
        mmpeft.share_base(dict(a=models['a'], b=adapted(LORA, 'int8')))
