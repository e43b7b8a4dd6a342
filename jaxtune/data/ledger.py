"""Accounts for every row: nothing is dropped or cut without being counted here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from jaxtune.data.files import Row, RowError

EXAMPLES = 5
Place = int | str  # a row number, with its file if a source has several


@dataclass
class Ledger:
    """The ledger of one source.

    Attributes:
        path: the source.
        rows: rows read.
        tokens: tokens of those rows, before any cut.
        documents: documents made of them.
        kept_tokens: tokens of those documents.
        trained_tokens: trained tokens of those documents.
        dropped: reason -> numbers of the dropped rows.
        cut: row number -> tokens cut off.
        parts: numbers of the rows that were split.
        problems: name -> numbers of the rows that have it.
        examples: name -> the first few messages.
    """

    path: str
    rows: int = 0
    tokens: int = 0
    documents: int = 0
    kept_tokens: int = 0
    trained_tokens: int = 0
    dropped: dict[str, list[Place]] = field(default_factory=dict)
    cut: dict[Place, int] = field(default_factory=dict)
    parts: list[Place] = field(default_factory=list)
    problems: dict[str, list[Place]] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self):
        self._policies: Mapping[str, str] = {}
        self._survey = False
        self.suppressed = 0  # errors that a survey continued after

    def by(self, policies: Mapping[str, str], survey: bool = False) -> "Ledger":
        """Set what to do about each problem: `error`, `drop` or `keep`. A survey turns every error into a drop."""
        self._policies, self._survey = policies, survey
        return self

    def problem(self, name: str, row: Row, reason: str) -> None:
        """Record a problem of a row that can still be trained on."""
        policy = self._policies.get(name, "keep")
        if policy == "error" and self._survey:
            self.suppressed += 1
        elif policy != "keep":
            raise row.fail(reason, name, policy)
        self._note(name, row, reason)

    def fault(self, error: RowError) -> None:
        """Record a row that cannot be used, or raise its error."""
        policy = error.policy or self._policies.get(error.name, "error")
        if policy != "drop":
            if not self._survey:
                raise error
            self.suppressed += 1
        if error.policy != "drop" or error.name in self._policies:
            self._note(error.name, error.row, error.reason)
        self.dropped.setdefault(error.name, []).append(error.row.place)

    def _note(self, name: str, row: Row, reason: str) -> None:
        self.problems.setdefault(name, []).append(row.place)
        examples = self.examples.setdefault(name, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{row.unit} {row.place}: {reason}")

    def keep(self, tokens: int, trained: int) -> None:
        """Book a document."""
        self.documents += 1
        self.kept_tokens += tokens
        self.trained_tokens += trained

    def to_dict(self) -> dict:
        """For JSON."""
        return asdict(self)

    def summary(self) -> str:
        """Dropped rows by reason, in words."""
        return ", ".join(f"{len(rows)} {reason.replace('_', ' ')}" for reason, rows in self.dropped.items()) or "none"
