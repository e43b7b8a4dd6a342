"""The report as one self-contained HTML file."""

import os
from html import escape
from pathlib import Path

from jaxtune.data.report import Preview, Report
from jaxtune.disk import write_text

STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfa; --ink: #1d1f21; --faint: #6c7278; --line: #e2e2dd; --bar: #2f7d95; --card: #ffffff;
  --on: #d3efd7; --on-ink: #0f3d1a; --bad: #b3261e; --warn: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181a; --ink: #e4e4e0; --faint: #969ca2; --line: #303438; --bar: #6cb8cf;
  --card: #1d2023; --on: #1f4a2a; --on-ink: #d5f5dc; --bad: #ff8a80; --warn: #f2c063; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 62rem; background: var(--ground); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1.5rem; font-weight: 650; } h2 { font-size: 1.05rem; margin: 2.5rem 0 .75rem; font-weight: 650; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.75rem, 1fr)); gap: .75rem; }
.figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .75rem 1rem; }
.figure b { display: block; font-size: 1.35rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.figure span, .faint { color: var(--faint); font-size: .87rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 500; font-size: .87rem; } .name { text-align: left; white-space: normal; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--faint); font: 11px system-ui, sans-serif; }
svg rect { fill: var(--bar); } svg line { stroke: var(--line); }
details { border-bottom: 1px solid var(--line); padding: .5rem 0; } summary { cursor: pointer; }
li { margin: .2rem 0; overflow-wrap: anywhere; }
.bad { color: var(--bad); font-weight: 600; } .warn { color: var(--warn); font-weight: 600; }
.row { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .75rem 1rem; margin: .4rem 0 1.25rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; max-height: 28rem;
  overflow-y: auto; }
mark { background: var(--on); color: var(--on-ink); border-radius: 3px; }
"""


def write(report: Report, path: str | os.PathLike) -> None:
    """Write the page."""
    write_text(Path(path), page(report))


def page(report: Report) -> str:
    """The whole document."""
    parts = [
        "<h1>What the model will see</h1>", _figures(report), "<h2>Problems</h2>", _problems(report), *map(_faint, report.notes),
        "<h2>Sources</h2>", _sources(report), "<h2>Lengths</h2>", _histogram(report), _losses(report),
        f"<h2>{len(report.previews)} rows, as the model reads them</h2><p class=faint><mark>Marked</mark> tokens are trained: "
        "the loss is taken on them. Everything else is read only.</p>",
        *map(_preview, report.previews),
    ]  # fmt: skip
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"{meta}<title>Data report</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _faint(text: str) -> str:
    return f'<p class="faint">{escape(text)}</p>'


def _figures(report: Report) -> str:
    share = report.trained_tokens / max(report.tokens, 1)
    lengths = ", ".join(map(str, report.row_length))
    figures = [
        (f"{report.rows:,}", "rows to train on"),
        (f"{report.tokens:,}", "tokens an epoch"),
        (f"{report.trained_tokens:,}", f"of them trained, {share:.1%}"),
        (f"{report.packing_efficiency:.1%}", f"of {report.packed_rows:,} batch rows filled (length {lengths})"),
        (f"{report.steps:,}", f"steps, {report.steps_per_epoch:,} an epoch"),
        *((f"{count:,}", f"{side} rows held out") for side, count in report.sides.items() if side != "train"),
    ]
    return '<div class="figures">' + "".join(f'<div class="figure"><b>{a}</b><span>{escape(b)}</span></div>' for a, b in figures) + "</div>"


def _problems(report: Report) -> str:
    if not report.problems:
        return "<p>None found.</p>"
    out = []
    for name, count in sorted(report.problems.items(), key=lambda problem: problem[0] not in report.stops):
        stops = name in report.stops
        note = ' <span class="faint">stops a run</span>' if stops else ""
        lines = "".join(f"<li>{escape(example)}</li>" for example in report.examples[name])
        head = f'<span class="{"bad" if stops else "warn"}">{count:,} {escape(name.replace("_", " "))}</span>{note}'
        out.append(f"<details{' open' if stops else ''}><summary>{head}</summary><ul>{lines}</ul></details>")
    return "".join(out)


def _sources(report: Report) -> str:
    head = ("rows", "documents", "tokens", "trained", "share of rows", "share of tokens")
    rows = []
    for source in report.sources:
        counts = [f"{source[key]:,}" for key in ("rows", "documents", "kept_tokens", "trained_tokens")]
        shares = [f"{source[key]:.1%}" if key in source else "" for key in ("row_share", "token_share")]
        cells = "".join(f"<td>{cell}</td>" for cell in counts + shares)
        rows.append(f'<tr><td class="name">{escape(source["path"])} <span class="faint">{source["side"]}</span></td>{cells}</tr>')
    titles = "".join(f"<th>{title}</th>" for title in head)
    return f'<div class="scroll"><table><tr><th class="name">source</th>{titles}</tr>{"".join(rows)}</table></div>'


def _histogram(report: Report) -> str:
    """Bars for the documents' lengths, each with its count in words."""
    width, height, foot = 900, 180, 22
    most = max(count for _, count in report.histogram)
    step = width / len(report.histogram)
    bars = []
    low = 1
    for number, (edge, count) in enumerate(report.histogram):
        tall = (height - 14) * count / most
        title = f"<title>{low} to {edge} tokens: {count:,} documents</title>"
        bars.append(
            f'<rect x="{number * step + 1:.1f}" y="{height - tall:.1f}" width="{step - 2:.1f}" height="{tall:.1f}" rx="2">{title}</rect>'
        )
        if number % 4 == 3 or len(report.histogram) < 8:
            bars.append(f'<text x="{(number + 1) * step:.1f}" y="{height + 16}" text-anchor="end">{edge}</text>')
        low = edge + 1
    axis = f'<line x1="0" x2="{width}" y1="{height}" y2="{height}"/><text x="0" y="10">{most:,}</text>'
    quantiles = ", ".join(f"{name} {value:,}" for name, value in report.lengths.items())
    return (
        f'<svg viewBox="0 0 {width} {height + foot}" role="img" aria-label="Histogram of document lengths">{axis}{"".join(bars)}</svg>'
        f'<p class="faint">Tokens of a document: {quantiles}.</p>'
    )


def _losses(report: Report) -> str:
    lines = report.losses()
    if not lines:
        return _faint("No row was dropped, cut or split.")
    return "<h2>Dropped, cut, split</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _preview(preview: Preview) -> str:
    runs = "".join(f"<mark>{escape(text)}</mark>" if trained else escape(text) for text, trained in preview.runs)
    title = f"{preview.place}: {preview.tokens:,} tokens, {preview.trained:,} trained"
    return f'<div class="faint">{escape(title)}</div><div class="row">{runs}</div>'
