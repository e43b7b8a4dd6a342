import pytest

from jaxtune.plan_search import largest_that_fits


@pytest.mark.parametrize("limit", [999, 1000, 1001, 5_000, 123_456, 10**7])
@pytest.mark.parametrize("bytes_of", [lambda n: 900 + 100 * n, lambda n: 900 + 3 * n + n * n // 50, lambda n: 900 + 64 * (n // 64)])
def test_the_largest_that_fits(bytes_of, limit):
    tries = []
    found = largest_that_fits(lambda n: tries.append(n) or bytes_of(n), limit, start=8, most=100_000)
    whole = [n for n in range(1, 100_001) if bytes_of(n) <= limit]
    assert found == (whole[-1] if whole else None)
    assert len(tries) == len(set(tries)) <= 30


def test_a_line_takes_four_tries():
    tries = []
    assert largest_that_fits(lambda n: tries.append(n) or 1000 + 10 * n, 51_235, start=8, unit=128, most=10**6) == 4992
    assert len(tries) <= 4
    assert largest_that_fits(lambda n: n, 10_000, start=1, most=777) == 777
