"""Who reaches the cluster's pods over the network: the policies, read as Kubernetes reads them."""

from __future__ import annotations

import pytest

from tests.deploy.kubernetes import KUBERAY, ray_service, rendered

OURS = {"kubernetes.io/metadata.name": "saccade"}
HEAD = {"app.kubernetes.io/part-of": "saccade", "ray.io/node-type": "head"}
WORKER = {"app.kubernetes.io/part-of": "saccade", "ray.io/node-type": "worker"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
RAY_PORTS = (8265, 6379, 10001, 52365, 8080, 40000)
"""Dashboard, GCS, client, agent, metrics, and one of those that Ray draws."""


def policies():
    return [one["spec"] for one in rendered(KUBERAY) if one["kind"] == "NetworkPolicy"]


def selects(selector, labels):
    assert set(selector) <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def is_peer(peer, pod, namespace):
    """A peer without namespaceSelector is one of the policy's own namespace."""
    assert set(peer) <= {"podSelector", "namespaceSelector"}
    if "namespaceSelector" in peer:
        inside = selects(peer["namespaceSelector"], namespace)
    else:
        inside = namespace == OURS
    return inside and selects(peer.get("podSelector", {}), pod)


def allows(direction, pod, other, namespace, port, protocol="TCP"):
    """Whether the policies let `pod` be reached by, or reach, `other` of `namespace`."""
    applying = [
        policy
        for policy in policies()
        if direction.capitalize() in policy["policyTypes"] and selects(policy["podSelector"], pod)
    ]
    if not applying:
        return True
    rules = [rule for policy in applying for rule in policy[direction]]
    peers = "from" if direction == "ingress" else "to"
    return any(
        (peers not in rule or any(is_peer(peer, other, namespace) for peer in rule[peers]))
        and ("ports" not in rule or {"port": port, "protocol": protocol} in rule["ports"])
        for rule in rules
    )


@pytest.mark.parametrize("pod", [HEAD, WORKER], ids=["head", "worker"])
@pytest.mark.parametrize(
    ("other", "namespace", "ports"),
    [
        ({}, OURS, ()),
        ({}, {"kubernetes.io/metadata.name": "elsewhere"}, ()),
        ({"saccade-client": "true"}, OURS, (8000,)),
        # The label of a pod counts in the service's namespace alone, that of a namespace for all.
        ({"saccade-client": "true"}, {"kubernetes.io/metadata.name": "elsewhere"}, ()),
        ({}, {"saccade-client": "true"}, (8000,)),
        (
            {"app.kubernetes.io/name": "prometheus"},
            {"kubernetes.io/metadata.name": "monitoring"},
            (8000,),
        ),
        (OPERATOR, {"kubernetes.io/metadata.name": "kuberay-system"}, (8265,)),
        (OPERATOR, {"kubernetes.io/metadata.name": "elsewhere"}, ()),
        ({}, {"kubernetes.io/metadata.name": "kuberay-system"}, ()),
        # Whoever calls a pod of another namespace as Ray's are called.
        (WORKER, {"kubernetes.io/metadata.name": "elsewhere"}, ()),
        (HEAD, OURS, (8000, *RAY_PORTS)),
        (WORKER, OURS, (8000, *RAY_PORTS)),
    ],
)
def test_who_reaches_which_port(pod, other, namespace, ports):
    tried = (8000, *RAY_PORTS)
    assert tuple(port for port in tried if allows("ingress", pod, other, namespace, port)) == ports


def test_workers_reach_rays_pods_and_names_and_nothing_else():
    elsewhere = {"kubernetes.io/metadata.name": "kube-system"}
    assert allows("egress", WORKER, HEAD, OURS, 6379)
    assert allows("egress", WORKER, WORKER, OURS, 40000)
    assert allows("egress", WORKER, {"k8s-app": "kube-dns"}, elsewhere, 53, "UDP")
    assert not allows("egress", WORKER, {}, elsewhere, 443)
    assert not allows("egress", WORKER, {}, OURS, 6379)
    # The head's autoscaler asks Kubernetes' API server.
    assert allows("egress", HEAD, {}, elsewhere, 443)


def test_policies_and_budgets_select_the_pods():
    """By labels that the templates or KubeRay set."""
    cluster = ray_service(KUBERAY)["rayClusterConfig"]
    groups = {"head": cluster["headGroupSpec"], "worker": cluster["workerGroupSpecs"][0]}
    pods = {
        kind: group["template"]["metadata"]["labels"] | {"ray.io/node-type": kind}
        for kind, group in groups.items()
    }
    assert pods == {"head": HEAD, "worker": WORKER}
    for policy in policies():
        assert any(selects(policy["podSelector"], pod) for pod in pods.values())
    budgets = [one["spec"] for one in rendered(KUBERAY) if one["kind"] == "PodDisruptionBudget"]
    for pod in pods.values():
        (budget,) = [one for one in budgets if selects(one["selector"], pod)]
        # Kubernetes takes nothing else for pods whose controller has no scale subresource.
        assert budget == {"minAvailable": 1, "selector": budget["selector"]}


def test_templates_leave_the_operators_labels_alone():
    """KubeRay's service for the head selects by labels that a template could overwrite."""
    cluster = ray_service(KUBERAY)["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        labels = group["template"]["metadata"]["labels"]
        assert not {"app.kubernetes.io/name", "app.kubernetes.io/created-by"} & set(labels)
        assert not any(label.startswith("ray.io/") for label in labels)


def test_nothing_is_exposed_beside_what_the_operator_makes():
    """No service, ingress, host port or host network of ours."""
    documents = rendered(KUBERAY)
    assert not {one["kind"] for one in documents} & {"Service", "Ingress", "Gateway", "HTTPRoute"}
    text = repr(documents)
    for word in ("hostPort", "hostNetwork", "NodePort", "LoadBalancer", "enableIngress"):
        assert word not in text
