"""Messages between driver and worker: one line of JSON each, with its length and CRC-32 in front.

A frame is ``LLLLLLLL CCCCCCCC {...}\\n``: length and checksum of the JSON in hexadecimal. A worker can die in
the middle of a write, and a job can write into descriptors that are not its own: both must be noticed, never
decoded. NaN and the infinities travel as Python's own JSON tokens, which need no escape that a user's value
could collide with.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

__all__ = ["MAX_BYTES", "Decoder", "TornMessage", "encode", "first_misfit"]

MAX_BYTES = 64 << 20
"""Longest message: enough for any record, and little enough that a mistake cannot fill the driver's memory."""

_HEADER = 18
_NUMBER = 8
_SCALARS = (str, int, float, type(None))


class TornMessage(Exception):
    """The other side sent something that is not a whole message."""


def encode(kind: str, body: Any = None, *, name: str = "message", **head: str | int | None) -> bytes:
    """The frame of ``{"type": kind, "body": body, **head}``.

    Raises TypeError naming the place inside ``body``, called ``name``, that is not JSON.
    """
    if misfit := first_misfit(body, name):
        raise TypeError(misfit)
    text = json.dumps({"type": kind, **head, "body": body}, separators=(",", ":")).encode("ascii")
    if len(text) > MAX_BYTES:
        raise TypeError(
            f"{name} is {len(text) >> 20} MB, more than the {MAX_BYTES >> 20} MB that can be sent; use a file"
        )
    return b"%08x %08x %b\n" % (len(text), zlib.crc32(text), text)


def first_misfit(value: object, name: str) -> str | None:
    """The first place in ``value`` that JSON would refuse or silently change, as one line; None if there is
    none.

    Tuples count as lists. Keys must be text, because JSON would turn 1 into "1" without a word.
    """
    try:
        return _misfit(value, name)
    except RecursionError:
        return f"{name} is nested too deeply, or contains itself"


def _misfit(value: object, path: str) -> str | None:
    if isinstance(value, _SCALARS):
        return None
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"{path} has the key {key!r} (a {type(key).__name__}); only text can be a key"
            # Looked at here as well, because naming the place of every number of a long list takes most of the time.
            if not isinstance(item, _SCALARS) and (found := _misfit(item, f"{path}[{key!r}]")):
                return found
        return None
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if not isinstance(item, _SCALARS) and (found := _misfit(item, f"{path}[{index}]")):
                return found
        return None
    return (
        f"{path} is a {type(value).__name__}; only dict, list, tuple, str, int, float, bool and None can be sent "
        "(float(x) or x.tolist() makes them)"
    )


class Decoder:
    """Cuts a stream of bytes into messages: ``feed`` what was read, ``pop`` until None."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Add what was read from the pipe."""
        self._buffer += data

    def pop(self) -> dict[str, Any] | None:
        """The next whole message, or None until more was fed. Raises TornMessage when the stream is damaged."""
        buffer = self._buffer
        if len(buffer) < _HEADER:
            return None
        try:
            length = int(buffer[:_NUMBER], 16)
            checksum = int(buffer[_NUMBER + 1 : _HEADER - 1], 16)
        except ValueError:
            raise TornMessage(f"sent something that is not a message: {bytes(buffer[:40])!r}") from None
        if length > MAX_BYTES:
            raise TornMessage(f"sent a message of {length} bytes, more than {MAX_BYTES}")
        end = _HEADER + length
        if len(buffer) <= end:
            return None
        text = bytes(buffer[_HEADER:end])
        if buffer[end] != ord("\n") or zlib.crc32(text) != checksum:
            raise TornMessage(f"sent a message of {length} bytes with a wrong checksum")
        del buffer[: end + 1]
        message: dict[str, Any] = json.loads(text)
        return message
