"""The commands `xgenmm list`, `download`, `convert` and `verify`."""

import hashlib
from pathlib import Path

from tests.support.hub_repository import BIG, NAME, assert_complete, program
from tests.support.hub_server import HubServer


def test_download_verify_convert_and_list(hub: HubServer, root: Path) -> None:
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


def test_error_for_a_missing_checkpoint_names_folder_and_command(root: Path) -> None:
    for command in ("verify", "convert"):
        failed = program(command, NAME)
        assert failed.returncode == 1
        assert f"error: model: {NAME} is not in {root} or " in failed.stderr
        assert f"download it with: xgenmm download {NAME}\n" in failed.stderr
