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
"""What an engine can do, under vLLM's names (`SupportedTask`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest(Sampling):
    """One generation: messages (or a bare prompt) plus sampling parameters, under vLLM's names.

    `request_id`, `cache_salt`, `flow` and `priority` are made by the server; clients never choose them.
    """

    task: ClassVar[Task] = "generate"
    request_id: str
    messages: list[Message] = field(default_factory=list)
    """In OpenAI's form. Images are `image_url` parts whose URLs are data URLs: engines fetch nothing."""
    prompt: str | list[int] | None = None
    """Text or token ids in place of `messages`; no chat template is applied."""
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    structured_outputs: dict[str, Any] | None = None
    """One of vLLM's `json`, `regex`, `choice`, `grammar`."""
    cache_salt: str | None = None
    """Prompts share cached prefixes only under equal salts."""
    flow: str = ""
    """Whom the request is for: requests of different flows are served fairly, those of one flow in order."""
    priority: int = 0
    """Class of service, lower first, as in vLLM."""
    affinity: str = ""
    """Opaque: where an engine has replicas and keeps conversations to one, equal values go to the same one."""
    stream: bool = False
    """Deltas as they come (True) or one delta per choice at the end (False), which costs the front end less."""
    max_tokens: int | None = None
    """A hard request: refused when it does not fit the context behind the prompt."""
    max_tokens_param: str = "max_tokens"
    """What the client called it, for messages."""
    default_max_tokens: int | None = None
    """Used when `max_tokens` is None, and cut to what the context leaves."""
    max_total_tokens: int | None = None
    """Most that prompt and all completions together may take; None leaves it to the context."""
    logprobs: bool = False
    top_logprobs: int = 0
    response_format: dict[str, Any] | None = None

    @property
    def prompt_param(self) -> str:
        """What the client called its prompt, for messages."""
        return "messages" if self.prompt is None else "prompt"


@dataclass(slots=True)
class Usage:
    """Tokens of one generation, kept up to date by the engine while it runs, and exact after an abort.

    `prompt_tokens` stays 0 until the engine has processed the prompt: a request that left the queue before that
    cost nothing, which is also how vLLM's own counters see it.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Part of `prompt_tokens` that the prefix cache served."""
    reasoning_tokens: int = 0
    """Part of `completion_tokens` that was thought, not said."""
    estimated: bool = False
    """Part of it is estimated, because an upstream does not report it."""

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
    """Inputs to turn into vectors."""

    task: ClassVar[Task] = "embed"
    dimensions: int | None = None
    """Length of the vectors. Only models that were trained for it (Matryoshka) support it."""


Request = GenerationRequest | PoolingRequest


class QueuePosition(Protocol):
    """Position of a request in the queue of the engine, computed on access."""

    @property
    def position(self) -> int:
        """1 is next."""

    @property
    def wait_s(self) -> float:
        """How long it is likely to wait from now on."""


@dataclass(slots=True, kw_only=True)
class Prepared:
    """A request that can run: template applied, tokens counted, parameters checked.

    `payload` is the engine's own business.
    """

    request_id: str
    prompt_tokens: int
    max_tokens: int
    """Most tokens that one choice may generate."""
    n: int = 1
    usage: Usage = field(default_factory=Usage)
    flow: str = ""
    priority: int = 0
    affinity: str = ""
    queue_s: float = 0.0
    """Seconds that it waited in the engine's queue; known once the prompt is processed."""
    waiting: QueuePosition | None = None
    """Kept up to date while it waits for admission, None otherwise."""
    request: Request | None = None
    """What it was prepared from, kept by the caller for itself; engines do without."""
    recheck: Callable[[], Awaitable[None]] | None = None
    """Asked once it has waited for admission, before it runs. Raises where it may not any more."""
    trace_headers: Mapping[str, str] | None = None
    """W3C trace context, in which the engine may record its own spans."""
    payload: Any = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's text, its UTF-8 bytes, its natural-log probability, and the best alternatives (same shape)."""

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
    """What one choice gained since its last delta. The last one of a choice carries `finish_reason`."""

    text: str
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
    reasoning: str = ""
    """What a reasoning model thought; `text` is what it said."""
    tool_calls: Sequence[ToolCallDelta] = ()
    stop_reason: str | None = None
    """The stop string that ended it, which is not part of the text; vLLM's word."""


class EngineError(Exception):
    """Base of everything an engine raises. The message is safe to show to a client."""


class InvalidRequest(EngineError):
    """The request can't be served as it is. `param` names the field, `code` is OpenAI's error code if it has one."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class EngineOverloaded(EngineError):
    """No room in the engine's queue. `reason` is one word out of a few; `retry_after_s` is None if unknown."""

    def __init__(self, message: str, retry_after_s: float | None = None, reason: str = "engine") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason


class EngineUnavailable(EngineError):
    """The engine can't take requests now."""

    def __init__(self, message: str = "The engine is not running.") -> None:
        super().__init__(message)


class EngineDied(EngineUnavailable):
    """The engine failed under a running generation."""

    def __init__(self, message: str = "The engine failed during generation.") -> None:
        super().__init__(message)


class Engine(Protocol):
    """A source of tokens. One instance serves many concurrent generations on one event loop.

    An engine implements the methods of its `tasks`. `prepare` refuses requests of other tasks, so that the other
    methods are never called.
    """

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What it can do."""

    @property
    def max_model_len(self) -> int:
        """Context length in tokens: prompt plus completion."""

    @property
    def max_num_seqs(self) -> int | None:
        """Most sequences that it runs at once; None if unknown."""

    @property
    def takes_images(self) -> bool:
        """Whether messages may hold images."""

    @property
    def unfinished_requests(self) -> int:
        """Generations that the engine holds now, waiting or running."""

    async def start(self) -> None:
        """Load what it needs. Raises EngineError when it can't; call once, before anything else."""

    async def prepare(self, request: Request) -> Prepared:
        """Apply the chat template and count the prompt, or count the inputs.

        Raises EngineUnavailable, and InvalidRequest also where the request's task is not one of `tasks`.
        """

    def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        """Yield deltas until every choice has finished.

        Closing or cancelling the generator aborts the request in the engine; afterwards `prepared.usage` holds what
        was really spent. Raises InvalidRequest, EngineOverloaded or EngineUnavailable at the first step,
        EngineDied at any.
        """

    async def pool(self, prepared: Prepared) -> list[list[float]]:
        """Return one vector per input. Cancelling aborts. Raises what `generate` raises."""

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        """Return the prompt's token ids, however many. Raises what `prepare` raises."""

    async def detokenize(self, token_ids: list[int]) -> str:
        """Return the text of token ids. Raises InvalidRequest on ids that the vocabulary does not have."""

    async def check_health(self) -> None:
        """Ask the engine itself, not a flag. Raises EngineUnavailable; may hang if the engine does."""

    def cpu_time_s(self) -> float | None:
        """CPU seconds used so far by the processes of the engine, to distinguish a busy engine from a stalled one.

        None where there are no such processes, or one of them is stopped.
        """

    async def close(self) -> None:
        """Stop and free everything. Running generations raise EngineDied. Idempotent."""


_NOT_OFFERED: dict[Task, str] = {
    "generate": "This model makes embeddings only.",
    "embed": "This model does not make embeddings.",
}


def not_offered(task: Task) -> InvalidRequest:
    """Make the error of a model that is asked for a task that its engine does not declare."""
    return InvalidRequest(_NOT_OFFERED[task], "model", "model_not_supported")


class TaskEngine:
    """Base of engines with some of the tasks: it refuses the others, in `prepare`."""

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
    """The most tokens that a choice may generate after a prompt of `prompt_tokens`.

    Raises InvalidRequest when the prompt leaves no room, or not the room that the request asks for. vLLM's own
    server cuts an explicit `max_tokens` silently; OpenAI refuses it, and so do we, because a caller who names a
    number counts on it.
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
