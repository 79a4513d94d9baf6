"""The global generators, lent to a piece of work and given back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch

__all__ = ["lent_generators"]


@contextmanager
def lent_generators(seed: int) -> Iterator[None]:
    """Within, the global generators of torch, numpy and ``random`` begin at ``seed``, so that what draws from them (an
    order of a loader, an augmentation) is the same in every run; afterwards they stand where they stood before.

    Generators that somebody holds himself, as a loader its ``generator=``, move on as they are drawn from.

    Args:
        seed: in [0, 2**32), which is what numpy takes.
    """
    plain, arrays, tensors = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    begun = torch.cuda.is_initialized()
    devices = torch.cuda.get_rng_state_all() if begun else []
    metal = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        random.seed(seed)
        numpy.random.seed(seed)
        # Not torch.manual_seed: before CUDA has begun it leaves a seed behind for when it does.
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(plain)
        numpy.random.set_state(arrays)
        torch.set_rng_state(tensors)
        if metal is not None:
            torch.mps.set_rng_state(metal)
        if begun:
            torch.cuda.set_rng_state_all(devices)
        elif torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(torch.initial_seed())  # where it would have begun without us
