"""The replies of the scripted gateway's model: to agents that research its documentation, and in plain chat.

Example:

    visit.ask(QUESTION)

`CHAT` has the plain answers by question. `HOSTILE` attacks the page with Markdown and HTML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.base import Delta, GenerationRequest
from tests.support.scripted_model import ScriptedModel, text_of

QUESTION = "What happens to the books when a client hangs up in mid-stream?"
_PARTS = {
    "What does the gateway do when a client hangs up?": (
        "client disconnects aborted",
        "Disconnects come first.",
    ),
    "Where is each generation settled?": ("settle finally every exit", "The tour of the code should name the place."),
    "What if the store is away at that moment?": ("store dies journal replayed", "It names the store and a journal."),
    "Which limits get their tokens back?": (
        "limits reserves unused tokens returned",
        "This is about limits.",
    ),
    "Who may see the figures?": ("usage admin keys", "Usage by key is what this is about."),
}
_FINDINGS = {
    "Failures": "The request leaves the engine at once, streamed or not, and the tokens made until then "
    "are counted exactly",
    "Keys limits sessions usage": "The ledger equals vLLM's own counters, to the token; what was reserved and not used "
    "goes back to where it came from",
    "Architecture": "Each generation is settled in `finally`, on every exit",
}
_ANSWER = """Nothing is lost, and nothing is counted twice{wrong}.

### While the client is gone

- The request **leaves the engine at once**, streamed or not, and the tokens made until then are counted exactly{wrong}.
- Each generation is settled in `finally`, so there is no exit without an entry{inside}.
- What was reserved and not used goes back to the second of the window that it was taken from{keys}.

### When the store is away as well

Usage goes to a journal on disk, which is replayed when the store is back{wrong}:

| State of the store | Where usage goes | Limits |
|---|---|---|
| answers | the ledger, in order | shared by all gateways |
| away | a journal on disk | this process's share |
| back again | the journal first | shared again |

The ledger and vLLM's own counters agree to the token, under disconnects, errors and drains{keys}.
"""

HOSTILE = """<script>window.taken = "script"</script>

<img src="x" onerror="window.taken = 'image'"> <svg onload="window.taken = 'svg'"><script>taken = 1</script></svg>

<iframe srcdoc="<script>parent.taken = 'frame'</script>"></iframe><object data="javascript:taken = 1"></object>

<style>* { display: none !important }</style><base href="https://elsewhere.example/"><form action="//elsewhere.example">

<a href="javascript:window.taken = 'html link'">html link</a> <javascript:window.taken='auto'> <data:text/html,x>

[script](javascript:window.taken='link') [mixed](JaVaScRiPt:window.taken='mixed') [tab](java&#09;script:window.taken=1)
[encoded](&#106;avascript:window.taken=1) [data](data:text/html;base64,PHNjcmlwdD50YWtlbj0xPC9zY3JpcHQ+)
[old](vbscript:msgbox) [file](file:///etc/passwd) [blob](blob:null/1) [relative](/admin/keys) [defined]

![pixel](https://elsewhere.example/pixel.png?said=all) ![drawn](data:image/svg+xml,%3Csvg%20onload=%22taken=1%22%3E)

[quotes](https://elsewhere.example/"onmouseover="taken=1) <https://elsewhere.example/?a="onclick="taken=1>

| <img src=x onerror=taken=1> | [cell](javascript:taken=1) |
|---|---|
| <script>taken = 1</script> | `<script>taken = 1</script>` |

```html onmouseover="taken=1"
<script>window.taken = "listing"</script>
```

[defined]: javascript:window.taken='definition' "onclick=taken=1"
"""

MARKDOWN = """# A heading

Text that is **strong**, *stressed*, ~~struck~~ and `code`, with a [link](https://shannon.example/a) and
https://shannon.example/b in it.

1. One
   - deep
     - deeper
2. Two

> Said by somebody
> > who quotes.

```python
def entropy(p):
    return -p * log2(p)
```

| Left | Right |
|:--|--:|
| a | 1 |
"""

PARAGRAPH = "The gateway counts each token once, where it is made, and the ledger keeps what was counted. " * 5
LONG_TOKENS = 20_000
_LONG_WORDS = (PARAGRAPH.strip() + "\n\n").split(" ")

CHAT: dict[str, str | list[Delta]] = {
    "Attack the page.": HOSTILE,
    "Show me markdown.": MARKDOWN,
    "Go on and on.": [Delta(f"{_LONG_WORDS[n % len(_LONG_WORDS)]} ") for n in range(LONG_TOKENS)],
    "Take your time.": [Delta(f"{number} ") for number in range(1, 1001)],
}


def model() -> ScriptedModel:
    """Return the model, as the `reply` of a mock engine."""
    return ScriptedModel(plan=_plan, step=_step, notes=_notes, answer=_answer, chat=_chat)


def _plan(request: GenerationRequest) -> Mapping[str, Any]:
    assert request.structured_outputs is not None
    least = request.structured_outputs["json"]["properties"]["sub_questions"]["minItems"]
    parts = list(_PARTS.items())[: max(4, least)]
    return {"sub_questions": [{"question": part, "queries": [query]} for part, (query, _) in parts]}


def _step(request: GenerationRequest) -> Mapping[str, Any]:
    text = _all(request)
    if "0 read so far" not in text:
        return {"action": "finish", "query": "", "number": 1, "reason": "That answers it."}
    reason = next(reason for part, (_, reason) in _PARTS.items() if f"Sub-question: {part}" in text)
    return {"action": "read", "query": "", "number": 1, "reason": reason}


def _notes(request: GenerationRequest) -> str:
    numbers = {
        title: number for number, title in re.findall(r'<source number="(\d+)"[^>]*title="([^"]*)"', _all(request))
    }
    found = [f"{text} [{numbers[title]}]." for title, text in _FINDINGS.items() if title in numbers]
    return "\n".join(f"- {line}" for line in found) or "Nothing on this."


def _answer(request: GenerationRequest) -> str:
    text = _all(request)

    def marker(title: str) -> str:
        found = re.search(re.escape(_FINDINGS[title]) + r" (\[\d+\])", text)
        return f" {found[1]}" if found else ""

    wrong, keys, inside = map(marker, _FINDINGS)
    return _ANSWER.format(wrong=wrong, keys=keys, inside=inside)


def _chat(request: GenerationRequest) -> str | list[Delta]:
    return CHAT.get(text_of(request), f"You said: {text_of(request)}")


def _all(request: GenerationRequest) -> str:
    return "\n".join(text_of(request, number) for number in range(len(request.messages)))
