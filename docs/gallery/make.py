"""Run the code of the gallery's pages and write what it prints into them: ``python docs/gallery/make.py [PAGE ...]``.

A page's ``python`` blocks are one program; the ``text`` block after each is what it printed. Pictures are saved by the
pages themselves, beside them. It needs normkit with its extras ``check`` and ``plot``, and PyTorch.
"""

import contextlib
import io
import os
import re
import sys
from pathlib import Path

BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<printed>.*?)```\n)?", re.DOTALL)


def made(page: Path) -> str:
    """The page with what its code prints now."""
    namespace = {"__name__": "__main__"}

    def run(block: re.Match) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block["code"], str(page), "exec"), namespace)
        text = f"\n```text\n{printed.getvalue().rstrip()}\n```\n" if printed.getvalue().strip() else ""
        return f"```python\n{block['code']}```\n{text}"

    return BLOCK.sub(run, page.read_text("utf-8"))


def main(names: list[str]) -> None:
    """All pages, or those that are named."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({"savefig.dpi": 100, "font.size": 9, "figure.facecolor": "white"})
    here = Path(__file__).parent
    pages = sorted(page for page in here.glob("*.md") if page.stem != "README")
    if unknown := set(names) - {page.stem for page in pages}:
        raise SystemExit(f"no page {', '.join(unknown)}; there are: {', '.join(page.stem for page in pages)}")
    os.chdir(here)
    for page in pages:
        if not names or page.stem in names:
            page.write_text(made(page), "utf-8")
            print(page.name)


if __name__ == "__main__":
    main(sys.argv[1:])
