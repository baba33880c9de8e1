"""Adapter files that are damaged, or made to do harm: all refused, and nothing happens.

A damaged file differs from what was written; its checksum tells. A hostile
one has the right checksum over wrong content.
"""

import copy
import json
import os
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import mmpeft
from mmpeft.checkpoint import adapter_file
from mmpeft.errors import UsageError
from mmpeft.injection.targets import Targets
from tests.cases import randomize
from tests.networks import Runs
from tests.networks import TwinNet as Net

METHOD = dict(type='FLoRA', rank=2, kernel_rank=1)
TARGETS = dict(module='backbone')


@pytest.fixture(scope='module')
def base():
    return Net()


@pytest.fixture(scope='module')
def whole(base, tmp_path_factory):
    """The bytes of an adapter file."""
    model = copy.deepcopy(base)
    mmpeft.inject(model, METHOD, TARGETS)
    randomize(model)
    return mmpeft.save_adapter(model, tmp_path_factory.mktemp('whole') / 'a').read_bytes()


def unpacked(content):
    """Header, as a dict, and data of a safetensors file."""
    size = struct.unpack('<Q', content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def packed(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data


def forged(content, tensors=None, **changes):
    """The file with other tensors or another manifest, and the right checksum.

    A change is the new value of a key of the manifest, or a function that
    gives it for the old one; ``text`` replaces the manifest altogether.
    """
    header, _ = unpacked(content)
    state = load(content) if tensors is None else tensors
    description = json.loads(header['__metadata__']['mmpeft'])
    text = changes.pop('text', None)
    for key, change in changes.items():
        description[key] = change(description[key]) if callable(change) else change
    text = json.dumps(description) if text is None else text
    return save(state, dict(mmpeft=text, sha256=adapter_file._checksum(text, state)))


def truncated(content):
    for size in np.linspace(0, len(content) - 1, 40, dtype=int):
        yield content[:size]


def flipped(content):
    random = np.random.default_rng(0)
    size = 8 + struct.unpack('<Q', content[:8])[0]
    regions = (range(8), range(8, size), range(size, len(content)))
    for region, count in zip(regions, (16, 60, 40), strict=True):
        for place in random.choice(region, count):
            damaged = bytearray(content)
            damaged[place] ^= 1 << random.integers(8)
            yield bytes(damaged)


def overwritten(content):
    random = np.random.default_rng(1)
    for _ in range(12):
        start, length = random.integers(len(content)), random.integers(1, 600)
        yield content[:start] + bytes(length) + content[start + length :] + b'\1'
        yield content[:start] + random.bytes(length) + content[start + length :]
    for extra in (b'\0', b'{}', content):
        yield content + extra
        yield extra + content


def exchanged(content):
    header, data = unpacked(content)
    names = [name for name in header if name != '__metadata__']
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if header[first]['shape'] == header[second]['shape']:
                swapped = header | {first: header[second], second: header[first]}
                yield packed(swapped, data)


def wrong_headers(content):
    header, data = unpacked(content)
    names = [name for name in header if name != '__metadata__']
    for name in names:
        entry = header[name]
        start, end = entry['data_offsets']
        for change in (
            dict(dtype='F16'),
            dict(dtype='I32'),
            dict(dtype='F999'),
            dict(dtype=None),
            dict(shape=[*entry['shape'], 1]),
            dict(shape=entry['shape'][::-1] + [2]),
            dict(shape=[10**9, 10**9]),
            dict(shape=[2**63, 2**63, 2]),
            dict(shape=[-1]),
            dict(shape=[0]),
            dict(data_offsets=[0, end - start + 4]),
            dict(data_offsets=[end, start]),
            dict(data_offsets=[start, 2**62]),
            dict(data_offsets=[-4, end]),
            dict(data_offsets=[start]),
        ):
            yield packed(header | {name: entry | change}, data)
        for other in ('../../evil', '/etc/passwd', '', 'x' * 10**6, '__class__', 'a\0b', '\ud800'):
            renamed = {other if key == name else key: value for key, value in header.items()}
            yield packed(renamed, data)
        yield packed({key: value for key, value in header.items() if key != name}, data)
    yield from (packed(header | {'__metadata__': m}, data) for m in (None, [], 3, dict(mmpeft=1)))
    manifest = header['__metadata__']['mmpeft']
    for more in ({}, dict(sha256=''), dict(sha256='0' * 64), dict(other='')):
        yield packed(header | {'__metadata__': dict(mmpeft=manifest) | more}, data)
    for size in (0, 1, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1):
        yield struct.pack('<Q', size) + content[8:]
    for text in (b'', b'[]', b'null', b'{' * 10**5, b'[' * 10**6, b'{"a":NaN}', b'\xff\xfe{}'):
        yield packed(text, data)
    yield packed(json.dumps(header).encode('utf-16'), data)
    yield packed(json.dumps(header)[:-1].encode() + b', "b": {}}', data)


def wrong_tensors(content):
    state = load(content)
    for name, value in state.items():
        rest = {key: tensor for key, tensor in state.items() if key != name}
        yield rest
        yield rest | {f'../{name}': value}
        yield rest | {name.replace('backbone', 'neck').replace('head', 'neck'): value}
        yield state | {f'{name}.more': value.clone()}
        for other in (
            value[None],
            value[..., :-1],
            value.flatten().repeat(2),
            value.double(),
            value.half(),
            value.to(torch.int32),
            value > 0,
            torch.zeros(()),
            torch.zeros(0),
        ):
            yield rest | {name: other.contiguous()}
    yield {}
    for extra in ('backbone.0.weight', 'backbone.2.running_mean', '../../evil', 'peft'):
        yield state | {extra: torch.zeros(4)}


WRONG_NUMBERS = (None, '2', 'x' * 10**6, [], {}, [[2]], -1, 0, 10**9, 10**18, 10**400, 1e300)
WRONG_WORDS = (None, 3, [], {}, 'neither', '../../evil', '\0')
WRONG_TYPES = ('Evil', 'harmful.Evil', 'os.system', 'mmengine.Config', '../FLoRA', 3, [], None)
OTHER_TYPES = ('LoRA', 'IA3', 'BitFit', 'Full', 'Frozen', 'VPT', 'PiSSA', 'VeRA', 'AdaLoRA')
WRONG_METHODS = (None, 3, 'FLoRA', [], {}, dict(type=None), dict(rank=2))
SLOW = (r'(\w+\.?)+!', '(.*)*(.*)*!', r'^(([a-z0-9])+.)+[A-Z]$', '.*.*.*!', 'x' * 10**5)
WRONG_TEXTS = (
    '',
    'null',
    '[]',
    '3',
    '"x"',
    '{}',
    '{',
    '[' * 10**5,
    '{"a":' * 10**5,
    '9' * 5000,
    '\0',
    'x' * (2**22 + 1),
)


def wrong_values(keys):
    """Descriptions that are none, and wrong values of what both formats have."""
    yield from (dict(text=text) for text in WRONG_TEXTS)
    for key in keys:
        for value in (None, [3], {}, dict(a=float('nan')), float('inf')):
            yield {key: value}
    yield dict(parameters='many')
    yield dict(version=3)
    yield dict(fingerprint='')
    yield dict(fingerprint='0' * 64)
    yield dict(fingerprint='../../evil')
    yield dict(unknown=1)
    yield dict(injections=[])
    yield dict(injections=lambda old: [*old, *old])
    yield dict(injections=lambda old: old * 40)
    yield dict(injections=[None])
    yield dict(injections=[{}])
    yield injection(further=1)


def wrong_methods(method):
    """Changes of a method's arguments, by a function that makes a case of them."""
    yield from (method(type=name) for name in WRONG_TYPES)
    for value in WRONG_NUMBERS:
        yield method(rank=value)
        yield method(kernel_rank=value)
        if value != 1e300:
            yield method(budget=value if value is not None else '1e400')
    for value in ('4.0', [], {}, True, float('nan'), float('-inf'), 10**400):
        yield method(scale=value)
    for value in (None, '0.1', 1, -0.1, 10**400):
        yield method(dropout=value)
    yield from (method(update=value) for value in WRONG_WORDS)
    yield method(__class__='x')


def injection(**changes):
    return dict(injections=lambda old: [old[0] | changes])


def targets(**changes):
    return dict(injections=lambda old: [old[0] | dict(targets=old[0]['targets'] | changes)])


def asked(**changes):
    return dict(injections=lambda old: [old[0] | dict(method=old[0]['method'] | changes)])


def method(**changes):
    """Both the method that was asked for and that of the adapters."""
    return asked(**changes) | dict(methods=lambda old: [old[0] | changes])


def entry(**changes):
    return dict(adapters=lambda old: [old[0] | changes, *old[1:]])


def wrong_manifests():
    keys = ('version', 'torch', 'injections', 'methods', 'adapters', 'parameters', 'fingerprint')
    yield from wrong_values(keys)
    yield from wrong_methods(method)
    yield from (asked(type=name) for name in (*WRONG_TYPES, *OTHER_TYPES))
    for value in WRONG_METHODS:
        yield injection(method=value)
        yield dict(methods=[value])
    for name in OTHER_TYPES:
        other = dict(type=name)
        yield injection(method=other) | dict(methods=[other])
    for other in (dict(type='VeRA', rank=10**9), dict(type='VPT', tokens=10**12)):
        yield injection(method=other) | dict(methods=[other])
    wrong = (None, 'x', 3, [3], [None], ['nothing'], {'a': 1}, [['x']], ['0.weight'], ['.*'])
    yield from (injection(trained=value) for value in (*wrong, ['0'], ['../head.weight']))
    yield injection(module='backbone.0')
    for value in (*WRONG_WORDS, 'head', 'backbone.9', 'x' * 10**6, '__class__'):
        yield injection(module=value)
        yield entry(path=value)
    for value in ('backbone', '', 'backbone.1', 'backbone.2', 'backbone.parametrizations'):
        yield entry(path=value)
    for value in (*WRONG_WORDS, 'bias', 'weight.data', 'forward', '__class__', 'parametrizations'):
        yield entry(tensor=value)
    for value in (None, '0', [], {}, -1, 1, 0.5, False, 10**400):
        yield entry(method=value)
        yield entry(injection=value)
    for value in (None, [], {}, dict(kinds=['mlp'])):
        yield entry(point=value)
        yield entry(point=value, tensor='')
    yield entry(further=1)
    yield dict(adapters=[])
    yield dict(adapters=[None])
    yield dict(adapters=[{}])
    yield dict(adapters=lambda old: old[1:])
    yield dict(adapters=lambda old: [*old, old[0]])
    yield dict(adapters=lambda old: old * 1000)
    yield dict(methods=[])


def wrong_points():
    """Of a file with adapters of activations."""

    def point(**changes):
        return dict(adapters=lambda old: [old[0] | dict(point=old[0]['point'] | changes), *old[1:]])

    for value in (None, 'mlp', [], {}, [3], ['mlp'] * 2 + ['evil'], ['../../evil']):
        yield point(kinds=value)
    for value in (None, 3, [], [4], [4, 4, 4], ['4', 4], [4.0, 4], [-1, 4], [10**9, 10**9]):
        yield point(shape=value)
    yield from (point(shape=value) for value in ([5, 5], [10**400, 1], [True, 4]))
    yield from (point(axis=value) for value in (None, '1', 0, 2, -2, 1.0, True, [], 10**400))
    yield from (point(numel=value) for value in (None, '1', -1, 0.5, [], float('nan')))
    yield from (point(first=value) for value in (None, 0, 1, 'x', []))
    yield from (point(ends=value) for value in (None, 'ab', [''], ['x', 'y'], [3, 4], ['0'] * 3))
    yield point(further=1)
    yield dict(adapters=lambda old: [{k: v for k, v in old[0].items() if k != 'point'}])
    yield entry(tensor='weight')
    yield from (entry(path=path) for path in ('backbone.0', 'backbone.1.0', 'head', 'nothing'))


def wrong_descriptions():
    """Of the former format."""
    yield from wrong_values(('version', 'torch', 'injections', 'parameters', 'fingerprint'))
    yield from wrong_methods(asked)
    for value in (None, 'x', 3, [3], [None], ['('], ['nothing'], {'a': 1}, [['x']]):
        yield injection(unfreeze=value)
    for value in WRONG_METHODS:
        yield injection(method=value)
        yield injection(targets=value)
    yield from (injection(method=dict(type=name)) for name in OTHER_TYPES)
    yield injection(method=dict(type='VeRA', rank=10**9))
    yield injection(method=dict(type='VPT', tokens=10**12))
    yield injection(method=dict(type='LoRA', rank=2, alpha=float('nan')))
    for value in WRONG_WORDS:
        yield targets(kinds=[value])
        yield targets(module=value)
    yield targets(__class__='x')
    for value in (None, 3, 'x', [3], ['('], ['(?P<a'], ['a{99999999999}'], ['(' * 5000], ['none']):
        yield targets(include=value)
        yield targets(exclude=value if value is not None else 3.5)
    for value in (
        None,
        3,
        [],
        {'(': {}},
        {'0': None},
        {'0': dict(rank=10**9)},
        {'0': dict(rank='x')},
        {'0': dict(scale='1')},
        {'0': dict(__class__='x')},
        {'0': dict(kernel_rank=[1])},
    ):
        yield targets(overrides=value)
    for value in ('x', [], {}, float('nan')):
        yield targets(max_share=value)
    for pattern in SLOW:
        yield targets(include=[pattern])
        yield injection(unfreeze=[pattern])
    yield targets(include=[f'.*{number}.*' for number in range(100)])


def foreign(marker):
    """Files that are something else, and run code where they are unpickled."""
    import io

    evil = Runs(marker)
    for protocol in range(6):
        yield pickle.dumps(evil, protocol)
        yield pickle.dumps(dict(state_dict=evil, meta=dict(mmpeft={})), protocol)
    for zipped in (False, True):
        buffer = io.BytesIO()
        torch.save(dict(a=torch.zeros(3), b=evil), buffer, _use_new_zipfile_serialization=zipped)
        yield buffer.getvalue()
    yield b'#!/bin/sh\ntouch ran\n'
    yield b'\x7fELF' + bytes(100)


def cases(whole, former, marker, adapted):
    yield from truncated(whole)
    yield from flipped(whole)
    yield from overwritten(whole)
    yield from exchanged(whole)
    yield from wrong_headers(whole)
    yield from (forged(whole, tensors) for tensors in wrong_tensors(whole))
    yield from foreign(marker)
    if not adapted:  # such a model is not adapted as the file says
        yield from (forged(whole, **changes) for changes in wrong_manifests())
        yield from (forged(former, **changes) for changes in wrong_descriptions())


def fingerprint_of(model):
    """All that a refused file must leave as it was."""
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        [(name, p.requires_grad, p) for name, p in model.named_parameters()],
        [(name, type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()],
        getattr(model, 'peft', None),
    )


def same(a, b):
    tensors = a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    parameters = [x[:2] for x in a[1]] == [x[:2] for x in b[1]]
    objects = all(x[2] is y[2] for x, y in zip(a[1], b[1], strict=True))
    return tensors and parameters and objects and a[2:] == b[2:]


def memory(which):
    """Of this process in bytes: ``VmRSS`` now, ``VmHWM`` at most since now was last asked."""
    lines = Path('/proc/self/status').read_text().splitlines()
    size = next(int(line.split()[1]) for line in lines if line.startswith(which))
    if which == 'VmRSS':
        Path('/proc/self/clear_refs').write_text('5')
    return 1024 * size


@pytest.fixture
def refuses(tmp_path, monkeypatch):
    """A function that checks that all of some files are refused, and that nothing happens."""
    monkeypatch.syspath_prepend(tmp_path / 'modules')
    marker, path = tmp_path / 'ran', tmp_path / 'a.safetensors'
    (tmp_path / 'modules').mkdir()
    (tmp_path / 'modules/harmful.py').write_text(f'open({str(marker)!r}, "w")\nEvil = dict\n')

    def check(model, whole, contents):
        path.write_bytes(whole)
        mmpeft.load_adapter(copy.deepcopy(model), path)  # imports what is needed
        before = fingerprint_of(model)
        monkeypatch.chdir(tmp_path)
        count, let_through = 0, []
        for number, content in enumerate(contents):
            path.write_bytes(content)
            at_rest = memory('VmRSS')
            try:
                mmpeft.load_adapter(model, path)
                let_through.append(number)
            except UsageError as error:
                count += 1
                message = str(error)
                assert str(path) in message and len(message) < 2000 and '\n' not in message
            assert memory('VmHWM') - at_rest < 2**25 + 16 * len(content), number
            assert same(fingerprint_of(model), before), number
            assert sorted(os.listdir(tmp_path)) == ['a.safetensors', 'modules'], number
        assert not let_through
        return count

    return check


@pytest.mark.parametrize('adapted', [False, True])
def test_each_is_refused_and_nothing_happens(adapted, base, whole, refuses, tmp_path):
    model = copy.deepcopy(base)
    if adapted:
        mmpeft.inject(model, METHOD, TARGETS)
        randomize(model)
    assert refuses(model, whole, cases(whole, former(whole), tmp_path / 'ran', adapted)) >= 500


def test_each_wrong_insertion_point_is_refused(refuses, tmp_path):
    mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    base = nn.ModuleDict(dict(backbone=nn.Sequential(nn.LayerNorm(4), mlp), head=nn.Linear(4, 3)))
    model = copy.deepcopy(base)
    mmpeft.inject(model, dict(type='PfeifferAdapter', rank=2), TARGETS)
    whole = mmpeft.save_adapter(model, tmp_path / 'whole').read_bytes()
    for path in tmp_path.glob('whole*'):
        path.unlink()
    assert refuses(base, whole, (forged(whole, **changes) for changes in wrong_points())) > 40


def test_the_file_itself_and_a_forged_copy_are_fine(base, whole, tmp_path):
    """So that what is refused above is refused for what was changed."""
    for number, content in enumerate((whole, forged(whole))):
        path = tmp_path / f'{number}.safetensors'
        path.write_bytes(content)
        model = mmpeft.load_adapter(copy.deepcopy(base), path)
        state = mmpeft.adapter_state_dict(model)
        stored = load(whole)
        assert state.keys() == stored.keys()
        assert all(torch.equal(state[key], stored[key]) for key in stored)


def former(content):
    """The file as mmpeft 0.3 wrote it."""
    header, _ = unpacked(content)
    manifest = json.loads(header['__metadata__']['mmpeft'])
    (method,), (injection,) = manifest.pop('methods'), manifest.pop('injections')
    del manifest['adapters']
    every = dict(Targets.of(dict(module=injection['module'])).__dict__)
    described = dict(method=method, targets=every, unfreeze=injection['trained'])
    return forged(content, text=json.dumps(manifest | dict(injections=[described])))


def test_damage_to_a_file_of_an_earlier_version_cannot_be_noticed_and_the_user_is_warned(
    base, whole, tmp_path
):
    header, data = unpacked(former(whole))
    del header['__metadata__']['sha256']
    description = json.loads(header['__metadata__']['mmpeft'])
    for key in ('torch', 'parameters'):
        del description[key]
    header['__metadata__']['mmpeft'] = json.dumps(description)
    path = tmp_path / 'old.safetensors'
    path.write_bytes(packed(header, data))
    with pytest.warns(UserWarning, match='no checksum'):
        model = mmpeft.load_adapter(copy.deepcopy(base), path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        mmpeft.load_adapter(copy.deepcopy(base), mmpeft.save_adapter(model, path))


@pytest.mark.parametrize('pattern', [r'^\d+\.weight$', r'(0|1)\.(weight|bias)', r'.*weight.*'])
def test_patterns_of_a_former_file_that_are_certain_to_be_fast_are_searched(
    pattern, base, whole, tmp_path
):
    path = tmp_path / 'a.safetensors'
    path.write_bytes(forged(former(whole), **targets(include=[pattern])))
    with pytest.warns(UserWarning, match='save it again'):
        loaded = mmpeft.load_adapter(copy.deepcopy(base), path)
    assert mmpeft.adapter_state_dict(loaded).keys() == load(whole).keys()


@pytest.mark.parametrize('pattern', SLOW)
def test_slow_patterns_of_a_former_file_are_not_searched_where_the_model_is_adapted(
    pattern, base, whole, tmp_path
):
    path = tmp_path / 'a.safetensors'
    path.write_bytes(forged(former(whole), **targets(include=[pattern])))
    with pytest.raises(UsageError, match='Adapt the model first'):
        mmpeft.load_adapter(copy.deepcopy(base), path)
    model = copy.deepcopy(base)
    mmpeft.inject(model, METHOD, TARGETS)
    with pytest.warns(UserWarning, match='save it again'):
        mmpeft.load_adapter(model, path)
    state = mmpeft.adapter_state_dict(model)
    assert all(torch.equal(state[key], value) for key, value in load(whole).items())
