"""The entry point of lmms-eval, group `lmms_eval.models`: names the classes, imports no PyTorch."""

from typing import Any


def manifest() -> Any:
    """Return the `ModelManifest` of `--model xgenmm`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "xgenmm.evaluation.lmms_eval_models"
    return ModelManifest(
        "xgenmm", simple_class_path=f"{module}.SimpleModel", chat_class_path=f"{module}.ChatModel"
    )
