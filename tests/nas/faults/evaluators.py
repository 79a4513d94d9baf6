"""Evaluators of the toy space that are struck by something at a chosen moment, once in a run.

The environment says what: ``NAS_FAULTS_STRIKE`` is ``TARGET:MOMENT``, where the target is ``driver`` or ``worker`` and
the moment is that durable step of the worker after the evaluation (1: before the first). ``NAS_FAULTS_STRUCK`` names a
file that is made when it happens.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.nas.faults.killer import Killer
from tests.nas.toys import toy

_installed = False


def struck_while_saving(architecture: dict[str, Any], directory: str) -> dict[str, float]:
    """The process that is chosen is killed while the result of trial 2 is written."""
    global _installed
    values = toy.evaluate(architecture, directory)
    if Path(directory).name == "2" and not _installed and not os.path.exists(os.environ["NAS_FAULTS_STRUCK"]):
        target, _, moment = os.environ["NAS_FAULTS_STRIKE"].partition(":")
        _installed = True
        Killer(int(moment), strike=lambda: _strike(target)).install(storages=False)
    return values


def _strike(target: str) -> None:
    os.close(os.open(os.environ["NAS_FAULTS_STRUCK"], os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    if target == "worker":
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(30)  # the end of the driver is the end of this process


def first_is_always_killed(architecture: dict[str, Any], directory: str) -> dict[str, float]:
    if Path(directory).name == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return toy.evaluate(architecture, directory)


def first_stops(architecture: dict[str, Any], directory: str) -> dict[str, float]:
    """As by Ctrl-Z, or by a debugger: it takes no signal but SIGKILL."""
    if Path(directory).name == "0":
        os.kill(os.getpid(), signal.SIGSTOP)
    return toy.evaluate(architecture, directory)


def first_hangs(architecture: dict[str, Any], directory: str) -> dict[str, float]:
    if Path(directory).name == "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1e9)
    return toy.evaluate(architecture, directory)


def first_allocates(architecture: dict[str, Any], directory: str) -> dict[str, float]:
    held = []
    while Path(directory).name == "0":
        if len(held) < 32:  # a driver that comes late to look must not find the memory of the machine used up
            held.append(bytearray(32 * 2**20))
        else:
            time.sleep(0.01)
    return toy.evaluate(architecture, directory)


def nan_when_narrow(architecture: dict[str, Any], directory: str) -> dict[str, float]:
    values = toy.evaluate(architecture, directory)
    return {**values, "score": float("nan")} if architecture["width"] == 16 else values


def never_ends(architecture: dict[str, Any], directory: str) -> dict[str, float]:
    """From the third candidate on."""
    values = toy.evaluate(architecture, directory)
    while int(Path(directory).name) >= 2:
        time.sleep(1)
    return values


def held(architecture: dict[str, Any], directory: str) -> dict[str, float]:
    """From the third candidate on, until the file ``NAS_FAULTS_GO`` is there: so long the run cannot be over."""
    values = toy.evaluate(architecture, directory)
    given_up = time.monotonic() + 300  # a test that failed makes no such file
    while int(Path(directory).name) >= 2 and time.monotonic() < given_up:
        if os.path.exists(os.environ["NAS_FAULTS_GO"]):
            break
        time.sleep(0.01)
    return values


def empties(architecture: dict[str, Any], directory: str) -> dict[str, float]:
    return {}
