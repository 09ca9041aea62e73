// A gRPC service in Protocol Buffers with reflection, over TLS: `stock.v1.Stock` of stock.proto, for clients that know
// nothing of it beforehand.
//
// Usage: node server.mjs SETTINGS.json
//   certificate_file, key_file   PEM of this server
//   issuer, jwks_uri             whose access tokens are accepted
//   audience                     the `aud` that a token must have
//
// A valid bearer token is demanded of every call, of those to the reflection service too.
// Output: JSON, one event a line: {"event":"ready","port"}, then one {"event":"request",...} for each call received.

import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';
import { ReflectionService } from '@grpc/reflection';
import { receiver, say } from '../api/received.mjs';

const settings = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const receive = receiver(settings);

// A call in the form in which the other origins receive requests.
function requestOf(method, call, metadata) {
  const headers = metadata.getMap();
  const rawHeaders = Object.keys(headers).flatMap((name) => metadata.get(name).flatMap((value) => [name, String(value)]));
  return { httpVersion: '2.0', method: 'POST', url: method.path, headers: { ...headers, host: call.getHost() }, rawHeaders };
}

const demandToken = (method, call) =>
  new grpc.ServerInterceptingCall(call, {
    start: (next) =>
      next({
        async onReceiveMetadata(metadata, pass) {
          const { seen, verified } = await receive(requestOf(method, call, metadata), 'grpc', settings.audience);
          if (!verified.ok) {
            return call.sendStatus({ code: grpc.status.UNAUTHENTICATED, details: `invalid token: ${verified.cause}` });
          }
          metadata.set('verified-jti', seen.jti);
          return pass(metadata);
        },
      }),
  });

const definition = loadSync(fileURLToPath(new URL('stock.proto', import.meta.url)));
const server = new grpc.Server({ interceptors: [demandToken] });
server.addService(grpc.loadPackageDefinition(definition).stock.v1.Stock.service, {
  listItems: (call, callback) => callback(null, { items: [{ id: 7, name: 'tea' }], jti: call.metadata.get('verified-jti')[0] }),
  deleteItem: (_call, callback) => callback(null, {}),
});
new ReflectionService(definition).addToServer(server);
const credentials = grpc.ServerCredentials.createSsl(null, [
  { cert_chain: readFileSync(settings.certificate_file), private_key: readFileSync(settings.key_file) },
]);
server.bindAsync('127.0.0.1:0', credentials, (error, port) => {
  if (error) throw error;
  say({ event: 'ready', port });
});
