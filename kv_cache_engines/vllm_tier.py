"""vLLM on a GPU over a pool: the tier below vLLM's own tier in host memory, shared by all vLLM processes of a host.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config":
      {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8589934592, "secondary_tiers": [
        {"type": "PoolTier", "module_path": "kv_cache_engines.vllm_tier", "pool": "vllm", "size": "64G"}]}}'

Other settings: store, tier, policy, max_entries (100,000), namespace, threads (2), and `pool_block_size` for the
block size of the pool. An entry is one chunk (`blocks_per_chunk` blocks of vLLM), of all ranks.

Its key covers vLLM's block hash (all tokens so far, cache salt, images, the name of a LoRA adapter), the namespace,
vLLM's version, dtype, layout, cache groups, sizes of block and chunk, parallelism, and the instruction set of the CPU.
The namespace names the weights. By default it is the model's name and, for a directory, the names, sizes and times of
its files. Set one where that does not distinguish what computes the KV: another revision under one name, other
`--quantization`, `--hf-overrides` or, with `--kv-cache-dtype`, `--dtype`; an adapter that was changed under its name.
vLLM's reset of its caches does not reach this tier: after a change of weights in a running engine, restart it with a
new namespace.

A chunk that has gone since its lookup, or a pool that can't be used, is a miss, with one warning. Run with vLLM 0.32.0:
its own tiering, with a CPU in place of a GPU. Not run on a GPU.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from kv_cache_engines import (
    check_fit,
    check_settings,
    digest_of,
    fitting,
    miss_on_error,
    open_pool,
    touch_all,
    warn_once,
)
from kv_cache_manager import CacheError, KVCachePool

with fitting("vllm"):
    from vllm.v1.kv_offload.base import LookupResult, Medium, RequestOffloadingContext
    from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager
    from vllm.version import __version__ as vllm_version


def open_vllm_pool(settings: Mapping[str, Any]) -> KVCachePool:
    """Open the pool; `block_size` is vLLM's word for a chunk, so that of the pool has another name here."""
    mine = {key: value for key, value in settings.items() if key != "block_size"}
    if "pool_block_size" in mine:
        mine["block_size"] = mine["pool_block_size"]
    return open_pool(mine, "vllm")


def root_of(config: Any, namespace: object, *more: object) -> str:
    """Return the digest that ends every key: all that KV depends on but a block's tokens and rank."""
    name, parallel = config.model.name, config.parallel
    if namespace is None:
        namespace = f"{name} {_files_of(name)}" if os.path.isdir(name) else name
    about = (
        f"vllm {vllm_version}", config.model.dtype, config.groups, config.cache, config.kv_cache_layout,
        config.worker_kv_bytes_per_block,
        (parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size, parallel.world_size),
        torch.backends.cpu.get_cpu_capability(), *more,
    )  # fmt: skip
    return digest_of(str(namespace), *map(str, about))


def _files_of(directory: str) -> str:
    """Return a digest of the names, sizes and times of a model's files: reading them would take minutes."""
    found = [
        f"{os.path.relpath(os.path.join(base, name), directory)} {status.st_size} {status.st_mtime_ns}"
        for base, _, names in os.walk(directory)
        for name in names
        if os.path.exists(os.path.join(base, name)) and (status := os.stat(os.path.join(base, name)))
    ]
    return digest_of(*sorted(found))


def in_order(keys: Iterable[Any], context: Any) -> list[Any]:
    """Return keys root first: the groups of a model are given one after the other."""
    return sorted(keys, key=lambda key: position_of(key, context))


def position_of(key: Any, context: Any) -> int:
    """Return the number of tokens up to the end of a chunk."""
    return int(context.get_offload_key_position(key) or 0)


class PoolTier(SecondaryTierManager):  # type: ignore[misc]
    """A `type` of `secondary_tiers`: keeps the chunks of vLLM's own host tier, all ranks in one entry."""

    medium = Medium.CPU

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        namespace: str | None = None,
        threads: int = 2,
        **settings: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        config = offloading_spec.config
        self._root = root_of(config, namespace, config.canonical_layout, self.block_size_bytes)
        check_settings(settings, "pool_block_size")
        self._pool = open_vllm_pool(settings)
        self._threads = ThreadPoolExecutor(threads, "cortex")
        self._jobs: dict[int, Future[JobResult]] = {}
        self._paths: dict[str, set[bytes]] = {}  # request -> its chunks that are, or soon will be, in the pool
        self._failed: set[bytes] = set()  # chunks whose load failed: else vLLM would ask for them again and again

    def _names(self, keys: Iterable[bytes]) -> list[str]:
        return [f"{key.hex()}.{self._root}" for key in keys]

    def _chunk(self, number: int) -> memoryview:
        """Return a chunk of the host tier as bytes."""
        chunk: memoryview = self._primary_kv_view[number : number + 1].cast("B")
        return chunk

    @miss_on_error(lambda *_: LookupResult.MISS)
    def lookup(self, key: bytes, req_context: Any) -> Any:
        if key in self._failed or self._names([key])[0] not in self._pool:
            return LookupResult.MISS
        self._paths.setdefault(req_context.req_id, set()).add(key)
        return LookupResult.HIT

    def submit_store(self, job_metadata: Any) -> None:
        self._failed.difference_update(job_metadata.keys)
        path = self._paths.setdefault(job_metadata.req_context.req_id, set())
        path.update(job_metadata.keys)
        names = self._names(in_order(path, job_metadata.req_context))
        self._jobs[job_metadata.job_id] = self._threads.submit(self._store, job_metadata, names)

    def _store(self, job: Any, path: list[str]) -> JobResult:
        started, stored = time.monotonic(), 0
        chunk_of = dict(zip(job.keys, job.chunk_ids.tolist(), strict=True))
        keys = in_order(chunk_of, job.req_context)
        each = [{"sequence_length": position_of(key, job.req_context)} for key in keys]
        values = [self._chunk(chunk_of[key]) for key in keys]
        try:
            stored = self._pool.put_path(self._names(keys), values, each, prefix_hash=self._root)
            touch_all(self._pool, path)
        except CacheError as error:
            warn_once(self, error)
        return self._result(job, keys[:stored], started)

    def submit_load(self, job_metadata: Any) -> None:
        """Pin the chunks that are there, and copy them in a thread; those that have gone since are recomputed."""
        stack, started = contextlib.ExitStack(), time.monotonic()
        views: Sequence[memoryview] = []
        try:
            views = stack.enter_context(self._pool.view_path(self._names(job_metadata.keys)))
        except CacheError as error:
            warn_once(self, error)
        self._jobs[job_metadata.job_id] = self._threads.submit(self._load, job_metadata, stack, views, started)

    def _load(self, job: Any, stack: contextlib.ExitStack, views: Sequence[memoryview], started: float) -> JobResult:
        loaded: list[bytes] = []
        with stack:
            for key, number, view in zip(job.keys, job.chunk_ids.tolist(), views, strict=False):
                if len(view) == self.block_size_bytes:
                    self._chunk(number)[:] = view
                    loaded.append(key)
        self._failed.update(set(job.keys).difference(loaded))
        return self._result(job, loaded, started)

    def _result(self, job: Any, done: list[bytes], started: float) -> JobResult:
        seconds, size = time.monotonic() - started, len(done) * self.block_size_bytes
        return JobResult(job.job_id, len(done) == len(job.keys), done, seconds, size)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        done = [job_id for job_id, job in self._jobs.items() if job.done()]
        return [self._jobs.pop(job_id).result() for job_id in done]

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    @miss_on_error(lambda *_: None)
    def on_request_finished(self, req_context: Any) -> None:
        path = self._paths.pop(req_context.req_id, ())
        touch_all(self._pool, self._names(in_order(path, req_context)), ends_prompt=True)

    def has_pending_work(self) -> bool:
        return bool(self._jobs)

    def drain_jobs(self) -> None:
        for job in list(self._jobs.values()):
            job.exception()

    def shutdown(self) -> None:
        self._threads.shutdown()
        self._pool.close()


check_fit("vllm", PoolTier)
