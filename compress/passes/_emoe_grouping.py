"""Hidden units into groups of equal size."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional

__all__ = ["Grouping", "balanced_kmeans", "group_units", "inertia"]

Grouping = Literal["kmeans", "random"]

_STARTS = 4
_ROUNDS = 50

Points = np.ndarray[Any, np.dtype[np.float64]]


def group_units(keys: Tensor, experts: int, grouping: Grouping, seed: int) -> Tensor:
    """Expert in [0, experts) of every hidden unit, (h,), as many units for each.

    Args:
        keys: (h, d), rows of the first layer; ``kmeans`` compares their directions, not their lengths.
        experts: divides h.
        grouping: ``kmeans``, or ``random``.
    """
    if grouping == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(keys), generator=generator) % experts
    return balanced_kmeans(functional.normalize(keys.detach().double().cpu(), dim=1), experts, seed)


def balanced_kmeans(points: Tensor, clusters: int, seed: int) -> Tensor:
    """k-means with clusters of equal size: label of every point, (n,).

    From scikit-learn's centres (of which no balance is asked), points are dealt out to as many places in every cluster
    so that the sum of squared distances is the least possible, and centres become means, by turns, until nothing is
    gained. Neither step can make it worse, so that this ends.

    Args:
        points: (n, d); n is a multiple of ``clusters``.
        seed: of the starts, in [0, 2**32).
    """
    values: Points = points.double().numpy()
    places = len(values) // clusters
    found = KMeans(clusters, n_init=_STARTS, random_state=seed).fit(values).cluster_centers_
    centres: Points = np.asarray(found, dtype=np.float64)
    best, best_cost = np.zeros(len(values), dtype=np.int64), np.inf
    for _ in range(_ROUNDS):
        # Distances but for the point's own length, which is the same for all clusters.
        distances = (centres**2).sum(1) - 2 * values @ centres.T
        _, seats = linear_sum_assignment(distances.repeat(places, axis=1))
        labels = seats // places
        centres = np.stack([values[labels == cluster].mean(0) for cluster in range(clusters)])
        cost = float(((values - centres[labels]) ** 2).sum())
        if cost >= best_cost * (1 - 1e-9):
            break
        best, best_cost = labels, cost
    return torch.from_numpy(best)


def inertia(points: Tensor, labels: Tensor) -> float:
    """Sum of squared distances of points (n, d) to the means of their clusters."""
    return sum(
        float(((own := points[labels == label]) - own.mean(0)).square().sum()) for label in labels.unique()
    )
