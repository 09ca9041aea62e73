"""The units of `deploy/systemd` under a real systemd, installed as docs/install.md says, with a service that calls an API
all the while."""

import collections
import json
import pathlib
import shutil
import subprocess
import tempfile
import time
import unittest

from .authorization_servers import AUDIENCE, SCOPE
from .processes import AGENT, HERE, Certificates, Process, node_server

ROOT = HERE.parent.parent
CLIENT = "svc-orders.service"
API = "orders.example.com"
RESTARTS = 20

# Eight callers of a service's, each of whose calls makes a line: its status, or what went wrong.
CALLERS = """
import sys, threading, time, urllib.request
def call():
    while True:
        try:
            with urllib.request.urlopen(sys.argv[1], timeout=30) as answer:
                answer.read()
                said = str(answer.status)
        except Exception as error:
            said = repr(error)
        print(said, flush=True)
        time.sleep(0.02)
callers = [threading.Thread(target=call) for _ in range(8)]
[caller.start() for caller in callers]
"""
SERVICE = """
[Service]
ExecStart=/usr/bin/python3 /run/shared/callers.py {url}
Environment=HTTPS_PROXY=http://127.0.0.1:7523 SSL_CERT_FILE=/run/countersign/bundle.pem
StandardOutput=append:/run/shared/calls
DynamicUser=yes
"""


class Machine:
    """A machine of its own on this one, with this one's systemd and programs and an empty network."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.shared = directory / "shared"
        self.shared.mkdir()
        scratch = directory / "machine"
        scratch.mkdir()
        self.process = Process("machine", [HERE / "systemd" / "boot", scratch, self.shared], directory)
        self.first_process = self.process.until(self.find_first_process, 30)
        self.process.until(lambda: self.run("systemctl is-system-running --wait", check=False) == "running", 60)

    def find_first_process(self) -> int | None:
        """The systemd that `boot` became: the child of its child."""
        children = [self.process.process.pid]
        for _ in range(2):
            found = subprocess.run(["pgrep", "-P", ",".join(map(str, children))], capture_output=True, text=True)
            children = found.stdout.split()
            if not children:
                return None
        name = pathlib.Path(f"/proc/{children[0]}/comm").read_text().strip()
        return int(children[0]) if name == "systemd" else None

    def enter(self, *namespaces: str) -> list[str]:
        return ["nsenter", f"--target={self.first_process}", *namespaces]

    def run(self, script: str, check: bool = True) -> str:
        """Runs a script as root on the machine, and gives what it printed."""
        command = [*self.enter("--all"), "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-e"]
        finished = subprocess.run(command, input=script, capture_output=True, text=True, timeout=120)
        if check and finished.returncode:
            raise AssertionError(f"exit code {finished.returncode} of {script}: {finished.stdout}{finished.stderr}")
        return finished.stdout.strip()

    def server(self, name: str, settings: dict, environment: dict | None = None) -> Process:
        """Starts `NAME/server.mjs` in the machine's network."""
        return node_server(name, f"{name}/server.mjs", self.shared.parent, settings, environment, self.enter("--net"))


class SystemdTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        directory = tempfile.TemporaryDirectory(prefix="countersign-real-", ignore_cleanup_errors=True)
        cls.addClassCleanup(directory.cleanup)
        cls.directory = pathlib.Path(directory.name)
        cls.machine = Machine(cls.directory)
        cls.addClassCleanup(cls.machine.process.stop)
        cls.calls = cls.machine.shared / "calls"
        install, start = cls.commands_of_the_page()
        cls.machine.run(install)
        cls.start_servers()
        cls.configure()
        cls.doctor = cls.machine.run(start)
        (cls.machine.shared / "callers.py").write_text(CALLERS)
        service = SERVICE.format(url=f"https://{API}:{cls.api_port}/v1/orders")
        cls.machine.run(f"cat >/etc/systemd/system/orders.service <<'END'\n{service}\nEND\nsystemctl start orders")
        cls.until_served()

    @classmethod
    def commands_of_the_page(cls) -> list[str]:
        """What docs/install.md has its readers type, but for the build: in a clone, then in the end."""
        clone = cls.machine.shared / "clone"
        for part in ("deploy", "policies"):
            shutil.copytree(ROOT / part, clone / part)
        (clone / "deploy" / "build").write_text("#!/bin/sh\necho /run/shared/countersign\n")
        shutil.copy(AGENT, cls.machine.shared / "countersign")
        page = (ROOT / "docs" / "install.md").read_text()
        blocks = [block.partition("```")[0] for block in page.split("```sh\n")[1:]]
        return [f"cd /run/shared/clone\n{block}" for block in blocks]

    @classmethod
    def start_servers(cls) -> None:
        certificates = Certificates.make(cls.directory, ["localhost", API])
        jwks = json.loads(cls.machine.run("cat /etc/countersign/client.jwks"))
        clients = [{"client_id": CLIENT, "jwks": jwks, "scope": SCOPE}]
        settings = {**certificates.of_server(), "clients": clients, "resources": [AUDIENCE], "scope": SCOPE, "access_token_lifetime": 60}
        authorization_server = cls.machine.server("oidc-provider", settings)
        cls.addClassCleanup(authorization_server.stop)
        cls.issuer = authorization_server.ready()["issuer"]
        settings = {**certificates.of_server(), "issuer": cls.issuer, "jwks_uri": f"{cls.issuer}/jwks", "audience": AUDIENCE}
        api = cls.machine.server("api", settings, {"NODE_EXTRA_CA_CERTS": str(certificates.authority_file)})
        cls.addClassCleanup(api.stop)
        cls.api_port = api.ready()["https_port"]
        shutil.copy(certificates.authority_file, cls.machine.shared)
        # As some distributions have the files of name resolution: links to where something writes them.
        cls.machine.run(
            f"install -m 0644 /run/shared/tier-ca.pem /etc/countersign; mkdir /run/netconfig; mv /etc/hosts /run/netconfig/;"
            f"echo 127.0.0.1 {API} >>/run/netconfig/hosts; ln -s /run/netconfig/hosts /etc/hosts"
        )

    @classmethod
    def configure(cls) -> None:
        """The servers of the example are these."""
        trusted = "ca_file: tier-ca.pem\n    allow_addresses: [127.0.0.0/8]"
        cls.change("https://auth.example.com", f"{cls.issuer}\n    resources: [{AUDIENCE}]\n    {trusted}")
        cls.change(f"hosts: [{API}]", f"hosts: [{API}]\n    ports: [{cls.api_port}]\n    {trusted}")

    @classmethod
    def change(cls, old: str, new: str) -> None:
        """Saves the configuration with another text in the place of one."""
        file = cls.machine.shared / "agent.yaml"
        text = cls.machine.run("cat /etc/countersign/agent.yaml")
        assert old in text, text
        file.write_text(text.replace(old, new) + "\n")
        cls.machine.run("cp /run/shared/agent.yaml /etc/countersign/new.yaml; mv /etc/countersign/new.yaml /etc/countersign/agent.yaml")

    @classmethod
    def called(cls) -> list[str]:
        return cls.calls.read_text().splitlines() if cls.calls.exists() else []

    @classmethod
    def until_served(cls, times: int = 20) -> None:
        """Waits until so many more calls were served."""
        served = lambda: cls.called().count("200")
        wanted = served() + times
        cls.machine.process.until(lambda: served() >= wanted, 60)

    def property(self, name: str) -> str:
        return self.machine.run(f"systemctl show countersign --value --property={name}")

    def until(self, name: str, value: str) -> None:
        self.machine.process.until(lambda: self.property(name) == value, 60)

    def test_it_serves_once_installed(self) -> None:
        self.assertIn("nothing is wrong", self.doctor)
        self.assertEqual(self.property("StatusText").partition(";")[0], "serving")
        record = json.loads(self.machine.run("tail -n 1 /var/log/countersign/audit.jsonl"))
        self.assertIn("systemd.system_unit=orders.service", record["attributes_read"])

    def test_no_call_fails_while_it_is_restarted(self) -> None:
        before = len(self.called())
        for _ in range(RESTARTS):
            # So many in so short a time would come to the unit's start limit.
            self.machine.run("systemctl reset-failed countersign; systemctl restart countersign")
            self.until_served()
        said = collections.Counter(self.called()[before:])
        print(f"calls over {RESTARTS} restarts: {dict(said)}", end=" ", flush=True)
        self.assertEqual(set(said), {"200"})

    def test_systemd_starts_it_again_when_it_was_killed(self) -> None:
        former = self.property("MainPID")
        self.machine.run("systemctl kill --signal=KILL countersign")
        self.machine.process.until(lambda: self.property("MainPID") not in (former, "0"), 60)
        self.until_served()
        self.assertEqual(self.property("Result"), "success")

    def test_what_it_binds_is_kept_over_a_restart_and_given_up_with_its_listener(self) -> None:
        listener = '  - {name: more, type: forward_proxy, bind: "127.0.0.1:7999"}\n'
        self.change("attestors:", f"{listener}attestors:")
        self.until("NFileDescriptorStore", "1")
        self.machine.run("systemctl restart countersign")
        self.assertEqual(self.property("NFileDescriptorStore"), "1")
        self.machine.run("curl --silent --proxy http://127.0.0.1:7999 http://localhost/ --output /dev/null")
        self.change(listener, "")
        self.until("NFileDescriptorStore", "0")
        self.until_served()

    def test_a_port_that_another_process_has_is_waited_for(self) -> None:
        listener = f'  - {{name: more, type: forward_proxy, bind: "127.0.0.1:7998"}}\n'
        self.machine.run("systemd-run --unit=squatter python3 -m http.server --bind 127.0.0.1 7998")
        self.machine.process.until(lambda: self.machine.run("ss -ltn").count(":7998"), 30)
        self.change("attestors:", f"{listener}attestors:")
        self.machine.run("systemctl restart countersign", check=False)
        self.until("ExecMainStatus", "69")
        self.machine.run("systemctl stop squatter")
        self.until("SubState", "running")
        self.change(listener, "")
        self.until("NFileDescriptorStore", "0")
        self.until_served()

    def test_a_configuration_that_is_wrong_is_not_tried_again(self) -> None:
        self.change("version: 1", "version: 2")
        self.machine.run("systemctl reload countersign")
        self.until_served()
        self.machine.run("systemctl restart countersign", check=False)
        self.machine.process.until(lambda: self.machine.run("systemctl is-failed countersign.socket", check=False) == "failed", 60)
        self.assertEqual(self.property("ExecMainStatus"), "78")
        self.assertEqual(self.property("NRestarts"), "0")
        self.change("version: 2", "version: 1")
        self.machine.run("systemctl reset-failed; systemctl start countersign.socket countersign")
        self.until_served()
