"""Models in DDP, FSDP and fully_shard over two gloo processes against one plain process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmpeft
from mmpeft.checkpoint.fingerprint import fingerprint
from tests.processes import launch
from tests.test_checkpoint import sharded_run
from tests.test_checkpoint.sharded_run import METHODS, TARGETS, batch, network, train, watched

ROOT = Path(__file__).parents[2]
WAYS = ('ddp', 'fsdp1', 'fsdp2')
SHARDED = WAYS[1:]
KINDS = ('transformer', 'conv')


def other():
    """The network of the tests with other values in its adapters."""
    model = network('transformer', 'LoRA')
    train(model, 'transformer')
    return model


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The folder of the run, and what each rank found."""
    folder = tmp_path_factory.mktemp('sharded')
    mmpeft.save_adapter(other(), folder / 'other.safetensors')
    wrong = network('transformer')
    with torch.no_grad():
        wrong.blocks[0].qkv.weight.add_(1)
    mmpeft.inject(wrong, METHODS['LoRA'], TARGETS)
    mmpeft.save_adapter(wrong, folder / 'wrong.safetensors')
    done = launch(2, sharded_run.__file__, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [torch.load(folder / f'rank{rank}.pth') for rank in (0, 1)]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('method', METHODS)
def test_files_and_training_are_those_of_one_process(kind, method, runs, tmp_path):
    folder, ranks = runs
    model = network(kind, method)
    path = mmpeft.save_adapter(model, tmp_path / 'plain.safetensors')
    train(model, kind)
    trained = mmpeft.adapter_state_dict(model)
    for way in WAYS:
        file = folder / f'{way}_{kind}_{method}.safetensors'
        assert file.read_bytes() == path.read_bytes()
        found = ranks[0][way][kind, method]
        assert found.keys() == trained.keys()
        for key, value in trained.items():
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-13)
        assert any(
            (value - load_file(path)[key]).abs().max() > 1e-3 for key, value in found.items()
        )
        for rank in ranks:
            assert rank[way][kind, method, 'fingerprint'] == fingerprint(model)


@pytest.mark.parametrize('way', WAYS)
def test_a_norm_may_be_sharded_away_when_the_layer_behind_it_has_its_backward(way, runs):
    model = network('transformer')
    mmpeft.inject(model, METHODS['LoRA'])
    train(model, 'transformer')
    torch.testing.assert_close(runs[1][0][way, 'norm'], mmpeft.adapter_state_dict(model))


@pytest.mark.parametrize('way', WAYS)
def test_a_file_is_loaded_by_all_ranks(way, runs):
    _, ranks = runs
    model = other()
    state, *_ = ranks[0][way, 'load']
    assert state.keys() == mmpeft.adapter_state_dict(model).keys()
    assert all(torch.equal(state[k], v) for k, v in mmpeft.adapter_state_dict(model).items())
    outputs = torch.cat([rank[way, 'load'][1] for rank in ranks])
    with torch.no_grad():
        torch.testing.assert_close(outputs, model(batch('transformer')[0]))
    first, second = (rank[way, 'load'][2] for rank in ranks)
    assert 'was trained on another frozen base' in first
    assert first == second


@pytest.mark.parametrize('way', WAYS)
def test_other_wrappers_and_tied_weights_are_saved_and_loaded(way, runs):
    expected, found = mmpeft.adapter_state_dict(network('transformer', 'LoRA')), runs[1][0]
    for name, state in found[way, 'wrappers'].items():
        if name == 'tied':
            assert len(state) == len(expected) - 2
        else:
            assert list(state) == list(expected)
            assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize('way, case', [('ddp', 'plain'), ('ddp', 'adalora'), ('fsdp2', 'plain')])
def test_a_watched_loop_is_that_of_one_process(way, case, runs):
    """The allocator of AdaLoRA keeps the same on both ranks."""
    _, said, state, expected = watched(None, case)
    assert not said
    for rank, found in enumerate(runs[1]):
        error, said, own, trained = found[way, case]
        assert error is None and not said
        assert own['iteration'] == 12
        kept = [each['kept'] for each in own['allocation']]
        torch.testing.assert_close(kept, [each['kept'] for each in state['allocation']])
        if way == 'ddp' or rank == 0:
            assert trained.keys() == expected.keys()
        for key, value in trained.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-9)
    assert (case == 'adalora') == bool(kept)
    if kept:
        flags = torch.cat([*kept[0].values()])
        assert 0 < flags.sum() < len(flags)


@pytest.mark.parametrize('way', ['ddp', 'fsdp2'])
def test_a_monitor_stops_both_ranks(way, runs):
    """At the same step; a dead adapter is named, and skipped steps change nothing."""
    dead = [rank[way, 'dead'] for rank in runs[1]]
    assert dead[0][0] == dead[1][0]
    assert dead[0][0].startswith('3: No gradient reached 2 of 8 adapters')
    assert dead[0][0].count("'blocks.0.mlp.0.") == 1 and not dead[0][1]
    (error, *_), (other, *_) = nan = [rank[way, 'nan'] for rank in runs[1]]
    assert error.startswith('5: Loss or gradients were NaN') and other.startswith('5: Loss or')
    assert "NaN is first given to 'blocks.0.qkv'" in error
    assert all(len(said) == 3 and 'the step was skipped' in said[0] for _, said, *_ in nan)
    assert all(value.isfinite().all() for *_, trained in nan for value in trained.values())


@pytest.mark.parametrize('way', SHARDED)
def test_what_a_sharded_model_cannot_do_is_refused_on_all_ranks(way, runs):
    first, second = (dict(rank[way, 'calls']) for rank in runs[1])
    assert first == second
    assert first.pop('same')
    for name in ('inject', 'load_adapter', 'merge', 'remove', 'unmerge'):
        assert first[name].startswith(f'mmpeft.{name} needs whole parameters'), name
    assert 'AdapterLibrary needs whole parameters' in first['library']
    assert 'mmpeft.allocate needs whole parameters' in first['allocate']
    assert 'mmpeft.penalty needs whole parameters' in first['penalty']
    assert 'has no adapters' in first['save']
    if way == 'fsdp1':
        assert 'Shard the model by fully_shard' in first['monitor']
        assert 'mmpeft.summary needs whole parameters' in first['summary']
        assert 'mmpeft.summary needs whole parameters' in first['inside_summary']
        for name in ('inside', 'inside_fingerprint'):
            assert 'Give the FullyShardedDataParallel itself' in first[name]
    else:
        names = 'summary', 'inside', 'inside_fingerprint', 'inside_summary'
        assert not any(first[name] for name in names)


def test_fsdp_without_original_parameters_is_refused(runs):
    for rank in runs[1]:
        assert 'use_orig_params=True' in rank['flat']['save']
        assert 'use_orig_params=True' in rank['flat']['print']


def test_in_ddp_rank_0_alone_writes(runs):
    folder, found = runs[0], [rank['ddp', 'calls'] for rank in runs[1]]
    assert [each['saved'] for each in found] == [True, False]
    assert [p.name for p in sorted(folder.glob('ddp_by*'))] == [
        f'ddp_by_rank0.safetensors{end}' for end in ('', '.json')
    ]
    assert all('has no adapters' in each['empty'] for each in found)


def test_in_ddp_all_but_adding_adapters_works(runs):
    model, base = network('transformer', 'LoRA'), network('transformer').state_dict()
    for rank in runs[1]:
        found = rank['ddp', 'calls']
        assert 'mmpeft.inject adds parameters' in found['inject']
        assert 'mmpeft.load_adapter adds parameters' in found['load_adapter']
        assert 'in a wrapper' in found['library']
        assert found['summary'] == str(mmpeft.summary(model))
        before, merged, unmerged = found['outputs']
        torch.testing.assert_close(merged, before)
        assert torch.equal(unmerged, before)
        assert found['merged'] == list(base)
        assert all(torch.equal(v, base[k]) for k, v in found['removed'].items() if 'blocks' in k)


def test_adapters_of_their_own_group_are_computed_in_float32(runs):
    low = [rank['low', 'own'] for rank in runs[1]]
    assert all(seen == {torch.float32} and not warned for seen, warned, _ in low)
    model = network('transformer', 'LoRA').float()
    train(model, 'transformer', torch.float32)
    expected, found = mmpeft.adapter_state_dict(model), low[0][-1]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == torch.float32
        torch.testing.assert_close(found[key], value, rtol=0.05, atol=5e-3)


@pytest.mark.parametrize('way', ['fsdp1', 'block'])
def test_factors_in_bfloat16_cause_a_warning(way, runs):
    for rank in runs[1]:
        seen, warned, _ = rank['low', way]
        assert seen == {torch.bfloat16}
        assert 'shard_adapters(block) before fully_shard(block)' in warned[0]
