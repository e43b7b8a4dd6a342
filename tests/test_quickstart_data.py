"""The quickstart's rows: reproducible byte for byte, correct according to an independent reading, and with test phrasings that do not occur
in training."""

import json
import random
import re
import runpy
from pathlib import Path

import pytest

from jaxtune import metrics
from jaxtune.errors import ConfigError

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "configs" / "quickstart"
SPLITS = ("train", "eval", "test")
JUDGE = f"{FOLDER}/cron.py:cron_match"


def rows(split: str) -> list[tuple[str, str]]:
    read = [json.loads(line)["messages"] for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]
    assert all([m["role"] for m in messages] == ["system", "user", "assistant"] for messages in read)
    return [(messages[1]["content"], messages[2]["content"]) for messages in read]


def test_the_generator_writes_the_files_that_are_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_quickstart_data.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "tools" / "make_quickstart_data.py"), run_name="__main__")
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1_000_000


# Values of a schedule, whatever the generator says: digits, number words, names of days and months, the hour's words.
DAY = r"(?:(?:sun|mon|tues|wednes|thurs|fri|satur)day|sun|mon|tue|wed|thu|fri|sat)s?|week ?days?|week ?ends?|(?:working|business) days?"
MONTH = r"january|february|march|april|may|june|july|august|september|october|november|december"
WORD = r"one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|first|second|third|fourth|other"
HOUR = r"noon|midnight|in the (?:morning|afternoon|evening)|at night|half past|quarter past"
VALUE = re.compile(rf"\b(?:\d+(?::\d\d)?(?:st|nd|rd|th)?(?: ?[ap]\.?m\b\.?)?|{DAY}|{MONTH}|{WORD}|{HOUR})(?!\w)")


def masked(english: str) -> str:
    """The phrasing: values as #, lists, ranges and runs of values as one #, without case and punctuation."""
    text = VALUE.sub("#", english.lower())
    text = re.sub(r"[^\w#]+", " ", text)
    return re.sub(r"#(?: (?:and |to |through |until )?#)+", "#", text).strip()


def test_no_row_is_shared_and_no_test_phrasing_is_a_training_phrasing():
    english = {split: {text.lower().rstrip(".") for text, _ in rows(split)} for split in SPLITS}
    phrasing = {split: {masked(text) for text in english[split]} for split in SPLITS}
    for a, b in (("train", "eval"), ("train", "test"), ("eval", "test")):
        assert not english[a] & english[b]
        assert not phrasing[a] & phrasing[b], sorted(phrasing[a] & phrasing[b])[:5]
    assert all("#" in text or "day" in text or "hour" in text or "quarter" in text for text in phrasing["test"])


def test_masking_leaves_the_phrasing_alone():
    assert masked("Run the backup every weekday at 6:30 p.m.") == masked("run the backup every Monday, Tuesday and Friday at noon")
    assert masked("run it on the 3rd of May at half past six in the evening") == masked("Run it on the first of June at 18:30.")
    assert masked("launch it every day at 5 pm") != masked("run it every day at 5 pm")


def test_some_clock_times_are_met_in_the_test_alone():
    times = {split: {" ".join(cron.split()[:2]) for _, cron in rows(split) if re.fullmatch(r"\d+ \d+ .*", cron)} for split in SPLITS}
    assert len(times["test"] - times["train"]) >= 5


def test_every_kind_of_field_is_there():
    for split in ("train", "test"):
        crons = [cron for _, cron in rows(split)]
        for pattern in (r"\*/\d+ \*", r"0 \*/\d+", r"\d+ \d+,\d+", r"\d+ \d+-\d+", r".* \d+ \* \*$", r".*,\d+ \* \*$", r".* \d+ \d+ \*$",
                        r".* 1 1,4,7,10 \*$", r".* \* \d+ \d$", r".* 1-5$", r".* 0,6$", r".* \d,\d,?\d?$"):  # fmt: skip
            assert any(re.match(pattern, cron) for cron in crons), (split, pattern)
    assert len(rows("test")) >= 200


# ---- the lines are right: an independent reading of the English ----

NUMBERS = {word: n for n, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())}
TIME = re.compile(
    r"(?P<word>noon|midnight)\b"
    r"|(?P<past>half past |quarter past )?(?P<spoken>one|two|three|four|five|six|seven|eight|nine|ten|eleven)"
    r" (?P<part>in the morning|in the afternoon|in the evening|at night)"
    r"|\b(?P<h>\d\d?)(?::(?P<m>\d\d))? ?(?P<half>[ap])\.?m\b|\b(?P<h24>\d\d):(?P<m24>\d\d)"
)


def read_times(text: str) -> list[tuple[int, int]]:
    found = []
    for t in TIME.finditer(text):
        if t["word"]:
            found.append((12 if t["word"] == "noon" else 0, 0))
        elif t["spoken"]:
            minute = {"half past ": 30, "quarter past ": 15, None: 0}[t["past"]]
            found.append((NUMBERS[t["spoken"]] + (0 if "morning" in t["part"] else 12), minute))
        elif t["h24"]:
            found.append((int(t["h24"]), int(t["m24"])))
        else:
            found.append((int(t["h"]) % 12 + (12 if t["half"] == "p" else 0), int(t["m"] or 0)))
    return found


def read_days(text: str) -> str | None:
    """The weekday field, if the text names weekdays."""
    if re.search(r"\bmonday to friday|mon-fri|week ?days?\b|(working|business) days?|work week", text):
        return "1-5"
    if re.search(r"week ?ends?", text):
        return "0,6"
    names = [("sun mon tue wed thu fri sat".split()).index(name) for name in
             re.findall(r"\b(sun|mon|tue|wed|thu|fri|sat)(?:s?|day|sday|nesday|rsday|urday)?s?\b", text)]  # fmt: skip
    if len(names) == 2 and re.search(r"\b(mon|tue|wed)\w*(-| to | through | until )|between (mon|tue|wed)", text):
        return f"{names[0]}-{names[1]}"
    return ",".join(map(str, sorted(names))) if names else None


@pytest.mark.parametrize("split", SPLITS)
def test_lines_mean_what_the_english_says(split):
    for english, cron in rows(split):
        text, (minute, hour, day, month, weekday) = english.lower(), cron.split()
        times = read_times(text)
        if "/" not in cron and "-" not in hour and times:
            assert {(h, int(minute)) for h in map(int, hour.split(","))} == set(times), (english, cron)
        elif "-" in hour:
            assert hour == "-".join(str(h) for h, _ in times), (english, cron)
        assert weekday == (read_days(text) or "*"), (english, cron)
        named = [n for n, name in enumerate(MONTH.split("|"), 1) if name in text]
        assert month == ("1,4,7,10" if "quarter" in re.sub("quarter past", "", text) else ",".join(map(str, named)) or "*"), (english, cron)
        if count := re.search(rf"(\d+|{'|'.join(NUMBERS)}) min(?:ute)?s?\\b", text):
            wanted = NUMBERS.get(count[1]) or int(count[1])
            assert minute == (f"{wanted}" if re.search(r"(past|after) (each|every) hour", text) else f"*/{wanted}"), (english, cron)
        assert day == "*" or re.search(r"\d|first|quarter", text), (english, cron)


# ---- the judge ----


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("0 9 * * MON-FRI", "0 9 * * 1-5", True),
        ("0 9 * * 1,2,3,4,5", "0 9 * * 1-5", True),
        ("00 09 * * 1-5", "0 9 * * 1-5", True),
        ("0,15,30,45 * * * *", "*/15 * * * *", True),
        ("0 0 * * 7", "0 0 * * 0", True),
        ("0 0 * * sat,SUN", "0 0 * * 0,6", True),
        ("0 0 1 jan,apr,jul,oct *", "0 0 1 */3 *", True),
        ("0 0 1 1/3 *", "0 0 1 1,4,7,10 *", True),
        (" 0 9 * * 1-5\n", "0 9 * * 1-5", True),
        ("0 9 * * 1-4", "0 9 * * 1-5", False),
        ("9 0 * * 1-5", "0 9 * * 1-5", False),
        ("0 9 * *", "0 9 * * *", False),
        ("0 9 * * * *", "0 9 * * *", False),
        ("`0 9 * * *`", "0 9 * * *", False),
        ("0 24 * * *", "0 0 * * *", False),
        ("0 9 * * 5-1", "0 9 * * 1-5", False),
        ("*/0 * * * *", "0 * * * *", False),
        ("*/x * * * *", "0 * * * *", False),
        ("", "0 9 * * *", False),
        ("At nine every day.", "0 9 * * *", False),
    ],
)
def test_judge_compares_what_lines_denote(prediction, reference, same):
    assert metrics.score(JUDGE, [prediction], [reference], [{}]) == [float(same)]


def test_judge_agrees_with_spelling_out_at_random():
    rng, module = random.Random(0), runpy.run_path(str(FOLDER / "cron.py"))
    for _ in range(200):
        values = sorted(rng.sample(range(60), rng.randrange(1, 20)))
        spelled = ",".join(map(str, values))
        assert module["parse"](f"{spelled} * * * *")[0] == set(values)
    for step in range(1, 31):
        assert module["parse"](f"* * */{step} * *")[2] == set(range(1, 32, step))


def test_judge_refuses_a_broken_reference_and_an_unknown_function():
    with pytest.raises(ConfigError, match="ValueError: .* five"):
        metrics.score(JUDGE, ["0 9 * * *"], ["0 9 * *"], [{}])
    with pytest.raises(ConfigError, match="no function cron"):
        metrics.find(JUDGE.replace("cron_match", "cron"))
    crons = [cron for split in SPLITS for _, cron in rows(split)]
    assert metrics.score(JUDGE, crons, crons, [{}] * len(crons)) == [1.0] * len(crons)
