"""Starts drivers quickly: everything is imported once, then each driver is a forked process of its own.

Reads one JSON order per line: {"arguments": [...], "environment": {...}, "log": FILE, "kill_at": N | null,
"names": FILE | null, "plain_report": bool} and answers {"pid": ...} and then {"status": exit code or minus signal}.
A killed driver is killed for good, its workers are real processes; only the second of imports is saved.
"""

from __future__ import annotations

import json
import os
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
        pid = os.fork()
        if pid == 0:
            _drive(order)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


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
        if order.get("plain_report"):
            import nas.conclude

            nas.conclude.write_report_files = lambda report, run: None
        if order.get("kill_at") is not None:
            from tests.nas.faults.killer import Killer

            Killer(order["kill_at"], order.get("names")).install()
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
