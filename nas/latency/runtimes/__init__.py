"""The ways of running a model, one module each: ``RUNTIMES`` finds them by name.

A runtime is a subclass of ``Runtime`` under ``@RUNTIMES.register(name)`` in a module of this package, or in another
distribution's through the entry-point group ``nas.latency.runtimes``. Importing it imports neither torch nor an engine.
"""

from nas.latency.runtimes.base import ALIASES, RUNTIMES, Runtime

__all__ = ["ALIASES", "RUNTIMES", "Runtime"]
