"""Running statistics after training: what they are of all the data, and how far the recorded ones are from that."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from ._batches import Batches, Call, bar, call_with
from ._dispatch import describe
from ._report import NormLayer, counted, grouped, kind_of, named
from ._validate import epsilon
from .backends.models import Functional, Recalibrates, Recorded, measured_of, original_of
from .core.normalize import BatchStats
from .core.population import Population
from .stats import RunningStats

if TYPE_CHECKING:
    from .diagnostics.channels import ChannelGap


class Gap(NamedTuple):
    """How far the running statistics of a layer are from those of the population, in its worst channels."""

    name: str
    kind: str
    #: Values per channel.
    count: int  # type: ignore[assignment]  # in place of tuple.count
    #: ``max |running mean - mean| / sqrt(var + eps)``.
    mean: float
    #: The smallest and the largest of ``(running var + eps) / (var + eps)``.
    var: tuple[float, float]

    @property
    def size(self) -> float:
        """Zero where there is no gap: the larger of the mean's and of the logarithms of the variance's."""
        return max(self.mean, *(abs(float(np.log(max(ratio, 1e-300)))) for ratio in self.var))


@dataclass(frozen=True, repr=False)
class Gaps:
    """What :func:`statistics_gap` found, or :func:`recalibrate` closed."""

    #: The model's class.
    model: str
    #: Whether the running statistics are those of the population now.
    closed: bool
    #: How many batches there were.
    batches: int
    layers: tuple[Gap, ...]
    #: The batch norms without, each with the reason.
    left: tuple[NormLayer, ...] = ()
    #: The new state of a model that holds none: linen's variables, haiku's state, equinox's ``State``.
    state: Any = field(default=None, compare=False)
    #: Of each layer by its name, every channel.
    channels: dict[str, ChannelGap] = field(default_factory=dict, compare=False)

    def plot(self, ax: Any = None) -> Any:
        """Draw the divergences of all channels, layer by layer, into the given axes or new ones (matplotlib's)."""
        from .diagnostics import plots

        return plots.draw(self, ax)

    def __repr__(self) -> str:
        done = "recalibrated" if self.closed else "measured"
        number = f"{self.batches} batch{'' if self.batches == 1 else 'es'}"
        lines = [f"{self.model}: {counted(self.layers)} {done} on {number}, {len(self.left)} left"]
        shown = sorted(self.layers, key=lambda gap: -gap.size)[:8]
        if shown:
            were = "were" if self.closed else "are"
            lines.append(f"        running statistics {were} off, in the worst channel of each layer, by")
            lines.append("        mean / spread   variance, times            values")
        for gap in shown:
            low, high = (f"{ratio:.3g}" for ratio in gap.var)
            lines.append(
                f"        {gap.mean:13.2g}   {low + ' to ' + high:16} {gap.count:14}   {gap.name or '(the model)'}"
            )
        if len(self.layers) > len(shown):
            lines.append(f"        and {len(self.layers) - len(shown)} more, which were nearer".replace("were", were))
        return "\n".join([*lines, *grouped(self.left, "")])


def recalibrate(
    model: Any,
    batches: Iterable[Any],
    *,
    call: Call | None = None,
    sequential: bool = False,
    progress: bool | None = None,
) -> Gaps:
    """Set the running statistics of every batch norm to those of all the batches together.

    Counts, means and sums of squared deviations are merged in float64, so that a short batch weighs less and what is
    between batches is not lost, as it is in an average of their variances::

        mean = Σ n_k mean_k / n        var = Σ n_k (var_k + (mean_k - mean)²) / n,  n = Σ n_k

    (times n / (n - 1) where the framework stores that). Within, every layer is in its inference mode, but that batch
    norms normalize by the batch; so dropout does not widen what they see. Masked elements do not count. A batch norm of
    Keras whose ``trainable`` is false is frozen, and left.

    Parameters
    ----------
    model : a torch.nn.Module, a keras.Layer, a layer of tf_keras or a flax.nnx.Module, in any mode, which stays; or
        what a model that holds no state comes as: ``(module, variables)`` of linen, ``(transformed, params, state)`` of
        haiku, ``(model, state)`` of equinox
    batches : what the model is called with, one after the other: a mapping is passed by name, of a tuple or list the
        first element, which labels follow
    call : ``call(model, batch)``, for a model that is called in another way. One that holds no state is called here
        without it, as in ``lambda model, batch: model(batch["image"], train=False)``, and one of equinox with all
        samples at once: arrays are mapped over their first axis
    sequential : let each batch norm see what it will see in inference, when those before it normalize by the
        population's statistics: the same as all data in one batch. It goes over the batches once for each batch norm.
    progress : whether to show a progress bar (rich's) on standard error; None: on a terminal, if rich is installed

    Returns
    -------
    Gaps
        How far the statistics were off, layer by layer. ``state`` is the new state of a model that holds none, of which
        nothing was changed: variables, haiku's or equinox's state.

    Raises
    ------
    TypeError
        model is of no framework whose statistics are known, or batches is not iterable.
    ValueError
        There are no batches (or an iterator that ends after one pass, where more are wanted); the model has no batch
        norm, or is not built, compiled, scripted, exported, traced or quantized; statistics are not finite, of one
        value, or more than the dtype of the running ones holds. Nothing is changed then.

    Examples
    --------
    >>> import torch
    >>> import normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    >>> batches = [torch.tensor([[1.0, 10.0], [3.0, 20.0]]), torch.tensor([[5.0, 30.0]])]
    >>> gaps = nk.recalibrate(model, batches)
    >>> model[0].running_mean, model[0].running_var
    (tensor([ 3., 20.]), tensor([  4., 100.]))
    """
    return _close("recalibrate", model, batches, call, sequential, progress, write=True)


@overload
def statistics_gap(
    model: RunningStats | BatchStats, batches: RunningStats | BatchStats, *, eps: float = ...
) -> ChannelGap: ...


@overload
def statistics_gap(
    model: Any,
    batches: Iterable[Any],
    *,
    call: Call | None = ...,
    sequential: bool = ...,
    progress: bool | None = ...,
) -> Gaps: ...


def statistics_gap(
    model: Any,
    batches: Any,
    *,
    call: Call | None = None,
    sequential: bool = False,
    progress: bool | None = None,
    eps: float = 0.0,
) -> Any:
    """How far the running statistics of every batch norm are from those of all the batches together.

    Arguments and errors are those of :func:`recalibrate`; nothing is changed. Of statistics in the place of a model,
    ``statistics_gap(running, precise, eps=...)`` compares the two (each a RunningStats or BatchStats) channel by
    channel: the divergence ``KL(precise ‖ running)`` of normal distributions in nats, the mean in standard deviations,
    the ratio of variances. ``gaps.channels`` has the same for each layer of a model.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> running = nk.RunningStats(np.zeros(2), np.ones(2))
    >>> precise = nk.RunningStats(np.asarray([0.0, 3.0]), np.asarray([1.0, 4.0]))
    >>> nk.statistics_gap(running, precise).kl.round(3)
    array([0.   , 5.307])
    """
    if isinstance(model, (RunningStats, BatchStats)):
        from .diagnostics.channels import channel_gap

        if call is not None or sequential:
            raise ValueError("statistics_gap takes call and sequential with a model, not with statistics.")
        return channel_gap(model, batches, epsilon(eps))
    if eps:
        raise ValueError("statistics_gap takes eps with statistics; the layers of a model have their own.")
    return _close("statistics_gap", model, batches, call, sequential, progress, write=False)


def _close(
    function: str, model: Any, batches: Any, call: Call | None, sequential: bool, progress: bool | None, write: bool
) -> Gaps:
    """Measure, and write what was measured if that is asked."""
    framework: Any = measured_of(model)
    if not isinstance(framework, Recalibrates):
        raise TypeError(
            f"{function} takes a torch.nn.Module, a keras.Layer, a layer of tf_keras or a flax.nnx.Module, or a model "
            f"with its state: (linen module, variables), (haiku transform, params, state), (equinox model, state); "
            f"received {describe(model)}."
        )
    title, functional = type(model).__name__, framework if isinstance(framework, Functional) else None
    if functional:
        model = functional.opened(model)
        title = model.name
    framework.refuse(model, function)
    found = [(layer, names, framework.recorded(layer)) for layer, names in named(framework, model)]
    norms = [(layer, names, recorded) for layer, names, recorded in found if recorded is not None]
    if not norms:
        has = "no running statistics" if functional else f"{len(found)} layers"
        raise ValueError(f"{function} found no batch norm in {title}, which has {has}.")
    wanted = {id(layer): layer for layer, _, recorded in norms if not isinstance(recorded, str)}
    names = {id(layer): names[0] for layer, names, _ in norms}
    source = Batches(function, batches, "sequential=True" if sequential else "")
    with framework.inference(model), bar(function, progress) as start:
        seen = _Pass(framework, wanted, names)
        count = seen.over(source, start, model, call or call_with)
        populations = dict(seen.populations)
        if sequential:
            populations = _one_by_one(seen, source, start, model, call or call_with)
    gaps, left, measured, channels = [], [], [], {}
    for layer, all_names, _ in norms:
        recorded = framework.recorded(layer)
        kind = kind_of(layer.kind if functional else original_of(layer) or type(layer))
        population = populations.get(id(layer))
        if not isinstance(recorded, Recorded) or population is None or not population.count:
            reason = recorded if isinstance(recorded, str) else "no batch reached it"
            left.append(NormLayer(all_names[0], kind, reason, all_names[1:]))
            continue
        if population.count == 1:
            raise ValueError(f"{function} saw one value per channel in {_called(all_names[0])}, which has no variance.")
        apart = _apart(recorded, population)
        extremes = float(apart.var.min()), float(apart.var.max())
        gap = Gap(all_names[0], kind, population.count, float(np.abs(apart.mean).max()), extremes)
        var = population.var(recorded.unbiased)
        most = max(float(np.abs(population.mean).max(initial=0)), float(var.max(initial=0)))
        if write and most > recorded.largest:
            raise ValueError(
                f"{function} cannot write {most:.3g} to the running statistics of {_called(all_names[0])}, whose "
                f"dtype ends at {recorded.largest:.3g}: keep them in float32."
            )
        gaps.append(gap)
        measured.append((layer, population.mean, var))
        channels[all_names[0]] = apart
    for layer, mean, var in measured if write else ():
        framework.record(layer, mean, var, count)
    state = functional.state(model) if functional and write else None
    return Gaps(title, write, count, tuple(gaps), tuple(left), state, channels)


def _called(name: str) -> str:
    return f"layer {name!r}" if name else "the model"


def _apart(recorded: Recorded, population: Population) -> ChannelGap:
    """How far the running statistics of a layer are from its population's."""
    from .diagnostics.channels import between_statistics

    var, eps = population.var(recorded.unbiased), recorded.eps
    return between_statistics(recorded.mean, recorded.var + eps, population.mean, var + eps)


class _Pass:
    """Populations of what some batch norms see while the batches go through the model."""

    def __init__(self, framework: Recalibrates, wanted: dict[int, Any], names: dict[int, str]) -> None:
        self.framework, self.wanted, self.names = framework, wanted, names
        #: In the order in which the layers were called first.
        self.populations: dict[int, Population] = {}
        self.settled: set[int] = set()

    def over(self, source: Batches, start: Any, model: Any, call: Call) -> int:
        """All batches; returns how many there were."""
        self.populations.clear()
        count = 0
        with self.framework.watch(self.wanted.values(), self._see):
            for self.batch in source.once(start(source.length)):
                count += 1
                self.count = count
                call(model, self.batch)
        return count

    def _see(self, layer: Any, population: Population) -> bool:
        if id(layer) in self.settled:
            return False
        if population.count and not (np.isfinite(population.mean).all() and np.isfinite(population.m2).all()):
            name = _called(self.names[id(layer)])
            raise ValueError(f"batch {self.count} brings {name} values whose mean or variance is not finite.")
        self.populations[id(layer)] = self.populations.get(id(layer), Population()).merge(population)
        return True


def _one_by_one(seen: _Pass, source: Batches, start: Any, model: Any, call: Call) -> dict[int, Population]:
    """Settle the first layer that is called, and go over the batches again for the next."""
    settled: dict[int, Population] = {}
    for key in list(seen.populations):
        if settled:
            seen.over(source, start, model, call)
        settled[key] = population = seen.populations[key]
        seen.settled.add(key)
        seen.framework.record(seen.wanted[key], population.mean, population.var(unbiased=False), 0)
    return settled
