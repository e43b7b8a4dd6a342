"""What one forward pass sees."""

from typing import Any

import numpy as np
from flax import struct


@struct.dataclass
class Answers:
    """The answers of a row, numbered 1, 2, ... S; in a pair the chosen one has the odd number, the rejected one the next.

    Attributes:
        numbers: int32 `[B, T]`, the answer a token belongs to, from its first trained token to its end; 0: none.
        values: float32 `[B, S]`, or `[B, S, L]`, the row's data for an answer: a label, a class, a pair's margin, L numbers.
        ref_logps: float32 `[B, S]`, log-probabilities under the reference model, computed beforehand; None: not computed yet.
    """

    numbers: Any
    values: Any
    ref_logps: Any = None


@struct.dataclass
class Rollout:
    """Data of sampled answers besides their advantages, which are `Answers.values`.

    Attributes:
        tokens: float32 `[B, S]`, the trained tokens per answer, averaged over all answers of the rollout.
        old_logps: float32 `[B, T]`, log-probability of each trained token under the policy that sampled it; None: the trained policy.
        ref_logps: float32 `[B, T]`, the same under the reference model; None: not computed beforehand, or not needed.
        advantages, returns, values: float32 `[B, T]`, for ppo: each trained token's advantage, the target of its value, and its value when
            sampled. None for other objectives.
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
        weights: float32 weight of a token *as a target*, predicted from the token before it. 0 is not trained; the first token of a segment
            without parent is always 0, since nothing in its own document precedes it.
        positions: int32 position inside the document, from 0.
        segments: int32; 0 is padding, 1, 2, ... are the documents of the row. Attention stays inside a segment.
        capacity: static; no row of this batch's plan has more tokens with non-zero weight, so logits are needed at that many positions
            of a row only. None: T.
        parents: int32, the segment that a token's own segment continues and can see: a prompt shared by answers. 0: none. None: nowhere.
        before: int32, the slot of the token from which a token is predicted. None: the previous slot, as always without parents.
        answers: for objectives on whole answers; None for others.
        rollout: for objectives that sample the answers themselves; None for others.
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
        """A batch of padding, to be filled in; with room for that many answers per row, each with a value of that shape, and for shared
        prompts."""

        def ints() -> np.ndarray:
            return np.zeros(shape, np.int32)

        numbered = Answers(ints(), np.zeros((*shape[:-1], answers, *value), np.float32)) if answers else None
        parents, before = (ints(), ints()) if shared else (None, None)
        return cls(ints(), np.zeros(shape, np.float32), ints(), ints(), capacity, parents, before, numbered)
