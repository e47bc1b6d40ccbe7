"""Fill in the form at random, as cog-safe-push does, and count the errors.

    python -m scripts.hostile.form                       # all inputs
    python -m scripts.hostile.form --config              # as cog-safe-push.yaml says
    python -m scripts.hostile.form --package CHECKOUT    # the server of another checkout

Each request is valid input by input. As for cog-safe-push, a failed prediction and an empty output
are errors.
"""

import argparse
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import httpx
import yaml

from tests.support.form_inputs import form_inputs
from tests.support.paths import ROOT
from tests.support.server import LocalServer, serving

SECONDS = 120.0


def problem(server: LocalServer, inputs: dict[str, Any]) -> str:
    """What cog-safe-push would report about a request, or an empty text."""
    response = httpx.post(f"{server.url}/predictions", json={"input": inputs}, timeout=SECONDS)
    if response.is_error:
        return response.text
    prediction = response.json()
    if prediction["status"] != "succeeded":
        return str(prediction["error"])
    return "" if "".join(prediction["output"]) else "no output"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", action="store_true")
    parser.add_argument("--package", type=Path, default=ROOT, metavar="CHECKOUT")
    arguments = parser.parse_args()
    fuzz: dict[str, Any] = {}
    if arguments.config:
        config = yaml.safe_load((ROOT / "cog-safe-push.yaml").read_text())
        fuzz = config["predict"]["fuzz"]
    random = Random(arguments.seed)
    problems: Counter[str] = Counter()
    with serving({"XGENMM_MODEL": "demo"}, root=arguments.package.resolve()) as server:
        server.wait_ready(SECONDS)
        for _ in range(arguments.cases):
            inputs = form_inputs(random, fuzz.get("fixed_inputs"), fuzz.get("disabled_inputs", ()))
            if message := problem(server, inputs):
                problems[message] += 1
    for message, count in problems.most_common():
        print(f"{count:4}  {message}")
    print(f"{problems.total()} of {arguments.cases} requests ended with an error")


if __name__ == "__main__":
    main()
