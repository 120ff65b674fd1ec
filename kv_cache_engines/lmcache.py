"""LMCache over a pool: its objects (chunks of KV) outlive LMCache's server, and all servers of a host share them.

    lmcache server --l1-size-gb 4 --eviction-policy LRU --l2-adapter '{
        "type": "plugin", "module_path": "kv_cache_engines.lmcache", "class_name": "PoolL2Adapter",
        "adapter_params": {"pool": "lmcache", "size": "16G"}}'

Other settings: store, tier, policy, block_size, max_entries (100,000 objects by default), namespace (below), threads
that copy (2). An object has one copy between LMCache's memory and the pool. LMCache's lock is a pin: it ends with the
unlock, the adapter or the process. A server that can't reach the pool goes on without it, and warns once.

A key covers: namespace, the chunk hash (tokens so far), the model's name, rank and world size, object group and cache
salt. Shapes and dtypes are stored with an object, and compared when it is loaded. LMCache's key has no more: set
`namespace` where one model name stands for several weights, or where block size or attention kernel change how an
engine lays out what it gives to LMCache, or where servers have different `serde`.
Run with LMCache 0.5.6: its own check of adapters, and its multi-process server with vLLM 0.32.0, on a CPU.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from kv_cache_engines import check_settings, digest_of, fitting, miss_on_error, open_pool, touch_all, warn_once
from kv_cache_manager import CacheError

with fitting("lmcache"):
    from lmcache.lmcache_native import Bitmap
    from lmcache.v1.distributed.internal_api import L2StoreResult
    from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
    from lmcache.v1.platform import create_event_notifier

NAMES_REMEMBERED = 50_000  # of the objects of the last lookups, some 200 bytes each
LOOKUP_LIFETIME = 300.0  # seconds until LMCache has given up a lookup whose result it does not fetch
_logger = logging.getLogger(__name__)
_root_of = functools.lru_cache(4096)(digest_of)


class _Lookup:
    """One lookup: its result, the path that it asked for, and the keys that it pinned."""

    def __init__(self, num_keys: int, path: Sequence[str] = ()) -> None:
        self.found = Bitmap(num_keys)
        self.path = path
        self.pinned: list[Any] = []
        self.num_pins = 0
        self.since = time.monotonic()


class PoolL2Adapter(L2AdapterInterface):  # type: ignore[misc]
    """LMCache's objects in a pool of `CacheStore`, made by the first server that asks for it.

    One thread looks up, pins and unpins, so that no lookup waits for a copy, and it alone changes `_pins`. Others copy.
    LMCache waits for the result of each task: a task always leaves one.
    """

    def __init__(self, adapter_params: Mapping[str, Any], l1_memory_desc: Any = None) -> None:
        super().__init__()  # without a capacity, which LMCache would keep free: the pool evicts by itself
        check_settings(adapter_params, "namespace", "threads")
        self._namespace = str(adapter_params.get("namespace", ""))
        self._copiers = ThreadPoolExecutor(int(adapter_params.get("threads", 2)), "kv-cache-copy")
        self._looker = ThreadPoolExecutor(1, "kv-cache-lookup")
        self.pool = open_pool(adapter_params, "lmcache")
        self._events = {kind: create_event_notifier() for kind in ("store", "lookup", "load")}
        self._results: dict[str, dict[int, Any]] = {kind: {} for kind in self._events}
        self._lock = threading.Lock()  # of the results
        self._numbers = itertools.count()
        self._pins: dict[Any, list[_Lookup]] = {}  # LMCache's key -> the lookups that have pinned it
        self._paths: dict[str, tuple[Sequence[str], int]] = {}  # key -> the last path looked up with it, where in it
        self._sizes: dict[Any, int] = {}  # LMCache's key -> the bytes that LMCache's own eviction counts for it

    # --- tasks -------------------------------------------------------------------------------------------------------

    def _submit(self, kind: str, threads: ThreadPoolExecutor, work: Callable[[], Any], otherwise: Any) -> int:
        """Start a task; return its number. Its result is that of `work`, or `otherwise` after an error."""
        number = next(self._numbers)

        def run() -> None:
            result = _result_of(work, otherwise)
            with self._lock:
                self._results[kind][number] = result
            self._events[kind].notify()

        threads.submit(run)
        return number

    def get_store_event_fd(self) -> int:
        return int(self._events["store"].fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        return int(self._events["lookup"].fileno())

    def get_load_event_fd(self) -> int:
        return int(self._events["load"].fileno())

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        work = functools.partial(self._store, keys, objects)
        return self._submit("store", self._copiers, work, L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        with self._lock:
            done, self._results["store"] = self._results["store"], {}
        return done

    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: Any) -> int:
        """Look up objects and pin them. The layouts are LMCache's, which `serde` changes: `_load` compares the real."""
        return self._submit("lookup", self._looker, functools.partial(self._lookup, keys), _Lookup(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        with self._lock:
            lookup = self._results["lookup"].pop(task_id, None)
        return lookup and lookup.found

    def submit_unlock(self, keys: list[Any]) -> None:
        self._looker.submit(_result_of, functools.partial(self._unlock, keys), None)

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        work = functools.partial(self._load, keys, objects)
        return self._submit("load", self._copiers, work, Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Any:
        with self._lock:
            return self._results["load"].pop(task_id, None)

    # --- keys --------------------------------------------------------------------------------------------------------

    def _key(self, key: Any) -> str:
        """Return the pool's key of LMCache's key: 64 digits for the tokens, 16 for all else."""
        about = (key.model_name, str(key.kv_rank), str(key.object_group_id), key.cache_salt)
        return f"{key.chunk_hash.hex()}.{_root_of(self._namespace, *about)}"

    # --- the work of the tasks ---------------------------------------------------------------------------------------

    def _lookup(self, keys: list[Any]) -> _Lookup:
        """Pin the objects that are there, each on its own: of a sliding window LMCache needs the last ones only."""
        self._end_unfetched()
        names = list(map(self._key, keys))
        lookup = _Lookup(len(keys), _by_depth(names))
        try:
            for number, (key, name) in enumerate(zip(keys, names, strict=True)):
                if name in self.pool and self.pool.pin(name):
                    self._pins.setdefault(key, []).append(lookup)
                    lookup.pinned.append(key)
                    lookup.num_pins += 1
                    lookup.found.set(number)
        except CacheError as error:  # no miss_on_error: what is pinned by now must be reported, or it stays so
            warn_once(self, error)
        for place, name in enumerate(lookup.path):
            self._paths.pop(name, None)
            self._paths[name] = lookup.path, place
        while len(self._paths) > NAMES_REMEMBERED:
            del self._paths[next(iter(self._paths))]
        return lookup

    @miss_on_error(lambda *_: None)
    def _unlock(self, keys: list[Any]) -> None:
        """End one pin of each key, of those that a lookup has pinned; after its last one count a use of its path.

        Not earlier: the tail that LMCache has loaded meanwhile would else outlive the head that LMCache had already.
        """
        for key in keys:
            lookups = self._pins.get(key, [])
            if lookups and self.pool.unpin(self._key(key)):
                lookup = lookups.pop(0)
                if not lookups:
                    del self._pins[key]
                lookup.num_pins -= 1
                if not lookup.num_pins:
                    touch_all(self.pool, dict.fromkeys(lookup.path))

    def _end_unfetched(self) -> None:
        """End the pins of old lookups: LMCache never fetches the results of a request that it aborts."""
        with self._lock:
            results = self._results["lookup"]
            until = time.monotonic() - LOOKUP_LIFETIME
            old = {number: lookup for number, lookup in results.items() if lookup.pinned and lookup.since < until}
            results.update({number: _Lookup(len(lookup.found)) for number, lookup in old.items()})
        for lookup in old.values():
            self._unlock(lookup.pinned)

    @miss_on_error(lambda *_: L2StoreResult(False, 0))
    def _store(self, keys: list[Any], objects: list[Any]) -> Any:
        """Store the objects that are not there yet. Success means that all are there: LMCache may then drop its own."""
        given = {self._key(key): (key, obj) for key, obj in zip(keys, objects, strict=True)}
        layouts = [_layout_of(name, obj) for name, (_, obj) in given.items()]
        values, new = [_bytes_of(obj) for _, obj in given.values()], list[bool]()
        for name, layout, value in zip(given, layouts, values, strict=True):
            entry = self.pool.peek(name)
            new.append(entry is None or (entry.prefix_hash, entry.size) != (layout, len(value)))
            if entry is not None and new[-1]:  # of another dtype, say
                self.pool.delete(name)
        num_there = self.pool.put_path(list(given), values, [{"prefix_hash": layout} for layout in layouts])
        there = list(given)[:num_there]
        sizes = [(given[name][0], len(value)) for name, value in zip(there, values, strict=False)]
        stored = dict(itertools.compress(sizes, new))
        self._report_stored(stored)
        deepest: dict[int, tuple[Sequence[str], int]] = {}
        for path, place in (self._paths.get(name, ((), 0)) for name in there):
            deepest[id(path)] = path, max(place, deepest.get(id(path), (path, 0))[1])
        for path, place in deepest.values():  # chunks before these came with earlier tasks
            touch_all(self.pool, dict.fromkeys(path[: place + 1]))
        return L2StoreResult(num_there == len(given), sum(stored.values()))

    @miss_on_error(lambda keys, *_: Bitmap(len(keys)))
    def _load(self, keys: list[Any], objects: list[Any]) -> Any:
        """Copy objects out of the pool; those of another size, dtype or shape are misses."""
        names, done, begin = list(map(self._key, keys)), Bitmap(len(keys)), 0
        while begin < len(names):
            with self.pool.view_path(names[begin:]) as views:  # up to the first that is missing
                for number, (view, entry) in enumerate(zip(views, views.entries, strict=True), begin):
                    obj = objects[number]
                    target = _bytes_of(obj)
                    if len(view) == len(target) and entry.prefix_hash == _layout_of(names[number], obj):
                        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(view, np.uint8))  # without the GIL
                        done.set(number)
                begin += len(views) + 1
        self._notify_keys_accessed(done.gather(keys))
        return done

    # --- what LMCache counts and deletes -----------------------------------------------------------------------------

    def _report_stored(self, sizes: dict[Any, int]) -> None:
        """Tell LMCache of new objects; first that those of them which it counts already have been evicted."""
        if self._listeners:  # its own eviction, by quotas, counts objects; nothing else needs their sizes
            again = [key for key in sizes if key in self._sizes]
            if again:
                self._notify_keys_deleted(again, [self._sizes[key] for key in again])
            self._sizes.update(sizes)
        if sizes:
            self._notify_keys_stored(list(sizes), list(sizes.values()))

    @miss_on_error(lambda *_: None)
    def delete(self, keys: list[Any]) -> None:
        """Delete objects. Report all as deleted: LMCache would else ask again for those that the pool has evicted."""
        sizes: list[int] = []
        for key in keys:
            entry = self.pool.peek(self._key(key))
            self.pool.delete(self._key(key))
            sizes.append(self._sizes.pop(key, entry.size if entry else 0))
        self._notify_keys_deleted(keys, sizes)

    def report_status(self) -> dict[str, Any]:
        status = {"type": type(self).__name__, "locked_key_count": len(self._pins)}
        try:
            return {**status, "is_healthy": True, "stored_object_count": len(self.pool)}
        except CacheError:
            return {**status, "is_healthy": False}

    def close(self) -> None:
        """End waiting tasks without a result, wait for those that run, as they use LMCache's memory; end all pins."""
        for threads in (self._copiers, self._looker):
            threads.shutdown(cancel_futures=True)
        self.pool.close()
        for event in self._events.values():
            event.close()


def _result_of(work: Callable[[], Any], otherwise: Any) -> Any:
    """Return the result of a task, or `otherwise` after an error, which is logged: LMCache waits for a result."""
    try:
        return work()
    except Exception:
        _logger.exception("a task of LMCache's adapter failed, which is a miss")
        return otherwise


def _by_depth(names: Sequence[str]) -> list[str]:
    """Return the keys of a lookup in the order of one path, the parts of a chunk side by side.

    LMCache asks for rows: all chunks of an object group on a rank, then of the next. A chunk needs its parts in all.
    """
    depths: Counter[str] = Counter()
    ordered: list[tuple[int, int]] = []
    for number, name in enumerate(names):
        row = name.rpartition(".")[2]
        ordered.append((depths[row], number))
        depths[row] += 1
    return [names[number] for _, number in sorted(ordered)]


def _layout_of(name: str, obj: Any) -> str:
    """Return what is stored with an object as its prefix_hash: a digest of its row, shapes and dtypes."""
    about = obj.metadata
    tensors = zip(about.shapes or [about.shape], about.dtypes or [about.dtype], strict=True)
    return _root_of(name.rpartition(".")[2], *(f"{dtype} {tuple(shape)}" for shape, dtype in tensors))


def _bytes_of(obj: Any) -> memoryview:
    return memoryview(obj.byte_array).cast("B")
