"""What methods ask of a Runner: loss terms, allocators, decompositions, shared factors."""

import copy

import pytest
import torch

import mmpeft
from mmpeft.injection.site import named_adapters
from tests.toy import by_iterations, same, scores, state_of, toy_runner, weights

METHODS = dict(
    adalora=dict(type='AdaLoRA', rank=2, init_rank=4, warmup=2, settle=2, every=2),
    fish=dict(type='FISH', share=0.1, samples=4),
    diff_pruning=dict(type='DiffPruning', project_at=5, share=0.2),
    pissa=dict(type='PiSSA', rank=2),
    milora=dict(type='MiLoRA', rank=2),
    svdiff=dict(type='SVDiff'),
    spectral=dict(type='SpectralAdapter', rank=2),
    vera=dict(type='VeRA', rank=4),
    lotr=dict(type='LoTR', rank=2),
    mpc=dict(type='LoRA', rank=2, mpc='d'),
    parallel=dict(type='ParallelAdapter', rank=2),
)
TWICE = {'model.backbone.twice': True}


@pytest.mark.parametrize('name', METHODS)
def test_a_resumed_run_equals_one_that_ran_through(name, tmp_path):
    changes = by_iterations(9, 3)
    through = toy_runner(tmp_path / 'through', METHODS[name], **copy.deepcopy(changes))
    through.train()
    for stop in (3, 6):
        resumed = toy_runner(
            tmp_path / f'from_{stop}',
            METHODS[name],
            **copy.deepcopy(changes),
            load_from=str(tmp_path / f'through/iter_{stop}.pth'),
            resume=True,
        )
        resumed.train()
        assert same(weights(through), weights(resumed)), stop
        one, two = (
            torch.load(tmp_path / f'{run}/iter_9.pth', weights_only=False)
            for run in ('through', f'from_{stop}')
        )
        assert same(one['state_dict'], two['state_dict']), stop
        assert str(one['optimizer']) == str(two['optimizer']), stop
        assert str(one['mmpeft_allocation']) == str(two['mmpeft_allocation']), stop


@pytest.mark.parametrize('name', ['pissa', 'milora', 'svdiff', 'spectral'])
def test_one_decomposition_of_the_pretrained_weights(name, pretrained, tmp_path, monkeypatch):  # noqa: F811
    decomposed = []
    svd = torch.linalg.svd

    def counted(matrix, *args, **kwargs):
        decomposed.append(matrix.clone())
        return svd(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, 'svd', counted)
    backbone = {'model.backbone.checkpoint': pretrained}
    runner = toy_runner(tmp_path, METHODS[name], **backbone)
    runner.train()
    weight = torch.load(pretrained)['fc.weight']
    assert len(decomposed) == 4
    assert any(m.shape == weight.shape and torch.equal(m, weight) for m in decomposed)
    expected = scores(runner.val())

    def refuse(matrix, *args, **kwargs):
        assert matrix.is_meta, 'a second decomposition'  # there it computes nothing
        return svd(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, 'svd', refuse)
    checkpoint = str(tmp_path / 'epoch_3.pth')
    fresh = toy_runner(tmp_path / 'test', METHODS[name], **backbone, load_from=checkpoint)
    assert (scores(fresh.test()) == expected).all()
    fewer = str(tmp_path / 'epoch_1.pth')
    resumed = toy_runner(
        tmp_path / 'resumed', METHODS[name], **backbone, load_from=fewer, resume=True
    )
    resumed.train()
    assert same(weights(runner), weights(resumed))


def test_the_loss_has_the_methods_term(tmp_path):
    term = dict(type='LoRA', rank=2, mpc='o', mpc_weight=0.3)
    runner = toy_runner(tmp_path, term, experiment_name='with_term')
    runner.train()
    logged = runner.message_hub.get_scalar('train/loss_peft').data[0]
    assert (logged > 0).all()
    adapters = named_adapters(runner.model).values()
    expected = 0
    for adapter in adapters:
        for gram in (adapter.lora_A @ adapter.lora_A.T, adapter.lora_B.T @ adapter.lora_B):
            expected += 0.3 * ((gram - torch.eye(len(gram))) ** 2).sum().item()
    assert mmpeft.penalty(runner.model).item() == pytest.approx(expected, rel=1e-5)
    without = toy_runner(
        tmp_path / 'without', dict(type='LoRA', rank=2), experiment_name='without_term'
    )
    without.train()
    assert 'train/loss_peft' not in without.message_hub.log_scalars
    assert mmpeft.penalty(without.model) is None


@pytest.mark.parametrize('iterations, counts, steps', [(12, 2, 6), (13, 3, 5)])
def test_the_allocator_follows_optimizer_steps(iterations, counts, steps, tmp_path):
    changes = by_iterations(iterations, iterations) | {'optim_wrapper.accumulative_counts': counts}
    runner = toy_runner(tmp_path, METHODS['adalora'], **changes)
    runner.train()
    (allocator,) = next(h for h in runner.hooks if hasattr(h, 'allocation')).allocation.allocators
    assert allocator.steps == allocator.step == steps
    adapters = list(named_adapters(runner.model).values())
    kept = sum(int((a.lora_E != 0).sum()) for a in adapters)
    assert kept <= sum(a.method.rank * (len(a.lora_E) // 4) for a in adapters)


def test_evaluation_of_fewer_ranks_needs_no_allocator(tmp_path):
    changes = by_iterations(12, 12)
    runner = toy_runner(tmp_path, METHODS['adalora'], **copy.deepcopy(changes))
    runner.train()
    expected = scores(runner.val())
    fresh = toy_runner(
        tmp_path / 'test', METHODS['adalora'], **changes, load_from=str(tmp_path / 'iter_12.pth')
    )
    assert (scores(fresh.test()) == expected).all()


def test_shared_factors_are_optimized_and_stored_once(tmp_path):
    targets = {'default_hooks.peft.targets': dict(include=('fc', 'again'))} | TWICE
    runner = toy_runner(tmp_path, dict(type='LoTR', rank=2), **targets)
    runner.train()
    first, second = named_adapters(runner.model).values()
    assert first.lotr_A is second.lotr_A and first.core is not second.core
    stored = [k for k in state_of(tmp_path / 'epoch_3.pth') if 'lotr_' in k]
    assert len(stored) == 2
    fresh = toy_runner(
        tmp_path / 'test',
        dict(type='LoTR', rank=2),
        **targets,
        load_from=str(tmp_path / 'epoch_3.pth'),
    )
    assert (scores(fresh.test()) == scores(runner.val())).all()
