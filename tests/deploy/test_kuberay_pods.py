"""What the cluster's pods may do, and where they write."""

from __future__ import annotations

import re

import pytest

from service.cluster import OBJECT_STORE_BYTES
from tests.deploy.kubernetes import (
    KUBERAY,
    VARIANTS,
    pod_templates,
    ray_containers,
    ray_service,
    rendered,
)
from tests.deploy.monitoring import ROOT

DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def cluster(request):
    return ray_service(request.param)["rayClusterConfig"]


def test_pods_meet_the_restricted_standard(cluster):
    """Kubernetes' Pod Security Standard that the namespace enforces."""
    for template in pod_templates(cluster):
        pod = template["securityContext"]
        assert pod["runAsNonRoot"]
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        # The user of the image, whose home and caches are its own.
        assert f"USER {pod['runAsUser']}:{pod['runAsGroup']}\n" in DOCKERFILE
        kinds = {kind for volume in template["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "persistentVolumeClaim"}
    contexts = [container["securityContext"] for container in ray_containers(cluster)]
    for context in (*contexts, cluster["autoscalerOptions"]["securityContext"]):
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"]
    (namespace,) = [one for one in rendered(KUBERAY) if one["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_what_is_written_to_is_a_volume(cluster):
    """Ray's sessions, and the caches that the image's variables name."""
    caches = re.findall(r"\w+_CACHE_DIR=(/\S+)", DOCKERFILE)
    assert len(caches) >= 2
    for template in pod_templates(cluster):
        (container,) = template["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) <= {volume["name"] for volume in template["volumes"]}
        assert "/tmp" in mounts
        for cache in caches:
            assert any(cache.startswith(path + "/") for path in mounts)


def test_rays_object_store_is_that_of_saccade_serve(cluster):
    """Kubernetes counts it as the container's memory, of which Ray would take 30%."""
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["rayStartParams"]["object-store-memory"] == str(OBJECT_STORE_BYTES)


def test_the_head_alone_asks_kubernetes(cluster):
    head, worker = pod_templates(cluster)
    assert worker["automountServiceAccountToken"] is False
    assert "automountServiceAccountToken" not in head
