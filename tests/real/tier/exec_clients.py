"""Clients as people have them, set up by `countersign exec` alone, before origins that demand tokens."""

import json
import os
import pathlib
import re
import subprocess
import tempfile

from . import packages
from .agent import PLAIN_HOST, SECURE_HOST, Agent, Client, Clients, Configuration, Origin
from .authorization_servers import NODE_CLIENT, OidcProvider
from .cases import PLAIN_ORDERS, SECURE_ORDERS, Server
from .processes import AGENT, CACHE, HERE, NODE, PYTHON

GRPC_HOST = "stock.example.test"
MORE_HOSTS = [*packages.HOSTS, GRPC_HOST]
# No destination covers it.
UNCOVERED_HOST = "elsewhere.example.test"
NODE_SERVERS = CACHE / "servers"
BUILT = CACHE / "clients"

# Each is given METHOD URL and prints status and body as JSON; curl prints the body, and then the status.
HTTP_CLIENTS = {
    "curl": ["curl", "-sS", "-w", "\n%{http_code}", "-X"],
    "requests": [PYTHON, HERE / "clients" / "with_requests.py"],
    "httpx": [PYTHON, HERE / "clients" / "with_httpx.py"],
    "fetch": ["node", NODE_SERVERS / "clients" / "with_fetch.mjs"],
    "axios": ["node", NODE_SERVERS / "clients" / "with_axios.mjs"],
    "net/http": [BUILT / "with_net_http"],
    "HttpClient": ["java", "-cp", BUILT, "WithHttpClient"],
}

# What each shows of a refused CONNECT: code and cause, or the status alone; grpcurl goes on trying for its 10 seconds.
SHOWN_OF_A_REFUSED_CONNECT = {
    **dict.fromkeys(HTTP_CLIENTS | {"pip": [], "npm": []}, "destination_not_configured: no destination is configured"),
    **dict.fromkeys(["curl", "git", "cargo"], "response 403"),
    "fetch": "Proxy response (403)",
    "HttpClient": "got: 403",
    "grpcurl": "deadline exceeded",
}

PACKAGES_POLICIES = """
@id("reads-packages")
permit (principal, action == Action::"inject", resource)
when {{
    [Credential::"git", Credential::"pypi", Credential::"npm", Credential::"crates"].contains(resource) &&
    principal has unix && principal.unix.uid == {uid} && context has request &&
    (context.request.safe || context.request.path == "/orders.git/git-upload-pack") &&
    (context.request.path like "/simple/*" || !(context.request.path like "*secretive*"))
}};

@id("lists-stock")
permit (principal, action == Action::"inject", resource == Credential::"stock")
when {{
    principal has unix && principal.unix.uid == {uid} && context has request &&
    (context.request.path == "/stock.v1.Stock/ListItems" || context.request.path like "/grpc.reflection.*")
}};
"""


class ExecConfiguration(Configuration):
    """An agent that also knows the registries and the gRPC service, each by a credential and an audience of its own."""

    def __init__(self, *arguments, ports: dict[str, int]) -> None:
        self.ports = ports
        super().__init__(*arguments)

    def policies(self, key_file: pathlib.Path | None) -> dict[str, str]:
        return {**super().policies(key_file), "packages.cedar": PACKAGES_POLICIES}

    def origins(self, surroundings) -> list[Origin]:
        names = {host: host.split(".")[0] for host in MORE_HOSTS}
        return super().origins(surroundings) + [
            Origin(name, host, self.ports[host], name, audience=f"https://{host}") for host, name in names.items()
        ]


class ExecClients(Clients):
    """Runs clients under `countersign exec`, each in an empty home directory; nothing else leads them to the agent."""

    # What the client was given, as the kernel has it, before it takes the shell's place.
    KEEP_AND_START = 'cat /proc/self/environ /proc/$$/cmdline >>"$HOME/held"; exec "$@"'

    def __init__(self, agent: Agent, directory: pathlib.Path) -> None:
        self.api = agent.configuration.workload_api
        self.directory = directory
        toolchain = subprocess.run(["rustc", "--print", "sysroot"], capture_output=True, text=True, check=True).stdout.strip()
        # The programs themselves: a shim of rustup's looks for its toolchains in the home directory.
        self.path = os.pathsep.join(
            [str(NODE.parent), str(NODE_SERVERS / "node_modules" / ".bin"), f"{toolchain}/bin", str(BUILT), os.environ["PATH"]]
        )
        self.held = b""
        self.environment = {}
        self.home = directory

    def run(self, *command) -> Client:
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="home-", dir=self.directory))
        self.environment = {"PATH": self.path, "LANG": "C.UTF-8", "HOME": str(self.home)}
        under_exec = [AGENT, "exec", "--agent", f"unix:{self.api}", "--", "sh", "-c", self.KEEP_AND_START, "sh", *command]
        client = super().run("env", f"--chdir={self.home}", *under_exec)
        self.held += (self.home / "held").read_bytes()
        return client

    def call(self, name: str, method: str, url: str) -> Client:
        return self.run(*HTTP_CLIENTS[name], method, url)

    # None asks again: how long a client goes on asking is not what is tested.

    def git(self, repository: str, host: str = packages.GIT_HOST) -> Client:
        return self.run("git", "clone", f"https://{host}/{repository}.git", "clone")

    def git_push(self) -> Client:
        script = """git clone --quiet "$1" clone && cd clone && git checkout --quiet -b other &&
            git -c user.name=tier -c user.email=tier@example.test commit --quiet --allow-empty --message more && git push origin other"""
        return self.run("sh", "-c", script, "sh", f"https://{packages.GIT_HOST}/orders.git")

    def pip(self, name: str, host: str = packages.PYPI_HOST, *more: str) -> Client:
        options = ["--no-cache-dir", "--disable-pip-version-check", "--retries", "0", *more]
        return self.run(
            PYTHON, "-m", "pip", "install", *options, "--target", "installed", "--index-url", f"https://{host}/simple/", name
        )

    def npm(self, name: str, host: str = packages.NPM_HOST) -> Client:
        """With the settings of a machine that has a certificate authority of its own: it is not the agent's."""
        script = """echo "cafile=$1" >.npmrc
            exec npm install --no-update-notifier --no-audit --fetch-retries 0 --registry "$2" "$3" """
        return self.run("sh", "-c", script, "sh", self.directory / "tier-ca.pem", f"https://{host}/", name)

    def cargo(self, name: str, host: str = packages.CRATES_HOST) -> Client:
        script = """mkdir -p package/src && cd package && touch src/lib.rs && printf '%s\\n' '[package]' 'name = "package"' \
            '[dependencies]' "$1 = { version = \\"1\\", registry = \\"tier\\" }" >Cargo.toml &&
            exec cargo fetch --config net.retry=0 --config "registries.tier.index='sparse+https://$2/index/'" """
        return self.run("sh", "-c", script, "sh", name, host)

    def grpcurl(self, method: str, host: str = GRPC_HOST) -> Client:
        return self.run("grpcurl", "-max-time", "20", f"{host}:443", f"stock.v1.Stock/{method}")


class ExecClientsTest(Server):
    """What each client does with a token, without one, and what it prints then."""

    host_names = [*Server.host_names, *MORE_HOSTS]

    @classmethod
    def start_authorization_server(cls) -> OidcProvider:
        audiences = [f"https://{host}" for host in [SECURE_HOST, *MORE_HOSTS]]
        return OidcProvider(cls.directory, cls.certificates, cls.jwks, audiences)

    @classmethod
    def start_more_origins(cls) -> None:
        root = cls.directory / "served"
        packages.publish(root)
        cls.registries = cls.start_origin("registries", {"root": str(root), "git_host": packages.GIT_HOST})
        cls.stock = cls.start_origin("grpc", {"audience": f"https://{GRPC_HOST}"})
        port = cls.registries.ready()["port"]
        cls.ports = {**dict.fromkeys(packages.HOSTS, port), GRPC_HOST: cls.stock.ready()["port"]}

    @classmethod
    def configure_agent(cls, directory: pathlib.Path, key_file: pathlib.Path) -> Configuration:
        return ExecConfiguration(directory, cls.surroundings, key_file, ports=cls.ports)

    @classmethod
    def clients_of(cls, agent: Agent) -> ExecClients:
        return ExecClients(agent, cls.directory)

    def setUp(self) -> None:
        self.forget()

    def received(self) -> list[dict]:
        """Every request that reached an origin."""
        return [
            {**event, "origin": origin.name, "number": number}
            for origin in (self.api, self.registries, self.stock)
            for number, event in enumerate(origin.events())
            if event["event"] == "request"
        ]

    def forget(self) -> None:
        self.known = {(event["origin"], event["number"]) for event in self.received()}

    def arrived(self) -> list[dict]:
        return [event for event in self.received() if (event["origin"], event["number"]) not in self.known]

    def assert_arrived(self, host: str, *paths: str) -> None:
        """These requests and no others, each with one token that the authorization server issued for this host."""
        arrived = self.arrived()
        self.assertEqual([event["path"].partition("?")[0] for event in arrived], list(paths))
        for event in arrived:
            self.assertTrue(event["verified"], event)
            self.assertEqual(len(event["authorization"]), 1)
            self.assert_issued(event["jti"], NODE_CLIENT)
            self.assertEqual(event["authority"].removesuffix(":443"), host)
            self.assertNotIn("proxy-authorization", event["header_names"])
        self.forget()

    def assert_says(self, client: Client, *words: str) -> None:
        self.assertNotEqual(client.returncode, 0, client.stdout)
        said = client.stdout + client.stderr
        for word in words:
            self.assertIn(word, said)

    def answer(self, name: str, method: str, url: str) -> dict:
        client = self.clients.call(name, method, url)
        if name != "curl":
            return client.json()
        body, _, status = client.stdout.rpartition("\n")
        return {"status": int(status), "body": json.loads(body)}

    def assert_calls_the_api(self, name: str) -> None:
        """A client that shows a response: served and denied, twice, over TLS and in clear."""
        for url, host in ((SECURE_ORDERS, SECURE_HOST), (PLAIN_ORDERS, PLAIN_HOST)):
            for _ in range(2):
                answer = self.answer(name, "GET", url)
                self.assertEqual(answer["status"], 200, answer)
                self.assertEqual([event["jti"] for event in self.arrived()], [answer["body"]["verified"]["jti"]])
                self.assert_arrived(host, "/v1/orders")
                self.assert_denied(self.answer(name, "DELETE", f"{url}/7"))

    def assert_installs(self, install, host: str, paths: list[str], file: str, paths_of_a_denial: tuple[str, ...] = ()) -> None:
        """A program that installs: served, denied, and served again."""
        for name in (packages.NAME, packages.FORBIDDEN, packages.NAME):
            client = install(name)
            if name == packages.FORBIDDEN:
                self.assert_says(client, "policy_denied", "no policy permits")
                self.assert_arrived(host, *paths_of_a_denial)
            else:
                self.assertEqual(client.returncode, 0, client.stderr)
                (found,) = self.clients.home.glob(file)
                self.assertIn(packages.CONTENT, found.read_text())
                self.assert_arrived(host, *paths)

    def test_curl(self) -> None:
        self.assert_calls_the_api("curl")

    def test_requests(self) -> None:
        self.assert_calls_the_api("requests")

    def test_httpx(self) -> None:
        self.assert_calls_the_api("httpx")

    def test_fetch(self) -> None:
        self.assert_calls_the_api("fetch")

    def test_axios(self) -> None:
        self.assert_calls_the_api("axios")

    def test_net_http(self) -> None:
        self.assert_calls_the_api("net/http")

    def test_http_client(self) -> None:
        self.assert_calls_the_api("HttpClient")

    def test_git(self) -> None:
        clone = lambda name: self.clients.git("orders" if name == packages.NAME else name)
        paths = ["/orders.git/info/refs", "/orders.git/git-upload-pack", "/orders.git/git-upload-pack"]
        self.assert_installs(clone, packages.GIT_HOST, paths, f"clone/{packages.NAME}")

    def test_git_push(self) -> None:
        """The refusal of what is sent to a repository is shown as its status."""
        self.assert_says(self.clients.git_push(), "HTTP 403")
        clone = ["/orders.git/info/refs", "/orders.git/git-upload-pack", "/orders.git/git-upload-pack"]
        self.assert_arrived(packages.GIT_HOST, *clone, "/orders.git/info/refs")
        self.assertEqual(self.clients.git("orders").returncode, 0)
        self.assert_arrived(packages.GIT_HOST, *clone)

    def test_pip(self) -> None:
        paths = [f"/simple/{packages.NAME}/", f"/files/{packages.NAME}-{packages.VERSION}-py3-none-any.whl"]
        self.assert_installs(self.clients.pip, packages.PYPI_HOST, paths, f"installed/{packages.NAME}.py", (f"/simple/{packages.FORBIDDEN}/",))

    def test_npm(self) -> None:
        paths = [f"/{packages.NAME}", f"/files/{packages.NAME}-{packages.VERSION}.tgz"]
        self.assert_installs(self.clients.npm, packages.NPM_HOST, paths, f"node_modules/{packages.NAME}/index.js")

    def test_cargo(self) -> None:
        index = f"/index/{packages.NAME[:2]}/{packages.NAME[2:4]}/{packages.NAME}"
        paths = ["/index/config.json", index, f"/crates/{packages.NAME}-{packages.VERSION}.crate"]
        file = f".cargo/registry/src/*/{packages.NAME}-{packages.VERSION}/src/lib.rs"
        self.assert_installs(self.clients.cargo, packages.CRATES_HOST, paths, file, ("/index/config.json",))

    def test_grpcurl(self) -> None:
        reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        for _ in range(2):
            listed = self.clients.grpcurl("ListItems")
            self.assertEqual(listed.json()["items"], [{"id": 7, "name": "tea"}], listed.stderr)
            self.assertEqual(self.arrived()[-1]["jti"], listed.json()["jti"])
            self.assert_arrived(GRPC_HOST, reflection, "/stock.v1.Stock/ListItems")
            self.assert_says(self.clients.grpcurl("DeleteItem"), "PermissionDenied", "policy_denied", "no policy permits")
            self.assert_arrived(GRPC_HOST, reflection)

    def of_every_client(self, clients: ExecClients) -> dict:
        """A good request of each, to the host that it is given."""
        api = lambda name: lambda host: clients.call(name, "GET", f"https://{host or SECURE_HOST}/v1/orders")
        return {
            **{name: api(name) for name in HTTP_CLIENTS},
            "git": lambda host: clients.git("orders", host or packages.GIT_HOST),
            # Of a page that it does not get pip says why only so.
            "pip": lambda host: clients.pip(packages.NAME, host or packages.PYPI_HOST, "-vv"),
            "npm": lambda host: clients.npm(packages.NAME, host or packages.NPM_HOST),
            "cargo": lambda host: clients.cargo(packages.NAME, host or packages.CRATES_HOST),
            "grpcurl": lambda host: clients.grpcurl("ListItems", host or GRPC_HOST),
        }

    def test_a_refused_connect(self) -> None:
        self.assertEqual(self.answer("curl", "GET", SECURE_ORDERS)["status"], 200)
        self.forget()
        clients = self.of_every_client(self.clients)
        self.assertEqual(set(clients), set(SHOWN_OF_A_REFUSED_CONNECT))
        for name, call in clients.items():
            with self.subTest(client=name):
                self.assert_says(call(UNCOVERED_HOST), SHOWN_OF_A_REFUSED_CONNECT[name])
                self.assertEqual(self.arrived(), [])
        self.assertEqual(self.answer("curl", "GET", SECURE_ORDERS)["status"], 200)

    def test_a_swapped_key(self) -> None:
        """With only the key of the agent swapped nothing arrives, and each client shows why: that the others are green says something."""
        self.assertEqual(self.answer("curl", "GET", SECURE_ORDERS)["status"], 200)
        self.forget()
        for name, call in self.of_every_client(self.clients_of_a_swapped_key()).items():
            with self.subTest(client=name):
                client = call(None)
                # pip asks again of every 502, though told not to, and then says no more.
                shown = "too many 502 error responses" if name == "pip" else "the authorization server answered `invalid_client`"
                self.assertIn(shown, client.stdout + client.stderr)
                self.assertEqual(self.arrived(), [])
        self.assertEqual(self.answer("curl", "GET", SECURE_ORDERS)["status"], 200)

    def test_zz_clients_held_no_secret(self) -> None:
        """Last by its name: what all clients were given, and what they left in their home directories."""
        self.assertEqual(self.answer("curl", "GET", SECURE_ORDERS)["status"], 200)
        tokens = {event["token"] for event in self.received()}
        known = {part.encode() for token in tokens for part in (token, token.rpartition(".")[2])}
        known |= {line.encode() for line in self.key_file.read_text().splitlines() if not line.startswith("-")}
        self.assertIn(b"NODE_USE_ENV_PROXY=1", self.clients.held)
        kept = [file.read_bytes() for file in self.directory.glob("home-*/**/*") if file.is_file()]
        for place in [self.clients.held, *kept]:
            for secret in known:
                self.assertNotIn(secret, place)
            self.assertIsNone(re.search(rb"eyJ[\w-]{10,}\.|PRIVATE KEY", place))
