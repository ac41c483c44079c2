"""`shannon doctor` on weights and memory: a hub on loopback, spoiled folders, and the arithmetic of the KV cache."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.demo import WEIGHTS
from engine.weights.hub import Hub
from gateway.doctor.case import Case
from gateway.doctor.checkpoint import Checkpoint, check_cache_space, check_weights, find_checkpoint
from gateway.doctor.finding import Finding
from gateway.doctor.gpus import Driver, Gpu
from gateway.doctor.memory import check_gpu_memory, check_ram, check_shares, need
from gateway.settings.config import EmbeddedSettings
from tests.support.doctor_case import CUDA, GIB, H100, case
from tests.support.hub_stub import HubStub, run_hub

MODEL = "shannon-ai/demo"
LLAMA_70B = {
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_size": 8192,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def hub() -> Iterator[HubStub]:
    with run_hub() as stub:
        stub.add_folder(MODEL, WEIGHTS)
        yield stub


def deployed(model: str, cache: Path, hub_url: str = "http://127.0.0.1:9", **machine: Any) -> Case:
    """Return a deployment of `model`; unless there is a hub, none can be reached."""
    tree = {"engines": {"main": {"kind": "embedded", "model": model}}, "weights": {"cache_dir": str(cache)}}
    return case(tree, {"HF_ENDPOINT": hub_url}, **machine)


def examined(deployment: Case) -> tuple[Finding, Checkpoint]:
    engine = deployment.in_process["main"]
    found = find_checkpoint(deployment, engine)
    return check_weights(deployment, "main", engine, found), found


def test_demo_model_is_there(tmp_path: Path) -> None:
    finding, found = examined(deployed("demo", tmp_path))

    assert finding.verdict == "ok"
    assert found.weight_bytes == (WEIGHTS / "model.safetensors").stat().st_size


def test_model_that_is_not_in_the_cache_says_how_to_bring_it(hub: HubStub, tmp_path: Path) -> None:
    deployment = deployed(MODEL, tmp_path, hub.url)
    finding, found = examined(deployment)

    assert finding.verdict == "warning"
    assert "are not in the cache" in finding.text
    assert finding.next_step == "shannon download --config deployment.yaml"
    assert found.weight_bytes == (WEIGHTS / "model.safetensors").stat().st_size
    assert check_cache_space(deployment, [found]).verdict == "ok"


def test_volume_that_is_too_small_fails(hub: HubStub, tmp_path: Path) -> None:
    deployment = deployed(MODEL, tmp_path, hub.url, free_bytes=lambda path: 2**20)
    finding = check_cache_space(deployment, [examined(deployment)[1]])

    assert finding.verdict == "failed"
    assert "1.0 MiB free" in finding.text
    assert "SHANNON_MODEL_CACHE" in finding.next_step


@pytest.mark.anyio
async def test_downloaded_model_is_there_without_a_hub(hub: HubStub, tmp_path: Path) -> None:
    bringer = Hub(tmp_path, endpoint=hub.url)
    snapshot = await bringer.download(bringer.plan(MODEL))
    finding, found = examined(deployed(MODEL, tmp_path))

    assert finding.verdict == "ok"
    assert found.folder == snapshot

    weights = snapshot / "model.safetensors"
    short = weights.read_bytes()[:1000]
    weights.unlink()
    weights.write_bytes(short)
    finding, _ = examined(deployed(MODEL, tmp_path))
    assert finding.verdict == "failed"
    assert "Part of it is in the cache" in finding.text


def test_gated_model_and_hub_out_of_reach_fail(hub: HubStub, tmp_path: Path) -> None:
    hub.add(MODEL, {"config.json": b"{}"}, private=True)
    finding, _ = examined(deployed(MODEL, tmp_path, hub.url))
    assert finding.verdict == "failed"
    assert "HUGGINGFACE_TOKEN" in finding.text

    finding, found = examined(deployed(MODEL, tmp_path))
    assert finding.verdict == "failed"
    assert "can't be reached" in finding.text
    assert check_cache_space(deployed(MODEL, tmp_path), [found]).verdict == "skipped"


def test_folder_with_a_missing_shard_names_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", shards, strict=True))})
    )
    (tmp_path / shards[0]).write_bytes(b"x" * 100)
    finding, _ = examined(deployed(str(tmp_path), tmp_path))
    assert finding.verdict == "failed"
    assert shards[1] in finding.text

    (tmp_path / shards[1]).write_bytes(b"x" * 100)
    finding, found = examined(deployed(str(tmp_path), tmp_path))
    assert finding.verdict == "ok"
    assert found.weight_bytes == 200


def test_folder_that_is_not_there_fails(tmp_path: Path) -> None:
    finding, _ = examined(deployed(str(tmp_path / "gone"), tmp_path))

    assert finding.verdict == "failed"
    assert "no such folder" in finding.text


Sized = Callable[[int, dict[str, Any]], Checkpoint]


@pytest.fixture
def sized(tmp_path: Path) -> Sized:
    """Return what makes a checkpoint of so many GiB, which take no room, with such a config.json."""

    def make(weight_gib: int, settings: dict[str, Any]) -> Checkpoint:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "model.safetensors").touch()
        os.truncate(folder / "model.safetensors", weight_gib * GIB)
        return Checkpoint("organisation/model", folder)

    return make


def engine(**args: Any) -> EmbeddedSettings:
    return EmbeddedSettings(kind="embedded", model="organisation/model", args=args)


@pytest.mark.parametrize(
    ("args", "changes", "context_bytes"),
    [
        ({}, {}, 2 * 80 * 8 * 128 * 2 * 131072),
        ({"max_model_len": 1000}, {}, 2 * 80 * 8 * 128 * 2 * 1000),
        ({"max_model_len": 1000, "kv_cache_dtype": "fp8"}, {}, 2 * 80 * 8 * 128 * 1000),
        ({"max_model_len": 1000, "tensor_parallel_size": 4}, {}, 2 * 80 * 2 * 128 * 2 * 1000),
        ({"max_model_len": 1000, "tensor_parallel_size": 16}, {}, 2 * 80 * 1 * 128 * 2 * 1000),
        ({"max_model_len": 1000, "pipeline_parallel_size": 2}, {}, 2 * 40 * 8 * 128 * 2 * 1000),
        ({"max_model_len": 1000}, {"head_dim": 64}, 2 * 80 * 8 * 64 * 2 * 1000),
        (
            {"max_model_len": 1000},
            {"layer_types": ["sliding_attention"] * 60 + ["full_attention"] * 20, "sliding_window": 100},
            2 * (60 * 100 + 20 * 1000) * 8 * 128 * 2,
        ),
        ({"max_model_len": 1000}, {"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 80 * 576 * 2 * 1000),
        ({"max_model_len": 1000}, {"num_hidden_layers": None}, None),
    ],
)
def test_kv_cache_of_a_context_is_computed(
    sized: Sized, args: dict[str, Any], changes: dict[str, Any], context_bytes: int
) -> None:
    wanted = need(engine(**args), sized(140, LLAMA_70B | changes), "")

    assert wanted is not None
    assert wanted.context_bytes == context_bytes


def test_weights_grow_with_their_type_unless_they_are_quantized(sized: Sized) -> None:
    half = sized(16, LLAMA_70B)
    quantized = sized(16, LLAMA_70B | {"quantization_config": {"quant_method": "fp8"}})

    assert need(engine(), half, "") == need(engine(dtype="bfloat16"), half, "float32")
    wanted = [need(engine(), checkpoint, "float32") for checkpoint in (half, quantized)]
    assert [one and one.weight_bytes for one in wanted] == [32 * GIB, 16 * GIB]
    whole = need(engine(tensor_parallel_size=8), half, "")
    assert whole is not None
    assert whole.weight_bytes == 2 * GIB


@pytest.mark.parametrize(
    ("weight_gib", "args", "verdict", "words"),
    [
        (70, {"tensor_parallel_size": 8}, "ok", ": 12 sequences of 131072"),
        (70, {"tensor_parallel_size": 8, "kv_cache_dtype": "fp8"}, "ok", "25 sequences of 131072"),
        (140, {}, "failed", "do not fit"),
        (60, {"max_model_len": 131072}, "failed", "131072 tokens take 40.0 GiB"),
        (60, {"max_model_len": 8192}, "ok", "sequences of 8192"),
        (60, {"max_model_len": 8192, "gpu_memory_utilization": "high"}, "ok", "sequences of 8192"),
        (16, {"tensor_parallel_size": 16}, "failed", "needs 16 GPUs"),
        (16, {"gpu_memory_utilization": 0.999, "max_model_len": 1024}, "failed", "79.0 GiB are free"),
    ],
)
def test_model_is_held_against_the_gpus(
    sized: Sized, weight_gib: int, args: dict[str, Any], verdict: str, words: str
) -> None:
    deployment = case(driver=H100, packages=CUDA)
    finding = check_gpu_memory(deployment, "main", engine(**args), sized(weight_gib, LLAMA_70B))

    assert finding.verdict == verdict, finding
    assert words in finding.text, finding
    assert bool(finding.next_step) == (verdict == "failed")


def test_context_that_would_fit_is_named(sized: Sized) -> None:
    deployment = case(driver=H100, packages=CUDA)
    finding = check_gpu_memory(deployment, "main", engine(), sized(60, LLAMA_70B))
    fits = int(finding.next_step.partition("max_model_len to ")[2].partition(" ")[0])

    assert 0 < fits < 131072
    again = check_gpu_memory(deployment, "main", engine(max_model_len=fits), sized(60, LLAMA_70B))
    assert again.verdict == "ok"


def test_memory_that_the_running_gateway_holds_is_not_missed(sized: Sized) -> None:
    busy = Driver("580", (13, 0), (Gpu("H100", 80 * GIB, 2 * GIB),))
    checkpoint = sized(16, LLAMA_70B)
    settings = engine(max_model_len=8192)

    assert check_gpu_memory(case(driver=busy), "main", settings, checkpoint).verdict == "failed"
    assert check_gpu_memory(case(driver=busy, serving=True), "main", settings, checkpoint).verdict == "ok"


def test_device_without_memory_of_its_own_shares_the_machines(sized: Sized) -> None:
    jetson = Driver("540", (12, 6), (Gpu("Orin", None, None),))
    finding = check_gpu_memory(
        case(driver=jetson, memory_bytes=32 * GIB), "main", engine(max_model_len=1024), sized(40, LLAMA_70B)
    )

    assert finding.verdict == "failed"
    assert "0.92 of 32.0 GiB" in finding.text


def test_engines_that_want_more_than_the_gpus_fail_together() -> None:
    two: dict[str, Any] = {
        "main": {"kind": "embedded"},
        "other": {"kind": "pooling", "args": {"gpu_memory_utilization": 0.3}},
    }

    (finding,) = check_shares(case({"engines": two}, driver=H100))
    assert "main 0.92 + other 0.3" in finding.text
    two["main"]["args"] = {"gpu_memory_utilization": 0.6}
    assert check_shares(case({"engines": two}, driver=H100)) == []


@pytest.mark.parametrize(
    ("memory_gib", "space", "verdict", "words"),
    [
        (64, "4", "ok", "4 GiB of KV cache"),
        (16, "4", "failed", "the machine has 16.0 GiB"),
        (64, "1", "failed", "8192 tokens take"),
        (64, "1.5", "failed", "'1.5'"),
    ],
)
def test_model_is_held_against_the_ram(sized: Sized, memory_gib: int, space: str, verdict: str, words: str) -> None:
    deployment = case({}, {"VLLM_CPU_KVCACHE_SPACE": space}, memory_bytes=memory_gib * GIB)
    settings = engine(max_model_len=8192, dtype="bfloat16")
    finding = check_ram(deployment, "main", settings, sized(16, LLAMA_70B))

    assert finding.verdict == verdict, finding
    assert words in finding.text
