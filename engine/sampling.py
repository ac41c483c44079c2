"""Sampling parameters: one declaration for all protocols and engines.

Adding a parameter is one entry in `Sampling`, under vLLM's name. Clients can then send it in the protocols that the
entry lists, vLLM receives it as a field of its own request, and remote servers receive it in the body. Not declared
here, because every protocol has its own rules for them: `max_tokens`, log probabilities and constraints on the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticKnownError

WireProtocol = Literal["chat", "completions", "responses", "messages", "jobs"]

OPENAI: tuple[WireProtocol, ...] = ("chat", "completions", "responses")
GENERATING: tuple[WireProtocol, ...] = (*OPENAI, "messages")

MAX_INT32 = 2**31 - 1
MAX_CHOICES = 16
MAX_BIASES = 1024

Int32 = Annotated[int, Field(ge=0, le=MAX_INT32)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], Field(max_length=16)]


def max_entries(most: int) -> BeforeValidator:
    """Return a validator that rejects a dict of more than `most` entries before pydantic validates the entries."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            context = {"field_type": "Dictionary", "max_length": most, "actual_length": len(value)}
            raise PydanticKnownError("too_long", context)
        return value

    return BeforeValidator(check)


def _as_list(stop: str | list[str]) -> list[str]:
    return [stop] if isinstance(stop, str) else stop


Stop = Annotated[StopString | StopStrings, AfterValidator(_as_list)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES),
    max_entries(MAX_BIASES),
]


@dataclass(frozen=True, slots=True)
class WireField:
    """A sampling parameter in the requests of one protocol."""

    parameter: str
    """Field of `Sampling`."""
    name: str
    """Field of the request."""
    accepts: Any
    """Type with bounds, for pydantic. Null is accepted too and means that the parameter is not given."""
    description: str | None


def _wire(
    accepts: Any,
    description: str | None = None,
    *,
    protocols: tuple[WireProtocol, ...] = OPENAI,
    renamed: Mapping[WireProtocol, tuple[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the metadata of a parameter that `protocols` accept under its own name.

    `renamed` has name and type for protocols that differ. `description` is for the OpenAPI document.
    """
    return {"wire": dict.fromkeys(protocols, (None, accepts)) | dict(renamed or {}), "description": description}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters under vLLM's names.

    None means that the parameter is not given: the engine uses the checkpoint's generation config, then OpenAI's
    default.
    """

    n: int = field(
        default=1, metadata=_wire(Annotated[int, Field(ge=1, le=MAX_CHOICES)], protocols=("chat", "completions"))
    )
    temperature: float | None = field(
        default=None, metadata=_wire(Annotated[float, Field(ge=0, le=2)], protocols=(*GENERATING, "jobs"))
    )
    top_p: float | None = field(default=None, metadata=_wire(Annotated[float, Field(gt=0, le=1)], protocols=GENERATING))
    top_k: int | None = field(
        default=None,
        metadata=_wire(Annotated[int, Field(ge=-1, le=MAX_INT32)], "-1 and 0 mean all tokens.", protocols=GENERATING),
    )
    min_p: float | None = field(default=None, metadata=_wire(Annotated[float, Field(ge=0, le=1)]))
    presence_penalty: float | None = field(default=None, metadata=_wire(Penalty))
    frequency_penalty: float | None = field(default=None, metadata=_wire(Penalty))
    repetition_penalty: float | None = field(default=None, metadata=_wire(Annotated[float, Field(gt=0, le=10)]))
    seed: int | None = field(default=None, metadata=_wire(Int64))
    stop: list[str] = field(
        default_factory=list, metadata=_wire(Stop, renamed={"messages": ("stop_sequences", StopStrings)})
    )
    stop_token_ids: list[int] = field(
        default_factory=list, metadata=_wire(Annotated[list[Int32], Field(max_length=64)])
    )
    ignore_eos: bool = field(default=False, metadata=_wire(bool))
    min_tokens: int = field(default=0, metadata=_wire(Int32))
    logit_bias: dict[str, float] | None = field(default=None, metadata=_wire(LogitBias, "Token id to bias."))

    def given(self) -> dict[str, Any]:
        """Return the parameters that differ from their defaults, by name."""
        return {name: value for name, default in _DEFAULTS if (value := getattr(self, name)) != default}


PARAMETERS = tuple(parameter.name for parameter in dataclasses.fields(Sampling))
_DEFAULTS = tuple((name, getattr(Sampling(), name)) for name in PARAMETERS)


def wire_fields(protocol: WireProtocol) -> tuple[WireField, ...]:
    """Return the sampling parameters that requests of `protocol` may have."""
    found = []
    for parameter in dataclasses.fields(Sampling):
        if protocol in parameter.metadata["wire"]:
            name, accepts = parameter.metadata["wire"][protocol]
            found.append(WireField(parameter.name, name or parameter.name, accepts, parameter.metadata["description"]))
    return tuple(found)
