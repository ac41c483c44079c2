"""Everything that a request may need, wired once by `gateway.app`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.inspector.base import Inspector
from engine.supervisor import SupervisedEngine
from gateway.access.address_limit import AddressLimit
from gateway.access.auth import Authenticator
from gateway.access.cache_salts import CacheSalts
from gateway.access.catalog import Catalog, ModelSpec
from gateway.access.keys import Keys
from gateway.access.ledger import Ledger
from gateway.access.limits import Limits
from gateway.clock import Clock
from gateway.conversations.live_responses import LiveResponses
from gateway.conversations.sessions import Sessions
from gateway.durable.jobs import Jobs
from gateway.durable.resumable import ResumableStreams
from gateway.exchange.bodies import Bodies
from gateway.exchange.drain import Drain
from gateway.images import Images
from gateway.settings.config import Config
from gateway.store.client import Store
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.tracing import Tracing
from gateway.tools.base import Toolbox


@dataclass(frozen=True, slots=True)
class Services:
    """Everything a route may need, wired once by `create_app`."""

    config: Config
    engines: Mapping[str, SupervisedEngine]
    catalog: Catalog
    authenticator: Authenticator
    keys: Keys
    limits: Limits
    ledger: Ledger
    sessions: Sessions
    responses: LiveResponses
    resumable: ResumableStreams
    jobs: Jobs
    images: Images
    bodies: Bodies
    cache_salts: CacheSalts
    tools: Toolbox
    store: Store
    metrics: Metrics
    tracing: Tracing
    drain: Drain
    inspector: Inspector | None
    """None where it is turned off."""
    address_limit: AddressLimit
    """Of the inspector's plain routes."""
    clock: Clock

    def tools_of(self, model: ModelSpec) -> Toolbox:
        """Return the tools that a model's agents may use."""
        allowed = model.settings.tools
        return self.tools if allowed is None else self.tools.only(allowed)
