"""Names of checkpoints, and the folders on this disk that they mean."""

from pathlib import Path

import pytest

from xgenmm.checkpoints.registry import releases, resolve
from xgenmm.errors import CheckpointError

MAIN = "xgen-mm-phi3-mini-instruct-interleave-r-v1.5"


def test_a_folder_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / MAIN).mkdir()
    assert resolve(MAIN) == Path(MAIN)


def test_the_converted_folder_wins_over_the_released_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XGENMM_WEIGHTS", str(tmp_path))
    (tmp_path / MAIN).mkdir()
    assert resolve(MAIN) == tmp_path / MAIN
    (tmp_path / f"{MAIN}-bf16").mkdir()
    for name in (
        MAIN,
        f"Salesforce/{MAIN}",
        "xgen-mm-phi3-mini-instruct-multi-r-v1.5",
    ):
        assert resolve(name) == tmp_path / f"{MAIN}-bf16"


def test_what_is_not_here_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XGENMM_WEIGHTS", str(tmp_path / "none"))
    (tmp_path / f"{MAIN}.partial").mkdir()
    with pytest.raises(CheckpointError, match=f"download {MAIN}$"):
        resolve(MAIN)
    with pytest.raises(CheckpointError, match=r"'xgen' is neither a folder .* known are .*demo"):
        resolve("xgen")


def test_every_release_is_described() -> None:
    known = releases()
    assert len(known) == 7
    assert len({name for release in known.values() for name in release.names}) == 6 * 2 + 3 * 2 + 1
    base = known["xgen-mm-phi3-mini-base-r-v1.5"]
    assert base.parameters == 4_359_257_219
    # 4 bytes a parameter, and the four headers.
    headers = sum(record.size for record in base.files.values()) - 4 * base.parameters
    assert 0 < headers < 200_000
