"""The device of an engine, and PyTorch's settings for it."""

import torch

from xgenmm.errors import InputError


def resolve_device(wanted: str | torch.device | None) -> torch.device:
    """Return the device that a caller means; a GPU always has an index.

    wanted: `cpu`, `cuda` or `cuda:N`; None is a GPU if there is one.

    Raises InputError for a device that does not exist here.
    """
    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise InputError(
            "device", f"{wanted!r} is not a device; use cpu, cuda or cuda:N"
        ) from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise InputError("device", f"{wanted} is not supported; use cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise InputError("device", f"{wanted} is not available: PyTorch finds no GPU; use cpu")
    index = torch.cuda.current_device() if device.index is None else device.index
    count = torch.cuda.device_count()
    if index >= count:
        raise InputError("device", f"cuda:{index} does not exist; use cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def use_device(device: torch.device) -> None:
    """Make a GPU the current one of the calling thread; does nothing for a CPU.

    Triton, CUDA streams and graphs use the current device, which every thread has for itself.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuDNN's attention may build a plan for each new prompt length, which takes tens to
        # hundreds of milliseconds.
        torch.backends.cuda.enable_cudnn_sdp(False)
