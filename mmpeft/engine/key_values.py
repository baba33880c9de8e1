"""Options of command lines of the form key=value."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from mmengine.config import DictAction

from mmpeft.errors import UsageError, suggest

# A dict, or a list that begins with one.
HAS_DICT = re.compile(r'[\s\'"\[(]*(\{|dict\()')
QUOTES = '\'" '
BLANK = re.compile(r'[^\s,\[(] +[^\s,\])]')  # within a word, not between two


class KeyValues(DictAction):
    """mmengine's ``DictAction``, with a sentence for what that cannot read.

    Raises:
        UsageError: A word has no ``=``, a key comes twice, or a value is a dict or has brackets
            that DictAction does not understand.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = [word.partition('=') for word in values]
        for key, equals, value in pairs:
            if not (key and equals):
                word = f'{key}{equals}{value}'
                raise UsageError(f'{option_string} {word}: write key=value, such as rank=16.')
            in_brackets = value.strip(QUOTES).startswith(('[', '('))
            if HAS_DICT.match(value) or (in_brackets and BLANK.search(value)):
                raise _unreadable(option_string, key, value)
            try:
                self._parse_iterable(value)
            except (AssertionError, RecursionError) as error:
                raise _unreadable(option_string, key, value) from error
        for key, times in Counter(key for key, _, _ in pairs).items():
            if times > 1:
                raise UsageError(
                    f'{option_string}: {key} comes {times} times, and only the last would hold. '
                    f'Write it once; several values are {key}=1,2.'
                )
        super().__call__(parser, namespace, values, option_string)
        # DictAction removes all blanks.
        texts = {key: value.strip(QUOTES) for key, _, value in pairs if BLANK.search(value)}
        getattr(namespace, self.dest).update(texts)


def check_options(
    options: Mapping, cfg: Mapping, names: Mapping[str, Iterable[str] | None]
) -> None:
    """Refuse options for keys that a config does not have, at any depth.

    Args:
        options: By dotted keys.
        cfg: The config without them.
        names: What dicts may have beside the config's keys, by patterns of their dotted keys ('' is
            the config itself); None stands for anything.

    Raises:
        UsageError: Names the key and similar ones.
    """
    for key in options:
        node, path = cfg, ''
        for name in key.split('.'):
            more = [found for pattern, found in names.items() if re.fullmatch(pattern, path)]
            is_new = node is ...  # a dict that the config does not have
            if None in more or isinstance(node, (list, tuple)) or (is_new and not more):
                break
            own = node if isinstance(node, Mapping) else {}
            known = dict.fromkeys([*own, *(each for found in more for each in found)])
            if name not in known and name != '_delete_':
                raise UsageError(f'--cfg-options: there is no {key!r}. {suggest(name, known)}')
            node, path = own.get(name, ...), f'{path}.{name}'.lstrip('.')


def _unreadable(option, key, value):
    return UsageError(
        f'{option} {key}={value}: a value is a number, a word, or a list or tuple of these with '
        'balanced brackets, such as [a,b]. In place of a dict write dotted keys, such as '
        'default_hooks.peft.method.rank=2, or name a method by --method.'
    )
