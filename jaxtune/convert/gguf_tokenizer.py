"""Build a tokenizer from a GGUF file's metadata.

A GGUF file contains a vocabulary, merges or scores, and the *name* of the rule that splits text before merging (`tokenizer.ggml.pre`); the
rule itself is llama.cpp's code. transformers' own conversion imports torch and lacks most of those rules, so they are here.
"""

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxtune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
SPACE = "\u2581"  # SentencePiece's character for a space

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Splitting(NamedTuple):
    """How text is split before merging with a byte-level vocabulary: matches of `patterns` are cut out, one pattern after the other."""

    patterns: tuple[str, ...] = ()
    words: bool = False  # GPT-2's own pattern is applied after these
    ignore_merges: bool = False  # a whole word in the vocabulary is not split
    nfc: bool = False


_GPT2 = Splitting(words=True)
_DIGITS = Splitting((r"\p{N}",), words=True)
_LLAMA3 = Splitting((_WORDS + r"|\p{N}{1,3}" + _REST,), ignore_merges=True)
_CL100K = _LLAMA3._replace(ignore_merges=False)
_QWEN2 = Splitting((_WORDS + r"|\p{N}" + _REST,), nfc=True)
_QWEN3_5 = Splitting((_WORDS.replace(r"\p{L}+", r"[\p{L}\p{M}]+") + r"|\p{N}" + _REST.replace(r"\p{L}", r"\p{L}\p{M}"),))
_SEED = Splitting((_WORDS + r"|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",))
_TEKKEN = Splitting(("|".join(_CASED) + r"|\p{N}" + _CASED_REST,), ignore_merges=True)
_O200K = Splitting(("|".join(f"{case}{_CONTRACTION}?" for case in _CASED) + r"|\p{N}{1,3}" + _CASED_REST,))
_NEOX = Splitting(words=True, nfc=True)
_DEEPSEEK_CODER = Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"))
# DeepSeek's letters with two cases, range by range, as in its tokenizer.json
_TWO_CASES = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-"
    "\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-"
    "\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-"
    "\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a"
    "-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-"
    "\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-"
    "\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = Splitting((
    r"[\r\n]", rf"\s?[{_TWO_CASES}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$", _DEEPSEEK_CODER.patterns[3], r"\p{N}",
))  # fmt: skip
_DEEPSEEK_V3 = Splitting((
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
))  # fmt: skip

# tokenizer.ggml.pre -> rule; the names are llama.cpp's (src/llama-vocab.cpp), the rules come from the models' own tokenizer.json
SPLITTINGS = {
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "roberta-bpe", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "glm4", "lfm2", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _CL100K),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _O200K),
    **dict.fromkeys(("olmo", "mpt"), _NEOX),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK_V3),
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-llm": _DEEPSEEK_LLM,
    "qwen35": _QWEN3_5,
    "seed-coder": _SEED,
    "stablelm2": _QWEN2._replace(nfc=False),
    "tekken": _TEKKEN,
}
# and rules with other kinds of steps
SEQUENCES = {
    "falcon": pre_tokenizers.Sequence([
        pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]),
}  # fmt: skip


def gguf_tokenizer(metadata: dict[str, Any], where: str) -> "PreTrainedTokenizerFast | None":
    """The tokenizer of a GGUF file's metadata; None if it has none. `where` names the file in errors.

    Raises ModelError for an unknown kind of vocabulary or splitting rule: a guess would silently tokenise text wrongly.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None
    if not isinstance(kind, str) or kind not in _BACKENDS:
        raise ModelError(f"{where}: a tokenizer of kind {kind!r} is not supported; supported are {', '.join(_BACKENDS)}")
    info = _Info(metadata, where)
    try:
        backend = _BACKENDS[kind](info)
    except ModelError:
        raise
    except Exception as error:  # for a vocabulary that does not fit its merges, the tokenizers package raises a bare Exception
        raise ModelError(f"{where}: the vocabulary is damaged: {error}") from error
    _add_tokens(backend, info)
    return _wrap(backend, info, add_bos=bool(info.get("add_bos_token", kind == "llama")))


class _Info:
    """The `tokenizer.ggml.*` keys."""

    def __init__(self, metadata: dict[str, Any], where: str):
        self.metadata, self.where = metadata, where
        self.architecture = metadata.get("general.architecture", "")
        self.tokens: list[str] = self.get("tokens") or []
        if not isinstance(self.tokens, list) or not all(isinstance(token, str) for token in self.tokens):
            raise ModelError(f"{where}: the vocabulary is damaged: tokenizer.ggml.tokens is no list of texts. Fetch the file again")
        self.types: list[int] = self.get("token_type") or [_NORMAL] * len(self.tokens)
        if not isinstance(self.types, list) or len(set(self.tokens)) != len(self.tokens) or len(self.types) != len(self.tokens):
            raise ModelError(f"{where}: the vocabulary is damaged: {len(self.tokens)} tokens, {len(set(self.tokens))} different ones")

    def get(self, key: str, default=None):
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def special(self, key: str) -> str | None:
        number = self.get(f"{key}_token_id")
        return self.tokens[number] if type(number) is int and 0 <= number < len(self.tokens) else None


def _byte_level(info: _Info) -> Tokenizer:
    """Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM)."""
    rule = info.get("pre")
    if rule not in SPLITTINGS and rule not in SEQUENCES:
        known = ", ".join(sorted([*SPLITTINGS, *SEQUENCES]))
        raise ModelError(f"{info.where}: tokenizer.ggml.pre is {rule!r}, a way to split text that is not known; known are {known}")
    splitting = SPLITTINGS.get(rule, Splitting())
    vocab = {token: number for number, token in enumerate(info.tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in info.get("merges") or []]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=splitting.ignore_merges))
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splitting.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.words))
    backend.pre_tokenizer = SEQUENCES.get(rule) or pre_tokenizers.Sequence(steps)
    if splitting.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(info: _Info) -> Tokenizer:
    """SentencePiece BPE with byte fallback (Llama 2, Mistral, Gemma): merges are recovered from the pieces and their scores."""
    scores = info.get("scores")
    if not scores or len(scores) != len(info.tokens):
        raise ModelError(f"{info.where}: the vocabulary is damaged: {len(info.tokens)} tokens, {len(scores or [])} scores")
    if info.architecture.startswith("gemma"):  # its scores do not follow the order of its merges, but the order of the pieces does
        scores = [-number for number in range(len(info.tokens))]
        # A run of spaces is stored as spaces, but text reaches the merges with each space already replaced.
        info.tokens = [token.replace(" ", SPACE) if token.isspace() and " " in token else token for token in info.tokens]
        info.types = [_NORMAL if set(token) == {SPACE} else kind for token, kind in zip(info.tokens, info.types, strict=True)]
    vocab = {token: number for number, token in enumerate(info.tokens)}
    unknown = info.special("unknown") or next(itertools.compress(info.tokens, (kind == _UNKNOWN for kind in info.types)), None)
    merges = _merges(vocab, scores, info.types)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(info.get("add_space_prefix", True))
    replace = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return backend


def _merges(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every way to make a piece from two others, best piece first: SentencePiece always joins the neighbours whose union scores highest."""
    found = []
    for token, number in vocab.items():
        if types[number] == _NORMAL:
            halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            found += [(scores[number], left, right) for left, right in halves if left in vocab and right in vocab]
    found.sort(key=lambda merge: (-merge[0], vocab[merge[1]], vocab[merge[2]]))
    return [(left, right) for _, left, right in found]


_BACKENDS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _add_tokens(backend: Tokenizer, info: _Info) -> None:
    """Control tokens are matched whole and skipped when decoding; user-defined ones are only matched whole."""
    pairs = list(zip(info.tokens, info.types, strict=True))
    named = {info.special(key) for key in ("bos", "eos", "unknown", "padding", "eot", "eom")} - {None}
    special = [token for token, kind in pairs if kind in (_CONTROL, _UNKNOWN) or token in named]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    plain = [token for token, kind in pairs if kind == _USER_DEFINED and token not in named]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])


def _wrap(backend: Tokenizer, info: _Info, add_bos: bool) -> "PreTrainedTokenizerFast":
    from jaxtune.convert.tokenizer import import_transformers

    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    specials: dict[str, Any] = {name: token for name, key in names.items() if (token := info.special(key)) is not None}
    bos = specials.get("bos_token")
    if add_bos and bos is not None:
        template = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=template)
        specials["add_bos_token"] = True
    tokenizer = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **specials
    )
    if template := info.metadata.get("tokenizer.chat_template"):
        named = {name: info.metadata.get(f"tokenizer.chat_template.{name}") for name in info.metadata.get("tokenizer.chat_templates", ())}
        tokenizer.chat_template = {"default": template} | named if named else template
    return tokenizer
