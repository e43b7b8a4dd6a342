"""The judge of the quickstart: two cron lines are equal when they fire at the same times.

Reached from a config as `metric: configs/quickstart/cron.py:cron_match`; an example of a metric of your own.
"""

MONTHS = {name: 1 + i for i, name in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split())}
WEEKDAYS = {name: i for i, name in enumerate("sun mon tue wed thu fri sat".split())}
# minute, hour, day of the month, month, weekday: first and last value, and the names that stand for numbers
FIELDS = ((0, 59, {}), (0, 23, {}), (1, 31, {}), (1, 12, MONTHS), (0, 7, WEEKDAYS))


def parse_field(text: str, low: int, high: int, names: dict[str, int]) -> frozenset[int]:
    """The numbers that one field such as `1-5`, `*/15` or `MON,WED` denotes. Raises ValueError on anything else."""

    def number(word: str) -> int:
        value = names[word.lower()] if word.lower() in names else int(word) if word.isdecimal() else None
        if value is None or not low <= value <= high:
            raise ValueError(f"{word!r} is no value between {low} and {high}")
        return value

    values: set[int] = set()
    for part in text.split(","):
        span, slash, step = part.partition("/")
        if slash and not (step.isdecimal() and int(step) > 0):
            raise ValueError(f"{step!r} is no step")
        first, dash, last = span.partition("-")
        if span == "*":
            bounds = low, high
        elif dash:
            bounds = number(first), number(last)
        else:  # `5/15` runs from 5 to the end, `5` is 5 alone
            bounds = number(first), high if slash else number(first)
        if bounds[0] > bounds[1]:
            raise ValueError(f"{span!r} runs backwards")
        values.update(range(bounds[0], bounds[1] + 1, int(step) if slash else 1))
    return frozenset(values)


def parse(line: str) -> tuple[frozenset[int], ...]:
    """The sets of minutes, hours, days, months and weekdays of a cron line (Sunday is 0). Raises ValueError."""
    fields = line.split()
    if len(fields) != len(FIELDS):
        raise ValueError(f"{line!r} has {len(fields)} fields; a cron line has five")
    *rest, weekdays = (parse_field(text, *field) for text, field in zip(fields, FIELDS, strict=True))
    return *rest, frozenset(day % 7 for day in weekdays)


def cron_match(predictions: list[str], references: list[str], rows: list[dict]) -> list[float]:
    """1.0 where the answer, all of it, is a cron line that denotes the reference's five sets, otherwise 0.0.

    `0 9 * * MON-FRI` matches `0 9 * * 1-5`; a line inside a sentence, or with a sixth field, does not.
    """

    def same(prediction: str, reference: str) -> bool:
        wanted = parse(reference)  # a broken reference is a mistake in the data: let it raise
        try:
            return parse(prediction) == wanted
        except ValueError:
            return False

    return [float(same(p, r)) for p, r in zip(predictions, references, strict=True)]
