"""`normkit check --html`: the report as one page that needs nothing beside it."""

from __future__ import annotations

import importlib.util

from normkit._check import Report

NEEDED = ("jinja2", "matplotlib")


def check() -> None:
    """Refuse before anything is measured where there is nothing to write the page with."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f'--html needs {" and ".join(missing)}: python -m pip install "normkit[check]"')


def render(report: Report) -> str:
    """The page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from normkit._page import view

    environment = Environment(
        loader=PackageLoader("normkit", "_page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(view.of(report))
