"""Get, convert and check checkpoints.

    python -m xgenmm.checkpoints.download list|download|convert|verify

A checkpoint is made in a folder `NAME.partial` beside its place, checked there, and renamed when it
is whole: a folder that carries a checkpoint's name is complete. A run that was killed at any moment
is taken up by the next one where it stopped. Each finished folder carries `manifest.json`: where it
came from, and the size and sha256 of its files.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get

from xgenmm.checkpoints.loading import (
    BUFFER_BYTES,
    INDEX,
    StoredTensor,
    read_chunks,
    stored_tensors,
)
from xgenmm.checkpoints.registry import (
    FileRecord,
    Release,
    find_release,
    folders_on_disk,
    releases,
    resolve,
    weights_folder,
)
from xgenmm.errors import CheckpointError

MANIFEST = "manifest.json"
PROGRESS = ".progress"
LOCK = "releases.lock.json"
SHARD_BYTES = 2 * 10**9
HUB_TIMEOUT = 10.0

_SAFETENSORS_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True)
class HubFile:
    """What one file must be: the hub states `sha256` of large ones, git's `blob_id` of small ones.

    A small one that the lock file or releases.json records has both.
    """

    name: str
    size: int
    sha256: str | None
    blob_id: str | None

    @property
    def part_name(self) -> str:
        """The unfinished file's name: it holds the digest, so that no other content is appended."""
        return f"{self.name}.{(self.blob_id or self.sha256 or '')[:16]}.part"


def list_checkpoints() -> None:
    """Print every known checkpoint, its licence, its size, and what of it is on this disk."""
    print(f"{'name':<46}{'licence':<15}{'parameters':<13}on this disk")
    for release in releases().values():
        count = f"{release.parameters / 1e9:.2f} billion" if release.parameters else "-"
        found = [f"{path.name} ({_gb(_size(path))})" for path in folders_on_disk(release)]
        found += [
            f"{path.name} (unfinished, {_gb(_size(path))})"
            for path in sorted(weights_folder().glob(f"{release.name}*.partial"))
        ]
        print(f"{release.name:<46}{release.licence:<15}{count:<13}{', '.join(found) or '-'}")
        print(f"    {release.description}")
    print(f"weights are kept in {weights_folder()} (XGENMM_WEIGHTS chooses another folder)")


def download(release: Release, root: Path, endpoint: str | None = None) -> Path:
    """Download a release into `root / release.name` and return that folder.

    Only JSON, `tokenizer.model` and safetensors files are taken. Each is checked against what the
    hub states of it, against the release's record, and against the lock file in `root` if it pins
    the release; the revision is pinned there afterwards.

    Raises CheckpointError if the hub cannot be reached or refuses, if the disk is too small, if
    the connection is lost for good, or if a file is not what it must be (it is then deleted).
    """
    if not release.repos:
        folder = resolve(release.name)
        print(f"{release.name} is shipped with the code, in {folder}")
        return folder
    target = root / release.name
    if target.is_dir():
        print(f"{release.name} is already in {target}")
        return target
    root.mkdir(parents=True, exist_ok=True)
    lock = _read_json(root / LOCK)
    pinned = lock.get(release.name, {})
    repo, revision, stated = _ask_hub(release, pinned, endpoint)
    files = _compare_with_records(release, stated, pinned)
    with _staging(target) as staging:
        have = sum(
            min(file.size, (staging / name).stat().st_size)
            for file in files
            for name in (file.name, file.part_name)
            if (staging / name).exists()
        )
        total = sum(file.size for file in files)
        _check_free_disk(staging, total - have)
        print(f"{repo} at {revision}: {len(files)} files, {_gb(total)}, {_gb(have)} already here")
        records = {}
        for file in files:
            url = hf_hub_url(repo, file.name, revision=revision, endpoint=endpoint)
            records[file.name] = _fetch(url, file, staging)
        for path in staging.iterdir():
            if path.name not in records:
                path.unlink()
        write_manifest(staging, records, name=release.name, repo=repo, revision=revision)
        pin = {"repo": repo, "revision": revision, "files": _as_json(records)}
        _write_json(root / LOCK, {**lock, release.name: pin})
        staging.rename(target)
    print(f"{release.name} is in {target}; every file's size and digest are right")
    return target


def convert(source: Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the checkpoint folder `source` in bfloat16 beside it, as NAME-bf16, and return that.

    Integers stay as they are. Memory stays at BUFFER_BYTES or so. Files of at most about
    `shard_bytes` bytes are written one after the other; finished ones survive a kill.

    Raises CheckpointError if the source is broken, is bfloat16 already, or the disk is too small.
    """
    tensors = stored_tensors(source)
    if not any(t.dtype.is_floating_point and t.dtype != torch.bfloat16 for t in tensors.values()):
        raise CheckpointError(f"{source}: it is bfloat16 already; there is nothing to convert")
    target = source.absolute().with_name(f"{source.absolute().name}-bf16")
    if target.is_dir():
        print(f"{target} is already there")
        return target
    small = [
        path
        for path in sorted(source.iterdir())
        if _belongs(path.name) and path.name != INDEX and path.suffix != ".safetensors"
    ]
    shards = _split(list(tensors.values()), shard_bytes)
    with _staging(target) as staging:
        # What was written from another source, or in other shards, is of no use.
        plan = {"shard_bytes": shard_bytes, "source": _fingerprint(tensors)}
        done = _write_shards(staging, shards, plan)
        places = {tensor.name: name for name, shard in shards.items() for tensor in shard}
        total = sum(_converted_size(tensor) for tensor in tensors.values())
        _write_json(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        for path in small:
            shutil.copyfile(path, staging / path.name)
        for path in [staging / INDEX, *(staging / path.name for path in small)]:
            done[path.name] = FileRecord(path.stat().st_size, _sha256(path))
        manifest = _read_json(source / MANIFEST)
        origin = {key: manifest[key] for key in ("name", "repo", "revision") if key in manifest}
        write_manifest(staging, done, **origin, dtype="bfloat16")
        staging.rename(target)
    (target / PROGRESS).unlink()
    print(f"{target}: {_gb(total)} in bfloat16")
    return target


def verify(folder: Path, records: Mapping[str, FileRecord]) -> bool:
    """Check a folder's files against its manifest and `records`; print a line a file.

    The parameter files' headers and index are checked too. Returns whether all is right. Raises
    CheckpointError if there is neither a manifest nor a record.
    """
    expected = {**_from_json(_read_json(folder / MANIFEST).get("files", {})), **records}
    if not expected:
        raise CheckpointError(
            f"{folder}: it has no {MANIFEST} and there is no record of it in releases.json"
        )
    print(folder)
    good = True
    for name, record in sorted(expected.items()):
        print(f"  {name:<40} {_gb(record.size):>9}", end="  ", flush=True)
        problem = _problem(folder / name, record)
        good = good and problem is None
        print(problem or "ok", flush=True)
    try:
        print(f"  {len(stored_tensors(folder))} tensors")
    except CheckpointError as error:
        good = False
        print(f"  {error}")
    return good


def write_manifest(
    folder: Path, records: Mapping[str, FileRecord] | None = None, **origin: str
) -> None:
    """Write a folder's manifest: `origin`, and its files' records (measured if not given)."""
    if records is None:
        records = {
            path.name: FileRecord(path.stat().st_size, _sha256(path))
            for path in folder.iterdir()
            if _belongs(path.name)
        }
    _write_json(folder / MANIFEST, {**origin, "files": _as_json(records)})


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status: 0 right, 1 wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m xgenmm.checkpoints.download",
        description="Get, convert and check checkpoints.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the known checkpoints and what of them is on this disk")
    for command, metavar, text in (
        ("download", "NAME", "get a checkpoint from the hub (resumes; HF_TOKEN, HF_ENDPOINT)"),
        ("convert", "NAME|FOLDER", "write it in bfloat16 beside it: half the size, loads faster"),
        ("verify", "NAME|FOLDER", "check every file's size and sha256"),
    ):
        commands.add_parser(command, help=text).add_argument("name", metavar=metavar)
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return 0 if _run(chosen.command, getattr(chosen, "name", "")) else 1
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
    return 1


def _run(command: str, name: str) -> bool:
    if command == "list":
        list_checkpoints()
    elif command == "download":
        download(find_release(name), weights_folder())
    elif command == "convert":
        convert(_released_folder(name))
    elif command == "verify":
        if Path(name).is_dir():
            return verify(Path(name), _records_for(Path(name)))
        resolve(name)  # says what to type if nothing is there
        folders = folders_on_disk(find_release(name))
        good = [verify(folder, _records_for(folder)) for folder in folders]
        return all(good)
    return True


def _released_folder(name: str) -> Path:
    """Return the folder to convert: an existing one, or the one a release was downloaded to."""
    if Path(name).is_dir():
        return Path(name)
    release = find_release(name)
    found = [folder for folder in folders_on_disk(release) if folder.name == release.name]
    return found[0] if found else resolve(name)


def _records_for(folder: Path) -> Mapping[str, FileRecord]:
    """Return the releases.json record of a folder that carries a release's own name."""
    release = releases().get(folder.resolve().name)
    return release.files if release else {}


def _ask_hub(
    release: Release, pinned: Mapping[str, Any], endpoint: str | None
) -> tuple[str, str, list[HubFile]]:
    """Return (repository, revision, files wanted): the pinned ones, or the newest of the first
    repository that exists."""
    repos = (pinned["repo"],) if pinned else release.repos
    where = endpoint or constants.ENDPOINT
    refused: HfHubHTTPError | None = None
    for repo in repos:
        try:
            info = HfApi(endpoint=endpoint).model_info(
                repo, revision=pinned.get("revision"), files_metadata=True, timeout=HUB_TIMEOUT
            )
        except RepositoryNotFoundError as error:
            refused = refused or error
            continue
        except OfflineModeIsEnabled as error:
            raise CheckpointError(
                f"{release.name}: HF_HUB_OFFLINE is set; unset it to download"
            ) from error
        except RevisionNotFoundError as error:
            raise CheckpointError(
                f"{release.name}: {repo} no longer has the revision {pinned['revision']}; "
                f"remove {release.name} from {LOCK} to take the newest"
            ) from error
        except (httpx.HTTPError, ValueError, TypeError, KeyError) as error:
            said = " ".join(str(error).split())
            raise CheckpointError(
                f"{release.name}: the hub at {where} does not answer as it should ({said}); "
                "check the network and HF_ENDPOINT, then run the same command again"
            ) from error
        files = [
            HubFile(
                name=s.rfilename,
                size=s.size or 0,
                sha256=s.lfs.sha256 if s.lfs else None,
                blob_id=None if s.lfs else s.blob_id,
            )
            for s in info.siblings or ()
            if _belongs(s.rfilename)
        ]
        if info.sha is None or not any(f.name.endswith(".safetensors") for f in files):
            raise CheckpointError(f"{release.name}: {repo} at {where} has no safetensors files")
        return repo, info.sha, sorted(files, key=lambda file: (file.size, file.name))
    if isinstance(refused, GatedRepoError):
        advice = "accept its terms on its page and set HF_TOKEN to a token of yours"
    else:
        advice = "check HF_ENDPOINT, and HF_TOKEN if it is private"
    raise CheckpointError(
        f"{release.name}: {where} gives no access to {' or '.join(repos)}; {advice}"
    ) from refused


def _belongs(name: str) -> bool:
    """Say whether a file is part of a checkpoint: not code, not pickles, nothing in folders."""
    return (
        Path(name).name == name
        and name != MANIFEST
        and (name.endswith((".json", ".safetensors")) or name == "tokenizer.model")
    )


def _compare_with_records(
    release: Release, stated: list[HubFile], pinned: Mapping[str, Any]
) -> list[HubFile]:
    """Return the hub's files, with recorded digests added where the hub states none.

    Raises CheckpointError, before anything is downloaded, where hub and records differ.
    """
    files = {file.name: file for file in stated}
    for source, records in (
        ("releases.json", release.files),
        (LOCK, _from_json(pinned.get("files", {}))),
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


def _fetch(url: str, file: HubFile, staging: Path) -> FileRecord:
    """Download one file into the staging folder, or the rest of it; return its record.

    Raises CheckpointError if it is not what the hub states (it is then deleted), or if the
    connection is lost for good (it is then kept, to go on from there).
    """
    path = staging / file.name
    if path.exists():
        problem, record = _check_hub_file(path, file)
        if problem is None:
            return record
        path.unlink()
    part = staging / file.part_name
    if file.blob_id is not None:
        part.unlink(missing_ok=True)  # small ones may come compressed, where ranges mean nothing
    # The hub client's own download-to-folder keeps no unfinished file: its `http_get` does the work
    # here, so that 4 of a shard's 5 GB survive a kill.
    with _full_disk_named(part), part.open("ab") as out:
        if out.tell() > file.size:
            out.truncate(0)
        _get_rest(url, file, out)
        out.flush()
        os.fsync(out.fileno())
    problem, record = _check_hub_file(part, file)
    if problem is not None:
        part.unlink()
        raise CheckpointError(f"{file.name}: {problem}; deleted it, run the same command again")
    part.rename(path)
    return record


def _get_rest(url: str, file: HubFile, out: io.BufferedWriter) -> None:
    """Append what is missing of a file; a broken connection is taken up while bytes come."""
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
            raise CheckpointError(f"{file.name}: the hub refuses it ({error})") from error
        except httpx.TransportError as error:
            have = out.seek(0, os.SEEK_END)
            # The client has retried everything but a reset connection.
            if have == start or not isinstance(error, httpx.ReadError):
                raise CheckpointError(
                    f"{file.name}: the connection was lost after {have} of {file.size} bytes "
                    f"({error}); run the same command again, it goes on from there"
                ) from error
        except OSError as error:
            if error.errno is not None:
                raise
            # The client found the size wrong: the check that follows says so, and of which file.
            return


def _check_hub_file(path: Path, file: HubFile) -> tuple[str | None, FileRecord]:
    """Return (what is wrong with a downloaded file, or None; its record)."""
    if file.size > 10**9:
        print(f"checking {file.name}", flush=True)
    found = FileRecord(path.stat().st_size, _sha256(path))
    problem = _difference(found, FileRecord(file.size, file.sha256 or found.sha256))
    if problem is None and file.blob_id is not None:
        content = path.read_bytes()
        blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if blob_id != file.blob_id:
            problem = f"its git id is {blob_id}, must be {file.blob_id}"
    return problem, found


def _problem(path: Path, expected: FileRecord) -> str | None:
    """Return what is wrong with a file, or None."""
    if not path.is_file():
        return "it is missing"
    size = path.stat().st_size
    # A file of the wrong size is not worth reading.
    digest = _sha256(path) if size == expected.size else ""
    return _difference(FileRecord(size, digest), expected)


def _difference(found: FileRecord, expected: FileRecord) -> str | None:
    if found.size != expected.size:
        return f"it has {found.size} bytes, must have {expected.size}"
    if found.sha256 != expected.sha256:
        return f"its sha256 is {found.sha256}, must be {expected.sha256}"
    return None


def _split(tensors: list[StoredTensor], shard_bytes: int) -> dict[str, list[StoredTensor]]:
    """Cut tensors, in order, into named files of at most `shard_bytes` bytes (or one tensor)."""
    shards: list[list[StoredTensor]] = []
    room = 0
    for tensor in tensors:
        size = _converted_size(tensor)
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= size
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, start=1)}


def _write_shards(
    staging: Path, shards: Mapping[str, list[StoredTensor]], plan: Mapping[str, Any]
) -> dict[str, FileRecord]:
    """Write the files that an earlier run with the same plan did not; return all their records."""
    progress = _read_json(staging / PROGRESS)
    done = _from_json(progress["files"]) if progress.get("plan") == plan else {}
    done = {n: r for n, r in done.items() if _problem(staging / n, r) is None}
    for path in staging.iterdir():
        if path.name not in {*done, PROGRESS}:
            path.unlink()
    missing = [tensor for name in shards.keys() - done.keys() for tensor in shards[name]]
    _check_free_disk(staging, sum(_converted_size(tensor) for tensor in missing))
    for name, shard in shards.items():
        print(f"{name} ...", end=" ", flush=True)
        if name not in done:
            done[name] = _write_bfloat16(staging / name, shard)
            _write_json(staging / PROGRESS, {"plan": plan, "files": _as_json(done)})
        print(_gb(done[name].size), flush=True)
    return done


def _converted_size(tensor: StoredTensor) -> int:
    if not tensor.dtype.is_floating_point:
        return tensor.size
    return tensor.size // tensor.dtype.itemsize * torch.bfloat16.itemsize


def _write_bfloat16(path: Path, tensors: list[StoredTensor]) -> FileRecord:
    """Write one safetensors file: a length, a JSON header, then the numbers as they come."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + _converted_size(tensor)
        dtype = torch.bfloat16 if tensor.dtype.is_floating_point else tensor.dtype
        header[tensor.name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the numbers aligned
    digest = hashlib.sha256()
    buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
    with _full_disk_named(path), path.open("wb") as out:
        for piece in _pieces(tensors, len(text).to_bytes(8, "little") + text, buffer):
            out.write(piece)
            digest.update(piece)
        out.flush()
        os.fsync(out.fileno())
    return FileRecord(path.stat().st_size, digest.hexdigest())


def _pieces(
    tensors: list[StoredTensor], head: bytes, buffer: torch.Tensor
) -> Iterator[bytes | memoryview]:
    yield head
    for tensor in tensors:
        with tensor.path.open("rb") as file:
            for run in read_chunks(tensor, file, buffer):
                kept = run.to(torch.bfloat16) if run.is_floating_point() else run
                yield kept.view(torch.uint8).numpy().data


def _fingerprint(tensors: Mapping[str, StoredTensor]) -> dict[str, list[int]]:
    """Return what tells one source from another: its files' sizes and times of change."""
    paths = {tensor.path for tensor in tensors.values()}
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(paths)}


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Hold the folder `TARGET.partial`, made if need be, for this process alone."""
    staging = target.with_name(f"{target.name}.partial")
    staging.mkdir(exist_ok=True)
    handle = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{staging}: another process is at work in it") from error
        yield staging
    finally:
        os.close(handle)


def _check_free_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder}: {_gb(needed)} are needed on this disk but {_gb(free)} are free; "
            "free some, or choose another folder with XGENMM_WEIGHTS"
        )


@contextlib.contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    """Turn the disk's refusal to take more of a file into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CheckpointError(
            f"{path}: {error.strerror}; make room and run the same command again, "
            "it goes on from here"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object, or an empty one if the file is not there."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: it is not a JSON object ({error}); delete it") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file at once: it is the old one or the new one, never half of either."""
    draft = path.with_name(f"{path.name}.new")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _as_json(records: Mapping[str, FileRecord]) -> dict[str, dict[str, Any]]:
    return {name: asdict(record) for name, record in sorted(records.items())}


def _from_json(records: Mapping[str, Mapping[str, Any]]) -> dict[str, FileRecord]:
    return {name: FileRecord(**record) for name, record in records.items()}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**7 else f"{size / 1e6:.2f} MB"


if __name__ == "__main__":
    sys.exit(main())
