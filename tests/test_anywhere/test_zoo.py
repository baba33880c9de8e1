"""A method of each family on models of transformers and diffusers, from injection to merging.

Each model takes one of the methods; all of them with MMPEFT_EVERY_PAIR=1.
"""

import copy
import os

import pytest
import torch

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.methods import ActivationMethod
from tests.cases import randomize
from tests.hf_zoo import HF, MORE, tensors_in

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')
METHODS = dict(
    lora=dict(type='LoRA', rank=2),
    flora=dict(type='FLoRA', rank=2),
    liera=dict(type='LieRA', rank=2),
    dora=dict(type='DoRA', rank=2),
    pissa=dict(type='PiSSA', rank=2),
    ssb=dict(type='SSB'),
    bitfit=dict(type='BitFit'),
    houlsby=dict(type='HoulsbyAdapter', rank=2),
    vpt=dict(type='VPT', tokens=2),
)
ZOO = HF | MORE
STEP = 1 if os.environ.get('MMPEFT_EVERY_PAIR') else len(METHODS)
PAIRS = [
    (name, method)
    for n, name in enumerate(ZOO)
    for m, method in enumerate(METHODS)
    if (m - n) % STEP == 0
]


SINGLE = {'mask2former'}  # mixes types otherwise


@pytest.fixture
def dtype(name):
    """Also the default type, in which CLIP makes its masks."""
    torch.set_default_dtype(torch.float32 if name in SINGLE else torch.float64)
    yield torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)


def converted(node, dtype):
    if isinstance(node, dict):
        return {key: converted(value, dtype) for key, value in node.items()}
    return node.to(dtype) if node.is_floating_point() else node


@pytest.mark.parametrize('name, method', PAIRS)
def test_the_whole_way(name, method, dtype, tmp_path):
    model, given = ZOO[name].build().eval(), converted(ZOO[name].inputs(), dtype)
    plain = copy.deepcopy(model)

    def outputs(model):
        return tensors_in(model(**given))

    def assert_close(one, other):
        tolerance = dict(rtol=0.02, atol=5e-3) if name in SINGLE else dict(rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(one, other, **tolerance)

    acts = issubclass(mmpeft.METHODS.get(METHODS[method]['type']), ActivationMethod)
    try:
        mmpeft.inject(model, METHODS[method])
    except UsageError as error:
        if method == 'bitfit':
            assert not any(name.endswith('bias') for name, _ in plain.named_parameters())
        else:
            assert acts and 'acts at insertion points of kind' in str(error)
        return
    if method != 'vpt':
        assert_close(outputs(model), outputs(plain))
    twin = copy.deepcopy(plain)
    mmpeft.inject(twin, METHODS[method], execution='plain')
    randomize(model, 0.1)
    twin.load_state_dict(model.state_dict())
    for each in (model, twin):
        sum(y.square().mean() for y in outputs(each)).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for key, parameter in trained.items():
        assert_close(parameter.grad, twin.get_parameter(key).grad)
    assert any(p.grad is not None and p.grad.any() for p in trained.values())
    optimizer = torch.optim.SGD(trained.values(), 1e-5)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        sum(y.square().mean() for y in outputs(model)).backward()
    with torch.no_grad():
        expected = outputs(model)
        assert all(y.isfinite().all() for y in expected)
        path = mmpeft.save_adapter(model, tmp_path / 'adapter.safetensors')
        assert_close(outputs(mmpeft.load_adapter(copy.deepcopy(plain), path)), expected)
        if acts:
            with pytest.raises(UsageError, match='cannot be merged'):
                mmpeft.merge(model)
        else:
            assert_close(outputs(mmpeft.merge(model)), expected)
            assert model.state_dict().keys() == plain.state_dict().keys()
