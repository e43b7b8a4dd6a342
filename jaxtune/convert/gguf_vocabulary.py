"""A transformers tokenizer as GGUF metadata: vocabulary, merges or scores, the splitting rule's name, special tokens, chat template."""

import json
import logging
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxtune.convert.gguf_tokenizer import SEQUENCES, SPACE, SPLITTINGS, Splitting
from jaxtune.data.templates import written
from jaxtune.data.tokenizer import listed, special_ids
from jaxtune.errors import ModelError

log = logging.getLogger("jaxtune")


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, vocab_size: int, generation_config: dict) -> None:
    """Write the `tokenizer.ggml.*` keys. ModelError for a tokenizer that llama.cpp cannot express."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise ModelError(f"a tokenizer of kind {model['type']} cannot be written as GGUF; there is BPE, byte-level or with byte fallback")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    tokens, types = _tokens(tokenizer, vocab_size, bool(model["byte_fallback"]))
    if model["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_has_prefix(described, tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitting_name(described))
        writer.add_token_list(tokens)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_types(types)
    _add_specials(writer, tokenizer, generation_config, vocab_size)
    if template := tokenizer.chat_template:
        several = isinstance(template, dict)
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()] if several else template)


def _tokens(tokenizer: Any, vocab_size: int, sentencepiece: bool) -> tuple[list[str], list[TokenType]]:
    """The text and kind of every id up to the model's vocabulary; ids without a token are padding."""
    by_id, added = {number: token for token, number in tokenizer.get_vocab().items()}, tokenizer.added_tokens_decoder
    beyond = [number for number in by_id if number >= vocab_size]
    if not added.keys() >= set(beyond):
        raise ModelError(f"the tokenizer has {max(by_id) + 1} tokens, but the model's vocabulary {vocab_size}; they do not belong together")
    if beyond:  # a padding token that was added without an embedding, say
        names = ", ".join(by_id[number] for number in sorted(beyond))
        log.warning("left out of the GGUF file, because the model has no embedding of them: %s", names)
    tokens, types = [], []
    for number in range(vocab_size):
        token, kind = by_id.get(number), TokenType.NORMAL
        if token is None:
            token, kind = f"[PAD{number}]", TokenType.UNUSED
        elif token == tokenizer.unk_token and sentencepiece:
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED
            # llama.cpp searches for user-defined tokens in the raw text, before spaces are replaced
            token = token.replace(SPACE, " ") if sentencepiece and not added[number].special else token
        elif sentencepiece and len(token) == 6 and token.startswith("<0x"):
            kind = TokenType.BYTE
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """SentencePiece's view of merges: the piece made first has the highest score; what no merge makes has the lowest."""
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _has_prefix(described: dict, tokenizer: Any) -> bool:
    """Whether llama.cpp should prepend a space to the text, which it then does after every special token, too.

    A tokenizer that does so at the very beginning only (`first`) has none in a chat that begins with a special token.
    """
    text = json.dumps([described["normalizer"], described["pre_tokenizer"]])
    everywhere = '"Prepend"' in text or '"prepend_scheme": "always"' in text
    return everywhere or '"prepend_scheme": "first"' in text and not _opens_specially(tokenizer)


def _opens_specially(tokenizer: Any) -> bool:
    """Whether the chat template begins a conversation with a special or added token."""
    try:
        text = written(tokenizer, [{"role": "user", "content": "?"}])
    except Exception:  # there is no template, or it refuses this conversation
        return False
    return tokenizer(text, add_special_tokens=False)["input_ids"][0] in special_ids(tokenizer)


def splitting_name(described: dict) -> str:
    """llama.cpp's name for the way a byte-level tokenizer splits text; ModelError if it has no known one."""
    steps = described["pre_tokenizer"] or {}
    for name, sequence in SEQUENCES.items():
        if _without_offsets(steps) == _without_offsets(_described(sequence)):
            return name
    steps = steps.get("pretokenizers", [steps])
    patterns = [_pattern(step) for step in steps if step.get("type") != "ByteLevel"]
    bytes_ = steps[-1] if steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space") else None
    known = bytes_ is not None and None not in patterns and len(patterns) == len(steps) - 1
    found = Splitting(
        patterns=tuple(pattern for pattern in patterns if pattern),
        words=bool(bytes_ and bytes_.get("use_regex", True)),
        ignore_merges=bool(described["model"].get("ignore_merges")),
        nfc='"NFC"' in json.dumps(described["normalizer"]),
    )
    # llama.cpp normalises nothing, so two rules that differ only in that have the same name
    for same in (found, found._replace(nfc=not found.nfc)):
        if known and same in SPLITTINGS.values():
            return next(name for name, splitting in SPLITTINGS.items() if splitting == same)
    rule = json.dumps(described["pre_tokenizer"])
    raise ModelError(f"this tokenizer cuts text in a way that llama.cpp has no name for that we know: {rule}")


def _described(sequence: pre_tokenizers.PreTokenizer) -> dict:
    """As tokenizer.json has it."""
    empty = Tokenizer(models.BPE())
    empty.pre_tokenizer = sequence
    return json.loads(empty.to_str())["pre_tokenizer"]


def _without_offsets(steps: dict) -> list[dict]:
    """A sequence's steps, without those that change no token."""
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps.get("pretokenizers", [])]


def _pattern(step: dict) -> str | None:
    """The pattern of a step that isolates each match; None for another kind of step."""
    if step.get("type") == "Digits" and step["individual_digits"]:
        return r"\p{N}"
    if step.get("type") != "Split" or "Regex" not in step["pattern"]:
        return None
    pattern = step["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n")
    # unmatched text is discarded, but nothing is left if the pattern ends with all remaining spaces
    whole = step["behavior"] == "Removed" and step["invert"] and pattern.endswith(r"|\s+(?!\S)|\s+")
    return pattern if whole or step["behavior"] == "Isolated" and not step["invert"] else None


def _add_specials(writer: GGUFWriter, tokenizer: Any, generation_config: dict, vocab_size: int) -> None:
    ends = listed(generation_config.get("eos_token_id"))
    numbers = {
        "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id,
        "eot": next((n for n in ends if n not in (None, tokenizer.eos_token_id) and 0 <= n < vocab_size), None),
    }  # fmt: skip
    for name, number in numbers.items():
        if number is not None and number < vocab_size:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
