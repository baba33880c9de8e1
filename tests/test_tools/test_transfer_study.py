"""The study: its plan, its statistics and its trials, on a network and images made here."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from submitit.core.utils import DelayedSubmission
from torch import nn

import mmpeft


@pytest.fixture(scope='module', autouse=True)
def study(script):
    return script('projects/transfer_study', 'study')


@pytest.fixture(scope='module')
def base(study):
    return study.parse(['run']).base


def outcome(trial, scale=4):
    """A record whose accuracy depends on rate, scale and ridge alone, with a peak."""
    distance = abs(np.log10(max(trial.rate, 1e-9) / 3e-3)) + abs(np.log10(trial.scale / scale))
    penalty = abs(np.log10(max(trial.ridge, 1e-9) / 1e-2))
    accuracy = round(0.9 - 0.01 * distance - 0.001 * penalty, 4)
    result = dict(accuracy=accuracy, held_loss=1 - accuracy, failed=None, parameters=9, seconds=1)
    return dict(id=trial.id, trial=asdict(trial)) | result


@pytest.mark.parametrize('method', ['frozen', 'full', 'lora'])
def test_a_method_gets_twelve_candidates_four_of_them_again_and_its_seeds(study, base, method):
    from transfer_study.plan import finals, pending

    records, rounds = {}, []
    methods = list(dict.fromkeys(['frozen', method]))
    while waiting := list(pending(base, methods, 5, records)):
        rounds.append(waiting)
        records |= {trial.id: outcome(trial) for trial in waiting}
    own = [[t for t in waiting if t.method == method] for waiting in rounds]
    again = 4 if method == 'frozen' else 8  # one draw is that of the candidates
    assert [len(trials) for trials in own if trials] == [12, again, 5]
    tuned, final = [t for stage in own for t in stage if t.stage == 'tune'], own[-1]
    assert {t.seed for t in final} == set(range(5)) and {t.seed for t in tuned} == {100, 101}
    assert len({replace(t, seed=0) for t in final}) == 1
    best = max(tuned, key=lambda t: records[t.id]['accuracy'])
    assert (final[0].rate, final[0].scale) == (best.rate, best.scale)
    assert [r['trial']['seed'] for r in finals(base, method, 5, records)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize('scale, widened', [(64, 2), (1 / 64, 3), (1e6, 4)])
def test_a_setting_at_an_edge_is_compared_with_what_lies_past_it(study, base, scale, widened):
    from transfer_study.plan import finals, pending

    records, rounds = {}, []
    while waiting := list(pending(base, ['frozen', 'lora'], 1, records)):
        rounds.append([t for t in waiting if t.method == 'lora'])
        records |= {trial.id: outcome(trial, scale) for trial in waiting}
        if rounds[-1] and len(rounds[-1]) == 8:  # final runs of what would have been chosen
            early = replace(rounds[-1][0], stage='final', epochs=12, seed=0)
            records[early.id] = outcome(early)
    own = [trials for trials in rounds if trials]
    assert [len(trials) for trials in own] == [12, 8, *[6] * widened, 1]
    (final,) = own[-1]
    assert abs(np.log(final.scale / scale)) < 0.05 or widened == 4 and final.scale == 4000
    assert [r['id'] for r in finals(base, 'lora', 5, records)] == [final.id]


def test_a_rate_at_an_edge_is_compared_with_the_next(study, base):
    from transfer_study.plan import beyond, candidates

    tried = [replace(base, method='lora', **c) for c in candidates(replace(base, method='lora'))]
    assert beyond(replace(tried[0], rate=3e-3, scale=1.0), tried) == []
    corner = next(t for t in tried if (t.rate, t.scale) == (1e-3, 16))
    found = [(t.rate, t.scale) for t in beyond(corner, tried)]
    assert found == [(1e-3, 64), (3e-3, 64), (1e-2, 64), (3.2e-4, 16)]


def test_the_report_pairs_seeds_and_tests_differences(study, base):
    from transfer_study.plan import pending
    from transfer_study.report import tables

    methods, records = ['frozen', 'lora', 'flora'], {}
    while waiting := list(pending(base, methods, 3, records)):
        for trial in waiting:
            record = records[trial.id] = outcome(trial)
            record['accuracy'] += 0.01 * trial.seed * (trial.stage == 'final')
            if (trial.method, trial.stage) == ('flora', 'final'):
                record['accuracy'] += 0.05 + 0.001 * trial.seed
    text = tables(base, methods, 3, records)
    rows = [line.split(' | ')[0] for line in text.splitlines() if line.startswith('| ')]
    assert {'| frozen', '| lora', '| flora', '| flora - lora', '| lora - frozen'} <= {*rows}
    (claim,) = (line for line in text.splitlines() if line.startswith('| flora - lora'))
    gaps = 5 + 0.1 * np.arange(3)
    half = gaps.mean() - stats.ttest_1samp(gaps, 0).confidence_interval(0.95).low
    assert f'+{gaps.mean():.2f} ± {half:.2f}' in claim and 'higher' in claim
    assert '--budget' not in text
    text = tables(replace(base, budget=41_000), methods, 3, records)
    assert text.endswith(f'and --budget {base.budget} shows them.') and '| lora' not in text


def test_other_settings_run_to_the_end_beside_the_chosen_one(study, base):
    from transfer_study.plan import finals, pending
    from transfer_study.report import also_run, tables

    args, records = study.parse(['run', '--methods', 'lora', '--seeds', '3', '--at', 'rate=1']), {}
    assert args.at == dict(rate=1) and study.left(args, records) == []
    methods = ['frozen', 'lora', 'flora']
    while waiting := list(pending(base, methods, 3, records)):
        records |= {trial.id: outcome(trial) for trial in waiting}
    tuned = [r['id'] for r in finals(base, 'lora', 3, records)]
    chosen = records[tuned[0]]['trial']
    for text in (['epochs=48'], ['rate=3e-4', 'scale=16']):
        args = study.parse(['run', '--methods', 'lora', '--seeds', '3', '--at', *text])
        waiting = study.left(args, records)
        wanted = chosen | args.at | dict(stage='final')
        assert [asdict(t) for t in waiting] == [wanted | dict(seed=seed) for seed in range(3)]
        records |= {t.id: outcome(t) | dict(accuracy=0.5 + 0.1 * t.seed) for t in waiting}
        assert study.left(args, records) == []
    assert [r['id'] for r in finals(base, 'lora', 3, records)] == tuned
    first, second = also_run(base, methods, 3, records)
    assert (first.setting, second.setting) == (
        'lora, epochs 48',
        'lora, rate 0.0003, scale 16',
    )
    assert list(first.scores.values()) == pytest.approx([50, 60, 70])
    gaps = np.array([50, 60, 70]) - 100 * records[tuned[0]]['accuracy']
    p = 2 * stats.ttest_1samp(gaps, 0).pvalue  # of two
    assert (first.gap.mean, first.gap.p) == pytest.approx((gaps.mean(), p))
    half = gaps.mean() - stats.ttest_1samp(gaps, 0).confidence_interval().low
    row = f'60.00 ± 24.84 | 3 | {gaps.mean():+.2f} ± {half:.2f} (p = {p:.3f})'
    assert f'| lora, epochs 48 | {row} |' in tables(base, methods, 3, records)
    with pytest.raises(SystemExit):
        study.parse(['run', '--at', 'seed=3'])


def test_a_method_that_is_not_tuned_runs_nowhere_else(study, tmp_path, monkeypatch):
    given = '--methods', 'lora', '--records', str(tmp_path / 'none.jsonl'), '--at', 'rate=1'
    monkeypatch.setattr('sys.argv', ['study.py', 'run', *given])
    with pytest.raises(SystemExit, match='lora is not tuned yet: run it without --at first'):
        study.main()


def test_a_failed_trial_is_not_chosen(base):
    from transfer_study.plan import best

    trials = [replace(base, method='lora', rate=rate) for rate in (1e-3, 3e-3)]
    records = {t.id: outcome(t) for t in trials}
    assert best(trials, records, 1)[0].rate == 3e-3
    records[trials[1].id]['failed'] = 'NaN'
    assert best(trials, records, 1)[0].rate == 1e-3


def test_what_has_a_record_is_not_run_again(study, base, tmp_path, monkeypatch, capsys):
    ran = []

    def run_trial(trial):
        ran.append(trial.id)
        if len(ran) == 15:
            raise KeyboardInterrupt
        return outcome(trial)

    monkeypatch.setattr(study, 'run_trial', run_trial)
    monkeypatch.chdir(tmp_path)
    args = study.parse(['run', '--methods', 'frozen', '--records', 'records.jsonl'])
    with pytest.raises(KeyboardInterrupt):
        study.work(args)
    assert len(study.read_records(args.records)) == 14
    study.work(args)
    assert len(ran) == len({*ran}) + 1 == 22
    lines = args.records.read_text().splitlines()
    assert len(lines) == 21 and all({'versions', 'date'} <= json.loads(x).keys() for x in lines)


def test_records_are_made_again(study, base, tmp_path, monkeypatch, capsys):
    trials = [replace(base, method='lora', seed=seed) for seed in range(5)]
    lines = [outcome(trial) for trial in trials]
    lines[3]['failed'] = 'NaN'
    path = tmp_path / 'records.jsonl'
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    monkeypatch.setattr(
        study, 'run_trial', lambda t: outcome(t) | dict(accuracy=0.5 + 0.1 * t.seed)
    )
    study.again(study.parse(['again', '--count', '9', '--records', str(path)]))
    shown = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in shown) == sorted(t.id for t in trials if t.seed != 3)
    old = lines[2]['accuracy']
    (line,) = (line for line in shown if line.startswith(trials[2].id))
    assert f'{old:.4f}, now 0.7000 ({100 * (0.7 - old):+.2f} points)' in line
    study.again(study.parse(['again', '--count', '2', '--draw', '1', '--records', str(path)]))
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_trial_is_run_by_one_worker(study, base, tmp_path):
    with study.claimed(tmp_path, base) as first, study.claimed(tmp_path, base) as second:
        assert (first, second) == (True, False)
    with study.claimed(tmp_path, base) as again:
        assert again


def test_the_head_is_the_regularized_logistic_regression():
    from transfer_study.classification import converge_head

    torch.manual_seed(0)
    x, y, ridge = torch.randn(90, 5), torch.randint(3, (90,)), 0.05
    head = converge_head(x, y, 3, ridge)
    expected = LogisticRegression(C=1 / (ridge * len(x)), tol=1e-10, max_iter=2000).fit(x, y)
    torch.testing.assert_close(
        head(x).softmax(1).detach(), torch.tensor(expected.predict_proba(x)).float(),
        atol=1e-4, rtol=0,
    )  # fmt: skip


def test_augmentation_mirrors_and_shifts_by_two_pixels():
    from transfer_study.classification import augment

    image = torch.randint(1, 256, (1, 28, 28), dtype=torch.uint8)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))[0]
    crops = [padded[i : i + 28, j : j + 28] for i in range(5) for j in range(5)]
    allowed = {tuple(c.flatten().tolist()) for crop in crops for c in (crop, crop.flip(1))}
    made = {tuple(out.flatten().tolist()) for out in augment(image.expand(2000, 28, 28))}
    assert made == allowed


def test_trials_of_every_method_on_a_small_network(study, base, monkeypatch):
    """Each method adapts a toy network, all at one budget, and repeats its record."""
    from transfer_study import classification as module
    from transfer_study.backbones import Backbone
    from transfer_study.methods import METHODS
    from transfer_study.plan import size_of

    def toy(task):
        torch.manual_seed(3)
        layers = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()
        more = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1), nn.ReLU()
        return nn.Sequential(*layers, *more, nn.AdaptiveAvgPool2d(2), nn.Flatten())

    def images(trial):
        generator = torch.Generator().manual_seed(trial.seed)
        labels = torch.randint(3, (96,), generator=generator)
        maps = torch.randint(0, 120, (96, 28, 28), generator=generator, dtype=torch.uint8)
        maps[torch.arange(96), :, labels * 9] = 255
        return (maps[:64], labels[:64]), (maps[64:], labels[64:])

    monkeypatch.setitem(module.BACKBONES, 'toy', Backbone(toy, 127.0, 128.0))
    monkeypatch.setitem(module.SETS, 'toy', (images, 3))
    start = replace(base, task='toy', backbone='toy', size=28, ridge=0.01, rate=1e-2)
    records = {}
    for method in METHODS.keys() - {'houlsby'}:  # which finds no block in a chain of layers
        has_budget, has_scale = size_of(method)
        budget = 800 if method == 'lora_loralib' else 200
        trial = replace(
            start,
            method=method,
            epochs=int(method != 'frozen'),
            budget=budget if has_budget else 0,
            scale=4.0 if has_scale else 1.0,
        )
        record = records[method] = module.classify(trial)
        assert record['failed'] is None, method
        assert not has_budget or 0 < record['parameters'] <= budget, method
        assert not has_scale or 'scale=None' not in record['method'], method
    for method in METHODS.keys() - {'houlsby', 'frozen'}:
        assert records[method]['held_loss'] != records['frozen']['held_loss'], method
    again = module.classify(trial)
    assert again | dict(seconds=0) == record | dict(seconds=0)


@pytest.mark.parametrize('name', ['lora_kernels', 'flora_kernels'])
def test_kernels_are_adapted_alone(study, name):
    from transfer_study.methods import METHODS

    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 4)
    net = nn.Sequential(*layers)
    mmpeft.inject(net, METHODS[name]['method'] | dict(rank=4), METHODS[name]['targets'])

    assert {key.partition('.')[0] for key in mmpeft.adapter_state_dict(net)} == {'0', '2'}


def test_missing_material_names_the_command(tmp_path, script):
    material = script('projects/demo', 'material')

    with pytest.raises(SystemExit, match='apt-get install dataset-fashion-mnist'):
        material.fashion_mnist('train', tmp_path)
    for name in material.FASHION_FILES:
        (tmp_path / f'{name}-ubyte.gz').write_bytes(b'other')
    with pytest.raises(SystemExit, match='has SHA-256 .*Install the right one'):
        material.fashion_mnist('train', tmp_path)


def test_workers_are_submitted_to_slurm(study, tmp_path, monkeypatch, capsys):
    """A stand-in for sbatch takes the script; what it would run is run here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=':')
    words = ['run', '--slurm', 'cpu', '--workers', '3', '--records', str(tmp_path / 'r.jsonl')]
    for name, answer in ('srun', ''), ('sbatch', 'cp "$1" taken.sh; echo Submitted batch job 17'):
        (tmp_path / name).write_text(f'#!/bin/sh\n{answer}\n')
        (tmp_path / name).chmod(0o755)
    args = study.parse(words)
    study.submit(args)
    script = (tmp_path / 'taken.sh').read_text()
    assert '#SBATCH --partition=cpu' in script and '#SBATCH --array=0-2' in script
    assert '3 workers are the job 17' in capsys.readouterr().out
    pickles = sorted((tmp_path / args.claims / 'slurm').glob('*submitted.pkl'))
    assert len(pickles) == 3
    job = DelayedSubmission.load(pickles[0])
    assert job.function is study.work and job.args == (args,)


def test_slurm_that_is_not_there(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PATH', '/nowhere')
    with pytest.raises(SystemExit, match="no job for the partition 'cpu'"):
        study.submit(study.parse(['run', '--slurm', 'cpu', '--workers', '2']))
