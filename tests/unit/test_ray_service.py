"""`ballonet check` of a RayService: the config inside, and what around it has to agree with it."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import ray_service_check
from cluster.config import load
from engine.errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "deploy" / "kuberay.yaml"
CLUSTER = "spec.rayClusterConfig"
MODEL = "applications[0].args.llm_configs[0]"
Change = Callable[[dict[str, Any]], object]


def unchanged(_: dict[str, Any]) -> None:
    """No change."""


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., list[str]]:
    """The shipped manifest with changes: faults, or else notes. `inside` changes the Serve config."""

    def changed(around: Change = unchanged, inside: Change = unchanged) -> list[str]:
        manifest = copy.deepcopy(yaml.safe_load(SHIPPED.read_text()))  # its anchors are of one object
        serve = yaml.safe_load(manifest["spec"]["serveConfigV2"])
        inside(serve)
        manifest["spec"]["serveConfigV2"] = yaml.safe_dump(serve)
        manifest = yaml.load(yaml.dump(manifest, Dumper=_NoAliases), yaml.SafeLoader)
        around(manifest["spec"])
        path = tmp_path / "service.yaml"
        path.write_text(yaml.safe_dump_all([{"kind": "Secret"}, manifest]))
        try:
            return ray_service_check.check(path)[1]
        except ConfigError as error:
            head, *faults = str(error).splitlines()
            assert head == f"{path} has errors:"
            return [fault.strip() for fault in faults]

    return changed


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _llm(serve: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = serve["applications"][0]["args"]["llm_configs"][0]
    return found


def _workers(spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = spec["rayClusterConfig"]["workerGroupSpecs"][0]
    return found


def _container(group: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = group["template"]["spec"]["containers"][0]
    return found


def test_the_shipped_one_agrees_beside_other_documents(check: Callable[..., list[str]]) -> None:
    assert check() == []


def test_faults_of_the_config_are_found_in_the_manifest(check: Callable[..., list[str]]) -> None:
    faults = check(inside=lambda serve: _llm(serve)["engine_kwargs"].update(max_num_seq=3))
    assert faults == [
        f"spec.serveConfigV2.{MODEL}.engine_kwargs.max_num_seq: unknown key; did you mean max_num_seqs?"
    ]
    assert check(inside=lambda serve: serve.clear()) == ["spec.serveConfigV2.applications: is missing"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "spec.serveConfigV2: must be a Serve config as text"),
        ({"applications": []}, "spec.serveConfigV2: must be a Serve config as text"),
        ("a: b: c", "spec.serveConfigV2: is not YAML"),
        ("- 1", "spec.serveConfigV2: must be a mapping"),
    ],
)
def test_the_config_is_text(check: Callable[..., list[str]], text: object, fault: str) -> None:
    assert check(lambda spec: spec.update(serveConfigV2=text))[0].startswith(fault)


def test_the_version_is_that_of_the_ray_here(check: Callable[..., list[str]]) -> None:
    (fault,) = check(lambda spec: spec["rayClusterConfig"].update(rayVersion="2.9.0"))
    assert fault.startswith(f"{CLUSTER}.rayVersion: is '2.9.0', and the Ray here is")
    pinned = (SHIPPED.parents[1] / "constraints.txt").read_text()
    shipped = yaml.safe_load(SHIPPED.read_text())["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"\nray=={shipped}\n" in pinned
    assert shipped == importlib.metadata.version("ray")


@pytest.mark.parametrize(
    ("around", "inside", "lacks"),
    [
        (lambda spec: _workers(spec).update(replicas=1), unchanged, "there: 1; no room for 1 of qwen3-8b"),
        (lambda spec: spec["rayClusterConfig"].pop("workerGroupSpecs"), unchanged, "there: none"),
        (
            unchanged,
            lambda serve: _llm(serve)["engine_kwargs"].update(tensor_parallel_size=2),
            "2 x 2 on one node; there: 1 + 1; no room for 2 of qwen3-8b",
        ),
    ],
)
def test_the_pods_have_the_gpus(
    check: Callable[..., list[str]], around: Change, inside: Change, lacks: str
) -> None:
    (fault,) = check(around, inside)
    assert fault.startswith(f"{CLUSTER}.workerGroupSpecs: GPUs asked for: qwen3-8b ")
    assert lacks in fault


def test_pods_that_an_autoscaler_adds_count(check: Callable[..., list[str]]) -> None:
    def grow(spec: dict[str, Any]) -> None:
        spec["rayClusterConfig"]["enableInTreeAutoscaling"] = True
        _workers(spec).update(replicas=0, minReplicas=0, maxReplicas=2)

    assert check(grow) == []


def test_gpus_may_be_told_to_ray_and_pods_come_in_hosts(check: Callable[..., list[str]]) -> None:
    def one_of_two_hosts(spec: dict[str, Any]) -> None:
        _workers(spec).update(replicas=1, numOfHosts=2, rayStartParams={"num-gpus": "1"})
        del _container(_workers(spec))["resources"]

    assert check(one_of_two_hosts) == []


def test_auto_is_refused_where_gpus_join_later(check: Callable[..., list[str]]) -> None:
    (fault,) = check(inside=lambda serve: _llm(serve)["engine_kwargs"].update(device="auto"))
    assert fault.startswith(f"spec.serveConfigV2.{MODEL}.engine_kwargs.device: auto would be the CPU")


def test_ports_and_host_agree(check: Callable[..., list[str]]) -> None:
    (fault,) = check(inside=lambda serve: serve["http_options"].update(host="127.0.0.1"))
    assert fault.startswith("spec.serveConfigV2.http_options.host: 127.0.0.1 is open to the pod alone")
    faults = check(inside=lambda serve: serve["http_options"].update(port=9000))
    assert [fault.partition(":")[0] for fault in faults] == [
        f"{CLUSTER}.headGroupSpec",
        f"{CLUSTER}.workerGroupSpecs[0]",
    ]
    (fault,) = check(lambda spec: _container(spec["rayClusterConfig"]["headGroupSpec"]).pop("ports"))
    assert "names no port serve" in fault
    assert check(lambda spec: _container(_workers(spec)).pop("ports")) == []  # KubeRay probes 8000 then


def test_pods_are_alike(check: Callable[..., list[str]]) -> None:
    where = f"{CLUSTER}.workerGroupSpecs[0]"
    (fault,) = check(lambda spec: _container(_workers(spec)).update(image="other"))
    assert fault.startswith(f"{where}: runs the image 'other'")

    def differ(spec: dict[str, Any]) -> None:
        env = _container(_workers(spec))["env"]
        del env[2]
        env[-1]["value"] = "7"
        env.append({"name": "EXTRA", "value": "1"})

    assert check(differ) == [
        f"{where}: the environment's EXTRA is missing in the head group; both have to be alike",
        f"{where}: the environment's HF_TOKEN is missing here; both have to be alike",
        f"{where}: the environment's RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S differs from the head "
        "group's; both have to be alike",
    ]


def test_keys_come_from_the_pods_environment(
    check: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BALLONET_API_KEYS", raising=False)

    def without(spec: dict[str, Any]) -> None:
        for group in (spec["rayClusterConfig"]["headGroupSpec"], _workers(spec)):
            del _container(group)["env"][0]

    (fault,) = check(without)
    assert "api_keys_env: the environment variable BALLONET_API_KEYS holds no key" in fault


def test_a_cluster_that_goes_before_its_streams_is_worth_a_note(check: Callable[..., list[str]]) -> None:
    (note,) = check(lambda spec: spec.pop("rayClusterDeletionDelaySeconds"))
    assert note.startswith("spec.rayClusterDeletionDelaySeconds is 60: an upgrade cuts off what still runs")


def test_a_section_of_another_shape_is_one_that_is_not_there(check: Callable[..., list[str]]) -> None:
    def keyless(serve: dict[str, Any]) -> None:
        serve["applications"][0]["args"]["ingress"] = {}

    faults = check(
        lambda spec: spec.update(rayClusterConfig={"workerGroupSpecs": 3, "headGroupSpec": []}), keyless
    )
    assert [fault.partition(": ")[0] for fault in faults] == [
        f"{CLUSTER}.rayVersion",
        f"{CLUSTER}.headGroupSpec",
        f"{CLUSTER}.workerGroupSpecs",
    ]


def test_one_config_a_file(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text("kind: RayService\n---\nkind: RayService\n")
    with pytest.raises(ConfigError, match="holds 2 YAML documents, 2 of them a RayService"):
        load(path)
    path.write_text("applications: []\n---\napplications: []\n")
    with pytest.raises(ConfigError, match="holds 2 YAML documents, 0 of them"):
        load(path)
    path.write_text("---\napplications: []\n---\n")  # an empty document is none
    with pytest.raises(ConfigError, match="applications: must not be empty"):
        load(path)
