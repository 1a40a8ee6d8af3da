"""Containers built byte by byte, because no encoder writes what an attacker would: each function
takes the claims that a hostile file makes."""

from __future__ import annotations

import io
import struct
import zlib

import av
import numpy as np

SECOND = bytes(32_000)  # of silence: 16 kHz, mono, 16 bit


# --- WAV and its relatives


def chunk(name: bytes, content: bytes, size: int | None = None) -> bytes:
    size = len(content) if size is None else size & 0xFFFFFFFF
    return name + struct.pack("<I", size) + content + bytes(len(content) % 2)


def wav(
    content: bytes = SECOND,
    *,
    tag: int = 1,
    channels: int = 1,
    rate: int = 16_000,
    bits: int = 16,
    align: int | None = None,
    size: int | None = None,
    before: bytes = b"",
) -> bytes:
    align = channels * bits // 8 & 0xFFFF if align is None else align
    about = struct.pack(
        "<HHIIHH", tag, channels, rate, rate * align & 0xFFFFFFFF, align & 0xFFFF, bits
    )
    body = b"WAVE" + before + chunk(b"fmt ", about) + chunk(b"data", content, size)
    return chunk(b"RIFF", body)


def rf64(content: bytes, size: int) -> bytes:
    sizes = chunk(b"ds64", struct.pack("<QQQI", size, size, size // 2, 0))
    about = chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16))
    return b"RF64\xff\xff\xff\xffWAVE" + sizes + about + b"data\xff\xff\xff\xff" + content


def w64(content: bytes, size: int) -> bytes:
    tail = bytes.fromhex("f3acd3118cd100c04f8edb8a")
    riff = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
    about = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)
    return (
        riff
        + struct.pack("<Q", size)
        + b"wave"
        + tail
        + b"fmt "
        + tail
        + struct.pack("<Q", 24 + len(about))
        + about
        + b"data"
        + tail
        + struct.pack("<Q", size)
        + content
    )


def avi(streams: int) -> bytes:
    """Each stream is sound."""
    about = chunk(b"strf", struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16))
    head = chunk(b"strh", b"auds" + bytes(16) + struct.pack("<IIIIIIII", 1, 16_000, *[0] * 6))
    stream = chunk(b"LIST", b"strl" + head + about)
    main = chunk(b"avih", struct.pack("<14I", 0, 0, 0, 0, 0, 0, streams, *[0] * 7))
    body = chunk(b"LIST", b"hdrl" + main + stream * streams)
    return chunk(b"RIFF", b"AVI " + body + chunk(b"LIST", b"movi" + chunk(b"00wb", SECOND)))


# --- Other plain ones


def aiff(*, channels: int = 1, frames: int = 16_000, rate: bytes | None = None) -> bytes:
    """`rate`: an 80-bit float; None: 16 kHz."""
    rate = rate or bytes.fromhex("400cfa00000000000000")
    common = struct.pack(">hIh", channels, frames & 0xFFFFFFFF, 16) + rate
    sound = struct.pack(">II", 0, 0) + SECOND
    body = b"AIFF" + b"COMM" + struct.pack(">I", len(common)) + common
    body += b"SSND" + struct.pack(">I", len(sound)) + sound
    return b"FORM" + struct.pack(">I", len(body)) + body


def au(*, channels: int = 1, rate: int = 16_000, size: int = 32_000) -> bytes:
    return b".snd" + struct.pack(">IIIII", 24, size, 3, rate, channels) + SECOND


def caf(*, channels: int = 1, rate: float = 16_000, packet: int = 2) -> bytes:
    about = struct.pack(">d4sIIIII", rate, b"lpcm", 0, packet, 1, channels, 16)
    data = struct.pack(">I", 0) + SECOND
    return (
        b"caff\0\1\0\0"
        + (b"desc" + struct.pack(">q", len(about)) + about)
        + (b"data" + struct.pack(">q", len(data)) + data)
    )


def flac_head(*, rate: int = 16_000, channels: int = 1, total: int = 0, more: bytes = b"") -> bytes:
    packed = rate << 44 | (channels - 1) << 41 | 15 << 36 | total
    about = struct.pack(">HH", 4096, 4096) + bytes(6) + packed.to_bytes(8, "big") + bytes(16)
    return b"fLaC" + (b"\0" if more else b"\x80") + len(about).to_bytes(3, "big") + about + more


def id3(frames: bytes) -> bytes:
    return b"ID3\4\0\0" + _sevens(len(frames)) + frames


def id3_bomb(length: int) -> bytes:
    """A text frame that unpacks to `length` zeros."""
    packed = struct.pack(">I", length) + zlib.compress(bytes(length), 9)
    return id3(b"TXXX" + _sevens(len(packed)) + b"\0\x09" + packed)


def _sevens(size: int) -> bytes:
    return bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))


# --- MP4 and QuickTime


def box(kind: bytes, *content: bytes, size: int | None = None) -> bytes:
    body = b"".join(content)
    return struct.pack(">I", 8 + len(body) if size is None else size) + kind + body


def full(kind: bytes, *content: bytes, version: int = 0, flags: int = 0) -> bytes:
    return box(kind, struct.pack(">I", version << 24 | flags), *content)


SELF_CONTAINED = full(b"url ", flags=1)


def alias(path: str, levels: int) -> bytes:
    """A QuickTime alias that names another file: by its path (`levels` 0), or beside it (1)."""
    name = path.rpartition("/")[2].encode()[:63]
    record = bytes(10) + b"\4disk".ljust(28, b"\0") + bytes(12)
    record += (bytes([len(name)]) + name).ljust(64, b"\0") + bytes(16)
    record += struct.pack(">HH", levels, levels) + bytes(16)
    text = path.encode() + bytes(len(path) % 2)
    return full(b"alis", record, struct.pack(">HH", 2, len(text)), text, b"\xff\xff\0\0")


def movie(
    *,
    tracks: int = 1,
    rate: int = 16_000,
    channels: int = 1,
    timescale: int = 16_000,
    duration: int = 16_000,
    frames: int = 16_000,
    table: bytes | None = None,
    sizes: bytes | None = None,
    reference: bytes = SELF_CONTAINED,
    edits: bytes = b"",
    more: bytes = b"",
) -> bytes:
    """A second of PCM. `table` and `sizes` replace the contents of stts and stsz."""
    head = box(b"ftyp", b"qt  ", struct.pack(">I", 0), b"qt  ")
    data = box(b"mdat", SECOND)
    place = len(head) + 8
    sound = struct.pack(">6xHHHIHHHHHH", 1, 0, 0, 0, channels, 16, 0, 0, rate & 0xFFFF, 0)
    table = struct.pack(">III", 1, frames, 1) if table is None else table
    sizes = struct.pack(">II", 2, frames) if sizes is None else sizes
    samples = box(
        b"stbl",
        full(b"stsd", struct.pack(">I", 1), box(b"sowt", sound)),
        full(b"stts", table),
        full(b"stsc", struct.pack(">IIII", 1, 1, frames, 1)),
        full(b"stsz", sizes),
        full(b"stco", struct.pack(">II", 1, place)),
    )
    media = box(
        b"mdia",
        full(b"mdhd", struct.pack(">IIIIHH", 0, 0, timescale, duration, 0, 0)),
        full(b"hdlr", bytes(4), b"soun", bytes(12), b"\0"),
        box(
            b"minf",
            full(b"smhd", bytes(4)),
            box(b"dinf", full(b"dref", struct.pack(">I", 1), reference)),
            samples,
        ),
    )
    track = box(
        b"trak",
        full(b"tkhd", struct.pack(">IIIII", 0, 0, 1, 0, duration), bytes(60), flags=7),
        edits,
        media,
    )
    whole = full(b"mvhd", struct.pack(">IIII", 0, 0, timescale, duration), bytes(80))
    return head + data + box(b"moov", whole, track * tracks, more)


def edit_list(*entries: tuple[int, int]) -> bytes:
    """(duration, start) each; -1 as a start is an empty edit."""
    packed = b"".join(struct.pack(">IiI", length, start, 0x10000) for length, start in entries)
    return box(b"edts", full(b"elst", struct.pack(">I", len(entries)), packed))


def reference_movie(url: str) -> bytes:
    """A QuickTime reference movie: nothing but an address."""
    text = url.encode() + b"\0"
    record = full(b"rdrf", b"url ", struct.pack(">I", len(text)), text)
    return box(b"ftyp", b"qt  ", bytes(4)) + box(b"moov", box(b"rmra", box(b"rmda", record)))


def packed_movie(length: int) -> bytes:
    """A compressed header that unpacks to `length` zeros."""
    packed = zlib.compress(bytes(length), 9)
    header = box(b"dcom", b"zlib") + box(b"cmvd", struct.pack(">I", length), packed)
    return box(b"ftyp", b"qt  ", bytes(4)) + box(b"moov", box(b"cmov", header))


# --- Matroska


def element(number: int, *content: bytes, size: int | None = None) -> bytes:
    body = b"".join(content)
    size = len(body) if size is None else size
    return (
        number.to_bytes((number.bit_length() + 7) // 8, "big")
        + (1 << 56 | size).to_bytes(8, "big")
        + body
    )


def unsigned(number: int, value: int) -> bytes:
    return element(number, value.to_bytes(8, "big"))


def float_(number: int, value: float) -> bytes:
    return element(number, struct.pack(">d", value))


def matroska(
    *,
    rate: float = 16_000.0,
    channels: int = 1,
    duration: float = 1000.0,
    scale: int = 1_000_000,
    tracks: int = 1,
    track_more: bytes = b"",
    payload: bytes = SECOND,
    segment_more: bytes = b"",
) -> bytes:
    head = element(0x1A45DFA3, element(0x4282, b"matroska"), unsigned(0x4287, 4))
    info = element(0x1549A966, unsigned(0x2AD7B1, scale), float_(0x4489, duration))
    sound = element(0xE1, float_(0xB5, rate), unsigned(0x9F, channels), unsigned(0x6264, 16))
    entries = b"".join(
        element(
            0xAE,
            unsigned(0xD7, number),
            unsigned(0x73C5, number),
            unsigned(0x83, 2),
            element(0x86, b"A_PCM/INT/LIT"),
            sound,
            track_more,
        )
        for number in range(1, tracks + 1)
    )
    block = element(0xA3, b"\x81\0\0\x80", payload)
    cluster = element(0x1F43B675, unsigned(0xE7, 0), block)
    return head + element(0x18538067, info, element(0x1654AE6B, entries), segment_more, cluster)


def zlib_track() -> bytes:
    """Says that each block is packed."""
    return element(
        0x6D80, element(0x6240, unsigned(0x5031, 0), element(0x5034, unsigned(0x4254, 0)))
    )


# --- Ogg and MPEG-TS


def ogg_page(serial: int, number: int, kind: int, content: bytes) -> bytes:
    lacing = bytes([255] * (len(content) // 255) + [len(content) % 255])
    head = b"OggS\0" + bytes([kind]) + struct.pack("<qII", 0, serial, number)
    page = head + bytes(4) + bytes([len(lacing)]) + lacing + content
    return page[:22] + struct.pack("<I", _checksum(page, 0)) + page[26:]


def _checksum(data: bytes, total: int) -> int:
    """CRC-32 with the bits of each byte in order, as Ogg and MPEG have it."""
    for byte in data:
        total ^= byte << 24
        for _ in range(8):
            total = (total << 1 ^ (0x04C11DB7 if total & 0x80000000 else 0)) & 0xFFFFFFFF
    return total


def ogg(streams: int) -> bytes:
    """Each an Opus stream that begins and has no sound."""
    about = b"OpusHead\1\1" + struct.pack("<HIhB", 0, 48_000, 0, 0)
    return b"".join(ogg_page(serial, 0, 2, about) for serial in range(streams))


def ogg_comments(count: int) -> bytes:
    """Claims `count` comments, and has none."""
    about = b"OpusHead\1\1" + struct.pack("<HIhB", 0, 48_000, 0, 0)
    tags = b"OpusTags" + struct.pack("<I", 0) + struct.pack("<I", count & 0xFFFFFFFF)
    return ogg_page(1, 0, 2, about) + ogg_page(1, 1, 0, tags)


def transport(programs: int, streams: int) -> bytes:
    """MPEG-TS tables with `programs` programs of `streams` streams each (36 at most)."""

    def packet(pid: int, table: int, number: int, body: bytes) -> bytes:
        section = struct.pack(">BHHBBB", table, 0xB000 | len(body) + 9, number, 0xC1, 0, 0) + body
        payload = b"\0" + section + struct.pack(">I", _checksum(section, 0xFFFFFFFF))
        return (struct.pack(">BHB", 0x47, 0x4000 | pid, 0x10) + payload).ljust(188, b"\xff")

    found = [packet(0, 0, 1, b"".join(struct.pack(">HH", n, 0xE000 | 16 + n) for n in range(40)))]
    for program in range(programs):
        first = 2000 + program * streams
        body = struct.pack(">HH", 0xE000 | first & 0x1FFF, 0xF000)
        body += b"".join(
            struct.pack(">BHH", 0x0F, 0xE000 | (first + n) & 0x1FFF, 0xF000) for n in range(streams)
        )
        found.append(packet(16 + program, 2, program, body))
    return b"".join(found) * 3


# --- Long ones, by an encoder


def silence(seconds: int, codec: str, container: str, rate: int) -> bytes:
    """Silence that an encoder makes small."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        block = np.zeros((1, 4096 if codec == "flac" else 960), np.int16)
        for number in range(seconds * rate // block.shape[1]):
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate, frame.pts = rate, number * block.shape[1]
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()
