"""Weights from a hub into a cache: what is chosen, what is resumed, what is checked, and what each failure says."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("huggingface_hub", reason="downloads need huggingface_hub; `make setup` installs it")

from engine.weights.cache import (
    File,
    Gated,
    NoSpace,
    NotFound,
    Offline,
    Plan,
    WeightsError,
    choose,
    find_snapshot,
    is_hub_id,
    show_bytes,
)
from engine.weights.hub import Hub
from gateway.cli import main
from gateway.download import Bars, Lines, choose_models
from gateway.settings.config import ConfigError, parse_config
from tests.support.hub_stub import Fault, HubStub, checksum, run_hub
from tests.support.waiting import FakeClock, until

pytestmark = pytest.mark.anyio

MODEL = "org/model"
SHARD = bytes(range(256)) * 2000
"""Half a megabyte, in LFS."""
FILES = {
    "config.json": b'{"a": 1}',
    "README.md": b"# Model",
    "model.safetensors": SHARD,
    "pytorch_model.bin": SHARD[::-1],
}


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGINGFACE_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SHANNON_CONFIG", "SHANNON_MODEL_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stub() -> Iterator[HubStub]:
    with run_hub() as stub:
        yield stub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def hub_of(stub: HubStub, cache: Path, **options: Any) -> Hub:
    return Hub(cache, endpoint=stub.url, **({"retry_s": 0.0} | options))


async def fetch(stub: HubStub, cache: Path, model: str = MODEL, **options: Any) -> Path:
    hub = hub_of(stub, cache, **options)
    return await hub.download(hub.plan(model))


# What is chosen


SENTENCE_MODULES = ["2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"]


@pytest.mark.parametrize(
    ("weights", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"], ["model.safetensors"]),
        (["model.safetensors", "onnx/model.onnx", "onnx/model.onnx_data", "openvino/m.bin"], ["model.safetensors"]),
        (["pytorch_model-1.bin", "pytorch_model-2.bin"], ["pytorch_model-1.bin", "pytorch_model-2.bin"]),
        (["pytorch_model.bin", "optimizer.bin", "training_args.bin", "scheduler.pt"], ["pytorch_model.bin"]),
        (["model.safetensors", "original/consolidated.00.pth"], ["model.safetensors"]),
        (["consolidated.safetensors", "model-1.safetensors"], ["consolidated.safetensors"]),
        (["weights.pt"], ["weights.pt"]),
        (["a.Q4.gguf", "a.Q8.gguf"], ["a.Q4.gguf", "a.Q8.gguf"]),
        (["model.safetensors", *SENTENCE_MODULES], ["model.safetensors", "2_Dense/model.safetensors"]),
    ],
)
def test_weights_are_chosen_in_one_format(weights: list[str], chosen: list[str]) -> None:
    small = ["config.json", "tokenizer.json", "1_Pooling/config.json", "modeling_x.py", "README.md"]

    assert choose(small + weights) == small + chosen


def test_shards_are_those_of_the_index() -> None:
    shards = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    paths = ["config.json", "model.safetensors.index.json", "model.fp16.safetensors", *shards]

    assert choose(paths, frozenset(shards)) == ["config.json", "model.safetensors.index.json", *shards]


def test_pictures_stay_behind() -> None:
    assert choose(["model.safetensors", "logo.PNG", "config.json"]) == ["model.safetensors", "config.json"]


@pytest.mark.parametrize("model", ["org/model", "gpt2", "Qwen/Qwen3-8B", "org/model_1.5-x"])
def test_hub_id_is_known_for_one(model: str) -> None:
    assert is_hub_id(model)


@pytest.mark.parametrize(
    "model", ["demo", "/models/x", "./x", "~/x", "a/b/c", "org/", "a--b/c", "../x", "", "org/m.git"]
)
def test_other_names_are_no_hub_ids(model: str) -> None:
    assert not is_hub_id(model)


def test_folder_of_that_name_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert not is_hub_id("org/model")


# The way into the cache


async def test_download_brings_what_is_needed_and_nothing_else(stub: HubStub, cache: Path) -> None:
    commit = stub.add(MODEL, FILES).commit
    snapshot = await fetch(stub, cache)

    assert snapshot == cache / "models--org--model" / "snapshots" / commit
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == {
        name: content for name, content in FILES.items() if name != "pytorch_model.bin"
    }
    assert find_snapshot(MODEL, None, cache) == find_snapshot(MODEL, commit, cache) == snapshot


async def test_cache_is_what_huggingface_hub_itself_reads(stub: HubStub, cache: Path) -> None:
    from huggingface_hub import scan_cache_dir, snapshot_download

    stub.add(MODEL, FILES)
    snapshot = await fetch(stub, cache)

    assert snapshot_download(MODEL, cache_dir=cache, local_files_only=True) == str(snapshot)
    (repository,) = scan_cache_dir(cache).repos
    assert (repository.repo_id, {ref for r in repository.revisions for ref in r.refs}) == (MODEL, {"main"})


async def test_second_download_asks_for_no_file(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES)
    await fetch(stub, cache)
    stub.asked.clear()
    await fetch(stub, cache)

    assert [asked.path for asked in stub.asked] == [f"/api/models/{MODEL}"]


async def test_read_only_cache_that_is_complete_is_no_error(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES)
    await fetch(stub, cache)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    await fetch(stub, cache)

    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


async def test_shards_are_brought_by_their_index(stub: HubStub, cache: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    weights = {"model-1.safetensors": SHARD, "model-2.safetensors": SHARD[:-1], "model.fp16.safetensors": SHARD[1:]}
    stub.add(MODEL, {"model.safetensors.index.json": index, **weights})
    snapshot = await fetch(stub, cache)

    assert sorted(path.name for path in snapshot.iterdir()) == [
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
    ]


async def test_files_in_folders_and_equal_files_are_brought(stub: HubStub, cache: Path) -> None:
    files = {"model.safetensors": SHARD, "a/empty.txt": b"", "b/empty.txt": b"", "a/copy.json": SHARD}
    stub.add(MODEL, files)
    snapshot = await fetch(stub, cache)

    assert {str(path.relative_to(snapshot)): path.read_bytes() for path in snapshot.rglob("*.*")} == files


async def test_revision_is_pinned(stub: HubStub, cache: Path) -> None:
    old = stub.add(MODEL, {"config.json": b"old"}, revisions=("v1", "refs/pr/1"))
    hub = hub_of(stub, cache)
    for revision in ("v1", "refs/pr/1", old.commit):
        plan = hub.plan(MODEL, revision)
        assert (plan.revision, plan.commit) == (revision, old.commit)
        snapshot = await hub.download(plan)
        assert find_snapshot(MODEL, revision, cache) == snapshot
    new = stub.add(MODEL, {"config.json": b"new"})

    assert (await fetch(stub, cache) / "config.json").read_bytes() == b"new"
    assert (find_snapshot(MODEL, None, cache) or cache).name == new.commit
    assert (find_snapshot(MODEL, old.commit, cache) or cache).name == old.commit


async def test_progress_counts_every_byte_once(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES)
    stub.fault("model.safetensors", Fault(after_bytes=200_000), Fault(after_bytes=100, ignore_range=True))
    hub = hub_of(stub, cache)
    for _ in range(2):
        plan = hub.plan(MODEL)
        told: list[tuple[str, int]] = []
        await hub.download(plan, lambda file, count, told=told: told.append((file.path, count)))  # type: ignore[misc]

        for file in plan.files:
            assert sum(count for path, count in told if path == file.path) == file.size_bytes


# Resuming


async def test_cut_connection_goes_on_where_it_broke(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES)
    stub.fault("model.safetensors", Fault(after_bytes=200_000), Fault(after_bytes=100_000))
    snapshot = await fetch(stub, cache)

    assert stub.ranges(SHARD) == [None, "bytes=200000-", "bytes=300000-"]
    assert (snapshot / "model.safetensors").read_bytes() == SHARD


async def test_later_run_goes_on_where_a_cancelled_one_stopped(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES)
    stub.fault("model.safetensors", Fault(after_bytes=200_000, stall=True))
    hub = hub_of(stub, cache)
    plan = hub.plan(MODEL)
    task = asyncio.create_task(hub.download(plan))
    partial = plan.folder / "blobs" / f"{checksum(SHARD)}.incomplete"
    await until(lambda: partial.exists() and partial.stat().st_size == 200_000)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert find_snapshot(MODEL, None, cache) is None
    assert hub.plan(MODEL).missing_bytes <= len(SHARD) - 200_000 + len(FILES["config.json"]) + len(FILES["README.md"])
    snapshot = await fetch(stub, cache)
    assert stub.ranges(SHARD) == [None, "bytes=200000-"]
    assert (snapshot / "model.safetensors").read_bytes() == SHARD
    assert not partial.exists()


async def test_server_without_ranges_starts_the_file_anew(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES)
    stub.fault("model.safetensors", Fault(after_bytes=200_000), Fault(ignore_range=True))
    snapshot = await fetch(stub, cache)

    assert (snapshot / "model.safetensors").read_bytes() == SHARD


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_passing_trouble_is_waited_out(stub: HubStub, cache: Path, status: int) -> None:
    stub.add(MODEL, FILES)
    stub.fault("model.safetensors", *[Fault(status=status)] * 3)

    assert (await fetch(stub, cache) / "model.safetensors").read_bytes() == SHARD


async def test_two_downloads_at_once_fetch_a_file_once(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES)
    first, second = await asyncio.gather(fetch(stub, cache), fetch(stub, cache))

    assert first == second
    assert len(stub.ranges(SHARD)) == 1


# What has arrived


async def test_damaged_file_is_fetched_anew(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES)
    stub.fault("model.safetensors", Fault(damage=True))
    stub.fault("config.json", Fault(damage=True))
    snapshot = await fetch(stub, cache)

    assert (snapshot / "model.safetensors").read_bytes() == SHARD
    assert (snapshot / "config.json").read_bytes() == FILES["config.json"]


async def test_partial_file_that_was_spoilt_is_fetched_anew(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES)
    plan = hub_of(stub, cache).plan(MODEL)
    partial = plan.folder / "blobs" / f"{checksum(SHARD)}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(300_000))
    snapshot = await fetch(stub, cache)

    assert stub.ranges(SHARD) == ["bytes=300000-", None]
    assert (snapshot / "model.safetensors").read_bytes() == SHARD


async def test_file_that_stays_damaged_is_an_error(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES)
    stub.fault("model.safetensors", Fault(damage=True), Fault(damage=True))

    with pytest.raises(WeightsError, match=r"org/model: model\.safetensors repeatedly arrives damaged"):
        await fetch(stub, cache)
    assert find_snapshot(MODEL, None, cache) is None


@pytest.mark.parametrize("spoil", ["shorten", "remove"])
async def test_spoilt_cache_is_not_taken_for_complete_and_is_mended(stub: HubStub, cache: Path, spoil: str) -> None:
    stub.add(MODEL, FILES)
    snapshot = await fetch(stub, cache)
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(SHARD[:1000]) if spoil == "shorten" else blob.unlink()

    assert find_snapshot(MODEL, None, cache) is None
    assert await fetch(stub, cache) == snapshot
    assert (snapshot / "model.safetensors").read_bytes() == SHARD


@pytest.mark.parametrize("path", ["../../../escape.txt", "/etc/escape.txt", "a/../../b.txt"])
async def test_names_that_lead_out_of_the_cache_are_refused(stub: HubStub, cache: Path, path: str) -> None:
    stub.add(MODEL, {path: b"x", "model.safetensors": SHARD})

    with pytest.raises(WeightsError, match="does not answer like a hub"):
        hub_of(stub, cache).plan(MODEL)


# Room


async def test_download_needs_room_for_what_is_missing(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES)
    stub.add("org/other", {"model.safetensors": SHARD[2:]})
    free: dict[str, int] = {"bytes": 0}
    hub = hub_of(stub, cache, free_bytes=lambda path: free["bytes"])
    plans = [hub.plan(MODEL), hub.plan("org/other")]
    needed = plans[0].size_bytes + plans[1].size_bytes

    free["bytes"] = needed - 1
    with pytest.raises(NoSpace) as caught:
        hub.check_space(plans)
    assert str(caught.value) == (
        f"org/model, org/other: needs {show_bytes(needed)} more, {show_bytes(needed - 1)} free at {cache}; make room "
        "there, or name another volume with --cache or SHANNON_MODEL_CACHE"
    )
    free["bytes"] = needed
    hub.check_space(plans)
    await hub.download(plans[0])
    free["bytes"] = plans[1].size_bytes
    hub.check_space(plans)


async def test_volume_that_fills_up_on_the_way_is_named(
    stub: HubStub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.add(MODEL, FILES)

    async def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.weights.hub.fetch", full)
    with pytest.raises(NoSpace, match=f"org/model: {cache} is full; make room"):
        await fetch(stub, cache)


async def test_cache_that_cannot_be_written_is_named(stub: HubStub, tmp_path: Path) -> None:
    stub.add(MODEL, FILES)
    (tmp_path / "file").write_text("")

    with pytest.raises(WeightsError, match=r"file.*: Not a directory"):
        await fetch(stub, tmp_path / "file" / "cache")


# Tokens, and what the hub refuses


async def test_token_goes_to_the_hub_but_not_where_it_redirects(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES, gated=True)
    await fetch(stub, cache, token="hf_reader")

    assert {asked.authorization for asked in stub.asked if not asked.path.startswith("/cdn/")} == {"Bearer hf_reader"}
    assert {asked.authorization for asked in stub.asked if asked.path.startswith("/cdn/")} == {None}


async def test_gated_model_asks_for_its_licence_and_a_token(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES, gated=True)
    with pytest.raises(Gated) as caught:
        await fetch(stub, cache)

    assert str(caught.value) == (
        f"org/model is gated; accept the licence at {stub.url}/org/model and set HUGGINGFACE_TOKEN"
    )


async def test_gated_model_says_that_the_token_is_not_enough(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES, gated=True)
    stub.refused.add(MODEL)
    with pytest.raises(Gated, match=r"the token may not read it; accept the licence at .* account of HUGGING"):
        await fetch(stub, cache, token="hf_reader")


async def test_wrong_token_is_said_to_be_wrong_without_being_repeated(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES)
    with pytest.raises(Gated, match="the hub refuses the token; check HUGGINGFACE_TOKEN") as caught:
        await fetch(stub, cache, token="hf_stale")

    assert "hf_stale" not in str(caught.value)


@pytest.mark.parametrize("token", [None, "hf_reader"])
async def test_unknown_model_is_not_found(stub: HubStub, cache: Path, token: str | None) -> None:
    with pytest.raises(NotFound, match=r"there is no model org/model at .*, or it is private; check the id"):
        await fetch(stub, cache, token=token)


async def test_unknown_revision_is_not_found(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES)
    with pytest.raises(NotFound, match="org/model has no revision 'v9'; check --revision"):
        hub_of(stub, cache).plan(MODEL, "v9")


async def test_path_is_not_looked_for_on_the_hub(stub: HubStub, cache: Path) -> None:
    with pytest.raises(NotFound, match="'/models/x' is not the id of a model on a hub"):
        hub_of(stub, cache).plan("/models/x")
    assert stub.asked == []


async def test_hub_out_of_reach_is_offline(cache: Path) -> None:
    with run_hub() as stub:
        gone = stub.url
    with pytest.raises(Offline, match=f"org/model: the hub at {gone} can't be reached; check the network"):
        Hub(cache, endpoint=gone).plan(MODEL)


async def test_hub_out_of_order_is_offline(stub: HubStub, cache: Path) -> None:
    stub.status = 503
    with pytest.raises(Offline, match="answers 503; try again later"):
        hub_of(stub, cache).plan(MODEL)


async def test_hub_that_sends_nothing_is_offline(stub: HubStub, cache: Path) -> None:
    stub.add(MODEL, FILES)
    stub.fault("model.safetensors", *[Fault()] * 20)
    with pytest.raises(Offline):
        await fetch(stub, cache)


async def test_something_that_is_no_hub_is_named(stub: HubStub, cache: Path) -> None:
    stub.status = 200
    with pytest.raises(WeightsError, match=f"{stub.url} does not answer like a hub; is HF_ENDPOINT right"):
        hub_of(stub, cache).plan(MODEL)


# The command


def deployment(tmp_path: Path, **engines: dict[str, Any]) -> Path:
    path = tmp_path / "deploy.yaml"
    tree = {
        "engines": {"main": {"kind": "embedded"}, **engines},
        "models": {"shannon-chat": {"description": "a"}},
        "weights": {"cache_dir": str(tmp_path / "cache")},
    }
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def test_command_brings_every_hub_model_of_the_deployment(
    stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", stub.url)
    commit = stub.add(MODEL, FILES, revisions=("v1",)).commit
    stub.add("org/embedder", {"model.safetensors": SHARD[1:]})
    path = deployment(
        tmp_path,
        spare={"kind": "embedded", "model": MODEL, "revision": "v1"},
        embedder={"kind": "pooling", "model": "org/embedder"},
        local={"kind": "embedded", "model": str(tmp_path)},
        mock={"kind": "mock"},
    )

    assert main(["download", "--config", str(path), "--json"]) == 0

    out, err = capsys.readouterr()
    first, second = json.loads(out)
    assert first == {
        "model": MODEL,
        "revision": "v1",
        "commit": commit,
        "path": str(tmp_path / "cache" / "models--org--model" / "snapshots" / commit),
        "bytes": sum(len(content) for name, content in FILES.items() if name != "pytorch_model.bin"),
        "downloaded_bytes": first["bytes"],
    }
    assert second["model"] == "org/embedder"
    assert f"org/model at {commit[:12]}: 3 files, 0.5 MiB, 0.5 MiB to come" in err
    assert "org/model: 0.5 MiB of 0.5 MiB (100%)" in err


def test_command_brings_a_named_model_into_a_named_cache(
    stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", stub.url)
    monkeypatch.setenv("SHANNON_MODEL_CACHE", str(tmp_path / "unused"))
    stub.add(MODEL, FILES, revisions=("v1",))

    assert main(["download", MODEL, "--revision", "v1", "--cache", str(tmp_path / "named")]) == 0

    assert capsys.readouterr().out == f"{find_snapshot(MODEL, 'v1', tmp_path / 'named')}\n"
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("variable", ["HUGGINGFACE_TOKEN", "HF_TOKEN"])
def test_command_takes_cache_and_token_from_the_environment(
    stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", stub.url)
    monkeypatch.setenv("SHANNON_MODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(variable, "hf_reader")
    stub.add(MODEL, FILES, gated=True, private=True)

    assert main(["download", MODEL]) == 0
    assert find_snapshot(MODEL, None, tmp_path / "cache")


def test_command_without_the_hub_is_content_with_a_finished_download(
    stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", stub.url)
    stub.add(MODEL, FILES)
    arguments = ["download", MODEL, "--cache", str(tmp_path / "cache"), "--json"]
    assert main(arguments) == 0
    stub.status = 503
    capsys.readouterr()

    assert main(arguments) == 0

    out, err = capsys.readouterr()
    assert json.loads(out)[0]["path"] == str(find_snapshot(MODEL, None, tmp_path / "cache"))
    assert "answers 503; try again later. Its finished download is used." in err
    assert main([*arguments, "--revision", "v2"]) == 2


def test_command_checks_room_for_all_models_before_the_first_byte(
    stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", stub.url)
    stub.add(MODEL, FILES)
    stub.add("org/huge", {"model.safetensors": SHARD}, sizes={"model.safetensors": 10**18})

    assert main(["download", MODEL, "org/huge", "--cache", str(tmp_path)]) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("shannon: org/model, org/huge: needs 931322574.6 GiB more, ")
    assert stub.ranges(SHARD) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a model, or the deployment's file with --config or SHANNON_CONFIG"),
        (["a/b", "c/d", "--revision", "v1"], "--revision goes with one MODEL"),
        (["/models/x"], "'/models/x' is not the id of a model on a hub; write ORGANISATION/NAME"),
    ],
)
def test_command_explains_what_it_needs(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", *arguments]) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"shannon: {message}")


def test_command_has_nothing_to_bring_for_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "--config", str(deployment(tmp_path))]) == 2
    assert "no engine's model comes from a hub" in capsys.readouterr().err


def test_named_model_has_the_revision_that_its_engine_pins() -> None:
    engine = {"kind": "embedded", "model": MODEL, "revision": "v1"}
    config = parse_config({"engines": {"main": engine}, "models": {"shannon-chat": {"description": "a"}}})

    assert choose_models([MODEL, "org/other"], config, None) == [(MODEL, "v1"), ("org/other", None)]
    assert choose_models([MODEL], config, "v2") == [(MODEL, "v2")]
    with pytest.raises(ConfigError):
        choose_models([], config, "v2")


# Progress

PLAN = Plan(MODEL, "main", "0" * 40, (File("a", 100 * 2**20, "0"), File("b", 2**20, "1")), Path("/nowhere"))


def test_lines_come_at_intervals_and_at_the_end() -> None:
    out, clock = io.StringIO(), FakeClock()
    with Lines(PLAN, Console(file=out), clock) as lines:
        for _ in range(50):
            clock.advance(0.5)
            lines.advance(PLAN.files[0], 2 * 2**20)
        clock.advance(0.5)
        lines.advance(PLAN.files[1], 2**20)

    assert out.getvalue().splitlines() == [
        "org/model: 40.0 MiB of 101.0 MiB (40%), 4.0 MiB/s",
        "org/model: 80.0 MiB of 101.0 MiB (79%), 4.0 MiB/s",
        "org/model: 101.0 MiB of 101.0 MiB (100%), 3.8 MiB/s",
    ]


def test_bars_show_all_files_and_each_under_way() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    with Bars(PLAN, console) as bars:
        bars.advance(PLAN.files[0], 30 * 2**20)
        bars.advance(PLAN.files[1], 2**20)
        bars.advance(PLAN.files[0], -10 * 2**20)

    assert "all files" in out.getvalue()
    assert "20.0/100.0 MiB" in out.getvalue()
    assert "21.0/101.0 MiB" in out.getvalue()
