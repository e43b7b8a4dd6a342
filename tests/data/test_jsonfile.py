import io
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.data import jsonfile
from jaxtune.data.files import read
from jaxtune.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def values(text, block):
    """What the reader makes of a text, a few characters at a time."""
    jsonfile.BLOCK = block
    try:
        return list(jsonfile.read("rows.json", lambda path: io.StringIO(text, newline="")))
    finally:
        jsonfile.BLOCK = 1 << 20


@given(st.lists(VALUES, max_size=6), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans(), st.booleans())
def test_the_values_are_those_of_the_json_module(rows, block, indent, plain, wrapped):
    whole = {"version": {"lists": [[], 1]}, "data": rows, "name": "x"} if wrapped else rows
    assert values(json.dumps(whole, indent=indent, ensure_ascii=plain), block) == rows


@pytest.mark.parametrize("number", ["1.5", "1e+9", "-0.25E-2", "12345678901234567890"])
def test_a_number_cut_anywhere_is_whole(number):
    for block in range(1, 9):
        assert values(f"[{number}, {number}]", block) == [json.loads(number)] * 2


@given(st.lists(VALUES, min_size=1, max_size=4), st.data())
def test_damage_is_found_where_the_json_module_finds_it(rows, data):
    text = json.dumps(rows, indent=1)
    at = data.draw(st.integers(0, len(text) - 1))
    broken = text[:at] + data.draw(st.sampled_from(["", "}", "x", ",,", "\n"])) + text[at + 1 :]
    try:
        wanted = json.loads(broken)
    except json.JSONDecodeError as error:
        with pytest.raises(DataError) as found:
            values(broken, 8)
        if error.pos < len(broken) - 1 and broken.startswith("["):
            assert f"line {error.lineno}:" in str(found.value)
    else:
        if isinstance(wanted, list):
            assert values(broken, 8) == wanted


def test_a_long_list_takes_the_memory_of_a_block(tmp_path):
    """40 MB in one line; only a few blocks of a million characters are held at a time."""
    row = json.dumps({"text": "word " * 2000})
    with open(tmp_path / "rows.json", "w") as stream:
        stream.write("[" + row)
        for _ in range(4000):
            stream.write("," + row)
        stream.write("]")
    tracemalloc.start()
    assert sum(1 for _ in read([tmp_path / "rows.json"])) == 4001
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
