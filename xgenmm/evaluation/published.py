"""The authors' published results, and the tables that compare measured ones with them.

`published.json` has the numbers of the model cards, and for each benchmark the task and metrics of
lmms-eval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from xgenmm.files import read_json_object

PATH = Path(__file__).with_name("published.json")
HEADS = ("published", "measured", "difference")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark in lmms-eval.

    metrics: which add up to the result. highest: what is 100 in the tables; None for results that
        are no shares. fewshot: further arguments of the model for prompts with examples. note: the
        name of a note below the table. needs_setup: whether the task fails unless one follows it.
    """

    name: str
    task: str
    metrics: Sequence[str]
    highest: float | None = None
    fewshot: str = ""
    note: str = ""
    needs_setup: bool = False

    def result(self, metrics: Mapping[str, float]) -> float:
        """The result in the units of the tables, from metrics by name.

        Raises KeyError if one is missing.
        """
        total = sum(metrics[name] for name in self.metrics)
        return total if self.highest is None else 100 * total / self.highest


class Cell(NamedTuple):
    """What a result is of: a model, the examples in its prompts, and the name of a benchmark."""

    model: str
    fewshot: int
    benchmark: str


@dataclass(frozen=True)
class Column:
    """A model of a table. name: in its heads, empty for the only one. fewshot: examples."""

    model: str
    name: str = ""
    fewshot: int = 0

    def cell(self, benchmark: Benchmark) -> Cell:
        """The cell of a benchmark."""
        return Cell(self.model, self.fewshot, benchmark.name)


@dataclass(frozen=True)
class Table:
    """Published results of some models: a row for each benchmark, a number for each column."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[tuple[Benchmark, Sequence[float]]]
    notes: Mapping[str, str] = field(default_factory=dict)


def published_tables() -> list[Table]:
    """Read the published results."""
    content = read_json_object(PATH)
    benchmarks = {name: Benchmark(name, **fields) for name, fields in content["benchmarks"].items()}
    return [
        Table(
            table["title"],
            [Column(**column) for column in table["columns"]],
            [(benchmarks[name], numbers) for name, *numbers in table["rows"]],
            content["notes"],
        )
        for table in content["tables"]
    ]


def markdown(tables: Sequence[Table], measured: Mapping[Cell, float]) -> str:
    """Write the tables with the measured results. What is missing stays empty."""
    return "\n".join(_table(table, measured) for table in tables)


def _table(table: Table, measured: Mapping[Cell, float]) -> str:
    heads = ["benchmark", "task: metric"]
    for column in table.columns:
        heads += [f"{column.name} {head}".strip() for head in HEADS]
    lines = [f"### {table.title}", "", _row(heads), _row(["---"] * len(heads))]
    marks: dict[str, str] = {}
    for benchmark, numbers in table.rows:
        if benchmark.note:
            marks.setdefault(benchmark.note, str(len(marks) + 1))
        mark = f" ({marks[benchmark.note]})" if benchmark.note else ""
        cells = [benchmark.name + mark, f"`{benchmark.task}`: {' + '.join(benchmark.metrics)}"]
        for column, published in zip(table.columns, numbers, strict=True):
            cells += _cells(published, measured.get(column.cell(benchmark)))
        lines.append(_row(cells))
    if marks:
        lines += ["", *(f"({mark}) {table.notes[note]}" for note, mark in marks.items())]
    return "\n".join([*lines, "", "```", *_commands(table), "```", ""])


def _cells(published: float, result: float | None) -> list[str]:
    digits = 0 if isinstance(published, int) else 1
    known = [f"{published:.{digits}f}"]
    if result is None:
        return [*known, "", ""]
    return [*known, f"{result:.{digits}f}", f"{result - published:+.{digits}f}"]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _commands(table: Table) -> list[str]:
    """The commands that measure a table; one for all benchmarks that take equal arguments."""
    tasks: dict[tuple[str, bool], list[str]] = {}
    for column in table.columns:
        for benchmark, _ in table.rows:
            arguments = f"pretrained={column.model}"
            if column.fewshot:
                arguments += f",fewshot={column.fewshot},{benchmark.fewshot}".rstrip(",")
            asked = tasks.setdefault((arguments, benchmark.needs_setup), [])
            if benchmark.task not in asked:
                asked.append(benchmark.task)
    return [
        "lmms-eval --model xgenmm --output_path results "
        f"--model_args {arguments} --tasks {','.join(asked)}"
        for (arguments, _), asked in tasks.items()
    ]
