"""Promises of the internal authority, of the door's certificate, and of what roles make of them."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

from tests.certificates import Authority
from tests.conftest import Start
from tests.processes import wait_for
from tests.roles.rendering import File, render
from tests.roles.test_roles import ROOT, ansible

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

AUTHORITY = ROOT / "roles/llmrack_tls/files/authority.py"
SHOWN = ROOT / "roles/llmrack_tls/files/shown.py"
DOOR = ROOT / "roles/llmgate/files/door.py"
NAMES = ["localhost", "127.0.0.1", "gpu1.example.org"]


def run(program: Path, *arguments: str | Path, said: Any = None) -> subprocess.CompletedProcess[str]:
    given = json.dumps(said) if said is not None else ""
    return subprocess.run([sys.executable, program, *arguments], input=given, text=True, capture_output=True)


class Host:
    """A host: its key, and what it asks for."""

    def __init__(self, folder: Path, authority: Path, name: str = "gpu1") -> None:
        self.key, self.authority, self.name, self.certificate = folder / f"{name}.key", authority, name, ""
        self.new_key()

    def new_key(self) -> None:
        make = ["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(self.key)]
        subprocess.run(["openssl", *make], check=True, capture_output=True)

    def ask(self, days: int = 180, renew: int = 60, names: list[str] = NAMES) -> dict[str, Any]:
        ask = ["openssl", "req", "-new", "-key", str(self.key), "-subj", "/CN=anybody"]
        csr = subprocess.run(ask, check=True, capture_output=True, text=True).stdout
        # What Ansible reads comes without its last newline.
        request = {"name": self.name, "names": names, "csr": csr.strip(), "certificate": self.certificate.strip()}
        done = run(AUTHORITY, "sign", self.authority, f"--days={days}", f"--renew-days={renew}", said=request)
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        self.certificate = answer["certificate"]
        return answer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = run(AUTHORITY, "make", tmp_path / "ca")
    assert made.stdout == "made\n", made.stderr
    return tmp_path / "ca"


def test_the_authority_is_made_once_and_its_key_is_its_owners(folder: Path) -> None:
    before = (folder / "ca.key").read_bytes()
    assert run(AUTHORITY, "make", folder).stdout == "there\n"
    assert (folder / "ca.key").read_bytes() == before
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "ca.key").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in folder.iterdir()) == ["ca.crt", "ca.key"]


def test_a_check_says_that_it_would_be_made_and_makes_nothing(tmp_path: Path) -> None:
    assert run(AUTHORITY, "make", tmp_path / "ca", "--check").stdout == "made\n"
    assert not (tmp_path / "ca").exists()


def test_a_host_gets_what_the_inventory_says_of_it_and_openssl_believes_it(folder: Path, tmp_path: Path) -> None:
    host = Host(tmp_path, folder)
    answer = host.ask()
    assert answer["changed"] and answer["why"] == "it has none"
    signed = x509.load_pem_x509_certificate(host.certificate.encode())
    names = signed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "gpu1.example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert "anybody" not in signed.subject.rfc4514_string()
    (tmp_path / "host.crt").write_text(host.certificate)
    for purpose in ("sslserver", "sslclient"):
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", folder / "ca.crt"]
        verified = subprocess.run([*command, tmp_path / "host.crt"], text=True, capture_output=True)
        assert verified.returncode == 0, verified.stdout + verified.stderr


def test_a_good_certificate_stays(folder: Path, tmp_path: Path) -> None:
    host = Host(tmp_path, folder)
    first = host.ask()["certificate"]
    again = host.ask()
    assert not again["changed"] and again["certificate"] == first


def test_a_certificate_is_renewed_before_it_ends(folder: Path, tmp_path: Path) -> None:
    host = Host(tmp_path, folder)
    host.ask(days=61)
    assert not host.ask(renew=60)["changed"]
    answer = host.ask(renew=62, days=180)
    assert answer["changed"] and answer["why"].startswith("it ends on ")
    end = x509.load_pem_x509_certificate(host.certificate.encode()).not_valid_after_utc
    assert end > datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=179)


def test_a_certificate_is_replaced_when_it_is_not_for_this_host_any_more(folder: Path, tmp_path: Path) -> None:
    host = Host(tmp_path, folder)
    host.ask()
    assert host.ask(names=[*NAMES, "198.51.100.7"])["why"] == "its names or addresses have changed"
    host.new_key()
    assert host.ask(names=[*NAMES, "198.51.100.7"])["why"] == "its certificate is for another key"
    other = tmp_path / "other"
    run(AUTHORITY, "make", other)
    host.authority = other
    assert "authority" in host.ask()["why"]
    host.certificate = "torn -----BEGIN CERTIFICATE-----"
    assert host.ask()["why"] == "what it has is no certificate of this authority"


def test_an_authority_that_ends_itself_says_so(folder: Path, tmp_path: Path) -> None:
    host = Host(tmp_path, folder)
    with pytest.raises(AssertionError, match="the authority itself ends on"):
        host.ask(days=5000, renew=4000)


def test_an_authority_whose_key_is_anothers_signs_nothing(folder: Path, tmp_path: Path) -> None:
    run(AUTHORITY, "make", tmp_path / "other")
    (folder / "ca.key").write_bytes((tmp_path / "other/ca.key").read_bytes())
    with pytest.raises(AssertionError, match=r"ca\.key is not the key of ca\.crt"):
        Host(tmp_path, folder).ask()


def test_a_port_that_shows_another_certificate_is_told_from_one_that_does_not(start: Start, tmp_path: Path) -> None:
    fleet = Authority(tmp_path)
    own, other = fleet.issue("node"), fleet.issue("other")
    pair = ["--tls-cert-file", str(own.certificate), "--tls-key-file", str(own.key)]
    node = start("llmnode", "--backend", "fake", *pair, "--tls-client-ca-file", str(fleet.file))
    plain = start("llmnode", "--backend", "fake").ready()

    def said(port: int, file: Path) -> str:
        return run(SHOWN, "127.0.0.1", str(port), file).stdout.strip()

    wait_for(lambda: said(node.port, own.certificate) == "same", "the node's certificate")
    assert said(node.port, other.certificate) == "other"
    assert said(plain.port, own.certificate) == "none"


@pytest.mark.parametrize(
    ("certificate", "key", "complaint"),
    [
        ("own.crt", "own.key", ""),
        ("own.crt", "other.key", "llmgate_tls_key is not the key of llmgate_tls_certificate's first certificate"),
        ("own.key", "own.key", "llmgate_tls_certificate holds no certificate in PEM form"),
        ("own.crt", "own.crt", "llmgate_tls_key holds no private key in PEM form"),
        ("own.crt", "locked.key", "llmgate_tls_key has a passphrase"),
    ],
)
def test_a_door_that_could_not_open_is_refused_before_a_host_hears_of_it(
    tmp_path: Path, certificate: str, key: str, complaint: str
) -> None:
    authority = Authority(tmp_path)
    own = authority.issue("own")
    authority.issue("other")
    lock = ["openssl", "pkey", "-in", own.key, "-aes256", "-passout", "pass:secret", "-out", tmp_path / "locked.key"]
    subprocess.run(lock, check=True)
    given = {"certificate": (tmp_path / certificate).read_text(), "key": (tmp_path / key).read_text()}
    judged = run(DOOR, said=given)
    assert judged.returncode == (2 if complaint else 0)
    assert complaint in judged.stderr and "PRIVATE" not in judged.stderr


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a gate's files: nodes.toml, where node1 asks for certificates and node2 does not, and settings for
    each kind of door."""
    folder = tmp_path_factory.mktemp("gate")
    instance = [{"name": "a", "model": "m", "port": 8100}]
    nodes = {
        "node1": {"ansible_host": "192.0.2.1", "llmrack_tls_nodes": True, "llmnode_instances": instance},
        "node2": {"ansible_host": "192.0.2.2", "llmnode_instances": instance},
    }
    groups = {"llmgate": {"hosts": {"gate1": {}}}, "llmnode": {"hosts": nodes}}

    def file(template: str, to: str, **variables: Any) -> File:
        return File("llmgate", template, to, variables)

    def known(node1: str, node2: str) -> dict[str, str]:
        """The list that the gate had, with these URLs."""
        pairs = {"node1-a": node1, "node2-a": node2}.items()
        entries = (f'[[nodes]]\nname = "{name}"\nurl = "{url}"\n' for name, url in pairs)
        return {"/etc/llmrack/nodes.toml": "\n".join(entries)}

    half, plain = (known("http://192.0.2.1:8100", f"{scheme}://192.0.2.2:8100") for scheme in ("https", "http"))
    unwanted = {"llmgate_mutual_wanted": False}
    files = [
        file("nodes.toml", "nodes.toml"),
        file("nodes.toml", "switching.toml", llmgate_kept=half),
        file("nodes.toml", "moved.toml", llmgate_kept=known("http://192.0.2.9:8100", "https://192.0.2.2:8999")),
        *(file("llmgate.toml", f"{tls}.toml", llmgate_tls=tls) for tls in ("none", "given", "internal")),
        file("llmgate.toml", "unswitched.toml", llmgate_kept=half, **unwanted),
        file("llmgate.toml", "switched.toml", llmgate_kept=plain, **unwanted),
        file("llmgate.toml", "renewed.toml", llmgate_tls="internal", llmgate_certificates=["a new one"]),
    ]
    render(folder, files, inventory=groups, host="gate1", roles=["llmgate"])
    return folder


def urls(path: Path) -> list[str]:
    return [node["url"] for node in tomllib.loads(path.read_text())["nodes"]]


def test_gates_call_each_node_as_it_listens(written: Path) -> None:
    assert urls(written / "nodes.toml") == ["https://192.0.2.1:8100", "http://192.0.2.2:8100"]


def test_gates_call_a_node_that_they_know_as_before_until_the_roll_has_switched_it(written: Path) -> None:
    """And have the settings for certificates for as long as one needs them."""
    assert urls(written / "switching.toml") == ["http://192.0.2.1:8100", "https://192.0.2.2:8100"]
    assert urls(written / "moved.toml") == ["https://192.0.2.1:8100", "http://192.0.2.2:8100"]
    unswitched, switched = ((written / f"{name}.toml").read_text() for name in ("unswitched", "switched"))
    assert "node_ca_file" in unswitched and "node_ca_file" not in switched


@pytest.mark.parametrize(("tls", "door"), [("none", None), ("given", "door/tls"), ("internal", "tls/host")])
def test_the_gate_shows_the_certificate_that_the_inventory_asks_for(written: Path, tls: str, door: str | None) -> None:
    given = tomllib.loads((written / f"{tls}.toml").read_text())
    assert given.get("tls_cert_file") == (f"/etc/llmrack/{door}.crt" if door else None)
    assert given.get("tls_key_file") == (f"/etc/llmrack/{door}.key" if door else None)
    assert given["node_cert_file"] == "/etc/llmrack/tls/host.crt"
    assert given["node_ca_file"] == "/etc/llmrack/tls/ca.crt"


def test_a_new_certificate_makes_the_gates_file_another_so_that_it_is_reloaded(written: Path) -> None:
    assert (written / "renewed.toml").read_text() != (written / "internal.toml").read_text()


def test_preflight_refuses_a_pair_that_cannot_open_the_door(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    own, other = authority.issue("own"), authority.issue("other")
    given = {
        "llmgate_tls": "given",
        "llmgate_tls_certificate": own.certificate.read_text(),
        "llmgate_tls_key": other.key.read_text(),
    }
    task = {"ansible.builtin.include_role": {"name": "llmgate", "tasks_from": "preflight"}}
    play = {"hosts": "localhost", "gather_facts": False, "vars": given, "tasks": [task]}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    refused = ansible("ansible-playbook", "-i", "localhost,", "-c", "local", tmp_path / "play.yml")
    said = " ".join((refused.stdout + refused.stderr).split())
    assert refused.returncode != 0
    assert "llmgate_tls is given, and llmgate_tls_key is not the key of llmgate_tls_certificate's first" in said
    assert "PRIVATE" not in said
