"""Ways in which two ranks come to disagree or to be refused: ``distributed_disagreements.py DIR``.

Each rank writes its errors. An error that did not reach all ranks would leave
the others waiting.
"""

import json
import sys
from pathlib import Path

import torch
from mmengine.dist import barrier, get_rank
from mmengine.hooks import Hook

from mmpeft.engine.launch import build_runner
from mmpeft.errors import TrainingError, UsageError
from mmpeft.injection.site import named_adapters
from tests.toy import by_iterations, toy_config


class Do(Hook):
    """Calls a function with the bare model at a stage, on rank 1 alone."""

    def __init__(self, stage, action, at=0):
        def act(runner, *_, **__):
            if get_rank() == 1 and runner.iter == at:
                action(runner.model.module)

        setattr(self, stage, act)


@torch.no_grad()
def write_base(model):
    model.backbone.norm.bias[2] += 0.5


@torch.no_grad()
def decide(model):
    adapter = named_adapters(model)['backbone.fc.parametrizations.weight.0']
    adapter.lora_E[0] = 1 - adapter.lora_E[0]


def spoil(model):
    model.backbone.stage[1].register_forward_hook(lambda *call: call[-1] * torch.nan)


def train(folder, name, *hooks, method=None, **changes):
    """What a run of four iterations says when it stops; '' if it does not."""
    torch.manual_seed(get_rank() if name == 'another_seed' else 0)
    named = {'launcher': 'pytorch', 'experiment_name': name} | by_iterations(4, 4)
    runner = build_runner(toy_config(folder / name, method, **named | changes))
    for hook in hooks:
        runner.register_hook(hook)
    try:
        runner.train()
    except (TrainingError, UsageError) as error:
        return str(error)
    return ''


def main(folder):
    folder = Path(folder)
    torch.set_num_threads(1)
    adalora = dict(type='AdaLoRA', rank=1, warmup=1, settle=1, every=1)
    errors = {'another_seed': train(folder, 'another_seed')}
    barrier()
    files = [folder / 'another_seed/iter_4.pth', folder / 'other/iter_4.pth']
    train(folder, 'other', **{'optim_wrapper.optimizer.lr': 0.1})
    barrier()
    errors['another_file'] = train(folder, 'another_file', load_from=str(files[get_rank()]))
    errors['another_base'] = train(folder, 'another_base', Do('before_train', write_base))
    errors['another_decision'] = train(
        folder, 'another_decision', Do('after_train_iter', decide, 3), method=adalora
    )
    errors['one_rank_alone'] = train(
        folder, 'one_rank_alone', Do('after_train_iter', write_base, 2)
    )
    errors['not_finite'] = train(folder, 'not_finite', Do('before_train', spoil))
    wrapper = dict(type='MMFullyShardedDataParallel', device_id=torch.device('cpu'))
    errors['sharded'] = train(folder, 'sharded', model_wrapper_cfg=wrapper)
    errors['unused'] = train(folder, 'unused', **{'model.backbone.unused': True})
    (folder / f'rank{get_rank()}.json').write_text(json.dumps(errors))


if __name__ == '__main__':
    main(*sys.argv[1:])
