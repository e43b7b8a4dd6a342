"""What one forward pass sees."""

from typing import Any

import numpy as np
from flax import struct


@struct.dataclass
class Answers:
    """The answers of a row, numbered 1, 2, ... S; of a pair the chosen one has the odd number, the rejected one the next.

    Attributes:
        numbers: int32 `[B, T]`, the answer a token is part of, from its first trained token to its end; 0: none.
        values: float32 `[B, S]`, or `[B, S, L]`, what the row says of an answer: a label, a class, a pair's margin, L numbers.
        ref_logps: float32 `[B, S]`, log-probabilities under the reference model that were computed before; None: not yet.
    """

    numbers: Any
    values: Any
    ref_logps: Any = None


@struct.dataclass
class Rollout:
    """What is known of drawn answers beside their advantages, which are `Answers.values`.

    Attributes:
        tokens: float32 `[B, S]`, the trained tokens of an answer, on average over all answers drawn at once.
        old_logps: float32 `[B, T]`, log-probability of each trained token by the policy that drew it; None: by the one that is trained.
        ref_logps: float32 `[B, T]`, the same by the reference model; None: not computed before, or not needed.
        advantages, returns, values: float32 `[B, T]`, of ppo: what each trained token's advantage is, what its value should have been,
            and was. None: not of ppo.
    """

    tokens: Any
    old_logps: Any = None
    ref_logps: Any = None
    advantages: Any = None
    returns: Any = None
    values: Any = None


@struct.dataclass
class Batch:
    """Rows of tokens, shape `[B, T]`, or `[A, B, T]` for A micro-batches. Leaves are numpy arrays on the host.

    Attributes:
        tokens: int32 token ids; any id where `segments` is 0.
        weights: float32 weight of a token *as a target*, predicted from the token before it. 0 is not trained; the first
            token of a segment without parent is always 0, since nothing in its own document comes before it.
        positions: int32 position inside the document, from 0.
        segments: int32; 0 is padding, 1, 2, ... are the documents of the row. Attention stays inside a segment.
        capacity: static; no row of the plan this batch belongs to has more tokens of non-zero weight, so logits are needed
            at that many places of a row only. None: T.
        parents: int32, the segment a token's own segment goes on from and sees too: a prompt that answers share. 0: none. None: nowhere.
        before: int32, the slot of the token that a token is predicted from. None: the slot before its own, as ever without parents.
        answers: of objectives about whole answers; None for others.
        rollout: of objectives that draw the answers themselves; None for others.
    """

    tokens: Any
    weights: Any
    positions: Any
    segments: Any
    capacity: int | None = struct.field(pytree_node=False, default=None)
    parents: Any = None
    before: Any = None
    answers: Answers | None = None
    rollout: Rollout | None = None

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], capacity: int | None = None, answers: int = 0, shared: bool = False, value: tuple[int, ...] = ()
    ) -> "Batch":
        """A batch of padding only, to be filled in; with room for that many answers a row, each with a value of that shape, and for
        shared prompts."""

        def ints() -> np.ndarray:
            return np.zeros(shape, np.int32)

        numbered = Answers(ints(), np.zeros((*shape[:-1], answers, *value), np.float32)) if answers else None
        parents, before = (ints(), ints()) if shared else (None, None)
        return cls(ints(), np.zeros(shape, np.float32), ints(), ints(), capacity, parents, before, numbered)
