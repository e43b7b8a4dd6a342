"""The user's own functions: their files, their hashes, and the line of what they raise. Finding them: tests/test_metrics.py."""

import hashlib

import pytest

from jaxtune import functions
from jaxtune.errors import ConfigError

SOURCE = """
def outer(x):
    return inner(x)

def inner(x):
    return 1 / x
"""


def test_a_function_of_a_file(tmp_path):
    spec = f"{tmp_path}/own.py:outer"
    (tmp_path / "own.py").write_text(SOURCE)
    assert functions.file_of(spec) == tmp_path / "own.py" and functions.file_of("package.module.outer") is None
    assert functions.hashes([spec, "exact_match", ""]) == {f"{tmp_path}/own.py": hashlib.sha256(SOURCE.encode()).hexdigest()}
    name, outer = functions.find({}, spec, "metric")
    assert name == "outer" and functions.call("metric outer", outer, 2) == 0.5
    with pytest.raises(ConfigError, match=r"metric outer failed: ZeroDivisionError: division by zero, at line 6 of .*own.py; correct"):
        functions.call("metric outer", outer, 0)
