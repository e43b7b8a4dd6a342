"""The other parameter-efficient methods: folders open in PEFT with the same logits, PEFT's open here, and training takes the same steps."""

import dataclasses
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft_library = pytest.importorskip("peft")
import references  # noqa: E402
import tiny  # noqa: E402
from methods import CASES, stir  # noqa: E402
from oracle.peft_logits import TOKENS, jitted, ours, theirs  # noqa: E402

from jaxtune import eva, loftq, optim, parallel, peft  # noqa: E402
from jaxtune.config import MeshConfig, load_config  # noqa: E402
from jaxtune.convert.load import load  # noqa: E402
from jaxtune.convert.peft import load_adapter, save_adapter  # noqa: E402
from jaxtune.data.batch import Batch  # noqa: E402
from jaxtune.model import quant  # noqa: E402
from jaxtune.objectives import OBJECTIVES  # noqa: E402
from jaxtune.step import init_state, make_step  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny.write(root / "llama", tiny.LLAMA, tiny.hf_tensors(tiny.LLAMA))
    for kind in ("gpt2", "gemma2"):
        golden = references.load(kind)
        tiny.write(root / kind, golden.config, {name: np.ascontiguousarray(tensor) for name, tensor in golden.tensors.items()})
    return {folder.name: folder for folder in root.iterdir()}


def _logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()[:, -TOKENS.shape[1] :]  # without the virtual tokens'


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_ours_opens_in_peft(folders, tmp_path, name):
    case = CASES[name]
    folder = folders[case.model]
    model = load(folder)
    adapter = stir(peft.init_adapter(jax.random.key(0), model, case.config()), model)
    save_adapter(adapter, model, tmp_path / "adapter")
    opened = peft_library.PeftModel.from_pretrained(theirs(folder), tmp_path / "adapter").eval()
    expected = _logits(opened)
    assert np.abs(expected - _logits(theirs(folder))).max() > 1e-2
    np.testing.assert_allclose(ours(folder, lambda _: adapter), expected, atol=1e-4)
    np.testing.assert_allclose(ours(folder, lambda model: load_adapter(tmp_path / "adapter", model)), expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_pefts_opens_here(folders, tmp_path, name):
    torch.manual_seed(0)
    case = CASES[name]
    folder = folders[case.model]
    made = peft_library.get_peft_model(theirs(folder), case.theirs(peft_library)).eval()
    with torch.no_grad():
        for parameter in (parameter for parameter in made.parameters() if parameter.requires_grad):
            parameter += 0.1 * torch.randn_like(parameter)
    made.save_pretrained(tmp_path / "adapter")
    expected = _logits(made)
    assert np.abs(expected - _logits(theirs(folder))).max() > 1e-2
    np.testing.assert_allclose(ours(folder, lambda model: load_adapter(tmp_path / "adapter", model)), expected, atol=1e-4)


TRAINED = {
    "ia3": ("IA3Config", {}, {}),
    "loha": ("LoHaConfig", {"r": 3, "target_modules": ["q_proj", "down_proj"]}, {}),
    "vera": ("VeraConfig", {"r": 6, "target_modules": ["q_proj", "down_proj"]}, {}),
    "adalora": ("AdaLoraConfig", {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 6,
                                  "target_modules": ["q_proj", "down_proj"]}, {"weight_decay": 0.1}),
    "oft": ("OFTConfig", {"oft_block_size": 4, "target_modules": ["q_proj"]}, {}),
}  # fmt: skip
STEPS, RATE = 6, 0.02


def _their_steps(folder, out, name, settings, weight_decay):
    """Losses of torch's AdamW over PEFT's adapter, which is saved first."""
    torch.manual_seed(0)
    made = peft_library.get_peft_model(theirs(folder), getattr(peft_library, name)(**settings, task_type="CAUSAL_LM")).train()
    with torch.no_grad():
        for parameter in (parameter for parameter in made.parameters() if parameter.requires_grad):
            parameter += 0.1 * torch.randn_like(parameter)
    made.save_pretrained(out)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=RATE, weight_decay=weight_decay)
    losses = []
    for step in range(STEPS):
        loss = made(torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss
        loss.backward()
        optimizer.step()
        if name == "AdaLoraConfig":
            made.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", TRAINED)
def test_steps_are_those_of_peft_and_torch(folders, tmp_path, method):
    name, settings, keys = TRAINED[method]
    wanted = _their_steps(folders["llama"], tmp_path / "a", name, settings, keys.get("weight_decay", 0.0))
    model = load(folders["llama"])
    adapter = load_adapter(tmp_path / "a", model)
    losses, trained = _our_steps(model, model.params, adapter, {"method": method, method: settings} | keys)
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    assert wanted[-1] < wanted[0] - 1e-2
    if method == "adalora":
        kept = [np.count_nonzero(trained.params[path]["e"]) for path in trained.params]
        assert sum(kept) == 2 * 6  # target_r for each of six matrices


def _our_steps(model, base, adapter, keys):
    """Losses of the same steps by the train step, and what was trained."""
    run = load_config({"model": "m", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0, "max_steps": STEPS} | keys)
    optimizer = optim.optimizer(run, STEPS)
    step = jax.jit(make_step(run, model.config, OBJECTIVES["sft"], optimizer))
    state = init_state(adapter, optimizer, 0)
    tokens = TOKENS.astype(np.int32)[None]
    batch = Batch.empty(tokens.shape)
    batch = dataclasses.replace(batch, tokens=tokens, weights=np.ones(tokens.shape, np.float32), segments=np.ones_like(tokens),
                                positions=np.broadcast_to(np.arange(tokens.shape[2], dtype=np.int32), tokens.shape))  # fmt: skip
    batch.weights[..., 0] = 0
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, base, batch)
        losses.append(float(metrics["loss"]))
    return losses, state.trainable


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_beginning_that_moves_the_base(folders, tmp_path, start):
    """The same losses as PEFT's; the result over the base as it was, in PEFT, has the logits of both."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": start}
    made = peft_library.get_peft_model(theirs(folders["llama"]), peft_library.LoraConfig(**settings, task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    wanted = []
    for _ in range(STEPS):
        loss = made(torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(float(loss.detach()))
    model = load(folders["llama"])
    run = load_config({"model": "m", "lora": settings})
    fresh = peft.METHODS["lora"].init(jax.random.key(0), model.config, model.params, run)
    base = peft.lora_init.residual_base(model.params, fresh)
    np.testing.assert_allclose(jitted(model.config, peft.compose(base, fresh), TOKENS), jitted(model.config, model.params, TOKENS),
                               atol=1e-4)  # fmt: skip
    losses, trained = _our_steps(model, base, fresh, {"lora": settings})
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    save_adapter(peft.lora_init.on_original_base(model.config, trained, fresh), model, tmp_path / "a")
    opened = peft_library.PeftModel.from_pretrained(theirs(folders["llama"]), tmp_path / "a").eval()
    np.testing.assert_allclose(_logits(opened), jitted(model.config, peft.compose(base, trained), TOKENS), atol=1e-4)
    np.testing.assert_allclose(_logits(opened), _logits(made.eval()), atol=2e-3)


@pytest.mark.parametrize("shape", [(48, 128), (128, 64)])
def test_loftq_is_pefts(shape):
    """PEFT's own function, which asks for CUDA, on a CPU; it leaves out the scale."""
    loftq_utils = pytest.importorskip("peft.utils.loftq_utils")
    pytest.importorskip("bitsandbytes")
    own = dict(vars(loftq_utils))
    exec(inspect.getsource(loftq_utils.loftq_init).replace('else "cuda"', 'else "cpu"'), own)  # noqa: S102
    w = np.random.default_rng(0).normal(0, 0.05, shape).astype(np.float32)
    theirs_q, their_a, their_b = (x.numpy() for x in own["loftq_init"](torch.tensor(w), 4, 8, 3))
    leaf, a, b = loftq.alternate(jnp.asarray(w), quant.quantize(w, "nf4"), "nf4", 8, 2.0, 3, "float32")
    np.testing.assert_allclose(leaf.dense(jnp.float32), theirs_q, atol=1e-6)
    np.testing.assert_allclose(2.0 * b @ a, their_b @ their_a, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_eva_is_pefts(folders):
    """Components and ranks; with twice as many directions as inputs have, both are exact."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 90, (3, 4, 30))
    trained = rng.random(tokens.shape) < 0.8
    trained[..., 0] = False
    settings = {"r": 9, "lora_alpha": 6, "target_modules": ["q_proj", "gate_proj", "down_proj"], "init_lora_weights": "eva"}
    own = peft_library.LoraConfig(**settings, eva_config=peft_library.EvaConfig(tau=0.8), task_type="CAUSAL_LM")
    made = peft_library.get_peft_model(theirs(folders["llama"]), own)
    batches = [{"input_ids": torch.tensor(t), "labels": torch.tensor(np.where(m, t, -100))} for t, m in zip(tokens, trained, strict=True)]
    peft_library.initialize_lora_eva_weights(made, batches, show_progress_bar=False)
    wanted = {name: x.detach().numpy() for name, x in made.named_parameters() if "lora_A" in name}
    model = load(folders["llama"])
    run = load_config({"model": "m", "lora": settings | {"eva_config": {"tau": 0.8}}})
    shape = tokens.shape[1:]

    def batch_at(step, *_):
        place, ones = step % 3, np.ones((1, *shape), np.int32)
        return Batch(tokens[place][None].astype(np.int32), trained[place][None].astype(np.float32), np.cumsum(ones, -1, np.int32) - 1, ones)

    fresh = peft.METHODS["lora"].init(jax.random.key(0), model.config, model.params, run)
    rows = types.SimpleNamespace(accumulation=1, batch_at=batch_at)
    found = eva.init(run, model, fresh, rows, parallel.make_mesh(MeshConfig(), jax.devices()[:1]))
    assert sum(rank for site in found.sites for rank in site.ranks) == 9 * 9
    config = made.peft_config["default"]
    assert dict(found.config.rank_pattern) == config.rank_pattern and len(set(config.rank_pattern.values())) > 2
    assert dict(found.config.alpha_pattern) == pytest.approx(config.alpha_pattern)
    rows_of = {"q": "self_attn.q_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj"}
    for site in found.sites:
        for layer, rank in enumerate(site.ranks):
            name = f"base_model.model.model.layers.{layer}.{rows_of[site.path.rpartition('/')[2]]}.lora_A.default.weight"
            a = np.asarray(found.params[site.path]["a"])[layer, :rank]
            np.testing.assert_allclose(np.abs((a * wanted[name]).sum(1)), 1.0, atol=2e-3)
