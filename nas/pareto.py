"""Which outcomes beat which: Pareto front, non-dominated ranks, crowding distance, hypervolume.

``values`` is (n, d): n outcomes, d objectives; ``directions`` has d entries, each "minimize" or "maximize".
One outcome dominates another when it is no worse in every objective and better in at least one. A row that
holds NaN compares with nothing: it is never on the front and ranks behind every row without NaN.

Non-dominated sorting and crowding distance: Deb, Pratap, Agarwal, Meyarivan, "A fast and elitist
multiobjective genetic algorithm: NSGA-II", IEEE Transactions on Evolutionary Computation 6 (2), 2002.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from nas.errors import UserMistake

__all__ = [
    "Direction",
    "check_directions",
    "crowding_distance",
    "hypervolume_2d",
    "non_dominated_sort",
    "pareto_mask",
    "to_losses",
]

Direction: TypeAlias = Literal["maximize", "minimize"]
Floats: TypeAlias = npt.NDArray[np.float64]


def check_directions(directions: Sequence[str]) -> tuple[Direction, ...]:
    """``directions`` as a tuple of at least one "maximize" or "minimize".

    Raises:
        UserMistake: it is empty or holds anything else.
    """
    if isinstance(directions, str) or not directions:
        raise UserMistake(
            f"directions={directions!r} must be a non-empty sequence of 'maximize' or 'minimize'"
        )
    checked: list[Direction] = []
    for direction in directions:
        if direction == "maximize":
            checked.append("maximize")
        elif direction == "minimize":
            checked.append("minimize")
        else:
            raise UserMistake(f"directions holds {direction!r}; allowed: 'maximize', 'minimize'")
    return tuple(checked)


def to_losses(values: npt.ArrayLike, directions: Sequence[Direction]) -> Floats:
    """(n, d) outcomes as (n, d) losses: objectives to maximise change their sign, so that less is better.

    Raises:
        UserMistake: ``values`` is not (n, d) with d the number of directions.
    """
    checked = check_directions(directions)
    losses = np.array(values, dtype=np.float64)
    if losses.size == 0 and losses.ndim < 2:
        losses = losses.reshape(0, len(checked))
    if losses.ndim != 2 or losses.shape[1] != len(checked):
        raise UserMistake(
            f"values has shape {losses.shape}; (n, {len(checked)}) is needed for {len(checked)} direction(s)"
        )
    losses *= np.array([-1.0 if direction == "maximize" else 1.0 for direction in checked])
    return losses


def pareto_mask(values: npt.ArrayLike, directions: Sequence[Direction]) -> npt.NDArray[np.bool_]:
    """(n, d) outcomes -> (n,) True where nothing dominates the row; equal rows are on the front together.

    O(n log n) for one and two objectives, O(n * size of the front) for more.

    Raises:
        UserMistake: the shape of ``values`` does not fit ``directions``.

    Example:
        >>> pareto_mask([[0.9, 5.0], [0.8, 7.0], [0.7, 1.0]], ["maximize", "minimize"]).tolist()
        [True, False, True]
    """
    losses = to_losses(values, directions)
    comparable = ~np.isnan(losses).any(axis=1)
    mask = np.zeros(len(losses), dtype=np.bool_)
    if comparable.any():
        unique, inverse = _unique_rows(losses[comparable])
        mask[comparable] = _front_of_sorted(unique)[inverse]
    return mask


def non_dominated_sort(values: npt.ArrayLike, directions: Sequence[Direction]) -> npt.NDArray[np.intp]:
    """(n, d) outcomes -> (n,) ranks: 0 on the front, 1 on the front of what is left without it, and so on.

    Rows with NaN share the rank behind the last. O(n log n) for one and two objectives.

    Raises:
        UserMistake: the shape of ``values`` does not fit ``directions``.
    """
    losses = to_losses(values, directions)
    ranks = np.zeros(len(losses), dtype=np.intp)
    comparable = ~np.isnan(losses).any(axis=1)
    if comparable.any():
        unique, inverse = _unique_rows(losses[comparable])
        ranks[comparable] = _ranks_of_sorted(unique)[inverse]
        ranks[~comparable] = ranks[comparable].max() + 1
    return ranks


def crowding_distance(
    values: npt.ArrayLike, directions: Sequence[Direction], ranks: npt.NDArray[np.intp] | None = None
) -> Floats:
    """(n, d) outcomes -> (n,) room around each row, in units of the range of each objective; more is better.

    Without ``ranks`` all rows are taken for one front; with ``ranks`` (n,) each row is compared with those of
    its own rank only. The extremes of every objective get infinity, rows with NaN get 0.

    Raises:
        UserMistake: the shape of ``values`` does not fit ``directions``.
    """
    losses = to_losses(values, directions)
    groups = np.zeros(len(losses), dtype=np.intp) if ranks is None else ranks
    comparable = ~np.isnan(losses).any(axis=1)
    distance = np.zeros(len(losses))
    for rank in np.unique(groups[comparable]):
        members = np.flatnonzero(comparable & (groups == rank))
        distance[members] = _crowding_of_front(losses[members])
    return distance


def hypervolume_2d(
    values: npt.ArrayLike, reference: Sequence[float], directions: Sequence[Direction]
) -> float:
    """Area that the rows of ``values`` (n, 2) dominate within the quadrant bounded by ``reference`` (2,).

    Rows that are not better than the reference in both objectives add nothing. The unit is the product of the
    units of the two objectives.

    Raises:
        UserMistake: there are not exactly two directions and two numbers in ``reference``.
    """
    if len(directions) != 2 or len(reference) != 2:
        raise UserMistake(
            f"hypervolume_2d needs two directions and a reference of two numbers, "
            f"not {len(directions)} and {len(reference)}"
        )
    losses = to_losses(values, directions)
    bound = to_losses([list(reference)], directions)[0]
    losses = losses[(losses < bound).all(axis=1)]
    if not len(losses):
        return 0.0
    unique, _ = _unique_rows(losses)
    front = unique[_front_of_sorted(unique)]
    upper = np.concatenate(([bound[1]], front[:-1, 1]))
    return float(np.sum((bound[0] - front[:, 0]) * (upper - front[:, 1])))


def _unique_rows(losses: Floats) -> tuple[Floats, npt.NDArray[np.intp]]:
    """(n, d) -> the different rows in lexicographic order (m, d), and for each row its place there (n,)."""
    # np.unique(axis=0) does the same by sorting structured records: ten times slower on small populations.
    order = np.lexsort(losses.T[::-1])
    ordered = losses[order]
    first = np.ones(len(losses), dtype=np.bool_)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    inverse = np.empty(len(losses), dtype=np.intp)
    inverse[order] = np.cumsum(first) - 1
    return ordered[first], inverse


def _front_of_sorted(losses: Floats) -> npt.NDArray[np.bool_]:
    """Front of different rows (n, d) in lexicographic order: a row can only be dominated by an earlier one."""
    mask = np.zeros(len(losses), dtype=np.bool_)
    if losses.shape[1] == 1:
        mask[0] = True
    elif losses.shape[1] == 2:
        mask[0] = True
        mask[1:] = losses[1:, 1] < np.minimum.accumulate(losses[:-1, 1])
    else:
        left = np.arange(len(losses))
        while len(left):
            mask[left[0]] = True
            left = left[(losses[left] < losses[left[0]]).any(axis=1)]
    return mask


def _ranks_of_sorted(losses: Floats) -> npt.NDArray[np.intp]:
    """Non-dominated ranks (n,) of different rows (n, d) in lexicographic order."""
    if losses.shape[1] == 1:
        return np.arange(len(losses), dtype=np.intp)
    ranks = np.zeros(len(losses), dtype=np.intp)
    if losses.shape[1] == 2:
        # The best second objective of each front so far never falls from one front to the next, and a row
        # belongs to the first front whose best it undercuts.
        best: list[float] = []
        for index, second in enumerate(losses[:, 1].tolist()):
            rank = bisect_right(best, second)
            best[rank : rank + 1] = [second]
            ranks[index] = rank
        return ranks
    left, rank = np.arange(len(losses)), 0
    while len(left):
        front = _front_of_sorted(losses[left])
        ranks[left[front]] = rank
        left, rank = left[~front], rank + 1
    return ranks


def _crowding_of_front(losses: Floats) -> Floats:
    """(n, d) losses of one front -> (n,) sum over objectives of the gap between the neighbours on both sides."""
    distance = np.zeros(len(losses))
    for column in losses.T:
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        distance[order[[0, -1]]] = np.inf
        extent = ordered[-1] - ordered[0]
        if np.isfinite(extent) and extent > 0:
            distance[order[1:-1]] += (ordered[2:] - ordered[:-2]) / extent
    return distance
