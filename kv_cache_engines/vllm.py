"""vLLM on a CPU over a pool: the KV of prompts outlives the server, and all vLLM processes of a host share it.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config":
      {"spec_name": "PoolOffloadingSpec", "spec_module_path": "kv_cache_engines.vllm", "pool": "vllm", "size": "16G"}}'

Settings and keys are as in `kv_cache_engines.vllm_tier`, which is for vLLM on a GPU. An entry is one chunk
(`blocks_per_chunk` blocks of vLLM) of one cache group and one rank, one copy away from vLLM's paged cache.

What `lookup` calls a hit is pinned until it has been loaded: by the scheduler, then by each worker. So it is there
even if the pool is cleared, deleted or filled meanwhile, for vLLM takes no error of a load. If the pool can't be used,
each block is a miss, with one warning. Run with vLLM 0.32.0 on a CPU.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kv_cache_engines import check_fit, digest_of, fitting, miss_on_error, touch_all, warn_once
from kv_cache_engines.vllm_tier import in_order, open_vllm_pool, position_of, root_of
from kv_cache_manager import CacheError, KVCachePool, UnsupportedError

with fitting("vllm"):
    from vllm.v1.kv_offload.base import (
        GPULoadStoreSpec,
        LoadStoreSpec,
        LookupResult,
        OffloadingManager,
        OffloadingSpec,
        OffloadingWorker,
        PrepareStoreOutput,
        RequestOffloadingContext,
        TransferResult,
        get_offload_group_idx,
    )
    from vllm.v1.metrics.cache_hit_source import CacheHitSource


def _claim_of(engine_id: str, rank: int) -> str:
    return f"worker {rank} of vLLM {digest_of(engine_id)}"


@dataclass
class PoolSpec(LoadStoreSpec):  # type: ignore[misc]
    """What the scheduler sends to the workers about one transfer; it is pickled on the way."""

    keys: list[bytes]
    root: str
    positions: list[int] = field(default_factory=list)  # of a store: the token at which each key ends
    path: list[bytes] = field(default_factory=list)  # of a store: all chunks of the request, root first
    tickets: list[bytes] = field(default_factory=list)  # of a load: for each rank, see KVCachePool.share


def _name(key: bytes, root: str, rank: int) -> str:
    return f"{key.hex()}.{root}.{rank}"


class PoolManager(OffloadingManager):  # type: ignore[misc]
    """The scheduler's side: finds chunks, and pins what will be loaded.

    A chunk that `lookup` found stays pinned until the end of the next step, or until its load is complete. All methods
    run in the scheduler's thread.
    """

    def __init__(self, pool: KVCachePool, root: str, config: Any) -> None:
        self._pool, self._root, self._config = pool, root, config
        self._ranks = range(config.parallel.world_size)
        self._users: Counter[bytes] = Counter()  # of each pinned chunk: lookups of this step, and loads
        self._found: set[bytes] = set()  # by lookups of this step, not loaded by any request yet
        self._found_before: set[bytes] = set()  # the same of the step before
        self._paths: dict[str, set[bytes]] = {}  # request -> its chunks that are, or soon will be, in the pool
        self._abandoned: list[bytes] = []  # chunks of loads that a reset has cut off
        self._step = self._blind_until = 0  # steps that have ended; nothing is found until the second
        self._may_load: bool | None = None  # not known yet

    def _names(self, key: bytes) -> list[str]:
        return [_name(key, self._root, rank) for rank in self._ranks]

    @miss_on_error(lambda *_: LookupResult.MISS)
    def lookup(self, key: bytes, req_context: Any) -> Any:
        if key not in self._found:
            if self._step < self._blind_until or (key not in self._users and not self._pin(key)):
                return LookupResult.MISS
            self._found.add(key)
            if key in self._found_before:
                self._found_before.discard(key)
            else:
                self._users[key] += 1
        self._paths.setdefault(req_context.req_id, set()).add(key)
        return LookupResult.HIT

    def _pin(self, key: bytes) -> bool:
        """Pin a chunk of all ranks; return False, with none pinned, if one is missing."""
        names = self._names(key)
        if not all(name in self._pool for name in names) or not self._workers_are_here():
            return False
        for number, name in enumerate(names):
            if not self._pool.pin(name):
                for other in names[:number]:
                    self._pool.unpin(other)
                return False
        return True

    def _workers_are_here(self) -> bool:
        """Return True if the workers have this very pool open: not one that was deleted, or made, as they started."""
        if self._may_load is None:
            names = [_claim_of(self._config.engine_id, rank) for rank in self._ranks]
            free = [name for name in names if self._pool.claim(name)]
            for name in free:
                self._pool.unclaim(name)
            self._may_load = not free
            if free:
                warn_once(self, CacheError(f"pool {self._pool.name!r} was made anew as vLLM started: restart vLLM"))
        return self._may_load

    def _unpin(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                for name in self._names(key):
                    self._pool.unpin(name)

    def get_load_source(self, key: bytes, req_context: Any) -> Any:
        return CacheHitSource.HOST

    def prepare_load(self, keys: Collection[bytes], req_context: Any) -> PoolSpec:
        """Keep the pins of these chunks, which lookups of this step have found, until `complete_load`."""
        keys = list(keys)
        for key in keys:
            if key in self._found:
                self._found.discard(key)  # that user is this load now
            else:
                self._users[key] += 1  # another request loads it too
        self._use_path(req_context)  # before this request's own stores could evict its beginning
        tickets = [self._pool.share([_name(key, self._root, rank) for key in keys]) for rank in self._ranks]
        return PoolSpec(keys, self._root, tickets=tickets)

    @miss_on_error(lambda *_: None)
    def complete_load(self, keys: Collection[bytes], req_context: Any) -> None:
        self._unpin(keys)

    @miss_on_error(lambda *_: None)
    def on_schedule_end(self, context: Any) -> None:
        """Unpin what was found in the step before, and not in this one again, as by a request that waits for blocks."""
        unused, self._found_before, self._found = self._found_before, self._found, set()
        self._step += 1
        self._unpin(unused)
        if self._step == self._blind_until:
            abandoned, self._abandoned = self._abandoned, []
            self._unpin(abandoned)
            self._delete_all()

    def has_pending_work(self) -> bool:
        """Return True while pins wait for a step to end: vLLM then makes steps without requests."""
        return bool(self._found_before) or self._step < self._blind_until

    def prepare_store(self, keys: Collection[bytes], req_context: Any) -> PrepareStoreOutput:
        try:
            missing = [key for key in keys if not all(name in self._pool for name in self._names(key))]
        except CacheError as error:
            warn_once(self, error)
            missing = []
        path = self._paths.setdefault(req_context.req_id, set())
        path.update(keys)
        positions = [position_of(key, req_context) for key in missing]
        spec = PoolSpec(missing, self._root, positions, in_order(path, req_context) if missing else [])
        return PrepareStoreOutput(missing, spec, [])

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: Any) -> None:
        self._use_path(req_context, ends_prompt=True)
        self._paths.pop(req_context.req_id, None)

    @miss_on_error(lambda *_: None)
    def _use_path(self, context: Any, ends_prompt: bool = False) -> None:
        """Count a use of the chunks of a request, root last, so that tails are evicted before heads."""
        path = in_order(self._paths.get(context.req_id, ()), context)
        for rank in self._ranks if path else ():
            touch_all(self._pool, [_name(key, self._root, rank) for key in path], ends_prompt)

    @miss_on_error(lambda *_: None)
    def reset_cache(self) -> None:
        """Delete all entries with our keys, as the weights may have changed.

        vLLM forgets its loads and stores under way, and workers end them within as many steps as it has batches under
        way. Until then nothing is found; then the pins of the loads end, and what was stored meanwhile is deleted.
        """
        loading = Counter(self._users) - Counter(self._found) - Counter(self._found_before)
        self._abandoned = list(loading.elements())  # also those of a reset before, which are users still
        self._blind_until = self._step + self._config.parallel.pp_size + 2
        self._delete_all()

    def _delete_all(self) -> None:
        for entry in self._pool.find_by_prefix(self._root):
            self._pool.delete(entry.key)

    def shutdown(self) -> None:
        self._pool.close()


class PoolWorker(OffloadingWorker):  # type: ignore[misc]
    """A worker's side: copies between its paged cache and the pool, loads in one thread and stores in another."""

    def __init__(self, pool: KVCachePool, config: Any, kv_caches: Any) -> None:
        if any(each.tensor.device.type != "cpu" for each in kv_caches.tensors):
            raise UnsupportedError("PoolOffloadingSpec is for vLLM on a CPU: on a GPU use PoolTier as a secondary tier")
        self._pool, self._rank, self._blocks_per_chunk = pool, config.parallel.rank, config.cache.blocks_per_chunk
        tensors = [each.tensor.numpy() for each in kv_caches.tensors]
        self._layers: list[list[Any]] = []  # of each cache group: arrays of (blocks, bytes)
        for refs in kv_caches.group_data_refs:
            sizes: dict[int, int] = {}  # layers may share a tensor
            for ref in refs:
                sizes[ref.tensor_idx] = max(ref.page_size_bytes, sizes.get(ref.tensor_idx, 0))
            self._layers.append([tensors[number][:, :size] for number, size in sorted(sizes.items())])
        self._group_ids = [group.group_id for group in config.groups]
        self._block_bytes = [sum(layer.shape[1] for layer in layers) for layers in self._layers]
        self._threads = {kind: ThreadPoolExecutor(1, f"cortex-{kind}") for kind in ("store", "load")}
        self._jobs: dict[int, Future[tuple[int, float]]] = {}
        claim = _claim_of(config.engine_id, self._rank)  # see PoolManager._workers_are_here; it lives as its thread
        self._threads["load"].submit(pool.claim, claim).result()

    def _pieces(self, gpu: GPULoadStoreSpec) -> Iterator[tuple[int, int, int, int]]:
        """Yield (number of the chunk, group, place in the chunk, block) for each block of a transfer.

        A load may begin within a chunk, if its head is in vLLM's own cache.
        """
        per_chunk, at, chunk = self._blocks_per_chunk, 0, 0
        for group, (size, first) in enumerate(zip(gpu.group_sizes, gpu.block_indices, strict=True)):
            for place, block in enumerate(gpu.block_ids[at : at + size].tolist(), first % per_chunk):
                yield chunk + place // per_chunk, group, place % per_chunk, block
            at += size
            chunk += -(-(first % per_chunk + size) // per_chunk) if size else 0

    def _copy(self, group: int, block: int, chunk: Any, place: int, *, into_pool: bool) -> None:
        """Copy one block of all layers between the paged cache and its place in a chunk, an array of bytes."""
        at = place * self._block_bytes[group]
        for layer in self._layers[group]:
            row, part = layer[block], chunk[at : at + layer.shape[1]]
            if into_pool:
                part[:] = row
            else:
                row[:] = part
            at += layer.shape[1]

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: PoolSpec) -> bool:
        self._jobs[job_id] = self._threads["store"].submit(self._store, src_spec, dst_spec)
        return True

    def _store(self, source: GPULoadStoreSpec, target: PoolSpec) -> tuple[int, float]:
        """Store chunks as far as the pool takes them; return (bytes, seconds)."""
        started, moved = time.monotonic(), 0
        per_group = Counter(map(get_offload_group_idx, target.keys))
        for group_id, size, first in zip(self._group_ids, source.group_sizes, source.block_indices, strict=True):
            if size + first % self._blocks_per_chunk != per_group[group_id] * self._blocks_per_chunk:
                return 0, 0.0  # a block that left its sliding window is missing: which chunk lacks it is not known
        pieces: list[list[tuple[int, int, int]]] = [[] for _ in target.keys]
        for number, *piece in self._pieces(source):
            pieces[number].append(tuple(piece))  # type: ignore[arg-type]
        whole = [number for number, blocks in enumerate(pieces) if len(blocks) == self._blocks_per_chunk]
        order = sorted(whole, key=target.positions.__getitem__)
        names = [_name(target.keys[number], target.root, self._rank) for number in order]
        sizes = [self._block_bytes[pieces[number][0][0]] * self._blocks_per_chunk for number in order]
        each = [{"sequence_length": target.positions[number]} for number in order]
        try:
            with self._pool.reserve_path(names, sizes, each, zero=False, prefix_hash=target.root) as views:
                for number, view in zip(order, views, strict=False):
                    if view is not None:  # else it is there already
                        chunk = _array_of(view)
                        for group, place, block in pieces[number]:
                            self._copy(group, block, chunk, place, into_pool=True)
                        moved += len(view)
                        del chunk
            touch_all(self._pool, [_name(key, target.root, self._rank) for key in target.path])
        except CacheError as error:
            warn_once(self, error)
        return moved, time.monotonic() - started

    def submit_load(self, job_id: int, src_spec: PoolSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False) -> bool:
        """Pin the chunks for this process too, and copy them in a thread. (`expedited`: vLLM 0.33.)"""
        stack = contextlib.ExitStack()
        views = stack.enter_context(self._pool.view_shared(src_spec.tickets[self._rank]))
        self._jobs[job_id] = self._threads["load"].submit(self._load, stack, views, dst_spec)
        return True

    def _load(self, stack: contextlib.ExitStack, views: Sequence[memoryview], target: Any) -> tuple[int, float]:
        started = time.monotonic()
        with stack:
            chunks = list(map(_array_of, views))
            for number, group, place, block in self._pieces(target):
                self._copy(group, block, chunks[number], place, into_pool=False)
            moved = sum(map(len, views))
            del chunks
        return moved, time.monotonic() - started

    def get_finished(self) -> list[TransferResult]:
        done = [job_id for job_id, job in self._jobs.items() if job.done()]
        return [TransferResult(job_id, True, *self._jobs.pop(job_id).result()) for job_id in done]

    def wait(self, job_ids: set[int]) -> None:
        for job_id in job_ids & self._jobs.keys():
            self._jobs[job_id].result()

    def shutdown(self) -> None:
        for thread in self._threads.values():
            thread.shutdown()
        self._pool.close()


def _array_of(view: memoryview) -> Any:
    return np.frombuffer(view, dtype=np.int8)


class PoolOffloadingSpec(OffloadingSpec):  # type: ignore[misc]
    """The `spec_name` of vLLM's OffloadingConnector: a pool as the offloading tier of vLLM on a CPU."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.canonical_layout:
            raise UnsupportedError("PoolOffloadingSpec has one layout: leave canonical_layout out of its settings")

    def get_manager(self) -> PoolManager:
        root = root_of(self.config, self.extra_config.get("namespace"))
        return PoolManager(open_vllm_pool(self.extra_config), root, self.config)

    def get_worker(self, kv_caches: Any) -> PoolWorker:
        return PoolWorker(open_vllm_pool(self.extra_config), self.config, kv_caches)


check_fit("vllm", PoolManager, PoolWorker, PoolOffloadingSpec)
