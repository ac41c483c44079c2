"""Model weights in a cache volume: the files that a server needs of a repository, and whether they are complete.

The cache has Hugging Face's layout, so that vLLM, transformers and `hf` can use it:

    models--ORG--NAME/
        blobs/CHECKSUM             the files
        blobs/CHECKSUM.incomplete  partial files
        refs/REVISION              the commit of a branch or tag
        snapshots/COMMIT/PATH      links to the blobs
        shannon/COMMIT.json        written last: the files of a finished download, and their sizes

Not handled: the download (`engine.weights.hub`). Every failure is raised as a WeightsError, whose message says what to
do:

    WeightsError
    +- Gated      a licence must be accepted, or a token is missing
    +- NotFound   no such repository, revision or file; or a private one
    +- NoSpace    the volume is too small
    +- Offline    the hub can't be reached, or fails
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from engine.weights.transfer import size_of

INDEX = "model.safetensors.index.json"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_NAME = 96
"""Limit on each half of an id in characters, as on the hub."""
_NAME = rf"\w(?:[\w.-]{{0,{_MAX_NAME - 2}}}\w)?"
_HUB_ID = re.compile(rf"(?!.{{0,{2 * _MAX_NAME}}}(?:--|\.\.)){_NAME}(?:/{_NAME})?(?<!\.git)", re.ASCII)
_MODULE = re.compile(r"[0-9]{1,3}_[0-9A-Za-z_]{1,64}/[^/]{1,255}")
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite"),
    *(".ot", ".mlmodel", ".nemo", ".llamafile", ".engine"),
)
_UNREAD = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp3", ".mp4", ".wav", ".flac", ".parquet", ".ipynb", ".zip")
_TRAINING = ("optimizer.", "scheduler.", "scaler.", "training_args.", "rng_state")


class WeightsError(Exception):
    """Base of the errors about weights. The message is one line for the operator."""


class Gated(WeightsError):
    """The hub requires an accepted licence, or another token."""


class NotFound(WeightsError):
    """There is no such model, or the token has no access to it."""


class NoSpace(WeightsError):
    """The volume is too small."""


class Offline(WeightsError):
    """The hub can't be reached."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of a repository. `checksum` is the SHA-256 of a git LFS file, git's SHA-1 of any other."""

    path: str
    size_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The files that a server needs of a model. `revision` is as requested, `commit` is its commit."""

    model: str
    revision: str
    commit: str
    files: tuple[File, ...]
    folder: Path
    """The repository's folder in the cache."""

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshots" / self.commit

    @property
    def manifest(self) -> Path:
        return self.folder / "shannon" / f"{self.commit}.json"

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be downloaded."""
        return self.size_bytes - sum(self._present_bytes(file) for file in self.files)

    def _present_bytes(self, file: File) -> int:
        if file.size_bytes in (size_of(self.snapshot / file.path), size_of(self.blob(file))):
            return file.size_bytes
        return min(size_of(self.partial(file)) or 0, file.size_bytes)

    def blob(self, file: File) -> Path:
        return self.folder / "blobs" / file.checksum

    def partial(self, file: File) -> Path:
        return self.folder / "blobs" / f"{file.checksum}.incomplete"


def is_hub_id(model: str) -> bool:
    """Return whether an engine's `model` is a repository on a hub, not a path or the demo model."""
    return model != "demo" and bool(_HUB_ID.fullmatch(model)) and not Path(model).exists()


def default_cache_dir() -> Path:
    """Return Hugging Face's default cache: HF_HUB_CACHE, or `hub` in HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repository_folder(cache_dir: Path, model: str) -> Path:
    """Return the folder of a repository in a cache."""
    return cache_dir / "--".join(("models", *model.split("/")))


def find_snapshot(model: str, revision: str | None = None, cache_dir: Path | None = None) -> Path | None:
    """Return the folder of a finished download, or None if there is none or a file is missing or too short.

    Does not query the hub: a branch has the commit of the last download.
    """
    folder = repository_folder(cache_dir or default_cache_dir(), model)
    revision = revision or "main"
    try:
        commit = revision if _COMMIT.fullmatch(revision) else (folder / "refs" / revision).read_text().strip()
        sizes = json.loads((folder / "shannon" / f"{commit}.json").read_text())["files"]
    except (OSError, ValueError, KeyError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if all(size_of(snapshot / path) == size for path, size in sizes.items()) else None


def show_bytes(count: int) -> str:
    """Format a number of bytes."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def choose(paths: Sequence[str], indexed: frozenset[str] = frozenset()) -> list[str]:
    """Return the files that a server reads of a repository: everything small, and the weights in one format.

    The order of formats is that of vLLM's loader (`DefaultModelLoader._prepare_weights` in 0.32): Mistral's
    consolidated files, the shards listed in an index (`indexed`), any safetensors, PyTorch's. If there is none of them,
    all files are returned. The modules of sentence-transformers (`2_Dense/...`) are chosen the same.
    """
    weights = [path for path in paths if path.lower().endswith(_WEIGHTS)]
    chosen = _one_format([path for path in weights if "/" not in path], indexed)
    if not chosen:
        return list(paths)
    for module in {path.partition("/")[0] for path in weights if _MODULE.fullmatch(path)}:
        chosen |= _one_format([path for path in weights if path.startswith(f"{module}/")])
    return [path for path in paths if path in chosen or not path.lower().endswith(_WEIGHTS + _UNREAD)]


def _one_format(weights: list[str], indexed: frozenset[str] = frozenset()) -> set[str]:
    if consolidated := {path for path in weights if fnmatch(path, "consolidated*.safetensors")}:
        return consolidated
    if sharded := indexed.intersection(weights):
        return set(sharded)
    for suffix in (".safetensors", ".bin", ".pt"):
        found = {path for path in weights if path.endswith(suffix)}
        if found := {path for path in found if not path.rpartition("/")[2].startswith(_TRAINING)}:
            return found
    return set()
