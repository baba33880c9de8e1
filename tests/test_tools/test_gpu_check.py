"""The check for a GPU, small and on the CPU: what it compares, keeps and leaves out."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmpeft.errors import UsageError

FOLDER = Path(__file__).parents[2] / 'projects/benchmark'
sys.path.insert(0, str(FOLDER))

# isort: off
import agreement  # noqa: E402
import checks  # noqa: E402
import records  # noqa: E402
# isort: on

sys.path.remove(str(FOLDER))

SETTINGS = [f'agreement-{name}' for name in agreement.SETTINGS]


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run the check with arguments; returns how many parts are faulty, and what all found."""
    monkeypatch.setattr(torch, 'set_num_threads', lambda count: None)

    def tool(*words, out=tmp_path / 'record.json'):
        arguments = ['--device', 'cpu', '--quick', '--out', str(out), *map(str, words)]
        return checks.main(arguments), json.loads(out.read_text())['parts']

    return tool


def test_all_parts_run_once(call, monkeypatch, capsys):
    faulty, parts = call()
    assert faulty == 0 and not any(part['error'] or part['left_out'] for part in parts.values())
    assert list(parts)[: len(SETTINGS)] == SETTINGS
    for name in SETTINGS:
        differences, allowed = parts[name]['differences'], parts[name]['tolerances']
        assert {case.split()[0] for case in differences} == {'flora', 'lora', 'liera'}
        assert all(0 < d <= allowed[case.split()[-1]] for case, d in differences.items())
    measured = {n: p['results'] for n, p in parts.items() if n not in SETTINGS}
    stored = [name.rpartition('-')[2] for name in measured if 'internvit' in name]
    assert stored == ['bfloat16', 'int8', 'nf4']
    for results in measured.values():
        assert len(results) > 1
        assert all(r['rounds']['backward'][0] > 0 and not r['skipped'] for r in results)
    assert '| flora' in capsys.readouterr().out

    def again(*args):
        pytest.fail('a part with a result ran again')

    monkeypatch.setattr(checks, 'run_part', again)
    assert call() == (0, parts)
    with pytest.raises(pytest.fail.Exception):
        call('--again', '--parts', 'agreement-float32')


def test_what_does_not_fit_is_named_and_done_later(call, capsys):
    name = 'agreement-float32'
    faulty, parts = call('--parts', name, '--minutes', 0)
    assert faulty == 0 and parts[name]['left_out'] == ['all of it: no time was left']
    assert f'Not complete: {name}' in capsys.readouterr().out
    found = dict(left_out=[])
    checks.agreement(agreement.Reference(), 'cpu', True, 'float32', found | {}, math.inf)
    with pytest.raises(RuntimeError, match='nothing was compared'):
        checks.agreement(agreement.Reference(), 'cpu', True, 'float32', found, 0)
    assert 'flora on linear' in found['left_out'] and not found['differences']
    _, parts = call('--parts', name)
    assert not parts[name]['left_out'] and parts[name]['differences']['flora on linear']


def test_a_fault_ends_in_an_error(call, monkeypatch, capsys):
    monkeypatch.setattr(checks, 'compare', lambda *args: (math.nan, 'y'))
    faulty, parts = call('--parts', 'agreement-float32')
    assert faulty == 1 and parts['agreement-float32']['failed'][0] == 'flora on linear: nan in y'
    assert '9 failed (flora on linear: nan in y;' in capsys.readouterr().out
    monkeypatch.setattr(checks, 'compare', lambda *args: 1 / 0)
    faulty, parts = call('--parts', 'agreement-float32', '--again')
    assert faulty == 1 and 'ZeroDivisionError' in parts['agreement-float32']['failed'][0]


def test_a_record_is_of_one_machine(call, tmp_path, monkeypatch):
    call('--minutes', 0)
    monkeypatch.setattr(checks, 'environment', lambda device: dict(device='another'))
    with pytest.raises(UsageError, match="record with device=.*here it is 'another'"):
        call()
    (tmp_path / 'other.json').write_text('[]')
    with pytest.raises(UsageError, match='was not written by gpu_check'):
        call(out=tmp_path / 'other.json')
    with pytest.raises(UsageError, match='none begins with nothing'):
        call('--parts', 'nothing')


def test_the_reference_by_hand():
    """LoRA on a linear layer in numpy: y = x (W + s B A)^T + b, and upstream gradient g."""
    model, found = agreement.Reference()('lora', 'linear', torch.float32)
    adapter = model[0].parametrizations.weight[0]
    a, b = (adapter.factors[name].detach().double().numpy() for name in ('lora_A', 'lora_B'))
    state = {name: t.double().numpy() for name, t in model.state_dict().items()}
    x = agreement.KINDS['linear'].input(torch.float32).double().numpy()
    scale = adapter.method.scaling
    w = state['0.parametrizations.weight.original'] + scale * b @ a
    np.testing.assert_allclose(found['y'], x @ w.T + state['0.bias'], rtol=1e-12, atol=1e-12)
    seed = torch.Generator().manual_seed(2)
    g = 64 * torch.randn(found['y'].shape, generator=seed, dtype=torch.float64).numpy()
    np.testing.assert_allclose(found['x'], g @ w, rtol=1e-12, atol=1e-12)
    dense = g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    by_name = {name.rpartition('.')[2]: value for name, value in found.items()}
    np.testing.assert_allclose(by_name['lora_B'], scale * dense @ a.T, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(by_name['lora_A'], scale * b.T @ dense, rtol=1e-10, atol=1e-10)


def test_a_wrong_number_is_found():
    model, expected = agreement.Reference()('flora', 'linear', torch.float32)
    setting = agreement.SETTINGS['float32']
    tolerance = setting.tolerance('linear')
    assert agreement.compare(model, expected, 'linear', setting, 'cpu')[0] < tolerance
    assert len(expected) == 5  # output, gradient of the input, two factors and the core
    for name, value in expected.items():
        for wrong in (value * 1.01, value * math.nan):
            found = agreement.compare(model, expected | {name: wrong}, 'linear', setting, 'cpu')
            assert not found[0] <= tolerance and found[1] == name


def test_wrong_choices_by_hand():
    def result(variant, seconds):
        rounds = dict(forward=seconds, backward=[0.0] * len(seconds))
        return records.Result('layer', '', 0, variant, 16, rounds=rounds)

    found = checks.losses(
        [
            result('flora', [2.0, 20.0, 2.2]),
            result('flora_plain', [1.0, 10.0, 1.0]),
            result('flora_merged', [1.9, 30.0, 1.0]),  # not in every round
            result('flora_branch', [1.99, 19.9, 2.19]),  # within the margin
            result('lora', [1.0]),
            result('lora_plain', [0.5]),  # one round shows nothing
        ]
    )
    assert found == ['flora on layer: 2.00 of plain']
