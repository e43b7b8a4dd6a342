"""Sample answers from the policy, score them, and arrange them as the batch of a step (grpo, rloo, ppo).

A rollout is a pure function of the config, the seed, the step and the weights at that step, so a resumed run samples the same answers as an
uninterrupted one. If several steps learn from one rollout, it is kept in `rollouts/` as long as a checkpoint needs it.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtune import data, parallel
from jaxtune.config import Config
from jaxtune.convert.load import Model
from jaxtune.data.rollout_prompts import Prompts, require_room
from jaxtune.disk import replacing, write_text
from jaxtune.errors import CheckpointError, ConfigError
from jaxtune.generation.answer import Answer, Reader
from jaxtune.generation.prompts import stop_tokens
from jaxtune.generation.sampling import Sampling
from jaxtune.generation.training_samples import sample_answers
from jaxtune.model import decoder
from jaxtune.objectives.advantages import ADVANTAGES, spread, weighted
from jaxtune.objectives.advantages import ppo as token_advantages
from jaxtune.objectives.answers import REFERENCE
from jaxtune.objectives.grpo import cooled
from jaxtune.objectives.logprobs import logprobs_of, token_logprobs, trained_states
from jaxtune.peft import compose
from jaxtune.rewards import Answers, Reward
from jaxtune.step import TrainState, with_reference


class Rollouts:
    """The rollouts of one run: `batch_at(step, state, base)` replaces a source's `batch_at(step)`."""

    def __init__(self, config: Config, model: Model, mesh: Mesh, rows: data.Data, rewards: Sequence[Reward], folder: Path, steps: int):
        self.config, self.mesh, self.folder, self.total = config, mesh, folder, steps
        self.model, self.rewards, self.weights = model, rewards, np.array([reward.weight for reward in rewards])
        self.train: Prompts = rows.train  # type: ignore[assignment]
        self.eval: Prompts | None = rows.eval  # type: ignore[assignment]
        self.reader = Reader(model.tokenizer, frozenset(stop_tokens(model)))
        numbers = (config.temperature, config.top_k, config.top_p, config.min_p or 0.0, config.repetition_penalty)
        self.sampling = Sampling.create(*numbers)
        self.score = _scorer(config, dataclasses.replace(model.config, mesh=mesh), mesh, self.train.layout.reference)
        self._writing = False  # whether this process has started to write completions.jsonl
        self._current: tuple[int, data.Batch, dict[str, float]] | None = None  # number, batch and metrics

    # ---- training ----

    def batch_at(self, step: int, state: TrainState, base: dict) -> tuple[data.Batch, dict[str, float]]:
        """The batch of step `step` (from 0), and the metrics of its rollout if this step sampled it."""
        number, place = divmod(step, self.train.repeats)
        if self._current is None or self._current[0] != number:
            kept = self.folder / "rollouts" / f"{number:08d}.npz"
            batch, logged = self._draw(number, step, state, base) if place == 0 else _read(kept)
            if place == 0 and self.train.repeats > 1:
                _write(kept, batch, logged)
            self._current = (number, batch, logged)
        _, batch, logged = self._current  # type: ignore[misc]
        epoch, slice_ = divmod(place, self.train.layout.slices)
        if self.train.layout.valued and self.train.layout.slices > 1:
            batch = _shuffled(batch, self.train.layout.prompts, (self.config.seed, number, epoch))
        return jax.tree.map(lambda x: x[slice_], batch), logged if place == 0 else {}

    def forget(self, oldest: int) -> None:
        """Remove rollouts that no step from `oldest` (counted from 0) on needs."""
        for file in (self.folder / "rollouts").glob("*.npz"):
            if int(file.stem) < oldest // self.train.repeats:
                file.unlink()

    def _draw(self, number: int, step: int, state: TrainState, base: dict) -> tuple[data.Batch, dict[str, float]]:
        config, layout, prompts = self.config, self.train.layout, self.train.prompts_at(number)
        answers, ended = self._answers(self.train, prompts, (config.seed, 0, number), state, base)
        judged, rewards_NF, logged = self._judge(self.train, prompts, answers, step)
        trained = ended if config.mask_truncated_completions else np.ones(len(answers), bool)
        ids = [self.train.ids(prompt) for prompt in prompts]
        tokens = [answer.tokens for answer in answers]
        batch = layout.batches(ids, tokens, np.zeros(len(answers)), trained, self.train.longest_prompt)
        scored = self._scored(batch, state, base) if layout.old else Scored()
        if scored.old is not None:
            kept = scored.ref if layout.kept else None
            batch = batch.replace(rollout=dataclasses.replace(batch.rollout, old_logps=scored.old, ref_logps=kept))
        if layout.valued:
            batch, advantages, more = self._by_token(batch, scored, rewards_NF, np.array([len(t) for t in tokens]), ended)
        else:
            batch, advantages, more = self._by_answer(batch, scored, rewards_NF)
        logged |= more | _lengths(answers, ended)
        if config.log_completions:
            self._write_completions(step, judged, rewards_NF, advantages)
        return batch, logged

    def _scored(self, batch: data.Batch, state: TrainState, base: dict) -> "Scored":
        """The numbers that policy and reference assign to a rollout's tokens."""
        base, found = with_reference(base, state), []
        for number in range(self.train.layout.slices):
            one = parallel.put(jax.tree.map(lambda x: x[number], batch), self.mesh)  # noqa: B023
            found.append(jax.device_get(self.score(state.trainable, base, one)))
        return Scored(*(None if of_slices[0] is None else np.stack(of_slices) for of_slices in zip(*found, strict=True)))

    def _by_answer(
        self, batch: data.Batch, scored: "Scored", rewards_NF: np.ndarray
    ) -> tuple[data.Batch, np.ndarray, dict[str, float]]:
        """The batch with an advantage per answer, the advantages in order, and metrics."""
        layout, kl_N, logged = self.train.layout, None, {}
        if scored.ref is not None:
            apart = (scored.old - scored.ref) * (batch.weights != 0)
            own = batch.answers.numbers[..., None, :] == np.arange(1, layout.together + 1)[:, None]
            kl_N = (apart[..., None, :] * own).sum(-1).reshape(-1)[: len(rewards_NF)].astype(np.float64)
        found = ADVANTAGES[self.config.objective](self.config, rewards_NF, self.weights, layout.answers, kl_N)
        batch.answers.values[:] = _like(found.advantages, batch.answers.values)
        if kl_N is not None and self.config.objective == "rloo":
            logged["kl"] = float(kl_N.sum() / max(np.count_nonzero(batch.weights), 1))
        return batch, found.advantages, _measured(self.rewards, rewards_NF, found.rewards) | _flat_groups(found.spread) | logged

    def _by_token(
        self, batch: data.Batch, scored: "Scored", rewards_NF: np.ndarray, lengths_N: np.ndarray, ended: np.ndarray
    ) -> tuple[data.Batch, np.ndarray, dict[str, float]]:
        """The batch with an advantage, a return and a value per token, the mean advantage of each answer, and metrics."""
        rewards_N = weighted(rewards_NF, self.weights)
        scores_N = np.nan_to_num(rewards_N) - (self.config.missing_eos_penalty or 0.0) * ~ended
        # both list the tokens answer by answer, because rows of the batch hold them in order
        there, place = batch.answers.numbers > 0, np.arange(lengths_N.max()) < lengths_N[:, None]

        def of_answers(x: np.ndarray | None) -> np.ndarray | None:
            if x is None:
                return None
            out = np.zeros(place.shape)
            out[place] = x[there]
            return out

        def of_rows(x_NT: np.ndarray) -> np.ndarray:
            out = np.zeros(there.shape, np.float32)
            out[there] = x_NT[place]
            return out

        found = token_advantages(self.config, scores_N, lengths_N, *map(of_answers, scored))
        more = {"advantages": of_rows(found.advantages), "returns": of_rows(found.returns), "values": scored.values}
        batch = batch.replace(rollout=dataclasses.replace(batch.rollout, **more))
        return batch, found.advantages.sum(1) / lengths_N, _measured(self.rewards, rewards_NF, rewards_N) | found.metrics

    # ---- evaluation ----

    def evaluate(self, state: TrainState, base: dict) -> dict[str, float]:
        """`eval_reward` and other metrics over the prompts of `data.eval`; every evaluation uses the same random keys."""
        assert self.eval is not None
        layout, step, prompts = self.eval.layout, int(state.step), list(range(len(self.eval.originals)))
        answers, ended = self._answers(self.eval, prompts, (self.config.seed, 1, 0), state, base)
        _, rewards_NF, logged = self._judge(self.eval, prompts, answers, step)
        found = ADVANTAGES["grpo"](self.config, rewards_NF, self.weights, layout.answers)
        logged |= _measured(self.rewards, rewards_NF, found.rewards) | _lengths(answers, ended)
        if layout.answers > 1:
            logged |= _flat_groups(found.spread)
        return {f"eval_{name}": value for name, value in logged.items()}

    # ---- drawing and judging ----

    def _answers(
        self, source: Prompts, prompts: list[int], seed: tuple[int, ...], state: TrainState, base: dict
    ) -> tuple[list[Answer], np.ndarray]:
        """The answers to every prompt, next to each other, and whether each ended by itself."""
        return sample_answers(
            self.model.config, compose(base, state.trainable), [source.ids(prompt) for prompt in prompts], source.layout.answers,
            source.layout.most, sampling=self.sampling, reader=self.reader, seed=seed, mesh=self.mesh,
        )  # fmt: skip

    def _judge(
        self, source: Prompts, prompts: list[int], answers: list[Answer], step: int
    ) -> tuple[Answers, np.ndarray, dict[str, float]]:
        """What was scored, the rewards `[answers, rewards]`, and the metrics that reward functions logged."""
        places = [prompt for prompt in prompts for _ in range(source.layout.answers)]
        originals, texts = [source.originals[place] for place in places], [answer.text for answer in answers]
        chat = [isinstance(prompt, list) for prompt in originals]
        judged = Answers(
            prompts=originals,
            completions=[[{"role": "assistant", "content": t}] if turns else t for t, turns in zip(texts, chat, strict=True)],
            texts=texts,
            completion_ids=[answer.tokens for answer in answers],
            columns={name: [source.fields[place][name] for place in places] for name in source.fields[places[0]]},
            step=step,
            max_steps=self.total,
        )
        logged: dict[str, list[float]] = {}
        rewards = np.stack([reward.judge(judged, logged, {}) for reward in self.rewards], axis=1)
        return judged, rewards, {name: float(np.mean(values)) for name, values in logged.items()}

    def _write_completions(self, step: int, judged: Answers, rewards_NF: np.ndarray, advantages: np.ndarray) -> None:
        file = self.folder / "completions.jsonl"
        if not self._writing and file.exists():  # from steps that are repeated
            kept = [line for line in file.read_text(encoding="utf-8").splitlines(True) if json.loads(line)["step"] <= step]
            write_text(file, "".join(kept))
        self._writing = True
        with file.open("a", encoding="utf-8") as stream:
            for number, text in enumerate(judged.texts):
                rewards = {reward.name: _finite(rewards_NF[number, n]) for n, reward in enumerate(self.rewards)}
                row = {"step": step + 1, "prompt": judged.prompts[number], "completion": text, "rewards": rewards}
                stream.write(json.dumps(row | {"advantage": float(advantages[number])}, ensure_ascii=False) + "\n")


class Scored(NamedTuple):
    """Numbers per trained token, 0 elsewhere, float32 `[A, B, T]` or for all slices: log-probabilities under the policy that sampled them
    and under the reference, and the value head's values; None if unused."""

    old: Any = None
    ref: Any = None
    values: Any = None


def _scorer(config: Config, model_config: Any, mesh: Mesh, reference: bool) -> Any:
    """`(trainable, base, batch [A, B, T]) -> Scored`."""
    model_config = cooled(config, model_config)

    def one(trainable: Any, base: dict, micro: data.Batch) -> Scored:
        params, rows = compose(base, trainable), jnp.arange(micro.tokens.shape[0])[:, None]
        states = trained_states(model_config, params, micro)
        live_BN = states.weights_BN != 0

        def back(x_BN: jax.Array) -> jax.Array:
            return jnp.zeros(micro.tokens.shape, jnp.float32).at[rows, states.index_BN].set(jnp.where(live_BN, x_BN, 0.0))

        return Scored(
            old=back(logprobs_of(model_config, params, states).logp_BN),
            ref=back(token_logprobs(model_config, base.get(REFERENCE, base), micro).logp_BN) if reference else None,
            values=back(decoder.values(params, states.hidden_BND)) if "value" in params else None,
        )

    def score(trainable: Any, base: dict, batch: data.Batch) -> Scored:
        return jax.lax.map(lambda micro: one(trainable, base, micro), batch)

    return jax.jit(score, out_shardings=parallel.replicated(mesh))


# ---- numbers ----


def _shuffled(batch: data.Batch, prompts: int, seed: tuple[int, ...]) -> data.Batch:
    """The rows of a rollout `[slices, A, B, ...]` with their prompts in another order, independent of how devices split the rows."""
    order = np.random.default_rng(seed).permutation(prompts)
    return jax.tree.map(lambda x: x.reshape(prompts, -1, *x.shape[3:])[order].reshape(x.shape), batch)


def _like(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Numbers per answer, in order, in the layout of a rollout's batch; 0 where it has no answer."""
    return np.pad(values, (0, place.size - len(values))).reshape(place.shape).astype(np.float32)


def _measured(rewards: Sequence[Reward], rewards_NF: np.ndarray, rewards_N: np.ndarray) -> dict[str, float]:
    """TRL's metrics of rewards; `rewards_N` is their weighted sum. A reward that scored no answer is left out."""
    logged: dict[str, float] = {}
    for number, reward in enumerate(rewards):
        values = rewards_NF[:, number]
        if not np.isnan(values).all():
            logged |= {f"rewards/{reward.name}/mean": float(np.nanmean(values)), f"rewards/{reward.name}/std": float(spread(values)[0])}
    if not np.isnan(rewards_N).all():
        logged |= {"reward": float(np.nanmean(rewards_N)), "reward_std": float(spread(rewards_N)[0])}
    return logged


def _flat_groups(spread_N: np.ndarray) -> dict[str, float]:
    """The share of answers in groups with a single reward."""
    return {"frac_reward_zero_std": float(np.isclose(spread_N, 0).mean())}


def _lengths(answers: Sequence[Answer], ended: np.ndarray) -> dict[str, float]:
    """TRL's metrics of lengths, in tokens, including the one that ends an answer."""
    lengths = np.array([len(answer.tokens) for answer in answers], float)
    logged = {"completions/clipped_ratio": float(1 - ended.mean())}
    for name, some in (("length", lengths), ("terminated_length", lengths[ended] if ended.any() else np.zeros(1))):
        logged |= {f"completions/{which}_{name}": float(getattr(some, which)()) for which in ("mean", "min", "max")}
    return logged


def _finite(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


# ---- a rollout on disk ----


def _write(file: Path, batch: data.Batch, logged: dict[str, float]) -> None:
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(batch)}
    with replacing(file) as scratch, scratch.open("wb") as stream:
        np.savez(stream, capacity=np.array(batch.capacity), logged=np.array(json.dumps(logged)), **leaves)


def _read(file: Path) -> tuple[data.Batch, dict[str, float]]:
    try:
        with np.load(file, allow_pickle=False) as found:
            saved = {name: found[name] for name in found.files}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({type(error).__name__}), but holds the answers for the next training step; take an "
            "earlier checkpoint (remove the newest of checkpoints/), or start again in another folder"
        ) from None
    logged, capacity = json.loads(str(saved.pop("logged"))), int(saved.pop("capacity"))
    fields = [field.name for field in dataclasses.fields(data.batch.Rollout)]
    rollout = data.batch.Rollout(*(saved.pop(f".rollout.{name}", None) for name in fields))
    answers = data.batch.Answers(saved.pop(".answers.numbers"), saved.pop(".answers.values"))
    return data.Batch(**{name[1:]: leaf for name, leaf in saved.items()}, capacity=capacity, answers=answers, rollout=rollout), logged


def check(config: Config, rows: data.Data, model_config: Any) -> None:
    """ConfigError for settings that sampling does not support, DataError for prompts that leave no room for answers."""
    if jax.process_count() > 1:
        raise ConfigError(f"objective {config.objective} samples answers in one process; run it on one host, with a mesh over its devices")
    if config.mesh.sequence > 1:
        raise ConfigError(f"objective {config.objective} samples answers with whole rows on a device; write mesh.sequence: 1")
    for source in filter(None, (rows.train, rows.eval)):
        require_room(source, model_config)  # type: ignore[arg-type]
