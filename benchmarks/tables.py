"""The report of `benchmarks.bench` for a terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

Report = dict[str, Any]
PARTS = {
    "data": "data only",
    "update": "forward, backward, update",
    "training": "whole training",
    "stage1": "its stage 1",
    "stage2": "its stage 2",
}


def render(report: Report) -> str:
    """The report for a terminal, ratios first."""
    return "\n\n".join(
        [
            _headline(report),
            _speed(report),
            _memory(report),
            _growth(report),
            _ceilings(report),
            _shares(report),
        ]
    )


def _headline(report: Report) -> str:
    hardware, versions = report["hardware"], report["versions"]
    lines = [
        f"{form}: {ratio['median']:.2f} times the images per second of plain form in whole training"
        f" ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
        for form, ratio in report["ratios"]["training"].items()
    ]
    numbers = "with" if hardware["bfloat16"] else "without"
    settings = report["settings"]
    return "\n".join(
        [
            *lines,
            f"{hardware['name']}, CPU {numbers} bfloat16; torch {versions['torch']}; "
            f"batch {settings['batch_size']}, {settings['rounds']} rounds, "
            f"{report['seconds']:.0f} s in all",
        ]
    )


def _speed(report: Report) -> str:
    rows = [["images per second", *report["images_per_second"]["data"]]]
    for part, title in PARTS.items():
        row = [title]
        for form, x in report["images_per_second"][part].items():
            ratio = report["ratios"][part].get(form)
            times = f" ({ratio['median']:.2f}x)" if ratio else ""
            row.append(f"{x['median']:,.0f}{times}")
        rows.append(row)
    spread = max(
        x["highest"] / x["lowest"] - 1
        for forms in report["images_per_second"].values()
        for x in forms.values()
    )
    tried = report["plain_workers"]
    workers = ", ".join(f"{count} workers {rate:,.0f}" for count, rate in tried.items())
    return table(rows) + (
        f"\nmedians; the highest is at most {spread:.0%} above the lowest. "
        f"Plain form, whole training, tried once: {workers}; the faster was taken."
    )


def _memory(report: Report) -> str:
    rows = [["peak memory, MiB", "whole", "of it at start", "largest worker, apart", "GPU"]]
    for form, x in report["peak_memory_bytes"].items():
        keys = ("peak", "start", "worker", "device")
        rows.append([form, *(f"{x[key] / 2**20:,.0f}" for key in keys)])
    return table(rows)


def _growth(report: Report) -> str:
    growth = report["growth"]
    tables = []
    for key, title in (("batch_size", "batch"), ("num_experts", "experts")):
        forms = [name for name in growth[key][0] if name != "value"]
        header = [f"update by {title}", *(f"{form}, images/s" for form in forms), "ratio"]
        rows = [
            [
                str(x["value"]),
                *(f"{x[form]:,.0f}" for form in forms),
                _times(x[forms[1]], x[forms[0]]),
            ]
            for x in growth[key]
        ]
        tables.append(table([header, *rows]))
    update = report["images_per_second"]["update"]
    seconds = report["settings"]["batch_size"] / update[list(update)[-1]]["median"]
    tables.append(
        table(
            [
                [
                    "heads and losses by classes",
                    "ms for a batch",
                    f"of an update, {list(update)[-1]}",
                ],
                *(
                    [str(x["value"]), f"{1e3 * x['seconds']:.1f}", f"{x['seconds'] / seconds:.0%}"]
                    for x in growth["num_classes"]
                ),
            ]
        )
    )
    tables.append(
        table(
            [
                ["data by images", "images/s", "memory, MiB", "of it the images"],
                *(
                    [
                        f"{x['value']:,}",
                        f"{x['images_per_second']:,.0f}",
                        f"{x['bytes'] / 2**20:,.0f}",
                        f"{x['table_bytes'] / 2**20:,.0f}",
                    ]
                    for x in growth["images"]
                ),
            ]
        )
    )
    return "\n\n".join(tables)


def _times(ours: float, plain: float) -> str:
    return f"{ours / plain:.2f}x"


def _ceilings(report: Report) -> str:
    ceilings = report["ceilings"]
    tables = []
    for precision, shapes in ceilings["convolutions"].items():
        network = ceilings["network"][precision]
        titles = [name.replace("_", " ") for name in network]
        rows = [[f"convolutions, GFLOP/s, {precision}", "times", *titles]]
        for x in shapes:
            name = f"{x['in_channels']} to {x['out_channels']}, {x['height']} x {x['width']}, "
            name += f"kernel {x['kernel']}, stride {x['stride']}"
            rates = [_gigaflops(x["operations"], x["seconds"][part]) for part in network]
            rows.append([name, str(x["count"]), *rates])
        whole = [_gigaflops(x["operations"], x["seconds"]) for x in network.values()]
        rows.append(["the whole network's", "", *whole])
        tables.append(table(rows))
    copy = ceilings["copy_bytes_per_second"] / 1e9
    return "\n\n".join(tables) + f"\ncopying: {copy:.1f} GB/s, read and written"


def _gigaflops(operations: float, seconds: float | None) -> str:
    return f"{operations / seconds / 1e9:,.0f}" if seconds else "-"


def _shares(report: Report) -> str:
    parts = ("data", "update", "training")
    rows = [["time at the ceiling / measured", *(PARTS[part] for part in parts)]]
    for form, shares in report["share_of_ceiling"].items():
        rows.append([form, *(f"{shares[part]:.1%}" for part in parts)])
    return table(rows)


def table(rows: Iterable[Sequence[str]]) -> str:
    """Columns in line: the first to the left, figures to the right, a rule below the header."""
    rows = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    first, *others = widths
    lines = [
        "  ".join(
            [row[0].ljust(first), *(x.rjust(w) for x, w in zip(row[1:], others, strict=True))]
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
