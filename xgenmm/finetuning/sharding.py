"""FSDP2: parameters, gradients and moments are split over the devices of a run.

A part of the model is whole on every device only while it computes. Layers with LoRA hold bfloat16
and float32 side by side, which FSDP2 gathers as bytes; it reduces only the gradients of what is
trained, which is all float32.
"""

from collections.abc import Mapping

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from xgenmm.finetuning.module import TrainedModel


def shard(module: TrainedModel, device: torch.device, devices: int) -> None:
    """Split the parameters of a module over all processes, in place."""
    mesh, vlm = init_device_mesh(device.type, (devices,)), module.model.vlm
    for part in (vlm.vision_encoder, vlm.vision_tokenizer, *vlm.lang_model.model.layers):
        fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def gather(tensors: Mapping[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
    """Return whole tensors on the CPU, nothing unless `keep`; all processes must call this."""
    gathered = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            gathered[name] = whole.detach().cpu().contiguous()
    return gathered


def like(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Split a whole tensor as `parameter` is split; all processes have the same."""
    if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
        return whole
    whole = whole.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def number(value: torch.Tensor) -> float:
    """Return the value of a tensor of one number; all processes must call this."""
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.item()
