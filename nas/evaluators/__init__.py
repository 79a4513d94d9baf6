"""How good is a candidate: one evaluator per file of this package, found by its registered name."""

from __future__ import annotations

from nas.evaluators.base import Context, Evaluation, Evaluator
from spaces.names import Registry

__all__ = ["EVALUATORS", "Context", "Evaluation", "Evaluator", "register_evaluator"]

EVALUATORS: Registry[Evaluator] = Registry("evaluator", "nas.evaluators")
register_evaluator = EVALUATORS.register
