"""Where uploads rest: one folder for each job that is unfinished or may be retried, owned by that
job alone.

    <data dir>/uploads/<job id>/audio            the bytes as received, complete
                                audio.part       an upload that is still arriving
                                manifest.json    what is needed to submit the job again
                                transcript.json  finished work that could not be committed yet
    <data dir>/parts/<fingerprint>/<number>.npz  speech of a part of a long recording

Whoever ends a job for good removes its folder: nothing is shared, so nothing is counted or locked,
and a job that joins another one's transcription keeps its own way back (a hard link, so no second
copy). A folder without a job record is either an upload under way or a job that Redis has lost; the
manifest tells which.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from uuid import UUID


@dataclass(frozen=True)
class Manifest:
    """What submit needs: a job can be rebuilt from this and the audio beside it."""

    job_id: str
    fingerprint: str
    checksum: str  # SHA-256 of the audio, hex
    options: str  # canonical JSON of TranscriptionOptions
    model: str
    size_bytes: int = 0  # of the audio
    owner: str = ""  # name of the API key that it was submitted with; '' without keys
    # What the job's record keeps besides: JobOptions.record(), its batch, its Idempotency-Key, how
    # often it was retried.
    job_options: dict[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[str | int, ...]:
        """In the order of submit.lua's arguments."""
        return (
            self.job_id,
            self.fingerprint,
            self.checksum,
            self.options,
            self.model,
            self.size_bytes,
            self.owner,
        )


class Storage:
    """The uploads below one data folder, on a file system that API and workers share."""

    def __init__(self, data_dir: Path):
        self.root = data_dir / "uploads"
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._parts = data_dir / "parts"

    def folder(self, job_id: str) -> Path:
        """Raises ValueError unless `job_id` is a UUID, so no path leaves the root."""
        return self.root / str(UUID(job_id))

    def audio(self, job_id: str) -> Path:
        return self.folder(job_id) / "audio"

    def begin(self, job_id: str, size_bytes: int = 0) -> Path:
        """Makes the job's folder; returns the path to write the arriving bytes to. So many of them
        have their place on the disk already: no other upload can take it. Raises OSError where
        there is none."""
        self.folder(job_id).mkdir()
        path = self.folder(job_id) / "audio.part"
        if size_bytes:
            self.reserve(path, size_bytes)
        return path

    def reserve(self, path: Path, size_bytes: int) -> None:
        """As `begin`, for bytes of which nobody knew then. Raises OSError."""
        with path.open("ab") as file:
            _allocate(file.fileno(), size_bytes)

    def keep(self, manifest: Manifest) -> None:
        """Makes an upload durable: audio, manifest and their names are on disk when it returns."""
        folder = self.folder(manifest.job_id)
        part = folder / "audio.part"
        _sync(part)
        part.rename(folder / "audio")
        self.keep_manifest(manifest)
        _sync(self.root)

    def keep_manifest(self, manifest: Manifest) -> None:
        """In the place of the one that the upload has. Raises OSError, for one when the upload is
        gone."""
        content = json.dumps(asdict(manifest)).encode()
        _write(self.folder(manifest.job_id) / "manifest.json", content)

    def borrow_audio(self, leaders: Iterable[str], job_id: str) -> int | None:
        """Takes the bytes of the first of these jobs that still has them as what has arrived for
        `job_id`: a link, or a copy where the file system has none. How many; None: nobody has them.
        """
        part = self.folder(job_id) / "audio.part"
        for leader in leaders:
            with suppress(FileNotFoundError):  # it is done, and gone
                try:
                    os.link(self.audio(leader), part)
                except FileNotFoundError:
                    raise
                except OSError:
                    shutil.copyfile(self.audio(leader), part)
                return part.stat().st_size
        return None

    def share_audio(self, leader: str, job_id: str) -> None:
        """Replaces the job's copy of the audio by a link to the same bytes of `leader`."""
        link = self.folder(job_id) / "audio.link"
        with suppress(OSError):  # the leader is done and gone, or the file system has no links
            os.link(self.audio(leader), link)
            link.rename(self.audio(job_id))

    def holder_with_audio(self, job_ids: Iterable[str]) -> str | None:
        """The first of these jobs, which hold the same transcription, whose upload is there."""
        return next((job_id for job_id in job_ids if self.audio(job_id).exists()), None)

    def manifest(self, job_id: str) -> Manifest | None:
        """None where there is none, or where it is not one of ours."""
        try:
            return Manifest(**json.loads((self.folder(job_id) / "manifest.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def spool(self, job_ids: Iterable[str], transcript: bytes) -> None:
        """Saves finished work beside the input of the first of these jobs that still has a folder,
        until it can be committed. Raises FileNotFoundError when none has."""
        folders = (self.folder(job_id) for job_id in job_ids)
        folder = next((folder for folder in folders if folder.exists()), self.root / "gone")
        _write(folder / "transcript.json", transcript)

    def spooled(self, job_id: str) -> bytes | None:
        try:
            return (self.folder(job_id) / "transcript.json").read_bytes()
        except OSError:
            return None

    def remove(self, job_id: str) -> None:
        """Forgets the job's upload; does nothing where there is none."""
        shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def job_ids(self) -> Iterator[str]:
        """Every job that has a folder."""
        with os.scandir(self.root) as entries:
            for entry in entries:
                with suppress(ValueError):
                    yield str(UUID(entry.name))

    def age_seconds(self, job_id: str) -> float:
        """How long ago anything arrived in the job's folder; 0 where there is none."""
        try:
            with os.scandir(self.folder(job_id)) as entries:
                newest = max((e.stat().st_mtime for e in entries), default=0.0)
            return time.time() - max(newest, self.folder(job_id).stat().st_mtime)
        except OSError:
            return 0.0

    def touch(self, job_id: str) -> None:
        """Something of the same request arrives still."""
        with suppress(OSError):
            os.utime(self.folder(job_id))

    def part(self, fingerprint: str, number: int) -> Path:
        return self._parts / fingerprint / f"{number}.npz"

    def save_part(self, fingerprint: str, number: int, content: bytes) -> None:
        """Raises OSError, for one when the disk is full."""
        path = self.part(fingerprint, number)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(path, content)

    def remove_parts(self, fingerprint: str) -> None:
        shutil.rmtree(self._parts / fingerprint, ignore_errors=True)

    def settled_parts(self, seconds: float) -> list[str]:
        """Fingerprints of the recordings whose parts were written longer ago than that."""
        with suppress(FileNotFoundError), os.scandir(self._parts) as entries:
            return [e.name for e in entries if time.time() - e.stat().st_mtime > seconds]
        return []

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.root).free


def _allocate(descriptor: int, size_bytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except AttributeError:  # macOS
        return
    except OSError as exc:
        if exc.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:  # a file system that can't
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing: a reader never sees half a file, even after a power cut."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    _sync(temporary)
    temporary.rename(path)
    _sync(path.parent)
