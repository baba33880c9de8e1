"""Runs that are killed, and disks that are full, while a checkpoint is written.

``python -m tests.crash_run FOLDER 200 0`` is the long run.
"""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import mmpeft
from mmpeft.checkpoint.adapter_file import read_adapter
from mmpeft.checkpoint.atomic import replacing
from mmpeft.checkpoint.safe_load import read_checkpoint
from mmpeft.errors import DamagedFileError, UnwrittenFileError, UsageError
from tests.networks import Runs
from tests.networks import TwinNet as Net
from tests.toy import toy_runner

ROOT = Path(__file__).parents[1]


def test_killed_at_random_moments_nothing_saved_is_lost(tmp_path):
    command = [sys.executable, '-m', 'tests.crash_run', str(tmp_path), '6', '0']
    environment = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures['equals_a_run_that_was_never_killed']
    assert figures['temporary_at_the_end'] == 0


@contextmanager
def files_up_to(size):
    """The system refuses to write more than that into a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def visible(folder):
    kept = ('.pth', '.safetensors', '.json', '.tmp')
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in kept}


@pytest.mark.parametrize('size', [2**10, 2**14], ids=['adapter', 'checkpoint'])
def test_a_full_disk_leaves_the_former_checkpoint(size, tmp_path):
    changes = {'default_hooks.checkpoint.max_keep_ckpts': 1, 'param_scheduler': None}
    toy_runner(tmp_path, **changes, **{'train_cfg.max_epochs': 1}).train()
    before = visible(tmp_path)
    assert len(before['epoch_1.pth']) > 2**14 > len(before['epoch_1.safetensors']) > 2**10
    runner = toy_runner(tmp_path, **changes, resume=True)
    name = 'epoch_2.safetensors' if size == 2**10 else 'epoch_2.pth'
    save = runner.save_checkpoint

    def save_on_a_full_disk(*args, **kwargs):
        with files_up_to(size):
            save(*args, **kwargs)

    runner.save_checkpoint = save_on_a_full_disk
    with pytest.raises(UnwrittenFileError, match=rf'{name}.*could not be written'):
        runner.train()
    after = visible(tmp_path)
    assert {key: after[key] for key in before} == before
    assert not any(key.endswith('.tmp') for key in after) and 'epoch_2.pth' not in after
    toy_runner(tmp_path, **changes, resume=True).train()
    assert [p.name for p in tmp_path.glob('*.pth')] == ['epoch_3.pth']


def test_an_adapter_that_does_not_fit_the_disk_leaves_the_former_one(tmp_path):
    model = Net()
    mmpeft.inject(model, dict(type='LoRA', rank=2), dict(module='backbone'))
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    before = visible(tmp_path)
    with pytest.raises(UnwrittenFileError, match='could not be written'), files_up_to(2**10):
        mmpeft.save_adapter(model, path)
    assert visible(tmp_path) == before


def test_torch_says_little_of_a_full_disk(tmp_path):
    path = tmp_path / 'a.pth'
    with pytest.raises(UnwrittenFileError, match=r'a\.pth.*MiB are free'), files_up_to(2**10):
        with replacing(path) as temporary:
            torch.save(torch.zeros(2**12), temporary)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_writers_go_with_the_next_write(tmp_path):
    path = tmp_path / 'file'
    child = os.fork()
    if not child:
        with replacing(path) as temporary:
            temporary.write_text('half')
            os._exit(0)
    os.waitpid(child, 0)
    assert [p.suffix for p in tmp_path.iterdir()] == ['.tmp']
    running = path.with_name(f'.file.{os.getppid()}.tmp')
    other = path.with_name('.file2.1.tmp')
    for file in (running, other):
        file.touch()
    with replacing(path) as temporary:
        temporary.write_text('whole')
    assert set(tmp_path.iterdir()) == {path, running, other}


def test_where_nothing_can_be_written_that_is_said(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UnwrittenFileError, match='file/a'), replacing(tmp_path / 'file/a'):
        pass


def test_an_error_of_another_kind_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match='^size mismatch$'), replacing(tmp_path / 'a.pth'):
        raise RuntimeError('size mismatch')
    assert not list(tmp_path.iterdir())


RESUMED = dict(param_scheduler=None)


def damage(path):
    """Flip one bit of a weight."""
    content = path.read_bytes()
    value = read_checkpoint(path)['state_dict']['head.bias'].numpy().tobytes()
    place = content.index(value)
    path.write_bytes(content[:place] + bytes([value[0] ^ 1]) + content[place + 1 :])


@pytest.mark.parametrize('harm', ['truncated', 'flipped', 'emptied'])
def test_resuming_passes_over_damaged_checkpoints(harm, tmp_path):
    toy_runner(tmp_path, **RESUMED, **{'train_cfg.max_epochs': 2}).train()
    newest = tmp_path / 'epoch_2.pth'
    if harm == 'flipped':
        damage(newest)
    else:
        os.truncate(newest, 0 if harm == 'emptied' else newest.stat().st_size // 2)
    runner = toy_runner(tmp_path, **RESUMED, resume=True)
    said = []
    runner.logger.warning = said.append
    runner.train()
    assert any('epoch_2.pth' in text and 'skipped' in text for text in said)
    through = toy_runner(tmp_path / 'through', **RESUMED)
    through.train()
    a, b = (r.model.state_dict() for r in (runner, through))
    assert all(torch.equal(a[key], b[key]) for key in b)


@pytest.mark.parametrize('content', [None, '', 'epoch_', '/elsewhere/epoch_1.pth'])
def test_resuming_does_not_rely_on_last_checkpoint(content, tmp_path):
    toy_runner(tmp_path, **RESUMED, **{'train_cfg.max_epochs': 2}).train()
    (tmp_path / 'last_checkpoint').unlink()
    if content is not None:
        (tmp_path / 'last_checkpoint').write_text(content)
    runner = toy_runner(tmp_path, **RESUMED, resume=True)
    runner.call_hook('before_run')
    assert Path(runner._load_from).name == 'epoch_2.pth'


def test_the_newest_is_the_one_that_was_saved_last(tmp_path):
    """Not the one of most epochs, which may be of an earlier run in the same folder."""
    toy_runner(tmp_path, **RESUMED).train()
    earlier = torch.load(tmp_path / 'epoch_3.pth', weights_only=False)
    earlier['meta']['time'] = '20200101_000000'
    torch.save(earlier, tmp_path / 'epoch_3.pth')
    runner = toy_runner(tmp_path, **RESUMED, resume=True)
    runner.call_hook('before_run')
    assert Path(runner._load_from).name == 'epoch_2.pth'


def test_where_no_checkpoint_is_whole_nothing_starts_anew(tmp_path):
    toy_runner(tmp_path, **RESUMED, **{'train_cfg.max_epochs': 2}).train()
    for path in tmp_path.glob('*.pth'):
        damage(path)
    before = visible(tmp_path)
    with pytest.raises(UsageError, match=r'no intact checkpoint.*epoch_[12]\.pth.*epoch_[12]\.pth'):
        toy_runner(tmp_path, **RESUMED, resume=True).train()
    assert visible(tmp_path) == before


def test_a_checkpoint_that_is_gone_is_missed(tmp_path):
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/epoch_2.pth')
    with pytest.raises(FileNotFoundError, match='last_checkpoint names'):
        toy_runner(tmp_path, **RESUMED, resume=True).train()


@pytest.mark.parametrize('resume', [False, True])
@pytest.mark.parametrize('zipped', [False, True])
def test_a_checkpoint_that_would_run_code_is_refused(zipped, resume, tmp_path):
    toy_runner(tmp_path / 'run', **RESUMED).train()
    path = tmp_path / 'run/epoch_3.pth'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['meta']['more'] = Runs(tmp_path / 'ran')
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    changes = RESUMED | (dict(resume=True) if resume else dict(load_from=str(path)))
    runner = toy_runner(tmp_path / 'run', **changes)
    with pytest.raises(UsageError, match='only be restored by running code'):
        runner.train() if resume else runner.test()
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize(
    'scheduler',
    [
        dict(type='OneCycleLR', eta_max=0.1, total_steps=40, by_epoch=False),
        dict(type='CosineRestartLR', periods=[2, 2], restart_weights=[1, 1], eta_min=0.0),
        dict(type='PolyMomentum', power=0.9, eta_min=0.1),
        dict(type='ReduceOnPlateauLR', monitor='toy/first'),
    ],
    ids=lambda scheduler: scheduler['type'],
)
def test_what_mmengine_stores_is_read(scheduler, tmp_path):
    changes = dict(param_scheduler=[scheduler], val_cfg=None, val_dataloader=None)
    changes |= dict(val_evaluator=None, custom_hooks=[dict(type='EMAHook')])
    changes['train_dataloader.dataset.noise'] = 0.0
    toy_runner(tmp_path, dict(type='AdaLoRA', rank=2), **changes).train()
    read = read_checkpoint(tmp_path / 'epoch_3.pth')
    full = torch.load(tmp_path / 'epoch_3.pth', weights_only=False)
    assert read.keys() == full.keys() and read['meta'] == full['meta']
    loss, expected = (c['message_hub']['log_scalars']['train/loss'] for c in (read, full))
    assert (loss.data[0] == expected.data[0]).all() and loss.mean() == expected.mean()
    assert (
        str(read['param_schedulers']).split(' at 0x')[0]
        == (str(full['param_schedulers']).split(' at 0x')[0])
    )


def test_an_adapter_file_is_no_checkpoint(tmp_path):
    toy_runner(tmp_path, **RESUMED).train()
    path = tmp_path / 'epoch_3.safetensors'
    with pytest.raises(UsageError, match=r'load_adapter.*beside it is .*epoch_3\.pth'):
        toy_runner(tmp_path / 'test', load_from=str(path)).test()
    with pytest.raises(UsageError, match=r'load_from.*beside it is .*epoch_3\.safetensors'):
        read_adapter(path.with_suffix('.pth'))
    alone = tmp_path / 'alone.safetensors'
    path.rename(alone)
    with pytest.raises(UsageError) as caught:
        read_checkpoint(alone)
    assert 'beside' not in str(caught.value)


@pytest.mark.parametrize('content', [b'junk', b'', b'\0' * 100, b'PK' + bytes(100)])
def test_a_file_of_something_else_is_no_checkpoint(content, tmp_path):
    path = tmp_path / 'a.pth'
    path.write_bytes(content)
    with pytest.raises(DamagedFileError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == (
        f'{str(path)!r} is damaged, or torch.save did not write it. Give a checkpoint (.pth) that '
        'training saved.'
    )
