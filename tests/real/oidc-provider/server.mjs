// npm `oidc-provider` in its FAPI 2.0 profile, over TLS, on a free loopback port.
//
// Usage: node server.mjs SETTINGS.json
//   certificate_file, key_file   PEM of this server
//   clients                      [{client_id, jwks, scope}], all with `private_key_jwt` and ES256
//   resources                    resource indicators (RFC 8707) that tokens may be asked for
//   scope                        the scopes that those resources know
//   access_token_lifetime        seconds
//
// Output: JSON, one event a line. First {"event":"ready","issuer":...}; then
// {"event":"issued","client_id","jti","scope","audience"} for each token and
// {"event":"refused","client_id","error","detail"} for each refusal. Never a token.

import { readFileSync } from 'node:fs';
import { createServer } from 'node:https';
import { generateKeyPair, exportJWK } from 'jose';
import Provider, { errors } from 'oidc-provider';

const settings = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const say = (event) => process.stdout.write(`${JSON.stringify(event)}\n`);

async function signingKey() {
  const { privateKey } = await generateKeyPair('ES256', { extractable: true });
  return { ...(await exportJWK(privateKey)), alg: 'ES256', use: 'sig', kid: 'server-1' };
}

function configuration(key) {
  return {
    jwks: { keys: [key] },
    clientAuthMethods: ['private_key_jwt'],
    // The only signing key is ES256, so the default of RS256 would make every client's metadata invalid.
    clientDefaults: { id_token_signed_response_alg: 'ES256' },
    clients: settings.clients.map((client) => ({
      ...client,
      grant_types: ['client_credentials'],
      redirect_uris: [],
      response_types: [],
      token_endpoint_auth_method: 'private_key_jwt',
      token_endpoint_auth_signing_alg: 'ES256',
    })),
    scopes: settings.scope.split(' '),
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      // FAPI 2.0 Security Profile section 5.3.2.1: the issuer as a string is the only audience of an assertion.
      fapi: { enabled: true, profile: '2.0' },
      resourceIndicators: {
        enabled: true,
        getResourceServerInfo(_context, resource) {
          if (!settings.resources.includes(resource)) throw new errors.InvalidTarget();
          return {
            scope: settings.scope,
            audience: resource,
            accessTokenFormat: 'jwt',
            accessTokenTTL: settings.access_token_lifetime,
            jwt: { sign: { alg: 'ES256' } },
          };
        },
      },
    },
    ttl: { ClientCredentials: settings.access_token_lifetime },
  };
}

const server = createServer({
  cert: readFileSync(settings.certificate_file),
  key: readFileSync(settings.key_file),
});
const key = await signingKey();
server.listen(0, '127.0.0.1', () => {
  const issuer = `https://localhost:${server.address().port}`;
  const provider = new Provider(issuer, configuration(key));
  provider.on('client_credentials.issued', (token) =>
    say({ event: 'issued', client_id: token.clientId, jti: token.jti, scope: token.scope, audience: token.aud }));
  provider.on('grant.error', (context, error) =>
    say({
      event: 'refused',
      client_id: context.oidc.params?.client_id ?? context.oidc.client?.clientId,
      error: error.error ?? error.name,
      detail: error.error_detail ?? error.error_description ?? error.message,
    }));
  provider.on('server_error', (_context, error) => say({ event: 'server_error', detail: error.stack }));
  server.on('request', provider.callback());
  say({ event: 'ready', issuer });
});
