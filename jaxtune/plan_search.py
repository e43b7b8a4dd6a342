"""Find the largest setting that fits in few tries: each is a compilation, so previous results choose the next one."""

from collections.abc import Callable


def largest_that_fits(
    peak: Callable[[int], int], limit: int, start: int, unit: int = 1, most: int = 2**24, close: float = 0.0
) -> int | None:
    """The largest multiple of `unit` up to `most` with `peak(n) <= limit`, or None; `peak` must increase with n.

    Memory is nearly linear in rows and length, so the line through the last two tries predicts the next one, bounded by the largest value
    known to fit and the smallest known not to. From the fourth try on, every other one bisects that interval. Ends when the two are
    neighbours, or closer than the fraction `close`.
    """
    low, high = 0, most // unit + 1  # in units: the largest that fits, the smallest that does not
    seen: list[tuple[int, int]] = []
    n = min(max(1, start // unit), high - 1)
    while high - low > 1 and high - low > close * low:
        seen.append((n, peak(n * unit)))
        if seen[-1][1] <= limit:
            low = n
        else:
            high = n
        halve = len(seen) > 3 and len(seen) % 2 == 0 and high <= most // unit
        n = (low + high) // 2 if halve else _guess(seen, limit)
        n = min(max(n, low + 1), high - 1)
    return low * unit or None


def _guess(seen: list[tuple[int, int]], limit: int) -> int:
    """Where the line through the last two tries meets `limit`; twice or half the first."""
    n, bytes_n = seen[-1]
    if len(seen) > 1 and (slope := (bytes_n - seen[-2][1]) / (n - seen[-2][0])) > 0:
        return int(n + (limit - bytes_n) / slope)
    return 2 * n if bytes_n <= limit else n // 2
