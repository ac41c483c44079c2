"""Names of Google Analytics that its metadata method does not return."""

from __future__ import annotations

# https://developers.google.com/analytics/devguides/reporting/data/v1/realtime-api-schema
REALTIME_METRICS = ("activeUsers", "eventCount", "keyEvents", "screenPageViews")
REALTIME_DIMENSIONS = (
    *("appVersion", "audienceId", "audienceName", "audienceResourceName", "city", "cityId", "country", "countryId"),
    *("deviceCategory", "eventName", "minutesAgo", "platform", "streamId", "streamName", "unifiedScreenName"),
)
"""What realtime reports know; a property's own `customUser:` dimensions come on top."""
