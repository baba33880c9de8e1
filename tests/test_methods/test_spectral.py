"""Spectral Adapter: shifts of singular vectors."""

import pytest

from tests.adapting import adapted, close, numpy_svd

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def test_spectral_adapter_shifts_the_top_singular_vectors(layer):
    r = 2
    frozen, new, f = adapted(layer, dict(type='SpectralAdapter', rank=r))
    left, values, right = numpy_svd(frozen, f['left'])
    left[:, :r] += f['shift_left']
    right[:, :r] += f['shift_right'].T
    close(new, (left * values @ right.T).reshape(frozen.shape))
