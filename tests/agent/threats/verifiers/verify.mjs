// Connects to NAME=PORT... on loopback, trusting one root: a line for each, `NAME ok` or what is wrong.
import { readFileSync } from 'node:fs';
import { connect } from 'node:tls';

const [root, ...pairs] = process.argv.slice(2);
const ca = readFileSync(root);
for (const pair of pairs) {
  const [servername, port] = pair.split('=');
  const said = await new Promise((resolve) => {
    const socket = connect({ host: '127.0.0.1', port, servername, ca });
    socket.on('secureConnect', () => resolve('ok')).on('error', (error) => resolve(`${error.code} ${error.message}`));
  });
  console.log(servername, said);
}
process.exit();
