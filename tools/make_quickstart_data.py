"""Writes the quickstart's data: English schedules and the cron lines they mean.

    python tools/make_quickstart_data.py [FOLDER]        # default configs/quickstart: train.jsonl, eval.jsonl, test.jsonl

A row joins a frame ("send the report {when} at {time}") and a way to say the days ("every {day}"). Each wording belongs to one
split: every test row has a frame that no train row has, half of them also say the days in a way that no train row does, and one
clock time in eight is met in the test alone. The same seed writes the same bytes.
"""

import argparse
import json
import random
from pathlib import Path

from jaxtune.disk import write_text

SYSTEM = "Answer with a cron line."
SIZES = {"train": 1500, "eval": 64, "test": 200}
SEED = 1

DAYS = "Sunday Monday Tuesday Wednesday Thursday Friday Saturday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()

# ---- 1. Wordings. {split: ...}; a wording is in one split only ----

FRAMES = {
    "train": [
        "{when} at {time}", "at {time} {when}", "{time} {when}", "{when}, {time}", "{when} {time}", "run {when} at {time}",
        "run it at {time} {when}", "run the backup {when} at {time}", "send the report at {time} {when}", "{when} at {time} please",
        "start the job {when} at {time}", "please run this at {time}, {when}", "I need it {when} at {time}", "wake me {when} at {time}",
        "schedule the sync {when} at {time}", "the job should run {when} at {time}", "it should start at {time} {when}",
        "restart the server at {time} {when}", "can you run it {when} at {time}?", "set it to run {when} at {time}",
        "clean the cache {when}, at {time}", "trigger the build {when} at {time}", "{when} at exactly {time}", "{when} when it is {time}",
        "at {time}, {when}", "remind me {when} at {time}", "email the team at {time} {when}", "rotate the logs {when} at {time}",
    ],
    "eval": [
        "do this {when} at {time}", "starting at {time}, {when}", "copy the files at {time} {when}", "{when} the alarm rings at {time}",
    ],
    "test": [
        "launch the import {when} at {time}", "at {time} {when}, archive the mail", "we want the export to happen {when} at {time}",
        "{when} sharp at {time}", "kick off the crawler at {time} {when}", "make a snapshot {when} at {time}, thanks",
        "the newsletter goes out {when} at {time}", "could the tests begin {when} at {time}?", "as soon as it is {time}, {when}",
        "update the dashboard, {when}, at {time}", "{when} the lights go on at {time}", "post the summary {when} around {time}",
    ],
}  # fmt: skip

# Frames of what repeats inside a day: {often} is "every 15 minutes", {when} the days, if any are named.
OFTEN_FRAMES = {
    "train": [
        "{often} {when}", "{when} {often}", "{often}, {when}", "run {often} {when}", "run it {often} {when}",
        "check the site {often} {when}", "poll the queue {often} {when}", "please run this {often} {when}",
        "the job should run {often} {when}", "sync the files {often} {when}",
        "send a ping {often} {when}", "{often} {when} please", "can you run it {often} {when}?", "set it to run {often} {when}",
    ],
    "eval": ["do this {often} {when}", "refresh the page {often} {when}"],
    "test": [
        "launch the import {often} {when}", "we want a snapshot {often} {when}", "fetch the prices {often} {when}, thanks",
        "could the tests begin {often} {when}?", "measure the load {often} {when}", "post the summary {often} {when}",
    ],
}  # fmt: skip

# kind -> split -> ways to say the days. Slots: {day} {days} {first} {last} {n} {m} {month} {month2} {k}
WHEN = {
    "daily": {
        "train": ["every day", "each day", "daily", "every single day", "on all days", "every day of the week", "seven days a week"],
        "eval": ["on each day"],
        "test": ["day after day", "on every day", "each and every day"],
    },
    "weekdays": {
        "train": ["every weekday", "on weekdays", "each weekday", "weekdays", "every working day", "Monday to Friday", "Mon-Fri",
                  "on business days", "during the work week"],
        "eval": ["weekdays only"],
        "test": ["on working days", "each business day", "on any weekday"],
    },
    "weekend": {
        "train": ["every weekend", "on weekends", "weekends", "on Saturday and Sunday", "Saturdays and Sundays", "at the weekend"],
        "eval": ["on both weekend days"],
        "test": ["each weekend", "weekends only", "every Saturday and Sunday"],
    },
    "day": {
        "train": ["every {day}", "on {day}", "on {day}s", "{day}s", "each {day}", "every week on {day}", "weekly on {day}"],
        "eval": ["on every {day}"],
        "test": ["once a week on {day}", "{day}s only", "on any {day}", "each week on {day}"],
    },
    "days": {
        "train": ["every {days}", "on {days}", "each {days}", "{days}", "every week on {days}"],
        "eval": ["on every {days}"],
        "test": ["each week on {days}", "only on {days}", "{days} only"],
    },
    "range": {
        "train": ["{first} to {last}", "from {first} to {last}", "{first} through {last}", "{first}-{last}",
                  "every day from {first} to {last}", "on {first} to {last}"],
        "eval": ["between {first} and {last}"],
        "test": ["from {first} through {last}", "from {first} until {last}", "each day from {first} to {last}"],
    },
    "monthday": {
        "train": ["on the {n} of every month", "on the {n} of the month", "every month on the {n}", "monthly on the {n}", "on the {n}",
                  "on the {n} of each month", "on day {k} of every month", "on the {n} day of every month"],
        "eval": ["on the {n} of any month"],
        "test": ["each month on the {n}", "once a month on the {n}", "on day {k} of the month", "on the {n} day of each month"],
    },
    "monthdays": {
        "train": ["on the {n} and {m} of every month", "on the {n} and the {m} of the month", "every month on the {n} and {m}",
                  "on the {n} and {m}", "on the {n} and {m} of each month"],
        "eval": ["monthly on the {n} and the {m}"],
        "test": ["each month on the {n} and {m}", "twice a month, on the {n} and {m}", "both on the {n} and the {m} of each month"],
    },
    "yearly": {
        "train": ["every year on {month} {k}", "on {month} {k}", "every {month} {n}", "on the {n} of {month}", "yearly on {k} {month}",
                  "each year on the {n} of {month}", "on {k} {month}"],
        "eval": ["on every {k} {month}"],
        "test": ["once a year on {month} {k}", "each {month} {n}", "every year on the {n} of {month}", "yearly on the {n} of {month}"],
    },
    "quarter": {
        "train": ["on the first day of every quarter", "on the first of every quarter", "quarterly on the 1st",
                  "every quarter on the first day", "every quarter", "on the 1st day of each quarter"],
        "eval": ["at the beginning of every quarter"],
        "test": ["each quarter on the first day", "on day 1 of every quarter", "quarterly on the first day"],
    },
    "day in month": {
        "train": ["every {day} in {month}", "on {day}s in {month}", "each {day} in {month}", "in {month} on {day}s", "{day}s in {month}"],
        "eval": ["on every {day} in {month}"],
        "test": ["in {month}, every {day}", "on each {day} of {month}", "every {day} of {month}"],
    },
}  # fmt: skip

OFTEN = {
    "minutes": {
        "train": ["every {k} minutes", "once every {k} minutes", "every {k} min", "each {k} minutes"],
        "eval": ["at every {k} minutes"],
        "test": ["every {k} mins", "repeating every {k} minutes"],
    },
    "hours": {
        "train": ["every {k} hours", "once every {k} hours", "every {n} hour", "each {k} hours"],
        "eval": ["at every {k} hours"],
        "test": ["every {k} hrs", "repeating every {k} hours"],
    },
    "hourly": {
        "train": ["every hour", "hourly", "once an hour", "each hour", "every hour on the hour"],
        "eval": ["one time an hour"],
        "test": ["at every full hour", "at the top of every hour", "once every hour"],
    },
    "past": {
        "train": ["at {k} minutes past every hour", "every hour at {k} past", "hourly at minute {k}", "at minute {k} of every hour",
                  "{k} minutes past each hour"],
        "eval": ["hourly, at {k} past"],
        "test": ["{k} minutes after every hour", "each hour at {k} past", "every hour at minute {k}"],
    },
    "window": {
        "train": ["every {k} minutes from {time} to {time2}", "every {k} minutes between {time} and {time2}",
                  "from {time} to {time2} every {k} minutes"],
        "eval": ["each {k} minutes from {time} to {time2}"],
        "test": ["between {time} and {time2} every {k} minutes", "once every {k} minutes from {time} until {time2}"],
    },
    "hourly window": {
        "train": ["every hour from {time} to {time2}", "hourly from {time} to {time2}", "hourly between {time} and {time2}",
                  "each hour from {time} to {time2}"],
        "eval": ["from {time} to {time2}, hourly"],
        "test": ["once an hour from {time} to {time2}", "every hour between {time} and {time2}", "hourly from {time} until {time2}"],
    },
}  # fmt: skip

# how often each kind is drawn
WHEN_KINDS = {"daily": 3, "weekdays": 3, "weekend": 2, "day": 4, "days": 2, "range": 2, "monthday": 3, "monthdays": 1, "yearly": 2,
              "quarter": 2, "day in month": 1}
OFTEN_KINDS = {"minutes": 3, "hours": 2, "hourly": 1, "past": 2, "window": 2, "hourly window": 1}  # fmt: skip


# ---- 2. Values and how they are said ----


def held_out(hour: int, minute: int) -> bool:
    """True for the eighth of all clock times that only the test may use."""
    return (hour * 5 + minute // 5) % 8 == 0 and minute > 0


def clock(rng: random.Random, split: str) -> tuple[int, int]:
    """An (hour, minute), on the quarter of an hour most of the time."""
    while True:
        hour, minute = rng.randrange(24), rng.choice([0, 0, 0, 0, 30, 30, 15, 45, 5 * rng.randrange(12), 5 * rng.randrange(12)])
        if split == "test" or not held_out(hour, minute):
            return hour, minute


def say_times(rng: random.Random, *times: tuple[int, int]) -> list[str]:
    """One of the ways to say clock times, the same for all: 6:30 pm, 6:30 p.m., 18:30, half past six in the evening, noon."""
    suffix, style = rng.choice([" am", "am", " AM", " a.m."]), rng.random()
    spoken = style < 0.2 and all(hour not in (0, 12) and minute in (0, 15, 30) for hour, minute in times)
    return [_say(hour, minute, suffix, "spoken" if spoken else "24" if style > 0.75 else "12") for hour, minute in times]


def _say(hour: int, minute: int, suffix: str, style: str) -> str:
    if minute == 0 and hour in (0, 12):
        return "midnight" if hour == 0 else "noon"
    if style == "spoken":
        part = "in the morning" if hour < 12 else "in the afternoon" if hour < 17 else "in the evening" if hour < 21 else "at night"
        return f"{({15: 'quarter past ', 30: 'half past '}.get(minute, ''))}{NUMBERS[hour % 12]} {part}"
    if style == "24" or hour == 0:  # few know which day 12:30 am belongs to
        return f"{hour:02}:{minute:02}"
    digits = f"{hour % 12 or 12}" + (f":{minute:02}" if minute else "")
    return digits + (suffix if hour < 12 else suffix.replace("a", "p").replace("A", "P"))


def ordinal(n: int) -> str:
    return f"{n}{'th' if n in (11, 12, 13) else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


# ---- 3. Meaning: kind -> what fills the wording's slots, and the cron fields ----


def days_of(kind: str, rng: random.Random) -> tuple[dict[str, str], str]:
    """The slots of a `WHEN` kind and its day-of-month, month and weekday fields."""
    day, month, short = rng.randrange(7), rng.randrange(1, 13), slice(3 if rng.random() < 0.2 else None)
    n, m = sorted(rng.sample(range(1, 29), 2)) if rng.random() < 0.7 else (1, 15)
    nth = "first" if n == 1 and rng.random() < 0.5 else ordinal(n)
    slots = {"day": DAYS[day], "month": MONTHS[month - 1], "n": nth, "m": ordinal(m), "k": str(n)}
    if kind == "days":
        chosen = sorted(rng.sample(range(1, 7), rng.choice([2, 2, 3])))
        names = [DAYS[d][short] for d in chosen]
        return {"days": f"{', '.join(names[:-1])} and {names[-1]}"}, f"* * {','.join(map(str, chosen))}"
    if kind == "range":
        first = rng.randrange(1, 4)
        last = rng.randrange(first + 2, 7)
        return {"first": DAYS[first][short], "last": DAYS[last][short]}, f"* * {first}-{last}"
    fields = {
        "daily": "* * *",
        "weekdays": "* * 1-5",
        "weekend": "* * 0,6",
        "day": f"* * {day}",
        "monthday": f"{n} * *",
        "monthdays": f"{n},{m} * *",
        "yearly": f"{n} {month} *",
        "quarter": "1 1,4,7,10 *",
        "day in month": f"* {month} {day}",
    }
    return slots, fields[kind]


def often_of(kind: str, rng: random.Random) -> tuple[dict[str, str], str]:
    """The slots of an `OFTEN` kind and its minute and hour fields. A window names its first and its last hour."""
    first = rng.randrange(6, 12)
    last = rng.randrange(first + 3, 23)
    slots = dict(zip(("time", "time2"), say_times(rng, (first, 0), (last, 0)), strict=True))
    if kind in ("minutes", "window"):
        k = rng.choice([2, 5, 10, 15, 20, 30])
        hours = "*" if kind == "minutes" else f"{first}-{last}"
        return slots | {"k": NUMBERS[k] if k < 13 and rng.random() < 0.3 else str(k)}, f"*/{k} {hours}"
    if kind == "hours":
        k = rng.choice([2, 3, 4, 6, 8, 12])
        return {"k": rng.choice([str(k), NUMBERS[k]]), "n": {2: "other", 3: "third", 4: "fourth"}.get(k, ordinal(k))}, f"0 */{k}"
    if kind == "past":
        minute = 5 * rng.randrange(1, 12)
        return {"k": str(minute)}, f"{minute} *"
    return slots, "0 *" if kind == "hourly" else f"0 {first}-{last}"


# ---- 4. Rows ----


def pick(rng: random.Random, table: dict[str, dict], split: str, kinds: dict[str, int]) -> tuple[str, str]:
    """A kind, as often as its number in `kinds` says, and a wording of it: the split's own half of the time."""
    (kind,) = rng.choices(list(kinds), list(kinds.values()))
    return kind, rng.choice(table[kind][split if rng.random() < 0.5 else "train"])


def schedule(rng: random.Random, split: str) -> tuple[str, str]:
    """One (English, cron line) whose frame belongs to `split`."""
    if rng.random() < 0.25:
        kind, words = pick(rng, OFTEN, split, OFTEN_KINDS)
        slots, clock_fields = often_of(kind, rng)
        spoken = {"often": words.format(**slots)}
        frame, kinds = rng.choice(OFTEN_FRAMES[split]), {"daily": 3, "weekdays": 2, "weekend": 1, "day": 1, "range": 1}
    else:
        hour, minute = clock(rng, split)
        hours = [hour]
        if rng.random() < 0.06:  # twice a day, at the same minute of two hours
            hours = sorted({hour, rng.choice([h for h in range(24) if not held_out(h, minute)])})
        spoken = {"time": " and ".join(say_times(rng, *((h, minute) for h in hours)))}
        clock_fields = f"{minute} {','.join(map(str, hours))}"
        frame, kinds = rng.choice(FRAMES[split]), WHEN_KINDS
    kind, words = pick(rng, WHEN, split, kinds)
    slots, day_fields = days_of(kind, rng)
    if "often" in spoken and kind == "daily" and rng.random() < 0.8:
        words = ""  # "every 15 minutes" needs no "every day"
    return tidy(rng, frame.format(when=words.format(**slots), **spoken)), f"{clock_fields} {day_fields}"


def tidy(rng: random.Random, text: str) -> str:
    """Spaces and commas put right; some rows start with a capital or end with a full stop, as people write."""
    text = " ".join(text.split()).replace(" ,", ",").replace(" ?", "?").strip(" ,")
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.2 and text[-1] not in "?." else text


def make(split: str, size: int, seen: set[str]) -> list[dict]:
    """`size` rows of `messages` whose English, letter case aside, is not in `seen`; adds them to it."""
    rng, rows = random.Random(f"{SEED} {split}"), []
    while len(rows) < size:
        english, cron = schedule(rng, split)
        if english.lower() in seen:
            continue
        seen.add(english.lower())
        turns = (("system", SYSTEM), ("user", english), ("assistant", cron))
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent.parent / "configs" / "quickstart")
    folder, seen = parser.parse_args().folder, set()
    for split, size in SIZES.items():
        rows = make(split, size, seen)
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / f'{split}.jsonl'}: {len(rows)} rows")


if __name__ == "__main__":
    main()
