"""The order of a model's layers, as repeating patterns."""

import functools
import itertools
from typing import NamedTuple


class Pattern(NamedTuple):
    """Layers that follow one pattern: `times[i]` layers of stack i, for each stack in turn, repeated `units` times. Usually there is one
    stack, and a unit is one of its layers."""

    first: int  # the number of its first stack
    stacks: tuple[tuple[int, ...], ...]
    times: tuple[int, ...]

    @property
    def units(self) -> int:
        """How often the pattern is repeated."""
        return len(self.stacks[0]) // self.times[0]

    @property
    def numbers(self) -> range:
        """Of its stacks."""
        return range(self.first, self.first + len(self.stacks))


@functools.lru_cache(maxsize=64)
def patterns_of(kinds: tuple) -> tuple[Pattern, ...]:
    """`ModelConfig.patterns` for layers of these kinds: at each place the pattern whose repetitions reach furthest, the shortest of those.
    """
    patterns, start, stack = [], 0, 0
    while start < len(kinds):
        size, units = 1, 1
        for length in range(1, (len(kinds) - start) // 2 + 1):
            first, n = kinds[start : start + length], 1
            while kinds[start + n * length : start + (n + 1) * length] == first:
                n += 1
            if n > 1 and n * length > size * units:
                size, units = length, n
            if start + size * units == len(kinds):
                break
        runs = [list(run) for _, run in itertools.groupby(range(start, start + size), key=lambda i: kinds[i])]
        stacks = tuple(tuple(unit * size + i for unit in range(units) for i in run) for run in runs)
        patterns.append(Pattern(stack, stacks, tuple(map(len, runs))))
        start, stack = start + size * units, stack + len(runs)
    return tuple(patterns)
