"""npm `oidc-provider`, the strict one: FAPI 2.0 profile, the issuer as a plain string, single-use `jti`."""

from .authorization_servers import OidcProvider
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
