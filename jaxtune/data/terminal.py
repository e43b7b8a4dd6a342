"""The report in the terminal."""

from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jaxtune.data.report import Preview, Report

BARS = " ▏▎▍▌▋▊▉█"
TRAINED = "bold black on green3"


def show(report: Report, console: Console) -> None:
    """Print a report."""
    console.print(Panel(_summary(report), title="what the model will see", title_align="left", border_style="dim"))
    console.print(_sources(report), markup=False)  # a source is a glob or a slice: a[0-9].jsonl, train[:10%]
    console.print(_histogram(report, min(console.width - 30, 60)))
    if report.dropped or any(report.cut.values()):
        console.print(Text("\n" + "\n".join(report.losses()), "yellow"))
    for preview in report.previews:
        console.print(_preview(preview))
    console.print(_problems(report))
    for note in report.notes:
        console.print(f"\nnote: {note}", style="cyan", markup=False, highlight=False)


def _summary(report: Report) -> Text:
    share = report.trained_tokens / max(report.tokens, 1)
    lengths = " or ".join(map(str, report.row_length))
    text = Text()
    text.append(f"{report.rows:,} rows", "bold").append(f" to train on, {report.tokens:,} tokens an epoch, of which ")
    text.append(f"{report.trained_tokens:,} trained ({share:.1%})\n", "bold")
    text.append(f"{report.packed_rows:,} batch rows of {lengths} tokens, {report.packing_efficiency:.1%} filled\n")
    text.append(f"{report.steps_per_epoch:,} steps an epoch, {report.steps:,} in all")
    rest = [f"{count:,} {side} rows" for side, count in report.sides.items() if side != "train"]
    text.append(f"; {', '.join(rest)} held out" if rest else "")
    stops = ", ".join(f"{report.problems[name]:,} {name.replace('_', ' ')}" for name in report.stops)
    return text.append(f"\na run would stop: {stops}" if stops else "", "bold red")


def _sources(report: Report) -> Table:
    table = Table(title="sources", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("", "source"):
        table.add_column(name, overflow="fold")
    for name in ("rows", "documents", "tokens", "trained", "of an epoch's rows", "of its tokens"):
        table.add_column(name, justify="right")
    for source in report.sources:
        shares = [f"{source[key]:.1%}" if key in source else "" for key in ("row_share", "token_share")]
        counts = [f"{source[key]:,}" for key in ("rows", "documents", "kept_tokens", "trained_tokens")]
        table.add_row(source["side"], source["path"], *counts, *shares)
    return table


def _histogram(report: Report, width: int) -> Group:
    most = max(count for _, count in report.histogram)
    lines = [Text("\nlengths in tokens: " + ", ".join(f"{name} {value}" for name, value in report.lengths.items()))]
    for edge, count in report.histogram:
        eighths = round(8 * width * count / most)
        bar = "█" * (eighths // 8) + BARS[eighths % 8].strip()
        lines.append(
            Text.assemble((f"{edge:>7} ", "dim"), (bar or ("▏" if count else ""), "cyan"), (f" {count:,}" if count else "", "dim"))
        )
    return Group(*lines)


def _preview(preview: Preview) -> Group:
    """A row with its trained tokens marked."""
    title = Text(f"\n{preview.place}: {preview.tokens} tokens, {preview.trained} trained", "dim")
    body = Text(overflow="fold")
    for text, trained in preview.runs:
        body.append(text if len(text) <= 1200 else text[:800] + " [...] " + text[-300:], TRAINED if trained else "")
    return Group(title, body)


def _problems(report: Report) -> Group | Text:
    if not report.problems:
        return Text("\nno problems found", "green")
    lines: list[Text | Padding] = [Text("\nproblems", "bold")]
    for name, count in sorted(report.problems.items(), key=lambda problem: problem[0] not in report.stops):
        stops = name in report.stops
        head = Text.assemble((f"{count:>7,} {name.replace('_', ' ')}", "bold red" if stops else "bold yellow"))
        lines.append(head.append("  stops a run" if stops else "", "red"))
        lines += [Padding(Text(example, "dim", overflow="fold"), (0, 0, 0, 10)) for example in report.examples[name]]
    return Group(*lines)
