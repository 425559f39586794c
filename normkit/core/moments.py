"""Mean, variance and reciprocal spread that keep their digits: large offsets, huge and tiny scales, constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import powers
from .plan import Plan

Array = Any


#: Results of one way, or of the other. The first also says whether they are right; the second has none where a share of
#: x is to be taken instead.
Plain = Callable[[], tuple[Array, tuple[Array, ...]]]
Rescued = Callable[[], tuple[Array, ...]]


def rescue_always(plain: Plain, rescued: Rescued) -> tuple[Array, ...]:
    """For arrays whose values cannot be looked at for free: the rescued result is right for every input."""
    return rescued()


def rescue_if_needed(plain: Plain, rescued: Rescued) -> tuple[Array, ...]:
    """For arrays with values at hand: the cheaper way wherever it is right."""
    right, result = plain()
    return result if bool(right) else rescued()


def there_and_back(xp, values: Array, dtype: Any) -> Array:
    """The values as a narrower dtype has them."""
    return xp.astype(xp.astype(values, dtype), values.dtype)


def never(values: Array, axes: tuple[int, ...]) -> bool:
    """No sum is short."""
    return False


def at_once(values: Array, axes: tuple[int, ...]) -> None:
    """No sum is taken in stages."""


def unchanged(values: Array, axes: tuple[int, ...]) -> Array:
    """For libraries that store every result anyway."""
    return values


def first_of(values: Array, axes: tuple[int, ...]) -> Array:
    """The first of each set."""
    return values[tuple(slice(0, 1) if a in axes else slice(None) for a in range(values.ndim))]


#: A part with which sums stay in range up to 4096 times what they could be: less would lose differences of 1e-30.
PART = 2.0**-12
#: A share of x that is never beyond the range from its mean, and whose spread has a reciprocal that is no subnormal.
SHARE = 0.25


class Habits(NamedTuple):
    """How the core computes with a library: what it must do, and what it may skip."""

    #: Sum float32 in float64: for a library that adds up one element after the other.
    wide: bool = False
    #: Which sums are so short that float32 holds them as well.
    short: Callable[[Array, tuple[int, ...]], bool] = never
    #: Of others, a shape in which two stages of them are: the axes of the first and of the second.
    stages: Callable[[Array, tuple[int, ...]], tuple[list[Any], tuple[int, ...], tuple[int, ...]] | None] = at_once
    #: But a few along the last axis, or all of it, are summed in float32 before: for a library that is slow to make
    #: float64 of all.
    staged: bool = False
    #: Add at most so many numbers one after the other, then the sums, without float64: for a compiler whose loops do
    #: (XLA on a processor). 0 leaves sums to the library.
    longest: int = 0
    #: Take all of float32's moments from float64 sums, in one pass: for a compiler that forms several sums in one loop.
    one_pass: bool = False
    #: Then add the last axes' numbers in so many sums side by side, and those in pairs: for a compiler that is slow to
    #: add up a vector.
    lanes: int = 0
    #: Store sums without the axes that they are over: for a compiler that makes another view of them otherwise.
    flat: bool = False
    #: How to choose between squares of ``d`` and squares of ``d`` times a power of two.
    rescue: Callable[[Plain, Rescued], tuple[Array, ...]] = rescue_always
    #: Values can be looked at: what to do about numbers that leave the dtype's range can wait until one does.
    hasty: bool = False
    #: A share of x that is multiplied again would become the other factor's: for compilers that move constants there.
    moves: bool = False
    #: What part of differences from the mean is summed, so that they may be large: for compilers that flush what that
    #: makes subnormal anyway.
    part: float = 1.0
    #: How to round to a narrower dtype, where a compiler leaves out a cast there and back.
    rounded: Callable[[Any, Array, Any], Array] = there_and_back
    #: How to have a set's factor stored, where a compiler computes it anew for each of the elements.
    stored: Callable[[Array, tuple[int, ...]], Array] = unchanged
    #: And its mean, where it is another from element to element.
    stored_mean: Callable[[Array, tuple[int, ...]], Array] = unchanged
    #: One of the values of each set, whichever.
    one_of: Callable[[Array, tuple[int, ...]], Array] = first_of

    def share(self, plan: Plan) -> float:
        """What share of x is worked with."""
        return 1.0 if plan.power is not None or (self.moves and not plan.center) else SHARE


class Moments(NamedTuple):
    """What is known of each reduced set, with the reduced axes kept at length 1, in the accumulation dtype.

    The mean is ``mean + residue``: the first is the mean rounded to the dtype, the second what that rounding took; or
    the first is one of the values, and the second how far the mean is from it.
    """

    mean: Array | None
    residue: Array | None
    var: Array
    rstd: Array
    count: Array | int  # type: ignore[assignment]  # in place of tuple.count


class _Range(NamedTuple):
    """Where squares are safe, and the powers of two that bring them there.

    ``largest`` and ``smallest`` bound the mean square; ``large`` and ``small`` bound |d|, which ``down`` and ``up``
    multiply. A set whose spread is below ``noise`` times its mean is constant: a last bit that differs in one of 2**28
    elements is more, unless the mean is below ``faint`` and its square is lost. A variance or reciprocal root beyond
    ``most`` is given as ``most``, a quarter of the dtype's range: n / (n - 1) times it is finite.
    """

    largest: float
    smallest: float
    large: float
    down: float
    small: float
    up: float
    noise: float
    faint: float
    most: float

    def needs_up(self, eps: float) -> bool:
        """Whether ``eps`` is too small to hide squares that underflow."""
        return eps < self.smallest * 2.0**24


_FLOAT32 = _Range(2.0**110, 2.0**-90, 2.0**40, 2.0**-80, 2.0**-30, 2.0**70, 2.0**-38, 2.0**-24, 2.0**126)
_FLOAT64 = _Range(2.0**950, 2.0**-850, 2.0**400, 2.0**-600, 2.0**-300, 2.0**500, 2.0**-90, 2.0**-430, 2.0**1022)


def _range_of(xp, x: Array) -> _Range:
    return _FLOAT64 if x.dtype == xp.float64 else _FLOAT32


#: So many numbers are added in float32 where sums are staged: along memory, side by side and in pairs; and across it.
ALONG, ACROSS = 32, 8

#: At least so many sums stand side by side, for vector registers.
LANES = 32


def accumulation_dtype(xp, dtype):
    """float64 for float64, float32 for everything narrower."""
    return xp.float64 if dtype == xp.float64 else xp.float32


def total(xp, x: Array, axes: tuple[int, ...], habits: Habits, over: Array | int = 1) -> Array:
    """The sum over ``axes``, kept at length 1, by ``over``; rounded once, after that, where it is taken in float64."""
    if not axes:
        return _by(x, over)
    if habits.longest:
        return _by(_in_stages(xp, x, axes, habits), over)
    if not habits.wide or x.dtype == xp.float64 or habits.short(x, axes):
        return _by(_sum(xp, x, axes, habits), over)
    if stages := habits.stages(x, axes):
        shape, first, second = stages
        found = xp.sum(xp.sum(xp.reshape(x, shape), axis=first, keepdims=True), axis=second)
        return _by(xp.reshape(found, _without(x, axes)), over)
    dtype = x.dtype
    if habits.staged and habits.hasty:
        found = _by_runs(xp, x, axes, habits)
    else:  # a traced length would be bound to how many runs it has
        if habits.staged and len(axes) > 1:
            x, axes = _sum(xp, x, axes[-1:], habits), axes[:-1]
        found = _sum(xp, x, axes, habits, xp.float64)
    return xp.astype(_by(found, over if is_number(over) else xp.astype(over, xp.float64)), dtype)


def _by(values: Array, over: Array | int) -> Array:
    """The quotient, which costs nothing where it is by one."""
    return values if type(over) is int and over == 1 else values / over


def _sum(xp, x: Array, axes: tuple[int, ...], habits: Habits, dtype: Any = None) -> Array:
    """The library's own sum, the axes kept at length 1."""
    if not habits.flat:
        return xp.sum(x, axis=axes, dtype=dtype, keepdims=True)
    return xp.reshape(xp.sum(x, axis=axes, dtype=dtype), _without(x, axes))


def _without(x: Array, axes: tuple[int, ...]) -> list[Any]:
    """x's shape, the axes at length 1."""
    return [1 if a in axes else n for a, n in enumerate(x.shape)]


def _by_runs(xp, x: Array, axes: tuple[int, ...], habits: Habits) -> Array:
    """The sum in float64 of sums in float32 of a few numbers along the last of the axes."""
    axis = axes[-1]
    n, run = x.shape[axis], ALONG if axis == x.ndim - 1 else ACROSS
    whole = n - n % run
    if not whole:
        return _sum(xp, _sum(xp, x, (axis,), habits), axes, habits, xp.float64)
    runs = xp.reshape(_part(x, axis, 0, whole), (*x.shape[:axis], -1, run, *x.shape[axis + 1 :]))
    found = _sum(xp, xp.sum(runs, axis=axis + 1), axes, habits, xp.float64)
    return found if whole == n else found + _by_runs(xp, _part(x, axis, whole, n), axes, habits)


def _in_stages(xp, x: Array, axes: tuple[int, ...], habits: Habits) -> Array:
    """The sum of sums of at most ``habits.longest`` numbers; along an axis of unknown length, in float64.

    Each is halved: XLA would make one long sum of a sum of sums. Of a long axis, numbers far from each other are added
    first, so that along the last axis, too, neighbours are added side by side.
    """
    halved = 0
    for axis in reversed(axes):
        while (n := x.shape[axis]) is not None and n > habits.longest:
            run = min(max(n // LANES, 2), habits.longest)
            run = next((k for k in range(run, run // 2, -1) if n % k == 0), run)
            lanes, rest = divmod(n, run)
            before, after = list(x.shape[:axis]), list(x.shape[axis + 1 :])
            head, tail = (x, None) if rest == 0 else (_part(x, axis, 0, n - rest), _part(x, axis, n - rest, n))
            x = xp.sum(xp.reshape(head, (*before, run, lanes, *after)), axis=axis) * 0.5
            if tail is not None:
                x = xp.concat([x, tail * 0.5], axis=axis)
            halved += 1
        if n is None:
            x = total(xp, x, (axis,), Habits(wide=True))
        else:
            x = xp.sum(x, axis=axis, keepdims=True) * 0.5
            halved += 1
    return x * 2.0**halved


def _part(x: Array, axis: int, start: int, stop: int) -> Array:
    return x[(slice(None),) * axis + (slice(start, stop),)]


def moments(
    xp, plan: Plan, x: Array, mask: Array | None, habits: Habits, count: Array | int
) -> tuple[Array, Array, Moments]:
    """Centre ``x`` (in the accumulation dtype, shaped ``plan.view``, zero where masked), and find its spread.

    ``d = x - m`` is exact where it matters, because ``m`` is near ``x``; its mean is the rounding error of ``m``, taken
    out again. Where squares of ``d`` would overflow or vanish, they are formed of ``d`` times a power of two. All is
    found of a share of x, which has the same digits, so that ``d`` itself stays in range.

    Returns
    -------
    d, factor, moments
        ``d * factor`` is the normalized x: exactly zero in a constant set, and where the mask is false. Either is what
        it would be of the share of x.
    """

    def quotient(values, over):
        return total(xp, values, plan.axes, habits, over)

    def average(values):
        return quotient(values, divisor)

    if mask is not None:
        valid = xp.where(mask, xp.ones_like(x), xp.zeros_like(x))
        count = total(xp, valid, plan.axes, habits)
    elif habits.one_pass and plan.power is None and x.dtype == xp.float32:
        return _in_one_pass(xp, plan, x, habits, count)
    divisor = at_least_one(xp, count)
    limits = _range_of(xp, x)
    all_of_x = x
    share = 1.0 if habits.hasty else habits.share(plan)
    eps = plan.eps * share**2
    d = shifted = x = times(x, share)
    mean = residue = None

    def centre():
        nonlocal d, shifted, mean, residue
        part = 1.0 if habits.hasty else habits.part
        if habits.longest:
            # XLA takes a sum times 1 / n from x, in some loops rounded and in others not: here x is multiplied instead.
            mean = total(xp, x * (1 / divisor), plan.axes, habits)
        else:
            mean = times(average(times(x, part)), 1 / part)
        if not habits.hasty:
            mean = xp.where(xp.isfinite(times(mean, 1 / share)), mean, one_of(x))
        shifted = masked(xp, mask, x - mean)
        residue = times(average(times(shifted, part)), 1 / part)
        d = masked(xp, mask, shifted - residue)

    def one_of(values):
        return habits.one_of(values, plan.axes) if mask is None else _valid_of(xp, plan, mask, values)

    if plan.center and not habits.hasty:
        centre()

    def values():
        return x if plan.power is not None and not plan.power.centred else d

    def square_of(values):
        if plan.power is None:
            return average(values * values)
        return powers.square(xp, plan, values, quotient, divisor)

    def padded(square, eps):
        if plan.power is not None and plan.power.floor:
            return xp.maximum(square, xp.zeros_like(square) + eps)
        return square + eps

    def plain():
        if plan.center and habits.hasty:
            centre()
        square = square_of(values())
        right = square <= limits.largest
        if limits.needs_up(eps):
            right = right & (square >= limits.smallest)
        return xp.all(right), (xp.sqrt(square), 1 / _root(xp, padded(square, eps), eps), square)

    def rescued():
        peak = xp.max(xp.abs(values()), axis=plan.axes, keepdims=True)
        if habits.hasty and not bool(xp.all(peak < limits.most * SHARE)):
            return ()
        scale, inverse, scaled_eps = _scale(xp, peak, limits, eps)
        square = square_of(values() * scale)
        root = _root(xp, padded(square, scaled_eps), eps)
        down = xp.minimum(scale, xp.ones_like(scale))
        # Not divided twice by scale: XLA would divide by its square, which is zero.
        var = xp.minimum(square, limits.most * share**2 * down * down) * inverse * inverse
        rstd = xp.minimum(scale / root, xp.full_like(root, limits.most))
        if not eps:
            rstd = xp.where(square > 0, rstd, xp.full_like(rstd, 1 / share))
        return xp.sqrt(square) * inverse, rstd, var

    found = habits.rescue(plain, rescued)
    if not found:  # the share is needed
        return moments(xp, plan, all_of_x, mask, habits._replace(hasty=False, part=PART), count)
    spread, factor, var = found
    rstd, var = times(factor, share), times(var, share**-2)
    if plan.center:
        height = xp.abs(mean)
        constant = spread < height * limits.noise
        if not limits.needs_up(eps):
            constant = constant & (height > limits.faint)
        factor = xp.where(constant, xp.zeros_like(factor), factor)
        rstd = xp.where(constant, xp.full_like(rstd, plan.eps**-0.5 if plan.eps else 1.0), rstd)
        residue = xp.where(constant, one_of(shifted), residue)
        var = xp.where(constant, xp.zeros_like(var), var)
        mean, residue = times(mean, 1 / share), times(residue, 1 / share)
    return d, habits.stored(factor, plan.axes), Moments(mean, residue, var, rstd, count)


def centred(x: Array, used: Moments) -> Array:
    """What x is from its mean, where it has one."""
    if used.mean is not None:
        x = x - used.mean
    return x if used.residue is None else x - used.residue


def factors(xp, plan: Plan, x: Array, used: Moments, habits: Habits) -> tuple[Array, Array]:
    """The two whose product is the normalized x, from moments that were found before: of a share of x, as there."""
    limits, share = _range_of(xp, x), habits.share(plan)
    if share == 1 or (habits.hasty and not bool(xp.any(used.rstd < limits.smallest))):
        return centred(x, used), used.rstd
    mean, residue = (None if a is None else a * share for a in (used.mean, used.residue))
    d = centred(x * share, used._replace(mean=mean, residue=residue))
    return d, xp.minimum(used.rstd, xp.full_like(used.rstd, limits.most * share)) * (1 / share)


def _in_one_pass(xp, plan: Plan, x: Array, habits: Habits, count: Array | int) -> tuple[Array, Array, Moments]:
    """The same from sums of what float32 x is from one value of its set, and of its squares, in float64's range.

    With ``s = x - x[0]`` in float64, ``m = x[0] + mean(s)`` and ``v = mean(s·s) - mean(s)²``. A set that holds x[0] has
    a variance of ``mean(s)² / (n - 1)`` at least, so that the difference keeps its digits up to many millions of
    elements; of a constant set all is exact.
    """
    portion, share = 1 / at_least_one(xp, count), habits.share(plan)

    def summed(values):
        if habits.lanes:
            return _side_by_side(xp, values, plan.axes, habits.lanes)
        return _sum(xp, values, plan.axes, habits)

    def wide(values):
        return xp.astype(values, xp.float64)

    d, s, mean, residue = times(x, share), wide(x), None, None
    if plan.center:
        # Exact, as are mean and residue: x[0] may be far from all others.
        start = wide(habits.one_of(x, plan.axes))
        s = s - start
        off = summed(s)
        shift, exact = off * portion, times(start, share) + off * (portion * share)
        mean = habits.stored_mean(xp.astype(exact, x.dtype), plan.axes)
        residue = habits.stored_mean(xp.astype(exact - wide(mean), x.dtype), plan.axes)
        d = (d - mean) - residue
        mean, residue = times(mean, 1 / share), times(residue, 1 / share)
    var = summed(s * s) * portion
    if plan.center:
        var = xp.maximum(var - shift * shift, xp.zeros_like(var))
    factor = (1 / share) / _root(xp, var + plan.eps, plan.eps)
    most = xp.full_like(var, _FLOAT32.most)
    var, factor = xp.minimum(var, most), habits.stored(xp.minimum(factor, most), plan.axes)
    var, rstd, factor = (xp.astype(a, x.dtype) for a in (var, times(factor, share), factor))
    return d, factor, Moments(mean, residue, var, rstd, count)


def _side_by_side(xp, values: Array, axes: tuple[int, ...], lanes: int) -> Array:
    """The sum over ``axes``, kept at length 1; the last of them together have as many numbers as lanes at least."""
    first = values.ndim
    while first - 1 in axes:
        first -= 1
    flat = xp.reshape(values, (*values.shape[:first], -1))
    outer, n = axes[: len(axes) - (values.ndim - first)], flat.shape[-1]
    whole = n - n % lanes
    sums = xp.sum(xp.reshape(flat[..., :whole], (*flat.shape[:-1], -1, lanes)), axis=(*outer, first))
    parts = [sums[..., k] for k in range(lanes)]
    if whole < n:
        rest = flat[..., whole:]
        rest = xp.sum(rest, axis=outer) if outer else rest
        parts += [rest[..., k] for k in range(n - whole)]
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return xp.reshape(parts[0], _without(values, axes))


def times(values: Array, share: float) -> Array:
    """The product, which costs nothing where it is with one."""
    return values if share == 1 else values * share


def is_number(count: Array | int) -> bool:
    """Whether a count is a number, perhaps a symbolic one, and not an array."""
    return isinstance(count, int) or not hasattr(count, "dtype")


def merged(xp, parts: Moments, axis: int, number: Any) -> tuple[Array, Array, Array | int]:
    """Mean, variance and count of the sets along an axis together: ``number`` of them, -1 where that is not known."""
    assert parts.mean is not None
    limits = _range_of(xp, parts.var)

    def summed(values):
        return xp.sum(values, axis=axis, keepdims=True)

    sizes = xp.ones_like(parts.var) * parts.count
    count = summed(sizes)
    share = sizes / at_least_one(xp, count)
    # From near the mean, where differences keep their digits.
    origin = summed(parts.mean * share)
    off = parts.mean - origin + parts.residue
    shift = summed(off * share)
    off = xp.minimum(xp.abs(off - shift), xp.full_like(off, limits.most**0.5))
    var = xp.minimum(summed((parts.var + off * off) * share), xp.full_like(shift, limits.most))
    known = is_number(parts.count) and number != -1
    return origin + shift, var, parts.count * number if known else count


def at_least_one(xp, count: Array | int) -> Array | int:
    """A count to divide by: sums over nothing are zero, not NaN."""
    if is_number(count):
        return count or 1
    return xp.maximum(count, xp.ones_like(count))


def masked(xp, mask: Array | None, values: Array) -> Array:
    """The values where the mask is true, and zero elsewhere."""
    return values if mask is None else xp.where(mask, values, xp.zeros_like(values))


def _valid_of(xp, plan: Plan, mask: Array, values: Array) -> Array:
    """One of the valid values of each reduced set, for sets in which all are the same."""
    values = xp.where(mask, values, xp.full_like(values, -float("inf")))
    return xp.max(values, axis=plan.axes, keepdims=True)


def _root(xp, spread: Array, eps: float) -> Array:
    """The square root to divide by, one instead of zero."""
    return xp.sqrt(spread if eps else xp.where(spread > 0, spread, xp.ones_like(spread)))


def _scale(xp, peak: Array, limits: _Range, eps: float) -> tuple[Array, Array, Array]:
    """The power of two that d is multiplied by before squaring, its inverse, and eps times its square."""

    def full(value):
        return xp.full_like(peak, value)

    large = peak > limits.large
    scale = xp.where(large, full(limits.down), full(1.0))
    inverse = xp.where(large, full(1 / limits.down), full(1.0))
    scaled_eps = xp.where(large, full(eps * limits.down**2), full(eps))
    if limits.needs_up(eps):
        small = peak < limits.small
        scale = xp.where(small, full(limits.up), scale)
        inverse = xp.where(small, full(1 / limits.up), inverse)
        scaled_eps = xp.where(small, full(eps * limits.up**2), scaled_eps)
    return scale, inverse, scaled_eps
