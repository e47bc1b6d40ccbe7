"""Ask for answers by hostile JSON Schemas, and count how many are handled.

    python -m scripts.hostile.schemas              # a line for each class of case
    python -m scripts.hostile.schemas -v           # and one for each case that is not handled
    python -m scripts.hostile.schemas -vv size     # all cases of the classes with this name

Each case runs in a process of its own: it compiles the schema in a thread with the stack of one of
Cog's, samples up to 150 tokens at random and checks the document. It is handled if that ends in
time, with bounded memory, and either the schema is refused with an InputError that says why, in at
most a screen, or all that was generated follows the schema. A few ordinary schemas, of up to 64 kB,
have to be answered.
"""

import argparse
import json
import re
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for

from scripts.hostile.isolation import LONGEST_MESSAGE, Outcome, run
from scripts.hostile.schema_cases import Case, all_cases
from xgenmm.checkpoints.registry import read_config
from xgenmm.engine.structured_output import GrammarCompiler
from xgenmm.errors import InputError
from xgenmm.preprocessing.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parents[2] / "weights" / "demo"
SECONDS = 60.0
STACK_BYTES = 3 << 19  # of Cog's 2 MB; with it, a case overflows it where it does in Cog's worker
MAX_TOKENS = 150
SLOWEST_MASK = 0.1  # seconds


class Compiler:
    """The demo's vocabulary, and a compiler that each case builds for itself."""

    def __init__(self) -> None:
        config = read_config(DEMO)
        text = config.text
        self.tokenizer = Tokenizer.from_folder(DEMO, text.convention, config.additional_ids)
        self.vocab = config.decoder.initial_vocab + config.decoder.additional_tokens
        self.end_ids = {self.tokenizer.id(token) for token in text.stop_tokens}

    def build(self) -> GrammarCompiler:
        """A compiler without anything in its caches."""
        return GrammarCompiler(self.tokenizer, self.end_ids, self.vocab)


def answer(compiler: Compiler, case: Case) -> str:
    """Compile, sample and check; returns a line about the document as JSON."""
    grammars = compiler.build()
    started = time.monotonic()
    grammar = grammars.compile(case.schema)
    compiled = time.monotonic() - started
    generator, ids, slowest = torch.Generator().manual_seed(0), list[int](), 0.0
    finished = False
    while len(ids) < MAX_TOKENS and not finished:
        started = time.monotonic()
        allowed = grammar.mask()
        slowest = max(slowest, time.monotonic() - started)
        scores = 3 * torch.randn(compiler.vocab, generator=generator)
        token = int(scores.masked_fill(~allowed, -torch.inf).argmax())
        finished = token in compiler.end_ids
        if not finished:
            started = time.monotonic()
            grammar.advance(token)
            slowest = max(slowest, time.monotonic() - started)
            ids.append(token)
            finished = grammar.finished
    text = compiler.tokenizer.decode(ids)
    wrong = _violation(text, case.schema) if finished and case.checked else ""
    return json.dumps({"wrong": wrong, "text": text[:60], "compile": compiled, "mask": slowest})


def _violation(text: str, schema: Any) -> str:
    """How a document breaks its schema; empty if it does not, or jsonschema cannot tell."""
    validator = validator_for(schema, default=Draft202012Validator)(schema)
    try:
        return str(best_match(validator.iter_errors(json.loads(text))) or "")[:200]
    except re.error:  # Python's patterns lack some that are valid
        return ""
    except ValueError as error:
        return f"not JSON: {error}"


def _in_small_stack(compiler: Compiler, case: Case) -> str:
    """Run `answer` in a thread with a stack like those of Cog's."""
    results: list[str | BaseException] = []

    def work() -> None:
        try:
            results.append(answer(compiler, case))
        except BaseException as error:
            results.append(error)

    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def problem(case: Case, outcome: Outcome) -> str:
    """What was wrong with an outcome; empty if the case was handled."""
    if outcome.ended == "raised" and outcome.kind == InputError.__name__:
        if case.expected == "answer":
            return "must be answered"
        if len(outcome.text) > LONGEST_MESSAGE:
            return f"a message of {len(outcome.text)} characters"
        return "" if outcome.text.startswith("json_schema: ") else "the message names no input"
    if outcome.ended != "returned":
        return "no InputError"
    if case.expected == "refuse":
        return "must be refused"
    result = json.loads(outcome.text)
    if result["wrong"]:
        return "does not follow the schema"
    return f"a mask of {result['mask']:.2f} s" if result["mask"] > SLOWEST_MASK else ""


def main() -> int:
    """Run all cases and print the table; return 1 if one was not handled."""
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("only", nargs="?", default="")
    parser.add_argument("-v", "--verbose", action="count", default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    compiler = Compiler()
    counts: dict[str, list[float]] = {}
    for case in all_cases():
        if options.only not in case.group:
            continue
        started = time.monotonic()
        outcome = run(partial(_in_small_stack, compiler, case), SECONDS)
        seconds = time.monotonic() - started
        wrong = problem(case, outcome)
        crashed = outcome.ended == "stopped"
        count = counts.setdefault(case.group, [0, 0, 0, 0])
        new = [count[0] + 1, count[1] + (not crashed), count[2] + (not wrong)]
        counts[case.group] = [*new, max(count[3], seconds)]
        if options.verbose > 1 or (wrong and options.verbose):
            print(f"  {case.group}: {case.name}: {wrong or 'handled'}: {seconds:.1f} s, {outcome}")
            sys.stdout.flush()
    columns = list(zip(*counts.values(), strict=True))
    counts["all"] = [*map(sum, columns[:3]), max(columns[3])]
    print(f"{'class':<30}{'cases':>7}{'survived':>10}{'handled':>9}{'longest':>10}")
    for group, (cases, survived, handled, longest) in counts.items():
        print(f"{group:<30}{cases:>7}{survived:>10}{handled:>9}{longest:>8.1f} s")
    return int(counts["all"][0] != counts["all"][2])


if __name__ == "__main__":
    sys.exit(main())
