"""Scoring heads of every family, both ways: transformers' classifiers score alike here, and ours there."""

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification  # noqa: E402

import jaxtune as jt  # noqa: E402
from jaxtune.model.families import FAMILIES, heads  # noqa: E402
from jaxtune.score import _batch, _scores  # noqa: E402

_source = importlib.util.spec_from_file_location("make_goldens", Path(__file__).parents[2] / "tools" / "make_goldens.py")
oracle = importlib.util.module_from_spec(_source)
_source.loader.exec_module(oracle)
CASES = {config["model_type"]: case for case, config in reversed(oracle.CASES.items())}
AUTO = {heads.SEQUENCE: AutoModelForSequenceClassification, heads.TOKEN: AutoModelForTokenClassification}
PAD = 0
# of unequal lengths; the last one ends in the padding token, which transformers does not count
TEXTS = [np.random.default_rng(n).integers(1, 96, n).tolist() for n in (13, 9)] + [[7, 5, 0, 44, 31, PAD, PAD]]


def make(model_type, of, labels):
    """A random classifier of transformers whose switches all show."""
    config = AutoConfig.for_model(**oracle.CASES[CASES[model_type]] | {"pad_token_id": PAD}, num_labels=labels)
    torch.manual_seed(3)
    model = AUTO[of].from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(12.0 if ".mlp." in name else 4.0) if p.ndim > 1 else p.add_(0.2 * torch.randn(p.shape))
    return model


def theirs(model, side):
    """Logits of the texts in one padded batch, `[n, labels]` or, token by token, `[tokens, labels]` of each."""
    width = max(map(len, TEXTS)) + 1
    tokens, mask = torch.full((len(TEXTS), width), PAD), torch.zeros(len(TEXTS), width, dtype=torch.long)
    for row, text in enumerate(TEXTS):
        place = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        tokens[row, place], mask[row, place] = torch.tensor(text), 1
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    return logits.numpy() if logits.ndim == 2 else [row[kept == 1].numpy() for row, kept in zip(logits, mask, strict=True)]


def ours(model, of):
    """The same by jaxtune."""
    whole = of == heads.SEQUENCE
    rows = [(text, [slice(0, len(text))] if whole else [slice(n, n + 1) for n in range(len(text))]) for text in TEXTS]
    scores = np.asarray(_scores(model.config, model.params, _batch(rows, len(rows), 16)))
    return scores[:, 0] if whole else [row[: len(text)] for row, text in zip(scores, TEXTS, strict=True)]


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


# one of each layout of names and blocks; the last three call the head differently
KINDS = [(name, heads.SEQUENCE) for name in ("llama", "mixtral", "gemma3_text", "phi3", "gpt2", "gpt_neox")]
KINDS += [(name, heads.TOKEN) for name in ("llama", *heads.CLASSIFIERS)]


@pytest.mark.parametrize(("model_type", "of"), KINDS)
def test_scores_are_transformers_both_ways(tmp_path, model_type, of):
    model = make(model_type, of, 3 if of == heads.TOKEN else 1)
    model.save_pretrained(tmp_path / "theirs")
    loaded = jt.load(tmp_path / "theirs")
    assert (loaded.config.num_labels, loaded.config.labels_of, loaded.config.pad_token_id) == (model.config.num_labels, of, PAD)
    found = ours(loaded, of)
    assert max(np.std(np.asarray(one)) for one in ([found] if of == heads.SEQUENCE else found)) > 0.03
    for side in ("right", "left"):
        assert_same(found, theirs(model, side))
    jt.save(loaded.config, loaded.params, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = AUTO[of].from_pretrained(tmp_path / "ours", dtype=torch.float32, attn_implementation="eager").eval()
    assert type(opened).__name__ == heads.class_name(loaded.config, of) == type(model).__name__
    assert_same(theirs(opened, "right"), theirs(model, "right"))


def test_every_family_says_which_classes_transformers_has():
    from transformers.models.auto import modeling_auto

    known = {
        heads.SEQUENCE: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        heads.TOKEN: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    }
    assert heads.CLASSES.keys() == FAMILIES.keys()
    language = {**modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    for model_type, (start, kinds) in heads.CLASSES.items():
        assert {of: f"{start}{heads.SUFFIX[of]}" for of in kinds} == {
            of: names[model_type] for of, names in known.items() if model_type in names
        }
        assert heads.language_class(model_type) == language[model_type]
