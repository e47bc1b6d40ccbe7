"""What gets into the Docker image: .dockerignore by Docker's own rules."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.dockerignore import DockerIgnore, image_files
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("text", "excluded", "included"),
    [
        ("# a\n\nb.md\n", "b.md b.md/c", "# a/b.md ab.md a/bxmd"),
        ("/docs/\n./a/../c", "docs/x.md docs c", "a/docs/x.md a"),
        ("*.md\n!README*.md\nREADME-secret.md", "a.md README-secret.md", "README.md x/a.md"),
        ("*.md\nREADME-secret.md\n!README*.md", "a.md", "README.md README-secret.md"),
        ("*\n!a/b", "a/c c a/bb/d", "a/b a/b/c/d"),
        ("*\n!a\na/*/c", "b a/b/c a/b/c/d", "a/c a/b/d"),
        ("**/x\n!y/**/z", "x a/x a/b/x/c", "ax y/z y/x/z y/x/a/z"),
        ("*/t?\n**/.*", "a/t1 a/t1/b .env a/.env .a/b", "t1 a/t a/t12 a.env"),
    ],
)
def test_patterns_follow_docker(text: str, excluded: str, included: str) -> None:
    ignore = DockerIgnore(text)
    assert [path for path in excluded.split(" ") if not ignore.excludes(path)] == []
    assert [path for path in included.split(" ") if ignore.excludes(path)] == []


def test_secrets_environments_and_other_checkpoints_stay_out(tmp_path: Path) -> None:
    wanted = {
        "predict.py",
        "finetune.py",
        "serving/settings.py",
        "xgenmm/engine/engine.py",
        "xgenmm/checkpoints/releases.json",
        "weights/NAME-bf16/model.safetensors",
        "weights/demo/config.json",
        "weights/demo-video/config.json",
    }
    unwanted = {
        ".env",
        ".env.production",
        ".git/config",
        ".netrc",
        ".venv/lib/torch.so",
        ".venv-vllm/pyvenv.cfg",
        "venv/bin/python",
        "env/bin/python",
        ".cog/openapi_schema.json",
        "id_rsa",
        "photo.jpg",
        "answers/_settings.json",
        "notes/predict.py",
        "xgenmm/.env",
        "xgenmm/__pycache__/config.cpython-312.pyc",
        "weights/releases.lock.json",
        "weights/NAME/model.safetensors",
        "weights/NAME.partial/model.safetensors",
        "weights/NAME-bf16.partial/model.safetensors",
        "weights/NAME-bf16/.cache/token",
    }
    for path in wanted | unwanted:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / ".dockerignore").write_bytes((ROOT / ".dockerignore").read_bytes())
    assert set(image_files(tmp_path)) == wanted


def test_of_the_repository_all_code_that_is_served_goes_in() -> None:
    command = ["git", "ls-files"]
    tracked = set(subprocess.check_output(command, cwd=ROOT, text=True).splitlines())
    served = {
        path
        for path in tracked
        if path.startswith(("serving/", "xgenmm/", "weights/demo/", "weights/demo-video/"))
        or re.fullmatch(r"\w+\.py|LICENSE", path)
    }
    assert set(image_files(ROOT)) & tracked == served
