"""What ``--method`` takes: the name of a method file, or a method as text."""

import ast
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mmengine.config import Config

from mmpeft.errors import UsageError, suggest

from .packages import package_configs


def read_method(method: str | Mapping | list) -> dict:
    """The ``method``, ``targets`` and ``unfreeze`` of PEFTHook that a method stands for.

    Args:
        method: The name of a file of ``configs/_base_/methods``; a method such
            as ``dict(type='LoRA', rank=4)``; a dict of the hook's arguments;
            or a list for its ``method``. The last three also as text in
            Python's or JSON's notation, which is parsed and not executed.

    Raises:
        UsageError: There is no such file, or the text is none of the above.
    """
    if isinstance(method, str):
        if not is_name(method):
            return read_method(_literal(method))
        files = method_files()
        if method.strip() not in files:
            raise UsageError(
                f'There is no method {method!r}. {suggest(method, files)} A method of your own is '
                'written as "dict(type=\'LoRA\', rank=4)".'
            )
        hook = Config.fromfile(files[method.strip()]).peft.to_dict()
        return {key: value for key, value in hook.items() if key != 'type'}
    keys = method if isinstance(method, Mapping) else ()
    if 'method' in keys and 'type' not in keys:
        return dict(method)
    if 'type' not in keys and not isinstance(method, list):
        raise UsageError(f"A method is a dict such as dict(type='FLoRA', rank=32), not {method!r}.")
    return dict(method=method)


def method_files() -> dict[str, Path]:
    """The files of ``configs/_base_/methods`` by name."""
    folder = package_configs('mmpeft', '--method') / '_base_' / 'methods'
    return {path.stem: path for path in sorted(folder.glob('*.py'))}


def method_name(method: str | Mapping | list) -> str:
    """A method as part of a path: its file's name, or type and arguments."""
    if is_name(method):
        return method.strip()
    hook = read_method(method)
    found = [
        m['type'].lower() + ''.join(f'_{k}-{v}' for k, v in m.items() if k != 'type')
        for m in methods_in(hook)
    ]
    parts = hook['method'] if isinstance(hook['method'], list) else [hook]
    others = [
        (key, value)
        for part in parts
        for key, value in part.items()
        if key not in ('method', 'type') and 'method' in part
    ]
    name = '+'.join(found) + ''.join(f'_{key}-{value}' for key, value in others)
    short = re.sub(r'[^\w.+-]', '', name)
    if len(short) <= 100:
        return short
    return f'{short[:91]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}'


def methods_in(hook: Mapping) -> Iterator[dict]:
    """The methods that the arguments of a hook name, one or several."""
    found = hook.get('method') or ()
    for each in found if isinstance(found, (list, tuple)) else [found]:
        each = each.get('method', each) if isinstance(each, dict) else None
        if isinstance(each, dict) and isinstance(each.get('type'), str):
            yield each


def is_name(method: str | Mapping | list) -> bool:
    """Whether a method is given by the name of its file."""
    return isinstance(method, str) and bool(re.fullmatch(r'[\w-]+', method.strip()))


def _literal(text):
    """A value in Python's or JSON's notation, ``dict(...)`` included."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return _value(ast.parse(text.strip(), mode='eval').body)
    except (SyntaxError, ValueError) as error:
        raise UsageError(
            f'{text!r} is neither the name of a method nor a dict: {error}. Write such as '
            '"dict(type=\'LoRA\', rank=4)"; several are a list of dicts with their targets.'
        ) from error


def _value(node):
    if isinstance(node, ast.Call):
        plain = isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args
        if not plain or any(keyword.arg is None for keyword in node.keywords):
            raise ValueError(f'{ast.unparse(node)} is not a dict of arguments')
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {_value(k): _value(v) for k, v in zip(node.keys, node.values, strict=True)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(each) for each in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ValueError(f'{ast.unparse(node)} is not a value') from error
