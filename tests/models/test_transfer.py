"""Copies to the model's device."""

import torch

from xgenmm.models.transfer import to_device


def test_copy_on_a_cpu_is_the_tensor_itself() -> None:
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
