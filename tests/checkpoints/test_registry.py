"""Checkpoint names, and the folders in which they are looked up."""

from pathlib import Path

import pytest

from xgenmm.checkpoints import registry
from xgenmm.checkpoints.registry import releases, resolve, search_folders, weights_folder
from xgenmm.errors import CheckpointError

MAIN = "xgen-mm-phi3-mini-instruct-interleave-r-v1.5"


def test_folder_takes_precedence_over_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / MAIN).mkdir()
    assert resolve(MAIN) == Path(MAIN)


def test_converted_folder_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XGENMM_HOME", str(tmp_path))
    (tmp_path / MAIN).mkdir()
    assert resolve(MAIN) == tmp_path / MAIN
    (tmp_path / f"{MAIN}-bf16").mkdir()
    for name in (
        MAIN,
        f"Salesforce/{MAIN}",
        "xgen-mm-phi3-mini-instruct-multi-r-v1.5",
    ):
        assert resolve(name) == tmp_path / f"{MAIN}-bf16"


def test_error_for_a_missing_checkpoint_names_folders_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XGENMM_HOME", str(tmp_path / "none"))
    (tmp_path / f"{MAIN}.partial").mkdir()
    looked = f"{MAIN} is not in {tmp_path / 'none'} or {registry.CHECKOUT_WEIGHTS}"
    with pytest.raises(CheckpointError, match=f"{looked}; .* xgenmm download {MAIN}$"):
        resolve(MAIN)
    with pytest.raises(CheckpointError, match=r"'xgen' is neither a folder .* known are .*demo"):
        resolve("xgen")


def test_weights_folder_is_xgenmm_home_then_the_checkout_then_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert weights_folder() == tmp_path / "weights"  # XGENMM_HOME
    monkeypatch.delenv("XGENMM_HOME")
    assert weights_folder() == registry.CHECKOUT_WEIGHTS
    monkeypatch.setattr(registry, "CHECKOUT_WEIGHTS", tmp_path / "none")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert weights_folder() == tmp_path / ".cache" / "xgenmm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert weights_folder() == tmp_path / "cache" / "xgenmm"
    assert search_folders() == [tmp_path / "cache" / "xgenmm"]


def test_error_for_a_missing_demo_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "CHECKOUT_WEIGHTS", tmp_path / "none")
    with pytest.raises(CheckpointError, match=f"demo is not in {tmp_path / 'weights'}.*clone the"):
        resolve("demo")


def test_releases_are_complete() -> None:
    known = releases()
    assert len(known) == 10
    assert len({name for release in known.values() for name in release.names}) == 8 * 2 + 4 * 2 + 2
    assert all(r.license == "cc-by-nc-4.0" for r in known.values() if "-vid-" in r.name)
    base = known["xgen-mm-phi3-mini-base-r-v1.5"]
    assert base.parameters == 4_359_257_219
    # The files hold 4 bytes per parameter, and a header each.
    headers = sum(record.size for record in base.files.values()) - 4 * base.parameters
    assert 0 < headers < 200_000
