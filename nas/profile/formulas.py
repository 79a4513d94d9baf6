"""Work in closed form, on shapes alone: what the three counters share. The convention is stated in ``nas.profile``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

__all__ = [
    "NOTHING",
    "TRANSFORMS",
    "Formula",
    "Shape",
    "Work",
    "attention",
    "chain",
    "convolution",
    "covariance",
    "einsum",
    "formula_of",
    "fourier",
    "fourier_call",
    "framed_fourier",
    "matrix_power",
    "matrix_product",
    "multi_head_attention",
    "recurrent",
    "register_formula",
    "registered",
    "tensordot",
    "transposed_convolution",
    "vector_products",
]

Shape = Sequence[int]


class Work(NamedTuple):
    """Multiply-accumulates and numbers written by the products that did them."""

    macs: int
    activations: int

    def __add__(self, other: object) -> Work:
        if not isinstance(other, Work):
            return NotImplemented
        return Work(self.macs + other.macs, self.activations + other.activations)


NOTHING = Work(0, 0)

Formula = Callable[[Sequence[Shape], Sequence[Shape]], "Work | tuple[int, int]"]
_REGISTERED: dict[str, Formula] = {}


def register_formula(operator: str, formula: Formula) -> None:
    """Tell all three counters what a kernel of somebody else does.

    Args:
        operator: its name in torch's registry, for example ``my_library::my_attention``.
        formula: from the shapes of its tensor arguments in the order of its schema (lists of tensors laid flat, absent
            ones left out) and the shapes of its results to (multiply-accumulates, activations).

    Raises:
        ValueError: the name has no ``::``, or lies in ``aten``, whose work is already counted.
    """
    namespace, separator, name = operator.partition("::")
    if not (namespace and separator and name) or namespace == "aten":
        raise ValueError(
            f"register_formula({operator!r}): operator must be 'library::name' of a library other than aten"
        )
    _REGISTERED[operator] = formula


def formula_of(operator: str) -> Formula | None:
    """The formula registered for ``library::name``, or None."""
    return _REGISTERED.get(operator)


def registered() -> dict[str, Formula]:
    """All formulas that were registered, by the names of their operators."""
    return dict(_REGISTERED)


def matrix_product(out: Shape, inner: int) -> Work:
    """Any product of matrices or vectors: one sum over ``inner`` for each number of ``out``."""
    return Work(math.prod(out) * inner, math.prod(out))


def vector_products(left: Shape, right: Shape, out: Shape) -> Work:
    """``torch.linalg.vecdot``: both factors broadcast, and one dimension of them summed over."""
    sizes = itertools.zip_longest(reversed(left), reversed(right), fillvalue=1)
    return Work(math.prod(b if a == 1 else a for a, b in sizes), math.prod(out))


def matrix_power(square: Shape, exponent: int) -> Work | None:
    """By repeated squaring, as torch does it; None for negative exponents, which need an inverse."""
    if exponent < 0:
        return None
    products = max(0, exponent.bit_length() - 1) + max(0, exponent.bit_count() - 1)
    once = matrix_product(square, square[-1])
    return Work(products * once.macs, products * once.activations)


def covariance(given: Shape) -> Work:
    """``torch.cov``, ``torch.corrcoef``: (variables, observations), or the observations of one, by their transpose."""
    rows = given[0] if len(given) > 1 else 1
    return matrix_product((rows, rows), given[-1] if given else 1)


def chain(shapes: Sequence[Shape]) -> Work:
    """``torch.linalg.multi_dot``: matrices in the order that takes the fewest products; vectors only at the ends."""
    count = len(shapes)
    sizes = [shapes[0][0] if len(shapes[0]) > 1 else 1, *(shape[0] for shape in shapes[1:])]
    sizes.append(shapes[-1][-1] if len(shapes[-1]) > 1 else 1)
    best = {(place, place): NOTHING for place in range(count)}
    for length, first in itertools.product(range(1, count), range(count)):
        last = first + length
        if last < count:
            found = [
                best[first, cut]
                + best[cut + 1, last]
                + matrix_product((sizes[first], sizes[last + 1]), sizes[cut + 1])
                for cut in range(first, last)
            ]
            # Of two equally good orders torch takes the left-most cut, but of three factors the right-most.
            best[first, last] = min(reversed(found) if count == 3 else found, key=lambda work: work.macs)
    return best[0, count - 1]


def convolution(out: Shape, weight: Shape) -> Work:
    """``weight`` (out, in / groups, *kernel); products with padding count, as kernels do them."""
    return matrix_product(out, math.prod(weight[1:]))


def transposed_convolution(image: Shape, out: Shape, weight: Shape) -> Work:
    """``weight`` (in, out / groups, *kernel): every number of ``image`` meets its kernels once."""
    return Work(math.prod(image) * math.prod(weight[1:]), math.prod(out))


def attention(q: Shape, k: Shape, v: Shape) -> Work:
    """(..., H, L, D), (..., H, S, D), (..., H, S, E): both products, all L x S of them whatever the mask.

    Fewer heads of keys and values than of queries (grouped queries) are repeated.
    """
    scores = math.prod(_batch(q, k)) * q[-2] * k[-2]
    values = math.prod(_batch((*_batch(q, k), 1, 1), v)) * q[-2] * v[-1]
    return Work(scores * q[-1] + values * k[-2], scores + values)


def _batch(left: Shape, right: Shape) -> tuple[int, ...]:
    """Leading dimensions of a batched product, broadcast; of heads the larger number."""
    pairs = [left[:-2], right[:-2]]
    rank = max(map(len, pairs))
    filled = [(1,) * (rank - len(part)) + tuple(part) for part in pairs]
    return tuple(max(sizes) if 0 not in sizes else 0 for sizes in zip(*filled, strict=True))


def multi_head_attention(
    batch: int, queries: int, keys: int, width: int, kdim: int, vdim: int, *, heads: int, attended: int
) -> Work:
    """``nn.MultiheadAttention``: three projections in, two products, one projection out.

    Args:
        batch, queries, keys, width, kdim, vdim: sizes of query, key and value.
        heads: heads, each with ``queries * attended`` scores.
        attended: keys that are attended to: ``keys``, and learned or zero ones that are put behind them.
    """
    projections = batch * width * (queries * 2 * width + keys * (kdim + vdim))
    products = 2 * batch * queries * attended * width
    written = batch * (width * (3 * queries + 2 * keys) + heads * queries * attended)
    return Work(projections + products, written)


def recurrent(rows: int, weights: Sequence[Shape]) -> Work:
    """RNN, GRU, LSTM: every matrix of ``weights`` meets each of ``rows`` (sequence x batch) vectors; biases ignored."""
    matrices = [weight for weight in weights if len(weight) == 2]
    return Work(rows * sum(map(math.prod, matrices)), rows * sum(weight[0] for weight in matrices))


def tensordot(left: Shape, right: Shape, out: Shape) -> Work:
    """The contracted size is in both factors and not in the result, so that it need not be named."""
    numbers = math.prod(out)
    return matrix_product(out, math.isqrt(math.prod(left) * math.prod(right) // numbers) if numbers else 0)


# -- Fourier transforms ------------------------------------------------------------------------------------------------


def fourier(batch: int, sizes: Shape, out: Shape, *, real: bool) -> Work:
    """5 N log2 N operations for a complex transform of N points in all, half for a real one; two make a MAC.

    Source: the convention of the FFTW authors' benchmarks (benchFFT, "mflops").
    """
    points = math.prod(sizes)
    each = round((1.25 if real else 2.5) * points * math.log2(points)) if points else 0
    return Work(batch * each, math.prod(out))


def framed_fourier(frames: Shape, points: int, *, complex_signal: bool, back: bool) -> Work:
    """``torch.stft`` and, ``back``, ``torch.istft``: a transform of ``points`` for each of the frames.

    Args:
        frames: (..., frequencies, frames), without a dimension for real and imaginary part.
    """
    count = math.prod(frames[:-2]) * frames[-1]
    written = (count, points) if back else frames
    return fourier(count, (points,), written, real=not complex_signal)


_FROM_REAL = ("rfft", "rfft2", "rfftn", "ihfft")
_TO_REAL = ("irfft", "irfft2", "irfftn", "hfft")
_COMPLEX = ("fft", "ifft", "fft2", "ifft2", "fftn", "ifftn")
TRANSFORMS = _FROM_REAL + _TO_REAL + _COMPLEX  # with a formula, by their names in torch.fft


def fourier_call(
    name: str,
    given: Shape,
    out: Shape,
    *,
    complex_input: bool,
    length: int | Sequence[int] | None,
    dims: int | Sequence[int] | None,
) -> Work | None:
    """A call of ``torch.fft.NAME`` as its arguments describe it; None for transforms without a formula (hfft2, ...)."""
    if name not in TRANSFORMS:
        return None
    lengths = [length] if isinstance(length, int) else list(length or ())
    if dims is None:
        dims = (
            (-2, -1)
            if name.endswith("2")
            else range(-len(lengths), 0)
            if lengths
            else range(-len(given), 0)
            if name.endswith("n")
            else -1
        )
    axes = [dims] if isinstance(dims, int) else list(dims)
    sizes = [out[axis] for axis in axes]
    batch = math.prod(out) // max(1, math.prod(sizes))
    if name in _FROM_REAL:  # the result holds half of the last dimension
        sizes[-1] = lengths[-1] if lengths and lengths[-1] != -1 else given[axes[-1]]
    real = name not in _COMPLEX or (name in ("fft", "ifft") and not complex_input)
    return fourier(batch, sizes, out, real=real)


# -- einsum ------------------------------------------------------------------------------------------------------------


def einsum(equation: str, shapes: Sequence[Shape], path: Sequence[int] | None = None) -> Work:
    """Pair by pair, as torch contracts: along ``path`` (flat pairs of positions), else from left to right.

    A pair without a common index to be summed is an element-wise product and counts nothing.
    """
    operands, result = _labelled(equation, shapes)
    steps = list(path or ())
    work = NOTHING
    while len(operands) > 1:
        first, second = sorted(steps[:2]) if steps else (0, 1)
        steps = steps[2:]
        right, left = operands.pop(second), operands.pop(first)
        kept = set(result).union(*operands) if operands else set(result)
        pair, done = _contract(left, right, kept)
        work += done
        operands.insert(len(operands) if path else 0, pair)
    return work


def _contract(left: dict[str, int], right: dict[str, int], kept: set[str]) -> tuple[dict[str, int], Work]:
    ending = (set(left) | set(right)) - kept
    summed = {label for label in ending if left.get(label, 1) != 1 and right.get(label, 1) != 1}
    sizes = {
        label: max(left.get(label, 1), right.get(label, 1))
        for label in {**left, **right}
        if label not in ending
    }
    if not summed:
        return sizes, NOTHING
    inner = math.prod(left[label] for label in summed)
    return sizes, matrix_product(tuple(sizes.values()), inner)


def _labelled(equation: str, shapes: Sequence[Shape]) -> tuple[list[dict[str, int]], list[str]]:
    """Sizes by index for each operand, and the indices of the result; the dimensions of ``...`` are .0, .1 from the
    right."""
    terms, arrow, target = equation.replace(" ", "").partition("->")
    operands: list[dict[str, int]] = []
    seen: list[str] = []
    longest = 0
    for term, shape in zip(terms.split(","), shapes, strict=True):
        before, dots, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after) if dots else 0
        longest = max(longest, hidden)
        labels = [*before, *(f".{index}" for index in reversed(range(hidden))), *after]
        seen += sorted(before + after)
        operands.append({})
        for label, size in zip(labels, shape, strict=True):
            operands[-1][label] = max(size, operands[-1].get(label, 1))
    dots_out = [f".{index}" for index in reversed(range(longest))]
    if not arrow:
        return operands, dots_out + [label for label in seen if seen.count(label) == 1]
    before, dots, after = target.partition("...")
    return operands, [*before, *(dots_out if dots else ()), *after]
