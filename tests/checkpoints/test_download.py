"""Checkpoints are got, converted and checked, whatever the network, the disk or a kill does.

The real hub client talks to the server of hub_server.py; kills are real ones of a real process.
"""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save, save_file

from tests.support.hub_server import PIECE, HubServer
from xgenmm.checkpoints import download as weights
from xgenmm.checkpoints.download import convert, download, verify
from xgenmm.checkpoints.registry import FileRecord, Release
from xgenmm.errors import CheckpointError

NAME = "xgen-mm-phi3-mini-instruct-dpo-r-v1.5"
REPO = f"Salesforce/{NAME}"
BIG = "model-00002-of-00002.safetensors"
SMALL = "model-00001-of-00002.safetensors"
CLIENT_PIECE = 10 * 2**20  # the hub client writes this many bytes at once
ROOT = Path(__file__).resolve().parents[2]


def tensors(count: int, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {f"layers.{seed}.{i}.weight": torch.randn(64, 256) for i in range(count)}


def repository(big: int = 4) -> dict[str, bytes]:
    """A released folder's files and some that must not be taken; `big` tensors of 64 kB."""
    states = {SMALL: tensors(2, 1), BIG: tensors(big, 2)}
    places = {name: file for file, state in states.items() for name in state}
    return {
        "config.json": b'{"model_type": "xgenmm"}',
        "model.safetensors.index.json": json.dumps({"weight_map": places}).encode(),
        "tokenizer.model": bytes(range(256)),
        "modeling_xgenmm.py": b"raise SystemExit('code from the hub was run')",
        "pytorch_model.bin": b"pickle",
        "README.md": b"# card",
        "extra/notes.json": b"{}",
        **{file: save(state) for file, state in states.items()},
    }


TAKEN = {"config.json", "model.safetensors.index.json", "tokenizer.model", SMALL, BIG}


def release(**files: FileRecord) -> Release:
    return Release(NAME, (REPO,), "apache-2.0", "for tests", None, files)


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XGENMM_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "weights"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({REPO: repository()}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def big_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub whose BIG has 48 MB, so that the client writes it in several pieces."""
    with HubServer({REPO: repository(big=732)}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xgenmm.checkpoints.download", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def assert_complete(root: Path, hub: HubServer) -> None:
    """The folder is there, verifies, and holds the hub's bytes and no others."""
    folder = root / NAME
    assert {path.name for path in folder.iterdir()} == TAKEN | {"manifest.json"}
    for name in TAKEN:
        assert (folder / name).read_bytes() == hub.repos[REPO][name]
    assert verify(folder, {})
    assert not (root / f"{NAME}.partial").exists()


def ranges(hub: HubServer, name: str) -> list[str | None]:
    """The ranges asked of the content store for one file."""
    return [seen.range for seen in hub.seen if seen.path == f"/store/{REPO}/{name}"]


def test_the_server_satisfies_the_hub_client_itself(hub: HubServer, tmp_path: Path) -> None:
    snapshot_download(REPO, local_dir=tmp_path / "all", endpoint=hub.url, cache_dir=tmp_path)
    for name, content in hub.repos[REPO].items():
        assert (tmp_path / "all" / name).read_bytes() == content


def test_download_takes_what_is_needed_and_pins_it(hub: HubServer, root: Path) -> None:
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


def test_a_pinned_revision_is_asked_for(hub: HubServer, root: Path) -> None:
    download(release(), root, hub.url)
    pinned = hub.revision(REPO)
    (root / NAME).rename(root / "old")
    download(release(), root, hub.url)
    assert f"/api/models/{REPO}/revision/{pinned}" in [seen.path for seen in hub.seen]
    (root / NAME).rename(root / "older")
    hub.repos[REPO]["config.json"] = b"{}"
    with pytest.raises(CheckpointError, match=f"no longer has the revision {pinned}; remove"):
        download(release(), root, hub.url)


def test_the_second_repository_is_tried(hub: HubServer, root: Path) -> None:
    moved = Release(NAME, ("Salesforce/gone", REPO), "apache-2.0", "", None)
    download(moved, root, hub.url)
    assert_complete(root, hub)


def test_the_program_downloads_verifies_converts_and_lists(hub: HubServer, root: Path) -> None:
    assert program("download", NAME).returncode == 0
    assert_complete(root, hub)
    assert program("convert", NAME).returncode == 0
    listed = program("list").stdout
    assert f"{NAME}-bf16 (" in listed
    checked = program("verify", NAME)
    assert checked.returncode == 0
    assert checked.stdout.count(" ok\n") == 5 + 4
    path = root / NAME / BIG
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    checked = program("verify", NAME)
    assert checked.returncode == 1
    assert checked.stdout.count(" ok\n") == 4 + 4
    assert f"its sha256 is {hashlib.sha256(content).hexdigest()}, must be" in checked.stdout


def test_a_token_reaches_the_hub_and_not_its_store(
    hub: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "secret"
    with pytest.raises(CheckpointError, match=r"gives no access to .*HF_TOKEN"):
        download(release(), root, hub.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    download(release(), root, hub.url)
    assert_complete(root, hub)
    assert {s.authorization for s in hub.seen if s.path.startswith("/store/")} == {None}


def test_no_hub_is_said_in_seconds(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer({}) as server:
        gone = server.url
    with pytest.raises(CheckpointError, match=f"hub at {gone} does not answer .*check the network"):
        download(release(), root, gone)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused = program("download", NAME)
    assert refused.returncode == 1
    assert refused.stderr == f"error: {NAME}: HF_HUB_OFFLINE is set; unset it to download\n"


@pytest.mark.parametrize("name", ["config.json", BIG])
def test_a_wrong_byte_is_found_named_and_deleted(hub: HubServer, root: Path, name: str) -> None:
    hub.faults.wrong_byte[name] = 11
    failed = program("download", NAME)
    assert failed.returncode == 1
    assert f"error: {name}: its " in failed.stderr
    assert "deleted it" in failed.stderr
    assert not (root / NAME).exists()
    assert not list((root / f"{NAME}.partial").glob(f"{name}*"))
    download(release(), root, hub.url)
    assert_complete(root, hub)


def test_a_file_shorter_than_stated_is_named_and_deleted(hub: HubServer, root: Path) -> None:
    size = len(hub.repos[REPO][BIG])
    hub.sizes[BIG] = size + 5
    with pytest.raises(CheckpointError, match=f"{BIG}: it has {size} bytes, must have {size + 5}"):
        download(release(), root, hub.url)
    assert not (root / NAME).exists()
    assert not list((root / f"{NAME}.partial").glob(f"{BIG}*"))


def test_the_record_is_checked_before_anything_is_downloaded(hub: HubServer, root: Path) -> None:
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


def test_the_record_of_a_small_file_is_checked_too(hub: HubServer, root: Path) -> None:
    size = len(hub.repos[REPO]["config.json"])
    record = {"config.json": FileRecord(size, "0" * 64)}
    with pytest.raises(CheckpointError, match=r"config\.json: its sha256 is .*; deleted it"):
        download(release(**record), root, hub.url)
    assert not (root / NAME).exists()


def test_a_cut_connection_is_taken_up_where_it_was_cut(big_hub: HubServer, root: Path) -> None:
    size = len(big_hub.repos[REPO][BIG])
    big_hub.faults.cut[BIG] = [CLIENT_PIECE + 5, CLIENT_PIECE + 5]
    download(release(), root, big_hub.url)
    assert_complete(root, big_hub)
    assert size > 4 * CLIENT_PIECE
    assert ranges(big_hub, BIG) == [None, f"bytes={CLIENT_PIECE}-", f"bytes={2 * CLIENT_PIECE}-"]


def test_a_reset_connection_is_taken_up(big_hub: HubServer, root: Path) -> None:
    big_hub.faults.reset[BIG] = 40 * 2**20
    download(release(), root, big_hub.url)
    assert_complete(root, big_hub)
    first, second = ranges(big_hub, BIG)
    assert first is None
    assert second is not None


def test_a_connection_lost_for_good_keeps_what_came(big_hub: HubServer, root: Path) -> None:
    big_hub.faults.cut[BIG] = [CLIENT_PIECE, *([0] * 12)]
    with pytest.raises(CheckpointError, match=f"{BIG}: the connection was lost after 10485760 of"):
        download(release(), root, big_hub.url)
    assert not (root / NAME).exists()
    big_hub.faults.cut.clear()
    download(release(), root, big_hub.url)
    assert_complete(root, big_hub)
    assert ranges(big_hub, BIG)[-1] == f"bytes={CLIENT_PIECE}-"


def test_an_unfinished_file_of_other_content_is_not_continued(hub: HubServer, root: Path) -> None:
    staging = root / f"{NAME}.partial"
    staging.mkdir(parents=True)
    (staging / f"{BIG}.0123456789abcdef.part").write_bytes(b"old content")
    (staging / SMALL).write_bytes(b"not whole")
    download(release(), root, hub.url)
    assert_complete(root, hub)
    assert ranges(hub, BIG) == [None]


def test_a_disk_that_is_too_small_is_known_before(hub: HubServer, root: Path) -> None:
    hub.sizes[BIG] = 10**18
    with pytest.raises(CheckpointError, match=r"1000000000\.00 GB are needed .* GB are free"):
        download(release(), root, hub.url)
    assert not any("resolve" in seen.path for seen in hub.seen)


def test_a_disk_that_fills_up_is_said_and_the_next_run_goes_on(hub: HubServer, root: Path) -> None:
    """The unfinished file is a link to the device that is always full."""
    digest = hashlib.sha256(hub.repos[REPO][BIG]).hexdigest()
    part = root / f"{NAME}.partial" / f"{BIG}.{digest[:16]}.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    full = program("download", NAME)
    assert full.returncode == 1
    assert f"{part.name}: No space left on device; make room and run" in full.stderr
    assert not (root / NAME).exists()
    part.unlink()
    download(release(), root, hub.url)
    assert_complete(root, hub)


def kill_download(hub: HubServer, root: Path, name: str, hold: int) -> None:
    """Run the program; SIGKILL it when `hold` bytes of `name` were sent and no more will be."""
    hub.faults.hold[name] = hold
    command = [sys.executable, "-m", "xgenmm.checkpoints.download", "download", NAME]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert hub.faults.held.wait(120)
        process.send_signal(signal.SIGKILL)
    hub.faults.release.set()
    assert process.returncode == -signal.SIGKILL
    assert not (root / NAME).exists()


@pytest.mark.parametrize("name", ["config.json", SMALL, BIG])
def test_a_download_killed_between_files_is_finished(hub: HubServer, root: Path, name: str) -> None:
    kill_download(hub, root, name, 0)
    finished = {path.name for path in (root / f"{NAME}.partial").iterdir()} & TAKEN
    hub.seen.clear()
    download(release(), root, hub.url)
    assert_complete(root, hub)
    asked = {seen.path.split("/")[-1] for seen in hub.seen if "resolve" in seen.path}
    assert asked == TAKEN - finished


@pytest.mark.parametrize("hold", [40 * 2**20, 732 * PIECE])
def test_a_download_killed_in_mid_file_goes_on_from_there(
    big_hub: HubServer, root: Path, hold: int
) -> None:
    kill_download(big_hub, root, BIG, hold)
    assert program("download", NAME).returncode == 0
    assert_complete(root, big_hub)
    first, second = ranges(big_hub, BIG)
    assert first is None
    assert second is not None
    start = int(second.removeprefix("bytes=").rstrip("-"))
    assert start >= CLIENT_PIECE


def test_a_download_killed_before_its_last_step_is_finished(hub: HubServer, root: Path) -> None:
    download(release(), root, hub.url)
    (root / NAME / "manifest.json").unlink()
    (root / NAME).rename(root / f"{NAME}.partial")
    hub.seen.clear()
    download(release(), root, hub.url)
    assert_complete(root, hub)
    assert [seen.path.split("/")[1] for seen in hub.seen] == ["api"]


def test_two_processes_do_not_mix(hub: HubServer, root: Path) -> None:
    hub.faults.hold[BIG] = 0
    command = [sys.executable, "-m", "xgenmm.checkpoints.download", "download", NAME]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert hub.faults.held.wait(120)
        with pytest.raises(CheckpointError, match="another process is at work"):
            download(release(), root, hub.url)
        hub.faults.release.set()
    assert process.returncode == 0
    assert_complete(root, hub)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A float32 folder of three shards, with an integer tensor and files that do not belong."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, content in repository().items():
        if "/" not in name:
            (folder / name).write_bytes(content)
    (folder / "model.safetensors.index.json").unlink()
    last = {"head.weight": torch.randn(80_000), "steps": torch.arange(5)}
    save_file(last, folder / "z.safetensors")
    return folder


def assert_converted(target: Path, source: Path) -> None:
    assert verify(target, {})
    original = {n: t for path in source.glob("*.safetensors") for n, t in load_file(path).items()}
    written = {n: t for path in target.glob("*.safetensors") for n, t in load_file(path).items()}
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        expected = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        assert torch.equal(written[name], expected)
    others = {path.name for path in target.iterdir() if path.suffix != ".safetensors"}
    assert others == {
        "config.json", "manifest.json", "model.safetensors.index.json", "tokenizer.model"
    }  # fmt: skip
    assert not target.with_name("mine-bf16.partial").exists()


@pytest.mark.parametrize("shard_bytes", [1, 70_000, 10**9])
def test_convert_writes_the_same_numbers_in_bfloat16(source: Path, shard_bytes: int) -> None:
    target = convert(source, shard_bytes)
    assert_converted(target, source)
    count = {1: 8, 70_000: 4, 10**9: 1}[shard_bytes]
    assert len(list(target.glob("*.safetensors"))) == count
    with pytest.raises(CheckpointError, match="bfloat16 already"):
        convert(target)


# The kernel kills a process that writes past its limit, so the kill comes at an exact byte.
KILLED_AT_A_BYTE = """
import resource, signal, sys
from pathlib import Path
from xgenmm.checkpoints.download import convert
signal.signal(signal.SIGXFSZ, getattr(signal, sys.argv[3]))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
convert(Path(sys.argv[1]), 70_000)
"""


def convert_with_limit(source: Path, limit: int, action: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED_AT_A_BYTE, str(source), str(limit), action]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("limit", "finished"), [(0, 0), (100, 0), (40_000, 0), (100_000, 3)])
def test_a_killed_conversion_is_taken_up(source: Path, limit: int, finished: int) -> None:
    """Three files of 65 kB, then one of 160 kB, which only the highest limit lets begin."""
    staging = source.with_name("mine-bf16.partial")
    names = [f"model-{i:05}-of-00004.safetensors" for i in range(1, finished + 1)]
    written: dict[str, int] = {}
    for _ in range(2):
        killed = convert_with_limit(source, limit, "SIG_DFL")
        assert killed.returncode == -signal.SIGXFSZ
        assert not source.with_name("mine-bf16").exists()
        written = written or {name: (staging / name).stat().st_mtime_ns for name in names}
    target = convert(source, 70_000)
    assert_converted(target, source)
    for name, time in written.items():
        assert (target / name).stat().st_mtime_ns == time


def test_a_conversion_of_another_source_is_not_continued(source: Path) -> None:
    convert_with_limit(source, 100_000, "SIG_DFL")
    save_file(tensors(2, 1), source / SMALL)
    save_file({name: -t for name, t in tensors(4, 2).items()}, source / BIG)
    assert_converted(convert(source, 70_000), source)


def test_a_conversion_that_the_disk_refuses_says_so(source: Path) -> None:
    refused = convert_with_limit(source, 40_000, "SIG_IGN")
    assert refused.returncode == 1
    assert "model-00001-of-00004.safetensors: File too large; make room" in refused.stderr
    assert not source.with_name("mine-bf16").exists()
    assert_converted(convert(source, 70_000), source)


def test_a_folder_that_nobody_recorded_cannot_be_verified(source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has no manifest\.json and there is no record"):
        verify(source, {})
    weights.write_manifest(source, name="mine")
    assert verify(source, {})
    (source / SMALL).unlink()
    assert not verify(source, {})


def test_a_missing_checkpoint_says_what_to_type() -> None:
    for command in ("verify", "convert"):
        failed = program(command, NAME)
        assert failed.returncode == 1
        assert f"python -m xgenmm.checkpoints.download download {NAME}\n" in failed.stderr
