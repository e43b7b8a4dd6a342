"""All planted faults are found, and nothing else is."""

import json
from pathlib import Path

import pytest

from jaxtune import data
from jaxtune.data.quality import Item, examine
from jaxtune.errors import DataError

NUMBERS = ["nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
THINGS = ["apples", "bricks", "candles", "doors", "engines", "feathers", "gloves", "hammers", "islands", "jars"]


def clean(n, side="train"):
    """A row unlike any other, of typical length, that ends like a sentence."""
    words = [NUMBERS[int(d)] for d in str(n)]
    things = THINGS[n % 10], THINGS[n // 10 % 10]
    prompt = f"Question {n}: {' '.join(words)} {things[0]} cost {n} coins, so what do {n * 3} {things[1]} cost in the {things[0]} market?"
    answer = f"They cost {n * 7} coins, since {' and '.join(words)} {things[1]} go for {n * 2} at the {things[1]} stall number {n}."
    return Item(side, 0, n, f"row {n}", prompt, answer)


def with_text(n, prompt=None, answer=None, side="train"):
    item = clean(n, side)
    return Item(side, 0, n, item.place, item.prompt if prompt is None else prompt, item.answer if answer is None else answer)


CLEAN = [clean(n) for n in range(100, 300)]


def found(*planted):
    return {name: [item.row for item, _ in rows] for name, rows in examine([*CLEAN, *planted]).rows.items()}


def test_nothing_is_found_in_clean_rows():
    assert found() == {}


def test_exact_and_near_duplicates():
    one = clean(150)
    spaced = with_text(900, "  ".join(one.prompt.split(" ")), one.answer)
    near = with_text(901, one.prompt, one.answer + " Indeed.")
    assert found(spaced, near) == {"exact_duplicate": [900], "near_duplicate": [901]}


def test_leakage_is_the_same_prompt_on_another_side():
    leaked = with_text(900, clean(150).prompt, "Something else entirely, which nobody said before now.", side="eval")
    similar = with_text(901, clean(151).prompt + " Say.", "Quite another thing, and this too was not said before.", side="test")
    fresh = clean(555, side="eval")
    assert found(leaked, similar, fresh) == {"leakage": [900, 901]}


def test_answers_of_one_word_among_long_ones():
    assert found(*(with_text(n, answer=f"{n}!") for n in range(300, 320))) == {"short_answer": list(range(300, 320))}


def test_one_answer_to_many_prompts():
    same = [with_text(n, answer="I am sorry, but I cannot help you with that at all.") for n in range(300, 306)]
    assert found(*same) == {"repeated_answer": list(range(300, 306))}


def test_truncated_answers():
    cut = with_text(300, answer=clean(300).answer[:-25])
    fence = with_text(301, answer="Here is some code for what you have asked me to do today:\n```python\nprint(301)")
    assert found(cut, fence) == {"truncated_answer": [300, 301]}


def test_labels_out_of_balance():
    labels = [Item("train", 0, n, f"row {n}", clean(n).prompt, "yes" if n < 390 else "no") for n in range(300, 400)]
    assert {name: len(rows) for name, rows in examine(labels).rows.items()} == {"label_imbalance": 90}
    even = [Item("train", 0, n, f"row {n}", clean(n).prompt, "yes" if n % 2 else "no") for n in range(300, 400)]
    assert examine(even).rows == {}


def test_encoding():
    mojibake = with_text(300, answer="They said itâ€™s the cafÃ© of the year, and all of the people came to it.")
    replaced = with_text(301, answer="They said it\ufffds the one place to be this year, and we all came to it.")
    fine = with_text(302, answer="Sie sagten: „Es ist das Café des Jahres“ – naïve Gäste zahlten 5 €, wir aber nicht.")
    assert found(mojibake, replaced, fine) == {"encoding": [300, 301]}


def test_secrets_and_addresses():
    key = with_text(300, answer="Use AKIAIOSFODNN7EXAMPLE as the key in the example that was given to you before.")
    mail = with_text(301, answer="Write to jane.doe@example.org if the thing that you have bought does not work.")
    assert found(key, mail) == {"secret": [300], "email_address": [301]}


def test_another_language_in_the_same_script():
    """Recognised if there are enough words; mixed sources, such as translations, have no usual language."""
    german = with_text(
        300,
        "Bitte fasse den folgenden Text über die Geschichte der Stadt und ihre wichtigsten Gebäude kurz zusammen.",
        "Die Stadt wurde im zwölften Jahrhundert gegründet, und ihr Dom ist bis heute das höchste Gebäude am Platz.",
    )
    assert found(german) == {"language": [300]}
    assert "is written in de, where 99% of its source is in en" in examine([*CLEAN, german]).rows["language"][0][1]
    mixed = [with_text(n, german.prompt, f"{german.answer} {n}") for n in range(300, 360)]
    assert "language" not in found(*mixed)


def test_language_and_length():
    russian = with_text(300, "Сколько стоят триста яблок на рынке?", "Триста яблок на рынке стоят две тысячи сто монет, как и прежде.")
    long = with_text(301, answer=" ".join(f"{n * 31 % 977} of {n * 17 % 613} and" for n in range(2000)) + " so on.")
    assert found(russian, long) == {"language": [300], "length_outlier": [301]}


def rows(*items):
    return [{"prompt": item.prompt + " ", "completion": item.answer} for item in items]


def test_training_drops_keeps_or_stops(config, tokenizers):
    given = rows(*CLEAN[:30], CLEAN[3], CLEAN[4])
    settings = {"max_length": 512}
    assert len(data.load(config(given, **settings), tokenizers["chatml"]).train.documents) == 32
    for _ in range(2):  # from the cache as well
        loaded = data.load(config(given, quality={"exact_duplicate": "drop"}, **settings), tokenizers["chatml"])
        (ledger,) = loaded.ledger["train"]
        assert len(loaded.train.documents) == 30 == ledger["documents"] and ledger["rows"] == 32
        assert [place.split(", ")[1] for place in ledger["dropped"]["exact_duplicate"]] == ["line 31", "line 32"]
        assert ledger["kept_tokens"] == loaded.train.tokens
    with pytest.raises(DataError, match=r"line 31: is the same as .*line 4 \(and 1 more rows\); data.quality.exact_duplicate is error"):
        data.load(config(given, quality={"exact_duplicate": "error"}, **settings), tokenizers["chatml"])


def test_empty_answers_are_dropped_on_demand(config, tokenizers):
    given = [*rows(*CLEAN[:3]), {"prompt": "One ", "completion": " "}]
    kept = data.load(config(given, max_length=512), tokenizers["chatml"])
    assert len(kept.train.documents) == 4 and kept.ledger["train"][0]["problems"] == {"empty_answer": [4]}
    dropped = data.load(config(given, max_length=512, quality={"empty_answer": "drop"}), tokenizers["chatml"])
    assert len(dropped.train.documents) == 3 and dropped.ledger["train"][0]["dropped"] == {"empty_answer": [4]}


SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_gsm8k_is_clean():
    lines = (SHARED / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[:2000]
    items = [Item("train", 0, n, f"line {n}", (row := json.loads(line))["question"], row["answer"]) for n, line in enumerate(lines, 1)]
    assert examine(items).rows == {}
