"""FastAPI dependencies of the routes: the app's services, and the caller's Principal."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import Depends, Request

from gateway.access.auth import Principal
from gateway.errors import AdminOnly
from gateway.services import Services

_CHECK_EVERY_S = 1.0
"""How old the last check of a key may be when its open stream is given more."""


async def services(request: Request) -> Services:
    """Return the app's services. A coroutine, because FastAPI sends plain functions through a thread pool."""
    services: Services = request.app.state.services
    return services


async def identify(request: Request, services: Services) -> Principal:
    """Return the caller, and note who it is for the access log. Raises what `Authenticator` raises."""
    principal = await services.authenticator.authenticate(request)
    request.state.key_id = principal.key_id
    request.state.tenant = principal.tenant
    return principal


async def authenticate(request: Request, services: Annotated[Services, Depends(services)]) -> Principal:
    """Return the caller, whose connection is from now on not closed to make room for another.

    Raises what `identify` raises, and Overloaded and RateLimitExceeded where there are too many connections.
    """
    principal = await identify(request, services)
    hold_connection = getattr(request.state, "hold_connection", None)
    if hold_connection is not None:  # it is there where the app runs in this product's own server
        hold_connection(principal.key_id)
    return principal


async def while_authenticated(
    chunks: AsyncGenerator[bytes, None], request: Request, services: Services
) -> AsyncGenerator[bytes, None]:
    """Pass on the pieces of an open stream while the key that opened it is valid.

    Raises what `Authenticator` raises. The key may have been revoked since, or rotated: then the rest may be for the
    holder of the new secret.
    """
    checked_at = time.monotonic()
    async with aclosing(chunks):
        async for chunk in chunks:
            if time.monotonic() - checked_at >= _CHECK_EVERY_S:
                await services.authenticator.authenticate(request)
                checked_at = time.monotonic()
            yield chunk


async def authenticate_admin(principal: Annotated[Principal, Depends(authenticate)]) -> Principal:
    """Return the caller if its key may administer. Raises AdminOnly."""
    if not principal.admin:
        raise AdminOnly("This needs an admin key.")
    return principal
