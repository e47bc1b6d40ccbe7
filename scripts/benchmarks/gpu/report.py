"""The tables of docs/benchmarks.md from the output of a run, whole or cut short."""

from collections.abc import Iterable

from scripts.benchmarks.gpu.figures import GOALS, Record
from scripts.benchmarks.gpu.run import STAGES, row
from scripts.benchmarks.report import HEAD, Row


def report(records: Iterable[Record]) -> str:
    """Markdown: the machine, a table of all figures, and why others are missing.

    A figure with a goal that was not measured has a row that says so.
    """
    machines = []
    figures: dict[str, list[Record]] = {stage.name: [] for stage in STAGES}
    reasons = {stage.name: "not run" for stage in STAGES}
    for record in records:
        if "machine" in record:
            machines.append(record["machine"])
            continue
        stage = record["stage"]
        if "value" in record:
            figures[stage].append(record)
            reasons[stage] = "cut short"
        elif "seconds" not in record:
            reasons[stage] = record.get("error") or record["skipped"]
        elif figures[stage]:  # else it was skipped
            reasons[stage] = ""
    lines = [f"{machine}\n" for machine in dict.fromkeys(machines)] + [HEAD]
    for stage in STAGES:
        lines += map(str, map(row, figures[stage.name]))
        measured = {record["measured"] for record in figures[stage.name]}
        for (name, what), goal in GOALS.items():
            if name == stage.name and what not in measured:
                unmeasured = Row(name, what, None, goal.unit, goal.at_least, goal.at_most)
                lines.append(str(unmeasured))
    missing = [f"- {stage}: {reason}" for stage, reason in reasons.items() if reason]
    return "\n".join([*lines, *(["", "Stages that did not finish:", *missing] if missing else [])])
