"""What --method takes."""

import pytest

from mmpeft.engine.method_argument import method_files, method_name, methods_in, read_method
from mmpeft.errors import UsageError

LORA = dict(type='LoRA', rank=4)


@pytest.mark.parametrize(
    'text',
    [
        "dict(type='LoRA', rank=4)",
        " dict(type='LoRA',\n rank=4) ",
        "{'type': 'LoRA', 'rank': 4}",
        '{"type": "LoRA", "rank": 4}',
    ],
)
def test_a_method_as_text(text):
    assert read_method(text) == dict(method=LORA)


def test_values_in_both_notations():
    python = "dict(type='A', a=-1.5, b=(1, 2), c=None, d=True, e={'f': [3]})"
    json = '{"type": "A", "a": -1.5, "b": [1, 2], "c": null, "d": true, "e": {"f": [3]}}'
    assert read_method(python) == read_method(json)


def test_a_hook_and_a_list():
    hook = dict(method=LORA, targets=dict(include=['fc']), unfreeze=['norm'])
    assert read_method(str(hook)) == hook
    several = [LORA, dict(method=dict(type='BitFit'))]
    assert read_method(str(several)) == dict(method=several)
    assert list(methods_in(dict(method=several))) == [LORA, dict(type='BitFit')]


def test_a_file():
    assert read_method('lora')['method'] == dict(type='LoRA', rank=16)
    assert {'lora', 'flora', 'vpt_deep'} <= method_files().keys()


@pytest.mark.parametrize(
    'text, message',
    [
        ('flor', "no method 'flor'. Did you mean 'flora'"),
        ('LoRA', "Did you mean 'lora'"),
        ("dict(type='LoRA'", 'neither the name of a method nor a dict'),
        ("dict(type=open('x'))", 'neither the name'),
        ("__import__('os').abort()", 'neither the name'),
        ("dict(**{'type': 'LoRA'})", 'not a dict of arguments'),
        ("dict('LoRA')", 'not a dict of arguments'),
        ("dict(type='LoRA', rank=2 + 2)", 'neither the name'),
        ('dict(rank=4)', 'A method is a dict'),
        ('17', "no method '17'"),
        ('"lora', 'neither the name'),
        ('lora+bitfit', r'lora \+ bitfit is not a value.*a list of dicts'),
    ],
)
def test_what_is_no_method(text, message):
    with pytest.raises(UsageError, match=message):
        read_method(text)


def test_names_for_folders():
    assert method_name('lora') == 'lora'
    assert method_name("dict(type='FLoRA', rank=(4, 2), scale=1.0)") == 'flora_rank-42_scale-1.0'
    assert method_name([LORA, dict(type='BitFit')]) == 'lora_rank-4+bitfit'


def test_names_tell_targets_apart():
    hooks = [dict(method=LORA, targets=dict(kinds=[kind])) for kind in ('linear', 'conv')]
    assert method_name(hooks[0]) == 'lora_rank-4_targets-kindslinear'
    assert method_name(hooks) != method_name(hooks[::-1])
    long = [dict(method=LORA, targets=dict(include=['x' * 200 + end])) for end in 'ab']
    names = [method_name(hook) for hook in long]
    assert names[0] != names[1] and max(map(len, names)) <= 100
