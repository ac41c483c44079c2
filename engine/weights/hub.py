"""A Hugging Face hub, and the cache that it fills.

huggingface_hub is asked what there is, and links files into the cache. Three things that it does not do are done here:
room is checked before the start, a file continues from where a former process stopped (the library begins it again),
and what has arrived is compared with its checksum. Does not handle files of more than 50 GB, which hubs serve by Xet
only: the library fetches those, each from its beginning. Raises what `engine.weights.cache` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from engine.weights.cache import (
    INDEX,
    File,
    Gated,
    NoSpace,
    NotFound,
    Offline,
    Plan,
    WeightsError,
    choose,
    default_cache_dir,
    is_hub_id,
    repository_folder,
    show_bytes,
)
from engine.weights.transfer import STALL_S, Damaged, Transfer, fetch, size_of

if TYPE_CHECKING:
    from httpx2 import AsyncClient
    from huggingface_hub.errors import HfHubHTTPError

MAX_HTTP_BYTES = 50 * 10**9
CONCURRENT_FILES = 8

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

OnBytes = Callable[[File, int], None]
"""Called with the new bytes of a file; a negative number means that bytes were discarded."""


class Hub:
    """A hub and its cache. The token is only sent to the hub, not to redirect targets."""

    def __init__(
        self,
        cache_dir: Path | None = None,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        retry_s: float = 1.0,
        free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    ) -> None:
        """`cache_dir`, `endpoint` and `token` are huggingface_hub's by default."""
        # Before the import: else the library asks the hub for a list of programs to report as the caller.
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from huggingface_hub import HfApi, constants, get_token

        self.cache_dir = (cache_dir or default_cache_dir()).expanduser().resolve()
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._token = token or get_token()
        self._api = HfApi(endpoint=self.endpoint, token=self._token, library_name="shannon-gateway")
        self._retry_s = retry_s
        self._free_bytes = free_bytes

    def plan(self, model: str, revision: str | None = None) -> Plan:
        """Ask what a model consists of. Raises WeightsError."""
        if not is_hub_id(model):
            raise NotFound(f"{model!r} is not the id of a model on a hub; write ORGANISATION/NAME")
        with self._explaining(model, revision or "main"):
            try:
                commit, files = self._list(model, revision)
                index = json.loads(self._link(model, commit, INDEX).read_text()) if INDEX in files else {}
                chosen = choose(list(files), frozenset(index.get("weight_map", {}).values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise WeightsError(f"{self.endpoint} does not answer like a hub; is HF_ENDPOINT right?") from error
        wanted = tuple(files[path] for path in chosen)
        return Plan(model, revision or "main", commit, wanted, repository_folder(self.cache_dir, model))

    def _list(self, model: str, revision: str | None) -> tuple[str, dict[str, File]]:
        """Return the commit and its files by path. Raises ValueError, TypeError or others for an invalid response."""
        info = self._api.model_info(model, revision=revision, files_metadata=True, timeout=STALL_S)
        files: dict[str, File] = {}
        for entry in info.siblings or ():
            size, checksum = (entry.lfs.size, entry.lfs.sha256) if entry.lfs else (entry.size, entry.blob_id)
            files[entry.rfilename] = File(entry.rfilename, size or 0, checksum or "")
        # Names that would lead out of the cache.
        if not all(_HASH.fullmatch(name) for name in (info.sha or "", *(file.checksum for file in files.values()))):
            raise ValueError("checksums")
        if any(PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts for path in files):
            raise ValueError("paths")
        return info.sha or "", files

    def check_space(self, plans: Sequence[Plan]) -> None:
        """Raise NoSpace unless the missing bytes of all `plans` fit on the volume."""
        needed = sum(plan.missing_bytes for plan in plans)
        volume = next(path for path in (self.cache_dir, *self.cache_dir.parents) if os.path.exists(path))
        free = self._free_bytes(volume)
        if needed > free:
            models = ", ".join(plan.model for plan in plans)
            raise NoSpace(
                f"{models}: needs {show_bytes(needed)} more, {show_bytes(free)} free at {self.cache_dir}; make room "
                "there, or name another volume with --cache or SHANNON_MODEL_CACHE"
            )

    async def download(self, plan: Plan, on_bytes: OnBytes = lambda file, count: None) -> Path:
        """Bring all files of `plan` that are not there, and return the snapshot's folder. Raises WeightsError.

        May be cancelled or killed at any point: the next call continues from there.
        """
        from huggingface_hub import get_async_session

        slots = asyncio.Semaphore(CONCURRENT_FILES)

        async def bring(client: AsyncClient, file: File) -> None:
            async with slots:
                await self._bring(client, plan, file, lambda count: on_bytes(file, count))

        with self._explaining(plan.model, plan.revision):
            async with get_async_session() as client:
                tasks = [asyncio.create_task(bring(client, file)) for file in plan.files]
                try:
                    await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
            if plan.revision != plan.commit:
                _write(plan.folder / "refs" / plan.revision, plan.commit)
            files = {file.path: file.size_bytes for file in plan.files}
            _write(plan.manifest, json.dumps({"files": files}, indent=1))
        return plan.snapshot

    async def _bring(self, client: AsyncClient, plan: Plan, file: File, on_bytes: Callable[[int], None]) -> None:
        """Bring one file, unless it is there, and have it linked into the snapshot."""
        link, blob, size = plan.snapshot / file.path, plan.blob(file), file.size_bytes
        if size_of(link) == size:
            on_bytes(size)
            return
        link.unlink(missing_ok=True)  # the library would take it as it is
        if size_of(blob) == size:
            on_bytes(size)
        elif size <= MAX_HTTP_BYTES:
            if blob.exists():
                blob.unlink()  # too short: what a power cut left
            await fetch(client, self._transfer(plan, file), on_bytes)
        await asyncio.to_thread(self._link, plan.model, plan.commit, file.path)
        if size > MAX_HTTP_BYTES:
            on_bytes(size)

    def _link(self, model: str, commit: str, path: str) -> Path:
        """Link a file into the snapshot through the library: from its blob, otherwise from the hub."""
        return Path(self._api.hf_hub_download(model, path, revision=commit, cache_dir=self.cache_dir))

    def _transfer(self, plan: Plan, file: File) -> Transfer:
        from huggingface_hub import hf_hub_url

        return Transfer(
            file.path,
            hf_hub_url(plan.model, file.path, revision=plan.commit, endpoint=self.endpoint),
            {"Authorization": f"Bearer {self._token}"} if self._token else {},
            plan.partial(file),
            plan.blob(file),
            file.size_bytes,
            file.checksum,
            self._retry_s,
        )

    @contextlib.contextmanager
    def _explaining(self, model: str, revision: str) -> Iterator[None]:
        """Turn whatever goes wrong into a WeightsError."""
        import httpx2
        from huggingface_hub import errors

        try:
            yield
        except Damaged as error:
            raise WeightsError(f"{model}: {error} repeatedly arrives damaged; try again later") from error
        except errors.OfflineModeIsEnabled as error:
            raise Offline(f"{model}: HF_HUB_OFFLINE is set, so the hub can't be asked; unset it") from error
        except errors.HfHubHTTPError as error:
            raise self._refusal(error, model, revision) from error
        except (httpx2.TransportError, errors.LocalEntryNotFoundError) as error:
            raise Offline(
                f"{model}: the hub at {self.endpoint} can't be reached; check the network, the proxy and HF_ENDPOINT"
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"{model}: {self.cache_dir} is full; make room there and run the same again") from error
            raise WeightsError(f"{error.filename or self.cache_dir}: {error.strerror or error}") from error

    def _refusal(self, error: HfHubHTTPError, model: str, revision: str) -> WeightsError:
        """The error for an error response of the hub."""
        status, headers = error.response.status_code, error.response.headers
        code, page = headers.get("X-Error-Code"), f"{self.endpoint}/{model}"
        if code == "GatedRepo":
            if self._token:
                return Gated(
                    f"{model} is gated, and the token may not read it; accept the licence at {page} with the "
                    "account of HUGGINGFACE_TOKEN"
                )
            return Gated(f"{model} is gated; accept the licence at {page} and set HUGGINGFACE_TOKEN")
        if status == 401 and self._token and code is None:
            return Gated(f"{model}: the hub refuses the token; check HUGGINGFACE_TOKEN")
        if code == "RevisionNotFound":
            return NotFound(f"{model} has no revision {revision!r}; check --revision, or `revision` of the engine")
        if code == "EntryNotFound":
            return NotFound(f"{model} has no file {error.response.url.path} any more; run the command again")
        if code == "RepoNotFound" or status in (401, 404):
            return NotFound(
                f"there is no model {model} at {self.endpoint}, or it is private; check the id, or set "
                "HUGGINGFACE_TOKEN"
            )
        if status == 403:
            return Gated(f"{model}: the hub forbids it; check what HUGGINGFACE_TOKEN may read")
        return Offline(f"{model}: the hub at {self.endpoint} answers {status}; try again later")


def _write(path: Path, text: str) -> None:
    """Write a file atomically, unless it has this content already: the cache may be read-only."""
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    new.write_text(text)
    new.replace(path)
