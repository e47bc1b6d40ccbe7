"""The files that Cog reads: openapi.json agrees with predict.py, cog.yaml and the pins are valid.

`openapi.json` is the output of Cog's own generator for predict.py, which `cog build` writes to
`.cog/openapi_schema.json`; `openapi-finetune.json` is that for finetune.py.
`tests/data/cog-yaml-schema.json` is Cog's schema of cog.yaml (from pkg/config/data in its
repository).
"""

import ast
import inspect
import json
import re
import types
import typing
from typing import Any

import cog
import jsonschema
import pytest
import yaml

import finetune
import predict
from finetune import BASES, Finetuner
from predict import Predictor
from serving.settings import DEFAULT_MODEL
from tests.support.paths import ROOT
from xgenmm.checkpoints.registry import releases
from xgenmm.engine.sampling_params import LIMITS, SamplingParams
from xgenmm.finetuning.training import TrainingSettings
from xgenmm.preprocessing.prompts import DEFAULT_SYSTEM_PROMPT

SCHEMA = json.loads((ROOT / "openapi.json").read_text())
INPUTS: dict[str, dict[str, Any]] = SCHEMA["components"]["schemas"]["Input"]["properties"]
FINETUNE_SCHEMA = json.loads((ROOT / "openapi-finetune.json").read_text())
FINETUNE_INPUTS: dict[str, dict[str, Any]] = FINETUNE_SCHEMA["components"]["schemas"]["Input"][
    "properties"
]


def parameters(server: type[cog.BasePredictor]) -> dict[str, inspect.Parameter]:
    """The parameters of `predict`."""
    found = inspect.signature(server.predict).parameters
    return {name: parameter for name, parameter in found.items() if name != "self"}


def source_types(module: types.ModuleType) -> dict[str, Any]:
    """Types of `predict`'s parameters as the source has them, which is what `cog build` reads."""
    return {
        argument.arg: eval(ast.unparse(argument.annotation), vars(module))
        for function in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        and function.name == "predict"
        for argument in function.args.args
        if argument.annotation
    }


PARAMETERS = parameters(Predictor)
JSON_TYPES = {str: "string", cog.Path: "string", int: "integer", float: "number", dict: "object"}


def json_type(annotation: Any) -> dict[str, Any]:
    """The JSON schema that Cog's generator produces for a type used in predict.py."""
    if isinstance(annotation, types.UnionType):
        (given,) = (kind for kind in typing.get_args(annotation) if kind is not types.NoneType)
        return json_type(given) | {"nullable": True}
    if typing.get_origin(annotation) is list:
        return {"type": "array", "items": json_type(typing.get_args(annotation)[0])}
    kind = typing.get_origin(annotation) or annotation
    return {"type": JSON_TYPES[kind]} | ({"format": "uri"} if kind is cog.Path else {})


def test_schema_has_the_inputs_in_order() -> None:
    order = sorted(INPUTS, key=lambda name: int(INPUTS[name]["x-order"]))
    assert order == list(PARAMETERS)
    order = sorted(FINETUNE_INPUTS, key=lambda name: int(FINETUNE_INPUTS[name]["x-order"]))
    assert order == list(parameters(Finetuner))
    order = list(PARAMETERS)
    assert order[:4] == ["image", "images", "video", "question"]
    assert "required" not in SCHEMA["components"]["schemas"]["Input"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_schema_agrees_with_predict(name: str) -> None:
    assert_agrees(predict, Predictor, name, INPUTS[name])


@pytest.mark.parametrize("name", parameters(Finetuner))
def test_schema_agrees_with_finetune(name: str) -> None:
    if name == "base":
        assert tuple(FINETUNE_SCHEMA["components"]["schemas"]["base"]["enum"]) == BASES
        assert FINETUNE_INPUTS[name]["default"] == DEFAULT_MODEL
    else:
        assert_agrees(finetune, Finetuner, name, FINETUNE_INPUTS[name])


def assert_agrees(
    module: types.ModuleType, server: type[cog.BasePredictor], name: str, given: dict[str, Any]
) -> None:
    """Assert that the schema of an input is what Cog's generator makes of the parameter."""
    field = parameters(server)[name].default
    expected = json_type(source_types(module)[name]) | {
        "description": field.description,
        "title": name.replace("_", " ").title(),
        "x-order": list(parameters(server)).index(name),
    }
    if name != "dataset":  # the only input that is required
        expected["default"] = field.default
    optional = {"minimum": field.ge, "maximum": field.le, "x-cog-accept": field.accept}
    expected |= {key: value for key, value in optional.items() if value is not None}
    assert given == expected


@pytest.mark.parametrize("name", [name for name in LIMITS if name != "seed"])
def test_schema_has_the_limits_of_the_library(name: str) -> None:
    assert (INPUTS[name]["minimum"], INPUTS[name]["maximum"]) == LIMITS[name]
    assert INPUTS[name]["default"] == getattr(SamplingParams(), name)


def test_schema_shows_the_trained_system_prompt() -> None:
    assert INPUTS["system_prompt"]["default"] == DEFAULT_SYSTEM_PROMPT


def test_output_is_streamed_text() -> None:
    assert SCHEMA["components"]["schemas"]["Output"]["x-cog-array-display"] == "concatenate"
    assert SCHEMA["paths"]["/predictions"]["post"]["x-cog-streaming"] is True
    assert FINETUNE_SCHEMA["paths"]["/predictions"]["post"]["x-cog-streaming"] is True


@pytest.mark.parametrize(
    ("file", "schema", "server"),
    [
        ("cog.yaml", SCHEMA, "predict.py:Predictor"),
        ("cog-finetune.yaml", FINETUNE_SCHEMA, "finetune.py:Finetuner"),
    ],
)
def test_cog_yaml_is_valid(file: str, schema: dict[str, Any], server: str) -> None:
    config = yaml.safe_load((ROOT / file).read_text())
    jsonschema.validate(
        config, json.loads((ROOT / "tests" / "data" / "cog-yaml-schema.json").read_text())
    )
    assert config["predict"] == server
    assert config["build"]["sdk_version"] == pins()["cog"] == schema["info"]["version"]
    assert config["build"]["run"][-1].endswith(f" coglet=={pins()['coglet']}")
    assert (ROOT / config["build"]["python_requirements"]).is_file()


def test_image_serves_the_default_model() -> None:
    config = yaml.safe_load((ROOT / "cog.yaml").read_text())
    assert config["environment"] == [f"XGENMM_MODEL={DEFAULT_MODEL}"]


def test_bases_are_the_checkpoints_whose_training_gives_an_adapter() -> None:
    trainable = {name for name in releases() if "-instruct-" in name and "-v1.5" in name}
    assert set(BASES) == trainable | {"demo"}


def test_defaults_of_training_are_those_of_the_command() -> None:
    defaults = TrainingSettings()
    found = {name: parameter.default.default for name, parameter in parameters(Finetuner).items()}
    assert found["lora_rank"] == defaults.target.rank
    for name in ("learning_rate", "epochs", "batch_size", "seed"):
        assert found[name] == getattr(defaults, name), name


def test_local_server_has_the_maximum_concurrency_of_the_image() -> None:
    at_once = vars(Predictor.predict)["__cog_concurrent_max__"]
    assert f"folder=. at_once={at_once} ;;" in (ROOT / "scripts" / "serve").read_text()


def test_default_model_is_a_known_release() -> None:
    assert DEFAULT_MODEL in releases()


def pins() -> dict[str, str]:
    """The exact version of each package in the requirements files of .venv."""
    found = {}
    for name in ("requirements.txt", "requirements-data.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line.startswith(("#", "-r requirements")):
                continue
            pin = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?==([\w.]+)", line)
            assert pin, f"{name}: {line!r} is not an exact pin"
            found[pin[1]] = pin[2]
    return found


def test_requirements_are_exact_and_complete() -> None:
    needed = {"cog", "torch", "transformers", "open-clip-torch", "einops", "einops-exts"}
    assert needed | {"pillow", "huggingface-hub"} <= pins().keys()
