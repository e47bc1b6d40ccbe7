"""The command `xgenmm`: its help, and what it imports."""

import subprocess
import sys

import pytest

from xgenmm.__main__ import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"\n    xgenmm {name}" in capsys.readouterr().out


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"\n    {name:<10}{command.help}\n" in shown


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["caption", "--help"]])
def test_commands_that_only_print_do_not_import_torch(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "xgenmm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "xgenmm" in imported
    assert "torch" not in imported
