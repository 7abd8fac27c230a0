"""Numbers as text: the metrics in columns, each beside what it has to be compared with.

`order` has the names of all metrics in the order in which all tables show them (`METRICS` of eval.py). Nothing is computed
here, and everything that is printed is in metrics.json as well.
"""

from lib import published
from lib.terminal import printable
from rewards import WHY_UNREADABLE


def print_table(order: tuple[str, ...], columns: dict[str, dict], title: str = "",
                intervals: dict[str, list[float]] | None = None) -> None:
    """One row a metric, one column an evaluation; what an evaluation does not have is a dash, or no column at all.

    `intervals` are those of the first column and stand behind it.
    """
    names = [name for name in order if any(name in column for column in columns.values())]
    columns = {key: column for key, column in columns.items() if any("/" in name for name in column)}
    cells = {key: {name: f"{column[name]:.3f}" for name in names if column.get(name) is not None}
             for key, column in columns.items()}
    if intervals:
        first, *others = cells.items()
        cells = dict([first, ("95 %", {name: in_brackets(interval) for name, interval in intervals.items()}), *others])
    width = 2 + max([len(key) for key in cells] + [len(cell) for column in cells.values() for cell in column.values()],
                    default=0)
    print(f"\n{title:24}" + "".join(f"{key:>{width}}" for key in cells))
    for name in names:
        print(f"{name:24}" + "".join(f"{column.get(name, '-'):>{width}}" for column in cells.values()))


def in_brackets(interval: list[float]) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def print_rows(title: str, names: list[str], rows: list[tuple[str, dict, str]]) -> None:
    """The other way round: one row an evaluation (its name, its metrics, a remark), one column a metric."""
    width = 2 + max(map(len, [title, *(row[0] for row in rows)]))
    print(f"\n{title:{width}}" + "".join(f"{name.split('/')[-1]:>10}" for name in names))
    for row, metrics, remark in rows:
        cells = ["-" if metrics.get(name) is None else f"{metrics[name]:.3f}" if name != "n" else f"{metrics[name]}"
                 for name in names]
        print((f"{row:{width}}" + "".join(f"{cell:>10}" for cell in cells) + f"  {remark}").rstrip())


def print_categories(order: tuple[str, ...], tables: dict[str, dict]) -> None:
    for task, table in tables.items():
        names = [name for name in order if any(name in row for row in table.values())]
        print_rows(f"{task} by category", [*names, "blind", "n"], [(printable(category), row, "") for category, row in table.items()])


def print_published(order: tuple[str, ...], benchmark: str, metrics: dict) -> None:
    rows = published.rows_of(benchmark)
    names = [name for name in order if any(name in row.values for row in rows)]
    print_rows(f"published: {benchmark}", names, [("this model", metrics, "")] + [
        (row.model, row.values, row.source + (f"; {row.note}" if row.note else "")) for row in rows])


NOT_ASKED = {"unreadable_video": "the video cannot be read", "prompt_too_long": "longer than --max_prompt_tokens",
             "truncated": "cut at --max_new_tokens"}


def print_reasons(reasons: dict[str, int]) -> None:
    """How many completions scored in full, and why the others did not."""
    print(f"\n{'completions by reason':24}")
    for reason, count in reasons.items():
        print(f"{reason:24}{count:>8}  {(WHY_UNREADABLE | NOT_ASKED).get(reason, '')}".rstrip())


def print_probes(order: tuple[str, ...], probes: dict[str, dict], metrics: dict, baselines: dict[str, dict]) -> None:
    """For every metric but shares above a threshold: what is left of it when the video, or the question, is spoilt.

    Below the best blind answer a drop shows no sight: a model that has lost the form of its answers falls as far."""
    for name in order:
        if name not in metrics or "R@" in name or "/" not in name:
            continue
        print(f"\n{name:28}{'n':>8}{'intact':>10}{'probe':>10}{'drop':>10}{'unreadable':>12}  95 % of the drop")
        best_blind = max([result[name] for result in baselines.values() if result.get(name) is not None], default=0.0)
        for probe, result in probes.items():
            if name in result["drop"]:
                cells = "".join(f"{result[column][name]:>10.3f}" for column in ("intact", "score", "drop"))
                n, unreadable = (result[of_task][name.split("/")[0]] for of_task in ("n", "unreadable"))
                remark = "  below the blind answer: broken output, not sight" if result["score"][name] < best_blind else ""
                print(f"{probe:28}{n:>8}{cells}{unreadable:>12.3f}  {in_brackets(result['drop_intervals'][name])}{remark}")
        for baseline, result in baselines.items():
            if name in result:
                print(f"{'blind: ' + baseline:46}{result[name]:>10.3f}")
