"""The part `choices`: answers restricted to choices, and answers that follow a JSON Schema."""

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jsonschema

import xgenmm
from scripts.benchmarks.report import Options, Row
from scripts.benchmarks.schemas import SCHEMAS, SHAPE_NAMES
from scripts.demo_model.evaluation_set import Case, evaluation_groups
from scripts.demo_model.scene import COLORS, KINDS
from xgenmm import Engine, Request, SamplingParams

logger = logging.getLogger(__name__)

MAX_NUM_SEQS = 16
POSSIBLE: Mapping[str, Sequence[tuple[str, ...]]] = {
    "color": (COLORS,),
    "shape": (KINDS,),
    "count": (tuple("01234"),),
    "existence": (("yes", "no"),),
    "place": ((*SHAPE_NAMES, "sign", "nothing"),),
    "pair": (("yes", "no"), ("first", "second")),
}
"""All possible answers by kind of question; `pair` questions have two forms."""


def choices(options: Options) -> list[Row]:
    """Measure the demo checkpoint on its evaluation set."""
    engine = xgenmm.load("demo", device="cpu", max_num_seqs=MAX_NUM_SEQS)
    groups = evaluation_groups(options.scenes)
    rows = _accuracy(engine, groups) + _validity(engine, groups, options.requests or 500)
    engine.close()
    return rows


def _accuracy(engine: Engine, groups: Sequence[Sequence[Case]]) -> list[Row]:
    """How often the answer is right with `choices`, and how often without."""

    def ask(group: Sequence[Case]) -> list[tuple[str, bool, bool]]:
        images, results = group[0].images, []
        for case in group:
            if case.kind in POSSIBLE:
                possible = next(each for each in POSSIBLE[case.kind] if case.answer in each)
                free = Request(case.question, images)
                chosen = engine.stream(replace(free, choices=possible)).text()
                free_text = engine.stream(free).text().lower()
                results.append((case.kind, chosen == case.answer, free_text == case.answer))
        return results

    right: dict[str, list[tuple[bool, bool]]] = {kind: [] for kind in POSSIBLE}
    with ThreadPoolExecutor(engine.max_num_seqs) as pool:
        for results in pool.map(ask, groups):
            for kind, chosen_right, free_right in results:
                right[kind].append((chosen_right, free_right))
    right["all"] = [pair for pairs in right.values() for pair in pairs]
    rows = []
    for kind, pairs in right.items():
        chosen, free = (100 * sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        what = f"{kind}: right by choices ({len(pairs)} questions; free answers {free:.1f} %)"
        rows.append(Row("choices", what, chosen, "%", at_least=free if kind == "all" else None))
    return rows


def _validity(engine: Engine, groups: Sequence[Sequence[Case]], requests: int) -> list[Row]:
    """How many answers follow their JSON Schema."""

    def is_valid(number: int) -> bool:
        schema, group = SCHEMAS[number % len(SCHEMAS)], groups[number % len(groups)]
        case = group[number % len(group)]
        sampling = SamplingParams(temperature=number % 2, seed=number)
        request = Request(case.question, case.images, sampling=sampling, json_schema=schema)
        text = engine.stream(request).text()
        try:
            valid = jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
        except ValueError:
            valid = False
        if not valid:
            logger.warning("%r does not follow %s", text, schema)
        return valid

    with ThreadPoolExecutor(engine.max_num_seqs) as pool:
        valid = list(pool.map(is_valid, range(requests)))
    what = f"JSON answers valid: {sum(valid)} of {len(valid)}, {len(SCHEMAS)} schemas"
    return [Row("choices", what, 100 * sum(valid) / len(valid), "%", at_least=100)]
