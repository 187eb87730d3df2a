"""What a sweep found as one HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from headkv.evaluation.report import sections
from headkv.evaluation.report_plots import plot_quality
from headkv.evaluation.rows import SweepRow

STYLE = """:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
div { overflow-x: auto; }
img { max-width: 100%; }"""


def as_html(rows: Sequence[SweepRow], by: str = "task") -> str:
    """All sections and the figure as one page: nothing from the network, light or dark as the reader has it."""
    sources = []
    for dark in (True, False):
        file = io.BytesIO()
        plot_quality(rows, by, dark=dark).savefig(file, format="png", dpi=130)
        sources.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    body = [
        f'<picture><source srcset="{sources[0]}" media="(prefers-color-scheme: dark)">'
        f'<img src="{sources[1]}" alt="Score against megabytes; the tables below have the numbers"></picture>'
    ]
    for title, lines in sections(rows, by):
        head = "".join(f"<th>{html.escape(name)}</th>" for name in lines[0])
        rest = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line.values()) + "</tr>"
            for line in lines
        )
        body.append(f"<h2>{html.escape(title)}</h2><div><table><tr>{head}</tr>{rest}</table></div>")
    versions = "; ".join(dict.fromkeys(f"{row.versions} on {row.device}" for row in rows))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>headkv report</title>'
        f"<style>{STYLE}</style><h1>Quality against bytes</h1>{''.join(body)}<p>{html.escape(versions)}</p></html>\n"
    )
