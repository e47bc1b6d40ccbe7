"""Load hostile checkpoint folders, and count how many are refused clearly.

    python -m scripts.hostile.checkpoints            # a line for each class of case
    python -m scripts.hostile.checkpoints -v         # and one for each case that is not handled
    python -m scripts.hostile.checkpoints "index"    # only classes whose name contains this

Each case damages one file of a tiny checkpoint, loads it in a process of its own and asks a
question. It is refused if loading ends within 30 s, without much memory, with a CheckpointError
(or another ValueError or OSError that has a message). It is handled if that error also names the
file, and the field if a field is wrong, in at most a screen. A folder that is in order is handled
if it answers as the undamaged one does.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image

import xgenmm
from scripts.hostile.checkpoint_damage import Case, undamaged, write_undamaged
from scripts.hostile.checkpoint_files import headers, in_order, index, malformed_json, special_files
from scripts.hostile.checkpoint_values import (
    config_values,
    contradictions,
    preprocessor,
    tokenizer_entries,
    tokenizer_json,
    tokenizer_model,
)
from scripts.hostile.isolation import LONGEST_MESSAGE, Outcome, print_table, run

JSON_FILES = (
    "config.json",
    "preprocessor_config.json",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "model.safetensors.index.json",
)


def all_cases() -> Iterator[Case]:
    """Yield every case."""
    yield from config_values()
    yield from contradictions()
    yield from preprocessor()
    yield from tokenizer_entries()
    yield from tokenizer_json()
    yield from tokenizer_model()
    for name in (*JSON_FILES, "tokenizer.model", "model.safetensors"):
        yield from special_files(name)
    for name in JSON_FILES:
        yield from malformed_json(name)
    yield from index()
    yield from headers()
    yield from in_order()


def answer(folder: Path) -> str:
    """Load a checkpoint and answer one question about one image."""
    torch.set_num_threads(1)
    try:
        engine = xgenmm.load(folder, device="cpu", max_num_seqs=1, cache_bytes=64 << 20)
    except xgenmm.CheckpointError:
        raise
    except Exception as error:
        # Clear errors of other types count too, if they name the file.
        if not isinstance(error, ValueError | OSError):
            raise RuntimeError(f"at load: {type(error).__name__}") from error
        raise xgenmm.CheckpointError(str(error)) from error
    image = Image.new("RGB", (50, 40), "red")
    sampling = xgenmm.SamplingParams(max_new_tokens=4)
    try:
        return repr("".join(engine.stream(xgenmm.Request("aaa what?", [image], sampling=sampling))))
    except Exception as error:
        raise RuntimeError(f"at the question: {type(error).__name__}: {error}") from error


def run_case(case: Case, right: dict[bool, str]) -> tuple[bool, bool, Outcome]:
    """Run one case; return whether it was bounded and whether it was handled."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "checkpoint"
        shutil.copytree(undamaged(case.base), folder)
        case.damage(folder)
        outcome = run(partial(answer, folder))
    if not case.words:
        same = outcome.text == right[case.base]
        return same, same, outcome
    refused = (outcome.ended, outcome.kind) == ("raised", "CheckpointError")
    clear = all(word in outcome.text for word in case.words) and "\x1b" not in outcome.text
    return refused, refused and clear and len(outcome.text) <= LONGEST_MESSAGE, outcome


def main() -> int:
    """Run all cases and print the table; return 1 if one was not handled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("only", nargs="?", default="")
    parser.add_argument("-v", "--verbose", action="store_true")
    options = parser.parse_args()
    write_undamaged()
    undamaged_outcomes = {base: run(partial(answer, undamaged(base))) for base in (False, True)}
    if any(outcome.ended != "returned" for outcome in undamaged_outcomes.values()):
        raise RuntimeError(f"the undamaged checkpoints do not answer: {undamaged_outcomes}")
    right = {base: outcome.text for base, outcome in undamaged_outcomes.items()}
    cases = (case for case in all_cases() if options.only in case.group)
    results = ((case, *run_case(case, right)) for case in cases)
    return print_table(results, options.verbose)


if __name__ == "__main__":
    sys.exit(main())
