#!/usr/bin/env python3
"""Write what the code says of itself: docs/cli.md, docs/api.md (their second halves) and the type stub of the wheel.

python docs/make_reference.py
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import kv_cache_manager as kv  # noqa: E402

MARK = "<!-- from here on made by docs/make_reference.py -->\n"


def main() -> None:
    for path, text in pages().items():
        path.write_text(text)


def pages() -> dict[Path, str]:
    """Return path -> text; of a page what is written by hand up to the mark, then what is made."""
    made = {HERE / "cli.md": commands(), HERE / "api.md": names()}
    texts = {path: path.read_text().partition(MARK)[0] + MARK + "\n" + lines(made[path]) for path in made}
    return {**texts, HERE.parent / "stubs" / "kv_cache_manager.pyi": lines(stub())}


def lines(text: Iterator[str]) -> str:
    return "\n".join(text) + "\n"


def commands() -> Iterator[str]:
    """Yield the lines about the commands of the shell."""
    parsers = kv.subcommands(kv.build_parser())
    yield from ("| command | |", "|---|---|")
    yield from (f"| [`{name}`](#{name}) | {sub.description} |" for name, sub in parsers.items())
    for name, sub in parsers.items():
        yield from ("", f"## {name}", "", str(sub.description), "", "```text", usage(name, sub), "```")
        actions = [action for action in sub._actions if action.dest not in ("help", "store")]
        rows = [argument(action) for action in actions if action.help]
        yield from ("", "| argument | |", "|---|---|", *rows) if rows else ()


def usage(name: str, sub: argparse.ArgumentParser) -> str:
    """Return the command with its arguments, the positional ones first, in lines of up to 100 characters."""
    words, begin = [], f"cortex cache {name}"
    for action in sorted(sub._actions, key=lambda action: bool(action.option_strings)):
        if action.dest not in ("help", "store"):
            words.append(shown(action) if action.required else f"[{shown(action)}]")
    # spaces inside an option are kept together
    text = textwrap.fill(" ".join(word.replace(" ", "\0") for word in words), 98 - len(begin), break_on_hyphens=False)
    return f"{begin} {textwrap.indent(text, ' ' * (len(begin) + 1)).strip()}".rstrip().replace("\0", " ")


def shown(action: argparse.Action) -> str:
    """Return an argument as it is typed: `--size SIZE`, `KEY`."""
    value = "|".join(map(str, action.choices)) if action.choices else str(action.metavar or action.dest.upper())
    if not action.option_strings:
        return value
    if action.nargs == 0:
        return action.option_strings[-1]
    return f"{action.option_strings[-1]} {f'[{value}]' if action.nargs == '?' else value}"


def argument(action: argparse.Action) -> str:
    name = action.option_strings[-1] if action.option_strings else shown(action).replace("|", "\\|")
    return f"| `{name}` | {(action.help or '').replace('%%', '%')} |"


def names() -> Iterator[str]:
    """Yield the lines about the public names of the module: classes first, then errors, functions and constants."""
    public = {name: getattr(kv, name) for name in kv.__all__}
    classes = {name: value for name, value in public.items() if inspect.isclass(value)}
    errors = {name: value for name, value in classes.items() if issubclass(value, kv.CacheError)}
    functions = {name: value for name, value in public.items() if inspect.isfunction(value)}
    order = ["KVCachePool", "CachePoolConfig", "CacheEntry", "CacheStore", "PrefixCache", "EvictionPolicy"]
    for name in [*order, *(name for name in classes if name not in order and name not in errors)]:
        yield from ("", f"## {name}", "", text_of(classes[name]))
        yield from members(name, classes[name])
    yield from ("", "## Errors", "", "| error | |", "|---|---|")
    for name, value in errors.items():
        base = value.__bases__[0].__name__
        about = " ".join(text_of(value).split())
        yield f"| `{name}` | {about}{'' if base in ('Exception', 'CacheError') else f' A `{base}`.'} |"
    yield from ("", "## Functions")
    for name, value in functions.items():
        yield from heading(f"### {name}", name, value)
        yield from ("", text_of(value))
    yield from ("", "## Constants", "", "| constant | |", "|---|---|")
    yield from (f"| `{name}` | `{value!r}` |" for name, value in public.items() if not callable(value))


def members(name: str, owner: Any) -> Iterator[str]:
    """Yield the lines about the fields, values and public methods of a class, as the code has them in its order."""
    if issubclass(owner, enum.Enum):
        yield from ("", "Its members: " + ", ".join(f"`{member.name}` ({member.value!r})" for member in owner) + ".")
        return
    if dataclasses.is_dataclass(owner):
        yield from heading("", name, owner)
    elif owner.__init__ is not object.__init__ and owner.__init__.__doc__:
        yield from heading("### The constructor", name, owner)
        yield from ("", text_of(owner.__init__))
    found: dict[str, Any] = {}
    for base in owner.__mro__:
        found = {**{key: value for key, value in vars(base).items() if not key.startswith("_")}, **found}
    for key in sorted(found, key=lambda key: key not in vars(owner)):  # those of its bases last
        function = getattr(found[key], "__func__", found[key])  # of a classmethod or staticmethod
        if inspect.isfunction(function) and function.__doc__:
            yield from heading(f"### {key}", key, function)
            yield from ("", text_of(function))
        elif isinstance(function, property):
            yield from ("", f"### {key}", "", f"A property. {text_of(function)}")


def heading(title: str, name: str, function: Any) -> Iterator[str]:
    """Yield a heading, and how a function or class is called, without self and cls."""
    found = inspect.signature(function)
    given = [text for text in arguments(found, repr) if text not in ("self", "cls")]
    result = "" if inspect.isclass(function) else str(found.return_annotation)
    result = result.replace("builtins.", "").replace("contextlib.", "")
    call = f"{name}({', '.join(given)})" + (f" -> {result}" if result and result != "None" else "")
    if len(call) > 110:
        call = f"{name}(\n    " + ",\n    ".join(given) + ",\n)" + call.partition(f"{given[-1]})")[2]
    yield from ("", title, "") if title else ("",)
    yield from ("```python", call.replace(" | os.PathLike[str]", " | PathLike"), "```")


ATTRIBUTES = {
    "KVCachePool": ["name: str", "store_path: str"],
    "CacheStore": ["store_path: str"],
    "PrefixCache": ["pool: KVCachePool", "block_size: int", "verify: bool"],
    "BitmapAllocator": ["num_blocks: int", "num_bytes: int"],
    "KVCacheCLI": ["store: CacheStore"],
}
SPECIAL = ["__init__", "__enter__", "__exit__", "__len__", "__contains__", "__iter__", "__bool__"]
STUB_HEAD = """\
# Made by docs/make_reference.py. Type information for users: PEP 561 has none for modules but by a package of stubs.
import argparse
import builtins
import contextlib
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

Progress = Callable[[int, int], None]"""


def stub() -> Iterator[str]:
    """Yield the lines of the type stub: all public names, and what they return."""
    yield STUB_HEAD
    yield f"__all__ = {kv.__all__!r}"
    yield "__version__: str"
    for name in [*kv.__all__, "PathViews"]:
        value = getattr(kv, name)
        if inspect.isfunction(value):
            yield stub_of(name, value)
        elif not inspect.isclass(value):
            yield f"{name}: {type(value).__name__}"
        else:
            bases = [base.__name__ for base in value.__bases__ if base is not object and base.__name__[0] != "_"]
            if name == "PathViews":
                bases = ["list[memoryview]"]
            if dataclasses.is_dataclass(value):
                yield "@dataclass"
            yield f"class {name}({', '.join(bases)}):" if bases else f"class {name}:"
            yield from (f"    {line}" for line in body_of(name, value))


def body_of(name: str, owner: Any) -> Iterator[str]:
    """Yield the lines of a class: its values or fields, attributes and methods, with those of its private bases."""
    if issubclass(owner, enum.Enum):
        yield from (f"{member.name} = {member.value!r}" for member in owner)
        return
    yield from ATTRIBUTES.get(name, [])
    for field in dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ():
        is_given = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        yield f"{field.name}: {field.type}{' = ...' if is_given else ''}"
    found: dict[str, Any] = {}
    for base in owner.__mro__:
        if base is owner or base.__name__[0] == "_":
            found = {**vars(base), **found}
    has_method = False
    for key, value in found.items():
        if key[0] == "_" and (key not in SPECIAL or dataclasses.is_dataclass(owner)):
            continue
        decorator = ""
        if isinstance(value, classmethod):
            decorator = "@classmethod"
        elif isinstance(value, staticmethod):
            decorator = "@staticmethod"
        function = getattr(value, "__func__", None) or getattr(value, "fget", None) or getattr(value, "func", value)
        if isinstance(value, property) or (function is not value and not decorator):
            decorator = "@property"
        if inspect.isfunction(function) and function.__name__ == key:  # not what Protocol puts there
            yield from filter(None, [decorator, stub_of(key, function)])
            has_method = True
    if not has_method:
        yield "..."


def stub_of(name: str, function: Any) -> str:
    """Return a function without its body."""
    found = inspect.signature(function)
    given = arguments(found, lambda value: "...")
    result = "" if found.return_annotation is found.empty else f" -> {found.return_annotation}"
    return f"def {name}({', '.join(given)}){result}: ...".replace("_Paths", "KVCachePool")


def arguments(found: inspect.Signature, show: Callable[[Any], str]) -> list[str]:
    """Return the parameters of a function as they are written; `show` gives the text of a default."""
    given: list[str] = []
    for key, value in found.parameters.items():
        if value.kind is value.KEYWORD_ONLY and not any(text[0] == "*" for text in given):
            given.append("*")
        star = {value.VAR_POSITIONAL: "*", value.VAR_KEYWORD: "**"}.get(value.kind, "")
        text = star + key + ("" if value.annotation is value.empty else f": {value.annotation}")
        if value.default is not value.empty:
            text += f" = {'...' if 'factory' in repr(value.default) else show(value.default)}"
        given.append(text)
    return given


def text_of(value: Any) -> str:
    """Return a docstring as Markdown: `names` stay, doctests become code."""
    text, in_code = [], False
    for line in inspect.cleandoc(value.__doc__ or "").splitlines():
        if line.startswith(">>>") and not in_code:
            text.append("```python")
            in_code = True
        elif in_code and not line:
            text.append("```")
            in_code = False
        text.append(line)
    return "\n".join([*text, "", "```"] if in_code else text)


if __name__ == "__main__":
    main()
