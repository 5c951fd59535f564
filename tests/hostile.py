"""Inputs that once ended a command, made anew by the tests that read them."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from corpora import tone


def flac(num_frames: int, *, rate: int = 16_000, num_channels: int = 1, is_silent: bool = False) -> bytes:
    samples = np.zeros(num_frames, dtype=np.int16) if is_silent else tone(num_frames / rate, rate)
    encoded = io.BytesIO()
    soundfile.write(encoded, np.repeat(samples[:, None], num_channels, axis=1), rate, format="FLAC", subtype="PCM_16")
    return encoded.getvalue()


def claiming(contents: bytes, num_frames: int) -> bytes:
    """A FLAC file whose header claims this many frames: the last 36 bits before the MD5 of its first block."""
    (packed,) = struct.unpack(">Q", contents[18:26])
    return contents[:18] + struct.pack(">Q", packed & ~(2**36 - 1) | num_frames) + contents[26:]


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def hostile_lines(folder: Path) -> list[bytes]:
    """Lines of a manifest, none of which is usable. What they name is made in `folder`, beside a good `good.wav`."""
    good = {"audio_filepath": "good.wav", "text": "one two"}
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    (folder / "claims.flac").write_bytes(claiming(flac(160, rate=96_000, num_channels=8), 7 * 3600 * 96_000))
    (folder / "broken.flac").write_bytes(flac(16_000)[:60])

    def line(**changes: Any) -> bytes:
        return json.dumps(good | changes).encode()

    def raw(field: str) -> bytes:
        return line()[:-1] + b", " + field.encode() + b"}"

    audio = [".", "/", "..", "folder.wav", "pipe.wav", "/dev/zero", "foo://bar", "no\0where.wav", "x" * 5000, "\udcff"]
    cut = {
        "id": "c",
        "supervisions": [{"text": "one two"}],
        "recording": {"sources": [{"type": "file", "source": "good.wav"}]},
    }
    cuts: list[dict[str, Any]] = [
        {"supervisions": 5},
        {"supervisions": [None]},
        {"supervisions": [{"text": "a", "start": 10**400}]},
        {"start": 1e308},
        {"duration": "nan"},
        {
            "start": 0.1,
            "channel": -1,
            "recording": {"sources": [{"type": "file", "source": "good.wav", "channels": [0, 1]}]},
        },
        {"recording": {"sources": [{"type": "file", "source": "good.wav", "channels": 7}]}},
        {"recording": {"sources": {}}},
        {"recording": []},
    ]
    return [
        nested(100_000).encode(),
        b"[" * 100_000,
        raw(f'"extra": {nested(500)}'),
        raw(f'"extra": {"1" * 5000}'),
        raw('"offset": 1e308'),
        raw('"offset": 1e400'),
        raw('"offset": -1'),
        raw(f'"duration": 1{"0" * 400}'),
        raw('"offset": NaN'),
        b"\xff\xfe{\x00",
        b'{"audio_filepath": "good.wav", "text": "caf\xe9"}',
        b"null",
        b"7",
        line(text="\ud800"),
        line(text=["a"]),
        line(text="a " * 2**20),
        line(audio_filepath=["good.wav"]),
        line(audio_filepath={"a": nested(60)}),
        line(lang="\x1b[2J"),
        line(lang=["en"]),
        line(audio_filepath="claims.flac"),
        line(audio_filepath="broken.flac", offset=0.1),
        *(line(audio_filepath=name) for name in audio),
        *(line(audio_filepath=name, offset=0.5) for name in audio),
        *(json.dumps(cut | change).encode() for change in cuts),
    ]


def pax_member(records: bytes, name: str = "a.json", contents: bytes = b"{}") -> bytes:
    """A tar member behind an extended header with these records, right or wrong."""
    header = tarfile.TarInfo("PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    member = tarfile.TarInfo(name)
    member.size = len(contents)
    return b"".join(
        part + bytes(-len(part) % 512)
        for part in (header.tobuf(tarfile.USTAR_FORMAT), records, member.tobuf(tarfile.USTAR_FORMAT), contents)
    )


def pax_record(key: str, value: str) -> bytes:
    """One record of an extended header, with its own length before it."""
    rest = f" {key}={value}\n".encode("utf-8", "surrogateescape")
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length += 1
    return str(length).encode() + rest


PAX_RECORDS = [
    b"5",
    b"0 a=b\n",
    b"99999999 path=x\n",
    b"-5 path=x\n",
    b"x path=y\n",
    pax_record("path", ""),
    pax_record("path", "/"),
    pax_record("path", "\0"),
    pax_record("size", "x"),
    pax_record("size", "-512"),
    pax_record("size", str(2**62)),
    pax_record("mtime", "nan"),
    pax_record("uid", "1e999"),
    pax_record("GNU.sparse.map", "1,x,3"),
    pax_record("GNU.sparse.size", "9" * 5000),
    pax_record("GNU.sparse.major", "1") + pax_record("GNU.sparse.minor", "0"),
    pax_record("GNU.sparse.numblocks", "-1"),
    pax_record("hdrcharset", "x" * 1000),
]
