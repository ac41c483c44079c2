"""Which errors of vLLM are the client's fault.

vLLM 0.32 declares a client's errors as `VLLMClientError`, but not all of them yet: its own server still answers every
ValueError, TypeError and OverflowError with 400 (`vllm/entrypoints/serve/exception_handling/error_response.py`). That
would blame clients for defects, so the rest of what clients can cause is listed here, by type and by where it was
raised. Anything else is a defect of vLLM or of ours: the client gets no detail, the log gets all of it.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from types import TracebackType

from engine.base import EngineError, EngineOverloaded, EngineUnavailable, InvalidRequest

log = logging.getLogger(__name__)

_MAX_WORDS = 500
"""Limit on a chat template's own message, in characters, in errors for clients."""
_TEMPLATE = "<template>"
"""The file name of a compiled Jinja template in tracebacks."""
_IMAGES = "The model can't process these images."
# Type, how the name of the module that raised it begins, and the client's message; None: the error's own message.
_DECLARED: tuple[tuple[type[Exception], str, str | None], ...] = (
    # Decoders raise all sorts on the bytes of an image; the model's processor raises ValueError and prints its input.
    (NotImplementedError, "vllm.multimodal.media", "Images must be data URLs in base64."),
    (Exception, "vllm.multimodal.media", _IMAGES),
    (Exception, "vllm.multimodal.image", _IMAGES),
    (ValueError, "vllm.multimodal.", _IMAGES),
    # What earlier calls were made with is JSON in a string, which the renderer reads.
    (RecursionError, "vllm.", "A tool's schema or a call's arguments are nested too deeply."),
    (ValueError, "vllm.renderers.chat_utils", "The messages are not in OpenAI's form: a part, or a call's arguments."),
    (ValueError, "vllm.renderers.base", None),
    # Encoders of prompts that are code, where other models have a template. They refuse messages by ValueError.
    (ValueError, "vllm.tokenizers.deepseek_v", None),
    (ValueError, "vllm.tokenizers.mistral", None),
    (ValueError, "mistral_common.", None),
    (ValueError, "vllm.renderers.cohere", None),
    (ValueError, "vllm.renderers.inkling", None),
)
_GRAMMARS = "vllm.v1.structured_output"
"""Compiles grammars. Its errors have no parameter; the caller knows the field."""
_SURROGATES = re.compile("^TextEncodeInput must be|surrogates not allowed")
"""Messages of tokenizers about text that can't be encoded in UTF-8."""
_PREFILL = re.compile("add_generation_prompt|continue_final_message")
"""vLLM's advice if the last message is the assistant's: parameters that clients can't set here."""
_PYTHON_ERRORS = (TypeError, LookupError, AttributeError, RecursionError, UnicodeError)
"""Causes that vLLM may quote in a declared error, with messages of Python."""
_seen: set[tuple[str, str, int]] = set()
_MAX_SEEN = 1000


@contextlib.contextmanager
def client_errors(prompt_param: str = "messages") -> Iterator[None]:
    """Turn what vLLM raises in here into an EngineError: InvalidRequest for what the client caused.

    `prompt_param` is what the client called its prompt. Leaves alone what vLLM raises about itself: a dead core is
    EngineUnavailable, its admission control (`GracefulHTTPError`) passes.
    """
    from vllm.exceptions import GracefulHTTPError
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except (EngineError, GracefulHTTPError):
        raise
    except EngineDeadError as error:
        raise EngineUnavailable() from error
    except Exception as error:
        raise _refusal(error, prompt_param) or defect(error) from error


def defect(error: Exception) -> EngineError:
    """Return the error of a request that failed by a defect. The log gets its traceback, the first time."""
    module, line = _origin(error.__traceback__)
    place = type(error).__name__, module, line
    if place not in _seen and len(_seen) < _MAX_SEEN:
        _seen.add(place)
        log.error("a request failed by a defect, %s in %s:%d", *place, exc_info=error)
    return EngineError("The engine had an error while processing the request.")


def _refusal(error: Exception, prompt_param: str) -> EngineError | None:
    """The client's error for an error that the client caused, else None."""
    from vllm.exceptions import VLLMClientError

    if (refusal := _template_words(error)) is not None:
        return InvalidRequest(refusal, prompt_param)
    if isinstance(error, VLLMClientError):
        if isinstance(error.__cause__, _PYTHON_ERRORS):
            return InvalidRequest("The model can't process this request.", prompt_param)
        # args[0] is the plain sentence; str() appends the parameter, which is sent in a field of its own.
        parameter = getattr(error, "parameter", None)
        message = str(error.args[0]) if error.args else str(error)
        if parameter in ("input_tokens", "input_text"):  # the rendered prompt, which clients know by another name
            return InvalidRequest(message, prompt_param, "context_length_exceeded")
        return InvalidRequest(message, prompt_param if parameter == "image" else parameter)
    for cause in _causes(error):
        module, _ = _origin(cause.__traceback__)
        if isinstance(cause, ValueError) and module.startswith("vllm.") and _PREFILL.search(str(cause)):
            return InvalidRequest(
                "This model can't continue a message: the last one can't be the assistant's.", prompt_param
            )
        if type(cause).__module__ == "mistral_common.exceptions" or (
            isinstance(cause, AssertionError) and module.startswith("mistral_common.")  # it also refuses by assertions
        ):
            param = "tools" if type(cause).__name__.startswith("InvalidTool") else prompt_param
            return InvalidRequest(_cut(str(cause)) or "The model's tokenizer refuses these messages.", param)
        if isinstance(cause, TimeoutError) and module.startswith("vllm.renderers"):
            return EngineOverloaded("The prompt could not be rendered in time.")
        if isinstance(cause, (TypeError, UnicodeError)) and _SURROGATES.search(str(cause)):
            return InvalidRequest("The text contains half of a surrogate pair, which is not a character.", prompt_param)
        if module.startswith(_GRAMMARS) and not isinstance(cause, (ImportError, MemoryError)):
            return InvalidRequest(_cut(str(cause)) if isinstance(cause, ValueError) else "it can't be compiled.")
        for kind, origin, words in _DECLARED:
            if (
                isinstance(cause, kind)
                and not isinstance(cause, (ImportError, MemoryError))
                and module.startswith(origin)
            ):
                return InvalidRequest(words or _cut(str(cause)), prompt_param)
    return None


def _template_words(error: Exception) -> str | None:
    """The client's error for an error inside the model's chat template, else None.

    vLLM declares these as the client's, and quotes them: what the template's author wrote is for the client, what
    Python says about the template's own code is not.
    """
    from jinja2 import TemplateError

    for cause in _causes(error):
        if type(cause) is TemplateError:
            return f"The model's chat template refuses this: {_cut(str(cause))}"
        if isinstance(cause, TemplateError) or _passed(cause.__traceback__, _TEMPLATE):
            return "The model's chat template can't render these messages."
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__


def _origin(trace: TracebackType | None) -> tuple[str, int]:
    """Return the deepest module of vLLM or mistral-common in a traceback and its line, otherwise the deepest module."""
    found = deepest = ("", 0)
    while trace is not None:
        deepest = str(trace.tb_frame.f_globals.get("__name__", "")), trace.tb_lineno
        if deepest[0].startswith(("vllm.", "mistral_common.")):
            found = deepest
        trace = trace.tb_next
    return found if found[0] else deepest


def _passed(trace: TracebackType | None, file: str) -> bool:
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            return True
        trace = trace.tb_next
    return False


def _cut(words: str) -> str:
    return words if len(words) <= _MAX_WORDS else words[:_MAX_WORDS] + "..."
