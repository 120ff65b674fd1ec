"""SGLang's HiCache over a pool: pages of KV outlive the engine, and all engines of a host share them.

    --enable-hierarchical-cache --hicache-mem-layout page_first
    --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
    '{"backend_name": "cortex", "module_path": "kv_cache_engines.sglang", "class_name": "PoolHiCache",
      "interface_v1": 1, "pool": "sglang", "size": "16G"}'

Without `"interface_v1": 1` SGLang takes a path with more copies. Other settings: store, tier, policy, block_size,
max_entries (100,000 pages by default), namespace (names the weights; by default the model's name). A page has one copy
between SGLang's host memory and the pool. An engine that can't reach the pool goes on without it, and warns once.

Its key covers: the page hash (tokens so far, and SGLang's salt), namespace, dtype, layout and page size of the host
memory, and the ranks of tensor, pipeline and context parallelism (MLA models share pages between tensor ranks).
Run with SGLang 0.5.23: its own abstract class and backend factory with a stand-in for host memory, as the engine does
not install without CUDA. Not run on a GPU. Hybrid models (Mamba, sliding windows) get no pages from it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from kv_cache_engines import digest_of, fitting, miss_on_error, open_pool

with fitting("sglang"):
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult


def _none(keys: Sequence[str], *_: Any) -> list[bool]:
    return [False] * len(keys)


class PoolHiCache(HiCacheStorage):  # type: ignore[misc]
    """The pages of one rank in a pool of `CacheStore`, made by the first rank or engine that asks for it."""

    def __init__(self, storage_config: Any, kwargs: dict[str, Any] | None = None) -> None:
        config, extra = storage_config, dict(storage_config.extra_config or {})
        self._scope = [  # of a page's key: all but its hash and the layout of host memory
            str(extra.get("namespace") or config.model_name or ""),
            f"pp {config.pp_rank} of {config.pp_size}",
            f"cp {config.attn_cp_rank} of {config.attn_cp_size}",
        ]
        if not config.is_mla_model:
            self._scope.append(f"tp {config.tp_rank} of {config.tp_size}")
        self._root = ""  # the digest of scope and host memory that ends every key
        self.pool = open_pool(extra, "sglang")

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        host = mem_pool_host  # its dtype and layout are known only now
        about = [str(host.dtype), host.layout, str(host.page_size), str(getattr(host, "storage_format_tag", None))]
        self._root = digest_of(*self._scope, *about)

    def _keys(self, pages: Sequence[str] | None) -> list[str]:
        return [f"{page}.{self._root}" for page in pages or ()]

    # --- interface v1: one copy between host memory and the pool -----------------------------------------------------

    def _parts(self, host_indices: Any) -> list[list[tuple[int, int]]]:
        """Return (address, bytes) of each part of each page, which may lie in several places of host memory."""
        addresses, sizes = self.mem_pool_host.get_page_buffer_meta(host_indices)
        parts = list(zip(addresses, sizes, strict=True))
        each = len(parts) // max(len(host_indices) // self.mem_pool_host.page_size, 1)
        return [parts[at : at + each] for at in range(0, len(parts), max(each, 1))]

    @miss_on_error(_none)
    def batch_set_v1(self, keys: Sequence[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Store the pages that are not there yet; return which of all are there now, a leading run."""
        pages, names = self._parts(host_indices), self._keys(keys)
        before = self._keys(getattr(extra_info, "prefix_keys", None))
        sizes = [sum(size for _, size in page) for page in pages]
        each = [{"sequence_length": (len(before) + number) * self._page_size()} for number in range(1, len(names) + 1)]
        with self.pool.reserve_path(names, sizes, each, zero=False, prefix_hash=self._root) as targets:
            for page, target in zip(pages, targets, strict=False):
                if target is not None:
                    _copy(page, target, into_pool=True)
        if before:  # they came with earlier calls: without this, they would be evicted before the new tail
            self.pool.touch(before + names[: len(targets)])
        return [True] * len(targets) + [False] * (len(names) - len(targets))

    @miss_on_error(_none)
    def batch_get_v1(self, keys: Sequence[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Copy pages into host memory, up to the first that is missing; return which."""
        done = 0
        with self.pool.view_path(self._keys(keys)) as views:
            for page, view in zip(self._parts(host_indices), views, strict=False):
                if len(view) != sum(size for _, size in page):
                    break
                _copy(page, view, into_pool=False)
                done += 1
        return [True] * done + [False] * (len(keys) - done)

    @miss_on_error(lambda *_: 0)
    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:
        return self.pool.count_path(self._keys(keys))

    @miss_on_error(lambda *_: False)
    def exists(self, key: str) -> bool:
        return self._keys([key])[0] in self.pool

    def _page_size(self) -> int:
        return int(getattr(self.mem_pool_host, "page_size", 1))

    # --- one tensor at a time, which SGLang calls without interface v1 ------------------------------------------------

    @miss_on_error(lambda *_: None)
    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        with self.pool.view(self._keys([key])[0]) as view:
            if view is None:
                return None
            if target_location is None:
                return torch.frombuffer(bytearray(view), dtype=torch.uint8)
            target = _bytes_of(target_location)
            if len(target) != len(view):
                return None
            target[:] = view
            return target_location

    def batch_get(self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        targets = target_locations or [None] * len(keys)
        return [self.get(key, target) for key, target in zip(keys, targets, strict=True)]

    @miss_on_error(lambda *_: False)
    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        data = _bytes_of(value.contiguous())
        return self.pool.put(self._keys([key])[0], data, if_absent=True, prefix_hash=self._root)

    def batch_set(
        self, keys: Sequence[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        return all(self.set(key, value) for key, value in zip(keys, values, strict=True))

    # --- interface v2: hybrid models ---------------------------------------------------------------------------------

    def batch_exists_v2(self, keys: Sequence[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        """Find nothing: a prefix of KV without the state of its other layers is of no use."""
        return PoolTransferResult.empty()

    def batch_get_v2(self, transfers: Any, extra_info: Any = None) -> dict[str, list[bool]]:
        return {transfer.name: _none(transfer.keys or ()) for transfer in transfers}

    def batch_set_v2(self, transfers: Any, extra_info: Any = None) -> dict[str, list[bool]]:
        return {transfer.name: _none(transfer.keys or ()) for transfer in transfers}

    # -----------------------------------------------------------------------------------------------------------------

    @miss_on_error(lambda *_: None)
    def clear(self) -> None:
        """Delete the pages whose keys end with our root; the pool may hold those of other engines."""
        for entry in self.pool.find_by_prefix(self._root):
            self.pool.delete(entry.key)

    def close(self) -> None:
        self.pool.close()


def _bytes_of(tensor: Any) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _copy(parts: Sequence[tuple[int, int]], value: memoryview, *, into_pool: bool) -> None:
    """Copy between host memory, in parts of (address, bytes), and a value of the pool."""
    at = 0
    for address, size in parts:
        part = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
        if into_pool:
            value[at : at + size] = part
        else:
            part[:] = value[at : at + size]
        at += size
