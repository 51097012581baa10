// HTTP/2 clients that keep their connections: `http2_client.js PORT`. It prints `ready`. At each line
// `PATH` it connects, requests that path, and prints the status; the connections stay open until the server closes
// them.

const http2 = require("http2");
const sessions = [];

require("readline").createInterface({ input: process.stdin }).on("line", (path) => {
  const session = http2.connect(`http://127.0.0.1:${process.argv[2]}`);
  session.on("error", () => {});
  sessions.push(session);
  const request = session.request({ ":path": path });
  request.on("response", (headers) => {
    request.resume();
    request.on("end", () => console.log(headers[":status"]));
  });
  request.end();
});
console.log("ready");
