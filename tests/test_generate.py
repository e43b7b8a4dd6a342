import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxtune as jt
from jaxtune import errors, generate
from jaxtune.config import LoraConfig
from jaxtune.generation import batches, decode
from jaxtune.generation.sampling import Sampling
from jaxtune.model import decoder, quant

LENGTHS = (9, 1, 30, 17, 4)
NEW = 40  # the same nearly everywhere, so that the tests share their programs
_forward = jax.jit(decoder.forward, static_argnums=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "model"
    tiny.write_chat_model(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    """A tiny chat model whose generation config names no stop token, so that its (random) text continues to the end."""
    return dataclasses.replace(jt.load(folder), generation_config={}, hf_config={})


@pytest.fixture
def endless(monkeypatch):
    monkeypatch.setattr(generate, "stop_tokens", lambda model: set())


def _prompts(model, lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, model.config.vocab_size, length).tolist() for length in lengths]


def _uncached(config, params, prompt, new):
    """Greedy tokens by running the whole text through the model again for each."""
    tokens = list(prompt)
    for _ in range(new):
        row = np.asarray([tokens + [0] * (80 - len(tokens))], np.int32)
        tokens.append(int(_forward(config, params, row)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def _tokens(*args, max_new_tokens=NEW, **settings):
    return [completion.tokens for completion in generate.generate_tokens(*args, max_new_tokens=max_new_tokens, **settings)]


# ---- what is generated ----


@pytest.mark.parametrize("least_slots", [1, 256])
def test_greedy_is_the_argmax_of_the_whole_text(model, endless, monkeypatch, least_slots):
    monkeypatch.setattr(batches, "LEAST_SLOTS", least_slots)  # 1: the cache grows on the way
    expected = [_uncached(model.config, model.params, prompt, NEW) for prompt in _prompts(model)]
    assert _tokens(model, _prompts(model)) == expected


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_greedy_with_packed_weights(model, folder, endless, kind):
    packed = jt.load(folder, quantization=kind)
    assert any(isinstance(leaf, (quant.NF4, quant.Int8)) for leaf in packed.params["layers"]["0"].values())
    expected = [_uncached(packed.config, packed.params, prompt, 12) for prompt in _prompts(model)]
    assert [tokens[:12] for tokens in _tokens(packed, _prompts(model))] == expected


def test_an_adapter_is_composed(model, endless, tmp_path):
    with jax.enable_x64(True):
        adapter = jt.init_adapter(jax.random.key(0), model, LoraConfig(r=4, lora_alpha=8))
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {np.dtype("float32")}
    assert _tokens(model, _prompts(model), adapter) == _tokens(model, _prompts(model))  # fresh: changes nothing
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    merged = dataclasses.replace(model, params=jt.merge(model.params, adapter))
    tuned = _tokens(model, _prompts(model), adapter)
    assert tuned == _tokens(merged, _prompts(model)) != _tokens(model, _prompts(model))
    jt.save_adapter(adapter, model, tmp_path / "adapter")
    assert _tokens(model, _prompts(model), tmp_path / "adapter") == tuned


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_batch(model, endless, temperature):
    settings = dict(temperature=temperature, seed=3)
    together = _tokens(model, _prompts(model), **settings)
    assert _tokens(model, _prompts(model), batch_size=2, **settings) == together
    assert _tokens(model, _prompts(model)[:4], batch_size=2, **settings) == together[:4]


def test_samples_depend_on_seed_and_number_only(model, endless):
    prompts = [_prompts(model)[0]] * 2
    one = _tokens(model, prompts, temperature=1.0)
    three = _tokens(model, prompts, temperature=1.0, num_return_sequences=3)
    assert len(three) == 6 and len(set(map(tuple, three))) == 6
    assert [three[0], three[3]] == one
    assert _tokens(model, prompts, temperature=1.0, num_return_sequences=3) == three
    assert _tokens(model, prompts, temperature=1.0, seed=1) != one
    completions = generate.generate_tokens(model, prompts, temperature=1.0, num_return_sequences=3)
    assert [completion.prompt for completion in completions] == [0, 0, 0, 1, 1, 1]


def test_top_k_of_one_is_greedy_at_any_temperature(model, endless):
    assert _tokens(model, _prompts(model), temperature=5.0, top_k=1) == _tokens(model, _prompts(model))


def test_repetition_penalty_reaches_prompt_and_answer(model, endless):
    prompts = _prompts(model)

    def distinct(**settings):
        return [len(set(tokens) - set(prompt)) for prompt, tokens in zip(prompts, _tokens(model, prompts, **settings), strict=True)]

    assert distinct(repetition_penalty=1e6) == [NEW] * len(LENGTHS)
    assert min(distinct()) < NEW


# ---- where it ends ----


@pytest.mark.parametrize("form", [int, lambda token: [3, int(token)]])
def test_a_stop_token_of_the_generation_config_ends_a_row(model, endless, monkeypatch, form):
    prompts = _prompts(model)
    free = _tokens(model, prompts)
    stop = free[0][12]
    first = [row.index(stop) + 1 if stop in row else None for row in free]
    assert first[0] is not None and None in first
    monkeypatch.undo()
    ending = dataclasses.replace(model, generation_config={"eos_token_id": form(stop)})
    ours = generate.stop_tokens(model)
    for completion, row, end in zip(generate.generate_tokens(ending, prompts, max_new_tokens=NEW), free, first, strict=True):
        assert not ours & set(row)
        assert completion.tokens == row[:end]
        assert completion.finish_reason == ("length" if end is None else "stop")
        assert completion.text == model.tokenizer.decode(row if end is None else row[: end - 1], skip_special_tokens=True)


def test_the_loop_ends_with_its_last_row(model, monkeypatch):
    prompts = _prompts(model)
    free = _tokens(model, prompts)
    states = []
    monkeypatch.setattr(batches, "decode", lambda *args: states.append(decode.decode(*args)) or states[-1])
    monkeypatch.setattr(generate, "stop_tokens", lambda model: {row[4] for row in free})
    completions = generate.generate_tokens(model, prompts, max_new_tokens=NEW)
    assert len(states) == 1  # one call, without host communication in between
    assert int(states[0].step) == max(len(completion.tokens) for completion in completions) <= 5


def test_one_token_needs_no_loop(model, endless, monkeypatch):
    expected = [tokens[:1] for tokens in _tokens(model, _prompts(model))]
    monkeypatch.setattr(batches, "decode", None)
    assert _tokens(model, _prompts(model), max_new_tokens=1) == expected


def test_stop_strings(model, endless):
    prompts = _prompts(model)
    free = generate.generate_tokens(model, prompts, max_new_tokens=NEW)
    stop = free[0].text[5:8]
    for completion, whole in zip(generate.generate_tokens(model, prompts, max_new_tokens=NEW, stop=stop), free, strict=True):
        assert completion.text == whole.text.split(stop)[0]
        assert completion.finish_reason == ("stop" if stop in whole.text else "length")
        assert completion.tokens == whole.tokens[: len(completion.tokens)]
    assert generate.generate(model, prompts, max_new_tokens=NEW, stop=[stop, "no such text"])[0] == free[0].text.split(stop)[0]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9}])
def test_logits_that_are_not_numbers_are_an_error(model, settings):
    broken = model.params | {"norm": model.params["norm"].at[3].set(jnp.nan)}
    with pytest.raises(errors.ModelError, match="token 1 of the answer to prompt 3 has logits that are not numbers .* float32 overflows"):
        generate.generate(dataclasses.replace(model, params=broken), _prompts(model), max_new_tokens=NEW, **settings)


# ---- streaming ----


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_pieces_are_the_text(model, endless, temperature):
    pieces: dict[int, list[str]] = {}
    settings = dict(max_new_tokens=NEW, temperature=temperature)

    def show(row, text):
        pieces.setdefault(row, []).append(text)

    completions = generate.generate_tokens(model, _prompts(model), stream=show, **settings)
    assert ["".join(pieces[row]) for row in range(len(completions))] == [completion.text for completion in completions]
    assert min(map(len, pieces.values())) > 3
    assert [completion.tokens for completion in completions] == _tokens(model, _prompts(model), **settings)


# ---- what it costs ----


def test_few_programs_are_compiled(model, endless):
    decode.decode.clear_cache()
    decode.prefill.clear_cache()
    _tokens(model, _prompts(model, range(1, 17)), batch_size=4)
    _tokens(model, _prompts(model, range(1, 17)), batch_size=4, temperature=0.7, top_p=0.9)
    _tokens(model, _prompts(model, range(1, 17)), batch_size=4, temperature=0.9, top_p=0.8, stop="x")
    assert (decode.prefill._cache_size(), decode.decode._cache_size()) == (2, 2)  # greedy, and drawn


def test_prompts_are_padded_by_a_quarter_at_most():
    assert [batches.length(n) for n in (1, 16, 17, 57, 142, 257, 1000)] == [16, 16, 20, 64, 160, 320, 1024]


def test_the_cache_is_updated_in_place(model):
    rows = decode.Rows(np.full(4, 16, np.int32), jax.random.split(jax.random.key(0), 4), np.asarray([2], np.int32))
    prompts = np.zeros((4, 16), np.int32)
    state = jax.eval_shape(lambda: decode.with_slots(decode.prefill(model.config, model.params, Sampling(), rows, prompts, 4000), 4000))
    cache = sum(x.size * 4 for x in jax.tree.leaves(state.cache.memory))
    memory = decode.decode.lower(model.config, model.params, Sampling(), rows, state, 4000).compile().memory_analysis()
    assert memory.alias_size_in_bytes > cache and memory.temp_size_in_bytes < cache / 2  # a layer's slice, not a second cache


def test_prompts_that_answers_share_are_read_once(model, monkeypatch):
    """Answers equal those of separate rows; the program reads as many prompts as there are."""
    read = []
    prefill = batches.prefill
    monkeypatch.setattr(batches, "prefill", lambda *args: read.append(args[4].shape[0]) or prefill(*args))
    settings = {"max_new_tokens": 6, "temperature": 1.0, "repetition_penalty": 1.3, "chat": False, "num_return_sequences": 3, "seed": 4}
    together = generate.generate_tokens(model, ["one two", "the quick brown fox"], **settings)
    assert read == [2] and len({tuple(answer.tokens) for answer in together}) > 2
    assert [answer.tokens for answer in together] == [
        answer.tokens for answer in generate.generate_tokens(model, ["one two", "the quick brown fox"], **settings, batch_size=1)
    ]


def test_batches_fit_their_memory(model):
    assert batches.fitting_rows(model.config, 20, 64)[0] == 64
    large = dataclasses.replace(model.config, num_layers=32, num_kv_heads=8, num_heads=32, head_dim=128, dtype="bfloat16")
    assert batches.fitting_rows(large, 1000, 1000)[0] == 2**30 // (2 * 32 * 8 * 128 * 2 * 2024 + 2 * 4 * 32 * 1024 * 1024)
    assert batches.fitting_rows(large, 100_000, 1000)[0] == 1


# ---- what may be given ----


def test_the_module_is_the_verb(model):
    conversation = [{"role": "user", "content": "hello"}]
    texts = jt.generate(model, ["hello", conversation, generate.token_ids(model, "hello", "prompt")], max_new_tokens=8)
    assert texts == jt.generate(model, "hello", max_new_tokens=8) * 3  # a single prompt need not be in a list
    assert jt.generate(model, conversation, max_new_tokens=8) == texts[:1]
    assert jt.generate(model, "hello", chat=False, max_new_tokens=8) != texts[:1]
    assert jt.generate(model, []) == []
    assert jt.generate_tokens is generate.generate_tokens


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be 1 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_return_sequences": 2}, "temperature 0 repeats the same answer"),
        ({"stop": ["a", ""]}, "stop holds an empty string"),
        ({"temperature": -1}, "temperature is -1"),
    ],
)
def test_settings_out_of_range(model, settings, message):
    with pytest.raises(errors.ConfigError, match=message):
        generate.generate(model, ["hello"], **settings)


def test_a_prompt_longer_than_the_model_goes(model):
    with pytest.raises(errors.DataError, match="prompt 2 of 2 has 250 tokens, and 64 more .* is 256; use max_new_tokens=6 or less"):
        generate.generate(model, [[5], [5] * 250])
    with pytest.raises(errors.DataError, match="prompt 1 of 1 has 300 tokens.*use a prompt of fewer than 256 tokens"):
        generate.generate(model, [[5] * 300])
    assert len(_tokens(model, [[5] * 250], max_new_tokens=6)[0]) <= 6


def test_a_model_without_a_tokenizer(model):
    with pytest.raises(errors.ModelError, match="has no tokenizer"):
        generate.generate(dataclasses.replace(model, tokenizer=None), [[5]])


# ---- the command ----


def _command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["jaxtune generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        errors.run(generate.main)
    return ended.value.code, *capsys.readouterr()


def test_one_prompt_is_streamed(monkeypatch, capsys, folder, model):
    code, out, err = _command(monkeypatch, capsys, folder, "--prompt", "hello", "--max-new-tokens", 20)
    assert code == 0 and out == jt.generate(model, "hello", max_new_tokens=20)[0] + "\n"
    assert "20 tokens in" in err


def test_json_of_a_file_of_prompts(monkeypatch, capsys, folder, model, tmp_path):
    turns = [{"role": "user", "content": "two"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [{"prompt": "one"}, {"prompt": turns}, {"messages": turns}])))
    code, out, _ = _command(
        monkeypatch, capsys, folder, "--prompt", "zero", "--prompts", tmp_path / "p.jsonl", "--system", "Be brief.", "--max-new-tokens", 9,
        "--json", "--temperature", 0.8, "--seed", 5,
    )  # fmt: skip
    found = json.loads(out)["completions"]
    system = {"role": "system", "content": "Be brief."}
    asked = [[system, {"role": "user", "content": text}] for text in ("zero", "one", "two", "two")]
    assert code == 0 and [completion["prompt"] for completion in found] == asked
    assert [completion["text"] for completion in found] == jt.generate(model, asked, max_new_tokens=9, temperature=0.8, seed=5)
    assert all(completion["finish_reason"] == "length" and len(completion["tokens"]) == 9 for completion in found)


def test_several_prompts_and_no_chat(monkeypatch, capsys, folder, model):
    arguments = ("--prompt", "one", "--prompt", "two", "--no-chat", "--max-new-tokens", 9, "--quantization", "int8", "--stop", "zzz")
    code, out, _ = _command(monkeypatch, capsys, folder, *arguments)
    texts = jt.generate(jt.load(folder, quantization="int8"), ["one", "two"], chat=False, max_new_tokens=9)
    assert code == 0 and out == f"--- 1 of 2 (length)\n{texts[0]}\n--- 2 of 2 (length)\n{texts[1]}\n"


def test_an_adapter_folder(monkeypatch, capsys, folder, model, tmp_path):
    adapter = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), jt.init_adapter(jax.random.key(0), model, LoraConfig(r=4)))
    jt.save_adapter(adapter, model, tmp_path / "adapter")
    code, out, _ = _command(monkeypatch, capsys, folder, "--adapter", tmp_path / "adapter", "--prompt", "hello", "--max-new-tokens", 20)
    assert code == 0 and out == jt.generate(model, "hello", adapter, max_new_tokens=20)[0] + "\n"
    assert out != jt.generate(model, "hello", max_new_tokens=20)[0] + "\n"


def test_each_prompt_by_its_own_adapter(monkeypatch, capsys, folder, model, tmp_path):
    for seed, name in enumerate(("a", "b")):
        adapter = jt.init_adapter(jax.random.key(seed), model, LoraConfig(r=2, target_modules="q_proj v_proj".split()))
        jt.save_adapter(jax.tree.map(lambda leaf: leaf + 0.5, adapter), model, tmp_path / name)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "hello", "adapter": {"a": 0.5, "b": 0.5}}))
    given = (folder, "--adapter", f"a={tmp_path / 'a'}", "--adapter", f"b={tmp_path / 'b'}", "--max-new-tokens", 9)
    asked = [word for use in ("a", "b", "base") for word in ("--prompt", "hello", "--use", use)]
    code, out, _ = _command(monkeypatch, capsys, *given, *asked, "--prompts", tmp_path / "p.jsonl", "--json")
    found = json.loads(out)["completions"]
    adapters = {name: jt.load_adapter(tmp_path / name, model) for name in "ab"}
    choices = ["a", "b", None, {"a": 0.5, "b": 0.5}]
    texts = jt.generate(model, ["hello"] * 4, jt.mix(adapters, choices), max_new_tokens=9)
    assert code == 0 and [one["text"] for one in found] == texts and len(set(texts)) == 4
    assert [one["adapter"] for one in found] == ["a", "b", "base", choices[3]]
    wrong = [
        (("--prompt", "x"), "prompt 1 of 1 names none of the adapters a, b"),
        (("--prompt", "x", "--use", "c"), "prompt 1 asks for adapter 'c'; there are a, b"),
        (("--prompt", "x", "--use", "a=much"), "--use 'a=much' is neither a name nor weights"),
        (("--prompt", "x", "--adapter", f"a={tmp_path / 'a'}", "--use", "a"), "3 adapters need as many names"),
        ((*asked, "--prompt", "y"), "--use is given 3 times for 4 --prompt"),
    ]
    for arguments, message in wrong:
        code, _, err = _command(monkeypatch, capsys, *given, *arguments)
        assert code == 2 and message in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "there are no prompts; give --prompt TEXT or --prompts FILE"),
        (("--prompt", ""), "prompt 1 of 1 is empty"),
        (("--prompt", "a", "--adapter", "no/such/folder"), "no/such/folder"),
        (("--prompt", "a", "--max-new-tokens", "300"), "max_position_embeddings is 256"),
        (("--prompt", "a", "--dtype", "float31"), "float31"),
        (("--prompt", "a", "--system", "b", "--no-chat"), "--system needs the chat template"),
        (("--prompts", "missing.jsonl"), "missing.jsonl: no such file"),
    ],
)
def test_mistakes_are_one_clear_line(monkeypatch, capsys, folder, arguments, message):
    code, out, err = _command(monkeypatch, capsys, folder, *arguments)
    assert code == 2 and message in err and "Traceback" not in err and out == ""


def test_two_system_turns_are_refused(monkeypatch, capsys, folder, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}))
    code, _, err = _command(monkeypatch, capsys, folder, "--prompts", tmp_path / "p.jsonl", "--system", "b")
    assert code == 2 and "prompt 1 of 1 has its own system turn" in err


def test_a_row_without_a_prompt_is_named(monkeypatch, capsys, folder, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"question": "two"}\n')
    code, _, err = _command(monkeypatch, capsys, folder, "--prompts", tmp_path / "p.jsonl")
    assert code == 2 and "p.jsonl, line 2: has no prompt" in err and "it has question" in err


def test_a_model_without_a_template(monkeypatch, capsys, folder, tmp_path):
    tokenizer = tiny.write_chat_model(tmp_path / "base")
    tokenizer.chat_template = None
    for file in (tmp_path / "base").glob("chat_template*"):
        file.unlink()
    tokenizer.save_pretrained(tmp_path / "base")
    code, _, err = _command(monkeypatch, capsys, tmp_path / "base", "--prompt", "a", "--system", "b")
    assert code == 2 and "has no chat template" in err and "--no-chat" in err
    assert _command(monkeypatch, capsys, tmp_path / "base", "--prompt", "a", "--max-new-tokens", 4)[0] == 0


def test_python_m_jaxtune_generate(folder):
    command = [sys.executable, "-m", "jaxtune.generate", str(folder), "--prompt", "hello", "--max-new-tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("\n") and "4 tokens in" in done.stderr
