"""The swap, at the right moment of a Runner.

mmengine builds the model, wraps it for DDP and builds the optimizer before
any hook runs, loads pretrained weights after, and loads no weights at all
before validation or test. So the hook, in ``before_run`` and ahead of all
others, unwraps the model, loads the base, injects, wraps again and builds
optimizer and schedulers anew. Loading and resuming then find the structure.
"""

import copy
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import find_latest_checkpoint, load_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint

from mmpeft.checkpoint import check_fits, complete, describe, frozen_keys
from mmpeft.errors import MissingFileError, UsageError
from mmpeft.injection import inject
from mmpeft.registry import HOOKS, METHODS
from mmpeft.targets import Targets, adapter_parameters

from .gradient_watch import GradientWatch
from .recompute import let_inputs_require_grad, recomputed_modules


@HOOKS.register_module()
class PEFTHook(Hook):
    """Fine-tune a model by adapters, in ``train``, ``val`` and ``test``.

    Belongs under ``default_hooks``, a dict that child configs and
    ``--cfg-options default_hooks.peft.method.rank=16`` change key by key.

    The base is the model's own pretrained weights (``init_cfg``, the
    backbone's checkpoint), over which ``base_checkpoint`` or a ``load_from``
    without adapters is loaded. Checkpoints hold all but the frozen base, and
    are refused by another one.

    Args:
        method (dict): Such as ``dict(type='FLoRA', rank=32)``.
        targets (dict, optional): See :class:`mmpeft.targets.Targets`. The
            module defaults to ``'backbone'``.
        unfreeze (Sequence[str]): See :func:`mmpeft.inject`.
        base_checkpoint (str, optional): A checkpoint of the whole plain model
            to start from.
        save_frozen (bool): Keep the frozen base in checkpoints.
        check_base (bool): Refuse adapters of another base.
        check_iters (int): Iterations after which an adapter without a
            gradient stops the run.

    Raises:
        UsageError: The method or the targets are wrong.
    """

    priority = 'HIGHEST'

    def __init__(
        self,
        method,
        targets=None,
        unfreeze=(),
        base_checkpoint=None,
        save_frozen=False,
        check_base=True,
        check_iters=10,
    ):
        self.method = METHODS.build(method)
        self.targets = Targets.of(dict(module='backbone') | dict(targets or {}))
        self.unfreeze = unfreeze
        self.base_checkpoint = base_checkpoint
        self.save_frozen = save_frozen
        self.check_base = check_base
        self.check_iters = check_iters
        self.watch = None
        self._iterations_watched = 0
        self._prepared = False

    def before_run(self, runner):
        """Load the base, inject, and build anew what depends on the parameters."""
        model = _unwrapped(runner)
        if not getattr(model, 'peft', []):
            outer, runner.model = runner.model, model
            self._load_base(runner)
            summary = inject(model, self.method, self.targets, self.unfreeze)
            runner.logger.info(f'{self.method}\n{summary}')
            runner.model = outer
        if _is_training(runner) and not self._prepared:
            self._prepared = True
            runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), model)
            self._rebuild_optimizer(runner)
            runner.register_hook(_AdapterCheckpointHook(self), 'LOWEST')

    def _load_base(self, runner):
        source, checkpoint = self._pending_checkpoint(runner)
        description = None if checkpoint is None else _description(checkpoint)
        plain = checkpoint is not None and description is None
        if plain and runner._resume:
            raise UsageError(
                f'{source!r} holds no adapters, so there is no adapter training to resume. To '
                'start from its weights, set load_from to it and leave --resume away.'
            )
        base = self.base_checkpoint or (description or {}).get('base_checkpoint')
        self.base_checkpoint = source if plain else base
        training = _is_training(runner)
        if training or not (plain or (description or {}).get('holds_base')):
            runner._init_model_weights()
        if plain and not training:
            runner.logger.warning(
                f'{source!r} holds no adapters. It is taken as the base, and the adapters are '
                'as they start.'
            )
        if self.base_checkpoint is not None:
            if '://' not in self.base_checkpoint and not Path(self.base_checkpoint).is_file():
                raise MissingFileError(
                    f'The base checkpoint {self.base_checkpoint!r}, which the adapters start '
                    'from, does not exist. Put it there, or set '
                    'default_hooks.peft.base_checkpoint to where it is.'
                )
            load_checkpoint(
                runner.model,
                self.base_checkpoint,
                map_location='cpu',
                revise_keys=[(r'^module\.', '')],
            )

    def _pending_checkpoint(self, runner):
        if runner._has_loaded:
            return None, None
        source = runner._load_from
        if source is None and runner._resume:
            source = find_latest_checkpoint(runner.work_dir)
        if source is None:
            return None, None
        if '://' not in str(source) and not Path(source).is_file():
            raise MissingFileError(f'The checkpoint {str(source)!r} does not exist.')
        return str(source), _load_checkpoint(str(source), map_location='cpu')

    def _rebuild_optimizer(self, runner):
        if 'optim_wrapper' not in runner.cfg:
            raise UsageError(
                'PEFTHook builds the optimizer anew from the config, and this Runner was made '
                'without one. Use Runner.from_cfg(cfg) with optim_wrapper and param_scheduler in '
                'it.'
            )
        runner.optim_wrapper = runner.build_optim_wrapper(copy.deepcopy(runner.cfg.optim_wrapper))
        scheduled, runner.param_schedulers = runner.param_schedulers is not None, None
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
        if scheduled:
            runner.param_schedulers = runner.build_param_scheduler(
                copy.deepcopy(runner.cfg.param_scheduler)
            )

    def before_train(self, runner):
        """Check that the optimizer has the adapters, and watch their gradients."""
        model = _unwrapped(runner)
        groups = runner.optim_wrapper.optimizer.param_groups
        optimized = {id(p) for group in groups for p in group['params']}
        lost = [p for p in adapter_parameters(model) if id(p) not in optimized]
        if lost:
            raise UsageError(
                f'{len(lost)} adapter parameters are not in the optimizer, so that they would '
                'never train. The optim_wrapper.constructor of the config leaves them out.'
            )
        names = runner.cfg.get('activation_checkpointing') or ()
        for module in recomputed_modules(model, names):
            let_inputs_require_grad(module)
        self.watch = GradientWatch(model)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Stop the run if gradients do not reach all adapters."""
        if self.watch is None:
            return
        self._iterations_watched += 1
        strict = is_model_wrapper(runner.model) and not runner.cfg.get('find_unused_parameters')
        if strict or self._iterations_watched >= self.check_iters:
            self._judge_gradients(runner, final=self._iterations_watched >= self.check_iters)

    def after_train(self, runner):
        """The same for runs of few iterations."""
        if self.watch is not None:
            self._judge_gradients(runner, final=True)

    def _judge_gradients(self, runner, final):
        unreached, zero = self.watch.unreached, self.watch.always_zero
        if unreached:
            raise UsageError(
                f'No gradient reached {len(unreached)} of {len(self.watch.reached)} adapters in '
                f'{self._iterations_watched} iterations, such as {", ".join(unreached[:3])}. Their '
                'layers are not used in the forward pass, or run under no_grad (a frozen_stages '
                'of the backbone, say) or in a reentrant checkpoint. Leave them out with '
                'targets.exclude, or let the gradient through.'
            )
        if final:
            if zero:
                runner.logger.warning(
                    f'The gradients of {len(zero)} adapters were all zero so far, such as '
                    f'{", ".join(zero[:3])}.'
                )
            self.watch.close()
            self.watch = None

    def after_load_checkpoint(self, runner, checkpoint):
        """Check an adapter checkpoint and complete it with the base of this model."""
        model = _unwrapped(runner)
        if not getattr(model, 'peft', []):
            return
        description = _description(checkpoint)
        state = checkpoint.get('state_dict', checkpoint)
        if description is not None:
            check_base = self.check_base and not description['holds_base']
            check_fits(model, state, description, 'The checkpoint', check_base)
        completed = complete(model, state, 'module.' if _is_prefixed(state) else '')
        if description is None:
            own = model.state_dict(keep_vars=True)
            adapters = {id(p) for p in adapter_parameters(model)}
            for key in (k for k, v in own.items() if id(v) in adapters):
                completed.setdefault(key, own[key].detach())
        _refill(state, completed)
        if 'ema_state_dict' in checkpoint:
            ema = checkpoint['ema_state_dict']
            _refill(ema, complete(model, ema, 'module.'))


class _AdapterCheckpointHook(Hook):
    """Takes the frozen base out of checkpoints, after all other hooks had their part."""

    def __init__(self, peft):
        self.peft = peft
        self.description = None

    def before_save_checkpoint(self, runner, checkpoint):
        model = _unwrapped(runner)
        if self.description is None:
            self.description = describe(model)
        checkpoint['meta']['mmpeft'] = self.description | dict(
            holds_base=self.peft.save_frozen,
            base_checkpoint=self.peft.base_checkpoint,
        )
        if not self.peft.save_frozen:
            for key in frozen_keys(model):
                checkpoint['state_dict'].pop(key, None)
                checkpoint.get('ema_state_dict', {}).pop(f'module.{key}', None)


def _is_training(runner):
    return isinstance(runner.optim_wrapper, OptimWrapper)


def _unwrapped(runner):
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _description(checkpoint):
    return (checkpoint.get('meta') or {}).get('mmpeft')


def _is_prefixed(state):
    return all(key.startswith('module.') for key in state)


def _refill(state, content):
    state.clear()
    state.update(content)
