#!/usr/bin/env python3
"""Draw the pictures of the documentation: docs/pictures/NAME-light.svg and NAME-dark.svg, both without a background.

    python docs/draw.py                   # all of them
    python docs/draw.py pool states       # some; these two need nothing but Python, the others matplotlib
    python docs/draw.py --png /tmp/look   # PNGs of the charts too, to look at

The charts show docs/pictures/measurements.json, which `docs/measure.py` writes; a part that is not there is not drawn.
The same figures give the same files.
"""

import argparse
import html
import io
import json
import math
import sys
from pathlib import Path

PICTURES = Path(__file__).resolve().parent / "pictures"
THEMES = {  # Okabe and Ito's colours, darker on white and lighter on black; `back` is only behind PNGs
    "light": {
        "text": "#1f2328", "dim": "#59636e", "grid": "#d1d9e0", "back": "#ffffff", "fill": "#f3f5f8",
        "blue": "#0072b2", "orange": "#c04d00", "green": "#007a58", "pink": "#a8447f", "yellow": "#8f6500",
        "grey": "#6e7781", "pale": "#cfe4f2",
    },
    "dark": {
        "text": "#e6edf3", "dim": "#9ba5b0", "grid": "#3d444d", "back": "#0d1117", "fill": "#161b22",
        "blue": "#58b5ec", "orange": "#ff8a3d", "green": "#2fc79a", "pink": "#ee9fcb", "yellow": "#f0c95a",
        "grey": "#9ba5b0", "pale": "#123a56",
    },
}  # fmt: skip
PEERS = {  # name in bench.py: (label, colour, marker, line), so that no two differ by colour alone
    "bare_copy": ("bare copy", "grey", "", (0, (4, 2))),
    "this_pool": ("this pool", "blue", "o", "-"),
    "LMDB": ("LMDB", "orange", "s", "-"),
    "files": ("files", "green", "^", "-"),
    "diskcache": ("diskcache", "pink", "D", "-"),
    "Redis": ("Redis", "yellow", "v", "-"),
}
POLICIES = {
    "optimum": ("optimum (knows the future)", "grey", "", (0, (4, 2))),
    "adaptive": ("adaptive", "blue", "o", "-"),
    "lru": ("lru", "orange", "s", "-"),
    "lfu": ("lfu", "green", "^", "-"),
    "fifo": ("fifo", "pink", "D", "-"),
    "priority": ("priority", "yellow", "v", "-"),
}
METHODS = {
    "in place": ("blue", "o", "-"),
    "in place, int8": ("pink", "D", "-"),
    "StaticCache": ("green", "^", "-"),
    "DynamicCache": ("orange", "s", "-"),
}

# ----------------------------------------------------------------------------------------------------------------------
# Drawings by hand
# ----------------------------------------------------------------------------------------------------------------------


class Sheet:
    """A picture by hand: shapes and text in an SVG of so many pixels. Colours are names in THEMES."""

    def __init__(self, width, height, title, theme):
        self.colours = THEMES[theme]
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
            f' viewBox="0 0 {width} {height}" role="img"'
            " font-family=\"-apple-system, 'Segoe UI', 'Noto Sans', 'DejaVu Sans', Helvetica, Arial, sans-serif\">",
            f"<title>{html.escape(title)}</title>",
            "<defs>",
        ]
        for name in ("text", "dim", "blue", "green", "orange"):
            self.parts.append(
                f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7"'
                f' orient="auto"><path d="M0 0L10 5L0 10z" fill="{self.colours[name]}"/></marker>'
            )
        self.parts.append("</defs>")

    def box(self, x, y, width, height, stroke="dim", fill="fill", radius=6, dash="", line=1.5):
        fill = self.colours.get(fill, "none")
        dash = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{fill}"'
            f' stroke="{self.colours[stroke]}" stroke-width="{line}"{dash}/>'
        )

    def text(self, x, y, *lines, colour="text", size=13, anchor="middle", bold=False, mono=False):
        style = (
            ' font-weight="600"' * bold + " font-family=\"ui-monospace, Menlo, 'DejaVu Sans Mono', monospace\"" * mono
        )
        for number, line in enumerate(lines):
            self.parts.append(
                f'<text x="{x}" y="{y + number * (size + 4)}" font-size="{size}" text-anchor="{anchor}"'
                f' fill="{self.colours[colour]}"{style}>{html.escape(line)}</text>'
            )

    def arrow(self, path, colour="text", dash="", end=True, line=1.8):
        dash = f' stroke-dasharray="{dash}"' if dash else ""
        head = f' marker-end="url(#{colour})"' * end
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{self.colours[colour]}" stroke-width="{line}"{dash}{head}/>'
        )

    def dot(self, x, y, colour):
        self.parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{self.colours[colour]}"/>')

    def write(self, path):
        path.write_text("\n".join([*self.parts, "</svg>"]) + "\n")


def draw_pool(theme):
    """Processes around one pool; no server between them."""
    title = "Worker processes read and write one pool of shared memory; there is no server"
    sheet = Sheet(800, 430, title, theme)
    workers = (  # x, what it calls, what that means, colour
        (20, "worker 1", "put(key, kv)", "blue"),
        (215, "worker 2", "get(key)", "green"),
        (410, "worker 3", "view(key)", "green"),
        (605, "worker 4", "put(key, kv)", "orange"),
    )
    for x, name, call, colour in workers:
        sheet.box(x, 12, 175, 58, stroke=colour, dash="5 4" if colour == "orange" else "")
        if name == "worker 4":
            sheet.arrow(f"M{x + 8} 18L{x + 167} 64M{x + 167} 18L{x + 8} 64", colour, end=False)
        sheet.text(x + 87, 35, name, bold=True)
        sheet.text(x + 87, 57, call, mono=True)

    cell, left = 40, 247
    centre = lambda number: left + number * cell + cell // 2 - 2  # noqa: E731  of a block of the data region
    sheet.box(12, 154, 776, 144, stroke="blue", line=2)
    sheet.text(400, 284, "pool “llama-cache”: one segment of shared memory, opened by its name", bold=True)
    for x, width, name, about in (
        (26, 94, "header", "counters"),
        (128, 100, "bitmap", "free blocks"),
        (236, 338, "data region", ""),
        (582, 192, "index", "keys, order, pins"),
    ):
        sheet.box(x, 168, width, 94, fill="back", radius=4)
        sheet.text(x + width / 2, 252, name, bold=True)
        sheet.text(x + width / 2, 214, about, colour="dim", size=12)
    for number in range(8):
        is_torn = number == 7
        stroke, dash = ("orange", "4 3") if is_torn else ("blue", "")
        fill = "" if number in (3, 6, 7) else "pale"
        sheet.box(left + number * cell, 190, cell - 4, 42, stroke, fill, 2, dash)
    sheet.arrow(f"M107 70C107 140 {centre(0)} 110 {centre(0)} 187", "blue")
    sheet.arrow(f"M{centre(2)} 188C{centre(2)} 130 302 130 302 73", "green")
    sheet.arrow(f"M{centre(4)} 211C{centre(4)} 130 497 130 497 73", "green")
    sheet.dot(centre(4), 211, "green")
    sheet.arrow(f"M692 70C692 140 {centre(7)} 110 {centre(7)} 187", "orange", dash="5 4")
    sheet.text(124, 94, "copied in, once", colour="blue", anchor="start")
    sheet.text(314, 94, "copied out,", "without a lock", colour="green", anchor="start")
    sheet.text(506, 94, "read in place:", "pinned, no copy", colour="green", anchor="start")
    sheet.text(700, 94, "kill -9: freed,", "never visible", colour="orange", anchor="start")

    sheet.box(26, 358, 210, 58)
    sheet.text(131, 381, "shell", bold=True)
    sheet.text(131, 403, "cortex cache status", mono=True, size=12)
    sheet.arrow("M131 355L131 301", "dim")
    sheet.box(285, 358, 240, 58)
    sheet.text(405, 381, "snapshot file", bold=True)
    sheet.text(405, 403, "llama-cache.safetensors", mono=True, size=12)
    sheet.arrow("M365 301L365 355", "dim")
    sheet.arrow("M445 355L445 301", "dim")
    sheet.text(355, 333, "persist", colour="dim", anchor="end")
    sheet.text(455, 333, "restore", colour="dim", anchor="start")
    sheet.text(670, 381, "No server.", bold=True, size=15)
    sheet.text(670, 403, "The pool outlives the workers.", colour="dim")
    return sheet


def draw_states(theme):
    """What a record of the index goes through."""
    sheet = Sheet(800, 400, "The states of a record: FREE, WRITING, COMPLETE, CONDEMNED, and what leads on", theme)
    nodes = {
        "FREE": (20, 168, "dim", "no value"),
        "WRITING": (310, 20, "blue", "a value on its way in"),
        "COMPLETE": (600, 168, "green", "an entry"),
        "CONDEMNED": (310, 316, "orange", "dropped, perhaps still read"),
    }
    for name, (x, y, colour, about) in nodes.items():
        sheet.box(x, y, 180, 62, stroke=colour, line=2)
        sheet.text(x + 90, y + 27, name, bold=True, size=15)
        sheet.text(x + 90, y + 48, about, colour="dim", size=12)
    sheet.arrow("M100 165C100 80 180 51 306 51", "blue")
    sheet.text(20, 26, "put above 64 KiB, reserve:", "blocks allocated, writer noted", colour="blue", anchor="start")
    sheet.arrow("M360 85C360 150 290 182 204 182", "dim")
    sheet.text(374, 116, "error in the block, or writer died;", colour="dim", anchor="start")
    sheet.text(374, 133, "or blocks swapped into the old entry", colour="dim", anchor="start")
    sheet.arrow("M490 51C620 51 690 80 690 164", "green")
    sheet.text(520, 38, "commit: the value is whole", colour="green", anchor="start")
    sheet.arrow("M200 205L596 205", "green")
    sheet.text(440, 197, "put up to 64 KiB: copied under the lock", colour="green")
    sheet.arrow("M640 230C640 310 600 347 494 347", "orange")
    sheet.text(506, 372, "delete, evict, replace", colour="orange", anchor="start")
    sheet.arrow("M310 347C190 347 110 330 110 234", "dim")
    sheet.text(160, 270, "not pinned: at once", colour="dim", anchor="start")
    sheet.text(160, 287, "pinned: when the last pin ends,", colour="dim", anchor="start")
    sheet.text(160, 304, "or its process has died", colour="dim", anchor="start")
    sheet.arrow("M700 230C700 290 755 290 755 234", "dim")
    sheet.text(728, 296, "moved, or", "replaced in place", colour="dim")
    return sheet


# ----------------------------------------------------------------------------------------------------------------------
# Charts
# ----------------------------------------------------------------------------------------------------------------------


def machine_line(part, *more):
    """The small print of a chart: the machine, the date, and what else there is to say."""
    machine = part["machine"]
    kernel = ".".join(machine["kernel"].split(".")[:2])
    words = [f"{machine['cores']} cores of {machine['cpu']}, Linux {kernel}, Python {machine['python']}"]
    words += [*more, f"{'trial run' if part['short'] else 'measured'} {machine['date']}"]
    return "; ".join(words)


def new_figure(theme, height, columns, note, **more):
    """(figure, axes, colours) of a chart 800 px wide; `note` stands small below it."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = THEMES[theme]
    matplotlib.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "kv-cache-manager",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
        "font.size": 12,
        "axes.titlesize": 13,
        "text.color": colours["text"],
        "axes.labelcolor": colours["text"],
        "axes.edgecolor": colours["dim"],
        "xtick.color": colours["dim"],
        "ytick.color": colours["dim"],
        "xtick.labelcolor": colours["text"],
        "ytick.labelcolor": colours["text"],
        "grid.color": colours["grid"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    figure = Figure(figsize=(800 / 72, height / 72), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 28 / height, 1, 1 - 28 / height), wspace=0.06)
    axes = figure.subplots(1, columns, squeeze=False, **more)[0]
    for axis in axes:
        axis.patch.set_visible(False)
        axis.grid(linewidth=0.7)
        axis.set_axisbelow(True)
    figure.text(0.5, 10 / height, note, ha="center", va="center", fontsize=10, color=colours["dim"])
    return figure, axes, colours


def plot(axis, colours, style, xs, ys, **more):
    label, colour, marker, line = style
    how = {"label": label, "color": colours[colour], "marker": marker, "linestyle": line, "markersize": 6}
    how |= {"linewidth": 2.6, "zorder": 3} if colour == "blue" else {"linewidth": 1.7}
    axis.plot(xs, ys, **how | more)


def legend(figure, columns):
    """One legend for all axes, each label once."""
    handles = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, handlelength=2.6)


def draw_latency(theme, part):
    note = machine_line(part, "everything in /dev/shm", "Redis on a unix socket")
    figure, axes, colours = new_figure(theme, 400, 2, note, sharex=True, sharey=True)
    for axis, op, title in zip(axes, ("get", "put new"), ("get: a copy of the value", "put: a new key"), strict=True):
        for name, style in PEERS.items():
            rows = [row for row in part["results"] if (row["op"], row["name"]) == (op, name)]
            if rows:
                plot(axis, colours, style, [row["size"] for row in rows], [row["us"] for row in rows])
        rows = [row for row in part["results"] if (row["op"], row["name"]) == ("view", "this_pool") and op == "get"]
        if rows:
            style = "this pool, view: no copy", "blue", "o", (0, (1, 1.2))
            plot(axis, colours, style, [row["size"] for row in rows], [row["us"] for row in rows], fillstyle="none")
        sizes = [4 << (10 + 2 * step) for step in range(7)]
        axis.set(xscale="log", yscale="log", title=title, xlabel="size of the value")
        axis.set_xticks(sizes, [f"{s >> 10} KiB" if s < 1 << 20 else f"{s >> 20} MiB" for s in sizes], fontsize=10)
        axis.minorticks_off()
        low, high = (math.log10(limit) for limit in axis.get_ylim())
        ticks = range(math.ceil(low), math.floor(high) + 1)
        axis.set_yticks([10**tick for tick in ticks], [f"{10**tick:,}" for tick in ticks])
    axes[0].set_ylabel("µs a call, median")
    legend(figure, 4)
    return figure


def draw_contention(theme, part):
    size = part["size"] >> 10
    figure, axes, colours = new_figure(theme, 340, 2, machine_line(part), sharex=True)
    for axis, op, title in zip(axes, ("get", "view"), ("get: a copy of the value", "view: in place"), strict=True):
        for name, style in PEERS.items():
            rows = [row for row in part["results"] if (row["op"], row["name"]) == (op, name)]
            if rows:
                rates = [row["calls_a_second"] / 1000 for row in rows]
                plot(axis, colours, style, [row["processes"] for row in rows], rates)
        axis.set(xscale="log", title=f"{title}, {size} KiB", xlabel="processes at once")
        axis.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("thousands of calls a second,\nall processes together")
    legend(figure, 4)
    return figure


def draw_hit_ratio(theme, part):
    traces = part["traces"]
    note = f"cortex cache replay, each trace from an empty cache; {part['machine']['date']}"
    figure, axes, colours = new_figure(theme, 400, len(traces), note)
    for axis, trace in zip(axes, traces, strict=True):
        lines = {}  # policies that give the same figures share a line
        for policy in POLICIES:
            rows = [row for row in trace["results"] if row["policy"] == policy]
            points = tuple((row["percent"], row["usable_hit_rate"]) for row in rows)
            if points:
                lines.setdefault(points, []).append(policy)
        for points, policies in lines.items():
            labels = ", ".join(POLICIES[policy][0] for policy in policies)
            percents, ratios = zip(*points, strict=True)
            plot(axis, colours, (labels, *POLICIES[policies[0]][1:]), range(len(percents)), ratios)
        axis.set_xticks(range(len(percents)), [f"{percent:g} %" for percent in percents])
        counts = f"{trace['requests']:,} requests, {trace['unique_blocks']:,} blocks"
        axis.set_title(f"{trace['title']}\n{counts}", fontsize=12)
        axis.set_xlabel("size of the cache, of the trace's blocks")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("usable hit ratio")
    legend(figure, 4)
    return figure


def draw_first_token(theme, part):
    rows = part["results"]
    note = machine_line(part, f"{part['model'].removesuffix('.gguf')} in {part['dtype']}")
    figure, (axis,), colours = new_figure(theme, 60 + 62 * len(rows), 1, note)
    for place, row in enumerate(rows):
        ways = (
            ("cold", "prompt computed", "grey", "", -0.19),
            ("warm", "prefix loaded from the pool", "blue", "", 0.19),
        )
        for way, about, colour, hatch, shift in ways:
            label = f"{way}: {about}" if not place else None
            axis.barh(place + shift, row[way], 0.36, color=colours[colour], hatch=hatch, label=label)
            words = f" {row[way]:.2f} s" + (f", {row['cold'] / row['warm']:.0f} times faster" if way == "warm" else "")
            axis.text(row[way], place + shift, words, va="center")
    axis.set_yticks(range(len(rows)), [f"{row['tokens']:,} tokens" for row in rows])
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(row["cold"] for row in rows))
    axis.set_xlabel("seconds to the first token")
    legend(figure, 2)
    return figure


def draw_shared_prefix(theme, part):
    """Also for examples/shared_prefix.py --plot."""
    rows = [row for row in part["results"] if row["processes"] == 1]
    counts = sorted({row["rows"] for row in rows})
    note = machine_line(part, f"{part['model'].removesuffix('.gguf')} in float32")
    figure, axes, colours = new_figure(theme, 360, 2, note, sharex=True)
    for axis, name, unit in zip(axes, ("rate", "private"), (1, 1e6), strict=True):
        for method, style in METHODS.items():
            points = sorted((row["rows"], row[name] / unit) for row in rows if row["method"] == method)
            plot(axis, colours, (method, *style), *zip(*points, strict=True))
        axis.set(xscale="log", xlabel="rows that share a prefix")
        axis.set_xticks(counts, map(str, counts))
        axis.minorticks_off()
    axes[0].set(title="tokens a second, all rows together", ylim=(0, None))
    axes[1].set(title="private memory of the process, MB", yscale="log")
    ticks = [10**power for power in range(6) if axes[1].get_ylim()[0] <= 10**power <= axes[1].get_ylim()[1]]
    axes[1].set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    legend(figure, len(METHODS))
    return figure


DRAWINGS = {"pool": draw_pool, "states": draw_states}
CHARTS = {  # name: (part of the measurements, how)
    "latency": ("latency", draw_latency),
    "contention": ("contention", draw_contention),
    "hit-ratio": ("policies", draw_hit_ratio),
    "first-token": ("first-token", draw_first_token),
    "shared-prefix": ("shared-prefix", draw_shared_prefix),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join([*DRAWINGS, *CHARTS])}; default: all")
    parser.add_argument("--png", type=Path, metavar="DIR", help="write PNGs of the charts here too, on a background")
    args = parser.parse_args()
    for name in args.names:
        if name not in {**DRAWINGS, **CHARTS}:
            parser.error(f"{name!r} must be one of {', '.join([*DRAWINGS, *CHARTS])}")
    file = PICTURES / "measurements.json"
    measured = json.loads(file.read_text()) if file.exists() else {}
    PICTURES.mkdir(exist_ok=True)
    for name in args.names or [*DRAWINGS, *CHARTS]:
        part, draw = CHARTS.get(name, (None, None))
        if part and part not in measured:
            sys.stderr.write(f"{name} is left out: python docs/measure.py {part}\n")
            continue
        for theme in THEMES:
            path = PICTURES / f"{name}-{theme}.svg"
            if not part:
                DRAWINGS[name](theme).write(path)
                continue
            figure = draw(theme, measured[part])
            text = io.StringIO()
            figure.savefig(text, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
            path.write_text(text.getvalue().replace('pt" height', '" height', 1).replace('pt" viewBox', '" viewBox', 1))
            if args.png:
                args.png.mkdir(parents=True, exist_ok=True)
                figure.savefig(args.png / f"{name}-{theme}.png", dpi=72, facecolor=THEMES[theme]["back"])


if __name__ == "__main__":
    main()
