"""Wheel, sdist and editable install give the same package: ``python -m normkit.conformance.package.builds SOURCE``."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

HOOK = """
import sys, scikit_build_core.build as backend
hook, out, *objects = sys.argv[1:]
print(getattr(backend, hook)(out, {"build-dir": folder for folder in objects}))
"""

# What a program finds where `site` is installed: the public names of each module, and the contents of each other file.
FOUND = """
import hashlib, importlib, json, site, sys
from importlib import metadata, resources

where, files = sys.argv[1], json.load(sys.stdin)
site.addsitedir(where)
sys.path.insert(0, where)
found = {"version": metadata.version("normkit")}
for file in files:
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    try:
        if file.endswith(".py"):
            found[file] = sorted(name for name in vars(importlib.import_module(module)) if not name.startswith("_"))
        else:
            folder, _, name = file.rpartition("/")
            data = resources.files(folder.replace("/", ".")).joinpath(name).read_bytes()
            found[file] = hashlib.sha256(data).hexdigest()
    except BaseException as error:  # a skipped test module's is no Exception
        found[file] = f"{type(error).__name__}: {error}"
import normkit
print(json.dumps({"file": normkit.__file__, "found": found}))
"""


def build(hook: str, source: Path, out: Path, *objects: Path) -> Path:
    """Call one build hook in ``source``, as an installer does, and return what it made."""
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", HOOK, hook, str(out), *map(str, objects)],
        cwd=source, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return out / done.stdout.decode().split()[-1]


def contents(wheel: Path) -> dict[str, str]:
    """Hash of each file in a wheel, but for those that name the build itself."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if not name.endswith(("/", ".dist-info/RECORD", ".dist-info/WHEEL", ".dist-info/direct_url.json"))
        }


def found(wheel: Path, site: Path, files: list[str]) -> tuple[Path, dict]:
    """Where ``normkit`` comes from with ``wheel`` unpacked in ``site``, and what each of its files gives."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    done = subprocess.run(
        [sys.executable, "-P", "-c", FOUND, str(site)],
        cwd=site, input=json.dumps(files).encode(), stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    answer = json.loads(done.stdout.splitlines()[-1])
    return Path(answer["file"]), answer["found"]


def differences(a: dict, b: dict) -> list[str]:
    """Keys whose values differ, with both values."""
    return [f"{key}: {a.get(key)} / {b.get(key)}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def expected(source: Path) -> set[str]:
    """The files of the mapped folders, by their names in the package, but for what the wheel is to leave out."""
    wheel = tomllib.loads((source / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]
    files = {
        f"{package}/{file.relative_to(source / folder).as_posix()}"
        for package, folder in wheel["packages"].items()
        for file in (source / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    return {file for file in files if not file.startswith(tuple(f"{folder}/" for folder in wheel["exclude"]))}


def compare(source: Path, scratch: Path) -> tuple[list[str], list[str]]:
    """What differs between the three, and the package's files."""
    # That of tox is compiled already; the two others are compiled once.
    tested = os.environ.get("TOX_PACKAGE")
    wheel = Path(tested) if tested else build("build_wheel", source, scratch / "wheel")
    with tarfile.open(build("build_sdist", source, scratch / "sdist")) as archive:
        archive.extractall(scratch / "unpacked", filter="data")
    (unpacked,) = (scratch / "unpacked").iterdir()
    repeated = build("build_wheel", unpacked, scratch / "repeated", scratch / "objects")
    editable = build("build_editable", unpacked, scratch / "editable", scratch / "objects")

    shipped = contents(wheel)
    wrong = [f"wheel / wheel of the sdist: {text}" for text in differences(shipped, contents(repeated))]
    about = {name: value for name, value in shipped.items() if ".dist-info/" in name}
    about_editable = {name: value for name, value in contents(editable).items() if ".dist-info/" in name}
    wrong += [f"wheel / editable: {text}" for text in differences(about, about_editable)]

    files = sorted(shipped.keys() - about.keys())
    wrong += [f"not in the wheel: {file}" for file in sorted(expected(source) - set(files))]
    place, plain = found(wheel, scratch / "site", files)
    place_editable, redirected = found(editable, scratch / "site-editable", files)
    wrong += [f"wheel / editable: {text}" for text in differences(plain, redirected)]
    for where, folder in ((place, scratch / "site"), (place_editable, unpacked)):
        if not where.is_relative_to(folder):
            wrong.append(f"normkit was imported from {where}, not from {folder}")
    return wrong, files


def main() -> int:
    """Print what differs; exit status 1 if anything does."""
    with tempfile.TemporaryDirectory() as scratch:
        wrong, files = compare(Path(sys.argv[1]).resolve(), Path(scratch).resolve())
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"wheel, sdist and editable install: {len(files)} files, {len(wrong)} differences")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
