"""Tests are marked slow and long by what they took."""

import ast
import json
from pathlib import Path

from tests import durations

ROOT = Path(__file__).parents[1]
RECORDED = json.loads((ROOT / 'tests/durations.json').read_text())
REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a.test_b" name="test_c[one]" time="2.0"/>
<testcase classname="tests.test_a.test_b" name="test_c[two-3]" time="1.0"/>
<testcase classname="tests.test_d" name="test_e" time="0.1"/>
<testcase classname="tests.test_d" name="test_f" time="5.0"><properties>
<property name="shared" value="4.9"/></properties></testcase>
</testsuite></testsuites>"""


def test_means_are_recorded(tmp_path, monkeypatch):
    (tmp_path / 'report.xml').write_text(REPORT)
    monkeypatch.setattr(durations, '__file__', str(tmp_path / 'durations.py'))
    durations.main(tmp_path / 'report.xml')
    found = json.loads((tmp_path / 'durations.json').read_text())
    assert found == {'tests/test_a/test_b.py::test_c': 1.5, 'tests/test_d.py::shared': 4.9}


def test_what_is_recorded_exists():
    assert max(RECORDED.values()) >= 2
    defined = {}
    for name in RECORDED:
        path, function = name.split('::')
        if path not in defined:
            tree = ast.parse((ROOT / path).read_text())
            defined[path] = {each.name for each in tree.body if hasattr(each, 'name')}
        assert function in defined[path], name


def test_marks(request):
    for item in request.session.items:
        path, test = item.nodeid.split('[')[0].split('::')
        took = sum(RECORDED.get(f'{path}::{name}', 0) for name in {test, *item.fixturenames})
        for mark, least in dict(slow=0.25, long=1).items():
            assert bool(item.get_closest_marker(mark)) == (took >= least), (item.nodeid, mark)
