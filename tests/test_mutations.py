"""tests/mutations.py breaks lines that it knows by their text: each must still be there, once."""

import mutations
import pytest


@pytest.mark.parametrize("file", mutations.MUTATIONS)
def test_every_pattern_is_found_exactly_once(file):
    text = (mutations.ROOT / file).read_text()
    assert [old for old, _ in mutations.MUTATIONS[file] if text.count(old) != 1] == []
    assert [old for old, new in mutations.MUTATIONS[file] if old == new] == []
