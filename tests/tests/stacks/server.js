// Closes each connection once it has received something. First prints the frames that V8 itself shows at that
// moment.
const net = require("net");

Error.stackTraceLimit = Infinity;

function say() {
  // The first two lines are no frames of the caller.
  console.log(JSON.stringify(new Error().stack.split("\n").slice(2)));
}

function hangUp(socket) {
  say();
  socket._handle.close();
}

class Server {
  takes(socket) {
    [socket].forEach((it) => hangUp(it));
  }
}

const server = net.createServer((socket) => {
  socket.on("data", function onData() {
    new Server().takes(socket);
  });
});
server.listen(Number(process.argv[2]), "127.0.0.1", () => console.log("ready"));
