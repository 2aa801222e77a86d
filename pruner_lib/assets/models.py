"""Models by name: the default one from the manifest, any other from the hub or a folder."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pruner_lib.assets.devices import computes_in_bfloat16
from pruner_lib.assets.errors import AssetError, UnknownAssetError, suggestion
from pruner_lib.assets.fetching import fetch
from pruner_lib.assets.files import cache_folder, replace_folder, temporary_folder
from pruner_lib.assets.manifest import load_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_MARKER = "conversion.json"


def load_model(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to be looked into.

    >>> model, tokenizer = load_model()                                  # the embedded default
    >>> model, tokenizer = load_model("HuggingFaceTB/SmolLM2-360M")      # a hub id
    >>> model, tokenizer = load_model("./runs/my-pruned-model")          # a folder

    Args:
        name: :data:`DEFAULT_MODEL`, a hub id ``owner/name``, or a folder that
            ``save_pretrained`` wrote. A folder that exists wins over a hub id of the same spelling.
        device: where the model goes; None takes CUDA when there is one, else the CPU.
        dtype: of the weights, for example ``"float32"``; None is bfloat16 on a GPU that computes in
            it, else float32.

    Returns:
        The model in evaluation mode and its tokenizer.

    Raises:
        UnknownAssetError: the name is none of the three, or the folder is not there.
        DownloadError: the default model is not in the cache and cannot be downloaded.
        AssetError: the hub or the folder has no loadable model of that name.
        ValueError: device or dtype is not one that torch knows, CUDA is asked for and absent, or MPS is.
    """
    place = resolve_device(device)
    precision = _resolve_dtype(dtype, place)
    source = locate_model(name)
    try:
        model, tokenizer = _open(source, precision)
    except (OSError, ValueError, KeyError) as error:
        raise AssetError(_explain_failure(str(name), error)) from error
    return model.to(place).eval(), tokenizer  # type: ignore[arg-type]


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or CUDA when there is one, else the CPU.

    Raises:
        ValueError: torch does not know the device, CUDA is asked for and absent, or it is Apple's MPS.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device {device!r} is unknown to torch; give 'cpu', 'cuda', 'cuda:0' or None"
        ) from error
    if place.type == "mps":
        raise ValueError(
            f"device {str(device)!r} was asked for, but losses and scores are summed in float64, which MPS "
            "lacks; give 'cpu' or None"
        )
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {str(device)!r} was asked for, but torch sees no CUDA device; give 'cpu' or None"
        )
    return place


def _resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, or the customary one of the device."""
    if dtype is None:
        half = device.type == "cuda" and computes_in_bfloat16(device)
        return torch.bfloat16 if half else torch.float32
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype {dtype!r} is not a floating type; give 'float32', 'bfloat16', 'float16' or None"
        )
    return found


def locate_model(name: str | os.PathLike[str]) -> str | Path:
    """Where a model name leads, without loading the model.

    The default model is fetched and converted first when the cache lacks it.

    Args:
        name: as for :func:`load_model`.

    Returns:
        A folder as a Path, or a hub id as a str.

    Raises:
        UnknownAssetError: the name is neither the default model's, nor a hub id, nor a model folder.
    """
    text = os.fspath(name)
    if text == DEFAULT_MODEL:
        return default_model_folder()
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UnknownAssetError(
                f"the folder {text!r} holds no config.json; "
                "give a folder that save_pretrained or save_pruned wrote"
            )
        return folder
    looks_like_path = folder.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1
    if looks_like_path or not all(text.split("/")):
        raise UnknownAssetError(_unknown(text))
    return text


def _unknown(text: str) -> str:
    """What else would have been valid."""
    return (
        f"no model is called {text!r} and no such folder exists.{suggestion(text, [DEFAULT_MODEL])} "
        f"Valid: {DEFAULT_MODEL!r} (the default, needs no hub), a hub id with its owner such as "
        "'HuggingFaceTB/SmolLM2-360M' or 'openai-community/gpt2', or a folder written by save_pretrained."
    )


def _explain_failure(name: str, error: Exception) -> str:
    """Why a hub id or folder did not open."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{name!r} could not be loaded as a causal language model: {first} "
        "A hub id needs the network (or the hub's own cache) and, for gated models, a login; "
        f"a folder needs config.json, safetensors weights and tokenizer files. "
        f"{DEFAULT_MODEL!r} needs no hub."
    )


def _open(source: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open with transformers; folders quietly and without asking the hub."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    if isinstance(source, Path):
        with _no_bars():
            opened: Any = AutoModelForCausalLM.from_pretrained(source, local_files_only=True, **how)
            return _whole(*opened), AutoTokenizer.from_pretrained(source, local_files_only=True)
    opened = AutoModelForCausalLM.from_pretrained(source, **how)
    return _whole(*opened), AutoTokenizer.from_pretrained(source)


def _whole(model: PreTrainedModel, report: dict[str, Any]) -> PreTrainedModel:
    """The model; transformers fills weights that a checkpoint lacks with random numbers, and reports it."""
    missing = sorted(map(str, report.get("missing_keys", ())))
    if missing:
        raise OSError(
            f"its checkpoint lacks {len(missing)} weights of a {type(model).__name__}, which would be random "
            f"({', '.join(missing[:3])}{' …' if len(missing) > 3 else ''})."
        )
    return model


@contextmanager
def _no_bars() -> Iterator[None]:
    """Silence transformers' bars for a load of a second, and put the setting back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def default_model_folder() -> Path:
    """Folder of the default model as safetensors, converted once from the manifest's GGUF file.

    Returns:
        ``<cache>/models/SmolLM2-135M-Instruct-<first digits of the GGUF's SHA-256>``.
    """
    asset = load_manifest()[DEFAULT_MODEL]
    folder = cache_folder() / "models" / f"{DEFAULT_MODEL}-{asset.sha256[:8]}"
    if not _is_complete(folder):
        convert_gguf(fetch(DEFAULT_MODEL), folder, name=DEFAULT_MODEL)
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether every file of the conversion is there in its full size."""
    marker = folder / _MARKER
    if not marker.is_file():
        return False
    sizes: dict[str, int] = json.loads(marker.read_text(encoding="utf-8"))["bytes"]
    return all(
        (folder / file).is_file() and (folder / file).stat().st_size == size for file, size in sizes.items()
    )


def convert_gguf(gguf: Path, folder: Path, *, name: str) -> None:
    """Write the model and tokenizer of a GGUF file as an ordinary model folder, whole or not at all.

    The quantised blocks become float32 without loss; nothing is quantised again.

    Args:
        gguf: the file.
        folder: the folder to make; one that is there is replaced.
        name: kept in the configuration as the model's name.

    Raises:
        AssetError: the folder could not be written (a full disk). Nothing is left behind.
    """
    print(f"converting {gguf.name} to safetensors, once (about 30 seconds)", flush=True)
    with temporary_folder(folder) as parent:
        part = parent / "model"
        try:
            _write_conversion(gguf, part, name)
            sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
            marker = json.dumps({"source": gguf.name, "bytes": sizes}, indent=2)
            (part / _MARKER).write_text(marker + "\n", encoding="utf-8")
            replace_folder(part, folder)
        # safetensors reports a full disk as an error of its own, which is no OSError.
        except Exception as error:
            raise AssetError(
                f"could not convert {gguf.name} into {folder}: {error}. The half-written copy was removed. "
                "The conversion needs about 0.6 GB; free some space or move PRUNER_LIB_CACHE."
            ) from error


def _write_conversion(gguf: Path, part: Path, name: str) -> None:
    """Load from GGUF, move the weights into a model with a clean configuration, save both."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    config = copy.deepcopy(loaded.config)
    # A configuration that still says "quantised" makes save_pretrained refuse.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = name
    if hasattr(config, "rms_norm_eps"):
        config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF keeps it as float32: 9.99999975e-06
    # The fresh model is initialised at random before it gets its weights; the caller's state stays.
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = copy.deepcopy(loaded.generation_config)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    tokenizer.model_max_length = config.max_position_embeddings
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
