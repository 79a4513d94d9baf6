"""Functions that the tests run as jobs. They must not import torch: the start of a worker is measured with them."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from nas.executors import Channel

FOREVER = 1e6

Json = dict[str, Any]


class Refused(RuntimeError):
    """What nas.errors.TrialFailure looks like to a worker."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


def double(payload: Json, channel: Channel) -> Json:
    return {"x": payload["x"] * 2}


def echo(payload: Json, channel: Channel) -> Json:
    return payload


def identify(payload: Json, channel: Channel) -> Json:
    return {"pid": os.getpid(), "group": os.getpgrp(), "session": os.getsid(0)}


def environment(payload: Json, channel: Channel) -> Json:
    return {name: os.environ.get(name) for name in payload["names"]}


def signals(payload: Json, channel: Channel) -> Json:
    names = ("SIGINT", "SIGTERM", "SIGCHLD", "SIGHUP")
    dispositions = {name: str(signal.getsignal(getattr(signal, name))) for name in names}
    return {**dispositions, "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, ()))}


def loaded_modules(payload: Json, channel: Channel) -> Json:
    return {name: name in sys.modules for name in payload["names"]}


# -- talking -----------------------------------------------------------------------------------------------------------


def report_steps(payload: Json, channel: Channel) -> Json:
    for step in range(payload["steps"]):
        channel.event({"step": step})
    return {"steps": payload["steps"]}


def ask_until_told_to_stop(payload: Json, channel: Channel) -> Json:
    for step in itertools.count():
        if channel.ask({"step": step}).get("stop"):
            return {"stopped_at": step}
    raise AssertionError("not reached")


def ask_once(payload: Json, channel: Channel) -> Json:
    return {"reply": channel.ask({"question": 1})}


def chatter(payload: Json, channel: Channel) -> Json:
    while True:
        channel.event({"noise": "x" * 100})


def chat_from_threads(payload: Json, channel: Channel) -> Json:
    def talk(name: int) -> None:
        for step in range(payload["steps"]):
            if channel.ask({"thread": name, "step": step}) != {"thread": name, "step": step}:
                raise RuntimeError("a reply went to the wrong thread")

    threads = [threading.Thread(target=talk, args=(name,)) for name in range(payload["threads"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {}


def leave_a_talking_thread(payload: Json, channel: Channel) -> Json:
    said: list[str] = []

    def talk() -> None:
        try:
            while True:
                channel.event({"late": True})
                time.sleep(0.001)
        except RuntimeError as error:
            Path(payload["file"]).write_text(str(error))

    threading.Thread(target=talk, daemon=True).start()
    return {"said": said}


def leave_an_asking_thread(payload: Json, channel: Channel) -> Json:
    asked = threading.Event()

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            while True:
                channel.ask({"late": True})
                asked.set()

    threading.Thread(target=ask, daemon=True).start()
    asked.wait()
    return {"pid": os.getpid()}


def send_bytes(payload: Json, channel: Channel) -> Json:
    channel.event({"weights": b"\0"})
    return {}


# -- ending badly ------------------------------------------------------------------------------------------------------


def fail(payload: Json, channel: Channel) -> Json:
    raise ValueError("learning rate\nis negative")


def refuse(payload: Json, channel: Channel) -> Json:
    raise Refused(payload["kind"], payload["reason"])


def say_it_ran_out_of_memory(payload: Json, channel: Channel) -> Json:
    raise RuntimeError(payload["text"])


def leave_by_sys_exit(payload: Json, channel: Channel) -> Json:
    sys.exit("enough")


def give_nan(payload: Json, channel: Channel) -> Json:
    return {"loss": math.nan, "curve": [math.inf, -math.inf, 1.5]}


def give_unserialisable(payload: Json, channel: Channel) -> Json:
    return {"metrics": {"accuracy": 1 + 2j}}


def give_number_keys(payload: Json, channel: Channel) -> Json:
    return {"per_epoch": {1: 0.5}}


def give_list(payload: Json, channel: Channel) -> Any:
    return [1, 2]


def give_itself(payload: Json, channel: Channel) -> Json:
    payload["self"] = payload
    return payload


def give_megabytes(payload: Json, channel: Channel) -> Json:
    return {"text": "x" * (payload["megabytes"] << 20)}


def kill_itself(payload: Json, channel: Channel) -> Json:
    """Dies in the first ``times`` attempts, which it counts in a file."""
    if _count_attempt(payload["file"]) <= payload["times"]:
        os.kill(os.getpid(), payload.get("signal", signal.SIGKILL))
        time.sleep(FOREVER)
    return {"survived": True}


def exit_at_once(payload: Json, channel: Channel) -> Json:
    os._exit(payload["code"])


def crash(payload: Json, channel: Channel) -> Json:
    print("about to crash")
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def die_while_reporting(payload: Json, channel: Channel) -> Json:
    """Kills the process in the middle of the write of its result, in the first ``times`` attempts."""
    if _count_attempt(payload["file"]) > payload["times"]:
        return {"survived": True}
    whole_write = os.write

    def torn_write(descriptor: int, data: Any) -> int:
        if b'"done"' in bytes(data[:200]):
            whole_write(descriptor, bytes(data)[: payload["bytes"]])
            os.kill(os.getpid(), signal.SIGKILL)
        return whole_write(descriptor, data)

    os.write = torn_write
    return {"survived": False, "filler": "x" * 1000}


def scribble_into_every_descriptor(payload: Json, channel: Channel) -> Json:
    # The descriptors keep the driver's numbers, which are as high as the driver has files open.
    for descriptor in range(3, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 4096 else 4096):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"scribble scribble scribble scribble\n")
    time.sleep(FOREVER)
    return {}


def fork_and_return_twice(payload: Json, channel: Channel) -> Json:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return {"pid": os.getpid()}


def change_the_process(payload: Json, channel: Channel) -> Json:
    """What a careless job leaves behind for the next one."""
    os.chdir("/")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return {"pid": os.getpid()}


def current_directory(payload: Json, channel: Channel) -> Json:
    return {"pid": os.getpid(), "directory": os.getcwd(), **signals(payload, channel)}


# -- not ending --------------------------------------------------------------------------------------------------------


def sleep(payload: Json, channel: Channel) -> Json:
    print("sleeping")
    channel.event({"pid": os.getpid()})
    time.sleep(payload.get("seconds", FOREVER))
    return {"pid": os.getpid()}


def sleep_deaf(payload: Json, channel: Channel) -> Json:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return sleep(payload, channel)


def spin(payload: Json, channel: Channel) -> Json:
    """A loop in C that neither returns to the interpreter nor lets another thread run."""
    channel.event({"pid": os.getpid()})
    sum(itertools.repeat(0))
    return {}


def stop_itself(payload: Json, channel: Channel) -> Json:
    channel.event({"pid": os.getpid()})
    os.kill(os.getpid(), signal.SIGSTOP)
    return {}


def wait_for_file(payload: Json, channel: Channel) -> Json:
    channel.event({"pid": os.getpid()})
    while not Path(payload["file"]).exists():
        time.sleep(0.01)
    return {"pid": os.getpid()}


# -- descendants -------------------------------------------------------------------------------------------------------


def breed(payload: Json, channel: Channel) -> Json:
    """Starts ``count`` processes that each start another and sleep, tells their numbers, goes on as ``then`` says."""
    script = (
        f"import subprocess; p = subprocess.Popen(['sleep', '{FOREVER}']); print(p.pid, flush=True); p.wait()"
    )
    pids = []
    for _ in range(payload["count"]):
        child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        if child.stdout is None:
            raise RuntimeError("no pipe")
        pids += [child.pid, int(child.stdout.readline())]
    if payload.get("own_session"):
        pids.append(subprocess.Popen(["sleep", str(FOREVER)], start_new_session=True).pid)
    channel.event({"pid": os.getpid(), "descendants": pids})
    if payload["then"] == "return":
        return {"pid": os.getpid()}
    if payload["then"] == "spin":
        sum(itertools.repeat(0))
    time.sleep(FOREVER)
    return {}


def start_in_background(payload: Json, channel: Channel) -> Json:
    """Leaves processes that are nobody's children any more, one of them in a session of its own."""
    for launcher in ("", "setsid"):
        command = f"{launcher} sleep {FOREVER} >/dev/null 2>&1 & echo $!"
        done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True)
        channel.event({"pid": int(done.stdout)})
    return {"pid": os.getpid()}


def fork_holding_pipes(payload: Json, channel: Channel) -> Json:
    """Leaves a forked child that inherits every pipe, then dies."""
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(FOREVER)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def wait_for_child(payload: Json, channel: Channel) -> Json:
    return {"code": subprocess.run([sys.executable, "-c", "raise SystemExit(7)"]).returncode}


# -- memory ------------------------------------------------------------------------------------------------------------


def allocate(payload: Json, channel: Channel) -> Json:
    """Fills memory block by block; ``gently``: slowly, and not all there is, for a watchdog on a loaded machine."""
    _count_attempt(payload["file"])
    held = []
    while True:
        if len(held) < 64 or not payload.get("gently"):
            held.append(bytearray(b"x") * (16 << 20))
        if payload.get("gently"):
            time.sleep(0.02)


def allocate_in_child(payload: Json, channel: Channel) -> Json:
    script = (
        "import time\nheld = []\nfor _ in range(64):\n    held.append(bytearray(b'x') * (16 << 20))\n"
        f"    time.sleep(0.02)\ntime.sleep({FOREVER})"
    )
    return {"code": subprocess.run([sys.executable, "-c", script]).returncode}


def share_with_forks(payload: Json, channel: Channel) -> Json:
    """Holds ``megabytes`` that ``forks`` children share with it, until told that they were looked at.

    The last child has ended, but nobody has asked for its code yet.
    """
    held = bytearray(b"x") * (payload["megabytes"] << 20)
    for number in range(payload["forks"] + 1):
        child = os.fork()
        if child == 0:
            if number < payload["forks"]:
                time.sleep(FOREVER)
            os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    channel.ask({"pid": os.getpid()})
    return {"held": len(held)}


# -- output ------------------------------------------------------------------------------------------------------------


def print_lines(payload: Json, channel: Channel) -> Json:
    for number in range(payload["lines"]):
        print(f"line {number} " + "." * payload.get("width", 0))
    sys.stderr.write("from stderr\n")
    os.system("echo from a child")
    if payload.get("fail"):
        raise ValueError("printed enough")
    return {}


def _count_attempt(file: str) -> int:
    with open(file, "a") as counter:
        counter.write("x")
    return Path(file).stat().st_size
