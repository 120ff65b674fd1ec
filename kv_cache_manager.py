#!/usr/bin/env python3
"""One shared-memory KV cache, many processes, no server.

A *pool* keeps the key-value blocks of transformer attention in one named segment: POSIX shared memory (tier "cpu")
or a preallocated file (tier "nvme"). Every process of the host opens it by name, reads and writes at memory speed,
and may be killed at any instruction. `KVCachePool` is the library, `cortex cache ...` the shell; see README.md.

The sections of this module, from the bottom up:

errors, sizes, data types    names, layout, checks
BitmapAllocator              which blocks are free
EvictionOrder, AdaptiveOrder which entry is evicted next, by slot; `EvictionManager`: by key
planning                     which entries to evict and move so that free blocks lie together: pure functions
Memory, Segment              the mapped memory, its file and its locks
EntryTable                   records and their chains; nothing else knows the offsets of their fields
Pins, Uses                   the pins of all sessions; the uses that readers without the lock have noted
Space, Index                 all work under the lock. `Space` evicts, moves and reclaims, `Index` does the rest
Snapshot                     the file format
_Handle, _Paths, KVCachePool a pool as one process has it open: takes the lock, copies outside it, returns views
buffers, tensors, restore    arrays in and out; a snapshot into a pool; the end of a process, and forks
PrefixCache                  tokens to keys, KV to blocks, by the public methods of a pool
CacheStore                   names to pools
replay, command line         hit ratios of a trace; `cortex`

Words
-----
block       the unit of the data region; a value takes whole blocks that lie together, its extent
slot        the number of an entry's place in the index, from 1; 0 means none
record      the data that the index keeps for a slot: the place of the value, its key, its pins
generation  a number of an entry, new each time its value is put, moved or replaced, or the index is rebuilt
seal        the first word of a record: its state and its generation
state       FREE; WRITING, a value being stored; COMPLETE, an entry; CONDEMNED, removed while a reader has it pinned
chain       the slots whose keys, or prefix hashes, share a hash
order       the order of eviction: a list of slots for each policy key, by which the policy sorts first
victim      an entry to be evicted: the next one is the first of the order that no session pins
ghost       the data that the policy adaptive keeps about an entry that was evicted
path        the keys of the blocks of one prompt, root first
parent      the block before another one in the path that stored or touched it; blocks without a known one are roots
part        some keys of a path, up to 64 or 256: the lock is taken once for each part
use         slot | generation << 32: names an entry as a reader without the lock found it
claim       a lock on a byte that stands for a key: the process that holds it computes the value
handle      a `KVCachePool`: a pool as one process has it open
session     a handle as others see it: a number, a pid, a lock that the kernel releases when the process dies
token       the number by which a handle knows one thing that it holds: a pin, a view, a value being stored
pin         keeps an entry from being evicted, moved or replaced
settle      clear the pins and writes of dead processes, and of calls that an error or interrupt has cut off
transient   of a pool: it lives as long as some process has it open

The segment
-----------
Byte offsets. Every section starts where the one before it ends, rounded up as noted:

    offset            size                          section
    0                 4096                          header: 0 magic, 8 version and checksum, 16 geometry (fixed),
                                                    512 state words (64, from DIRTY on), 1024 config as JSON
    4096              ceil(num_blocks / 8),         bitmap: 1 bit a block, 1 = in use
                      rounded up to 4096
    data_offset       num_blocks * block_size       data region: the values
    index_offset      3 * 128 * 8                   session table, three words a session, column by column: pid of the
                                                    open handle, 0 = free; slot that its current view reads, 0 = none;
                                                    misses
                      128 * 32 * 16                 uses noted, 32 for each session: slot | generation << 32, 0 = none;
                                                    then the monotonic time of each
                      2 * num_slots * 4             heads of the key chains, heads of the prefix chains
                      64 * num_slots + 104          eviction order: a 40-byte node a slot, a 24-byte bucket a slot
                      440 * (num_slots + 1)         entry table: one record a slot; slot 0 is never used
                      16 * config.record            the last accesses, a ring: digest of the key; size * 4, + 2 for
                                                    the first one of a request, + 1 for a hit
    (rounded up to a page)
                      384 * num_slots               ghosts of evicted entries, once the policy is adaptive

A record is 112 bytes of fields (`RECORD`) and 328 bytes of text: key, prefix hash, tensor description. Its last four
bytes, where the texts leave them, are the hash of the key of its parent, the block before it in its path; 0: not known.
Only `get_memory` reads that hash, for statistics. Two keys may share a hash.

Valid if and only if
--------------------
* An entry exists if and only if the state of its record is COMPLETE. That word is written last. If two COMPLETE records
  carry one key (a crash in the middle of an overwrite), the record with the greater sequence number counts.
* A WRITING record (a value being stored) counts only while the session that owns it is open. A CONDEMNED record (a
  value deleted or replaced while a reader has it pinned) counts only while a pin holds it.
* A session pins a record by a bit in the record, or by its word of the session table, which then names the slot.
* Records, and the sequence number, use count and priority in their eviction nodes, are the truth. Bitmap, chains,
  eviction order, free lists and counters are derived from them. `check()` compares all of them.

Locks
-----
* The lock of a pool is `flock` on the segment's own file, plus a thread lock in each process. Metadata is changed under
  it. Values of up to 64 KiB are written under it too. Larger ones are written outside, protected by a WRITING record.
* Reads take no lock on x86-64, see below. On other machines, and in a pool that records its accesses, they take it.
* A session clears its own word of the session table without the lock, to unpin what it has read. It may then set
  UNREAD. WAITED_FOR is set without the lock too, and is only a hint.
* A session (one open handle) holds an open-file-description lock on a byte of its own, far behind the end of the file.
  The kernel releases it when the process dies. So others can tell the pins and WRITING records of the dead from those
  of the living. All handles hold a shared lock on a second byte: it shows whether any process has the pool open.
* A claim of a key is a lock on a byte that its digest names. It blocks only others that claim that key.
* The name lock is a lock on one more byte of the file. It serializes making, opening and removing a segment, also
  between processes that share nothing but /dev/shm. A maker holds it until the header is published. So a segment
  without a header whose name is not locked has lost its maker, and is removed. A process unlinks a segment only while
  it holds that lock, and has seen that the path still leads to that file. Calls that read or write entries never take
  it. `unlink` does, and so does the end of a handle on a transient pool.
* `flock` on the store directory is held while a pool takes a name in one of the tiers. So no name is in both.
  A process that holds it waits for no other lock.
* Long work is done in steps of some milliseconds under the lock. A process that sleeps until it gets the lock sets
  WAITED_FOR, and processes that work in steps pause for it. A sweep over all entries follows the key chains. An
  overwritten key stays in its chain, so a key that is there throughout is seen exactly once.
* A forked child shares its parent's open files, and so all of these locks. A page that the kernel wipes at every fork
  marks the child before it touches anything. The child then opens the file anew, and takes a session of its own.

A read without the lock
-----------------------
The first word of a record is its seal: state and generation. The seal of an entry changes before its blocks are freed,
moved or used for another value. So:
1. Walk the key chain. For a record of the key: read the seal, compare the key, read where the value lies. If the seal
   is not COMPLETE, or is marked as CHANGING, begin again.
2. `get` copies the value, and reads the seal again. If it is the same, the copy is whole. If not, begin again.
   A view writes the slot into its word of the session table first, then a memory barrier, then reads the seal again.
   If it is the same, the value is pinned. If not, the word is cleared, and the view takes the lock.
3. A use is noted in an empty place of the session: the time first, slot and generation second, USED third.
   If the place is taken, the reader takes the lock, under which all uses are counted.
A key is missing if DIRTY was clear and CHANGES was the same before and after the walk. A writer sets DIRTY and
increments CHANGES before it changes a key chain. After UNLOCKED_TRIES a reader takes the lock. A session has one word
for a view: a second view at the same time pins by a bit in the record, under the lock.

A change beside readers without the lock
----------------------------------------
1. Take the lock, count the uses of all sessions in the order of time, and clear their places. So the eviction order and
   the number of hits are exact whenever they are read.
2. To remove an entry: write CONDEMNED, then a memory barrier, then read the pins. Pinned blocks stay as they are.
3. To move a value, or replace it in place: mark the seal as CHANGING, then a barrier, then read the pins. A pinned
   value stays. Change where the value lies. Clear the mark. Free the old blocks.
A rebuild gives every entry a new generation before it frees anything.

After a crash
-------------
A process that dies inside a change leaves the header word DIRTY set; the kernel frees the lock. The next process that
locks sees the word. It finishes a block move that was under way, whose journal is in the header. Then it rebuilds all
derived data from the records. A process that dies in the rebuild leaves DIRTY set again. A process that dies outside a
change leaves at most WRITING records, pins, uses not counted yet, and CONDEMNED records without a pin. They are
reclaimed when a process opens the pool, needs their space, asks for statistics or checks. A waiter that dies leaves
WAITED_FOR set. The next call that works in steps clears it after MAX_PAUSES pauses.
A maker that dies leaves a file without a header, and the last user of a transient pool leaves the pool. Both are
removed when a process opens or lists that name, prunes, or needs their space to make another pool.
"""

from __future__ import annotations

import array
import atexit
import bisect
import builtins
import contextlib
import errno
import fcntl
import functools
import hashlib
import heapq
import io
import itertools
import json
import math
import mmap
import operator
import os
import re
import stat
import struct
import sys
import threading
import time
import weakref
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from json.encoder import encode_basestring
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, Protocol, TypeVar, cast

if TYPE_CHECKING:
    import argparse

    from typing_extensions import TypeVarTuple, Unpack

    _Args = TypeVarTuple("_Args")

_R = TypeVar("_R")

__all__ = [
    "BITMAP_SIZE",
    "BLOCK_SIZE",
    "CACHE_MAGIC",
    "CACHE_VERSION",
    "HEADER_SIZE",
    "BitmapAllocator",
    "CacheEntry",
    "CacheError",
    "CachePoolConfig",
    "CacheStore",
    "CorruptionError",
    "EvictionManager",
    "EvictionPolicy",
    "InvalidArgumentError",
    "KVCacheCLI",
    "KVCachePool",
    "KVContext",
    "NotCacheableError",
    "PoolClosedError",
    "PoolExistsError",
    "PoolMismatchError",
    "PoolNotFoundError",
    "PrefixCache",
    "StorageError",
    "UnsupportedError",
    "format_size",
    "main",
    "model_fingerprint",
    "parse_size",
]
__version__ = "0.2.0"

# ======================================================================================================================
# Constants and layout
# ======================================================================================================================

CACHE_MAGIC = b"CORTEXKV"
CACHE_VERSION = 2
BLOCK_SIZE = 4096  # default; any multiple of 512 up to MAX_BLOCK_SIZE
HEADER_SIZE = 4096
BITMAP_SIZE = 4096  # the smallest bitmap, and the unit it grows by
MIN_BLOCK_SIZE = 512
MAX_BLOCK_SIZE = 1 << 30
MIN_NUM_BLOCKS = 2
MAX_KEY_BYTES = 250
MAX_NAME_LENGTH = 100
SEGMENT_PREFIX = "cortex-kv-"
SHM_DIR = "/dev/shm"

HEADER = struct.Struct("<8sII4qI")  # magic, version, checksum; geometry; length of the JSON
HEADER_FIXED_AT = 16
HEADER_JSON_AT = 1024

# State words of the header, as indexes into the segment seen as 64-bit words.
DIRTY = 64  # 1 while derived data may disagree with the records
HITS, MISSES, PUTS, EVICTIONS = 65, 66, 67, 68
ALLOCATED = 69  # the first of BITMAP_COUNTERS words, see BitmapAllocator
BITMAP_COUNTERS = 4
NUM_ENTRIES = 73  # COMPLETE records
NUM_BUSY = 74  # WRITING and CONDEMNED records
FREE_SLOT, TOP_SLOT = 75, 76  # head of the list of freed slots; slots above TOP_SLOT were never used
MOVE_SLOT, MOVE_FROM, MOVE_TO, MOVE_DONE = 77, 78, 79, 80  # journal of a move: slot; old, new start; blocks done
TOP_SESSION = 82  # sessions from this number on were never used
RECORDED = 83  # accesses recorded so far
POLICY = 84  # 0: as in the config; else 1 + the place of the policy in EvictionPolicy
CHANGES = 85  # number of changes to key chains
UNREAD = 86  # 1 once the end of an array has left a deleted value to be freed
USED = 89  # 1 once a reader has noted a use that is not counted yet
GENERATION = 88  # of the last entry that was made, moved or changed in place; even
WAITED_FOR = 87  # 1 while a process sleeps until it gets the lock: processes that work in steps pause for it
BOOT_ID = 124  # the first of NUM_BOOT_IDS words: the boots for which the index is known to be whole, latest first
NUM_BOOT_IDS = 4

MAX_SESSIONS = 128
NO_SESSION = 1 << 40  # its words would lie outside of any segment
MAX_USES = 32  # uses that a session notes before a reader must take the lock to count them
SPARE_SLOTS = 16  # so that overwrites in a pool at max_entries need no eviction
PRESENCE_BYTE = 1 << 60  # this and the next three: lock offsets, far behind the end of any file
SESSION_BYTE = PRESENCE_BYTE + 1
NAME_BYTE = PRESENCE_BYTE - 1
CLAIM_BYTE = 1 << 61  # the first of 2**60; the digest of a key names one of them

# state, owner (the session that writes a WRITING record) or generation of an entry, size, start block, number of
# blocks, hash of key, hash of prefix, next in key chain, next and previous in prefix chain, CRC-32 of the value (0:
# unknown), created, accessed, sequence length, layer, sessions that pin it (128 bits), lengths of key, prefix and
# tensor description, 1 if that ends with a raw_size, priority (for the eviction node, once the entry is complete)
RECORD = struct.Struct("<IIqIIIIIIIIddqqIIIIHHHHq")
RECORD_TAIL = struct.Struct("<qqqqHHHHq")  # from the sequence length on
RECORD_BYTES = 440
RECORD_TEXT = RECORD_BYTES - RECORD.size
TEXT_BESIDE_PARENT = RECORD_TEXT - 4
R_STATE, R_OWNER, R_GENERATION, R_START, R_BLOCKS, R_KEY_HASH, R_PREFIX_HASH = 0, 1, 1, 4, 5, 6, 7  # in 32-bit halves
R_KEY_NEXT, R_PREFIX_NEXT, R_PREFIX_PREV, R_CHECKSUM, R_PINS, R_LENGTHS = 8, 9, 10, 11, 20, 24
R_PARENT = 109  # hash of the parent's key, 0: not known; only where the texts leave these four bytes
W_SIZE, W_EXTENT, W_CREATED, W_ACCESSED, W_SEQUENCE_LENGTH, W_LAYER = 1, 2, 6, 7, 8, 9  # in words
W_PINS, W_PRIORITY = 10, 13
HALVES_PER_RECORD = RECORD_BYTES // 4
# A copy of an entry: its eviction node (40 bytes), the number of its slot, its record.
COPY_ORDER = struct.Struct("<12xI3qI20xI")  # 1 if it ends a prompt, sequence, uses, priority; slot; number of blocks
COPY_RECORD_AT = 44
COPY_SIZES = struct.Struct("<40xI8xqI76x3H")  # slot, size in bytes, first block, lengths of key, prefix, tensor text
TICKET_HEAD = struct.Struct("<4sQQI")  # magic, device and inode of the segment, session that pins the values
TICKET = struct.Struct("<IIIqq")  # of a value: slot, first block, hash of the key, size, created
FREE, WRITING, COMPLETE, CONDEMNED = range(4)
# The seal, the first word of a record: state, and generation << 32. CHANGING: its value is being moved or replaced.
CHANGING = 1 << 32
SEAL_MASK = CHANGING | 0xFFFFFFFF  # an entry can be read without the lock if its seal & SEAL_MASK is COMPLETE
MAX_GENERATION = (1 << 31) - 2
UNLOCKED_TRIES = range(3)  # to read without the lock before taking it

COPY_UNDER_LOCK = 64 << 10  # bytes; a larger value is copied outside the lock
COPY_CHUNK = 1 << 20  # bytes that are copied, read or written at a time
BESIDE = 256 << 10  # bytes; checksums of smaller values are not worth another thread
# True if a processor sees the writes of others in order and 64-bit words whole, and a lock orders its own accesses.
# All work without the pool's lock needs that. Other machines do everything under the lock.
LOADS_IN_ORDER = os.uname().machine == "x86_64" and sys.maxsize > 1 << 32
SPINS = 100  # tries of 1 to 2 us each to get a lock before sleeping until it is free
FAULT_AROUND = 64 << 10  # bytes; a read fault maps all pages of such a window, a write fault just one page
PATIENCE_FOR_WRITES, PATIENCE_FOR_PINS = 0.25, 0.02  # seconds that a put waits: for copies, for pins
# Long work is done in steps of 1 to 5 ms under the lock. Limits of a step: entries described or evicted, slots and key
# chains passed over, entries moved, bytes moved. Then: seconds of one pause between steps, and the most pauses.
ENTRIES_A_STEP, SLOTS_A_STEP, MAX_CHAINS_A_STEP, MOVES_A_STEP, STEP_BYTES = 256, 1 << 13, 1 << 16, 64, 4 << 20
STEP_PAUSE, MAX_PAUSES = 1e-4, 100
CLAIM_LOOK = 0.02  # seconds that a process waits for a claim before it looks for the value again
# Bytes from which threads share a copy, mean bytes a piece (below, handing over the GIL costs more), most threads.
PARALLEL_COPY, PARALLEL_PIECE, MAX_COPIERS = 8 << 20, 256 << 10, 4
KEYS_A_LOOK = 64  # keys that one lookup without the lock sees as of one moment
ENDING_PATIENCE = 1.0  # seconds that the end of a process waits for a daemon thread to end its call
RESERVE_CHUNK = 256 << 20  # bytes of a new pool that are allocated between two looks at the limits
I64_MIN, I64_MAX = -(1 << 63), (1 << 63) - 1
MAX_ACCESS_COUNT = 1 << 61  # of a new entry; a rebuild of the order takes twice that for a stray write

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


# ======================================================================================================================
# Errors
# ======================================================================================================================


class CacheError(Exception):
    """Base of every error that this module raises on purpose."""


class InvalidArgumentError(CacheError, ValueError):
    """The caller passed a value that can't be used; nothing was changed."""


class PoolNotFoundError(CacheError):
    """There is no pool of that name in that store."""


class PoolExistsError(CacheError):
    """A pool of that name exists already."""


class PoolMismatchError(CacheError):
    """The pool that is there disagrees with the config it was opened with."""


class PoolClosedError(CacheError):
    """The handle was closed."""

    @classmethod
    def of(cls, name: str, why: str = "is closed") -> PoolClosedError:
        """Return the error of a call to the closed pool `name`."""
        return cls(f"pool {name!r} {why}: open it again")


class CorruptionError(CacheError):
    """A segment or a snapshot is damaged or not ours."""


class StorageError(CacheError):
    """The operating system refused: no space, no permission, no such directory."""


class UnsupportedError(CacheError):
    """This machine, platform or build does not support the request."""


class NotCacheableError(UnsupportedError):
    """The KV of this prompt can't be distinguished from other KV; that of other prompts of the model can."""


class _os_errors:
    """Turn an OSError in the block into a StorageError that names the operation.

    It is a class, because from Python 3.12 on an error that passes through a generator context manager leaves a cycle.
    That keeps the frames of all callers until a garbage collection (cpython#129280).
    """

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            raise StorageError(f"cannot {self._doing}: {error.strerror or error}") from error


# ======================================================================================================================
# Sizes
# ======================================================================================================================

_SIZE_TEXT = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?:([KMGTP])I?)?B?", re.IGNORECASE | re.ASCII)
_UNITS = " KMGTP"


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "16G", "1.5g", "64MiB" or "1024", in powers of 1024; ValueError if none."""
    match = _SIZE_TEXT.fullmatch(text.strip()) if isinstance(text, str) and len(text) < 100 else None
    if match is None:
        raise InvalidArgumentError(f"size {text!r} is not a number with an optional K, M, G, T or P, such as 16G")
    number, unit = match.groups()
    whole, _, part = number.partition(".")
    return int(whole + part) * (1 << 10 * _UNITS.index((unit or " ").upper())) // int("1" + "0" * len(part))


def format_size(size_bytes: float) -> str:
    """Return a size for people: 500 -> "500 B", 16 * 1024**3 -> "16.0 GB"."""
    if abs(size_bytes) < 1023.5:
        return f"{size_bytes:.0f} B"
    power = 1
    while abs(size_bytes) / 1024**power >= 1023.95 and power < len(_UNITS) - 1:
        power += 1
    return f"{size_bytes / 1024**power:.1f} {_UNITS[power]}B"


# ======================================================================================================================
# Data types and hashing
# ======================================================================================================================


class EvictionPolicy(Enum):
    """The rule for the entry to evict first. Of several such entries, the least recently used one goes."""

    LRU = "lru"  # least recently used
    LFU = "lfu"  # least often read
    FIFO = "fifo"  # first stored
    PRIORITY = "priority"  # lowest priority
    ADAPTIVE = "adaptive"  # least likely to be used again, by how long entries usually wait for their second use


def as_policy(policy: EvictionPolicy | str) -> EvictionPolicy:
    """Return the policy of that name; InvalidArgumentError if there is none."""
    try:
        return EvictionPolicy(policy)
    except ValueError:
        names = ", ".join(each.value for each in EvictionPolicy)
        raise InvalidArgumentError(f"policy {_show(policy)} must be one of {names}") from None


POLICY_HELP = {
    EvictionPolicy.LRU: "least recently used first; the default, right for most serving",
    EvictionPolicy.LFU: "least often read first; for hot and cold data that stay so",
    EvictionPolicy.FIFO: "first stored first; for streams and time-based expiry",
    EvictionPolicy.PRIORITY: "lowest priority first, then least recently used; for prompts that must stay",
    EvictionPolicy.ADAPTIVE: "least likely to be used again first, learnt from reuse; for chat with small caches",
}


@dataclass
class CacheEntry:
    """The description of one entry. It is a copy: later changes in the pool do not show in it."""

    key: str
    prefix_hash: str  # names the prompt prefix that the entry belongs to
    offset: int  # of the value, in bytes from the start of the segment
    size: int  # bytes
    created_at: float  # seconds since the epoch
    last_accessed: float
    access_count: int = 0
    priority: int = 0  # higher stays longer under EvictionPolicy.PRIORITY
    sequence_length: int = 0  # tokens
    layer_index: int = 0
    dtype: str = ""  # safetensors name such as "BF16"; empty: plain bytes
    shape: tuple[int, ...] = ()
    framework: str = ""  # kind of value: "numpy", "torch", ...; empty: bytes, or not known
    raw_size: int = 0  # bytes of the value before the caller encoded it; 0: it is stored as it was
    encoding: str = ""  # how the caller encoded it

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CacheEntry:
        """Build from `to_dict` output; unknown keys are ignored."""
        known = {f.name for f in fields(cls)}
        known_data = {k: tuple(v) if k == "shape" else v for k, v in data.items() if k in known}
        return cls(**cast("dict[str, Any]", known_data))


def _utc_now() -> str:
    from datetime import datetime, timezone  # here: its import takes time that a shell command need not spend

    return datetime.now(timezone.utc).isoformat()


@dataclass
class CachePoolConfig:
    """The description of a pool to make: plain data, checked when the pool is made."""

    name: str
    size_bytes: int  # header + bitmap + data region; the index comes on top
    tier: str = "cpu"  # "cpu": shared memory, "nvme": a mapped file in the store directory
    eviction_policy: str = "lru"
    max_entries: int = 10000
    persist_path: str | None = None  # the path that `persist` writes to if it is given none
    created_at: str = field(default_factory=_utc_now)
    block_size: int = BLOCK_SIZE  # bytes; the unit of allocation
    record: int = 0  # number of last accesses to keep for `cortex cache replay NAME`, 16 bytes each

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CachePoolConfig:
        """Build from `to_dict` output; unknown keys are ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in data.items() if k in known})


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def check_name(name: str) -> str:
    """Return `name` if a pool may have it; else InvalidArgumentError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
        raise InvalidArgumentError(
            f"pool name {_show(name)} must be 1 to {MAX_NAME_LENGTH} of A-Z a-z 0-9 . _ - and not begin with . or -"
        )
    return name


def _show(value: object) -> str:
    """Return a short repr for an error message. It never fails, unlike `repr` of an int of 5,000 digits."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # a caller's __repr__ may raise anything
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def check_int(what: str, value: int, low: int, high: int = I64_MAX) -> int:
    """Return `value` as an int if it is an integer from `low` to `high`; else InvalidArgumentError."""
    try:
        number = operator.index(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError):
        number = None
    if number is None or not low <= number <= high:
        raise InvalidArgumentError(f"{what} {_show(value)} must be an integer from {low} to {high}")
    return number


def check_seconds(what: str, value: float) -> None:
    """Raise InvalidArgumentError unless `value` is a number of seconds from 0 to 1e9."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1e9:
        raise InvalidArgumentError(f"{what} {_show(value)} must be a number of seconds from 0 to 1e9")


def check_list(what: str, values: Any, length: int) -> None:
    """Raise InvalidArgumentError unless `values` is a sequence of `length` items, one for each key of a path."""
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__") or not hasattr(values, "__getitem__"):
        raise InvalidArgumentError(f"{what} {_show(values)} must be a list, with an item for each of {length} keys")
    if len(values) != length:
        raise InvalidArgumentError(f"{length} keys need as many {what}, not {len(values)}")


def check_path(path: str | os.PathLike[str], what: str = "path") -> str:
    """Return a path as text; InvalidArgumentError if no file can have it."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    try:
        if isinstance(text, str) and text and b"\0" not in os.fsencode(text):
            return text
    except UnicodeEncodeError:
        pass
    raise InvalidArgumentError(f"{what} {_show(path)} must be a str or os.PathLike that a file can have")


def check_keys(keys: Sequence[str]) -> None:
    """Raise InvalidArgumentError unless `keys` is a sequence, and neither str nor bytes."""
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Sequence):
        raise InvalidArgumentError(f"keys {_show(keys)} must be a list of str")


def encode_keys(keys: Sequence[str]) -> list[bytes]:
    """Return the UTF-8 bytes of the keys of a path."""
    check_keys(keys)
    return [encode_key(key) for key in keys]


def encode_key(key: str) -> bytes:
    """Return the UTF-8 bytes of a key."""
    if type(key) is str:
        try:
            encoded = key.encode()
        except UnicodeEncodeError:
            raise InvalidArgumentError(f"key {key!r} holds surrogates that UTF-8 cannot encode") from None
        if 0 < len(encoded) <= MAX_KEY_BYTES:
            return encoded
        shown = key if len(key) <= 40 else key[:37] + "..."
        raise InvalidArgumentError(f"key {shown!r} has {len(encoded)} UTF-8 bytes, the limit is 1 to {MAX_KEY_BYTES}")
    if isinstance(key, str):
        return encode_key(str(key))
    raise InvalidArgumentError(
        f"key {_show(key)} is a {type(key).__name__}, it must be a str of 1 to {MAX_KEY_BYTES} bytes"
    )


# The dtypes of safetensors, and their sizes in bits. F4 and F6 are packed. Other dtypes are refused, as in the
# safetensors package: the size of such a value can't be checked.
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
MAX_DIMENSIONS = 32  # numpy 1 has no more
FRAMEWORKS = ("", "numpy", "torch", "transformers", "json")


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the size of a tensor in bytes; InvalidArgumentError if there can be no such tensor."""
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise InvalidArgumentError(f"dtype {_show(dtype)} must be one of {', '.join(DTYPE_BITS)}")
    lengths = [check_int("dimension", length, 0) for length in shape]
    total = bits * math.prod(lengths)
    # Frameworks multiply the other dimensions of an empty tensor too, in 64 bits.
    largest = total or bits * math.prod(length or 1 for length in lengths)
    if len(lengths) > MAX_DIMENSIONS or largest >> 3 > I64_MAX:
        raise InvalidArgumentError(
            f"shape {_show(shape)} must have at most {MAX_DIMENSIONS} dimensions and less than 2**63 bytes"
        )
    if total % 8:
        raise InvalidArgumentError(
            f"a {dtype} tensor of shape {_show(shape)} has {total} bits, it must fill whole bytes: pad it"
        )
    return total // 8


RAW_SIZE_MARK = b" of "  # in a tensor description: what follows is the raw_size


class EntryMeta(NamedTuple):
    """The caller's description of a value, checked."""

    prefix: bytes = b""
    priority: int = 0
    sequence_length: int = 0
    layer_index: int = 0
    # "torch:BF16 2 16 64": framework, dtype and shape; empty for plain bytes. Then " of 8192" or " of 8192 int8", if it
    # has a raw_size, an encoding.
    tensor: bytes = b""
    is_encoded: bool = False  # True if it has a raw_size

    @classmethod
    def of(
        cls,
        key: bytes,
        size: int,
        prefix_hash: str = "",
        priority: int = 0,
        sequence_length: int = 0,
        layer_index: int = 0,
        dtype: str = "",
        shape: Sequence[int] = (),
        framework: str = "",
        raw_size: int = 0,
        encoding: str = "",
    ) -> EntryMeta:
        """Return the checked metadata of a value of `size` bytes to be stored under `key`."""
        if not isinstance(prefix_hash, str):
            raise InvalidArgumentError(
                f"prefix_hash {_show(prefix_hash)} is a {type(prefix_hash).__name__}, it must be a str"
            )
        try:
            prefix = prefix_hash.encode()
        except UnicodeEncodeError:
            raise InvalidArgumentError(f"prefix_hash {prefix_hash!r} holds surrogates UTF-8 cannot encode") from None
        tensor = b""
        if dtype or shape != ():
            if not isinstance(dtype, str) or not isinstance(shape, (tuple, list)):
                raise InvalidArgumentError(
                    f"dtype {_show(dtype)} and shape {_show(shape)} must be such as 'BF16' and (2, 16)"
                )
            expected = tensor_bytes(dtype, shape)
            if expected != size:
                raise InvalidArgumentError(
                    f"the value has {size} bytes, a {dtype} tensor of shape {_show(shape)} must have {expected}"
                )
            if framework not in FRAMEWORKS:
                raise InvalidArgumentError(f"framework {_show(framework)} must be one of {', '.join(FRAMEWORKS[1:])}")
            tensor = " ".join([f"{framework}:{dtype}", *(str(operator.index(length)) for length in shape)]).encode()
        raw_size = check_int("raw_size", raw_size, 0)
        if raw_size:
            tensor += RAW_SIZE_MARK + b"%d" % raw_size
        if encoding != "":
            if not _is_text(encoding) or not raw_size:
                raise InvalidArgumentError(f"encoding {_show(encoding)} must be a printable str, beside a raw_size")
            tensor += b" " + encoding.encode()
        total = len(key) + len(prefix) + len(tensor)
        if total > RECORD_TEXT:
            raise InvalidArgumentError(
                f"key, prefix_hash and tensor with its encoding take {len(key)} + {len(prefix)} + {len(tensor)} bytes, "
                f"the limit is {RECORD_TEXT} together: use a shorter prefix_hash, a digest say"
            )
        return cls(
            prefix,
            check_int("priority", priority, I64_MIN),
            check_int("sequence_length", sequence_length, 0),
            check_int("layer_index", layer_index, I64_MIN),
            tensor,
            raw_size > 0,
        )


NO_META = EntryMeta()
META_NAMES = (
    "prefix_hash", "priority", "sequence_length", "layer_index", "dtype", "shape", "framework", "raw_size", "encoding"
)  # fmt: skip


def split_tensor(description: str) -> tuple[str, str, str, int, str]:
    """Return (framework, dtype, lengths joined by spaces, raw_size, encoding) of a description; "" or 0: none."""
    tensor, _, before = description.partition(RAW_SIZE_MARK.decode())
    framework, _, described = tensor.partition(":")
    dtype, _, shape = described.partition(" ")
    raw_size, _, encoding = before.partition(" ")
    return framework, dtype, shape, int(raw_size or 0), encoding


def _checked_meta(key: bytes, size: int, meta: Mapping[str, Any]) -> EntryMeta:
    """Return the checked metadata of a value from the keyword arguments of `put` or `reserve`."""
    unknown = meta.keys() - set(META_NAMES)
    if unknown:
        raise InvalidArgumentError(f"an entry has no {', '.join(sorted(unknown))}; it has {', '.join(META_NAMES)}")
    return EntryMeta.of(key, size, **meta)


def _checked_metas(keys: Sequence[bytes], sizes: Sequence[int], metas: Sequence[Mapping[str, Any]]) -> list[EntryMeta]:
    """Return the checked metadata of each value of a path; the same dict with the same size is checked once."""
    found: list[EntryMeta] = []
    last_size, last_meta, longest, checked = -1, None, 0, NO_META  # `longest`: key that was checked with these
    for key, size, meta in zip(keys, sizes, metas, strict=True):
        if not meta:
            found.append(NO_META)
            continue
        if meta is not last_meta or size != last_size or len(key) > longest:
            checked = _checked_meta(key, size, meta)
            last_size, last_meta, longest = size, meta, len(key)
        found.append(checked)
    return found


class Geometry(NamedTuple):
    """The offsets in a segment; all of them follow from five numbers."""

    size_bytes: int
    block_size: int
    num_blocks: int
    max_entries: int
    num_recorded: int = 0

    @classmethod
    def of(cls, config: CachePoolConfig) -> Geometry:
        """Return the layout of a pool; InvalidArgumentError if there can be no such pool."""
        block_size = check_int("block_size", config.block_size, MIN_BLOCK_SIZE, MAX_BLOCK_SIZE)
        if block_size % MIN_BLOCK_SIZE:
            raise InvalidArgumentError(f"block_size {block_size} must be a multiple of {MIN_BLOCK_SIZE} bytes")
        smallest = HEADER_SIZE + BITMAP_SIZE + MIN_NUM_BLOCKS * block_size
        size_bytes = check_int("size_bytes", config.size_bytes, 0, 1 << 46)
        if size_bytes < smallest:
            raise InvalidArgumentError(
                f"size_bytes {size_bytes} must be at least {smallest} with blocks of {format_size(block_size)}"
            )
        max_entries = check_int("max_entries", config.max_entries, 1, 1 << 26)
        num_blocks = (size_bytes - HEADER_SIZE - BITMAP_SIZE) // block_size
        while HEADER_SIZE + cls.bitmap_bytes(num_blocks) + num_blocks * block_size > size_bytes:
            num_blocks = (size_bytes - HEADER_SIZE - cls.bitmap_bytes(num_blocks)) // block_size
        record = check_int("record", config.record, 0, 1 << 26)
        return cls(size_bytes, block_size, num_blocks, min(max_entries, num_blocks), record)

    @staticmethod
    def bitmap_bytes(num_blocks: int) -> int:
        """Return the size in bytes of the bitmap of `num_blocks` blocks."""
        return -(-num_blocks // (8 * BITMAP_SIZE)) * BITMAP_SIZE

    @property
    def num_slots(self) -> int:
        return self.max_entries + SPARE_SLOTS

    @property
    def data_offset(self) -> int:
        return HEADER_SIZE + self.bitmap_bytes(self.num_blocks)

    @property
    def index_offset(self) -> int:
        return self.data_offset + self.num_blocks * self.block_size

    @property
    def heads_offset(self) -> int:
        return self.index_offset + (24 + 16 * MAX_USES) * MAX_SESSIONS

    @property
    def order_offset(self) -> int:
        return self.heads_offset + 8 * self.num_slots

    @property
    def records_offset(self) -> int:
        return self.order_offset + EvictionOrder.buffer_bytes(self.num_slots)

    @property
    def accesses_offset(self) -> int:
        return self.records_offset + RECORD_BYTES * (self.num_slots + 1)

    @property
    def total_bytes(self) -> int:
        """The size of a segment without ghosts, which are a mapping of their own behind it."""
        return self.accesses_offset + 16 * self.num_recorded

    @property
    def ghosts_offset(self) -> int:
        return -(-self.total_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY

    @property
    def bytes_with_ghosts(self) -> int:
        return self.ghosts_offset + AdaptiveOrder.ghost_bytes(self.num_slots)

    def blocks_for(self, size: int) -> int:
        """Return the number of blocks of a value of `size` bytes; an empty value takes one too."""
        return -(-size // self.block_size) or 1


# ======================================================================================================================
# Bitmap allocator
# ======================================================================================================================


_IN_USE = b"\xff" * 8192


def _run_starts(bits: int, length: int) -> int:
    """Return the 1 bits at which runs of `length` 1 bits begin, by ANDing shifted copies of the bits."""
    known = 1
    while known < length and bits:
        step = min(known, length - known)
        bits &= bits >> step
        known += step
    return bits


class BitmapAllocator:
    """First-fit allocator of runs of blocks over a bitmap: bit 1 = in use, lowest bit of byte 0 = block 0.

    It works over a buffer of its own, or over a slice of a segment. Four derived counters lie beside it: 0 blocks in
    use; 1 no free block lies before this one; 2, 3 no free run of length (2) begins before block (3). The last three
    tell where a search may begin, so that a bitmap in pieces is not searched from its start.
    Methods are thread-safe, but in those that end in `_locked` the caller must hold the lock.
    """

    def __init__(self, num_blocks: int, bitmap: memoryview | None = None, counters: memoryview | None = None) -> None:
        self.num_blocks = check_int("num_blocks", num_blocks, 1, (1 << 32) - 1)
        self.num_bytes = (self.num_blocks + 7) // 8
        self._lock = threading.Lock()
        self._bits = memoryview(bytearray(self.num_bytes)) if bitmap is None else bitmap
        self._counters = memoryview(bytearray(8 * BITMAP_COUNTERS)).cast("q") if counters is None else counters
        if bitmap is None:
            self.rebuild_locked(())

    def allocate(self, num_blocks: int) -> int | None:
        """Return the first block of the lowest free run of `num_blocks`, now in use; None if there is none."""
        num_blocks = check_int("num_blocks", num_blocks, 1)
        with self._lock:
            return self.allocate_locked(num_blocks)

    def free(self, start_block: int, num_blocks: int) -> None:
        """Free blocks. InvalidArgumentError if one of them lies outside or is free already."""
        num_blocks = check_int("num_blocks", num_blocks, 1, self.num_blocks)
        start_block = check_int("start_block", start_block, 0, self.num_blocks - num_blocks)
        with self._lock:
            if self._any_free(start_block, num_blocks):
                raise InvalidArgumentError(
                    f"blocks {start_block} to {start_block + num_blocks - 1} are not all allocated: a double free?"
                )
            self.free_locked(start_block, num_blocks)

    def get_usage(self) -> tuple[int, int]:
        """Return (allocated blocks, all blocks)."""
        return self._counters[0], self.num_blocks

    def to_bytes(self) -> bytes:
        """Return the bitmap; bits behind the last block are 0."""
        return bytes(self._bits[: self.num_bytes])

    def from_bytes(self, data: bytes) -> None:
        """Replace the bitmap by one that `to_bytes` of an allocator of the same size returned."""
        if not isinstance(data, (bytes, bytearray, memoryview)) or len(data) != self.num_bytes:
            data = b"" if not isinstance(data, (bytes, bytearray, memoryview)) else data
            raise InvalidArgumentError(f"bitmap has {len(data)} bytes, {self.num_blocks} blocks need {self.num_bytes}")
        bits = int.from_bytes(data, "little")
        if bits >> self.num_blocks:
            raise InvalidArgumentError(f"bitmap marks blocks behind the last one, {self.num_blocks - 1}")
        with self._lock:
            self._bits[: self.num_bytes] = data
            self._reset_counters(bits.bit_count())

    def hints_are_true(self) -> bool:
        """Return True if counters 1 to 3 agree with the bitmap; one pass over it."""
        _, first, length, begin = self._counters
        free = self._free_bits(0, self.num_blocks)
        starts = _run_starts(free, length)
        low = (free & -free).bit_length() - 1 if free else self.num_blocks
        lowest = (starts & -starts).bit_length() - 1 if starts else self.num_blocks
        return 0 <= first <= low and 0 <= begin <= lowest

    def largest_free_run(self) -> int:
        """Return the length in blocks of the longest free run; some passes over the bitmap."""
        free = self._free_bits(0, self.num_blocks)
        if not free:
            return 0
        # starts[i]: where free runs of 2**i begin. Double while one is left, then add the halves that still fit.
        starts, length = [free], 1
        while longer := starts[-1] & (starts[-1] >> length):
            starts.append(longer)
            length *= 2
        longest = starts.pop()
        while starts:
            shorter = starts.pop()
            if longer := longest & (shorter >> length):
                longest, length = longer, length + (1 << len(starts))
        return length

    def allocate_locked(self, num_blocks: int) -> int | None:
        start = self.find_locked(num_blocks)
        if start is None:
            return None
        self.take_locked(start, num_blocks)
        return start

    def find_locked(self, num_blocks: int) -> int | None:
        """Return the start of the lowest free run of `num_blocks`, which stays free; None if there is none."""
        counters = self._counters
        begin = counters[1]
        if num_blocks >= counters[2] and counters[3] > begin:
            begin = counters[3]
        end = begin + num_blocks
        if end <= self.num_blocks:  # most often the run is right there
            bits = int.from_bytes(self._bits[begin >> 3 : (end + 7) >> 3], "little") >> (begin & 7)
            if not bits & ((1 << num_blocks) - 1):
                return begin
        if num_blocks > self.num_blocks - counters[0]:
            return None
        start = self._find_short(num_blocks, begin) if num_blocks < 15 else self._find_long(num_blocks, begin)
        found = self.num_blocks if start is None else start
        if num_blocks <= counters[2] or found > counters[3] + 4096:  # prefer a hint that serves shorter runs too
            counters[2] = num_blocks
            counters[3] = found
        return start

    def take_locked(self, start: int, num_blocks: int) -> None:
        """Mark free blocks as in use."""
        self._mark(start, num_blocks, True)
        counters = self._counters
        counters[0] = allocated = counters[0] + num_blocks
        if allocated == self.num_blocks:
            counters[1] = counters[3] = allocated  # so that the next block freed is known at once
        elif start == counters[1]:
            counters[1] = start + num_blocks

    def free_locked(self, start: int, num_blocks: int) -> None:
        """Mark blocks in use as free."""
        self._mark(start, num_blocks, False)
        counters = self._counters
        counters[0] -= num_blocks
        if start < counters[1]:
            counters[1] = start
        lowest = start - counters[2] + 1  # the first block at which a run of that length could begin now
        if lowest < counters[3]:
            counters[3] = max(lowest, 0)

    def rebuild_locked(self, runs: Iterable[tuple[int, int]]) -> None:
        """Mark just these (start, number of blocks) as in use, all others as free."""
        self._bits[: self.num_bytes] = bytes(self.num_bytes)
        allocated = 0
        for start, num_blocks in runs:
            self._mark(start, num_blocks, True)
            allocated += num_blocks
        self._reset_counters(allocated)

    def _reset_counters(self, allocated: int) -> None:
        self._counters[0] = allocated
        self._counters[1] = self._counters[3] = 0
        self._counters[2] = 1

    def _free_bits(self, start: int, stop: int) -> int:
        """Return the free blocks from `start` (a multiple of 8) to `stop`, as the 1 bits of an integer."""
        return ~int.from_bytes(self._bits[start >> 3 : (stop + 7) >> 3], "little") & ((1 << (stop - start)) - 1)

    def free_before_locked(self, block: int) -> int:
        """Return the number of free blocks that end right before `block`."""
        end, window = block, 64
        while end:
            begin = max(end - window, 0) & ~7
            used = self._free_bits(begin, end) ^ ((1 << (end - begin)) - 1)
            if used:
                return block - begin - used.bit_length()
            end, window = begin, 4 * window
        return block

    def _find_short(self, num_blocks: int, begin: int) -> int | None:
        """Return the start of the lowest free run, None if there is none. Search growing windows as integers."""
        counters = self._counters
        window = 256
        position = begin & ~7
        full_so_far = begin == counters[1]
        while position < self.num_blocks:
            free = self._free_bits(position, min(position + window + num_blocks, self.num_blocks))
            if full_so_far:  # all blocks before are in use: the hint can move up
                full_so_far = not free
                first = position + (window if full_so_far else (free & -free).bit_length() - 1)
                counters[1] = min(first, self.num_blocks)
            starts = _run_starts(free, num_blocks)
            if starts:
                return position + (starts & -starts).bit_length() - 1
            position += window
            window = min(4 * window, 4096)
            while window == 4096 and bytes(self._bits[position >> 3 : (position >> 3) + len(_IN_USE)]) == _IN_USE:
                position += 8 * len(_IN_USE)  # a comparison skips them ten times as fast as arithmetic
        return None

    def _find_long(self, num_blocks: int, begin: int) -> int | None:
        """Return the start of the lowest free run of 15 or more, or None: find its zero bytes, then count its edges.

        So long a run has a zero byte. The windows grow: the run is often near, and copying a large bitmap takes 30 us.
        """
        base, window = begin >> 3, 256
        zeros = bytes((num_blocks - 7) // 8)
        while base < self.num_bytes:
            data = bytes(self._bits[base : min(base + window + num_blocks // 8 + 2, self.num_bytes)])
            at = data.find(zeros)
            while at >= 0:
                before = 8 - data[at - 1].bit_length() if at else 0
                end = at + len(zeros)
                length = before + 8 * len(zeros)
                while length < num_blocks and end < len(data) and not data[end]:
                    length += 8
                    end += 1
                if length < num_blocks and end < len(data):
                    length += (data[end] & -data[end]).bit_length() - 1
                start = (base + at) * 8 - before
                if min(length, self.num_blocks - start) >= num_blocks:
                    return start
                at = data.find(zeros, end)
            base += window  # runs that begin before it have been seen whole
            window *= 4
        return None

    def _any_free(self, start: int, num_blocks: int) -> bool:
        """Return True if any of these blocks is free."""
        shift = start & 7
        return self._free_bits(start - shift, start + num_blocks) >> shift != 0

    def _mark(self, start: int, num_blocks: int, in_use: bool) -> None:
        low, end = start >> 3, (start + num_blocks + 7) >> 3
        if not (start | num_blocks) & 7:  # most often so, if all values have one size, a power of two
            self._bits[low:end] = (b"\xff" if in_use else b"\0") * (end - low)
            return
        mask = ((1 << num_blocks) - 1) << (start & 7)
        bits = int.from_bytes(self._bits[low:end], "little")
        self._bits[low:end] = (bits | mask if in_use else bits & ~mask).to_bytes(end - low, "little")


# ======================================================================================================================
# Eviction
# ======================================================================================================================

# The order buffer in 32-bit halves; links are positions in halves:
# 0     0 clock: the last sequence number (64 bits), 2 free bucket, 4 buckets ever used, 6 mean of the logarithms of
#       reuse gaps times 2**32 (64 bits, 0: none yet), 8 ring of buckets, 14 weights of ADAPTIVE (3 of 20 bits, 0: none)
# 16    buckets of 6: last node, first node, lower bucket, higher bucket, key (64 bits)
# then  nodes of 10: previous, next, bucket, 1 if it ends a prompt, sequence, use count, priority (64 bits each)
# The ghosts of ADAPTIVE have a buffer of their own: sets of 8 places of 3 words (key digest, 0 = free; sequence; uses).
# The digest is written last, so a crash leaves no ghost that is half another. Nothing links them: no rebuild is needed.
_RING = 8
_BUCKETS = 16
_BUCKET_HALVES = 6
_NODE_HALVES = 10
_CLOCK, _FREE_BUCKET, _TOP_BUCKET, _GAP, _WEIGHTS = 0, 1, 2, 3, 7  # in words
_LAST, _FIRST, _LOWER, _HIGHER = 0, 1, 2, 3  # in a bucket
_PREV, _NEXT, _BUCKET, _TAIL = 0, 1, 2, 3  # in a node
_KEY, _SEQUENCE, _COUNT, _PRIORITY = 2, 2, 3, 4  # in words: key of a bucket, numbers of a node

# The key that a policy sorts by first. Entries with one key are in the order of sequence numbers, oldest first.
POLICY_KEY: dict[EvictionPolicy, Callable[[int, int], int]] = {
    EvictionPolicy.LRU: lambda count, priority: 0,
    EvictionPolicy.LFU: lambda count, priority: count,
    EvictionPolicy.FIFO: lambda count, priority: 0,
    EvictionPolicy.PRIORITY: lambda count, priority: priority,
    EvictionPolicy.ADAPTIVE: lambda count, priority: count + 1 if count < 3 else 4,  # 0 for the end of a prompt
}
REUSE_BONUS = (-8.0, 0.0, 1.0, 1.5, 2.0)  # by the keys of ADAPTIVE: the worth of a key, in typical reuse gaps
REUSE_LACK = tuple(REUSE_BONUS[-1] - bonus for bonus in REUSE_BONUS)
GAP_MEMORY = 1600  # gaps that the running mean of ADAPTIVE remembers, about
GHOSTS_PER_SLOT = 16
_GHOST_WAYS = 8  # places in a set of ghosts
_GHOST_SET = struct.Struct("24q")  # 3 words for each of the 8
WEIGHT_NAMES = ("recency_weight", "frequency_weight", "size_weight")
_WEIGHT_BITS = 20


def pack_weights(weights: Mapping[str, float] | None) -> int:
    """Return the weights in one word, normalised to sum to 1, missing ones as 0; 0 for None; InvalidArgumentError."""
    if weights is None:
        return 0
    if not isinstance(weights, Mapping) or not set(weights) <= set(WEIGHT_NAMES):
        raise InvalidArgumentError(f"weights {_show(weights)} must be None or a dict of {', '.join(WEIGHT_NAMES)}")
    values = [weights.get(name, 0) for name in WEIGHT_NAMES]
    for name, value in zip(WEIGHT_NAMES, values, strict=True):
        if not isinstance(value, (int, float)) or not 0 <= value <= 1e9:
            raise InvalidArgumentError(f"{name} {_show(value)} must be a number from 0 to 1e9")
    if not sum(values):
        raise InvalidArgumentError("at least one weight must be more than 0; None for the order by reuse gaps")
    most = (1 << _WEIGHT_BITS) - 1
    shares = [round(value / sum(values) * most) for value in values]
    return shares[0] | shares[1] << _WEIGHT_BITS | shares[2] << 2 * _WEIGHT_BITS


def split_policy(text: EvictionPolicy | str) -> tuple[EvictionPolicy, dict[str, float] | None]:
    """Return (policy, weights) of a policy or a text: "lru", "adaptive:0.4/0.3/0.3" (recency, frequency, size)."""
    name, colon, numbers = text.partition(":") if isinstance(text, str) else (text, "", "")
    policy = as_policy(name)
    if not colon:
        return policy, None
    try:
        weights = dict(zip(WEIGHT_NAMES, map(float, numbers.split("/")), strict=True))
    except ValueError:
        weights = {}
    if policy is not EvictionPolicy.ADAPTIVE or not weights:
        raise InvalidArgumentError(
            f"policy {_show(text)}: only adaptive has weights, and three of them, such as adaptive:0.4/0.3/0.3"
        )
    pack_weights(weights)
    return policy, weights


def unpack_weights(packed: int) -> dict[str, float] | None:
    """Return the weights that `pack_weights` packed, which sum to 1; None if there are none."""
    most = (1 << _WEIGHT_BITS) - 1
    shares = [(packed >> shift) & most for shift in (0, _WEIGHT_BITS, 2 * _WEIGHT_BITS)]
    if not sum(shares):
        return None
    return {name: round(share / sum(shares), 5) for name, share in zip(WEIGHT_NAMES, shares, strict=True)}


def key_digest(key: bytes) -> int:
    """Return a positive 63-bit digest of a key: its CRC-32 forwards and backwards, in a third of the time of BLAKE2."""
    return zlib.crc32(key) | (zlib.crc32(key[::-1]) >> 1) << 32 or 1


Least = tuple[int, int]  # the lowest use count and priority that a parent may have
NO_LEAST: Least = (0, I64_MIN)


def _words32(numbers: Sequence[int]) -> memoryview:
    """Return numbers as 32-bit words, to write them into a column at once."""
    return memoryview(struct.pack(f"{len(numbers)}I", *numbers)).cast("I")


Note = tuple[int, int, int, int, int]  # policy key, sequence number, slot, use count, blocks
Waste = Callable[[int, int, int, int], float]  # of all in a note but the slot: the greatest is evicted first


def in_victim_order(noted: Iterable[tuple[Note, _R]], waste: Waste | None) -> list[_R]:
    """Return the items of (note, item), next victim first, as `victims` does, but without the lock. See `waste_now`."""
    queues: dict[int, list[tuple[Note, _R]]] = {}
    for item in sorted(noted, key=operator.itemgetter(0), reverse=True):
        queues.setdefault(item[0][0], []).append(item)
    if waste is None:
        return [item for key in sorted(queues) for _, item in reversed(queues[key])]

    def head(key: int) -> tuple[float, int, int]:
        _, sequence, slot, count, num_blocks = queues[key][-1][0]
        return -waste(key, sequence, count, num_blocks), -slot, key

    items, heads = [], [head(key) for key in queues]
    heapq.heapify(heads)
    while heads:
        key = heads[0][2]
        items.append(queues[key].pop()[1])
        if queues[key]:
            heapq.heapreplace(heads, head(key))
        else:
            heapq.heappop(heads)
    return items


class EvictionOrder:
    """The order of eviction: buckets by policy key, lowest first, each a list by sequence number, oldest first.

    A change of one slot is O(1), unless its bucket must be searched for: O(number of distinct keys). That happens with
    PRIORITY, and with LFU if an entry arrives with a use count of its own (a restore). The bucket lists for LFU follow
    "An O(1) algorithm for implementing the LFU cache eviction scheme" (Shah, Mitra, Matani, 2010).

    The numbers of a node (sequence, count, priority) are the truth. Links and buckets are derived and rebuilt from
    them. The class knows slots, but neither keys nor blocks. The caller must hold the lock, in a pool the pool's lock.
    """

    is_adaptive = False

    def __init__(self, policy: EvictionPolicy, buffer: memoryview, num_slots: int) -> None:
        self.policy = policy
        self.num_slots = num_slots
        self._halves = buffer.cast("I")
        self._words = buffer.cast("q")
        self._nodes = _BUCKETS + _BUCKET_HALVES * num_slots
        self._key_of = POLICY_KEY[policy]
        self._is_fifo, self._is_lfu = policy is EvictionPolicy.FIFO, policy is EvictionPolicy.LFU
        self._has_keys = policy not in (EvictionPolicy.LRU, EvictionPolicy.FIFO)  # else one bucket at most

    @staticmethod
    def buffer_bytes(num_slots: int) -> int:
        """Return the size of the order buffer."""
        return 4 * (_BUCKETS + _BUCKET_HALVES * num_slots + _NODE_HALVES * (num_slots + 1))

    def take_over(self, other: EvictionOrder, slots: Iterable[int]) -> None:
        """Copy `other`, an order of these slots by the same policy, whose buffer is smaller."""
        size = (other.num_slots + 1) * _NODE_HALVES
        self._halves[self._nodes : self._nodes + size] = other._halves[other._nodes : other._nodes + size]
        for word in (_CLOCK, _GAP, _WEIGHTS):
            self._words[word] = other._words[word]
        self.rebuild(slots)

    # --- changing ----------------------------------------------------------------------------------------------------

    def _node(self, slot: int) -> int:
        return self._nodes + slot * _NODE_HALVES

    def stamp(self, slot: int, count: int, priority: int) -> None:
        """Set the numbers of a slot: the next sequence number, a use count, a priority."""
        words = self._words
        word = (self._nodes + slot * _NODE_HALVES) >> 1
        words[_CLOCK] = words[word + _SEQUENCE] = words[_CLOCK] + 1
        words[word + _COUNT] = count
        words[word + _PRIORITY] = priority

    def numbers(self, slot: int) -> tuple[int, int, int]:
        """Return (sequence number, use count, priority) of a slot."""
        word = (self._nodes + slot * _NODE_HALVES) >> 1
        sequence, count, priority = self._words[word + _SEQUENCE : word + _PRIORITY + 1]
        return sequence, count, priority

    def link(self, slot: int) -> None:
        """Link a stamped slot into the order, behind all others of its key."""
        halves, words = self._halves, self._words
        node = self._nodes + slot * _NODE_HALVES
        bucket = halves[_RING + _LOWER]  # the highest one; restored entries come in ascending order
        if self._has_keys or bucket == _RING:
            key = self._key(node)
            if bucket != _RING and words[(bucket >> 1) + _KEY] > key:
                bucket = halves[_RING + _HIGHER]
                while words[(bucket >> 1) + _KEY] < key:
                    bucket = halves[bucket + _HIGHER]
                if words[(bucket >> 1) + _KEY] != key:
                    bucket = halves[bucket + _LOWER]
            if bucket == _RING or words[(bucket >> 1) + _KEY] != key:
                bucket = self._new_bucket(bucket, key)
        last = halves[bucket]
        halves[node] = last
        halves[node + _NEXT] = halves[node + _BUCKET] = bucket
        halves[last + _NEXT] = node
        halves[bucket] = node

    def unlink(self, slot: int) -> None:
        """Unlink a slot from the order."""
        halves = self._halves
        node = self._node(slot)
        before, behind = halves[node], halves[node + _NEXT]
        halves[before + _NEXT] = behind
        halves[behind] = before
        if before == behind:  # both are the bucket itself, now empty
            self._drop_bucket(before)

    def touch(self, slot: int) -> None:
        """Count a use of a slot and move it to its new place."""
        words = self._words
        word = ((self._nodes + slot * _NODE_HALVES) >> 1) + _COUNT
        words[word] = count = words[word] + 1
        if not self._is_fifo:
            self.renew(slot, count if self._is_lfu else None)

    def touch_all(self, slots: list[int]) -> None:
        """Count uses of slots, in this order; a slot may be there several times."""
        words, nodes, counts = self._words, self._nodes, Counter(slots)
        for slot in reversed(dict.fromkeys(reversed(slots))):  # the last use of each decides its place
            if self._is_lfu:
                for _ in range(counts[slot]):
                    self.touch(slot)
                continue
            words[((nodes + slot * _NODE_HALVES) >> 1) + _COUNT] += counts[slot]
            if not self._is_fifo:
                self.renew(slot)

    def replace(self, slot: int) -> None:
        """Move a slot whose value is replaced to the place of a new one; its use count and priority stay."""
        self.renew(slot)

    def renew(self, slot: int, new_key: int | None = None) -> None:
        """Move a slot behind all others of its key, or of `new_key`, which must not be lower."""
        halves, words = self._halves, self._words
        node = self._nodes + slot * _NODE_HALVES
        words[_CLOCK] = words[(node >> 1) + _SEQUENCE] = words[_CLOCK] + 1
        before, behind = halves[node], halves[node + _NEXT]
        target = bucket = halves[node + _BUCKET]
        if new_key is not None:
            target = halves[bucket + _HIGHER]
            if target == _RING or words[(target >> 1) + _KEY] != new_key:
                if before == behind:  # alone in its bucket: give that the new key
                    words[(bucket >> 1) + _KEY] = new_key
                    return
                target = self._new_bucket(bucket, new_key)
        elif behind == bucket:  # the last one already
            return
        halves[before + _NEXT] = behind
        halves[behind] = before
        last = halves[target]
        halves[node] = last
        halves[node + _NEXT] = target
        if target != bucket:
            halves[node + _BUCKET] = target
        halves[last + _NEXT] = node
        halves[target] = node
        if before == behind:
            self._drop_bucket(bucket)

    def touch_path(
        self, path: Sequence[int], unused: Container[int] = (), ends_prompt: bool = False, least: Least = NO_LEAST
    ) -> Least:
        """Count a use of the slots of one path, root first. Under every policy a child then goes before its parent.

        The deepest slot is queued first, under FIFO too. No parent keeps a lower use count or priority than its child.
        `unused`: slots stored just now, which count no use. `ends_prompt`, which only ADAPTIVE heeds: the last slot
        holds the end of a prompt.
        A long path is touched in parts, deepest first. Return the least that the part above must have, its `least`.
        """
        least_count, least_priority = least
        words, nodes = self._words, self._nodes
        for slot in reversed(path):
            word = (nodes + slot * _NODE_HALVES) >> 1
            _, count, priority = words[word + _SEQUENCE : word + _PRIORITY + 1]
            if slot not in unused:
                count += 1
            least_count, least_priority = max(count, least_count), max(priority, least_priority)
            if self._has_keys:
                self.unlink(slot)
                self.stamp(slot, least_count, least_priority)
                self.link(slot)
            else:  # one list for all
                words[word + _COUNT], words[word + _PRIORITY] = least_count, least_priority
                self.renew(slot)
        return least_count, least_priority

    def remember(self, slot: int, key: bytes) -> None:
        """Leave a ghost of the entry of `key` in a slot, which is about to be evicted; only ADAPTIVE has ghosts."""

    def recall(self, key: bytes) -> int:
        """Return the use count of an entry that is stored again after its eviction, 0 if it is not known."""
        return 0

    def configure(self, packed_weights: int) -> None:
        """Set the weights of ADAPTIVE, if it is the policy now or later; 0: use reuse gaps."""
        self._words[_WEIGHTS] = packed_weights

    def forget_ends(self, slots: Iterable[int]) -> None:
        """Clear the mark for the end of a prompt in these slots: only ADAPTIVE keeps it up to date."""
        for slot in slots:
            self._halves[self._node(slot) + _TAIL] = 0

    # --- looking -----------------------------------------------------------------------------------------------------

    def victims(self) -> Iterator[int]:
        """Yield the slots, next victim first. The order must not change meanwhile."""
        return self._walk()

    def _walk(self) -> Iterator[int]:
        """Yield the slots bucket by bucket; IndexError if the links go in a circle."""
        halves = self._halves
        left = 2 * self.num_slots  # so that such links hang no caller
        bucket = halves[_RING + _HIGHER]
        while bucket != _RING:
            node = halves[bucket + _FIRST]
            while node != bucket:
                yield (node - self._nodes) // _NODE_HALVES
                node = halves[node + _NEXT]
                left -= 1
                if not left:
                    raise IndexError
            bucket = halves[bucket + _HIGHER]
            left -= 1
            if not left:
                raise IndexError

    def sort_key(self, slot: int) -> tuple[int, int]:
        """Return (policy key, sequence number) of a slot, by which the order is sorted."""
        node = self._node(slot)
        return self._key(node), self._words[(node >> 1) + _SEQUENCE]

    def _key(self, node: int) -> int:
        return self._key_of(self._words[(node >> 1) + _COUNT], self._words[(node >> 1) + _PRIORITY])

    def _tails(self, top: int) -> list[int]:
        """Return, for each slot from 0 to `top`, 1 if it ends a prompt and so comes before all others, else 0."""
        return [0] * (top + 1)

    def copy(self, slot: int) -> bytes:
        """Return the bytes of the node of a slot."""
        node = self._nodes + slot * _NODE_HALVES
        return self._halves[node : node + _NODE_HALVES].tobytes()

    def note_of(self, is_tail: int, sequence: int, count: int, priority: int, slot: int, num_blocks: int) -> Note:
        """Return the numbers on which the place of a slot in the order depends, for `in_victim_order`."""
        return self._key_of(count, priority), sequence, slot, count, num_blocks

    def waste_now(self) -> Waste | None:
        """Return `waste` for `in_victim_order`; None: the order is bucket by bucket."""
        return None

    def weights(self) -> dict[str, float] | None:
        """Return the weights of ADAPTIVE; None: it uses reuse gaps, or is not the policy."""
        return None

    def oldest_first(self, slots: Iterable[int]) -> list[int]:
        """Return these slots by sequence number: 0.1 us each."""
        slots = list(slots)
        return sorted(slots, key=self._column(_SEQUENCE, max(slots, default=0)).__getitem__)

    def _column(self, word: int, top: int) -> list[int]:
        """Return a word of each node, for the slots from 0 to `top`."""
        first = (self._nodes >> 1) + word
        column: list[int] = self._words[first : first + top * (_NODE_HALVES >> 1) + 1 : _NODE_HALVES >> 1].tolist()
        return column

    # --- rebuilding and checking -------------------------------------------------------------------------------------

    def rebuild(self, slots: Iterable[int]) -> None:
        """Link just these slots, from their numbers: about 1 us each, column by column."""
        halves, words, nodes = self._halves, self._words, self._nodes
        slots = list(slots)
        top = max(slots, default=0)
        end = nodes + (top + 1) * _NODE_HALVES
        sequences, counts, priorities = (self._column(word, top) for word in (_SEQUENCE, _COUNT, _PRIORITY))
        tails = self._tails(top)
        if any(not (0 <= sequences[slot] < 1 << 62 and 0 <= counts[slot] < 1 << 62) for slot in slots):
            # Stray writes: no pool counts that far.
            for number, slot in enumerate(sorted(slots, key=self.sort_key), 1):
                if not (0 <= sequences[slot] < 1 << 62 and 0 <= counts[slot] < 1 << 62):
                    words[(self._node(slot) >> 1) + _SEQUENCE] = sequences[slot] = number
                    words[(self._node(slot) >> 1) + _COUNT] = counts[slot] = 0
        key_of = self._key_of
        ordered = sorted(
            (0 if tails[slot] else key_of(counts[slot], priorities[slot]), sequences[slot], slot) for slot in slots
        )
        last = max((sequences[slot] for slot in slots), default=0)
        words[_CLOCK] = max(words[_CLOCK], last) if 0 <= words[_CLOCK] < 1 << 62 else last
        links = [[0] * (top + 1) for _ in range(3)]  # previous, next and bucket of each node
        befores, behinds, buckets = links
        lower, number = _RING, 0
        for key, group in itertools.groupby(ordered, key=operator.itemgetter(0)):
            bucket = _BUCKETS + _BUCKET_HALVES * number
            number += 1
            before, before_slot, first = bucket, 0, 0
            for _, _, slot in group:
                node = nodes + slot * _NODE_HALVES
                befores[slot], buckets[slot] = before, bucket
                if before_slot:
                    behinds[before_slot] = node
                else:
                    first = node
                before, before_slot = node, slot
            behinds[before_slot] = bucket
            words[(bucket >> 1) + _KEY] = key
            halves[bucket + _LAST], halves[bucket + _FIRST] = before, first
            halves[bucket + _LOWER] = lower
            halves[lower + _HIGHER] = bucket
            lower = bucket
        halves[_RING + _LOWER], halves[lower + _HIGHER] = lower, _RING
        words[_FREE_BUCKET], words[_TOP_BUCKET] = 0, number
        for at, column in zip((_PREV, _NEXT, _BUCKET), links, strict=True):
            halves[nodes + at : end : _NODE_HALVES] = _words32(column)

    def check(self, slots: Iterable[int]) -> list[str]:
        """Return the problems found when comparing the order with `slots`, which it should hold; one pass over it."""
        expected = sorted(slots, key=self.sort_key)
        try:
            found = list(itertools.islice(self._walk(), len(expected) + 1))
        except IndexError:
            return ["the eviction order leads out of the index"]
        if found == expected:
            return []
        return [f"eviction order lists slots {found[:8]}..., the records say {expected[:8]}..."]

    def _new_bucket(self, lower: int, key: int) -> int:
        """Return a new, empty bucket right above the bucket `lower`."""
        halves, words = self._halves, self._words
        bucket = words[_FREE_BUCKET]
        if bucket:
            words[_FREE_BUCKET] = halves[bucket + _HIGHER]
        else:
            bucket = _BUCKETS + _BUCKET_HALVES * words[_TOP_BUCKET]
            words[_TOP_BUCKET] += 1
        higher = halves[lower + _HIGHER]
        words[(bucket >> 1) + _KEY] = key
        halves[bucket] = halves[bucket + _FIRST] = bucket
        halves[bucket + _LOWER] = lower
        halves[bucket + _HIGHER] = higher
        halves[lower + _HIGHER] = bucket
        halves[higher + _LOWER] = bucket
        return bucket

    def _drop_bucket(self, bucket: int) -> None:
        halves = self._halves
        lower, higher = halves[bucket + _LOWER], halves[bucket + _HIGHER]
        halves[lower + _HIGHER] = higher
        halves[higher + _LOWER] = lower
        halves[bucket + _HIGHER] = self._words[_FREE_BUCKET]
        self._words[_FREE_BUCKET] = bucket


class AdaptiveOrder(EvictionOrder):
    """The order of the policy ADAPTIVE: by worth. Only the heads of the buckets are compared.

    There is a bucket each for entries not used since their put, used once, twice, and more often. One more is for
    unused entries that end a prompt. The worth of an entry is its last use plus `REUSE_BONUS` of its bucket times G.
    G is the typical gap between the first and second use of an entry: the exponential of a running mean of the gaps'
    logarithms. Time is counted in blocks touched. The victim is the head that is furthest below the greatest possible
    worth. That distance counts once for every block, so that of heads of several sizes the victim frees most.
    Ghosts keep the use counts of entries evicted lately. So an entry that comes back is not taken for new, and G learns
    from its gap.
    With weights, the same heads are compared by a weighted sum of three numbers from 0 to 1. Time unused counts as
    age / (age + capacity), rare use as 1 - min(uses, 3) / 3, size as 1 - 1 / blocks.
    """

    is_adaptive = True

    def __init__(
        self,
        buffer: memoryview,
        num_slots: int,
        capacity: int,
        blocks_of: Callable[[int], int],
        ghosts: memoryview,
    ) -> None:
        """Work over these buffers. `capacity`, in blocks, is G at first; `blocks_of(slot)` is the size of an entry."""
        super().__init__(EvictionPolicy.ADAPTIVE, buffer, num_slots)
        self._capacity = capacity
        self._blocks_of = blocks_of
        self._ghosts = ghosts.cast("q")
        self._ghost_sets = GHOSTS_PER_SLOT * num_slots // _GHOST_WAYS

    @staticmethod
    def ghost_bytes(num_slots: int) -> int:
        """Return the size of the buffer of ghosts."""
        return 24 * GHOSTS_PER_SLOT * num_slots

    def take_over(self, other: EvictionOrder, slots: Iterable[int]) -> None:
        ghosts = cast(AdaptiveOrder, other)._ghosts
        words_per_set = 3 * _GHOST_WAYS
        for at in range(0, len(ghosts), 3):
            if ghosts[at]:  # each set splits in two, so all ghosts can keep their places in it
                new = words_per_set * (ghosts[at] % self._ghost_sets) + at % words_per_set
                self._ghosts[new : new + 3] = ghosts[at : at + 3]
        super().take_over(other, slots)

    # --- changing ----------------------------------------------------------------------------------------------------

    def stamp(self, slot: int, count: int, priority: int) -> None:
        self._halves[self._node(slot) + _TAIL] = 0
        self._words[_CLOCK] += self._blocks_of(slot) - 1
        super().stamp(slot, count, priority)

    def touch(self, slot: int) -> None:
        self.touch_path((slot,))

    def touch_all(self, slots: list[int]) -> None:
        for slot in slots:
            self.touch_path((slot,))

    def replace(self, slot: int) -> None:
        _, count, priority = self.numbers(slot)
        self.unlink(slot)
        self.stamp(slot, count, priority)
        self.link(slot)

    def touch_path(
        self, path: Sequence[int], unused: Container[int] = (), ends_prompt: bool = False, least: Least = NO_LEAST
    ) -> Least:
        least_count, least_priority = least
        clock, gaps = self._words[_CLOCK], []
        for slot in reversed(path):
            sequence, count, priority = self.numbers(slot)
            is_new = not count
            if slot not in unused:
                if is_new:
                    gaps.append(max(clock - sequence, 1))
                count += 1
            least_count, least_priority = max(count, least_count), max(priority, least_priority)
            self.unlink(slot)
            self.stamp(slot, least_count, least_priority)
            if ends_prompt and is_new:  # a prompt that was used again is like any other
                self._halves[self._node(slot) + _TAIL] = 1
            ends_prompt = False  # for those above it
            self.link(slot)
        if gaps:
            self._learn(gaps)
        return least_count, least_priority

    def _mean(self) -> float:
        """Return the running mean of the logarithms of gaps; before the first gap, the logarithm of the capacity."""
        learnt = self._words[_GAP]
        return learnt / (1 << 32) if 0 < learnt < 64 << 32 else math.log(self._capacity)

    def _learn(self, gaps: Sequence[int]) -> None:
        """Add gaps, in blocks, between the first and the second use of entries to the running mean."""
        mean, count = self._mean(), len(gaps)
        mean += (sum(map(math.log, gaps)) / count - mean) * count / (count + GAP_MEMORY)
        self._words[_GAP] = max(1, int(mean * (1 << 32)))

    def remember(self, slot: int, key: bytes) -> None:
        """Leave a ghost of an entry that is about to be evicted; in a full set it replaces the oldest one."""
        words, ghosts, digest = self._words, self._ghosts, key_digest(key)
        word = (self._nodes + slot * _NODE_HALVES) >> 1
        at = 3 * _GHOST_WAYS * (digest % self._ghost_sets)
        found = _GHOST_SET.unpack(ghosts[at : at + 3 * _GHOST_WAYS])
        digests, last = found[::3], found[1::3]
        at += 3 * (digests.index(0) if 0 in digests else last.index(min(last)))
        ghosts[at] = 0
        ghosts[at + 1] = words[word + _SEQUENCE]
        ghosts[at + 2] = words[word + _COUNT]
        ghosts[at] = digest

    def recall(self, key: bytes) -> int:
        """Return one more than the use count in the ghost of the key, which is removed; 0 if it has none."""
        ghosts, digest = self._ghosts, key_digest(key)
        at = 3 * _GHOST_WAYS * (digest % self._ghost_sets)
        found = _GHOST_SET.unpack(ghosts[at : at + 3 * _GHOST_WAYS])
        if digest not in found[::3]:
            return 0
        place = 3 * found[::3].index(digest)
        at += place
        sequence: int = found[place + 1]
        count: int = found[place + 2]
        ghosts[at] = 0
        if not count:
            self._learn([max(self._words[_CLOCK] - sequence, 1)])
        return count + 1

    # --- looking -----------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, float] | None:
        return unpack_weights(self._words[_WEIGHTS])

    def victims(self) -> Iterator[int]:
        halves, words, blocks_of, nodes = self._halves, self._words, self._blocks_of, self._nodes
        waste = self.waste_now()
        heads: list[tuple[float, int, int]] = []  # waste, node, bucket
        fresh = self._heads()
        for _ in range(self.num_slots):
            for node, bucket in fresh:
                key, word = words[(bucket >> 1) + _KEY], node >> 1
                num_blocks = blocks_of((node - nodes) // _NODE_HALVES)
                heads.append((waste(key, words[word + _SEQUENCE], words[word + _COUNT], num_blocks), node, bucket))
            if not heads:
                return
            head = max(heads)
            _, node, bucket = head
            yield (node - nodes) // _NODE_HALVES
            heads.remove(head)
            node = halves[node + _NEXT]
            fresh = [(node, bucket)] if node != bucket else []
        if heads or fresh:
            raise IndexError

    def _heads(self) -> list[tuple[int, int]]:
        """Return (first node, bucket) of each bucket."""
        halves = self._halves
        heads: list[tuple[int, int]] = []
        bucket = halves[_RING + _HIGHER]
        while bucket != _RING and len(heads) < len(REUSE_BONUS):
            heads.append((halves[bucket + _FIRST], bucket))
            bucket = halves[bucket + _HIGHER]
        return heads

    def waste_now(self) -> Waste:
        """Return a function of (policy key, sequence number, use count, blocks) of an entry; the greatest value goes.

        It is as of now. It depends on no other entry, so the order of two entries does not either.
        """
        words, capacity = self._words, self._capacity
        clock, gap = words[_CLOCK], math.exp(self._mean())
        by_name = words[_WEIGHTS] and self.weights()
        if not by_name:  # the distance to the greatest possible worth, once for every block
            return lambda key, sequence, _, num_blocks: (clock - sequence + REUSE_LACK[key] * gap) * num_blocks
        recency, frequency, size = by_name.values()

        def weigh(_: int, sequence: int, count: int, num_blocks: int) -> float:
            age = clock - sequence
            seldom = 1 - min(count, 3) / 3
            return recency * age / (age + capacity) + frequency * seldom + size * (1 - 1 / (num_blocks or 1))

        return weigh

    def _key(self, node: int) -> int:
        return 0 if self._halves[node + _TAIL] else super()._key(node)

    def _tails(self, top: int) -> list[int]:
        first = self._nodes + _TAIL
        tails: list[int] = self._halves[first : first + top * _NODE_HALVES + 1 : _NODE_HALVES].tolist()
        return tails

    def note_of(self, is_tail: int, sequence: int, count: int, priority: int, slot: int, num_blocks: int) -> Note:
        key = 0 if is_tail else self._key_of(count, priority)
        return key, sequence, slot, count, num_blocks


def order_over(
    policy: EvictionPolicy,
    buffer: memoryview,
    num_slots: int,
    capacity: int,
    blocks_of: Callable[[int], int],
    ghosts: memoryview | None,
) -> EvictionOrder:
    """Return the order of a policy over a buffer. `capacity` to `ghosts` are for ADAPTIVE: see `AdaptiveOrder`."""
    if policy is not EvictionPolicy.ADAPTIVE:
        return EvictionOrder(policy, buffer, num_slots)
    assert ghosts is not None
    return AdaptiveOrder(buffer, num_slots, capacity, blocks_of, ghosts)


def private_order(
    policy: EvictionPolicy, num_slots: int, capacity: int, blocks_of: Callable[[int], int]
) -> EvictionOrder:
    """Return an empty order over private memory."""
    buffer = memoryview(bytearray(EvictionOrder.buffer_bytes(num_slots)))
    num_bytes = AdaptiveOrder.ghost_bytes(num_slots) if policy is EvictionPolicy.ADAPTIVE else 0
    ghosts = memoryview(bytearray(num_bytes))
    order = order_over(policy, buffer, num_slots, capacity, blocks_of, ghosts)
    order.rebuild(())
    return order


class EvictionManager:
    """An `EvictionOrder` by key, over private memory. All methods are thread-safe. Pools do not use it."""

    def __init__(self, policy: EvictionPolicy | str, *, num_slots: int = 64, capacity: int = 0) -> None:
        """Make an empty order with space for `num_slots` entries, which grows; `capacity`: see `AdaptiveOrder`."""
        self._capacity = capacity or num_slots
        self._lock = threading.Lock()
        self._slot_of: dict[str, int] = {}
        self._entry_of: dict[int, CacheEntry] = {}
        self._free_slots: list[int] = []
        self._order = private_order(as_policy(policy), num_slots, self._capacity, self._blocks_of)

    @property
    def policy(self) -> EvictionPolicy:
        return self._order.policy

    def _blocks_of(self, slot: int) -> int:
        return -(-self._entry_of[slot].size // BLOCK_SIZE) or 1

    def add(self, entry: CacheEntry) -> None:
        """Insert an entry as the most recently used one, in place of an entry with the same key."""
        if not isinstance(entry, CacheEntry):
            raise InvalidArgumentError(f"entry is a {type(entry).__name__}, it must be a CacheEntry")
        check_int("size", entry.size, 0)
        count, priority = (
            check_int("access_count", entry.access_count, 0, MAX_ACCESS_COUNT),
            check_int("priority", entry.priority, I64_MIN),
        )
        with self._lock:
            self._remove(entry.key)
            if not self._free_slots and len(self._entry_of) == self._order.num_slots:
                self._grow()
            slot = self._free_slots.pop() if self._free_slots else len(self._entry_of) + 1
            self._slot_of[entry.key] = slot
            self._entry_of[slot] = entry
            self._order.stamp(slot, count or self._order.recall(entry.key.encode()), priority)
            self._order.link(slot)

    def access(self, key: str) -> None:
        """Count a use of an entry; an unknown key is ignored."""
        with self._lock:
            slot = self._slot_of.get(key)
            if slot is not None:
                self._order.touch(slot)
                self._entry_of[slot].access_count += 1
                self._entry_of[slot].last_accessed = time.time()

    def touch(self, keys: Sequence[str], ends_prompt: bool = False) -> None:
        """Count a use of each entry of a path, root first, as `KVCachePool.touch` does; unknown keys are ignored."""
        check_keys(keys)
        with self._lock:
            path = [self._slot_of[key] for key in dict.fromkeys(keys) if key in self._slot_of]
            self._order.touch_path(path, ends_prompt=ends_prompt)
            for slot in path:
                self._entry_of[slot].access_count += 1
                self._entry_of[slot].last_accessed = time.time()

    def remove(self, key: str, evicted: bool = False) -> None:
        """Remove an entry; an unknown key is ignored. If it was `evicted`, it leaves a ghost under ADAPTIVE."""
        with self._lock:
            if evicted and key in self._slot_of:
                self._order.remember(self._slot_of[key], key.encode())
            self._remove(key)

    def configure_adaptive(self, weights: Mapping[str, float] | None) -> None:
        """Set the weights of ADAPTIVE, see `KVCachePool.configure_adaptive`; None: use reuse gaps again."""
        packed = pack_weights(weights)
        with self._lock:
            self._order.configure(packed)

    def get_eviction_candidates(self, count: int) -> list[str]:
        """Return up to `count` keys, next victim first."""
        check_int("count", count, 0)
        with self._lock:
            return [self._entry_of[slot].key for slot in itertools.islice(self._order.victims(), count)]

    def get_all_entries(self) -> list[CacheEntry]:
        """Return all entries, in the order they were added."""
        with self._lock:
            return [self._entry_of[slot] for slot in self._slot_of.values()]

    def _remove(self, key: str) -> None:
        slot = self._slot_of.pop(key, None)
        if slot is not None:
            self._order.unlink(slot)
            del self._entry_of[slot]
            self._free_slots.append(slot)

    def _grow(self) -> None:
        """Double the private buffer; the order, and the ghosts of ADAPTIVE, stay as they are."""
        order = private_order(self.policy, 2 * self._order.num_slots, self._capacity, self._blocks_of)
        order.take_over(self._order, self._entry_of)
        self._order = order


# ======================================================================================================================
# Planning
# ======================================================================================================================

# Pure functions that plan which entries to evict and to move so that free blocks lie together. Entries in use stay:
# they cut the data region into sections, and every other value lies in one of them.

MAX_TARGETS = 8
Extent = tuple[int, int, int]  # first block, number of blocks, slot
Move = tuple[int, int]  # slot, new first block
Plan = tuple[list[int], list[Move]]  # slots to evict; then the moves, in this order


class Section(NamedTuple):
    """Blocks between two extents that can't move."""

    low: int  # the first block
    high: int  # the block behind the last
    extents: list[Extent]  # of entries that can be moved and evicted, by first block

    def without(self, gone: Container[int]) -> Section:
        """Return the section once these slots are evicted."""
        return self._replace(extents=[extent for extent in self.extents if extent[2] not in gone])

    @property
    def num_free(self) -> int:
        return self.high - self.low - sum(num_blocks for _, num_blocks, _ in self.extents)


def cut_sections(movable: list[Extent], fixed: list[Extent], num_blocks: int) -> list[Section]:
    """Return the sections of a data region. Both lists must be sorted by first block."""
    sections, low, begin = [], 0, 0
    for start, length, _ in [*fixed, (num_blocks, 0, 0)]:
        end = bisect.bisect_left(movable, (start, 0, 0), begin)
        sections.append(Section(low, start, movable[begin:end]))
        low, begin = start + length, end
    return sections


def join_extents(extents: Iterable[Extent]) -> Iterator[tuple[int, int]]:
    """Yield (first block, number of blocks) of the runs that extents make, which must be sorted by first block."""
    begin = end = 0
    for start, length, _ in extents:
        if start != end:
            if end > begin:
                yield begin, end - begin
            begin = start
        end = start + length
    if end > begin:
        yield begin, end - begin


def widest_section(fixed: list[Extent], num_blocks: int) -> int:
    """Return the number of blocks of the largest section between `fixed`, in any order: 0.5 us an extent."""
    widest = low = 0
    for start, length, _ in sorted(fixed):
        widest = max(widest, start - low)
        low = start + length
    return max(widest, num_blocks - low)


def plan_room(sections: list[Section], num_blocks: int, candidates: Iterable[int], need_slot: bool) -> Plan | None:
    """Return the slots to evict, in the order of `candidates`, and the moves that join `num_blocks` free blocks.

    It evicts no more than it must. `need_slot`: at least one entry is evicted. None if pins make it impossible: no
    section is wide enough, which is checked first, or the candidates run out. Takes 1 us an extent, and up to 7 where
    pins split the free blocks and entries must change sections.
    """
    if all(section.high - section.low < num_blocks for section in sections):
        return None
    section_of = {
        slot: (number, length) for number, section in enumerate(sections) for _, length, slot in section.extents
    }
    free = [section.num_free for section in sections]
    total, most = sum(free), max(free)
    victims: list[int] = []
    least = -1  # the number of victims that free enough blocks, wherever these lie
    queue = iter(candidates)
    while most < num_blocks or least < 0:
        if least < 0 and total >= num_blocks and (victims or not need_slot):
            least = len(victims)
            continue
        slot = next(queue, 0)
        if not slot:
            return None
        if slot not in section_of:  # a reader has unpinned it since, without the lock
            continue
        victims.append(slot)
        number, length = section_of[slot]
        free[number] += length
        total += length
        most = max(most, free[number])

    def moves_after(count: int) -> list[Move] | None:
        gone = set(victims[:count])
        left = [section.without(gone) for section in sections] if gone else sections
        return plan_slide(left, num_blocks) if count == len(victims) else plan_exchange(left, num_blocks)

    # All victims free enough of one section. Fewer, but at least `least`, may do if entries move to other sections.
    enough, step = least, 1
    while (moves := moves_after(enough)) is None:
        least, enough, step = enough + 1, min(enough + step, len(victims)), 2 * step
    while least < enough:
        middle = (least + enough) // 2
        fewer = moves_after(middle)
        if fewer is None:
            least = middle + 1
        else:
            enough, moves = middle, fewer
    return victims[:enough], moves


def plan_slide(sections: list[Section], num_blocks: int) -> list[Move] | None:
    """Return the moves of fewest blocks within one section that join `num_blocks` free blocks; None if none do."""
    best: tuple[int, list[Extent], int] | None = None
    for low, high, extents in sections:
        starts = [start for start, _, _ in extents] + [high]
        ends = [low] + [start + count for start, count, _ in extents]
        gaps = [start - end for start, end in zip(starts, ends, strict=True)]
        first = free = cost = 0
        for last, gap in enumerate(gaps):
            free += gap
            if last:
                cost += extents[last - 1][1]
            while free - gaps[first] >= num_blocks:
                free -= gaps[first]
                cost -= extents[first][1]
                first += 1
            if free >= num_blocks and (best is None or cost < best[0]):
                best = (cost, extents[first:last], ends[first])
    return None if best is None else slide(best[1], best[2])


def slide(extents: list[Extent], low: int) -> list[Move]:
    """Return the moves that pack these extents from block `low` on."""
    moves = []
    for start, num_blocks, slot in extents:
        if start != low:
            moves.append((slot, low))
        low += num_blocks
    return moves


def plan_exchange(sections: list[Section], num_blocks: int) -> list[Move] | None:
    """Return moves to other sections that join `num_blocks` free blocks in one section; None if none are found.

    Best fit: the smallest entry that is enough alone, else the largest, goes where it leaves the fewest free blocks.
    Of the sections that are wide enough only the `MAX_TARGETS` with the most free blocks are tried.
    """
    free = [section.num_free for section in sections]
    rooms = sorted((room, number) for number, room in enumerate(free) if room)
    wide = ((room, n) for n, room in enumerate(free) if sections[n].high - sections[n].low >= num_blocks)
    for _, target in heapq.nlargest(MAX_TARGETS, wide):
        low, _, extents = sections[target]
        missing = num_blocks - free[target]
        room = [item for item in rooms if item[1] != target]
        remaining = sorted((length, start, slot) for start, length, slot in extents)
        leaving: dict[int, list[tuple[int, int]]] = {}  # section -> (slot, number of blocks)
        while missing > 0 and remaining:
            length, _, slot = remaining.pop(min(bisect.bisect_left(remaining, (missing,)), len(remaining) - 1))
            fitting = bisect.bisect_left(room, (length,))
            if fitting < len(room):
                size, number = room.pop(fitting)
                bisect.insort(room, (size - length, number))
                leaving.setdefault(number, []).append((slot, length))
                missing -= length
        if missing > 0:
            continue
        moves: list[Move] = []
        for number, arriving in leaving.items():
            moves += slide(sections[number].extents, sections[number].low)
            end = sections[number].high - free[number]
            for slot, length in arriving:
                moves.append((slot, end))
                end += length
        left = {slot for arriving in leaving.values() for slot, _ in arriving}
        return moves + slide(sections[target].without(left).extents, low)
    return None


# ======================================================================================================================
# Segment and lock
# ======================================================================================================================


def _record_lock(fd: int, kind: int, offset: int, command: int) -> bytes:
    """Lock, unlock or query a byte by open-file-description lock (Linux 3.15); return the kernel's `struct flock`."""
    return fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, offset, 1, 0))


def _try_lock_byte(fd: int, kind: int, offset: int) -> bool:
    try:
        _record_lock(fd, kind, offset, fcntl.F_OFD_SETLK)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _byte_is_locked(fd: int, offset: int) -> bool:
    """Return True if another open file description holds a lock on that byte."""
    kind: int = struct.unpack_from("h", _record_lock(fd, fcntl.F_WRLCK, offset, fcntl.F_OFD_GETLK))[0]
    return kind != fcntl.F_UNLCK


def _somebody_has_open(path: str) -> bool:
    """Return True if any living process has the segment at `path` open."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return _byte_is_locked(fd, PRESENCE_BYTE)
    finally:
        os.close(fd)


# Files in a directory of a memory cgroup: a limit, and the memory that counts against it. Version 2, then version 1.
CGROUP_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),  # beyond it the kernel slows the process down to a standstill
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
)


def _read_text(path: str) -> str:
    """Return the text of a small file of the kernel, "" if it can't be read."""
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()
    return ""


def _cgroup_directories(process: str = "/proc/self") -> Iterator[str]:
    """Yield the directories of this process's memory cgroup and of its ancestors, as far as they are mounted here."""
    paths = {}  # file system type -> path of our cgroup in that hierarchy
    for line in _read_text(f"{process}/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    for line in _read_text(f"{process}/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        parts, kinds = mount.split(" "), kind.split(" ")
        path = paths.get(kinds[0], "")
        if len(parts) < 5 or not path or (kinds[0] == "cgroup" and "memory" not in kinds[-1].split(",")):
            continue
        root, top = (re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), part) for part in parts[3:5])
        root = root.rstrip("/")
        if f"{path}/".startswith(f"{root}/"):
            below = path[len(root) :].strip("/")
        elif set(root.split("/")) == {"", ".."}:
            # For each "..", the mount is one level above our cgroup namespace, which does not tell their names.
            import glob

            below, levels = "", "/*" * root.count("..")
            for procs in glob.glob(f"{glob.escape(top)}{levels}{glob.escape(path.rstrip('/'))}/cgroup.procs"):
                if str(os.getpid()) in _read_text(procs).split():
                    below = os.path.relpath(os.path.dirname(procs), top)
        else:
            continue  # a mount of another part of the tree
        if ".." in below.split("/"):
            continue  # above that mount
        yield os.path.join(top, below) if below else top
        while below:
            below = os.path.dirname(below)
            directory = os.path.join(top, below) if below else top
            if _read_text(f"{directory}/memory.use_hierarchy").strip() != "0":  # "0": version 1, it does not limit ours
                yield directory


def _cgroup_memory(directory: str) -> Iterator[tuple[int, str]]:
    """Yield (available bytes, name of the limit) for each limit that a directory of a memory cgroup sets.

    Page cache that the kernel can drop does not count as used. Shared memory is no such cache.
    """
    numbers: dict[str, int] = {}
    for line in _read_text(f"{directory}/memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if value.isdigit():
            numbers[name] = int(value)
    whole = "total_" if "total_inactive_file" in numbers else ""  # version 1: including all cgroups below
    cache = numbers.get(f"{whole}inactive_file", 0) + numbers.get(f"{whole}active_file", 0)
    for limit_name, used_name in CGROUP_LIMITS:
        limit, used = (_read_text(f"{directory}/{name}").strip() for name in (limit_name, used_name))
        if limit.isdigit() and used.isdigit():
            bound = int(limit)
            if limit_name == "memory.limit_in_bytes":  # or the limit of an ancestor that is not mounted here
                bound = min(bound, numbers.get("hierarchical_memory_limit", bound))
            if bound < 1 << 60:  # else "no limit"
                text = f"the cgroup {directory} ({limit_name} {format_size(bound)})"
                yield max(0, bound - int(used) + cache), text


def _available_memory(process: str = "/proc/self", meminfo: str = "/proc/meminfo") -> tuple[int, str] | None:
    """Return (available bytes of memory, name of the limit); None if that can't be known.

    Swap does not count: a cgroup may not be allowed to use it, and a cache in swap is slower than none.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read_text(meminfo), re.MULTILINE)
    limits = [(1024 * int(found[1]), "this machine")] if found else []
    for directory in _cgroup_directories(process):
        limits += _cgroup_memory(directory)
    return min(limits, default=None)


def _memory_shortage(size: int) -> str:
    """Return "" if `size` bytes of shared memory are available, else the reason: the kernel would kill a process."""
    available = _available_memory()
    # On top come the kernel's tree of pages and a page table, 8 bytes a page each, and counts that lag behind.
    needed = size + (size >> 7) + (1 << 20)
    if available is None or needed <= available[0]:
        return ""
    return (
        f"it needs {format_size(needed)} and {available[1]} has {format_size(available[0])} of memory available: "
        "make a smaller pool, raise the limit, or use tier nvme"
    )


def _space_shortage(directory: str, size: int, must: bool = False) -> str:
    """Return "" if the file system of a directory has `size` bytes free, else the reason; `must`: always a reason."""
    room = os.statvfs(directory)
    free = room.f_bavail * room.f_frsize
    if not must and (size <= free or not room.f_blocks):  # a tmpfs without a limit has 0 blocks here
        return ""
    fix = "raise Docker's --shm-size, remount it with a larger size=," if directory == SHM_DIR else "free some space"
    return (
        f"it needs {format_size(size)} and {directory} has {format_size(free)} free of "
        f"{format_size(room.f_blocks * room.f_frsize)}: {fix} or make a smaller pool"
        + (", or one of tier nvme" if directory == SHM_DIR else "")
    )


@functools.lru_cache(maxsize=1)
def _boot_id() -> int:
    """Return a number that changes with every boot, 0 if there is none."""
    text = _read_text("/proc/sys/kernel/random/boot_id").strip()
    if not text:  # some containers hide it
        found = re.search(r"^btime \d+", _read_text("/proc/stat"), re.MULTILINE)
        text = found[0] if found else ""
    return zlib.crc32(text.encode()) or 1 if text else 0


class SegmentHeader(NamedTuple):
    """The fixed part of a segment's header."""

    geometry: Geometry
    config: CachePoolConfig
    store_path: str
    transient: bool
    identity: str  # random; tells a pool from a later one of the same name
    first_policy: str  # the policy that the pool was made with; the config has the current one

    def encode(self) -> tuple[bytes, bytes]:
        """Return (fixed words without the magic, JSON)."""
        more = {"store": self.store_path, "transient": self.transient, "identity": self.identity}
        try:
            text = json.dumps({"config": self.config.to_dict(), **more}).encode()
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(f"config {_show(self.config)} holds what JSON can't: {error}") from None
        if len(text) > HEADER_SIZE - HEADER_JSON_AT:
            raise InvalidArgumentError(
                f"config and store path take {len(text)} bytes, the header holds {HEADER_SIZE - HEADER_JSON_AT}: "
                "use shorter paths"
            )
        g = self.geometry
        fixed = HEADER.pack(b"", CACHE_VERSION, 0, g.size_bytes, g.block_size, g.num_blocks, g.max_entries, len(text))
        checksum = zlib.crc32(text, zlib.crc32(fixed[HEADER_FIXED_AT:]))
        return struct.pack("<II", CACHE_VERSION, checksum) + fixed[HEADER_FIXED_AT:], text

    @classmethod
    def decode(cls, data: bytes, file_bytes: int, path: str) -> SegmentHeader | None:
        """Return the header in `data`; None if its maker died before it was done; CorruptionError if it is not ours."""
        if not data[: len(CACHE_MAGIC)].strip(b"\0"):
            return None
        fixed = data.ljust(HEADER_SIZE, b"\0")
        magic, version, checksum, size_bytes, block_size, num_blocks, max_entries, length = HEADER.unpack_from(fixed)
        if magic != CACHE_MAGIC:
            raise CorruptionError(
                f"{path} begins with {magic!r}, a pool with {CACHE_MAGIC!r}: not a pool, or smashed; delete it"
            )
        if version != CACHE_VERSION:
            raise CorruptionError(
                f"{path} has layout version {version}, this program knows {CACHE_VERSION}: persist it with the version "
                "that made it, or delete it"
            )
        text = fixed[HEADER_JSON_AT : HEADER_JSON_AT + length]
        if checksum != zlib.crc32(text, zlib.crc32(fixed[HEADER_FIXED_AT : HEADER.size])):
            raise CorruptionError(
                f"the header of {path} does not match its checksum: smashed; delete it and create it anew"
            )
        more = json.loads(text)
        config = CachePoolConfig.from_dict(more["config"])
        geometry = Geometry(size_bytes, block_size, num_blocks, max_entries, config.record)
        (word,) = struct.unpack_from("q", fixed, 8 * POLICY)
        now = replace(config, eviction_policy=_policy_now(config, word).value)
        # Ghosts stay when the policy changes again. A crash may leave a part of them; `map_ghosts` makes the rest.
        if not geometry.total_bytes <= file_bytes <= geometry.bytes_with_ghosts:
            raise CorruptionError(
                f"{path} has {file_bytes} bytes, its header says {geometry.total_bytes} to "
                f"{geometry.bytes_with_ghosts}: cut? delete it"
            )
        return cls(geometry, now, more["store"], more["transient"], more["identity"], config.eviction_policy)


def _policy_now(config: CachePoolConfig, word: int) -> EvictionPolicy:
    """Return the policy of a pool, by the header word POLICY."""
    policies = list(EvictionPolicy)
    if 1 <= word <= len(policies):
        return policies[word - 1]
    return EvictionPolicy(config.eviction_policy)


def read_header(path: str) -> SegmentHeader | None:
    """Return the header of the segment at `path`, or None, as `SegmentHeader.decode` does. May be FileNotFoundError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return SegmentHeader.decode(os.pread(fd, HEADER_SIZE, 0), os.fstat(fd).st_size, path)
    finally:
        os.close(fd)


def _map_pages(memory: mmap.mmap, offset: int, size: int) -> None:
    """Map the pages of a range before a write, by a read in each window: a seventh of the cost of write faults."""
    _ = memory[offset & -FAULT_AROUND : offset + size : FAULT_AROUND]


class Memory:
    """The bytes of a pool, also as 64-bit words, 32-bit halves and floats. A slice of `memory` is a copy."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        self.buffer = memoryview(memory)
        self.read_only = self.buffer.toreadonly()
        self.words = self.buffer.cast("q")
        self.halves = self.buffer.cast("I")
        self.floats = self.buffer.cast("d")

    def release(self) -> None:
        """Unmap the memory as soon as no view shows it any more."""
        for name in ("halves", "words", "floats", "read_only", "buffer"):
            if hasattr(self, name):
                getattr(self, name).release()
        if hasattr(self, "memory"):
            del self.memory


class Segment(Memory):
    """One pool's file, its locks, and once mapped its memory.

    A segment of tier cpu is POSIX shared memory: a file of /dev/shm, which is all that `shm_open` opens on Linux. It is
    mapped without `multiprocessing.shared_memory`: its import takes longer than all the rest of opening a pool. Its
    resource tracker also unlinks live pools at exit (cpython#82300; `track=False` exists only from Python 3.13 on).

    `fd` is an open file description of our own, on which `flock` and the byte locks are taken. mmap keeps another one,
    `map_fd`. A forked child shares that, so locks on it would outlive our process. `map_fd` also maps more of the file
    later, when the path may lead elsewhere, or the process may have lost the right to open it.

    `Segment(path)` opens the file and locks its name. The caller must `map` or `make` it and `unlock_name`, or `close`.
    """

    def __init__(self, path: str, *, make: bool = False, wait: bool = True) -> None:
        """Open the file at `path`, or with `make` a new, empty one, and lock its name.

        FileNotFoundError, with `make` FileExistsError. BlockingIOError if not `wait` and another process has the lock.
        """
        self.path = path
        self.header: SegmentHeader
        self.fd = self.map_fd = -1
        self.session = -1
        self.is_owned = False  # True if a pool owns it, and closes it
        self.ghosts: memoryview | None = None
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if make else 0)
        if not _own_process[0]:
            _adopt_pools()
        try:
            while True:
                if wait:
                    with _no_fork:  # a child must know of every file on which we take locks
                        self.fd = os.open(path, flags, 0o600)
                        _segments.add(self)
                else:  # a destructor might wait for `_no_fork` for ever; `close` also unlocks a file that a child has
                    self.fd = os.open(path, flags, 0o600)
                    _segments.add(self)
                if wait and not make:
                    _record_lock(self.fd, fcntl.F_WRLCK, NAME_BYTE, fcntl.F_OFD_SETLKW)
                elif not _try_lock_byte(self.fd, fcntl.F_WRLCK, NAME_BYTE):
                    if not make:
                        raise BlockingIOError(errno.EAGAIN, "being made, opened or removed by another process")
                    self._close_files()  # another process took it for a leftover and will remove it: make another one
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(self.fd), os.stat(path)):
                        return
                self._close_files()  # removed before we had the lock
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Segment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_in_use(self) -> bool:
        """Return True if another handle, of any process, has the segment open."""
        return _byte_is_locked(self.fd, PRESENCE_BYTE)

    def read_live_header(self) -> SegmentHeader | None:
        """Return the header; None, and the file is removed, if the segment is of no use. The caller must lock the name.

        It is of no use if its maker died before it was done, or if it is a transient pool that no process has open.
        """
        data = os.pread(self.fd, HEADER_SIZE, 0)
        header = SegmentHeader.decode(data, os.fstat(self.fd).st_size, self.path)
        if header is None or (header.transient and not self.is_in_use()):
            os.unlink(self.path)
            return None
        return header

    def unlock_name(self) -> None:
        """Let others open and remove the segment."""
        _record_lock(self.fd, fcntl.F_UNLCK, NAME_BYTE, fcntl.F_OFD_SETLK)

    def map(self, header: SegmentHeader) -> None:
        """Count as a user of the segment and map its memory. The caller must hold the name lock."""
        self.header = header
        with _os_errors(f"open {self.path}"):
            _record_lock(self.fd, fcntl.F_RDLCK, PRESENCE_BYTE, fcntl.F_OFD_SETLKW)
            self.map_fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            super().__init__(mmap.mmap(self.map_fd, header.geometry.total_bytes))

    def make(self, header: SegmentHeader, progress: Progress | None = None) -> None:
        """Make a pool of an empty file, whole or not at all, and map it. The caller must hold the name lock."""
        try:
            with _os_errors(f"create {self.path}"):
                os.fchmod(self.fd, 0o600)
                self._reserve_space(header, progress)
            self.map(header)
            if header.transient and os.path.dirname(self.path) == SHM_DIR:
                # The maker of such a pool goes on to use it. Mapping its pages makes this take a tenth longer. Without
                # that, the first puts would take up to twice as long.
                for at in range(0, len(self.memory), RESERVE_CHUNK):
                    _map_pages(self.memory, at, RESERVE_CHUNK)
            self._publish()
        except BaseException:
            if self.fd >= 0:  # else this is a child that was forked meanwhile: the parent owns the name
                with contextlib.suppress(OSError):
                    os.unlink(self.path)
            self.close()
            raise

    def map_ghosts(self) -> memoryview:
        """Return the memory of ghosts, made if it is not there; StorageError if there is no space for it."""
        if self.ghosts is None:
            offset = self.header.geometry.ghosts_offset
            size = self.header.geometry.bytes_with_ghosts - offset
            doing = f"make room for the ghosts of policy adaptive in {self.path}"
            with _os_errors(doing):
                missing = offset + size - os.fstat(self.fd).st_size
                if missing > 0 and os.path.dirname(self.path) == SHM_DIR and (short := _memory_shortage(missing)):
                    raise StorageError(f"cannot {doing}: {short}")
                os.posix_fallocate(self.fd, offset, size)
                self.ghosts = memoryview(mmap.mmap(self.map_fd, size, offset=offset))
        return self.ghosts

    def _reserve_space(self, header: SegmentHeader, progress: Progress | None) -> None:
        """Allocate every page now: a file that only looks large enough kills with SIGBUS at the first touch.

        Leftovers of dead processes are removed if space is short. Limits are checked for each chunk: others use memory.
        """
        geometry = header.geometry
        has_ghosts = header.first_policy == EvictionPolicy.ADAPTIVE.value
        total = geometry.bytes_with_ghosts if has_ghosts else geometry.total_bytes
        place = os.path.dirname(self.path)
        in_memory = place == SHM_DIR
        left: list[Leftover] | None = None  # segments that could not be removed, once the others have been
        zeros = memoryview(bytes(COPY_CHUNK))
        end = 0
        while end < total:
            at, end = end, min(end + RESERVE_CHUNK, total)
            short = _space_shortage(place, total - at) or (_memory_shortage(total - at) if in_memory else "")
            try:
                if not short:
                    os.posix_fallocate(self.fd, at, end - at)
                    # The kernel zeroes a page of tmpfs at its first use, unless that is a write: a write is cheaper.
                    if in_memory:
                        for part in range(at, end, COPY_CHUNK):
                            os.pwrite(self.fd, zeros[: end - part], part)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                short = _space_shortage(place, total - at, must=True)
            if short:
                if left is None:
                    removed, left = _remove_leftovers(place)
                    if removed:
                        end = at
                        continue
                hint = f"; also there: {', '.join(map(str, left))}" if left else ""
                raise StorageError(f"cannot create {self.path}: {short}{hint}")
            if progress is not None:
                progress(end, total)

    def _publish(self) -> None:
        """Write the header, the magic last: without the magic there is no pool."""
        fixed, text = self.header.encode()
        self.memory[HEADER_JSON_AT : HEADER_JSON_AT + len(text)] = text
        self.words[BOOT_ID] = _boot_id()
        self.words[DIRTY] = 1  # the first process to lock builds the index
        self.memory[len(CACHE_MAGIC) : len(CACHE_MAGIC) + len(fixed)] = fixed
        self.memory[: len(CACHE_MAGIC)] = CACHE_MAGIC

    def note_boot_locked(self) -> None:
        """Set DIRTY for an nvme pool at the first lock after a boot. The caller must hold the lock."""
        # Pages of the index may never have reached the disk. Containers of one boot may differ in its id: keep a few.
        boot = _boot_id()
        known = self.words[BOOT_ID : BOOT_ID + NUM_BOOT_IDS].tolist()
        if boot and boot not in known and self.header.config.tier == "nvme":
            self.words[DIRTY] = 1
            for at, number in enumerate([boot, *known[:-1]]):
                self.words[BOOT_ID + at] = number

    # --- sessions ----------------------------------------------------------------------------------------------------

    def is_alive(self, session: int) -> bool:
        """Return True if the process behind a session still has it open.

        Pids can be recycled and differ between containers. The lock can't: the kernel releases it with the process.
        """
        return session == self.session or _byte_is_locked(self.fd, SESSION_BYTE + session)

    def lock_session(self, session: int) -> bool:
        """Take the lock that shows others that this session is alive; return False if another handle has it."""
        return _try_lock_byte(self.fd, fcntl.F_WRLCK, SESSION_BYTE + session)

    def can_be_locked(self, patience: float) -> bool:
        """Return True if the pool's lock is free now, or within `patience` seconds. This handle must not hold it."""
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                pass
            finally:  # also after an interrupt; it does no harm where the lock is another's
                fcntl.flock(self.fd, fcntl.LOCK_UN)
            if time.monotonic() >= until:
                return False
            time.sleep(STEP_PAUSE)

    def withdraw(self) -> None:
        """Stop counting as a user of the segment, but keep the session."""
        _record_lock(self.fd, fcntl.F_UNLCK, PRESENCE_BYTE, fcntl.F_OFD_SETLK)

    def reopen_after_fork(self) -> None:
        """Open the file anew in a forked child, so that it has locks of its own and none of the parent's."""
        self.session = -1
        own = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.dup2(own, self.fd, inheritable=False)
        finally:
            os.close(own)
        _record_lock(self.fd, fcntl.F_RDLCK, PRESENCE_BYTE, fcntl.F_OFD_SETLKW)

    def __del__(self) -> None:
        if not self.is_owned:  # a collection also calls this for a pool that lives on for its views
            self.close()

    def _close_files(self) -> None:
        """Close the files; all locks end with them."""
        for name in ("fd", "map_fd"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)

    def close(self) -> None:
        """Close the files and the memory. Memory that a view still shows stays mapped until the last such view is gone.

        The name is unlocked explicitly: a child of a fork in C may have the file open too, without knowing of it.
        """
        if self.fd >= 0 and _own_process[0]:
            with contextlib.suppress(OSError):
                _record_lock(self.fd, fcntl.F_UNLCK, NAME_BYTE, fcntl.F_OFD_SETLK)
        self._close_files()
        self.release()
        self.ghosts = None


class _OwnPid:
    """The fallback of `_mark_process`: item 0 is true in the process that has set it last. Costs a system call."""

    def __init__(self) -> None:
        self[0] = 1

    def __getitem__(self, index: int) -> bool:
        return os.getpid() == self._pid

    def __setitem__(self, index: int, value: int) -> None:
        self._pid = os.getpid()


def _mark_process() -> mmap.mmap | _OwnPid:
    """Return a mark whose item 0 is true in this process, and false in a child until the child sets it.

    It is a page that the kernel wipes in every forked child (Linux 4.14). That holds for a fork in C too, which runs
    none of Python's hooks. A look at it costs 0.04 us; `getpid` costs up to 0.3.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        page.madvise(18)  # MADV_WIPEONFORK, which the module `mmap` does not name
    except OSError:
        page.close()
        return _OwnPid()
    page[0] = 1
    return page


_own_process = _mark_process()
_adopting = threading.RLock()
_adoptions: list[int] = []  # not empty while the thread that holds `_adopting` is at work

# Every segment that has files open. A forked child closes those that are not part of a pool yet.
_segments: weakref.WeakSet[Segment] = weakref.WeakSet()

# Held by `fork`, and while a file for locks is opened. A child that inherits such a file without knowing of it would
# hold the lock for its whole life. A thread that holds `_no_fork` waits for nothing but the lock of a store.
_no_fork = threading.RLock()
_forking: set[int] = set()  # the threads that hold it for a fork


def _adopt_pools() -> None:
    """Give the pools of a forked child locks and sessions of their own.

    The hook of `os.fork` calls it. So does every call, before it touches anything, if the mark shows a fork without it.
    """
    global _no_fork  # noqa: PLW0603  # a lock that a thread of the parent holds can't be freed
    with _adopting:
        if _own_process[0] or _adoptions:  # done; or one of the calls below comes back here
            return
        try:
            _adoptions.append(1)
            _no_fork = threading.RLock()
            _forking.clear()
            pools = _known_pools()
            in_pools = {pool._mapped for pool in pools}
            for segment in list(_segments):
                if segment not in in_pools:  # another thread was opening or making it
                    segment._close_files()
            for pool in pools:
                pool._after_fork()
            _own_process[0] = 1
        finally:
            _adoptions.clear()


def _in_store(store_path: str, work: Callable[[], _R]) -> _R:
    """Run `work` under the lock of a store directory and return its result; `work` must not wait for anything.

    It is a function with try and finally, and no context manager, for the reason given at `_locked`.
    """
    fd = -1
    if not _own_process[0]:
        _adopt_pools()
    with _no_fork:
        try:
            try:
                fd = os.open(store_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(fd, fcntl.LOCK_EX)
            except OSError as error:
                raise StorageError(f"cannot lock the store directory {store_path}: {error.strerror}") from error
            return work()
        finally:
            if fd >= 0:
                with contextlib.suppress(OSError):  # explicitly: a child of a fork in C, without hooks, may have `fd`
                    fcntl.flock(fd, fcntl.LOCK_UN)
                os.close(fd)


class Leftover(NamedTuple):
    """A segment that is not removed, although it may be of no use."""

    name: str
    size_bytes: int
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({format_size(self.size_bytes)}, {self.why})"


OUT_OF_SIGHT = "its store directory is not to be seen from here; `cortex cache prune --force` removes it"


def _remove_leftovers(directory: str, force: bool = False) -> tuple[list[str], list[Leftover]]:
    """Remove the useless segments of a directory, without waiting; return (their names, those that stay).

    Damaged segments stay, and those of other users. So do durable pools that no process has open and whose store
    directory is not there. It may be in another container, so only `force` removes them.
    """
    removed, left = [], []
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        if not name.startswith(SEGMENT_PREFIX):
            continue
        try:
            with Segment(path, wait=False) as segment:
                header = segment.read_live_header()
                if header is None:
                    removed.append(name)
                    continue
                is_lost = not header.transient and directory == SHM_DIR and not os.path.isdir(header.store_path)
                if is_lost and not segment.is_in_use():
                    if force:
                        os.unlink(path)
                        removed.append(name)
                    else:
                        left.append(Leftover(name, os.fstat(segment.fd).st_blocks * 512, OUT_OF_SIGHT))
        except (CacheError, OSError) as error:
            with contextlib.suppress(OSError):
                status = os.stat(path)
                if isinstance(error, CorruptionError):
                    left.append(Leftover(name, status.st_blocks * 512, f"damaged, delete {path}"))
                elif status.st_uid != os.getuid():
                    left.append(Leftover(name, status.st_blocks * 512, f"it belongs to user {status.st_uid}"))
    return removed, left


# ======================================================================================================================
# Entry table
# ======================================================================================================================


# `_new_lock().acquire()` is a memory fence: no read after it comes before a write ahead of it. The lock is a fresh one:
# no thread may wait for another here, and taking a lock that this thread has already is no fence.
_new_lock = threading.Lock


_NOT_ZERO = re.compile(rb"[^\0]")


def _not_zero(column: bytes) -> list[int]:
    """Return the positions of bytes that are not 0; fast if they are few or none."""
    tail = column.lstrip(b"\0")
    begin = len(column) - len(tail)
    return [begin + match.start() for match in _NOT_ZERO.finditer(tail.rstrip(b"\0"))]


class EntryTable:
    """The records of a segment, with a chain of slots for every hash of a key and of a prefix.

    The caller must hold the pool's lock, except for `find`, `find_use`, `is_current`, `state` and `copy`.
    """

    def __init__(self, memory: Memory, geometry: Geometry) -> None:
        self.memory, self.words = memory.memory, memory.words
        self.halves, self.floats = memory.halves, memory.floats
        self.num_slots = geometry.num_slots
        self.geometry = geometry
        self._every_slot = range(self.num_slots)  # limits walks: links that go in a circle must not hang the caller
        self._data_offset, self._block_size = geometry.data_offset, geometry.block_size
        self._records = geometry.records_offset // 4
        self._key_heads = geometry.heads_offset // 4
        self._prefix_heads = self._key_heads + self.num_slots

    def record(self, slot: int) -> int:
        """Return the position of a record, in halves; in words it is half of that."""
        return self._records + slot * HALVES_PER_RECORD

    def find(self, key: bytes) -> int:
        """Return the slot of the entry with this key, 0 if there is none."""
        halves = self.halves
        key_hash = zlib.crc32(key)
        slot = halves[self._key_heads + key_hash % self.num_slots]
        for _ in self._every_slot:
            if not slot:
                return 0
            record = self._records + slot * HALVES_PER_RECORD
            if halves[record + R_KEY_HASH] == key_hash:
                text = 4 * record + RECORD.size
                if self.memory[text : text + len(key)] == key and halves[record + R_LENGTHS] & 0xFFFF == len(key):
                    return slot
            slot = halves[record + R_KEY_NEXT]
        raise IndexError

    def find_use(self, key: bytes) -> tuple[int, int, int]:
        """Return (use, offset from the start of the segment, size) of an entry, without the lock.

        A use is slot | generation << 32. 0: there is no such entry, if no key chain was changed meanwhile. -1: the
        entry is being changed. Bytes read from that place are the value if `is_current` is true afterwards.
        """
        halves, words = self.halves, self.words
        key_hash = zlib.crc32(key)
        slot = halves[self._key_heads + key_hash % self.num_slots]
        for _ in self._every_slot:
            if not slot:
                return 0, 0, 0
            record = self._records + slot * HALVES_PER_RECORD
            if halves[record + R_KEY_HASH] == key_hash:
                word = record >> 1
                seal: int = words[word]  # before the key, or the slot could become another entry's in between
                text = 4 * record + RECORD.size
                if self.memory[text : text + len(key)] == key and halves[record + R_LENGTHS] & 0xFFFF == len(key):
                    if seal & SEAL_MASK != COMPLETE:
                        return -1, 0, 0
                    offset = self._data_offset + halves[record + R_START] * self._block_size
                    return seal - COMPLETE + slot, offset, words[word + W_SIZE]
            slot = halves[record + R_KEY_NEXT]
        raise IndexError

    def is_current(self, use: int) -> bool:
        """Return True if the entry that `find_use` found is still there, with its value in the same place."""
        slot = use & 0xFFFFFFFF
        seal: int = self.words[(self._records + slot * HALVES_PER_RECORD) >> 1]
        return seal == use - slot + COMPLETE

    def complete(self, slot: int) -> None:
        """Make a record an entry, in one write, with a new generation."""
        words = self.words
        generation = words[GENERATION] + 2
        if generation > MAX_GENERATION:
            generation = 2
        words[GENERATION] = generation
        words[(self._records + slot * HALVES_PER_RECORD) >> 1] = COMPLETE | generation << 32

    def seal_off(self, slot: int) -> None:
        """Mark an entry as CHANGING: readers without the lock do not read it until `unseal` or `complete`."""
        half = self._records + slot * HALVES_PER_RECORD + R_GENERATION
        self.halves[half] = self.halves[half] | 1

    def unseal(self, slot: int) -> None:
        """Clear the mark CHANGING of an entry that has not been changed."""
        half = self._records + slot * HALVES_PER_RECORD + R_GENERATION
        self.halves[half] = self.halves[half] ^ 1

    def state(self, slot: int) -> int:
        """Return FREE, WRITING, COMPLETE or CONDEMNED."""
        state: int = self.halves[self._records + slot * HALVES_PER_RECORD]
        return state

    def set_state(self, slot: int, state: int) -> None:
        self.halves[self._records + slot * HALVES_PER_RECORD] = state

    def owner(self, slot: int) -> int:
        """Return the session that writes a WRITING record."""
        owner: int = self.halves[self._records + slot * HALVES_PER_RECORD + R_OWNER]
        return owner

    def priority(self, slot: int) -> int:
        """Return the priority of a value that is being stored; that of an entry is in its eviction node."""
        return int(self.words[(self.record(slot) >> 1) + W_PRIORITY])

    def set_checksum(self, slot: int, checksum: int) -> None:
        self.halves[self.record(slot) + R_CHECKSUM] = checksum

    def set_times(self, slot: int, created: float, accessed: float) -> None:
        word = self.record(slot) >> 1
        self.floats[word + W_CREATED], self.floats[word + W_ACCESSED] = created, accessed

    def set_parent(self, slot: int, parent: int) -> None:
        """Set the hash of the parent's key, unless the texts take its place."""
        if sum(self._lengths(slot)) <= TEXT_BESIDE_PARENT:
            self.halves[self.record(slot) + R_PARENT] = parent

    def adopt(self, slots: Sequence[int], keys: Sequence[bytes], parent: bytes) -> None:
        """Set the parent of each slot of a part of a path that has none; `parent`: the key before the part, or b""."""
        halves, first = self.halves, self._records + R_PARENT
        for number in [at for at, slot in enumerate(slots) if not halves[first + slot * HALVES_PER_RECORD]]:
            above = keys[number - 1] if number else parent
            if slots[number] and above:
                self.set_parent(slots[number], zlib.crc32(above))

    def set_start(self, slot: int, start: int) -> None:
        """Set the first block of a record; their number stays."""
        self.halves[self.record(slot) + R_START] = start

    def claim(
        self, key: bytes, size: int, start: int, num_blocks: int, owner: int, meta: EntryMeta, parent: int = 0
    ) -> int:
        """Fill in a record, its state still FREE, and return its slot; 0 if all are taken."""
        halves, words = self.halves, self.words
        slot = words[FREE_SLOT]
        if slot:
            words[FREE_SLOT] = halves[self.record(slot) + R_KEY_NEXT]
        elif words[TOP_SLOT] < self.num_slots:
            slot = words[TOP_SLOT] = words[TOP_SLOT] + 1
        else:
            return 0
        now = time.time()
        record = self.record(slot)
        halves[record + R_PARENT] = parent  # first: texts that take these bytes overwrite it
        self.memory[4 * record : 4 * record + RECORD.size + len(key) + len(meta.prefix) + len(meta.tensor)] = (
            RECORD.pack(
                FREE, owner, size, start, num_blocks, zlib.crc32(key), zlib.crc32(meta.prefix), 0, 0, 0, 0, now, now,
                meta.sequence_length, meta.layer_index, 0, 0, 0, 0, len(key), len(meta.prefix), len(meta.tensor),
                meta.is_encoded, meta.priority,
            )
            + key
            + meta.prefix
            + meta.tensor
        )  # fmt: skip
        return slot

    def release(self, slot: int) -> None:
        """Put a slot that is in no chain into the free list."""
        record = self.record(slot)
        self.halves[record] = FREE
        self.halves[record + R_KEY_NEXT] = self.words[FREE_SLOT]
        self.words[FREE_SLOT] = slot

    def link(self, slot: int) -> None:
        """Link a record into its chains. The caller must set DIRTY first, as for `unlink`."""
        halves = self.halves
        self.words[CHANGES] = self.words[CHANGES] + 1
        record = self.record(slot)
        head = self._key_heads + halves[record + R_KEY_HASH] % self.num_slots
        halves[record + R_KEY_NEXT] = halves[head]
        halves[head] = slot
        if halves[record + R_LENGTHS] <= 0xFFFF:  # no prefix hash: no chain, which would be one long one
            return
        head = self._prefix_heads + halves[record + R_PREFIX_HASH] % self.num_slots
        behind = halves[head]
        halves[record + R_PREFIX_NEXT] = behind
        halves[record + R_PREFIX_PREV] = 0
        if behind:
            halves[self.record(behind) + R_PREFIX_PREV] = slot
        halves[head] = slot

    def unlink(self, slot: int) -> None:
        """Unlink a record from its chains."""
        halves = self.halves
        self.words[CHANGES] = self.words[CHANGES] + 1
        record = self.record(slot)
        link = self._key_heads + halves[record + R_KEY_HASH] % self.num_slots
        for _ in self._every_slot:
            if halves[link] == slot:
                break
            link = self.record(halves[link]) + R_KEY_NEXT
        halves[link] = halves[record + R_KEY_NEXT]
        if halves[record + R_LENGTHS] <= 0xFFFF:
            return
        before, behind = halves[record + R_PREFIX_PREV], halves[record + R_PREFIX_NEXT]
        if before:
            halves[self.record(before) + R_PREFIX_NEXT] = behind
        else:
            halves[self._prefix_heads + halves[record + R_PREFIX_HASH] % self.num_slots] = behind
        if behind:
            halves[self.record(behind) + R_PREFIX_PREV] = before

    def find_prefix(self, prefix: bytes, budget: int) -> list[int] | None:
        """Return the slots of the entries with that prefix hash, oldest first; None if it takes over `budget` links.

        None for the prefix hash "" too: entries without a prefix hash are in no chain.
        """
        if not prefix:
            return None
        prefix_hash = zlib.crc32(prefix)
        slots: list[int] = []
        slot = self.halves[self._prefix_heads + prefix_hash % self.num_slots]
        for _ in range(budget):
            if not slot:
                return slots[::-1]
            record = self.record(slot)
            if self.halves[record + R_PREFIX_HASH] == prefix_hash and self.has_prefix(slot, prefix):
                slots.append(slot)
            slot = self.halves[record + R_PREFIX_NEXT]
        return None

    def key(self, slot: int) -> bytes:
        record = self._records + slot * HALVES_PER_RECORD
        at = 4 * record + RECORD.size
        return self.memory[at : at + (self.halves[record + R_LENGTHS] & 0xFFFF)]

    def texts(self, slot: int) -> tuple[bytes, bytes, bytes]:
        """Return (key, prefix hash, tensor description)."""
        at = 4 * self.record(slot) + RECORD.size
        key_length, prefix_length, tensor_length = self._lengths(slot)
        text = self.memory[at : at + key_length + prefix_length + tensor_length]
        return text[:key_length], text[key_length : key_length + prefix_length], text[key_length + prefix_length :]

    def _lengths(self, slot: int) -> tuple[int, int, int]:
        half = self.record(slot) + R_LENGTHS
        return self.halves[half] & 0xFFFF, self.halves[half] >> 16, self.halves[half + 1] & 0xFFFF

    def extent(self, slot: int) -> tuple[int, int]:
        """Return (start block, number of blocks)."""
        record = self.record(slot)
        return self.halves[record + R_START], self.halves[record + R_BLOCKS]

    def blocks_of(self, slot: int) -> int:
        return self.halves[self._records + slot * HALVES_PER_RECORD + R_BLOCKS]

    def place(self, slot: int) -> tuple[int, int]:
        """Return the place of a value: (offset from the start of the segment, size), in bytes."""
        record = self._records + slot * HALVES_PER_RECORD
        size: int = self.words[(record >> 1) + W_SIZE]
        return self._data_offset + self.halves[record + R_START] * self._block_size, size

    def ticket(self, slot: int) -> bytes:
        """Return the bytes that name a value for `KVCachePool.share`: slot, place, hash of the key, time of storing."""
        half = self.record(slot)
        start, key_hash = self.halves[half + R_START], self.halves[half + R_KEY_HASH]
        return TICKET.pack(slot, start, key_hash, self.words[(half >> 1) + W_SIZE], self.words[(half >> 1) + W_CREATED])

    def find_ticket(self, ticket: bytes) -> int:
        """Return the slot of the value that a ticket names, an entry or a deleted value; 0 if it is there no more."""
        slot = int(TICKET.unpack(ticket)[0])
        is_there = 0 < slot <= self.num_slots and self.state(slot) in (COMPLETE, CONDEMNED)
        return slot if is_there and self.ticket(slot) == ticket else 0

    def is_same(self, slot: int, size: int, told: bytes) -> bool:
        """Return True if a record has this size, these bytes of `tell` or `told_by`, and no bit of a pin."""
        word = (self._records + slot * HALVES_PER_RECORD) >> 1
        tail = 8 * (word + W_SEQUENCE_LENGTH)
        return bool(self.words[word + W_SIZE] == size and self.memory[tail : tail + len(told)] == told)

    def is_like(self, slot: int, size: int, tensor: bytes) -> bool:
        """Return True if a value has this size and tensor description."""
        return self.place(slot)[1] == size and self.texts(slot)[2] == tensor

    @staticmethod
    def tell(key: bytes, meta: EntryMeta) -> bytes:
        """Return the record of such an entry from the sequence length on: key and metadata, nothing of the value."""
        lengths = len(key), len(meta.prefix), len(meta.tensor)  # the two zeros before them are its pins
        told = RECORD_TAIL.pack(meta.sequence_length, meta.layer_index, 0, 0, *lengths, meta.is_encoded, meta.priority)
        told += key
        return told if meta is NO_META else told + meta.prefix + meta.tensor

    def told_by(self, slot: int) -> tuple[int, bytes]:
        """Return (size of a value, bytes of its record as in `tell`)."""
        word = (self._records + slot * HALVES_PER_RECORD) >> 1
        tail = 8 * (word + W_SEQUENCE_LENGTH)
        return self.words[word + W_SIZE], self.memory[tail : tail + RECORD_TAIL.size + sum(self._lengths(slot))]

    def swap(self, slot: int, start: int, num_blocks: int) -> None:
        """Set the blocks of an entry in one write: a crash leaves it with the old ones or the new ones."""
        record = self._records + slot * HALVES_PER_RECORD
        word = record >> 1
        self.halves[record + R_CHECKSUM] = 0
        self.words[word + W_EXTENT] = start | num_blocks << 32
        self.floats[word + W_CREATED] = self.floats[word + W_ACCESSED] = time.time()

    def set_accessed(self, slot: int, now: float) -> None:
        self.floats[((self._records + slot * HALVES_PER_RECORD) >> 1) + W_ACCESSED] = now

    def set_all_accessed(self, times: Mapping[int, float]) -> None:
        """Set the time of the last use of each of these slots."""
        floats, first = self.floats, (self._records >> 1) + W_ACCESSED
        for slot, moment in times.items():
            floats[first + slot * (HALVES_PER_RECORD >> 1)] = moment

    def used(self) -> range:
        """Return the range of slots that were ever used."""
        return range(1, min(max(self.words[TOP_SLOT], 0), self.num_slots) + 1)

    def bytes_at(self, offset: int, among: range) -> bytes:
        """Return the byte at `offset` of each record of some slots: 0.01 us a slot."""
        first = 4 * self.record(among.start) + offset
        return self.memory[first : first + len(among) * RECORD_BYTES : RECORD_BYTES]

    def slots(self, *states: int, among: range | None = None) -> list[int]:
        """Return the slots in one of these states, among all or some; one pass over them."""
        among = self.used() if among is None else among
        column = self.bytes_at(0, among)
        if COMPLETE in states:
            return [slot for slot, state in zip(among, column, strict=True) if state in states]
        return [among.start + match.start() for match in re.finditer(b"[%b]" % bytes(states), column)]  # few or none

    def count(self, state: int, among: range) -> int:
        """Return the number of slots in a state among some; one pass over them."""
        return self.bytes_at(0, among).count(state)

    def extents(self, among: range) -> Iterator[tuple[int, int, int, int]]:
        """Yield (slot, state, start block, number of blocks) of some slots; one pass over them."""
        first, last = self.record(among.start), len(among) * HALVES_PER_RECORD
        starts, lengths = (
            self.halves[first + at : first + at + last : HALVES_PER_RECORD] for at in (R_START, R_BLOCKS)
        )
        return zip(among, self.bytes_at(0, among), starts.tolist(), lengths.tolist(), strict=True)

    def chains(self, first: int, budget: int) -> tuple[list[int], int]:
        """Return the slots in the key chains from number `first` on, and the number of the next chain.

        It stops after about `budget` slots, in groups of 64 chains, or after MAX_CHAINS_A_STEP chains. The last chain
        is num_slots - 1. A sweep over all chains sees a key that is there throughout just once: it stays in its chain.
        """
        halves, heads = self.halves, self._key_heads
        slots: list[int] = []
        chain = first
        end = min(first + MAX_CHAINS_A_STEP, self.num_slots)
        while chain < end and len(slots) < budget:
            stop = min(chain + 64, end)
            if self.memory[4 * (heads + chain) : 4 * (heads + stop)].strip(b"\0"):
                for head in halves[heads + chain : heads + stop].tolist():
                    slot = head
                    while slot:
                        slots.append(slot)
                        slot = halves[self._records + slot * HALVES_PER_RECORD + R_KEY_NEXT]
                        if len(slots) > 2 * self.num_slots:  # the links go in a circle
                            raise IndexError
            chain = stop
        return slots, chain

    def copy(self, slot: int) -> bytes:
        """Return the record of a slot, for `RECORD.unpack_from`; its texts begin at RECORD.size."""
        at = 4 * (self._records + slot * HALVES_PER_RECORD)
        return self.memory[at : at + RECORD_BYTES]

    def copy_range(self, among: range) -> bytes:
        """Return the records of some slots that lie together."""
        at = 4 * (self._records + among.start * HALVES_PER_RECORD)
        return self.memory[at : at + len(among) * RECORD_BYTES]

    def has_prefix(self, slot: int, prefix: bytes) -> bool:
        """Return True if a record has this prefix hash."""
        return self.texts(slot)[1] == prefix

    def damage(self, slot: int) -> str:
        """Return the reason why a record is impossible, else "". Only stray writes by others can cause it."""
        record = self.record(slot)
        start, num_blocks = self.extent(slot)
        size = self.words[(record >> 1) + W_SIZE]
        lengths = self._lengths(slot)
        if size < 0 or num_blocks != self.geometry.blocks_for(size):
            return f"slot {slot} holds {size} bytes in {num_blocks} blocks"
        if start + num_blocks > self.geometry.num_blocks:
            return f"slot {slot} claims blocks {start} to {start + num_blocks - 1} of {self.geometry.num_blocks}"
        if not 0 < lengths[0] <= MAX_KEY_BYTES or sum(lengths) > RECORD_TEXT:
            return f"slot {slot} has texts of {lengths} bytes"
        key, prefix, _ = self.texts(slot)
        if (zlib.crc32(key), zlib.crc32(prefix)) != (
            self.halves[record + R_KEY_HASH],
            self.halves[record + R_PREFIX_HASH],
        ):
            return f"slot {slot} has a key or prefix that does not match its hash"
        try:
            b" ".join(self.texts(slot)).decode()
        except UnicodeDecodeError:
            return f"slot {slot} has texts that are not UTF-8"
        return ""

    def sound(self) -> tuple[list[str], list[tuple[int, int, int, int, bytes]]]:
        """Return (problems of records, (slot, state, start block, blocks, key) of sound ones): 1.5 us a slot."""
        memory, crc32, geometry = self.memory, zlib.crc32, self.geometry
        problems, found = [], []
        for slot, state, start, num_blocks, size, key_hash, prefix_hash, lengths, tensor_length in self._columns():
            if state not in (WRITING, COMPLETE, CONDEMNED):
                continue
            at = 4 * (self._records + slot * HALVES_PER_RECORD) + RECORD.size
            key_end = at + (lengths & 0xFFFF)
            prefix_end = key_end + (lengths >> 16)
            end = prefix_end + (tensor_length & 0xFFFF)
            key = memory[at:key_end]
            is_sound = (
                size >= 0
                and num_blocks == (-(-size // self._block_size) or 1)
                and start + num_blocks <= geometry.num_blocks
                and 0 < len(key) <= MAX_KEY_BYTES
                and end - at <= RECORD_TEXT
                and crc32(key) == key_hash
                and crc32(memory[key_end:prefix_end]) == prefix_hash
                and memory[at:end].isascii()
            )
            if not is_sound and (problem := self.damage(slot)):  # `damage` decides, and has the text
                problems.append(problem)
            else:
                found.append((slot, state, start, num_blocks, key))
        return problems, found

    def _columns(self) -> Iterator[tuple[int, ...]]:
        """Yield (slot, state, start, blocks, size, hashes and lengths of key and prefix, tensor length) of all."""
        among = self.used()
        first, end = self.record(1), self.record(1) + len(among) * HALVES_PER_RECORD
        column = [
            self.halves[first + at : end : HALVES_PER_RECORD].tolist()
            for at in (R_START, R_BLOCKS, R_KEY_HASH, R_PREFIX_HASH, R_LENGTHS, R_LENGTHS + 1)
        ]
        sizes = self.words[(first >> 1) + W_SIZE : end >> 1 : HALVES_PER_RECORD >> 1].tolist()
        return zip(among, self.bytes_at(0, among), *column[:2], sizes, *column[2:], strict=True)

    def renew(self, slots: Sequence[int]) -> None:
        """Set new generations of entries, so that all readers without the lock begin again."""
        words, records = self.words, self._records
        generation = words[GENERATION]
        if generation + 2 * len(slots) > MAX_GENERATION:
            generation = 0
        words[GENERATION] = generation + 2 * len(slots)
        for slot in slots:
            generation += 2
            words[(records + slot * HALVES_PER_RECORD) >> 1] = COMPLETE | generation << 32

    def rebuild(self, entries: Iterable[int], others: Iterable[int]) -> None:
        """Rebuild chains, free list and counters: `entries` exist, `others` are WRITING or CONDEMNED.

        All other records must be FREE already. It takes about 1 us a slot, column by column.
        """
        halves, words, num_slots = self.halves, self.words, self.num_slots
        entries = list(entries)
        words[CHANGES] += 1
        kept = {*entries, *others}
        top = max(kept, default=0)
        first, end = self.record(1), self.record(1) + top * HALVES_PER_RECORD
        key_hashes, prefix_hashes, lengths = (
            [0, *halves[first + at : end : HALVES_PER_RECORD].tolist()] for at in (R_KEY_HASH, R_PREFIX_HASH, R_LENGTHS)
        )
        heads = memoryview(bytearray(8 * num_slots)).cast("I")  # of key chains, then of prefix chains
        behinds, prefix_behinds, prefix_befores = ([0] * (top + 1) for _ in range(3))
        for slot in entries:
            head = key_hashes[slot] % num_slots
            behinds[slot], heads[head] = heads[head], slot
            if lengths[slot] > 0xFFFF:
                head = num_slots + prefix_hashes[slot] % num_slots
                behind = heads[head]
                prefix_behinds[slot], heads[head] = behind, slot
                prefix_befores[behind] = slot  # slot 0 does not matter
        free = 0
        for slot in range(top, 0, -1):
            if slot not in kept:
                behinds[slot], free = free, slot
        halves[self._key_heads : self._key_heads + 2 * num_slots] = heads
        for at, column in (
            (R_KEY_NEXT, behinds),
            (R_PREFIX_NEXT, prefix_behinds),
            (R_PREFIX_PREV, prefix_befores),
        ):
            halves[first + at : end : HALVES_PER_RECORD] = _words32(column[1:])
        words[FREE_SLOT], words[TOP_SLOT] = free, top
        words[NUM_ENTRIES] = len(entries)
        words[NUM_BUSY] = len(kept) - len(entries)

    def check(self, entries: list[int], others: list[int]) -> list[str]:
        """Return the problems found when comparing chains, free list and counters with the records; one pass."""
        halves, words = self.halves, self.words
        problems = []
        for name, heads, next_at, hash_at in (
            ("key", self._key_heads, R_KEY_NEXT, R_KEY_HASH),
            ("prefix", self._prefix_heads, R_PREFIX_NEXT, R_PREFIX_HASH),
        ):
            found: list[int] = []
            for index, head in enumerate(halves[heads : heads + self.num_slots].tolist()):
                slot, before = head, 0
                while 0 < slot <= self.num_slots and len(found) <= len(entries):
                    record = self.record(slot)
                    if halves[record + hash_at] % self.num_slots != index:
                        problems.append(f"slot {slot} is in the wrong {name} chain, {index}")
                    if name == "prefix" and halves[record + R_PREFIX_PREV] != before:
                        problems.append(f"slot {slot} has a wrong backward link in prefix chain {index}")
                    found.append(slot)
                    slot, before = halves[record + next_at], slot
            expected = entries if name == "key" else [slot for slot in entries if self._lengths(slot)[1]]
            if sorted(found) != expected:
                problems.append(f"the {name} chains hold {len(found)} slots, it should be {len(expected)}")
        free = set()
        slot = words[FREE_SLOT]
        while 0 < slot <= self.num_slots and slot not in free:
            free.add(slot)
            slot = halves[self.record(slot) + R_KEY_NEXT]
        if free != set(range(1, words[TOP_SLOT] + 1)) - {*entries, *others}:
            problems.append(f"the free list holds {len(free)} slots, which are not those that are free")
        for name, word, value in (("entries", NUM_ENTRIES, len(entries)), ("busy records", NUM_BUSY, len(others))):
            if words[word] != value:
                problems.append(f"the header counts {words[word]} {name}, there are {value}")
        return problems


def read_copy(copy: bytes) -> tuple[str, str, str, int, int, float, float, int, int, int, int]:
    """Return the fields of a copied entry: (key, prefix hash, tensor description, first block, size, created, ...).

    The others are: accessed, uses, priority, sequence length, layer.
    """
    (
        _, _, size, start, _, _, _, _, _, _, _, created, accessed, tokens, layer, _, _, _, _,
        key_bytes, prefix_bytes, tensor_bytes, _, _,
    ) = RECORD.unpack_from(copy, COPY_RECORD_AT)  # fmt: skip
    _, _, count, priority, _, _ = COPY_ORDER.unpack_from(copy)
    at = COPY_RECORD_AT + RECORD.size
    key, at = copy[at : at + key_bytes].decode(), at + key_bytes
    prefix, at = copy[at : at + prefix_bytes].decode(), at + prefix_bytes
    tensor = copy[at : at + tensor_bytes].decode()
    return key, prefix, tensor, start, size, created, accessed, count, priority, tokens, layer


def copied_checksum(copy: bytes) -> int:
    """Return the CRC-32 of the value of a copied entry, 0 if none is known."""
    checksum: int = RECORD.unpack_from(copy, COPY_RECORD_AT)[10]
    return checksum


def copied_parent(copy: bytes) -> int:
    """Return the hash of the key of the parent of a copied entry, 0 if none is known."""
    has_parent = sum(COPY_SIZES.unpack_from(copy)[3:]) <= TEXT_BESIDE_PARENT
    return int.from_bytes(copy[-4:], "little") if has_parent else 0


def copied_key(copy: bytes) -> str:
    """Return the key of a copied entry."""
    at = COPY_RECORD_AT + RECORD.size
    return copy[at : at + COPY_SIZES.unpack_from(copy)[3]].decode()


def count_sequences(keys: Sequence[int], parents: Sequence[int]) -> list[int]:
    """Return the number of sequences through each block, from the hashes of its key and of its parent's key.

    A sequence is a block that is the parent of no other, with all blocks above it. About 0.6 us a block.
    """
    none = len(keys)
    number_of = dict(zip(keys, range(none), strict=True))
    if len(number_of) < none:  # of two keys that share a hash, neither counts as a parent: see `R_PARENT`
        for key in [key for key, count in Counter(keys).items() if count > 1]:
            del number_of[key]
    number_of.pop(0, None)
    above = [number_of.get(parent, none) for parent in parents]
    num_waiting = [0] * (none + 1)  # children of a block whose sequences it has not counted yet
    for number in above:
        num_waiting[number] += 1
    num_waiting[none] += 2  # it never counts all of them: a walk ends there
    counts = [0] * (none + 1)
    for leaf in [number for number, num in enumerate(num_waiting) if not num]:
        number, count = leaf, 1
        while True:
            counts[number] = count
            number = above[number]
            count += counts[number]
            if num_waiting[number] != 1:
                break
        num_waiting[number] -= 1
        counts[number] = count
    return [count or 1 for count in counts[:none]]  # 0: the parents go in a circle, as hashes may


class MemoryTally:
    """Adds up the memory of a pool by kind, from copies of its records: see `KVCachePool.get_memory`."""

    def __init__(self, geometry: Geometry) -> None:
        self._data_size, self._block_size = geometry.num_blocks * geometry.block_size, geometry.block_size
        self._bytes_of = [0] * 4  # by state
        self._num_blocks = self._pinned = self._saved_by_codec = 0
        self._keys, self._parents, self._sizes = (array.array(kind) for kind in "IIq")  # of entries
        self._raw_sizes: dict[bytes, int] = {}  # by tensor description
        self._held: dict[int, list[int]] = {}  # pid -> [values, bytes]

    def add(self, first_slot: int, records: bytes, names: Sequence[int], pids: Mapping[int, int]) -> None:
        """Add the records of some slots from `first_slot` on: `names` has the slot that each session names.

        `pids` has the process of each session. About 0.3 us a slot, and as much again for values with a raw_size.
        """
        halves, words = memoryview(records).cast("I"), memoryview(records).cast("q")
        states, sizes = records[::RECORD_BYTES], words[W_SIZE :: HALVES_PER_RECORD >> 1].tolist()
        columns = [
            halves[at::HALVES_PER_RECORD].tolist() for at in (R_BLOCKS, R_KEY_HASH, R_PARENT, R_LENGTHS, R_LENGTHS + 1)
        ]
        at = RECORD.size - RECORD_BYTES
        for state, size, num_blocks, key, parent, lengths, tensor in zip(states, sizes, *columns, strict=True):
            at += RECORD_BYTES
            if state == FREE:
                continue
            self._bytes_of[state] += size
            self._num_blocks += num_blocks
            if state == COMPLETE:
                length, tensor_length = (lengths & 0xFFFF) + (lengths >> 16), tensor & 0xFFFF
                if tensor > 0xFFFF:
                    raw_size = self._raw_size(records[at + length : at + length + tensor_length])
                    self._saved_by_codec += raw_size - size
                self._keys.append(key)
                self._parents.append(parent if length + tensor_length <= TEXT_BESIDE_PARENT else 0)
                self._sizes.append(size)
        self._add_pins(states, sizes, self._find_pins(first_slot, records, states, names), pids)

    def _raw_size(self, description: bytes) -> int:
        """Return the raw_size in a tensor description."""
        size = self._raw_sizes.get(description)
        if size is None:
            digits = description.partition(RAW_SIZE_MARK)[2].partition(b" ")[0]
            size = self._raw_sizes[description] = int(digits) if digits.isdigit() else 0
        return size

    @staticmethod
    def _find_pins(first_slot: int, records: bytes, states: bytes, names: Sequence[int]) -> dict[int, set[int]]:
        """Return session -> the records, counted from 0, that it pins or writes."""
        found: dict[int, set[int]] = {}
        for session, slot in enumerate(names):
            if slot and 0 <= slot - first_slot < len(states):
                found.setdefault(session, set()).add(slot - first_slot)
        for byte in range((len(names) + 7) >> 3):
            bits = records[4 * R_PINS + byte :: RECORD_BYTES]
            for at in _not_zero(bits):
                for bit in range(8):
                    if bits[at] >> bit & 1:
                        found.setdefault(8 * byte + bit, set()).add(at)
        for match in re.finditer(b"[%c]" % WRITING, states):
            at = match.start()
            owner = int.from_bytes(records[at * RECORD_BYTES + 4 * R_OWNER :][:4], sys.byteorder)
            found.setdefault(owner, set()).add(at)
        return found

    def _add_pins(self, states: bytes, sizes: list[int], held: Mapping[int, set[int]], pids: Mapping[int, int]) -> None:
        """Add the values that sessions pin or write, each once for a process."""
        of_process: dict[int, set[int]] = {}
        for session, numbers in held.items():
            if session in pids:
                of_process.setdefault(pids[session], set()).update(at for at in numbers if states[at])
        for pid, numbers in of_process.items():
            held_before = self._held.setdefault(pid, [0, 0])
            held_before[0] += len(numbers)
            held_before[1] += sum(sizes[at] for at in numbers)
        pinned = set().union(*held.values())
        self._pinned += sum(sizes[at] for at in pinned if states[at] in (COMPLETE, CONDEMNED))

    def result(self) -> dict[str, Any]:
        """Return the dict that `KVCachePool.get_memory` describes."""
        _, writing, values, deleted = self._bytes_of
        in_use = self._num_blocks * self._block_size
        counts = count_sequences(self._keys, self._parents) if any(self._parents) else [1] * len(self._keys)
        by_process = sorted(self._held.items(), key=lambda item: -item[1][1])
        return {
            "data_size_bytes": self._data_size,
            "value_bytes": values,
            "deleted_bytes": deleted,
            "writing_bytes": writing,
            "padding_bytes": in_use - values - deleted - writing,
            "free_bytes": max(self._data_size - in_use, 0),  # others may have replaced large values meanwhile
            "pinned_bytes": self._pinned,
            "shared_bytes": sum(size for size, count in zip(self._sizes, counts, strict=True) if count > 1),
            "saved_by_sharing_bytes": sum(map(operator.mul, self._sizes, counts)) - values,
            "saved_by_codec_bytes": self._saved_by_codec,
            "entries_by_sequences": dict(sorted(Counter(counts).items())),
            "pins": [{"pid": pid, "entries": num, "bytes": size} for pid, (num, size) in by_process if num],
        }


# ======================================================================================================================
# Pins and uses
# ======================================================================================================================


class Pins:
    """The pins of all sessions, as the segment has them, and the pins and writes of this handle, by token.

    A slot is pinned if an open session has a bit in its record, or names it: its word of the session table is the slot.
    `held` is the truth about this handle; bits and name agree with it between calls. A dead process leaves bits, name
    and WRITING records; `Index.settle_dead` clears them. The caller must hold the lock, but for `name`.
    """

    def __init__(self, table: EntryTable) -> None:
        self.words, self.halves = table.words, table.halves
        self._table = table
        self._pids = table.geometry.index_offset // 8
        self._names = self._pids + MAX_SESSIONS
        self._bits = table.record(0) + R_PINS
        self.session = NO_SESSION
        self.held: dict[int, tuple[int, ...]] = {}  # token -> slots that it pins, or the slot that it writes
        self.writing: set[int] = set()  # the tokens that write
        self.counts: dict[int, int] = {}  # slot -> number of tokens that pin it by our bit
        self.named = 0  # the token that pins by our word in the session table
        self.ending = 0  # the token whose name is being cleared without the lock

    # --- sessions ----------------------------------------------------------------------------------------------------

    def sessions(self) -> dict[int, int]:
        """Return session -> pid of all sessions in the table, dead ones too."""
        table = self.words[self._pids : self._pids + MAX_SESSIONS].tolist()
        return {number: pid for number, pid in enumerate(table) if pid}

    def enter(self, session: int, pid: int) -> None:
        """Insert a session, whose lock this process holds, into the table."""
        words = self.words
        words[self._names + session] = 0
        words[TOP_SESSION] = max(words[TOP_SESSION], session + 1)
        words[self._pids + session] = pid

    def leave(self, session: int) -> None:
        """Remove a session that holds nothing from the table."""
        self.words[self._pids + session] = 0

    def act_for(self, session: int) -> None:
        """Pin for `session` from now on."""
        self.session = session
        self._own_bits = self._bits + (session >> 5)  # of slot 0; those of other slots lie whole records further
        self._own_bit = 1 << (session & 31)

    # --- of this handle ----------------------------------------------------------------------------------------------

    def hold(self, token: int, *slots: int) -> None:
        """Pin slots by our bit, with a single write each, so that no crash leaves half of it."""
        self.held[token] = slots
        halves, counts = self.halves, self.counts
        for slot in slots:
            count = counts.get(slot, 0)
            if not count:
                half = self._own_bits + slot * HALVES_PER_RECORD
                halves[half] = halves[half] | self._own_bit
            counts[slot] = count + 1

    def hold_by_name(self, token: int, slot: int) -> None:
        """Pin a slot for the time of a view or a copy: by our word if that is free, else by our bit."""
        if self.named or not LOADS_IN_ORDER:
            return self.hold(token, slot)
        self.held[token] = (slot,)
        self.named = token
        return self.name(slot)

    def name(self, slot: int) -> None:
        """Write the slot that we read into our word of the session table. 0 means none, and needs no lock."""
        self.words[self._names + self.session] = slot

    def drop(self, token: int) -> tuple[int, ...]:
        """Unpin the slots that a token pins, and return them."""
        slots = self.held.pop(token)
        if token == self.named:
            self.named = 0
            self.name(0)
            return slots
        for slot in slots:
            count = self.counts[slot] - 1
            if count:
                self.counts[slot] = count
            else:
                del self.counts[slot]
                self._clear_bit(slot, self.session)
        return slots

    def forget(self, tokens: Iterable[int]) -> set[int]:
        """Forget these tokens, whose calls were cut off, and count again; return their slots, 0 for an unknown one.

        Our bits and WRITING records do not agree with that yet: `Index.settle` must follow.
        """
        slots = {slot for token in tokens for slot in self.held.pop(token, (0,))}
        self.writing.difference_update(tokens)
        if self.named not in self.held:
            self.named = 0
        by_bit = self.held.keys() - self.writing - {self.named, self.ending}
        self.counts = dict(Counter(slot for token in by_bit for slot in self.held[token]))
        self.name(0 if self.named == self.ending else self.held.get(self.named, (0,))[0])
        return slots

    def written(self) -> set[int]:
        """Return the slots that this handle writes."""
        return {slot for token in self.writing for slot in self.held.get(token, ())}

    def clear(self) -> None:
        """Forget all tokens, in a forked child: all pins and writes are the parent's."""
        self.held.clear()
        self.writing.clear()
        self.counts.clear()
        self.named = self.ending = 0

    # --- of all sessions ---------------------------------------------------------------------------------------------

    def is_pinned(self, slot: int) -> bool:
        """Return True if any session pins the slot."""
        words = self.words
        word = (self._bits + slot * HALVES_PER_RECORD) >> 1
        return bool(words[word] or words[word + 1]) or self.is_named(slot)

    def is_held_by(self, session: int, slot: int) -> bool:
        """Return True if a session pins the slot by its bit."""
        half = self._bits + slot * HALVES_PER_RECORD + (session >> 5)
        return bool(self.halves[half] >> (session & 31) & 1)

    def is_named(self, slot: int) -> bool:
        """Return True if any session pins the slot by its word in the session table."""
        words, names, top = self.words, self._names, self.words[TOP_SESSION]
        return slot in words[names : names + (top if top < MAX_SESSIONS else MAX_SESSIONS)].tolist()

    def names(self) -> list[int]:
        """Return the slot that each session names, 0 for none; sessions that were never used are left out."""
        top = min(self.words[TOP_SESSION], MAX_SESSIONS)
        named: list[int] = self.words[self._names : self._names + top].tolist()
        return named

    def pinned(self, among: range) -> set[int]:
        """Return the slots among some that any session pins; one pass over them."""
        names = self.names()
        found = set(names).intersection(among)
        for byte in range((len(names) + 7) >> 3):
            found.update(among.start + at for at in _not_zero(self._table.bytes_at(4 * R_PINS + byte, among)))
        return found

    def release_all(self, session: int, among: range, but: Container[int] = ()) -> None:
        """Clear the bits of a session in the records of some slots, except the slots `but`; one pass over them."""
        column, bit = self._table.bytes_at(4 * R_PINS + (session >> 3), among), 1 << (session & 7)
        for at in _not_zero(column):
            slot = among.start + at
            if column[at] & bit and slot not in but:
                self._clear_bit(slot, session)

    def end_name(self, session: int) -> None:
        """Clear the word by which an ended session names a slot."""
        self.words[self._names + session] = 0

    def _clear_bit(self, slot: int, session: int) -> None:
        half = self._bits + slot * HALVES_PER_RECORD + (session >> 5)
        self.halves[half] = self.halves[half] & ~(1 << (session & 31))


class Uses:
    """The uses and misses that readers without the lock have noted, by session. The next lock counts them.

    A use is slot | generation << 32. If a process dies while it notes a use, that use is not noted.
    """

    def __init__(self, table: EntryTable) -> None:
        self.words, self.floats = table.words, table.floats
        self._table = table
        self._misses = table.geometry.index_offset // 8 + 2 * MAX_SESSIONS
        self._uses = self._misses + MAX_SESSIONS  # for each session MAX_USES uses, and then their times
        self.act_for(NO_SESSION)

    def act_for(self, session: int) -> None:
        """Let `note` and `count_miss` write the places of `session` from now on."""
        self._own_uses = self._uses + 2 * MAX_USES * session
        self._own_misses = self._misses + session

    def note(self, use: int, number: int) -> bool:
        """Note a use of an entry for this session, without the lock; return False if the place `number` is taken.

        Threads and signal handlers pass different numbers, so they need no lock between them.
        """
        words = self.words
        at = self._own_uses + number % MAX_USES
        if words[at]:
            return False
        self.floats[at + MAX_USES] = time.monotonic()
        words[at] = use
        words[USED] = 1
        return True

    def take(self) -> tuple[int, list[tuple[float, int]]]:
        """Clear the uses that sessions have noted; return (their number, (monotonic time, slot) of each, oldest first).

        Uses of entries that have been changed since are not in the list. The caller must hold the lock.
        """
        words, floats, is_current = self.words, self.floats, self._table.is_current
        words[USED] = 0
        _new_lock().acquire()  # a use that is noted from now on sets USED again
        found: list[tuple[float, int]] = []
        count, at = 0, self._uses
        for _ in range(min(words[TOP_SESSION], MAX_SESSIONS)):
            for number, use in enumerate(words[at : at + MAX_USES].tolist(), at):
                if use:
                    moment = floats[number + MAX_USES]
                    words[number] = 0
                    count += 1
                    if use & 0xFFFFFFFF <= self._table.num_slots and is_current(use):
                        found.append((moment, use & 0xFFFFFFFF))
            at += 2 * MAX_USES
        found.sort()
        return count, found

    def count_miss(self) -> None:
        """Count a miss in our own word, which needs no lock."""
        self.words[self._own_misses] = self.words[self._own_misses] + 1

    def misses(self) -> int:
        """Return the misses of all sessions, ended ones too."""
        words = self.words
        return int(words[MISSES] + sum(words[self._misses : self._misses + MAX_SESSIONS].tolist()))

    def leave(self, session: int) -> None:
        """Add the misses of a session that has ended to the header."""
        words, own = self.words, self._misses + session
        misses, words[own] = words[own], 0
        words[MISSES] = (words[MISSES] + misses) & I64_MAX


# ======================================================================================================================
# Index
# ======================================================================================================================


class Saved(NamedTuple):
    """The history of a value, from a snapshot."""

    access_count: int
    created: float  # seconds since the epoch
    accessed: float
    checksum: int  # CRC-32, 0: unknown
    parent: int  # hash of the key of its parent, 0: unknown


class Space:
    """The space of a pool: finds free blocks, evicts, moves, and reclaims records without a holder; base of `Index`.

    It works over the memory of a segment, or over private memory, by slot and token. It knows no threads, views, files
    and processes: `is_alive(session)` is True if the session's process lives. The caller must hold the pool's lock.
    Invariant whenever the lock is free: all derived data agrees with the records, or DIRTY is set. Each change sets
    DIRTY first, and at its end writes `_unfinished`: 0, or 1 if it is a part of a larger change. A process that dies in
    a change leaves DIRTY set, and so does an error; `Index.rebuild` follows.
    """

    def __init__(
        self,
        memory: Memory,
        geometry: Geometry,
        policy: EvictionPolicy,
        ghosts: memoryview | None = None,
        is_alive: Callable[[int], bool] = bool,
    ) -> None:
        self.memory, self.words = memory.memory, memory.words
        self.geometry = geometry
        self.is_alive = is_alive
        self._unfinished = 0  # the value of DIRTY after a change
        self._is_rebuilding = False  # if True, derived data is left to the rebuild
        self._data_offset, self._block_size = geometry.data_offset, geometry.block_size
        self.table = EntryTable(memory, geometry)
        self.pins = Pins(self.table)
        self.uses = Uses(self.table)
        self.blocks = BitmapAllocator(
            geometry.num_blocks,
            memory.buffer[HEADER_SIZE : geometry.data_offset],
            memory.words[ALLOCATED : ALLOCATED + BITMAP_COUNTERS],
        )
        self._order_buffer = memory.buffer[geometry.order_offset : geometry.records_offset]
        self.use_policy(policy, ghosts)
        self._num_recorded, self._accesses = geometry.num_recorded, geometry.accesses_offset >> 3

    def use_policy(self, policy: EvictionPolicy, ghosts: memoryview | None) -> None:
        """Use the order of this policy from now on; `rebuild` must follow if the segment has that of another policy."""
        geometry = self.geometry
        self.order = order_over(
            policy, self._order_buffer, geometry.num_slots, geometry.num_blocks, self.table.blocks_of, ghosts
        )

    def act_for(self, session: int) -> None:
        """Pin and note uses for this session from now on."""
        self.pins.act_for(session)
        self.uses.act_for(session)

    def _finish(self) -> None:
        """End a change, and the larger change that it was a part of."""
        self._unfinished = 0
        self.words[DIRTY] = 0

    # --- space for a value --------------------------------------------------------------------------------------------

    def is_full(self, old: int = 0, num_more: int = 0) -> bool:
        """Return True if a new value needs another entry evicted; if it replaces `old`, only if no slot is free.

        `num_more` values of the same path have their slots already, and will become entries.
        """
        words = self.words
        no_slot = not words[FREE_SLOT] and words[TOP_SLOT] == self.table.num_slots
        return no_slot or (not old and words[NUM_ENTRIES] + num_more >= self.geometry.max_entries)

    def _find_room(self, old: int, num_blocks: int, num_more: int = 0) -> tuple[int, int] | None:
        """Return (start of `num_blocks` free blocks, `old`, or 0 if it had to go first); a slot is free then, too.

        `old`: the entry to replace, or 0. Evicts and moves entries if needed. None, and no change, if pins prevent it.
        """
        words = self.words
        full = self.is_full(old, num_more)
        start = None if full else self.blocks.find_locked(num_blocks)
        if start is None:
            if (words[UNREAD] or self.others_write()) and self.reclaim(only_signs=True):
                return self._find_room(old, num_blocks, num_more)
            start = self._make_room(num_blocks, full, old, num_more)
            if start is None:
                return None
            if old and self.table.state(old) != COMPLETE:
                old = 0
        return start, old

    def needs_slot(self) -> bool:
        """Return True if a new entry needs another one evicted, after a `reclaim`."""
        self.reclaim()
        return self.is_full()

    def others_write(self) -> bool:
        """Return True if other handles are storing values, or deleted values are still pinned."""
        return bool(self.words[NUM_BUSY] > len(self.pins.writing))

    def _make_room(self, num_blocks: int, need_slot: bool, old: int, num_more: int = 0) -> int | None:
        """Evict and move until `num_blocks` lie together; return their start. None: pins prevent it, nothing changed.

        Victims go in policy order, no more than needed. `old`, the value about to be replaced, goes only if there is no
        other way. Everything is planned before anything is changed. Most often the first victim is large enough; else
        the plan takes up to 2 us for each entry of the pool.
        """
        if num_blocks > self.geometry.num_blocks:
            return None
        victim = next(self.candidates(old), 0)
        start, length = self.table.extent(victim)
        must_evict = need_slot or num_blocks > self.geometry.num_blocks - self.words[ALLOCATED]
        if victim and victim != old and must_evict and length >= num_blocks and self.evict((victim,)):
            return start  # the plan would be the same
        need_slot = need_slot and self.is_full(old, num_more)
        while True:
            plan = self._plan_room(num_blocks, need_slot, old)
            if plan is None and self.reclaim():
                plan = self._plan_room(num_blocks, need_slot, old)
            if plan is None:
                self._finish()
                return None
            victims, moves = plan
            if old in victims:  # a lookup without the lock would find neither value until the new one is there
                self._unfinished = 1
            # A view that begins at this moment, without the lock, makes either of these fail: plan again.
            if self.evict(victims) and all(self.move(slot, target) for slot, target in moves):
                return self.blocks.find_locked(num_blocks)
            need_slot = self.is_full(old, num_more)

    def _plan_room(self, num_blocks: int, need_slot: bool, old: int) -> Plan | None:
        in_use, _ = self.fixed(self.table.used())  # takes far less than the whole layout
        if widest_section(in_use, self.geometry.num_blocks) < num_blocks:
            return None
        movable, fixed = self.layout()
        sections = cut_sections(movable, fixed, self.geometry.num_blocks)
        return plan_room(sections, num_blocks, self.candidates(old), need_slot)

    def candidates(self, last: int = 0) -> Iterator[int]:
        """Yield the slots that may be evicted, next victim first; the slot `last` comes last."""
        is_pinned = self.pins.is_pinned
        for slot in self.order.victims():
            if slot != last and not is_pinned(slot):
                yield slot
        if last and not is_pinned(last):
            yield last

    def layout(self) -> tuple[list[Extent], list[Extent]]:
        """Return (extents that can be moved and evicted, extents in use), by first block. One pass, 0.5 us a slot."""
        among = self.table.used()
        pinned = self.pins.pinned(among)
        movable: list[Extent] = []
        fixed: list[Extent] = []
        for slot, state, start, num_blocks in self.table.extents(among):
            if state == COMPLETE and slot not in pinned:
                movable.append((start, num_blocks, slot))
            elif state:
                fixed.append((start, num_blocks, slot))
        return sorted(movable), sorted(fixed)

    def fixed(self, among: range) -> tuple[list[Extent], bool]:
        """Return (the extents in use of some slots, True if any entry of these can be evicted); one pass over them."""
        table = self.table
        pinned = [slot for slot in self.pins.pinned(among) if table.state(slot) == COMPLETE]
        busy = table.slots(WRITING, CONDEMNED, among=among)
        return [(*table.extent(slot), slot) for slot in pinned + busy], table.count(COMPLETE, among) > len(pinned)

    # --- moving -------------------------------------------------------------------------------------------------------

    def move(self, slot: int, target: int) -> bool:
        """Move an entry's blocks; return False if it is pinned. Its record has the old place until all is copied.

        If old and new place overlap (a slide to the left), pieces no longer than the distance are copied. The journal
        notes each. Overwritten bytes have been copied before, so a repair can go on at the noted piece.
        """
        words = self.words
        start, num_blocks = self.table.extent(slot)
        words[DIRTY] = 1
        is_free = self._begin_change(slot)
        if is_free:
            words[MOVE_FROM], words[MOVE_TO], words[MOVE_DONE] = start, target, 0
            words[MOVE_SLOT] = slot
            self._finish_move()
            self.table.complete(slot)
            self.blocks.free_locked(start, num_blocks)
            self.blocks.take_locked(target, num_blocks)
        words[DIRTY] = self._unfinished
        return is_free

    def _finish_move(self) -> None:
        """Finish the move in the journal, from the piece that it has noted."""
        words, table, data, size = self.words, self.table, self._data_offset, self._block_size
        slot, start, target = words[MOVE_SLOT], words[MOVE_FROM], words[MOVE_TO]
        if 0 < slot <= table.num_slots and table.extent(slot)[0] == start:
            num_blocks = table.blocks_of(slot)
            if not 0 <= target <= self.geometry.num_blocks - num_blocks:
                raise CorruptionError("the pool has a damaged journal: delete it")
            piece = start - target if 0 < start - target < num_blocks else num_blocks
            while (done := words[MOVE_DONE]) < num_blocks:
                count = min(piece, num_blocks - done)
                self.memory.move(data + (target + done) * size, data + (start + done) * size, count * size)
                words[MOVE_DONE] = done + count
            table.set_start(slot, target)
        words[MOVE_SLOT] = 0

    def defragment(self, slots: Sequence[int], begin: int) -> tuple[int, int]:
        """Move some of `slots`, from number `begin` on, to the left; return (how many moved, the next number)."""
        moved, budget = 0, STEP_BYTES // self.geometry.block_size
        self.reclaim_dead()
        for number in range(begin, min(begin + ENTRIES_A_STEP, len(slots))):
            slot = slots[number]
            if self.table.state(slot) == COMPLETE and not self.pins.is_pinned(slot):
                start, num_blocks = self.table.extent(slot)
                gap = self.blocks.free_before_locked(start)
                if gap:
                    if moved and (num_blocks > budget or moved == MOVES_A_STEP):
                        return moved, number
                    self.move(slot, start - gap)
                    budget -= num_blocks
                    moved += 1
        return moved, min(begin + ENTRIES_A_STEP, len(slots))

    def _begin_change(self, slot: int) -> bool:
        """Return True once readers without the lock keep off an entry, whose value may then move or change in place.

        False, and nothing has changed, if one of them pins it now; others pin under the lock. A reader writes its pin,
        then reads the seal. A change writes the seal, then reads the pins. So the change sees the pin, or is seen.
        `EntryTable.complete` must follow.
        """
        self.table.seal_off(slot)
        _new_lock().acquire()
        if self.pins.is_named(slot):
            self.table.unseal(slot)
            return False
        return True

    # --- removing -----------------------------------------------------------------------------------------------------

    def remove(self, slot: int) -> None:
        """Remove the entry in a slot."""
        self.words[DIRTY] = 1
        self._drop(slot)
        self.words[DIRTY] = self._unfinished

    def evict(self, slots: Iterable[int]) -> bool:
        """Evict entries; return False if a view that began at this moment still has one of them pinned."""
        words, all_free = self.words, True
        for slot in slots:
            words[DIRTY] = 1
            if self.order.is_adaptive:  # reading the key costs time
                self.order.remember(slot, self.table.key(slot))
            all_free = self._drop(slot) and all_free
            words[EVICTIONS] = words[EVICTIONS] + 1
            words[DIRTY] = self._unfinished
        return all_free

    def evict_some(self, wanted: int) -> int:
        """Evict `wanted` entries in policy order, fewer if the others are pinned; return how many."""
        victims = list(itertools.islice(self.candidates(), wanted))
        if len(victims) < wanted and self.reclaim_dead():
            victims = list(itertools.islice(self.candidates(), wanted))
        self.evict(victims)
        return len(victims)

    def delete(self, key: bytes) -> bool:
        """Remove an entry; return False if there is none."""
        slot = self.table.find(key)
        if not slot:
            return False
        self.remove(slot)
        return True

    def delete_slot(self, key: bytes, slot: int) -> None:
        """Remove the entry of `key` if it is still in that slot."""
        if self.table.find(key) == slot:
            self.remove(slot)

    def _drop(self, slot: int) -> bool:
        """Remove an entry. Return False if it is pinned: its blocks are freed once its last pin ends."""
        table, words = self.table, self.words
        # Write the state, then read the pins. A reader pins, then reads the seal; it unpins, then reads the state.
        table.set_state(slot, CONDEMNED)
        _new_lock().acquire()
        pinned = self.pins.is_pinned(slot)
        if not pinned:
            table.set_state(slot, FREE)
        table.unlink(slot)
        self.order.unlink(slot)
        words[NUM_ENTRIES] = words[NUM_ENTRIES] - 1
        if pinned:
            words[NUM_BUSY] = words[NUM_BUSY] + 1
        else:
            self.blocks.free_locked(*table.extent(slot))
            table.release(slot)
        return not pinned

    # --- settling dead sessions, and cut-off calls --------------------------------------------------------------------

    def settle(self, held: Mapping[int, tuple[Container[int], Container[int]]], among: range | None = None) -> None:
        """Clear all pins and writes of these sessions but those in `held`: session -> (slots pinned, slots written).

        It does so in all slots, or in some: one pass. WRITING and CONDEMNED records that nothing holds then are freed.
        """
        table = self.table
        for session, (pinned, _) in held.items():
            self.pins.release_all(session, table.used() if among is None else among, pinned)
        stale = []
        are_busy = self.words[NUM_BUSY] or self._is_rebuilding
        for slot in table.slots(WRITING, CONDEMNED, among=among) if are_busy else ():
            if table.state(slot) == WRITING:
                owner = table.owner(slot)
                if owner in held and slot not in held[owner][1]:
                    stale.append(slot)
            elif not self.pins.is_pinned(slot):
                stale.append(slot)
        self._free(stale)

    def _free(self, slots: Iterable[int]) -> None:
        """Free the blocks and slots of WRITING or CONDEMNED records."""
        self.words[DIRTY] = 1
        for slot in slots:
            self.table.set_state(slot, FREE)
            if not self._is_rebuilding:
                self.blocks.free_locked(*self.table.extent(slot))
                self.table.release(slot)
                self.words[NUM_BUSY] -= 1
        self.words[DIRTY] = self._unfinished

    def reclaim(self, only_signs: bool = False) -> bool:
        """Free every record that no live session pins or writes; return True if there was any.

        About 1 us a session. If values are being stored, or deleted ones are not freed yet, it also makes a pass over
        all records, 0.03 us each. `only_signs`: that pass only if UNREAD is set.
        """
        found = self.reclaim_dead()
        if self.words[UNREAD] or (not only_signs and self.others_write()):
            self.words[UNREAD] = 0
            _new_lock().acquire()
            busy = self.words[NUM_BUSY]
            self.settle({})
            found = found or self.words[NUM_BUSY] < busy
        return found

    def dead_sessions(self) -> dict[int, int]:
        """Return session -> pid of the sessions whose process has died."""
        return {number: pid for number, pid in self.pins.sessions().items() if not self.is_alive(number)}

    def settle_dead(self, dead: Iterable[int], among: range | None = None, is_last: bool = True) -> None:
        """Clear the pins and writes of dead sessions in some slots, or in all; `is_last`: end the sessions too."""
        for session in dead:
            self.pins.end_name(session)
        self.settle(dict.fromkeys(dead, ((), ())), among)
        for session in dead if is_last else ():
            self.leave(session)

    def settle_own(self, tokens: Collection[int]) -> None:
        """Forget these tokens, whose calls were cut off, and clear the pins and writes that no other token holds.

        It makes a pass over all records, 0.03 us a slot, only if there are many slots, or one is not known. That is so
        after an interrupt inside a call, but not after an error in a block that reads or writes a value.
        """
        pins = self.pins
        slots = pins.forget(tokens)
        held: dict[int, tuple[Container[int], Container[int]]] = {pins.session: (pins.counts, pins.written())}
        is_everywhere = 0 in slots or len(slots) > KEYS_A_LOOK
        for among in (self.table.used(),) if is_everywhere else (range(slot, slot + 1) for slot in slots):
            self.settle(held, among)

    def settle_dead_again(self, dead: Mapping[int, int], among: range, is_last: bool = False) -> None:
        """Do one step of `settle_dead` for the sessions in `dead` that are still there: others may do the same."""
        left = [session for session, pid in self.dead_sessions().items() if dead.get(session) == pid]
        self.settle_dead(left, among, is_last)

    def reclaim_dead(self) -> bool:
        """Clear the pins and writes of sessions whose process has died; return True if there was such a session."""
        dead = self.dead_sessions()
        if dead:
            self.settle_dead(dead)
        return bool(dead)

    def leave(self, session: int) -> None:
        """Remove a session that holds nothing from the table."""
        self.uses.leave(session)
        self.pins.leave(session)


# Between two parts of a path that is reserved: the number of entries that it will add; CHANGES after the last part,
# None if others have changed it or a value replaces another. While CHANGES is the same, no missing value can be there.
PathSoFar = tuple[int, "int | None"]


class Index(Space):
    """The changes and reads of a pool under its lock: use, store, pin, settle, repair, check, describe.

    It pins and reserves by token, for the session that `act_for` names. If readers may have noted uses, the caller must
    call `catch_up` first, or the order lacks them. The invariant is that of `Space`.
    """

    # --- using -------------------------------------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Count the uses that readers without the lock have noted, in the order, the use counts and the hits."""
        words = self.words
        count, uses = self.uses.take()
        words[HITS] = words[HITS] + count
        if uses:
            words[DIRTY] = 1
            self.order.touch_all([slot for _, slot in uses])
            words[DIRTY] = self._unfinished
            boot = time.time() - time.monotonic()
            self.table.set_all_accessed({slot: boot + moment for moment, slot in uses})

    def use(self, key: bytes) -> int:
        """Find an entry and count a use of it, or a miss; return its slot, or 0."""
        table, words = self.table, self.words
        slot = table.find(key)
        if self._num_recorded:
            self._record(key, slot, True)
        if not slot:
            self.uses.count_miss()
            return 0
        words[DIRTY] = 1
        self.order.touch(slot)
        words[DIRTY] = self._unfinished
        table.set_accessed(slot, time.time())
        words[HITS] = words[HITS] + 1
        return slot

    def get(self, key: bytes, token: int) -> bytes | tuple[int, int] | None:
        """Use an entry; return its value, or if that is large (offset, size), pinned by `token`; None on a miss."""
        slot = self.use(key)
        if not slot:
            return None
        offset, size = self.table.place(slot)
        if size <= COPY_UNDER_LOCK:
            return self.memory[offset : offset + size]
        self.pins.hold_by_name(token, slot)
        return offset, size

    def hold(self, key: bytes, token: int, counts: bool) -> tuple[int, int] | None:
        """Return (offset, size) of an entry, pinned by `token`; None on a miss. `counts`: count a use or a miss."""
        slot = self.use(key) if counts else self.table.find(key)
        if not slot:
            return None
        self.pins.hold_by_name(token, slot)
        return self.table.place(slot)

    def _record(self, key: bytes, slot: int, is_first: bool) -> None:
        """Record an access: a hit, or a miss (slot 0), the first of its request or not. A crash leaves it out."""
        words = self.words
        number = words[RECORDED]
        at = self._accesses + 2 * (number % self._num_recorded)
        size = self.table.place(slot)[1] if slot else 0
        words[at] = key_digest(key)
        words[at + 1] = size << 2 | is_first << 1 | bool(slot)
        words[RECORDED] = number + 1

    def recorded(self) -> list[int]:
        """Return the last accesses, oldest first, two words each: see `_record`."""
        number, kept = self.words[RECORDED], self._num_recorded
        ring: list[int] = self.words[self._accesses : self._accesses + 2 * kept].tolist()
        begin = 2 * (number % kept) if kept and number > kept else 0
        return ring[begin : 2 * number] + ring[:begin]

    def pin(self, key: bytes, token: int) -> bool:
        """Pin an entry until `unpin`; return False if there is none."""
        slot = self.table.find(key)
        if slot:
            self.pins.hold(token, slot)
        return bool(slot)

    def unpin(self, *tokens: int) -> None:
        """Unpin the slots of these tokens. Skip tokens that hold nothing: in a forked child, or settled already."""
        for token in tokens:
            if token in self.pins.held:
                for slot in self.pins.drop(token):
                    self.free_unread(slot)

    def free_unread(self, slot: int) -> None:
        """Free the record of a deleted value if no session pins it any more."""
        if self.table.state(slot) == CONDEMNED and not self.pins.is_pinned(slot):
            self._free([slot])

    # --- paths -------------------------------------------------------------------------------------------------------

    def find_path(self, keys: Iterable[bytes]) -> list[int]:
        """Return the uses, see `EntryTable.find_use`, of the leading run of keys that are there."""
        uses: list[int] = []
        for key in keys:
            use, _, _ = self.table.find_use(key)
            if use <= 0:
                break
            uses.append(use)
        return uses

    def _resolve(self, uses: Iterable[int], keys: Iterable[bytes]) -> Iterator[int]:
        """Yield the slots of a path that was found without the lock, 0 for an entry that has gone since."""
        for use, key in zip(uses, keys, strict=False):
            yield use & 0xFFFFFFFF if self.table.is_current(use) else self.table.find(key)

    def touch(
        self, uses: Sequence[int], keys: Sequence[bytes], parent: bytes, ends_prompt: bool, least: Least
    ) -> Least:
        """Use and queue a part of a path as `EvictionOrder.touch_path` does; return its `least`.

        `parent`: the key before the part, or b"". Entries without a known parent get theirs.
        """
        slots = list(self._resolve(uses, keys))
        self.table.adopt(slots, keys, parent)
        return self._touch(list(filter(None, slots)), True, ends_prompt, least)

    def _touch(
        self, slots: Sequence[int], counts: bool = True, ends_prompt: bool = False, least: Least = NO_LEAST
    ) -> Least:
        self.words[DIRTY] = 1
        least = self.order.touch_path(slots, () if counts else frozenset(slots), ends_prompt, least)
        self.words[DIRTY] = self._unfinished
        self.table.set_all_accessed(dict.fromkeys(slots, time.time()))
        return least

    def use_path(self, uses: Sequence[int], keys: Sequence[bytes], least: Least) -> Least:
        """Count the hits of a part of a path, and a miss if it has more keys than uses; queue it as `touch` does."""
        self._count_hits(len(uses), len(keys))
        return self._touch(list(filter(None, self._resolve(uses, keys))), least=least)

    def hold_path(self, uses: Sequence[int], keys: Sequence[bytes], token: int) -> list[tuple[int, int]]:
        """Pin the leading run of a part of a path by one token; return (offset, size) of each."""
        slots = list(itertools.takewhile(bool, self._resolve(uses, keys)))
        if slots:
            self.pins.hold(token, *slots)
        return list(map(self.table.place, slots))

    def share_held(self, tokens: Iterable[int]) -> list[bytes]:
        """Return the tickets of the values that these tokens pin."""
        return [self.table.ticket(slot) for token in tokens for slot in self.pins.held.get(token, ())]

    def hold_shared(self, session: int, tickets: Sequence[bytes], token: int) -> list[tuple[int, int]]:
        """Pin values that `session` pins, also deleted ones; return (offset, size) of each. Count hits.

        CacheError, and nothing is pinned, if `session` does not pin one of them.
        """
        slots = list(map(self.table.find_ticket, tickets))
        if not all(slot and self.pins.is_held_by(session, slot) for slot in slots):
            raise CacheError("a value of this ticket is pinned no more: `unpin` it only once it has been viewed")
        self.pins.hold(token, *slots)
        self._count_hits(len(slots), len(slots))
        return list(map(self.table.place, slots))

    def open_path(self, uses: Sequence[int], keys: Sequence[bytes], token: int) -> list[tuple[int, int]]:
        """Do the work of `hold_path` and `use_path` for a path of one part; return (offset, size) of each value."""
        places = self.hold_path(uses, keys, token)
        slots = self.pins.held.get(token, ())
        self._count_hits(len(slots), len(keys))
        self._touch(slots)
        return places

    def _count_hits(self, num_there: int, num_keys: int) -> None:
        self.words[HITS] += num_there
        if num_there < num_keys:
            self.uses.count_miss()

    def record_path(self, keys: Sequence[bytes], num_there: int, is_first: bool) -> None:
        """Record the accesses of a part of a path, root first: hits for the first `num_there`, misses for the rest."""
        for number, key in enumerate(keys):
            self._record(key, self.table.find(key) if number < num_there else 0, is_first and not number)

    def reserve_path(
        self,
        keys: Sequence[bytes],
        sizes: Sequence[int],
        metas: Sequence[EntryMeta],
        token: int,
        so_far: PathSoFar | None,
        parent: bytes = b"",
    ) -> tuple[list[tuple[int, int] | None], PathSoFar]:
        """Return ((offset, size) of a place for each value of a part of a path, None if it is there; `so_far`).

        There means: with that size, dtype and shape. The first value is written, or pinned, by `token`, the next by
        `token` + 1, and so on. The list is shorter if no more can be stored. `so_far`: of the part before, or None.
        `parent`: the last key of the part before, or b"".
        """
        table, words = self.table, self.words
        places: list[tuple[int, int] | None] = []
        num_more, changes = (0, words[CHANGES]) if so_far is None else so_far
        is_unchanged = changes == words[CHANGES]
        for number, (key, size, meta) in enumerate(zip(keys, sizes, metas, strict=True), token):
            slot = table.find(key)
            if slot and table.is_like(slot, size, meta.tensor):
                self.pins.hold(number, slot)
                table.adopt([slot], [key], parent)
                places.append(None)
                parent = key
                continue
            place = self.reserve(key, size, meta, number, num_more, slot, parent)
            if place is None:
                break
            places.append(place)
            parent = key
            num_more += not slot or table.state(slot) != COMPLETE  # not COMPLETE: it has just been evicted
            is_unchanged = is_unchanged and not slot
        return places, (num_more, words[CHANGES] if is_unchanged else None)

    def commit_path(
        self,
        tokens: Sequence[int],
        checksums: Mapping[int, int],
        kept: Container[int],
        least: Least,
        changes: int | None,
    ) -> tuple[Least, int | None]:
        """Commit the values that these tokens write and queue the path; unpin all but the tokens `kept`.

        `checksums`: token -> CRC-32 of the values written. The deepest is committed first, so others find no part of
        the new run before its head is there. Parts of a path go the same way, with `least` as in `touch`. If another
        process has stored a value of that size, dtype and shape meanwhile, its value stays and ours is freed.
        `changes`: that of `PathSoFar`. Return (`least`, `changes`) for the next part.
        """
        table, pins, queued = self.table, self.pins, []
        are_missing = changes == self.words[CHANGES]
        for token in reversed(tokens):
            (slot,) = pins.held[token]
            queued.append(slot)
            if token in checksums:
                old = 0 if are_missing else table.find(table.key(slot))
                is_new = not old or not table.is_like(old, table.place(slot)[1], table.texts(slot)[2])
                if is_new or token in kept:
                    least = self._commit(token, old, None, token in kept, checksums[token], least)
                    continue
                self._withdraw(token)
                queued[-1] = slot = old
            else:
                self.unpin(token)
                if table.state(slot) != COMPLETE:  # replaced or removed meanwhile
                    queued[-1] = slot = table.find(table.key(slot))
            if slot:
                least = self._touch((slot,), False, False, least)
        table.set_all_accessed(dict.fromkeys(filter(None, queued), time.time()))  # one time for all, as after a read
        return least, self.words[CHANGES] if are_missing else None

    def abandon(self, tokens: Iterable[int]) -> None:
        """Free the places that these tokens write, and unpin the slots that they pin."""
        for token in tokens:
            if token in self.pins.writing:
                self._withdraw(token)
            else:
                self.unpin(token)

    def _withdraw(self, token: int) -> None:
        """Free the place that a token writes."""
        self.pins.writing.discard(token)
        self._free(self.pins.held.pop(token))

    # --- storing -----------------------------------------------------------------------------------------------------

    def put(self, key: bytes, data: Any, size: int, meta: EntryMeta, if_absent: bool) -> bool:
        """Store a value at once; return False, and change nothing, if there is no space for it."""
        found = self.table.find(key)
        if if_absent and found:
            return True
        num_blocks = self.geometry.blocks_for(size)
        room = self._find_room(found, num_blocks)
        if room is None:
            return False
        start, old = room
        table, words = self.table, self.words
        at = self._data_offset + start * self._block_size
        _map_pages(self.memory, at, size)
        self.memory[at : at + size] = data  # into free blocks: a crash here leaves nothing to repair
        words[DIRTY] = 1
        self.blocks.take_locked(start, num_blocks)
        # A swap of the blocks costs half as much as a new record and the removal of the old one.
        if old and table.is_same(old, size, table.tell(key, meta)) and self._begin_change(old):
            self._swap(old, start, num_blocks)
        else:
            slot = table.claim(key, size, start, num_blocks, self.pins.session, meta)
            self._enter(slot, old, self._uses_of(key, old), meta.priority)
        words[DIRTY] = self._unfinished = 0
        return True

    def reserve(
        self,
        key: bytes,
        size: int,
        meta: EntryMeta,
        token: int,
        num_more: int = 0,
        old: int | None = None,
        parent: bytes = b"",
    ) -> tuple[int, int] | None:
        """Return (offset, size) of a place for a value that `token` writes; None, and no change, if it can't be stored.

        `num_more`: see `is_full`. `parent`: the key before it in its path, b"" if there is none.
        """
        num_blocks = self.geometry.blocks_for(size)
        room = self._find_room(self.table.find(key) if old is None else old, num_blocks, num_more)
        if room is None:
            return None
        table, words = self.table, self.words
        self.pins.writing.add(token)
        words[DIRTY] = 1
        self.blocks.take_locked(room[0], num_blocks)
        slot = table.claim(key, size, room[0], num_blocks, self.pins.session, meta, zlib.crc32(parent))
        table.set_state(slot, WRITING)
        words[NUM_BUSY] = words[NUM_BUSY] + 1
        self.pins.held[token] = (slot,)
        self._finish()
        return table.place(slot)

    def commit(self, token: int, saved: Saved | None, keep_pinned: bool, if_absent: bool) -> None:
        """Make a reserved value an entry, in place of any value under its key; `if_absent`: only if there is none.

        `saved`: its history from a snapshot. `keep_pinned`: the token stays as a pin.
        """
        (slot,) = self.pins.held[token]
        key = self.table.key(slot)
        old = self.table.find(key)
        if old and if_absent:
            self._withdraw(token)
        else:
            self._commit(token, old, saved, keep_pinned, 0 if saved is None else saved.checksum, None)

    def _commit(
        self,
        token: int,
        old: int,
        saved: Saved | None,
        keep_pinned: bool,
        checksum: int,
        least: Least | None,
    ) -> Least:
        """Commit a value. In a path it gets no fewer uses and no lower priority than `least`.

        Return the `least` of its parent.
        """
        table, words, pins = self.table, self.words, self.pins
        (slot,) = pins.held[token]
        if not old and words[NUM_ENTRIES] >= self.geometry.max_entries:  # others have filled the pool during our copy
            victim = next(self.candidates(), 0)
            self.evict([victim] if victim else [])
        words[DIRTY] = 1
        if old and saved is None and table.is_same(old, *table.told_by(slot)) and self._begin_change(old):
            table.set_state(slot, FREE)  # first: two records must not have the same blocks
            self._swap(old, *table.extent(slot))
            table.release(slot)
            slot = old
            least = NO_LEAST if least is None else self.order.touch_path((slot,), (slot,), False, least)
        else:
            if saved is not None:
                table.set_times(slot, saved.created, saved.accessed)
                table.set_parent(slot, saved.parent)
                count = saved.access_count
            else:
                count = self._uses_of(table.key(slot), old) if old or self.order.is_adaptive else 0
            least_count, least_priority = NO_LEAST if least is None else least
            least = max(count, least_count), max(table.priority(slot), least_priority)
            self._enter(slot, old, *least)
        table.set_checksum(slot, checksum)
        words[NUM_BUSY] = words[NUM_BUSY] - 1
        pins.writing.discard(token)
        del pins.held[token]
        if keep_pinned:
            pins.hold(token, slot)
        words[DIRTY] = self._unfinished
        return least

    def _uses_of(self, key: bytes, old: int) -> int:
        """Return the use count that a new value begins with: that of the value it replaces, or of its ghost."""
        return self.order.numbers(old)[1] if old else self.order.recall(key)

    def _enter(self, slot: int, old: int, count: int, priority: int) -> None:
        """Make a record that has been filled in an entry, in place of `old`."""
        table, order, words = self.table, self.order, self.words
        order.stamp(slot, count, priority)
        table.complete(slot)
        if old:
            self._drop(old)
        table.link(slot)
        order.link(slot)
        words[NUM_ENTRIES] = words[NUM_ENTRIES] + 1
        words[PUTS] = words[PUTS] + 1

    def _swap(self, slot: int, start: int, num_blocks: int) -> None:
        """Give an entry a new value, in blocks that are allocated already, after `_begin_change` has sealed it off."""
        table, words = self.table, self.words
        extent = table.extent(slot)
        table.swap(slot, start, num_blocks)
        table.complete(slot)
        self.blocks.free_locked(*extent)
        self.order.replace(slot)
        words[PUTS] = words[PUTS] + 1

    # --- repairing and checking --------------------------------------------------------------------------------------

    def begin_anew(self) -> None:
        """Forget any change of ours that an error has cut off. DIRTY stays set if we or a dead process have set it."""
        self._is_rebuilding = bool(self.words[DIRTY])
        self._unfinished = int(self._is_rebuilding)

    def repair(self) -> None:
        """Rebuild after a process has died, or an error has come, in the middle of a change. It scans all records."""
        self.reclaim_dead()
        self.rebuild()

    def rebuild(self) -> list[str]:
        """Rebuild all derived data by passes over all records; return the problems of the records themselves."""
        table = self.table
        self.words[DIRTY] = self._unfinished = 1
        self._is_rebuilding = True
        self._finish_move()
        self.settle({})
        problems, entries, others, extents = self._sound_records()
        replaced = set(table.slots(COMPLETE)).difference(entries)
        if replaced:  # readers without the lock may be pinning them: mark them first, as in `_drop`
            for slot in replaced:
                table.set_state(slot, CONDEMNED)
            _new_lock().acquire()
            self.settle({})
            _, entries, others, extents = self._sound_records()
        kept = {*entries, *others}
        for slot in table.slots(WRITING, COMPLETE, CONDEMNED):
            if slot not in kept:
                table.set_state(slot, FREE)
        table.renew(entries)  # before any block is freed: readers without the lock must notice
        table.rebuild(self.order.oldest_first(entries), others)
        self.blocks.rebuild_locked(join_extents(extents))
        self.order.rebuild(entries)
        self._is_rebuilding = False
        self._finish()
        return problems

    def _sound_records(self) -> tuple[list[str], list[int], list[int], list[Extent]]:
        """Return (problems, slots of entries, slots of WRITING and CONDEMNED records, extents of both by first block).

        It takes one pass over all records, and does not look at their owners.
        """
        problems, found = self.table.sound()
        others, extents = [], []
        newest: dict[bytes, int] = {}
        gone = set()
        for slot, state, start, num_blocks, key in found:
            extents.append((start, num_blocks, slot))
            if state != COMPLETE:
                others.append(slot)
                continue
            twin = newest.setdefault(key, slot)
            if twin != slot:
                older, newer = sorted((twin, slot), key=lambda s: self.order.numbers(s)[0])
                problems.append(f"slots {older} and {newer} both hold the key {key.decode()!r}")
                newest[key] = newer
                if self.pins.is_pinned(older):
                    others.append(older)
                else:
                    gone.add(older)
        entries = sorted(newest.values())
        extents.sort()
        end, last = 0, 0
        for start, num_blocks, slot in extents:
            if slot in gone:
                continue
            if start < end:
                problems.append(f"slots {last} and {slot} both claim block {start}")
                (entries if slot in entries else others).remove(slot)
                gone.add(slot)
                continue
            end, last = start + num_blocks, slot
        if gone:
            extents = [extent for extent in extents if extent[2] not in gone]
        return problems, entries, others, extents

    def check(self, fix: bool) -> list[str]:
        """Return the problems found when comparing all derived data with all records; see `KVCachePool.check`."""
        self.reclaim()
        self.settle({})
        table = self.table
        problems, entries, others, extents = self._sound_records()
        problems += table.check(entries, sorted(others))
        problems += self.order.check(entries)
        expected = BitmapAllocator(self.geometry.num_blocks)
        expected.rebuild_locked(join_extents(extents))
        if expected.to_bytes() != self.blocks.to_bytes():
            problems.append("the bitmap and the records disagree on which blocks are in use")
        if expected.get_usage() != self.blocks.get_usage():
            problems.append(
                f"the header counts {self.words[ALLOCATED]} blocks in use, there are {expected.get_usage()[0]}"
            )
        if not self.blocks.hints_are_true():
            problems.append("the free-block hint is past the first free block or run")
        if self.words[MOVE_SLOT]:
            problems.append(f"a move of slot {self.words[MOVE_SLOT]} is under way, outside of any change")
        if fix and problems:
            self.rebuild()
        return problems

    # --- the policy --------------------------------------------------------------------------------------------------

    def set_policy(self, policy: EvictionPolicy, packed_weights: int, ghosts: memoryview | None) -> None:
        """Change the policy, which rebuilds the index, or only its weights; all handles follow."""
        self.order.configure(packed_weights)
        if policy is not self.order.policy:
            self.words[DIRTY] = self._unfinished = 1
            self.order.forget_ends(self.table.slots(COMPLETE))
            self.words[POLICY] = 1 + list(EvictionPolicy).index(policy)
            self.use_policy(policy, ghosts)
            self.rebuild()

    def configure_adaptive(self, packed_weights: int) -> EvictionPolicy:
        """Set the weights if the policy is ADAPTIVE; return the policy."""
        if self.order.is_adaptive:
            self.order.configure(packed_weights)
        return self.order.policy

    def how_to_order(self) -> tuple[Callable[[int, int, int, int, int, int], Note], Waste | None]:
        """Return (`note_of`, `waste`) for `in_victim_order`, as of now."""
        return self.order.note_of, self.order.waste_now()

    # --- describing --------------------------------------------------------------------------------------------------

    def copy(self, slot: int) -> bytes:
        """Return the bytes of an entry, for `read_copy`.

        Making thousands of objects under the lock would start garbage collections there, and others would wait.
        """
        return self.order.copy(slot) + slot.to_bytes(4, "little") + self.table.copy(slot)

    def describe(self, key: bytes) -> bytes:
        """Return a copy of an entry, b"" if there is none."""
        slot = self.table.find(key)
        return self.copy(slot) if slot else b""

    def describe_held(self, *tokens: int) -> list[bytes]:
        """Return copies of the entries that these tokens pin."""
        return [self.copy(slot) for token in tokens for slot in self.pins.held.get(token, ())]

    def describe_prefix(self, prefix: bytes) -> list[bytes] | None:
        """Return copies of the entries with a prefix hash, oldest first; None if it is "", or that takes long."""
        slots = self.table.find_prefix(prefix, ENTRIES_A_STEP)
        return None if slots is None else list(map(self.copy, slots))

    def sweep(self, chain: int, work: Callable[[Index, int], _R]) -> tuple[list[_R], int]:
        """Return (results of `work` for the entries of some key chains from `chain` on, the next chain)."""
        slots, chain = self.table.chains(chain, ENTRIES_A_STEP)
        return [work(self, slot) for slot in slots], chain

    def copy_small(self, copies: list[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Return (copies of entries as they are now, copies of their values), up to a MiB of values.

        Both are b"" for an entry that has gone. A large value ends the lists: its entry is there, its value is not.
        """
        table, memory, unpack = self.table, self.memory, COPY_SIZES.unpack_from
        data, block_size = self._data_offset, self._block_size
        now: list[bytes] = []
        values: list[bytes] = []
        room = COPY_CHUNK
        for noted in copies:
            copy = noted
            slot, size, start, _, _, _ = unpack(copy)
            if table.copy(slot) != copy[COPY_RECORD_AT:]:  # used, replaced or removed since it was copied
                copy = self.describe(copied_key(copy).encode())
                if not copy:
                    now.append(b"")
                    values.append(b"")
                    continue
                _, size, start, _, _, _ = unpack(copy)
            room -= size
            if size > COPY_UNDER_LOCK:
                now.append(copy)
                break
            if room < 0:
                break
            now.append(copy)
            offset = data + start * block_size
            values.append(memory[offset : offset + size])
        return now, values

    def copy_range(self, among: range) -> tuple[bytes, list[int], dict[int, int]]:
        """Return (the records of some slots, the slot that each session names, session -> pid), for `MemoryTally`.

        A copy takes 0.1 us a slot or less; all else is done without the lock.
        """
        return self.table.copy_range(among), self.pins.names(), self.pins.sessions()

    def count_pinned(self, among: range) -> int:
        """Return the number of pinned entries among some slots; one pass over them."""
        return sum(self.table.state(slot) == COMPLETE for slot in self.pins.pinned(among))

    def count(self) -> int:
        """Return the number of entries."""
        return int(self.words[NUM_ENTRIES])

    def num_used(self) -> int:
        """Return the number of slots that were ever used."""
        return len(self.table.used())

    def forget_waiter(self) -> None:
        """Clear WAITED_FOR, after a process was killed while it waited for the lock."""
        self.words[WAITED_FOR] = 0

    def stats(self) -> dict[str, Any]:
        """Return the figures of `KVCachePool.get_stats` on blocks, entries and accesses, after a `reclaim`."""
        self.reclaim()
        words = self.words
        allocated, total = self.blocks.get_usage()
        hits, misses = words[HITS], self.uses.misses()
        largest, free = self.blocks.largest_free_run(), total - allocated
        return {
            "total_blocks": total,
            "allocated_blocks": allocated,
            "free_blocks": free,
            "utilization_percent": 100 * allocated / total,
            "entry_count": words[NUM_ENTRIES],
            "adaptive_weights": self.order.weights(),
            "hits": hits,
            "misses": misses,
            "hit_rate": hits / (hits + misses) if hits + misses else 0.0,
            "puts": words[PUTS],
            "evictions": words[EVICTIONS],
            "largest_free_run": largest,
            "fragmentation": 1 - largest / free if free else 0.0,
            "attached_pids": sorted(set(self.pins.sessions().values())),
        }


# ======================================================================================================================
# Snapshot
# ======================================================================================================================

# A snapshot is a safetensors file (https://github.com/huggingface/safetensors#format): eight bytes of header length, a
# JSON header, the tensors without gaps. There is one tensor an entry, next victim first: reading them in turn rebuilds
# the eviction order. `__metadata__` holds "format", "cortex_header_crc32", "cortex_config" (JSON) and
# "cortex_entries" (JSON: tensor name -> the list in `_describe_saved`).

SNAPSHOT_FORMAT = "cortex-kv 1"
NO_CHECKSUM = "00000000"  # in the header while its CRC-32 is computed, over the header with its padding
SNAPSHOT_SUFFIX = ".safetensors"
MAX_SNAPSHOT_HEADER = 1 << 31


class SnapshotEntry(NamedTuple):
    """One entry of a snapshot: its description by the pool, with its place in the file, and the CRC-32 of its bytes."""

    entry: CacheEntry  # its offset counts from the start of the file
    crc32: int | None  # None: written by another program
    parent: int = 0  # hash of the key of its parent, 0: not known


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _describe_saved(copy: bytes, names: set[str], crc32: int, begin: int) -> tuple[str, str]:
    """Return (the item of "cortex_entries", the tensor) of a copied entry, as JSON; add its tensor's name to `names`.

    The text is joined by hand: a CacheEntry and `json.dumps` take five times as long, noticed with 100,000 entries.
    """
    key, prefix, tensor, _, size, created, accessed, count, priority, tokens, layer = read_copy(copy)
    name, key_text = key, encode_basestring(key)
    while name in names or name == "__metadata__":  # safetensors reserves this name
        name += "_"
    names.add(name)
    text = key_text if name is key else encode_basestring(name)
    dtype, framework, shape, raw_size, encoding = "U8", "", str(size), 0, ""
    if tensor:
        kind, described, lengths, raw_size, encoding = split_tensor(tensor)
        if described:
            dtype, framework, shape = described, f"{kind}:", lengths.replace(" ", ",")
    parent = copied_parent(copy)
    more = f",{raw_size},{parent}" if raw_size or parent else ""  # versions before 0.2.0 know no such list
    more += f",{encode_basestring(encoding)}" if encoding else ""
    return (
        f'{text}:["{crc32:08x}",{key_text},{encode_basestring(prefix)},{created!r},{accessed!r},{count},{priority},'
        f'{tokens},{layer},"{framework}"{more}]',
        f'{text}:{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{begin},{begin + size}]}}',
    )


def _snapshot_header(config: CachePoolConfig, about: list[str], tensors: list[str]) -> bytes:
    """Return the JSON header for tensors without gaps, its checksum still NO_CHECKSUM."""
    metadata = {
        "format": SNAPSHOT_FORMAT,
        "cortex_header_crc32": NO_CHECKSUM,
        "cortex_config": json.dumps(config.to_dict()),
        "cortex_entries": f"{{{','.join(about)}}}",
    }
    return ('{"__metadata__":' + ",".join([_to_json(metadata), *tensors]) + "}").encode()


_ESCAPED = re.compile(rb'[\0-\x1f"\\\x7f]')


def header_room(texts: bytes) -> int:
    """Return an upper bound on the bytes of an entry in the header, from its key, prefix hash and tensor text."""
    # The key is there three times, and twice in JSON within JSON.
    return 340 + (32 if _ESCAPED.search(texts) else 4) * len(texts)


class SnapshotReader(Protocol):
    """The access of `write_snapshot` to the values of a pool that others use."""

    def small_values(self, copies: list[bytes]) -> list[tuple[bytes, bytes | None]]:
        """Return (the entry as it is now, its value) of the first of these copied entries, of at least one.

        It is (b"", b"") if the key has gone. A large value is None.
        """

    def value(self, key: str) -> contextlib.AbstractContextManager[tuple[bytes, memoryview] | None]:
        """Open one value in place: (the entry as it is now, its value); None if it has gone."""


def write_snapshot(
    path: str,
    config: CachePoolConfig,
    copies: list[bytes],
    total: int,
    room: int,
    read: SnapshotReader,
    progress: Progress | None = None,
) -> int:
    """Write a snapshot of these entries and return how many it holds; `path` is replaced whole or not at all.

    `copies` are as `KVCachePool._copy_all` makes them. `read` opens the values, `total` bytes as far as is known. A key
    that has gone meanwhile is left out. The header comes first in the file but is known last. So space is kept for it,
    `room` bytes for the entries, and filled up with spaces, as the format allows. The temporary file has a fixed name
    and is locked: two writers take turns, and the file of a killed one is reused. A link is refused, it is not ours.
    """
    directory, base = os.path.split(os.path.abspath(path))
    temporary = os.path.join(directory, f".{base}.tmp")
    with _os_errors(f"write the snapshot {path}"):
        while True:
            try:
                file = io.FileIO(temporary, "a+", opener=_open_private)
            except OSError:
                if os.path.islink(temporary):
                    raise StorageError(f"{temporary} is a symbolic link: remove it") from None
                raise
            fd = file.fileno()
            fcntl.flock(fd, fcntl.LOCK_EX)
            opened = os.fstat(fd)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(opened, os.lstat(temporary)):
                    break  # if not, another writer has renamed it meanwhile
            file.close()
        with file:
            if not stat.S_ISREG(opened.st_mode) or opened.st_nlink > 1:
                raise StorageError(f"{temporary} is no file, or has a second name: remove it")
            try:
                fcntl.fcntl(fd, fcntl.F_SETFL, 0)  # append mode was needed to open without truncating, before the lock
                os.fchmod(fd, 0o600)
                file.truncate(0)
                with _Checksums() as checksums:
                    saved = _write_values(file, config, copies, total, room, read, checksums, progress)
                os.fsync(fd)
                os.rename(temporary, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
    # The snapshot is in place, whatever happens here. Network and FUSE file systems may refuse to sync a directory, and
    # a directory that can be written may not be readable.
    with contextlib.suppress(OSError):
        directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory_fd)
        finally:
            os.close(directory_fd)
    return saved


def _open_private(path: str, flags: int) -> int:
    """Open or make a file that only its owner can read; a symbolic link is not followed."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


class _Checksums(contextlib.ExitStack):
    """Compute the CRC-32 of large values in a second thread during their write: a third less time for a snapshot."""

    def __enter__(self) -> _Checksums:
        self._thread = None
        with contextlib.suppress(RuntimeError):  # at exit no more threads can be started
            from concurrent.futures import ThreadPoolExecutor

            self._thread = self.enter_context(ThreadPoolExecutor(1))
        return super().__enter__()

    def start(self, data: memoryview) -> Callable[[], int]:
        """Begin, and return a function that waits for the result. zlib lets other threads run meanwhile."""
        if self._thread is not None and len(data) >= BESIDE:
            with contextlib.suppress(RuntimeError):
                return self._thread.submit(zlib.crc32, data).result
        return functools.partial(zlib.crc32, data)


def _write_values(
    file: io.RawIOBase,
    config: CachePoolConfig,
    copies: list[bytes],
    total: int,
    room: int,
    read: SnapshotReader,
    checksums: _Checksums,
    progress: Progress | None,
) -> int:
    """Write the values, then the header in front of them; return how many entries there are: see `write_snapshot`."""
    room = (room + 8192 + 8 * len(_snapshot_header(config, [], []))) // 8 * 8
    file.seek(8 + room)
    names: set[str] = set()
    about: list[str] = []  # text: every garbage collection would have to visit other objects
    tensors: list[str] = []
    done = at = 0

    def add(copy: bytes, crc32: int, begin: int) -> None:
        described, tensor = _describe_saved(copy, names, crc32, begin)
        about.append(described)
        tensors.append(tensor)

    def tell() -> None:
        if progress is not None:
            progress(min(done, total), total)  # values may have grown meanwhile

    while at < len(copies):
        small: list[bytes] = []
        large = b""
        for copy, data in read.small_values(copies[at : at + ENTRIES_A_STEP]):
            at += 1
            if data is None:
                large = copy
            elif copy:
                add(copy, zlib.crc32(data), done)
                small.append(data)
                done += len(data)
        if small:
            _write_all(file, memoryview(b"".join(small)))
            tell()
        if large:
            with read.value(copied_key(large)) as opened:
                if opened is not None:
                    copy, view = opened
                    start = done
                    checksum = checksums.start(view)
                    try:
                        for begin in range(0, len(view), COPY_CHUNK):
                            with view[begin : begin + COPY_CHUNK] as chunk:
                                _write_all(file, chunk)
                                done += len(chunk)
                            tell()
                    finally:
                        crc32 = checksum()  # before the view ends
                    add(copy, crc32, start)
    header = _snapshot_header(config, about, tensors)
    if len(header) > room:  # only if entries were rewritten meanwhile with far longer texts
        raise StorageError(f"the snapshot's header has {len(header)} bytes, room was kept for {room}: try again")
    header = header.ljust(room)
    header = header.replace(NO_CHECKSUM.encode(), b"%08x" % zlib.crc32(header), 1)
    file.seek(0)
    _write_all(file, memoryview(struct.pack("<Q", room) + header))
    return len(names)


def _write_all(file: io.RawIOBase, data: memoryview) -> None:
    """Write all of `data` to a file without a buffer, which would write half of a large value in small pieces."""
    at = 0
    while at < len(data):
        at += file.write(data[at:]) or 0


class Snapshot:
    """A snapshot file open for reading. Its header is checked when it is opened, its values by `verify`."""

    def __init__(self, path: str, salvage: bool = False) -> None:
        """Open a snapshot and read its header. With `salvage` the values may be cut, or followed by something else.

        FileNotFoundError if there is no such file, CorruptionError if it is not a whole safetensors file.
        """
        self.path = path
        self.num_described = 0
        self._salvage = salvage
        self.config: CachePoolConfig | None = None  # None: written by another program
        self.entries: list[SnapshotEntry] = []
        self._file: BinaryIO | None = None
        try:
            # O_NONBLOCK: opening a named pipe would wait for a writer.
            self._file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise CorruptionError(f"{path} is not a file")
            self._read_header(self._file)
        except FileNotFoundError:
            raise
        except OSError as error:
            self.close()
            raise StorageError(f"cannot read the snapshot {path}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _read_header(self, file: BinaryIO) -> None:
        file_bytes = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(file_bytes - 8, MAX_SNAPSHOT_HEADER):
            raise CorruptionError(f"{self.path} is no safetensors file: {file_bytes} bytes, header length {length}")
        try:
            self._take_header(file.read(length), file_bytes)
        except CorruptionError:
            raise
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
            why = str(error) or type(error).__name__
            raise CorruptionError(f"the header of {self.path} is damaged or not for a pool: {why}") from None

    def _take_header(self, raw: bytes, file_bytes: int) -> None:
        """Check the JSON header; set `config`, `num_described` and `entries` from it."""
        data_at = 8 + len(raw)
        header = json.loads(raw.decode(), object_pairs_hook=_unique_keys)
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata  # the safetensors package takes null for none, too
        if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
            raise ValueError("__metadata__ must be texts by name")
        # Any sign of ours is enough. So damage to one of them does not make the file look like another program's.
        ours = (
            not {"cortex_header_crc32", "cortex_config", "cortex_entries"}.isdisjoint(metadata)
            or metadata.get("format") == SNAPSHOT_FORMAT
        )
        about: dict[str, list[Any]] = {}
        if ours:
            checksum_text = metadata["cortex_header_crc32"]
            if metadata["format"] != SNAPSHOT_FORMAT:
                raise ValueError(f"format {metadata['format']!r}, this program knows {SNAPSHOT_FORMAT!r}")
            unsealed = raw.replace(checksum_text.encode(), NO_CHECKSUM.encode(), 1)
            if f"{zlib.crc32(unsealed):08x}" != checksum_text:
                raise ValueError("it does not match its checksum")
            about = json.loads(metadata["cortex_entries"], object_pairs_hook=_unique_keys)
            self.config = CachePoolConfig.from_dict(json.loads(metadata["cortex_config"]))
            if about.keys() != header.keys():
                raise ValueError("its entries and its tensors differ")
        self.num_described = len(header)
        end = 0
        now = time.time()
        for name, tensor in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            begin, stop = tensor["data_offsets"]
            beyond = check_int("offset", stop, begin) > file_bytes - data_at
            if beyond and self._salvage:
                return
            if check_int("offset", begin, 0) != end or beyond:
                raise CorruptionError(
                    f"{self.path} is cut or damaged: entry {name!r} lies at {begin} to {stop}, after {end} of "
                    f"{file_bytes - data_at} bytes"
                )
            end = stop
            size = stop - begin
            checksum, described, parent = None, ":", 0
            entry = CacheEntry(name, "", data_at + begin, size, now, now)
            if ours:
                (text, entry.key, entry.prefix_hash, entry.created_at, entry.last_accessed, entry.access_count,
                 entry.priority, entry.sequence_length, entry.layer_index, described, *more) = about[name]  # fmt: skip
                if more:
                    entry.raw_size, parent, entry.encoding = (*more, "")[:3]
                    check_int("parent", parent, 0, 0xFFFFFFFF)
                checksum = int(text, 16)
                if not all(
                    type(t) in (int, float) and math.isfinite(t) for t in (entry.created_at, entry.last_accessed)
                ):
                    raise ValueError(f"entry {name!r} has times that are none")
                check_int("access count", entry.access_count, 0, MAX_ACCESS_COUNT)
            if described:
                entry.dtype, entry.shape = tensor["dtype"], tuple(tensor["shape"])
                entry.framework = described[:-1]
            elif (tensor["dtype"], tensor["shape"]) != ("U8", [size]):
                raise ValueError(f"entry {name!r} is not plain bytes")
            try:
                snapshot_meta(entry)
            except InvalidArgumentError as error:
                raise ValueError(f"entry {_show(name)}: {error}") from None
            self.entries.append(SnapshotEntry(entry, checksum, parent))
        if end != file_bytes - data_at and not self._salvage:
            raise CorruptionError(
                f"{self.path} has {file_bytes} bytes, its header describes {data_at + end}: not whole"
            )
        if len({item.entry.key for item in self.entries}) != len(self.entries):
            raise ValueError("two entries have one key")

    def read(self, item: SnapshotEntry, target: memoryview) -> bool:
        """Read one value into `target`; return False if it does not match its checksum.

        A `target` shorter than the value is filled again and again, which is of use only to check the value.
        """
        assert self._file is not None
        size = item.entry.size
        checksum = done = 0
        while done < size:
            at = done if len(target) >= size else 0
            with target[at : at + min(COPY_CHUNK, size - done)] as chunk, _os_errors(f"read the snapshot {self.path}"):
                count = os.preadv(self._file.fileno(), [chunk], item.entry.offset + done)
                checksum = zlib.crc32(chunk[:count], checksum)
            if not count:
                return False
            done += count
        return item.crc32 is None or checksum == item.crc32

    def verify(self, salvage: bool = False, progress: Progress | None = None) -> list[SnapshotEntry]:
        """Read all values once and return the intact entries.

        CorruptionError that names the first damaged entry, unless `salvage` leaves such entries out.
        """
        intact = []
        total = sum(item.entry.size for item in self.entries)
        done = 0
        scratch = memoryview(bytearray(COPY_CHUNK))
        for item in self.entries:
            if self.read(item, scratch):
                intact.append(item)
            elif not salvage:
                raise CorruptionError(
                    f"{self.path}: entry {item.entry.key!r} does not match its checksum; "
                    "restore with salvage to take the rest"
                )
            done += item.entry.size
            if progress is not None:
                progress(done, total)
        return intact


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dict of pairs; ValueError if a name is there twice, for `json.loads` silently drops the first one."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("two entries have one name")
    return result


def snapshot_meta(entry: CacheEntry) -> EntryMeta:
    """Return the metadata of an entry, checked, for storing it."""
    e = entry
    return EntryMeta.of(
        encode_key(e.key),
        e.size,
        e.prefix_hash,
        e.priority,
        e.sequence_length,
        e.layer_index,
        e.dtype,
        e.shape,
        e.framework,
        e.raw_size,
        e.encoding,
    )


# ======================================================================================================================
# Pool
# ======================================================================================================================

_open_pools: weakref.WeakSet[_Handle] = weakref.WeakSet()  # the handles of this process
# Handles that are closed or garbage while something made from one of their views lives. They keep their session.
_lent_out: set[_Handle] = set()
# The weak references to all views of each handle, by id of their mapping. A garbage collection that finds a handle in a
# cycle clears the references that only the cycle holds. Without this table the handle would lose track of its views.
_all_view_refs: dict[int, dict[int, _ViewRef]] = {}


def _known_pools() -> list[_Handle]:
    """Return all handles that have not ended."""
    while True:
        try:
            return list({*_open_pools, *_lent_out})
        except RuntimeError:  # another thread has opened one meanwhile
            continue


def _expand_user(path: str) -> str:
    """Return `path` with a leading ~ or ~user replaced by that home directory.

    An empty or relative HOME is ignored: a store must be the same from every directory.
    """
    if not path.startswith("~"):
        return path
    user, _, rest = path[1:].partition("/")
    home = "" if user else os.environ.get("HOME", "")
    if not os.path.isabs(home):
        import pwd

        with contextlib.suppress(KeyError):
            home = (pwd.getpwnam(user) if user else pwd.getpwuid(os.getuid())).pw_dir
    if os.path.isabs(home):
        return os.path.join(home, rest.lstrip("/"))
    if user:
        raise InvalidArgumentError(f"path {_show(path)}: there is no user {user!r}; ./~{user} is a file called so")
    raise StorageError(
        f"user {os.getuid()} has no home directory (no HOME, none in /etc/passwd): set CORTEX_CACHE_DIR, or give a "
        "store directory (--store DIR)"
    )


def default_store_path() -> str:
    """Return `$CORTEX_CACHE_DIR`, or ~/.config/cortex/kv_cache; StorageError if there is neither."""
    return _expand_user(os.environ.get("CORTEX_CACHE_DIR") or os.path.join("~", ".config", "cortex", "kv_cache"))


def _real_store_path(store_path: str | os.PathLike[str] | None) -> str:
    return os.path.realpath(_expand_user(check_path(store_path)) if store_path is not None else default_store_path())


def _segment_paths(store_path: str, name: str) -> dict[str, str]:
    """Return tier -> path of the segment of that name.

    In /dev/shm the name has a digest of the store's path, so the names of two stores differ. In the store directory it
    does not depend on the path: a directory can be renamed. No snapshot has that name, as pool names have no @.
    """
    digest = hashlib.sha256(os.fsencode(store_path)).hexdigest()[:12]
    cpu = os.path.join(SHM_DIR, f"{SEGMENT_PREFIX}{digest}-{name}")
    return {"cpu": cpu, "nvme": os.path.join(store_path, f"{SEGMENT_PREFIX}@nvme-{name}")}


def _open_there(path: str) -> Segment | None:
    """Return the segment at `path` with its name locked, or None. Waits for a process that is making it."""
    with _os_errors(f"open {path}"):
        try:
            return Segment(path)
        except FileNotFoundError:
            if os.path.islink(path):
                raise StorageError(f"{path} is a symbolic link to nothing: delete it") from None
            return None


def _check_agreement(config: CachePoolConfig, there: CachePoolConfig) -> None:
    """Raise PoolMismatchError, which shows both values, if a config differs where opening can't change the pool."""
    names = ("size_bytes", "tier", "eviction_policy", "block_size")
    different = [name for name in names if getattr(config, name) != getattr(there, name)]
    if different:
        asked = ", ".join(f"{name} {getattr(config, name)}" for name in different)
        found = ", ".join(f"{name} {getattr(there, name)}" for name in different)
        raise PoolMismatchError(
            f"pool {config.name!r} is there with {found}; asked for was {asked}: use its values or delete it"
        )


def _open_segment(
    store_path: str,
    name: str,
    config: CachePoolConfig | None = None,
    *,
    create: bool = False,
    transient: bool = False,
    exclusive: bool = False,
    progress: Progress | None = None,
) -> Segment | None:
    """Return the segment, opened, or made if `create`; else None. PoolExistsError if `exclusive` and it is there."""
    check_name(name)
    if sys.platform != "linux":
        raise UnsupportedError(f"pools need Linux (open-file-description locks, {SHM_DIR}); this is {sys.platform}")
    if sys.byteorder != "little" or sys.maxsize < 1 << 32:
        raise UnsupportedError(
            f"pools need a 64-bit little-endian machine and Python; this is {os.uname().machine}, "
            f"{sys.maxsize.bit_length() + 1}-bit, {sys.byteorder}-endian"
        )
    paths = _segment_paths(store_path, name)
    new = None
    if config is not None:
        if isinstance(config.eviction_policy, EvictionPolicy):
            config = replace(config, eviction_policy=config.eviction_policy.value)
        if config.tier == "gpu":
            raise UnsupportedError(
                "tier 'gpu' is not built yet: it needs CUDA memory shared between processes; use cpu, or nvme"
            )
        for what, value, known in (
            ("tier", config.tier, list(paths)),
            ("eviction_policy", config.eviction_policy, [policy.value for policy in EvictionPolicy]),
        ):
            if value not in known:
                raise InvalidArgumentError(f"{what} {_show(value)} must be one of {', '.join(known)}")
        if config.persist_path is not None:
            if not isinstance(config.persist_path, str):
                raise InvalidArgumentError(f"persist_path {_show(config.persist_path)} must be a str")
            _expand_user(check_path(config.persist_path, "persist_path"))
        identity = os.urandom(8).hex()
        new = SegmentHeader(Geometry.of(config), config, store_path, transient, identity, config.eviction_policy)
        new.encode()
    if create:
        try:
            os.makedirs(store_path, mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot make the store directory {store_path}: {error.strerror}; choose another one "
                "(CORTEX_CACHE_DIR, store_path, --store)"
            ) from error
    elif not os.path.isdir(store_path):
        return None

    def open_existing(segment: Segment) -> bool:
        with _os_errors(f"open {segment.path}"):
            there = segment.read_live_header()
        if there is None:
            return False
        if exclusive:
            raise PoolExistsError(f"pool {name!r} exists already: delete it first, or open it")
        if config is not None:
            first, now = there.first_policy, there.config.eviction_policy  # either will do
            asked = replace(config, eviction_policy=now) if config.eviction_policy == first else config
            _check_agreement(asked, there.config)
        segment.map(there._replace(store_path=store_path))
        return True

    def take_name(path: str) -> Segment | None:
        with _os_errors(f"create {path}"), contextlib.suppress(FileExistsError):
            return None if any(map(os.path.lexists, paths.values())) else Segment(path, make=True)
        return None

    while True:
        for path in paths.values():
            segment = _open_there(path)
            if segment is not None:
                try:
                    if open_existing(segment):
                        segment.unlock_name()
                        return segment
                    segment.close()
                except BaseException:
                    segment.close()
                    raise
        if not create or new is None:
            return None
        made = _in_store(store_path, functools.partial(take_name, paths[new.config.tier]))
        if made is not None:  # else another process has taken the name: wait for it
            made.make(new, progress)
            made.unlock_name()
            return made


def _wait_for_lock(fd: int, words: memoryview) -> None:
    """Take a lock that is held. It is mostly held for a few microseconds, a tenth of the cost of falling asleep."""
    for _ in range(SPINS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            continue
    words[WAITED_FOR] = 1
    fcntl.flock(fd, fcntl.LOCK_EX)
    words[WAITED_FOR] = 0


_flock, _TRY_LOCK, _UNLOCK = fcntl.flock, fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN


class _ClosedMemory:
    """Stands for the memory of a closed pool. A call that another thread's `close` overtakes gets PoolClosedError."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        raise PoolClosedError.of(self._name)

    def __getitem__(self, index: Any) -> Any:
        raise PoolClosedError.of(self._name)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise PoolClosedError.of(self._name)


class _ViewRef(weakref.ref):  # type: ignore[type-arg]
    """A weak reference whose callback runs when the last user of a view has gone."""

    __slots__ = ("pool", "tokens")
    tokens: Sequence[int]  # that pin, or write, the values that the view shows
    pool: _Handle  # set once the handle is closed or garbage


def _try_lock(lock: Any) -> Any:
    """Return a context manager that takes an RLock if it is free; if not, the end of the block is a RuntimeError.

    Both ends are C code, so no interrupt can come between taking the lock and the block.
    """
    acquire = staticmethod(functools.partial(lock.acquire, False))
    return type("TryLock", (), {"__enter__": acquire, "__exit__": staticmethod(lock.__exit__)})()


def _array_gone(pool_ref: weakref.ref[_Handle], tokens: Sequence[int], _: weakref.ref[memoryview]) -> None:
    """Unpin a value when the last array that outlived its view has gone.

    A pin by our word ends at once, a pin by a bit only if the lock is free now. This may run inside any other code, so
    it must not wait: the next call does the rest. An interrupt in here is lost, as in any callback of a weak reference.
    So `_lend` makes a reference of its own, whose callback is C code. It runs after this one.
    """
    pool = pool_ref()
    if pool is None or pool._segment is None or pool._closing or not _own_process[0]:
        return
    pool._array_refs.pop(tokens[0], None)
    if tokens[0] == pool._pins.named:
        with contextlib.suppress(ValueError, PoolClosedError):  # another thread has just ended the session
            pool._pins.name(0)
            _new_lock().acquire()  # as in `_release_pin`
            if pool._table.state(pool._held.get(tokens[0], (0,))[0]) == CONDEMNED:
                pool._words[UNREAD] = 1
        return
    pool._due.extend(tokens)
    with contextlib.suppress(CacheError, RuntimeError), _try_lock(pool._mutex) as taken:
        if taken and not pool._is_locked and pool._segment is not None and pool._segment.can_be_locked(0):
            pool._join()


def _view_gone_after_close(ref: _ViewRef) -> None:
    """End the session of a closed handle when its last view has gone. Takes no lock: it ends like a dead process's."""
    pool = ref.pool
    pool._due.append(ref)
    if not pool._is_locked and pool._is_unused():
        pool._end_unlocked()


class _Handle:
    """A pool as one process has it open: its session, its lock, its end, and the views of its memory.

    `_index.pins` has all pins and writes of the handle, by token. Only `_locked` takes the pool's lock, to run a method
    of `Index`. `_due` has everything that an interrupt, an error or the end of an array left unsettled. The next call
    that locks settles it. After a fork the child's handles are sessions of their own, which hold nothing.
    """

    _lost = "is closed"  # for PoolClosedError; else how the handle was lost

    def _start(self, segment: Segment) -> None:
        self._segment: Segment | None = segment  # None once closed
        self._mapped = segment
        self._config = segment.header.config
        self.name = self._config.name
        self.store_path = segment.header.store_path
        self._geometry = geometry = segment.header.geometry
        self._path = segment.path
        self._identity = segment.header.identity
        self._mutex = threading.RLock()
        self._use_numbers = itertools.count()
        self._tokens = itertools.count(1, 1 << 32)  # a path uses the numbers from its token on
        self._is_locked = False
        self._closing = False
        self._view_refs: dict[int, _ViewRef] = {}
        _all_view_refs[id(self._view_refs)] = self._view_refs
        self._array_refs: dict[int, weakref.ref[memoryview]] = {}  # to the owners of views that arrays outlive
        self._pins_by_key: dict[bytes, list[int]] = {}
        self._claims: dict[int, weakref.ref[_Claimant]] = {}  # by lock byte
        self._this_thread = threading.local()  # has its _Claimant
        # To settle at the next lock: tokens of calls that were cut off by an error or interrupt; references to views
        # whose last user has gone; 0 for anything else. An except block appends to it before all else. That is one
        # call of C code, so no second interrupt comes in before it is over.
        self._due: deque[int | _ViewRef] = deque([0])  # so the first lock takes a session
        self._memory, self._words = segment.memory, segment.words
        self._policy = 0  # the header word POLICY, as it was last seen
        self._is_lock_free = LOADS_IN_ORDER and not geometry.num_recorded  # a recorded access needs the lock
        policy = EvictionPolicy(self._config.eviction_policy)
        ghosts = segment.map_ghosts() if policy is EvictionPolicy.ADAPTIVE else None
        self._index = Index(segment, geometry, policy, ghosts, segment.is_alive)
        self._table, self._pins, self._uses = self._index.table, self._index.pins, self._index.uses
        self._held = self._pins.held  # token -> slots; it outlives the memory
        self._own_names = {*self.__dict__, "_own_names", "_lost"}
        _open_pools.add(self)
        segment.is_owned = True
        try:
            self._join()
            self._settle_dead()
        except BaseException:
            self._shut(wait=True)
            raise

    # --- the lock ----------------------------------------------------------------------------------------------------

    def _locked(
        self, work: Callable[[Index, Unpack[_Args]], _R], *args: Unpack[_Args], after_close: bool = False
    ) -> _R:
        """Run a method of `Index` under the pool's lock, once everything left over is settled; return its result.

        PoolClosedError if the pool is closed or closing. With `after_close`, for calls that end something, only if it
        is closed. A KeyboardInterrupt may arrive after any call, but leaves no lock held: `with` on an RLock is C code,
        and `flock` is inside the try block. Unlocking a file that is not locked does no harm. A wrapper of our own
        around both, used with `with`, would have a gap at the first instruction of its `__exit__`.
        """
        if not _own_process[0]:
            _adopt_pools()
        with self._mutex:
            if self._is_locked:
                raise CacheError(
                    f"pool {self.name!r} was called by a signal handler that interrupted a call to it: try later"
                )
            fd = -1
            try:
                self._is_locked = True  # to the very end: a signal handler that came in would unlock for us
                segment = self._segment
                if segment is None or (self._closing and not after_close):
                    raise PoolClosedError.of(self.name, self._lost)
                fd, words = segment.fd, self._words
                try:
                    _flock(fd, _TRY_LOCK)
                except BlockingIOError:
                    _wait_for_lock(fd, segment.words)
                if self._due or words[DIRTY] or words[POLICY] != self._policy:
                    self._put_in_order(segment)
                if words[USED]:
                    self._index.catch_up()
                return work(self._index, *args)
            except CacheError:
                raise
            except (IndexError, ValueError, OverflowError) as error:  # another program has written into the index
                self._due.append(0)
                self._words[DIRTY] = 1
                raise CorruptionError(
                    f"the index of pool {self.name!r} is damaged; the next call rebuilds it from the records: try again"
                ) from error
            except BaseException:
                self._due.append(0)
                raise
            finally:
                try:
                    if fd >= 0:
                        _flock(fd, _UNLOCK)
                finally:
                    self._is_locked = False

    def _put_in_order(self, segment: Segment) -> None:
        """Settle calls that were cut off, here or in processes that died. The caller must hold the lock."""
        index, words = self._index, self._words
        due = [self._due[number] for number in range(len(self._due))]  # others append to it meanwhile
        if segment.session < 0:
            segment.note_boot_locked()
        index.begin_anew()
        if words[POLICY] != self._policy:
            self._follow_policy(segment)
        if segment.session < 0:
            self._enter(segment)
        else:
            cut_off = {item for item in due if isinstance(item, int)}
            if cut_off:
                index.settle_own(cut_off)
                for token in cut_off:
                    self._view_refs.pop(token, None)
        for ref in due:
            if isinstance(ref, _ViewRef):
                if not self._pins.writing.isdisjoint(ref.tokens):  # an interrupt kept `__exit__` from running
                    index.settle_own(ref.tokens)
                index.unpin(*ref.tokens)
                self._view_refs.pop(ref.tokens[0], None)
        if words[DIRTY]:
            index.repair()
        for _ in due:
            self._due.popleft()

    def _enter(self, segment: Segment) -> None:
        """Take a free session; StorageError if there is none. The caller must hold the lock."""
        index = self._index
        for is_last in (False, True):
            taken = index.pins.sessions()
            for number in range(MAX_SESSIONS):
                if number not in taken and segment.lock_session(number):
                    index.pins.enter(number, os.getpid())
                    index.act_for(number)  # first: after a fork it still acts for the parent
                    segment.session = number
                    return
            if is_last or not index.reclaim_dead():
                raise StorageError(
                    f"{segment.path} is open {MAX_SESSIONS} times, the limit: close a handle or use one per process"
                )

    def _follow_policy(self, segment: Segment) -> None:
        """Use the policy that the header names: `set_eviction_policy` has changed it, here or in another process."""
        word = self._words[POLICY]
        policy = _policy_now(self._config, word)
        ghosts = segment.map_ghosts() if policy is EvictionPolicy.ADAPTIVE else None
        self._index.use_policy(policy, ghosts)
        self._config = replace(self._config, eviction_policy=policy.value)
        self._policy = word

    def _join(self) -> None:
        """Take the lock once, to settle everything in `_due`, and to take a session if this handle has none."""
        self._locked(Index.count, after_close=True)

    def _settle_dead(self) -> None:
        """Free everything that dead sessions hold: a scan of all used slots, in steps, if there are dead sessions."""
        dead = self._locked(Index.dead_sessions)
        if dead:
            for among in self._ranges():
                self._locked(Index.settle_dead_again, dead, among, False)
            self._locked(Index.settle_dead_again, dead, range(0), True)

    def _give_way(self) -> None:
        """Pause between two steps, so that others get the lock; not for long if a waiter was stopped or killed."""
        time.sleep(STEP_PAUSE)
        for _ in range(MAX_PAUSES):
            if not self._word(WAITED_FOR):
                return
            time.sleep(STEP_PAUSE)
        self._locked(Index.forget_waiter)

    def _sweep(self, work: Callable[[Index, int], _R]) -> list[_R]:
        """Return the result of `work` for the slot of each entry: a scan under the lock, which others get in between.

        An entry that is there throughout is seen once, also if it is overwritten. The results are of different moments.
        """
        found: list[_R] = []
        chain, end = 0, self._geometry.num_slots
        while chain < end:
            if chain:
                self._give_way()
            some, chain = self._locked(Index.sweep, chain, work)
            found += some
        return found

    def _ranges(self) -> Iterator[range]:
        """Yield all slots that were ever used, in ranges for one lock each; others get the lock in between."""
        end = self._locked(Index.num_used) + 1
        for begin in range(1, end, SLOTS_A_STEP):
            if begin > 1:
                self._give_way()
            yield range(begin, min(begin + SLOTS_A_STEP, end))

    def _word(self, number: int) -> int:
        """Return a word of the header, without the lock; PoolClosedError if another thread has just closed the pool."""
        try:
            return int(self._words[number])
        except ValueError:
            raise PoolClosedError.of(self.name) from None

    def _check_open(self) -> None:
        if self._segment is None or self._closing:
            raise PoolClosedError.of(self.name, self._lost)

    # --- reading and writing ------------------------------------------------------------------------------------------

    def _may_read_unlocked(self) -> bool:
        """Return True if this machine allows reads without the lock, and this handle has nothing to settle first."""
        return not (self._due or self._closing) and LOADS_IN_ORDER and bool(_own_process[0])

    def _note_late(self, use: int) -> None:
        """Count all noted uses under the lock, then note one that has found no free place."""
        with contextlib.suppress(CacheError, IndexError, ValueError):  # a signal handler inside a call; closed; forked
            self._locked(Index.catch_up)
            self._uses.note(use, next(self._use_numbers))

    def _count_miss(self) -> bool:
        """Count a miss without the lock; return False if that needs the lock, as in a pool that records accesses."""
        with self._mutex:  # not a lock of the parent's: the caller has just looked
            if self._segment is None or self._closing or self._due or self._is_locked or not self._is_lock_free:
                return False
            try:
                self._uses.count_miss()
            except (PoolClosedError, IndexError, ValueError):  # a signal handler has just closed the pool, or forked
                return False
            return True

    def _open_view(self, key: bytes, token: int, counts: bool, is_writable: bool) -> memoryview | None:
        """Return a view of an entry, pinned as `token`, or None. Takes the lock if the session's word is in use."""
        if self._is_lock_free and _own_process[0]:
            with self._mutex:  # other threads use the same word to pin
                if not (self._pins.named or self._is_locked or self._due or self._closing):
                    try:
                        self._is_locked = True  # a signal handler must not use the word, nor look at half a pin
                        use, view, is_pinned = self._pin_unlocked(key, token, is_writable)
                    finally:
                        self._is_locked = False
                    if is_pinned:
                        try:
                            is_noted = not counts or self._uses.note(use, next(self._use_numbers))
                        except (IndexError, ValueError):  # a signal handler has just forked: this is the child
                            is_noted = True
                        if not is_noted:
                            self._note_late(use)
                        return view
                    if view is not None:
                        self._close_view(token, view, cast(memoryview, view.obj))
                    elif use == 0 and (not counts or self._count_miss()):
                        return None
        place = self._locked(Index.hold, key, token, counts)
        if place is None:
            return None
        return self._lend_one(self._mapped.buffer if is_writable else self._mapped.read_only, *place, token)

    def _pin_unlocked(self, key: bytes, token: int, is_writable: bool) -> tuple[int, memoryview | None, bool]:
        """Pin an entry by the session's word; return (its use, a view, True if the view is valid).

        It is valid if the use is still current. The use is 0 if there is no such entry, -1 if that needs the lock.
        """
        segment, table, words, pins = self._segment, self._table, self._words, self._pins
        try:
            if segment is None:
                return -1, None, False
            changes, is_dirty = words[CHANGES], words[DIRTY]
            use, offset, size = table.find_use(key)
            if use <= 0:
                is_missing = not (use or is_dirty or words[DIRTY]) and words[CHANGES] == changes
                return (0 if is_missing else -1), None, False
            view = self._lend_one(segment.buffer if is_writable else segment.read_only, offset, size, token)
            slot = use & 0xFFFFFFFF
            pins.held[token] = (slot,)
            pins.named = token
            pins.name(slot)
            _new_lock().acquire()  # see `Index._begin_change`
            return use, view, table.is_current(use)
        except (PoolClosedError, IndexError, ValueError):
            self._held.pop(token, None)
            if pins.named == token:
                pins.named = 0
            return -1, None, False

    def _patiently(self, attempt: Callable[[], _R], size: int, num_own: int = 0) -> _R:
        """Repeat an attempt to store that finds no space, while copies of others may be in the way; return its result.

        Copies take microseconds to milliseconds. A pin that lasts longer is no copy, so the attempt fails. It does not
        wait for the `num_own` values that the same call is storing.
        """
        started, pause = time.monotonic(), 1e-4
        result = attempt()
        if not result and self._geometry.blocks_for(size) <= self._geometry.num_blocks:
            while not result and self._segment is not None:
                others_write = self._word(NUM_BUSY) > num_own
                if time.monotonic() - started > (PATIENCE_FOR_WRITES if others_write else PATIENCE_FOR_PINS):
                    break
                time.sleep(pause)
                pause = min(2 * pause, 0.005)
                result = attempt()
        return result

    def _reserve(self, key: bytes, size: int, meta: EntryMeta, token: int) -> tuple[int, int] | None:
        """Reserve a place for a value as `token`; return its (offset, size), or None if it can't be stored."""
        place = self._patiently(lambda: self._locked(Index.reserve, key, size, meta, token), size)
        if place is not None:
            _map_pages(self._memory, *place)
        return place

    def _zero(self, offset: int, size: int) -> None:
        for at in range(offset, offset + size, COPY_CHUNK):
            end = min(at + COPY_CHUNK, offset + size)
            self._memory[at:end] = bytes(end - at)

    def _decode(self, copy: bytes) -> CacheEntry:
        """Return the entry that a copy by `Index.copy` describes."""
        key, prefix, tensor, start, size, created, accessed, count, priority, tokens, layer = read_copy(copy)
        offset = self._geometry.data_offset + start * self._geometry.block_size
        entry = CacheEntry(key, prefix, offset, size, created, accessed, count, priority, tokens, layer)
        if tensor:
            entry.framework, entry.dtype, shape, entry.raw_size, entry.encoding = split_tensor(tensor)
            entry.shape = tuple(map(int, shape.split()))
        return entry

    # --- views -------------------------------------------------------------------------------------------------------

    def _lend(
        self, memory: memoryview, places: Iterable[tuple[int, int]], tokens: Sequence[int]
    ) -> tuple[list[memoryview], memoryview]:
        """Return (views for the caller, their owner). When their last user has gone, the next call unpins.

        All slices of one memoryview count as one buffer, and an array made from a slice holds just that buffer. So a
        PickleBuffer (which pickles nothing) gives the views a buffer of their own, with another memoryview as its
        owner. The owner can be released, or dies, when the views and everything made from them have gone.
        """
        try:
            owner = memory[:]
        except ValueError:  # another thread has just closed the pool
            raise PoolClosedError.of(self.name) from None
        ref = _ViewRef(owner, self._due.append)
        ref.tokens = tokens
        self._view_refs[tokens[0]] = ref
        whole = memoryview(PickleBuffer(owner))
        return [whole[offset : offset + size] for offset, size in places], owner

    def _lend_one(self, memory: memoryview, offset: int, size: int, token: int) -> memoryview:
        """Return one view, made as by `_lend`; its owner is its `obj`."""
        owner = memory[offset : offset + size]
        ref = _ViewRef(owner, self._due.append)
        ref.tokens = (token,)
        self._view_refs[token] = ref
        return memoryview(PickleBuffer(owner))

    def _close_view(self, token: int, view: memoryview, owner: memoryview) -> None:
        """End a view and its pin. Arrays that were made from it, and live on, keep the pin."""
        if not _own_process[0]:
            _adopt_pools()
        try:
            view.release()
            owner.release()
        except BufferError:  # arrays that were made from it live on
            self._outlast((token,), owner)
            return
        if token in self._held:
            self._release_pin(token)
        self._view_refs.pop(token, None)

    def _outlast(self, tokens: Sequence[int], owner: memoryview) -> None:
        """Keep all that these tokens hold for as long as arrays made from their views live."""
        with self._mutex:
            if self._closing:
                self._outlive()
            else:
                gone = functools.partial(_array_gone, weakref.ref(self), tokens)
                self._array_refs[tokens[0]] = weakref.ref(owner, gone)

    def _cut_off(self, tokens: Sequence[int], views: Iterable[memoryview], owner: memoryview) -> None:
        """Settle all that tokens hold, after an error at the end of their block, unless arrays still show it.

        If a second interrupt cuts this short, the end of `owner` settles the rest: see `_lend`.
        """
        if _take_back(views, owner):
            self._due.extend(tokens)
            self._settle_due()
        else:
            self._outlast(tokens, owner)

    def _release_pin(self, token: int) -> None:
        """End a pin: without the lock if it is by the session's word. The caller must not hold the lock."""
        try:
            with self._mutex:  # to the end: another thread that closes the pool must not come in between
                pins = self._pins
                if token == pins.named and not self._is_locked:
                    (slot,) = pins.held[token]
                    before, pins.ending = pins.ending, token  # if a callback settles now, this is half a pin
                    pins.name(0)
                    pins.named = 0  # now: a signal handler may have opened a view just before
                    _new_lock().acquire()  # the state is read last, as it may just change: see `Index._drop`
                    is_condemned = self._table.state(slot) == CONDEMNED
                    del pins.held[token]  # not before: a signal handler that closed the pool would unmap it
                    pins.ending = before
                    if is_condemned:
                        self._locked(Index.free_unread, slot, after_close=True)
                else:
                    self._locked(Index.unpin, token, after_close=True)
        except BaseException:
            self._due.append(token)
            self._settle_due()
            raise
        if self._closing:
            self._close_if_unused()

    def _settle_due(self) -> None:
        """Settle everything in `_due` after an error or interrupt. Inside a locked call, leave it to the next call."""
        if self._segment is not None and not self._is_locked:
            self._join()
            if self._closing:
                self._close_if_unused()

    def _unpin_all(self) -> None:
        for tokens in list(self._pins_by_key.values()):
            for token in tokens:
                if token in self._held:  # else an interrupt came before it was a pin
                    self._release_pin(token)
        self._pins_by_key.clear()

    # --- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close this handle and end its pins; a second call does nothing.

        Views in use stay readable, and their entries pinned, until they end. A pool that no `CacheStore` made
        disappears with its last handle. CacheError in a signal handler that has interrupted a call to this handle.
        """
        if not _own_process[0]:
            _adopt_pools()
        with self._mutex:
            if self._segment is None:
                if self in _open_pools:  # an interrupt has cut the first call short
                    self._shut(wait=True)
                return
            if self._is_locked:
                raise CacheError(f"pool {self.name!r} was closed by a signal handler that interrupted a call to it")
            self._closing = True
            self._end_claims(list(self._claims))
            self._unpin_all()
            if self._due:
                self._join()
            self._close_if_unused()
            if self._segment is not None and not self._outlive():
                self._close_if_unused()

    def _outlive(self) -> bool:
        """Keep this handle until the last of its views has gone; return False if none is left: then it must be ended.

        From now on the end of each view checks if it was the last one.
        """
        for token, ref in list(self._view_refs.items()):
            owner = ref()
            if owner is not None:
                last = _ViewRef(owner, _view_gone_after_close)
                last.tokens, last.pool = ref.tokens, self
                self._view_refs[token] = last
                _lent_out.add(self)
        return self in _lent_out

    def __del__(self) -> None:
        # Takes no lock: this may run inside a call to another pool, where waiting for a lock could last for ever.
        if getattr(self, "_segment", None) is None or sys.is_finalizing():  # then modules may be gone
            return
        self._closing = True
        if _own_process[0]:
            self._end_claims(list(self._claims))
        lent = {token for ref in self._view_refs.values() if ref() is not None for token in ref.tokens}
        for token in self._held.keys() - lent:
            del self._held[token]
        if self._outlive():
            for name in self.__dict__.keys() - self._own_names:  # set by a caller; may lead back to the views
                del self.__dict__[name]
        else:
            self._end_unlocked()

    def _end(self) -> None:
        """Close at the end of the process. Leave memory that a daemon thread still uses to the kernel.

        Does not wait long for a thread that is stuck in a call, or for a stopped process that has the lock. All that
        this handle holds then stays held, and mapped, until the process is dead.
        """
        if not _own_process[0]:
            _adopt_pools()
        self._closing = True  # calls from now on raise PoolClosedError
        self._array_refs.clear()  # the callbacks of these may run when modules are gone
        if not self._mutex.acquire(timeout=ENDING_PATIENCE):
            return
        try:
            if self._segment is None or self._is_locked:
                return
            if self._segment.can_be_locked(ENDING_PATIENCE):
                self._unpin_all()
                self._close_if_unused()
            elif not self._held:
                self._end_unlocked()
            if self._segment is not None and self._segment.header.transient:
                self._segment.withdraw()
                self._remove_name(wait=False, only_if_unused=True)
        finally:
            self._mutex.release()

    def _close_if_unused(self) -> None:
        """Do the second half of `close` if no view and no copy under way needs the memory any more."""
        with self._mutex:
            if self._closing and self._segment is not None and not self._is_locked and self._is_unused():
                self._locked(Index.leave, self._segment.session, after_close=True)
                self._shut(wait=True)

    def _is_unused(self) -> bool:
        """Return True if all that this handle holds are views whose last user has gone."""
        due = [self._due[number] for number in range(len(self._due))]
        gone = {token for ref in due if isinstance(ref, _ViewRef) for token in ref.tokens}
        return gone.issuperset(list(self._held))

    def _end_unlocked(self) -> None:
        """End the session without a lock. Others see from its lock byte that it is over, as for a dead process."""
        if _own_process[0]:
            self._shut(wait=False)
        else:
            _adopt_pools()  # which ends a closed handle of the parent

    def _shut(self, wait: bool) -> None:
        """Close the segment, drop all that refers to it, remove an unused transient pool; `wait`: for its name lock."""
        segment, self._segment = self._mapped, None
        _lent_out.discard(self)
        self._view_refs.clear()
        _all_view_refs.pop(id(self._view_refs), None)
        gone: Any = _ClosedMemory(self.name)  # whatever refers to the memory keeps it mapped
        for name in vars(self._index) if isinstance(self._index, Index) else ():  # frames of an error may refer to it
            setattr(self._index, name, gone)
        self._index = self._table = self._pins = self._uses = self._memory = self._words = gone
        segment.close()
        if segment.header.transient:
            with contextlib.suppress(CacheError):  # the store is gone, or busy: the next opener or `prune` removes it
                self._remove_name(wait, only_if_unused=True)
        _open_pools.discard(self)

    def _end_claims(self, claims: Iterable[int]) -> None:
        """Unlock these bytes, so that others can claim their keys."""
        for byte in claims:
            with contextlib.suppress(OSError):  # another thread, or a signal handler, has just closed the pool
                _record_lock(self._mapped.fd, fcntl.F_UNLCK, byte, fcntl.F_OFD_SETLK)
            self._claims.pop(byte, None)

    def unlink(self) -> None:
        """Delete the pool, also from a closed handle. Other handles keep its memory until they are closed."""
        self._remove_name(wait=True)

    def _remove_name(self, wait: bool, only_if_unused: bool = False) -> None:
        """Unlink the file of this pool, if it is still there; `wait`: for the lock of its name."""

        def is_ours(header: SegmentHeader | None) -> bool:
            return header is not None and header.identity == self._identity  # not a later pool of that name

        path = self._path
        if self._segment is not None and not os.path.lexists(path):
            with contextlib.suppress(OSError):  # its directory was renamed meanwhile
                path = os.readlink(f"/proc/self/fd/{self._segment.fd}")
        with _os_errors(f"delete {path}"), contextlib.suppress(FileNotFoundError):
            if not is_ours(read_header(path)):  # never waits for the maker of a later one
                return
            with Segment(path, wait=wait) as segment:
                if is_ours(read_header(path)) and not (only_if_unused and segment.is_in_use()):
                    os.unlink(path)

    def _after_fork(self) -> None:
        """Give a forked child locks and a session of its own, and none of the parent's views, pins and writes."""
        segment = self._segment
        self._mutex = threading.RLock()
        self._is_locked = False
        for mapping in (self._held, self._view_refs, self._array_refs, self._pins_by_key, self._claims):
            mapping.clear()
        self._due = deque([0])
        _lent_out.discard(self)
        if segment is None:
            return
        self._pins.clear()
        self._index.act_for(NO_SESSION)  # a call that was interrupted by the fork goes on in the child
        if self._closing:  # the views that it waits for are the parent's
            self._shut(wait=False)
        else:
            try:
                segment.reopen_after_fork()
            except OSError as error:  # out of file descriptors, no /proc, no permission: closed, not without locks
                self._lost = f"could not get locks of its own in this forked child ({error.strerror})"
                self._shut(wait=False)


class _View:
    """Context manager giving a pinned view of one value, read-only unless `is_writable`."""

    __slots__ = ("_counts", "_is_writable", "_key", "_owner", "_pool", "_view", "token")

    def __init__(self, pool: _Handle, key: bytes, counts: bool = True, is_writable: bool = False) -> None:
        self._pool = pool
        self._key = key
        self._counts = counts
        self._is_writable = is_writable
        self.token = 0
        self._view: memoryview | None = None

    def __enter__(self) -> memoryview | None:
        pool = self._pool
        self.token = token = next(pool._tokens)
        try:
            self._view = view = pool._open_view(self._key, token, self._counts, self._is_writable)
            if view is not None:
                self._owner: Any = view.obj  # now: a view that is released inside the block has no `obj`
        except BaseException:
            pool._due.append(token)
            pool._settle_due()
            raise
        return view

    def __exit__(self, *_: object) -> None:
        view = self._view
        if view is not None:
            owner, self._view, self._owner = self._owner, None, None
            self._pool._close_view(self.token, view, owner)


class _TensorView(contextlib.AbstractContextManager[Any]):
    """Context manager giving a pinned array over one value."""

    def __init__(self, pool: _Handle, key: bytes, framework: str | None) -> None:
        self._reader = _View(pool, key, is_writable=True)  # torch warns of memory that it can't write to
        self._pool = pool
        self._framework = framework

    def __enter__(self) -> Any:
        view = self._reader.__enter__()
        if view is None:
            return None
        try:
            entry = self._pool._decode(*self._pool._locked(Index.describe_held, self._reader.token))
            return as_tensor(view, entry.dtype, entry.shape, self._framework or entry.framework)
        except BaseException:
            del view
            self._reader.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._reader.__exit__()


class _Peek(contextlib.AbstractContextManager["tuple[bytes, memoryview] | None"]):
    """Context manager giving (copy of an entry, its value in place, pinned); it counts no use."""

    def __init__(self, pool: _Handle, key: str) -> None:
        self._reader = _View(pool, encode_key(key), counts=False)
        self._pool = pool

    def __enter__(self) -> tuple[bytes, memoryview] | None:
        view = self._reader.__enter__()
        if view is None:
            return None
        try:
            return self._pool._locked(Index.describe_held, self._reader.token)[0], view
        except BaseException:
            self._reader.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._reader.__exit__()


class _PoolReader:
    """The values of a pool, for `write_snapshot`."""

    def __init__(self, pool: _Handle) -> None:
        self._pool = pool

    def small_values(self, copies: list[bytes]) -> list[tuple[bytes, bytes | None]]:
        self._pool._give_way()
        return list(itertools.zip_longest(*self._pool._locked(Index.copy_small, copies)))

    def value(self, key: str) -> _Peek:
        return _Peek(self._pool, key)


class _Reservation(contextlib.AbstractContextManager["memoryview | None"]):
    """Context manager giving a writable view of a value, which exists from the clean end of the block on."""

    def __init__(self, pool: _Handle, key: bytes, size: int, meta: EntryMeta, saved: Saved | None = None) -> None:
        """With `saved`, the value's history in a snapshot, the value is not zeroed: the caller fills it whole."""
        self._pool = pool
        self._key = key
        self._size = size
        self._meta = meta
        self._saved = saved
        self._token = 0
        self._view: memoryview | None = None

    def __enter__(self) -> memoryview | None:
        pool = self._pool
        self._token = next(pool._tokens)
        try:
            place = pool._reserve(self._key, self._size, self._meta, self._token)
            if place is not None:
                self._view = pool._lend_one(pool._mapped.buffer, *place, self._token)
                self._owner: Any = self._view.obj
                if self._saved is None:
                    pool._zero(*place)
        except BaseException:
            pool._due.append(self._token)
            pool._settle_due()
            raise
        return self._view

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        view, self._view = self._view, None
        pool, token = self._pool, self._token
        if view is None:
            return
        owner, self._owner = self._owner, None
        try:
            if not _own_process[0]:
                _adopt_pools()
            is_unused = _take_back((view,), owner)  # else arrays that were made from it keep what it shows
            if token not in pool._held:
                pass  # this is a forked child, the value is its parent's
            elif error_type is None:
                pool._locked(Index.commit, token, self._saved, not is_unused, False, after_close=True)
            elif is_unused:
                pool._locked(Index.abandon, (token,), after_close=True)
            if is_unused:
                pool._view_refs.pop(token, None)
            else:
                pool._outlast((token,), owner)
        except BaseException:
            pool._cut_off((token,), (view,), owner)
            raise
        if pool._closing:
            pool._close_if_unused()


def _parts(keys: Sequence[_R], length: int) -> Iterator[Sequence[_R]]:
    """Yield a path in parts of `length` keys, root first."""
    for begin in range(0, len(keys), length):
        yield keys[begin : begin + length]


def _parts_from_the_end(uses: Sequence[int], keys: Sequence[bytes]) -> Iterator[tuple[Sequence[int], Sequence[bytes]]]:
    """Yield (uses, keys) of each part of a path that was found, deepest part first; there may be one more key."""
    for begin in reversed(range(0, len(keys), ENTRIES_A_STEP)):
        end = begin + ENTRIES_A_STEP
        yield uses[begin:end], keys[begin:end]


class _Claimant:
    """Stands for one thread with one handle, and is freed with either of them."""


def _claimant_gone(pool_ref: weakref.ref[_Handle], byte: int, ref: weakref.ref[_Claimant]) -> None:
    """End a claim whose thread has ended."""
    pool = pool_ref()
    if pool is not None and pool._segment is not None and _own_process[0] and pool._claims.get(byte) is ref:
        pool._end_claims((byte,))


def _claim_byte(key: bytes) -> int:
    """Return the lock byte that a claim of a key takes."""
    return CLAIM_BYTE + (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 4)


class PathViews(list["memoryview"]):
    """The values of a path in place, root first: a list of pinned memoryviews, from `KVCachePool.view_path`."""

    def __init__(self, pool: _Paths, tokens: Sequence[int]) -> None:
        self._pool = pool
        self._tokens = tokens

    @functools.cached_property
    def entries(self) -> list[CacheEntry]:
        """The CacheEntry of each value. Ask for it inside the block: it takes the lock once for each 256 entries."""
        return [self._pool._decode(copy) for copy in self._copy_entries()[: len(self)]]

    def _copy_entries(self) -> list[bytes]:
        """Return copies of the pinned entries, for `read_copy`."""
        copies: list[bytes] = []
        for token in self._pool._each_part(self._tokens):
            copies += self._pool._locked(Index.describe_held, token)
        return copies


class _PathReader(contextlib.AbstractContextManager[PathViews]):
    """Context manager giving pinned read-only views of the leading run of a path.

    It is no generator: an exception that passes through a generator keeps its frames, and so its views, in a cycle.
    No loop stands inside a try block here. In CPython 3.12 and 3.13 a handler misses an interrupt at the jump back of
    a loop that ends with an `if`, or of a comprehension with one.
    """

    def __init__(self, pool: _Paths, keys: list[bytes], verify: bool) -> None:
        self._pool = pool
        self._keys = keys
        self._verify = verify

    def __enter__(self) -> PathViews:
        pool = self._pool
        first = next(pool._tokens)  # one token for each part
        self._tokens = tokens = range(first, first + max(-(-len(self._keys) // ENTRIES_A_STEP), 1))
        self._views = views = PathViews(pool, tokens)
        try:
            places = self._pin()
            self._lent, self._owner = pool._lend(pool._mapped.read_only, places, tokens)
            views += self._lent  # the caller gets this list, and may change it
            if self._verify:
                self._drop_damaged()
        except BaseException:
            pool._due.extend(tokens)
            pool._settle_due()
            raise
        return views

    def _pin(self) -> list[tuple[int, int]]:
        """Pin the path and count its uses; return (offset, size) of each value."""
        pool, keys = self._pool, self._keys
        uses = pool._find_path(keys)
        if len(self._tokens) == 1:
            places = pool._locked(Index.open_path, uses, keys, self._tokens[0])
        else:
            places = self._open_long(uses)
        pool._record_path(keys, len(places))
        return places

    def _open_long(self, uses: list[int]) -> list[tuple[int, int]]:
        """Pin a path of several parts, root first, then count its uses, the deepest part first."""
        pool, keys = self._pool, self._keys
        places: list[tuple[int, int]] = []
        begins = pool._each_part(range(0, len(uses), ENTRIES_A_STEP))
        for token, begin in zip(self._tokens, begins, strict=False):
            some = slice(begin, begin + ENTRIES_A_STEP)
            places += pool._locked(Index.hold_path, uses[some], keys[some], token)
            if len(places) < min(some.stop, len(uses)):  # it has become shorter meanwhile
                break
        least = NO_LEAST
        parts = _parts_from_the_end(uses[: len(places)], keys[: len(places) + 1])
        for some_uses, some_keys in pool._each_part(parts):
            least = pool._locked(Index.use_path, some_uses, some_keys, least)
        return places

    def _drop_damaged(self) -> None:
        """Delete the first entry that does not match its checksum, and end the path there. Reads every value."""
        for number, (view, copy) in enumerate(zip(self._views, self._views._copy_entries(), strict=True)):
            checksum = copied_checksum(copy)
            if checksum and zlib.crc32(view) != checksum:
                self._pool._locked(Index.delete_slot, copied_key(copy).encode(), COPY_SIZES.unpack_from(copy)[0])
                del self._views[number:]
                return

    def __exit__(self, *_: object) -> None:
        try:
            self._end()
        except BaseException:
            self._pool._cut_off(self._tokens, self._lent, self._owner)
            raise
        if self._pool._closing:
            self._pool._close_if_unused()

    def _end(self) -> None:
        """Unpin the values now, or once no array shows them any more."""
        pool, tokens, owner = self._pool, self._tokens, self._owner
        if not _own_process[0]:
            _adopt_pools()
        if _take_back(self._lent, owner):
            for token in pool._each_part(tokens):  # a lock each
                if token in pool._held:  # else there was no such part, or this is a forked child
                    pool._locked(Index.unpin, token, after_close=True)
            pool._view_refs.pop(tokens[0], None)
        else:
            pool._outlast(tokens, owner)


class _SharedReader(_PathReader):
    """Context manager giving read-only views of values that another process has pinned: its keys are tickets."""

    def __init__(self, pool: _Paths, session: int, tickets: list[bytes]) -> None:
        super().__init__(pool, tickets, verify=False)
        self._session = session

    def _pin(self) -> list[tuple[int, int]]:
        places: list[tuple[int, int]] = []
        for token, some in zip(self._tokens, self._pool._each_part(_parts(self._keys, ENTRIES_A_STEP)), strict=False):
            places += self._pool._locked(Index.hold_shared, self._session, some, token)
        return places


class _PathWriter(contextlib.AbstractContextManager["list[memoryview | None]"]):
    """Context manager giving writable views of the missing values of a path, which exist from its clean end on."""

    def __init__(
        self,
        pool: _Paths,
        keys: list[bytes],
        sizes: list[int],
        metas: list[EntryMeta],
        zero: bool,
        checksums: bool,
    ) -> None:
        self._pool = pool
        self._keys = keys
        self._sizes = sizes
        self._metas = metas
        self._zero = zero
        self._checksums = checksums

    def __enter__(self) -> list[memoryview | None]:
        self._token = next(self._pool._tokens)
        self._places: list[tuple[int, int] | None] = []
        try:
            return self._open()  # a function of its own: see `_PathReader`
        except BaseException:
            self._pool._due.extend(
                range(self._token, self._token + len(self._keys))
            )  # all that a cut-off call may hold
            self._pool._settle_due()
            raise

    def _open(self) -> list[memoryview | None]:
        """Reserve the missing values, pin the others; return a view, or None, for each."""
        pool, keys, sizes, metas, places = self._pool, self._keys, self._sizes, self._metas, self._places
        first = self._token
        so_far: PathSoFar | None = None

        def reserve() -> list[tuple[int, int] | None]:
            nonlocal so_far
            begin = len(places)
            some = slice(begin, begin + KEYS_A_LOOK)
            token = first + begin
            before = so_far if places else None  # None: also for a first part that is tried once more
            part = keys[some], sizes[some], metas[some]
            found, so_far = pool._locked(Index.reserve_path, *part, token, before, keys[begin - 1] if begin else b"")
            return found

        while len(places) < len(keys):
            if places and pool._word(WAITED_FOR):
                pool._give_way()
            num_own = sum(place is not None for place in places)
            found = pool._patiently(reserve, sizes[len(places)], num_own)
            places += found
            if not found:
                break
        self._changes = so_far[1] if so_far else None
        fresh = [place for place in places if place is not None]
        for place in fresh:
            _map_pages(pool._memory, *place)
        self._lent, self._owner = pool._lend(pool._mapped.buffer, fresh, self._tokens())
        for place in fresh if self._zero else ():
            pool._zero(*place)
        views = iter(self._lent)
        return [None if place is None else next(views) for place in places]

    def _tokens(self) -> range:
        """Return the tokens that write or pin something, at least one."""
        return range(self._token, self._token + max(len(self._places), 1))

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            self._end(error_type is None)
        except BaseException:
            self._pool._cut_off(self._tokens(), self._lent, self._owner)
            raise
        if self._pool._closing:
            self._pool._close_if_unused()

    def _end(self, is_done: bool) -> None:
        """Commit the new values if `is_done`, else free them; unpin the others."""
        pool, owner, first, tokens = self._pool, self._owner, self._token, self._tokens()
        if not _own_process[0]:
            _adopt_pools()
        written = {number for number, place in enumerate(self._places, first) if place is not None}
        sums = self._sum() if self._checksums and is_done else [0] * len(written)
        is_unused = _take_back(self._lent, owner)  # else arrays keep all that is new
        is_ours = any(token in pool._held for token in tokens)  # else this is a forked child
        if is_ours and is_done:
            self._commit(dict(zip(sorted(written), sums, strict=True)), () if is_unused else written)
        elif is_ours:
            for some in pool._each_part(_parts(tokens, KEYS_A_LOOK)):
                ended = [token for token in some if is_unused or token not in written]
                pool._locked(Index.abandon, ended, after_close=True)
        if is_unused:
            pool._view_refs.pop(first, None)
        else:
            pool._outlast(tokens, owner)

    def _sum(self) -> list[int]:
        """Return the CRC-32 of each value that was written."""
        try:
            return [zlib.crc32(view) for view in self._lent]
        except ValueError:
            raise InvalidArgumentError("a view of the path was released inside the block: it has no checksum") from None

    def _commit(self, checksums: dict[int, int], kept: Container[int]) -> None:
        """Commit the new values, `checksums` being token -> CRC-32, and end all pins but those `kept`."""
        tokens, so_far = range(self._token, self._token + len(self._places)), (NO_LEAST, self._changes)
        for some in self._pool._each_part(reversed(list(_parts(tokens, KEYS_A_LOOK)))):
            so_far = self._pool._locked(Index.commit_path, some, checksums, kept, *so_far, after_close=True)


class _Entries(Mapping[str, CacheEntry]):
    """The entries of a pool as a mapping. Reading it changes neither the order of eviction nor the statistics."""

    def __init__(self, pool: KVCachePool) -> None:
        self._pool = pool

    def __getitem__(self, key: str) -> CacheEntry:
        entry = self._pool._describe(encode_key(key))
        if entry is None:
            raise KeyError(key)
        return entry

    def __contains__(self, key: object) -> bool:
        return key in self._pool

    def __iter__(self) -> Iterator[str]:
        return iter([entry.key for entry in self._pool._describe_all()])

    def __len__(self) -> int:
        return self._pool._locked(Index.count)

    def values(self) -> Any:
        return self._pool._describe_all()

    def items(self) -> Any:
        return [(entry.key, entry) for entry in self._pool._describe_all()]


class _Paths(_Handle):
    """The methods of a pool about the blocks of one prompt, root first; a path ends at the first missing one.

    A path is found without the lock. Each part is pinned, planned or committed under one lock, and copied outside it.
    """

    def count_path(self, keys: Sequence[str]) -> int:
        """Return how many of these keys are there, up to the first missing one; change nothing.

        Takes the lock only if a writer is in the way. Each 64 keys are looked up as of one moment.
        """
        return len(self._find_path(encode_keys(keys)))

    def _find_path(self, keys: Sequence[bytes]) -> list[int]:
        """Return the uses, see `EntryTable.find_use`, of the leading run of keys that are there."""
        uses: list[int] = []
        for some in _parts(keys, KEYS_A_LOOK):
            found = self._find_unlocked(some)
            if found is None:
                found = self._locked(Index.find_path, some)
            uses += found
            if len(found) < len(some):
                break
        return uses

    def _find_unlocked(self, keys: Sequence[bytes]) -> list[int] | None:
        """Return the result of `_find_path`, as of one moment and without the lock; None if that needs the lock."""
        with contextlib.suppress(PoolClosedError, IndexError, ValueError):
            words, find_use = self._words, self._table.find_use
            for _ in UNLOCKED_TRIES:
                changes = words[CHANGES]
                if not self._may_read_unlocked():
                    break
                if words[DIRTY]:
                    continue
                use, uses = 0, list[int]()
                for key in keys:
                    use, _, _ = find_use(key)
                    if use <= 0:
                        break
                    uses.append(use)
                # -1: being moved or replaced in place just now, which the words below need not show
                if use >= 0 and not words[DIRTY] and words[CHANGES] == changes:
                    return uses
        return None

    def _each_part(self, parts: Iterable[_R]) -> Iterator[_R]:
        """Yield the parts of a path; pause between two of them if a process waits for the lock."""
        for number, part in enumerate(parts):
            if number and self._word(WAITED_FOR):
                self._give_way()
            yield part

    def touch(self, keys: Sequence[str], ends_prompt: bool = False) -> int:
        """Count a use of each entry of a path, up to the first missing one; return how many were counted.

        Under every policy a child is evicted before its parent. `ends_prompt=True` tells the policy adaptive that the
        last key holds the end of a prompt, seldom used again. Takes the lock once for each 256 keys, about 2 us a key.
        An entry whose parent is not known yet gets the key before it, for `get_memory`.
        """
        encoded = encode_keys(keys)
        self._check_open()
        uses, least = self._find_path(encoded), NO_LEAST
        ends_prompt = ends_prompt and len(uses) == len(encoded)
        for begin in self._each_part(reversed(range(0, len(encoded), ENTRIES_A_STEP))):
            some, parent = slice(begin, begin + ENTRIES_A_STEP), encoded[begin - 1] if begin else b""
            least = self._locked(Index.touch, uses[some], encoded[some], parent, ends_prompt, least)
            ends_prompt = False  # for those above it
        return len(uses)

    def view_path(self, keys: Sequence[str], *, verify: bool = False) -> contextlib.AbstractContextManager[PathViews]:
        """Return a context manager that gives read-only memoryviews of a path in place, up to the first missing key.

        Counts a use of each entry; the deepest is queued first for eviction. The entries are pinned inside the block,
        and for as long as any array made from the views lives. `.entries` of the list has the CacheEntry of each.
        `verify=True` compares each value with its checksum, if it has one (see `reserve_path`). An entry that does not
        match is deleted, and ends the path. Takes the lock once for each 256 keys, for about 4 us a key.
        """
        encoded = encode_keys(keys)
        self._check_open()
        return _PathReader(self, encoded, verify)

    def view_shared(self, ticket: bytes) -> contextlib.AbstractContextManager[PathViews]:
        """Return a context manager that gives read-only memoryviews of values that another process has pinned.

        `ticket` is what `share` returned there. The other process must keep its pins until this block has begun, which
        has pins of its own. Counts hits, but leaves the eviction order to `touch`. InvalidArgumentError if the ticket
        is of another pool, such as a deleted one of this name. CacheError, at the start of the block, if a value is
        pinned no more. Takes the lock once for each 256 values.
        """
        self._check_open()
        head, size = self._ticket_head(), TICKET_HEAD.size
        given = bytes(ticket) if isinstance(ticket, (bytes, bytearray, memoryview)) else b""
        if given[: size - 4] != head[: size - 4] or len(given) < size or (len(given) - size) % TICKET.size:
            raise InvalidArgumentError(
                f"ticket {_show(ticket)} is not of the pool that is open here as {self.name!r}: pass what `share` "
                "returned, and open the pool again if it was deleted and made anew"
            )
        session = TICKET_HEAD.unpack_from(given)[3]
        check_int("session of the ticket", session, 0, MAX_SESSIONS - 1)
        tickets = [given[at : at + TICKET.size] for at in range(size, len(given), TICKET.size)]
        return _SharedReader(self, session, tickets)

    def _ticket_head(self) -> bytes:
        """Return the bytes of a ticket that name this segment and the session that pins."""
        if not _own_process[0]:
            _adopt_pools()
        with self._mutex:
            self._check_open()
            status = os.fstat(self._mapped.fd)
            return TICKET_HEAD.pack(b"KVT1", status.st_dev, status.st_ino, self._mapped.session)

    def get_path_into(self, keys: Sequence[str], targets: Sequence[Any]) -> int:
        """Copy the values of a path into writable buffers, up to the first missing key; return how many were copied.

        A target is any C-contiguous writable buffer, such as a bytearray or an array. It must have exactly the size of
        its value: InvalidArgumentError names one that has not, and no use is counted. Else a use of each copied value
        is counted. Values are copied without the lock. Targets after the last copied value may have been written to.
        """
        encoded = encode_keys(keys)
        self._check_open()
        check_list("targets", targets, len(encoded))
        views = [_writable_bytes(target) for target in targets]
        uses: list[int] = []
        while len(uses) < len(encoded):
            uses += self._copy_unlocked(encoded[len(uses) :], views[len(uses) :])
            if len(uses) < len(encoded):  # missing, of another size, or just being changed
                use = self._copy_pinned(encoded[len(uses)], views[len(uses)])
                if not use:
                    break
                uses.append(use)
        least = NO_LEAST
        for some_uses, some_keys in self._each_part(_parts_from_the_end(uses, encoded[: len(uses) + 1])):
            least = self._locked(Index.use_path, some_uses, some_keys, least)
        self._record_path(encoded, len(uses))
        return len(uses)

    def _record_path(self, keys: Sequence[bytes], num_there: int) -> None:
        """Record the accesses of a path that was read, in a pool that records them."""
        if self._geometry.num_recorded:
            for begin in self._each_part(range(0, len(keys), ENTRIES_A_STEP)):
                some = keys[begin : begin + ENTRIES_A_STEP]
                self._locked(Index.record_path, some, max(num_there - begin, 0), not begin)

    def _copy_unlocked(self, keys: Sequence[bytes], targets: Sequence[memoryview]) -> list[int]:
        """Copy values without the lock, up to the first that needs it; return their uses, which are not counted."""
        with contextlib.suppress(PoolClosedError, IndexError, ValueError):
            if self._may_read_unlocked():
                table, memory = self._table, self._mapped.buffer
                uses: list[int] = []
                pairs: list[tuple[memoryview, memoryview]] = []
                for key, target in zip(keys, targets, strict=True):
                    use, offset, size = table.find_use(key)
                    if use <= 0 or size != len(target):
                        break
                    uses.append(use)
                    pairs.append((target, memory[offset : offset + size]))
                copy_all(pairs)
                return list(itertools.takewhile(table.is_current, uses))
        return []

    def _copy_pinned(self, key: bytes, target: memoryview) -> int:
        """Copy one value, without counting a use; return its slot, or 0 if there is none."""
        reader = _View(self, key, counts=False)
        with reader as view:
            if view is None:
                return 0
            if len(view) != len(target):
                raise InvalidArgumentError(
                    f"the value under {key.decode()!r} has {len(view)} bytes, its target must have as many, not "
                    f"{len(target)}"
                )
            target[:] = view
            return self._held.get(reader.token, (0,))[0]  # without a generation: the key is looked up again

    def reserve_path(
        self,
        keys: Sequence[str],
        sizes: Sequence[int],
        each: Sequence[Mapping[str, Any]] | None = None,
        *,
        zero: bool = True,
        checksums: bool = False,
        **meta: Any,
    ) -> contextlib.AbstractContextManager[list[memoryview | None]]:
        """Return a context manager that gives a writable memoryview for each missing value of a path, root first.

        It gives None for a value of that size, dtype and shape that is there already; one that differs is replaced.
        The list is shorter if no more can be stored. All these values are pinned inside the block. A clean exit makes
        the new values entries, deepest first, also in the order of eviction. An error stores nothing. A value of that
        size, dtype and shape that another process has stored meanwhile stays. The keys must differ. `sizes`: bytes.

        Keyword arguments are as in `put`, and dtype, shape and framework; `each` has more of them, a dict for each key.
        `zero=False` skips zeroing: then write every byte, for an unwritten one shows old bytes of other entries.
        `checksums=True` stores a CRC-32 with each new value, for `view_path(..., verify=True)`. A new value knows the
        key before it as its parent, for `get_memory`. Takes the lock once for each 64 keys at the start, and again at
        the end.
        """
        encoded = encode_keys(keys)
        self._check_open()
        check_list("sizes", sizes, len(encoded))
        if each is not None:
            check_list("dicts in each", each, len(encoded))
        if len(set(encoded)) < len(encoded):
            twice = next(key for key, count in Counter(encoded).items() if count > 1)
            raise InvalidArgumentError(f"key {twice.decode()!r} is there twice: the keys of a path must differ")
        sizes = [size if type(size) is int and 0 <= size <= I64_MAX else check_int("size", size, 0) for size in sizes]
        if each is not None:
            if not all(isinstance(about, Mapping) for about in each):
                raise InvalidArgumentError(f"each {_show(each)} must be a list of dicts, one for each key")
            more = [{**meta, **about} for about in each]
        else:
            more = [meta] * len(encoded)
        return _PathWriter(self, encoded, sizes, _checked_metas(encoded, sizes, more), zero, checksums)

    def put_path(
        self, keys: Sequence[str], values: Sequence[Any], each: Sequence[Mapping[str, Any]] | None = None, **how: Any
    ) -> int:
        """Store copies of the missing values of a path; return how many of its keys, from the root on, are there then.

        Each value is as for `put`; everything else is as for `reserve_path`.
        """
        check_keys(keys)
        check_list("values", values, len(keys))
        data = [as_bytes(value) for value in values]
        sizes = [value.nbytes for value in data]
        with self.reserve_path(keys, sizes, each, **{**how, "zero": False}) as targets:
            pairs = zip(targets, data, strict=False)
            copy_all([(target, value.cast("B")) for target, value in pairs if target is not None and value.nbytes])
        return len(targets)

    def claim(self, key: str, wait: float = 0.0) -> bool:
        """Claim the work of computing the value of `key`; return False if it is still claimed after `wait` seconds.

        A claim excludes claims of that key by other processes, handles and threads; it blocks nothing else. A thread
        that has the claim gets True again, and one `unclaim` ends it: tasks that share a thread must agree among
        themselves. A claim ends with `unclaim`, by any thread, or with its thread, handle or process, killed or not.
        The key need not be there. Takes none of the pool's locks.
        """
        encoded = encode_key(key)
        check_seconds("wait", wait)
        byte, until, pause = _claim_byte(encoded), time.monotonic() + wait, STEP_PAUSE
        while True:
            if not _own_process[0]:
                _adopt_pools()
            with self._mutex:
                if self._try_claim(byte, key):
                    return True
            left = until - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, 0.01)

    def _try_claim(self, byte: int, key: str) -> bool:
        """Lock the byte of a claim if it is free; return True if this thread has the claim."""
        self._check_open()
        claimant = self._this_thread.__dict__.setdefault("claimant", _Claimant())
        ref = self._claims.get(byte)
        if ref is not None:
            return ref() is claimant
        try:
            gone = functools.partial(_claimant_gone, weakref.ref(self), byte)
            self._claims[byte] = weakref.ref(claimant, gone)
            with _os_errors(f"claim {key!r}"):
                if _try_lock_byte(self._mapped.fd, fcntl.F_WRLCK, byte):
                    return True
        except BaseException:
            self._end_claims((byte,))
            raise
        del self._claims[byte]
        return False

    def unclaim(self, key: str) -> bool:
        """End a claim of this handle; return False if it has none on that key."""
        byte = _claim_byte(encode_key(key))
        if not _own_process[0]:
            _adopt_pools()
        with self._mutex:
            self._check_open()
            is_held = byte in self._claims
            self._end_claims((byte,))
            return is_held


class KVCachePool(_Paths):
    """A pool of KV blocks in memory that every process of the host can open by name.

    All methods are safe to call from several threads and processes at once, and may be interrupted or killed at any
    point. On x86-64 `get`, misses and one view at a time take no lock, so processes read side by side; one read in 32
    takes it to count uses. Methods that change entries take the pool's lock for a few microseconds, and copy values of
    more than 64 KiB outside it. After `fork` the child has locks of its own. Views and pins stay the parent's.
    """

    def __init__(
        self, config: CachePoolConfig, create: bool = True, *, store_path: str | os.PathLike[str] | None = None
    ) -> None:
        """Open the pool `config.name`, or make one that lives as long as some process has it open.

        PoolNotFoundError if it is not there and `create` is false. PoolMismatchError if its size, tier, policy or block
        size differ from the config's. `store_path` is the store directory, by default that of `CacheStore()`.
        """
        if not isinstance(config, CachePoolConfig):
            raise InvalidArgumentError(f"config is a {type(config).__name__}, it must be a CachePoolConfig")
        store = _real_store_path(store_path)
        segment = _open_segment(store, config.name, config, create=create, transient=True)
        if segment is None:
            raise PoolNotFoundError(f"there is no pool {config.name!r} in {store}: create it first")
        self._start(segment)

    @classmethod
    def attach(cls, name: str, store_path: str | os.PathLike[str] | None = None) -> KVCachePool:
        """Return a new handle on an existing pool; PoolNotFoundError if there is none of that name."""
        store = _real_store_path(store_path)
        pool = cls._open(store, name)
        if pool is None:
            raise PoolNotFoundError(f"there is no pool {name!r} in {store}: create it first")
        return pool

    @classmethod
    def _open(cls, store_path: str, name: str, config: CachePoolConfig | None = None, **how: Any) -> KVCachePool | None:
        """Return a handle on the segment that `_open_segment` opens or makes, or None."""
        segment = _open_segment(store_path, name, config, **how)
        if segment is None:
            return None
        pool = cls.__new__(cls)
        pool._start(segment)
        return pool

    @property
    def config(self) -> CachePoolConfig:
        """The config that the pool was made with, with the eviction policy that it has now."""
        if not (self._segment is None or self._closing or self._is_locked) and self._word(POLICY) != self._policy:
            self._join()
        return self._config

    def __enter__(self) -> KVCachePool:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the pool's name and store directory: the process that unpickles it opens the pool by them."""
        return KVCachePool.attach, (self.name, self.store_path)

    def __repr__(self) -> str:
        state = "closed" if self._segment is None else self._config.eviction_policy
        return f"<KVCachePool {self.name!r} {format_size(self._geometry.size_bytes)} {state}>"

    # --- storing -----------------------------------------------------------------------------------------------------

    def put(self, key: str, data: Any, *, if_absent: bool = False, **meta: Any) -> bool:
        """Store a copy of `data`, any object with the buffer protocol, under `key`; return False if it can't be stored.

        Keyword arguments: prefix_hash, priority, sequence_length, layer_index; raw_size, the bytes that the value had
        before you encoded it, and encoding, a text that says how. False means that the value is larger than the data
        region, or that pins are in the way (`get_memory` names their processes), and that nothing has changed. (An
        entry may be evicted in vain only if a view of it begins at the same moment.) Changes the eviction order, and
        may evict other entries. Waits up to 0.25 s for copies of others. `if_absent=True` keeps an old value, and
        returns True.

        An old value stays readable until the new one is complete, if there is space for both once all other unpinned
        entries are evicted. If there is not, the old value is removed first. Then none is left if the process is killed
        or interrupted in the put. Others find none while a new value of more than 64 KiB is copied, else see no gap.
        """
        encoded = encode_key(key)
        if type(data) is bytes:
            size = len(data)
        else:
            data = as_bytes(data)
            size = data.nbytes
        checked = _checked_meta(encoded, size, meta) if meta else NO_META
        return self._store(encoded, data, size, checked, if_absent)

    def _store(self, key: bytes, data: Any, size: int, meta: EntryMeta, if_absent: bool = False) -> bool:
        """Store a value and return as `put` does: a small one under one lock, a large one copied outside the lock."""
        token = 0
        try:
            if size <= COPY_UNDER_LOCK:
                stored = self._locked(Index.put, key, data, size, meta, if_absent)
                return stored or self._patiently(
                    lambda: self._locked(Index.put, key, data, size, meta, if_absent), size
                )
            if if_absent and self._find_path([key]):
                return True
            token = next(self._tokens)
            place = self._reserve(key, size, meta, token)
            if place is None:
                return False
            self._memory[place[0] : place[0] + size] = data
            self._locked(Index.commit, token, None, False, if_absent, after_close=True)
        except BaseException:
            self._due.append(token)
            self._settle_due()
            raise
        if self._closing:
            self._close_if_unused()
        return True

    def allocate(
        self,
        key: str,
        size: int,
        prefix_hash: str = "",
        priority: int = 0,
        sequence_length: int = 0,
        layer_index: int = 0,
    ) -> CacheEntry | None:
        """Store `size` zero bytes under `key`, in place of an old value; return the entry, None where `put` fails."""
        meta = {
            "prefix_hash": prefix_hash,
            "priority": priority,
            "sequence_length": sequence_length,
            "layer_index": layer_index,
        }
        with self.reserve(key, size, **meta) as view:
            stored = view is not None
        return self._describe(encode_key(key)) if stored else None

    def reserve(self, key: str, size: int, **meta: Any) -> contextlib.AbstractContextManager[memoryview | None]:
        """Return a context manager that gives a writable memoryview of `size` zero bytes, an entry after a clean exit.

        It gives None where `put` returns False. Keyword arguments are as in `put`. An error inside the block stores
        nothing. If there is space for both values, as in `put`, an old value stays readable until the end of the block,
        and after an error. If there is not, it is removed at the start of the block, whatever its size, and does not
        come back. After the block do not write to arrays made from the view: others read them then.
        """
        self._check_open()
        encoded = encode_key(key)
        size = check_int("size", size, 0)
        return _Reservation(self, encoded, size, _checked_meta(encoded, size, meta))

    # --- reading -----------------------------------------------------------------------------------------------------

    def get(self, key: str) -> bytes | None:
        """Return a copy of the value, or None. Changes the eviction order, the use count and the statistics."""
        encoded = encode_key(key)
        try:
            for _ in UNLOCKED_TRIES:
                words, table = self._words, self._table
                if self._due or self._closing or not (self._is_lock_free and _own_process[0]):
                    break
                changes, is_dirty = words[CHANGES], words[DIRTY]
                use, offset, size = table.find_use(encoded)
                if use > 0:
                    value = self._memory[offset : offset + size]
                    if table.is_current(use):
                        if not self._uses.note(use, next(self._use_numbers)):
                            self._note_late(use)
                        return value
                elif not (use or is_dirty or words[DIRTY]) and words[CHANGES] == changes and self._count_miss():
                    return None
        except (PoolClosedError, IndexError, ValueError):  # closed by another thread, or led astray by a change
            pass
        token = next(self._tokens)
        try:
            found = self._locked(Index.get, encoded, token)
            if isinstance(found, tuple):
                offset, size = found
                found = self._memory[offset : offset + size]
                self._release_pin(token)
        except BaseException:
            self._due.append(token)
            self._settle_due()
            raise
        return found

    def _look_up(self, key: bytes) -> tuple[int, int]:
        """Return (slot or 0, the CHANGES for which that is true) without the lock; (0, -1) if that needs the lock.

        `_find_unlocked` does the same for a path, but would make `in` take half as long again.
        """
        try:
            words = self._words
            changes: int = words[CHANGES]
            unchanged = not (words[DIRTY] or self._due or self._closing)
            if unchanged and LOADS_IN_ORDER and _own_process[0]:
                slot = self._table.find(key)
                if not words[DIRTY] and words[CHANGES] == changes:
                    return slot, changes
        except (PoolClosedError, IndexError, ValueError):  # closed by another thread, or led astray by a change
            pass
        return 0, -1

    def recorded_requests(self) -> tuple[list[list[int]], dict[int, int], float]:
        """Return (requests, blocks of each key, hit rate) of the recorded accesses, oldest first; keys are digests.

        A request is one `get` or `view`, or one path that was read, root first. A key that was never there counts one
        block. Empty for a pool that was not made to record. Copies the record, 16 bytes an access, under the lock.
        """
        ring = self._locked(Index.recorded)
        requests: list[list[int]] = []
        blocks: dict[int, int] = {}
        hits = 0
        for digest, about in zip(ring[::2], ring[1::2], strict=True):
            if about & 2 or not requests:
                requests.append([])
            requests[-1].append(digest)
            hits += about & 1
            blocks[digest] = max(self._geometry.blocks_for(about >> 2), blocks.get(digest, 1))
        return requests, blocks, hits / max(len(ring) // 2, 1)

    def view(self, key: str) -> contextlib.AbstractContextManager[memoryview | None]:
        """Return a context manager that gives a read-only memoryview of the value in place, or None on a miss.

        The entry is pinned inside the block: neither evicted, moved nor overwritten. A numpy array made from the view
        keeps the pin for as long as it lives. Counts and changes the same as `get`.
        """
        if self._closing or self._segment is None:
            self._check_open()
        return _View(self, encode_key(key))

    def pin(self, key: str) -> bool:
        """Keep the value under `key` from being evicted or moved until `unpin` or `close`; False if none is there.

        Each `pin` needs its own `unpin`. A pinned value can be replaced or deleted; its blocks are freed once unpinned.
        """
        encoded = encode_key(key)
        token = next(self._tokens)
        try:
            is_there = self._locked(Index.pin, encoded, token)
            with self._mutex:
                if is_there:
                    self._pins_by_key.setdefault(encoded, []).append(token)
            return is_there
        except BaseException:
            self._due.append(token)
            self._settle_due()
            raise

    def _pins_of(self, key: bytes) -> list[int]:
        """Return the tokens of this handle's pins of a key, oldest first. The caller must hold the mutex."""
        return list(filter(self._held.__contains__, self._pins_by_key.get(key, ())))

    def unpin(self, key: str) -> bool:
        """End one `pin` of this handle; return False if it has none on that key."""
        encoded = encode_key(key)
        if not _own_process[0]:
            _adopt_pools()
        with self._mutex:
            self._check_open()
            tokens = self._pins_of(encoded)
            if not tokens:
                return False
            self._locked(Index.unpin, tokens[0])  # first: an interrupt must not lose the others
            if tokens[1:]:
                self._pins_by_key[encoded] = tokens[1:]
            else:
                del self._pins_by_key[encoded]
        return True

    # --- tensors -----------------------------------------------------------------------------------------------------

    def share(self, keys: Sequence[str]) -> bytes:
        """Return a ticket by which other processes can view the values that this handle has pinned, in this order.

        `view_shared` takes it, until these pins end: also once the keys are deleted, replaced or cleared. It has 24
        bytes, and 28 more for each value. InvalidArgumentError for a key that this handle has not pinned (see `pin`).
        """
        tickets: list[bytes] = []
        head = self._ticket_head()
        for some in self._each_part(_parts(encode_keys(keys), ENTRIES_A_STEP)):
            with self._mutex:  # no `unpin` of another thread in between
                tokens: list[int] = []
                for key in some:
                    held = self._pins_of(key)
                    if not held:
                        raise InvalidArgumentError(
                            f"key {key.decode()!r} is not pinned by this handle: call `pin` first"
                        )
                    tokens.append(held[-1])
                tickets += self._locked(Index.share_held, tokens)
        return head + b"".join(tickets)

    def put_tensor(self, key: str, tensor: Any, **meta: Any) -> bool:
        """Store a numpy array, or a torch tensor in main memory, as `put` does; snapshots keep dtype and shape too.

        Takes any dtype that safetensors and the array's library both have, such as bf16, all fp8, fp4 (in pairs, as in
        torch) and complex64; InvalidArgumentError for others. Copies the values once. Copies them twice if they are not
        contiguous, are conjugated or negated by a flag, or have the other byte order.
        """
        framework, dtype, shape, data = tensor_parts(tensor)
        encoded = encode_key(key)
        described = {"dtype": dtype, "shape": shape, "framework": framework}
        checked = _checked_meta(encoded, data.nbytes, {**meta, **described})
        return self._store(encoded, data, data.nbytes, checked)

    def get_tensor(self, key: str, framework: str | None = None) -> Any:
        """Return a copy of a value, as the numpy array or torch tensor that was stored; None on a miss.

        `framework` "numpy" or "torch" asks for that one. Plain bytes come as one dimension of unsigned 8-bit numbers.
        """
        with self.view_tensor(key, framework) as tensor:
            if tensor is None:
                return None
            return tensor.clone() if hasattr(tensor, "clone") else tensor.copy()

    def view_tensor(self, key: str, framework: str | None = None) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager that gives a value in place, as the array of `get_tensor`; None on a miss.

        The entry is pinned inside the block and while the array lives. Do not write to it: only numpy prevents it.
        """
        self._check_open()
        if framework is not None and framework not in ("numpy", "torch"):
            raise InvalidArgumentError(f"framework {_show(framework)} must be numpy or torch")
        return _TensorView(self, encode_key(key), framework)

    # --- removing ----------------------------------------------------------------------------------------------------

    def delete(self, key: str) -> bool:
        """Remove an entry; return False if there is none. Views of it stay valid until they end."""
        return self._locked(Index.delete, encode_key(key))

    def clear(self) -> int:
        """Remove all entries; return how many. Statistics stay.

        Works in steps, between which others get the lock. So an entry that is put meanwhile may stay.
        """
        return len(self._sweep(Index.remove))

    def evict(self, percent: float) -> int:
        """Evict `percent` of the entries (0 to 100, rounded down to whole entries) in policy order; return how many.

        Pinned entries are passed over. Works in steps, between which others get the lock.
        """
        if isinstance(percent, bool) or not isinstance(percent, (int, float)) or not 0 <= percent <= 100:
            raise InvalidArgumentError(f"percent {_show(percent)} must be a number from 0 to 100")
        wanted = int(self._locked(Index.count) * percent / 100)
        evicted = 0
        while evicted < wanted and (count := self._locked(Index.evict_some, min(wanted - evicted, ENTRIES_A_STEP))):
            evicted += count
            if evicted < wanted:
                self._give_way()
        return evicted

    # --- looking -----------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> Mapping[str, CacheEntry]:
        """All entries: a mapping key -> CacheEntry. `len` and `in` take constant time; iteration scans all in steps."""
        self._check_open()
        return _Entries(self)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            self._check_open()
            return False
        encoded = encode_key(key)
        slot, changes = self._look_up(encoded)
        return bool(slot) if changes >= 0 else self._describe(encoded) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __bool__(self) -> bool:
        return True  # an empty pool is still a pool

    def peek(self, key: str) -> CacheEntry | None:
        """Return the CacheEntry under `key`, or None; count nothing and change nothing.

        Takes the lock only if uses by others have yet to be counted, or a writer is in the way.
        """
        self._check_open()
        encoded = encode_key(key)
        with contextlib.suppress(PoolClosedError, IndexError, ValueError):
            for _ in UNLOCKED_TRIES:
                words, table, changes = self._words, self._table, self._words[CHANGES]
                if not self._may_read_unlocked() or words[DIRTY] or words[USED]:
                    break
                use, _, _ = table.find_use(encoded)
                copy = self._index.copy(use & 0xFFFFFFFF) if use > 0 else b""
                if words[DIRTY] or words[CHANGES] != changes or use < 0 or (copy and not table.is_current(use)):
                    continue
                return self._decode(copy) if copy else None
        return self._describe(encoded)

    def find_by_prefix(self, prefix_hash: str) -> list[CacheEntry]:
        """Return the entries stored with that prefix hash, oldest first.

        The cost grows with their number, up to some hundred. Beyond that, or for the prefix hash "", it scans all
        entries, in steps, between which others get the lock.
        """
        prefix = _encode_prefix(prefix_hash)

        def copy(index: Index, slot: int) -> bytes:
            return index.copy(slot) if index.table.has_prefix(slot, prefix) else b""

        found = self._locked(Index.describe_prefix, prefix)
        if found is None:
            found = self._sweep(copy)
        return sorted((self._decode(copy) for copy in found if copy), key=lambda entry: entry.created_at)

    def count_by_prefix(self, prefix_hash: str) -> int:
        """Return how many entries were stored with that prefix hash. The cost is that of `find_by_prefix`."""
        prefix = _encode_prefix(prefix_hash)
        found = self._locked(Index.describe_prefix, prefix)
        if found is not None:
            return len(found)
        return sum(self._sweep(lambda index, slot: index.table.has_prefix(slot, prefix)))

    def _describe(self, key: bytes) -> CacheEntry | None:
        copy = self._locked(Index.describe, key)
        return self._decode(copy) if copy else None

    def _describe_all(self) -> list[CacheEntry]:
        """Return all entries, next victim first: a scan in steps, between which others get the lock."""
        return list(map(self._decode, self._copy_all()))

    def _copy_all(self) -> list[bytes]:
        """Return copies of all entries, for `_decode`, next victim first: a scan in steps, as for `_sweep`."""
        copies = self._sweep(Index.copy)
        note_of, waste = self._locked(Index.how_to_order)
        return in_victim_order([(note_of(*COPY_ORDER.unpack_from(copy)), copy) for copy in copies], waste)

    def can_allocate(self, size: int) -> bool:
        """Return True if `allocate` of `size` bytes would succeed now, evicting other entries if need be.

        Scans all entries, in steps, between which others get the lock.
        """
        num_blocks = self._geometry.blocks_for(check_int("size", size, 0))
        need_slot = self._locked(Index.needs_slot)
        fixed: list[Extent] = []
        for among in self._ranges():
            some, evictable = self._locked(Index.fixed, among)
            fixed += some
            need_slot = need_slot and not evictable
        return not need_slot and widest_section(fixed, self._geometry.num_blocks) >= num_blocks

    def get_stats(self) -> dict[str, Any]:
        """Return a dict of sizes (in bytes), use, hits and more; docs/api.md explains every key.

        Reclaims leftovers of dead processes. Scans all entries for pins, in steps, between which others get the lock.
        """
        self._settle_dead()
        stats, geometry = self._locked(Index.stats), self._geometry
        return {
            "name": self.name,
            "size_bytes": geometry.size_bytes,
            "data_size_bytes": geometry.num_blocks * geometry.block_size,
            "block_size": geometry.block_size,
            "policy": self._config.eviction_policy,
            "tier": self._config.tier,
            "max_entries": geometry.max_entries,
            **stats,
            "pinned_entries": sum(self._locked(Index.count_pinned, among) for among in self._ranges()),
        }

    def get_memory(self) -> dict[str, Any]:
        """Return a dict of the memory of the pool by kind, in bytes; docs/api.md explains every key.

        Frees first what dead processes held. Takes 1 to 2 us a slot, of which 0.1 us or less under the lock: others get
        it between the steps, so the figures are of different moments. Counts no use.
        """
        self._settle_dead()
        self._locked(Index.reclaim)
        tally = MemoryTally(self._geometry)
        for among in self._ranges():
            tally.add(among.start, *self._locked(Index.copy_range, among))
        return tally.result()

    # --- the policy --------------------------------------------------------------------------------------------------

    def set_eviction_policy(self, policy: EvictionPolicy | str) -> None:
        """Change the eviction policy, in every process that has the pool open; no entry is lost.

        The new order follows the entries' last use, use count and priority. Under fifo the present entries keep the
        order of last use, so that no prefix loses its head before its tail. "adaptive:0.4/0.3/0.3" sets the weights of
        `configure_adaptive`; a call without weights removes them. InvalidArgumentError for an unknown policy.
        StorageError, with nothing changed, without space for the ghosts of adaptive, 384 bytes a slot. Holds the lock
        throughout: about 4 us an entry.
        """
        policy, weights = split_policy(policy)
        with self._mutex:  # no other thread closes the segment meanwhile
            self._check_open()
            ghosts = self._mapped.map_ghosts() if policy is EvictionPolicy.ADAPTIVE else None
        self._locked(Index.set_policy, policy, pack_weights(weights), ghosts)
        self._join()

    def configure_adaptive(self, weights: Mapping[str, float] | None) -> None:
        """Give adaptive fixed weights, in every process: `recency_weight`, `frequency_weight`, `size_weight`.

        Missing weights are 0; weights are normalised to sum to 1. None goes back to reuse gaps, the default.
        InvalidArgumentError for other names or values, or while the pool has another policy.
        """
        policy = self._locked(Index.configure_adaptive, pack_weights(weights))
        if policy is not EvictionPolicy.ADAPTIVE:
            raise InvalidArgumentError(
                f"pool {self.name!r} has policy {policy.value}: call set_eviction_policy('adaptive') first"
            )

    # --- checking and defragmenting ----------------------------------------------------------------------------------

    def check(self, fix: bool = False) -> list[str]:
        """Compare all derived data with the records; return the problems found, none for a sound pool.

        `fix=True` rebuilds all derived data, and removes records that can't be right. Leftovers of dead processes are
        reclaimed first. Holds the lock throughout: about a second for 100,000 entries.
        """
        return self._locked(Index.check, fix)

    def defragment(self) -> int:
        """Move entries that are not in use together, so that free blocks lie together; return how many were moved.

        Works in steps of up to 4 MiB, or one larger entry, between which others get the lock.
        """
        slots = [slot for _, slot in sorted(self._sweep(lambda index, slot: (index.table.extent(slot), slot)))]
        moved = done = 0
        while done < len(slots):
            if done:
                self._give_way()
            count, done = self._locked(Index.defragment, slots, done)
            moved += count
        return moved

    # --- snapshots ---------------------------------------------------------------------------------------------------

    @property
    def default_snapshot_path(self) -> str:
        """The path that `persist` writes to by default."""
        given = self._config.persist_path
        return _expand_user(given) if given else os.path.join(self.store_path, self.name + SNAPSHOT_SUFFIX)

    def persist(self, path: str | os.PathLike[str] | None = None, progress: Progress | None = None) -> bool:
        """Write all entries to a safetensors file, replaced whole or not at all; return True when it is on the disk.

        The default path is `default_snapshot_path`. A missing directory is made. A symbolic link at `path` is replaced
        by the file; its target stays as it is. Others use the pool meanwhile. Each entry is pinned while it is copied,
        and left out if it is removed before. StorageError if the file can't be written. `progress` is called with
        (bytes done, bytes in all).
        """
        self._persist(check_path(path) if path is not None else self.default_snapshot_path, progress)
        return True

    def _persist(self, path: str, progress: Progress | None) -> int:
        """Write a snapshot as `persist` does; return how many entries were written."""
        parent = os.path.dirname(os.path.abspath(path))
        with _os_errors(f"make the directory {parent}"):
            os.makedirs(parent, exist_ok=True)
        copies, total, room = self._copy_all(), 0, 0
        text_at, unpack = COPY_RECORD_AT + RECORD.size, COPY_SIZES.unpack_from
        for copy in copies:
            _, size, _, key_bytes, prefix_bytes, tensor_bytes = unpack(copy)
            total += size
            room += header_room(copy[text_at : text_at + key_bytes + prefix_bytes + tensor_bytes])
        return write_snapshot(path, self._config, copies, total, room, _PoolReader(self), progress)

    @classmethod
    def restore(
        cls,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        store_path: str | os.PathLike[str] | None = None,
        salvage: bool = False,
        progress: Progress | None = None,
        **changes: Any,
    ) -> KVCachePool | None:
        """Restore a snapshot into its pool, which is opened, or made as by the constructor; return the pool.

        Returns None if there is no such file. CorruptionError if it is damaged, before anything has changed: a pool
        made for it is removed. `salvage=True` takes the intact entries instead. Entries under the same keys are
        replaced, others stay. `name` chooses another pool. `changes` (size_bytes, tier, ...) override the snapshot's
        config for a pool that is made; PoolMismatchError if a pool is there with another size, tier, policy or block
        size. A safetensors file of another program goes into a pool named after the file. If not all entries fit, those
        that the policy would evict first are left out. `progress` is called with (bytes done, bytes in all).
        """
        found = restore_snapshot(check_path(path), _real_store_path(store_path), True, name, changes, salvage, progress)
        return found[0] if found else None


def _encode_prefix(prefix_hash: str) -> bytes:
    """Return the UTF-8 bytes of a prefix hash to look for."""
    if not isinstance(prefix_hash, str):
        raise InvalidArgumentError(
            f"prefix_hash {_show(prefix_hash)} is a {type(prefix_hash).__name__}, it must be a str"
        )
    return prefix_hash.encode(errors="surrogatepass")


def _take_back(views: Iterable[memoryview], owner: memoryview) -> bool:
    """Release views made by `_lend`, and their owner; return False if arrays made from them live on."""
    is_unused = True
    for view in (*views, owner):
        try:
            view.release()
        except BufferError:
            is_unused = False
    return is_unused


# --- buffers and tensors ----------------------------------------------------------------------------------------------

# A buffer format (PEP 3118) without objects and pointers: O, P, &, X{} for functions, z and Z for text in ctypes. A
# name stands between colons and may hold any letter. Zf, Zd and Zg are complex numbers.
_NUMBER_FORMATS = frozenset("?bBhHiIlLqQefd")  # the usual ones, which need no closer look
_PLAIN_FORMAT = re.compile(r"(?:(?:[^:OPXzZ&]|Z[fdg])(?::[^:]*:)?)*")


def as_bytes(data: Any) -> memoryview:
    """Return a memoryview of a C-contiguous buffer; of any other buffer, a memoryview of a copy of its bytes."""
    try:
        view = memoryview(data)
    except (TypeError, ValueError, BufferError) as error:
        fix = "pass bytes or an array of numbers"
        if hasattr(data, "untyped_storage"):
            fix = "call put_tensor, or pass tensor.view(torch.uint8).numpy()"
        raise InvalidArgumentError(f"value of type {type(data).__name__} gives no buffer ({error}): {fix}") from None
    if view.format not in _NUMBER_FORMATS and not _PLAIN_FORMAT.fullmatch(view.format):
        raise InvalidArgumentError(
            f"value of buffer format {_show(view.format)} holds Python objects or pointers, which mean nothing to "
            "others: pass numbers"
        )
    if not view.c_contiguous:
        return memoryview(view.tobytes())
    return view


def copy_all(pairs: Sequence[tuple[memoryview, memoryview]]) -> None:
    """Copy the second of each pair into the first, of equal size; large ones on several threads, without the GIL."""
    num_threads = min(os.cpu_count() or 1, MAX_COPIERS, len(pairs))
    total = sum(len(target) for target, _ in pairs)
    if num_threads < 2 or total < max(PARALLEL_COPY, PARALLEL_PIECE * len(pairs)):
        for target, source in pairs:
            target[:] = source
        return
    import ctypes
    from concurrent.futures import ThreadPoolExecutor

    def copy(number: int) -> None:
        for target, source in pairs[number::num_threads]:
            kind = ctypes.c_char * len(target)
            if not source.readonly:
                ctypes.memmove(kind.from_buffer(target), kind.from_buffer(source), len(target))
            elif type(source.obj) is bytes and source.nbytes == len(source.obj):
                ctypes.memmove(kind.from_buffer(target), source.obj, len(target))
            else:  # ctypes takes no other read-only buffer
                target[:] = source

    try:
        with ThreadPoolExecutor(num_threads) as threads:
            list(threads.map(copy, range(num_threads)))
    except RuntimeError:  # no more threads can be started
        list(map(copy, range(num_threads)))


def _writable_bytes(target: Any) -> memoryview:
    """Return a flat view of the bytes of a writable buffer."""
    view = as_bytes(target)
    if view.readonly:  # or a copy of what is not contiguous
        raise InvalidArgumentError(f"target {_show(target)} must be a C-contiguous buffer that can be written to")
    return view.cast("B") if view.nbytes else memoryview(bytearray())


_NUMPY_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "float16": "F16", "int32": "I32",
    "uint32": "U32", "float32": "F32", "int64": "I64", "uint64": "U64", "float64": "F64", "complex64": "C64",
}  # fmt: skip
_TORCH_DTYPES = _NUMPY_DTYPES | {
    "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0", "float4_e2m1fn_x2": "F4",
}  # fmt: skip
_DTYPE_NAMES = {safetensors: name for name, safetensors in _TORCH_DTYPES.items()}


def _library(name: str) -> Any:
    """Return an optional library; UnsupportedError if it is not installed."""
    try:
        return __import__(name)
    except ImportError as error:
        raise UnsupportedError(
            f"this needs {name}, which can't be imported ({error}): pip install 'kv-cache-manager[{name}]'"
        ) from None


def tensor_parts(tensor: Any) -> tuple[str, str, tuple[int, ...], memoryview]:
    """Return (framework, safetensors dtype, shape, bytes) of an array or tensor, without a copy where possible."""
    if hasattr(tensor, "untyped_storage"):
        torch = _library("torch")
        name = str(tensor.dtype).removeprefix("torch.")
        is_dense = tensor.layout == torch.strided and not tensor.is_nested
        if tensor.device.type != "cpu" or not is_dense or name not in _TORCH_DTYPES:
            raise InvalidArgumentError(
                f"a {'nested' if tensor.is_nested else tensor.layout} tensor of {name} on {tensor.device} can't be "
                f"stored: make it dense, in main memory, of one of {', '.join(_TORCH_DTYPES)}"
            )
        dtype, shape = _TORCH_DTYPES[name], tuple(tensor.shape)
        if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise InvalidArgumentError(
                f"a {type(tensor).__name__} keeps its values in other tensors: pass those, or make it a plain tensor"
            )
        if dtype == "F4":  # safetensors counts numbers, torch pairs of them
            if not shape:
                raise InvalidArgumentError(f"a {name} tensor must have a dimension: reshape it to (1,)")
            shape = (*shape[:-1], 2 * shape[-1])
        try:
            dense = tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().contiguous()
            flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)  # a size of 1 may have any stride
            return "torch", dtype, shape, memoryview(flat.numpy())
        except RuntimeError as error:  # a stand-in for a tensor, as inside torch.vmap
            raise InvalidArgumentError(f"this {type(tensor).__name__} has no bytes of its own ({error})") from None
    if not hasattr(tensor, "__array_interface__"):
        raise InvalidArgumentError(f"a {type(tensor).__name__} is neither a numpy array nor a torch tensor")
    numpy = _library("numpy")
    if isinstance(tensor, numpy.ma.MaskedArray):
        raise InvalidArgumentError("a masked array can't be stored, its mask would be lost: pass .filled() or .data")
    values: Any = numpy.asarray(tensor)
    if values.dtype.name not in _NUMPY_DTYPES:
        raise InvalidArgumentError(f"numpy dtype {values.dtype} is none of {', '.join(_NUMPY_DTYPES)}: put its bytes")
    native = numpy.ascontiguousarray(values, dtype=values.dtype.newbyteorder("="))
    return (
        "numpy",
        _NUMPY_DTYPES[values.dtype.name],
        values.shape,
        memoryview(cast(Any, native.reshape(-1).view("uint8"))),
    )


def _torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor of torch's own dtype `name`; raise an error if this torch has no such tensor."""
    torch = _library("torch")
    if not hasattr(torch, name):
        raise UnsupportedError(f"torch {torch.__version__} has no {name}: update torch, or use `view` for the bytes")
    if _TORCH_DTYPES[name] != "F4":
        return shape
    if shape[-1] % 2:
        raise InvalidArgumentError(
            f"torch keeps F4 in pairs, shape {shape} must end with an even number: use `view` for the bytes"
        )
    return (*shape[:-1], shape[-1] // 2)


def as_tensor(view: memoryview, dtype: str, shape: tuple[int, ...], framework: str, is_writable: bool = False) -> Any:
    """Return an array over `view`: of torch if `framework` says so, or if numpy lacks the dtype; else of numpy.

    The array keeps the view's memory in use for as long as it lives. For torch the view must be writable: torch has no
    read-only memory, and warns of it. An array of numpy is writable only if `is_writable` is true.
    """
    if not dtype:
        dtype, shape = "U8", (len(view),)
    if framework not in FRAMEWORKS:
        raise InvalidArgumentError(f"framework {_show(framework)} must be numpy or torch")
    name = _DTYPE_NAMES.get(dtype)
    if name is None:
        raise InvalidArgumentError(f"neither numpy nor torch has {dtype}: use `view` for the bytes")
    if framework == "numpy" and name not in _NUMPY_DTYPES:
        raise InvalidArgumentError(f"numpy has no {dtype}: use framework='torch', or `view` for the bytes")
    if name not in _NUMPY_DTYPES:
        shape = _torch_shape(name, shape)
    if framework in ("torch", "transformers") or name not in _NUMPY_DTYPES:
        torch = _library("torch")
        if not len(view):
            return torch.empty(shape, dtype=getattr(torch, name), device="cpu")  # not the default device
        # By way of numpy: a tensor of `frombuffer` does not keep a view from being released.
        return torch.from_numpy(_library("numpy").frombuffer(view, "u1")).view(getattr(torch, name)).view(shape)
    return _library("numpy").frombuffer(view if is_writable else view.toreadonly(), dtype=name).reshape(shape)


class Unlocked:
    """Memory of a numpy array that may be read-only, for `numpy.asarray`, which takes it for writable.

    Torch warns of read-only memory, since it has none. The caller must not write to such an array.
    """

    def __init__(self, array: Any) -> None:
        self._array = array  # keeps the memory in use
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


# --- codecs -----------------------------------------------------------------------------------------------------------
# An encoded block is the KV of some tokens in fewer bytes. L layers, H heads, T tokens, head size D; little-endian:
#
#     offset           size               section
#     0                64                 "KVC1"; codec and dtype (places in _CODEC_NAMES, CODED_DTYPES), 32, 0: a byte
#                                         each; L, H, T, D, offset of scales (64), of codes: 4 bytes each; zeros
#     64               4 * L*H*(D + T*G)  int8 and int4: float16 scales of keys [L,H,D], their least values [L,H,D],
#                                         scales of values [L,H,T,G], their least values [L,H,T,G]
#     offset of codes  to the end         raw: the block [L,2,H,T,D] as it is. bf16: the same in bfloat16.
#     (a multiple                         int8: a byte for each number of the keys [L,H,T,D], then of the values.
#     of 64)                              int4: half of that. Byte j of a row is number j | number j + D/2 << 4.
#
# A value is least + number * scale. Keys share a scale along each channel, since some channels are far from 0 for all
# tokens. Values share one along each token (KIVI, arXiv:2402.02750); for int4 in G groups of at least 32 channels: G is
# the largest divisor of D that is at most D / 32, or 1. For int8 G is 1. `encode_block` rounds least values down and
# scales up. So a decoded value differs by half a scale at most, beside the rounding of float32.

CODECS = ("bf16", "int8", "int4")
CODED_DTYPES = ("F32", "BF16", "F16")
MIN_CODED_TOKENS = 16  # a block of fewer tokens has more bytes of scales than its codes save
CODED_LIMIT = 65000.0  # of absolute values: scales and least values are float16, which ends at 65504
CODED_AT_ONCE = 64 << 10  # numbers that are coded at a time: as float32 they stay in a processor's cache
BLOCK_HEAD = struct.Struct("<4sBBBBIIIIII32x")
BLOCK_MAGIC = b"KVC1"
VALUE_GROUP = 32
MAX_HEAD_SIZE = 1 << 16
_CODEC_NAMES = ("raw", *CODECS)
_CODE_BITS = {"bf16": 16, "int8": 8, "int4": 4}


class BlockFormat(NamedTuple):
    """The format of an encoded block, which its header holds."""

    codec: str  # raw, bf16, int8 or int4; "": the block is no encoded one
    dtype: str  # of the block before it was encoded, one of CODED_DTYPES
    shape: tuple[int, ...]  # of that block: (layers, 2, heads, tokens, head size)

    @classmethod
    def of(cls, codec: str, dtype: str, shape: tuple[int, ...]) -> BlockFormat:
        """Return the format of a block that this codec can encode; InvalidArgumentError if it can't."""
        check_codec(codec, shape[3])
        if dtype not in CODED_DTYPES:
            raise InvalidArgumentError(f"codec {codec} takes KV of {', '.join(CODED_DTYPES)}, not {dtype}: convert it")
        if codec == "bf16" and dtype == "F16":
            raise InvalidArgumentError("codec bf16 loses bits of F16 KV and saves no byte: use int8, or codec=None")
        if codec == "int4" and shape[4] % 2:
            raise InvalidArgumentError(f"codec int4 takes an even head size, not {shape[4]}: use int8, or codec=None")
        if not all(0 < length < 1 << 32 for length in shape) or shape[4] > MAX_HEAD_SIZE:
            raise InvalidArgumentError(
                f"codec {codec} takes KV of a head size up to {MAX_HEAD_SIZE}, and no dimension of 0, not {shape}"
            )
        return cls(codec, dtype, shape)

    @property
    def text(self) -> str:
        """The encoding of an entry of such a block. Blocks that differ in it are different values."""
        return " ".join([self.codec, self.dtype, *map(str, self.shape)])

    def describe(self, framework: str) -> dict[str, Any]:
        """Return the metadata of an entry that is such a block."""
        size = self.num_bytes
        tensor = {"dtype": "U8", "shape": (size,), "framework": framework}
        return {**tensor, "raw_size": self.raw_size, "encoding": self.text}

    @classmethod
    def read(cls, view: memoryview) -> BlockFormat | None:
        """Return the format of an encoded block; None if these bytes are no such block, by their header and length."""
        head = bytes(view[: BLOCK_HEAD.size])
        if len(head) < BLOCK_HEAD.size:
            return None
        magic, codec, dtype, _, _, layers, heads, tokens, head_size, _, _ = BLOCK_HEAD.unpack(head)
        is_known = magic == BLOCK_MAGIC and codec < len(_CODEC_NAMES) and dtype < len(CODED_DTYPES)
        # The smallest code has half a byte. Head sizes are limited as a search for a divisor would take long.
        if not is_known or not 0 < layers * heads * tokens * head_size <= len(view) or head_size > MAX_HEAD_SIZE:
            return None
        found = cls(_CODEC_NAMES[codec], CODED_DTYPES[dtype], (layers, 2, heads, tokens, head_size))
        if (found.codec, found.dtype) == ("bf16", "F16") or (found.codec == "int4" and head_size % 2):
            return None  # `of` refuses them
        return found if found.num_bytes == len(view) and found.header == head else None

    @property
    def num_groups(self) -> int:
        """Number of scales of one token's values in one head; 0 if the codec has no scales."""
        if self.codec == "int4":
            head_size = self.shape[4]
            return next(n for n in range(max(head_size // VALUE_GROUP, 1), 0, -1) if head_size % n == 0)
        return int(self.codec == "int8")

    @property
    def codes_at(self) -> int:
        """Offset of the codes."""
        layers, _, heads, tokens, head_size = self.shape
        num_scales = layers * heads * (head_size + tokens * self.num_groups) if self.num_groups else 0
        return BLOCK_HEAD.size + -(-4 * num_scales // 64) * 64

    @property
    def num_bytes(self) -> int:
        """Size of the encoded block in bytes."""
        return self.codes_at + math.prod(self.shape) * _CODE_BITS.get(self.codec, DTYPE_BITS[self.dtype]) // 8

    @property
    def raw_size(self) -> int:
        """Size of the block in bytes before it was encoded."""
        return tensor_bytes(self.dtype, self.shape)

    @property
    def header(self) -> bytes:
        """The first bytes of the encoded block."""
        layers, _, heads, tokens, head_size = self.shape
        kinds = _CODEC_NAMES.index(self.codec), CODED_DTYPES.index(self.dtype), VALUE_GROUP, 0
        return BLOCK_HEAD.pack(BLOCK_MAGIC, *kinds, layers, heads, tokens, head_size, BLOCK_HEAD.size, self.codes_at)

    def sections(self, view: memoryview) -> tuple[Any, Any, Any]:
        """Return arrays of numpy over an encoded block in place: (scales of keys, scales of values, codes).

        Of a codec with scales: float16 of shape (2, layers, heads, 1, head size), scales before least values; the same
        of shape (2, layers, heads, tokens, groups); uint8 of shape (2, layers, heads, tokens, head size or half of it),
        keys before values. Of raw and bf16: None, None, unsigned words of the block's shape.
        """
        numpy = _library("numpy")
        layers, _, heads, tokens, head_size = self.shape
        if not self.num_groups:
            word = "<u4" if (self.codec, self.dtype) == ("raw", "F32") else "<u2"
            return None, None, numpy.frombuffer(view, word, offset=self.codes_at).reshape(self.shape)
        middle, end = (2 * layers * heads * count for count in (head_size, head_size + tokens * self.num_groups))
        scales = numpy.frombuffer(view, "<f2", end, BLOCK_HEAD.size)
        codes = numpy.frombuffer(view, "u1", offset=self.codes_at)
        return (
            scales[:middle].reshape(2, layers, heads, 1, head_size),
            scales[middle:].reshape(2, layers, heads, tokens, self.num_groups),
            codes.reshape(2, layers, heads, tokens, -1),
        )

    def _layers_at_once(self) -> list[slice]:
        """Return all layers in slices of about CODED_AT_ONCE numbers."""
        layers, _, heads, tokens, head_size = self.shape
        step = max(CODED_AT_ONCE // (heads * tokens * head_size), 1)
        return [slice(first, first + step) for first in range(0, layers, step)]


def check_codec(codec: str | None, block_size: int) -> None:
    """Raise InvalidArgumentError unless this is a codec for blocks of that many tokens, or None."""
    if codec is not None and codec not in CODECS:
        raise InvalidArgumentError(f"codec {_show(codec)} must be None, {', '.join(map(repr, CODECS))}")
    if codec in ("int8", "int4") and block_size < MIN_CODED_TOKENS:
        raise InvalidArgumentError(
            f"codec {codec} takes blocks of {MIN_CODED_TOKENS} tokens or more, not {block_size}, whose scales would "
            "take more than its codes save: use a larger block_size, or codec=None"
        )


def can_encode(states: Any) -> bool:
    """Return True if all numbers of an array are below CODED_LIMIT, none NaN or infinite. It reads them twice."""
    return bool(float(states.min()) > -CODED_LIMIT and float(states.max()) < CODED_LIMIT)  # a NaN makes both false


def encode_block(states: Any, form: BlockFormat, target: memoryview) -> None:
    """Encode a block, an array of numpy or torch of any strides, into `target`, of form.num_bytes.

    Unless the codec is raw, `can_encode` must be true of it. Scales are computed in float32.
    """
    numpy = _library("numpy")
    target[: BLOCK_HEAD.size] = form.header
    key_scales, value_scales, codes = form.sections(target)
    if key_scales is None:
        if (form.codec, form.dtype) != ("bf16", "F32"):
            codes[...] = _words(states)
        elif hasattr(states, "detach"):
            _bfloat16(codes).copy_(states.detach())
        else:
            codes[...] = _narrow(_words(states))
        return
    end_of_scales = BLOCK_HEAD.size + key_scales.nbytes + value_scales.nbytes
    target[end_of_scales : form.codes_at] = bytes(form.codes_at - end_of_scales)
    top = (1 << _CODE_BITS[form.codec]) - 1
    for some in form._layers_at_once():
        for which, scales in enumerate((key_scales, value_scales)):
            part = states[some, which]
            if hasattr(part, "detach"):
                part = part.detach().float().cpu().numpy()
            part = numpy.ascontiguousarray(part, numpy.float32)
            rows = part.reshape(*part.shape[:3], form.num_groups, -1) if which else part
            numbers = _quantize(rows, scales[:, some], top, -1 if which else -2).reshape(part.shape)
            if form.codec == "int4":
                half = numbers.shape[-1] // 2
                numbers = numbers.astype(numpy.uint8)
                numpy.bitwise_or(numbers[..., :half], numbers[..., half:] << 4, out=codes[which, some])
            else:
                codes[which, some] = numbers


def _quantize(rows: Any, scales: Any, top: int, axis: int) -> Any:
    """Return the numbers of float32 rows, from 0 to `top`, as float32; write scales and least values along an axis."""
    numpy = _library("numpy")
    lowest = rows.min(axis, keepdims=True)
    least = lowest.astype(numpy.float16)
    least = numpy.where(least > lowest, numpy.nextafter(least, numpy.float16(-numpy.inf)), least).astype(numpy.float32)
    span = (rows.max(axis, keepdims=True) - least) / numpy.float32(top)
    scale = span.astype(numpy.float16)
    scale = numpy.where(scale < span, numpy.nextafter(scale, numpy.float16(numpy.inf)), scale).astype(numpy.float32)
    # Never -0.0: of 0.0 and -0.0 numpy finds either to be the least, and bytes of a block must not depend on it.
    scales[0], scales[1] = (scale + 0.0).reshape(scales.shape[1:]), (least + 0.0).reshape(scales.shape[1:])
    numbers = rows - least
    numbers /= numpy.where(scale == 0, numpy.float32(1), scale)
    return numpy.rint(numbers, out=numbers)


def decode_block(view: memoryview, form: BlockFormat, out: Any) -> None:
    """Decode a block into `out`, an array of numpy or torch of any strides, of the dtype before it was encoded.

    `out` has the shape of the block, or fewer tokens: the first ones.
    """
    numpy = _library("numpy")
    num_tokens = out.shape[3]
    key_scales, value_scales, codes = form.sections(view)
    if key_scales is None:
        codes = codes[:, :, :, :num_tokens]
        if (form.codec, form.dtype) != ("bf16", "F32"):
            _words(out)[...] = codes
        elif hasattr(out, "detach"):
            out.copy_(_bfloat16(codes))  # takes three quarters of the time of numpy, which has no such dtype
        else:
            numpy.left_shift(codes, numpy.uint32(16), out=_words(out), dtype=numpy.uint32)
        return
    scales = key_scales.astype(numpy.float32), value_scales[:, :, :, :num_tokens].astype(numpy.float32)
    to_numpy = form.dtype == "F32" and hasattr(out, "detach")
    target = out.detach().numpy() if to_numpy else out
    for some in form._layers_at_once():
        for which in range(2):
            part = codes[which, some, :, :num_tokens]
            if form.dtype == "F32":
                dequantize(part, scales[which][:, some], target[some, which])
            else:
                numbers = numpy.empty(target[some, which].shape, numpy.float32)
                dequantize(part, scales[which][:, some], numbers)
                target[some, which] = _library("torch").from_numpy(numbers) if hasattr(out, "detach") else numbers


def decode_layer(blocks: Sequence[tuple[Any, Any, Any]], layer: int, out: Any) -> None:
    """Decode one layer of int8 or int4 blocks of one format, given by their `sections`, one behind another into `out`.

    `out` is float32 of numpy, in C order, of shape (2, heads, tokens of all blocks, head size).
    """
    numpy = _library("numpy")
    key_scales, value_scales, codes = (
        numpy.concatenate([block[kind][:, layer] for block in blocks], 2) for kind in range(3)
    )
    heads, num_blocks = key_scales.shape[1:3]
    by_block = (2, heads, num_blocks, -1)
    out = out.reshape(*by_block, out.shape[-1])
    codes = codes.reshape(*by_block, codes.shape[-1])
    scales = (
        key_scales[:, :, :, None].astype(numpy.float32),
        value_scales.reshape(*by_block, value_scales.shape[-1]).astype(numpy.float32),
    )
    step = max(CODED_AT_ONCE // math.prod(out.shape[3:]), 1)
    for which, head, first in itertools.product(range(2), range(heads), range(0, num_blocks, step)):
        some = slice(first, first + step)
        dequantize(codes[which, head, some], scales[which][:, head, some], out[which, head, some])


def dequantize(codes: Any, scales: Any, out: Any) -> None:
    """Write least + number * scale into `out`, float32 of shape (..., tokens, head size), of any strides.

    `codes` is uint8, of the same shape or half the head size. `scales` is float32 of shape (2, ..., 1, head size) or
    (2, ..., tokens, groups): scales, then least values.
    """
    numpy = _library("numpy")
    numbers = numpy.empty(out.shape, numpy.float32)
    head_size = out.shape[-1]
    if codes.shape[-1] == head_size:
        numbers[...] = codes
    else:
        half = head_size // 2
        numbers[..., :half] = codes & 15
        numbers[..., half:] = codes >> 4
    if 1 < scales.shape[-1] < head_size:
        scales = numpy.repeat(scales, head_size // scales.shape[-1], -1)
    numbers *= scales[0]
    numpy.add(numbers, scales[1], out=out)


def _words(array: Any) -> Any:
    """Return the bits of an array of numpy or torch as unsigned words, in place unless it lies on another device."""
    if hasattr(array, "detach"):
        torch = _library("torch")
        array = array.detach().cpu().view(torch.int32 if array.element_size() == 4 else torch.int16).numpy()
    return array.view(f"u{array.dtype.itemsize}")


def _bfloat16(words: Any) -> Any:
    """Return 16-bit words of numpy as a tensor of bfloat16 in place."""
    torch = _library("torch")
    return torch.from_numpy(_library("numpy").asarray(Unlocked(words)).view("i2")).view(torch.bfloat16)


def _narrow(words: Any) -> Any:
    """Return float32 as bfloat16, rounded to the nearest, ties to even; both as words. Not for NaN."""
    rounded = words >> 16
    rounded &= 1
    rounded += words
    rounded += 0x7FFF
    rounded >>= 16
    return rounded


# --- restoring a snapshot ---------------------------------------------------------------------------------------------


def _restore_order(config: CachePoolConfig, snapshot: Snapshot, items: list[SnapshotEntry]) -> list[SnapshotEntry]:
    """Return the items in the order of eviction of a pool's policy, so that the right ones stay if space is short."""
    policy = EvictionPolicy(config.eviction_policy)
    if snapshot.config is not None and snapshot.config.eviction_policy == policy.value:
        return items  # in that order already
    rank, is_fifo = POLICY_KEY[policy], policy is EvictionPolicy.FIFO

    def turn(item: SnapshotEntry) -> tuple[int, float, int]:
        entry = item.entry
        recency = entry.created_at if is_fifo else entry.last_accessed
        return rank(entry.access_count, entry.priority), recency, -entry.sequence_length  # deeper first

    return sorted(items, key=turn)


def _that_fit(config: CachePoolConfig, items: list[SnapshotEntry]) -> list[SnapshotEntry]:
    """Return the items that an empty pool would keep in the end; both lists are in the order of eviction."""
    geometry = Geometry.of(config)
    room = geometry.num_blocks
    kept: list[SnapshotEntry] = []
    for item in reversed(items):
        num_blocks = geometry.blocks_for(item.entry.size)
        if num_blocks > geometry.num_blocks:
            continue
        room -= num_blocks
        if room < 0 or len(kept) == geometry.max_entries:
            break
        kept.append(item)
    return kept[::-1]


def _restore_entry(pool: KVCachePool, snapshot: Snapshot, item: SnapshotEntry) -> bool:
    """Store one value of a snapshot; return False if it does not fit."""
    entry = item.entry
    saved = Saved(entry.access_count, entry.created_at, entry.last_accessed, item.crc32 or 0, item.parent)
    with _Reservation(pool, encode_key(entry.key), entry.size, snapshot_meta(entry), saved) as target:
        if target is not None and not snapshot.read(item, target):
            raise CorruptionError(f"{snapshot.path} changed while it was read, at entry {entry.key!r}")
        return target is not None


def restore_snapshot(
    path: str,
    store_path: str,
    transient: bool,
    name: str | None,
    changes: Mapping[str, Any],
    salvage: bool,
    progress: Progress | None,
) -> tuple[KVCachePool, int, int] | None:
    """Do what `restore` does; return (pool, entries restored, entries in the file), None if there is no such file."""
    try:
        snapshot = Snapshot(path, salvage)
    except FileNotFoundError:
        return None
    with snapshot:
        intact = snapshot.verify(True, progress) if salvage else snapshot.entries
        config = snapshot.config
        if config is None:  # another program's file
            stem = name or os.path.basename(path).removesuffix(SNAPSHOT_SUFFIX)
            if not _NAME.fullmatch(stem):
                raise InvalidArgumentError(f"the file {path!r} is not called as a pool may be: give a name (--name)")
            room = sum(-(-item.entry.size // BLOCK_SIZE) + 1 for item in intact) * BLOCK_SIZE
            smallest = HEADER_SIZE + BITMAP_SIZE + MIN_NUM_BLOCKS * BLOCK_SIZE
            config = CachePoolConfig(stem, smallest + room + room // 1000, max_entries=max(10000, len(intact)))
        unknown = changes.keys() - {f.name for f in fields(CachePoolConfig)}
        if unknown:
            raise InvalidArgumentError(f"a pool config has no {', '.join(sorted(unknown))}")
        config = CachePoolConfig.from_dict({**config.to_dict(), **changes, "name": name or config.name})
        pool, made = None, False
        while pool is None:
            pool = KVCachePool._open(store_path, config.name)
            if pool is not None and changes:
                try:
                    _check_agreement(CachePoolConfig.from_dict({**pool.config.to_dict(), **changes}), pool.config)
                except PoolMismatchError:
                    pool.close()
                    raise
            if pool is None:
                with contextlib.suppress(PoolExistsError):  # another process has made it meanwhile: open that
                    how = {"create": True, "exclusive": True, "transient": transient, "progress": progress}
                    pool = KVCachePool._open(store_path, config.name, config, **how)
                    made = True
        try:
            items = _restore_order(pool.config, snapshot, intact)
            if made:
                items = _that_fit(pool.config, items)
            # A pool that this call has made is verified as it is filled, and removed if the file is damaged.
            if not salvage and not (made and len(items) == len(intact)):
                snapshot.verify(progress=progress)
            stored, done, total = [], 0, sum(item.entry.size for item in items)
            for item in items:
                if _restore_entry(pool, snapshot, item):
                    stored.append(item.entry.key)
                done += item.entry.size
                if made and progress is not None:
                    progress(done, total)
        except BaseException as error:
            if made:
                pool.unlink()
            pool.close()
            if made and not salvage and isinstance(error, CorruptionError):
                snapshot.verify(progress=progress)  # names the first damaged entry in the order of the file
            raise
        return pool, sum(key in pool for key in stored), snapshot.num_described


# --- the end of a process, and forks ----------------------------------------------------------------------------------


@atexit.register
def _end_all() -> None:
    """Close all pools at the end of the process. Transient pools are removed with their last process."""
    print_error = threading.excepthook

    def hide_closed(args: threading.ExceptHookArgs) -> None:
        """Print nothing for a daemon thread that calls a pool now; it could do nothing about it."""
        if not issubclass(args.exc_type, PoolClosedError):
            print_error(args)

    threading.excepthook = hide_closed
    for pool in _known_pools():
        with contextlib.suppress(CacheError):
            pool._end()


def _before_fork() -> None:
    if not _own_process[0]:
        _adopt_pools()
    _forking.add(threading.get_ident())  # first: an interrupt in between must not leave the lock taken
    _no_fork.acquire()


def _after_fork_in_parent() -> None:
    if threading.get_ident() in _forking:  # else an extension calls this hook without `_before_fork`
        _forking.discard(threading.get_ident())
        with contextlib.suppress(RuntimeError):
            _no_fork.release()


def _after_fork_in_child() -> None:
    global _adopting  # noqa: PLW0603  # another thread of the parent may hold it for ever
    _adopting = threading.RLock()
    _adoptions.clear()
    _adopt_pools()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


# ======================================================================================================================
# Prefix cache
# ======================================================================================================================


def model_fingerprint(path: str | os.PathLike[str]) -> str:
    """Return a namespace for `PrefixCache` from a model on disk: a digest of its files, names and contents.

    `path` is one file, such as a GGUF, or a directory. All files in it and its sub-directories count, and those that
    symlinks lead to. Hidden names do not count, nor do symlinks that lead nowhere, pipes, sockets and devices. Four
    threads read every byte, at 1 to 2 GB/s each: a fine-tune may differ from its base in one layer only. If that takes
    too long, make up a namespace of your own. Add the dtype that the model runs in, if it may differ.
    InvalidArgumentError if there is no file, or if a symlink leads to a directory that holds the model among other
    files. StorageError if a file can't be read.
    """
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path  # here, like `array` below: each takes longer to import than `cortex` to open a pool

    def digest_of(file: str) -> bytes:
        digest = hashlib.sha256()
        with open(file, "rb") as data:
            while piece := data.read(COPY_CHUNK):
                digest.update(piece)
        return digest.digest()

    root = Path(check_path(path))
    with _os_errors(f"read the model {str(root)!r}"):
        files = {"": str(root)} if root.is_file() else _model_files(str(root))
        if not files:
            raise InvalidArgumentError(f"{str(root)!r} holds no model: there is no file that is not hidden")
        names = sorted(files)
        with ThreadPoolExecutor(4) as pool:
            digests = list(pool.map(digest_of, [files[name] for name in names]))
    whole = hashlib.sha256()
    for name, part in zip(names, digests, strict=True):
        whole.update(_framed((name or root.name).encode("utf-8", "surrogateescape")) + part)
    return whole.hexdigest()[:32]


def _model_files(root: str) -> dict[str, str]:
    """Return the path of each file below `root` by its name there; hidden names do not count, symlinks are followed.

    A symlink to a directory on the way to itself is a loop. It adds no file, so it is passed over. A symlink that leads
    above `root` would make all files there a part of the model: InvalidArgumentError.
    """

    def identify(directory: str) -> tuple[int, int]:
        status = os.stat(directory)
        return status.st_dev, status.st_ino

    above, parent = set(), os.path.realpath(root)
    while parent != os.path.dirname(parent):
        parent = os.path.dirname(parent)
        above.add(identify(parent))
    files: dict[str, str] = {}
    # (directory, its name below `root`, identities of it and of those on the way to it, the symlink that leads above)
    waiting: list[tuple[str, str, tuple[tuple[int, int], ...], str]] = []
    if os.path.isdir(root):
        waiting.append((root, "", (identify(root),), ""))
    while waiting:
        directory, prefix, way, astray = waiting.pop()
        for name in os.listdir(directory):
            if name[0] == ".":
                continue
            file = os.path.join(directory, name)
            try:
                status = os.stat(file)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) and os.path.islink(file):
                    continue  # it leads nowhere
                raise
            if stat.S_ISREG(status.st_mode):
                if astray:
                    raise InvalidArgumentError(
                        f"symlink {astray!r} of the model leads to a directory that holds the model itself, and "
                        f"{file!r} too: remove the symlink"
                    )
                files[prefix + name] = file
            elif stat.S_ISDIR(status.st_mode):
                identity = status.st_dev, status.st_ino
                if identity not in way:
                    leads_above = astray or (file if identity in above else "")
                    waiting.append((file, f"{prefix}{name}/", (*way, identity), leads_above))
    return files


def _framed(data: bytes) -> bytes:
    """Return the length of some bytes and the bytes, so that different sequences of them never join to the same."""
    return struct.pack("<Q", len(data)) + data


def _is_text(text: object) -> bool:
    """Return True if a text can name something that KV depends on."""
    return isinstance(text, str) and text != "" and text.isprintable()


def _token_bytes(tokens: Any) -> bytes:
    """Return token ids as 32-bit little-endian words."""
    import array

    if hasattr(tokens, "detach"):  # torch
        try:
            tokens = tokens.detach().cpu().numpy()
        except (TypeError, RuntimeError) as error:
            raise InvalidArgumentError(f"tokens in a tensor must be integers in one row: {error}") from None
    if hasattr(tokens, "__array_interface__"):
        import numpy

        tokens = numpy.asarray(tokens)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise InvalidArgumentError(f"tokens of {tokens.dtype}, shape {tokens.shape}, must be integers in one row")
        if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= 1 << 32):
            raise InvalidArgumentError(
                f"tokens from {tokens.min()} to {tokens.max()} must be from 0 to {(1 << 32) - 1}"
            )
        return bytes(tokens.astype("<u4").tobytes())
    try:
        if not isinstance(tokens, (list, tuple, range)):
            raise TypeError(f"a {type(tokens).__name__} is no list, tuple, numpy array or torch tensor")
        words = array.array("I", tokens)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"tokens must be integers from 0 to {(1 << 32) - 1} in one row: {error}") from None
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


class KVContext(Protocol):
    """All that the KV of one model depends on beside weights and tokens. `PrefixCache` asks it each time it hashes."""

    def digest(
        self, tokens: Sequence[int], named_blocks: Container[int], block_size: int, length: int, stores: bool
    ) -> bytes:
        """Return bytes that are equal only for equal KV of these tokens, in a prompt of `length` tokens.

        `named_blocks`: the blocks that `block_extra` names. `stores`: the KV was computed just now. UnsupportedError if
        KV of this model can't be cached, NotCacheableError if only that of this prompt can't.
        """

    def check_length_is_known(self) -> None:
        """Raise UnsupportedError if KV depends on the length of the prompts that begin with these tokens."""

    def check_dtype(self, dtype: Any) -> None:
        """Raise UnsupportedError if the model does not compute KV of this dtype, a torch.dtype, as it is now."""


class PrefixCache:
    """The KV of token prefixes in a pool, in blocks of `block_size` tokens, which any process finds again.

    The hash of a block covers the hash of the block before it: an equal hash means an equal whole prefix. All prompts
    that begin with a prefix share its blocks. `namespace` names the weights (`model_fingerprint`): the KV of another
    model, block size or salt is never found. `salt` keeps tenants apart. Without it, the time of an answer shows a
    tenant which prompts others have asked (CVE-2025-46570). With `verify`, blocks are stored with a CRC-32. A block
    that does not match it when loaded is deleted and counts as missing.

    `extra`, a text or a list of texts, names everything else that the whole KV depends on: the dtype, an adapter, a
    rank of tensor or pipeline parallelism, a soft prompt. `block_extra={block number: text}` names anything else that
    one block depends on, such as the digest of an image or a sound whose placeholder tokens lie in it. Blocks after it
    need no text of their own. Name every block that holds some of the placeholders, for a prompt may be cut between two
    of them. `for_model` handles adapters, dtype and rope scaling by itself.

    `codec` stores blocks in fewer bytes: "bf16", "int8" or "int4" (16, 9.25 and 5.5 bits a number for 16 tokens a block
    of head size 64; sizes and errors are in docs/prefix-cache.md). Without it KV comes back bit for bit. A block with a
    number that is NaN, infinite, or 65,000 or more in absolute value is stored as it is. Each codec has its own hashes,
    so it never finds the blocks of another codec, nor those without a codec. KV must be F32, BF16 or F16.
    InvalidArgumentError for bf16 of F16, int8 and int4 of fewer than 16 tokens a block, int4 of an odd head size.

    Hashes (SHA-256, hex): root = H(frame("cortex-prefix-1") frame(namespace) frame(salt) block_size), where frame(x) is
    the length of x as 8 bytes, then x; block = H(hash of the parent, 32 bytes; token ids, 4 bytes each). All integers
    are little-endian. Namespace "m", no salt, block size 2, tokens 1, 2, 3, 4, 5 give
    91e18dc874bf41fdb9637d26499f92f0d33830c4d1a5bb667cbed5fce07d1c8b
    2c59e6d00bdf1ee3614cb74b21adccc465239eb54f682464288083b58eedf02e
    With texts in `extra` the root also covers frame(frame(text 1) frame(text 2) ...). With `for_model` it also covers
    that, even of no texts, and then frame(digest of the model). A block that `block_extra` names also covers
    frame(text). With extra "tp 0 of 2" and block_extra {1: "image"} the same tokens give
    467ba64ac03c60176484b49f3381457aea1a82d8fa4618041183b28bfa796f30
    30e2f8232066a5c6eea840a2f73b763a9c5c4fa7bfbb98e2cc6b1c1c837a3a26
    With a codec the root covers three frames: of the texts and of the digest as above, each even if there is none, and
    frame(codec). Namespace "m", block size 2, codec "bf16" and the same tokens give
    18141bb9fb84a76259d5d165ed6bb9f43d6bd074e3502dde684160c73b06810a
    dfcc5210adbba925cfc2441a3f40eafb4291bc0c8c08119305bbf2986afa791d

    Statistics count the calls of this object; the pool has its own. Methods may be called from several threads.
    """

    def __init__(
        self,
        pool: KVCachePool,
        *,
        namespace: str,
        block_size: int = 16,
        salt: str = "",
        verify: bool = False,
        extra: str | Sequence[str] = "",
        codec: str | None = None,
        context: KVContext | None = None,
    ) -> None:
        if not isinstance(pool, KVCachePool):
            raise InvalidArgumentError(f"pool is a {type(pool).__name__}, it must be a KVCachePool")
        if not isinstance(verify, bool):
            raise InvalidArgumentError(f"verify {_show(verify)} must be True or False")
        texts = isinstance(namespace, str) and isinstance(salt, str)
        if not texts or not namespace or not (namespace + salt).isprintable():
            raise InvalidArgumentError(
                f"namespace {_show(namespace)} must be a printable str that names the weights, salt {_show(salt)} too"
            )
        extras = ((extra,) if extra else ()) if isinstance(extra, str) else extra
        if not isinstance(extras, (list, tuple)) or not all(map(_is_text, extras)):
            raise InvalidArgumentError(f"extra {_show(extra)} must be a printable str, or a list of them without ''")
        self._made_of: dict[str, Any] = {
            "namespace": namespace,
            "block_size": block_size,
            "salt": salt,
            "verify": verify,
            "extra": tuple(extras),
            "codec": codec,
        }
        self.pool = pool
        self._context = context
        self.block_size = check_int("block_size", block_size, 1, 1 << 20)
        check_codec(codec, self.block_size)
        self.codec = codec
        self.verify = verify
        parts = [_framed(part.encode()) for part in ("cortex-prefix-1", namespace, salt)]
        self._named = b"".join(parts) + struct.pack("<Q", self.block_size)
        self._extra = b"".join(_framed(text.encode()) for text in extras)
        self._root = self._root_with(b"")
        self._prefix_hash = self._root.hex()[:16]
        self._lock = threading.Lock()
        names = "tokens_requested tokens_hit blocks_stored blocks_shared bytes_saved bytes_before bytes_after"
        self._counts = dict.fromkeys(names.split(), 0)
        self._claims: dict[str, float] = {}  # block that we compute -> time until which others may wait for it

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments: the process that unpickles them opens the pool by name, with new statistics."""
        if self._context is not None:
            raise UnsupportedError(
                "a cache for_model can't be sent to another process: make it there, from its own model"
            )
        return functools.partial(PrefixCache, self.pool, **self._made_of), ()

    @classmethod
    def for_model(
        cls,
        pool: KVCachePool,
        model: Any,
        *,
        namespace: str,
        block_size: int = 16,
        salt: str = "",
        verify: bool = False,
        extra: str | Sequence[str] = "",
        codec: str | None = None,
    ) -> PrefixCache:
        """Return a `PrefixCache` that examines a transformers model whenever it hashes tokens to store, load or match.

        It finds KV again only if these are as they were: dtype and autocast; config, with rope and attention
        implementation; adapters of peft, by config, state and weights; a sample of all other weights. The sample shows
        merged adapters and shards, but `namespace` names the weights. Longrope prompts up to the original length and
        beyond it are kept apart. Call `store` before the model computes another prompt.

        UnsupportedError for all that can't be distinguished: virtual tokens, dropout, attention in both directions,
        placeholders of images and sounds that `block_extra` does not name. The same holds beyond the original length
        for dynamic NTK rope, and for longrope outside the Phi family (whose `generate` begins anew there). For `load`
        and `match`, a prompt that can't be cached because of its length or placeholders is a miss.

        Name in `extra` or `block_extra` all that only a call has: images, `adapter_names=`, embeddings, hooks,
        positions that do not count from 0. A look costs some milliseconds: it visits every module. Adapter weights are
        digested whole, once. Later looks sum them up, at memory speed.
        """
        try:
            from kv_cache_engines.model_context import ModelContext
        except ImportError as error:
            raise UnsupportedError(
                f"for_model needs the package kv_cache_engines, which is not beside this module ({error}): "
                "pip install kv-cache-manager"
            ) from None
        return cls(
            pool,
            namespace=namespace,
            block_size=block_size,
            salt=salt,
            verify=verify,
            extra=extra,
            codec=codec,
            context=ModelContext(model),
        )

    # --- blocks ------------------------------------------------------------------------------------------------------

    def compute_block_hashes(
        self, tokens: Any, *, block_extra: Mapping[int, str] | None = None, length: int | None = None
    ) -> list[str]:
        """Return the hash of each full block, root first. Tokens: list, tuple, numpy array or torch tensor of ids.

        ValueError for ids that are negative or beyond 32 bits. The same in every process, platform and Python.
        `block_extra` may name the partial last block, to no effect, but none after it. `length` is the number of tokens
        of the whole prompt (default: of these). It matters if rope scaling depends on it: see `for_model`.
        """
        data = _token_bytes(tokens)
        num_tokens = len(data) // 4
        total = num_tokens if length is None else check_int("length", length, num_tokens)
        named = self._framed_texts(block_extra, num_tokens)
        return self._chain(data, named, self._find_root(data, named, total, False))

    def _chain(self, data: bytes, named: Mapping[int, bytes], root: bytes) -> list[str]:
        """Return the hash of each full block of these tokens."""
        words = memoryview(data)
        step = 4 * self.block_size
        parent, sha256 = root, hashlib.sha256
        hashes = []
        for at in range(0, len(words) - step + 1, step):
            block = parent + words[at : at + step]
            if named:
                block += named.get(at // step, b"")
            parent = sha256(block).digest()
            hashes.append(parent.hex())
        return hashes

    def _framed_texts(self, block_extra: Mapping[int, str] | None, num_tokens: int) -> dict[int, bytes]:
        """Check `block_extra` for a prompt of `num_tokens`; return block number -> bytes that its hash also covers."""
        if block_extra is None:
            return {}
        if not isinstance(block_extra, Mapping):
            raise InvalidArgumentError(f"block_extra {_show(block_extra)} must be a dict {{block number: text}}")
        named = {}
        for number, text in block_extra.items():
            block = check_int("block number in block_extra", number, 0)
            if block * self.block_size >= num_tokens:
                raise InvalidArgumentError(
                    f"block_extra names block {block}, but {num_tokens} tokens end in block "
                    f"{(num_tokens - 1) // self.block_size}: number blocks of {self.block_size} tokens from 0"
                )
            if not _is_text(text):
                raise InvalidArgumentError(f"block_extra[{block}] {_show(text)} must be a printable str, not empty")
            named[block] = _framed(text.encode())
        return named

    def _root_with(self, context: bytes) -> bytes:
        """Return the hash before the first block, for KV that depends on this context (b"": on none)."""
        parts = [self._extra, context, (self.codec or "").encode()]
        while parts and not parts[-1]:  # what is not used adds nothing, so hashes stay as they were before there was it
            parts.pop()
        return hashlib.sha256(self._named + b"".join(map(_framed, parts))).digest()

    def _find_root(self, data: bytes, named: Mapping[int, bytes], length: int, stores: bool) -> bytes:
        """Return the root for these tokens of a prompt of `length` tokens; `stores`: for KV computed just now."""
        if self._context is None:
            return self._root
        tokens = memoryview(data).cast("I")
        return self._root_with(self._context.digest(tokens, named, self.block_size, length, stores))

    def _find_hashes(self, tokens: Any, block_extra: Mapping[int, str] | None, length: int | None) -> list[str]:
        """Return the hashes to look for, an empty list if the KV of this prompt can't be cached."""
        try:
            return self.compute_block_hashes(tokens, block_extra=block_extra, length=length)
        except NotCacheableError:
            return []

    def match(self, tokens: Any, *, block_extra: Mapping[int, str] | None = None, length: int | None = None) -> int:
        """Return how many of these tokens are cached, as a leading run of whole blocks; change nothing."""
        return self.pool.count_path(self._find_hashes(tokens, block_extra, length)) * self.block_size

    def lookup(self, hashes: Sequence[str]) -> tuple[list[Any], int]:
        """Return (copies of the leading blocks that are there, how many tokens they cover)."""
        blocks: list[Any] = []
        with self.pool.view_path(hashes, verify=self.verify) as views:
            for view, entry in zip(views, views.entries, strict=True):
                if self.codec is None:
                    blocks.append(_copy_block(view, entry))
                elif (form := _format_of(view, entry)) is not None:
                    blocks.append(_join_blocks([view], entry.framework, [form], form.shape[3]))
                else:
                    break
        self._count(tokens_requested=len(hashes) * self.block_size, tokens_hit=len(blocks) * self.block_size)
        return blocks, len(blocks) * self.block_size

    def insert(self, hashes: Sequence[str], blocks: Sequence[Any], priority: int = 0) -> int:
        """Store the block of each hash that is not there yet; return how many were stored.

        A block is bytes, an array of numpy or torch, or JSON: a dict, list, str, number. With a codec it is an array of
        shape (layers, 2, heads, block size, head size). Stops if a block does not fit into the pool.
        """
        check_keys(hashes)
        check_list("blocks", blocks, len(hashes))
        if self.codec is not None:
            return self._insert_arrays(hashes, blocks, priority)
        parts = [_block_parts(block) for block in blocks]
        metas = [{"dtype": dtype, "shape": shape, "framework": framework} for framework, dtype, shape, _ in parts]

        def write(number: int, target: memoryview) -> None:
            target[:] = parts[number][3]

        return self._insert(hashes, [data.nbytes for _, _, _, data in parts], metas, write, priority)

    def _insert_arrays(self, hashes: Sequence[str], blocks: Sequence[Any], priority: int) -> int:
        """Do what `insert` does for blocks to be encoded, which may differ in dtype and shape."""
        assert self.codec is not None
        kinds, arrays = [], []
        for number, block in enumerate(blocks):
            shape = tuple(getattr(block, "shape", ()))
            if len(shape) != 5 or (shape[1], shape[3]) != (2, self.block_size):
                raise InvalidArgumentError(
                    f"block {number} is a {type(block).__name__} of shape {shape}: with codec {self.codec} it must be "
                    f"an array of (layers, 2, heads, {self.block_size}, head size)"
                )
            framework, dtype, shape, data = tensor_parts(block)
            form = BlockFormat.of(self.codec, dtype, shape)
            arrays.append(as_tensor(data, dtype, shape, framework, True))  # plain, whatever kind of array was passed
            kinds.append((framework, form if can_encode(arrays[-1]) else form._replace(codec="raw")))

        def write(number: int, target: memoryview) -> None:
            encode_block(arrays[number], kinds[number][1], target)

        sizes = [form.num_bytes for _, form in kinds]
        return self._insert(hashes, sizes, [form.describe(framework) for framework, form in kinds], write, priority)

    def _insert(
        self,
        hashes: Sequence[str],
        sizes: Sequence[int],
        metas: Sequence[Mapping[str, Any]],
        write: Callable[[int, memoryview], None],
        priority: int,
    ) -> int:
        """Store the missing blocks: `metas` has what the pool shall keep of each, `write` fills one."""
        each = [{**meta, "sequence_length": number * self.block_size} for number, meta in enumerate(metas, 1)]
        how: dict[str, Any] = {"prefix_hash": self._prefix_hash, "priority": priority, "zero": False}
        try:
            with self.pool.reserve_path(hashes, sizes, each, checksums=self.verify, **how) as targets:
                for number, target in enumerate(targets):
                    if target is not None:
                        write(number, target)
        finally:
            self._unclaim(hashes)
        new = [number for number, target in enumerate(targets) if target is not None]
        size_of_new = sum(sizes[number] for number in new)
        self._count(
            blocks_stored=len(new),
            blocks_shared=len(targets) - len(new),
            bytes_saved=sum(sizes[: len(targets)]) - size_of_new,
            bytes_before=sum(metas[number].get("raw_size") or sizes[number] for number in new),
            bytes_after=size_of_new,
        )
        return len(new)

    # --- the KV of a model -------------------------------------------------------------------------------------------

    def store(
        self,
        tokens: Any,
        kv: Any,
        priority: int = 0,
        *,
        block_extra: Mapping[int, str] | Sequence[Mapping[int, str] | None] | None = None,
        generated: bool = False,
    ) -> int:
        """Store the KV of `tokens` in full blocks, those that are missing; return how many were stored.

        `kv` is a `DynamicCache` of transformers, a cache by `open_prefix`, or an array of numpy or torch of shape
        (layers, 2, heads, tokens, head size). A cache needs one row of `tokens` for each row of its batch, without
        padding, and must not be that of a beam search. `kv` may hold fewer tokens. An array may hold more.
        InvalidArgumentError for a `DynamicCache` that holds more, and with `for_model` for an array: the others may be
        virtual tokens in front.
        `generated=True` says that they come after `tokens`. For a batch `block_extra` is a list, one for each row.
        UnsupportedError for layers that do not keep the KV of every token. InvalidArgumentError for a cache by
        `open_prefix` if its rows do not begin with that prefix, or hold padding.
        """
        if not isinstance(generated, bool):
            raise InvalidArgumentError(f"generated {_show(generated)} must be True or False")
        if hasattr(kv, "layers"):
            states = kv if hasattr(kv, "copy_tokens") else _Rows(_dense_layers(kv))
            num_rows = states.num_rows
            rows = list(tokens) if _is_batch(tokens) else [tokens]
            extras = block_extra if isinstance(block_extra, (list, tuple)) else [block_extra]
            if block_extra is None:
                extras = [None] * len(rows)
            if num_rows and len(rows) != num_rows:
                raise InvalidArgumentError(
                    f"{len(rows)} rows of tokens need a cache of that batch size, not {num_rows}"
                )
            if len(rows) != len(extras):
                raise InvalidArgumentError(f"block_extra must be a list of {len(rows)}, one for each row of tokens")
            if not num_rows:
                return 0
            if self._context is not None:
                self._context.check_dtype(states.dtype)
            dtype = _TORCH_DTYPES[str(states.dtype).removeprefix("torch.")]
            shape = states.block_shape(self.block_size)
            paths = [
                self._hashes_to_store(row, extra, states.length_of(number, len(row)), generated)
                for number, (row, extra) in enumerate(zip(rows, extras, strict=True))
            ]
            for number, path in enumerate(paths):
                if any(key != opened for key, opened in zip(path, states.hashes, strict=False)):
                    raise InvalidArgumentError(
                        f"row {number} does not begin with the prefix of this cache, or another PrefixCache has opened "
                        "it: store the tokens of the row, in the cache that opened the prefix"
                    )
            copies = [functools.partial(states.copy_tokens, row) for row in range(num_rows)]
            return sum(
                self._store_path(path, "transformers", dtype, shape, copy, priority)
                for path, copy in zip(paths, copies, strict=True)
            )
        if getattr(kv, "ndim", 0) != 5 or kv.shape[1] != 2:
            shape = tuple(getattr(kv, "shape", ()))
            raise InvalidArgumentError(
                f"kv is a {type(kv).__name__} of shape {shape}, it must be a DynamicCache, or an array of (layers, 2, "
                "heads, tokens, head size)"
            )
        if _is_batch(tokens):
            raise InvalidArgumentError("tokens must be one row for an array: store several as a DynamicCache")
        framework, dtype, shape, _ = tensor_parts(kv[:, :, :, : self.block_size])
        shape = (*shape[:3], self.block_size, *shape[4:])  # also if there are fewer tokens
        hashes = self._hashes_to_store(tokens, block_extra, kv.shape[3], generated or self._context is None)
        states = kv.detach() if framework == "torch" else kv  # or `out` would join a graph of gradients

        def copy(start: int, stop: int, out: Any) -> None:
            out[...] = states[:, :, :, start:stop]

        return self._store_path(hashes, framework, dtype, shape, copy, priority)

    def _hashes_to_store(self, tokens: Any, block_extra: Any, length: int, may_be_longer: bool) -> list[str]:
        """Return the hashes of the full blocks of these tokens that a KV of `length` tokens holds."""
        data = _token_bytes(tokens)
        num_tokens = len(data) // 4
        if length > num_tokens and not may_be_longer:
            raise InvalidArgumentError(
                f"kv of {length} tokens is longer than the {num_tokens} tokens: name all of them; or pass "
                "generated=True if the others come after these (virtual tokens in front of them can't be stored)"
            )
        if self._context is not None and length < num_tokens - 1:  # `generate` leaves out the KV of the last token
            try:
                self._context.check_length_is_known()
            except UnsupportedError:  # transformers 5.0 begins anew beyond a model's original length
                raise NotCacheableError(
                    f"kv of {length} tokens may be that of the last ones of {num_tokens}, as rope scaling of this "
                    "model depends on the length: pass the tokens that it holds"
                ) from None
        named = self._framed_texts(block_extra, num_tokens)
        data = data[: 4 * length]
        return self._chain(data, named, self._find_root(data, named, length, True))

    def _store_path(
        self,
        hashes: list[str],
        framework: str,
        dtype: str,
        shape: tuple[int, ...],
        copy: Callable[[int, int, Any], None],
        priority: int,
    ) -> int:
        """Store the blocks of one row, each of `shape`. `copy(start, stop, out)` copies KV of tokens to an array."""
        step, size = self.block_size, tensor_bytes(dtype, shape)
        if self.codec is None:
            meta = {"dtype": dtype, "shape": shape, "framework": framework}

            def write(number: int, target: memoryview) -> None:
                copy(number * step, (number + 1) * step, as_tensor(target, dtype, shape, framework, True))

            return self._insert(hashes, [size] * len(hashes), [meta] * len(hashes), write, priority)
        coded = BlockFormat.of(self.codec, dtype, shape)
        raw = coded._replace(codec="raw")
        block = as_tensor(memoryview(bytearray(size)), dtype, shape, framework, True)

        def choose(number: int) -> BlockFormat:
            copy(number * step, (number + 1) * step, block)
            return coded if can_encode(block) else raw

        def write_coded(number: int, target: memoryview) -> None:
            if choose(number) is not formats[number]:
                raise _FormatChanged
            encode_block(block, formats[number], target)

        # The formats of blocks that are there are known without reading `kv`. If one is evicted meanwhile, its format
        # may be that of other KV.
        there = [self.pool.peek(key) for key in hashes[: self.pool.count_path(hashes)]]
        for entries in (there, []):
            formats = [raw if entry and entry.encoding == raw.text else coded for entry in entries]
            formats += map(choose, range(len(formats), len(hashes)))
            metas = [form.describe(framework) for form in formats]
            with contextlib.suppress(_FormatChanged):
                return self._insert(hashes, [form.num_bytes for form in formats], metas, write_coded, priority)
        raise InvalidArgumentError("kv changed while it was stored: keep it as it is until `store` has returned")

    def load(
        self,
        tokens: Any,
        batch_size: int = 1,
        *,
        block_extra: Mapping[int, str] | None = None,
        length: int | None = None,
        wait: float = 0.0,
    ) -> tuple[Any, int]:
        """Return (KV of the longest cached prefix of `tokens`, how many tokens it covers); (None, 0) if there is none.

        The KV has the type that was stored. Pass a `DynamicCache` to `generate(ids, past_key_values=kv)`. Each call
        returns a fresh one, as generate changes it. `batch_size` prompts that begin with these tokens share one copy.
        The KV never covers all of `tokens`: the model must see the last one to go on. A block of another dtype or layer
        shape than the first ends the prefix. `length`: see `compute_block_hashes`; that of the longest of the prompts.

        `wait` (seconds): just one of several callers that ask for one prompt at once computes it. If another one is
        computing the missing KV, this call waits that long for it. If none is, it returns, and its caller must compute.
        Others wait until it calls `store` or `abandon`, ends or is killed, or has held them up for `wait` seconds.
        """
        check_int("batch_size", batch_size, 1)
        check_seconds("wait", wait)
        if _is_batch(tokens):
            raise InvalidArgumentError("tokens must be one row: load the prefix that the rows share, with batch_size")
        if batch_size > 1 and length is None and self._context is not None:
            self._context.check_length_is_known()
        hashes = self._find_hashes(tokens, block_extra, length)
        if wait:
            self._await(hashes[: (len(tokens) - 1) // self.block_size], wait)
        with self.pool.view_path(hashes, verify=self.verify) as views:
            framework, formats = _usable_formats(views, self.codec, self.block_size)
            num_tokens = max(min(len(formats) * self.block_size, len(tokens) - 1), 0)
            kv = _join_blocks(views[: len(formats)], framework, formats, num_tokens) if num_tokens else None
        self._count(tokens_requested=len(tokens), tokens_hit=num_tokens)
        if kv is not None and framework == "transformers":
            return _dynamic_cache(kv, batch_size), num_tokens
        return kv, num_tokens

    def open_prefix(
        self, tokens: Any, *, block_extra: Mapping[int, str] | None = None, length: int | None = None
    ) -> Any:
        """Return a cache of transformers that attends to the longest cached prefix where it lies in the pool.

        It is a context manager, a `kv_cache_engines.transformers.SharedPrefix`. Its `num_tokens` is the length of the
        prefix: 0 if none is cached, and never all of `tokens`. The blocks are pinned until it is closed. Pass it to the
        model after `model.set_attn_implementation("cortex")`: with any other attention it raises an error. One serves
        any number of rows that begin with the prefix, on the CPU. For a model `for_model` whose KV depends on the
        length of the prompt, `length` is that of the longest of them.

        UnsupportedError for a model with sliding windows or other layers that do not keep every token.
        """
        try:
            from kv_cache_engines.transformers import SharedPrefix, check_context
        except ImportError as error:
            raise UnsupportedError(
                f"open_prefix needs torch, transformers and the package kv_cache_engines ({error}): "
                "pip install 'kv-cache-manager[transformers]'"
            ) from None
        if _is_batch(tokens):
            raise InvalidArgumentError("tokens must be one row: open the prefix that the rows share")
        if self._context is not None:
            check_context(self._context)
            if length is None:
                self._context.check_length_is_known()
        hashes = self._find_hashes(tokens, block_extra, length)
        with contextlib.ExitStack() as pins:
            views = pins.enter_context(self.pool.view_path(hashes, verify=self.verify))
            _, formats = _usable_formats(views, self.codec, self.block_size)
            num_tokens = max(min(len(formats) * self.block_size, len(tokens) - 1), 0)
            if num_tokens:
                whole = hashes[: num_tokens // self.block_size]
                past = SharedPrefix(kept := contextlib.ExitStack(), views[: len(formats)], formats, num_tokens, whole)
                kept.push(pins.pop_all())
            else:
                past = SharedPrefix(contextlib.ExitStack())
        self._count(tokens_requested=len(tokens), tokens_hit=num_tokens)
        return past

    def _await(self, hashes: Sequence[str], wait: float) -> None:
        """Wait while another caller computes the first missing block. If none does, claim it."""
        pool, until = self.pool, time.monotonic() + wait
        self._unclaim(())
        while (there := pool.count_path(hashes)) < len(hashes):
            if pool.claim(hashes[there], min(max(until - time.monotonic(), 0), CLAIM_LOOK)):
                if pool.count_path(hashes) == there:
                    with self._lock:
                        self._claims[hashes[there]] = time.monotonic() + wait
                    return
                pool.unclaim(hashes[there])  # its owner stored it just before
            elif time.monotonic() >= until:
                return

    def _unclaim(self, hashes: Collection[str]) -> None:
        """End our claims on these blocks, and those whose time is over."""
        if not self._claims:
            return
        now, wanted = time.monotonic(), frozenset(hashes)
        with self._lock:
            ended = [key for key, until in self._claims.items() if key in wanted or until < now]
            for key in ended:
                del self._claims[key]
        for key in ended:
            self.pool.unclaim(key)

    def abandon(self, tokens: Any, *, block_extra: Mapping[int, str] | None = None, length: int | None = None) -> None:
        """Give up computing the KV of these tokens: callers that wait for it in `load` go on."""
        self._unclaim(self._find_hashes(tokens, block_extra, length))

    def warm(
        self,
        prompts: Iterable[Any],
        compute: Callable[[Any], Any],
        priority: int = 0,
        *,
        block_extra: Callable[[Any], Mapping[int, str] | None] | Mapping[int, str] | None = None,
    ) -> int:
        """Store the KV, `compute(tokens)`, of each prompt that is not cached yet; return how many were computed.

        `block_extra` is that of every prompt, or a function that returns it for the tokens of one.
        """
        if not isinstance(prompts, Iterable) or not callable(compute):
            raise InvalidArgumentError(
                f"prompts {_show(prompts)} must be an iterable of token lists, compute {_show(compute)} a function"
            )
        computed = 0
        for tokens in prompts:
            extra = block_extra(tokens) if callable(block_extra) else block_extra
            if self.match(tokens, block_extra=extra) < len(tokens) // self.block_size * self.block_size:
                self.store(tokens, compute(tokens), priority, block_extra=extra)
                computed += 1
        return computed

    def get_stats(self) -> dict[str, Any]:
        """Return a dict of counts of this object's calls, and `blocks`: the blocks of this namespace in the pool now.

        tokens_requested, tokens_hit, hit_rate (of tokens), blocks_stored, blocks_shared (found there already),
        bytes_saved (by sharing), bytes_before and bytes_after (blocks stored, before and after the codec). The cost is
        that of `KVCachePool.count_by_prefix`.
        """
        with self._lock:
            counts = dict(self._counts)
        requested = counts["tokens_requested"]
        rate = counts["tokens_hit"] / requested if requested else 0.0
        return {**counts, "hit_rate": rate, "blocks": self.pool.count_by_prefix(self._prefix_hash)}

    def _count(self, **changes: int) -> None:
        with self._lock:
            for name, change in changes.items():
                self._counts[name] += change


def _is_batch(tokens: Any) -> bool:
    if isinstance(tokens, (list, tuple)):
        return bool(tokens) and bool(getattr(tokens[0], "ndim", hasattr(tokens[0], "__len__")))
    return bool(getattr(tokens, "ndim", 1) == 2)


def _block_parts(block: Any) -> tuple[str, str, tuple[int, ...], memoryview]:
    """Return (framework, dtype, shape, bytes) of a block given to `insert`."""
    if hasattr(block, "__array_interface__") or hasattr(block, "untyped_storage"):
        return tensor_parts(block)
    if isinstance(block, (dict, list, str, int, float)):
        try:
            data = json.dumps(block).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"block {_show(block)} holds what JSON can't: {error}") from None
        return "json", "U8", (len(data),), memoryview(data)
    return "", "", (), memoryview(bytes(as_bytes(block)))


def _copy_block(view: memoryview, entry: CacheEntry) -> Any:
    if entry.framework == "json":
        return json.loads(bytes(view))
    if not entry.dtype:
        return bytes(view)
    return as_tensor(memoryview(bytearray(view)), entry.dtype, entry.shape, entry.framework, True)


class _FormatChanged(Exception):
    """A block needs another format than was expected when its bytes were reserved."""


def _format_of(view: memoryview, entry: CacheEntry) -> BlockFormat | None:
    """Return the format of a block that a codec has encoded; None if it is no such block, or its header is damaged."""
    form = BlockFormat.read(view)
    return form if form is not None and form.text == entry.encoding else None


def _usable_formats(views: PathViews, codec: str | None, block_size: int) -> tuple[str, list[BlockFormat]]:
    """Return (framework, format of each) of the leading blocks of KV that are of one framework, dtype and shape.

    A block that no codec has encoded has the codec "".
    """
    found: list[BlockFormat] = []
    framework = ""
    for view, entry in zip(views, views.entries, strict=True):
        form = BlockFormat("", entry.dtype, entry.shape) if codec is None else _format_of(view, entry)
        if form is None or len(form.shape) != 5 or form.shape[3] != block_size:
            break
        if found and (framework, *found[0][1:]) != (entry.framework, *form[1:]):
            break
        found.append(form)
        framework = entry.framework
    return framework, found


def _join_blocks(views: list[memoryview], framework: str, formats: list[BlockFormat], num_tokens: int) -> Any:
    """Return one array of `num_tokens` tokens from blocks of one shape, (layers, 2, heads, tokens, head size).

    numpy copies plain words, once, whatever the dtype. Other threads can run meanwhile, so some share a large copy.
    """
    _, dtype, shape = formats[0]
    numpy, name = _library("numpy"), _DTYPE_NAMES.get(dtype)
    if name is None:
        raise InvalidArgumentError(f"neither numpy nor torch has {dtype}: use `KVCachePool.view_path` for the bytes")
    if name not in _NUMPY_DTYPES:
        shape = _torch_shape(name, shape)  # torch counts F4 in pairs
    word = f"u{max(DTYPE_BITS[dtype] // 8, 1)}"
    whole = (*shape[:3], num_tokens, shape[4])
    if framework == "numpy":
        # Starts on a cache line, as torch's do. Arrays of numpy start 16 bytes into a page, the blocks at one. Then
        # processors stall that compare only the low 12 bits of loads and earlier stores (94 MB: 48 ms, not 22).
        size = tensor_bytes(dtype, whole)
        room = numpy.empty(size + 63, numpy.uint8)
        skip = -room.ctypes.data % 64
        joined = room[skip : skip + size].view(name).reshape(whole)
        words = joined.view(word)
    else:
        torch = _library("torch")
        joined = torch.empty(whole, dtype=getattr(torch, name), device="cpu")  # whatever the default device
        words = joined.view(torch.uint8).numpy().view(word)

    def copy(numbers: Iterable[int]) -> None:
        for number in numbers:
            at = number * shape[3]
            end = min(at + shape[3], num_tokens)
            if formats[number].codec:
                decode_block(views[number], formats[number], joined[:, :, :, at:end])
            else:
                block = numpy.frombuffer(views[number], word).reshape(shape)
                words[:, :, :, at:end] = block[:, :, :, : end - at]

    num_threads = min(os.cpu_count() or 1, MAX_COPIERS)
    if words.nbytes < PARALLEL_COPY or num_threads == 1:
        copy(range(len(views)))
    else:
        from concurrent.futures import ThreadPoolExecutor

        try:
            with ThreadPoolExecutor(num_threads) as threads:
                list(threads.map(copy, [range(n, len(views), num_threads) for n in range(num_threads)]))
        except RuntimeError:  # no more threads can be started
            copy(range(len(views)))
    return joined


class _Rows:
    """The rows of a `DynamicCache` as `PrefixCache.store` reads them, as those of a `SharedPrefix`."""

    hashes: Sequence[str] = ()  # of blocks that are known to be those of every row

    def __init__(self, layers: list[tuple[Any, Any]]) -> None:
        self._layers = layers
        self.num_rows = len(layers[0][0]) if layers else 0
        self.dtype = layers[0][0].dtype if layers else None

    def block_shape(self, block_size: int) -> tuple[int, ...]:
        """Return the shape of a block of KV."""
        _, heads, _, head_size = self._layers[0][0].shape
        return len(self._layers), 2, heads, block_size, head_size

    def length_of(self, row: int, num_tokens: int) -> int:
        """Return the number of tokens of a row, for which the caller has `num_tokens`."""
        return int(self._layers[0][0].shape[2])

    def copy_tokens(self, row: int, start: int, stop: int, out: Any) -> None:
        """Copy the KV of some tokens of a row into `out`, a tensor of `block_shape(stop - start)`."""
        for index, layer in enumerate(self._layers):
            for which, states in enumerate(layer):
                out[index, which] = states[row, :, start:stop]


def _dense_layers(cache: Any) -> list[tuple[Any, Any]]:
    """Return (keys, values) of each layer of a cache; UnsupportedError if a layer does not keep every token."""
    dense = _library("transformers").cache_utils.DynamicLayer
    layers = []
    for number, layer in enumerate(cache.layers):
        if type(layer) is not dense:
            raise UnsupportedError(
                f"layer {number} is a {type(layer).__name__}, which does not keep the keys and values of every token "
                "as they are (sliding window, linear attention, quantized, static): it can't be cached in blocks"
            )
        if layer.is_initialized and layer.get_seq_length():
            layers.append((layer.keys.detach(), layer.values.detach()))
    shapes = {(tuple(states.shape), states.dtype) for layer in layers for states in layer}
    if len(shapes) > 1 or (layers and len(layers) != len(cache.layers)):
        raise UnsupportedError(f"the layers differ in shape or dtype, or some are empty: {sorted(map(str, shapes))}")
    return layers


def _dynamic_cache(kv: Any, batch_size: int) -> Any:
    """Return a DynamicCache over an array of shape (layers, 2, heads, tokens, head size), without a copy."""
    caches = _library("transformers").cache_utils
    cache = caches.DynamicCache()
    for keys, values in kv:
        layer = caches.DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys = keys.expand(batch_size, *keys.shape)
        layer.values = values.expand(batch_size, *values.shape)
        cache.layers.append(layer)
    return cache


# ======================================================================================================================
# Store
# ======================================================================================================================


class CacheStore:
    """The pools of one store directory. It keeps nothing in memory: the segments themselves are the list."""

    def __init__(self, store_path: str | os.PathLike[str] | None = None) -> None:
        """Use `store_path` (default: `$CORTEX_CACHE_DIR`, or ~/.config/cortex/kv_cache); `create` makes it."""
        self.store_path = _real_store_path(store_path)

    def create(self, config: CachePoolConfig, progress: Progress | None = None) -> KVCachePool:
        """Make a pool that stays until it is deleted (tier cpu: or until a reboot); PoolExistsError if it is there."""
        if not isinstance(config, CachePoolConfig):
            raise InvalidArgumentError(f"config is a {type(config).__name__}, it must be a CachePoolConfig")
        pool = KVCachePool._open(self.store_path, config.name, config, create=True, exclusive=True, progress=progress)
        assert pool is not None
        return pool

    def get(self, name: str) -> KVCachePool | None:
        """Return a new handle on the pool of that name, or None."""
        return KVCachePool._open(self.store_path, name)

    def delete(self, name: str) -> bool:
        """Delete a pool, a damaged one too; return False if there is none. Open handles keep it until they are closed.

        If a process is making the pool, this waits for it and then deletes the pool.
        """
        check_name(name)

        if not os.path.isdir(self.store_path):
            return False
        found = False
        with _os_errors(f"delete pool {name!r}"):
            for path in _segment_paths(self.store_path, name).values():
                with contextlib.suppress(FileNotFoundError), Segment(path) as segment:
                    with contextlib.suppress(CorruptionError):
                        if segment.read_live_header() is None:
                            continue
                    os.unlink(path)
                    found = True
        return found

    def list(self) -> builtins.list[str]:
        """Return the names of all pools, sorted, damaged ones too. Never waits. Pools being made are left out."""
        found: set[str] = set()
        if os.path.isdir(self.store_path):
            with _os_errors(f"list the pools of {self.store_path}"):
                for example in _segment_paths(self.store_path, "").values():
                    directory, prefix = os.path.split(example)
                    for segment in os.listdir(directory):
                        if segment.startswith(prefix) and _is_there(os.path.join(directory, segment)):
                            found.add(segment.removeprefix(prefix))
        return sorted(found)

    def restore(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        salvage: bool = False,
        progress: Progress | None = None,
        **changes: Any,
    ) -> KVCachePool | None:
        """Restore a snapshot as `KVCachePool.restore` does; a pool that is made stays until it is deleted."""
        found = restore_snapshot(check_path(path), self.store_path, False, name, changes, salvage, progress)
        return found[0] if found else None

    @staticmethod
    def prune(force: bool = False) -> builtins.list[str]:
        """Remove shared memory that no process can use any more; return the names of the removed segments.

        These are leftovers of killed processes: transient pools, and pools being made. `force=True` also removes
        durable pools that no process has open and whose store directory is not there. Mind that another container may
        see that directory. All others stay, damaged ones too.
        """
        with _os_errors(f"prune {SHM_DIR}"):
            return _remove_leftovers(SHM_DIR, force)[0]


def _is_there(path: str) -> bool:
    """Return True if a pool is at `path`; never waits. Removes leftovers of dead processes."""
    try:
        header = read_header(path)
        if header is not None and (not header.transient or _somebody_has_open(path)):
            return True
        with Segment(path, wait=False) as segment:
            return segment.read_live_header() is not None
    except (FileNotFoundError, BlockingIOError):  # being made, opened or removed
        return False
    except (CacheError, OSError):  # damaged, or another user's: it is there all the same
        return True


# ======================================================================================================================
# Replay
# ======================================================================================================================

MAX_REQUEST = 1 << 20  # blocks; 16 million tokens of 16 a block
OPTIMUM = "optimum"  # Belady's, which knows the future: a bound, not a policy


def read_trace(path: str | os.PathLike[str]) -> list[list[int]]:
    """Return the requests of a trace, each the blocks of a prompt, root first.

    The file has JSON lines, gzipped if its name ends in .gz. A line is an object with `hash_ids`, as Mooncake has it,
    or a list [milliseconds, input tokens, output tokens, parent block, number of new blocks]. A list is a request for
    the path to the parent (-1: none), then new blocks, numbered by first use. CorruptionError names a bad line.
    """
    parents: list[int] = []
    requests: list[list[int]] = []
    name = check_path(path)
    for number, line in _numbered_lines(name):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if isinstance(row, dict):
                blocks = [operator.index(block) for block in row["hash_ids"]]
            else:
                _, _, _, parent, num_new = map(operator.index, row)
                if not -1 <= parent < len(parents) or num_new < 0:
                    raise ValueError(f"parent {parent} of {num_new} new blocks, after {len(parents)} blocks")
                blocks, block = [], parent
                while block >= 0:
                    blocks.append(block)
                    block = parents[block]
                blocks.reverse()
                check_int("number of blocks of a request", len(blocks) + num_new, 0, MAX_REQUEST)
                for _ in range(num_new):
                    blocks.append(len(parents))
                    parents.append(parent)
                    parent = blocks[-1]
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise CorruptionError(f"{name}, line {number} is no request: {error or type(error).__name__}") from None
        requests.append(blocks)
    return requests


def _numbered_lines(path: str) -> Iterator[tuple[int, bytes]]:
    import gzip

    with _os_errors(f"read the trace {path}"), (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        try:
            yield from enumerate(file, 1)
        except (EOFError, zlib.error) as error:
            raise CorruptionError(f"{path} is cut or damaged: {error}") from None


def replay(
    requests: Iterable[Sequence[int]],
    policy: str,
    capacity: int,
    blocks: Mapping[int, int] | None = None,
    as_pool: bool = False,
) -> tuple[int, int]:
    """Return (hits, usable hits), in block accesses, of a cache for `capacity` blocks, empty at first.

    A hit is usable when all blocks before it in its request are hits too. Every request is stored whole, its deepest
    block queued first; then victims are evicted until the rest fits. The order is an `EvictionOrder`, as in a pool.
    `policy` may be "optimum" (Belady's) or have weights, "adaptive:0.4/0.3/0.3" for recency, frequency and size. Each
    key takes one block, or its number in `blocks`; then the optimum is only a good policy, not the best.

    On a trace, blocks that a request has just stored may be evicted first. The last block of a request ends a prompt
    for ADAPTIVE: traces count the partial last block, which is seldom used again. `as_pool` is for recordings: blocks
    just stored stay as long as they can, as in a pool. A request of one block is a `get`, which fifo does not count.
    No block ends a prompt, as `PrefixCache` stores full blocks only.
    """
    capacity = check_int("capacity", capacity, 1)
    requests = list(requests)
    blocks = blocks or {}
    if policy == OPTIMUM:
        return _replay_optimum(requests, capacity, blocks)
    num_slots = capacity + max(map(len, requests), default=0)
    slot_of: dict[int, int] = {}
    block_of = [0] * (num_slots + 1)
    kind, weights = split_policy(policy)
    order = private_order(kind, num_slots, capacity, lambda slot: blocks.get(block_of[slot], 1))
    order.configure(pack_weights(weights))
    used = 0
    free = list(range(num_slots, 0, -1))
    hits = usable = 0
    for request in requests:
        path, new = [], set()
        for block in dict.fromkeys(request):
            slot = slot_of.get(block, 0)
            if not slot:
                slot_of[block] = slot = free.pop()
                block_of[slot] = block
                used += blocks.get(block, 1)
                order.stamp(slot, order.recall(b"%d" % block), 0)
                order.link(slot)
                new.add(slot)
            elif not new:
                usable += 1
            path.append(slot)
        hits += len(path) - len(new)
        if as_pool and len(path) == 1:
            if not new:
                order.touch(slot)
        else:
            order.touch_path(path, new, ends_prompt=not as_pool)
        victims: list[int] = []
        kept = set(path) if as_pool else set()
        for slot in order.victims() if used > capacity else ():
            if slot not in kept:
                victims.append(slot)
                used -= blocks.get(block_of[slot], 1)
                if used <= capacity:
                    break
        while used > capacity:
            victims.append(path.pop())
            used -= blocks.get(block_of[victims[-1]], 1)
        for slot in victims:
            order.remember(slot, b"%d" % block_of[slot])
            order.unlink(slot)
            del slot_of[block_of[slot]]
            free.append(slot)
    return hits, usable


def _replay_optimum(requests: Sequence[Sequence[int]], capacity: int, blocks: Mapping[int, int]) -> tuple[int, int]:
    """Return as `replay` does. The victims are the blocks whose next use is farthest away (Belady, 1966)."""
    never = len(requests)
    next_use: list[list[int]] = []
    seen: dict[int, int] = {}
    for number in range(never - 1, -1, -1):
        next_use.append([seen.get(block, never) for block in requests[number]])
        seen.update(dict.fromkeys(requests[number], number))
    cached: dict[int, int] = {}
    latest: list[tuple[int, int, int]] = []
    hits = usable = used = 0
    for request in requests:
        run = [block in cached for block in request]
        hits += sum(run)
        usable += run.index(False) if False in run else len(run)
        for depth, (block, use) in enumerate(zip(request, next_use.pop(), strict=True)):
            used += 0 if block in cached else blocks.get(block, 1)
            cached[block] = use
            heapq.heappush(latest, (-use, -depth, block))
        while used > capacity:
            use, _, block = heapq.heappop(latest)
            if cached.get(block) == -use:
                del cached[block]
                used -= blocks.get(block, 1)
    return hits, usable


# ======================================================================================================================
# Command line
# ======================================================================================================================

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
ENGINES = ("vllm", "sglang", "lmcache", "llama_cpp")  # of `doctor`; kv_cache_engines.doctor knows more of them


class _ProgressLine:
    """A progress line on stderr, for what takes longer than a second, when it is a terminal."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._started = self._shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._started > 1 and (now - self._shown > 0.1 or done >= total):
            self._shown = now
            end = "\n" if done >= total else ""
            line = f"\r{self._doing}: {format_size(done)} of {format_size(total)}, {100 * done // max(total, 1)} %"
            sys.stderr.write(line + end)
            sys.stderr.flush()


def _out(text: str) -> None:
    """Write data to stdout."""
    sys.stdout.write(text + "\n")


def _say(text: str) -> None:
    """Write a message to stderr."""
    with contextlib.suppress(OSError):  # stderr can't be written, but the command has done its work
        sys.stderr.write(text + "\n")


def _print_table(rows: list[list[str]]) -> None:
    """Print columns as wide as they need to be, the first one flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        _out("  ".join(cells).rstrip())


def _hit_rate(stats: Mapping[str, Any]) -> str:
    hits, misses = _plural(stats["hits"], "hit"), _plural(stats["misses"], "miss", "misses")
    return f"{100 * stats['hit_rate']:.1f}% ({hits}, {misses})"


def _plural(count: int, noun: str, nouns: str = "") -> str:
    return f"{count} {noun if count == 1 else nouns or noun + 's'}"


# Kinds of memory, and of savings: the keys of `KVCachePool.get_memory`, each with the words for it.
_MEMORY = {
    "value": "values",
    "deleted": "deleted but pinned",
    "writing": "being stored",
    "padding": "padding",
    "free": "free",
}
_SAVINGS = {"saved_by_sharing": "by sharing", "saved_by_codec": "by codec"}
PINS_SHOWN = 4


def _pins_text(pins: Sequence[Mapping[str, int]]) -> str:
    """Return the processes in `get_memory()["pins"]` as text: those that hold most."""
    shown = [
        f"{format_size(pin['bytes'])} in {_plural(pin['entries'], 'entry', 'entries')} by process {pin['pid']}"
        for pin in pins[:PINS_SHOWN]
    ]
    if len(pins) > PINS_SHOWN:
        shown.append(_plural(len(pins) - PINS_SHOWN, "more process", "more processes"))
    return ", ".join(shown) or "nothing"


class KVCacheCLI:
    """The commands of `cortex cache`: the method of a command takes the parsed arguments and returns the exit code.

    `build_parser` describes each in one line: docstrings would be missing under `python -OO`.
    """

    def __init__(self, store_path: str | None = None) -> None:
        self._store_path = store_path

    def __getattr__(self, name: str) -> CacheStore:
        """Make `store` when a command first needs it. Commands that don't need it work without a home directory."""
        if name != "store":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self.store = CacheStore(self._store_path)
        return self.store

    def create(self, args: argparse.Namespace) -> int:
        given = vars(args)
        config = CachePoolConfig(
            args.name,
            parse_size(args.size),
            tier=given.get("tier") or "cpu",
            eviction_policy=given.get("policy") or "lru",
            max_entries=CachePoolConfig.max_entries if given.get("max_entries") is None else args.max_entries,
            persist_path=given.get("persist_path"),
            block_size=parse_size(given.get("block_size") or str(BLOCK_SIZE)),
            record=given.get("record") or 0,
        )
        with self.store.create(config, _ProgressLine("reserving")) as pool:
            stats = pool.get_stats()
        _say(
            f"created {args.name}: {format_size(config.size_bytes)}, tier {config.tier}, "
            f"policy {config.eviction_policy}, {stats['total_blocks']} blocks of {format_size(config.block_size)}"
        )
        return EXIT_DONE

    def status(self, args: argparse.Namespace) -> int:
        names = [args.name] if args.name else self.store.list()
        found: list[dict[str, Any]] = []
        failed = 0
        for name in names:
            try:
                with self._open(name) as pool:
                    stats = pool.get_stats()
                    if args.name or vars(args).get("json"):
                        stats["memory"] = pool.get_memory()
                stats["attached_pids"].remove(os.getpid())  # show other processes only
                found.append(stats)
            except PoolNotFoundError:
                if args.name:  # else it has just been deleted
                    raise
            except CacheError as error:
                if args.name:
                    raise
                _say(f"{name}: {_printable(str(error))}")
                failed += 1
        if vars(args).get("json"):
            _out(json.dumps(found[0] if args.name and found else found, indent=2))
        elif args.name and found:
            for key, value in self._describe(found[0]).items():
                _out(f"{key + ':':<14} {value}")
        elif found:
            rows = [["NAME", "TIER", "POLICY", "SIZE", "USED", "ENTRIES", "HIT RATE", "EVICTIONS", "PROCESSES"]]
            for stats in found:
                row = [stats["name"], stats["tier"], stats["policy"], format_size(stats["size_bytes"])]
                row += [
                    f"{stats['utilization_percent']:.1f}%",
                    str(stats["entry_count"]),
                    f"{100 * stats['hit_rate']:.1f}%",
                ]
                rows.append([*row, str(stats["evictions"]), str(len(stats["attached_pids"]))])
            _print_table(rows)
        elif not failed:
            _say(f"no pools in {self.store.store_path}")
        return EXIT_FAILED if failed else EXIT_DONE

    @staticmethod
    def _describe(stats: Mapping[str, Any]) -> dict[str, str]:
        blocks = (
            f"{stats['allocated_blocks']} of {stats['total_blocks']} in use, {format_size(stats['block_size'])} each"
        )
        weights = stats["adaptive_weights"]
        free_run = format_size(stats["largest_free_run"] * stats["block_size"])
        return {
            "name": stats["name"],
            "tier": stats["tier"],
            "policy": stats["policy"]
            + (f", weights {'/'.join(f'{w:g}' for w in weights.values())}" if weights else ""),
            "size": f"{format_size(stats['size_bytes'])}, {format_size(stats['data_size_bytes'])} for data",
            "blocks": blocks,
            "used": f"{stats['utilization_percent']:.1f}%",
            "entries": f"{stats['entry_count']} of {stats['max_entries']}, {stats['pinned_entries']} pinned",
            "hit rate": _hit_rate(stats),
            "puts": str(stats["puts"]),
            "evictions": str(stats["evictions"]),
            "fragmentation": f"{100 * stats['fragmentation']:.1f}%, largest free run {free_run}",
            **KVCacheCLI._describe_memory(stats["memory"]),
            "attached": ", ".join(map(str, stats["attached_pids"])) or "no process",
        }

    @staticmethod
    def _describe_memory(memory: Mapping[str, Any]) -> dict[str, str]:
        size = {name: format_size(memory[f"{name}_bytes"]) for name in (*_MEMORY, *_SAVINGS)}
        kinds = [f"{size[name]} {what}" for name, what in _MEMORY.items() if memory[f"{name}_bytes"] or name == "free"]
        sharers = memory["entries_by_sequences"]
        by_many = sum(count for number, count in sharers.items() if number > 2)
        return {
            "memory": ", ".join(kinds),
            "sequences": f"{_plural(sharers.get(1, 0), 'entry', 'entries')} in 1, {sharers.get(2, 0)} in 2, "
            f"{by_many} in 3 or more",
            "saved": ", ".join(f"{size[name]} {how}" for name, how in _SAVINGS.items()),
            "pinned": _pins_text(memory["pins"]),
        }

    def list(self, args: argparse.Namespace) -> int:
        with self._open(args.name) as pool:
            entries = list(pool.entries.values())
        if vars(args).get("json"):
            _out(json.dumps([entry.to_dict() for entry in entries], indent=2))
            return EXIT_DONE
        now = time.time()
        rows = [["KEY", "SIZE", "USES", "IDLE", "PRIORITY", "LAYER", "TOKENS", "PREFIX"]]
        for entry in entries:
            row = [_printable(entry.key), format_size(entry.size), str(entry.access_count)]
            row += [f"{max(0.0, now - entry.last_accessed):.0f} s", str(entry.priority), str(entry.layer_index)]
            rows.append([*row, str(entry.sequence_length), _printable(entry.prefix_hash) or "-"])
        if entries:
            _print_table(rows)
        else:
            _say(f"{args.name} has no entries")
        return EXIT_DONE

    def put(self, args: argparse.Namespace) -> int:
        given = vars(args)
        file = given.get("file") or "-"
        with self._open(args.name) as pool:
            encode_key(args.key)
            limit = pool.get_stats()["data_size_bytes"]
            data = self._read(file, limit)
            names = ("prefix_hash", "priority", "sequence_length", "layer_index")
            meta = {name: given[name] for name in names if given.get(name)}
            if len(data) > limit:
                raise StorageError(
                    f"{args.key!r} with more than {limit} bytes does not fit: {args.name} holds {limit}; "
                    "make a larger pool"
                )
            if not pool.put(args.key, data, **meta):
                raise StorageError(
                    f"{args.key!r} with {len(data)} bytes does not fit beside what is pinned in {args.name}, which "
                    f"holds {limit}: {_pins_text(pool.get_memory()['pins'])}; unpin, end the process, or make a larger "
                    "pool"
                )
        _say(f"stored {args.key} ({format_size(len(data))}) in {args.name}")
        return EXIT_DONE

    @staticmethod
    def _read(file: str, limit: int) -> bytearray:
        """Read a file or standard input, just over `limit` bytes at most; in pieces, so that Ctrl-C gets through."""
        data = bytearray()
        with _os_errors(f"read {file!r}"), contextlib.ExitStack() as stack:
            source: Any = sys.stdin.buffer if file == "-" else stack.enter_context(open(file, "rb"))
            while len(data) <= limit and (piece := source.read1(COPY_CHUNK)):
                data += piece
        return data

    def get(self, args: argparse.Namespace) -> int:
        file = vars(args).get("file") or "-"
        with self._open(args.name) as pool, pool.view(args.key) as view:
            if view is None:
                _say(f"cortex cache: {args.name} has no entry {args.key!r}: see `cortex cache list {args.name}`")
                return EXIT_FAILED
            if file == "-":
                sys.stdout.flush()
                sys.stdout.buffer.write(view)
                sys.stdout.buffer.flush()
            else:
                with _os_errors(f"write {file!r}"), open(file, "wb") as output:
                    output.write(view)
        return EXIT_DONE

    def evict(self, args: argparse.Namespace) -> int:
        with self._open(args.name) as pool:
            count = pool.evict(float(args.percent))
            left = len(pool)
        _say(f"evicted {_plural(count, 'entry', 'entries')} of {args.name}, {left} left")
        return EXIT_DONE

    def persist(self, args: argparse.Namespace) -> int:
        with self._open(args.name) as pool:
            path = vars(args).get("path") or pool.default_snapshot_path
            count = pool._persist(path, _ProgressLine("writing"))
        _say(
            f"persisted {_plural(count, 'entry', 'entries')} of {args.name} to {path}, "
            f"{format_size(os.stat(path).st_size)}"
        )
        return EXIT_DONE

    def restore(self, args: argparse.Namespace) -> int:
        given = vars(args)
        path = self._snapshot_path(args.path)
        changes: dict[str, Any] = {"tier": given.get("tier"), "eviction_policy": given.get("policy")}
        changes["max_entries"] = given.get("max_entries")
        changes["size_bytes"] = parse_size(args.size) if given.get("size") else None
        changes["block_size"] = parse_size(args.block_size) if given.get("block_size") else None
        changes = {key: value for key, value in changes.items() if value is not None}
        salvage = bool(given.get("salvage"))
        progress = _ProgressLine("verifying")
        found = restore_snapshot(path, self.store.store_path, False, given.get("name"), changes, salvage, progress)
        if found is None:
            raise StorageError(
                f"there is no file {args.path!r}, and no snapshot {path}: give the file that was persisted"
            )
        pool, restored, total = found
        with pool:
            pins = pool.get_memory()["pins"] if restored < total else ()
        left = f"; {total - restored} did not fit" if restored < total and not salvage else ""
        left += f"; pinned there: {_pins_text(pins)}" if left and pins else ""
        _say(f"restored {restored} of {_plural(total, 'entry', 'entries')} to {pool.name} from {path}{left}")
        return EXIT_DONE

    def _snapshot_path(self, path_or_name: str) -> str:
        """Return the path of a file of that name, or the default snapshot path of a pool of that name."""
        if os.path.exists(path_or_name) or not _NAME.fullmatch(path_or_name):
            return path_or_name
        with contextlib.suppress(CacheError), self._open(path_or_name) as pool:
            return pool.default_snapshot_path
        return os.path.join(self.store.store_path, path_or_name + SNAPSHOT_SUFFIX)

    def configure(self, args: argparse.Namespace) -> int:
        with self._open(args.name) as pool:
            pool.set_eviction_policy(args.policy)
        _say(f"{args.name} goes by {args.policy} now")
        return EXIT_DONE

    def check(self, args: argparse.Namespace) -> int:
        given = vars(args)
        with self._open(args.name) as pool:
            problems = pool.check(fix=bool(given.get("fix")))
            left = pool.check() if problems and given.get("fix") else problems
        if given.get("json"):
            _out(json.dumps({"name": args.name, "problems": problems, "fixed": bool(problems) and not left}, indent=2))
        else:
            for problem in problems:
                _out(problem)
        verdict = (
            "sound" if not problems else f"{_plural(len(problems), 'problem')} found" + ("" if left else " and fixed")
        )
        _say(f"{args.name}: {verdict}")
        return EXIT_FAILED if left else EXIT_DONE

    def delete(self, args: argparse.Namespace) -> int:
        if not self.store.delete(args.name):
            raise PoolNotFoundError(f"there is no pool {args.name!r} in {self.store.store_path}")
        _say(f"deleted {args.name}")
        return EXIT_DONE

    def prune(self, args: argparse.Namespace) -> int:
        with _os_errors(f"prune {SHM_DIR}"):
            removed, left = _remove_leftovers(SHM_DIR, bool(vars(args).get("force")))
        if vars(args).get("json"):
            _out(json.dumps(removed, indent=2))
        else:
            for segment in removed:
                _out(segment)
        _say(f"removed {_plural(len(removed), 'segment')}")
        kept = [f"{item.name} ({format_size(item.size_bytes)})" for item in left if item.why == OUT_OF_SIGHT]
        if kept:
            _say(f"kept, as their store directory is not to be seen from here: {', '.join(kept)}; --force removes them")
        return EXIT_DONE

    def replay(self, args: argparse.Namespace) -> int:
        blocks: dict[int, int] = {}
        as_pool = False
        wanted = "1%,5%,10%,20%,40%" if args.sizes is None else args.sizes
        if os.path.exists(args.trace) or not _NAME.fullmatch(args.trace):
            requests = read_trace(args.trace)
        else:
            as_pool = True
            with self._open(args.trace) as pool:
                requests, blocks, hit_rate = pool.recorded_requests()
                config, num_blocks = pool.config, pool.get_stats()["total_blocks"]
            if not config.record:
                raise UnsupportedError(f"pool {args.trace!r} records no accesses: create it with --record N")
            if args.sizes is None:
                wanted = ",".join(str(max(1, num_blocks * times // 4)) for times in (1, 2, 4, 8))
            _say(f"{args.trace}: {num_blocks} blocks, policy {config.eviction_policy}, hit ratio {hit_rate:.4f} so far")
        accesses = sum(map(len, requests))
        unique = sum(blocks.get(block, 1) for block in {block for request in requests for block in request})
        if not accesses:
            raise CorruptionError(f"{args.trace} holds no block accesses")
        sizes = {text: _share_of(text, unique) for text in wanted.split(",")}
        policies = list(dict.fromkeys(args.policies.split(",")))
        for policy in policies:
            if policy != OPTIMUM:
                try:  # a wrong one is an error now, not after all the others
                    split_policy(policy)
                except InvalidArgumentError as error:
                    raise InvalidArgumentError(f"{error}; or {OPTIMUM}") from None
        line = _ProgressLine("replaying")
        rows: list[dict[str, Any]] = []
        for policy in policies:
            for text, capacity in sizes.items():
                hits, usable = replay(requests, policy, capacity, blocks, as_pool)
                rows.append({"policy": policy, "size": text, "blocks": capacity})
                rows[-1] |= {"hit_rate": hits / accesses, "usable_hit_rate": usable / accesses}
                line(len(rows), len(sizes) * len(policies))
        file = vars(args).get("plot")
        drawn = _write_plot(rows, list(sizes), policies, file) if file else False
        if file and not drawn:
            _say(f"{file} is not written, a chart in text instead: it needs pip install 'kv-cache-manager[plot]'")
        if args.json:
            totals = {"requests": len(requests), "accesses": accesses, "unique_blocks": unique}
            _out(json.dumps({**totals, "results": rows}, indent=2))
            return EXIT_DONE
        _out(f"{len(requests)} requests, {accesses} block accesses, {unique} blocks; usable hit ratio (hit ratio)")
        table = [["policy", *(f"{text} = {capacity}" for text, capacity in sizes.items())]]
        for policy in policies:
            found = [row for row in rows if row["policy"] == policy]
            table.append([policy, *(f"{row['usable_hit_rate']:.4f} ({row['hit_rate']:.4f})" for row in found)])
        _print_table(table)
        if file is not None and not drawn:
            _print_chart(rows, list(sizes), policies)
        return EXIT_DONE

    def policies(self, args: argparse.Namespace) -> int:
        if vars(args).get("json"):
            _out(json.dumps({policy.value: text for policy, text in POLICY_HELP.items()}, indent=2))
        else:
            for policy, text in POLICY_HELP.items():
                _out(f"{policy.value:<9} {text}")
        return EXIT_DONE

    def demo(self, args: argparse.Namespace) -> int:
        return _demo()

    def doctor(self, args: argparse.Namespace) -> int:
        given, store_path = vars(args), self.store.store_path
        pool, size = given.get("pool"), given.get("size")
        Geometry.of(CachePoolConfig(check_name(pool or "pool"), parse_size(size or "1G")))  # a wrong one: an error now
        report: dict[str, Any] = {"host": None, "engines": [], "not_installed": [], "self_test": None}
        fixes = 0

        def add(title: str, examined: tuple[dict[str, Any], list[tuple[str, str]]]) -> dict[str, Any]:
            nonlocal fixes
            facts, rows = examined
            fixes += len(facts["fixes"])
            if not given.get("json"):
                rows = rows + [("FIX", text) for text in facts["fixes"]] + [("note", text) for text in facts["notes"]]
                _print_section(title, rows)
            return facts

        report["host"] = add("host", _examine_host(store_path))
        named = list(dict.fromkeys(given.get("engines") or ()))
        try:
            from kv_cache_engines import doctor as engines
        except ImportError as error:
            text = f"the connectors are not installed ({error}): pip install kv-cache-manager"
            facts: dict[str, list[str]] = {"fixes": [text] if named else [], "notes": [] if named else [text]}
            report["connectors"] = add("engines", (facts, []))
        else:
            # The engine must find the pool without the environment and the options of this command.
            is_default = self._store_path is None and not os.environ.get("CORTEX_CACHE_DIR")
            where = {} if is_default else {"store": store_path}
            report["not_installed"] = [name for name in ENGINES if engines.find(name) is None]
            for name in named or [name for name in ENGINES if name not in report["not_installed"]]:
                if sys.stderr.isatty():
                    _say(f"importing kv_cache_engines.{name}, which may take a minute")
                look = functools.partial(_examine_pool, store_path)
                report["engines"].append(add(name, engines.examine(name, pool, size, where, look)))
            if report["not_installed"] and not named and not given.get("json"):
                _out(f"not installed for {sys.executable}: {', '.join(report['not_installed'])}\n")
        report["self_test"] = add("self-test", _self_test())
        if given.get("json"):
            _out(json.dumps({**report, "is_well": not fixes}, indent=2))
        _say(f"{_plural(fixes, 'problem')} to fix" if fixes else "all is well")
        return EXIT_FAILED if fixes else EXIT_DONE

    def completion(self, args: argparse.Namespace) -> int:
        _out(_completion(args.shell))
        return EXIT_DONE

    def _open(self, name: str) -> KVCachePool:
        pool = self.store.get(name)
        if pool is None:
            raise PoolNotFoundError(
                f"there is no pool {name!r} in {self.store.store_path}: see `cortex cache status`, or create it"
            )
        return pool


def _print_chart(rows: Sequence[Mapping[str, Any]], sizes: Sequence[str], policies: Sequence[str]) -> None:
    """Print bars of the usable hit ratios."""
    most = max(row["usable_hit_rate"] for row in rows) or 1.0
    width = max(map(len, policies))
    for size in sizes:
        _out(f"\n{size}")
        for row in rows:
            if row["size"] == size:
                bar = "#" * round(50 * row["usable_hit_rate"] / most)
                _out(f"  {row['policy']:<{width}}  {row['usable_hit_rate']:.4f}  {bar}".rstrip())


def _write_plot(rows: Sequence[Mapping[str, Any]], sizes: Sequence[str], policies: Sequence[str], path: str) -> bool:
    """Draw the usable hit ratios over the sizes, in the format that `path` ends in; return False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for policy in policies:
        ratios = [row["usable_hit_rate"] for row in rows if row["policy"] == policy]
        axes.plot(range(len(sizes)), ratios, marker="o", label=policy, linestyle="--" if policy == OPTIMUM else "-")
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_xlabel("size of the cache")
    axes.set_ylabel("usable hit ratio")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with _os_errors(f"write {path!r}"):
        try:
            figure.savefig(path)
        except ValueError as error:  # a name that says no format, or one that matplotlib has not
            raise InvalidArgumentError(f"{path!r} can't be plotted: {error}") from None
    return True


def _share_of(text: str, unique: int) -> int:
    """Return a number of blocks: "5000", or "5%" of the unique ones."""
    try:
        number = float(text.removesuffix("%"))
        blocks = max(1, int(unique * number / 100)) if text.endswith("%") else int(text)
        if number > 0 and math.isfinite(number):
            return blocks
    except (ValueError, OverflowError):
        pass
    raise InvalidArgumentError(f"size {text!r} must be a number of blocks, or a share of the trace's such as 5%")


def _printable(text: str) -> str:
    """Return a text with its unprintable characters escaped, so that it can't upset a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


DEMO_BLOCK = 2 << 20  # bytes: 16 tokens x 32 layers x (K and V) x 8 heads x 128 x 2 bytes (bf16), as in an 8B model


def _demo_payload(number: int) -> bytes:
    """Return the bytes that any process can verify from the number alone."""
    return hashlib.sha256(str(number).encode()).digest() * (DEMO_BLOCK // 32)


def _demo_reader(store_path: str, numbers: list[int]) -> tuple[float, int]:
    """Read blocks that another process has put; return (seconds, blocks with wrong bytes)."""
    seconds, wrong = 0.0, 0
    with KVCachePool.attach("demo", store_path) as pool:
        for number in numbers:
            started = time.perf_counter()
            data = pool.get(f"block-{number}")
            seconds += time.perf_counter() - started
            wrong += data != _demo_payload(number)
    return seconds, wrong


def _demo_victim(store_path: str, ready: Any) -> None:
    """Write half a block, then wait to be killed."""
    with KVCachePool.attach("demo", store_path) as pool, pool.reserve("block-torn", DEMO_BLOCK) as view:
        assert view is not None
        view[: DEMO_BLOCK // 2] = b"\xff" * (DEMO_BLOCK // 2)
        ready.send("half written")
        time.sleep(60)


def _demo() -> int:
    """Fill, share, kill, check, evict, persist, restore; every line it prints is measured."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="cortex-demo-") as store_path:
        store = CacheStore(store_path)
        try:
            sound = _demo_tour(store)
        finally:
            store.delete("demo")
    _out("cleaned up; " + ("all of it held" if sound else "SOMETHING DID NOT HOLD"))
    return EXIT_DONE if sound else EXIT_FAILED


def _demo_tour(store: CacheStore) -> bool:
    import multiprocessing

    fork = multiprocessing.get_context("fork")
    values = {f"block-{number}": _demo_payload(number) for number in range(24)}

    def speed(num_bytes: float, seconds: float) -> str:
        return f"{num_bytes / seconds / 1e9:.1f} GB/s"

    size_bytes = HEADER_SIZE + BITMAP_SIZE + 16 * DEMO_BLOCK  # fits into the 64 MB that Docker gives
    pool = store.create(CachePoolConfig("demo", size_bytes))
    _out(
        f"pool      {format_size(size_bytes)} of shared memory, policy lru; a block of KV is {format_size(DEMO_BLOCK)}"
    )

    started = time.perf_counter()
    stored = sum(pool.put(key, value) for key, value in values.items())
    rate = speed(stored * DEMO_BLOCK, time.perf_counter() - started)
    stats = pool.get_stats()
    evicted = stats["evictions"]
    _out(f"put       {stored} blocks at {rate}; {stats['entry_count']} fit, {evicted} of the oldest were evicted")

    numbers = [int(key.removeprefix("block-")) for key in pool]
    with fork.Pool(3) as readers:
        results = readers.starmap(_demo_reader, [(store.store_path, numbers)] * 3)
        readers.close()  # the end of the `with` block would kill them, maybe while they hold the pool's own semaphore
        readers.join()
    wrong = sum(result[1] for result in results)
    rate = speed(sum(len(numbers) * DEMO_BLOCK / seconds for seconds, _ in results), 1)
    _out(f"share     3 processes read {len(numbers)} blocks each at {rate} together, {_plural(wrong, 'wrong block')}")

    ours, theirs = fork.Pipe()
    victim = fork.Process(target=_demo_victim, args=(store.store_path, theirs))
    victim.start()
    ours.recv()
    victim.kill()
    victim.join()
    problems = pool.check()
    stats = pool.get_stats()
    leaked = stats["allocated_blocks"] - stats["entry_count"] * (DEMO_BLOCK // BLOCK_SIZE)
    torn = "block-torn" in pool
    _out(
        f"kill -9   a process in the middle of a put: {_plural(len(problems), 'problem')} found by check, "
        f"blocks leaked: {leaked}, torn value visible: {'yes' if torn else 'no'}"
    )

    _out(f"evict     25 %: {pool.evict(25)} blocks, {len(pool)} left")

    path = os.path.join(store.store_path, "demo.safetensors")
    started = time.perf_counter()
    pool.persist(path)
    num_bytes = os.stat(path).st_size
    rate = speed(num_bytes, time.perf_counter() - started)
    _out(f"persist   {len(pool)} blocks, {format_size(num_bytes)}, to a safetensors file at {rate}, fsync included")

    kept = list(pool)
    pool.close()
    store.delete("demo")
    started = time.perf_counter()
    restored = store.restore(path)
    rate = speed(num_bytes, time.perf_counter() - started)
    assert restored is not None
    with restored as pool:
        same = sum(pool.get(key) == values[key] for key in kept)
        _out(f"restore   {len(pool)} blocks into a new pool at {rate}, {same} of {len(kept)} byte for byte the same")
        for key in values:
            pool.get(key)
        _out(f"hit rate  {_hit_rate(pool.get_stats())}: what was evicted is missed")
        problems += pool.check()
    return not (wrong or problems or leaked or torn) and same == len(kept)


def _print_section(title: str, rows: list[tuple[str, str]]) -> None:
    """Print a part of what `doctor` says: a line for each row, or below it if the text has several lines."""
    _out(title)
    for name, text in rows:
        lines = [_printable(line) for line in text.splitlines()]
        _out("\n    ".join([f"  {name:<10} {lines[0]}".rstrip(), *lines[1:]]))
    _out("")
    sys.stdout.flush()


def _examine_host(store_path: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return (facts, rows of text) about this machine and the store; `fixes` in the facts are what must be mended."""
    fixes: list[str] = []
    notes: list[str] = []
    machine, python = f"{os.uname().sysname} {os.uname().machine}", sys.version.split()[0]
    facts: dict[str, Any] = {"python": python, "version": __version__, "machine": machine, "shm": None, "pools": []}
    facts |= {"reads_without_lock": LOADS_IN_ORDER, "store": store_path, "fixes": fixes, "notes": notes}
    reads = "reads take no lock" if LOADS_IN_ORDER else "reads take the lock, as it is not x86-64"
    rows = [("Python", f"{python}, kv-cache-manager {__version__}"), ("machine", f"{machine}, {reads}")]
    try:
        found = os.statvfs(SHM_DIR)
    except OSError as error:
        fixes.append(f"{SHM_DIR} is not there ({error.strerror}): mount a tmpfs there, with Docker not --ipc none")
    else:
        size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
        may_create = os.access(SHM_DIR, os.W_OK | os.X_OK)
        facts["shm"] = {"size_bytes": size, "free_bytes": free, "may_create": may_create}
        space = f"{format_size(size)}, {format_size(free)} free" if size else "without a limit of its own"
        rows.append((SHM_DIR, f"{space}; this process {'may' if may_create else 'may not'} create segments"))
        if not may_create:
            fixes.append(f"user {os.geteuid()} can't write {SHM_DIR}: mount it writable, with mode 1777")
        if 0 < size <= 64 << 20:
            notes.append(f"{SHM_DIR} is as small as Docker makes it: run the container with --shm-size 20g, say")
    available = _available_memory()
    limits = [text for directory in _cgroup_directories() for _, text in _cgroup_memory(directory)]
    facts["memory"] = {"available_bytes": available and available[0], "by": available and available[1]}
    facts["memory"]["cgroup_limits"] = limits
    if available is not None:
        bound = "" if available[1] in limits else f"; limits: {', '.join(limits)}" if limits else "; no cgroup limit"
        rows.append(("memory", f"{format_size(available[0])} available of {available[1]}{bound}"))
    above = store_path
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    facts["store_is_writable"] = os.path.isdir(above) and os.access(above, os.R_OK | os.W_OK | os.X_OK)
    if facts["store_is_writable"] and above != store_path:
        probe = os.path.join(above, f".cortex-doctor-{os.getpid()}")
        try:
            os.mkdir(probe)
            os.rmdir(probe)
        except OSError:  # /proc lets root write, but makes no directories
            facts["store_is_writable"] = False
    rows.append(("store", store_path if above == store_path else f"{store_path}, not there yet"))
    if not facts["store_is_writable"]:
        fixes.append(f"user {os.geteuid()} can't write a directory {above}: set CORTEX_CACHE_DIR, or use --store")
    else:
        try:
            fd = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(fd)
        except BlockingIOError:  # another process has it: locks work there
            pass
        except OSError as error:
            fixes.append(f"{above} can't be locked ({error.strerror}): choose a store directory on a local disk")
    try:
        facts["pools"] = [_examine_pool(store_path, name) for name in CacheStore(store_path).list()]
    except CacheError as error:
        fixes.append(f"{error}: run this as the user that owns the pools")
    pools = [f"{each['name']} ({format_size(each['size_bytes'])})" for each in facts["pools"] if each["is_there"]]
    rows.append(("pools", ", ".join(pools) or "none"))
    fixes += [each["problem"] for each in facts["pools"] if each["problem"]]
    return facts, rows


def _examine_pool(store_path: str, name: str, size_bytes: int = 0, max_entries: int = 1) -> dict[str, Any]:
    """Return facts about a pool, or else about making one; `problem` is "" if all is well.

    Reads only the header, so it waits for no process that is stopped.
    """
    facts: dict[str, Any] = {"name": name, "is_there": False, "problem": ""}
    try:
        for path in _segment_paths(store_path, name).values():
            with _os_errors(f"open {path}"), contextlib.suppress(FileNotFoundError):
                header = read_header(path)
                if header is not None and (not header.transient or _somebody_has_open(path)):
                    config, geometry = header.config, header.geometry
                    facts |= {"is_there": True, "tier": config.tier, "policy": config.eviction_policy}
                    break
        else:
            if size_bytes:
                geometry = Geometry.of(CachePoolConfig(name, size_bytes, max_entries=max_entries))
                with _os_errors(f"look at {SHM_DIR}"):
                    short = _space_shortage(SHM_DIR, geometry.total_bytes) or _memory_shortage(geometry.total_bytes)
                facts["problem"] = short and f"pool {name!r} can't be made: {short}"
    except CacheError as error:
        facts["problem"] = f"{error}{'' if isinstance(error, CorruptionError) else ': run this as its owner'}"
        return facts
    if size_bytes or facts["is_there"]:
        facts |= {"size_bytes": geometry.size_bytes, "total_bytes": geometry.total_bytes}
        facts |= {"block_size": geometry.block_size, "num_blocks": geometry.num_blocks}
        facts["max_entries"] = geometry.max_entries
    return facts


SELF_TEST_VALUE = 256 << 10  # bytes: more than COPY_UNDER_LOCK, as blocks of KV are


def _end_self_test(store_path: str) -> None:
    """Remove the pool of the self-test and its store."""
    import shutil

    with contextlib.suppress(CacheError):
        CacheStore(store_path).delete("self-test")
    shutil.rmtree(store_path, ignore_errors=True)


def _self_test_victim(store_path: str, ours: Any, theirs: Any) -> None:
    """Write half a value over one that is pinned, say if that was as it should be, and wait to be killed.

    Remove all that there is if the parent is killed first.
    """
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    ours.close()
    with contextlib.suppress(EOFError, OSError):  # from the pipe, once the parent is dead
        theirs.recv()
        with KVCachePool.attach("self-test", store_path) as pool:
            is_same = pool.get("kept") == b"\1" * SELF_TEST_VALUE and pool.pin("kept")
            with pool.reserve("kept", SELF_TEST_VALUE) as target:
                if target is not None:
                    target[: SELF_TEST_VALUE // 2] = b"\2" * (SELF_TEST_VALUE // 2)
                theirs.send(is_same and target is not None)
                theirs.recv()
    _end_self_test(store_path)


def _self_test() -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Put, view and compare in a pool of its own; kill a process in the middle of a put, and look at what is left.

    Nothing remains, also if this process is killed.
    """
    import multiprocessing

    value, steps = b"\1" * SELF_TEST_VALUE, dict[str, bool]()
    facts: dict[str, Any] = {"steps": steps, "fixes": [], "notes": []}
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    store_path = os.path.join(SHM_DIR, f"cortex-doctor-{os.urandom(8).hex()}")  # /tmp may be read-only
    victim = fork.Process(target=_self_test_victim, args=(store_path, ours, theirs), daemon=True)
    try:
        victim.start()  # before there is anything to remove
        theirs.close()
        with _os_errors(f"make a directory in {SHM_DIR}"):
            os.mkdir(store_path, mode=0o700)
        config = CachePoolConfig("self-test", 8 * SELF_TEST_VALUE, max_entries=16)
        with KVCachePool(config, store_path=store_path) as pool:
            stored = pool.put("kept", value)
            with pool.view("kept") as view:
                steps["a value is put and viewed"] = stored and view is not None and bytes(view) == value
            ours.send("go on")
            steps["another process reads it, and pins it"] = ours.poll(30) and ours.recv()
            before = pool.get_stats()["pinned_entries"]
            _end_self_test(store_path)  # the pool is in memory only from here on
            victim.kill()
            victim.join()
            steps["after its kill -9 in a put, the old value is whole"] = pool.get("kept") == value
            steps["its pin is gone"] = before == 1 and pool.get_stats()["pinned_entries"] == 0
            steps["check finds nothing"] = pool.check() == []
    except (CacheError, OSError, EOFError) as error:
        facts["fixes"].append(str(error) or "the second process of the self-test ended by itself: report this")
    finally:
        if victim.pid:
            victim.kill()
            victim.join()
        _end_self_test(store_path)
    failed = [step for step, is_done in steps.items() if not is_done]
    facts["fixes"] += [f"it is not so that {step}: use no pools on this machine, and report this" for step in failed]
    return facts, [("passed", step) for step, is_done in steps.items() if is_done]


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser of `cortex cache`."""
    import argparse

    class Parser(argparse.ArgumentParser):
        """A parser whose errors take one line."""

        def error(self, message: str) -> NoReturn:
            found = re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL)
            if found:
                import difflib

                known = re.findall(r"[\w-]+", found[3])
                near = difflib.get_close_matches(found[2].lower(), known, 1)
                fix = f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(known)}"
                message = f"argument {found[1]}: {found[2]!r} is not known: {fix}"
            self.exit(EXIT_USAGE, f"{self.prog}: {_printable(message)}; see `{self.prog} --help`\n")

        def _check_value(self, action: argparse.Action, value: Any) -> None:
            if value != []:  # Python 3.10 looks for it among the choices when there are no arguments
                super()._check_value(action, value)

    width = 80  # argparse would find it too, by imports that take longer than everything else
    with contextlib.suppress(ValueError, OSError, AttributeError):
        width = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
    look: Any = functools.partial(argparse.HelpFormatter, width=width - 2)
    about = "A shared-memory KV cache for LLM inference."
    parser = Parser(prog="cortex cache", description=about, formatter_class=look)
    parser.add_argument("--version", action="version", version=f"kv-cache-manager {__version__}")
    common = Parser(add_help=False, formatter_class=look)
    store_help = "store directory (default: $CORTEX_CACHE_DIR or ~/.config/cortex/kv_cache)"
    parser.add_argument("--store", metavar="DIR", help=store_help)
    common.add_argument("--store", metavar="DIR", help=store_help, default=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, prog=parser.prog)

    def command(name: str, text: str, *, json_too: bool = False) -> argparse.ArgumentParser:
        about = f"{text[0].upper()}{text[1:]}."
        sub = commands.add_parser(name, help=text, description=about, parents=[common], formatter_class=look)
        if json_too:
            sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    def pool_options(sub: argparse.ArgumentParser, size_needed: bool) -> None:
        def or_else(default: str) -> str:
            return f"default {default}" if size_needed else "default: as in the snapshot"

        size_help = "bytes of header, bitmap and data, such as 16G or 512M"
        sub.add_argument(
            "--size", required=size_needed, help=size_help if size_needed else f"{size_help}; {or_else('')}"
        )
        tier_help = f"cpu: shared memory; nvme: a mapped file; {or_else('cpu')}"
        sub.add_argument("--tier", choices=["cpu", "nvme", "gpu"], help=tier_help)
        policy_help = f"see `policies`; {or_else('lru')}"
        sub.add_argument("--policy", choices=[policy.value for policy in EvictionPolicy], help=policy_help)
        sub.add_argument("--block-size", metavar="SIZE", help=f"unit of allocation; {or_else('4K')}")
        sub.add_argument("--max-entries", type=int, metavar="N", help=f"most entries at a time; {or_else('10000')}")

    sub = command("create", "make a pool that stays until it is deleted")
    sub.add_argument("name", metavar="NAME")
    pool_options(sub, True)
    sub.add_argument("--persist-path", metavar="PATH", help="where `persist` writes by default")
    sub.add_argument("--record", type=int, metavar="N", help="keep the last N accesses, for `replay NAME`")
    sub = command("status", "show one pool, or a line for each", json_too=True)
    sub.add_argument("name", metavar="NAME", nargs="?")
    sub = command("list", "list the entries of a pool, next victim first", json_too=True)
    sub.add_argument("name", metavar="NAME")
    sub = command("put", "store a file, or standard input, under a key")
    sub.add_argument("name", metavar="NAME")
    sub.add_argument("key", metavar="KEY")
    sub.add_argument("file", metavar="FILE", nargs="?", help="default: standard input")
    sub.add_argument("--prefix-hash", metavar="TEXT", help="names the prompt prefix that the value belongs to")
    sub.add_argument("--priority", type=int, metavar="N", help="for policy priority: higher stays longer")
    sub.add_argument("--sequence-length", type=int, metavar="N", help="how many tokens it covers")
    sub.add_argument("--layer-index", type=int, metavar="N", help="layer of the model")
    sub = command("get", "write a value to a file, or to standard output")
    sub.add_argument("name", metavar="NAME")
    sub.add_argument("key", metavar="KEY")
    sub.add_argument("file", metavar="FILE", nargs="?", help="default: standard output")
    sub = command("evict", "evict a share of the entries, by policy")
    sub.add_argument("name", metavar="NAME")
    sub.add_argument("--percent", type=float, required=True, metavar="P", help="share of the entries, 0 to 100")
    sub = command("persist", "write a snapshot (a safetensors file)")
    sub.add_argument("name", metavar="NAME")
    sub.add_argument("--path", metavar="P", help="default: NAME.safetensors in the store directory")
    sub = command("restore", "read a snapshot back, into its pool or a new one")
    sub.add_argument("path", metavar="PATH|NAME")
    sub.add_argument("--name", help="name of the pool (default: the one in the snapshot)")
    pool_options(sub, False)
    sub.add_argument("--salvage", action="store_true", help="take the intact entries of a damaged file")
    sub = command("configure", "change the eviction policy of a pool")
    sub.add_argument("name", metavar="NAME")
    policy_help = "see `policies`; adaptive:0.4/0.3/0.3 for fixed weights of recency, frequency and size"
    sub.add_argument("--policy", required=True, metavar="P", help=policy_help)
    sub = command("check", "compare all of a pool's metadata, repair it with --fix", json_too=True)
    sub.add_argument("name", metavar="NAME")
    sub.add_argument("--fix", action="store_true", help="rebuild derived data, remove records that can't be right")
    sub = command("delete", "delete a pool and all it holds")
    sub.add_argument("name", metavar="NAME")
    sub = command("prune", "remove leftovers of killed processes from shared memory", json_too=True)
    force_help = "also remove pools that no process has open and whose store directory can't be seen from here"
    sub.add_argument("--force", action="store_true", help=force_help)
    sub = command(
        "replay",
        "hit ratios that policies and sizes would have on a trace of requests, or on what a pool has recorded",
        json_too=True,
    )
    sub.add_argument(
        "trace", metavar="TRACE|NAME", help="JSON lines with hash_ids, or of parent blocks; or a pool that records"
    )
    every = ",".join([policy.value for policy in EvictionPolicy] + [OPTIMUM])
    sub.add_argument("--policies", default=every, metavar="P,...", help=f"default: {every}")
    sub.add_argument(
        "--sizes",
        metavar="S,...",
        help="blocks, or %% of the unique ones; default 1%%,5%%,10%%,20%%,40%%; for a pool a quarter to twice its size",
    )
    plot_help = "draw the usable hit ratios (needs matplotlib); as bars of text without FILE or matplotlib"
    sub.add_argument("--plot", metavar="FILE.png", nargs="?", const="", help=plot_help)
    command("policies", "list the eviction policies", json_too=True)
    command("demo", "a tour with several real processes, in under 15 seconds")
    sub = command("doctor", "check host and engines, test a pool, print each engine's settings", json_too=True)
    engine_help = "one or several; default: all that are installed"
    sub.add_argument("engines", metavar="ENGINE", nargs="*", default=[], choices=ENGINES, help=engine_help)
    sub.add_argument("--pool", metavar="NAME", help="pool for the engine's settings; default: as the engine")
    sub.add_argument("--size", help="of that pool, if the engine makes it; default 1G")
    sub = command("completion", "print a script that completes commands, options and names of pools in your shell")
    sub.add_argument("shell", metavar="SHELL", choices=["bash", "zsh", "fish"], help="bash, zsh or fish")
    return parser


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    found: Any = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    return dict(found)


# The words before the one that is completed say which command it is, and how many arguments it has.
_BASH_COMPLETION = """\
_cortex() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command= store= words= option= number=0 i
    COMPREPLY=()
    [[ $before != = ]] || before=${COMP_WORDS[COMP_CWORD-2]}
    [[ $word != = ]] || word=
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            --store | VALUED)
                option=${COMP_WORDS[i++]}
                [[ ${COMP_WORDS[i]} != = ]] || ((i++))
                [[ $option != --store ]] || store=${COMP_WORDS[i]}
                ;;
            -*) ;;
            *)
                if [[ $command ]]; then ((number++))
                elif [[ ${COMP_WORDS[i]} != cache ]]; then command=${COMP_WORDS[i]}
                fi ;;
        esac
    done
    case $before in
        CHOSEN
        --store | VALUED) return ;;
    esac
    if [[ ! $words && $word == -* ]]; then
        case $command in
            OPTIONS
            *) words="--help --version --store" ;;
        esac
    elif [[ ! $words ]]; then
        case $command,$number in
            POOLS) words=$(cortex cache ${store:+--store "$store"} status 2>/dev/null | awk 'NR > 1 {print $1}') ;;
            CHOICES
            ,0) words="COMMANDS"; [[ $before != cortex ]] || words+=" cache" ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _cortex cortex"""
_FISH_COMPLETION = """\
function __cortex_arguments -d 'how many arguments the command has that are no options'
    set -l words (string match -v -- '-*' (commandline -opc) | string match -v cache)
    math (count $words) - 2
end
complete -c cortex -f
complete -c cortex -n __fish_use_subcommand -a cache"""
_FISH_POOLS = "(cortex cache status 2>/dev/null | string match -gr '^(\\S+)' | tail -n +2)"


def _completion(shell: str) -> str:
    """Return a script with which a shell completes commands, options, their values and names of pools."""
    import shlex

    def choices(action: argparse.Action) -> str:
        if action.dest in ("policy", "policies"):
            return " ".join(policy.value for policy in EvictionPolicy)
        return " ".join(map(str, action.choices or ()))

    commands = subcommands(build_parser())
    chosen: dict[str, str] = {}  # option -> the values that it takes
    valued, options, pools, positional = set(), [], [], []
    fish = [_FISH_COMPLETION]
    no_command = f"not __fish_seen_subcommand_from {' '.join(commands)}"
    for name, sub in commands.items():
        seen = f"__fish_seen_subcommand_from {name}"
        fish.append(f"complete -c cortex -n '{no_command}' -a {name} -d {shlex.quote(sub.description or '')}")
        words = []
        for action in sub._actions:
            if not action.option_strings:
                if action.dest in ("name", "trace") and name != "create":
                    pools.append(f"{name},0")
                    first = f"'{seen}; and test (__cortex_arguments) -eq 0'"
                    fish.append(f"complete -c cortex -n {first} -a {shlex.quote(_FISH_POOLS)}")
                elif action.choices:
                    number = "*" if action.nargs == "*" else "0"
                    positional.append(f'{name},{number}) words="{choices(action)}" ;;')
                    fish.append(f"complete -c cortex -n '{seen}' -a '{choices(action)}'")
                elif action.dest != "key":
                    fish.append(f"complete -c cortex -n '{seen}' -F")
                continue
            option = action.option_strings[-1]
            words.append(option)
            about = (action.help or "").replace("%%", "%")
            line = f"complete -c cortex -n '{seen}' -l {option[2:]} -d {shlex.quote(about)}"
            if choices(action):
                chosen[option] = choices(action)
                line += f" -x -a '{choices(action)}'"
            elif action.nargs != 0:
                line += " -x" if action.type else " -r -F"
            if action.nargs != 0 and option != "--store":
                valued.add(option)
            fish.append(line)
        options.append(f'{name}) words="{" ".join(words)}" ;;')
    if shell == "fish":
        return "\n".join(fish)
    script = _BASH_COMPLETION
    for mark, text in (
        ("VALUED", " | ".join(sorted(valued))),
        ("CHOSEN", "\n        ".join(f'{option}) words="{values}" ;;' for option, values in chosen.items())),
        ("OPTIONS", "\n            ".join(options)),
        ("POOLS", " | ".join(pools)),
        ("CHOICES", "\n            ".join(positional)),
        ("COMMANDS", " ".join(commands)),
    ):
        script = script.replace(mark, text)
    return ("autoload -U +X compinit bashcompinit && compinit && bashcompinit\n" if shell == "zsh" else "") + script


def _fill_standard_streams() -> None:
    """Open the streams that the shell has closed (`>&-`): else a pool's file would become standard output or error."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                os.fstat(number)
                continue
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def main(argv: list[str] | None = None) -> int:
    """Run `cortex cache ...`; return the exit code: 0 done, 1 failed, 2 usage, 130 Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    _fill_standard_streams()
    at = 0
    while arguments[at : at + 1] and arguments[at].startswith("-"):  # options may come before the word cache
        at += 2 if arguments[at] == "--store" else 1
    if arguments[at : at + 1] == ["cache"]:
        del arguments[at]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a key that the terminal's encoding lacks is shown, not fatal
            stream.reconfigure(errors="backslashreplace")
    try:
        args = build_parser().parse_args(arguments)
        code: int = getattr(KVCacheCLI(args.store), args.command)(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    except InvalidArgumentError as error:
        _say(f"cortex cache: {_printable(str(error))}")
        return EXIT_USAGE
    except (CacheError, OSError) as error:
        if isinstance(error, OSError):  # stdout: a full disk, or a reader that has gone (`... | head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries once more
        if not isinstance(error, BrokenPipeError):
            _say(f"cortex cache: {_printable(str(error))}")
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
