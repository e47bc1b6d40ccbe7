"""Preprocessing runs in processes that do not load PyTorch."""

import pkgutil
import subprocess
import sys

from xgenmm import preprocessing


def test_preprocessing_does_not_import_torch() -> None:
    modules = [
        f"xgenmm.preprocessing.{m.name}" for m in pkgutil.iter_modules(preprocessing.__path__)
    ]
    assert "xgenmm.preprocessing.tokenizer" in modules
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
