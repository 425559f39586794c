"""`normkit check` with --html and --compare, and the schema of --json."""

import copy
import json
from html.parser import HTMLParser
from importlib import resources

import pytest

from normkit import _check, _compare, _page, _table
from normkit.bench import brief, cells, rows
from normkit.bench.timing import Spread
from normkit.conformance import across
from normkit.conformance.package.command import hiding, normkit_command

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("jinja2")

VOID = {"meta", "br", "path", "use", "i"}
SECTIONS = ["errors", "ladder", "agreement", "speed", "divergences", "machine", "rows"]


class Page(HTMLParser):
    """The parts of a page that are asked about."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.open, self.cells, self.words = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag == "td":
            self.cells.append([attrs, ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and "td" in self.open:
            self.cells[-1][1] += data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page of NumPy and its JSON."""
    folder = tmp_path_factory.mktemp("page")
    done = normkit_command("check", "--quick", "--backend", "numpy", "--html", "r.html", "--json", "r.json", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(file.name for file in folder.iterdir()) == ["r.html", "r.json"]
    return (folder / "r.html").read_text("utf-8"), json.loads((folder / "r.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def schema():
    found = json.loads(resources.files("normkit").joinpath("check.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def report(**changes):
    """A small report of two libraries, as it may come out anywhere."""
    place = ("layer_norm", "float32", "forward")
    tolerance = _check.tolerance("forward", "float32")

    def at(library, native, error, native_error):
        layer, dtype, quantity = place
        return _check.Measurement(
            library,
            layer,
            dtype,
            quantity,
            "normal",
            "contiguous",
            native,
            error,
            native_error,
            1.0,
            tolerance,
            path="plain",
        )

    one = Spread(0.002, 0.0019, 0.0021)
    row = rows.Row(
        "torch", "LN <8x8>", "layer_norm", (8, 8), "", "float32", "forward", "eager", "torch", one, one, "kernel",
        native_time=one, speedup=Spread(2.5, 2.4, 2.6), to_floor=Spread(1.25, 1.2, 1.3),
        native_to_floor=Spread(31.2, 31, 32),
    )  # fmt: skip
    about = {
        "date": "2026-01-31T10:00:00+00:00", "platform": "an <OS>", "python": "3.11", "processor": "a & b", "cores": 2,
        "versions": {"normkit": "0.1.0", "torch": "<script>alert(1)</script>"}, "devices": {"torch": "cpu"},
        "threads": {"torch": 1}, "kernels": {"torch": {"built": False, "reason": "none"}}, "variables": {},
    }  # fmt: skip
    found = _check.Report(
        True,
        [at("numpy", "textbook", 0.5, 64.0), at("torch", "torch", 1.5, float("inf"))],
        machine=about,
        ladder=[across.Rung("torch", "layer_norm", "torch", 10.0**k, 0.5, 10.0**k) for k in range(4)],
        agreement=[across.Pair("numpy", "torch", "", "", "normal", 1.25, "layer_norm")],
        speed=[row],
    )
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_the_page_needs_nothing_beside_it(made):
    page = Page(made[0])
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    # One library agrees with no other.
    assert [name for name in page.ids if name in SECTIONS] == [name for name in SECTIONS if name != "agreement"]
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "base", "form"}
    for tag, attrs in page.tags:
        loads = [v for k, v in attrs.items() if k in ("src", "srcset", "data", "action", "xlink:href")]
        assert all(v.startswith("#") for v in loads), (tag, attrs)
        assert not any(k.startswith("on") for k in attrs)
        if "href" in attrs and tag != "use":
            assert tag == "a"
            assert attrs["href"].startswith(("https://", "#"))
            assert attrs["href"][1:] in page.ids or attrs["href"].startswith("https://")
    assert "url(http" not in made[0].replace("'", "").replace('"', "")
    assert "@import" not in made[0]
    assert "prefers-color-scheme: dark" in made[0]


def test_the_page_says_what_the_table_says(made):
    """The verdict, versions, and a row for each of the JSON's with its figures."""
    page, found = Page(made[0]), made[1]
    text = " ".join(" ".join(page.words).split())
    assert "normkit is within tolerance everywhere." in text
    assert f"{len(found['measurements'])} measurements" in text
    assert found["machine"]["versions"]["numpy"] in text
    cells = [(attrs.get("data-v"), words) for attrs, words in page.cells]
    for row in found["rows"]:
        for name in ("error", "native_error", "native_real", "distance"):
            if row[name] is not None:
                value = float(row[name])
                assert (str(value), _table.figure(value).replace("inf", "∞")) in cells, (name, row)


def test_speed_and_ladder_are_drawn(made):
    page, found = Page(made[0]), made[1]
    assert found["speed"]
    assert found["speed"][0]["direction"] == "forward"  # a busy machine leaves the last ones out
    texts = [words for _, words in page.cells]
    for row in found["speed"]:
        assert any(cells.short(row["to_floor"]["median"]) in words for words in texts)
    svgs = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(svgs) == len({rung["layer"] for rung in found["ladder"]}) == 6
    assert {rung["offset"] for rung in found["ladder"]} == set(across.OFFSETS)
    drawing = made[0].partition("<svg")[2]
    assert "var(--normkit)" in drawing
    assert "mean / spread</text>" in drawing
    assert "#fe0" not in made[0]


def test_json_is_as_its_schema_says(made, schema):
    schema.validate(made[1])
    schema.validate(json.loads(json.dumps(report().json())))
    for spoil in (
        lambda found: found.pop("ladder"),
        lambda found: found["schema"].update(version=1),
        lambda found: found["rows"][0].update(error="many"),
        lambda found: found["rows"][0].update(extra=1),
        lambda found: found["agreement"][0].update(distance=-1),
    ):
        found = json.loads(json.dumps(report().json()))
        spoil(found)
        assert not schema.is_valid(found)


def test_what_comes_from_outside_is_text():
    text = _page.render(report(broken={"torch, speed": "Error: <b>&</b>"}))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "PyTorch, speed could not be measured: Error: &lt;b&gt;&amp;&lt;/b&gt;" in text
    assert "LN &lt;8x8&gt;" in text
    assert "7 comparisons were left out" in text
    assert "an &lt;OS&gt;; a &amp; b" in text


def test_a_figure_out_of_tolerance_shows():
    wrong = report()
    object.__setattr__(wrong.measurements[0], "error", 3.0)
    page = Page(_page.render(wrong))
    assert "normkit: out of tolerance in 1 of 2 rows." in " ".join(" ".join(page.words).split())
    failed = [words for attrs, words in page.cells if "failed" in attrs.get("class", "")]
    assert failed == ["3.00", "3.00"]  # in the heat map, and in the table of all rows
    shades = [(words, attrs["class"].split()[-1]) for attrs, words in page.cells if "class" in attrs]
    assert {("64.0", "h1"), ("∞", "h4"), ("1.50", "h0")} <= set(shades)


def test_what_was_not_measured_has_no_section():
    page = Page(_page.render(report(ladder=[], agreement=[], speed=None)))
    assert [name for name in page.ids if name in SECTIONS] == ["errors", "divergences", "machine", "rows"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--html", "no/such/r.html"], "--html cannot write 'no/such/r.html': No such file or directory."),
        (["--html", "."], "--html wants a file to write to; received '.', which is none."),
        (["--html", "a", "--json", "./a"], "--html and --json want two files; received 'a' for both."),
        (["--factor", "3"], "--factor is for --compare."),
        (["--no-speed"], "--no-speed is for --html."),
        (["--compare", "a.json", "b.json", "--quick"], "--compare measures nothing: beside it there may be --factor"),
        (["--compare", "a.json", "b.json"], "Cannot read 'a.json': No such file or directory."),
        (["--compare", "a.json"], "Option '--compare' requires 2 arguments."),
    ],
    ids=range(8),
)
def test_a_wrong_call_is_one_sentence_before_anything_is_measured(args, message, tmp_path):
    done = normkit_command("check", *args, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_what_the_page_needs(tmp_path):
    done = normkit_command("check", "--html", "r.html", cwd=tmp_path, site=hiding(tmp_path, "jinja2"))
    assert done.returncode == 2
    assert done.stderr == 'normkit check: --html needs jinja2: python -m pip install "normkit[check]"\n'
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "was not written by `normkit check --json`"),
        ('{"schema": {"name": "normkit-bench", "version": 1}}', "was not written by `normkit check --json`"),
        (
            '{"schema": {"name": "normkit-check", "version": 1}}',
            "has version 1 of the format; this normkit compares ver",
        ),
        ('{"schema": {"name": "normkit-check", "version": 2}}', "is not whole: it lacks"),
    ],
)
def test_what_cannot_be_compared_is_refused(text, message, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        _compare.loaded(str(tmp_path / "a.json"))


def changed(**rows):
    """What moved when these rows of numpy and torch are other than they were: an error, a native error, a verdict."""
    old = json.loads(json.dumps(report().json()))
    new = copy.deepcopy(old)
    for row in new["rows"]:
        row.update(rows.get(row["library"], {}))
    return old, new, _compare.compare(old, new)


@pytest.mark.parametrize(
    ("row", "kind", "lost"),
    [
        ({}, None, False),
        ({"error": 0.99}, None, False),
        ({"error": 1.01}, "worse", False),
        ({"error": 0.001}, None, False),
        ({"error": 2.5, "passed": False}, "out of tolerance", True),
        ({"native_error": 31.0}, "better", False),
        ({"native_error": "inf"}, "worse", False),
        ({"native_error": None}, "gone", False),
    ],
)
def test_a_row_that_moved(row, kind, lost):
    found = changed(numpy=row)[2]
    assert [c.kind for c in found.changes] == ([kind] if kind else [])
    assert found.lost is lost


def test_rows_come_and_go_and_come_back_into_tolerance():
    old, new, _ = changed(torch={"error": 9.0, "passed": False})
    back = _compare.compare(new, old)
    assert [(c.kind, c.old, c.new) for c in back.changes] == [("within tolerance again", 9.0, 1.5)]
    assert not back.lost
    rows = new["rows"]
    new["rows"] = [row for row in rows if row["library"] == "torch"]
    fewer = _compare.compare(old, new)
    assert [c.kind for c in fewer.changes] == ["out of tolerance", "gone", "gone"]
    more = _compare.compare(old | {"rows": []}, new)
    assert [c.kind for c in more.changes] == ["new, out of tolerance", "new"]
    assert more.lost
    assert _compare.compare(old, old | {"broken": {"jax": "Error"}}).lost


def test_compare_prints_what_moved(tmp_path):
    old, new, _ = changed(torch={"error": 9.0, "passed": False})
    new["passed"], new["machine"]["versions"]["torch"] = False, "9.9"
    for name, found in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(found), "utf-8")
    done = normkit_command("check", "--compare", "old.json", "new.json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "PyTorch float32 layer_norm forward normkit 1.50 9.00 out of tolerance" in lines
    assert "torch <script>alert(1)</script> → 9.9" in lines
    verdict = "✗ normkit is within tolerance before, out of tolerance now: 1 out of tolerance, of 4 rows in both"
    assert verdict in " ".join(lines)
    same = normkit_command("check", "--compare", "old.json", "old.json", "--factor", "1.5", cwd=tmp_path)
    assert same.returncode == 0
    assert "✓ normkit is still within tolerance: nothing moved, of 4 rows in both" in " ".join(same.stdout.split())


def test_a_machine_that_is_busy_is_not_kept_for_long(monkeypatch):
    monkeypatch.setattr(rows, "measure", lambda job, directions, seconds, rounds: [(str(job.workload), *directions)])
    every = [*brief.NAMES[1]]
    wanted = [[(name, direction)] for direction in ("forward", "backward") for name in every]
    assert list(brief.measure("numpy")) == wanted
    assert len(wanted) == brief.count("numpy")
    monkeypatch.setattr(brief, "LIMIT", -1)
    assert list(brief.measure("numpy")) == []


def test_outputs_are_held_against_each_other():
    """Two libraries that differ in one element by one unit of the largest."""
    import numpy as np

    from normkit.conformance.libraries import library

    mine = across.outputs(library("numpy"))
    other = {key: y.copy() for key, y in mine.items()}
    key = ("group_norm", "tabular columns", "")
    largest = np.abs(mine[key]).max()
    other[key][0, 0, 0, 0] += np.float32(64 * 2.0**-23 * largest)
    found = across.worst(across.pairs({"numpy": mine, "torch": other}))
    assert set(found) == {(("numpy", whose), ("torch", whose)) for whose in ("", "textbook")}
    pair = found[("numpy", ""), ("torch", "")]
    assert (pair.layer, pair.input) == ("group_norm", "tabular columns")
    assert abs(pair.distance - 64) < 1
    assert found[("numpy", "textbook"), ("torch", "textbook")].distance == 0
    assert across.pairs({"numpy": {k: y for k, y in mine.items() if not k[2]}}) == []
