"""Who may talk to whom under the chart's NetworkPolicies, by Kubernetes' rules for them.

What a network plugin adds (a node may always reach its own pods, for probes) is not covered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from tests.support.deploy.chart import NAMESPACE, RELEASE, Manifest, find, manifests, pod_templates

OURS = {"app.kubernetes.io/name": "shannon", "app.kubernetes.io/instance": RELEASE}
GATEWAY_PORT, VALKEY_PORT = 8080, 6379
NAMED_PORTS = {"http": GATEWAY_PORT, "valkey": VALKEY_PORT}


@dataclass(frozen=True)
class Peer:
    """A pod, or an address outside the cluster."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = NAMESPACE
    address: str = ""


def ours(component: str) -> Peer:
    return Peer(OURS | {"app.kubernetes.io/component": component})


GATEWAY, VALKEY, TEST, WORKER, DOWNLOAD = map(ours, ("gateway", "valkey", "test", "worker", "download"))
STRANGER = Peer({"app": "stranger"})
INGRESS, PROMETHEUS, FLEET = Peer(namespace="ingress-nginx"), Peer(namespace="monitoring"), Peer(namespace="vllm")
HUB, METADATA, CLUSTER = Peer(address="18.164.174.23"), Peer(address="169.254.169.254"), Peer(address="10.96.0.1")


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(expression["key"]) in expression["values"] for expression in selector.get("matchExpressions", [])
    )


def _is(peer: Peer, rule: dict[str, Any]) -> bool:
    """Whether a peer of a rule is this one."""
    if "ipBlock" in rule:
        block = rule["ipBlock"]
        inside = peer.address and ip_address(peer.address) in ip_network(block["cidr"])
        return bool(inside) and not any(ip_address(peer.address) in ip_network(net) for net in block.get("except", []))
    if peer.address:
        return False
    if "namespaceSelector" in rule:
        in_namespace = _selects(rule["namespaceSelector"], {"kubernetes.io/metadata.name": peer.namespace})
    else:
        in_namespace = peer.namespace == NAMESPACE
    return in_namespace and _selects(rule.get("podSelector", {}), peer.labels)


def _allows(rules: list[dict[str, Any]], side: str, peer: Peer, port: int) -> bool:
    return any(
        (side not in rule or any(_is(peer, one) for one in rule[side]))
        and ("ports" not in rule or port in [NAMED_PORTS.get(p["port"], p["port"]) for p in rule["ports"]])
        for rule in rules
    )


def may(source: Peer, target: Peer, port: int, scenario: str, *settings: str) -> bool:
    """Tell whether `source` may open a connection to `target`: each end must allow it where a policy selects it."""
    policies = [m["spec"] for m in manifests(scenario, *settings) if m["kind"] == "NetworkPolicy"]
    for end, other, direction, side in ((source, target, "Egress", "to"), (target, source, "Ingress", "from")):
        binding = [
            policy
            for policy in policies
            if end.labels and end.namespace == NAMESPACE and _selects(policy["podSelector"], end.labels)
            if direction in policy["policyTypes"]
        ]
        if binding and not any(_allows(policy.get(direction.lower(), []), side, other, port) for policy in binding):
            return False
    return True


STRICT = "network-policy"


@pytest.mark.parametrize("client", [INGRESS, PROMETHEUS, TEST])
def test_clients_reach_the_gateway(client: Peer) -> None:
    assert may(client, GATEWAY, GATEWAY_PORT, STRICT)


@pytest.mark.parametrize("client", [STRANGER, VALKEY, FLEET])
def test_nobody_else_does(client: Peer) -> None:
    assert not may(client, GATEWAY, GATEWAY_PORT, STRICT)
    assert not may(client, VALKEY, VALKEY_PORT, STRICT)


def test_gateway_reaches_its_store_and_its_fleet() -> None:
    assert may(GATEWAY, VALKEY, VALKEY_PORT, STRICT)
    assert may(GATEWAY, FLEET, 8000, STRICT)
    assert may(GATEWAY, Peer(namespace="kube-system"), 53, STRICT)


@pytest.mark.parametrize("target", [HUB, METADATA, CLUSTER, STRANGER])
def test_gateway_reaches_nobody_else(target: Peer) -> None:
    assert not may(GATEWAY, target, 443, STRICT)


def test_valkey_goes_nowhere() -> None:
    assert not may(VALKEY, HUB, 443, STRICT)
    assert not may(VALKEY, Peer(namespace="kube-system"), 53, STRICT)


def test_agents_may_read_the_web_but_not_the_cluster() -> None:
    settings = ("networkPolicy.enabled=true",)

    assert may(GATEWAY, HUB, 443, "h100", *settings)
    assert not may(GATEWAY, METADATA, 80, "h100", *settings)
    assert not may(GATEWAY, CLUSTER, 443, "h100", *settings)
    assert may(STRANGER, GATEWAY, GATEWAY_PORT, "h100", *settings), "no clients are named: the key decides"
    assert not may(STRANGER, VALKEY, VALKEY_PORT, "h100", *settings)


def test_nodes_of_a_model_talk_on_any_port() -> None:
    settings = ("networkPolicy.enabled=true",)

    for source, target in ((GATEWAY, WORKER), (WORKER, GATEWAY), (WORKER, WORKER)):
        assert may(source, target, 29501, "multi-node", *settings)
        assert may(source, target, 43210, "multi-node", *settings)
    assert not may(STRANGER, WORKER, 29501, "multi-node", *settings)
    assert may(DOWNLOAD, HUB, 443, "multi-node", *settings)


def test_every_pod_is_under_a_policy() -> None:
    settings = ("networkPolicy.enabled=true",)
    found = manifests("multi-node", *settings)
    policies: list[Manifest] = [m["spec"] for m in found if m["kind"] == "NetworkPolicy"]
    for manifest in found:
        for name, template in pod_templates(manifest):
            labels = template["metadata"]["labels"]
            if labels["app.kubernetes.io/component"] != "test":
                assert any(_selects(policy["podSelector"], labels) for policy in policies), name


def test_ports_of_the_policies_are_those_of_the_services() -> None:
    assert find(STRICT, "Service")["spec"]["ports"][0]["targetPort"] == "http"
    assert find(STRICT, "Service", f"{RELEASE}-shannon-valkey")["spec"]["ports"][0]["port"] == VALKEY_PORT
