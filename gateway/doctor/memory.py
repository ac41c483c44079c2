"""Whether a model fits: its weights, the KV cache of one full context, and what vLLM needs besides.

The arithmetic follows vLLM 0.32: `gpu_memory_utilization` of each device is taken; what weights, activations and CUDA
graphs leave of it is KV cache, and the start fails if that does not hold `max_model_len` tokens. Activations depend
on the model and are estimated; does not count what speculative models and LoRA adapters take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.local.async_llm import build_defaults
from engine.weights.cache import show_bytes
from gateway.doctor.case import Case
from gateway.doctor.checkpoint import Checkpoint
from gateway.doctor.finding import Finding
from gateway.settings.config import EmbeddedSettings

UTILIZATION = 0.92
"""vLLM's default of `gpu_memory_utilization`."""
_ACTIVATIONS_BYTES = int(1.5 * 2**30)
"""Per GPU, CUDA graphs included: what an 8B model takes with vLLM's defaults."""
_PROCESSES_BYTES = int(2.5 * 2**30)
"""The front end and the engine core on the CPU, without weights and cache: measured 2.1 GiB."""
_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that one device must hold; `context_bytes` is the KV cache of one sequence of `max_model_len` tokens."""

    weight_bytes: int
    context_bytes: int | None
    max_model_len: int | None


def devices(engine: EmbeddedSettings) -> int:
    """The number of devices that an engine runs on."""
    return max(1, _count(engine, "data_parallel_size")) * _shards(engine)


def need(engine: EmbeddedSettings, found: Checkpoint, dtype: str) -> Need | None:
    """The bytes that each device needs, None if the weights are not known. `dtype` is what "auto" means, if any."""
    if found.weight_bytes is None:
        return None
    settings = found.settings
    text = settings.get("text_config") or settings
    own = str(text.get("dtype") or text.get("torch_dtype") or settings.get("torch_dtype") or "bfloat16")
    chosen = str(engine.args.get("dtype", "auto"))
    chosen = chosen if chosen in _BYTES else dtype or own
    weights = found.weight_bytes
    if "quantization_config" not in settings:
        weights = weights * _BYTES.get(chosen, 2) // _BYTES.get(own, 2)
    length = engine.args.get("max_model_len", text.get("max_position_embeddings"))
    length = length if isinstance(length, int) and length > 0 else text.get("max_position_embeddings")
    cache = str(engine.args.get("kv_cache_dtype", "auto"))
    element = 1 if cache.startswith("fp8") else _BYTES.get(cache, _BYTES.get(chosen, 2))
    context = _context_bytes(text, length, element, max(1, _count(engine, "tensor_parallel_size")))
    stages = max(1, _count(engine, "pipeline_parallel_size"))
    return Need(weights // _shards(engine), None if context is None else context // stages, length)


def check_gpu_memory(case: Case, name: str, engine: EmbeddedSettings, found: Checkpoint) -> Finding:
    """Compare what an engine needs with the smallest of the GPUs."""
    subject, count = f"engines.{name}", devices(engine)
    gpus = case.machine.driver.gpus[:count]
    if count > len(gpus):
        text = f"needs {count} GPUs (tensor, pipeline and data parallel); there are {len(gpus)}"
        return Finding("memory", "failed", text, "Lower tensor_parallel_size, or take a larger node", subject)
    # A device without memory of its own shares the machine's.
    total = min(case.machine.memory_bytes if gpu.total_bytes is None else gpu.total_bytes for gpu in gpus)
    share = _share(engine)
    budget = int(share * total)
    taken = f"{share:g} of {show_bytes(total)}"
    wanted = need(engine, found, "")
    if wanted is None:
        return Finding("memory", "skipped", "the size of the weights is not known", subject=subject)
    left = budget - wanted.weight_bytes - _ACTIVATIONS_BYTES
    weights = f"{show_bytes(wanted.weight_bytes)} of weights per GPU"
    if left <= 0:
        step = "Take a larger tensor_parallel_size, a quantized checkpoint, or raise gpu_memory_utilization"
        return Finding("memory", "failed", f"{weights} do not fit into {taken}", step, subject)
    if wanted.context_bytes and wanted.max_model_len and wanted.context_bytes > left:
        text = f"{weights} leave some {show_bytes(left)} for the KV cache; {wanted.max_model_len} tokens take "
        text += show_bytes(wanted.context_bytes)
        fits = wanted.max_model_len * left // wanted.context_bytes // 1024 * 1024
        step = f"Set max_model_len to {fits} or less, kv_cache_dtype to fp8, or a larger tensor_parallel_size"
        return Finding("memory", "failed", text, step, subject)
    free = min((gpu.free_bytes for gpu in gpus if gpu.free_bytes is not None), default=total)
    if free < budget and not case.serving:
        text = f"{show_bytes(free)} are free; vLLM asks for {taken}"
        step = "See nvidia-smi for who holds the rest, or lower gpu_memory_utilization"
        return Finding("memory", "failed", text, step, subject)
    text = f"{weights}, some {show_bytes(left)} for the KV cache: {_contexts(wanted, left)}"
    return Finding("memory", "ok", text, subject=subject)


def check_shares(case: Case) -> list[Finding]:
    """Whether engines on the same GPUs leave room for each other."""
    shares = {name: _share(engine) for name, engine in case.in_process.items()}
    if len(shares) < 2 or sum(shares.values()) <= 1 or not case.machine.driver.gpus:
        return []
    told = " + ".join(f"{name} {share:g}" for name, share in shares.items())
    step = "Give each a gpu_memory_utilization, together at most 0.95; vLLM numbers GPUs from 0 for each engine"
    return [Finding("memory", "failed", f"engines share the GPUs, and want more than there is: {told}", step)]


def check_ram(case: Case, name: str, engine: EmbeddedSettings, found: Checkpoint) -> Finding:
    """Compare what an engine needs on the CPU with the machine's memory."""
    subject = f"engines.{name}"
    environment, args = build_defaults()
    wanted = need(engine, found, str(args.get("dtype", "")))
    if wanted is None:
        return Finding("memory", "skipped", "the size of the weights is not known", subject=subject)
    variable = "VLLM_CPU_KVCACHE_SPACE"
    told = case.environment.get(variable) or environment.get(variable, "1")
    if not told.isdecimal() or told == "0":
        text = f"{variable} is {told!r}"
        return Finding("memory", "failed", text, "Set it to a whole number of GiB, or unset it", subject)
    cache, shards = int(told) * 2**30, _shards(engine)
    all_bytes = (wanted.weight_bytes + cache) * shards + _PROCESSES_BYTES
    text = f"{show_bytes(wanted.weight_bytes * shards)} of weights and {told} GiB of KV cache per worker"
    if all_bytes > case.machine.memory_bytes:
        text += f", {show_bytes(all_bytes)} in all; the machine has {show_bytes(case.machine.memory_bytes)}"
        return Finding("memory", "failed", text, f"Take a smaller model, a lower {variable}, or more memory", subject)
    if wanted.context_bytes and wanted.max_model_len and wanted.context_bytes > cache:
        text += f"; {wanted.max_model_len} tokens take {show_bytes(wanted.context_bytes)}"
        needed = -(-wanted.context_bytes // 2**30)
        return Finding("memory", "failed", text, f"Set {variable}={needed}, or a smaller max_model_len", subject)
    text += f" ({_contexts(wanted, cache)}), of {show_bytes(case.machine.memory_bytes)}"
    return Finding("memory", "ok", text, subject=subject)


def _contexts(wanted: Need, cache_bytes: int) -> str:
    """The number of sequences that a cache holds, as text."""
    if not wanted.context_bytes or not wanted.max_model_len:
        return "the number of tokens is unknown until config.json is here"
    return f"{cache_bytes // wanted.context_bytes} sequences of {wanted.max_model_len} tokens"


def _context_bytes(text: dict[str, Any], length: Any, element_bytes: int, tensor_parallel: int) -> int | None:
    """Return the KV cache of one sequence on one device of a tensor parallel group, None if it is unknown."""
    try:
        layers, length = int(text["num_hidden_layers"]), int(length)
        kinds: list[str] = text.get("layer_types") or ["full_attention"] * layers
        window = int(text.get("sliding_window") or length)
        tokens = int(kinds.count("full_attention") * length + kinds.count("sliding_attention") * min(window, length))
        if text.get("kv_lora_rank"):  # multi-head latent attention: one vector for all heads, on every device
            return tokens * (int(text["kv_lora_rank"]) + int(text["qk_rope_head_dim"])) * element_bytes
        heads = int(text.get("num_key_value_heads") or text["num_attention_heads"])
        width = int(text.get("head_dim") or int(text["hidden_size"]) // int(text["num_attention_heads"]))
    except (KeyError, TypeError, ValueError):
        return None
    return 2 * tokens * -(-heads // tensor_parallel) * width * element_bytes


def _shards(engine: EmbeddedSettings) -> int:
    return max(1, _count(engine, "tensor_parallel_size")) * max(1, _count(engine, "pipeline_parallel_size"))


def _share(engine: EmbeddedSettings) -> float:
    """Return the part of a GPU that an engine takes. What is no number vLLM itself objects to."""
    value = engine.args.get("gpu_memory_utilization")
    return float(value) if isinstance(value, int | float) else UTILIZATION


def _count(engine: EmbeddedSettings, name: str) -> int:
    value = engine.args.get(name, 1)
    return value if isinstance(value, int) else 1
