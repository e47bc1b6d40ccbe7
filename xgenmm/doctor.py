"""The command `xgenmm doctor`: what this machine is, whether it computes right, and how fast."""

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence

import torch
from PIL import Image

import xgenmm
from xgenmm.checkpoints.registry import folders_on_disk, releases, weights_folder
from xgenmm.engine.engine import Engine
from xgenmm.engine.prefill_check import check_prefill
from xgenmm.engine.reference import answer_text
from xgenmm.engine.request import Request
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.errors import CheckpointError, EngineError, InputError

PACKAGES = ("xgenmm", "torch", "triton", "transformers", "cog")
DECODE_TOKENS = 64
COPIES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `xgenmm doctor` and add its arguments."""
    parser.description = """\
Show this machine and the checkpoints found on it, then load a checkpoint and check that it computes
right and fast: the kernels against plain PyTorch, the engine against the reference, the decode rate
against the memory's bandwidth. Ends with what to do; the exit status is 1 if anything is wrong.

    xgenmm doctor demo
"""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="NAME|FOLDER",
        help="the checkpoint to check; by default the first one found on this disk",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N; by default a GPU if there is one")
    parser.add_argument("--quantize", help="int8 or fp8, as in XGENMM_QUANTIZE")


def run(options: argparse.Namespace) -> int:
    """Run `xgenmm doctor`; return the exit status."""
    for line in machine():
        print(line, flush=True)
    found = checkpoints()
    print(f"checkpoints: {', '.join(found) or 'none'}", flush=True)
    advice = list[str]()
    if not torch.cuda.is_available():
        advice.append(
            "PyTorch finds no GPU: the released models need one with 16 GB or more (10 GB with "
            "--quantize int8); on a CPU they take seconds for each token"
        )
    model = options.model or next(iter(found), None)
    if model is None:
        advice.append("download a checkpoint: xgenmm download NAME; `xgenmm list` shows the names")
        return _conclude(advice, failed=True)
    try:
        engine = xgenmm.load(model, options.device, quantize=options.quantize)
    except (CheckpointError, InputError, EngineError) as error:
        return _conclude([*advice, str(error)], failed=True)
    failed = False
    for title, check in (("prefill", _prefill), ("answer", _answer), ("decode", _decode)):
        try:
            passed, text = check(engine)
        except (EngineError, torch.OutOfMemoryError) as error:
            passed, text = False, str(error)
        print(f"{title}: {text}", flush=True)
        if not passed:
            failed = True
            advice.append(f"{title} failed; report all of the above")
    engine.close()
    return _conclude(advice, failed)


def machine() -> Iterator[str]:
    """Lines about this machine: versions, processor, memory, GPUs and disk."""
    yield f"python {platform.python_version()}, {platform.platform()}"
    yield ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    pages = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_AVPHYS_PAGES")
    total, free = (count * os.sysconf("SC_PAGE_SIZE") for count in pages)
    yield f"{os.cpu_count()} cores, memory {_gigabytes(free)} free of {_gigabytes(total)}"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        yield (
            f"cuda:{index}: {torch.cuda.get_device_name(index)}, compute capability "
            f"{major}.{minor}, memory {_gigabytes(free)} free of {_gigabytes(total)}, "
            f"CUDA {torch.version.cuda}, driver {_driver()}"
        )
    folder = weights_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    yield f"weights in {folder}, {_gigabytes(shutil.disk_usage(there).free)} free on its disk"


def checkpoints() -> list[str]:
    """Names of the known checkpoints that are on this disk."""
    return [name for name, release in releases().items() if folders_on_disk(release)]


def _prefill(engine: Engine) -> tuple[bool, str]:
    cache = engine.model.cache(8)
    return True, f"logits differ from the reference's by {check_prefill(engine.model, cache):.1e}"


def _answer(engine: Engine) -> tuple[bool, str]:
    """Compare an answer of the engine with that of the reference."""
    request = Request(
        "What is in the image?",
        [Image.new("RGB", (64, 48), "red")],
        sampling=SamplingParams(max_new_tokens=16),
    )
    found, expected = engine.stream(request).text(), answer_text(engine, request)
    if found == expected:
        return True, f"{found!r}, the same as the reference's"
    # In bfloat16 two tokens may be equally likely up to rounding.
    return engine.model.dtype != torch.float32, f"{found!r}; the reference's is {expected!r}"


def _decode(engine: Engine) -> tuple[bool, str]:
    """Measure the decode rate of one answer, and how much of the bandwidth it uses for weights."""
    status = engine.status()
    request = Request("Write a long story.", sampling=SamplingParams(DECODE_TOKENS, 1.0, seed=0))
    rates = []
    for _ in range(2):  # the first one warms up
        usage = (answer := engine.stream(request)).usage
        answer.text()
        seconds = usage.output_tokens / usage.tokens_per_second - usage.time_to_first_token
        rates.append((usage.output_tokens - 1) / seconds if seconds > 0 else 0.0)
    decoder = engine.model.decoder
    weights = sum(t.nbytes for t in decoder.state_dict().values()) - sum(
        parameter.nbytes for parameter in decoder.model.embed_tokens.parameters()
    )
    bandwidth = copy_bandwidth(engine.model.device)
    return True, (
        f"{rates[-1]:.1f} tokens/s by the {status.decode_path} path, reading the weights at "
        f"{100 * rates[-1] * weights / bandwidth:.0f} % of the copy bandwidth "
        f"({bandwidth / 1e9:.0f} GB/s)"
    )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy on this device reads and writes."""
    source = torch.empty((256 if device.type == "cuda" else 64) << 20, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    started = _now(device)
    for _ in range(COPIES):
        target.copy_(source)
    return 2 * COPIES * source.nbytes / (_now(device) - started)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def _conclude(advice: Sequence[str], failed: bool) -> int:
    for line in advice:
        print(f"- {line}", flush=True)
    print("something is wrong" if failed else "all checks passed", flush=True)
    return int(failed)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split()[0]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
