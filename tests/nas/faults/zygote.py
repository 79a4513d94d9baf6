"""Starts drivers quickly: everything is imported once, then each driver is a forked process of its own.

Reads one JSON order per line. {"do": "start", "arguments": [...], "environment": {...}, "log": FILE, "kill_at": N or
null, "names": FILE or null, "plain_report": bool, "handles": N or null, "obey": bool} is answered by {"pid": ...},
and {"do": "wait", "pid": ...} by {"status": exit code, minus the signal, or null while it runs}.
A killed driver is killed for good, its workers are real processes; only the second of imports is saved.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

TOYS = Path(__file__).parents[1] / "toys" / "toy.py"


def main() -> None:
    _warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "start":
            pid = os.fork()
            if pid == 0:
                _drive(order)
            print(json.dumps({"pid": pid}), flush=True)
        else:
            pid, status = os.waitpid(order["pid"], os.WNOHANG)
            print(json.dumps({"status": os.waitstatus_to_exitcode(status) if pid else None}), flush=True)


def _warm_up() -> None:
    """A whole run in this process, so that every module is there."""
    from nas.cli.main import main as nas

    words = ["search", "--space", f"{TOYS}:SPACE", "--evaluator", f"{TOYS}:evaluate", "--trials", "1"]
    words += ["--objective", "score:maximize", "--objective", "cost:minimize", "--workers", "1"]
    stdout = os.dup(1)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            for storage in ([], ["--storage", f"journal:{folder}/journal"]):
                out = f"{folder}/{len(storage)}"
                nas([*words, "--out", out, *storage])
        except SystemExit as ended:
            if ended.code:
                raise
        sys.stdout.flush()
        os.dup2(stdout, 1)
    os.close(stdout)


def obey_permissions() -> None:
    """Take from root what lets it read and write anywhere, for this process and those it starts."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the capability sets, of this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, for capabilities 0-31 and 32-63
    dac_override, dac_read_search, bounding_set_drop = 1, 2, 24
    failed = libc.capget(header, sets)
    for place in range(3):
        sets[place] &= ~(1 << dac_override | 1 << dac_read_search)
    failed |= libc.capset(header, sets)
    for capability in (dac_override, dac_read_search):
        failed |= libc.prctl(bounding_set_drop, capability, 0, 0, 0)
    if failed:
        raise OSError(ctypes.get_errno(), "this root cannot give up its powers")


def _drive(order: dict[str, Any]) -> None:
    code = 70
    try:
        os.setsid()
        os.environ.update(order["environment"])
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if order["handles"] is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (order["handles"], order["handles"]))
        if order["obey"]:
            obey_permissions()
        if order["plain_report"]:
            import nas.conclude

            nas.conclude.write_report_files = lambda report, run: None
        if order["kill_at"] is not None:
            from tests.nas.faults.killer import Killer

            Killer(order["kill_at"], order["names"]).install()
        from nas.cli.main import main as nas

        nas(order["arguments"])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
