"""The benchmark: what it counts is what is there, and its ratios are of one round."""

import copy
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.weights import original_of
from tests.cases import randomize

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'tools/benchmark'
sys.path.insert(0, str(FOLDER))

# isort: off
import around_training  # noqa: E402
import epoch  # noqa: E402
import figures  # noqa: E402
import grids  # noqa: E402
import measuring  # noqa: E402
import rounds  # noqa: E402
import runner_start  # noqa: E402
import startup  # noqa: E402
import train_step  # noqa: E402
import variants  # noqa: E402
import workloads  # noqa: E402
from operations import Operations  # noqa: E402
from published_flora import PublishedFLoRA  # noqa: E402
from saved import saved_bytes  # noqa: E402
from trial import Trial  # noqa: E402
# isort: on

sys.path.remove(str(FOLDER))

TINY = 'convnextv2_atto:32x32:1'
ONLY_TORCH_AND_TIMM = """
import runpy, sys

absent = 'mmcv', 'mmdet', 'mmseg', 'mmrotate', 'mmpretrain', 'peft', 'lycoris', 'transformers'
sys.modules.update(dict.fromkeys(absent))
sys.path.insert(0, 'tools/benchmark')
runpy.run_path('tools/benchmark/train_step.py', run_name='__main__')
"""


@pytest.fixture(autouse=True)
def scope():
    """Leave the global default scope as it was."""
    before = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)


@pytest.fixture
def toy(monkeypatch):
    """A workload of two linear layers and a depthwise convolution, by the name 'toy'."""

    def network():
        return nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1, groups=6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 25, 8),
            nn.ReLU(),
            nn.Linear(8, 3),
        )

    workload = workloads.Workload('toy', 'a toy', network, (2, 6, 5, 5))
    monkeypatch.setitem(workloads.WORKLOADS, 'toy', workload)
    return workload


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Run a tool with arguments; returns what it has written."""

    def tool(module, *arguments):
        out = tmp_path / 'out' / f'{module.TOOL}.json'
        words = [f'{module.TOOL}.py', '--threads', 1, '--device', 'cpu', '--out', out, *arguments]
        monkeypatch.setattr(sys, 'argv', [str(word) for word in words])
        module.main()
        return json.loads(out.read_text())

    return tool


def trial_of(name, workload, rank=2):
    return Trial.of(variants.find(name), workload, workload.build(), rank)


def test_a_network_through_the_whole_tool(call, tmp_path, capsys):
    page = tmp_path / 'page.md'
    arguments = ['--workloads', TINY, '--variants', 'flora', '--ranks', 2, 4, '--rounds', 1]
    data = call(train_step, *arguments, '--markdown', page)
    workload = data['workloads'][TINY]
    assert list(workload['entries']) == ['floor', 'flora@2', 'flora@4']
    assert workload['left_out'] == {} and workload['failed'] == []
    for entry in workload['entries'].values():
        assert {'variant', 'rank', 'trained', 'saved', 'operations', 'peak'} <= set(entry)
        assert len(entry['rounds']) == 1 and min(entry['rounds'][0].values()) > 0
        assert entry['peak'] is None
    floor, *flora = workload['entries'].values()
    for phase in ('forward', 'backward', 'step', 'with_optimizer'):
        assert floor['ratios'][phase]['median'] == 1
    assert floor['trained'] == 0
    for entry in flora:
        network = workloads.find(TINY).build()
        summary = mmpeft.inject(network, dict(type='FLoRA', rank=entry['rank']))
        assert entry['trained'] == summary.adapters
        (one,), (base,) = entry['rounds'], floor['rounds']
        step = (one['forward'] + one['backward']) / (base['forward'] + base['backward'])
        assert entry['ratios']['step']['median'] == pytest.approx(step)
    assert data['environment']['torch'] == torch.__version__.partition('+')[0]
    for picture in ('train_step.png', 'train_step_ranks.png'):
        assert (tmp_path / 'out' / picture).stat().st_size > 10_000
    shown = capsys.readouterr().out
    for text in (shown, page.read_text()):
        assert 'flora@4' in text and f'{floor["saved"] / 2**20:.1f}' in text


def test_report_shows_what_was_stored(call, toy, tmp_path, capsys):
    call(train_step, '--workloads', 'toy', '--variants', 'full', '--rounds', 2)
    stored = tmp_path / 'out/train_step.json'
    before, content = capsys.readouterr().out, stored.read_text()
    call(train_step, '--report', stored)
    assert stored.read_text() == content
    shown = capsys.readouterr().out
    assert [line for line in before.splitlines() if 'full' in line] == [
        line for line in shown.splitlines() if 'full' in line
    ]
    with pytest.raises(UsageError, match='not written by train_step'):
        stored.write_text('{"tool": "another"}')
        call(train_step, '--report', stored)


def test_a_second_run_keeps_the_first(call, toy, tmp_path):
    for seed in (1, 2):
        call(train_step, '--workloads', 'toy', '--variants', 'floor', '--seed', seed)
    names = {1: 'train_step.previous.json', 2: 'train_step.json'}
    for seed, name in names.items():
        assert json.loads((tmp_path / 'out' / name).read_text())['arguments']['seed'] == seed


def test_what_was_measured_survives_an_interruption(call, toy, monkeypatch, capsys):
    in_turn = measuring.in_turn

    def interrupted(entries, number):
        for count, measured in enumerate(in_turn(entries, number)):
            yield measured
            if count == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(measuring, 'in_turn', interrupted)
    data = call(train_step, '--workloads', 'toy', TINY, '--variants', 'full', '--rounds', 9)
    entries = data['workloads']['toy']['entries']
    assert [len(entry['rounds']) for entry in entries.values()] == [3, 2]
    assert set(data['workloads']) == {'toy'} and data['interrupted']
    shown = capsys.readouterr().out
    assert 'Interrupted' in shown and 'full' in shown


def test_peers_may_be_absent(call, toy, monkeypatch, capsys):
    monkeypatch.setattr(variants, 'find_spec', lambda name: None)
    peers = [name for name, variant in variants.VARIANTS.items() if variant.needs]
    data = call(train_step, '--workloads', 'toy', '--variants', *peers, '--rounds', 1)
    result = data['workloads']['toy']
    assert list(result['entries']) == ['floor']
    assert result['left_out'] == {
        f'{name}@16': f'{variants.find(name).needs} is not installed' for name in peers
    }
    assert 'peft_lora@16: left out, peft is not installed.' in capsys.readouterr().out


def test_failures_of_our_own_end_in_an_error(call, toy, monkeypatch, capsys):
    def fail(model, rank):
        raise RuntimeError('broken\nin two lines')

    for name, needs in dict(ours='', theirs='torch').items():
        broken = variants.Variant(name, 'broken', fail, needs=needs)
        monkeypatch.setitem(variants.VARIANTS, name, broken)
    arguments = ['--workloads', 'toy', '--rounds', 1, '--variants']
    data = call(train_step, *arguments, 'theirs', 'full')
    assert data['workloads']['toy']['left_out'] == {'theirs@16': 'RuntimeError: broken'}
    assert list(data['workloads']['toy']['entries']) == ['floor', 'full']
    with pytest.raises(SystemExit, match='mmpeft failed: ours@16 on toy'):
        call(train_step, *arguments, 'ours', 'full')
    assert 'full' in capsys.readouterr().out


@pytest.mark.parametrize('amp', [None, torch.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('name', variants.VARIANTS)
def test_every_variant_trains(name, amp, toy):
    trial = Trial.of(variants.find(name), toy, toy.build(), rank=2, amp=amp)
    survey = trial.survey()
    assert (survey['trained'] > 0) == (name not in ('floor', 'frozen'))
    assert survey['saved'] > 0 and min(survey['operations'].values()) > 0
    trial.forward().backward()
    assert all(p.grad is not None and p.grad.any() for p in trial.parameters)


def test_every_variant_is_of_the_same_network(toy):
    """Perturbed adapters change it by little; the frozen weights are held in common."""
    network = toy.build()
    before = [p.clone() for p in network.parameters()]
    expected = network(toy.batch())
    shared = {id(p) for p in network.parameters()}
    for name, variant in variants.VARIANTS.items():
        model = variant.of(network, 2)
        assert torch.allclose(model(toy.batch()), expected, atol=0.05), name
        own = [p for p in model.parameters() if id(p) not in shared]
        assert len(list(model.parameters())) - len(own) == (0 if name == 'full' else len(shared))
        Trial(model, toy.batch(), needs_input_gradient=True).step()
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))
    assert not any(p.requires_grad for p in network.parameters())


def test_disabled_execution_is_the_plain_form(toy):
    for name in ('flora', 'lora', 'liera'):
        fast, plain = (variants.find(n).of(toy.build(), 2) for n in (name, f'{name}_plain'))
        enabled = [m for m in fast.modules() if mmpeft.execution.is_enabled(m)]
        assert len(enabled) == 3
        assert not any(mmpeft.execution.is_enabled(m) for m in plain.modules())
        assert torch.allclose(fast(toy.batch()), plain(toy.batch()), atol=1e-5)


def test_saved_bytes_by_hand():
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    workload = workloads.Workload('toy', '', lambda: network, (4, 3))
    # The rectified map, and the output under its square.
    activations = 4 * (4 * 5 + 4 * 2)
    assert trial_of('floor', workload).survey()['saved'] == activations
    # The first layer's input too; the second one's is the rectified map.
    assert trial_of('full', workload).survey()['saved'] == activations + 4 * 4 * 3


def test_views_of_a_storage_are_saved_once():
    x = torch.randn(6, 4, requires_grad=True)
    model = nn.Linear(4, 4)
    with saved_bytes(model) as saved:
        y = x.exp()
        (y[:3].square().sum() + y[3:].square().sum() + model.weight.square().sum()).backward()
    assert sum(saved.values()) == 4 * 6 * 4


def test_operations_by_hand(toy):
    # Two images: 9 multiply-adds at 25 positions of 6 channels, then the two matrices.
    forward = 2 * 2 * (9 * 25 * 6 + 6 * 25 * 8 + 8 * 3)
    frozen = trial_of('floor', toy).survey()['operations']
    assert frozen == dict(forward=forward, backward=forward)
    full = trial_of('full', toy).survey()['operations']
    assert full == dict(forward=forward, backward=2 * forward)


def test_operations_of_attention():
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    with Operations() as counted:
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        forward = counted.count
        y.sum().backward()
    product = 2 * 2 * 3 * 5 * 5 * 8
    assert (forward, counted.count) == (2 * product, 7 * product)


@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
@pytest.mark.parametrize(
    'layer, size',
    [
        (nn.Linear(7, 9), (4, 7)),
        (nn.Conv2d(5, 6, 3, stride=2, padding=1, dilation=2), (2, 5, 8, 9)),
        (nn.Conv2d(4, 6, 1, bias=False), (2, 4, 3, 3)),
    ],
    ids=['linear', 'kernel', 'pointwise'],
)
def test_published_flora_is_our_flora(layer, size):
    ours = nn.Sequential(copy.deepcopy(layer)).double()
    published = PublishedFLoRA(copy.deepcopy(layer), rank=3, kernel_rank=2, scale=0.4).double()
    x = torch.randn(size, dtype=torch.float64)
    plain = ours(x)
    assert torch.equal(published(x), plain)
    mmpeft.inject(ours, dict(type='FLoRA', rank=3, kernel_rank=2, scale=0.4))
    randomize(ours)
    factors = ours[0].parametrizations.weight[0].factors.values()
    copies = [published.core, *published.factors]
    with torch.no_grad():
        for own, value in zip(copies, factors, strict=True):
            own.copy_(value)
    expected, y = ours(x), published(x)
    assert not torch.allclose(expected, plain, atol=1e-2)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(y)
    (expected * upstream).sum().backward()
    (y * upstream).sum().backward()
    for own, value in zip(copies, factors, strict=True):
        torch.testing.assert_close(own.grad, value.grad, rtol=1e-10, atol=1e-11)


def test_in_turn_and_ratios_within_a_round():
    calls = []
    steps = {name: lambda name=name: calls.append(name) or dict(forward=1.0) for name in 'ABC'}
    assert [name for name, _ in rounds.in_turn(steps, 2)] == list('ABCABC') == calls
    # The machine is ten times slower in the second round.
    floor = [dict(forward=f, backward=2 * f) for f in (1.0, 10.0, 1.0)]
    other = [dict(forward=2 * f, backward=2 * f) for f in (1.0, 10.0, 1.0)]
    assert rounds.ratios(other, floor, ('forward',)) == [2, 2, 2]
    assert rounds.ratios(other, floor, ('forward', 'backward')) == [4 / 3] * 3
    assert rounds.ratios(other, floor, ('optimizer',)) == []
    assert rounds.spread([3.0, 1.0, 2.0]) == dict(median=2.0, low=1.5, high=2.5)
    assert rounds.spread([]) is None
    times = iter([3.0, 9.0, 1.0])
    assert rounds.median_of(lambda: dict(forward=next(times)), 3) == dict(forward=3.0)


def entry(seconds, saved=0):
    return dict(rounds=[dict(forward=s, backward=s) for s in seconds], saved=saved)


def test_goals():
    entries = {
        'floor': entry([1.0, 2.0], saved=100),
        'flora@8': entry([1.1, 2.2]),
        'flora@128': entry([1.2, 2.4]),
        'flora_linear@8': entry([1.0, 2.0], saved=130),
        'peft_lora@8': entry([1.0, 2.0], saved=150),
    }
    workload = dict(name='convnextv2_x', device='cpu', ranks=[8, 128], entries=entries)
    goals = figures.goals_of({'convnextv2_x': workload, 'free:1x1:1': workload})
    found = {(g['text'], g['rank']): (g['measured'], g['reached']) for g in goals}
    assert found['FLoRA over the floor', 8] == (pytest.approx(1.1), True)
    assert found['FLoRA over the floor', 128] == (pytest.approx(1.2), False)
    assert found['FLoRA, rank 128 against rank 8', None] == (pytest.approx(12 / 11), True)
    (saved,) = (value for (text, _), value in found.items() if 'bytes saved' in text)
    assert saved == (pytest.approx(0.6), True)
    assert {goal['workload'] for goal in goals} == {'convnextv2_x'}


def test_documents(tmp_path):
    path = tmp_path / 'page.md'
    grids.write_document(path, 'train_step', 'first')
    path.write_text('before\n' + path.read_text() + 'after\n')
    grids.write_document(path, 'train_step', r'second \1')
    text = path.read_text()
    assert text.startswith('before\n') and text.endswith('after\n')
    assert r'second \1' in text and 'first' not in text
    with pytest.raises(UsageError, match='no place for the tables'):
        grids.write_document(path, 'around_training', 'third')
    assert path.read_text() == text


@pytest.mark.parametrize('tool', ['train_step', 'around_training'])
def test_page_has_a_place_for_the_tables(tool, tmp_path):
    page = tmp_path / 'performance.md'
    page.write_text((ROOT / 'docs/performance.md').read_text())
    grids.write_document(page, tool, 'measured anew')
    assert 'measured anew' in page.read_text()


def test_page_names_every_variant():
    page = (ROOT / 'docs/performance.md').read_text()
    assert [name for name in variants.VARIANTS if f'`{name}`' not in page] == []


def test_names_that_there_are_not(call):
    for arguments, hint in (
        (['--workloads', 'convnextv2_bas-160'], "'convnextv2_base-160'"),
        (['--workloads', 'convnextv2_tini:64x64:1'], "'convnextv2_tiny'"),
        (['--variants', 'flor'], "'flora'"),
        (['--ranks', '0'], '--ranks: 0'),
        (['--out', 'results.txt'], 'must end in .json'),
    ):
        with pytest.raises(UsageError, match=hint):
            call(train_step, *arguments)
    with pytest.raises(UsageError, match="'peft_lora' is none of the methods of mmpeft"):
        call(around_training, '--variants', 'peft_lora')


def test_named_workloads_are_what_their_names_say():
    for name, workload in workloads.WORKLOADS.items():
        with torch.device('meta'):
            outputs = workload.network()(torch.empty(workload.size))
        outputs = outputs if isinstance(outputs, list) else [outputs]
        if name.startswith(('convnext', 'resnet')):
            heights = [workload.size[2] // stride for stride in (32, 16, 8, 4)]
            assert [o.shape[2] for o in outputs[:-5:-1]] == heights
        else:
            assert outputs[0].shape == workload.size and workload.size[1] == 1297


def test_around_training(call, toy, capsys, tmp_path):
    page = tmp_path / 'page.md'
    arguments = ['--workload', 'toy', '--rounds', 2, '--variants', 'flora', '--markdown', page]
    parts = call(around_training, *arguments, '--parts', 'inference', 'injection')['parts']
    assert set(parts['inference']['entries']) == {'plain', 'flora, attached', 'flora, merged'}
    assert set(parts['injection']['entries']) == {'building the network', 'flora', 'flora, meta'}
    for part in parts.values():
        assert part['entries'][part['base']]['ratio']['median'] == 1
        assert all(len(e['rounds']) == 2 for e in part['entries'].values())
    for text in (capsys.readouterr().out, page.read_text()):
        assert 'flora, merged' in text and 'building the network' in text


def test_merged_in_inference_is_plain_and_leaves_the_network(toy):
    entries = around_training.inference.entries(toy, [variants.find('flora')], 2, 'cpu')
    plain, attached, merged = (step.model for step in entries.values())
    x = toy.batch()
    torch.testing.assert_close(merged(x), attached(x), rtol=1e-4, atol=1e-5)
    assert [type(m) for m in merged] == [type(m) for m in plain]
    assert not torch.equal(merged[0].weight, plain[0].weight)
    assert original_of(attached[0], 'weight') is plain[0].weight


@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
def test_start_of_a_runner(toy):
    hook = variants.find('flora').hook
    start = runner_start.Start('toy', hook | dict(method=hook['method'] | dict(rank=2)))
    total = start()['start']
    assert 0 < start.of_hook()['start'] < total


def test_start_of_python():
    assert startup.execute('pass')['process'] > 0
    with pytest.raises(subprocess.CalledProcessError):
        startup.execute('raise SystemExit(3)')
    assert startup.BASE in startup.entries()


def test_runs_with_torch_mmengine_and_timm_alone(tmp_path):
    out = tmp_path / 'results.json'
    arguments = ['--workloads', TINY, '--variants', 'flora', 'peft_lora', '--rounds', '1']
    done = subprocess.run(
        [sys.executable, '-c', ONLY_TORCH_AND_TIMM, *arguments, '--out', str(out)],
        cwd=ROOT,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(out.read_text())['workloads'][TINY]['entries']) == {'floor', 'flora@16'}


def test_runners_take_turns():
    import threading

    turns, order = epoch.Turns(['a', 'b', 'c']), []

    def work(name, times):
        for _ in range(times):
            turns.wait(name)
            order.append(name)
            turns.give(name)
        turns.leave(name)

    threads = [threading.Thread(target=work, args=pair) for pair in dict(c=2, a=3, b=2).items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert order[:6] == ['a', 'b', 'c'] * 2 and order[6:] == ['a']


def test_an_epoch_is_compared_iteration_by_iteration():
    seconds = dict(frozen=[1.0, 10.0, 1.0], flora=[2.0, 20.0, 2.0])
    grid = epoch.grid_of(seconds, types.SimpleNamespace(task='coco'))
    assert grid.rows == [
        ('frozen', '1000.0', '12.0', '1.00 ±0.00'),
        ('flora', '2000.0', '24.0', '2.00 ±0.00'),
    ]
