"""The optimisers and schedules against torch's and transformers' own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune.config import load_config
from jaxtune.optim import clip_by_global_norm, optimizer
from jaxtune.schedules import schedule

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

STEPS = 12


def config(**keys):
    return load_config({"model": "m", "method": "full"} | keys)


SCHEDULES = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5, "num_cycles": 0.7}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.3}),
    ("constant_with_warmup", {}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-6, "power": 2.0}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 20}),
    ("warmup_stable_decay", {"num_decay_steps": 30}),
    ("warmup_stable_decay", {"num_decay_steps": 30, "warmup_type": "cosine", "decay_type": "cosine", "min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 30, "warmup_type": "1-sqrt", "decay_type": "1-sqrt", "min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 30, "decay_type": "linear"}),
]
CASES = [("constant", {}, 0)] + [(name, kwargs, warmup) for name, kwargs in SCHEDULES for warmup in (0, 1, 7, 0.1, 60)]


@pytest.mark.parametrize(("name", "kwargs", "warmup"), CASES)
def test_every_schedule_is_transformers_at_every_step(name, kwargs, warmup):
    total, lr = 101, 2e-4
    ours = schedule(config(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=warmup, learning_rate=lr), total)
    args = transformers.TrainingArguments(output_dir="unused", warmup_steps=warmup, use_cpu=True)
    torch_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    theirs = transformers.get_scheduler(name, torch_optimizer, args.get_warmup_steps(total), total, kwargs)
    on_device = jax.jit(ours)
    for step in range(total + 1):
        want = torch_optimizer.param_groups[0]["lr"]
        assert ours(step) == pytest.approx(want, rel=1e-12, abs=1e-18)
        assert on_device(jnp.int32(step)) == np.float32(ours(step))
        torch_optimizer.step()
        theirs.step()


def gradients():
    rng = np.random.default_rng(0)
    # sizes from tiny to large, an exact zero, and a sign that flips: where eps and bias correction show
    scale = np.float32(10.0) ** rng.integers(-9, 3, (STEPS, 6, 10)).astype(np.float32)
    grads = rng.standard_normal((STEPS, 6, 10)).astype(np.float32) * scale
    grads[:, 0, 0] = 0
    return rng.standard_normal((6, 10)).astype(np.float32), grads


def run_ours(start, grads, **keys):
    keys = {"lr_scheduler_type": "constant", "learning_rate": 1e-2} | keys
    tx = optimizer(config(**keys), STEPS)
    params = {"layers": {"0": {"q": jnp.asarray(start)[None]}}}
    state, update = tx.init(params), jax.jit(tx.update)
    out = []
    for g in grads:
        updates, state = update({"layers": {"0": {"q": jnp.asarray(g)[None]}}}, state, params)
        params = optax.apply_updates(params, updates)
        out.append(np.asarray(params["layers"]["0"]["q"][0]))
    return np.stack(out)


def run_theirs(start, grads, make):
    parameter = torch.nn.Parameter(torch.tensor(start))
    torch_optimizer = make([parameter])
    out = []
    for g in grads:
        parameter.grad = torch.tensor(g)
        torch_optimizer.step()
        out.append(parameter.detach().numpy().copy())
    return np.stack(out)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("keys", "make"),
    [
        (
            {"optim": "adamw", "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
            lambda decay: lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay),
        ),
        ({"optim": "adamw"}, lambda decay: lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=decay)),
        ({"optim": "sgd"}, lambda decay: lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=decay)),
        (
            {"optim": "sgd", "optim_args": {"momentum": 0.9, "nesterov": True}},
            lambda decay: lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=decay, momentum=0.9, nesterov=True),
        ),
        (
            {"optim": "adafactor"},
            lambda decay: lambda p: transformers.Adafactor(p, lr=1e-2, weight_decay=decay, scale_parameter=False, relative_step=False),
        ),
    ],
)
def test_every_optimizer_is_torchs_step_by_step(keys, make, decay):
    start, grads = gradients()
    ours, theirs = run_ours(start, grads, weight_decay=decay, **keys), run_theirs(start, grads, make(decay))
    # float32 rounding of values near 1, over a dozen steps; sgd takes gradients of up to a thousand
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-6)


def test_muon_is_torchs_to_the_rounding_of_its_bfloat16():
    start, grads = gradients()
    grads = np.sign(grads) * np.abs(grads) ** 0.1  # a matrix of full rank: torch's bfloat16 loses the small singular values of others
    ours = run_ours(start, grads, optim="muon", weight_decay=0.1)
    theirs = run_theirs(start, grads, lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    moved = np.abs(theirs[-1] - start).max()
    np.testing.assert_allclose(ours, theirs, atol=0.03 * moved)


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_clipping_is_torchs(max_norm):
    _, grads = gradients()
    a, b = grads[0], grads[1][0]
    clipped, norm = clip_by_global_norm({"a": jnp.asarray(a), "b": jnp.asarray(b)}, max_norm)
    parameters = [torch.nn.Parameter(torch.zeros(x.shape)) for x in (a, b)]
    for parameter, x in zip(parameters, (a, b), strict=True):
        parameter.grad = torch.tensor(x)
    their_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    np.testing.assert_allclose(norm, their_norm.item(), rtol=1e-6)
    for ours, parameter in zip((clipped["a"], clipped["b"]), parameters, strict=True):
        np.testing.assert_allclose(ours, parameter.grad.numpy(), rtol=1e-6)


def test_loraplus_groups_are_pefts():
    """The rates that PEFT's LoRA+ gives a model with an adapted embedding and linear, against ours on the same adapter."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False
        )
    )
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    torch_optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-2, loraplus_lr_ratio=16)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [(names[id(p)], group["lr"]) for group in torch_optimizer.param_groups for p in group["params"]]
    theirs = {name.removeprefix("base_model.model.model."): rate for name, rate in groups}

    keys = {"model": "m", "optim": "sgd", "learning_rate": 1e-2, "loraplus_lr_ratio": 16.0, "lr_scheduler_type": "constant"}
    tx = optimizer(load_config(keys), 10)
    params = {
        "params": {
            "embed": {"a": jnp.ones((2, 8)), "b": jnp.ones((16, 2))},
            "layers/0/q": {"a": jnp.ones((1, 2, 8)), "b": jnp.ones((1, 8, 2))},
        }
    }
    updates = tx.update(params, tx.init(params), params)[0]["params"]
    rates = {key: -float(leaf.ravel()[0]) for key, leaf in jax.tree_util.tree_leaves_with_path(updates)}
    rates = {jax.tree_util.keystr(key, simple=True, separator="/"): rate for key, rate in rates.items()}
    for ours, theirs_name in [
        ("embed/a", "embed_tokens.lora_embedding_A.default"),
        ("embed/b", "embed_tokens.lora_embedding_B.default"),
        ("layers/0/q/a", "layers.0.self_attn.q_proj.lora_A.default.weight"),
        ("layers/0/q/b", "layers.0.self_attn.q_proj.lora_B.default.weight"),
    ]:
        assert rates[ours] == pytest.approx(theirs[theirs_name], rel=1e-6), ours


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("name", "make"), [("adamw_8bit", "AdamW8bit"), ("lion_8bit", "Lion8bit")])
def test_8_bit_optimizers_are_bitsandbytes(name, make, decay, monkeypatch):
    """All of bitsandbytes' step but the choice of a level: its CPU kernel (0.50.2) gives 2e-5 for a zero; on a GPU it is the nearest."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def nearest(full, code, absmax, out, blocksize):
        blocks = full.reshape(-1, blocksize)
        absmax.copy_(blocks.abs().max(1).values)
        codes = torch.bucketize((blocks / absmax[:, None].clamp(min=1e-38)).double(), (code[1:].double() + code[:-1].double()) / 2)
        out.copy_(codes.reshape(out.shape).to(torch.uint8))

    monkeypatch.setattr("bitsandbytes.backends.cpu.ops._quant_blockwise_fp32_direct", nearest)
    rng = np.random.default_rng(0)
    start = rng.standard_normal((64, 96)).astype(np.float32)
    grads = rng.standard_normal((STEPS, 64, 96)).astype(np.float32) * np.float32(10.0) ** rng.integers(-5, 1, (64, 96)).astype(np.float32)
    betas = {"adam_beta1": 0.9, "adam_beta2": 0.99}
    ours = run_ours(start, grads, optim=name, weight_decay=decay, **betas)
    theirs = run_theirs(start, grads, lambda p: getattr(bitsandbytes.optim, make)(p, lr=1e-2, betas=(0.9, 0.99), weight_decay=decay))
    # a number midway between two levels may go either way: a few of 6144 numbers, and then by less than a level
    apart = np.abs(ours - theirs)
    moved = np.abs(theirs - start).max()
    assert np.quantile(apart, 0.995) < 5e-6 * max(1, np.abs(theirs).max())
    assert apart.max() < 0.15 * moved
    plain = run_ours(start, grads, optim=name.removesuffix("_8bit"), weight_decay=decay, **betas)
    assert np.mean(np.abs(plain - theirs) > 1e-4) > 4 * max(np.mean(apart > 1e-4), 0.002)  # that it is the 8 bits that are compared


def test_the_levels_are_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    from jaxtune.moments import levels

    for signed in (True, False):
        np.testing.assert_allclose(levels(signed), functional.create_dynamic_map(signed), rtol=2e-7)
