#!/usr/bin/env python3
"""Measure what the pictures of the documentation show, and keep the figures in docs/pictures/measurements.json.

    pip install lmdb diskcache redis && apt-get install redis-server   # what is absent is left out, with a word
    python docs/measure.py latency        # us of put, get and view by size of the value, beside other stores
    python docs/measure.py contention     # calls a second by 1, 2, 4 and 8 processes at once
    python docs/measure.py policies --trace FILE [TITLE]     # usable hit ratios, as `cortex cache replay FILE --json`
    python docs/measure.py first-token    # examples/chat_prefix.py with prompts of several lengths; needs its packages
    python docs/measure.py shared-prefix  # examples/shared_prefix.py, once: the page shows the table that it prints

Several parts may be named at once. Each replaces its own figures in the file and leaves the others as they are, and
notes the machine and the date. A figure is the median of `--rounds` runs. `--short` is for trying the script: fewer
sizes, values and rounds. `docs/draw.py` draws the pictures.
"""

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402
import kv_cache_manager as kv  # noqa: E402

FIGURES = ROOT / "docs" / "pictures" / "measurements.json"
SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)  # of values, for latency
PAIRS = ("get", "bare_copy"), ("get", "this_pool"), ("get", "LMDB"), ("view", "this_pool"), ("view", "LMDB")
CONTENDED_SIZE, CONTENDED_COUNT = 64 << 10, 256


def say(text):
    sys.stderr.write(f"{datetime.datetime.now():%H:%M:%S} {text}\n")


def rounded(value):
    """Four digits, so that the file stays small."""
    return float(f"{value:.4g}")


def versions(*packages):
    """{package: version} of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            say(f"{package} is not installed")
    return found


def latency(args):
    sizes, total = (SIZES[::2], 32 << 20) if args.short else (SIZES, 192 << 20)
    found = {}
    for size in sizes:
        for turn in range(args.rounds):
            say(f"latency: {kv.format_size(size)}, round {turn + 1} of {args.rounds}")
            for pair, us in bench.medians(size, max(16, min(1024, total // size))).items():
                found.setdefault((size, *pair), []).append(us)
    rows = [
        {"size": size, "op": op, "name": name, "us": rounded(statistics.median(us))}
        for (size, op, name), us in found.items()
    ]
    return {"versions": versions("lmdb", "diskcache", "redis"), "results": rows}


def contention(args):
    found = {}
    for turn in range(args.rounds):
        for op, name in PAIRS:
            for number in (1, 2, 4, 8):
                say(f"contention: {op}, {name}, {number} at once, round {turn + 1} of {args.rounds}")
                try:
                    rates, us = bench.together(name, op, CONTENDED_SIZE, CONTENDED_COUNT, number)
                except ImportError as error:
                    say(f"{name} is left out: {error}")
                    break
                figures = sum(rates), us[len(us) // 2], us[len(us) * 99 // 100]
                found.setdefault((op, name, number), []).append(figures)
    rows = []
    for (op, name, number), figures in found.items():
        rate, median, p99 = (rounded(statistics.median(column)) for column in zip(*figures, strict=True))
        row = {"op": op, "name": name, "processes": number, "calls_a_second": rate}
        rows.append(row | {"median_us": median, "p99_us": p99})
    return {"versions": versions("lmdb"), "size": CONTENDED_SIZE, "results": rows}


def policies(args):
    sizes = "1%,10%,40%" if args.short else "1%,2%,5%,10%,20%,40%"
    every = [*(policy.value for policy in kv.EvictionPolicy), "optimum"]

    def replay(path, policy):
        command = [sys.executable, kv.__file__, "replay", path, "--policies", policy, "--sizes", sizes, "--json"]
        answer = json.loads(subprocess.check_output(command))
        say(f"policies: {path}, {policy}")
        return answer

    traces = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:  # nothing is timed here
        for path, *title in args.trace:
            answers = list(threads.map(lambda policy, path=path: replay(path, policy), every))
            rows = [row | {"size": row["size"].rstrip("%")} for answer in answers for row in answer["results"]]
            for row in rows:
                row["percent"] = float(row.pop("size"))
                row["hit_rate"], row["usable_hit_rate"] = rounded(row["hit_rate"]), rounded(row["usable_hit_rate"])
            totals = {name: answers[0][name] for name in ("requests", "accesses", "unique_blocks")}
            traces.append({"title": " ".join(title) or Path(path).name.partition(".")[0], **totals, "results": rows})
    return {"traces": traces}


def first_token(args):
    lengths = (512, 2048) if args.short else (512, 1024, 2048, 4096)
    prompt = re.compile(r"prompt +(\d+) tokens, model (.+), (\w+)$", re.MULTILINE)
    times = re.compile(r"(cold|warm) +([\d.]+) s to first token, (\d+) tokens reused", re.MULTILINE)
    rows, about, reused = [], {}, {}
    for length in lengths:
        found = {"cold": [], "warm": []}
        for turn in range(args.rounds):
            say(f"first-token: {length} tokens, round {turn + 1} of {args.rounds}")
            command = [sys.executable, str(ROOT / "examples" / "chat_prefix.py"), "--tokens", str(length)]
            command += ["--together", "1", "--prompt", kv.__file__]  # a long text that is there
            answer = subprocess.check_output(command, text=True)
            tokens, about["model"], about["dtype"] = prompt.search(answer).groups()
            for way, seconds, reused[way] in times.findall(answer):
                found[way].append(float(seconds))
        rows.append({"tokens": int(tokens), "reused": int(reused["warm"])})
        rows[-1] |= {way: rounded(statistics.median(seconds)) for way, seconds in found.items()}
    return {"versions": versions("torch", "transformers"), **about, "results": rows}


def shared_prefix(args):
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, str(ROOT / "examples" / "shared_prefix.py"), "--json", file.name]
        if args.short:
            command += ["--prefix", "256", "--tokens", "4"]
        subprocess.run(command, check=True)
        figures = json.loads(Path(file.name).read_text())
    for row in figures["results"]:
        row["rate"], row["first"] = rounded(row["rate"]), rounded(row["first"])
    return {"versions": versions("torch", "transformers"), "model": figures["model"], "results": figures["results"]}


PARTS = {
    "latency": latency,
    "contention": contention,
    "policies": policies,
    "first-token": first_token,
    "shared-prefix": shared_prefix,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument(
        "--trace", nargs="+", action="append", metavar=("FILE", "TITLE"), help="for policies; repeatable"
    )
    parser.add_argument("--rounds", type=int, help="runs of each part, of which the median counts; default 5, short 1")
    parser.add_argument("--short", action="store_true", help="fewer sizes, values and rounds")
    args = parser.parse_args()
    parts = args.parts or list(PARTS)
    for part in parts:
        if part not in PARTS:
            parser.error(f"{part!r} must be one of {', '.join(PARTS)}")
    if "policies" in parts and not args.trace:
        parser.error("policies needs --trace FILE: a trace that `cortex cache replay` reads")
    args.rounds = args.rounds or (1 if args.short else 5)
    for part in parts:
        figures = {"machine": bench.describe_machine(), "rounds": args.rounds, "short": args.short, **PARTS[part](args)}
        FIGURES.parent.mkdir(exist_ok=True)
        every = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
        every[part] = figures
        new = FIGURES.with_suffix(".new")
        new.write_text(json.dumps({name: every[name] for name in PARTS if name in every}, indent=1) + "\n")
        new.rename(FIGURES)  # whole or absent
        say(f"{part}: written to {FIGURES}")


if __name__ == "__main__":
    main()
