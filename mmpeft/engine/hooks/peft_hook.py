"""The swap, at the right moment of a Runner.

mmengine builds the model, wraps it for DDP and builds the optimizer before
any hook runs, loads pretrained weights after, and loads no weights at all
before validation or test. So the hook, in ``before_run`` and ahead of all
others, unwraps the model, loads the base, injects, wraps again and builds
optimizer and schedulers anew. Loading and resuming then find the structure.
"""

import copy
from contextlib import ExitStack

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapper
from torch.nn.utils import parametrize

from mmpeft.checkpoint.keys import excluded_keys, fill_frozen
from mmpeft.checkpoint.legacy import former_method
from mmpeft.checkpoint.manifest import describe
from mmpeft.checkpoint.validation import check_fits
from mmpeft.engine.hooks.monitors.finite import FiniteWatch
from mmpeft.engine.hooks.monitors.frozen import FrozenWatch
from mmpeft.engine.hooks.monitors.gradients import GradientWatch
from mmpeft.engine.hooks.monitors.movement import MotionWatch
from mmpeft.engine.hooks.monitors.ranks import RankAgreement
from mmpeft.errors import UsageError
from mmpeft.injection.inject import inject
from mmpeft.injection.site import adapter_parameters
from mmpeft.injection.targets import Targets
from mmpeft.registry import HOOKS, METHODS
from mmpeft.training.allocation import allocate
from mmpeft.training.recompute import let_inputs_require_grad, recomputed_modules

from .checkpoint_files import keep_whole
from .frozen_base import description_of, load_base
from .penalty_term import add_penalty


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
        targets (dict, optional): See :class:`mmpeft.injection.targets.Targets`. The
            module defaults to ``'backbone'``.
        unfreeze (Sequence[str]): See :func:`mmpeft.inject`.
        base_checkpoint (str, optional): A checkpoint of the whole plain model
            to start from.
        save_frozen (bool): Keep the frozen base in checkpoints.
        save_adapters (bool): Write an adapter file beside each checkpoint.
        check_base (bool): Refuse adapters of another base.
        execution (str): See :func:`mmpeft.inject`.
        check_iters (int): Iterations after which an adapter without a
            gradient stops the run, and other mistakes that show early are
            looked for.
        nonfinite_iters (int): Steps in a row with NaN or infinite loss or
            gradients that stop the run.
        check_frozen (bool): Stop the run where something frozen has changed.

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
        save_adapters=True,
        check_base=True,
        execution='auto',
        check_iters=10,
        nonfinite_iters=3,
        check_frozen=True,
    ):
        METHODS.build(method)  # refuses what is wrong
        self.method = method
        self.targets = Targets.of(dict(module='backbone') | dict(targets or {}))
        self.unfreeze = unfreeze
        self.base_checkpoint = base_checkpoint
        self.save_frozen = save_frozen
        self.save_adapters = save_adapters
        self.check_base = check_base
        self.execution = execution
        self.check_iters = check_iters
        self.nonfinite_iters = nonfinite_iters
        self.check_frozen = check_frozen
        self.watch = None
        self.allocation = None
        self._resumed_allocation = None
        self._kept_weights = ExitStack()
        self._iterations_watched = 0
        self._prepared = False

    def before_run(self, runner):
        """Load the base, inject, and build anew what depends on the parameters."""
        _check_alone(runner)
        model = _unwrapped(runner)
        if not getattr(model, 'peft', []):
            outer, runner.model = runner.model, model
            base = load_base(runner, self.base_checkpoint, _is_training(runner))
            self.base_checkpoint = base.checkpoint
            summary = inject(
                model,
                former_method(self.method, base.manifest),
                self.targets,
                self.unfreeze,
                empty=base.manifest is not None,
                execution=self.execution,
            )
            runner.logger.info(f'{model.peft[-1].method}\n{summary}')
            runner.model = outer
        if _is_training(runner) and not self._prepared:
            self._prepared = True
            runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), model)
            self._rebuild_optimizer(runner)
            add_penalty(model)
            for watch in self._watches(runner):
                runner.register_hook(watch)
            runner.register_hook(_AdapterCheckpointHook(self, keep_whole(runner)), 'LOWEST')

    def _watches(self, runner):
        optim_wrapper = runner.optim_wrapper
        yield FiniteWatch(optim_wrapper, self.nonfinite_iters, self.check_iters)
        yield MotionWatch(optim_wrapper.optimizer, self.check_iters)
        if self.check_frozen:
            yield FrozenWatch(self.check_iters)
        if runner.distributed:
            yield RankAgreement(self.check_iters)

    def _rebuild_optimizer(self, runner):
        if 'optim_wrapper' not in runner.cfg:
            raise UsageError(
                'PEFTHook builds the optimizer anew from the config, and this Runner was made '
                'without one. Use Runner.from_cfg(cfg) with optim_wrapper and param_scheduler in '
                'it.'
            )
        config = copy.deepcopy(runner.cfg.optim_wrapper)
        if config.get('paramwise_cfg'):
            # Adapters may hold parameters in common, which mmengine else takes for a mistake.
            config.paramwise_cfg.setdefault('bypass_duplicate', True)
        runner.optim_wrapper = runner.build_optim_wrapper(config)
        scheduled, runner.param_schedulers = runner.param_schedulers is not None, None
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
        if scheduled:
            runner.param_schedulers = runner.build_param_scheduler(
                copy.deepcopy(runner.cfg.param_scheduler)
            )

    def before_train(self, runner):
        """Check that the optimizer has the adapters, start what follows its steps."""
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
        steps = runner.max_iters // runner.optim_wrapper._accumulative_counts
        self.allocation = allocate(model, runner.optim_wrapper.optimizer, steps)
        if runner._resume and self._resumed_allocation is not None:
            self.allocation.load_state_dict(self._resumed_allocation)

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
        self.allocation.close()

    def _keep_weights(self, runner, *_):
        """Build adapted weights once for a whole evaluation."""
        self._forget_weights()
        self._kept_weights.enter_context(parametrize.cached())

    def _forget_weights(self, *_, **__):
        self._kept_weights.close()

    before_val_epoch = before_test_epoch = _keep_weights
    after_val_epoch = after_test_epoch = before_train_epoch = _forget_weights

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
        description = description_of(checkpoint)
        state = checkpoint.get('state_dict', checkpoint)
        if description is not None:
            check_base = self.check_base and not description['holds_base']
            check_fits(model, state, description, 'The checkpoint', check_base)
        self._resumed_allocation = checkpoint.get('mmpeft_allocation')
        completed = fill_frozen(model, state, 'module.' if _is_prefixed(state) else '')
        if description is None:
            own = model.state_dict(keep_vars=True)
            adapters = {id(p) for p in adapter_parameters(model)}
            for key in (k for k, v in own.items() if id(v) in adapters):
                completed.setdefault(key, own[key].detach())
        _refill(state, completed)
        if 'ema_state_dict' in checkpoint:
            ema = checkpoint['ema_state_dict']
            _refill(ema, fill_frozen(model, ema, 'module.'))


class _AdapterCheckpointHook(Hook):
    """Takes the frozen base out of checkpoints, after all other hooks had their part."""

    def __init__(self, peft, files):
        self.peft = peft
        self.files = files
        self.description = None

    def before_save_checkpoint(self, runner, checkpoint):
        model = _unwrapped(runner)
        if self.description is None:
            self.description = describe(model)
        checkpoint['meta']['mmpeft'] = self.description | dict(
            holds_base=self.peft.save_frozen,
            base_checkpoint=self.peft.base_checkpoint,
        )
        allocation = self.peft.allocation
        if 'optimizer' in checkpoint and allocation is not None:
            checkpoint['mmpeft_allocation'] = allocation.state_dict()
        omitted = excluded_keys(model)
        if self.peft.save_adapters:
            state = checkpoint['state_dict'].items()
            self.files.announce({k: v for k, v in state if k not in omitted}, self.description)
        if not self.peft.save_frozen:
            for key in omitted:
                checkpoint['state_dict'].pop(key, None)
                checkpoint.get('ema_state_dict', {}).pop(f'module.{key}', None)


def _check_alone(runner):
    hooks = [hook for hook in runner.hooks if isinstance(hook, PEFTHook)]
    if len(hooks) > 1:
        raise UsageError(
            f'The config has {len(hooks)} hooks of type PEFTHook, and only one can adapt the '
            'model. Choose all layers with the targets of one: its module may be a common parent, '
            'or "" for the whole model, narrowed by include and overrides.'
        )


def _is_training(runner):
    return isinstance(runner.optim_wrapper, OptimWrapper)


def _unwrapped(runner):
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _is_prefixed(state):
    return all(key.startswith('module.') for key in state)


def _refill(state, content):
    state.clear()
    state.update(content)
