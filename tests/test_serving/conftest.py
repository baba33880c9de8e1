"""A base, models adapted from it, their files, and a library of all of them."""

import copy

import pytest
import torch

import mmpeft
from tests.adapters import ADAPTERS, DOUBLE, Detector, trained


@pytest.fixture(scope='module')
def x():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 8, 6, 6, dtype=DOUBLE, generator=generator)


@pytest.fixture(scope='module')
def base(x):
    torch.manual_seed(2)
    model = Detector().double()
    model(x)  # statistics that are not those of a new layer
    return model.eval()


@pytest.fixture(scope='module')
def models(base, x):
    torch.manual_seed(3)
    return {name: trained(base, injection, x) for name, injection in ADAPTERS.items()}


@pytest.fixture(scope='module')
def files(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp('adapters')
    return {
        name: mmpeft.save_adapter(model, folder / f'{name}.safetensors')
        for name, model in models.items()
    }


@pytest.fixture
def adapters(base, files):
    adapters = mmpeft.AdapterLibrary(copy.deepcopy(base))
    for name, path in files.items():
        adapters.load(name, path)
    return adapters
