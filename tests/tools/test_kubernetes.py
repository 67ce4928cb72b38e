"""deploy/kubernetes/: valid by Kubernetes' own schemas, and true to what the programs understand."""

from __future__ import annotations

import json
import re
from typing import Any

import kubernetes_validate
import pytest
import yaml

from kvferry.adapters.vllm_settings import Settings
from kvferry.control.settings import Settings as DaemonSettings
from kvferry.tools.router.cli import router
from tests.daemon_process import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
MANIFESTS = [
    (name, manifest)
    for name in KUSTOMIZATION["resources"]
    for manifest in yaml.safe_load_all((FOLDER / name).read_text())
]
DEPLOYMENTS = {
    manifest["metadata"]["name"]: manifest
    for _, manifest in MANIFESTS
    if manifest["kind"] == "Deployment"
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


@pytest.mark.parametrize("name", sorted(DEPLOYMENTS))
def test_what_is_named_is_there(name: str) -> None:
    spec = DEPLOYMENTS[name]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == labels
    pod = spec["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for each in (*pod["containers"], *pod["initContainers"]):
        assert {mount["name"] for mount in each["volumeMounts"]} <= volumes
    main = container(DEPLOYMENTS[name])
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


@pytest.mark.parametrize(
    ("name", "role"), [("vllm-prefill", "kv_producer"), ("vllm-decode", "kv_consumer")]
)
def test_the_engines_settings_are_settings(
    name: str, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = container(DEPLOYMENTS[name])
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
    assert settings.keys == "/keys/engine.key"
    assert settings.daemon.startswith("tcp://kvferry-daemon:7717#")


def test_the_routers_flags_are_flags() -> None:
    flags = container(DEPLOYMENTS["kvferry-router"])["command"][2:]
    names = {flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in flags}
    assert names <= set(router.__annotations__)


def test_the_daemon_listens_where_its_service_leads() -> None:
    text = (ROOT / "deploy" / "Containerfile").read_text()
    bound = dict(re.findall(r"KVFERRY_DAEMON_(\w+)=\S*:(\d+)", text))
    ports = {
        port["name"]: port["containerPort"]
        for port in container(DEPLOYMENTS["kvferry-daemon"])["ports"]
    }
    assert ports == {
        "requests": int(bound["BIND"]),
        "changes": int(bound["PUBLISH"]),
        "http": int(bound["HTTP"]),
    }
    assert {name.lower() for name in bound} <= set(DaemonSettings.__struct_fields__)
