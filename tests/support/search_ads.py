"""Answers of the services that serve search ads.

Example:

    router.get(SEARCHAPI).respond(json=ADS)
"""

from __future__ import annotations

KEYS = {"SERPER_API_KEY": "serper-secret", "SEARCHAPI_API_KEY": "searchapi-secret"}


SEARCHAPI = "https://www.searchapi.io/api/v1/search"


ADS = [
    {
        "position": 1,
        "block_position": "top",
        "title": "Acme Planner - 30% off",
        "link": "https://www.acme.test/plan?gclid=1",
        "source": "Acme",
        "displayed_link": "https://www.acme.test › plan",
        "snippet": "Plan your week.\nFree for teams.",
        "extensions": ["4.8 stars"],
        "sitelinks": {"inline": [{"title": "Pricing", "link": "https://www.acme.test/pricing"}]},
    },
    {
        "position": 1,
        "block_position": "bottom",
        "title": "Tidy",
        "link": "https://www.google.com/aclk?sa=l&adurl=https%3A%2F%2Ftidy.test%2Fstart",
        "source": "tidy.test",
        "description": "Tidy up.",
    },
]
