"""Downloading released checkpoints from the Hugging Face hub.

The files arrive in `NAME.partial` and are verified there, so a run that was killed at any moment is
continued by the next one. The revision is pinned in `releases.lock.json`: later downloads, also on
machines to which that file is copied, get the same files.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants
from pydantic import BaseModel

from xgenmm.checkpoints.hub import (
    Hub,
    HubError,
    Repository,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    WrongSizeError,
)
from xgenmm.checkpoints.manifest import (
    Records,
    difference,
    format_size,
    is_checkpoint_file,
    measure,
    read_if_present,
    records_to_json,
    write_manifest,
)
from xgenmm.checkpoints.registry import FileRecord, Release, RepositoryId, Revision, resolve
from xgenmm.checkpoints.staging import check_free_disk, disk_errors, staging_folder
from xgenmm.errors import CheckpointError
from xgenmm.files import write_json

logger = logging.getLogger(__name__)

LOCK_FILE = "releases.lock.json"
LARGE = 10**9  # bytes; verifying such a file takes seconds
MAX_FILES = 1000  # of a repository, that belong to the checkpoint


class Pin(BaseModel):
    """What the lock file says about a release: the revision to download, and its files."""

    repo: RepositoryId
    revision: Revision
    files: Records


@dataclass(frozen=True)
class HubFile:
    """A file of a hub repository.

    The hub states the `sha256` of large files and the `blob_id` (git's) of small ones. A small file
    with a record in releases.json or in the lock file has both.
    """

    name: str
    size: int
    sha256: str | None
    blob_id: str | None

    @property
    def part_name(self) -> str:
        """Name of the unfinished file. It contains the digest, so only the same file is resumed."""
        return f"{self.name}.{(self.blob_id or self.sha256 or '')[:16]}.part"


def download(release: Release, root: Path, endpoint: str | None = None) -> Path:
    """Download a release into `root / release.name` and return that folder.

    Only JSON files, `tokenizer.model` and safetensors files are downloaded. Each is checked against
    the size and digest that the hub, releases.json and the lock file in `root` state, if they do.
    Then the revision is pinned in the lock file.

    Raises CheckpointError if the hub is not available or denies access, the disk is too small, the
    connection is lost for good, or a file is not as expected (it is then deleted).
    """
    if not release.repos:
        folder = resolve(release.name)
        logger.info("%s is part of the repository: %s", release.name, folder)
        return folder
    target = root / release.name
    if target.is_dir():
        logger.info("%s is already in %s", release.name, target)
        return target
    root.mkdir(parents=True, exist_ok=True)
    lock = read_if_present(root / LOCK_FILE, dict[str, Pin]) or {}
    pinned = lock.get(release.name)
    hub = Hub(endpoint or constants.ENDPOINT)
    repository = _find_repository(hub, release, pinned)
    files = _merge_records(release, _wanted_files(repository), pinned)
    with staging_folder(target) as staging:
        present = _bytes_present(staging, files)
        total = sum(file.size for file in files)
        check_free_disk(staging, total - present)
        logger.info(
            "%s (license: %s) at %s: %d files, %s, of which %s are here already",
            *(repository.id, release.license, repository.sha),
            *(len(files), format_size(total), format_size(present)),
        )
        records = {file.name: _fetch(hub, repository, file, staging) for file in files}
        for path in staging.iterdir():
            if path.name not in records:
                path.unlink()
        origin = {"repo": repository.id, "revision": repository.sha}
        write_manifest(staging, records, name=release.name, **origin)
        kept = {name: pin.model_dump() for name, pin in lock.items()}
        new = {**origin, "files": records_to_json(records)}
        write_json(root / LOCK_FILE, {**kept, release.name: new})
        staging.rename(target)
    logger.info("%s is in %s; the sizes and digests of all files match", release.name, target)
    return target


def _find_repository(hub: Hub, release: Release, pinned: Pin | None) -> Repository:
    """Return the hub's description of the pinned revision, or of the newest revision of the
    first repository that exists."""
    if constants.is_offline_mode():
        raise CheckpointError(f"{release.name}: HF_HUB_OFFLINE is set; unset it to download")
    repos = (pinned.repo,) if pinned else release.repos
    revision = pinned.revision if pinned else None
    denied: RepositoryNotFoundError | None = None
    for repo in repos:
        try:
            return hub.repository(repo, revision)
        except RepositoryNotFoundError as error:
            denied = denied or error
        except RevisionNotFoundError as error:
            raise CheckpointError(
                f"{release.name}: {repo} no longer has the revision {revision}; "
                f"remove {release.name} from {LOCK_FILE} to download the newest one"
            ) from error
        except HubError as error:
            raise CheckpointError(
                f"{release.name}: no valid response from the hub at {hub.endpoint} ({error}); "
                "check the network and HF_ENDPOINT, then run the same command again"
            ) from error
    if denied is not None and denied.gated:
        advice = "accept its terms on its page and set HF_TOKEN"
    else:
        advice = "check HF_ENDPOINT, and HF_TOKEN if it is private"
    raise CheckpointError(
        f"{release.name}: the hub at {hub.endpoint} gives no access to {' or '.join(repos)}; "
        f"{advice}"
    ) from denied


def _wanted_files(repository: Repository) -> list[HubFile]:
    """Return the checkpoint's files in a repository, small ones first."""
    files = []
    for listed in repository.siblings:
        if not is_checkpoint_file(listed.rfilename):
            continue
        if listed.size is None:
            raise CheckpointError(f"{repository.id}: the hub states no size of {listed.rfilename}")
        sha256, blob_id = (listed.lfs.sha256, None) if listed.lfs else (None, listed.blobId)
        files.append(HubFile(listed.rfilename, listed.size, sha256, blob_id))
    if not any(file.name.endswith(".safetensors") for file in files):
        raise CheckpointError(f"{repository.id} has no safetensors files, so it cannot be used")
    if len(files) > MAX_FILES:
        raise CheckpointError(
            f"{repository.id} has {len(files):,} files, more than the {MAX_FILES:,} allowed"
        )
    return sorted(files, key=lambda file: (file.size, file.name))


def _merge_records(release: Release, stated: list[HubFile], pinned: Pin | None) -> list[HubFile]:
    """Return the hub's files, with recorded digests where the hub states none.

    Raises CheckpointError if the hub's statements differ from a record.
    """
    files = {file.name: file for file in stated}
    sources: dict[str, Mapping[str, FileRecord]] = {"releases.json": release.files}
    if pinned:
        sources[LOCK_FILE] = pinned.files
    for source, records in sources.items():
        for name, record in records.items():
            file = files.get(name)
            if file is None or file.size != record.size or file.sha256 not in (None, record.sha256):
                now = f"{file.size} bytes, sha256 {file.sha256}" if file else "no such file"
                raise CheckpointError(
                    f"{release.name}: {name} is recorded in {source} as {record.size} bytes, "
                    f"sha256 {record.sha256}, but the hub has {now}; nothing was downloaded"
                )
            files[name] = replace(file, sha256=record.sha256)
    return list(files.values())


def _bytes_present(staging: Path, files: list[HubFile]) -> int:
    """Return how much of `files` an interrupted download has left in the staging folder."""
    return sum(
        min(file.size, (staging / name).stat().st_size)
        for file in files
        for name in (file.name, file.part_name)
        if (staging / name).exists()
    )


def _fetch(hub: Hub, repository: Repository, file: HubFile, staging: Path) -> FileRecord:
    """Download a file, or the rest of it, into the staging folder; return its record.

    Raises CheckpointError if it is not what the hub states (it is then deleted), or if the
    connection is lost for good (the part is then kept, to resume from).
    """
    path = staging / file.name
    if path.exists():
        problem, record = _verify_hub_file(path, file)
        if record is not None:
            return record
        path.unlink()
    part = staging / file.part_name
    # Not `snapshot_download`: huggingface_hub 1.33 writes to a new temporary file on each call, so
    # a killed download of a 5 GB shard would start over.
    with disk_errors(part), part.open("ab") as out:
        if out.tell() > file.size:
            out.truncate(0)
        try:
            hub.append(repository, file.name, file.size, out)
        except WrongSizeError as error:
            part.unlink()
            raise CheckpointError(
                f"{file.name}: it must have {file.size} bytes, but the hub sends more; it has been "
                "deleted, run the same command again"
            ) from error
        out.flush()
        os.fsync(out.fileno())
    problem, record = _verify_hub_file(part, file)
    if record is None:
        part.unlink()
        raise CheckpointError(
            f"{file.name}: {problem}; it has been deleted, run the same command again"
        )
    part.rename(path)
    return record


def _verify_hub_file(path: Path, file: HubFile) -> tuple[str | None, FileRecord | None]:
    """Return what is wrong with a downloaded file, or else its record."""
    if file.size > LARGE:
        logger.info("verifying %s", file.name)
    try:
        found = measure(path)
    except ValueError as error:
        return str(error), None
    problem = difference(found, FileRecord(file.size, file.sha256 or found.sha256))
    if problem is None and file.blob_id is not None:
        content = path.read_bytes()
        blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if blob_id != file.blob_id:
            problem = f"its git blob id is {blob_id}, must be {file.blob_id}"
    return (None, found) if problem is None else (problem, None)
