"""Folders of peft: read and written by mmpeft and by peft itself, compared by what they compute."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import named_adapters
from mmpeft.interop.peft_export import to_peft
from mmpeft.interop.peft_folder import load_peft, read_peft, save_peft
from mmpeft.interop.peft_import import from_peft
from mmpeft.interop.peft_names import Names
from tests.cases import randomize
from tests.hf_zoo import HF

pytestmark = pytest.mark.filterwarnings('ignore')

# Of the largest output.
EXACT, SINGLE = 1e-12, 2e-6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return x + self.attend(x, x, self.fc(x))[0]


class Net(nn.Module):
    """Linear layers of equal names at two depths, kernels of every kind, a head of its own."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.stem = nn.Conv2d(3, 6, (2, 3), stride=2, padding=1)
        self.backbone.dilated = nn.Conv2d(6, 6, 3, padding=2, dilation=2)
        self.backbone.mirrored = nn.Conv2d(6, 6, 3, padding=1, padding_mode='reflect')
        self.backbone.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.backbone.point = nn.Conv2d(6, 6, 1)
        self.backbone.norm = nn.BatchNorm2d(6)
        self.backbone.fc = nn.Linear(6, 6, bias=False)
        self.backbone.block = Block()
        self.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))
        self.final = nn.Linear(4, 3)

    def forward(self, x):
        net = self.backbone
        for layer in (net.stem, net.dilated, net.mirrored, net.grouped, net.point, net.norm):
            x = layer(x).tanh()
        tokens = net.block(net.fc(x.flatten(2).mT))
        return self.final(self.head(tokens.amax(1)))


# Regular expressions of the layers that peft computes alike.
LINEAR = [r'^backbone\.fc', r'^backbone\.block\.fc']
KERNELS = [r'stem', r'point']
METHODS = dict(
    lora=dict(type='LoRA', rank=2),
    lora_alpha=dict(type='LoRA', rank=3, alpha=7),
    lora_scale=dict(type='LoRA', rank=3, scale=0.4),
    lora_channel=dict(type='LoRA', rank=2, alpha=4, layout='channel'),
    dora=dict(type='DoRA', rank=2),
    dora_scale=dict(type='DoRA', rank=3, scale=1.7, layout='channel'),
)


@pytest.fixture
def base():
    model = Net().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        for norm in (model.backbone.norm, model.head[0]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model.double()


def images(model):
    return torch.randn(2, 3, 8, 8, dtype=next(model.parameters()).dtype)


def adapted(base, method=None, targets=None, unfreeze=()):
    """A copy of the base, adapted and trained, as it were."""
    model = copy.deepcopy(base)
    mmpeft.inject(model, method or METHODS['lora'], targets or dict(include=LINEAR), unfreeze)
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and '.parametrizations.' not in name:
                parameter.add_(torch.randn_like(parameter))
    return model


def in_peft(base, folder):
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def outputs(x, *models):
    with torch.no_grad():
        return [model(x) for model in models]


def assert_close(one, other, tolerance=EXACT):
    assert (one - other).abs().max() <= tolerance * other.abs().max()


def check_equal(base, model, folder, tolerance=EXACT):
    theirs, ours, before = outputs(images(base), in_peft(base, folder), model, base)
    assert_close(theirs, ours, tolerance)
    assert (ours - before).abs().max() > 1e-2


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_peft_computes_what_we_do(name, dtype, base, tmp_path):
    method = METHODS[name]
    include = LINEAR + (KERNELS if 'layout' in method else ['point'])
    base = base.to(dtype)
    model = adapted(base, method, dict(include=include, overrides={'point': dict(rank=1)}))
    check_equal(base, model, save_peft(model, tmp_path), EXACT if dtype.itemsize > 4 else SINGLE)


@pytest.mark.parametrize(
    'method',
    [
        dict(type='FLoRA', rank=2),
        dict(type='PiSSA', rank=2, alpha=3),
        dict(type='LoRA', rank=2, alpha=3, layout='loralib'),
        dict(type='DoRA', rank=2),
    ],
    ids=lambda method: method['type'],
)
def test_thin_updates_of_other_methods_as_lora(method, tmp_path):
    base = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(36, 5))
    base, x = base.double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model = adapted(base, method, dict(module=''))
    theirs, ours, before = outputs(
        x, in_peft(base, save_peft(model, tmp_path, as_lora=True)), model, base
    )
    assert_close(theirs, ours)
    assert (ours - before).abs().max() > 1e-2
    config = json.loads((tmp_path / 'adapter_config.json').read_text())
    assert config['use_dora'] == (method['type'] == 'DoRA')
    if method.get('layout') == 'loralib':
        assert set(config['rank_pattern'].values()) | {config['r']} == {2 * 9, 2}


@pytest.mark.parametrize(
    'name, rank', [('LieRA', dict(rank=2)), ('SSB', {}), ('LoHa', dict(rank=2))]
)
def test_what_is_no_sum_with_thin_factors_is_no_lora(name, rank, base):
    model = adapted(base, dict(type=name, **rank))
    with pytest.raises(UsageError, match=f'adapted by {name}.* Merge it'):
        to_peft(model, as_lora=True)


def test_conv1d_and_conv3d(tmp_path):
    base = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Unflatten(1, (2, 2, 1)), nn.Conv3d(2, 3, (2, 1, 3)))
    base = base.double()
    for name in ('lora_channel', 'dora_scale'):
        model = adapted(base, METHODS[name], dict(module=''))
        folder = save_peft(model, tmp_path / name)
        x = torch.randn(2, 3, 7, dtype=torch.float64)
        theirs, ours = outputs(x, in_peft(base, folder), model)
        assert_close(theirs, ours)


def test_ranks_and_scales_of_their_own_for_single_layers(base, tmp_path):
    """Where a path is the end of another, which peft's patterns and targets take along."""
    overrides = {r'^backbone\.fc': dict(rank=4, scale=3.0), 'point': dict(rank=1, scale=0.3)}
    targets = dict(include=[*LINEAR, 'point'], overrides=overrides)
    model = adapted(base, METHODS['lora_scale'], targets)
    folder = save_peft(model, tmp_path)
    config = json.loads((folder / 'adapter_config.json').read_text())
    assert config['rank_pattern'] and config['alpha_pattern']
    check_equal(base, model, folder)
    inner = Net().backbone.double().eval()
    inner.forward = lambda x: inner.block(inner.fc(x))
    model = adapted(inner, METHODS['lora'], dict(include=[r'^fc']))
    theirs = in_peft(inner, save_peft(model, tmp_path / 'inner'))
    assert not any('block' in key for key, _ in theirs.named_modules() if 'lora_A' in key)


def test_what_trains_beside_goes_into_modules_to_save(base, tmp_path):
    targets = dict(module='backbone', include=LINEAR_IN_BACKBONE)
    model = adapted(base, METHODS['dora'], targets, unfreeze=[r'^norm\.'])
    folder = save_peft(model, tmp_path)
    config = json.loads((folder / 'adapter_config.json').read_text())
    assert config['modules_to_save'] == ['backbone.norm', 'head.0', 'head.1', 'final']
    check_equal(base, model, folder)
    loaded = load_peft(copy.deepcopy(base), folder, module='backbone')
    assert_same_state(loaded, model)
    trained = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert {'final.weight', 'head.1.bias'} <= trained


LINEAR_IN_BACKBONE = [r'^fc', r'^block\.fc']


def assert_same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def train_in_peft(base, folder, **config):
    """An adapter that peft has made and trained a few steps."""
    torch.manual_seed(1)
    config = dict(r=2, lora_alpha=3, target_modules=['backbone.fc', 'block.fc'], **config)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    x, y = images(base), torch.randn(2, 3, dtype=torch.float64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    'config',
    [
        dict(),
        dict(use_rslora=True),
        dict(use_dora=True, init_lora_weights='gaussian'),
        dict(rank_pattern={'block.fc': 4}, alpha_pattern={'^backbone.fc': 11, 'fc': 5}),
        dict(modules_to_save=['final', 'backbone.norm']),
        dict(use_dora=True, use_rslora=True, rank_pattern={'fc': 3}, modules_to_save=['final']),
    ],
    ids=lambda config: '-'.join(config) or 'plain',
)
def test_what_peft_has_trained(config, base, tmp_path):
    base.eval()
    theirs = train_in_peft(base, tmp_path / 'peft', **config)
    model = load_peft(copy.deepcopy(base), tmp_path / 'peft', module='backbone')
    x = images(base)
    there, here, before = outputs(x, theirs, model, base)
    assert_close(here, there)
    assert (there - before).abs().max() > 1e-2

    path = mmpeft.save_adapter(model, tmp_path / 'adapter.safetensors')
    again = mmpeft.load_adapter(copy.deepcopy(base), path)
    assert torch.equal(*outputs(x, model, again))
    save_peft(model, tmp_path / 'back')
    _, first = read_peft(tmp_path / 'peft')
    _, second = read_peft(tmp_path / 'back')
    beside = {key for key in second.keys() - first.keys() if 'lora_' not in key}
    assert second.keys() - beside == first.keys()  # heads are stored whether they moved or not
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert_close(outputs(x, in_peft(base, tmp_path / 'back'))[0], there)

    mmpeft.merge(model)
    assert_close(outputs(x, model)[0], there)


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_there_and_back_is_equal_to_the_last_bit(name, dtype, base, tmp_path):
    method = METHODS[name]
    base = base.to(dtype)
    include = LINEAR + (KERNELS if 'layout' in method else ['point'])
    model = adapted(base, method, dict(include=include, overrides={'point': dict(rank=1)}))
    folder = save_peft(model, tmp_path / 'first')
    loaded = load_peft(copy.deepcopy(base), folder)
    assert_same_state(loaded, model)
    own, other = (named_adapters(m).values() for m in (model, loaded))
    for a, b in zip(own, other, strict=True):
        assert type(a.method) is type(b.method) and a.method.rank == b.method.rank
        assert a.method.scaling == pytest.approx(b.method.scaling, rel=1e-15)
    again = save_peft(loaded, tmp_path / 'second')
    for file in ('adapter_config.json', 'adapter_model.safetensors'):
        assert (again / file).read_bytes() == (folder / file).read_bytes()


def test_tied_weights_stay_tied(base, tmp_path):
    base.backbone.block.fc.weight = base.backbone.fc.weight
    model = adapted(base)
    folder = save_peft(model, tmp_path)
    check_equal(base, model, folder)
    assert_same_state(load_peft(copy.deepcopy(base), folder), model)
    config, state = read_peft(folder)
    state['base_model.model.backbone.fc.lora_A.weight'] += 1
    with pytest.raises(UsageError, match='share one weight'):
        from_peft(copy.deepcopy(base), config, state)


def test_the_base_may_have_other_names(base, tmp_path):
    """As timm's whole model and the part of it that gives features."""
    model = adapted(base, targets=dict(module='backbone', include=LINEAR_IN_BACKBONE))
    names = Names('backbone', {'fc': 'entry', 'block.fc': 'blocks.0.fc'})
    _, state = read_peft(save_peft(model, tmp_path, names))
    assert {key.rpartition('.lora')[0] for key in state} == {
        'base_model.model.entry',
        'base_model.model.blocks.0.fc',
    }
    loaded = load_peft(copy.deepcopy(base), tmp_path, 'backbone', names)
    assert {k: v.tolist() for k, v in to_peft(loaded, names)[1].items()} == {
        k: v.tolist() for k, v in state.items()
    }
    with pytest.raises(UsageError, match="layer 'blocks.0.fc', which the model does not have"):
        load_peft(copy.deepcopy(base), tmp_path)
    with pytest.raises(UsageError, match=r'backbone\.fc\.weight is adapted, and .*final'):
        to_peft(model, Names('final'))


EVERY_KERNEL = dict(type='LoRA', rank=1, layout='channel')


@pytest.mark.parametrize(
    'method, targets, message',
    [
        (dict(type='FLoRA', rank=1), {}, r'backbone\.fc\.weight is adapted by FLoRA.*--as-lora'),
        (dict(type='LieRA', rank=1), {}, r'by LieRA, .*\(mmpeft\.merge\)\.$'),
        (dict(type='AdaLoRA', rank=1), {}, r'backbone\.fc\.weight is adapted by AdaLoRA'),
        (dict(type='LoRA', rank=1, update='lie'), {}, r"backbone\.fc\.weight .*update='lie'"),
        (dict(type='LoRA', rank=1, dropout=0.1), {}, r'backbone\.fc\.weight .*dropout=0.1'),
        (dict(type='LoRA', rank=1, mpc='o'), {}, r"backbone\.fc\.weight .*mpc='o'"),
        (
            dict(EVERY_KERNEL, layout='loralib'),
            ['stem'],
            r"backbone\.stem\.weight .* loralib's layout",
        ),
        (EVERY_KERNEL, ['dilated'], r'backbone\.dilated\.weight is of a dilated'),
        (EVERY_KERNEL, ['mirrored'], r"backbone\.mirrored\.weight .*padding_mode='reflect'"),
        (EVERY_KERNEL, ['grouped'], r'backbone\.grouped\.weight is of a grouped'),
        (EVERY_KERNEL, ['in_proj'], r'attend\.in_proj_weight is not a linear layer'),
        (EVERY_KERNEL, ['out_proj'], r'attend\.out_proj\.weight is read directly by nn\.Multihead'),
    ],
)
def test_what_peft_has_no_equal_of(method, targets, message, base, tmp_path):
    model = adapted(base, method, dict(include=targets or LINEAR))
    with pytest.raises(UsageError, match=message):
        save_peft(model, tmp_path / 'folder')
    assert not (tmp_path / 'folder').exists()


def test_layers_that_peft_lacks_are_named_before_methods_that_it_lacks(base, tmp_path):
    mmpeft.inject(base, dict(type='FLoRA', rank=2))
    with pytest.raises(UsageError, match='backbone.dilated.weight is of a dilated convolution'):
        save_peft(base, tmp_path)


def test_peft_does_compute_something_else_there(base, tmp_path):
    """The reason for the refusals of kernels and of attention, seen in peft."""
    for layer in ('backbone.dilated', 'backbone.mirrored', 'backbone.block.attend.out_proj'):
        model = adapted(base, EVERY_KERNEL, dict(include=[f'^{layer}']))
        (adapter,) = named_adapters(model).values()
        config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=[layer])
        theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
        state = {k: v for k, v in theirs.named_parameters() if 'lora_' in k}
        with torch.no_grad():
            for key, value in state.items():
                own = adapter.lora_A if 'lora_A' in key else adapter.lora_B
                value.copy_(own.view(value.shape))
        try:
            there, here = outputs(images(base), theirs, model)
        except RuntimeError:
            continue  # a dilated kernel: the sizes of base and branch differ
        assert (there - here).abs().max() > 1e-3


def test_training_settings_are_left_out_on_request(base, tmp_path):
    model = adapted(base, dict(type='LoRA', rank=2, dropout=0.5, mpc='d')).eval()
    check_equal(base, model, save_peft(model, tmp_path, inference=True))


def test_models_that_hold_more_than_a_folder_can(base, tmp_path):
    twice = adapted(base)
    mmpeft.inject(twice, METHODS['lora'], dict(include=LINEAR))
    with pytest.raises(UsageError, match='has several adapters'):
        to_peft(twice)
    mixed = adapted(base)
    mmpeft.inject(mixed, METHODS['dora'], dict(include=['point']))
    with pytest.raises(UsageError, match='DoRA and LoRA'):
        to_peft(mixed)
    partly = adapted(base, unfreeze=[r'^final\.bias'])
    with pytest.raises(UsageError, match=r'final\.bias trains beside'):
        to_peft(partly)
    with pytest.raises(UsageError, match='nothing to convert'):
        to_peft(base)
    with torch.no_grad():
        base.backbone.fc.weight[0] = 0
    dead = copy.deepcopy(base)
    mmpeft.inject(dead, METHODS['dora'], dict(include=LINEAR))
    with pytest.raises(UsageError, match=r'backbone\.fc\.weight has an output channel of zeros'):
        to_peft(dead)


def test_layers_that_change_their_weight_before_use(tmp_path):
    class ScaledLinear(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)

    model = nn.Sequential(ScaledLinear(3, 3))
    mmpeft.inject(model, dict(type='LoRA', rank=1))
    with pytest.raises(UsageError, match=r'0\.weight belongs to a ScaledLinear'):
        to_peft(model)


def test_nothing_is_overwritten(base, tmp_path):
    model = adapted(base)
    (tmp_path / 'adapter_config.json').write_text('precious')
    with pytest.raises(UsageError, match='adapter_config.json exists already.*--overwrite'):
        save_peft(model, tmp_path)
    assert (tmp_path / 'adapter_config.json').read_text() == 'precious'
    assert len(list(tmp_path.iterdir())) == 1
    save_peft(model, tmp_path, overwrite=True)
    check_equal(base, model, tmp_path)


@pytest.fixture
def folder(base, tmp_path):
    return save_peft(adapted(base, unfreeze=[r'^final\.']), tmp_path / 'folder')


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(peft_type='LOHA'), "peft_type='LOHA'"),
        (dict(init_lora_weights='pissa_niter_4'), "init_lora_weights='pissa_niter_4' changes"),
        (dict(bias='all'), "bias='all'"),
        (dict(lora_bias=True), 'lora_bias=True'),
        (dict(layer_replication=[[0, 1]]), 'layer_replication'),
        (dict(kind_of_the_future=3), 'kind_of_the_future=3'),
        (dict(lora_dropout=0.1), 'lora_dropout=0.1'),
        (dict(r=5), 'does not fit'),
        (dict(r='two'), "r='two'"),
        (dict(lora_alpha=float('nan')), 'lora_alpha=nan'),
        (dict(use_dora=True), 'does not fit'),
        (dict(rank_pattern={'(': 3}), 'not a valid regular expression'),
        (dict(alpha_pattern=[1]), r'alpha_pattern=\[1\]'),
        (dict(modules_to_save='final'), 'not a list of names'),
        (dict(modules_to_save=[]), "final.bias' is neither"),
        (dict(modules_to_save=['final', 'head']), r'lacks head\.'),
    ],
)
def test_configs_that_are_refused(change, message, base, folder):
    before = copy.deepcopy(base.state_dict())
    config, state = read_peft(folder)
    with pytest.raises(UsageError, match=message):
        from_peft(base, config | change, state)
    assert not hasattr(base, 'peft')
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


FC = 'base_model.model.backbone.fc.lora_A.weight'


@pytest.mark.parametrize(
    'key, value, message',
    [
        (FC, None, 'does not fit'),
        (FC, torch.zeros(2, 7), 'does not fit'),
        (FC, torch.zeros(2, 6, dtype=torch.int64), 'torch.int64'),
        ('other.fc.lora_A.weight', torch.zeros(1), 'does not start with'),
        ('base_model.model.fcc.lora_A.weight', torch.zeros(1), "layer 'fcc'"),
        ('base_model.model.backbone.norm.lora_A.weight', torch.zeros(1), 'not a linear layer'),
        ('base_model.model.backbone.block.lora_A.weight', torch.zeros(1), 'no weight'),
        (
            'base_model.model.backbone.block.attend.out_proj.lora_A.weight',
            torch.zeros(1),
            'bypasses',
        ),
        ('base_model.model.final.bias', torch.zeros(4), 'does not fit the model'),
        ('base_model.model.final.other', torch.zeros(4), 'does not fit the model'),
        ('base_model.model.final.bias', None, r'lacks final\.bias'),
    ],
)
def test_tensors_that_are_refused(key, value, message, base, folder):
    before = copy.deepcopy(base.state_dict())
    config, state = read_peft(folder)
    state.pop(key, None)
    if value is not None:
        state[key] = value
    with pytest.raises(UsageError, match=message):
        from_peft(base, config, state)
    assert not hasattr(base, 'peft')
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_bases_that_are_refused(base, folder):
    config, state = read_peft(folder)
    with pytest.raises(UsageError, match=r'float64.*would round'):
        from_peft(copy.deepcopy(base).float(), config, state)
    with pytest.raises(UsageError, match='has adapters already'):
        from_peft(adapted(base), config, state)
    part = copy.deepcopy(base)
    mmpeft.inject(part.backbone, dict(type='LoRA'))
    with pytest.raises(UsageError, match='has adapters already'):
        from_peft(part, config, state)
    with pytest.raises(UsageError, match="not below 'head'"):
        from_peft(base, config, state, module='head')


def test_a_buffer_of_a_saved_module_is_none_of_the_frozen_base(base, tmp_path):
    model = adapted(base, targets=dict(module='backbone', include=LINEAR_IN_BACKBONE))
    model.head[0].running_mean += 1
    folder = save_peft(model, tmp_path)
    with pytest.raises(UsageError, match=r"'head\.0\.running_mean', a buffer"):
        load_peft(copy.deepcopy(base), folder)
    assert_same_state(load_peft(copy.deepcopy(base), folder, module='backbone'), model)


class Runs:
    """Unpickling an instance writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_pickles_are_not_read(base, folder, tmp_path):
    (folder / 'adapter_model.safetensors').unlink()
    torch.save(Runs(tmp_path / 'was_run'), folder / 'adapter_model.bin')
    with pytest.raises(UsageError, match=r'adapter_model\.bin, a pickle.*save_pretrained'):
        load_peft(base, folder)
    assert not (tmp_path / 'was_run').exists()


def test_folders_that_are_none(base, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match='no adapter_model.safetensors'):
        read_peft(tmp_path)
    config, weights = folder / 'adapter_config.json', folder / 'adapter_model.safetensors'
    whole = weights.read_bytes()
    for damaged in (b'', whole[:-9], b'\xff' * 8 + whole[8:], b'[]'):
        weights.write_bytes(damaged)
        with pytest.raises(UsageError, match='damaged'):
            load_peft(base, folder)
    weights.write_bytes(whole)
    for damaged in (b'{', b'[' * 100_000, b'\xff\xfe\x00', b'[]', b'null'):
        config.write_bytes(damaged)
        with pytest.raises(UsageError, match='damaged|not a config of peft'):
            load_peft(base, folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match='no adapter_config.json'):
        load_peft(base, folder)
    save_file(load_file(weights), weights)
    assert not hasattr(base, 'peft')


@pytest.mark.parametrize('method', ['lora_alpha', 'dora'])
def test_conv1d_of_gpt2(method, tmp_path):
    """Both ways, in peft's own layers, which take ``fan_in_fan_out`` from the layer."""
    model = HF['gpt2'].build().double().eval()
    base, ids = copy.deepcopy(model), torch.arange(6)[None]
    mmpeft.inject(model, METHODS[method], dict(include=[r'^transformer\.h\.']))
    randomize(model)
    save_peft(model, tmp_path / 'ours')
    assert json.loads((tmp_path / 'ours/adapter_config.json').read_text())['fan_in_fan_out']
    expected = model(ids).logits
    theirs = in_peft(base, tmp_path / 'ours')
    kinds = {type(m.base_layer).__name__ for m in theirs.modules() if hasattr(m, 'base_layer')}
    assert 'Conv1D' in kinds
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-12)
    assert (base(ids).logits - expected).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path / 'theirs')
    loaded = load_peft(copy.deepcopy(base), tmp_path / 'theirs')
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('saved', ['head', 'embed'])
def test_a_tied_weight_that_peft_has_trained_a_copy_of(saved, tmp_path):
    def network():
        torch.manual_seed(0)
        model = nn.Sequential()
        model.embed, model.fc = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        model.head = nn.Linear(4, 4, bias=False)
        model.head.weight = model.embed.weight
        return model

    config = peft.LoraConfig(target_modules=['fc'], modules_to_save=[saved])
    theirs = peft.get_peft_model(network(), config)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f'holds {saved}.weight, which is tied to'):
        load_peft(network(), tmp_path)


def test_a_module_at_two_paths_is_not_converted(tmp_path):
    model = nn.Module()
    model.a = model.b = nn.Linear(4, 4)
    model.c = nn.Linear(4, 4)
    mmpeft.inject(model, dict(type='LoRA', rank=2))
    with pytest.raises(UsageError, match='a.weight belongs to a module that is also at b'):
        save_peft(model, tmp_path)
