"""Faults 10 and 11 for ``--storage journal:FILE``: a torn tail at every position, flipped bits everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nas.reader import read_run
from nas.run_directory import RunDirectory
from tests.nas.toys import toy
from tests.nas.toys.runs import architectures, made_run, opened, summary, toy_result


class Original:
    """A run whose study is in a journal, and copies of it to be damaged."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.journal = folder / "study.journal"
        self.url = f"journal:{self.journal}"
        self.run = made_run(folder / "run", self.url)
        self.bytes = self.journal.read_bytes()
        study, lines = opened(self.run)
        self.run.release()
        assert lines == []
        self.summary = summary(study)
        shutil.copytree(folder / "run", folder / "kept")

    def restore(self, data: bytes) -> RunDirectory:
        """The run as it was, with ``data`` for its journal."""
        shutil.rmtree(self.run.path)
        shutil.copytree(self.folder / "kept", self.run.path)
        for path in self.folder.glob("study.journal*"):
            path.unlink()
        self.journal.write_bytes(data)
        return RunDirectory(self.run.path)

    def check(self, run: RunDirectory, *, again: bool = True) -> list[str]:
        """Everything is still known, and the study can be written to."""
        study, lines = opened(run)
        try:
            assert study.recover() == []
            assert summary(study) == self.summary
            trial = study.suggest(architectures()[7])
            study.record(trial, toy_result(trial))
        finally:
            run.release()
        for line in self.journal.read_bytes().splitlines():
            assert "op_code" in json.loads(line)
        if again:
            reopened, more = opened(run)
            run.release()
            assert more == []
            assert summary(reopened)[:-1] == self.summary
            assert summary(reopened)[-1][2] == "complete"
        return lines


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return Original(tmp_path_factory.mktemp("journal"))


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_every_cut_of_the_last_record(original: Original, step: int) -> None:
    whole = original.bytes
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in [*range(last, len(whole), step), len(whole) - 1]:
        run = original.restore(whole[:cut])
        original.check(run, again=cut % 16 == 0)
        torn = original.journal.with_name("study.journal.torn-1")
        assert torn.exists() == (cut > last)
        if cut > last:
            assert torn.read_bytes() == whole[last:cut]


def test_any_number_of_records_cut_off(original: Original) -> None:
    """A machine that loses its power can lose more than the last record."""
    whole = original.bytes
    starts = [0, *(index + 1 for index, byte in enumerate(whole[:-1]) if byte == ord("\n"))]
    for start in starts[::2]:
        for cut in {start, start + 40}:
            run = original.restore(whole[:cut])
            original.check(run)


def flipped(data: bytes, position: int, bit: int) -> bytes:
    return data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :]


@pytest.mark.parametrize("step", [499, pytest.param(19, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_flipped_bits(original: Original, step: int) -> None:
    mended = 0
    for position in range(0, len(original.bytes), step):
        data = flipped(original.bytes, position, position % 8)
        run = original.restore(data)
        reader = read_run(run.path)
        assert summary(reader.study) == original.summary, position
        assert original.journal.read_bytes() == data, "a reader wrote to the journal"
        lines = original.check(run)
        if any("damaged" in line for line in lines):
            mended += 1
            assert original.journal.with_name("study.journal.damaged-1").read_bytes() == data
            assert all(len(line) < 400 and "\n" not in line for line in lines)
    assert mended > 5


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"\0" * 4096, b"{}\n", b"[1]\n", b"not a journal\n", b'{"op_code": 99}\n']
)
def test_something_else_in_its_place(original: Original, data: bytes) -> None:
    original.check(original.restore(data))


def test_deleted(original: Original) -> None:
    run = original.restore(b"")
    original.journal.unlink()
    assert summary(read_run(run.path).study) == original.summary
    assert not original.journal.exists(), "a reader made a journal"
    original.check(run)


def test_reading_leaves_an_unfinished_record_alone(original: Original) -> None:
    """Another driver may be in the middle of writing it."""
    data = original.bytes + b'{"op_code": 8, "worker'
    run = original.restore(data)
    assert summary(read_run(run.path).study) == original.summary
    assert original.journal.read_bytes() == data
    assert toy.SPACE.name == read_run(run.path).study.space.name
