"""An adapter and the checkpoint that it was trained on -> a whole checkpoint."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from xgenmm.checkpoints.loading import parameter_files, stored_tensors
from xgenmm.checkpoints.manifest import is_checkpoint_file, write_manifest
from xgenmm.errors import CheckpointError, listed
from xgenmm.files import read_json_object, write_json
from xgenmm.finetuning.adapters import CONFIG_FILE, PREFIX, WEIGHTS_FILE, save_tensors
from xgenmm.finetuning.progress import complete_folder

_A, _B = ".lora_A.weight", ".lora_B.weight"


class Adapter:
    """The tensors of an adapter folder, under the released names.

    Attributes:
        replaced: parameters that were trained whole.
        added: what LoRA adds to a weight, as its two matrices; the second is scaled already.
    """

    def __init__(self, folder: Path) -> None:
        """Read the folder. Raises CheckpointError if it is not an adapter."""
        self.folder = folder
        try:
            self.config: dict[str, Any] = read_json_object(folder / CONFIG_FILE)
            tensors = load_file(folder / WEIGHTS_FILE)
        except Exception as error:  # safetensors raises its own kinds
            raise CheckpointError(f"adapter: {folder} cannot be read ({error})") from error
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        self.replaced = {n: t for n, t in tensors.items() if not n.endswith((_A, _B))}
        self.added: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, down in tensors.items():
            if name.endswith(_A):
                module = name.removesuffix(_A)
                if module + _B not in tensors:
                    raise CheckpointError(f"adapter: {folder} lacks {module + _B}")
                scale = self.config["lora_alpha"] / self.config["r"]
                self.added[f"{module}.weight"] = down, tensors[module + _B] * scale

    @property
    def base(self) -> str:
        """The name of the checkpoint that it was trained on."""
        return str(self.config.get("base_model_name_or_path"))

    def check(self, shapes: Mapping[str, tuple[int, ...]], base: str) -> None:
        """Raise CheckpointError if the adapter is of another checkpoint than `base`.

        shapes: of the checkpoint's tensors, by their released names.
        """
        own = {name: tuple(tensor.shape) for name, tensor in self.replaced.items()}
        own |= {n: (up.shape[0], down.shape[1]) for n, (down, up) in self.added.items()}
        wrong = sorted(name for name, shape in own.items() if shapes.get(name) != shape)
        if wrong or self.base != base:
            tensors = f", and {listed(wrong)} do not fit" if wrong else ""
            raise CheckpointError(
                f"adapter: {self.folder} is for {self.base}, not for {base}{tensors}"
            )

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight of the checkpoint as it is after training, in its dtype."""
        if name in self.replaced:
            return self.replaced[name].to(weight.dtype)
        if name in self.added:
            down, up = self.added[name]
            return (weight.float() + up.float() @ down.float()).to(weight.dtype)
        return weight


def write_checkpoint(
    base: Path, adapter: Path, target: Path, files: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint in the released layout: `base` with an adapter merged into it.

    files: JSON files in place of the base's, by name.

    Raises CheckpointError if the adapter is of another checkpoint, or the disk is full.
    """
    trained, shapes = Adapter(adapter), {n: t.shape for n, t in stored_tensors(base).items()}
    trained.check(shapes, base.name)
    parameters = parameter_files(base)
    with complete_folder(target) as folder:
        for path in sorted(base.iterdir()):
            if is_checkpoint_file(path.name) and path.suffix != ".safetensors":
                shutil.copyfile(path, folder / path.name)
        beside = base.parent / "tokenizer.model"  # read from there if the folder has none
        if beside.exists() and not (folder / beside.name).exists():
            shutil.copyfile(beside, folder / beside.name)
        for name, content in (files or {}).items():
            write_json(folder / name, content)
        for path in parameters:
            with safe_open(path, "pt") as file:
                tensors = {n: trained.apply(n, file.get_tensor(n)) for n in file.keys()}  # noqa: SIM118
            save_tensors(folder / path.name, {n: t.contiguous() for n, t in tensors.items()})
        write_manifest(folder)
