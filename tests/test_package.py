"""The wheel: what it contains, and that it works outside of a checkout.

It is installed into a fresh environment that shares the dependencies of this one, but not this
checkout. No network is needed.
"""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from tests.support.paths import DEMO, ROOT
from xgenmm.checkpoints.registry import releases

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(copy_of_sources(folder))], check=True)
    (built,) = folder.glob("*.whl")
    return built


def copy_of_sources(folder: Path) -> Path:
    """A copy of the checkout without ignored files: building a wheel leaves files behind."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        target = folder / "sources" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    return folder / "sources"


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment's `bin` folder, with the wheel and this environment's dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*command, "install", "--quiet", "--no-deps", str(wheel)], check=True)
    # Path files in the folder named here are not processed, so an editable installation of this
    # checkout has no effect.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def run(environment: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment, without variables that point to this checkout."""
    ours = ("PYTHON", "XDG", "XGENMM")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return subprocess.run(
        [str(environment / program), *arguments],
        cwd=environment,
        env=inherited | {"HOME": str(environment)},
        capture_output=True,
        text=True,
        timeout=150,
    )


def metadata(wheel: Path) -> Message:
    """The wheel's core metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_has_the_library_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "xgenmm").rglob("*.py")}
    data = {"py.typed", "checkpoints/releases.json", "evaluation/published.json"}
    assert names == sources | {f"xgenmm/{name}" for name in data}


def test_wheel_has_complete_metadata(wheel: Path) -> None:
    found = metadata(wheel)
    assert found["Name"] == "xgenmm"
    assert found["License-Expression"] == "Apache-2.0"
    assert found["License-File"] == "LICENSE"
    assert found["Requires-Python"] == ">=3.11"
    assert found["Author"]
    assert found.get_all("Project-URL")
    assert set(found.get_all("Provides-Extra", [])) == {
        *("data", "dev", "eval", "finetune", "serve", "video", "vllm")
    }
    required = found.get_all("Requires-Dist", [])
    always = {requirement for requirement in required if "extra ==" not in requirement}
    assert len(always) == len(PROJECT["dependencies"])
    assert not any(requirement.startswith(("cog", "ray", "vllm")) for requirement in always)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/entry_points.txt"))
        entry_points = archive.read(name).decode()
    assert "[console_scripts]\nxgenmm = xgenmm.__main__:main\n" in entry_points
    assert "[vllm.general_plugins]\nxgenmm = xgenmm.vllm_plugin.plugin:register\n" in entry_points


def test_package_is_imported_outside_of_a_checkout(environment: Path) -> None:
    done = run(environment, "python", "-c", "import xgenmm; print(xgenmm.__file__)")
    assert Path(done.stdout.strip()).is_relative_to(environment.parent / "lib"), done.stderr


@pytest.mark.parametrize("program", [("xgenmm",), ("python", "-m", "xgenmm")])
def test_list_works_outside_of_a_checkout(environment: Path, program: tuple[str, ...]) -> None:
    done = run(environment, *program, "list")
    assert done.returncode == 0, done.stderr
    for name in releases():
        assert f"\n{name} " in done.stdout
    assert f"downloads go to {environment / '.cache' / 'xgenmm'} " in done.stdout


def test_verify_works_outside_of_a_checkout(environment: Path) -> None:
    done = run(environment, "xgenmm", "verify", str(DEMO))
    assert done.returncode == 0, done.stdout + done.stderr


def test_error_for_a_missing_demo_says_where_it_is(environment: Path) -> None:
    done = run(environment, "xgenmm", "verify", "demo")
    assert done.returncode == 1
    cache = environment / ".cache" / "xgenmm"
    assert done.stderr.startswith(f"error: model: demo is not in {cache}. It is part of the rep")


ANSWER = """
import sys
import xgenmm

engine = xgenmm.load(sys.argv[1], device="cpu")
image = xgenmm.read_image(sys.argv[2])
print(engine.stream(xgenmm.Request("What does the sign say?", [image])).text())
engine.close()
"""


def test_checkpoint_given_by_its_path_answers(environment: Path) -> None:
    image = DEMO / "examples" / "scene-8.png"
    done = run(environment, "python", "-c", ANSWER, str(DEMO), str(image))
    assert done.stdout.strip() == "STAY", done.stderr


def test_every_dependency_is_pinned() -> None:
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    names = {pin.split("==")[0] for pin in pins if not pin.startswith("#")}
    extras = PROJECT["optional-dependencies"]
    for requirement in [*PROJECT["dependencies"], *extras["serve"], *extras["video"]]:
        name = requirement.split(">=")[0].split("==")[0]
        assert name.replace("_", "-") in names
    assert not any(name.startswith(("nvidia-", "cuda-", "triton")) for name in names)


def test_requirements_files_agree() -> None:
    every = set((ROOT / "requirements-dev.txt").read_text().splitlines())
    for name in ("requirements.txt", "requirements-data.txt"):
        pins = (ROOT / name).read_text().splitlines()
        assert {pin for pin in pins if not pin.startswith("#")} <= every
