"""Messages between a driver and its workers, however the stream is cut or damaged."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.executors.wire import MAX_BYTES, Decoder, TornMessage, encode

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


class TestWire:
    @given(st.lists(st.dictionaries(st.text(), json_values), max_size=4), st.integers(1, 50))
    @settings(max_examples=50, deadline=None)
    def test_messages_arrive_whole_however_the_stream_is_cut(
        self, messages: list[dict[str, Any]], size: int
    ) -> None:
        stream = b"".join(encode("event", message) for message in messages)
        decoder = Decoder()
        arrived = []
        for start in range(0, len(stream), size):
            decoder.feed(stream[start : start + size])
            while (message := decoder.pop()) is not None:
                arrived.append(message["body"])
        assert arrived == messages

    def test_a_message_that_is_cut_anywhere_is_not_a_message(self) -> None:
        frame = encode("done", {"loss": 0.5})
        for length in range(1, len(frame)):
            decoder = Decoder()
            decoder.feed(frame[:length])
            assert decoder.pop() is None
            decoder.feed(frame[length:])
            assert decoder.pop() == {"type": "done", "body": {"loss": 0.5}}

    def test_a_flipped_bit_is_never_taken_for_a_message(self) -> None:
        frame = encode("done", {"loss": 0.5})
        for place, bit in itertools.product(range(len(frame)), range(8)):
            damaged = bytearray(frame)
            damaged[place] ^= 1 << bit
            decoder = Decoder()
            decoder.feed(bytes(damaged))
            try:
                message = decoder.pop()
            except TornMessage:
                continue
            # Case of a hexadecimal digit and a longer length than was sent: not wrong, or not complete.
            assert message is None or message == {"type": "done", "body": {"loss": 0.5}}

    def test_an_absurd_length_is_refused_before_it_is_read(self) -> None:
        decoder = Decoder()
        decoder.feed(b"ffffffff 00000000 {")
        with pytest.raises(TornMessage, match=f"more than {MAX_BYTES}"):
            decoder.pop()
