// What every origin of the tier does with a request: demand a bearer token, verify it, and say what arrived.

import { createRemoteJWKSet, jwtVerify } from 'jose';

// One event a line of standard output.
export const say = (event) => process.stdout.write(`${JSON.stringify(event)}\n`);

// All the values of a header, also where it came more than once: the joined form hides the second `Authorization`.
function headerValues(request, name) {
  const values = [];
  for (let index = 0; index < request.rawHeaders.length; index += 2) {
    if (request.rawHeaders[index].toLowerCase() === name) values.push(request.rawHeaders[index + 1]);
  }
  return values;
}

// Gives a function that verifies a request's token, whose `aud` must be `audience`, says what arrived, and gives both.
// Settings: `issuer` and `jwks_uri`, whose access tokens are accepted.
export function receiver(settings) {
  const jwks = createRemoteJWKSet(new URL(settings.jwks_uri));

  async function verify(token, audience) {
    try {
      const { payload, protectedHeader } = await jwtVerify(token, jwks, {
        issuer: settings.issuer,
        audience,
        requiredClaims: ['exp', 'jti'],
      });
      return { ok: true, payload, algorithm: protectedHeader.alg };
    } catch (error) {
      return { ok: false, cause: error.code ?? error.message };
    }
  }

  return async function receive(request, transport, audience) {
    const authorization = headerValues(request, 'authorization');
    const token = authorization.length === 1 ? /^Bearer (.+)$/.exec(authorization[0])?.[1] : undefined;
    const verified = token
      ? await verify(token, audience)
      : { ok: false, cause: `${authorization.length} authorization headers` };
    const seen = {
      event: 'request',
      transport,
      http_version: request.httpVersion,
      method: request.method,
      path: request.url,
      authority: request.headers[':authority'] ?? request.headers.host,
      user_agent: request.headers['user-agent'],
      header_names: [...new Set(request.rawHeaders.filter((_, index) => index % 2 === 0).map((name) => name.toLowerCase()))],
      authorization,
      caller_authorization_arrived: authorization.some((value) => value.includes('callers-own')),
      token,
      verified: verified.ok,
      cause: verified.cause,
      jti: verified.payload?.jti,
      client_id: verified.payload?.client_id ?? verified.payload?.azp,
    };
    say(seen);
    return { seen, verified };
  };
}

// Refuses what has no valid token (RFC 6750 section 3).
export function refuse(response, verified) {
  response.writeHead(401, { 'www-authenticate': 'Bearer error="invalid_token"', 'content-type': 'application/json' });
  return response.end(JSON.stringify({ error: 'invalid_token', cause: verified.cause }));
}
