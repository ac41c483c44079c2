"""A Google Analytics property: its service account and what its API answers.

Example:

    api.post(TOKEN_URL).respond(json={"access_token": "t", "expires_in": 3600})
    api.post(f"{PROPERTY}:runReport").respond(json=REPORT)
    key_file.write_text(account(private_key))
"""

from __future__ import annotations

import json
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

TOKEN_URL = "https://oauth2.test/token"

PROPERTY = "https://ga4.test/v1beta/properties/123"

METADATA = {
    "metrics": [
        {"apiName": "sessions", "uiName": "Sessions", "description": "Begun.", "type": "TYPE_INTEGER"},
        {"apiName": "activeUsers", "uiName": "Active users", "type": "TYPE_INTEGER"},
        {"apiName": "bounceRate", "uiName": "Bounce rate", "type": "TYPE_FLOAT"},
    ],
    "dimensions": [
        {"apiName": "country", "uiName": "Country"},
        {"apiName": "date", "uiName": "Date"},
        {"apiName": "customUser:plan", "uiName": "Plan", "customDefinition": True},
    ],
}


def row(dimensions: list[str], *metrics: str) -> dict[str, Any]:
    return {
        "dimensionValues": [{"value": value} for value in dimensions],
        "metricValues": [{"value": value} for value in metrics],
    }


REPORT = {
    "dimensionHeaders": [{"name": "country"}],
    "metricHeaders": [{"name": "sessions", "type": "TYPE_INTEGER"}, {"name": "bounceRate", "type": "TYPE_FLOAT"}],
    "rows": [row(["Japan"], "1204", "0.4211"), row(["France"], "96", "0.5")],
    "totals": [row(["RESERVED_TOTAL"], "1300", "0.4269")],
    "rowCount": 7,
    "metadata": {"currencyCode": "JPY", "timeZone": "Asia/Tokyo", "samplingMetadatas": [{"samplesReadCount": "1"}]},
}


def account(private_key: rsa.RSAPrivateKey, token_url: str = TOKEN_URL) -> str:
    """Return a service account's key file."""
    pem = private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return json.dumps(
        {
            "type": "service_account",
            "client_email": "gateway@project.test",
            "private_key_id": "k1",
            "private_key": pem.decode(),
            "token_uri": token_url,
        }
    )
