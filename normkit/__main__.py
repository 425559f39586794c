"""The command `normkit`, up to where click and rich are needed."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("click", "rich")


def main() -> int:
    """Run the command line; without what it needs, say what to install."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        install = 'python -m pip install "normkit[check]"'
        print(f"normkit: the command needs {' and '.join(missing)}: {install}", file=sys.stderr)
        return 2
    try:
        from normkit.backends import kernels  # noqa: F401  what the environment asks of them may be wrong
    except (ValueError, ImportError) as error:
        print(f"normkit: {error}", file=sys.stderr)
        return 2
    from normkit import cli

    return cli.run()


if __name__ == "__main__":
    sys.exit(main())
