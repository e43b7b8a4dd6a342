"""Writes the preference set: answers to customers of a shop, of which one keeps the house rules and the other breaks one of them.

    python tools/make_preference_data.py [FOLDER]        # default configs/preference: train.jsonl, eval.jsonl

The rules, one to a row in turn, under `rule`:

    relevant      the answer is about the thing that was asked about; the other one says the same of another thing
    answer first  the answer comes before the courtesy; the other one has the same two sentences the other way round
    definite      the answer says what happens; the other one evades
    courteous     the answer ends kindly; the other one ends rudely, in words as polite as "thank you" and "please"

Length tells nothing: within each rule, and in all, the better answer is longer as often as it is shorter. The first two rules cannot be
told from the answer's words either. Eval rows ask about things and in situations that no train row has, and their kind, rude and evasive
sentences are met there alone. The same seed writes the same bytes.
"""

import argparse
import json
import random
from pathlib import Path

from jaxtune.disk import write_text

SYSTEM = "Answer a customer of the shop."
SIZES = {"train": 480, "eval": 160}
SEED = 3
RULES = ("relevant", "answer first", "definite", "courteous")

# ---- Wordings, {split: ...}; a wording is in one split only ----

THINGS = {
    "train": [
        "kettle", "lamp", "backpack", "blender", "raincoat", "keyboard", "mirror", "bookshelf", "tent", "watch", "toaster", "armchair",
        "camera", "blanket", "printer", "suitcase", "helmet", "guitar", "radio", "desk", "vase", "umbrella", "frying pan", "sleeping bag",
        "garden hose", "alarm clock", "coffee grinder", "bicycle pump",
    ],
    "eval": ["teapot", "jacket", "monitor", "wardrobe", "violin", "scooter", "carpet", "juicer", "rain barrel", "hiking stick"],
}  # fmt: skip

# situation: (what is asked, what is answered)
SITUATIONS = {
    "train": {
        "late": (
            ["My {thing} has not arrived yet. Where is it?", "I am still waiting for my {thing}.", "When will the {thing} I ordered come?"],
            ["Your {thing} arrives on {day}.", "The {thing} left our warehouse today and is with you on {day}."],
        ),
        "return": (
            ["Can I send the {thing} back?", "I would like to return a {thing}. How long do I have?"],
            ["You can send the {thing} back within {n} days.", "Yes, we take the {thing} back for {n} days, free of charge."],
        ),
        "broken": (
            ["The {thing} I bought from you is broken.", "My new {thing} stopped working after a day."],
            ["We are sending you a new {thing} today.", "A new {thing} is on its way, and you may keep the old one."],
        ),
        "refund": (
            ["Where is the money for the {thing} I sent back?", "I returned a {thing} and have not been paid yet."],
            ["The money for the {thing} is in your account by {day}.", "We paid you back for the {thing} this morning."],
        ),
        "stock": (
            ["Do you still have the {thing} on page {n}?", "Is the {thing} sold out?", "When can I buy the {thing} again?"],
            ["The {thing} is in stock, we have {n} of them.", "We get the {thing} in again on {day}."],
        ),
        "warranty": (
            ["How long is the warranty on a {thing}?", "Is my {thing} still under warranty?"],
            ["The warranty on a {thing} is {n} months.", "Your {thing} is covered for another {n} months."],
        ),
        "cancel": (
            ["Please cancel my order of a {thing}.", "I no longer need the {thing} I ordered."],
            ["Your order of the {thing} is cancelled.", "We have cancelled the {thing}, and you pay nothing."],
        ),
        "address": (
            ["I have moved. Can the {thing} go to my new address?", "Please send the {thing} to my office instead."],
            ["The {thing} now goes to your new address.", "We changed the address, and the {thing} arrives there on {day}."],
        ),
    },
    "eval": {
        "gift": (
            ["Could you wrap the {thing} as a gift?", "The {thing} is a present. Can it come with a card?"],
            ["We wrap the {thing} for you and add a card.", "Yes, the {thing} comes in gift paper on {day}."],
        ),
        "part": (
            ["A screw of my {thing} is missing.", "I have lost a part of the {thing}. Can I get a new one?"],
            ["The missing part of your {thing} is in the mail.", "We keep parts of the {thing} for {n} years and send you one today."],
        ),
        "price": (
            ["I saw the {thing} for less elsewhere. Do you match that?", "What does the {thing} cost with my voucher?"],
            ["We match that price and sell you the {thing} for {n} dollars.", "With your voucher the {thing} costs {n} dollars."],
        ),
    },
}  # fmt: skip

KIND = {
    "train": [
        "Thank you for your patience.", "I am sorry for the trouble.", "Please write again if anything is unclear.", "Have a lovely day.",
        "We are glad to help you.", "Thank you for shopping with us.", "I hope that helps you.", "It is a pleasure to look into this.",
        "We are happy that you asked.", "Please excuse the inconvenience, and thank you for telling us.", "Enjoy it!",
        "If there is anything else we can do for you, just let us know.",
    ],
    "eval": [
        "Many thanks for writing to us.", "Do get in touch at any time.", "We wish you a wonderful week.", "I apologise for any worry.",
        "You are always welcome here.", "Thanks so much for your understanding.", "We appreciate it!",
    ],
}  # fmt: skip
RUDE = {
    "train": [
        "Thank you for wasting our time.", "Please learn to read.", "I am sorry that you are so slow.", "You could have found it yourself.",
        "Next time think before you write.", "I have no time for questions like this.", "Only a fool would ask us that.", "Go away.",
        "We hope that you shop somewhere else from now on.", "It is your own fault.", "Please do not bother us with this again.",
        "Everybody else manages without asking, so why can you not do it?",
    ],
    "eval": [
        "Thanks for nothing.", "Do not ever write to us again.", "We wish you were less stupid.", "Any child would have known that.",
        "You are a very annoying person.", "I apologise for not caring about you.", "Stop whining and leave us alone.",
    ],
}  # fmt: skip
EVASIVE = {
    "train": [
        "It is hard to say anything about the {thing}.", "Who knows what happens with the {thing}?", "The {thing} is a hard case.",
        "I cannot tell you anything about the {thing} right now.", "That depends on the {thing}.", "With a {thing} you never know.",
        "Somebody may look at the {thing} some day.", "There are many things one could say about a {thing}.",
    ],
    "eval": [
        "I have no idea about the {thing}.", "Perhaps the {thing} is somewhere, perhaps it is not.", "Things like the {thing} vary a lot.",
        "We might think about the {thing} at some point.", "Ask someone else about the {thing}.",
    ],
}  # fmt: skip
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday".split()


def answers(rng: random.Random, split: str, rule: str, thing: str, body: str) -> tuple[str, str]:
    """The answer that keeps the rules, and the one that breaks `rule`; `body` is what is answered, with a slot for the thing."""
    said, kind = body.format(thing=thing), rng.choice(KIND[split])
    good = f"{said} {kind}"
    if rule == "relevant":
        other = rng.choice([other for other in THINGS[split] if other != thing])
        return good, f"{body.format(thing=other)} {kind}"
    if rule == "answer first":
        return good, f"{kind} {said}"
    if rule == "definite":
        return good, f"{rng.choice(EVASIVE[split]).format(thing=thing)} {kind}"
    return good, f"{said} {rng.choice(RUDE[split])}"


def row(rng: random.Random, split: str, rule: str) -> dict:
    """One question with both answers, as messages."""
    thing, (asked, answered) = rng.choice(THINGS[split]), rng.choice(list(SITUATIONS[split].values()))
    values = {"day": rng.choice(DAYS), "n": rng.randrange(14, 60)}
    question = rng.choice(asked).format(thing=thing, **values)
    chosen, rejected = answers(rng, split, rule, thing, rng.choice(answered).format(thing="{thing}", **values))
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    sides = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", chosen), ("rejected", rejected))}
    return {"prompt": prompt, **sides, "rule": rule}


def difference(row: dict) -> int:
    """Letters that the chosen answer is longer by."""
    return len(row["chosen"][0]["content"]) - len(row["rejected"][0]["content"])


def make(split: str, size: int) -> list[dict]:
    """`size` rows, the rules in turn, no answer twice; a row is drawn again until it brings the lengths of its rule's answers together."""
    rng, rows, seen = random.Random(f"{SEED} {split}"), [], set()
    longer, letters = dict.fromkeys(RULES, 0), dict.fromkeys(RULES, 0)
    while len(rows) < size:
        rule = RULES[len(rows) % len(RULES)]
        drawn = row(rng, split, rule)
        more, texts = difference(drawn), {json.dumps([drawn["prompt"], drawn[side]]) for side in ("chosen", "rejected")}
        sign = (more > 0) - (more < 0)
        even = longer[rule] * sign <= 0 and abs(letters[rule] + more) <= max(12, abs(letters[rule]))
        if texts & seen or not even:
            continue
        seen |= texts
        longer[rule] += sign
        letters[rule] += more
        rows.append(drawn)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent.parent / "configs" / "preference")
    folder = parser.parse_args().folder
    for split, size in SIZES.items():
        rows = make(split, size)
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / f'{split}.jsonl'}: {len(rows)} rows")


if __name__ == "__main__":
    main()
