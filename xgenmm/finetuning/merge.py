"""An adapter and the checkpoint that it was trained on -> a whole checkpoint."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from xgenmm.checkpoints.adapter import read_adapter
from xgenmm.checkpoints.loading import parameter_files
from xgenmm.checkpoints.manifest import is_checkpoint_file, write_manifest
from xgenmm.files import write_json
from xgenmm.finetuning.adapters import save_tensors
from xgenmm.finetuning.progress import complete_folder


def write_checkpoint(
    base: Path, adapter: Path, target: Path, files: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint in the released layout: `base` with an adapter merged into it.

    files: JSON files in place of the base's, by name.

    Raises CheckpointError if the adapter is of another checkpoint, or the disk is full.
    """
    trained = read_adapter(adapter, base)
    with complete_folder(target) as folder:
        for path in sorted(base.iterdir()):
            if is_checkpoint_file(path.name) and path.suffix != ".safetensors":
                shutil.copyfile(path, folder / path.name)
        beside = base.parent / "tokenizer.model"  # read from there if the folder has none
        if beside.exists() and not (folder / beside.name).exists():
            shutil.copyfile(beside, folder / beside.name)
        for name, content in (files or {}).items():
            write_json(folder / name, content)
        for path in parameter_files(base):
            tensors = {}
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(name)
                    if name in trained.names:
                        tensor = trained.merge(name, tensor.float()).to(tensor.dtype)
                    tensors[name] = tensor.contiguous()
            save_tensors(folder / path.name, tensors)
        write_manifest(folder)
