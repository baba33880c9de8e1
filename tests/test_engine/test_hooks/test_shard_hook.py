"""Sharded runs of two and four gloo processes against one process that shards nothing."""

import json

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.processes import launch

SCRIPT = __file__.replace('test_shard_hook.py', 'shard_run.py')
METHODS = 'lora', 'lotr', 'adaptformer', 'full', 'adalora', 'diff_pruning'


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Folders of the runs: two sharded processes, then one and four that go on from theirs."""
    folder = tmp_path_factory.mktemp('runs')
    for name, processes, *source in (('two', 2), ('one', 1, 'two'), ('four', 4, 'two')):
        done = launch(processes, SCRIPT, folder / name, *(folder / path for path in source))
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


def saved(path):
    """Keys of a checkpoint, and the tensors in its state dict and its optimizer."""
    checkpoint = torch.load(path, weights_only=False)
    parts = checkpoint['state_dict'], checkpoint['optimizer']['state']
    return list(parts[0]), [leaf for leaf in tree_leaves(parts) if isinstance(leaf, torch.Tensor)]


def assert_close(path, other):
    (keys, values), (other_keys, others) = saved(path), saved(other)
    assert keys == other_keys
    assert {type(value) for value in values} == {torch.Tensor}
    torch.testing.assert_close(values, others, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('method', METHODS)
def test_two_sharded_processes_train_what_one_would(method, runs):
    for file in ('epoch_1.pth', 'epoch_2.pth'):
        assert_close(runs / 'two' / method / file, runs / 'one' / method / file)
    adapter = f'{method}/epoch_2.safetensors.json'
    manifests = [json.loads((runs / ranks / adapter).read_text()) for ranks in ('one', 'two')]
    assert manifests[0] | dict(sha256='') == manifests[1] | dict(sha256='')
    files = (runs / 'two' / method / file for file in ('epoch_2.safetensors', 'by_all.safetensors'))
    first, second = (file.read_bytes() for file in files)
    assert first == second
    one, first, second = (
        json.loads((runs / file).read_text())[method]
        for file in ('one/rank0.json', 'two/rank0.json', 'two/rank1.json')
    )
    torch.testing.assert_close(first['scores'], one['scores'], rtol=1e-10, atol=1e-12)
    assert sum(first['held']) + sum(second['held']) >= one['frozen'] and one['held'] == []
    assert max(sum(first['held']), sum(second['held'])) < 0.6 * sum(first['held'] + second['held'])


@pytest.mark.parametrize('method', ['lora', 'full', 'adalora'])
@pytest.mark.parametrize('ranks', ['one', 'two', 'four'])
def test_resuming_on_another_number_of_ranks(method, ranks, runs):
    keys, values = saved(runs / 'two' / method / 'epoch_1.pth')
    again, others = saved(runs / ranks / 'again' / method / 'epoch_1.pth')
    assert keys == again and len(values) == len(others) > len(keys)
    assert all(map(torch.equal, values, others))
    resumed = runs / ranks / 'resumed' / method / 'epoch_2.pth'
    assert_close(resumed, runs / 'two' / method / 'epoch_2.pth')


@pytest.mark.parametrize('victim', [0, 1])
def test_a_rank_that_is_killed_while_it_saves_leaves_the_checkpoint_before(
    victim, runs, tmp_path, monkeypatch
):
    monkeypatch.setenv('VICTIM', str(victim))
    assert launch(2, SCRIPT, tmp_path).returncode != 0
    files = {path.name for path in (tmp_path / 'full').glob('epoch_*')}
    assert files == {'epoch_1.pth', 'epoch_1.safetensors', 'epoch_1.safetensors.json'}
    folders = tmp_path / 'full', runs / 'two' / 'full'
    assert all(map(torch.equal, *(saved(folder / 'epoch_1.pth')[1] for folder in folders)))
    first, second = ((folder / 'epoch_1.safetensors').read_bytes() for folder in folders)
    assert first == second


@pytest.mark.parametrize(
    'case, expected',
    [
        ('bits', 'is stored in few bits, which sharding would make whole'),
        ('averages', 'EMAHook averages a copy of the whole model'),
        ('compile', 'A sharded model is not compiled'),
        ('blocks', "There are no blocks to shard in 'backbone'"),
    ],
)
def test_what_cannot_be_sharded_is_refused_on_all_ranks(case, expected, runs):
    for rank in (0, 1):
        found = json.loads((runs / 'two' / f'rank{rank}.json').read_text())['refusals'][case]
        assert expected in (found or '')
