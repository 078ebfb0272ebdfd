"""The frames between host and box: a sans-IO codec, strict, the same on both sides.

A frame is `type u8 | seq u32 | header_len u32 | body_len u32 | mac[16]`, then a JSON object and raw bytes. The first
frame, HELLO, carries the key; every MAC covers the direction, so that nothing can be played back to its sender, and
sequence numbers count up by one, so that nothing can be played again.
"""

from __future__ import annotations

import json
import struct
from _blake2 import blake2b
from typing import Any, NamedTuple, NoReturn

HELLO, READY, CALL, RESULT, INTERRUPT = 1, 2, 3, 4, 5
TO_BOX, TO_HOST = b"\x00", b"\x01"
VERSION = 2
LIMIT = 1 << 20            # header and body together
KEY_BYTES = 32

_HEAD = struct.Struct(">BIII16s")
_COVERED = struct.Struct(">BIII")
_KINDS = {TO_BOX: frozenset((HELLO, CALL, INTERRUPT)), TO_HOST: frozenset((READY, RESULT))}
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_decode = json.JSONDecoder(parse_constant=_no_constant).decode


class FrameError(Exception):
    """The bytes are no frame of this conversation. Nothing after them can be trusted."""


class Frame(NamedTuple):
    """One message. `kind` is one of HELLO, READY, CALL, RESULT, INTERRUPT."""

    kind: int
    seq: int
    header: dict[str, Any]
    body: bytes


def _mac(key: bytes, direction: bytes, covered: bytes, content: bytes) -> bytes:
    return blake2b(direction + covered + content, key=key, digest_size=16).digest()


class Encoder:
    """Makes the frames of one direction."""

    def __init__(self, direction: bytes, key: bytes) -> None:
        self._direction, self._key, self.seq = direction, key, 0

    def encode(self, kind: int, header: dict[str, Any], body: bytes = b"") -> bytes:
        """The next frame; it counts `seq`, the number of the frame to come, up. Raises FrameError if it is too big."""
        head = _encode(header).encode()
        if len(head) + len(body) > LIMIT:
            raise FrameError(f"a frame of {len(head) + len(body)} bytes, at most {LIMIT} are allowed")
        covered, content = _COVERED.pack(kind, self.seq, len(head), len(body)), head + body
        self.seq += 1
        return covered + _mac(self._key, self._direction, covered, content) + content


class Decoder:
    """Takes the bytes of one direction in pieces of any size and gives whole frames.

    Without a key the first frame must be a HELLO that brings it. After a FrameError the decoder gives nothing more.
    """

    def __init__(self, direction: bytes, key: bytes | None = None) -> None:
        self._direction, self.key, self._seq = direction, key, 0
        self._buffer = bytearray()
        self._broken: str | None = None

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes. Raises FrameError at the first byte that cannot be right."""
        if self._broken is not None:
            raise FrameError(self._broken)
        buffer = self._buffer
        buffer += data
        frames = []
        try:
            while len(buffer) >= _HEAD.size:
                frame = self._next(buffer)
                if frame is None:
                    break
                frames.append(frame)
        except FrameError as error:
            self._broken = str(error)
            raise
        return frames

    def _next(self, buffer: bytearray) -> Frame | None:
        kind, seq, header_length, body_length, mac = _HEAD.unpack_from(buffer)
        if kind not in _KINDS[self._direction] or (kind == HELLO) != (self.key is None):
            raise FrameError(f"a frame of type {kind} is out of place")
        if seq != self._seq:
            raise FrameError(f"frame {seq} where frame {self._seq} is due")
        if header_length + body_length > LIMIT:
            raise FrameError(f"a frame of {header_length + body_length} bytes, at most {LIMIT} are allowed")
        end = _HEAD.size + header_length + body_length
        if len(buffer) < end:
            return None
        covered, content = bytes(buffer[:_COVERED.size]), bytes(buffer[_HEAD.size:end])
        del buffer[:end]
        key = self.key
        if key is None:            # only a HELLO says what to check it with
            header = self._header(content[:header_length])
            key = _key(header)
        # An ordinary comparison: the first wrong frame ends the conversation, so its duration tells nobody anything.
        if mac != _mac(key, self._direction, covered, content):
            raise FrameError(f"frame {seq} has a wrong MAC")
        self._seq, self.key = seq + 1, key
        return Frame(kind, seq, self._header(content[:header_length]), content[header_length:])

    @staticmethod
    def _header(data: bytes) -> dict[str, Any]:
        try:
            header = _decode(data.decode())
        except (ValueError, RecursionError) as error:
            raise FrameError(f"a header that is not JSON: {error}") from None
        if not isinstance(header, dict):
            raise FrameError("a header that is no object")
        return header


def _key(header: dict[str, Any]) -> bytes:
    try:
        key = bytes.fromhex(header["key"])
    except (KeyError, TypeError, ValueError):
        raise FrameError("a HELLO without a key") from None
    if len(key) != KEY_BYTES:
        raise FrameError(f"a key of {len(key)} bytes, expected {KEY_BYTES}")
    return key
