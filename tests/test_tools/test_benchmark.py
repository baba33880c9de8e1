"""The benchmark: what it counts is what is there, and its ratios are of one round."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.analysis.operations import Operations
from mmpeft.errors import MissingFileError, UsageError
from tests.cases import randomize

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'projects/benchmark'
sys.path.insert(0, str(FOLDER))

# isort: off
import growth  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import plots  # noqa: E402
import records  # noqa: E402
import report  # noqa: E402
import steps  # noqa: E402
import variants  # noqa: E402
import workloads  # noqa: E402
# isort: on

sys.path.remove(str(FOLDER))

TINY = 'convnextv2_atto:32x32:1'
ONLY_TORCH_AND_TIMM = """
import runpy, sys

absent = 'mmcv', 'mmdet', 'mmseg', 'mmrotate', 'mmpretrain', 'peft', 'lycoris', 'transformers'
sys.modules.update(dict.fromkeys(absent))
sys.path.insert(0, 'projects/benchmark')
runpy.run_path('projects/benchmark/measure.py', run_name='__main__')
"""


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
    """Run measure.py with arguments; returns the run that it has written."""

    def tool(*arguments, out=tmp_path / 'out/results.jsonl'):
        words = ['measure.py', '--threads', 1, '--device', 'cpu', '--out', out, *arguments]
        monkeypatch.setattr(sys, 'argv', [str(word) for word in words])
        measure.main()
        (done,) = records.read(out)
        return done

    return tool


def step_of(name, workload, rank=2, **kwargs):
    model = variants.build(name, workload.build(), rank)
    return steps.Step(model, workload.batch(), **kwargs)


def test_a_network_from_measuring_to_tables_and_plots(call, tmp_path, monkeypatch, capsys):
    done = call('--workloads', TINY, '--variants', 'flora', '--ranks', 2, 4, '--rounds', 1)
    assert done.mode == 'train'
    assert done.where['torch'] == torch.__version__.partition('+')[0]
    floor, *flora = done.results
    assert [result.name for result in done.results] == ['floor', 'flora@2', 'flora@4']
    for result in done.results:
        assert result.skipped == '' and result.peak is None
        assert result.saved > 0 and result.operations > 0
        assert list(result.rounds) == ['forward', 'backward', 'optimizer']
        assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in result.rounds.values())
    assert floor.trained == 0
    for result in flora:
        summary = mmpeft.inject(workloads.find(TINY).build(), dict(type='FLoRA', rank=result.rank))
        assert result.trained == summary.adapters
        own, base = ([r.rounds[p][0] for p in ('forward', 'backward')] for r in (result, floor))
        assert result.ratios(floor) == [pytest.approx(sum(own) / sum(base))]
    shown, page = capsys.readouterr().out, tmp_path / 'page.md'
    words = ['report.py', tmp_path / 'out/results.jsonl', '--markdown', page, '--plots', tmp_path]
    monkeypatch.setattr(sys, 'argv', [str(word) for word in words])
    report.main()
    assert (tmp_path / 'train_step_ranks.png').stat().st_size > 10_000
    for text in (shown, page.read_text(), capsys.readouterr().out):
        (row,) = [line for line in text.splitlines() if line.startswith('| flora')]
        assert f'{flora[1].ratios(floor)[0]:.2f}' in row


def test_stored_results_are_those_shown(call, toy, tmp_path, capsys):
    done = call('--workloads', 'toy', '--variants', 'full', '--rounds', 2)
    assert report.tables([done]) in capsys.readouterr().out
    path = tmp_path / 'out/results.jsonl'
    assert done.lines() == path.read_text()
    with pytest.raises(UsageError, match='exists already'):
        call('--workloads', 'toy')
    path.write_text('{"workload": "toy"}\n')
    with pytest.raises(UsageError, match='Line 1 of .*results.jsonl'):
        records.read(path)
    with pytest.raises(MissingFileError):
        records.read(tmp_path / 'none.jsonl')


def test_memory_beside_time(call, tmp_path, capsys):
    done = call('--memory', '--workloads', TINY, '--rounds', 1, '--ranks', 2)
    assert done.mode == 'memory'
    floor, *others = done.results
    assert [result.variant for result in others] == list(variants.MEMORY)
    kept = {result.variant: result.saved for result in others}
    assert kept['flora'] > kept['flora_balanced'] > kept['flora_small'] > 0
    step, saved = capsys.readouterr().out.split('saved for backward over')
    for text, ratio in (step, others[2].ratios(floor)[0]), (saved, kept['flora'] / floor.saved):
        (row,) = [line for line in text.splitlines() if line.startswith('| flora@2 ')]
        assert f' {ratio:.2f} |' in row
    assert [path.name for path in plots.draw([done], tmp_path)] == ['memory.png']


def test_results_survive_an_interruption(call, toy, monkeypatch, capsys):
    in_turn = measure.in_turn

    def interrupted(*args):
        for count, result in enumerate(in_turn(*args)):
            yield result
            if count == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(measure, 'in_turn', interrupted)
    done = call('--workloads', 'toy', TINY, '--variants', 'full', '--rounds', 9)
    assert {result.workload for result in done.results} == {'toy'}
    assert [len(result.rounds['forward']) for result in done.results] == [3, 2]
    shown = capsys.readouterr().out
    assert 'Interrupted' in shown and '| full' in shown


def test_peers_may_be_absent(call, toy, monkeypatch, capsys):
    monkeypatch.setattr(variants, 'find_spec', lambda name: None)
    names = [name for name in variants.VARIANTS if variants.package_of(name)]
    floor, *others = call('--workloads', 'toy', '--variants', *names, '--rounds', 1).results
    assert floor.rounds and len(others) == len(names) == 6
    for result in others:
        package = variants.package_of(result.variant)
        assert result.skipped == f'{package} is not installed' and not result.rounds
    assert 'peft_lora@16: skipped, peft is not installed.' in capsys.readouterr().out


def test_failures_of_mmpeft_end_in_an_error(call, toy, monkeypatch, capsys, tmp_path):
    def fail(model, rank):
        raise RuntimeError('broken\nin two lines')

    monkeypatch.setitem(variants.VARIANTS, 'peft_lora', fail)
    monkeypatch.setitem(variants.VARIANTS, 'flora', fail)
    arguments = ['--workloads', 'toy', '--rounds', 1, '--variants']
    _, peer, full = call(*arguments, 'peft_lora', 'full').results
    assert peer.skipped == 'RuntimeError: broken' and full.rounds
    with pytest.raises(SystemExit, match='mmpeft failed: flora@16 on toy'):
        call(*arguments, 'flora', 'full', out=tmp_path / 'second.jsonl')
    assert '| full' in capsys.readouterr().out


def test_nothing_is_compared_with_a_floor_that_fails(call, toy, monkeypatch, capsys):
    def too_large(model, rank):
        raise torch.OutOfMemoryError('too large')

    monkeypatch.setitem(variants.VARIANTS, 'floor', too_large)
    done = call('--workloads', 'toy', '--variants', 'full', '--rounds', 1)
    assert not any(result.rounds for result in done.results)
    assert 'toy: the floor was skipped, too large.' in capsys.readouterr().out


@pytest.mark.parametrize('amp', [None, torch.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('name', variants.VARIANTS)
def test_every_variant_trains(name, amp, toy):
    step = step_of(name, toy, amp=amp)
    survey = step.survey()
    assert (survey['trained'] > 0) == (name not in ('floor', 'frozen'))
    assert survey['saved'] > 0 and survey['operations'] > 0
    step.batch.requires_grad_(True)
    step.loss().backward()
    assert all(p.grad is not None and p.grad.any() for p in step.parameters)


def test_every_variant_is_of_the_same_network(toy):
    """Perturbed adapters change it by little; frozen weights are shared and stay."""
    network = toy.build()
    before = [p.clone() for p in network.parameters()]
    expected = network(toy.batch())
    shared = {id(p) for p in network.parameters()}
    for name in variants.VARIANTS:
        model = variants.build(name, network, 2)
        assert torch.allclose(model(toy.batch()), expected, atol=0.05), name
        own = [p for p in model.parameters() if id(p) not in shared]
        assert len(list(model.parameters())) - len(own) == (0 if name == 'full' else len(shared))
        steps.Step(model, toy.batch(), is_inner=True)()
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))
    assert not any(p.requires_grad for p in network.parameters())


def test_plain_execution_is_the_same_function(toy):
    for name in ('flora', 'lora', 'liera'):
        fast, plain = (variants.build(n, toy.build(), 2) for n in (name, f'{name}_plain'))
        enabled = [m for m in fast.modules() if mmpeft.execution.is_enabled(m)]
        assert len(enabled) == 3
        assert not any(mmpeft.execution.is_enabled(m) for m in plain.modules())
        assert torch.allclose(fast(toy.batch()), plain(toy.batch()), atol=1e-5)


def test_batch_norm_is_held_in_all_but_full():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    for name in variants.VARIANTS:
        model = variants.build(name, network, 2)
        (norm,) = (m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        assert norm.training == (name == 'full'), name


def test_any_variant_can_be_compiled():
    """Block by block; full fine-tuning has weights of its own all the same."""

    def block():
        return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

    network, x = nn.Sequential(block(), block()).requires_grad_(False), torch.randn(2, 6)
    shared = {id(p) for p in network.parameters()}
    for name in ('floor', 'full', 'flora'):
        plain, compiled = (variants.build(n, network, 2) for n in (name, f'{name}_compiled'))
        torch.testing.assert_close(compiled(x), plain(x))
        assert all(block._compiled_call_impl for block in compiled)
        assert not any(block._compiled_call_impl for block in plain)
        step = steps.Step(compiled, x, is_inner=True)
        assert 'saved' not in step.survey() and step()['backward'] > 0
        kept = shared & {id(p) for p in compiled.parameters()}
        assert kept == (set() if name == 'full' else shared)
    assert not any(p.requires_grad for p in network.parameters())
    variants.check_name('flora_compiled')
    with pytest.raises(UsageError, match="no 'flra_compiled'"):
        variants.check_name('flra_compiled')


def test_saved_bytes_by_hand():
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    workload = workloads.Workload('toy', '', lambda: network, (4, 3))
    # The rectified map, and the output under its square.
    activations = 4 * (4 * 5 + 4 * 2)
    assert step_of('floor', workload).survey()['saved'] == activations
    # The first layer's input too; the second one's is the rectified map.
    assert step_of('full', workload).survey()['saved'] == activations + 4 * 4 * 3


def test_views_of_a_storage_are_saved_once():
    x = torch.randn(6, 4, requires_grad=True)
    model = nn.Linear(4, 4)
    with steps.saved_bytes(model) as saved:
        y = x.exp()
        (y[:3].square().sum() + y[3:].square().sum() + model.weight.square().sum()).backward()
    assert sum(saved.values()) == 4 * 6 * 4


def test_operations_by_hand(toy):
    # Two images: 9 multiply-adds at 25 positions of 6 channels, then the two matrices.
    forward = 2 * 2 * (9 * 25 * 6 + 6 * 25 * 8 + 8 * 3)
    assert step_of('floor', toy).survey()['operations'] == 2 * forward
    assert step_of('full', toy).survey()['operations'] == 3 * forward


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
    published = nn.Sequential(copy.deepcopy(layer))
    peers.published_flora(published, 3, ['0'], kernel_rank=2, scale=0.4).double()
    x = torch.randn(size, dtype=torch.float64)
    plain = ours(x)
    assert torch.equal(published(x), plain)
    mmpeft.inject(ours, dict(type='FLoRA', rank=3, kernel_rank=2, scale=0.4))
    randomize(ours)
    factors = ours[0].parametrizations.weight[0].factors.values()
    copies = [published[0].core, *published[0].factors]
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


def test_steps_in_turn():
    calls = []

    class Counted:
        def __init__(self, name):
            self.name = name

        def median_of(self, times):
            calls.append((self.name, times))
            return dict(forward=0.5)

    entries = [(records.Result('toy', '', 0, name), Counted(name)) for name in 'ABC']
    assert [result.name for result in measure.in_turn(entries, 2, 3)] == list('ABCABC')
    assert calls == [(name, 3) for name in 'ABCABC']
    assert all(result.rounds == dict(forward=[0.5, 0.5]) for result, _ in entries)


def result_of(variant='floor', forward=(1.0,), backward=None, workload='toy', **kwargs):
    rounds = dict(forward=list(forward), backward=list(backward or forward))
    kwargs = dict(text='a toy', parameters=1_000_000, saved=0, operations=1) | kwargs
    return records.Result(workload=workload, variant=variant, rounds=rounds, **kwargs)


def test_ratios_are_within_a_round():
    # The machine is ten times slower in the second round.
    floor = result_of(forward=[1.0, 10.0, 1.0], backward=[2.0, 20.0, 2.0])
    other = result_of(forward=[2.0, 20.0, 2.0], backward=[2.0, 20.0])
    assert other.ratios(floor, ['forward']) == [2, 2, 2]
    assert floor.ratios(floor) == [1, 1, 1]
    assert other.ratios(floor, ['optimizer']) == []
    other.rounds['backward'].append(2.0)
    assert other.ratios(floor) == [4 / 3] * 3
    assert records.median([]) is None and records.quartiles([3.0]) == (3, 3)
    assert records.quartiles([3.0, 1.0, 2.0]) == (1.5, 2.5)
    times = iter([3.0, 9.0, 1.0])
    step = steps.Step(nn.Identity(), torch.zeros(1))
    step.timed = lambda *_: dict(forward=next(times))
    assert step.median_of(3) == dict(forward=3.0)


def test_evaluation_has_one_table_that_says_what_is_missing():
    results = [
        result_of('floor', [0.5, 1.0], peak=100),
        result_of('flora', [0.6, 1.2], rank=8, peak=103),
        result_of('peft_lora', rank=8, skipped='peft is not installed'),
    ]
    results[2].rounds = {}
    text = report.evaluation_table(dict(toy={result.name: result for result in results}))
    assert 'in brackets memory at the peak' in text and '1,500.0 ms' in text
    assert '1.20 ±0.00 (1.03)' in text and 'peft_lora@8: skipped, peft is not installed.' in text


def test_figures_that_are_compared():
    results = [
        result_of('floor', [1.0, 2.0], saved=100),
        result_of('flora', [1.2, 2.4], rank=8),
        result_of('flora_linear', rank=8, saved=130),
        result_of('peft_lora', [1.5, 3.0], rank=8, saved=150),
    ]
    results = {result.name: result for result in results}
    assert report.compare(results, 'flora', 'floor', 'step') == '1.20'
    assert report.compare(results, 'flora', 'peft_lora', 'step') == '0.80'
    assert report.compare(results, 'flora_linear', 'peft_lora', 'saved') == '0.87'  # 130 / 150
    assert report.compare(results, 'liera', 'full', 'step') == ''
    names = {name for _, of, to, _ in report.COMPARED for name in (of, to)}
    assert names <= set(variants.VARIANTS)


def run_of(*results):
    return records.Run('train', dict(kind='cpu'), list(results))


def test_the_last_of_equal_workloads_counts():
    first = run_of(result_of(), result_of('full'), result_of(workload='other'))
    last = run_of(result_of(forward=[3.0]))
    found = records.by_workload([first, last])
    assert list(found) == ['toy', 'other'] and list(found['toy']) == ['floor']
    assert found['toy']['floor'].rounds['forward'] == [3.0]
    assert records.by_workload([first], 'evaluate') == {}


def test_growth_with_rank_image_and_network():
    def measured(model, side, ratio, parameters=1_000_000, **kwargs):
        name = f'{model}:{side}x{side}:1'
        kwargs = dict(workload=name, text=f'{model}, 1 x {side}x{side}', parameters=parameters)
        return result_of(**kwargs), result_of('full', [ratio], **kwargs)

    ranked = [result_of('flora', [1.0 + rank / 10], rank=rank) for rank in (8, 4)]
    found = records.by_workload(
        [
            run_of(result_of(), *ranked),
            run_of(*measured('net_small', 32, 1.5), *measured('net_small', 64, 1.25)),
            run_of(*measured('net_large', 64, 1.125, parameters=2_000_000)),
            run_of(*measured('alone', 32, 2.0)),
        ]
    )
    (ranks,) = growth.by_rank(found)
    assert ranks.lines == dict(flora={4: 1.4, 8: 1.8}) and ranks.points() == [4, 8]
    images, networks = growth.by_size(found)
    assert images.lines == dict(full={32: 1.5, 64: 1.25})
    assert networks.lines == dict(full={1.0: 1.25, 2.0: 1.125})
    assert list(growth.single(found)) == ['alone:32x32:1']
    for results in found.values():
        for number, result in enumerate(results.values()):
            result.saved = 8 + 2 * number
    assert [curves.lines for curves in growth.by_size(found, 'saved')] == [
        dict(full={32: 1.25, 64: 1.25}),
        dict(full={1.0: 1.25, 2.0: 1.25}),
    ]
    table = report.curves_table(images)
    assert '|      |   32 |   64 |' in table and '| full | 1.50 | 1.25 |' in table


def test_documents(tmp_path):
    path = tmp_path / 'page.md'
    report.write_between_marks(path, 'first')
    path.write_text('before\n' + path.read_text() + 'after\n')
    report.write_between_marks(path, r'second \1')
    text = path.read_text()
    assert text.startswith('before\n') and text.endswith('after\n')
    assert r'second \1' in text and 'first' not in text
    path.write_text('no marks')
    with pytest.raises(UsageError, match='no place for the tables'):
        report.write_between_marks(path, 'third')
    assert path.read_text() == 'no marks'


def test_the_page_holds_the_stored_results():
    """docs/performance.md and docs/images are what report.py makes of docs/benchmark."""
    files = sorted((ROOT / 'docs/benchmark').glob('*.jsonl'))
    runs = [run for path in files for run in records.read(path)]
    page = (ROOT / 'docs/performance.md').read_text()
    assert report.tables(runs) in page
    assert [name for name in variants.VARIANTS if f'`{name}`' not in page] == []
    assert {result.variant for run in runs for result in run.results} <= set(variants.VARIANTS)


def test_plots_of_stored_results(tmp_path):
    runs = [run for path in (ROOT / 'docs/benchmark').glob('*.jsonl') for run in records.read(path)]
    for run in runs:
        run.results = [r for r in run.results if r.variant in ('floor', 'full', 'flora')]
    names = [path.name for path in plots.draw(runs, tmp_path)]
    memory = [f'memory{part}.png' for part in ('', '_ranks', '_sizes')]
    assert names == ['train_step.png', 'evaluation.png', *memory]
    page = (ROOT / 'docs/performance.md').read_text()
    assert all(f'](images/{name})' in page for name in names)
    assert all((ROOT / 'docs/images' / name).is_file() for name in names)


@pytest.mark.parametrize(
    'arguments, hint',
    [
        (['--workloads', 'convnextv2_bas-160'], "'convnextv2_base-160'"),
        (['--workloads', 'convnextv2_tini:64x64:1'], "'convnextv2_tiny'"),
        (['--variants', 'flor'], "'flora'"),
        (['--ranks', '0'], '--ranks: 0'),
    ],
)
def test_unknown_names(arguments, hint, call):
    with pytest.raises(UsageError, match=hint):
        call(*arguments)


ONE_OF_EACH_NETWORK = {w.text.split(',')[0]: name for name, w in workloads.WORKLOADS.items()}


@pytest.mark.parametrize('name', ONE_OF_EACH_NETWORK.values())
def test_named_workloads_are_what_their_names_say(name):
    workload = workloads.find(name)
    with torch.device('meta'):
        outputs = workload.network()(torch.empty(workload.size))
    outputs = outputs if isinstance(outputs, list) else [outputs]
    if workload.is_inner:
        assert outputs[0].shape == workload.size and workload.size[1] == 1297
    else:
        strides = (16, 16, 16) if name.startswith('vit') else (32, 16, 8, 4)
        heights = [workload.size[2] // stride for stride in strides]
        assert [o.shape[2] for o in outputs[:-5:-1]] == heights


def test_evaluation(call, toy, capsys):
    done = call('--evaluate', '--workloads', 'toy', '--rounds', 2, '--variants', 'flora')
    assert done.mode == 'evaluate'
    floor, flora = done.results
    assert list(flora.rounds) == ['forward'] and len(flora.ratios(floor)) == 2
    assert flora.saved is None and flora.trained > 0
    assert '| flora@16' in capsys.readouterr().out


def test_evaluation_builds_weights_once(toy):
    step = step_of('flora_plain', toy, evaluates=True)
    assert not step.model.training
    calls = []
    adapter = step.model[0].parametrizations.weight[0]
    adapter.register_forward_hook(lambda *_: calls.append(1))
    assert list(step()) == ['forward']
    assert len(calls) == 1


def test_runs_with_torch_mmengine_and_timm_alone(tmp_path):
    out = tmp_path / 'results.jsonl'
    arguments = ['--workloads', TINY, '--variants', 'flora', 'peft_lora', '--rounds', '1']
    arguments += ['--threads', '1']
    done = subprocess.run(
        [sys.executable, '-c', ONLY_TORCH_AND_TIMM, *arguments, '--out', str(out)],
        cwd=ROOT,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    _, *lines = map(json.loads, out.read_text().splitlines())
    assert [line['variant'] for line in lines if line['rounds']] == ['floor', 'flora']


def test_evaluation_in_merged_weights_is_measured(tmp_path):
    """In a process of its own, whose memory is that of the network."""
    arguments = ['--alone', '--networks', 'one token, 8 layers of width 2048', '--methods', 'dora']
    done = subprocess.run(
        [sys.executable, FOLDER / 'merged_evaluation.py', *arguments, '--rounds', '1'],
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert 120 < record['plain_mib'] < 160  # 8 x 2048 x 2048 numbers are 128
    assert record['time'].keys() == record['memory'].keys() == {'attached', 'merged'}
    assert all(value > 0 for value in record['time'].values())
    assert all(0.9 < value < 1.2 for value in record['memory'].values())
    assert not list(tmp_path.iterdir())
