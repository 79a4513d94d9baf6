"""Conditions and constraints at work: which parameters count, and what a predicate may read.

Every predicate of a space is called here and nowhere else. It has a number, its *reader*: the condition of
the parameter declared at position i has number i, the constraint at position j has number (parameters + j).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

from spaces.errors import SpaceError, nearest
from spaces.parameters import Constraint, Parameter, Scalar, listed

__all__ = ["PartialView", "Rules", "Undecided", "View"]

_RANDOM_PROBES = 256
_SWEEP = 16  # values of one parameter that are probed while all others have their defaults


class Undecided(BaseException):
    """A predicate read a parameter whose value is not known yet.

    Not an Exception: a predicate that guards itself with ``except Exception`` must not take it for an answer.
    """

    def __init__(self, reader: int, name: str) -> None:
        super().__init__(name)
        self.reader = reader
        self.name = name


class View(dict[str, Any]):
    """The active parameters decided so far, for the predicate number ``reader``.

    Looking up an inactive parameter is an error, ``get`` gives the default and ``in`` is False; a name that
    the predicate may not know is always an error. A dict, because every sample and mutation comes this way.
    """

    __slots__ = ("_rules", "reader")

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self._rules = rules
        self.reader = 0

    def __missing__(self, name: str) -> Any:
        self._rules.check_readable(self.reader, name)
        raise self._rules.inactive(self.reader, name)

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name, default) if name in self else default

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name):
            return True
        self._rules.check_readable(self.reader, name)
        return False


class PartialView(Mapping[str, Any]):
    """What ``View`` shows, where only some parameters are decided; remembers which names were read.

    Args:
        values: the active ones among the decided parameters.
        known: whether a parameter is decided (active or not); reading another one raises ``Undecided``.
    """

    def __init__(
        self, rules: Rules, reader: int, values: dict[str, Any], known: Callable[[str], bool]
    ) -> None:
        self._rules = rules
        self._reader = reader
        self._values = values
        self._known = known
        self.reads: dict[str, None] = {}

    def _active(self, name: str) -> bool:
        self._rules.check_readable(self._reader, name)
        self.reads[name] = None
        if not self._known(name):
            raise Undecided(self._reader, name)
        return dict.__contains__(self._values, name)  # a View would check the name against its own reader

    def __getitem__(self, name: str) -> Any:
        if not self._active(name):
            raise self._rules.inactive(self._reader, name)
        return self._values[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self._values[name] if self._active(name) else default

    def __contains__(self, name: object) -> bool:
        return self._active(name)  # type: ignore[arg-type]  # a name of another type is refused there

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in self._rules.names[: self._reader] if self._active(name)])

    def __len__(self) -> int:
        return len(list(iter(self)))


class Rules:
    """The parameters of a space, in order, with everything that decides whether they count.

    Raises:
        SpaceError: a condition or constraint reads a name that it may not read. Found here for the default
            architecture, and at first use for what other architectures reach.
    """

    def __init__(
        self, space: str, parameters: Mapping[str, Parameter], constraints: Sequence[Constraint]
    ) -> None:
        self.space = space
        self.parameters = dict(parameters)
        self.constraints = tuple(constraints)
        self.names = tuple(self.parameters)
        self.positions = {name: position for position, name in enumerate(self.names)}
        conditions = [self.positions[name] for name, one in self.parameters.items() if one.when is not None]
        laws = range(len(self.names), len(self.names) + len(self.constraints))
        self.readers = (*conditions, *laws)
        self._plan = tuple(
            (position, name, parameter, parameter.when is not None)
            for position, (name, parameter) in enumerate(self.parameters.items())
        )
        self.violated(self.assemble(lambda _, parameter: parameter.default))

    def check_readable(self, reader: int, name: object) -> None:
        """SpaceError unless ``name`` is a parameter that the predicate ``reader`` may know of."""
        position = self.positions.get(name) if isinstance(name, str) else None
        if position is None:
            known = self.names[:reader]
            raise SpaceError(
                f"{self._describe(reader)} reads {name!r}, which is not a parameter"
                f"{nearest(str(name), known)}; it may read {listed(known) or 'nothing'}"
            )
        if position >= reader:
            own = self.names[reader]
            way_out = (
                f"declare {name!r} before {own!r}" if position > reader else "it may read earlier ones only"
            )
            raise SpaceError(
                f"{self._describe(reader)} reads {name!r}, which is not declared before it; {way_out}"
            )

    def inactive(self, reader: int, name: str) -> SpaceError:
        """The error for a look-up of a parameter that does not count."""
        return SpaceError(
            f"{self._describe(reader)} reads {name!r} where it is inactive; "
            f"read it with .get({name!r}), or first test what {name!r} depends on"
        )

    def _describe(self, reader: int) -> str:
        if reader < len(self.names):
            return f"search space {self.space!r}: the condition of parameter {self.names[reader]!r}"
        return f"search space {self.space!r}: constraint {self.constraints[reader - len(self.names)].name!r}"

    def holds(self, reader: int, view: Mapping[str, Any]) -> bool:
        """What the predicate ``reader`` says of ``view``.

        Raises:
            SpaceError: it raised something, or read what it may not.
            Undecided: it read a parameter that ``view`` does not know yet.
        """
        count = len(self.names)
        if reader < count:
            predicate = self._plan[reader][2].when
            if predicate is None:
                return True
        else:
            predicate = self.constraints[reader - count].predicate
        try:
            return bool(predicate(view))
        except SpaceError:
            raise
        except Exception as error:
            raise SpaceError(
                f"{self._describe(reader)} raised {type(error).__name__}: {error}; "
                "it must be defined for all values of the parameters"
            ) from error

    def assemble(self, pick: Callable[[str, Parameter], Scalar]) -> View:
        """Decides the parameters in order; ``pick`` is asked for the value of each one that is active."""
        values = View(self)
        for position, name, parameter, conditional in self._plan:
            if conditional:
                values.reader = position
                if not self.holds(position, values):
                    continue
            values[name] = pick(name, parameter)
        return values

    def violated(self, values: View) -> Constraint | None:
        """The first constraint that a completely decided architecture breaks."""
        for reader, constraint in enumerate(self.constraints, len(self.names)):
            if not self.meets(reader, values):
                return constraint
        return None

    def meets(self, reader: int, values: View) -> bool:
        """Whether a completely decided architecture meets the constraint with this number."""
        values.reader = reader
        return self.holds(reader, values)

    def extend(self, values: View, start: int, choose: Callable[[int], Scalar]) -> Constraint | None:
        """Decides the parameters from position ``start`` on; stops once a constraint is surely broken.

        ``values`` holds the active parameters before ``start`` and is extended in place; ``choose`` gets the
        position of each active parameter. Returns the broken constraint, or None at a valid architecture.
        """
        for position, name, _, conditional in self._plan[start:]:
            values.reader = position
            if not conditional or self.holds(position, values):
                values[name] = choose(position)
            for reader in self._triggers.get(position, ()):
                if self._surely_broken(reader, values, position):
                    return self.constraints[reader - len(self.names)]
        return self.violated(values)

    def _surely_broken(self, reader: int, values: View, position: int) -> bool:
        view = PartialView(self, reader, values, lambda name: self.positions[name] <= position)
        try:
            return not self.holds(reader, view)
        except Undecided:
            return False

    @cached_property
    def _triggers(self) -> dict[int, list[int]]:
        """Constraints worth a try once the parameter at a position is decided."""
        triggers: dict[int, list[int]] = {}
        for reader in self.readers:
            if reader >= len(self.names):
                for name in self.probed_reads[reader]:
                    triggers.setdefault(self.positions[name], []).append(reader)
        return triggers

    def read_by(self, reader: int, values: View) -> list[str]:
        """The names that a predicate reads of a completely decided architecture, in the order of reading."""
        view = PartialView(self, reader, values, lambda _: True)
        self.holds(reader, view)
        return list(view.reads)

    @cached_property
    def probed_reads(self) -> dict[int, frozenset[str]]:
        """What each predicate read of the probes; others may be read elsewhere."""
        reads: dict[int, set[str]] = {reader: set() for reader in self.readers}
        for values in islice(self.probes(), _RANDOM_PROBES // 4):
            for reader in self.readers:
                before = View(self)
                before.update(
                    (name, value) for name, value in values.items() if self.positions[name] < reader
                )
                reads[reader].update(self.read_by(reader, before))
        return {reader: frozenset(names) for reader, names in reads.items()}

    def probes(self) -> Iterator[View]:
        """Architectures, constraints aside, that show what conditions do: always the same ones."""
        rng = random.Random(0)  # only random() is used: its sequence is guaranteed across versions of Python
        for _ in range(_RANDOM_PROBES):
            yield self.assemble(lambda _, parameter: _probe_value(parameter, rng.random()))
        for name, parameter in self.parameters.items():
            count = min(parameter.size or _SWEEP, _SWEEP)
            for step in range(count):
                yield self._default_but(name, _probe_value(parameter, step / count))

    def _default_but(self, changed: str, value: Scalar) -> View:
        return self.assemble(lambda name, parameter: value if name == changed else parameter.default)


def _probe_value(parameter: Parameter, unit: float) -> Scalar:
    if parameter.size is None:
        low, high = parameter.describe()["low"], parameter.describe()["high"]
        return parameter.normalise(min(low + unit * (high - low), high))
    return parameter.at(min(int(unit * parameter.size), parameter.size - 1))
