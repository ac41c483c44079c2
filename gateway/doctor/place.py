"""Where the gateway would run: its volume, shared memory, open files, and the port."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path

import psutil

from engine.weights.cache import show_bytes
from gateway.doctor.case import Case, existing_parent
from gateway.doctor.finding import Finding
from gateway.doctor.memory import devices
from gateway.serving import listeners
from gateway.settings.config import ConfigError
from gateway.settings.data_dir import usable_data_dir

_SCARCE_BYTES = 2**30
_LEAST_BYTES = 100 * 2**20
_REMOTE = ("nfs", "cifs", "smb", "9p", "ceph", "glusterfs", "lustre", "fuse.", "afs", "beegfs")
_PASSING = ("overlay", "tmpfs", "ramfs")
_SHM_BYTES = 2**30
_LEAST_SHM_BYTES = 256 * 2**20
"""vLLM's workers share a ring of ten messages of 16 MiB with the core, and NCCL's buffers besides."""
_OPEN_FILES = 8192


def check_data_dir(case: Case) -> Finding:
    """Whether `store.data_dir` can be written, is on a local disk, and has room."""
    settings = case.config.store
    bundled = not case.environment.get(settings.url_env, "").strip()
    try:
        path = usable_data_dir(settings.data_dir, bundled=bundled)
    except ConfigError as error:
        step = "Name another folder in store.data_dir, or give it to the gateway's user"
        return Finding("data_dir", "failed", str(error).removeprefix("store.data_dir: "), step)
    parent = existing_parent(path)
    free = case.machine.free_bytes(parent)
    kind = filesystem(parent)
    text = f"{path}: {show_bytes(free)} free, on {kind or 'an unknown filesystem'}"
    if free < _SCARCE_BYTES:
        return Finding("data_dir", "failed" if free < _LEAST_BYTES else "warning", text, "Make room there")
    if kind.startswith(_REMOTE):
        text += ", which is not a local disk: its locks and its delays endanger the journal and the bundled Valkey"
        return Finding("data_dir", "warning", text, "Name a folder on a local disk in store.data_dir")
    if kind in _PASSING:
        text += ", which is gone with the container or the next start"
        return Finding("data_dir", "warning", text, "Mount a volume at store.data_dir")
    return Finding("data_dir", "ok", text)


def filesystem(path: Path) -> str:
    """The kind of filesystem of a folder, empty if it is unknown."""
    best, kind = "", ""
    for partition in psutil.disk_partitions(all=True):
        point = partition.mountpoint
        if Path(point) in (path, *path.parents) and len(point) >= len(best):
            best, kind = point, partition.fstype
    return kind


def check_shared_memory(case: Case) -> Finding:
    """Whether /dev/shm is large enough for vLLM's workers."""
    size, workers = case.machine.shm_bytes, max(map(devices, case.in_process.values()), default=0)
    if not workers:
        return Finding("shared_memory", "skipped", "no engine runs in this process")
    step = "Start the container with --shm-size=8g, or mount an emptyDir with medium: Memory at /dev/shm"
    if size is None:
        return Finding("shared_memory", "failed" if workers > 1 else "warning", "there is no /dev/shm", step)
    text = f"/dev/shm has {show_bytes(size)}"
    if workers > 1 and size < _LEAST_SHM_BYTES:
        return Finding("shared_memory", "failed", f"{text}; {workers} workers need 1 GiB and more", step)
    if size < (_SHM_BYTES if workers > 1 else 64 * 2**20):
        return Finding("shared_memory", "warning", f"{text}, which is little for {workers} workers", step)
    return Finding("shared_memory", "ok", text)


def check_open_files(case: Case) -> Finding:
    """Whether as many connections can be open as clients will make."""
    limit = case.machine.open_files
    if limit < _OPEN_FILES:
        text = f"{limit} may be open at once: a connection takes one, a stream to a remote engine another"
        return Finding("open_files", "warning", text, "ulimit -Hn 65536, or LimitNOFILE=65536 in the unit")
    return Finding("open_files", "ok", f"{limit} may be open at once")


def check_port(case: Case) -> Finding:
    """Whether the server's addresses can be listened on, and who does if one can't."""
    hosts, port = case.config.server.hosts, case.config.server.port
    if port == 0:
        return Finding("port", "ok", "any free one (server.port is 0)")
    where = ", ".join(f"{host}:{port}" for host in hosts)
    try:
        for bound in listeners.bind(hosts, port):
            bound.close()
    except ConfigError as refused:
        error = refused.__cause__
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.EADDRINUSE and case.serving:
            return Finding("port", "ok", f"{where} is held by a gateway, {holder(port)}")
        if number == errno.EADDRINUSE:
            text = f"{where} is taken by {holder(port) or 'a process that is not shown to this user'}"
            return Finding("port", "failed", text, "Stop that, or set server.port or SHANNON_PORT")
        if number == errno.EACCES:
            return Finding("port", "failed", f"this user may not listen on {where}", "Take a port from 1024 on")
        step = "Set server.host or SHANNON_HOST to an address of this machine, or 0.0.0.0"
        return Finding("port", "failed", str(refused).removeprefix("server.host: "), step)
    return Finding("port", "ok", f"{where} is free")


def holder(port: int) -> str:
    """Return the process that listens on a port, empty if the system does not report it."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            local = connection.laddr
            if connection.status == psutil.CONN_LISTEN and local and local.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                return f"{process.name()} (process {process.pid})"
    return ""
