#!/usr/bin/env python3
"""The pool beside what people use instead: one run, the same keys and bytes for each, medians, ratios to a bare copy.

    pip install lmdb diskcache redis && apt-get install redis-server   # what is absent is left out, with a word
    python3 bench.py               # put, get, view, miss, evicting put; one process and two
    python3 bench.py --scale       # cost of an operation with 1,000 ... 1,000,000 entries, every policy
    python3 bench.py --allocator   # the bitmap of 16 GiB, 95 % full and torn
    python3 bench.py --snapshot    # persist and restore against cp and reading
    python3 bench.py --attach      # open and first read in a new process; `cortex cache status`

Everything lies in /dev/shm, so that no disk is measured (`--dir` moves the snapshots). `--json FILE` keeps the figures.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kv_cache_manager as kv
from kv_cache_manager import CachePoolConfig, CacheStore, KVCachePool, format_size, parse_size

OPS = ("put new", "overwrite", "get", "view", "miss", "evicting put")
ROWS: list[dict[str, Any]] = []


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def median_us(work: Callable[[], object], count: int) -> float:
    return statistics.median(seconds(work) for _ in range(count)) * 1e6


# --- the peers: each has put, get and close, and view where it can read without a copy --------------------------------


class BareCopy:
    """What nobody can beat: the same bytes into memory that is mapped already, and out of it."""

    def __init__(self, place: str, size: int, num_values: int) -> None:
        self.size, self.slots = size, num_values
        self.memory = memoryview(bytearray(b"\1") * (size * num_values))

    def put(self, key: str, data: bytes) -> None:
        at = int(key) % self.slots * self.size
        self.memory[at : at + self.size] = data

    def get(self, key: str) -> bytes | None:
        at = int(key) % self.slots * self.size
        return self.memory[at : at + self.size].tobytes() if int(key) >= 0 else None

    def close(self) -> None:
        self.memory.release()


class Pool:
    def __init__(self, place: str, size: int, num_values: int) -> None:
        blocks = -(-size // 4096) * num_values
        config = CachePoolConfig("bench", 4096 + max(4096, -(-blocks // 32768) * 4096) + 4096 * blocks)
        self.store = CacheStore(place)
        self.pool = self.store.create(config)
        self.put, self.get = self.pool.put, self.pool.get

    def view(self, key: str) -> None:
        with self.pool.view(key):
            pass

    def close(self) -> None:
        self.pool.close()
        self.store.delete("bench")


class Lmdb:
    def __init__(self, place: str, size: int, num_values: int) -> None:
        import lmdb

        self.env = lmdb.open(place, map_size=3 * size * num_values + (64 << 20), writemap=True, sync=False)
        self.close = self.env.close

    def put(self, key: str, data: bytes) -> None:
        with self.env.begin(write=True) as transaction:
            transaction.put(key.encode(), data)

    def get(self, key: str) -> bytes | None:
        with self.env.begin() as transaction:
            return transaction.get(key.encode())

    def view(self, key: str) -> None:
        with self.env.begin(buffers=True) as transaction:
            transaction.get(key.encode())


class Files:
    def __init__(self, place: str, size: int, num_values: int) -> None:
        self.place = place

    def put(self, key: str, data: bytes) -> None:
        path = f"{self.place}/{key}"
        with open(path + ".new", "wb", buffering=0) as file:
            file.write(data)
        os.rename(path + ".new", path)

    def get(self, key: str) -> bytes | None:
        try:
            with open(f"{self.place}/{key}", "rb", buffering=0) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def close(self) -> None:
        pass


class DiskCache:
    def __init__(self, place: str, size: int, num_values: int) -> None:
        import diskcache

        policy = "least-recently-used"
        self.cache = diskcache.Cache(place, size_limit=size * num_values + (1 << 20), eviction_policy=policy)
        self.put, self.get, self.close = self.cache.set, self.cache.get, self.cache.close


class Redis:
    def __init__(self, place: str, size: int, num_values: int) -> None:
        import redis

        socket, limit = f"{place}/socket", size * num_values * 5 // 4 + (64 << 20)
        options = f"--port 0 --unixsocket {socket} --save --appendonly no --dir {place} --maxmemory {limit}"
        command = ["redis-server", *options.split(), "--maxmemory-policy", "allkeys-lru"]
        self.server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.client = redis.Redis(unix_socket_path=socket)
        while self.server.poll() is None and not Path(socket).exists():
            time.sleep(0.01)
        self.put, self.get = self.client.set, self.client.get

    def close(self) -> None:
        self.client.close()
        self.server.terminate()
        self.server.wait()


PEERS = {"bare copy": BareCopy, "this pool": Pool, "LMDB": Lmdb, "files": Files, "diskcache": DiskCache, "Redis": Redis}
EVICT = {"this pool", "diskcache", "Redis"}  # the others grow without end


@contextlib.contextmanager
def opened(size: int, num_values: int, say: bool = True) -> Iterator[dict[str, Any]]:
    """Every peer that is installed, over a folder of its own in memory."""
    with contextlib.ExitStack() as stack:
        peers = {}
        for name, make in PEERS.items():
            try:
                place = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", ignore_cleanup_errors=True))
                peers[name] = stack.enter_context(contextlib.closing(make(place, size, num_values)))
            except (ImportError, FileNotFoundError) as error:
                if say:
                    print(f"{name} is left out: {error}", file=sys.stderr)
        yield peers


def one_process(size: int, num_values: int) -> dict[tuple[str, str], float]:
    """Medians in seconds of every (peer, operation); peers take turns, so that all see the same noise."""
    data, other = random.randbytes(size), random.randbytes(size)
    times: dict[tuple[str, str], list[float]] = {}
    keys = [str(number) for number in range(num_values)]
    more = [str(number) for number in range(num_values, 2 * num_values)]
    with opened(size, num_values) as peers:

        def turns(op: str, keys: list[str], work: Callable[[Any, str], object], names: set[str]) -> None:
            for at in range(0, len(keys), 16):
                for name in names & peers.keys():
                    samples = times.setdefault((name, op), [])
                    samples += [seconds(lambda: work(peers[name], key)) for key in keys[at : at + 16]]  # noqa: B023

        everyone, lookers = set(peers), {name for name, peer in peers.items() if hasattr(peer, "view")}
        turns("put new", keys, lambda peer, key: peer.put(key, data), everyone)
        turns("overwrite", keys, lambda peer, key: peer.put(key, other), everyone)
        turns("get", keys, lambda peer, key: peer.get(key), everyone)
        turns("view", keys, lambda peer, key: peer.view(key), lookers)
        turns("miss", [f"-{key}" for key in keys], lambda peer, key: peer.get(key), everyone)
        assert all(bytes(peer.get(keys[-1])) == other for peer in peers.values())
        turns("evicting put", more, lambda peer, key: peer.put(key, data), EVICT | {"bare copy"})
    return {name: statistics.median(samples) for name, samples in times.items()}


def serve(size: int, num_values: int, number: int, store: str, barrier: Any, results: Any, bare: bool) -> None:
    """One of several processes that put and get values of their own, in one pool or in private memory."""
    peer = BareCopy("", size, num_values) if bare else KVCachePool.attach("bench", store)
    data, keys = random.randbytes(size), [str(number * num_values + i) for i in range(num_values)]
    for key in keys:
        peer.put(key, data)
    barrier.wait()
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < 1.5:
        for key in keys:
            peer.put(key, data)
            peer.get(key)
        done += 2 * size * num_values
    results.put(done / (time.perf_counter() - started))
    peer.close()


def several_processes(size: int, num_processes: int, bare: bool) -> float:
    """Bytes per second of all processes together."""
    num_values = max(4, (32 << 20) // size)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place, contextlib.closing(Pool(place, size, 3 * num_values)):
        barrier, results = context.Barrier(num_processes), context.Queue()
        arguments = [(size, num_values, number, place, barrier, results, bare) for number in range(num_processes)]
        workers = [context.Process(target=serve, args=each) for each in arguments]
        for worker in workers:
            worker.start()
        total = sum(results.get() for _ in workers)
        for worker in workers:
            worker.join()
    return total


def compare(args: argparse.Namespace) -> None:
    for size in map(parse_size, args.sizes.split(",")):
        medians = one_process(size, max(16, min(1024, (192 << 20) // size)))
        print(f"\n{format_size(size)}, one process: us, and times the bare copy")
        print("".join(f"{title:>18}" for title in ("", *OPS)))
        for name in PEERS:
            cells = []
            for op in OPS:
                value, bare = medians.get((name, op)), medians[("bare copy", "get" if op == "view" else op)]
                cells.append(
                    "-" if value is None else f"{value * 1e6:.1f}" + f" ({value / bare:.2f}x)" * (op != "miss")
                )
                ROWS.append({"size": size, "store": name, "op": op, "us": value and value * 1e6})
            if cells != ["-"] * len(OPS):
                print("".join(f"{cell:>18}" for cell in (name, *cells)))
        for name, bare_only in (("bare copy", True), ("this pool", False)):
            one, two = (several_processes(size, count, bare_only) for count in (1, 2))
            print(f"{name}: put and get {one / 1e9:.1f} GB/s in one process, {two / 1e9:.1f} in two: {two / one:.2f}x")
            ROWS.append({"size": size, "store": name, "op": "two processes", "ratio": two / one, "bytes_per_s": two})


# --- one mode each ----------------------------------------------------------------------------------------------------


def scale(args: argparse.Namespace) -> None:
    """The same small operations in pools of 1,000 to 1,000,000 entries of 4 KiB, keys in random order."""
    print(
        f"{'policy':<10}{'entries':>10}" + "".join(f"{op:>14}" for op in ("overwrite", "get", "miss", "evicting put"))
    )
    for policy in args.policies.split(","):
        base: dict[str, float] = {}
        for count in (1000, 10_000, 100_000, 1_000_000):
            if count > args.entries:
                continue
            with tempfile.TemporaryDirectory() as place:
                store = CacheStore(place)
                size_bytes = 4096 * (1 + -(-count // 32768) + count)
                config = CachePoolConfig("bench", size_bytes, eviction_policy=policy, max_entries=count)
                with contextlib.closing(store.create(config)) as pool:
                    data = bytes(4096)
                    for number in range(count):
                        pool.put(str(number), data)
                    keys, new = iter(random.choices(range(count), k=8000)), iter(range(count, 2 * count + 4000))
                    medians = {
                        "overwrite": median_us(lambda: pool.put(str(next(keys)), data), 2000),
                        "get": median_us(lambda: pool.get(str(next(keys))), 2000),
                        "miss": median_us(lambda: pool.get(f"-{next(keys)}"), 2000),
                        "evicting put": median_us(lambda: pool.put(str(next(new)), data), 2000),
                    }
                store.delete("bench")
            base = base or medians
            cells = [f"{value:.1f} ({value / base[op]:.2f}x)" for op, value in medians.items()]
            print(f"{policy:<10}{count:>10}" + "".join(f"{cell:>14}" for cell in cells))
            ROWS.append({"policy": policy, "entries": count, **medians})


def allocator(args: argparse.Namespace) -> None:
    """4 Mi blocks of 4 KiB, 95 % full in pieces of all sizes, one long run free at the far end."""
    total = 4 << 20
    bitmap = kv.BitmapAllocator(total)
    shuffled = random.Random(0)
    at = 0
    while at < total:
        used = min(shuffled.randint(1, 256), total - at)
        bitmap.allocate(used)
        at += used
    while bitmap.get_usage()[0] > 0.95 * total:
        with contextlib.suppress(ValueError):
            bitmap.free(shuffled.randrange(total - 2048), shuffled.randint(1, 14))
    bitmap.free(total - 1024, 1024)
    for count in (1, 16, 512):
        starts = []
        value = median_us(lambda: starts.append(bitmap.allocate(count)) or bitmap.free(starts[-1], count), 300)  # noqa: B023
        single = statistics.median(
            (seconds(lambda: starts.append(bitmap.allocate(count))), bitmap.free(starts[-1], count))[0]  # noqa: B023
            for _ in range(300)
        )
        print(f"allocate({count}) {single * 1e6:.1f} us, with free {value:.1f} us")
        ROWS.append({"blocks": count, "allocate_us": single * 1e6, "with_free_us": value})


def snapshot(args: argparse.Namespace) -> None:
    """Persist and restore a full pool of 2 MiB values against copying and reading the same bytes with cp and read."""
    size = parse_size(args.size)
    with tempfile.TemporaryDirectory(dir=args.dir) as place:
        path, twin = f"{place}/snapshot", f"{place}/twin"
        with KVCachePool(CachePoolConfig("bench", size + (16 << 20)), store_path=place) as pool:
            for number in range(size >> 21):
                pool.put(str(number), random.randbytes(2 << 20))
            pool.persist(path)
            copy, kept = [], []
            for _ in range(5):
                for file in (path, twin):
                    Path(file + ".old").unlink(missing_ok=True)
                kept.append(seconds(lambda: pool.persist(twin)))
                Path(twin).unlink()
                command = ["sh", "-c", f"cp {path} {twin} && sync {twin}"]
                copy.append(seconds(lambda: subprocess.run(command, check=True)))  # noqa: B023
                Path(twin).unlink()
        read, back = [], []
        for _ in range(5):
            read.append(seconds(lambda: Path(path).read_bytes()))
            started = time.perf_counter()
            with KVCachePool.restore(path, store_path=place) as restored:  # type: ignore[union-attr]
                back.append(time.perf_counter() - started)
                assert len(restored) == size >> 21
    pairs = {"persist + fsync": (kept, copy, "cp + fsync"), "restore": (back, read, "read")}
    for name, (ours, theirs, peer) in pairs.items():
        a, b = statistics.median(ours), statistics.median(theirs)
        print(f"{name} {a:.3f} s, {peer} {b:.3f} s, {a / b:.2f}x of {format_size(size)}")
        ROWS.append({"op": name, "seconds": a, "peer_seconds": b})


def attach(args: argparse.Namespace) -> None:
    """What a new process pays: open a pool of 1 GiB, read a first value and the same one again; and the shell."""
    script = (
        "import sys, time; from kv_cache_manager import KVCachePool; at = time.perf_counter\n"
        "t = [at()]; pool = KVCachePool.attach('bench', sys.argv[1]); t.append(at())\n"
        "for _ in 'ab': pool.get('key'); t.append(at())\n"
        "for _ in 'ab': pool.put('new', b'x' * (2 << 20)); t.append(at())\n"
        "print(*(b - a for a, b in zip(t, t[1:])))"
    )
    names = ("open", "first get of 2 MiB", "second get", "first put of 2 MiB", "second put")
    with tempfile.TemporaryDirectory() as place:
        store = CacheStore(place)
        with contextlib.closing(store.create(CachePoolConfig("bench", 1 << 30))) as pool:
            pool.put("key", random.randbytes(2 << 20))
            command, found = [sys.executable, "-c", script, place], []
            for _ in range(15):
                found.append([float(text) for text in subprocess.check_output(command).split()])
            for name, samples in zip(names, zip(*found, strict=True), strict=True):
                print(f"{name} {statistics.median(samples) * 1e6:.0f} us")
                ROWS.append({"op": name, "us": statistics.median(samples) * 1e6})
            shell = [sys.executable, "-m", "kv_cache_manager", "--store", place, "status", "bench"]
            times = []
            for command in ([sys.executable, "-c", ""], shell):
                run = functools.partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
                times.append(median_us(run, 15) / 1000)
            print(f"status {times[1]:.1f} ms, bare python {times[0]:.1f} ms")
            ROWS.append({"op": "status", "ms": times[1], "python_ms": times[0]})
        store.delete("bench")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for mode in (scale, allocator, snapshot, attach):
        parser.add_argument(f"--{mode.__name__}", dest="mode", action="store_const", const=mode, default=compare)
    parser.add_argument("--sizes", default="64K,512K,2M,16M", help="of values, for the comparison")
    parser.add_argument("--entries", type=int, default=1_000_000, help="at most, for --scale")
    parser.add_argument(
        "--policies", default=",".join(policy.value for policy in kv.EvictionPolicy), help="for --scale"
    )
    parser.add_argument("--size", default="1G", help="of the values, for --snapshot")
    parser.add_argument("--dir", default="/dev/shm", help="where snapshots go")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    machine = f"{os.cpu_count()} x {model[0] if model else platform.machine()}, Linux {platform.release()}"
    machine += f", Python {platform.python_version()}"
    print(machine)
    args.mode(args)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine, "rows": ROWS}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
