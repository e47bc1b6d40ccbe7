"""Adapters: merged while a checkpoint is loaded, from folders and tars; wrong ones are refused."""

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import adapters, tiny
from xgenmm.__main__ import main
from xgenmm.checkpoints import adapter_files
from xgenmm.checkpoints.adapter import PREFIX, Adapter, read_adapter
from xgenmm.checkpoints.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from xgenmm.checkpoints.convert import convert
from xgenmm.checkpoints.loading import load_parameters
from xgenmm.checkpoints.registry import read_config
from xgenmm.config import INTERLEAVE
from xgenmm.errors import CheckpointError
from xgenmm.models.xgenmm import XGenMM

MODULE = "vlm.lang_model.model.layers.0.self_attn.o_proj"
A, B = f"{PREFIX}{MODULE}.lora_A.weight", f"{PREFIX}{MODULE}.lora_B.weight"
LATENTS = PREFIX + adapters.RESAMPLER


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("adapters") / "tiny")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return adapters.write(base.parent / "adapter", base)


def loaded(folder: Path, adapter: Adapter | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """The state of a model loaded from a folder, with an adapter if given."""
    with torch.device("meta"):
        model = XGenMM(read_config(folder))
    options = {"device": "cpu", "dtype": torch.float32, **options}
    load_parameters(model, folder, adapter=adapter, **options)
    return model.state_dict()


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(
    "options",
    [{}, {"quantize": "int8"}, {"quantize": "fp8"}, {"dtype": torch.bfloat16}],
    ids=["float32", "int8", "fp8", "bfloat16"],
)
def test_merged_while_loaded_equals_a_merged_checkpoint(
    options: dict[str, Any], base: Path, adapter: Path, tmp_path: Path
) -> None:
    assert main(["merge", str(base), str(adapter), "-o", str(tmp_path / "merged")]) == 0
    found = loaded(base, read_adapter(adapter, base), **options)
    assert_equal(found, loaded(tmp_path / "merged", **options))
    plain = loaded(base, **options)
    changed = {name for name in found if not torch.equal(found[name], plain[name])}
    assert {n for n in changed if not n.endswith(".scale")} == read_adapter(adapter, base).names


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "name", [f"Salesforce/{INTERLEAVE}", "xgen-mm-phi3-mini-instruct-multi-r-v1.5", "", None]
)
def test_adapter_from_peft_loads(
    name: str | None, base: Path, tmp_path: Path, *, rslora: bool
) -> None:
    folder = shutil.copytree(base, tmp_path / f"{INTERLEAVE}-bf16")
    model = XGenMM(read_config(folder))
    load_parameters(model, folder, device="cpu", dtype=torch.float32)
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "o_proj", "down_proj"],
        modules_to_save=["vision_tokenizer"],
        use_rslora=rslora,
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(str(tmp_path / "peft"))
    file = tmp_path / "peft" / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
    found = loaded(folder, read_adapter(tmp_path / "peft", folder))
    for key, expected in wrapped.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[key], expected, msg=key)


def test_names_without_the_parents_are_understood(base: Path, tmp_path: Path) -> None:
    content = adapters.tensors(base)
    for cut in ("vlm.", "vlm.lang_model."):
        short = {name.replace(cut, ""): tensor for name, tensor in content.items() if cut in name}
        found = read_adapter(adapters.write(tmp_path / cut, base, short), base)
        assert len(found.names) == len({name.split(".lora")[0] for name in short})


def test_base_is_known_after_it_was_renamed_or_converted(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    renamed = shutil.copytree(base, tmp_path / "renamed")
    for folder in (renamed, convert(renamed)):
        assert read_adapter(adapter, folder).digest() == read_adapter(adapter, base).digest()


def test_other_parameters_are_another_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "tiny")
    parameters = load_file(base / "model.safetensors")
    parameters[f"{MODULE}.weight"] *= 1.1
    save_file(parameters, other / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is for tiny, not for .*other parameters"):
        read_adapter(adapter, other)
    named = adapters.write(tmp_path / "named", base, fingerprinted=False)
    read_adapter(named, other)  # only the name is known
    with pytest.raises(CheckpointError, match="is for tiny, not for else"):
        read_adapter(named, other.rename(tmp_path / "else"))


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA', but should be 'LORA'"),
        ({"bias": "all"}, "bias is 'all', but should be 'none'"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"rank_pattern": {"o_proj": 2}}, "rank_pattern is {'o_proj': 2}"),
        ({"alpha_pattern": {"o_proj": 2}}, "alpha_pattern is"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"of_a_later_version": 3}, "of_a_later_version is 3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa"),
        ({"r": "4"}, "r is '4', but should be a valid integer"),
        ({"r": 0}, "r is 0, but should be greater than or equal to 1"),
        ({"r": None}, "rank None"),
        ({"r": 5}, "with rank 5"),
        ({"lora_alpha": None}, "r or lora_alpha is missing"),
    ],
    ids=str,
)
def test_configuration_is_refused(
    config: dict[str, Any], error: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"^adapter: .*{error}"):
        read_adapter(adapters.write(tmp_path / "a", base, **config), base)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def with_(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (without(A), rf"LoRA of {MODULE}.weight lacks lora_A.weight"),
        (without(B), rf"LoRA of {MODULE}.weight lacks lora_B.weight"),
        (with_(A, torch.ones(4, 33)), r"is \[32, 4\] times \[4, 33\] with rank 4, must give"),
        (with_(A, torch.ones(4)), r"times \[4\]"),
        (with_(LATENTS, torch.ones(5, 32)), r"latents is \[5, 32\], must be \[4, 32\]"),
        (
            with_(A.replace("o_proj", "q_proj"), torch.ones(4, 32)),
            "q_proj.lora_A.weight is not for",
        ),
        (with_(f"{PREFIX}x.lora_magnitude", torch.ones(4)), "x.lora_magnitude is not for any"),
        (with_(LATENTS.removeprefix(PREFIX), torch.ones(4, 32)), "latents is there twice"),
        (with_(f"{PREFIX}{MODULE}.weight", torch.ones(32, 32)), "is trained whole, too"),
        (with_(LATENTS, torch.ones(4, 32, dtype=torch.int32)), "has type torch.int32"),
        (with_(A, torch.full((4, 32), torch.nan)), "o_proj.lora_A.weight has infinities or NaN"),
        (dict.clear, "it has no tensors"),
    ],
)
def test_tensors_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None], error: str, base: Path, tmp_path: Path
) -> None:
    content = adapters.tensors(base)
    change(content)
    with pytest.raises(CheckpointError, match=f"^adapter: .*{error}"):
        read_adapter(adapters.write(tmp_path / "a", base, content), base)


@pytest.mark.parametrize(
    ("prefix", "mode"), [("", "w"), ("./", "w:gz"), ("adapter/", "w:gz"), ("./out/", "w")]
)
def test_tar_equals_its_folder(
    prefix: str, mode: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    with_others = shutil.copytree(adapter, tmp_path / "a")
    (with_others / "README.md").write_text("An adapter.")
    tar = adapters.pack(tmp_path / "a.tar", with_others, prefix, mode)
    assert_equal(loaded(base, read_adapter(tar, base)), loaded(base, read_adapter(adapter, base)))


def tar_of(*members: tuple[str, bytes | str]) -> bytes:
    """A tar of files, or links where the content is a path."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


HUGE = tarfile.TarInfo(WEIGHTS_FILE)
HUGE.size = 1 << 40


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "neither a folder nor a tar"),
        (b"not a tar at all" * 100, "neither a folder nor a tar"),
        (gzip.compress(b"not a tar at all" * 100), "neither a folder nor a tar"),
        (gzip.compress(bytes(10**6))[:-900], "neither a folder nor a tar"),
        (tar_of((f"../{CONFIG_FILE}", b"{}")), f"no {WEIGHTS_FILE} at its top"),
        (tar_of(("a/b/" + CONFIG_FILE, b"{}")), f"no {CONFIG_FILE} at its top"),
        (
            tar_of((CONFIG_FILE, b"{}"), (f"a/{CONFIG_FILE}", b"{}"), (WEIGHTS_FILE, b"")),
            f"more than one {CONFIG_FILE}",
        ),
        (tar_of((CONFIG_FILE, b"{}"), (f"a/{WEIGHTS_FILE}", b"")), "not in the same folder"),
        (tar_of((CONFIG_FILE, "/etc/passwd"), (WEIGHTS_FILE, b"")), f"{CONFIG_FILE} is a link"),
        (tar_of((CONFIG_FILE, b"{}"), (WEIGHTS_FILE, CONFIG_FILE)), f"{WEIGHTS_FILE} is a link"),
        (tar_of((CONFIG_FILE, b"{}"), (WEIGHTS_FILE, b"x" * 99)), "truncated or corrupt"),
        (tar_of((CONFIG_FILE, b"{}"), (WEIGHTS_FILE, b"x" * 9999))[:5000], "damaged"),
        (tar_of((CONFIG_FILE, b"{}")).rstrip(b"\0") + HUGE.tobuf(), "damaged"),
        (tar_of(*[(f"{n}", b"") for n in range(1001)]), "more than 1000 files"),
    ],
    ids=[
        *("empty", "no tar", "gzip of no tar", "cut gzip", "traversal", "too deep", "twice"),
        *("two places", "link out", "link", "corrupt", "cut", "huge", "many"),
    ],
)
def test_hostile_tars_are_refused(content: bytes, error: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=f"^adapter: {tmp_path}/a.tar.*{error}"):
        read_adapter(tmp_path / "a.tar", base)
    assert sorted(tmp_path.rglob("*")) == before


def test_decompression_is_bounded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_files, "MAX_TAR_BYTES", 10**7)
    bomb = tmp_path / "a.tar.gz"
    bomb.write_bytes(gzip.compress(tar_of(("zeros", bytes(2 * 10**7)))))
    with pytest.raises(CheckpointError, match=r"a.tar.gz: it has more than 10,000,000 bytes"):
        read_adapter(bomb, base)


def test_what_is_no_adapter_is_named(base: Path, tmp_path: Path) -> None:
    for path, error in (
        (base, "tiny is not an adapter: it has no adapter_config.json"),
        (tmp_path / "missing", "No such file or directory: '.*/missing'"),
        (Path("/dev/null"), "/dev/null is a device, but must be a regular file"),
    ):
        with pytest.raises(CheckpointError, match=f"^adapter: .*{error}"):
            read_adapter(path, base)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"r": 4}))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled files are never read"):
        read_adapter(tmp_path, base)
