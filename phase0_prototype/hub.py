"""From what the user typed after `--model` to a directory on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from phase0_prototype.errors import UserError

SHIPPED: Mapping[str, Path] = MappingProxyType({"titan-tiny": Path(__file__).parent / "models" / "titan-tiny"})
"""Models that come with the project, by name."""

WANTED = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
# Repositories may hold the same weights twice: Mistral's consolidated.safetensors, Llama's original/.
UNWANTED = ("consolidated*", "original/*", "onnx/*")
TIMEOUT_S = 4.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve_model(model: str | Path, *, revision: str | None = None) -> Path:
    """The directory of `model`: an existing directory, the name of a shipped model, or a hub id `owner/name`.

    A hub id is downloaded once into the cache of huggingface_hub (HF_HOME, HF_HUB_OFFLINE and HF_TOKEN are respected),
    `revision` being a branch, tag or commit. Raises UserError, one line with the remedy.
    """
    name = str(model)
    path = Path(os.path.expanduser(model))  # unlike Path.expanduser it does not raise where there is no such user
    if name and path.is_dir():
        return path
    if name in SHIPPED:
        if not (SHIPPED[name] / "config.json").is_file():
            raise UserError(f"the shipped model {name} is not in this installation ({SHIPPED[name]}): use a git clone")
        return SHIPPED[name]
    if name and path.exists():
        raise UserError(f"{name} is a file: give the directory that holds config.json and the weights")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(name):
        raise UserError(
            f"{name!r} is neither a directory, nor a shipped model ({', '.join(SHIPPED)}), nor a hub id like "
            "Qwen/Qwen3-0.6B"
        )
    return _download(name, revision)


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    # snapshot_download asks without a timeout, so a network that swallows packets would hang it: ask once before it.
    refusal: Exception | None = None
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().model_info(model, revision=revision, timeout=TIMEOUT_S)
        except (
            Exception
        ) as error:  # of several libraries, for proxies, names, connections, refusals; the cache may help
            refusal = error
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
                etag_timeout=TIMEOUT_S,
                local_files_only=constants.HF_HUB_OFFLINE or refusal is not None,
            )
        )
    except errors.LocalEntryNotFoundError:
        message = _why_not(model, revision, refusal)
    except Exception as error:  # a connection that breaks, a full disk, an id that the hub's rules forbid
        message = f"{model} could not be downloaded: {type(error).__name__}: {_first_line(error)}"
    raise UserError(message)


def _why_not(model: str, revision: str | None, refusal: Exception | None) -> str:
    """One line on why a model is not to be had; `refusal` is what the hub or the network said to our question."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{model}"
    match refusal:
        case errors.GatedRepoError():  # a subclass of the next
            return f"{model} is gated: accept its licence at {page}, then set HF_TOKEN or run `hf auth login`"
        case errors.RepositoryNotFoundError():
            return f"{model} is neither a directory nor a model at {page}: check the name (private: set HF_TOKEN)"
        case errors.RevisionNotFoundError():
            return f"{model} has no revision {revision!r}: see {page}"
        case errors.HfHubHTTPError():
            reason = f"{constants.ENDPOINT} answers: {_first_line(refusal)}"
        case None:
            reason = "HF_HUB_OFFLINE is set"
        case _:
            reason = f"there is no answer from {constants.ENDPOINT} (no network?)"
    return (
        f"{model} is not in the cache {constants.HF_HUB_CACHE} and {reason}: give a local directory, or set HF_HOME to "
        "a cache that holds it"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no details"
