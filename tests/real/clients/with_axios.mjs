// An unmodified axios client: METHOD URL. It knows of no proxy and of no token.
import axios from 'axios';

const [method, url] = process.argv.slice(2);
const response = await axios({ method, url, validateStatus: () => true });
console.log(JSON.stringify({ status: response.status, body: response.data }));
