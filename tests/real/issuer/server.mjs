// An OpenID Connect issuer of workload tokens, shaped like that of a CI system: discovery, JWKS, and tokens on request.
//
// Usage: node server.mjs SETTINGS.json
//   certificate_file, key_file   PEM of this server
//   mint_secret                  who sends it in `x-mint-secret` may have any claims signed (the tier alone)
//
// POST /mint {claims, lifetime} answers a JWT with `iss`, `jti`, `iat`, `exp` set here.
// Output: JSON, one event a line: {"event":"ready","issuer":...}, {"event":"minted","jti","sub"}.

import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createServer } from 'node:https';
import { SignJWT, exportJWK, generateKeyPair } from 'jose';

const settings = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const say = (event) => process.stdout.write(`${JSON.stringify(event)}\n`);
const { privateKey, publicKey } = await generateKeyPair('RS256', { extractable: true });
const kid = randomUUID();
const jwks = { keys: [{ ...(await exportJWK(publicKey)), kid, alg: 'RS256', use: 'sig' }] };

async function mint(request) {
  let body = '';
  for await (const chunk of request) body += chunk;
  const { claims, lifetime } = JSON.parse(body);
  const now = Math.floor(Date.now() / 1000);
  const jti = randomUUID();
  say({ event: 'minted', jti, sub: claims.sub });
  return new SignJWT({ ...claims, jti })
    .setProtectedHeader({ alg: 'RS256', typ: 'JWT', kid })
    .setIssuer(issuer())
    .setIssuedAt(now)
    .setNotBefore(now)
    .setExpirationTime(now + lifetime)
    .sign(privateKey);
}

const server = createServer(
  { cert: readFileSync(settings.certificate_file), key: readFileSync(settings.key_file) },
  async (request, response) => {
    const answer = (status, body) => {
      response.writeHead(status, { 'content-type': 'application/json' });
      response.end(JSON.stringify(body));
    };
    if (request.url === '/.well-known/openid-configuration') {
      return answer(200, {
        issuer: issuer(),
        jwks_uri: `${issuer()}/jwks`,
        id_token_signing_alg_values_supported: ['RS256'],
        response_types_supported: ['id_token'],
        subject_types_supported: ['public'],
      });
    }
    if (request.url === '/jwks') return answer(200, jwks);
    if (request.url === '/mint' && request.headers['x-mint-secret'] === settings.mint_secret) {
      return answer(200, { token: await mint(request) });
    }
    return answer(404, { error: 'not_found' });
  },
);
const issuer = () => `https://localhost:${server.address().port}`;
server.listen(0, '127.0.0.1', () => say({ event: 'ready', issuer: issuer() }));
