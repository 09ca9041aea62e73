// The registries that the tier's programs install from, over https with HTTP/1.1 and HTTP/2: files as they lie under
// ROOT/HOST, and git's own smart HTTP (`git http-backend`) for repositories under ROOT/GIT_HOST.
//
// Usage: node server.mjs SETTINGS.json
//   certificate_file, key_file   PEM of this server
//   issuer, jwks_uri             whose access tokens are accepted
//   root                         a directory for each host
//   git_host                     the host whose directory holds bare repositories
//
// A valid bearer token whose `aud` is `https://HOST` is demanded of every request.
// Output: JSON, one event a line: {"event":"ready","port"}, then one {"event":"request",...} for each request received.

import { spawn } from 'node:child_process';
import { readFileSync, statSync } from 'node:fs';
import { createSecureServer } from 'node:http2';
import { join } from 'node:path';
import { receiver, refuse, say } from '../api/received.mjs';

const settings = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const receive = receiver(settings);

async function answer(request, response) {
  const authority = request.headers[':authority'] ?? request.headers.host;
  const { hostname, pathname, search } = new URL(request.url, `https://${authority}`);
  const { verified } = await receive(request, 'https', `https://${hostname}`);
  if (!verified.ok) return refuse(response, verified);
  // A URL's path has no `..` left in it.
  if (hostname === settings.git_host) return answerGit(request, response, pathname, search.slice(1));
  return answerFile(response, join(settings.root, hostname, pathname));
}

function answerFile(response, path) {
  const found = statSync(path, { throwIfNoEntry: false });
  const file = found?.isDirectory() ? join(path, 'index.html') : path;
  if (!statSync(file, { throwIfNoEntry: false })?.isFile()) {
    response.writeHead(404);
    return response.end();
  }
  response.writeHead(200, { 'content-type': file.endsWith('.html') ? 'text/html' : 'application/octet-stream' });
  return response.end(readFileSync(file));
}

// RFC 3875: what `git http-backend` reads of a request.
function answerGit(request, response, path, query) {
  const backend = spawn('git', ['http-backend'], {
    env: {
      PATH: process.env.PATH,
      GIT_PROJECT_ROOT: join(settings.root, settings.git_host),
      GIT_HTTP_EXPORT_ALL: '1',
      GIT_PROTOCOL: request.headers['git-protocol'] ?? '',
      PATH_INFO: path,
      QUERY_STRING: query,
      REQUEST_METHOD: request.method,
      CONTENT_TYPE: request.headers['content-type'] ?? '',
      HTTP_CONTENT_ENCODING: request.headers['content-encoding'] ?? '',
    },
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  request.pipe(backend.stdin);
  const chunks = [];
  backend.stdout.on('data', (chunk) => chunks.push(chunk));
  backend.on('close', () => {
    const output = Buffer.concat(chunks);
    const end = output.indexOf('\r\n\r\n');
    const fields = output.subarray(0, end).toString().split('\r\n').map((line) => line.split(/: */, 2));
    const { status, ...headers } = Object.fromEntries(fields.map(([name, value]) => [name.toLowerCase(), value]));
    response.writeHead(Number.parseInt(status ?? '200', 10), headers);
    response.end(output.subarray(end + 4));
  });
}

const server = createSecureServer(
  { cert: readFileSync(settings.certificate_file), key: readFileSync(settings.key_file), allowHTTP1: true },
  answer,
);
server.listen(0, '127.0.0.1', () => say({ event: 'ready', port: server.address().port }));
