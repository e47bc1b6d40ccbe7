"""Create a virtual environment with pinned packages; the Makefile runs this.

    python3.11 -m scripts.make_env .venv -r requirements.txt

The first argument is the folder, the others are those of `pip install`. This package is installed
as well, in editable mode, for its `xgenmm` command and its vLLM plugin. Packages are installed with
uv, which takes a fraction of pip's time, or with pip where uv is not available. Needs nothing but
the standard library.
"""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

UV = "uv==0.13.9"
HEARTBEAT = 10.0  # seconds between progress lines when the output is not a terminal

# pip's name of a setting -> uv's environment variable, and the separator of its values.
PIP_SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "proxy": ("ALL_PROXY", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "client-cert": ("SSL_CLIENT_CERT", " "),
}


def main(arguments: list[str]) -> int:
    """Run the program; return its exit status."""
    folder, packages = Path(arguments[0]), arguments[1:]
    started = time.monotonic()
    print(f"creating {folder} (about 5 GB, once only)", flush=True)
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    command, environment = installer(python)
    editable = ["--no-deps", "--no-build-isolation", "--editable", "."]
    for selection in (packages, editable):
        status = _run_visibly([*command, *selection], environment)
        if status:
            failed = " ".join(selection)
            print(f"installing {failed} into {folder} failed; see above", file=sys.stderr)
            return status
    print(f"created {folder} in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def installer(python: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command that installs packages for `python`, and the variables to run it with."""
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run([*pip, "--quiet", UV], capture_output=True, text=True)
    if done.returncode:
        reason = "".join(done.stderr.strip().splitlines()[-1:])
        print(f"using pip, because {UV} cannot be installed ({reason})", flush=True)
        return pip, dict(os.environ)
    uv = python.with_name("uv")
    return [str(uv), "pip", "install", "--python", str(python)], uv_environment(python)


def uv_environment(python: Path) -> dict[str, str]:
    """Return this process's environment plus pip's settings, translated for uv.

    Variables that are already set win.
    """
    listed = subprocess.run(
        [str(python), "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    settings: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # pip's order: the last one wins
        for name, value in re.findall(rf"^{section}\.([\w-]+)=(.+)$", listed.stdout, re.MULTILINE):
            settings[name.removeprefix("default-")] = ast.literal_eval(value)
    translated = {
        variable: separator.join(settings[name].split())
        for name, (variable, separator) in PIP_SETTINGS.items()
        if name in settings
    }
    # As pip does: take the best version of all indexes, trust the system's certificates, and use
    # the Python that is there.
    translated |= {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_SYSTEM_CERTS": "1"}
    translated |= {"UV_PYTHON_DOWNLOADS": "never"}
    return translated | dict(os.environ)


def _run_visibly(command: list[str], environment: dict[str, str]) -> int:
    """Run a command and return its exit status, with progress lines if there is no terminal."""
    started = time.monotonic()
    with subprocess.Popen(command, env=environment) as process:
        while True:
            try:
                return process.wait(None if sys.stdout.isatty() else HEARTBEAT)
            except subprocess.TimeoutExpired:
                print(f"still installing after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
