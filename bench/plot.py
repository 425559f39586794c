"""The sweep as a picture: time over the time of a copy, from 1 KB to 512 MB."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normkit.bench import rows
from normkit.bench.report import Report
from normkit.bench.rows import Row

SUFFIXES = (".png", ".svg")
LAYERS = {"layer_norm": "layer norm, rows of 256", "batch_norm_train": "batch norm in training, 32 × 32, NCHW"}
#: Contenders, in colours that stay apart for the colour-blind (Okabe and Ito).
COLOURS = {rows.OWN: "#0072b2", "native": "#d55e00", rows.PLAIN: "#7f7f7f"}
WIDTH, HEIGHT = 5.6, 3.4


def check(path: str) -> None:
    """Refuse a file that cannot be drawn, before anything is measured."""
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"--plot wants a file that ends in {' or '.join(SUFFIXES)}; received {path!r}.")
    if not Path(path).resolve().parent.is_dir():
        raise ValueError(f"--plot cannot write {path!r}: there is no such folder.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError('--plot needs matplotlib: python -m pip install "normkit[bench]"') from None


def draw(report: Report, path: str) -> None:
    """A row of panels for each library: layers, forward and backward."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[tuple, dict[tuple[str, str], list[Row]]] = {}
    for row in report.rows:
        panels = groups.setdefault((row.library, row.mode, row.threads), {})
        panels.setdefault((row.layer, row.direction), []).append(row)
    keys = [(layer, direction) for layer in LAYERS for direction in ("forward", "backward")]
    one = len(groups) == 1
    lines, columns = (2, 2) if one else (len(groups), len(keys))
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * lines + 0.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=one or "row")
    for i, (group, panels) in enumerate(groups.items()):
        for j, key in enumerate(keys):
            ax = axes[j // 2][j % 2] if one else axes[i][j]
            _panel(ax, panels.get(key, []), key, _group(report, *group))
    for ax in axes[-1]:
        ax.set_xlabel("size of x")
    figure.suptitle(_title(report), fontsize=12)
    with rc_context({"svg.fonttype": "none"}):  # letters as text, in fewer bytes
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)


def _panel(ax: Any, found: Sequence[Row], key: tuple[str, str], group: str) -> None:
    units = {"forward": 1.0, "backward": 1.5}[key[1]]
    sizes = [row.bytes for row in found]
    ratios = {rows.OWN: [r.to_floor for r in found], "native": [r.native_to_floor for r in found]}
    ratios[rows.PLAIN] = [r.plain_to_floor or (r.to_floor if r.path == "plain" else None) for r in found]
    native = next((row.native for row in found if row.native_time), "native")
    for name in ("native", rows.PLAIN, rows.OWN):
        over = [row.over_copy(ratio) for row, ratio in zip(found, ratios[name], strict=True)]
        points = [(size, ratio) for size, ratio in zip(sizes, over, strict=True) if ratio is not None]
        if not points or (name == rows.PLAIN and all(r.path == "plain" for r in found)):
            continue
        at = [p[0] for p in points]
        label = {"native": f"native ({native})", rows.PLAIN: "normkit, plain"}.get(name, "normkit")
        style = {"lw": 2.2, "marker": "o", "ms": 4} if name == rows.OWN else {"lw": 1.6, "marker": "o", "ms": 3}
        ax.fill_between(
            at, [p[1].low for p in points], [p[1].high for p in points], color=COLOURS[name], alpha=0.18, lw=0
        )
        ax.plot(at, [p[1].median for p in points], color=COLOURS[name], label=label, **style)
    ax.axhline(units, color="#333333", lw=1, ls=(0, (4, 3)), label="memory's floor")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    _ticks(ax)
    for cache, text in _caches():
        ax.axvline(cache, color="#cccccc", lw=1, zorder=0)
        ax.text(cache, 0.015, f" {text}", transform=ax.get_xaxis_transform(), va="bottom", fontsize=8, color="#888888")
    ax.set_title(f"{group}: {LAYERS[key[0]]}, {key[1]}", fontsize=9.5, loc="left")
    ax.set_ylabel("time / time of a copy")
    ax.grid(True, which="major", color="#eeeeee", lw=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8.5, loc="upper right")


def _ticks(ax: Any) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    def size(value: float, _: int) -> str:
        return f"{value / 2**20:g} MB" if value >= 1 << 20 else f"{value / 1024:g} KB"

    ax.xaxis.set_major_locator(FixedLocator([1024 << k for k in range(0, 20, 3)]))
    ax.xaxis.set_minor_locator(FixedLocator([]))
    ax.xaxis.set_major_formatter(FuncFormatter(size))
    ax.tick_params(labelbottom=True, labelleft=True)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _caches() -> list[tuple[int, str]]:
    """Sizes of the second- and third-level cache, where the system tells."""
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, size = ((index / name).read_text().strip() for name in ("level", "size"))
        if level in ("2", "3") and size.endswith("K"):
            found.append((int(size[:-1]) << 10, f"L{level}"))
    return found


def _group(report: Report, library: str, mode: str, threads: int | None) -> str:
    several = len({row.threads for row in report.rows}) > 1
    return f"{library}{'' if mode == 'eager' else f' ({mode})'}{f', {threads} threads' if several else ''}"


def _title(report: Report) -> str:
    about = report.machine
    counts = sorted({row.threads for row in report.rows if row.threads})
    threads = f", {' and '.join(map(str, counts))} threads" if counts else ""
    kernels = next((f", kernels {k['instruction_set']}" for k in about["kernels"].values() if k["built"]), "")
    where = f"{about['processor']}{threads}{kernels}"
    return f"normkit {about['versions']['normkit']}, float32: time over the time of a copy ({where})"
