"""Tests of kv_cache_engines against the real packages. What is not installed is left out, with a word."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kv_cache_manager import CachePoolConfig, CacheStore, KVCachePool

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
        with CacheStore().create(CachePoolConfig("sglang", 80 << 10)) as pool:
            ends = [result_of(process) for process in [engine(*lines), engine(*lines)]]
            assert ends == [(0, "True\n", "")] * 2
            assert pool.check() == []
            assert pool.get_stats()["pinned_entries"] == 0

    def test_killed_while_it_stores_it_leaves_whole_pages(self) -> None:
        lines = (
            "host = Host(64); backend = make_backend(host); fill(host, *range(64)); print('ready', flush=True)",
            "while True:",
            "    backend.batch_set_v1(keys_of(64), indices(*range(64))); backend.clear()",
        )
        make_backend(Host(1)).close()
        for _ in range(3):
            with engine(*lines) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
                process.send_signal(signal.SIGKILL)
            host = Host(64)
            backend = make_backend(host)
            done = backend.batch_get_v1(keys_of(64), indices(*range(64)))
            for page in range(64):
                assert bool((host.kv_buffer[:, page] == (1 + page if done[page] else 0)).all())
            assert backend.pool.check() == []
            backend.close()
