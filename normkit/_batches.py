"""Batches for a model: how it is called with one, and how far it is through them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

#: How a model is called with a batch, for those that the default does not suit.
Call = Callable[[Any, Any], Any]


def call_with(model: Any, batch: Any) -> Any:
    """Arguments by name for a mapping; of a tuple or list the first element, which labels follow; else the batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) and batch else batch)


class Batches:
    """The batches that a function got, gone over once or more; none at all are an error."""

    def __init__(self, function: str, batches: Iterable[Any], again: str = "") -> None:
        """``again``: the option for which they are gone over more than once."""
        try:
            once = iter(batches) is batches
        except TypeError:
            raise TypeError(f"{function} takes an iterable of batches; received {type(batches).__name__}.") from None
        if again and once:
            raise ValueError(
                f"{function} goes over the batches once for each layer with {again}: pass a list or a loader, for a "
                f"{type(batches).__name__} ends after one."
            )
        self.function, self.batches = function, batches
        self.length = len(batches) if isinstance(batches, Sized) else None

    def once(self, advance: Callable[[], None]) -> Iterator[Any]:
        """Each batch; ``advance`` is called when the next is asked for."""
        none = True
        for batch in self.batches:
            none = False
            yield batch
            advance()
        if none:
            raise ValueError(
                f"{self.function} received no batches: there are none in this {type(self.batches).__name__}, or it is "
                f"an iterator that was used before."
            )


@contextlib.contextmanager
def bar(label: str, progress: bool | None) -> Iterator[Callable[[int | None], Callable[[], None]]]:
    """A progress bar on standard error; what is yielded starts another round of so many steps and returns the step.

    ``None`` shows one where standard error is a terminal and rich is installed.
    """
    rich_progress: Any = None
    if progress or (progress is None and sys.stderr.isatty()):
        try:
            from rich import progress as rich_progress
        except ImportError:
            if progress:
                raise ImportError("progress=True needs rich, which is not installed: pip install rich.") from None
    if rich_progress is None:
        yield lambda steps: lambda: None
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    columns = rich_progress.Progress.get_default_columns()
    with rich_progress.Progress(*columns, console=console, transient=console.is_terminal) as shown:
        task = shown.add_task(label, total=None)
        total = 0

        def start(steps: int | None) -> Callable[[], None]:
            nonlocal total
            total += steps or 0
            shown.update(task, total=total or None)
            return lambda: shown.advance(task)

        yield start
