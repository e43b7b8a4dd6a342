"""What became of every row: nothing is dropped or cut without being counted here."""

from dataclasses import asdict, dataclass, field


@dataclass
class Ledger:
    """The books of one source.

    Attributes:
        path: the source.
        rows: rows read.
        tokens: tokens of those rows, before anything was cut.
        documents: documents made of them.
        kept_tokens: tokens of those documents.
        trained_tokens: tokens of those documents that are trained.
        dropped: reason -> row numbers.
        dropped_tokens: reason -> tokens.
        cut: row number -> tokens cut away.
        parts: row numbers that were split.
        problems: name -> row numbers.
    """

    path: str
    rows: int = 0
    tokens: int = 0
    documents: int = 0
    kept_tokens: int = 0
    trained_tokens: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    dropped_tokens: dict[str, int] = field(default_factory=dict)
    cut: dict[int, int] = field(default_factory=dict)
    parts: list[int] = field(default_factory=list)
    problems: dict[str, list[int]] = field(default_factory=dict)

    def read(self, tokens: int) -> None:
        """Book a row."""
        self.rows += 1
        self.tokens += tokens

    def keep(self, tokens: int, trained: int) -> None:
        """Book a document."""
        self.documents += 1
        self.kept_tokens += tokens
        self.trained_tokens += trained

    def drop(self, reason: str, row: int, tokens: int) -> None:
        """Book a row that is left out."""
        self.dropped.setdefault(reason, []).append(row)
        self.dropped_tokens[reason] = self.dropped_tokens.get(reason, 0) + tokens

    def cut_row(self, row: int, tokens: int) -> None:
        """Book tokens cut off a row."""
        self.cut[row] = tokens

    def problem(self, name: str, row: int) -> None:
        """Book a row that has something wrong with it."""
        self.problems.setdefault(name, []).append(row)

    def to_dict(self) -> dict:
        """For JSON."""
        return asdict(self)

    def summary(self) -> str:
        """Dropped rows by reason, in words."""
        return ", ".join(f"{len(rows)} {reason.replace('_', ' ')}" for reason, rows in self.dropped.items()) or "none"
