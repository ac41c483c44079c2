"""The workflows by their name in the configuration. `chat` is not among them, because it is a single call."""

from __future__ import annotations

from gateway.workflows.ads import ads
from gateway.workflows.analytics import analytics
from gateway.workflows.complex import supervise
from gateway.workflows.research import research
from gateway.workflows.run import Workflow

WORKFLOWS: dict[str, Workflow] = {
    "quick_research": research("quick"),
    "standard_research": research("standard"),
    "deep_research": research("deep"),
    "academic_research": research("academic"),
    "ads_research": ads,
    "analytics": analytics,
    "complex": supervise,
}
