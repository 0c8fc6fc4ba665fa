"""The page: one HTML file that asks nothing of the network."""

import base64
import hashlib
from pathlib import Path

from tools.reporting.header import header
from tools.reporting.markup import esc
from tools.reporting.report import Report
from tools.reporting.sections import Section, sections

_HERE = Path(__file__).parent


def page(report: Report) -> str:
    """The whole document."""
    parts = [section for section in sections(report) if section.content]
    title = " · ".join(run.name for run in report.runs)
    links = "".join(f'<a href="#{part.name}">{part.title}</a>' for part in parts)
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("style.css", "page.js"))
    # Texts of models and data sets stand on this page: should one get past the escaping, nothing of it may run.
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)} – distill</title><style>{style}</style></head>"
        f"<body><header>{header(report, title)}</header><nav aria-label=Sections>{links}</nav>"
        f"<main>{''.join(map(_section, parts))}</main><script>{script}</script></body></html>\n"
    )


def _section(section: Section) -> str:
    lead = f"<p class=lead>{section.lead}</p>" if section.lead else ""
    return f"<section id={section.name}><h2>{section.title}</h2>{lead}{section.content}</section>"
