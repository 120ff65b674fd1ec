"""KV of transformers models: all that it depends on beside weights and tokens, for `PrefixCache.for_model`.

Tested with transformers 5 and peft. It imports neither: it looks at a model that the caller has.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from kv_cache_manager import InvalidArgumentError, NotCacheableError, UnsupportedError

# Rope scaling that is the same for every length of prompt. Of the others, all but dynamic NTK and longrope are refused.
_FIXED_ROPES = ("default", "linear", "yarn", "llama3", "proportional", "mrope", "axial")
# Their `generate` computes a prompt anew when it grows beyond the original length, so its KV has one set of factors.
_LONGROPE_MODELS = ("phi3", "phimoe", "phi4_multimodal")
_ORIGINAL = "original_max_position_embeddings"
_PLACEHOLDER = re.compile(r"(image|video|audio)_token_(id|index)")
# Keys of a config about names, outputs and generation: KV does not depend on them. The dtype is that of the weights.
_NOT_OF_KV = re.compile(
    r"_name_or_path|transformers_version|architectures|auto_map|dtype|torch_dtype|use_cache|return_dict|output_\w+|"
    r"id2label|label2id|problem_type|\w+_token_id|base_model_name_or_path|revision|inference_mode|peft_version"
)
_NUM_SAMPLES = 16  # values of each weight that are read at each look; the fewest that always show a merged adapter


class ModelContext:
    """The state of a model of transformers or peft that KV depends on beside tokens: a `KVContext` for `PrefixCache`.

    It looks at the model each time. A look costs some milliseconds, as it visits every module.
    """

    def __init__(self, model: Any) -> None:
        if not hasattr(model, "named_modules") or not hasattr(getattr(model, "config", None), "to_dict"):
            raise InvalidArgumentError(f"model is a {type(model).__name__}, it must be a model of transformers or peft")
        self._model = model
        # By the id of each adapter weight: (reference to it, its version, the sum of its bits, their digest).
        self._digests: dict[int, tuple[weakref.ref[Any], int, int, bytes]] = {}

    def digest(
        self, tokens: Sequence[int], named_blocks: Container[int], block_size: int, length: int, stores: bool
    ) -> bytes:
        """Return a digest of all that the KV of these tokens depends on; see `KVContext`."""
        config = self._model.config.to_dict()
        parts = list(_configs(config))
        _check_causal(self._model, parts)
        _check_placeholders(tokens, named_blocks, block_size, parts)
        digest = hashlib.sha256()
        for name, limit, model_type in _ropes_by_length(parts):
            is_beyond = length > limit
            if name == "longrope":
                if is_beyond and model_type not in _LONGROPE_MODELS:
                    raise NotCacheableError(
                        f"longrope of {model_type}: the KV of {length} tokens can't be told from one that was begun "
                        f"with other factors, at up to {limit} tokens: cache prompts of up to {limit} tokens"
                    )
                digest.update(_framed(b"longrope: long" if is_beyond else b"longrope: short"))
            elif is_beyond or ((stores or length == limit) and _has_grown(self._model)):
                raise NotCacheableError(
                    f"dynamic NTK rope: the KV of {length} tokens depends on how many the model has computed, for it "
                    f"has gone beyond {limit}: cache prompts of up to {limit} tokens, before a longer one is computed"
                )
        texts = [json.dumps(_of_kv(config), sort_keys=True, default=_plain), _attention_of(self._model.config)]
        for text in (*texts, self._autocast()[0]):
            digest.update(_framed(text.encode()))
        digest.update(self._weights_digest())
        return digest.digest()

    def check_length_is_known(self) -> None:
        """Raise UnsupportedError if KV depends on the length of the prompts that begin with these tokens."""
        if _ropes_by_length(list(_configs(self._model.config.to_dict()))):
            raise UnsupportedError(
                "rope scaling of this model depends on the length of the prompt: pass that of the longest one that "
                "begins with these tokens, as load(tokens, batch_size, length=...)"
            )

    def check_dtype(self, dtype: Any) -> None:
        """Raise UnsupportedError if the model does not compute KV of this dtype, a torch.dtype, as it is now."""
        text, computed = self._autocast()
        dtypes = {tensor.dtype for tensor in self._model.parameters()}
        if dtype not in dtypes and dtype != computed:
            raise UnsupportedError(
                f"kv of {dtype} is not of this model of {', '.join(sorted(map(str, dtypes)))}{text and ', ' + text}: "
                "it was computed under autocast, or the model was converted since: compute it anew"
            )

    def _autocast(self) -> tuple[str, Any]:
        """Return (the model's autocast now, as text, the dtype that it computes in); ("", None) if there is none."""
        import torch

        device = next((tensor.device.type for tensor in self._model.parameters()), "cpu")
        if device == "meta" or not torch.is_autocast_enabled(device):
            return "", None
        dtype = torch.get_autocast_dtype(device)
        return f"autocast to {dtype}", dtype

    def _weights_digest(self) -> bytes:
        """Return a digest of the adapters' state and all weights: adapters in use as a whole, others by a sample."""
        digest, sampled = hashlib.sha256(), []
        configs: Mapping[str, Any] = {}
        used: set[str] = set()
        # (module, where it lies in the adapted layer around it or None, adapters of that layer that are not in use)
        waiting: list[tuple[Any, tuple[str, ...] | None, frozenset[str]]] = [(self._model, None, frozenset())]
        seen = set()
        while waiting:
            module, way, idle = waiting.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            _check_no_dropout(module)
            found = vars(module).get("peft_config")
            configs = found if isinstance(found, Mapping) else configs
            if isinstance(getattr(type(module), "disable_adapters", None), property):  # an adapted layer of peft
                merged = list(getattr(module, "merged_adapters", ()))
                active = [] if module.disable_adapters else list(module.active_adapters)
                way, idle = (), frozenset(configs) - {*active, *merged}
                if active or merged:
                    used.update(active, merged)
                    scaling = getattr(module, "scaling", {})
                    factors = {key: scaling[key] for key in active if key in scaling}
                    text = f"{type(module).__name__} {active} {merged} {factors}"
                    digest.update(_framed(text.encode()))
            tensors = [*module._parameters.items()]
            unsaved = module._non_persistent_buffers_set
            # The model makes other buffers that are not saved as it runs, such as those of rope for a long prompt.
            tensors += [(n, t) for n, t in module._buffers.items() if n not in unsaved or _is_rope(module, n)]
            for name, tensor in tensors:
                if tensor is None or _is_idle(way, name, idle):
                    continue
                if hasattr(tensor, "to_local"):  # a shard: other ranks need not take part, and hold other KV
                    tensor = tensor.to_local()  # noqa: PLW2901
                text = f"{tensor.dtype} {tuple(tensor.shape)}"
                if way is None:
                    digest.update(_framed(text.encode()))
                    sampled.append(tensor)
                else:
                    digest.update(_framed(f"{'.'.join((*way, name))} {text}".encode()) + self._digest(tensor))
            for name, child in module._modules.items():
                if child is None or _is_idle(way, name, idle):
                    continue
                is_base = way == () and name in ("base_layer", "original_module")
                waiting.append(
                    (child, None if way is None or is_base else (*way, name), frozenset() if is_base else idle)
                )
        for name in sorted(used):
            if name in configs:
                digest.update(_framed(_adapter_text(name, configs[name]).encode()))
        digest.update(_sample(sampled))
        return digest.digest()

    def _digest(self, tensor: Any) -> bytes:
        """Return the digest of a tensor's bytes: kept for as long as its version and the sum of its bits stay.

        The version alone does not show writes through `tensor.data`.
        """
        import torch

        if tensor.device.type == "meta":
            raise UnsupportedError("adapter weights on the device meta can't be read: load the adapter into memory")
        bits = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
        is_aligned = not (bits.numel() | bits.storage_offset()) % 8
        total = int((bits.view(torch.int64) if is_aligned else bits).sum())
        version = -1 if tensor.is_inference() else tensor._version
        key = id(tensor)
        kept = self._digests.get(key)
        if kept is not None and kept[0]() is tensor and kept[1:3] == (version, total):
            return kept[3]
        digest = hashlib.sha256(memoryview(bits.cpu().numpy())).digest()
        kept_digests = self._digests
        self._digests[key] = weakref.ref(tensor, lambda _: kept_digests.pop(key, None)), version, total, digest
        return digest


def _check_placeholders(
    tokens: Sequence[int], named_blocks: Container[int], block_size: int, parts: Sequence[Mapping[str, Any]]
) -> None:
    """Raise NotCacheableError if a full block without a text holds a placeholder of an image or a sound."""
    holders = {
        value: key
        for part in parts
        for key, value in part.items()
        if _PLACEHOLDER.fullmatch(str(key)) and isinstance(value, int)
    }
    for at in range(len(tokens) // block_size * block_size if holders else 0):
        block, token = at // block_size, tokens[at]
        if token in holders and block not in named_blocks:
            raise NotCacheableError(
                f"block {block} holds token {token} ({holders[token]}), whose KV depends on more than tokens: name "
                f"the image or sound, as in block_extra={{{block}: digest}}"
            )


def _framed(data: bytes) -> bytes:
    """Return data with its length in front, so that two texts one after the other can't be taken for others."""
    return len(data).to_bytes(8, "little") + data


def _configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a config of transformers, as a dict, and all dicts inside it."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _configs(value)


def _of_kv(config: Any) -> Any:
    """Return a config without the keys that KV does not depend on."""
    if isinstance(config, Mapping):
        return {str(key): _of_kv(value) for key, value in config.items() if not _NOT_OF_KV.fullmatch(str(key))}
    return config


def _plain(value: object) -> Any:
    """Return a value that JSON can hold in place of a config's value that it can't."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _ropes_by_length(parts: Iterable[Mapping[str, Any]]) -> list[tuple[str, int, str]]:
    """Return ("longrope" or "dynamic", its original length, model type) of each rope that depends on a prompt's length.

    UnsupportedError for a kind of rope scaling that is not known. One config may have several, by type of layer.
    """
    found = []
    for part in parts:
        for rope in (part.get("rope_parameters"), part.get("rope_scaling")):
            if not isinstance(rope, Mapping):
                continue
            for each in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
                name = str(each.get("rope_type", each.get("type", "default")))
                lengths = [each.get(_ORIGINAL), part.get(_ORIGINAL), part.get("max_position_embeddings")]
                known = [length for length in lengths if isinstance(length, int)]
                if name in _FIXED_ROPES:
                    continue
                if not known or not ("dynamic" in name or name in ("longrope", "su")):
                    raise UnsupportedError(
                        f"rope scaling {name!r} is not known here: use PrefixCache without for_model, and name in "
                        "extra what its KV depends on"
                    )
                is_dynamic = "dynamic" in name
                kind, limit = ("dynamic", min(known)) if is_dynamic else ("longrope", known[0])
                found.append((kind, limit, str(part.get("model_type"))))
    return found


def _has_grown(model: Any) -> bool:
    """Return True if rope of dynamic NTK is now that of a prompt beyond its original length."""
    for module in model.modules():
        limit = getattr(module, "original_max_seq_len", None)
        lengths = [value for name, value in vars(module).items() if name.endswith("max_seq_len_cached")]
        if limit is not None and any(int(length) > int(limit) for length in lengths):
            return True
    return False


def _check_causal(model: Any, parts: Iterable[Mapping[str, Any]]) -> None:
    """Raise UnsupportedError if KV depends on anything after its token, or on virtual tokens in front."""
    for part in parts:
        both = part.get("use_bidirectional_attention") in (True, "all") or part.get("model_type") == "paligemma"
        if both or part.get("is_encoder_decoder") is True:
            raise UnsupportedError(
                f"KV of a {part.get('model_type')} model depends on more than the tokens so far (an encoder, or "
                "attention in both directions): it can't be cached by prefix"
            )
    adapters, name = getattr(model, "peft_config", None), getattr(model, "active_adapter", None)
    adapter = adapters.get(name) if isinstance(adapters, Mapping) and isinstance(name, str) else None
    if getattr(adapter, "is_prompt_learning", False) and not getattr(model, "_adapters_disabled", False):
        raise UnsupportedError(
            f"adapter {name!r} puts virtual tokens before the prompt, so its KV can't be cached by prefix: "
            "disable it, or use PrefixCache without for_model and count them as tokens"
        )


def _check_no_dropout(module: Any) -> None:
    """Raise UnsupportedError if the module drops values at random."""
    if not module.training:
        return
    told = vars(module)  # not getattr: a module takes long to say that it has no such attribute
    rates = told.get("attention_dropout"), told.get("p") if "Dropout" in type(module).__name__ else 0
    if any(isinstance(rate, float) and rate > 0 for rate in rates):
        raise UnsupportedError("the model is in training mode, with dropout: its KV is random; call model.eval() first")


def _adapter_text(name: str, config: Any) -> str:
    """Return an adapter's name and config; UnsupportedError if its effect on KV depends on more than tokens so far."""
    told = config.to_dict()
    kind = str(getattr(told.get("peft_type"), "value", told.get("peft_type")))
    if kind in ("XLORA", "POLY") or told.get("alora_invocation_tokens"):
        raise UnsupportedError(f"adapter {name!r} of kind {kind} goes by the whole prompt or by tasks: disable it")
    return f"{name} {json.dumps(_of_kv(told), sort_keys=True, default=_plain)}"


def _attention_of(config: Any) -> str:
    """Return the attention implementations of a config and those inside it. That of `SharedPrefix` counts as sdpa."""
    inside = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    names = [getattr(each, "_attn_implementation", None) for each in (config, *inside)]
    return str(["sdpa" if name == "cortex" else name for name in names])


def _is_rope(module: Any, name: str) -> bool:
    """Return True for a buffer of rope frequencies that is the same whatever the model has computed."""
    kinds = getattr(module, "rope_type", "")
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    changes = any("dynamic" in str(kind) or kind == "longrope" for kind in kinds)
    return name.endswith("inv_freq") and (not changes or "original" in name)


def _is_idle(way: tuple[str, ...] | None, name: str, idle: frozenset[str]) -> bool:
    """Return True for a part of an adapted layer that belongs to an adapter not in use: lora_A.NAME, say."""
    return way is not None and len(way) == 1 and name in idle


def _sample(tensors: Iterable[Any]) -> bytes:
    """Return some bytes of each of these tensors, evenly spread; nothing of those that can't be read."""
    import torch

    pieces: dict[Any, list[Any]] = {}
    for tensor in tensors:
        if tensor.numel() and tensor.device.type != "meta":
            with contextlib.suppress(RuntimeError, TypeError, NotImplementedError):  # a packed kind of its own
                flat = tensor.detach().reshape(-1)[:: -(-tensor.numel() // _NUM_SAMPLES)]
                pieces.setdefault(tensor.device, []).append(flat.contiguous().view(torch.uint8))
    return b"".join(torch.cat(each).cpu().numpy().tobytes() for each in pieces.values())
