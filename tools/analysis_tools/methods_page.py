"""Write the methods' tables and sections into README.md and docs/methods.md.

python tools/analysis_tools/methods_page.py [--check]
"""

import argparse
from pathlib import Path

from mmpeft.analysis.method_page import PAGE, entries, overview, page
from mmpeft.engine.launch import run
from mmpeft.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
BEGIN = '<!-- written by tools/analysis_tools/methods_page.py from here -->'
END = '<!-- to here -->'


def documents() -> dict[str, str]:
    """What each document should hold: its path below the repository to its text."""
    found = entries(ROOT / 'configs/_base_/methods')
    return {'README.md': marked('README.md', overview(found)), PAGE: marked(PAGE, page(found))}


def marked(path: str, text: str) -> str:
    """A document with ``text`` between its marks.

    Raises:
        UsageError: The document has no marks.
    """
    before, begin, rest = (ROOT / path).read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError(f'{path} has lost its marks. Put {BEGIN!r} and {END!r} back into it.')
    return f'{before}{BEGIN}\n\n{text}\n\n{END}{after}'


def main():
    parser = argparse.ArgumentParser(description='Write the documents of the methods')
    parser.add_argument(
        '--check', action='store_true', help='write nothing; fail if a document is out of date'
    )
    args = parser.parse_args()
    stale = {path: text for path, text in documents().items() if (ROOT / path).read_text() != text}
    if args.check and stale:
        raise UsageError(
            f'Out of date: {", ".join(stale)}. '
            'Run python tools/analysis_tools/methods_page.py to write them again.'
        )
    for path, text in stale.items():
        (ROOT / path).write_text(text)
        print(f'Wrote {path}')


if __name__ == '__main__':
    run(main)
