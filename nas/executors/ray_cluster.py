"""The connection to a Ray cluster, made quietly, and what its nodes offer."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nas.errors import UserMistake

__all__ = ["Cluster", "Need"]

logger = logging.getLogger(__name__)

_INSTALL = "pip install 'nas-toolkit[ray]'"
_CONNECT_SECONDS = 10.0
_HEAD_SECONDS = 3.0
_FORMS = "local, auto, HOST:PORT or ray://HOST:PORT"
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Need:
    """What one job takes of a node. ``resource``: one of the node's custom resource of that name."""

    cpus: float
    gpus: float = 0.0
    resource: str | None = None

    def times_in(self, resources: Mapping[str, float]) -> int:
        """How often it fits into ``resources``."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, **({self.resource: 1.0} if self.resource else {})}
        fits = [
            int(resources.get(name, 0.0) / amount + _ROUNDING)
            for name, amount in wanted.items()
            if amount > 0
        ]
        return min(fits, default=0)

    def options(self) -> dict[str, Any]:
        """The same as options of an actor."""
        custom = {self.resource: 1.0} if self.resource else {}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": custom}


class Cluster:
    """A connection that is ours (``local``, ``auto``, an address) or that the program had already.

    Args:
        address: ``local`` starts a cluster of this machine, ``auto`` joins the one that runs here or that RAY_ADDRESS
            names, anything else is the address of a head node.
        runtime_env: Ray's description of what the nodes need to run our code (working_dir, pip, env_vars).
        local_options: further arguments of ``ray.init`` for a local cluster, such as num_cpus.

    Raises UserMistake when Ray is not installed or the address leads nowhere.
    """

    def __init__(
        self,
        address: str,
        runtime_env: Mapping[str, Any] | None = None,
        local_options: Mapping[str, Any] | None = None,
    ):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # What a future Ray does today: a job that asks for no GPU is left those that it sees.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError:
            raise UserMistake(f"--ray {address}: Ray is not installed; {_INSTALL}") from None
        self.runtime_env: dict[str, Any] = {}
        self._owned = not ray.is_initialized()
        if self._owned:
            self._connect(address, dict(runtime_env or {}), dict(local_options or {}))
        else:
            self.runtime_env = dict(runtime_env or {})
        # A client has no connection to the head's own service, only to a server that speaks for it.
        client = ray.util.client.ray.is_connected()
        host, _, port = ("" if client else ray.get_runtime_context().gcs_address).rpartition(":")
        self._head = (host.strip("[]"), int(port)) if port else None

    def close(self) -> None:
        """Leave the cluster, and end it if it was started here."""
        import ray

        if self._owned and ray.is_initialized():
            self._owned = False
            ray.shutdown()

    def head_answers(self) -> bool:
        """Whether the head of the cluster can be reached; Ray ends the program a minute after it cannot."""
        if self._head is None:
            return True
        try:
            socket.create_connection(self._head, timeout=_HEAD_SECONDS).close()
        except OSError:
            return False
        return True

    def nodes(self) -> list[dict[str, Any]]:
        """Nodes that are alive, as Ray describes them."""
        import ray

        return [node for node in ray.nodes() if node["Alive"]]

    def room(self, need: Need, *, except_nodes: frozenset[str] = frozenset()) -> int:
        """How many jobs the cluster can run at a time, if nobody else uses it."""
        return sum(
            need.times_in(node["Resources"]) for node in self.nodes() if node["NodeID"] not in except_nodes
        )

    def with_resource(self, name: str) -> list[dict[str, Any]]:
        """Nodes that have the custom resource. Raises UserMistake when there is none."""
        found = [node for node in self.nodes() if node["Resources"].get(name, 0.0) >= 1]
        if not found:
            raise UserMistake(
                f"--target ray:{name}/...: no node of the cluster has the resource {name!r}; start one with "
                f"ray start --address=... --resources='{{\"{name}\": 1}}'"
            )
        return found

    # -- connecting ------------------------------------------------------------------------------------------

    def _connect(self, address: str, runtime_env: dict[str, Any], local_options: dict[str, Any]) -> None:
        import ray

        options: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "runtime_env": runtime_env or None,
        }
        if address == "local":
            options |= {"address": "local", "include_dashboard": False, **local_options}
            # How long its helper processes look for a head that has gone with a killed driver; Ray's own minute is for
            # heads that come back.
            os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
        else:
            if address != "auto":
                _check_reachable(address)
            options["address"] = address
        try:
            with _kept_signal_handlers(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(**options)
        except (
            Exception
        ) as error:  # Ray raises ConnectionError, RuntimeError, ValueError, OSError and its own
            raise _mistake(address, error) from error


def _check_reachable(address: str) -> None:
    """Ray itself tries for half a minute, and then ends some programs outright."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserMistake(f"--ray {address}: must be {_FORMS}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        why = error.strerror or str(error)
        raise UserMistake(
            f"--ray {address}: no answer ({why}); give the address that 'ray start --head' printed, or {_FORMS}"
        ) from None


def _mistake(address: str, error: Exception) -> UserMistake:
    text = " ".join(str(error).split())
    if "Could not find any running Ray instance" in text:
        return UserMistake(
            f"--ray {address}: no Ray runs on this machine; start one with 'ray start --head', or give --ray local"
        )
    return UserMistake(f"--ray {address}: {text[:400]}; allowed: {_FORMS}")


@contextlib.contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """Ray puts its own handler of SIGTERM in place of the program's, which would then not stop as it should."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
