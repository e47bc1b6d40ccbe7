"""Adapters: what fine-tuning with LoRA has learned, merged into the checkpoint it started from.

Files are in peft's format (see `adapter_files`): the matrices of LoRA, and parameters that were
trained whole, such as the resampler's. An adapter made by `xgenmm finetune` records a fingerprint
of its checkpoint; others only have its name.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open

from xgenmm.checkpoints.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterConfig,
    adapter_folder,
    read_adapter_config,
)
from xgenmm.checkpoints.loading import (
    StoredTensor,
    new_buffer,
    read_header,
    read_tensor,
    stored_tensors,
)
from xgenmm.checkpoints.manifest import MANIFEST, Manifest, read_if_present
from xgenmm.checkpoints.registry import CONVERTED, releases
from xgenmm.errors import listed, printable

logger = logging.getLogger(__name__)

PREFIX = "base_model.model."
BASE_FINGERPRINT = "base_fingerprint"
"""Key in the metadata of the safetensors file, which other programs ignore."""

_A, _B = ".lora_A.weight", ".lora_B.weight"
_PARENTS = ("", "vlm.", "vlm.lang_model.")
"""Adapters of the authors' training code, or of the language model alone, have names without."""

_SAMPLE = 256


@dataclass(frozen=True)
class Adapter:
    """The tensors of an adapter, on the CPU, by the released names of what they change.

    Attributes:
        replaced: parameters that were trained whole.
        added: for a weight [features, width], the matrices of LoRA, float32 [rank, width] and
            [features, rank]; the second is scaled already.
    """

    replaced: Mapping[str, torch.Tensor]
    added: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @cached_property
    def names(self) -> frozenset[str]:
        """The parameters that it changes."""
        return frozenset(self.replaced) | frozenset(self.added)

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a parameter as it is after training, on its device; all in float32."""
        if name in self.replaced:
            return self.replaced[name].to(weight)
        if name in self.added:
            down, up = self.added[name]
            return torch.addmm(weight, up.to(weight), down.to(weight))
        return weight

    def digest(self) -> str:
        """The sha256 of its content, the same for a folder and a tar."""
        digest = hashlib.sha256()
        for name in sorted(self.names):
            tensors = self.added.get(name) or (self.replaced[name],)
            digest.update(name.encode())
            for tensor in tensors:
                digest.update(tensor.float().numpy().tobytes())
        return digest.hexdigest()


def read_adapter(path: str | os.PathLike[str], checkpoint: Path) -> Adapter:
    """Read the adapter of a checkpoint folder from a folder or a tar.

    Reads no parameters of the checkpoint but a few numbers of each, so this is also the check to
    make before a model is loaded.

    Raises CheckpointError if the adapter cannot be read, is hostile, uses features of peft other
    than plain LoRA, is of another checkpoint, or does not fit it.
    """
    source, base = Path(path).expanduser(), stored_tensors(checkpoint)
    with adapter_folder(source) as folder:
        config = read_adapter_config(folder)
        file = folder / WEIGHTS_FILE
        header = read_header(file)
        with safe_open(file, "pt") as opened:
            metadata: Mapping[str, str] = opened.metadata() or {}
        _check_base(source, config, metadata.get(BASE_FINGERPRINT), checkpoint)
        fit = _Fit(header, base, config.r)
        if fit.problems:
            raise ValueError(f"{source} does not fit {checkpoint}: {listed(fit.problems, '; ')}")
        buffer = new_buffer()

        def read(tensor: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
            values = read_tensor(tensor, buffer, dtype)
            # NaN if any value is; a tenth of the time of `isfinite` on all values.
            if not all(bound.isfinite() for bound in values.aminmax()):
                raise ValueError(f"{source}: {printable(tensor.name)} has infinities or NaN")
            return values

        return Adapter(
            {name: read(tensor, tensor.dtype) for name, tensor in fit.whole.items()},
            {
                name: (read(down, torch.float32), read(up, torch.float32) * config.scale)
                for name, (down, up) in fit.pairs.items()
            },
        )


def fingerprint(checkpoint: Path) -> str:
    """Identify a checkpoint by the names, shapes and first values of all its parameters.

    The sha256 does not depend on the folder's name and files, nor on whether the parameters are
    float32 or were converted to bfloat16.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(stored_tensors(checkpoint).items()):
        if tensor.dtype.is_floating_point:
            digest.update(f"{name} {list(tensor.shape)}\n".encode())
            with tensor.path.open("rb") as file:
                file.seek(tensor.offset)
                content = file.read(min(tensor.size, _SAMPLE * tensor.dtype.itemsize))
            values = torch.frombuffer(bytearray(content), dtype=tensor.dtype) if content else None
            if values is not None:
                digest.update(values.bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _check_base(
    source: Path, config: AdapterConfig, recorded: str | None, checkpoint: Path
) -> None:
    """Raise ValueError if an adapter was trained on another checkpoint."""
    name = config.base_model_name_or_path
    if recorded is not None:
        if recorded != fingerprint(checkpoint):
            raise ValueError(
                f"{source} is for {printable(name)}, not for {checkpoint}: it was trained on other "
                "parameters; use the checkpoint that it was trained on"
            )
    elif not name:
        logger.warning("adapter: %s does not name the checkpoint it was trained on", source)
    elif _release_name(name) not in _names_of(checkpoint):
        raise ValueError(
            f"{source} is for {printable(name)}, not for {checkpoint.name}; if they are the same, "
            f"correct base_model_name_or_path in its {CONFIG_FILE}"
        )


def _names_of(checkpoint: Path) -> set[str]:
    """The names of a checkpoint folder: its own, and those it was downloaded under."""
    manifest = read_if_present(checkpoint / MANIFEST, Manifest)
    names = {checkpoint.name, checkpoint.resolve().name}
    names |= {name for name in (manifest and manifest.name, manifest and manifest.repo) if name}
    return {_release_name(name) for name in names}


def _release_name(name: str) -> str:
    """Return the one name of a known checkpoint, for any name, repository or path of it."""
    name = name.rstrip("/").split("/")[-1].removesuffix(CONVERTED)
    return next((r.name for r in releases().values() if name in r.names), name)


class _Fit:
    """Which tensors of an adapter change which parameters of a checkpoint.

    Attributes:
        whole: the adapter's tensor that replaces a parameter, by the parameter's released name.
        pairs: the matrices of LoRA that are added to a weight, by the weight's name.
        problems: what does not fit.
    """

    def __init__(
        self, tensors: Iterable[StoredTensor], base: Mapping[str, StoredTensor], rank: int | None
    ) -> None:
        self.whole: dict[str, StoredTensor] = {}
        self.pairs: dict[str, tuple[StoredTensor, StoredTensor]] = {}
        self.problems: list[str] = []
        self._base, self._rank = base, rank
        halves: dict[str, dict[str, StoredTensor]] = {}
        for tensor in tensors:
            half = next((end for end in (_A, _B) if tensor.name.endswith(end)), "")
            name = self._find(tensor.name.removesuffix(half) + (".weight" if half else ""))
            if name is None:
                self.problems.append(f"{tensor.name} is not for any parameter of it")
            elif not tensor.dtype.is_floating_point:
                self.problems.append(f"{tensor.name} has type {tensor.dtype}, must be floating")
            elif half in halves.setdefault(name, {}):
                self.problems.append(f"{tensor.name} is there twice")
            else:
                halves[name][half] = tensor
        for name, found in halves.items():
            self._add(name, found)
        if not halves and not self.problems:
            self.problems.append("it has no tensors")

    def _find(self, name: str) -> str | None:
        """Return the released name of the parameter that a tensor is for."""
        name = name.removeprefix(PREFIX)
        found = (parent + name for parent in _PARENTS)
        known = (n for n in found if n in self._base and self._base[n].dtype.is_floating_point)
        return next(known, None)

    def _add(self, name: str, found: Mapping[str, StoredTensor]) -> None:
        """Add what there is for one parameter, or the problem with it."""
        shape, shapes = self._base[name].shape, {half: t.shape for half, t in found.items()}
        if found.keys() == {""}:
            if shapes[""] == shape:
                self.whole[name] = found[""]
            else:
                self.problems.append(f"{name} is {list(shapes[''])}, must be {list(shape)}")
        elif found.keys() != {_A, _B}:
            missing = {_A, _B} - found.keys()
            problem = f"lacks {missing.pop()[1:]}" if missing else "is trained whole, too"
            self.problems.append(f"LoRA of {name} {problem}")
        elif len(shape) == 2 and shapes == {_A: (self._rank, shape[1]), _B: (shape[0], self._rank)}:
            self.pairs[name] = found[_A], found[_B]
        else:
            self.problems.append(
                f"LoRA of {name} is {list(shapes[_B])} times {list(shapes[_A])} with rank "
                f"{self._rank}, must give {list(shape)}"
            )
