"""tests/mutations.py breaks lines that it knows by their text: each must still be there, once."""

import mutations
import pytest


@pytest.mark.parametrize("file", mutations.MUTATIONS)
def test_every_pattern_is_found_exactly_once(file):
    text = (mutations.ROOT / file).read_text()
    assert [old for old, *_ in mutations.MUTATIONS[file] if text.count(old) != 1] == []
    assert [old for old, new, *_ in mutations.MUTATIONS[file] if old == new] == []


@pytest.mark.parametrize("file", mutations.MUTATIONS)
def test_every_file_has_tests_that_are_there(file):
    tests, _ = mutations.suite_of(file)
    assert tests and all((mutations.ROOT / test).is_file() for test in tests)
