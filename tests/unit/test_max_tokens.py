"""How many tokens a choice may generate: what was asked for or refused, else the default cut to what is left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.base import GenerationRequest, InvalidRequest, resolve_max_tokens
from tests.support.app import HELLO


def request(max_tokens: int | None = None, default: int | None = None) -> GenerationRequest:
    return GenerationRequest(request_id="r1", messages=HELLO, max_tokens=max_tokens, default_max_tokens=default)


@pytest.mark.parametrize(
    ("max_tokens", "default", "expected"),
    [
        (None, None, 90),
        (None, 50, 50),
        (None, 90, 90),
        (None, 4096, 90),
        (1, 50, 1),
        (60, 50, 60),
        (90, 50, 90),
    ],
)
def test_max_tokens_is_the_request_or_the_default_cut_to_fit(
    max_tokens: int | None, default: int | None, expected: int
) -> None:
    assert resolve_max_tokens(request(max_tokens, default), prompt_tokens=10, max_model_len=100) == expected


def test_max_tokens_beyond_the_context_is_refused_with_the_largest_that_fits() -> None:
    with pytest.raises(InvalidRequest, match="max_tokens can be at most 90, not 91") as caught:
        resolve_max_tokens(request(91), prompt_tokens=10, max_model_len=100)

    assert caught.value.param == "max_tokens"
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("max_tokens", [None, 1])
@pytest.mark.parametrize("prompt_tokens", [100, 101, 5000])
def test_prompt_that_leaves_no_room_is_refused(prompt_tokens: int, max_tokens: int | None) -> None:
    with pytest.raises(InvalidRequest, match=f"length is 100 tokens, but the messages are {prompt_tokens}") as caught:
        resolve_max_tokens(request(max_tokens), prompt_tokens, max_model_len=100)

    assert caught.value.param == "messages"
    assert caught.value.code == "context_length_exceeded"


def test_prompt_that_leaves_one_token_is_served() -> None:
    assert resolve_max_tokens(request(None, 4096), prompt_tokens=99, max_model_len=100) == 1


@given(
    max_tokens=st.none() | st.integers(1, 10_000),
    default=st.none() | st.integers(1, 10_000),
    prompt_tokens=st.integers(1, 10_000),
    max_model_len=st.integers(1, 10_000),
)
def test_prompt_and_completion_always_fit_the_context(
    max_tokens: int | None, default: int | None, prompt_tokens: int, max_model_len: int
) -> None:
    try:
        resolved = resolve_max_tokens(request(max_tokens, default), prompt_tokens, max_model_len)
    except InvalidRequest:
        assert prompt_tokens + (max_tokens or 1) > max_model_len
    else:
        assert 1 <= resolved <= max_model_len - prompt_tokens
        assert max_tokens in (None, resolved)
