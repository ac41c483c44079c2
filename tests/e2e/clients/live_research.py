import os
import sys

from openai import OpenAI
from rich.console import Group
from rich.live import Live
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

SIGNS = {"AGENT_COMPLETED": "[green]done[/]", "ERROR_OCCURRED": "[red]failed[/]", "TOOL_INVOKED": "[cyan]tool[/]"}
question = " ".join(sys.argv[1:]) or "What are you?"
client = OpenAI(base_url=os.environ["SHANNON_URL"] + "/v1", api_key=os.environ["SHANNON_KEY"])
agents: dict[str, tuple[str, str, Text]] = {}
sources: list[dict] = []
answer = ""


def note(event: dict) -> None:
    """Keep what an agent does now, and what it last thought or saw."""
    name, payload = event["agent_id"], event["payload"]
    message = Text(event["message"].partition("\n")[0], overflow="ellipsis", no_wrap=True)
    if event["type"] in ("AGENT_STARTED", "AGENT_COMPLETED") and name in agents:
        message = agents[name][2]
    agents[name] = payload.get("role", ""), SIGNS.get(event["type"], "works"), message
    if event["type"] == "WORKFLOW_COMPLETED":
        sources.extend(payload.get("sources", []))


def view() -> Group:
    table = Table("agent", "role", "", "at work on", title=question, expand=True)
    for name, row in agents.items():
        table.add_row(name, *row)
    return Group(table, Markdown(answer), "")


stream = client.chat.completions.create(
    model=os.environ.get("SHANNON_MODEL", "shannon-deep-research"),
    messages=[{"role": "user", "content": question}],
    extra_body={"shannon_options": {"max_iterations": 1}},
    stream=True,
)
with Live(view(), refresh_per_second=8) as live:
    for chunk in stream:
        for event in (chunk.model_extra or {}).get("shannon_events", []):
            note(event)
        answer += chunk.choices[0].delta.content or ""
        live.update(view())
print(f"\n{len(sources)} sources, {chunk.usage.total_tokens} tokens")
