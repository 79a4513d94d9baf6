"""Atomic files, sealed records, checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas import files
from nas.files import (
    CorruptFile,
    WriteFailed,
    atomic_path,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    read_json,
    read_record,
    seal,
    sha256_file,
    sweep_temporary,
    unseal,
    write_record,
)

RECORD = {"name": "é", "values": [1, 2.5, None, True], "nested": {"b": 1, "a": {"2": 3}}}


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_bytes_text_and_json_round_trip(tmp_path: Path) -> None:
    atomic_write_bytes(tmp_path / "a", b"\x00\xff")
    atomic_write_text(tmp_path / "b", "é\n")
    atomic_write_json(tmp_path / "c.json", RECORD)
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b").read_text(encoding="utf-8") == "é\n"
    assert read_json(tmp_path / "c.json") == RECORD
    assert names(tmp_path) == ["a", "b", "c.json"]


def test_a_new_file_gets_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    atomic_write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_step_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "f"
    atomic_write_text(path, "old")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(
        WriteFailed, match=r"f cannot be written: No space left on device; nothing was"
    ) as caught:
        atomic_write_text(path, "new")
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value, OSError)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["f"]


def test_any_error_inside_the_block_removes_the_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_vanished_directory_is_named_and_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(WriteFailed, match=r"gone/f cannot be written: No such file or directory"):
        atomic_write_text(tmp_path / "gone" / "f", "x")
    assert not (tmp_path / "gone").exists()


def test_file_size_limit_is_a_clear_error(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(WriteFailed, match=r"f cannot be written: File too large"):
            atomic_write_bytes(tmp_path / "f", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == []


def test_threads_may_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    errors: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(10):
                write_record(path, {"number": number, "filler": "x" * 1000 * number})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert read_record(path)["number"] in range(4)
    assert names(tmp_path) == ["f.json"]


def test_nan_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"f\.json cannot be written as JSON: Out of range float"):
        write_record(tmp_path / "f.json", {"loss": float("nan")})
    assert names(tmp_path) == []


def test_record_round_trip_and_its_seal(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_record(path, RECORD)
    assert read_record(path) == RECORD
    stored = json.loads(path.read_text(encoding="utf-8"))
    canonical = json.dumps(RECORD, sort_keys=True, separators=(",", ":"))
    assert stored.pop("sha256") == hashlib.sha256(canonical.encode()).hexdigest()


def test_every_cut_of_a_record_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_record(path, RECORD)
    whole = path.read_bytes()
    for length in range(
        len(whole) - 1
    ):  # the last byte is the newline, without which the record is still whole
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFile, match=r"r\.json is damaged"):
            read_record(path)


def test_every_flipped_bit_of_a_record_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_record(path, RECORD)
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            assert read_record(path) == RECORD  # white space, or another spelling of the same value
        except CorruptFile as error:
            assert error.path == path


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "it is empty"),
        (b"\0\0\0\0", "it is empty"),
        (b'{"a": ', "not JSON or cut short"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"[" * 200_000, "not JSON"),
        (b"[1, 2]", "holds no record"),
        (b'{"a": 1}', "its checksum is missing"),
        (b'{"a": NaN, "sha256": "0"}', "holds values that no record can have"),
        (b'{"a": 1, "sha256": "0"}', "do not match its checksum"),
    ],
)
def test_what_is_no_record_says_why(tmp_path: Path, text: bytes, why: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(text)
    with pytest.raises(CorruptFile, match=why):
        read_record(path)


def test_unseal_names_what_is_not_a_file() -> None:
    assert unseal(seal({"a": 1}), "suggestion") == {"a": 1}
    with pytest.raises(CorruptFile, match=r"^suggestion is damaged: holds no record"):
        unseal(None, "suggestion")
    with pytest.raises(ValueError, match="cannot have a key 'sha256'"):
        seal({"sha256": 1})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4).filter(lambda key: key != "sha256"), JSON, max_size=4))
def test_a_seal_survives_being_written_and_read(data: dict[str, Any]) -> None:
    assert unseal(json.loads(json.dumps(seal(data), indent=1)), "x") == data


def test_sweep_removes_what_dead_writers_left_and_nothing_else(tmp_path: Path) -> None:
    dead = dead_pid()
    left = [f".r.json.{dead}-1.tmp", f".a.{dead}.tmp", f".own.{os.getpid()}-999999.tmp"]
    kept = [f".r.json.{os.getppid()}-1.tmp", "r.json", "x.tmp", f"r.{dead}.tmp", ".hidden"]
    for name in (*left, *kept):
        (tmp_path / name).touch()
    with atomic_path(tmp_path / "live") as temporary:
        temporary.write_text("x")
        assert sweep_temporary(tmp_path) == len(left)
    assert names(tmp_path) == sorted([*kept, "live"])


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_killed_at_any_durable_step_leaves_old_or_new(tmp_path: Path, step: str) -> None:
    path = tmp_path / "r.json"
    write_record(path, {"version": 0})
    program = (
        "import os, signal, sys\n"
        "from nas import files\n"
        "real, seen = getattr(os, sys.argv[2]), [0]\n"
        "def shim(*a, **k):\n"
        "    seen[0] += 1\n"
        "    if seen[0] == int(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*a, **k)\n"
        "setattr(os, sys.argv[2], shim)\n"
        "files.write_record(sys.argv[1], {'version': 1})\n"
    )
    for count, expected in ((1, {0}), (2, {1})):
        done = subprocess.run([sys.executable, "-c", program, str(path), step, str(count)], check=False)
        assert done.returncode == (0 if step == "replace" and count == 2 else -signal.SIGKILL)
        assert read_record(path)["version"] in expected
        sweep_temporary(tmp_path)
        assert names(tmp_path) == ["r.json"]


def test_sha256_file_reads_it_all(tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, nas.files, nas.environment, nas.latency, nas.latency.gate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_environment_is_json_without_paths_or_names() -> None:
    from nas.environment import describe_environment, usable_cpus

    text = json.dumps(describe_environment())
    found = json.loads(text)
    assert found["cpu"]["usable_cores"] == usable_cpus() >= 1
    assert found["versions"]["torch"]
    assert found["memory_bytes"] > 1 << 28
    assert str(Path(files.__file__).parent.parent) not in text
    assert f"{Path.home()}/" not in text
