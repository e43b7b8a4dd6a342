"""Answers drawn from the policy, judged, and laid out as the batch of a step (grpo, rloo).

What a rollout holds is a pure function of the config, the seed, the step and the weights of that step, so that a resumed run draws what
the stopped one would have drawn. Where several steps learn from one rollout, it is kept in `rollouts/` until no checkpoint needs it.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtune import data, parallel
from jaxtune.config import Config
from jaxtune.convert.load import Model
from jaxtune.data.asked import Prompts, require_room
from jaxtune.disk import replacing, write_text
from jaxtune.errors import CheckpointError, ConfigError
from jaxtune.generation.answer import Answer, Reader
from jaxtune.generation.batches import Row, Run
from jaxtune.generation.prompts import stop_tokens
from jaxtune.generation.sampling import Sampling
from jaxtune.objectives.advantages import ADVANTAGES, spread
from jaxtune.objectives.grpo import has_kl_term, logps_of, reference_logps_of
from jaxtune.peft import compose
from jaxtune.rewards import Answers, Reward
from jaxtune.step import TrainState, with_reference


class Rollouts:
    """The rollouts of one run: `batch_at(step, state, base)` in place of a source's `batch_at(step)`."""

    def __init__(self, config: Config, model: Model, mesh: Mesh, rows: data.Data, rewards: Sequence[Reward], folder: Path, steps: int):
        self.config, self.mesh, self.folder, self.total = config, mesh, folder, steps
        self.model, self.rewards = model, rewards
        self.train: Prompts = rows.train  # type: ignore[assignment]
        self.eval: Prompts | None = rows.eval  # type: ignore[assignment]
        self.reader = Reader(model.tokenizer, frozenset(stop_tokens(model)))
        numbers = (config.temperature, config.top_k, config.top_p, config.min_p or 0.0, config.repetition_penalty)
        self.sampling = Sampling.create(*numbers)
        self.score = _scorer(config, dataclasses.replace(model.config, mesh=mesh), mesh, self.train.layout.reference)
        self._writing = False  # whether this process has begun to write completions.jsonl
        self._current: tuple[int, data.Batch, dict[str, float]] | None = None  # rollout, its rows, what is said of it

    # ---- training ----

    def batch_at(self, step: int, state: TrainState, base: dict) -> tuple[data.Batch, dict[str, float]]:
        """The batch of step `step` (from 0), and what its rollout measured where this step drew it."""
        number, place = divmod(step, self.train.repeats)
        if self._current is None or self._current[0] != number:
            kept = self.folder / "rollouts" / f"{number:08d}.npz"
            batch, told = self._draw(number, step, state, base) if place == 0 else _read(kept)
            if place == 0 and self.train.repeats > 1:
                _write(kept, batch, told)
            self._current = (number, batch, told)
        _, batch, told = self._current  # type: ignore[misc]
        slice_ = place % self.train.layout.slices
        return jax.tree.map(lambda x: x[slice_], batch), told if place == 0 else {}

    def forget(self, oldest: int) -> None:
        """Remove rollouts that no step from `oldest` (from 0) on needs."""
        for file in (self.folder / "rollouts").glob("*.npz"):
            if int(file.stem) < oldest // self.train.repeats:
                file.unlink()

    def _draw(self, number: int, step: int, state: TrainState, base: dict) -> tuple[data.Batch, dict[str, float]]:
        config, layout, prompts = self.config, self.train.layout, self.train.prompts_at(number)
        answers, ended = self._answers(self.train, prompts, (config.seed, 0, number), state, base)
        judged, rewards_NF, told = self._judge(self.train, prompts, answers, step)
        trained = ended if config.mask_truncated_completions else np.ones(len(answers), bool)
        ids = [self.train.ids(prompt) for prompt in prompts]
        tokens = [answer.tokens for answer in answers]
        batch = layout.batches(ids, tokens, np.zeros(len(answers)), trained, self.train.longest_prompt)
        kl_N = None
        if layout.old:
            batch, kl_N = self._scored(batch, len(answers), state, base)
        weights = np.array([reward.weight for reward in self.rewards])
        found = ADVANTAGES[config.objective](config, rewards_NF, weights, layout.answers, kl_N)
        batch.answers.values[:] = _like(found.advantages, batch.answers.values, layout.together)
        told |= _measured(self.rewards, rewards_NF, found) | _lengths(answers, ended)
        if kl_N is not None and config.objective == "rloo":
            told["kl"] = float(kl_N.sum() / max(sum(len(t) for t, there in zip(tokens, trained, strict=True) if there), 1))
        if config.log_completions:
            self._write_completions(step, judged, rewards_NF, found.advantages)
        return batch, told

    def _scored(self, batch: data.Batch, count: int, state: TrainState, base: dict) -> tuple[data.Batch, np.ndarray | None]:
        """The batch with log-probabilities by the policy and the reference, and how far apart they are on each answer."""
        base, found = with_reference(base, state), []
        for number in range(self.train.layout.slices):
            one = parallel.put(jax.tree.map(lambda x: x[number], batch), self.mesh)  # noqa: B023
            found.append(jax.device_get(self.score(state.trainable, base, one)))
        old, ref = (None if found[0][n] is None else np.stack([one[n] for one in found]) for n in range(2))
        kept = ref if has_kl_term(self.config) else None
        batch = batch.replace(rollout=dataclasses.replace(batch.rollout, old_logps=old, ref_logps=kept))
        if ref is None:
            return batch, None
        apart = (old - ref) * (batch.weights != 0)
        own = batch.answers.numbers[..., None, :] == np.arange(1, self.train.layout.together + 1)[:, None]
        return batch, (apart[..., None, :] * own).sum(-1).reshape(-1)[:count].astype(np.float64)

    # ---- evaluation ----

    def evaluate(self, state: TrainState, base: dict) -> dict[str, float]:
        """`eval_reward` and what else is measured, over the prompts of `data.eval`; the same draws at every evaluation."""
        assert self.eval is not None
        layout, step, prompts = self.eval.layout, int(state.step), list(range(len(self.eval.asked)))
        answers, ended = self._answers(self.eval, prompts, (self.config.seed, 1, 0), state, base)
        _, rewards_NF, told = self._judge(self.eval, prompts, answers, step)
        weights = np.array([reward.weight for reward in self.rewards])
        found = ADVANTAGES["grpo"](self.config, rewards_NF, weights, layout.answers)
        told |= _measured(self.rewards, rewards_NF, found) | _lengths(answers, ended)
        return {f"eval_{name}": value for name, value in told.items()}

    # ---- drawing and judging ----

    def _answers(
        self, source: Prompts, prompts: list[int], seed: tuple[int, ...], state: TrainState, base: dict
    ) -> tuple[list[Answer], np.ndarray]:
        """The answers to every prompt, side by side, and whether they came to an end of their own."""
        each = source.layout.answers
        words = np.random.SeedSequence(seed).generate_state(2, np.uint32)
        run = Run(
            config=dataclasses.replace(self.model.config, remat="none"),
            params=compose(base, state.trainable),
            adapter=None,
            sampling=self.sampling,
            key=jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32"),
            stops=jnp.asarray(sorted(self.reader.stop_tokens), jnp.int32),
            new=source.layout.most,
            watched=False,
            mesh=self.mesh,
        )
        rows = [
            Row(place, sample, source.ids(prompt), Answer(self.reader)) for place, prompt in enumerate(prompts) for sample in range(each)
        ]
        run.all(rows)
        return [row.answer for row in rows], np.array([row.answer.finish_reason == "stop" for row in rows])

    def _judge(
        self, source: Prompts, prompts: list[int], answers: list[Answer], step: int
    ) -> tuple[Answers, np.ndarray, dict[str, float]]:
        """What was judged, the rewards `[answers, rewards]`, and what reward functions told of themselves."""
        places = [prompt for prompt in prompts for _ in range(source.layout.answers)]
        asked, texts = [source.asked[place] for place in places], [answer.text for answer in answers]
        chat = [isinstance(prompt, list) for prompt in asked]
        judged = Answers(
            prompts=asked,
            completions=[[{"role": "assistant", "content": t}] if turns else t for t, turns in zip(texts, chat, strict=True)],
            texts=texts,
            completion_ids=[answer.tokens for answer in answers],
            columns={name: [source.fields[place][name] for place in places] for name in source.fields[places[0]]},
            step=step,
            max_steps=self.total,
        )
        told: dict[str, list[float]] = {}
        rewards = np.stack([reward.judge(judged, told, {}) for reward in self.rewards], axis=1)
        return judged, rewards, {name: float(np.mean(values)) for name, values in told.items()}

    def _write_completions(self, step: int, judged: Answers, rewards_NF: np.ndarray, advantages: np.ndarray) -> None:
        file = self.folder / "completions.jsonl"
        if not self._writing and file.exists():  # of steps that are taken again
            kept = [line for line in file.read_text(encoding="utf-8").splitlines(True) if json.loads(line)["step"] <= step]
            write_text(file, "".join(kept))
        self._writing = True
        with file.open("a", encoding="utf-8") as stream:
            for number, text in enumerate(judged.texts):
                rewards = {reward.name: _finite(rewards_NF[number, n]) for n, reward in enumerate(self.rewards)}
                row = {"step": step + 1, "prompt": judged.prompts[number], "completion": text, "rewards": rewards}
                stream.write(json.dumps(row | {"advantage": float(advantages[number])}, ensure_ascii=False) + "\n")


def _scorer(config: Config, model_config: Any, mesh: Mesh, reference: bool) -> Any:
    """`(trainable, base, batch [A, B, T]) -> (old, ref)`, log-probabilities `[A, B, T]` of trained tokens, 0 elsewhere."""

    def one(trainable: Any, base: dict, micro: data.Batch) -> tuple[jax.Array, jax.Array | None]:
        tokens = logps_of(config, model_config, compose(base, trainable), micro)
        rows = jnp.arange(micro.tokens.shape[0])[:, None]

        def back(logp_BN: jax.Array) -> jax.Array:
            return jnp.zeros(micro.tokens.shape, jnp.float32).at[rows, tokens.index_BN].set(logp_BN)

        return back(tokens.logp_BN), back(reference_logps_of(config, model_config, base, micro)) if reference else None

    def score(trainable: Any, base: dict, batch: data.Batch) -> tuple[jax.Array, jax.Array | None]:
        return jax.lax.map(lambda micro: one(trainable, base, micro), batch)

    return jax.jit(score, out_shardings=parallel.replicated(mesh))


# ---- numbers ----


def _like(values: np.ndarray, place: np.ndarray, together: int) -> np.ndarray:
    """Numbers of answers, in order, where a rollout's batch has them; 0 where it has no answer."""
    return np.pad(values, (0, place.size - len(values))).reshape(place.shape).astype(np.float32)


def _measured(rewards: Sequence[Reward], rewards_NF: np.ndarray, found: Any) -> dict[str, float]:
    """TRL's metrics of rewards. A reward that judged no answer is left out."""
    told: dict[str, float] = {}
    for number, reward in enumerate(rewards):
        values = rewards_NF[:, number]
        if not np.isnan(values).all():
            told |= {f"rewards/{reward.name}/mean": float(np.nanmean(values)), f"rewards/{reward.name}/std": float(spread(values)[0])}
    if not np.isnan(found.rewards).all():
        told |= {"reward": float(np.nanmean(found.rewards)), "reward_std": float(spread(found.rewards)[0])}
    return told | {"frac_reward_zero_std": float(np.isclose(found.spread, 0).mean())}


def _lengths(answers: Sequence[Answer], ended: np.ndarray) -> dict[str, float]:
    """TRL's metrics of lengths, in tokens with the one that ends an answer."""
    lengths = np.array([len(answer.tokens) for answer in answers], float)
    told = {"completions/clipped_ratio": float(1 - ended.mean())}
    for name, some in (("length", lengths), ("terminated_length", lengths[ended] if ended.any() else np.zeros(1))):
        told |= {f"completions/{which}_{name}": float(getattr(some, which)()) for which in ("mean", "min", "max")}
    return told


def _finite(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


# ---- a rollout on disk ----


def _write(file: Path, batch: data.Batch, told: dict[str, float]) -> None:
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(batch)}
    with replacing(file) as scratch, scratch.open("wb") as stream:
        np.savez(stream, capacity=np.array(batch.capacity), told=np.array(json.dumps(told)), **leaves)


def _read(file: Path) -> tuple[data.Batch, dict[str, float]]:
    try:
        with np.load(file, allow_pickle=False) as found:
            saved = {name: found[name] for name in found.files}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({type(error).__name__}), but holds the answers that the step to go on with learns from; take an "
            "earlier checkpoint (remove the newest of checkpoints/), or start again in another folder"
        ) from None
    told, capacity = json.loads(str(saved.pop("told"))), int(saved.pop("capacity"))
    rollout = data.batch.Rollout(*(saved.pop(f".rollout.{name}", None) for name in ("tokens", "old_logps", "ref_logps")))
    answers = data.batch.Answers(saved.pop(".answers.numbers"), saved.pop(".answers.values"))
    return data.Batch(**{name[1:]: leaf for name, leaf in saved.items()}, capacity=capacity, answers=answers, rollout=rollout), told


def check(config: Config, rows: data.Data, model_config: Any) -> None:
    """ConfigError for what a run of drawn answers cannot do, DataError for prompts that leave no room for them."""
    if jax.process_count() > 1:
        raise ConfigError(f"objective {config.objective} draws answers in one process; run it on one host, with mesh over its devices")
    if config.mesh.sequence > 1:
        raise ConfigError(f"objective {config.objective} draws answers with whole rows on a device; write mesh.sequence: 1")
    for source in filter(None, (rows.train, rows.eval)):
        require_room(source, model_config)  # type: ignore[arg-type]
