"""Parameters are loaded from a folder completely or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from xgenmm.checkpoints import loading as checkpoint
from xgenmm.checkpoints.loading import load_parameters
from xgenmm.errors import CheckpointError


class Model(nn.Module):
    """A model with a scalar parameter, a persistent integer buffer and a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def meta_model() -> Model:
    with torch.device("meta"):
        return Model()


def random_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "linear.weight": torch.randn(5, 3),
        "linear.bias": torch.randn(5),
        "scale": torch.randn(()),
        "steps": torch.tensor([3, 2**40]),
    }


def write_shards(folder: Path, state: dict[str, torch.Tensor], count: int, index: bool) -> None:
    names = sorted(state)
    places: dict[str, str] = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        save_file({name: state[name] for name in names[i::count]}, folder / file)
        places |= dict.fromkeys(names[i::count], file)
    if index:
        (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_every_layout_and_dtype_is_read_and_cast(
    tmp_path: Path, wanted: torch.dtype, stored: torch.dtype, count: int, index: bool
) -> None:
    state = random_state()
    kept = {n: t.to(stored) if t.is_floating_point() else t for n, t in state.items()}
    write_shards(tmp_path, kept, count, index)
    model = meta_model()
    load_parameters(model, tmp_path, device="cpu", dtype=wanted)
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in kept.items():
        expected = tensor.to(wanted) if tensor.is_floating_point() else tensor
        assert loaded[name].dtype == expected.dtype
        assert torch.equal(loaded[name], expected)
    assert isinstance(model.linear.weight, nn.Parameter)


def test_tensor_larger_than_the_buffer_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "BUFFER_BYTES", 64)
    state = {"weight": torch.randn(7, 11), "bias": torch.randn(7)}
    save_file(state, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = nn.Linear(11, 7)
    load_parameters(model, tmp_path, device="cpu", dtype=torch.float32)
    assert torch.equal(model.weight, state["weight"])
    assert torch.equal(model.bias, state["bias"])


def test_non_persistent_buffer_is_unchanged(tmp_path: Path) -> None:
    write_shards(tmp_path, random_state(), 1, index=False)
    model = Model()
    load_parameters(model, tmp_path, device="cpu", dtype=torch.float32)
    assert torch.equal(model.get_buffer("table"), torch.arange(4.0))


def test_loaded_parameters_do_not_depend_on_the_file(tmp_path: Path) -> None:
    state = random_state()
    write_shards(tmp_path, state, 1, index=False)
    model = meta_model()
    load_parameters(model, tmp_path, device="cpu", dtype=torch.float32)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"")
    assert torch.equal(model.linear.weight, state["linear.weight"])


def test_one_error_names_every_mismatch(tmp_path: Path) -> None:
    save_file(
        {
            "linear.weight": torch.zeros(3, 5),
            "head.bias": torch.zeros(2),
            "head.weight": torch.zeros(2, 1),
            "steps": torch.zeros(2),
        },
        tmp_path / "model.safetensors",
    )
    model = meta_model()
    with pytest.raises(CheckpointError) as error:
        load_parameters(model, tmp_path, device="cpu", dtype=torch.float32)
    for line in (
        "missing (2): linear.bias [5]; scale []",
        "unexpected (2): head.bias [2]; head.weight [2, 1]",
        "mis-shaped (1): linear.weight [3, 5], must be [5, 3]",
        "mis-typed (1): steps torch.float32, must be like torch.int64",
    ):
        assert line in str(error.value)
    assert model.linear.weight.is_meta


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_truncated_file_is_named_in_the_error(tmp_path: Path, keep: int) -> None:
    write_shards(tmp_path, random_state(), 2, index=True)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is truncated or"):
        load_parameters(meta_model(), tmp_path, device="cpu", dtype=torch.float32)


def test_missing_shard_is_named_in_the_error(tmp_path: Path) -> None:
    write_shards(tmp_path, random_state(), 3, index=True)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003\.safetensors"):
        load_parameters(meta_model(), tmp_path, device="cpu", dtype=torch.float32)


def test_index_that_contradicts_the_files_is_rejected(tmp_path: Path) -> None:
    write_shards(tmp_path, random_state(), 2, index=True)
    index = json.loads((tmp_path / checkpoint.INDEX).read_text())
    index["weight_map"]["scale"] = index["weight_map"]["linear.weight"]
    index["weight_map"]["linear.weight"] = index["weight_map"]["linear.bias"]
    (tmp_path / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"disagree on where these are: linear\.weight"):
        load_parameters(meta_model(), tmp_path, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not valid JSON"),
        ("{}", "weight_map is missing"),
        ('{"weight_map": ["a"]}', r"weight_map is \['a'\], but should be an object"),
        ('{"weight_map": {"scale": "../model.safetensors"}}', "should be a .* beside the index"),
        ('{"weight_map": {"scale": "model.bin"}}', "should be a .* beside the index"),
    ],
)
def test_malformed_index_is_rejected(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / checkpoint.INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        load_parameters(meta_model(), tmp_path, device="cpu", dtype=torch.float32)


def test_tensor_in_two_files_is_rejected(tmp_path: Path) -> None:
    for file in ("a.safetensors", "b.safetensors"):
        save_file(random_state(), tmp_path / file)
    with pytest.raises(CheckpointError, match=r"b\.safetensors: .* is also in a\.safetensors"):
        load_parameters(meta_model(), tmp_path, device="cpu", dtype=torch.float32)


def test_unsupported_dtype_is_rejected(tmp_path: Path) -> None:
    save_file({"scale": torch.zeros((), dtype=torch.float8_e4m3fn)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"m\.safetensors has tensors of type F8_E4M3"):
        load_parameters(meta_model(), tmp_path, device="cpu", dtype=torch.float32)


def test_pickled_files_are_never_read(tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"never read: pytorch_model\.bin"):
        load_parameters(meta_model(), tmp_path, device="cpu", dtype=torch.float32)


MEASURE = """
import sys
from pathlib import Path
import torch
from torch import nn
from xgenmm.checkpoints.loading import load_parameters

def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

with torch.device("meta"):
    model = nn.Sequential(nn.Embedding(40_000, 1_000), *(nn.Linear(2_000, 5_000) for _ in range(4)))
torch.zeros(8).to(torch.bfloat16)
before = status("VmRSS")
load_parameters(model, Path(sys.argv[1]), device="cpu", dtype=torch.bfloat16)
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""


def test_peak_memory_is_little_more_than_the_result(tmp_path: Path) -> None:
    """Peak resident memory, mapped files included, of loading 320 MB of float32 as bfloat16."""
    state = {"0.weight": torch.randn(40_000, 1_000)}
    for i in range(1, 5):
        state |= {f"{i}.weight": torch.randn(5_000, 2_000), f"{i}.bias": torch.randn(5_000)}
    write_shards(tmp_path, state, 2, index=True)
    del state
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], check=True, capture_output=True, text=True
    ).stdout
    growth, result = map(int, output.split())
    assert result > 160e6
    assert growth < result + 40e6
