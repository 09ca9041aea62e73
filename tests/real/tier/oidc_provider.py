"""npm `oidc-provider`, the strict one: FAPI 2.0 profile, the issuer as a plain string, single-use `jti`."""

from .authorization_servers import OidcProvider
from .cases import Cases, Server


class OidcProviderTest(Cases, Server):
    @classmethod
    def start_authorization_server(cls) -> OidcProvider:
        return OidcProvider(cls.directory, cls.certificates, cls.jwks)
