"""The cluster's manifests have the fields that Kubernetes and its operators know, and no others."""

from __future__ import annotations

import copy
import shutil
import subprocess

import pytest
import yaml

from tests.deploy.kubernetes import KUBERAY, VARIANTS, problems, rendered

ALL = {
    "gpu": (KUBERAY, ()),
    "gpu, own model": (KUBERAY, ("model",)),
    "cpu": (KUBERAY / "cpu", ()),
    "cpu, own model": (KUBERAY / "cpu", ("../model",)),
}
FREE = {"labels", "matchLabels", "rayStartParams", "requests", "limits", "stringData"}
"""Mappings whose keys are anybody's."""


def examples():
    return list(yaml.safe_load_all((KUBERAY / "secrets.example.yaml").read_text()))


@pytest.mark.parametrize("variant", ALL)
def test_manifests_are_valid(variant):
    documents = rendered(*ALL[variant])
    assert {document["kind"] for document in documents} >= {
        *("Namespace", "RayService", "NetworkPolicy", "PodDisruptionBudget"),
    }
    for document in documents:
        assert problems(document) == []


def test_the_secrets_example_is_valid():
    assert [problems(document) for document in examples()] == [[], []]


def keys(value, path=()):
    """Paths of the keys that a schema names, the first of each name below a kind."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            if key not in FREE:
                yield from keys(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from keys(inner, (*path, index))


def misspelt(document, path):
    changed = copy.deepcopy(document)
    place = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1] + "s"] = place.pop(path[-1])
    return changed


def test_a_misspelt_field_is_found():
    """Each field's name once in each kind of document; apiVersion and kind choose the schema."""
    tried = set()
    for document in [*rendered(KUBERAY, ("model",)), *rendered(KUBERAY / "cpu"), *examples()]:
        for path in keys(document):
            if (document["kind"], path[-1]) in tried or path in (("apiVersion",), ("kind",)):
                continue
            tried.add((document["kind"], path[-1]))
            assert problems(misspelt(document, path)), (document["kind"], path)
    assert len(tried) > 100


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("enableInTreeAutoscaling", "yes"),
        ("workerGroupSpecs.0.maxReplicas", "4"),
        ("headGroupSpec.rayStartParams.num-cpus", 0),
        ("workerGroupSpecs.0.template.spec.containers.0.ports.0.containerPort", "8000"),
        ("workerGroupSpecs.0.template.spec.containers.0.env.0.value", 1),
        ("autoscalerOptions.version", "v3"),
        ("authOptions.mode", "tokens"),
    ],
)
def test_a_value_of_another_type_is_found(path, value):
    (service,) = [one for one in rendered(KUBERAY) if one["kind"] == "RayService"]
    place = service["spec"]["rayClusterConfig"]
    *way, last = path.split(".")
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    assert last in place
    place[last] = value
    assert problems(service)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", VARIANTS.values(), ids=VARIANTS)
def test_the_tests_read_kustomizations_as_kubectl_does(folder):
    done = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, check=True
    )

    def by_name(documents):
        return {(one["kind"], one["metadata"]["name"]): one for one in documents}

    assert by_name(yaml.safe_load_all(done.stdout)) == by_name(rendered(folder))
