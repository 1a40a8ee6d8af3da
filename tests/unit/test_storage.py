"""Storage: durable, owned by one job, gone when its job is."""

from __future__ import annotations

import errno
from uuid import uuid4

import pytest

from shared.storage import Manifest, Storage


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(tmp_path)


def kept(storage: Storage, content: bytes = b"audio") -> Manifest:
    made = Manifest(str(uuid4()), "f", "c", "{}", "m")
    storage.begin(made.job_id).write_bytes(content)
    storage.keep(made)
    return made


def test_what_was_kept_can_be_read_back(storage):
    made = kept(storage)
    assert storage.manifest(made.job_id) == made
    assert storage.audio(made.job_id).read_bytes() == b"audio"
    assert list(storage.job_ids()) == [made.job_id]


def test_removing_leaves_nothing_and_may_be_repeated(storage):
    made = kept(storage)
    storage.spool([made.job_id], b"{}")
    storage.remove(made.job_id)
    storage.remove(made.job_id)
    assert list(storage.root.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", "x" * 300])
def test_no_id_leads_out_of_the_storage(storage, name):
    with pytest.raises(ValueError, match="hexadecimal"):
        storage.folder(name)


def test_a_joined_job_shares_the_bytes_but_not_the_fate_of_its_leader(storage):
    """A hundred identical uploads take the space of one; each still has its own way back."""
    leader, follower = kept(storage), kept(storage)
    storage.share_audio(leader.job_id, follower.job_id)
    assert storage.audio(leader.job_id).samefile(storage.audio(follower.job_id))
    storage.remove(leader.job_id)
    assert storage.audio(follower.job_id).read_bytes() == b"audio"
    storage.share_audio(leader.job_id, follower.job_id)
    assert storage.holder_with_audio([leader.job_id, follower.job_id]) == follower.job_id


@pytest.mark.parametrize("has_links", [True, False])
def test_a_job_without_an_upload_borrows_the_bytes_of_another(storage, monkeypatch, has_links):
    """Of the first that still has them; a copy, where the file system has no links."""
    if not has_links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "")))
    gone, leader = kept(storage), kept(storage, b"much audio")
    storage.remove(gone.job_id)
    borrower = Manifest(str(uuid4()), "f", "c", "{}", "m")
    storage.begin(borrower.job_id)
    assert storage.borrow_audio([gone.job_id], borrower.job_id) is None
    assert storage.borrow_audio([], borrower.job_id) is None
    assert storage.borrow_audio([gone.job_id, leader.job_id], borrower.job_id) == 10
    storage.keep(borrower)
    assert storage.audio(leader.job_id).samefile(storage.audio(borrower.job_id)) == has_links
    storage.remove(leader.job_id)
    assert storage.audio(borrower.job_id).read_bytes() == b"much audio"
    assert storage.manifest(borrower.job_id) == borrower


def test_a_damaged_manifest_is_no_manifest(storage):
    made = kept(storage)
    (storage.folder(made.job_id) / "manifest.json").write_text('{"job_id": 1')
    assert storage.manifest(made.job_id) is None


def test_finished_work_waits_beside_its_input(storage):
    made = kept(storage)
    assert storage.spooled(made.job_id) is None
    storage.spool([made.job_id], b"{}")
    assert storage.spooled(made.job_id) == b"{}"


def test_files_of_others_in_the_folder_are_left_alone(storage):
    (storage.root / "README").write_text("mine")
    assert list(storage.job_ids()) == []
