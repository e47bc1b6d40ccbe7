"""Downloading released checkpoints from the Hugging Face hub.

The files arrive in `NAME.partial` and are verified there, so a run that was killed at any moment is
continued by the next one. The revision is pinned in `releases.lock.json`: later downloads, also on
machines to which that file is copied, get the same files.
"""

import hashlib
import io
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import ModelInfo

from xgenmm.checkpoints.manifest import (
    difference,
    format_size,
    is_checkpoint_file,
    measure,
    read_if_present,
    records_from_json,
    records_to_json,
    write_manifest,
)
from xgenmm.checkpoints.registry import FileRecord, Release, resolve
from xgenmm.checkpoints.staging import check_free_disk, disk_errors, staging_folder
from xgenmm.errors import CheckpointError
from xgenmm.files import write_json

logger = logging.getLogger(__name__)

LOCK_FILE = "releases.lock.json"
HUB_TIMEOUT = 10.0  # seconds
LARGE = 10**9  # bytes; verifying such a file takes seconds


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
    lock = read_if_present(root / LOCK_FILE)
    pinned = lock.get(release.name, {})
    info = _find_repository(release, pinned, endpoint)
    files = _merge_records(release, _wanted_files(info), pinned)
    with staging_folder(target) as staging:
        present = _bytes_present(staging, files)
        total = sum(file.size for file in files)
        check_free_disk(staging, total - present)
        logger.info(
            "%s at %s: %d files, %s, of which %s are here already",
            *(info.id, info.sha, len(files), format_size(total), format_size(present)),
        )
        records = {}
        for file in files:
            url = hf_hub_url(info.id, file.name, revision=info.sha, endpoint=endpoint)
            records[file.name] = _fetch(url, file, staging)
        for path in staging.iterdir():
            if path.name not in records:
                path.unlink()
        origin = {"repo": info.id, "revision": str(info.sha)}
        write_manifest(staging, records, name=release.name, **origin)
        pin = {**origin, "files": records_to_json(records)}
        write_json(root / LOCK_FILE, {**lock, release.name: pin})
        staging.rename(target)
    logger.info("%s is in %s; the sizes and digests of all files match", release.name, target)
    return target


def _find_repository(
    release: Release, pinned: Mapping[str, Any], endpoint: str | None
) -> ModelInfo:
    """Return the hub's description of the pinned revision, or of the newest revision of the
    first repository that exists."""
    repos = (pinned["repo"],) if pinned else release.repos
    denied: HfHubHTTPError | None = None
    for repo in repos:
        try:
            return HfApi(endpoint=endpoint).model_info(
                repo, revision=pinned.get("revision"), files_metadata=True, timeout=HUB_TIMEOUT
            )
        except RepositoryNotFoundError as error:
            denied = denied or error
        except OfflineModeIsEnabled as error:
            raise CheckpointError(
                f"{release.name}: HF_HUB_OFFLINE is set; unset it to download"
            ) from error
        except RevisionNotFoundError as error:
            raise CheckpointError(
                f"{release.name}: {repo} no longer has the revision {pinned['revision']}; "
                f"remove {release.name} from {LOCK_FILE} to download the newest one"
            ) from error
        except (httpx.HTTPError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{release.name}: no valid response from the hub at "
                f"{endpoint or constants.ENDPOINT} ({reason}); check the network and HF_ENDPOINT, "
                "then run the same command again"
            ) from error
    if isinstance(denied, GatedRepoError):
        advice = "accept its terms on its page and set HF_TOKEN"
    else:
        advice = "check HF_ENDPOINT, and HF_TOKEN if it is private"
    raise CheckpointError(
        f"{release.name}: {endpoint or constants.ENDPOINT} gives no access to "
        f"{' or '.join(repos)}; {advice}"
    ) from denied


def _wanted_files(info: ModelInfo) -> list[HubFile]:
    """Return the checkpoint's files in a repository, small ones first."""
    files = [
        HubFile(
            name=sibling.rfilename,
            size=sibling.size or 0,
            sha256=sibling.lfs.sha256 if sibling.lfs else None,
            blob_id=None if sibling.lfs else sibling.blob_id,
        )
        for sibling in info.siblings or ()
        if is_checkpoint_file(sibling.rfilename)
    ]
    if info.sha is None or not any(file.name.endswith(".safetensors") for file in files):
        raise CheckpointError(f"{info.id} has no safetensors files, so it cannot be used")
    return sorted(files, key=lambda file: (file.size, file.name))


def _merge_records(
    release: Release, stated: list[HubFile], pinned: Mapping[str, Any]
) -> list[HubFile]:
    """Return the hub's files, with recorded digests where the hub states none.

    Raises CheckpointError if the hub's statements differ from a record.
    """
    files = {file.name: file for file in stated}
    for source, records in (
        ("releases.json", release.files),
        (LOCK_FILE, records_from_json(pinned.get("files", {}))),
    ):
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


def _fetch(url: str, file: HubFile, staging: Path) -> FileRecord:
    """Download a file, or the rest of it, into the staging folder; return its record.

    Raises CheckpointError if it is not what the hub states (it is then deleted), or if the
    connection is lost for good (the part is then kept, to resume from).
    """
    path = staging / file.name
    if path.exists():
        problem, record = _verify_hub_file(path, file)
        if problem is None:
            return record
        path.unlink()
    part = staging / file.part_name
    if file.blob_id is not None:
        part.unlink(missing_ok=True)  # may be sent compressed, so byte ranges do not apply
    # Not `snapshot_download`: huggingface_hub 1.33 writes to a new temporary file on each call, so
    # a killed download of a 5 GB shard would start over.
    with disk_errors(part), part.open("ab") as out:
        if out.tell() > file.size:
            out.truncate(0)
        _append_rest(url, file, out)
        out.flush()
        os.fsync(out.fileno())
    problem, record = _verify_hub_file(part, file)
    if problem is not None:
        part.unlink()
        raise CheckpointError(
            f"{file.name}: {problem}; it has been deleted, run the same command again"
        )
    part.rename(path)
    return record


def _append_rest(url: str, file: HubFile, out: io.BufferedWriter) -> None:
    """Append the rest of a file, reconnecting as long as each connection brings data."""
    token = get_token()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    while (start := out.seek(0, os.SEEK_END)) < file.size:
        try:
            http_get(
                url,
                out,
                resume_size=start,
                headers=headers,
                expected_size=file.size,
                displayed_filename=file.name,
            )
        except HfHubHTTPError as error:
            raise CheckpointError(f"{file.name}: the hub refuses to send it ({error})") from error
        except httpx.TransportError as error:
            received = out.seek(0, os.SEEK_END)
            if received == start:
                raise CheckpointError(
                    f"{file.name}: the connection was lost after {received} of {file.size} bytes "
                    f"({error}); run the same command again, it resumes"
                ) from error
        except OSError as error:
            if error.errno is not None:
                raise
            # The size is wrong; the verification that follows reports it.
            return


def _verify_hub_file(path: Path, file: HubFile) -> tuple[str | None, FileRecord]:
    """Return what is wrong with a downloaded file, or None, and its record."""
    if file.size > LARGE:
        logger.info("verifying %s", file.name)
    found = measure(path)
    problem = difference(found, FileRecord(file.size, file.sha256 or found.sha256))
    if problem is None and file.blob_id is not None:
        content = path.read_bytes()
        blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if blob_id != file.blob_id:
            problem = f"its git blob id is {blob_id}, must be {file.blob_id}"
    return problem, found
