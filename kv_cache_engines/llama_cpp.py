"""A pool as the cache of llama-cpp-python: a prompt computed once is loaded by each later process of the host.

    llm = Llama(path, n_ctx=4096)
    llm.set_cache(PoolLlamaCache(pool, llm, model_id=model_fingerprint(path)))
    llm.create_chat_completion(...)

Before a prompt is computed, the longest prefix of it that the pool has is loaded into `llm`. After an answer, the state
of `llm` is stored. `save_sequence` and `load_sequence` do the same around calls of `llm.eval` and `llm.generate`.

A value is the state of one sequence, its token ids in front. llama.cpp writes it into the pool, and reads it from
there: one copy each. No state is searched for the longest prefix. The tokens of a state are cut into blocks of 64; a
hash names each block and all before it. Under that hash an index entry names the last 14 states that begin with these
tokens, and the 64 tokens that follow in each. A look-up finds the deepest block of the prompt that is there, and the
state named there that shares most of the tokens behind it: with 10,000 states as fast as with 10. Blocks are not
shorter because an index entry takes a block of the pool (4 KiB) and 512 bytes of index. KV of 64 tokens takes 1.5 MB
with a model of 135M parameters, and more with larger ones.

An index entry is a hint. If it names a state that was evicted, another one is tried; if it was evicted itself, less is
found. A state is used only if its tokens have the hash in its key, and its bytes the checksum in its head. Index
entries are touched with their state, and evicted after it. A chat that grows keeps one state: a state whose tokens
begin a new one is deleted, unless its priority is higher.

The key covers the tokens, model_id, the model's description, sizes and shape, the version of llama-cpp-python, the
types of KV, flash attention, rope and yarn settings, and a LoRA adapter. It does not cover n_ctx, so that a server may
be restarted with another one, except for models with rope scaling, whose KV may depend on it.
Run with llama-cpp-python 0.3.36 on a CPU. `UnsupportedError` for models whose KV can't be cut to a prefix.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kv_cache_engines import digest_of, fitting, miss_on_error, warn_once
from kv_cache_manager import (
    CacheError,
    InvalidArgumentError,
    KVCachePool,
    UnsupportedError,
    format_size,
    model_fingerprint,
)

with fitting("llama_cpp_python"):
    import llama_cpp
    from llama_cpp.llama import LlamaState
    from llama_cpp.llama_cache import BaseLlamaCache

    VERSIONS = f"{llama_cpp.__version__} {llama_cpp.LLAMA_STATE_SEQ_VERSION}"  # of the package, and of a state

Array = np.ndarray[Any, Any]
BYTES = ctypes.POINTER(ctypes.c_uint8)
BLOCK = 64  # tokens that an index entry covers beyond its parent
STATES = 14  # most states that an index entry names, so that its value fits a block of the pool
NAMED = struct.Struct(f"<I16s{4 * BLOCK}s")  # in an index entry: tokens of a state, digest in its key, the next block
HEAD = struct.Struct("<8sIIQ8s")  # of a state: MAGIC, tokens, where the bytes of llama.cpp begin, how many, checksum
MAGIC = b"kvllama1"
LANES = 509  # sums of a checksum; prime, so that pages that changed places change sums
SETTINGS = (
    *("type_k", "type_v", "flash_attn_type", "n_seq_max", "kv_unified", "attention_type", "ctx_type"),
    *("rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_orig_ctx", "yarn_ext_factor"),
    *("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"),
)
SHAPE = ("size", "n_params", "n_embd", "n_layer", "n_head", "n_head_kv", "n_ctx_train", "n_swa", "rope_type")


class PoolLlamaCache(BaseLlamaCache):  # type: ignore[misc, unused-ignore]
    """The sequence states of one `Llama` object in a pool, which any number of processes share.

    It belongs to `llm`: `cache[tokens]` loads into `llm`, and `cache[tokens] = state` stores what `llm` holds.
    `model_id` names the weights. `verify=False` skips the checksum of a state when it is loaded. States are stored
    with `priority`. A pool that can't be used is a miss, and one warning.
    """

    def __init__(
        self, pool: KVCachePool, llm: llama_cpp.Llama, model_id: str, *, verify: bool = True, priority: int = 0
    ) -> None:
        if not isinstance(model_id, str) or not model_id:
            raise InvalidArgumentError(f"model_id {model_id!r} must name the weights: pass model_fingerprint(path)")
        super().__init__(pool.config.size_bytes)
        self.pool, self.llm, self.verify, self.priority = pool, llm, verify, priority
        self.index = StateIndex(pool, _root_of(llm, model_id))

    @property
    @miss_on_error(lambda *_: 0)
    def cache_size(self) -> int:
        """The bytes in use in the pool, of all that it holds."""
        stats = self.pool.get_stats()
        return int(stats["allocated_blocks"] * stats["block_size"])

    @miss_on_error(lambda *_: False)
    def __contains__(self, key: Sequence[int]) -> bool:
        return next(self.index.find(_ids(key), self.llm.n_ctx()), None) is not None

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        """Load the longest prefix of these tokens into `llm`; KeyError if the pool has none longer than `llm` holds.

        The result says what `llm` holds now, in which `Llama` finds nothing left to load. It has no bytes of its own:
        `load_state` copies them three times, and fills the scores.
        """
        num_tokens = _load(self, _ids(key))
        if not num_tokens:
            raise KeyError("the pool has no longer prefix of these tokens")
        ids = np.full(self.llm.n_ctx(), -1, np.intc)  # -1 is no token: else old ids of the tail might match
        ids[:num_tokens] = self.llm.input_ids[:num_tokens]
        return _Loaded(ids, np.zeros((1, 1), np.single), num_tokens, b"", 0, self.llm._seed)

    @miss_on_error(lambda *_: None)
    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        """Store what `llm` holds, of which `value` is the state."""
        if not np.array_equal(value.input_ids[: value.n_tokens], self.llm.input_ids[: self.llm.n_tokens]):
            raise InvalidArgumentError("the state is not what `llm` holds: make a PoolLlamaCache for each Llama object")
        save_sequence(self)


class _Loaded(LlamaState):  # type: ignore[misc, unused-ignore]
    """The state that the `llm` of a cache holds already. `load_state`, which only others call, reads scores first."""

    @property
    def scores(self) -> Any:
        raise InvalidArgumentError("this cache belongs to another Llama object: make a PoolLlamaCache for each of them")

    @scores.setter
    def scores(self, value: Any) -> None:
        pass


@miss_on_error(lambda *_: False)
def save_sequence(cache: PoolLlamaCache, *, priority: int | None = None) -> bool:
    """Store the tokens that `cache.llm` holds, and their KV; return False if they can't be stored.

    They are not if they are less than a block, may stand for images, or do not fit into the pool. `priority` is by
    default that of the cache. A state is kept when a longer one covers it if it has a higher priority: so give one to
    a system prompt.
    """
    llm, priority = cache.llm, cache.priority if priority is None else priority
    ids, memory = _held(llm), llama_cpp.llama_get_memory(llm.ctx)
    if len(ids) < BLOCK:
        return False
    llama_cpp.llama_memory_seq_rm(memory, 0, len(ids), -1)  # KV behind the tokens, as `Llama.eval` does first
    first, last = llama_cpp.llama_memory_seq_pos_min(memory, 0), llama_cpp.llama_memory_seq_pos_max(memory, 0)
    if (first, last) != (0, len(ids) - 1):  # somebody has changed the KV without the tokens
        return False
    at = -(-(HEAD.size + ids.nbytes) // 64) * 64
    size = int(llama_cpp.llama_state_seq_get_size(llm.ctx, 0))
    chain, digest = cache.index.digests(ids)
    key, how = _state_key(digest), cache.index.how(len(ids), priority)
    with cache.pool.reserve_path([key], [at + size], zero=False, **how) as targets:
        if not targets:
            if at + size > cache.pool.config.size_bytes:
                fix = "create the pool anew with a larger --size"
                about = (
                    f"a state of {format_size(at + size)} does not fit into {format_size(cache.pool.config.size_bytes)}"
                )
                warn_once(cache, CacheError(f"{about}: {fix}"))
            return False
        if targets[0] is not None:  # it is not there yet
            _write(llm, ids, targets[0], at)
        superseded = cache.index.add(ids, chain, digest, priority)  # in here, where that can't evict the state
    for other in superseded:
        cache.pool.delete(other)
    cache.pool.touch([*map(_block_key, chain), key])
    return True


def load_sequence(cache: PoolLlamaCache, tokens: Sequence[int]) -> int:
    """Make `cache.llm` hold the longest prefix of `tokens` that it or the pool has; return its number of tokens.

    It never holds all of them, as the model must see the last one to go on: `llm.eval(tokens[n:])`.
    """
    ids, llm = _ids(tokens), cache.llm
    num_tokens = _load(cache, ids)
    if not num_tokens:
        num_tokens = llm.n_tokens = min(_common(_held(llm), ids), max(len(ids) - 1, 0))
        llm._requires_eval = True  # the logits are those of a later token
    return num_tokens


# --- between llama.cpp and the pool -----------------------------------------------------------------------------------


@miss_on_error(lambda *_: 0)
def _load(cache: PoolLlamaCache, ids: Array) -> int:
    """Load the longest prefix that the pool has; return its tokens, or 0 if `llm` holds as many, and keeps them."""
    llm = cache.llm
    if _sees_images(llm):
        return 0
    for key in cache.index.find(ids, llm.n_ctx()):
        with cache.pool.view(key) as view:
            if view is None:  # evicted
                continue
            theirs = _tokens_of(view)
            chain, digest = cache.index.digests(theirs)
            num_tokens = min(_common(theirs, ids), len(ids) - 1)
            if _state_key(digest) == key:
                if num_tokens <= _common(_held(llm), ids):
                    return 0
                if _read(llm, theirs, num_tokens, view, cache.verify):
                    cache.pool.touch([*map(_block_key, chain), key])
                    return num_tokens
        cache.pool.delete(key)  # damaged
    return 0


def _write(llm: llama_cpp.Llama, ids: Array, target: memoryview, at: int) -> None:
    data, size = np.frombuffer(target, np.uint8), len(target) - at
    written = llama_cpp.llama_state_seq_get_data(llm.ctx, data[at:].ctypes.data_as(BYTES), size, 0)
    if written != size:
        raise CacheError(f"llama.cpp wrote a state of {written} bytes, not the {size} that it said")
    data[HEAD.size : HEAD.size + ids.nbytes] = ids.view(np.uint8)
    data[HEAD.size + ids.nbytes : at] = 0
    HEAD.pack_into(target, 0, MAGIC, len(ids), at, size, _checksum(data[at:]))


def _tokens_of(view: memoryview) -> Array:
    """Return a copy of the tokens of a state; none if it is none of ours."""
    magic, num_tokens, at, size, _ = HEAD.unpack_from(view) if len(view) >= HEAD.size else (b"", 0, 0, 0, b"")
    is_ours = magic == MAGIC and HEAD.size + 4 * num_tokens <= at == len(view) - size
    return _ids(np.frombuffer(view[HEAD.size :] if is_ours else b"", "<i4", num_tokens if is_ours else 0).copy())


def _read(llm: llama_cpp.Llama, theirs: Array, num_tokens: int, view: memoryview, verify: bool) -> bool:
    """Load a state into `llm` and cut it to `num_tokens`; return False if it is damaged."""
    _, _, at, size, checksum = HEAD.unpack_from(view)
    data, memory = np.frombuffer(view, np.uint8)[at:], llama_cpp.llama_get_memory(llm.ctx)
    if verify and _checksum(data) != checksum:
        return False
    llm.n_tokens, llm._requires_eval = 0, True  # of what was there, nothing is left from here on
    done = llama_cpp.llama_state_seq_set_data(llm.ctx, data.ctypes.data_as(BYTES), size, 0) == size
    if not done or not llama_cpp.llama_memory_seq_rm(memory, 0, num_tokens, -1):
        llama_cpp.llama_memory_seq_rm(memory, 0, -1, -1)
        return False
    llm.input_ids[:num_tokens], llm.n_tokens = theirs[:num_tokens], num_tokens
    if llm._logits_all:
        llm.scores[:num_tokens] = np.nan  # not stored; only `echo` with `logprobs` shows them
    return True


def _ids(tokens: Any) -> Array:
    return np.ascontiguousarray(tokens, "<i4")


def _held(llm: llama_cpp.Llama) -> Array:
    """Return the tokens whose KV `llm` holds; none if some may stand for images, which they do not name."""
    return _ids(llm.input_ids[: 0 if _sees_images(llm) else llm.n_tokens])


def _sees_images(llm: llama_cpp.Llama) -> bool:
    return hasattr(llm.chat_handler, "mtmd_ctx")


def _common(some: Array, others: Array) -> int:
    """Return how many tokens both begin with."""
    length = min(len(some), len(others))
    differ = some[:length] != others[:length]
    return int(differ.argmax()) if differ.any() else length


def _checksum(data: Array) -> bytes:
    """Return 8 bytes that differ if a byte does, or if pages are zeroed, mixed up or old.

    Five times as fast as the CRC-32 of zlib, which takes twice as long as llama.cpp takes for the state itself.
    """
    rows = len(data) // (8 * LANES)
    words, rest = np.split(data, [rows * 8 * LANES])
    sums = np.add.reduce(words.view(np.uint64).reshape(rows, LANES), axis=0)
    return hashlib.blake2b(sums.tobytes() + rest.tobytes(), digest_size=8).digest()


def _root_of(llm: llama_cpp.Llama, model_id: str) -> str:
    """Return the digest of all that the KV of `llm` depends on beside its tokens, or of the form of a state."""
    model, params = llm.model, llm.context_params
    if llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model):
        raise UnsupportedError("the state of a recurrent or hybrid model can't be cut to a prefix: set no cache")
    if llama_cpp.llama_model_has_encoder(model) or llama_cpp.llama_model_is_diffusion(model) or not llm._ctx.memory:
        raise UnsupportedError("only KV of models that read from left to right can be cached: set no cache")
    if llama_cpp.llama_model_n_swa(model) and not params.swa_full:
        raise UnsupportedError("KV outside the sliding window is not kept: make the Llama object with swa_full=True")
    is_scaled = params.rope_scaling_type > 0 or any(".rope.scaling." in key for key in llm.metadata)
    return digest_of(
        model_id,
        f"{VERSIONS} {MAGIC!r} blocks of {BLOCK}",
        f"{llm._model.desc()} {llm.n_vocab()} {[getattr(llama_cpp, f'llama_model_{name}')(model) for name in SHAPE]}",
        f"{[getattr(params, name) for name in SETTINGS]} {llm.n_ctx() if is_scaled else 'any n_ctx'}",
        f"{sorted((llm.kv_overrides or {}).items())}",
        f"{llm.lora_scale} {model_fingerprint(llm.lora_path)}" if llm.lora_path else "no adapter",
    )


# --- the index --------------------------------------------------------------------------------------------------------


def _block_key(digest: bytes) -> str:
    return f"llama.block.{digest[:16].hex()}"


def _state_key(digest: bytes) -> str:
    return f"llama.state.{digest.hex()}"


def _state_digest(parent: bytes, rest: bytes) -> bytes:
    return hashlib.sha256(parent + rest + b"state").digest()[:16]


def _named(value: Any) -> list[tuple[int, bytes, bytes]]:
    """Return (tokens, digest, the next block) of each state that an index entry names, the newest first."""
    return [] if value is None or len(value) % NAMED.size else [*NAMED.iter_unpack(value)]


class StateIndex:
    """Finds the states that share the longest prefix with a prompt, by the hash chain of its blocks of 64 tokens.

    Hashes: block = SHA-256(hash of its parent, token ids); the root stands for the first parent. A state has the hash
    of its last full block, the ids behind it and the word "state".
    """

    def __init__(self, pool: KVCachePool, root: str) -> None:
        self.pool, self.root = pool, root

    def digests(self, ids: Array) -> tuple[list[bytes], bytes]:
        """Return (the hash of each full block, root first; that of the state of these tokens)."""
        parent, chain, data = hashlib.sha256(self.root.encode()).digest(), [], ids.tobytes()
        last = len(data) - len(data) % (4 * BLOCK)
        for at in range(0, last, 4 * BLOCK):
            parent = hashlib.sha256(parent + data[at : at + 4 * BLOCK]).digest()
            chain.append(parent)
        return chain, _state_digest(parent, data[last:])

    def how(self, num_tokens: int, priority: int) -> dict[str, Any]:
        """Return the keyword arguments that an entry is stored with."""
        return {"prefix_hash": self.root, "sequence_length": num_tokens, "priority": priority}

    def find(self, ids: Array, most_tokens: int) -> Iterator[str]:
        """Yield the keys of states of up to `most_tokens` that share blocks with these tokens, the longest share first.

        Among equals the shortest comes first, as it takes the least time to load. Takes no lock, as a rule.
        """
        keys, seen = [_block_key(digest) for digest in self.digests(ids)[0]], set()
        for depth in range(self.pool.count_path(keys), 0, -1):
            named, wanted = _named(self.pool.get(keys[depth - 1])), np.full(BLOCK, -2, "<i4")  # -2 is no token
            behind = ids[depth * BLOCK : (depth + 1) * BLOCK]
            wanted[: len(behind)] = behind
            differ = np.frombuffer(b"".join(each[2] for each in named), "<i4").reshape(-1, BLOCK) != wanted
            common = np.where(differ.any(axis=1), differ.argmax(axis=1), BLOCK).tolist()
            for _, (num_tokens, digest, _) in sorted(zip([-each for each in common], named, strict=True)):
                if digest not in seen and num_tokens <= most_tokens and _state_key(digest) in self.pool:
                    yield _state_key(digest)
                seen.add(digest)

    def add(self, ids: Array, chain: Sequence[bytes], digest: bytes, priority: int) -> list[str]:
        """Name a state first in the entry of each of its blocks; return the keys of those that it makes superfluous.

        Another process may change an entry at the same time. Then one of two names is lost, and found no more there.
        """
        keys, begin = [*map(_block_key, chain)], {digest}
        with self.pool.view_path(keys) as views:
            old = [(_named(view), entry.priority) for view, entry in zip(views, views.entries, strict=True)]
        for depth, (named, _) in enumerate(old, 1):
            for num_tokens, other, _ in named:
                if depth * BLOCK <= num_tokens < min((depth + 1) * BLOCK, len(ids)):  # it ends behind this block
                    entry, rest = self.pool.peek(_state_key(other)), ids[depth * BLOCK : num_tokens].tobytes()
                    if other == _state_digest(chain[depth - 1], rest) and not (entry and entry.priority > priority):
                        begin.add(other)
        old += [([], priority)] * (len(keys) - len(old))
        for depth, (key, (named, before)) in enumerate(zip(keys, old, strict=True), 1):
            behind = ids[depth * BLOCK : (depth + 1) * BLOCK].tobytes().ljust(4 * BLOCK, b"\xff")  # -1 is no token
            new = [(len(ids), digest, behind), *(each for each in named if each[1] not in begin)][:STATES]
            if new != named:
                value = b"".join(NAMED.pack(*each) for each in new)
                self.pool.put(key, value, **self.how(depth * BLOCK, max(before, priority)))
        return [_state_key(other) for other in begin - {digest}]
