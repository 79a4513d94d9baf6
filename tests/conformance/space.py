"""What every search space must do."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import numpy as np
import pytest

from spaces import Architecture, SearchSpace

__all__ = ["SpaceConformance"]


class SpaceConformance:
    """Inherit, and override the fixture ``space``::

    class TestCell(SpaceConformance):
        @pytest.fixture
        def space(self):
            return get_space("cell")
    """

    samples = 25

    @pytest.fixture
    def space(self) -> SearchSpace:
        raise NotImplementedError("override the fixture 'space'")

    @pytest.fixture
    def architectures(self, space: SearchSpace) -> list[Architecture]:
        rng = random.Random(7)
        return [space.sample(rng) for _ in range(self.samples)]

    def test_samples_are_valid(self, space: SearchSpace, architectures: list[Architecture]) -> None:
        for architecture in architectures:
            space.validate(architecture)
            assert type(architecture) is dict
            assert list(architecture) == space.active(architecture)

    def test_one_seed_gives_the_same_samples(
        self, space: SearchSpace, architectures: list[Architecture]
    ) -> None:
        rng = random.Random(7)
        assert [space.to_json(space.sample(rng)) for _ in architectures] == _texts(space, architectures)

    def test_canonical_ignores_order_and_is_idempotent(
        self, space: SearchSpace, architectures: list[Architecture]
    ) -> None:
        for architecture in architectures:
            shuffled = dict(reversed(architecture.items()))
            canonical = space.canonical(shuffled)
            assert list(canonical.items()) == list(architecture.items())
            assert space.to_json(space.canonical(canonical)) == json.dumps(architecture)

    def test_canonical_drops_inactive_parameters(
        self, space: SearchSpace, architectures: list[Architecture]
    ) -> None:
        for architecture in architectures:
            full = {name: parameter.default for name, parameter in space.parameters.items()}
            assert space.canonical({**full, **architecture}) == architecture
            assert space.key({**full, **architecture}) == space.key(architecture)

    def test_json_round_trip(self, space: SearchSpace, architectures: list[Architecture]) -> None:
        for text in _texts(space, architectures):
            assert space.to_json(space.from_json(text)) == text

    def test_keys_are_equal_exactly_for_equal_architectures(
        self, space: SearchSpace, architectures: list[Architecture]
    ) -> None:
        keys = [space.key(architecture) for architecture in architectures]
        assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)
        assert len(set(keys)) == len(set(_texts(space, architectures)))
        assert len(set(zip(keys, _texts(space, architectures), strict=True))) == len(set(keys))

    def test_encoding_has_one_length_and_is_finite(
        self, space: SearchSpace, architectures: list[Architecture]
    ) -> None:
        assert len(set(space.encoding_names)) == len(space.encoding_names)
        for architecture in architectures:
            vector = space.encode(architecture)
            assert vector.dtype == np.float32
            assert vector.shape == (len(space.encoding_names),)
            assert np.isfinite(vector).all()
            assert (vector >= 0).all()
            assert (vector <= 1).all()
            assert np.array_equal(vector, space.encode(dict(reversed(architecture.items()))))

    def test_mutation_gives_another_valid_architecture(
        self, space: SearchSpace, architectures: list[Architecture]
    ) -> None:
        rng = random.Random(8)
        for architecture in architectures:
            alone = space.sample_unseen({space.key(architecture)}, rng) is None
            for rate in (None, 0.1, 1.0):
                child = space.mutate(architecture, rng, rate=rate)
                space.validate(child)
                assert (space.key(child) == space.key(architecture)) == alone

    def test_crossover_gives_valid_children(
        self, space: SearchSpace, architectures: list[Architecture]
    ) -> None:
        rng = random.Random(9)
        for first, second in pairwise(architectures):
            child = space.crossover(first, second, rng)
            space.validate(child)
            assert child == space.canonical(child)
            assert space.key(space.crossover(first, first, rng)) == space.key(first)

    def test_neighbors_are_valid_distinct_and_different(
        self, space: SearchSpace, architectures: list[Architecture]
    ) -> None:
        for architecture in architectures[:5]:
            near = space.neighbors(architecture)
            keys = {space.key(neighbor) for neighbor in near}
            assert len(keys) == len(near)
            assert space.key(architecture) not in keys

    def test_unseen_architectures_are_unseen(
        self, space: SearchSpace, architectures: list[Architecture]
    ) -> None:
        seen = {space.key(architecture) for architecture in architectures}
        found = space.sample_unseen(seen, random.Random(10))
        if found is None:
            assert len(seen) == space.cardinality()
        else:
            assert space.key(found) not in seen

    def test_cardinality_covers_what_is_known(
        self, space: SearchSpace, architectures: list[Architecture]
    ) -> None:
        known = {space.key(architecture) for architecture in [*architectures, *space.published.values()]}
        assert space.cardinality() >= len(known)

    def test_published_variants_are_inside(self, space: SearchSpace) -> None:
        for architecture in space.published.values():
            assert space.canonical(architecture) == architecture
        assert space.baseline is None or space.baseline in space.published

    def test_fingerprint_is_stable(self, space: SearchSpace) -> None:
        again = SearchSpace(space.name, space.parameters, constraints=space.constraints)
        assert again.fingerprint() == space.fingerprint()


def _texts(space: SearchSpace, architectures: list[Architecture]) -> list[str]:
    return [space.to_json(architecture) for architecture in architectures]
