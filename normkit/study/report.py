"""The report: what the documents say, what is right about it, the picture and the verdict, as HTML and Markdown."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from normkit.study import runner
from normkit.study.claims import DOCUMENTS, claims
from normkit.study.record import AFTERWARDS, CRITERION, DOCUMENT, UNTESTABLE, VERDICTS

#: A mark beside each verdict, so that it does not hang on colours.
MARKS = {"reproduced": "●", "partly": "◐", "not reproduced": "○", UNTESTABLE: "–"}


#: What a check is for, as a heading.
KINDS = {
    CRITERION: "Criterion",
    DOCUMENT: "What documents say beyond it: no part of the verdict above",
    AFTERWARDS: "Seen afterwards: no part of any verdict",
}


def write(out: Path, records: Mapping[str, dict[str, Any]]) -> Path:
    """Figures, report.html and report.md; returns the path of the first."""
    import jinja2

    from normkit.study import figures

    drawn = figures.draw(out, records)
    loader = jinja2.PackageLoader("normkit.study", ".")
    values = _values(out, records, drawn)
    for name in ("report.html", "report.md"):
        environment = jinja2.Environment(
            loader=loader, autoescape=name.endswith("html"), trim_blocks=True, lstrip_blocks=True
        )
        environment.filters |= {"figure": figure, "cell": lambda text: str(text).replace("|", "\\|")}
        text = environment.get_template(f"{name}.jinja").render(values)
        runner.replaced(out / name, text.encode())
    return out / "report.html"


def figure(value: float | None) -> str:
    """A number as a reader wants it."""
    if value is None:
        return "–"
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def _values(out: Path, records: Mapping[str, dict[str, Any]], drawn: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    experiments = runner.experiments()
    rows = [
        {**record, "name": name, "figures": [drawn[f] for f in experiments[name].figures if f in drawn]}
        for name, record in records.items()
    ]
    for picture in drawn.values():
        picture["data"] = {k: _data(out / p) for k, p in picture["files"].items()}
    said = [(c, c.judge(records)) for c in claims().values()]
    settings = next(iter(records.values()))["settings"] if records else {}
    return {
        "records": rows,
        "overview": drawn.get("verdicts"),
        "missing": [name for name in experiments if name not in records],
        "documents": [
            (letter, title, [(c, v) for c, v in said if c.name[0] == letter]) for letter, title in DOCUMENTS.items()
        ],
        "counts": Counter(v for c, v in said if c.by and v is not None),
        "unjudged": sum(not c.by for c, _ in said),
        "verdicts": VERDICTS,
        "kinds": KINDS,
        "marks": MARKS,
        "settings": settings,
        "seconds": sum(record["seconds"] for record in records.values()),
        "today": date.today().isoformat(),
    }


def _data(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
