"""An adapter and the checkpoint that it was trained on -> a whole checkpoint."""

import shutil
from pathlib import Path

from safetensors import safe_open

from xgenmm.checkpoints.adapter import read_adapter
from xgenmm.checkpoints.loading import parameter_files
from xgenmm.checkpoints.manifest import is_checkpoint_file, write_manifest
from xgenmm.finetuning.adapters import save_tensors
from xgenmm.finetuning.progress import complete_folder


def write_checkpoint(base: Path, adapter: Path, target: Path) -> None:
    """Write a checkpoint in the released layout: `base` with an adapter merged into it.

    Raises CheckpointError if the adapter is of another checkpoint, or the disk is full.
    """
    trained = read_adapter(adapter, base)
    with complete_folder(target) as folder:
        for path in sorted(base.iterdir()):
            if is_checkpoint_file(path.name) and path.suffix != ".safetensors":
                shutil.copyfile(path, folder / path.name)
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
