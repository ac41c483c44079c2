"""The process that grammars are tried in. Only `engine.local.grammar_trials` runs it.

Takes requests on standard input and answers each on standard output until its input ends. A message is its length in
four bytes, then a pickle: first vLLM's configuration, then constraints, each answered with a word:

    fine       it can be compiled, and tokens are found fast; or vLLM's own check refuses it, and says best why
    compile    it takes too long, or too much memory, to be compiled
    tokens     it takes too long to find the tokens that may come next
    late       it has not ended in time, though it took little: the processors are busy

Each constraint is tried in a fork, which ends where it takes too much. It works with the backend and the tokenizer that
the engine core has, so it costs what it would cost there.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import random
import resource
import select
import signal
import struct
import time
from typing import TYPE_CHECKING, Any

from engine.process import die_with_parent

if TYPE_CHECKING:
    from vllm.sampling_params import StructuredOutputsParams

LENGTH = struct.Struct(">I")
_NICENESS = 5
_MOST_COMPILE_S = 5.0
"""CPU time. The largest real schemas take 2 s with a vocabulary of 131,072 tokens."""
_MOST_TOKENS_S = 0.2
"""CPU time to find the possible next tokens. The core does this for each token, and all of its requests wait."""
_MOST_MEMORY_BYTES = 2 * 2**30
_MOST_TRIAL_S = 30.0
"""Wall-clock time; other processes may use the CPUs."""
_WALKS = 4
_WALK_TOKENS = 256
_MOST_WALKS_S = 1.0


class _Trials:
    """Compiles and tries grammars with vLLM's backends."""

    def __init__(self, vllm_config: Any) -> None:
        from vllm.tokenizers import cached_tokenizer_from_config

        self._config = vllm_config
        self._tokenizer = cached_tokenizer_from_config(model_config=vllm_config.model_config)
        self._backends: dict[str, Any] = {}
        configured = vllm_config.structured_outputs_config.backend
        self._backend("xgrammar" if configured == "auto" else configured)  # before any fork

    def _backend(self, name: str) -> Any:
        if name not in self._backends:
            self._backends[name] = _backend_class(name)(
                self._config, tokenizer=self._tokenizer, vocab_size=self._config.model_config.get_vocab_size()
            )
        return self._backends[name]

    def judge(self, constraint: StructuredOutputsParams) -> str:
        """The answer of a fork."""
        reads, writes = os.pipe()
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                die_with_parent(signal.SIGKILL)
                os.close(reads)
                _be_silent()
                _bound_this_process()
                os.write(writes, self._judge(constraint).encode())
            os._exit(0)
        os.close(writes)
        word = _word_from(reads)
        os.close(reads)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, _, used = os.wait4(child, 0)
        if word == "late" and used.ru_utime + used.ru_stime > _MOST_COMPILE_S / 2:
            return "compile"
        return word

    def _judge(self, constraint: StructuredOutputsParams) -> str:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.structured_output.request import get_structured_output_key

        params = SamplingParams(structured_outputs=constraint)
        try:
            params._validate_structured_outputs(
                self._config.model_config, self._config.structured_outputs_config, self._tokenizer
            )
        except Exception:
            return "fine"
        assert params.structured_outputs is not None
        assert params.structured_outputs._backend is not None
        backend = self._backend(params.structured_outputs._backend)
        try:
            grammar = backend.compile_grammar(*get_structured_output_key(params.structured_outputs))
        except Exception:
            return "compile"
        if time.process_time() > _MOST_COMPILE_S:
            return "compile"
        return "fine" if _finds_tokens_fast(grammar, backend.allocate_token_bitmask(1)) else "tokens"


def _finds_tokens_fast(grammar: Any, mask: Any) -> bool:
    """Generate random allowed tokens, and check how long it takes to find the possible next ones."""
    import numpy as np

    chance = random.Random(0)
    began = time.process_time()
    for _ in range(_WALKS):
        for _ in range(_WALK_TOKENS):
            before = time.process_time()
            mask.fill_(-1)
            grammar.fill_bitmask(mask, 0)
            allowed = np.unpackbits(mask[0].numpy().view(np.uint8), bitorder="little").nonzero()[0]
            written = len(allowed) and grammar.accept_tokens("trial", [int(chance.choice(allowed))])
            took_s = time.process_time() - before
            if took_s > _MOST_TOKENS_S:
                return False
            if not written or grammar.is_terminated() or time.process_time() - began > _MOST_WALKS_S:
                break
        if time.process_time() - began > _MOST_WALKS_S:
            break
        grammar.reset()
    return True


def _be_silent() -> None:
    """Suppress all output: compilers print warnings about each constraint."""
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def _bound_this_process() -> None:
    seconds = int(_MOST_COMPILE_S + _MOST_WALKS_S) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with open("/proc/self/statm") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MOST_MEMORY_BYTES, taken + _MOST_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _word_from(pipe: int) -> str:
    """The answer of a fork. A fork that ends without one has reached its limits."""
    ready, _, _ = select.select([pipe], [], [], _MOST_TRIAL_S)
    return (os.read(pipe, 64).decode() or "compile") if ready else "late"


def _backend_class(name: str) -> Any:
    if name == "guidance":
        from vllm.v1.structured_output.backend_guidance import GuidanceBackend

        return GuidanceBackend
    if name == "outlines":
        from vllm.v1.structured_output.backend_outlines import OutlinesBackend

        return OutlinesBackend
    if name == "lm-format-enforcer":
        from vllm.v1.structured_output.backend_lm_format_enforcer import LMFormatEnforcerBackend

        return LMFormatEnforcerBackend
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    return XgrammarBackend


def main() -> None:
    """Serve until the input ends."""
    die_with_parent(signal.SIGKILL)
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up between the answers
    os.nice(_NICENESS)
    with contextlib.suppress(Exception):  # while the engine core starts; what is wrong with them shows at their use
        importlib.import_module("vllm.tokenizers")
        _backend_class("xgrammar")
    trials: _Trials | None = None
    while (head := requests.read(LENGTH.size)) and len(head) == LENGTH.size:
        # From the gateway alone, which made it of checked fields.
        message = pickle.loads(requests.read(LENGTH.unpack(head)[0]))
        if trials is None:
            trials = _Trials(message)
            continue
        answer = trials.judge(message).encode()
        answers.write(LENGTH.pack(len(answer)) + answer)
        answers.flush()


if __name__ == "__main__":
    main()
