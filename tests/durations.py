"""Write durations.json, from which conftest.py marks the tests that take long.

    make test-all TEST_ARGS=--junitxml=report.xml
    python tests/durations.py report.xml

It holds seconds by test and by fixture of a module, of those that are slow: the mean over the
cases of a test, without its fixtures.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from xml.etree import ElementTree

SLOW, LONG = 0.25, 1  # seconds


def main(report: str) -> None:
    """Read a JUnit report of all tests, and write the file."""
    seconds = defaultdict(list)
    for case in ElementTree.parse(report).iter('testcase'):
        path = case.get('classname').replace('.', '/') + '.py'
        fixtures = {each.get('name'): float(each.get('value')) for each in case.iter('property')}
        took = {case.get('name').split('[')[0]: float(case.get('time')) - sum(fixtures.values())}
        for name, value in {**took, **fixtures}.items():
            seconds[f'{path}::{name}'].append(value)
    means = {name: round(mean(values), 2) for name, values in sorted(seconds.items())}
    kept = {name: value for name, value in means.items() if value >= SLOW}
    Path(__file__).with_suffix('.json').write_text(f'{json.dumps(kept, indent=0)}\n')


if __name__ == '__main__':
    main(*sys.argv[1:])
