"""Files that mmpeft 0.2 and 0.3 wrote: tests/fixtures/v030."""

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from safetensors.torch import load_file

import mmpeft
from mmpeft.checkpoint.adapter_file import read_adapter
from mmpeft.checkpoint.fingerprint import digests
from mmpeft.errors import UsageError
from mmpeft.registry import modern_arguments
from tests.fixtures.v030.network import base, images
from tests.toy import state_of

V030 = Path(__file__).parents[1] / 'fixtures/v030'
CASES = json.loads((V030 / 'cases.json').read_text())
ADAPTERS = {case['name']: case for case in CASES['adapters']}
CHECKPOINTS = {case['name']: case for case in CASES['checkpoints']}


@pytest.fixture(scope='module')
def expected():
    return load_file(V030 / 'expected.safetensors')


def described(path):
    """The injections that a file of that time describes, all arguments included."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return read_adapter(path)[0]['injections']


def assert_is(model, path, output):
    """A model holds what a file does to the last bit, and computes what it did."""
    stored, state = load_file(path), mmpeft.adapter_state_dict(model)
    assert stored.keys() == state.keys()
    assert all(torch.equal(state[key], value) for key, value in stored.items())
    with torch.no_grad():
        difference = (model.eval()(images()) - output).abs().max()
    assert difference <= 1e-5 * output.abs().max()


@pytest.mark.parametrize('name', ADAPTERS)
def test_a_file_loads_into_the_plain_network_and_is_saved_anew(name, expected, tmp_path):
    case, output = ADAPTERS[name], expected[f'adapters/{name}']
    path = V030 / case['file']
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        model = mmpeft.load_adapter(base(case['network']), path)
    (warning,) = [w for w in caught if 'save it again' in str(w.message)]
    assert ('no checksum' in str(warning.message)) == (name == 'of_0_2')
    assert_is(model, path, output)
    anew = mmpeft.save_adapter(model, tmp_path / 'anew.safetensors')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = mmpeft.load_adapter(base(case['network']), anew)
    assert_is(again, path, output)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [name for name, p in again.named_parameters() if not p.requires_grad]


@pytest.mark.parametrize('name', ADAPTERS)
def test_a_file_loads_into_a_network_that_the_user_adapted(name, expected):
    case = ADAPTERS[name]
    path, model = V030 / case['file'], base(case['network'])
    for injection in described(path):
        method, targets = modern_arguments(injection['method'], '0.3'), injection['targets']
        for changes in targets['overrides'].values():
            changes |= dict(scale=1.0) if 'update' in changes else {}
        mmpeft.inject(model, method, targets, injection['unfreeze'])
    with pytest.warns(UserWarning, match='save it again'):
        mmpeft.load_adapter(model, path)
    assert_is(model, path, expected[f'adapters/{name}'])


def test_another_method_or_rank_is_refused():
    path = V030 / ADAPTERS['lora']['file']
    for method, message in (
        (dict(type='LoRA', rank=3, layout='loralib'), r'rank=2 at .*stem\.weight, .* rank=3'),
        (dict(type='FLoRA', rank=2), r'LoRA at .*stem\.weight, and the model FLoRA'),
        (dict(type='LoRA', rank=2, layout='channel'), "layout='loralib' at .*'channel'"),
    ):
        model = base('mixed')
        mmpeft.inject(model, method, dict(module='backbone'))
        with pytest.raises(UsageError, match=message), pytest.warns(UserWarning):
            mmpeft.load_adapter(model, path)


def test_layouts_are_the_same_on_linear_layers(expected):
    case = ADAPTERS['tied_lora']
    model = base('tied')
    mmpeft.inject(model, dict(type='LoRA', rank=2), dict(module='backbone', include=['mlp']))
    with pytest.warns(UserWarning, match='save it again'):
        mmpeft.load_adapter(model, V030 / case['file'])
    assert_is(model, V030 / case['file'], expected['adapters/tied_lora'])


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_a_checkpoint_is_tested_by_the_config_of_its_run(name, expected, tmp_path):
    case = CHECKPOINTS[name]
    runner = runner_of(case, tmp_path, load_from=str(V030 / case['file']))
    scores = torch.tensor(runner.test()['toy/scores'])
    given = {key: value.hex() for key, value in digests(runner.model.state_dict()).items()}
    assert given == case['digests']
    assert (scores - expected[f'checkpoints/{name}']).abs().max() <= 1e-5 * scores.abs().max()


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_the_adapter_beside_a_checkpoint_loads_into_its_base(name, tmp_path):
    case = CHECKPOINTS[name]
    config = copy.deepcopy(case['config'])
    del config['default_hooks']['peft']
    model = runner_of(case | dict(config=config), tmp_path).model
    model.init_weights()
    with pytest.warns(UserWarning, match='save it again'):
        mmpeft.load_adapter(model, V030 / case['adapter'])
    given = {key: value.hex() for key, value in digests(model.state_dict()).items()}
    assert given == case['digests']


@pytest.mark.parametrize('run', ['lora_ema', 'adalora'])
def test_a_resumed_run_ends_as_it_did(run, tmp_path):
    """To float32's rounding, which the machine and its kernels decide."""
    case = CHECKPOINTS[f'{run}/epoch_2']
    shutil.copy(V030 / f'checkpoints/{run}/epoch_1.pth', tmp_path)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    runner_of(case, tmp_path, resume=True).train()
    ours, theirs = (
        torch.load(p, weights_only=False) for p in (tmp_path / 'epoch_2.pth', V030 / case['file'])
    )
    for key in ('state_dict', 'ema_state_dict'):
        state, given = ours.get(key, {}), theirs.get(key, {})
        assert state.keys() == given.keys()
        for k, value in given.items():
            torch.testing.assert_close(state[k], value, rtol=1e-5, atol=1e-6)
    assert (
        state_of(tmp_path / 'epoch_2.pth').keys()
        == load_file(tmp_path / 'epoch_2.safetensors').keys()
    )
    read_adapter(tmp_path / 'epoch_2.safetensors')


def runner_of(case, work_dir, **changes):
    name = f'{case["name"].replace("/", "_")}_{work_dir.name}'
    settings = dict(work_dir=str(work_dir), experiment_name=name)
    return Runner.from_cfg(Config(case['config'] | settings | changes))
