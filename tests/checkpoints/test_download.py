"""Downloads from a hub with network errors, wrong bytes, full disks and kills.

The real hub client talks to the server of hub_server.py, and real processes are killed.
"""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from tests.support.hub_repository import (
    BIG,
    NAME,
    REPO,
    SMALL,
    TAKEN,
    assert_complete,
    program,
    repository,
)
from tests.support.hub_server import CHUNK, HubServer
from xgenmm.checkpoints import hub as hub_client
from xgenmm.checkpoints.download import download
from xgenmm.checkpoints.registry import FileRecord, Release
from xgenmm.errors import CheckpointError

PART = 10 * 2**20  # bytes sent before a connection breaks
COMMAND = [sys.executable, "-m", "xgenmm", "download", NAME]


def release(**files: FileRecord) -> Release:
    return Release(NAME, (REPO,), "apache-2.0", "for tests", None, files)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "PAUSE_SECONDS", 0.01)


@pytest.fixture
def big_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub whose file BIG has 48 MB, which the client writes in several chunks."""
    with HubServer({REPO: repository(big=732)}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def ranges(hub: HubServer, name: str) -> list[str | None]:
    """The Range headers of all requests to the content store for one file."""
    return [seen.range for seen in hub.seen if seen.path == f"/store/{REPO}/{name}"]


def test_hub_server_works_with_the_hub_client(hub: HubServer, tmp_path: Path) -> None:
    snapshot_download(REPO, local_dir=tmp_path / "all", endpoint=hub.url, cache_dir=tmp_path)
    for name, content in hub.repos[REPO].items():
        assert (tmp_path / "all" / name).read_bytes() == content


def test_download_fetches_only_checkpoint_files_and_pins_the_revision(
    hub: HubServer, root: Path
) -> None:
    download(release(), root, hub.url)
    assert_complete(root, hub)
    revision = hub.revision(REPO)
    assert json.loads((root / NAME / "manifest.json").read_text())["revision"] == revision
    lock = json.loads((root / "releases.lock.json").read_text())
    assert lock[NAME]["revision"] == revision
    assert lock[NAME]["files"].keys() == TAKEN
    count = len(hub.seen)
    download(release(), root, hub.url)
    assert len(hub.seen) == count


def test_pinned_revision_is_requested(hub: HubServer, root: Path) -> None:
    download(release(), root, hub.url)
    pinned = hub.revision(REPO)
    (root / NAME).rename(root / "old")
    download(release(), root, hub.url)
    assert f"/api/models/{REPO}/revision/{pinned}" in [seen.path for seen in hub.seen]
    (root / NAME).rename(root / "older")
    hub.repos[REPO]["config.json"] = b"{}"
    with pytest.raises(CheckpointError, match=f"no longer has the revision {pinned}; remove"):
        download(release(), root, hub.url)


def test_second_repository_is_tried_if_the_first_is_gone(hub: HubServer, root: Path) -> None:
    moved = Release(NAME, ("Salesforce/gone", REPO), "apache-2.0", "", None)
    download(moved, root, hub.url)
    assert_complete(root, hub)


def test_token_is_sent_to_the_hub_but_not_to_its_store(
    hub: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "secret"
    with pytest.raises(CheckpointError, match=r"gives no access to .*HF_TOKEN"):
        download(release(), root, hub.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    download(release(), root, hub.url)
    assert_complete(root, hub)
    assert {s.authorization for s in hub.seen if s.path.startswith("/store/")} == {None}


def test_unreachable_hub_and_offline_mode_are_reported(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer({}) as server:
        gone = server.url
    with pytest.raises(CheckpointError, match=f"from the hub at {gone} .*check the network"):
        download(release(), root, gone)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused = program("download", NAME)
    assert refused.returncode == 1
    assert refused.stderr == f"error: {NAME}: HF_HUB_OFFLINE is set; unset it to download\n"


@pytest.mark.parametrize("name", ["config.json", BIG])
def test_file_with_a_wrong_byte_is_named_in_the_error_and_deleted(
    hub: HubServer, root: Path, name: str
) -> None:
    hub.faults.wrong_byte[name] = 11
    failed = program("download", NAME)
    assert failed.returncode == 1
    assert f"error: {name}: its " in failed.stderr
    assert "it has been deleted" in failed.stderr
    assert not (root / NAME).exists()
    assert not list((root / f"{NAME}.partial").glob(f"{name}*"))
    download(release(), root, hub.url)
    assert_complete(root, hub)


def test_file_shorter_than_stated_is_named_in_the_error_and_deleted(
    hub: HubServer, root: Path
) -> None:
    size = len(hub.repos[REPO][BIG])
    hub.sizes[BIG] = size + 5
    with pytest.raises(CheckpointError, match=f"{BIG}: it has {size} bytes, must have {size + 5}"):
        download(release(), root, hub.url)
    assert not (root / NAME).exists()
    assert not list((root / f"{NAME}.partial").glob(f"{BIG}*"))


def test_release_records_are_checked_before_anything_is_downloaded(
    hub: HubServer, root: Path
) -> None:
    content = hub.repos[REPO][BIG]
    right = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    for wrong in (
        FileRecord(right.size, "0" * 64),
        FileRecord(right.size + 1, right.sha256),
    ):
        with pytest.raises(CheckpointError, match=f"{BIG} is recorded in releases.json"):
            download(release(**{BIG: wrong}), root, hub.url)
    with pytest.raises(CheckpointError, match=r"gone\.safetensors .* the hub has no such file"):
        download(release(**{"gone.safetensors": right}), root, hub.url)
    assert not any("resolve" in seen.path for seen in hub.seen)
    download(release(**{BIG: right}), root, hub.url)
    assert_complete(root, hub)


def test_release_record_of_a_small_file_is_checked(hub: HubServer, root: Path) -> None:
    size = len(hub.repos[REPO]["config.json"])
    record = {"config.json": FileRecord(size, "0" * 64)}
    with pytest.raises(
        CheckpointError, match=r"config\.json: its sha256 is .*; it has been deleted"
    ):
        download(release(**record), root, hub.url)
    assert not (root / NAME).exists()


def test_download_resumes_where_the_connection_was_cut(big_hub: HubServer, root: Path) -> None:
    size = len(big_hub.repos[REPO][BIG])
    big_hub.faults.cut[BIG] = [PART + 5, PART + 5]
    download(release(), root, big_hub.url)
    assert_complete(root, big_hub)
    assert size > 4 * PART
    starts = [PART + 5, 2 * (PART + 5)]
    assert ranges(big_hub, BIG) == [None, *(f"bytes={start}-" for start in starts)]


def test_download_resumes_after_a_connection_reset(big_hub: HubServer, root: Path) -> None:
    big_hub.faults.reset[BIG] = 40 * 2**20
    download(release(), root, big_hub.url)
    assert_complete(root, big_hub)
    first, second = ranges(big_hub, BIG)
    assert first is None
    assert second is not None


def test_lost_connection_keeps_the_received_part(big_hub: HubServer, root: Path) -> None:
    big_hub.faults.cut[BIG] = [PART, *([0] * 12)]
    with pytest.raises(CheckpointError, match=f"{BIG}: the connection was lost after 10485760 of"):
        download(release(), root, big_hub.url)
    assert not (root / NAME).exists()
    big_hub.faults.cut.clear()
    download(release(), root, big_hub.url)
    assert_complete(root, big_hub)
    assert ranges(big_hub, BIG)[-1] == f"bytes={PART}-"


def test_partial_download_of_another_file_is_not_resumed(hub: HubServer, root: Path) -> None:
    staging = root / f"{NAME}.partial"
    staging.mkdir(parents=True)
    (staging / f"{BIG}.0123456789abcdef.part").write_bytes(b"old content")
    (staging / SMALL).write_bytes(b"not whole")
    download(release(), root, hub.url)
    assert_complete(root, hub)
    assert ranges(hub, BIG) == [None]


def test_lack_of_disk_space_is_reported_before_the_download(hub: HubServer, root: Path) -> None:
    hub.sizes[BIG] = 10**18
    with pytest.raises(CheckpointError, match=r"1000000000\.00 GB are needed .* GB are free"):
        download(release(), root, hub.url)
    assert not any("resolve" in seen.path for seen in hub.seen)


def test_full_disk_is_reported_and_the_next_run_resumes(hub: HubServer, root: Path) -> None:
    """The unfinished file is a link to a device that is always full."""
    digest = hashlib.sha256(hub.repos[REPO][BIG]).hexdigest()
    part = root / f"{NAME}.partial" / f"{BIG}.{digest[:16]}.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    full = program("download", NAME)
    assert full.returncode == 1
    assert f"{part.name}: No space left on device; free some disk space and run" in full.stderr
    assert not (root / NAME).exists()
    part.unlink()
    download(release(), root, hub.url)
    assert_complete(root, hub)


def kill_download(hub: HubServer, root: Path, name: str, hold: int) -> None:
    """Run the program and kill it while the hub holds `name` back after `hold` bytes."""
    hub.faults.hold[name] = hold
    with subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert hub.faults.held.wait(120)
        process.send_signal(signal.SIGKILL)
    hub.faults.release.set()
    assert process.returncode == -signal.SIGKILL
    assert not (root / NAME).exists()


@pytest.mark.parametrize("name", ["config.json", SMALL, BIG])
def test_download_killed_between_files_is_resumed(hub: HubServer, root: Path, name: str) -> None:
    kill_download(hub, root, name, 0)
    finished = {path.name for path in (root / f"{NAME}.partial").iterdir()} & TAKEN
    hub.seen.clear()
    download(release(), root, hub.url)
    assert_complete(root, hub)
    asked = {seen.path.split("/")[-1] for seen in hub.seen if "resolve" in seen.path}
    assert asked == TAKEN - finished


@pytest.mark.parametrize("hold", [40 * 2**20, 732 * CHUNK])
def test_download_killed_within_a_file_is_resumed_there(
    big_hub: HubServer, root: Path, hold: int
) -> None:
    kill_download(big_hub, root, BIG, hold)
    assert program("download", NAME).returncode == 0
    assert_complete(root, big_hub)
    first, second = ranges(big_hub, BIG)
    assert first is None
    assert second is not None
    start = int(second.removeprefix("bytes=").rstrip("-"))
    assert start >= PART


def test_download_killed_before_its_last_step_is_completed(hub: HubServer, root: Path) -> None:
    download(release(), root, hub.url)
    (root / NAME / "manifest.json").unlink()
    (root / NAME).rename(root / f"{NAME}.partial")
    hub.seen.clear()
    download(release(), root, hub.url)
    assert_complete(root, hub)
    assert [seen.path.split("/")[1] for seen in hub.seen] == ["api"]


def test_concurrent_download_is_rejected(hub: HubServer, root: Path) -> None:
    hub.faults.hold[BIG] = 0
    with subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert hub.faults.held.wait(120)
        with pytest.raises(CheckpointError, match="another process is writing to it"):
            download(release(), root, hub.url)
        hub.faults.release.set()
    assert process.returncode == 0
    assert_complete(root, hub)
