"""How fast a model runs on the device that will run it, and the gate that keeps the device free meanwhile.

Importing this package imports no torch; measuring does.
"""

from nas.latency.gate import DeviceGate, GateTimeout
from nas.latency.measure import measure, measure_interleaved
from nas.latency.result import InterleavedResult, LatencyResult
from nas.latency.target import Target

__all__ = [
    "DeviceGate",
    "GateTimeout",
    "InterleavedResult",
    "LatencyResult",
    "Target",
    "measure",
    "measure_interleaved",
]
