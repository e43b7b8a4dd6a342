"""The training step: one pure function for all methods, objectives and machines."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from jaxtune import in_backward
from jaxtune.errors import ConfigError
from jaxtune.kernels import attention_form
from jaxtune.model.attention import CPU_TILE, TILE
from jaxtune.model.nf4_kernel import choose_kernel
from jaxtune.objectives.answers import REFERENCE
from jaxtune.optim import clip_by_global_norm
from jaxtune.peft import compose, lora_init, penalty


class TrainState(struct.PyTreeNode):
    """Everything that changes in training: the step number, the trainable part, the optimiser's state, the PRNG key.

    `reference`, only with `sync_ref_model`: an earlier `trainable`, from which the reference model is composed.
    """

    step: jax.Array
    trainable: struct.PyTreeNode | dict
    opt_state: optax.OptState
    key: jax.Array
    reference: struct.PyTreeNode | dict | None = None


def init_state(trainable, optimizer: optax.GradientTransformation, seed: int, sync_ref_model: bool = False) -> TrainState:
    """The state before the first step."""
    reference = jax.tree.map(jnp.copy, trainable) if sync_ref_model else None
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), jax.random.key(seed), reference)


def with_reference(base: dict, state: TrainState) -> dict:
    """The base, with the reference model in it if that is another tree: one that moves, or the base as it was before an adapter was taken
    out of it."""
    if state.reference is not None:
        return base | {REFERENCE: compose(base, state.reference)}
    before = None if REFERENCE in base else lora_init.original_base(base)
    return base if before is None else base | {REFERENCE: before}


def _synchronised(config, reference, trainable, step: jax.Array):
    """Every `ref_model_sync_steps` steps `(1 - alpha) reference + alpha trainable` (TR-DPO, arXiv 2404.09656), otherwise unchanged."""
    alpha, due = config.ref_model_mixup_alpha, step % config.ref_model_sync_steps == 0
    return jax.tree.map(lambda old, new: jnp.where(due, (1 - alpha) * old + alpha * new, old).astype(old.dtype), reference, trainable)


def remat_of(config, platform: str) -> str:
    """What `gradient_checkpointing` means on a platform: a row of the table in model/stack.py."""
    # dots keeps products and attention: 1.3 times the speed for 2.7 GB where full takes 0.5
    auto = "dots" if platform == "cpu" and not config.optimizer_in_bwd else "full"
    own, meant = config.gradient_checkpointing, {True: "full", False: "none", "auto": auto}
    return meant[own] if own in meant else own


def how_to_compute(config, model_config, mesh: Mesh):
    """The model's config with the run's computation settings: the dtype, what the backward pass recomputes, how many tokens have logits at
    a time (on a CPU as many as its cache holds: 512 rows of 49152 logits take 3 times as long per row as 128)."""
    platform = mesh.devices.flat[0].platform
    chunk = config.logits_chunk_size or (128 if platform == "cpu" else 512)
    tile = CPU_TILE if platform == "cpu" else TILE
    kernel = choose_kernel(config.quantization_kernel, platform)
    how = dict(dtype=config.dtype, remat=remat_of(config, platform), logits_chunk=chunk, mlp_chunk=config.mlp_chunk_size)
    form = attention_form(config, model_config, mesh)
    return dataclasses.replace(model_config, **how, attention=form, attention_tile=tile, quantization_kernel=kernel)


def make_step(
    config, model_config, objective: Callable, optimizer: optax.GradientTransformation, axis_name: str | None = None,
    mesh: Mesh | None = None,
) -> Callable:
    """`step(state, base, batch) -> (state, metrics)`, to be jitted (or pmapped with `axis_name`); on `mesh`, activations are sharded by
    model/layout.py.

    `batch` has leading axes `[A, B, T]`. Sums of loss, gradient and weight over the A micro-batches (and devices) are divided once by the
    total weight, so A, B and the number of devices do not change the result. `metrics` are float32 scalars on the device. With
    `max_skipped_steps`, a step with a non-finite loss or gradient changes nothing but the step number.
    """
    model_config = dataclasses.replace(model_config, mesh=mesh)
    if config.optimizer_in_bwd and axis_name is not None:
        raise ConfigError("optimizer_in_bwd goes with a mesh, not with pmap; leave axis_name out, or the key.")
    if config.optimizer_in_bwd and model_config.is_given:
        given = f"layers of this {model_config.model_type} model are given what others make, whose gradient has to be kept"
        raise ConfigError(f"{given}; leave optimizer_in_bwd out.")

    def step(state: TrainState, base: dict, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), 2 * batch.tokens.shape[0])
        if axis_name is not None:  # each device draws its own dropout
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, jax.lax.axis_index(axis_name))

        def total(trainable, micro, key_pair):
            params = compose(base, trainable, key=key_pair[0])
            loss = objective(config, model_config, params, with_reference(base, state), micro, key_pair[1])
            return loss.total, loss

        def one(micro, key_pair):
            grads, loss = jax.grad(total, has_aux=True)(state.trainable, micro, key_pair)
            return jax.tree.map(lambda g: g.astype(jnp.float32), grads), loss

        xs, tokens = (batch, keys.reshape(-1, 2)), jnp.count_nonzero(batch.segments)
        if config.optimizer_in_bwd:
            micro = jax.tree.map(lambda x: x[0], xs)
            down, own = (lambda trainable: total(trainable, *micro)), 0.0
            trainable, opt_state, loss, grad_norm = in_backward.update(down, state.trainable, state.opt_state, optimizer)
        else:
            sums = _sum_over(one, xs)
            if axis_name is not None:
                sums, tokens = jax.lax.psum((sums, tokens), axis_name)
            grads, loss = sums
            grads = jax.tree.map(lambda g: g / loss.weight, grads)
            own, grads = _with_penalty(state.trainable, grads)
            grads, grad_norm = clip_by_global_norm(grads, config.max_grad_norm)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": loss.total / loss.weight + own, "grad_norm": grad_norm, "weight": loss.weight, "tokens": tokens}
        metrics |= {name: value / weight for name, (value, weight) in loss.metrics.items()}  # NaN if there was nothing to measure
        reference = None if state.reference is None else _synchronised(config, state.reference, trainable, state.step + 1)
        new = state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state, reference=reference)
        if config.max_skipped_steps:
            sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
            names = ("trainable", "opt_state", "reference")
            kept = {name: jax.tree.map(lambda *x: jnp.where(sound, *x), getattr(new, name), getattr(state, name)) for name in names}
            new = new.replace(**kept)
        return new, metrics

    return step


def _with_penalty(trainable, grads):
    """The method's own loss term (AdaLoRA's orthogonality), and the gradient including it."""
    if penalty(trainable) is None:
        return 0.0, grads
    own, more = jax.value_and_grad(penalty)(trainable)
    return own, jax.tree.map(jnp.add, grads, more)


def _sum_over(function: Callable, xs):
    """Sum of `function(*x)` over the leading axis, one at a time."""
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        return function(*jax.tree.map(lambda x: x[0], xs))
    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], xs))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(lambda sums, x: (jax.tree.map(jnp.add, sums, function(*x)), None), zeros, xs)
    return total


def make_eval_step(config, model_config, objective: Callable, mesh: Mesh | None = None) -> Callable:
    """`eval_step(trainable, base, batch [B, T]) -> Loss` of sums, without dropout or noise."""
    model_config = dataclasses.replace(model_config, mesh=mesh)

    def eval_step(trainable, base: dict, batch):
        return objective(config, model_config, compose(base, trainable), base, batch, None)

    return eval_step
