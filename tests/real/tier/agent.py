"""The agent under test, its configuration and policies, and the clients that call through it."""

import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import re
import socket
import subprocess

from .authorization_servers import AUDIENCE, SCOPE
from .processes import AGENT, HERE, NODE, PYTHON, Certificates, Process, free_port

SECURE_HOST = "orders.example.test"
PLAIN_HOST = "plain.example.test"
WORKLOAD_CLIENT = "ci-acme-orders"
REPOSITORY = "730121"
BRANCH = "refs/heads/main"

# The same for every client: which policies permit, so that every other request is denied.
KERNEL_POLICIES = """
@id("reads-orders")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when {{
    principal has unix && principal.unix.uid == {uid} &&
    context has request && context.request.safe
}};

@id("lists-orders-by-grpc")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when {{
    principal has unix && principal.unix.uid == {uid} &&
    context has request && ["/orders.v1.Orders/ListOrders", "/orders.v1.Orders/WatchOrders"].contains(context.request.path)
}};
"""
PRESENTED_POLICIES = """
@id("main-branch-reads-orders")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when {{
    principal has ci.repository_id && principal.ci.repository_id == "{repository}" &&
    principal has ci.ref && principal.ci.ref == "{branch}" &&
    context has request && context.request.safe
}};

@id("main-branch-lists-orders-by-grpc")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when {{
    principal has ci.repository_id && principal.ci.repository_id == "{repository}" &&
    principal has ci.ref && principal.ci.ref == "{branch}" &&
    context has request && ["/orders.v1.Orders/ListOrders", "/orders.v1.Orders/WatchOrders"].contains(context.request.path)
}};

@id("main-branch-is-issued-tokens")
permit (principal, action == Action::"issue", resource == Credential::"orders-api")
when {{
    principal has ci.repository_id && principal.ci.repository_id == "{repository}" &&
    principal has ci.ref && principal.ci.ref == "{branch}"
}};
"""


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: pathlib.Path) -> None:
        super().__init__("localhost", timeout=5)
        self.path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(5)
        self.sock.connect(self.path)


@dataclasses.dataclass
class Surroundings:
    """What an agent's configuration refers to."""

    certificates: Certificates
    issuer: str
    api_http_port: int
    api_https_port: int


@dataclasses.dataclass
class Origin:
    """A destination of the agent's, on a loopback port, and the credential that requests to it get."""

    name: str
    host: str
    port: int
    credential: str
    scheme: str = "https"
    audience: str = AUDIENCE

    def destination(self, ca_file: pathlib.Path) -> str:
        trusted = f"\n    ca_file: {ca_file}" if self.scheme == "https" else ""
        return f"""  - name: {self.name}
    hosts: [{self.host}]
    scheme: {self.scheme}
    credentials: [{{name: {self.credential}}}]{trusted}
    connect_to: "127.0.0.1:{self.port}"
    allow_addresses: [127.0.0.0/8]"""


class Configuration:
    """One agent's configuration and policies, in a directory of their own."""

    def __init__(self, directory: pathlib.Path, surroundings: Surroundings, key_file: pathlib.Path | None, ci_issuer: str | None = None) -> None:
        self.directory = directory
        self.proxy_port = free_port()
        self.file = directory / "countersign.yaml"
        self.admin_socket = directory / "admin.sock"
        self.workload_api = directory / "api.sock"
        self.authority_file = directory / "ca.pem"
        self.trust_bundle = directory / "bundle.pem"
        self.audit = directory / "audit.jsonl"
        policies = directory / "policies"
        policies.mkdir(parents=True)
        for name, template in self.policies(key_file).items():
            (policies / name).write_text(template.format(uid=os.getuid(), repository=REPOSITORY, branch=BRANCH))
        self.file.write_text(self.text(surroundings, key_file, ci_issuer))

    def policies(self, key_file: pathlib.Path | None) -> dict[str, str]:
        return {"orders.cedar": KERNEL_POLICIES if key_file else PRESENTED_POLICIES}

    def origins(self, surroundings: Surroundings) -> list[Origin]:
        return [
            Origin("orders", SECURE_HOST, surroundings.api_https_port, "orders-api"),
            Origin("orders-in-clear", PLAIN_HOST, surroundings.api_http_port, "orders-api", "http"),
        ]

    def text(self, surroundings: Surroundings, key_file: pathlib.Path | None, ci_issuer: str | None) -> str:
        tier_ca = surroundings.certificates.authority_file
        if key_file:
            authentication = f"{{method: private_key_jwt, key_file: {key_file}, algorithm: ES256}}"
            client = "node-agent"
            attestors = "  unix: {}"
        else:
            # Keycloak names the client by the assertion's `sub`, and 26.5 refuses a `client_id` beside it.
            authentication = "{method: workload_assertion}"
            client = f"{WORKLOAD_CLIENT}\n    send_client_id: false"
            attestors = f"""  unix: {{}}
  oidc:
    issuers:
      - name: ci
        issuer: {ci_issuer}
        audiences: ["{surroundings.issuer}"]
        claims: {{repository_id: string, ref: string}}
        ca_file: {tier_ca}"""
        origins = self.origins(surroundings)
        audiences = {origin.credential: origin.audience for origin in origins}
        credentials = "\n".join(
            f"""  - name: {credential}
    type: oauth_client_credentials
    issuer: {surroundings.issuer}
    client_id: {client}
    client_authentication: {authentication}
    scopes: [{SCOPE}]
    resources: [{audience}]
    ca_file: {tier_ca}
    timeout: 60s"""
            for credential, audience in audiences.items()
        )
        destinations = "\n".join(origin.destination(tier_ca) for origin in origins)
        return f"""version: 1
listeners:
  - {{name: workloads, type: forward_proxy, bind: "127.0.0.1:{self.proxy_port}"}}
  - {{name: api, type: workload_api, bind: "unix:{self.workload_api}", access: {{mode: "0600"}}}}
attestors:
{attestors}
credentials:
{credentials}
destinations:
{destinations}
interception:
  ca: {{source: generated, state_directory: {self.directory / "ca"}}}
  ca_certificate_file: {self.authority_file}
  trust_bundle_file: {self.trust_bundle}
policies: {{directory: policies}}
audit:
  on_failure: degrade
  sinks: [{{type: file, path: {self.audit}}}]
telemetry: {{log: {{format: json, level: debug}}}}
admin: {{socket: {self.admin_socket}}}
"""


class Agent:
    """`countersign run`, ready, with a relay before its proxy that keeps what the clients sent."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.process = Process("agent", [AGENT, "run", "--config", configuration.file], configuration.directory)
        try:
            self.process.until(self.is_ready, 60)
            self.sent = configuration.directory / "clients-sent.bin"
            command = [PYTHON, HERE / "relay.py", str(configuration.proxy_port), self.sent]
            self.relay = Process("relay", command, configuration.directory)
            self.relay_port = self.relay.ready()["port"]
        except BaseException:
            self.process.stop()
            raise

    def is_ready(self) -> bool:
        connection = UnixConnection(self.configuration.admin_socket)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def logs(self) -> str:
        return self.process.output.read_text(errors="replace") + self.process.errors.read_text(errors="replace")

    def stop(self) -> None:
        self.relay.stop()
        self.process.stop()


@dataclasses.dataclass
class Client:
    """What a client printed, and what it held: its environment and arguments as the kernel had them."""

    returncode: int
    stdout: str
    stderr: str
    held: bytes

    def json(self) -> dict:
        try:
            return json.loads(self.stdout)
        except ValueError:
            raise AssertionError(f"the client ended with {self.returncode}: {self.stdout[-1500:]}{self.stderr[-1500:]}") from None


class Clients:
    """Runs unmodified clients with nothing but the usual proxy and CA variables."""

    def __init__(self, agent: Agent) -> None:
        proxy = f"http://127.0.0.1:{agent.relay_port}"
        bundle = str(agent.configuration.trust_bundle)
        self.environment = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "http_proxy": proxy,
            "https_proxy": proxy,
            "HTTP_PROXY": proxy,
            "HTTPS_PROXY": proxy,
            "CURL_CA_BUNDLE": bundle,
            "REQUESTS_CA_BUNDLE": bundle,
            "NODE_EXTRA_CA_CERTS": bundle,
            "NODE_USE_ENV_PROXY": "1",
            "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": bundle,
        }
        self.held = b""

    def run(self, *command) -> Client:
        arguments = [str(part) for part in command]
        process = subprocess.Popen(
            arguments, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        held = b"\0".join(argument.encode() for argument in arguments)
        held += b"\0".join(f"{name}={value}".encode() for name, value in self.environment.items())
        for file in ("environ", "cmdline"):
            # A client that has already ended has neither; what it was given stands above.
            with contextlib.suppress(ProcessLookupError):
                held += pathlib.Path("/proc", str(process.pid), file).read_bytes()
        stdout, stderr = process.communicate(timeout=60)
        self.held += held
        return Client(process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace"), held)

    def curl(self, method: str, url: str, *options: str) -> dict:
        """Gives status, HTTP version between curl and the agent, headers and the JSON body."""
        client = self.run("curl", "-sS", "-i", "-w", "\n%{http_code} %{http_version}", "-X", method, *options, url)
        if client.returncode != 0:
            raise AssertionError(f"curl ended with {client.returncode}: {client.stderr}")
        answer, _, written = client.stdout.rpartition("\n")
        status, version = written.split()
        # The answer to CONNECT comes first, with a head of its own.
        heads, _, body = answer.rpartition("\r\n\r\n")
        head = heads.split("\r\n\r\n")[-1]
        headers = dict(re.findall(r"(?m)^([\w-]+): *(.*?)\r?$", head))
        return {"status": int(status), "version": version, "headers": {name.lower(): value for name, value in headers.items()}, "body": json.loads(body)}

    def requests(self, method: str, url: str) -> dict:
        return self.run(PYTHON, HERE / "clients" / "with_requests.py", method, url).json()

    def fetch(self, method: str, url: str) -> dict:
        return self.run(NODE, HERE / "clients" / "with_fetch.mjs", method, url).json()

    def grpc(self, method: str) -> dict:
        return self.run(PYTHON, HERE / "clients" / "with_grpc.py", f"{SECURE_HOST}:443", method).json()
