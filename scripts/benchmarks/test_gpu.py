"""The parts `gpu` and `cpu` on tiny models, whose figures mean nothing."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from scripts.benchmarks.gpu import run
from scripts.benchmarks.gpu.__main__ import main as gpu_main
from scripts.benchmarks.gpu.context import Context
from scripts.benchmarks.gpu.figures import GOALS, Figure, Record
from scripts.benchmarks.gpu.report import report
from scripts.benchmarks.gpu.run import STAGES, Stage
from scripts.benchmarks.random_data import ROOT

PACKAGES = ("torch", "torchvision", "triton", "transformers")
CARRIED = ("cachetools", "einops", "sentencepiece")  # as `--help` says


def records(file: Path) -> list[Record]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def link_packages(folder: Path, names: tuple[str, ...]) -> None:
    """Fill a folder with links to these installed distributions and all that they require."""
    waiting, done = list(names), set()
    while waiting:
        name = waiting.pop()
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # needed on other systems only
        if name in done:
            continue
        done.add(name)
        for file in installed.files or ():
            link = folder / file.parts[0]
            if file.parts[0] != ".." and not link.exists():
                link.symlink_to(str(installed.locate_file(file.parts[0])))
        required = (r for r in installed.requires or () if "extra ==" not in r)
        waiting += [re.split(r"[^\w.-]", requirement)[0] for requirement in required]


@pytest.mark.timeout(300)
def test_all_stages_run_with_few_packages(tmp_path: Path) -> None:
    packages, output = tmp_path / "packages", tmp_path / "gpu.jsonl"
    packages.mkdir()
    link_packages(packages, PACKAGES + CARRIED)
    command = [sys.executable, "-S", "-m", "scripts.benchmarks.gpu", "--tiny"]
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    subprocess.run([*command, "--output", str(output)], cwd=ROOT, env=environment, check=True)
    found = records(output)
    ended = {record["stage"] for record in found if "seconds" in record}
    assert ended == {stage.name for stage in STAGES}
    assert {"stage": "server", "skipped": "cog is not installed"} in found
    measured = {(record["stage"], record["measured"]) for record in found if "value" in record}
    assert {stage for stage, _ in measured} == ended - {"server"}
    not_here = {("decode", "batch 32: of the copy bandwidth")}
    assert {key for key in GOALS if key[0] != "server"} - measured == not_here


@pytest.mark.timeout(120)
def test_server_stage(tmp_path: Path) -> None:
    output = tmp_path / "gpu.jsonl"
    assert gpu_main(["--tiny", "--stages", "server", "--output", str(output)]) == 0
    measured = {("server", record["measured"]) for record in records(output) if "value" in record}
    assert {key for key in GOALS if key[0] == "server"} < measured


def fails(context: Context) -> Iterator[Figure]:
    yield Figure("before", 1.0, "s")
    raise ValueError("wrong")


def dies(context: Context) -> Iterator[Figure]:
    os._exit(3)
    yield


def hangs(context: Context) -> Iterator[Figure]:
    yield Figure("before", 1.0, "s")
    time.sleep(1000)


def works(context: Context) -> Iterator[Figure]:
    yield Figure("figure", 2.0, "ms", {"s": 0.002})


def test_failed_and_hanging_stages_lose_no_figures() -> None:
    limits = {"fails": 60.0, "dies": 60.0, "hangs": 5.0, "works": 60.0}
    stages = [Stage(name, __name__, limit) for name, limit in limits.items()]
    found = [record for record in run.run(stages, tiny=True) if "machine" not in record]
    before = {"measured": "before", "value": 1.0, "unit": "s", "details": {}}
    tracebacks = [record.pop("traceback") for record in found if "error" in record]
    assert 'raise ValueError("wrong")' in tracebacks[0]
    assert tracebacks[1:] == ["", ""]
    found[-1].pop("seconds")
    assert found == [
        {"stage": "fails", **before},
        {"stage": "fails", "error": "ValueError: wrong"},
        {"stage": "dies", "error": "the process died with exit status 3"},
        {"stage": "hangs", **before},
        {"stage": "hangs", "error": "it took longer than 5 s"},
        {
            "stage": "works",
            "measured": "figure",
            "value": 2.0,
            "unit": "ms",
            "details": {"s": 0.002},
        },
        {"stage": "works"},
    ]


def test_no_stage_starts_without_time() -> None:
    assert list(run.run(STAGES[:1], budget=1)) == [
        {"stage": "limits", "skipped": "no time left of 1 s"}
    ]


def test_report_of_a_run_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = {"stage": "server", "value": 11.5, "unit": "s", "details": {"ms": 11500.0}}
    lines = [
        {"machine": "a GPU"},
        {"stage": "limits", "measured": "copy", "value": 2.0, "unit": "GB/s", "details": {}},
        {"stage": "limits", "seconds": 2.0},
        {"stage": "decode", "error": "ValueError: wrong", "traceback": ""},
        {**figure, "measured": "process start to READY"},
    ]
    file = tmp_path / "gpu.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "server", "meas')
    assert gpu_main(["--report", str(file)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "a GPU"
    assert "| server | process start to READY (11,500 ms) | 11.5 s | ≤ 12 s | yes |" in printed
    assert "| server | of that setup() | not measured | ≤ 5 s |  |" in printed
    reasons = [line for line in printed if line.startswith("- ")]
    assert {"- decode: ValueError: wrong", "- server: cut short"} < set(reasons)
    assert len(reasons) == len(STAGES) - 1  # not the one that finished
    assert report([]).count("not measured") == len(GOALS)


def part_figures(part: str, folder: Path) -> dict[str, float]:
    """The values of a part of `python -m scripts.benchmarks` by what was measured."""
    from scripts.benchmarks.__main__ import main  # slow: not for workers

    file = folder / "figures.json"
    main([part, "--tiny", "--json", str(file)])
    return {row["measured"]: row["value"] for row in json.loads(file.read_text())["rows"]}


def test_gpu_is_a_part_of_the_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "STAGES", STAGES[:1])
    assert part_figures("gpu", tmp_path)["copy, read and written"] > 0


def test_cpu_part_compares_prefill_and_decode(tmp_path: Path) -> None:
    found = part_figures("cpu", tmp_path)
    assert {"prefill, times as fast", "decode, times as fast"} <= found.keys()
