"""Adapters at the right moment of a Runner.

mmengine builds the model, wraps it for DDP and builds the optimizer before
any hook runs, loads pretrained weights after, and loads no weights at all
before validation or test. So the hook, in ``before_run`` and before all
others, unwraps the model, loads the base, injects, wraps again and rebuilds
optimizer and schedulers. Loading and resuming then find the structure.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from mmengine.dist import broadcast
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from torch import nn

from mmpeft.engine.datasets import check_datasets
from mmpeft.engine.injections import Methods, inject_all, injections, with_rank
from mmpeft.engine.loading import complete, load_base
from mmpeft.engine.normalisation import normalisation_fault
from mmpeft.engine.resume import pending_source
from mmpeft.engine.sensitivity import measure
from mmpeft.errors import UsageError, suggest
from mmpeft.injection.compile import compile_blocks
from mmpeft.injection.summary import Summary
from mmpeft.methods.arguments import check_types, require
from mmpeft.registry import HOOKS
from mmpeft.training.penalty import penalty

from .checkpoints import AdapterCheckpointHook
from .fitting import load_checked
from .merged_evaluation import MergedEvaluation, check_merged_evaluation, restore
from .monitor_hook import MonitorHook
from .optimizer import rebuild_optimizer, warm_up_fault
from .runner_check import check_alone, check_runner, check_teacher
from .shard_hook import ShardHook, check_shardable
from .unwrap import unwrap


@HOOKS.register_module()
@dataclass(eq=False)
class PEFTHook(Hook):
    """Fine-tune a model by adapters, in ``train``, ``val`` and ``test``.

    Belongs under ``default_hooks``, a dict that child configs and
    ``--cfg-options default_hooks.peft.method.rank=16`` change key by key.

    The base is the model's own pretrained weights (``init_cfg``, the
    backbone's checkpoint), over which ``base_checkpoint`` or a ``load_from``
    without adapters is loaded. Checkpoints hold everything but the frozen
    base, and are refused by another one. Where a checkpoint with adapters is
    loaded, arguments of the method that the config leaves open are those of
    the checkpoint.

    Args:
        method: Such as ``dict(type='FLoRA', rank=32)``; or a list of such, or
            of ``dict(method=..., targets=..., unfreeze=...)``, injected in
            order.
        targets: See :class:`mmpeft.injection.targets.Targets`, for all
            methods. The module defaults to ``'backbone'``.
        unfreeze: See :func:`mmpeft.inject`.
        base_checkpoint: A checkpoint of the whole plain model to start from.
        save_frozen: Keep the frozen base in checkpoints.
        save_adapters: Write an adapter file beside each checkpoint.
        check_base: Refuse adapters of another base.
        check_whole: In testing and resuming, refuse a checkpoint that lacks
            tensors of the model or has them in other shapes, such as a head of
            other classes. Training that starts from one logs what it leaves out.
        execution: See :func:`mmpeft.inject`.
        memory: Likewise.
        compile_blocks: Compile the blocks of the targets (:func:`mmpeft.compile_blocks`): ``True``,
            or options such as ``dict(mode='reduce-overhead', dynamic=False)``.
        frozen_dtype: See :func:`mmpeft.inject`. The base is loaded as it is, and then rounded.
        check_iters: Iterations after which an adapter without a gradient
            stops the run, and other mistakes that show early are looked for.
        nonfinite_iters: Steps in a row with NaN or infinite loss or gradients
            that stop the run.
        check_frozen: Stop the run if something frozen changes.
        shard: Spread the frozen base over the processes, by torch's ``fully_shard``, in training.
        sensitivity: Batches of training data, in each process, by whose gradients a budget is
            distributed over weights before training (:func:`mmpeft.sensitivity`); 0 for one rank
            for all. A run that resumes, or loads adapters, takes their ranks and measures nothing.
        evaluate_merged: Validate and test in merged weights
            (:class:`~mmpeft.engine.hooks.merged_evaluation.MergedEvaluation`).
    """

    priority = 'HIGHEST'

    method: Methods | None = None
    targets: Mapping | None = None
    unfreeze: str | Sequence[str] | None = ()
    base_checkpoint: str | Path | None = None
    save_frozen: bool = False
    save_adapters: bool = True
    check_base: bool = True
    check_whole: bool = True
    execution: str = 'auto'
    memory: str = 'speed'
    compile_blocks: bool | Mapping = False
    frozen_dtype: str | None = None
    check_iters: int = 10
    nonfinite_iters: int = 3
    check_frozen: bool = True
    shard: bool = False
    sensitivity: int = 0
    evaluate_merged: bool = False

    def __new__(cls, *_, **arguments):
        known = [field.name for field in fields(cls)]
        for name in arguments:
            if name not in known:
                raise UsageError(f'PEFTHook has no argument {name!r}. {suggest(name, known)}')
        return super().__new__(cls)

    def __post_init__(self):
        check_types(self)
        require(self, 'check_iters', self.check_iters >= 0, 'must not be negative.')
        self._injections = injections(self.method, self.targets, self.unfreeze, self.sensitivity)
        self._prepared, self._adapted = False, None
        if self.shard and self.compile_blocks is not False:
            raise UsageError(
                'shard=True and compile_blocks do not work together: shards are gathered by hooks '
                'around blocks, which are not compiled. Leave one of the two out.'
            )
        if self.evaluate_merged and (self.shard or self.compile_blocks is not False):
            raise UsageError(
                'evaluate_merged merges whole weights before each evaluation, and a model that is '
                'sharded or compiled cannot change so. Leave it out, or shard and compile_blocks.'
            )

    def before_run(self, runner):
        """Load the base, inject, and rebuild what depends on the parameters."""
        if not self._prepared:
            check_runner(runner)
        check_alone(runner, PEFTHook)
        model, trains = unwrap(runner.model), isinstance(runner.optim_wrapper, OptimWrapper)
        check_datasets(runner, model)
        if model is self._adapted:
            restore(model)
        if not getattr(model, 'peft', []):
            wrapped, runner.model = runner.model, model
            self._adapt(runner, trains)
            runner.model, self._adapted = wrapped, model
            if self.evaluate_merged:
                check_merged_evaluation(model)
                runner.register_hook(MergedEvaluation())
        elif model is not self._adapted:
            raise UsageError(
                f'The model of this Runner has adapters already ({model.peft[0].method}), and they '
                'would train in place of those of PEFTHook. Give the Runner a plain model: a new '
                'one, or this one after mmpeft.remove(model).'
            )
        if trains and not self._prepared:
            self._prepared = True
            runner._init_model_weights = partial(_share, model)
            if fault := normalisation_fault(model):
                runner.logger.warning(fault)
            if self.shard:
                check_shardable(runner)
                runner.model = model.cpu()
            else:
                runner.model = _wrapped(runner, model)
            rebuild_optimizer(runner)
            model.register_forward_hook(_add_penalty, with_kwargs=True)
            for hook in self._helpers(runner):
                runner.register_hook(hook)

    def inject(
        self,
        model: nn.Module,
        manifest: Mapping | None = None,
        measure: Callable[[dict], Mapping] | None = None,
        rank: int | None = None,
    ) -> Summary:
        """Inject the hook's methods into a model, from the weights that it has.

        Args:
            model: Without adapters and wrappers.
            manifest: See :func:`~mmpeft.engine.injections.inject_all`.
            measure: Likewise.
            rank: In place of the rank or budget of all methods.

        Raises:
            UsageError: See :func:`mmpeft.inject`; or ``rank`` is given and a method has none.
        """
        return inject_all(
            model,
            self._injections if rank is None else with_rank(self._injections, rank),
            manifest,
            measure,
            execution=self.execution,
            memory=self.memory,
            frozen_dtype=self.frozen_dtype,
        )

    def _adapt(self, runner, trains):
        source = pending_source(runner)
        if source is not None and source.manifest is None:
            if runner._resume:
                raise UsageError(
                    f'{source.path!r} holds no adapters, so there is no adapter training to '
                    'resume. To start from its weights, set load_from to it and omit --resume.'
                )
        self.base_checkpoint = load_base(
            runner.model,
            source,
            self.base_checkpoint,
            runner._init_model_weights,
            trains,
            self.check_whole,
        )
        manifest = source and source.manifest
        if source is not None and manifest is None and not trains:
            runner.logger.warning(
                f'{source.path!r} holds no adapters. It is taken as the base, and the adapters '
                'have their initial values.'
            )
        summary = self.inject(runner.model, manifest, partial(measure, runner) if trains else None)
        runner.logger.info(str(summary))
        if self.compile_blocks is not False:
            options = {} if self.compile_blocks is True else self.compile_blocks
            compiled = compile_blocks(runner.model, **options)
            runner.logger.info(f'{len(compiled)} blocks are compiled at their first call.')

    def _helpers(self, runner) -> Iterator[Hook]:
        yield MonitorHook(
            check_iters=self.check_iters,
            nonfinite_iters=self.nonfinite_iters,
            check_frozen=self.check_frozen,
        )
        saved = self.base_checkpoint, self.save_frozen, self.save_adapters
        checkpoints = AdapterCheckpointHook(runner, *saved)
        yield checkpoints
        if self.shard:
            yield ShardHook(runner, checkpoints)

    def before_train(self, runner):
        """Refuse averages that were paired with the plain model; look at the warm-up."""
        check_teacher(runner, unwrap(runner.model))
        if fault := warm_up_fault(runner):
            runner.logger.warning(fault)

    def after_load_checkpoint(self, runner, checkpoint):
        """Check an adapter checkpoint and complete it with the base of this model."""
        model = unwrap(runner.model)
        if getattr(model, 'peft', []):
            complete(model, checkpoint, self.check_base)
        load_checked(runner, checkpoint, self.check_whole)


def _share(model):
    """Make processes equal; ``init_weights`` of DETRs would draw anew what was loaded."""
    for value in model.state_dict().values():
        broadcast(value)


def _wrapped(runner, model):
    """A model in the Runner's wrapper, without converting norms again, which would thaw them."""
    converted = runner.cfg.pop('sync_bn', None)
    try:
        return runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), model)
    finally:
        if converted is not None:
            runner.cfg.sync_bn = converted


def _add_penalty(model, args, kwargs, losses):
    """Add the methods' term of the loss; mmengine sums and logs what has ``loss`` in its name."""
    if kwargs.get('mode') != 'loss' or not isinstance(losses, dict):
        return None
    term = penalty(model)
    return None if term is None else {**losses, 'loss_peft': term}
