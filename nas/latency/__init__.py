"""How fast a model runs on the device that will run it, and the gate that keeps the device free meanwhile.

Importing this package imports no torch; measuring does.
"""

from nas.latency.gate import DeviceGate, GateTimeout, LeaseLost
from nas.latency.measure import Options, measure, measure_together
from nas.latency.result import LatencyResult, Pair, Session
from nas.latency.rounds import Plan
from nas.latency.target import Target

__all__ = [
    "DeviceGate",
    "GateTimeout",
    "LatencyResult",
    "LeaseLost",
    "Options",
    "Pair",
    "Plan",
    "Session",
    "Target",
    "measure",
    "measure_together",
]
