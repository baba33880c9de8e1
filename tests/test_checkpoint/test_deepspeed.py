"""Adapted models in DeepSpeed over two gloo processes against one plain process."""

import pytest
import torch
from safetensors.torch import load_file

import mmpeft
from mmpeft.checkpoint.fingerprint import fingerprint
from tests.processes import launch
from tests.test_checkpoint import deepspeed_run
from tests.test_checkpoint.deepspeed_run import METHODS, STAGES, network
from tests.test_checkpoint.sharded_run import train


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The folder of the run, and what each rank found."""
    folder = tmp_path_factory.mktemp('deepspeed')
    mmpeft.save_adapter(network('transformer', 'LoRA').float(), folder / 'other.safetensors')
    done = launch(2, deepspeed_run.__file__, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [torch.load(folder / f'rank{rank}.pth') for rank in (0, 1)]


@pytest.mark.parametrize('kind', ['transformer', 'conv'])
@pytest.mark.parametrize('method', METHODS)
def test_files_and_training_are_those_of_one_process(kind, method, runs, tmp_path):
    folder, ranks = runs
    model = network(kind, method).float()
    path = mmpeft.save_adapter(model, tmp_path / 'plain.safetensors')
    start = load_file(path)
    train(model, kind, torch.float32)
    trained = mmpeft.adapter_state_dict(model)
    for stage in STAGES:
        file = folder / f'{stage}_{kind}_{method}.safetensors'
        assert file.read_bytes() == path.read_bytes()
        found = ranks[0][stage][kind, method]
        assert found.keys() == trained.keys()
        for key, value in trained.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-6)
        assert any((value - start[key]).abs().max() > 1e-3 for key, value in found.items())
        for rank in ranks:
            assert rank[stage][kind, method, 'fingerprint'] == fingerprint(model)
            assert any(rank[stage][kind, method, 'sizes']) == (stage < 3)


@pytest.mark.parametrize('stage', STAGES)
def test_what_would_be_lost_is_refused_on_all_ranks(stage, runs):
    first, second = (rank[stage, 'calls'] for rank in runs[1])
    assert [first.pop('writes'), second.pop('writes')] == [[True, True], [stage == 3, stage == 3]]
    assert first == second
    for name in ('load_adapter', 'monitor', 'penalty'):
        assert f"mmpeft.{name} does not reach DeepSpeed's optimizer" in first[name]
    assert first['callback'] == first['allocate']
    if stage == 3:
        for name in ('inject', 'merge', 'remove', 'summary', 'allocate'):
            assert f'mmpeft.{name} needs whole parameters' in first[name]
        assert 'AdapterLibrary needs whole parameters' in first['library']
    else:
        for name in ('inject', 'allocate'):
            assert f"mmpeft.{name} does not reach DeepSpeed's optimizer" in first[name]
        assert not any(first[name] for name in ('merge', 'remove', 'summary'))


@pytest.mark.parametrize('stage', STAGES)
def test_in_bfloat16_the_factors_are_those_of_the_engine(stage, runs):
    found = runs[1][0][stage, 'low']
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    model = network('transformer', 'LoRA').float()
    train(model, 'transformer', torch.float32)
    for key, value in mmpeft.adapter_state_dict(model).items():
        torch.testing.assert_close(found[key].float(), value, rtol=0.05, atol=5e-3)
