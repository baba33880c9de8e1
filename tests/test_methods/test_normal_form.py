"""What a method declares to the kernels is what it applies."""

import pytest
import torch

from tests.cases import METHODS
from tests.test_execution.tables import LARGE, NORMAL, TABLE, adapted

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

LAYERS = ('linear', 'conv2d', 'conv2d_1x1', 'conv1d', 'transposed2d', 'depthwise', 'volume')


@pytest.mark.parametrize('name', NORMAL)
@pytest.mark.parametrize('case', LAYERS)
def test_the_form_is_phi(case, name):
    layer = adapted(TABLE[case], METHODS[name])[0]
    weight, adapter = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
    form = adapter.method.normal_form(adapter.factors, adapter.spec)
    if not adapter.spec.is_plain:
        assert form is None
    if form is not None:
        assert form.core is None or form.core.ndim == 2 + len(adapter.spec.kernel_size)
        expected = layer.weight
        assert (form.apply(weight) - expected).abs().max() < 1e-12
        completed = form.with_core(adapter.spec.kernel_size)
        assert (completed.apply(weight) - expected).abs().max() < 1e-12


@pytest.mark.parametrize('name', NORMAL)
def test_every_such_method_has_a_form_of_linear_layers(name):
    layer = adapted(TABLE['linear'], METHODS[name])[0]
    adapter = layer.parametrizations.weight[0]
    form = adapter.method.normal_form(adapter.factors, adapter.spec)
    up, down = form.matrices()
    assert up.shape == (5, len(down)) and down.shape == (len(up.T), 6)
    delta = adapter.method.delta(adapter.factors, adapter.spec)
    assert (up @ down - delta).abs().max() < 1e-12


@pytest.mark.parametrize('name', ['lora_channel', 'flora', 'liera'])
@pytest.mark.parametrize('case', ['large_linear', 'pointwise', 'kernel'])
def test_dropout_is_in_the_form_of_a_training_step_alone(case, name):
    layer = adapted(LARGE[case], METHODS[name] | dict(dropout=0.5))[0]
    weight, adapter = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
    form = adapter.method.normal_form(adapter.factors, adapter.spec)
    assert form.dropped(adapter.spec) is form
    form = adapter.method.normal_form(adapter.factors, adapter.spec, training=True)
    torch.default_generator.manual_seed(3)
    found = form.dropped(adapter.spec).apply(weight)
    torch.default_generator.manual_seed(3)
    expected = adapter.method.apply(weight, adapter.factors, adapter.spec, training=True)
    assert (found - expected).abs().max() < 1e-12
    dropped = (expected == weight).transpose(0, 1).flatten(1).all(1)
    assert 0 < dropped.sum() < len(dropped)
