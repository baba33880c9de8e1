"""Models in torch.compile, checkpoint_wrapper and nn.DataParallel, and in spawned processes."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import distributed, multiprocessing, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import mmpeft
from mmpeft.checkpoint.fingerprint import fingerprint
from mmpeft.errors import UsageError
from mmpeft.injection.wrappers import inner
from tests.cases import METHODS, randomize
from tests.networks import Net

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

LORA = dict(type='LoRA', rank=2)
BACKBONE = dict(module='backbone')


def compiled(model):
    return torch.compile(model, backend='eager')


def inside(wrap):
    """Wraps each block, and a layer in it, in place."""

    def wrap_inside(model):
        for number, block in enumerate(list(model.backbone)):
            block.pw = wrap(block.pw)
            model.backbone[number] = wrap(block)
        return model

    return wrap_inside


WRAPPERS = dict(
    compile=compiled,
    compiled_blocks=inside(compiled),
    checkpoint=checkpoint_wrapper,
    checkpointed_blocks=inside(checkpoint_wrapper),
    both=lambda model: compiled(inside(checkpoint_wrapper)(model)),
    data_parallel=nn.DataParallel,
)


def make(method=LORA):
    torch.manual_seed(0)
    model = Net().double().eval()
    if method:
        mmpeft.inject(model, method, BACKBONE)
        randomize(model)
    return model


def x():
    return torch.randn(2, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('name', WRAPPERS)
def test_wrappers_leave_no_trace_in_files(name, tmp_path):
    wrap, plain = WRAPPERS[name], make()
    wrapped = wrap(make())
    state, theirs = mmpeft.adapter_state_dict(plain), mmpeft.adapter_state_dict(wrapped)
    assert list(state) == list(theirs)
    assert all(torch.equal(state[key], theirs[key]) for key in state)
    assert fingerprint(wrapped) == fingerprint(plain)
    assert mmpeft.summary(wrapped) == mmpeft.summary(plain)
    path = mmpeft.save_adapter(wrapped, tmp_path / 'wrapped.safetensors')
    other = mmpeft.save_adapter(plain, tmp_path / 'plain.safetensors')
    expected = plain(x())
    torch.testing.assert_close(mmpeft.load_adapter(make(None), path)(x()), expected)
    for base in (wrap(make(None)), wrap(make(dict(type='LoRA', rank=2)))):
        assert mmpeft.load_adapter(base, other) is base
        torch.testing.assert_close(base(x()), expected)


@pytest.mark.parametrize('name', WRAPPERS)
def test_what_is_in_wrappers_is_adapted_merged_and_restored(name):
    wrapped, plain = WRAPPERS[name](make(None)), make(None)
    modules = list(wrapped.modules())
    summary = mmpeft.inject(wrapped, LORA, BACKBONE)
    assert summary == mmpeft.inject(plain, LORA, BACKBONE)
    for model in (wrapped, plain):
        torch.manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
    torch.testing.assert_close(wrapped(x()), plain(x()))
    assert mmpeft.merge(wrapped, reversible=True) is wrapped
    torch.testing.assert_close(wrapped(x()), plain(x()))
    assert mmpeft.unmerge(wrapped) is wrapped
    torch.testing.assert_close(wrapped(x()), plain(x()))
    assert mmpeft.remove(wrapped) is wrapped
    torch.testing.assert_close(wrapped(x()), mmpeft.remove(plain)(x()))
    assert list(wrapped.modules()) == modules


def test_wrappers_are_back_after_an_error():
    model = WRAPPERS['both'](make(None))
    modules = list(model.modules())
    with pytest.raises(UsageError, match='nothing'):
        mmpeft.inject(model, LORA, dict(module='backbone.0.out', kinds=('norm',)))
    assert list(model.modules()) == modules


@pytest.mark.parametrize('name', ['checkpointed_blocks', 'data_parallel'])
def test_models_in_wrappers_share_their_base(name):
    base = Net().eval()
    models = dict(plain=copy.deepcopy(base), wrapped=copy.deepcopy(base))
    for model in models.values():
        mmpeft.inject(model, LORA, BACKBONE)
        randomize(model)
    models['wrapped'] = WRAPPERS[name](models['wrapped'])
    x = torch.randn(2, 8, 6, 6)
    expected = models['wrapped'](x)
    assert mmpeft.share_base(models) == sum(v.nbytes for v in base.backbone.state_dict().values())
    assert mmpeft.share_base(models) == 0
    assert torch.equal(models['wrapped'](x), expected)
    with pytest.raises(UsageError, match="'b' has no adapters"):
        mmpeft.share_base(dict(a=models['plain'], b=WRAPPERS[name](base)))


def test_a_library_takes_no_wrapper():
    with pytest.raises(UsageError, match='in a wrapper'):
        mmpeft.AdapterLibrary(WRAPPERS['checkpointed_blocks'](make(None)))


def test_adapters_of_other_shapes_are_not_saved(tmp_path):
    model = make()
    adapter = inner(model).backbone[0].pw.parametrizations.weight[0]
    adapter.lora_A.data = adapter.lora_A.data[:0]
    with pytest.raises(UsageError, match=r"pw\.parametrizations.*lora_A' has the shape \(0, 8\)"):
        mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    del adapter.lora_A
    with pytest.raises(UsageError, match='is missing'):
        mmpeft.adapter_state_dict(model)


def train(model, batch):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def spawned(rank, model, folder):
    torch.set_num_threads(1)
    store = f'file://{folder}/store'
    distributed.init_process_group('gloo', init_method=store, rank=rank, world_size=2)
    # torch.multiprocessing lets both processes share the model's memory, as Lightning undoes too.
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    train(wrapped, x()[rank : rank + 1])
    mmpeft.save_adapter(inner(wrapped), folder / f'{rank}.safetensors')  # DDP writes one file
    distributed.barrier()
    distributed.destroy_process_group()


def test_an_adapted_model_is_spawned(tmp_path):
    """As Lightning's ``ddp_spawn`` does: the model is pickled for each process."""
    model = make(dict(type='DoRA', rank=2))
    expected = copy.deepcopy(model)
    multiprocessing.spawn(spawned, (copy.deepcopy(model), tmp_path), nprocs=2)
    train(expected, x())
    found = [
        mmpeft.load_adapter(copy.deepcopy(model), tmp_path / f'{r}.safetensors') for r in (0, 1)
    ]
    for key, value in mmpeft.adapter_state_dict(expected).items():
        first, second = (mmpeft.adapter_state_dict(each)[key] for each in found)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('method', ['LoRA', 'IA3', 'BitFit', 'ConvAdapter'])
def test_replicas_of_data_parallel_are_refused(method):
    """They have no parameters, only tensors, so that a method would do nothing in them."""
    model = Net()
    mmpeft.inject(model, dict(type=method), BACKBONE)
    with pytest.raises(UsageError, match='DataParallel copies a model .* torchrun'):
        [module._replicate_for_data_parallel() for module in model.modules()]


@pytest.mark.parametrize(
    'call',
    [
        mmpeft.merge,
        mmpeft.remove,
        lambda model: mmpeft.inject(model, LORA, dict(module='head')),
        lambda model: mmpeft.save_adapter(model, 'never.safetensors'),
        lambda model: mmpeft.load_adapter(model, 'never.safetensors'),
        lambda model: mmpeft.load_base(model, {}),
    ],
)
def test_functions_are_called_on_what_was_adapted(call):
    outside = Net()
    mmpeft.inject(outside.backbone, LORA)
    with pytest.raises(UsageError, match="and that was its module 'backbone'"):
        call(outside)
    assert len(outside.backbone.peft) == 1
    inside = Net()
    mmpeft.inject(inside, LORA, BACKBONE)
    with pytest.raises(UsageError, match='that was a module that holds this one'):
        call(inside.backbone)
    assert mmpeft.summary(inside).adapters == mmpeft.summary(outside).adapters > 0


@torch.no_grad()
@pytest.mark.parametrize('method', ['lora', 'dora', 'vera', 'ia3', 'bitfit', 'loha'])
def test_weights_that_accelerate_offloads(method, tmp_path):
    """Hooks bring a module's tensors when it is called, and kernels do not call the adapter."""
    model, path = make(METHODS[method]), tmp_path / 'adapter.safetensors'
    expected = model(x())
    cpu_offload(model, torch.device('cpu'))
    torch.testing.assert_close(model(x()), expected, rtol=1e-10, atol=1e-10)
    for call in (
        lambda: mmpeft.merge(model),
        lambda: mmpeft.remove(model),
        lambda: mmpeft.save_adapter(model, path),
        lambda: mmpeft.load_adapter(model, path),
        lambda: mmpeft.adapter_state_dict(model),
    ):
        with pytest.raises(UsageError, match='accelerate has offloaded some'):
            call()
    assert not path.exists()
    remove_hook_from_submodules(model)
    torch.testing.assert_close(mmpeft.merge(model)(x()), expected, rtol=1e-10, atol=1e-10)
    cpu_offload(model, torch.device('cpu'))
    with pytest.raises(UsageError, match='mmpeft.inject needs the weights'):
        mmpeft.inject(model, LORA)
    with pytest.raises(UsageError, match='mmpeft.AdapterLibrary needs the weights'):
        mmpeft.AdapterLibrary(model)
