"""Token distributions and attention weights from transformers with eager attention, one forward pass per step.

A step returns the distribution that its token was drawn from (entropy and the ten most likely tokens) and the last
token's row of attention weights in one layer. The prompt is processed in chunks, so that a cancelled request ends soon.
Runs in the inspector's process (`engine.inspector.inspector_process`); nothing else imports this module. Not handled:
images, tools and batching. Raises InvalidRequest for errors of the request.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.base import InvalidRequest

CHUNK_TOKENS = 64
"""Prompt tokens per forward pass: about a second for a billion parameters on one thread."""
STOP_TAGS = ("\nuser: ", "\nsystem: ")
"""Tags with which a model starts the next turn itself."""
_TAG_TOKENS = 16
"""Number of last tokens that contain a whole tag, with at least one byte per token."""
TOP = 10
"""Number of most likely tokens shown for each step."""
_DIGITS = 6
"""Significant digits of values for clients."""
_POWERS = 10.0 ** np.arange(23)  # all of them exact

Answer = tuple[Any, ...]
"""The head of an answer, then JSON documents."""
BUSY: Answer = ({"kind": "busy"},)
"""A step without a result; more follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request. `messages` have text only."""

    messages: list[dict[str, str]]
    trace_layer: int
    head: int | None
    max_new_tokens: int
    temperature: float
    top_k: int | None
    seed: int
    max_model_len: int
    max_prompt_bytes: int
    max_attention_tokens: int


def distribution(logits: torch.Tensor, temperature: float, top_k: int | None) -> torch.Tensor:
    """Return the probabilities (V,) that a token is drawn from, given logits (V,).

    Exactly `top_k` tokens have nonzero probability. At temperature 0, which is greedy, the model's own distribution is
    returned.
    """
    if temperature > 0:
        # Relative to the maximum: a very low temperature would overflow otherwise.
        logits = (logits - logits.max()) / max(temperature, 1e-6)
        if top_k is not None and top_k < len(logits):
            kept = torch.topk(logits, top_k).indices
            logits = torch.full_like(logits, -torch.inf).index_copy(0, kept, logits[kept])
    return torch.softmax(logits, dim=-1)


def entropy(probs: torch.Tensor) -> float:
    """Return the entropy of a distribution, in nats."""
    return float(-(probs * torch.log(probs + 1e-12)).sum())


def draw(probs: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """Return a token id: the most likely one at temperature 0, otherwise a random one."""
    if temperature == 0:
        return int(probs.argmax())
    return int(torch.multinomial(probs, 1, generator=generator))


def rounded(values: NDArray[Any]) -> NDArray[np.float64]:
    """Round values from 0 to 1 to six significant digits, so that their JSON has no more digits.

    Dividing an integer by an exact power of ten gives the double that prints as those digits.
    """
    values = np.asarray(values, dtype=np.float64)
    shown = values > 1e-12
    exponents = np.floor(np.log10(np.where(shown, values, 1.0))).astype(np.int64)
    powers = _POWERS[np.clip(_DIGITS - 1 - exponents, 0, len(_POWERS) - 1)]
    return np.where(shown, np.rint(values * powers) / powers, 0.0)


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


class Subject:
    """A loaded checkpoint."""

    def __init__(self, path: str, device: str, trust_remote_code: bool) -> None:
        # bfloat16 crashes on some CPUs; on a GPU the checkpoint's type is also the served one.
        dtype: Any = torch.float32 if device == "cpu" else "auto"
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
        self._model = model.to(device).eval()
        self._device = device
        self._layers = int(model.config.get_text_config().num_hidden_layers)
        self._eos = self._end_tokens()
        self._anchor = self._tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._texts: dict[int, str] = {}

    def _end_tokens(self) -> frozenset[int]:
        """Return the end tokens: like vLLM, the tokenizer's and those of the generation config."""
        named = getattr(self._model.generation_config, "eos_token_id", None)
        tokens = named if isinstance(named, list) else [named]
        return frozenset(token for token in (*tokens, self._tokenizer.eos_token_id) if token is not None)

    def trace(self, job: Job) -> Iterator[Answer]:
        """Yield BUSY and steps, then the reply. Raises InvalidRequest before the first of them."""
        ids = self._prompt(job)
        prompt_tokens = len(ids)
        yield from self._generate(job, ids)
        text = self._tokenizer.decode(ids[prompt_tokens:], skip_special_tokens=True)
        cuts = [at for tag in STOP_TAGS if (at := text.find(tag)) >= 0]
        yield ({"kind": "reply", "reply": text[: min(cuts, default=len(text))]},)

    def attention(self, job: Job) -> Iterator[Answer]:
        """Yield BUSY, then the weights (t, t) of one head over the last t tokens of the context.

        The tokens are the prompt's and, if requested, generated ones after it.
        """
        ids = self._prompt(job)
        for _ in self._generate(job, ids):
            yield BUSY
        ids = ids[-min(job.max_model_len, job.max_attention_tokens) :]
        matrix = np.zeros((len(ids), len(ids)))
        cache = None
        for start in range(0, len(ids), CHUNK_TOKENS):
            outputs = self._forward(ids[start : start + CHUNK_TOKENS], cache, attentions=True)
            cache = outputs.past_key_values
            rows = _array(self._weights(outputs, job.trace_layer)[job.head])  # (chunk, seen so far)
            end = start + rows.shape[0]
            matrix[start:end, end - rows.shape[1] : end] = rows  # tokens before a sliding window have no weights
            yield BUSY
        document = {
            "layer": job.trace_layer,
            "head": job.head,
            "tokens": [self._text(token_id) for token_id in ids],
            "attn": rounded(matrix),
        }
        yield {"kind": "attention"}, document

    def _prompt(self, job: Job) -> list[int]:
        """Return the conversation's token ids, with the generation prompt. Raises InvalidRequest."""
        try:
            text: str = self._tokenizer.apply_chat_template(job.messages, add_generation_prompt=True, tokenize=False)
        except (TemplateError, ValueError) as error:  # ValueError: the tokenizer has no template
            reason = str(error).partition("\n")[0]
            raise InvalidRequest(f"The model's chat template can't render 'messages': {reason}", "messages") from error
        size = len(text.encode("utf-8", "replace"))
        if size > job.max_prompt_bytes:
            raise InvalidRequest(
                f"The prompt is {size} bytes long; at most {job.max_prompt_bytes} can be inspected.",
                "messages",
                "prompt_too_large",
            )
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _generate(self, job: Job, ids: list[int]) -> Iterator[Answer]:
        """Append generated tokens to `ids`, and yield a step for each."""
        generator = torch.Generator(device="cpu").manual_seed(job.seed)
        context = _Context(self, job.max_model_len)
        prompt_tokens = len(ids)
        for step in range(job.max_new_tokens):
            outputs = yield from context.read(ids)
            logits = outputs.logits[0, -1].float().cpu()
            row = self._weights(outputs, job.trace_layer)[:, -1]  # (heads, seen so far)
            probs = distribution(logits, job.temperature, job.top_k)
            token_id = draw(probs, job.temperature, generator)
            ids.append(token_id)
            token = {"step": step, "token_id": token_id, "token_text": self._text(token_id)}
            trace = {
                "step": step,
                "entropy": _round(entropy(probs)),
                "topk": self._best(logits, probs),
                "attn": rounded(_padded(_array(row), context.length)),
            }
            yield {"kind": "step"}, token, trace
            tail = self._tokenizer.decode(ids[prompt_tokens:][-_TAG_TOKENS:])
            if token_id in self._eos or any(tag in tail for tag in STOP_TAGS):
                return

    def _best(self, logits: torch.Tensor, probs: torch.Tensor) -> list[dict[str, Any]]:
        """Return the most likely tokens by logits, so that there are ten even if `top_k` is lower."""
        return [
            {"token_id": token_id, "token_text": self._text(token_id), "prob": _round(float(probs[token_id]))}
            for token_id in torch.topk(logits, min(TOP, len(logits))).indices.tolist()
        ]

    def _text(self, token_id: int) -> str:
        """Return a token's text, decoded after another token: some tokenizers drop a leading space."""
        text = self._texts.get(token_id)
        if text is None:
            decode = self._tokenizer.decode
            text = self._texts[token_id] = decode([*self._anchor, token_id])[len(decode(self._anchor)) :]
        return text

    @torch.inference_mode()
    def _forward(self, ids: list[int], cache: Any, *, attentions: bool) -> Any:
        return self._model(
            input_ids=torch.tensor([ids], device=self._device),
            past_key_values=cache,
            use_cache=True,
            output_attentions=attentions,
            logits_to_keep=1,
        )

    def _weights(self, outputs: Any, layer: int) -> torch.Tensor:
        """Return the attention weights (heads, queries, keys) of one layer. Raises InvalidRequest if there are none."""
        attentions = outputs.attentions or ()
        if len(attentions) != self._layers or attentions[layer] is None:
            raise InvalidRequest("Not all layers of this model have attention weights to show.", "trace_layer")
        weights: torch.Tensor = attentions[layer][0]
        return weights


class _Context:
    """KV cache for a growing token sequence, limited to the last `max_model_len` tokens."""

    def __init__(self, subject: Subject, max_model_len: int) -> None:
        self._subject = subject
        self._max_model_len = max_model_len
        self._cache: Any = None
        self._start = 0
        self._end = 0

    @property
    def length(self) -> int:
        """Tokens in the context."""
        return self._end - self._start

    def read(self, ids: list[int]) -> Generator[Answer, None, Any]:
        """Process `ids` to their end, the last token separately, and return the output of that pass.

        If the sequence is longer than the context, every position changes with each token, so it is processed again.
        """
        start = max(0, len(ids) - self._max_model_len)
        if start != self._start:
            self._cache, self._start, self._end = None, start, start
        while self._end < len(ids) - 1:
            end = min(self._end + CHUNK_TOKENS, len(ids) - 1)
            self._cache = self._subject._forward(ids[self._end : end], self._cache, attentions=False).past_key_values
            self._end = end
            yield BUSY
        outputs = self._subject._forward(ids[-1:], self._cache, attentions=True)
        self._cache = outputs.past_key_values
        self._end = len(ids)
        return outputs


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().cpu().numpy()
    return array


def _padded(row: NDArray[Any], length: int) -> NDArray[Any]:
    """Return rows (heads, length), with zeros for tokens before a sliding window."""
    return np.pad(row, ((0, 0), (length - row.shape[1], 0)))


def set_threads(threads: int) -> None:
    """Set the number of torch's CPU threads. Call before any other use of torch."""
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
