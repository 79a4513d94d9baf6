"""What an error says, in one line."""

from __future__ import annotations

import pytest

from nas.errors import first_line


@pytest.mark.parametrize(
    ("error", "limit", "line"),
    [
        (ValueError("one\ntwo"), None, "one"),
        (ValueError("\n  one  \ntwo"), None, "one  "),
        (ValueError(""), None, "ValueError"),
        (ValueError(" \n\n "), None, "ValueError"),
        (RuntimeError(), 3, "Run"),
        (ValueError("x" * 500), 20, "x" * 20),
        (KeyError("name"), None, "'name'"),
        (OSError(2, "No such file"), None, "[Errno 2] No such file"),
    ],
)
def test_first_line(error: BaseException, limit: int | None, line: str) -> None:
    assert first_line(error, limit) == line


def test_nothing_is_cut_by_default() -> None:
    assert first_line(ValueError("x" * 500 + "\ny")) == "x" * 500
