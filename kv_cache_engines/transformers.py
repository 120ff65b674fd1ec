"""Attention of transformers models to a prefix where it lies in a pool, for `PrefixCache.open_prefix`.

    with cache.open_prefix(ids[0]) as past:
        model.set_attn_implementation("cortex")
        result = model.generate(ids, past_key_values=past)

All rows of a batch share the prefix. A layer multiplies the queries of all rows with its keys at once. The tokens after
the prefix belong to one row each. Both outputs are merged by the log-sum-exp of their scores: the result is that of one
attention to all tokens. Blocks of IN_PLACE tokens or more are read where they lie. Shorter ones, and encoded ones, are
copied or decoded into a buffer for one layer, which all layers use.

Tested with transformers 5.0 and 5.24, on the CPU. Importing this module registers the attention "cortex". It computes
what "sdpa" computes with any other cache.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kv_cache_engines.model_context import ModelContext as ModelContext
from kv_cache_manager import (
    BlockFormat,
    InvalidArgumentError,
    Unlocked,
    UnsupportedError,
    as_tensor,
    decode_block,
    decode_layer,
)

NAME = "cortex"  # of the attention
IN_PLACE = 256  # tokens; each block is a product of its own, so for shorter ones a copy costs less
SCORES_AT_ONCE = 1 << 20  # computed at a time: they stay in a processor's cache, and a long prompt needs little memory
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_NOT_OF_SDPA = ("block_indices", "indices", "s_aux", "sinks")  # it drops these, and computes something else
_REFUSED = ("dropout", "head_mask", "output_attentions", "position_bias", "sliding_window", "softcap")
_NO_GRADIENTS = "a SharedPrefix computes no gradients: call the model in torch.inference_mode()"
_INTERRUPTED = "the last forward pass did not reach all layers: reset() this SharedPrefix"
_Parts = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values, each (batch, tokens, head size), one after another


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False):  # else it could not be written to outside of inference mode
        return torch.empty(shape, dtype=dtype, device="cpu")  # whatever the default device


def _plain_block(view: memoryview, form: BlockFormat) -> Any:
    """Return a block that holds plain numbers as a tensor over its memory, which is not to be written to."""
    numbers: Any = numpy.asarray(Unlocked(numpy.frombuffer(view, "u1", offset=form.codes_at if form.codec else 0)))
    return as_tensor(memoryview(numbers), "BF16" if form.codec == "bf16" else form.dtype, form.shape, "torch")


class _Run:
    """Blocks of one format that follow one another in a prefix."""

    def __init__(self, views: Sequence[memoryview], form: BlockFormat) -> None:
        self.form, self.dtype, self.num_tokens = form, _DTYPES[form.dtype], len(views) * form.shape[3]
        self.is_coded = form.codec in ("int8", "int4")
        self.blocks: list[Any] = [form.sections(view) if self.is_coded else _plain_block(view, form) for view in views]
        is_plain = not self.is_coded and self.blocks[0].dtype == self.dtype
        self.is_in_place = is_plain and (len(views) == 1 or form.shape[3] >= IN_PLACE)
        self.layers: dict[int, list[torch.Tensor]] = {}  # slices of plain blocks: making them each time takes longer
        self.buffer: torch.Tensor | None = None

    def read(self, layer: int) -> list[torch.Tensor]:
        """Return keys and values of a layer in parts, each (2, heads, tokens, head size), valid until the next call."""
        _, _, heads, _, head_size = self.form.shape
        if not self.is_coded and layer not in self.layers:
            self.layers[layer] = [block[layer] for block in self.blocks]
        if self.is_in_place:
            return self.layers[layer]
        if self.buffer is None:
            self.buffer = _empty(2, heads, self.num_tokens, head_size, dtype=self.dtype)
        if self.is_coded:
            wide = self.buffer if self.dtype == torch.float32 else _empty(*self.buffer.shape, dtype=torch.float32)
            decode_layer(self.blocks, layer, wide.numpy())
            self.buffer = self.buffer if wide is self.buffer else self.buffer.copy_(wide)
        elif self.layers[layer][0].dtype == self.dtype:
            torch.cat(self.layers[layer], 2, out=self.buffer)
        else:
            self.buffer.copy_(torch.cat(self.layers[layer], 2))
        return [self.buffer]


class _Prefix:
    """The pinned blocks of a prefix, and the padding behind it: all that the layers of a cache share.

    It has no reference to the cache, so that a cache that is garbage ends its pins without the collector of cycles.
    """

    def __init__(
        self, pins: contextlib.ExitStack, views: Sequence[memoryview], formats: Sequence[BlockFormat], num_tokens: int
    ) -> None:
        if formats and formats[0].dtype not in _DTYPES:
            raise UnsupportedError(f"KV of {formats[0].dtype} is none of {', '.join(_DTYPES)}: use PrefixCache.load")
        self.views, self.formats, self.num_tokens = list(views), list(formats), num_tokens
        self.num_layers = 0  # 0: of any model, as there are no blocks
        self.kind: tuple[int, int, torch.dtype] | None = None  # heads, head size, dtype of all keys and values
        for form in formats[:1]:
            self.num_layers, _, heads, _, head_size = form.shape
            self.kind = heads, head_size, _DTYPES[form.dtype]
        self.kept: torch.Tensor | None = None  # which tokens after the prefix are no padding: (rows, tokens); None: all
        self.num_masked = 0  # tokens after the prefix that the last mask was of
        self.model_layers = 0  # of the model that uses it
        self.runs: list[_Run] = []
        self._pins, self._pid, self._is_open = pins, os.getpid(), True
        for form, some in itertools.groupby(zip(formats, views, strict=True), lambda pair: pair[0]):
            self.runs.append(_Run([view for _, view in some], form))

    def close(self) -> None:
        self._is_open, self.views, self.runs = False, [], []
        self._pins.close()

    def check_open(self) -> None:
        """Raise InvalidArgumentError if the pins have ended, or are those of another process."""
        if not self._is_open:
            raise InvalidArgumentError("this SharedPrefix is closed: use it before close(), or open_prefix() again")
        if self._pid != os.getpid():
            raise InvalidArgumentError(
                f"process {self._pid} pins this SharedPrefix, and may end before its fork does: open_prefix() here"
            )

    def read(self, layer: int) -> _Parts:
        """Return the keys and values of a layer, valid until the next call. The batch of products are the heads."""
        parts = [part for run in self.runs for part in run.read(layer)]
        rest = self.num_tokens - sum(part.shape[2] for part in parts[:-1])
        parts[-1] = parts[-1][:, :, :rest]
        return [(keys, values) for keys, values in parts]

    def copy_tokens(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Copy the KV of some of its tokens into `out`, of shape (layers, 2, heads, stop - start, head size)."""
        step = self.formats[0].shape[3] if start < stop else 1
        for number in range(start // step, -(-stop // step) if start < stop else 0):
            view, form, first = self.views[number], self.formats[number], number * step
            begin, end = max(start - first, 0), min(stop - first, step)
            if form.codec:
                block = _empty(*form.shape[:3], end, form.shape[4], dtype=_DTYPES[form.dtype])
                decode_block(view, form, block)
            else:
                block = _plain_block(view, form)
            out[:, :, :, first + begin - start : first + end - start] = block[:, :, :, begin:end]

    def note_padding(self, mask: torch.Tensor | None, num_own: int, num_before: int) -> None:
        """Keep the padding of `num_own` tokens after the prefix, `num_before` of them cached; check that it stays."""
        num_tokens = self.num_tokens + num_own
        if mask is not None and (mask.ndim != 2 or mask.shape[1] < num_tokens):
            raise InvalidArgumentError(
                f"attention_mask of shape {tuple(mask.shape)} must name all {num_tokens} tokens of each row, those of "
                "the prefix too: reset() a SharedPrefix before it computes another batch"
            )
        kept = None if mask is None or bool(mask.all()) else mask[:, self.num_tokens : num_tokens].bool()
        before, now = (None if each is None else each[:, :num_before] for each in (self.kept, kept))
        if before is None or now is None:
            is_same = all(bool(each.all()) for each in (before, now) if each is not None)
        else:
            is_same = torch.equal(before, now)
        if not is_same or (kept is not None and mask is not None and not bool(mask[:, : self.num_tokens].all())):
            raise InvalidArgumentError(
                f"attention_mask hides other tokens than padding: of the {self.num_tokens} of the prefix, with which "
                f"every row begins, or other ones of the next {num_before} than before: pad behind the prefix"
            )
        self.kept, self.num_masked = kept, num_own


class _States(torch.Tensor):  # type: ignore[misc, unused-ignore]
    """The keys or values that a layer returns: only our attention can use them. Others would miss the prefix."""

    layer: _Layer

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise InvalidArgumentError(
            f"only the attention {NAME!r} knows the keys and values of a SharedPrefix: call "
            f"model.set_attn_implementation({NAME!r}); if that changes nothing, this model has its own attention: use "
            "PrefixCache.load instead of open_prefix"
        )


class _Offset(int):
    """The number of tokens before those that a mask is of. It names their prefix to our mask function."""

    prefix: _Prefix
    num_cached: int  # after the prefix


class _Layer(CacheLayerMixin):  # type: ignore[misc, unused-ignore]
    """The keys and values of one layer after the prefix: buffers that grow, of which `length` tokens are in use."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    keys: Any
    values: Any

    def __init__(self, prefix: _Prefix, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.prefix, self.index, self.length = prefix, index, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (self._buffer_for(states, 0) for states in (key_states, value_states))
        self.is_initialized = True

    @staticmethod
    def _buffer_for(states: torch.Tensor, num_tokens: int) -> torch.Tensor:
        rows, heads, _, head_size = states.shape
        return _empty(rows, heads, num_tokens, head_size, dtype=states.dtype)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        sizes = key_states.shape[-1], value_states.shape[-1]
        if sizes[0] != sizes[1]:
            raise UnsupportedError(
                f"keys of head size {sizes[0]} with values of {sizes[1]} (latent attention) are none for a "
                "SharedPrefix: use PrefixCache without open_prefix"
            )
        self._check(key_states)
        self._check(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            old, size = (self.keys, self.values), end + end // 8 + 8
            self.keys, self.values = (self._buffer_for(each, size) for each in old)
            self.keys[:, :, :start], self.values[:, :, :start] = (each[:, :, :start] for each in old)
        self.keys[:, :, start:end], self.values[:, :, start:end] = key_states.detach(), value_states.detach()
        self.length = end
        states = torch.empty(0, device="cpu").as_subclass(_States)
        states.layer = self
        return states, states

    def _check(self, states: torch.Tensor) -> None:
        """Raise an error if these keys or values can't come after those that are here."""
        self.prefix.check_open()
        if states.device.type != "cpu":
            raise UnsupportedError(
                f"a SharedPrefix is in main memory, the model on {states.device}: use PrefixCache.load"
            )
        if states.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(_NO_GRADIENTS)
        rows, heads, _, head_size = states.shape
        kind = heads, head_size, states.dtype
        self.prefix.kind = there = self.prefix.kind or kind
        num_rows = len(self.keys) if self.is_initialized else rows
        if (rows, kind) != (num_rows, there):
            raise InvalidArgumentError(
                f"{rows} rows of keys or values, (heads, head size, dtype) {kind}, can't follow {num_rows} rows, "
                f"{there}, of this SharedPrefix: reset() it for another batch, open another one for another model"
            )

    def get_seq_length(self) -> int:
        self.prefix.check_open()
        return self.prefix.num_tokens + self.length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return (number of tokens that the mask is of, number of tokens before them, those of the prefix)."""
        # transformers 5.0 passes the positions of the queries, later ones their number.
        count = query_length if isinstance(query_length, int) else len(query_length)
        offset = _Offset(self.prefix.num_tokens)
        offset.prefix, offset.num_cached = self.prefix, self.length
        return self.length + count, offset

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.0

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.length = False, 0


class SharedPrefix(Cache):  # type: ignore[misc, unused-ignore]
    """A cache whose first tokens stay in the pool, pinned, for any number of rows that begin with them.

    `PrefixCache.open_prefix` returns it. Without a prefix in the pool it is empty, and grows as any cache. Its pins end
    when it is closed or garbage, and with its process. `reset()` leaves just the prefix, for the next batch.
    """

    layers: list[Any]

    def __init__(
        self,
        pins: contextlib.ExitStack,
        views: Sequence[memoryview] = (),
        formats: Sequence[BlockFormat] = (),
        num_tokens: int = 0,
        hashes: Sequence[str] = (),
    ) -> None:
        """Take over the `pins` of the blocks; `hashes` are those of the blocks that are used as a whole."""
        self.num_tokens, self.hashes, self._is_reordered = num_tokens, list(hashes), False
        self._prefix = prefix = _Prefix(pins, views, formats, num_tokens)
        super().__init__(layers=[_Layer(prefix, index) for index in range(max(prefix.num_layers, 1))])

    def __enter__(self) -> SharedPrefix:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError("a SharedPrefix can't be copied or pickled: reset() it, or open_prefix() once more")

    def close(self) -> None:
        """End the pins. Any later use raises InvalidArgumentError."""
        self._prefix.close()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Add keys and values of a layer; return what only the attention "cortex" can use."""
        if layer_idx == len(self.layers) and not self._prefix.num_layers:
            self.layers.append(_Layer(self._prefix, layer_idx))
        if layer_idx >= len(self.layers):
            raise InvalidArgumentError(f"layer {layer_idx} is none of the {len(self.layers)} that this prefix has")
        length = self.layers[0].length - key_states.shape[2] if layer_idx else self.layers[-1].length
        if self.layers[layer_idx].length != length:
            raise InvalidArgumentError(_INTERRUPTED)
        return self.layers[layer_idx].update(key_states, value_states)

    def reset(self) -> None:
        """Leave just the prefix."""
        self._prefix.kept, self._prefix.num_masked, self._is_reordered = None, 0, False
        super().reset()  # type: ignore[no-untyped-call, unused-ignore]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._is_reordered = True  # so the rows are those of running beams, which are not the sequences of the result
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.num_rows, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        with torch.inference_mode(False):  # as in `_empty`
            for layer in self.layers if self.num_rows else ():
                layer.keys, layer.values = layer.keys[indices], layer.values[indices]
        if self._prefix.kept is not None:
            self._prefix.kept = self._prefix.kept[indices]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove that many of the last tokens, if negative; else keep that many. Never cuts the prefix."""
        # transformers 5.0 passes the number to keep, later ones the negative number.
        length = self.get_seq_length()
        keep = (min(tokens_to_remove, length) if tokens_to_remove > 0 else length + tokens_to_remove) - self.num_tokens
        if keep < 0:
            raise InvalidArgumentError(
                f"crop({tokens_to_remove}) of {length} tokens would cut the prefix of {self.num_tokens}: open_prefix() "
                "with fewer tokens"
            )
        if keep > min(layer.length for layer in self.layers):
            raise InvalidArgumentError(_INTERRUPTED)
        for layer in self.layers:
            layer.length = keep
        self._prefix.num_masked = 0
        if self._prefix.kept is not None:
            self._prefix.kept = self._prefix.kept[:, :keep]

    def activate_past_recording(self) -> None:
        """Refuse assisted decoding from a prefix: it starts with a call of this, from some transformers 5 on."""
        if self.get_seq_length():
            raise UnsupportedError(
                "assisted decoding of this transformers computes the whole prompt behind what a cache holds: generate "
                "without an assistant, or without a cache"
            )

    # --- for PrefixCache.store ---------------------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        """Number of rows; 0 before the first forward pass."""
        return len(self.layers[0].keys) if self.layers[0].is_initialized else 0

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the KV; None if there is none yet."""
        return self._prefix.kind[2] if self._prefix.kind else None

    def block_shape(self, block_size: int) -> tuple[int, ...]:
        """Return the shape of a block of KV. There must be rows."""
        heads, head_size, _ = self._prefix.kind or (0, 0, None)
        return len(self.layers), 2, heads, block_size, head_size

    def length_of(self, row: int, num_tokens: int) -> int:
        """Return the number of tokens of a row, without its padding. The caller has `num_tokens` for it.

        InvalidArgumentError if these can't be the tokens of that KV.
        """
        self._prefix.check_open()
        lengths = {layer.length for layer in self.layers}
        if len(lengths) > 1 or len(self.layers) != self._prefix.model_layers:
            raise InvalidArgumentError(_INTERRUPTED)
        if self._is_reordered:
            raise InvalidArgumentError(
                "the rows of a SharedPrefix after beam search are not the sequences that it returned: don't store them"
            )
        kept = self._prefix.kept
        length = self.num_tokens + (lengths.pop() if kept is None else int(kept[row].sum()))
        if kept is not None and num_tokens > length + 1:  # `generate` leaves out the KV of the last token
            raise InvalidArgumentError(
                f"row {row} has {num_tokens} tokens, its KV without padding {length}: leave out the padding"
            )
        return length

    def copy_tokens(self, row: int, start: int, stop: int, out: torch.Tensor) -> None:
        """Copy the KV of some tokens of a row into `out`, a tensor of `block_shape(stop - start)`."""
        self._prefix.check_open()
        middle = min(max(self.num_tokens, start), stop)
        self._prefix.copy_tokens(start, middle, out[:, :, :, : middle - start])
        places: Any = slice(middle - self.num_tokens, stop - self.num_tokens)
        if self._prefix.kept is not None:
            places = self._prefix.kept[row].nonzero()[places, 0]
        for index, layer in enumerate(self.layers if middle < stop else ()):
            for which, states in enumerate((layer.keys, layer.values)):
                out[index, which, :, middle - start :] = states[row][:, places]


# ----------------------------------------------------------------------------------------------------------------------


def check_context(context: Any) -> None:
    """Raise UnsupportedError if the model of `PrefixCache.for_model` is none for a SharedPrefix."""
    if isinstance(context, ModelContext):
        _check_config(context._model.config, 0)


def _check_config(config: Any, num_layers: int) -> int:
    """Return the number of layers of a model; raise an error unless each attends to all tokens.

    There must be `num_layers`, unless that is 0.
    """
    config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    names = ["num_kv_shared_layers", "kv_sharing_modes", "is_encoder_decoder"]
    names += [] if kinds else ["sliding_window", "attention_chunk_size"]  # they are of some layers, of none, or of all
    others = sorted({str(kind) for kind in kinds or ()} - {"full_attention"})
    others += [f"{name}={value}" for name in names if (value := getattr(config, name, None))]
    if others:
        raise UnsupportedError(
            f"a SharedPrefix is for models with full attention, and KV of its own, in each layer: {config.model_type} "
            f"has {', '.join(others)}: use PrefixCache without open_prefix"
        )
    if num_layers and config.num_hidden_layers != num_layers:
        raise InvalidArgumentError(
            f"the model has {config.num_hidden_layers} layers, this SharedPrefix {num_layers}: open one of its own KV"
        )
    return int(config.num_hidden_layers)


def make_mask(*, kv_length: int, kv_offset: int = 0, **kwargs: Any) -> torch.Tensor | None:
    """Return the mask that "sdpa" has; for a SharedPrefix that of the tokens after the prefix, which all rows see."""
    if isinstance(kv_offset, _Offset):
        prefix = kv_offset.prefix
        prefix.check_open()
        prefix.model_layers = _check_config(kwargs["config"], prefix.num_layers)
        if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
            # Some models make masks that none of their layers uses. `attend` refuses one of this shape.
            return torch.empty(0, dtype=torch.bool, device="cpu")
        prefix.note_padding(kwargs.get("attention_mask"), kv_length, kv_offset.num_cached)
    mask: torch.Tensor | None = sdpa_mask(kv_length=kv_length, kv_offset=int(kv_offset), **kwargs)
    return mask


def attend(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the attention "cortex": that of a SharedPrefix, with any other cache "sdpa"."""
    how = {"scaling": scaling, **kwargs}
    for name in _NOT_OF_SDPA:
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"{NAME!r} has no {name}, which {type(module).__name__} needs: set another one")
    if not isinstance(key, _States):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)  # type: ignore[no-any-return, unused-ignore]
    layer = key.layer
    prefix, length, count = layer.prefix, layer.length, query.shape[2]
    _check_call(layer, count, attention_mask, query.requires_grad, kwargs)
    keys, values = layer.keys[:, :, :length], layer.values[:, :, :length]
    if not prefix.num_tokens:
        return sdpa_attention_forward(module, query, keys, values, attention_mask, **how)  # type: ignore[no-any-return, unused-ignore]
    rows, num_heads, _, head_size = query.shape
    heads = keys.shape[1]
    query = query * (head_size**-0.5 if scaling is None else scaling)
    query = query.view(rows, heads, -1, count, head_size)  # heads of queries share one of keys in groups

    parts = prefix.read(layer.index)
    step = max(SCORES_AT_ONCE // (heads * prefix.num_tokens), 1)
    done = [_weigh(some, parts) for some in query.transpose(0, 1).reshape(heads, -1, head_size).split(step, 1)]
    far, far_logs = (torch.cat(each, 1) for each in zip(*done, strict=True))
    far = far.view(heads, rows, -1, count, head_size).transpose(0, 1)
    far_logs = far_logs.view(heads, rows, -1, count).transpose(0, 1)

    if attention_mask is None and count > 1:
        attention_mask = torch.ones(count, length, dtype=torch.bool, device="cpu").tril(length - count)
        attention_mask = attention_mask.expand(rows, 1, -1, -1)
    own = [(layer.keys.flatten(0, 1)[:, :length], layer.values.flatten(0, 1)[:, :length])]
    outputs = []
    step = max(SCORES_AT_ONCE // (rows * num_heads * length), 1)
    for some in (slice(first, min(first + step, count)) for first in range(0, count, step)):
        allowed = None if attention_mask is None else attention_mask[:, :, some]
        near, near_logs = _weigh(query[:, :, :, some].reshape(rows * heads, -1, head_size), own, allowed)
        near = near.view(rows, heads, -1, some.stop - some.start, head_size)
        weight = torch.sigmoid(far_logs[..., some] - near_logs.view(near.shape[:-1])).unsqueeze(-1)
        outputs.append(torch.lerp(near, far[:, :, :, some], weight).to(query.dtype))
    return torch.cat(outputs, 3).permute(0, 3, 1, 2, 4).reshape(rows, count, num_heads, head_size), None


def _check_call(
    layer: _Layer, count: int, mask: torch.Tensor | None, needs_gradient: bool, kwargs: dict[str, Any]
) -> None:
    """Raise UnsupportedError for all that a model can ask of its attention but `attend` can't."""
    if needs_gradient and torch.is_grad_enabled():
        raise UnsupportedError(_NO_GRADIENTS)
    for name in _REFUSED:
        if torch.is_tensor(kwargs.get(name)) or kwargs.get(name):
            raise UnsupportedError(f"a SharedPrefix has no attention with {name}: use PrefixCache.load")
    is_ours = mask is None or (mask.dtype == torch.bool and mask.shape == (len(layer.keys), 1, count, layer.length))
    if not is_ours or layer.prefix.num_masked != layer.length or kwargs.get("is_causal") is False:
        raise UnsupportedError(
            "a SharedPrefix takes causal attention with an attention_mask of (rows, tokens), from which the model "
            "makes its own by create_causal_mask: use PrefixCache.load for any other"
        )


def _weigh(
    query: torch.Tensor, parts: _Parts, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (output, log-sum-exp of the scores) of scaled queries (batch, queries, head size).

    `allowed` (rows, 1, queries, tokens) says which tokens a query sees. Products are in the dtype of the model, as in
    "eager", sums in float32 or more.
    """
    lengths = [keys.shape[1] for keys, _ in parts]
    weights = torch.empty(*query.shape[:2], sum(lengths), dtype=query.dtype, device="cpu")
    for (keys, _), some in zip(parts, torch.split(weights, lengths, 2), strict=True):
        torch.bmm(query, keys.transpose(1, 2), out=some)
    weights = weights.to(torch.promote_types(query.dtype, torch.float32))
    if allowed is not None:
        # Not -inf: some padding sees nothing after the prefix, and its NaN would reach other tokens.
        each = weights.view(len(allowed), -1, *allowed.shape[2:])
        each.masked_fill_(allowed.logical_not(), torch.finfo(weights.dtype).min)
    top = weights.amax(-1)
    torch.softmax(weights, -1, out=weights)  # in place: another buffer of this size costs up to a third more
    logs = top - weights.amax(-1).log()  # the largest weight is now exp(top - log-sum-exp)
    output = torch.zeros(1, dtype=weights.dtype, device="cpu")
    for (_, values), some in zip(parts, torch.split(weights.to(query.dtype), lengths, 2), strict=True):
        output = output + torch.bmm(some, values)
    return output, logs


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
