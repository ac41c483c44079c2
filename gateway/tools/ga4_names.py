"""Names that Google Analytics' metadata method does not list."""

from __future__ import annotations

# https://developers.google.com/analytics/devguides/reporting/data/v1/realtime-api-schema
REALTIME_METRICS = ("activeUsers", "eventCount", "keyEvents", "screenPageViews")
REALTIME_DIMENSIONS = (
    *("appVersion", "audienceId", "audienceName", "audienceResourceName", "city", "cityId", "country", "countryId"),
    *("deviceCategory", "eventName", "minutesAgo", "platform", "streamId", "streamName", "unifiedScreenName"),
)
"""Dimensions of realtime reports, besides a property's own `customUser:` dimensions."""
