"""npm `oidc-provider`, the strict one: FAPI 2.0 profile, the issuer as a plain string, single-use `jti`."""

import base64
import json
import secrets
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from .authorization_servers import AUDIENCE, NODE_CLIENT, SCOPE, OidcProvider
from .cases import Cases, Server
from .processes import AGENT


class OidcProviderTest(Cases, Server):
    @classmethod
    def start_authorization_server(cls) -> OidcProvider:
        return OidcProvider(cls.directory, cls.certificates, cls.jwks)

    def test_keys_jwks_prints_what_the_server_was_given(self) -> None:
        """The registered set was worked out without the agent, thumbprint included."""
        printed = self.clients.run(AGENT, "keys", "jwks", self.key_file)
        self.assertEqual(printed.json(), self.jwks, printed.stderr)

    def test_the_server_is_the_strict_one(self) -> None:
        """With the agent's key, but not by the agent: what the server refuses, so that the agent's tokens say something."""
        issuer = self.authorization_server.issuer
        good = self.assertion(issuer)
        self.assertEqual(self.token_request(good), 200)
        refused = {
            "the same `jti` again": good,
            "the issuer in a list": self.assertion([issuer]),
            "the issuer with a slash": self.assertion(f"{issuer}/"),
            "the token endpoint": self.assertion(f"{issuer}/token"),
            "no `jti`": self.assertion(issuer, jti=None),
            "expired": self.assertion(issuer, exp=int(time.time()) - 120),
            "by another issuer": self.assertion(issuer, iss="another"),
        }
        for name, assertion in refused.items():
            self.assertEqual(self.token_request(assertion), 401, name)
        self.assertEqual(self.token_request(self.assertion(issuer)), 200)

    def assertion(self, audience: str | list[str], **different) -> str:
        """A client assertion (RFC 7523 section 3), signed with the agent's key; a claim of `None` is left out."""
        now = int(time.time())
        claims = {"iss": NODE_CLIENT, "sub": NODE_CLIENT, "aud": audience, "jti": secrets.token_hex(), "iat": now, "exp": now + 60}
        claims = {name: value for name, value in {**claims, **different}.items() if value is not None}
        text = lambda data: base64.urlsafe_b64encode(data).rstrip(b"=").decode()
        signed = ".".join(text(json.dumps(part).encode()) for part in ({"alg": "ES256", "typ": "JWT"}, claims))
        key = serialization.load_pem_private_key(self.key_file.read_bytes(), None)
        r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{text(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def token_request(self, assertion: str) -> int:
        """The status that the server's token endpoint answers to a client that presents this assertion."""
        form = {
            "grant_type": "client_credentials",
            "client_id": NODE_CLIENT,
            "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
            "client_assertion": assertion,
            "scope": SCOPE,
            "resource": AUDIENCE,
        }
        trusted = ssl.create_default_context(cafile=self.certificates.authority_file)
        body = urllib.parse.urlencode(form).encode()
        try:
            with urllib.request.urlopen(f"{self.authorization_server.issuer}/token", body, 10, context=trusted) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code
