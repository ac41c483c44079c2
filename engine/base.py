"""The engine protocol: the values that cross it, and its errors.

Names are vLLM's. An engine turns a `GenerationRequest` into a `Prepared` (the exact prompt, counted) and a
`Prepared` into a stream of `Delta`s. It knows no keys, tenants, sessions or HTTP. Every failure leaves as an
`EngineError`; the tree:

    EngineError
    +- InvalidRequest       the caller's fault: it will fail again as it is
    +- EngineOverloaded     no room now; worth trying again later
    +- EngineUnavailable    starting, restarting, dead or closed
       +- EngineDied        ... and it died under a running generation
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from engine.messages import Message
from engine.sampling import Sampling

FinishReason = Literal["stop", "length", "tool_calls"]
Task = Literal["generate", "embed"]
"""Kind of request that an engine supports, under vLLM's names (`SupportedTask`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest(Sampling):
    """One generation: messages (or a bare prompt) plus sampling parameters, under vLLM's names.

    `request_id`, `cache_salt`, `flow` and `priority` are set by the gateway, never by clients.
    """

    task: ClassVar[Task] = "generate"
    request_id: str
    messages: list[Message] = field(default_factory=list)
    """Their images must have data URLs: engines fetch nothing."""
    prompt: str | list[int] | None = None
    """Text or token ids instead of `messages`; no chat template is applied."""
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    structured_outputs: dict[str, Any] | None = None
    """One of vLLM's `json`, `regex`, `choice`, `grammar`."""
    cache_salt: str | None = None
    """Prompts share cached prefixes only if their salts are equal."""
    flow: str = ""
    """Id of the client: requests of different flows are scheduled fairly, those of one flow in order."""
    priority: int = 0
    """Priority class; lower runs first, as in vLLM."""
    affinity: str = ""
    """Opaque. An engine with replicas and sticky choice sends requests with equal values to the same replica."""
    stream: bool = False
    """True: deltas as they are generated. False: one delta per choice at the end, which costs less CPU."""
    max_tokens: int | None = None
    """Given by the client. The request is rejected if it does not fit the context after the prompt."""
    max_tokens_param: str = "max_tokens"
    """The client's name for `max_tokens`, for error messages."""
    default_max_tokens: int | None = None
    """Used if `max_tokens` is None; reduced to what fits the context."""
    max_total_tokens: int | None = None
    """Limit on prompt and completions together; None means the context length."""
    logprobs: bool = False
    top_logprobs: int = 0
    response_format: dict[str, Any] | None = None

    @property
    def prompt_param(self) -> str:
        """The client's name for its prompt, for error messages."""
        return "messages" if self.prompt is None else "prompt"


@dataclass(slots=True)
class Usage:
    """Tokens of one generation, kept up to date by the engine while it runs, and exact after an abort.

    `prompt_tokens` stays 0 until the engine has processed the prompt: a request cancelled in the queue costs nothing,
    as in vLLM's own counters.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Part of `prompt_tokens` found in the prefix cache."""
    reasoning_tokens: int = 0
    """Part of `completion_tokens` that is reasoning."""
    estimated: bool = False
    """Some counts are estimates, because a remote server did not report them."""

    def add(self, other: Usage) -> None:
        """Add `other` to this sum."""
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.cached_tokens += other.cached_tokens
        self.reasoning_tokens += other.reasoning_tokens
        self.estimated |= other.estimated


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingRequest:
    """Inputs for a pooling model, which makes one list of numbers of each. Base of the requests of pooling tasks.

    The server sets `request_id`, `cache_salt`, `flow` and `priority`, as for a GenerationRequest.
    """

    task: ClassVar[Task]
    request_id: str
    inputs: list[str | list[int]]
    """Texts, or lists of token ids."""
    cache_salt: str | None = None
    flow: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest(PoolingRequest):
    """Texts or lists of token ids; each gives one vector."""

    task: ClassVar[Task] = "embed"
    dimensions: int | None = None
    """Length of the vectors. Only Matryoshka models support other lengths than their own."""


Request = GenerationRequest | PoolingRequest


class QueuePosition(Protocol):
    """Position in the queue in front of the engine, computed on access."""

    @property
    def position(self) -> int:
        """1 is next."""

    @property
    def wait_s(self) -> float:
        """Predicted seconds until admission."""


@dataclass(slots=True, kw_only=True)
class Prepared:
    """A request that can run: template applied, tokens counted, parameters checked.

    `payload` is private to the engine.
    """

    request_id: str
    prompt_tokens: int
    max_tokens: int
    """Limit on the tokens of one choice."""
    n: int = 1
    usage: Usage = field(default_factory=Usage)
    flow: str = ""
    priority: int = 0
    affinity: str = ""
    queue_s: float = 0.0
    """Seconds in the engine's queue; set when the prompt has been processed."""
    waiting: QueuePosition | None = None
    """Position while the request waits for admission, otherwise None."""
    request: Request | None = None
    """The original request, kept for the caller; engines do not use it."""
    recheck: Callable[[], Awaitable[None]] | None = None
    """Called if the request had to wait, before it runs. Raises if the request is no longer allowed."""
    trace_headers: Mapping[str, str] | None = None
    """W3C trace context for the engine's own spans."""
    payload: Any = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's text, its UTF-8 bytes, its natural-log probability, and the most likely alternatives."""

    token: str
    logprob: float
    bytes: list[int]
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call. The first piece of call number `index` has `id` and `name`, later ones `arguments`."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Delta:
    """Addition to one choice. Only the last delta of a choice has a `finish_reason`."""

    text: str
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
    reasoning: str = ""
    """Reasoning text; `text` has the answer."""
    tool_calls: Sequence[ToolCallDelta] = ()
    stop_reason: str | None = None
    """Stop string that ended the choice. It is not part of the text."""


class EngineError(Exception):
    """Base of all errors of engines. The message is safe to show to clients."""


class InvalidRequest(EngineError):
    """The request is invalid. `param` names the field; `code` is OpenAI's error code, if there is one."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class EngineOverloaded(EngineError):
    """The engine has no capacity. `reason` is a label for metrics; `retry_after_s` is None if unknown."""

    def __init__(self, message: str, retry_after_s: float | None = None, reason: str = "engine") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason


class EngineUnavailable(EngineError):
    """The engine can't accept requests now."""

    def __init__(self, message: str = "The engine is not running.") -> None:
        super().__init__(message)


class EngineDied(EngineUnavailable):
    """The engine failed during a generation."""

    def __init__(self, message: str = "The engine failed during generation.") -> None:
        super().__init__(message)


class Engine(Protocol):
    """Runs requests on a model. One instance serves many concurrent requests on one event loop.

    An engine implements the methods of its `tasks`. `prepare` rejects requests of other tasks, so that their methods
    are never called.
    """

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Supported tasks."""

    @property
    def max_model_len(self) -> int:
        """Context length in tokens, prompt and completion together."""

    @property
    def max_num_seqs(self) -> int | None:
        """Limit on concurrent sequences; None if unknown."""

    @property
    def takes_images(self) -> bool:
        """Whether messages may have images."""

    @property
    def unfinished_requests(self) -> int:
        """Requests in the engine, waiting or running."""

    async def start(self) -> None:
        """Load the model. Call once, before anything else. Raises EngineError."""

    async def prepare(self, request: Request) -> Prepared:
        """Apply the chat template and count the prompt, or count the inputs.

        Raises EngineUnavailable, and InvalidRequest, also if the request's task is not one of `tasks`.
        """

    def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        """Yield deltas until every choice has finished.

        Closing or cancelling the generator aborts the request in the engine; `prepared.usage` then has the tokens
        actually used. Raises InvalidRequest, EngineOverloaded or EngineUnavailable at the first step, EngineDied at
        any step.
        """

    async def pool(self, prepared: Prepared) -> list[list[float]]:
        """Return one vector per input. Cancelling aborts. Raises what `generate` raises."""

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        """Return the prompt's token ids, even if they exceed the context length. Raises what `prepare` raises."""

    async def detokenize(self, token_ids: list[int]) -> str:
        """Return the text of token ids. Raises InvalidRequest for ids outside the vocabulary."""

    async def check_health(self) -> None:
        """Query the engine itself, not a flag. Raises EngineUnavailable; may hang if the engine hangs."""

    def cpu_time_s(self) -> float | None:
        """Return the CPU seconds used so far by the engine's processes, which shows whether it is busy or stalled.

        None if it has no processes, or if one of them is stopped.
        """

    async def close(self) -> None:
        """Stop and free all resources. Running generations raise EngineDied. Idempotent."""


_NOT_OFFERED: dict[Task, str] = {
    "generate": "This model makes embeddings only.",
    "embed": "This model does not make embeddings.",
}


def not_offered(task: Task) -> InvalidRequest:
    """Return the error for a request of a task that the model's engine does not declare."""
    return InvalidRequest(_NOT_OFFERED[task], "model", "model_not_supported")


class TaskEngine:
    """Base of engines that declare `tasks`.

    `prepare` rejects requests of other tasks; a subclass implements `generate` and `embed` only if it declares them.
    """

    tasks: ClassVar[tuple[Task, ...]]

    async def prepare(self, request: Request) -> Prepared:
        if request.task not in self.tasks:
            raise not_offered(request.task)
        return await self._prepare(request)

    async def _prepare(self, request: Any) -> Prepared:
        """Prepare a request of one of `tasks`."""
        raise NotImplementedError

    def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        raise NotImplementedError  # nothing was prepared for it

    async def pool(self, prepared: Prepared) -> list[list[float]]:
        raise NotImplementedError


def resolve_max_tokens(request: GenerationRequest, prompt_tokens: int, max_model_len: int) -> int:
    """Return the limit on the tokens of one choice after a prompt of `prompt_tokens`.

    Raises InvalidRequest if the prompt leaves no space, or less than `max_tokens`. vLLM's own server reduces an
    explicit `max_tokens` silently; OpenAI rejects the request, and so does this.
    """
    room = max_model_len - prompt_tokens
    what = f"{request.prompt_param} is" if request.prompt is not None else f"{request.prompt_param} are"
    if room < 1:
        raise InvalidRequest(
            f"This model's maximum context length is {max_model_len} tokens, but the {what} {prompt_tokens} "
            f"tokens long. Shorten the {request.prompt_param}.",
            param=request.prompt_param,
            code="context_length_exceeded",
        )
    if request.max_tokens is None:
        room = min(room, request.default_max_tokens or room)
        if request.max_total_tokens is not None:
            room = min(room, max(1, (request.max_total_tokens - prompt_tokens) // request.n))
        return room
    if request.max_tokens > room:
        raise InvalidRequest(
            f"This model's maximum context length is {max_model_len} tokens. Your {request.prompt_param} took "
            f"{prompt_tokens} of them, so {request.max_tokens_param} can be at most {room}, not {request.max_tokens}.",
            param=request.max_tokens_param,
            code="context_length_exceeded",
        )
    return request.max_tokens
