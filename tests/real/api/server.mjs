// The API that the tier's clients call: over http, over https with HTTP/1.1 and HTTP/2, and as a gRPC service over TLS.
//
// Usage: node server.mjs SETTINGS.json
//   certificate_file, key_file   PEM of this server
//   issuer, jwks_uri             whose access tokens are accepted
//   audience                     the `aud` that a token must have
//
// A valid bearer token is demanded of every request. The answer echoes what was verified and how the request arrived.
// Output: JSON, one event a line: {"event":"ready","http_port","https_port"}, then one {"event":"request",...} for each
// request received, refused ones included: what the origin saw. The token stands in it, so that the tier can search
// the clients for it: the output is the tier's alone.
//
// The gRPC service is `orders.v1.Orders` with messages in JSON: ListOrders (unary), WatchOrders (three messages),
// DeleteOrder (unary).

import { readFileSync } from 'node:fs';
import { createServer as createHttpServer } from 'node:http';
import { createSecureServer } from 'node:http2';
import { receiver, refuse, say } from './received.mjs';

const settings = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const receive = receiver(settings);

function echo({ seen, verified }) {
  const { payload } = verified;
  return {
    orders: [{ id: 7, item: 'tea' }],
    verified: {
      jti: payload.jti,
      sub: payload.sub,
      client_id: seen.client_id,
      scope: payload.scope,
      expires_in: payload.exp - Math.floor(Date.now() / 1000),
    },
    http_version: seen.http_version,
    transport: seen.transport,
    caller_authorization_arrived: seen.caller_authorization_arrived,
  };
}

async function answerHttp(request, response, transport) {
  const received = await receive(request, transport, settings.audience);
  request.resume();
  if (!received.verified.ok) return refuse(response, received.verified);
  response.writeHead(200, { 'content-type': 'application/json' });
  return response.end(JSON.stringify(echo(received)));
}

// A gRPC message: no compression, four bytes of length, the message.
function frame(value) {
  const message = Buffer.from(JSON.stringify(value));
  const head = Buffer.alloc(5);
  head.writeUInt32BE(message.length, 1);
  return Buffer.concat([head, message]);
}

async function answerGrpc(request, response) {
  const received = await receive(request, 'grpc', settings.audience);
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  const finish = (status, message) => {
    response.addTrailers({ 'grpc-status': String(status), 'grpc-message': encodeURIComponent(message) });
    response.end();
  };
  response.writeHead(200, { 'content-type': 'application/grpc' });
  if (!received.verified.ok) return finish(16, `invalid token: ${received.verified.cause}`);
  const answer = { ...echo(received), request: JSON.parse(Buffer.concat(chunks).subarray(5).toString() || 'null') };
  const messages = request.url === '/orders.v1.Orders/WatchOrders' ? [1, 2, 3] : [1];
  for (const sequence of messages) response.write(frame({ ...answer, sequence }));
  return finish(0, '');
}

const plain = createHttpServer((request, response) => answerHttp(request, response, 'http'));
const secure = createSecureServer(
  { cert: readFileSync(settings.certificate_file), key: readFileSync(settings.key_file), allowHTTP1: true },
  (request, response) =>
    request.httpVersion === '2.0' && (request.headers['content-type'] ?? '').startsWith('application/grpc')
      ? answerGrpc(request, response)
      : answerHttp(request, response, 'https'),
);
plain.listen(0, '127.0.0.1', () =>
  secure.listen(0, '127.0.0.1', () =>
    say({ event: 'ready', http_port: plain.address().port, https_port: secure.address().port })));
