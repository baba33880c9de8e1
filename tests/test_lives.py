"""Random lives of adapters: after every step the model is what an account of its own says.

A life is a random network of a random dtype and random steps. 16 run by
default, always the same. ``MMPEFT_LIVES=2000`` runs that many others, and longer
ones; with ``-s`` it prints how often each step, method and dtype occurred.
"""

import copy
import os
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

import mmpeft
from mmpeft.checkpoint.adapter_file import json_beside
from mmpeft.errors import UsageError
from mmpeft.injection.merge import MERGED
from mmpeft.methods import ActivationMethod, Adapter
from tests.cases import METHODS, randomize
from tests.comparing import plain_of
from tests.lives import (
    BLOCKS,
    TOLERANCE,
    Account,
    Combined,
    below,
    distance,
    images,
    network,
    plain,
    same_bits,
    state_of,
)
from tests.networks import assert_same, snapshot

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

LIVES = int(os.environ.get('MMPEFT_LIVES', 0))
COUNTS = Counter()
mmpeft.METHODS.import_from_location()


def acts(config):
    return issubclass(mmpeft.METHODS.get(config['type']), ActivationMethod)


@st.composite
def methods(draw):
    """A method of the table with other arguments; and its name there."""
    name = draw(st.sampled_from(sorted(METHODS)))
    config = dict(METHODS[name])
    if isinstance(config.get('rank'), int) and 'init_rank' not in config:
        config['rank'] = draw(st.integers(1, 3))
        if draw(st.integers(0, 7)) == 0 and not acts(config):
            config['budget'] = draw(st.integers(300, 2000))
    if 'update' in config:
        config['update'] = draw(st.sampled_from(['additive', 'lie', 'lie_exact']))
    if hasattr(mmpeft.METHODS.get(config['type']), 'dropout') and draw(st.integers(0, 7)) == 0:
        config['dropout'] = 0.3
    return name, config


@st.composite
def injections(draw, model):
    """Arguments of ``inject`` for a model without or with adapters; and the method's name."""
    name, config = draw(methods())
    roots = ['body', 'body', '', *(f'body.{i}' for i in range(len(model.body))), 'neck', 'head']
    root = draw(st.sampled_from(roots))
    targets = dict(module=root)
    found = {
        plain(key).rpartition('.')[0]: value.ndim
        for key, value in model.get_submodule(root).named_parameters()
        if '.original' in key or not re.search('parametrizations|peft_', key)
    }
    weighty = [path for path, ndim in found.items() if ndim > 1 and 'norm' not in path]
    if not acts(config) and config['type'] != 'BitFit':
        choices = [['conv', 'linear', 'embedding']] * 3 + [None, ['linear'], ['conv']]
        targets['kinds'] = draw(st.sampled_from(choices))
    pattern = draw(st.sampled_from(weighty or list(found))) or 'weight'
    changes = [
        dict(exclude_kinds=['depthwise']),
        dict(include=[pattern]),
        dict(exclude=[pattern]),
        dict(overrides={pattern: dict(rank=1) if 'rank' in config else {}}),
        dict(max_share=0.5),
    ]
    targets |= draw(st.sampled_from([{}] * 5 + changes * (not acts(config))))
    return name, dict(
        method=config,
        targets=targets,
        unfreeze=draw(st.sampled_from([[], [], [], [pattern], ['bias']])),
        execution=draw(st.sampled_from(['auto', 'auto', 'plain', 'merged', 'branch'])),
    )


def flags(model):
    named = model.named_parameters(remove_duplicate=False)
    return {plain(name) for name, p in named if p.requires_grad}


def answer(model, x):
    """What a model gives in evaluation by torch's parametrize, whatever of it trains."""
    with torch.no_grad():
        return plain_of(model).eval().requires_grad_(False)(x)


def traces(model):
    """What adapters could leave behind in modules."""
    return [
        (path, type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for path, m in model.named_modules()
    ]


class Life(RuleBasedStateMachine):
    """One model, its account, and what was put aside.

    Attributes:
        account: Of the model as it is.
        aside: Account of what a reversible merge put aside, or None.
        origin: What trains in the plain network.
        modes: Whether each of its modules trains, by path.
        answer: The model's before a reversible merge; None if it has trained since.
        files: Path, account and answer of what was saved.
        library: An ``AdapterLibrary``, or None.
        parts: Its adapters' accounts by name; under None the base's.
    """

    @initialize(
        seed=st.integers(0, 2**31),
        blocks=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3),
        dtype=st.sampled_from(list(TOLERANCE)),
        frozen=st.sampled_from([None, None, 'neck', 'head', 'body.0', 'body']),
        mode=st.booleans(),
        is_new=st.booleans(),
        data=st.data(),
    )
    def start(self, seed, blocks, dtype, frozen, mode, is_new, data):
        torch.manual_seed(seed)
        self.folder = Path(tempfile.mkdtemp())
        blocks = _of_tokens_once(blocks)
        self.model = network(blocks, dtype, frozen).train(mode)
        self.x = images(dtype)
        self.account = Account.of(self.model)
        self.origin = set(self.account.trains)
        self.modes = {path: mode for path, _ in self.model.named_modules()}
        self.aside = self.library = self.answer = None
        self.files, self.parts = [], {}
        COUNTS['lives'] += 1
        COUNTS[f'dtype {dtype}'] += 1
        COUNTS.update(f'block {name}' for name in blocks)
        self.inject(data)
        if self.account.injections:
            self.move(0.1)
            self.save(by_library=False)
            if is_new:
                self.remove()

    def teardown(self):
        if hasattr(self, 'folder'):
            shutil.rmtree(self.folder)

    # What may be done now.

    def is_started(self):
        return hasattr(self, 'model')

    def is_free(self):
        return self.is_started() and self.library is None

    def is_plain(self):
        return self.is_free() and not self.account.injections and self.aside is None

    def is_adapted(self):
        return self.is_started() and bool(self.account.injections)

    def is_combined(self):
        return isinstance(self.account, Combined)

    def is_own(self):
        """Whether what trains now belongs to no others."""
        return self.is_started() and not self.is_combined() and (self.is_free() or self.current)

    def cuts_a_tie(self):
        """Whether layers read one weight through different adapters."""
        through = defaultdict(set)
        for path, module in self.model.named_modules():
            for chain in getattr(module, 'parametrizations', {}).values():
                through[id(chain.original)].add(tuple(map(id, chain)))
            if 'parametrizations' not in path:
                for value in module._parameters.values():
                    through[id(value)].add(())
        return any(len(found) > 1 for found in through.values())

    def fitting_files(self):
        """Those of a network with the same ties, which a merge can have cut."""
        return [file for file in self.files if file[1].tied() == self.account.tied()]

    def may_exchange(self):
        return self.is_started() and self.library is not None and self.aside is None

    @property
    def current(self):
        return self.library.current

    def is_interesting(self):
        return self.is_adapted() or bool(self.is_started() and (self.aside or self.files))

    # Injecting and training.

    @precondition(lambda self: self.is_free() and len(self.account.injections) < 3)
    @rule(data=st.data())
    def inject(self, data):
        name, arguments = data.draw(injections(self.model))
        acting = [each['method'] for each in (*self.account.injections, arguments)]
        acting = [config['type'] for config in acting if acts(config)]
        if 'VPT' in acting and len(acting) > 1:
            return  # it widens what goes into a convolution, which others then refuse
        self._inject(name, arguments, lambda: mmpeft.inject(self.model, **arguments))

    @precondition(lambda self: self.is_adapted() and self.is_own())
    @rule(std=st.sampled_from([0.02, 0.1]))
    def move(self, std):
        COUNTS['move'] += 1
        randomize(self.model, std)
        self.account.see(self.model)

    @precondition(lambda self: self.is_interesting() and self.is_own())
    @rule(allocate=st.booleans())
    def train(self, allocate):
        COUNTS['train'] += 1
        self.answer = None
        model, account = self.model, self.account
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            return
        optimizer = torch.optim.SGD(trained, 0.05)
        allocation = mmpeft.allocate(model, optimizer, 4) if allocate else None
        for _ in range(2):
            optimizer.zero_grad()
            reference, leaves = account.reference(self.modes)
            terms = [model(self.x).square().mean(), mmpeft.penalty(model)]
            sum(term for term in terms if term is not None).backward()
            if self._is_certain():
                loss = reference(self.x).square().mean() + account.penalty(leaves)
                self._check_gradients(loss, leaves)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            account.see(model)
        optimizer.zero_grad()
        if allocation:
            COUNTS['allocate'] += bool(allocation.allocators)
            allocation.close()

    @precondition(is_interesting)
    @rule(mode=st.booleans(), data=st.data())
    def switch_mode(self, mode, data):
        COUNTS['mode'] += 1
        path = data.draw(st.sampled_from(['', '', 'body', 'body.0', 'neck', 'neck.1']))
        self.model.get_submodule(path).train(mode)
        self.modes.update({k: mode for k in self.modes if k == path or below(k)(path)})

    # Files.

    @precondition(lambda self: self.is_adapted() and not self.is_combined())
    @rule(by_library=st.booleans())
    def save(self, by_library):
        COUNTS['save'] += 1
        path = self.folder / f'{len(self.files)}.safetensors'
        if by_library and self.may_exchange():
            COUNTS['library save'] += 1
            self.library.save(self.current, path)
        else:
            mmpeft.save_adapter(self.model, path)
        assert path.is_file() and json_beside(path).is_file()
        self.files.append((path, self.account.copy(), answer(self.model, self.x)))

    @precondition(lambda self: self.is_free() and self.fitting_files())
    @rule(data=st.data())
    def load_into_a_fresh_base(self, data):
        file = self._file(data)
        base = self._plain_account()
        model = self._in_modes(base.bare())
        loaded = self._loaded(base, file[1])
        if loaded is None:
            self._refused(model, lambda: mmpeft.load_adapter(model, file[0]), 'load')
            return
        COUNTS['load'] += 1
        assert mmpeft.load_adapter(model, file[0]) is model
        self.model, self.account, self.aside = model, loaded, None
        self._check_answer(*file)

    @precondition(lambda self: self.is_adapted() and self.is_own() and self.fitting_files())
    @rule(data=st.data())
    def load_into_the_same(self, data):
        file = self._file(data)
        if _told(file[1]) != _told(self.account):
            return
        loaded = self._loaded(self.account, file[1], again=True)
        if loaded is None:
            self._refused(self.model, lambda: mmpeft.load_adapter(self.model, file[0]), 'load same')
            return
        COUNTS['load same'] += 1
        mmpeft.load_adapter(self.model, file[0])
        self.account.values, self.account.factors = loaded.values, loaded.factors
        self._check_answer(*file)

    @precondition(lambda self: self.is_free() and self.fitting_files())
    @rule(data=st.data())
    def load_into_another_base(self, data):
        path, file, _ = self._file(data)
        base = self._plain_account()
        if not file.frozen() or self._loaded(base, file) is None:
            return
        COUNTS['other base'] += 1
        model = base.bare()
        key = data.draw(st.sampled_from(sorted(file.frozen())))
        value = dict(model.state_dict(keep_vars=True))[key].data.view(-1)
        changed = value[-1] + 1 if not value.is_floating_point() else value[-1] * 1.5 + 0.1
        value[-1] = changed
        before = snapshot(model)
        with pytest.raises(UsageError, match='another frozen base'):
            mmpeft.load_adapter(model, path)
        assert_same(model, before)

    # Copies.

    @precondition(lambda self: self.is_free() and self.is_interesting())
    @rule()
    def copy(self):
        COUNTS['copy'] += 1
        left, before = self.model, answer(self.model, self.x)
        self.model = copy.deepcopy(left)
        with torch.no_grad():
            for value in left.state_dict().values():
                value.fill_(3)
        mmpeft.remove(left)
        assert torch.equal(answer(self.model, self.x), before)

    @precondition(lambda self: self.is_free() and self.is_adapted() and self.aside is None)
    @rule()
    def go_through_a_state_dict(self):
        COUNTS['state dict'] += 1
        before, state = answer(self.model, self.x), state_of(self.model)
        model = self._in_modes(self._plain_account().bare())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        self._adapt(model, self.account)
        model.load_state_dict(state)
        self.model = model
        assert torch.equal(answer(model, self.x), before)

    @precondition(lambda self: self.is_free())
    @rule()
    def convert(self):
        """From float64 to float32: the only way on which nothing is made up."""
        if self.account.dtype != torch.float64:
            return
        COUNTS['convert'] += 1
        self.answer = None
        self.model.to(torch.float32)
        self.x = self.x.float()
        for account in filter(None, (self.account, self.aside)):
            for held in (account.values, account.factors):
                held.update({k: v.float() for k, v in held.items() if v.is_floating_point()})

    # Merging.

    @precondition(is_adapted)
    @rule()
    def merge_reversibly(self):
        if self.account.acts or self.aside is not None or self.cuts_a_tie():
            merge = lambda: mmpeft.merge(self.model, reversible=True)  # noqa: E731
            self._refused(self.model, merge, 'merge')
            return
        COUNTS['merge reversibly'] += 1
        self._merge(reversible=True)

    @precondition(lambda self: self.is_started() and self.aside is not None)
    @rule()
    def unmerge(self):
        if self.account.injections:
            self._refused(self.model, lambda: mmpeft.unmerge(self.model), 'unmerge')
            return
        COUNTS['unmerge'] += 1
        assert mmpeft.unmerge(self.model) is self.model
        self._back()
        if self.answer is not None:
            assert torch.equal(answer(self.model, self.x), self.answer)

    @precondition(lambda self: self.is_adapted() and not self.account.acts and self.aside is None)
    @rule()
    def merge_and_unmerge(self):
        self.merge_reversibly()
        self.check()
        self.unmerge()

    @precondition(lambda self: self.is_free() and (self.is_adapted() or self.aside is not None))
    @rule()
    def merge_for_good(self):
        if self.account.acts or self.cuts_a_tie():
            self._refused(self.model, lambda: mmpeft.merge(self.model), 'merge')
            return
        COUNTS['merge'] += 1
        self._merge(reversible=False)

    @precondition(lambda self: self.is_free() and (self.is_adapted() or self.aside is not None))
    @rule()
    def remove(self):
        COUNTS['remove'] += 1
        assert mmpeft.remove(self.model) is self.model
        if self.aside is not None:
            self.account = self._plain_account()
            self._back()
        self.account = self._plain_account()

    # Libraries.

    @precondition(is_plain)
    @rule()
    def open_library(self):
        COUNTS['library'] += 1
        self.library = mmpeft.AdapterLibrary(self.model)
        self.parts = {None: self.account}

    @precondition(lambda self: self.may_exchange() and self.fitting_files())
    @rule(data=st.data())
    def put_into_library(self, data):
        file = self._file(data)
        name = f'{len(self.parts)}{data.draw(st.sampled_from("ab"))}'
        loaded = self._loaded(self.parts[None], file[1])
        if name in self.parts or loaded is None:
            self._refused(self.model, lambda: self.library.load(name, file[0]), 'library load')
            return
        COUNTS['library load'] += 1
        self.library.load(name, file[0])
        self.parts[name] = loaded
        self._use(name)
        self._check_answer(*file)

    @precondition(may_exchange)
    @rule(data=st.data())
    def begin_in_library(self, data):
        label, arguments = data.draw(injections(self.model))
        arguments['execution'] = 'auto'
        given = {k: v for k, v in arguments.items() if k != 'execution'}
        name = f'new{len(self.parts)}'
        while name in self.parts:
            name += '+'
        self._inject(label, arguments, lambda: self.library.inject(name, **given), name)

    @precondition(may_exchange)
    @rule(data=st.data())
    def use(self, data):
        COUNTS['use'] += 1
        self._use(data.draw(st.sampled_from(list(self.parts))))

    @precondition(lambda self: self.may_exchange() and len(self.parts) > 1)
    @rule(data=st.data())
    def combine(self, data):
        names = data.draw(st.lists(st.sampled_from(list(self.parts)[1:]), min_size=1, max_size=3))
        names = sorted(set(names))
        weights = {
            name: data.draw(st.sampled_from([0.25, 0.5, 1.0])) / len(names) for name in names
        }
        heads = data.draw(st.sampled_from([None, *names]))
        name = '+'.join(map(str, names)) + f' {len(self.parts)}'
        acting = [n for n in names if self.parts[n].acts]
        if name in self.parts or len(acting) > 1 or any(weights[n] != 1 for n in acting):
            call = lambda: self.library.combine(name, weights, heads)  # noqa: E731
            self._refused(self.model, call, 'combine')
            return
        COUNTS['combine'] += 1
        used = self.current
        self.library.combine(name, weights, heads)
        assert self.current == used
        chosen = [(weights[n], self.parts[n]) for n in names]
        self.parts[name] = Combined.over(self.parts[None], chosen, heads and self.parts[heads])
        self._use(name)

    @precondition(lambda self: self.may_exchange() and len(self.parts) > 1)
    @rule(data=st.data())
    def forget(self, data):
        COUNTS['forget'] += 1
        name = data.draw(st.sampled_from(list(self.parts)[1:]))
        used = self.current
        self.library.remove(name)
        del self.parts[name]
        assert self.library.names == list(self.parts)[1:]
        assert self.current == (None if used == name else used)
        self.account = self.parts[self.current]

    @precondition(lambda self: self.may_exchange() and len(self.parts) > 2)
    @rule()
    def close_library(self):
        COUNTS['close'] += 1
        self._use(None)
        self.library, self.parts = None, {}

    # What holds after every step.

    @precondition(is_started)
    @invariant()
    def check(self):
        COUNTS['steps'] += 1
        self._check_state()
        self._check_flags()
        self._check_traces()
        if self._is_certain():
            self._check_outputs()

    def _check_state(self):
        state, account = state_of(self.model), self.account
        named = {plain(key): value for key, value in state.items()}
        if not self.is_combined():
            assert set(state) == account.keys()
            for key, value in account.factors.items():
                assert same_bits(state[key], value), key
        if not account.injections:
            assert list(state) == list(account.network.state_dict())
        assert account.values.keys() <= named.keys()
        for key, value in account.values.items():
            if self.is_combined() and value.is_floating_point():
                error = distance([named[key]], [value])
                assert error < TOLERANCE[account.dtype], f'{key} differs by {error}'
            else:
                assert same_bits(named[key], value), key

    def _check_flags(self):
        for path, module in self.model.named_modules():
            layer = re.split(r'\.(?:parametrizations|peft_adapters)\b', path)[0]
            expected = self.modes[layer] and layer not in self.account.still
            assert module.training is expected, path
        own = {key for key in self.account.values}
        if not self.is_combined():
            assert flags(self.model) & own == self.account.trains
        assert (MERGED in vars(self.model)) is (self.aside is not None)
        assert bool(getattr(self.model, 'peft', [])) is bool(self.account.injections)

    def _check_traces(self):
        if self.account.injections or self.aside is not None:
            return
        assert traces(self.model) == traces(self.account.network)
        assert not any(isinstance(module, Adapter) for module in self.model.modules())

    def _check_outputs(self):
        reference, _ = self.account.reference(self.modes)
        buffers = [b for b in self.model.buffers()]
        before = [b.clone() for b in buffers]
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                y, expected = self.model(self.x), reference(self.x)
            assert y.dtype == expected.dtype == self.account.dtype
            error = distance([y], [expected])
            assert error < TOLERANCE[self.account.dtype], f'outputs differ by {error}'
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    def _check_gradients(self, loss, leaves):
        loss.backward()
        found, expected = [], []
        for key, parameter in self.model.named_parameters(remove_duplicate=False):
            leaf = leaves[key] if key in leaves else leaves[plain(key)]
            if parameter.requires_grad:
                zero = torch.zeros_like(parameter)
                found.append(zero if parameter.grad is None else parameter.grad)
                expected.append(zero if leaf.grad is None else leaf.grad)
        error = distance(found, expected)
        assert error < 2 * TOLERANCE[self.account.dtype], f'gradients differ by {error}'

    def _check_answer(self, path, account, expected):
        """Of what was saved, where the base is as it was and the dtype is the same."""
        if all(same_bits(v, self.account.values[k]) for k, v in account.values.items()):
            COUNTS['answers'] += 1
            assert torch.equal(answer(self.model, self.x), expected)

    # Steps that several rules take.

    def _file(self, data):
        files = self.fitting_files()
        return files[data.draw(st.integers(0, len(files) - 1))]

    def _is_certain(self):
        return not (self.account.drops and any(self.modes.values()))

    def _inject(self, label, arguments, call, part=None):
        before, answered = snapshot(self.model), answer(self.model, self.x)
        names = None if part is None else self.library.names
        try:
            call()
        except UsageError as error:
            COUNTS['refused inject'] += 1
            COUNTS[f'refused inject: {" ".join(str(error).split()[:3])}'] += 1
            assert_same(self.model, before)
            assert part is None or names == self.library.names
            return
        COUNTS['inject' if part is None else 'library inject'] += 1
        COUNTS[f'method {label}'] += 1
        COUNTS[f'execution {arguments["execution"]}'] += 1
        account = self.account
        if part is not None:
            self.parts[part] = account = self.parts[None].copy()
            assert self.current != part
            self.library.use(part)
            self.account = account
        account.take_in(self.model, arguments)
        if arguments['method']['type'] != 'VPT' and part is None:
            assert torch.equal(answer(self.model, self.x), answered)

    def _refused(self, model, call, what):
        COUNTS[f'refused {what}'] += 1
        before = snapshot(model)
        with pytest.raises(UsageError):
            call()
        assert_same(model, before)

    def _merge(self, reversible):
        account = self.account
        self.answer = answer(self.model, self.x)
        assert mmpeft.merge(self.model, reversible=reversible) is self.model
        named = state_of(self.model)
        values = account.merged()
        for key in account.adapted if self.is_combined() else ():
            assert distance([named[key]], [values[key]]) < TOLERANCE[account.dtype]
            values[key] = named[key]
        if self.is_combined():
            values = {key: named[key] for key in values}
        merged = self._plain_account().copy(values=values)
        self._untie(merged, account)
        if reversible:
            self.aside = account
            merged.trains, merged.still = set(account.trains), set(account.still)
            self.account = merged
            if isinstance(account, Combined):
                merged.trains = flags(self.model)
        else:
            self.aside = None
            self.account = merged

    def _untie(self, merged, account):
        """Only what all its layers read through the same adapters is tied in a merged model."""
        merged.network, found = copy.deepcopy(account.network), {}
        for path, module in merged.network.named_modules():
            own = self.model.get_submodule(path)._parameters
            for name, value in module._parameters.items():
                if value is not None:
                    through = (id(value), *account.through(path, name))
                    key = id(own[name]) if self.is_combined() else through
                    module._parameters[name] = found.setdefault(key, nn.Parameter(value.detach()))
        every = self.model.named_parameters(remove_duplicate=False)
        tied = {name for name, _ in every} - {name for name, _ in self.model.named_parameters()}
        assert merged.tied() == tied

    def _back(self):
        values = self.account.values
        named = list(self.aside.network.named_parameters(remove_duplicate=False))
        plainly = {id(p): values[name] for name, p in named if name not in self.aside.adapted}
        tied = {name: plainly[id(p)] for name, p in named if id(p) in plainly}
        values = {k: v for k, v in values.items() if k not in self.aside.adapted} | tied
        self.account, self.aside = self.aside, None
        self.account.values |= values

    def _use(self, name):
        assert self.library.use(name) is self.model
        self.account = self.parts[name]

    def _plain_account(self):
        account = self.account
        trains = set(self.origin)
        return Account(account.network, dict(account.values), trains)

    def _loaded(self, base, file, again=False):
        """The account of a base with a file's adapters; None where it has to be refused."""
        loaded = Account(base.network, dict(base.values), set(self.origin))
        for injection in file.injections:
            loaded.freeze(injection | dict(execution='auto'))
        if again:
            loaded.trains = set(base.trains)
        frozen = loaded.frozen()
        alike = {k: v.dtype for k, v in base.values.items()} == {
            k: v.dtype for k, v in file.values.items()
        }
        if not alike or frozen != file.frozen():
            return None
        if not all(same_bits(base.values[key], file.values[key]) for key in frozen):
            return None
        loaded.values |= {k: v for k, v in file.values.items() if k not in frozen}
        loaded.formulas, loaded.factors = list(file.formulas), dict(file.factors)
        loaded.ties = dict(file.ties)
        return loaded

    def _adapt(self, model, account):
        """Inject as before, with scales that were resolved from the weights of then."""
        for injection, record in zip(account.injections, self.model.peft, strict=True):
            mmpeft.inject(model, **injection | dict(method=record.method, empty=True))

    def _in_modes(self, model):
        for path, module in model.named_modules():
            module.training = self.modes[path]
        return model


def _of_tokens_once(blocks):
    """Prompts would not get from one to the next: VPT refuses two."""
    found = [name for name in blocks if 'attention' in name]
    return [name for name in blocks if name not in found] + found[:1]


def _told(account):
    return [{k: v for k, v in each.items() if k != 'execution'} for each in account.injections]


BASIC = ['inject', 'train', 'save', 'load', 'use', 'merge', 'merge reversibly', 'unmerge', 'remove']
FURTHER = (
    ['move', 'allocate', 'mode', 'copy', 'convert', 'state dict', 'load same', 'other base']
    + ['library', 'library load', 'library inject', 'library save', 'combine', 'forget', 'close']
    + [f'method {name}' for name in METHODS]
    + [f'block {name}' for name in BLOCKS]
)


def test_lives():
    COUNTS.clear()
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=LIVES or 16,
            stateful_step_count=25 if LIVES else 20,
            derandomize=not LIVES,
            database=None,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    for name, count in sorted(COUNTS.items()):
        print(f'{count:8,} {name}')
    missing = [name for name in BASIC + FURTHER * (LIVES >= 2000) if not COUNTS[name]]
    assert not missing, f'no life had {missing}'


# What the lives found.


@pytest.mark.parametrize('layer', [nn.Linear(4, 3), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 3)])
@pytest.mark.parametrize('execution', ['auto', 'merged', 'branch'])
def test_a_weight_that_trains_beneath_its_adapter_gets_its_gradient(layer, execution):
    gradients = []
    for way in ('plain', execution):
        model = nn.Sequential(copy.deepcopy(layer)).double()
        mmpeft.inject(model, dict(type='LoRA', rank=2), unfreeze='weight', execution=way)
        x = torch.ones((2, 4) if isinstance(layer, nn.Linear) else (2, 4, 5, 5)).double()
        model(x).square().mean().backward()
        gradients.append(model[0].parametrizations.weight.original.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_adapters_follow_a_model_that_was_given_less_precision_while_merged(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3)).double()
    mmpeft.inject(model, dict(type='LoRA', rank=2))
    base = mmpeft.remove(copy.deepcopy(model)).float()
    mmpeft.unmerge(mmpeft.merge(model, reversible=True).float())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    mmpeft.load_adapter(base, mmpeft.save_adapter(model, tmp_path / 'a.safetensors'))


@pytest.mark.parametrize('method', ['LoRA', 'HoulsbyAdapter'])
def test_all_modules_of_an_adapter_are_in_its_layers_mode(method):
    model = network(['attention'], torch.float32, None).eval()
    adapters = mmpeft.AdapterLibrary(model)
    adapters.inject('a', dict(type=method, rank=2), dict(module='body'))
    assert not any(module.training for module in adapters.use('a').modules())


@pytest.mark.parametrize('method', ['Frozen', 'Full'])
def test_a_second_reversible_merge_does_not_lose_the_first_base(method):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    weight = model[0].weight.clone()
    mmpeft.inject(model, dict(type='LoRA', rank=2), dict(module='0'))
    randomize(model)
    mmpeft.merge(model, reversible=True)
    mmpeft.inject(model, dict(type=method), dict(module='1'))
    with pytest.raises(UsageError, match='already reversibly merged'):
        mmpeft.merge(model, reversible=True)
    assert torch.equal(mmpeft.remove(model)[0].weight, weight)
