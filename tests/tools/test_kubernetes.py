"""deploy/kubernetes/: valid by Kubernetes' own schemas, and true to what the programs understand."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml

from kvferry.adapters.vllm.settings import Settings
from kvferry.control.cluster.store import parse_store
from kvferry.control.daemon.settings import Settings as DaemonSettings
from kvferry.tools.router.cli import router
from tests import ROOT
from tests.support.requirements import need

FOLDER = ROOT / "deploy" / "kubernetes"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
MANIFESTS = [
    (name, manifest)
    for name in KUSTOMIZATION["resources"]
    for manifest in yaml.safe_load_all((FOLDER / name).read_text())
]
WORKLOADS = {
    manifest["metadata"]["name"]: manifest
    for _, manifest in MANIFESTS
    if manifest["kind"] in ("Deployment", "StatefulSet")
}
CONFIG = dict(
    literal.split("=", 1)
    for generator in KUSTOMIZATION["configMapGenerator"]
    for literal in generator["literals"]
)


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(only)


@pytest.mark.parametrize("version", ["1.30", "1.37"])
@pytest.mark.parametrize(
    "manifest", [pytest.param(m, id=f"{name}:{m['kind']}") for name, m in MANIFESTS]
)
def test_every_manifest_is_valid(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_a_wrong_manifest_is_not() -> None:
    wrong = json.loads(json.dumps(MANIFESTS[0][1]))
    wrong["spec"]["replica"] = wrong["spec"].pop("replicas")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


def test_every_file_is_applied() -> None:
    files = {path.name for path in FOLDER.glob("*.yaml")}
    assert files == {*KUSTOMIZATION["resources"], "kustomization.yaml"}


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_what_is_named_is_there(name: str) -> None:
    spec = WORKLOADS[name]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == labels
    pod = spec["template"]["spec"]
    volumes = {volume["name"] for volume in pod.get("volumes", ())}
    volumes |= {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", ())}
    for each in (*pod["containers"], *pod.get("initContainers", ())):
        assert {mount["name"] for mount in each["volumeMounts"]} <= volumes
    main = container(WORKLOADS[name])
    ports = {port["name"] for port in main["ports"]}
    probes = [main[probe] for probe in main if probe.endswith("Probe")]
    assert probes
    assert {probe["httpGet"]["port"] for probe in probes} <= ports
    (services,) = [
        [
            m["spec"]
            for _, m in MANIFESTS
            if m["kind"] == "Service" and m["spec"]["selector"] == labels
        ]
    ]
    for service in services:
        assert {port["targetPort"] for port in service["ports"]} <= ports
    maps = {source["configMapRef"]["name"] for source in main.get("envFrom", ())}
    assert maps <= {generator["name"] for generator in KUSTOMIZATION["configMapGenerator"]}


def test_a_pod_gets_its_own_key_alone_and_each_key_is_said_to_be_made() -> None:
    text = (FOLDER / "kustomization.yaml").read_text()
    keys = []
    for workload in WORKLOADS.values():
        for volume in workload["spec"]["template"]["spec"].get("volumes", ()):
            if "secret" in volume:
                own, allowed = [item["key"] for item in volume["secret"]["items"]]
                assert allowed == "allowed_keys"
                keys.append(own)
    assert len(keys) == len(set(keys)) == 4
    assert all(f"kvferry keys new {key.removesuffix('.key')} --role" in text for key in keys)


def pods_of(name: str, port: int) -> list[str]:
    """The addresses that a StatefulSet's pods have, whatever happens to them."""
    spec = WORKLOADS[name]["spec"]
    (service,) = [
        m["spec"]
        for _, m in MANIFESTS
        if m["kind"] == "Service" and m["metadata"]["name"] == spec["serviceName"]
    ]
    assert service["clusterIP"] == "None", "else its pods have no names"
    assert port in {each["port"] for each in service["ports"]}
    return [f"{name}-{n}.{spec['serviceName']}:{port}" for n in range(spec["replicas"])]


def test_agents_and_routers_know_all_daemons() -> None:
    addresses = [each.partition("#")[0] for each in CONFIG["KVFERRY_DAEMON"].split(",")]
    assert addresses == [f"tcp://{each}" for each in pods_of("kvferry-daemon", 7717)]
    assert len(addresses) >= 2


def test_the_daemons_know_all_servers_of_etcd() -> None:
    store = parse_store(CONFIG["KVFERRY_DAEMON_STORE"])
    found = [f"{host}:{port}" for host, port in store.endpoints]
    assert found == pods_of("kvferry-etcd", 2379)
    main = container(WORKLOADS["kvferry-daemon"])
    (publish,) = [e["value"] for e in main["env"] if e["name"] == "KVFERRY_DAEMON_PUBLISH"]
    assert publish == "tcp://$(POD_IP):7718"  # what others are told: no pod resolves another's name


def test_the_servers_of_etcd_know_each_other() -> None:
    flags = dict(each.removeprefix("--").split("=", 1) for each in etcd_command()[1:])
    members = dict(each.split("=", 1) for each in flags["initial-cluster"].split(","))
    assert list(members.values()) == [f"http://{each}" for each in pods_of("kvferry-etcd", 2380)]
    for pod, url in members.items():
        assert url == flags["initial-advertise-peer-urls"].replace("$(POD_NAME)", pod)
    known = subprocess.run([need("etcd"), "--help"], capture_output=True, text=True, check=True)
    assert all(f"--{flag} " in known.stdout for flag in flags)


def etcd_command() -> list[str]:
    command: list[str] = container(WORKLOADS["kvferry-etcd"])["command"]
    return command


@pytest.mark.parametrize(
    ("name", "role"), [("vllm-prefill", "kv_producer"), ("vllm-decode", "kv_consumer")]
)
def test_the_engines_settings_are_settings(
    name: str, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = container(WORKLOADS[name])
    (argument,) = [each for each in main["args"] if each.startswith("--kv-transfer-config=")]
    config = json.loads(argument.partition("=")[2])
    assert config["kv_connector"] == "KVFerryConnector"
    assert config["kv_role"] == role
    values = {each["name"]: each.get("value", "10.0.0.7") for each in main["env"]} | CONFIG
    for variable, value in values.items():
        monkeypatch.setenv(variable, value.replace("$(POD_IP)", "10.0.0.7"))
    settings = Settings.read(config.get("kv_connector_extra_config", {}))
    assert settings.host == "10.0.0.7"
    assert settings.service == "http://10.0.0.7:8000"
    assert settings.keys == f"/keys/{name.removeprefix('vllm-')}.key"
    assert settings.daemon == CONFIG["KVFERRY_DAEMON"]


def test_the_routers_flags_are_flags() -> None:
    flags = container(WORKLOADS["kvferry-router"])["command"][2:]
    names = {flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in flags}
    assert names <= set(router.__annotations__)


def test_the_daemon_listens_where_its_service_leads() -> None:
    text = (ROOT / "deploy" / "Containerfile").read_text()
    bound = dict(re.findall(r"KVFERRY_DAEMON_(\w+)=\S*:(\d+)", text))
    ports = {
        port["name"]: port["containerPort"]
        for port in container(WORKLOADS["kvferry-daemon"])["ports"]
    }
    assert ports == {
        "requests": int(bound["BIND"]),
        "changes": int(bound["PUBLISH"]),
        "http": int(bound["HTTP"]),
    }
    assert {name.lower() for name in bound} <= set(DaemonSettings.__struct_fields__)
