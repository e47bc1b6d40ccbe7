"""Copies from the host to the model's device that do not make the host wait."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to `device`.

    To a GPU it goes through pinned memory: a copy from pageable memory would make the host wait
    for all work queued on the stream. PyTorch keeps the pinned memory until the copy is done.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
