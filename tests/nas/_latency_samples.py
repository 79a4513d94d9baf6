"""Transformers as counted work, and a device on which every kind of work has its price."""

from __future__ import annotations

import math
import random

from nas.latency.prediction import Work

__all__ = ["PRICES", "drawn", "transformer"]


PRICES = {
    "constant": 0.4,
    "products": 0.01,
    "launches": 0.002,
    "linear_macs": 2e-8,
    "attention_macs": 4e-8,
    "convolution_macs": 3e-8,
    "embedding_macs": 2e-8,
    "elements": 4e-7,
    "softmax_elements": 1e-6,
    "parameter_bytes": 0.0,
    "batch": 0.0,
}


def transformer(rng: random.Random, batch: int = 1) -> Work:
    """Work of a vision transformer by its closed form."""
    depth, width = rng.randint(4, 12), rng.choice([128, 192, 256, 320, 384])
    heads, ratio, tokens = (
        width // rng.choice([32, 64]),
        rng.choice([2, 3, 4]),
        rng.choice([37, 65, 101, 145]),
    )
    return Work(
        constant=1,
        products=6 * depth + 2,
        launches=15 * depth + 5,
        linear_macs=batch * depth * tokens * width * width * (4 + 2 * ratio),
        attention_macs=batch * depth * 2 * tokens * tokens * width,
        convolution_macs=0,
        embedding_macs=batch * tokens * width * 768,
        elements=batch * depth * tokens * width * (8 + ratio),
        softmax_elements=batch * depth * heads * tokens * tokens,
        parameter_bytes=4 * depth * width * width * (4 + 2 * ratio),
        batch=batch,
    )


def milliseconds(work: Work, rng: random.Random, noise: float = 0.02) -> float:
    """A device on which every kind of work has one price; measurements repeat within ``noise``."""
    exact = sum(PRICES[name] * value for name, value in work.to_dict().items())
    return exact * math.exp(rng.gauss(0.0, noise))


def drawn(
    count: int, seed: int, noise: float = 0.02, batches: tuple[int, ...] = (1,)
) -> tuple[list[Work], list[float]]:
    rng = random.Random(seed)
    work = [transformer(rng, rng.choice(batches)) for _ in range(count)]
    return work, [milliseconds(w, rng, noise) for w in work]
