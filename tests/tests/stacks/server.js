// Closes each connection once it has received something. Before that, prints the frames that V8 itself shows, and
// which connection it is. With --expose-gc it calls a new function for each connection, collects garbage after the
// close, and lets other functions take the place of those that were moved.
const net = require("net");
const vm = require("vm");

Error.stackTraceLimit = Infinity;

let count = 0;
let kept = [];

function say(socket) {
  // The first two lines are no frames of the caller.
  console.log(JSON.stringify([socket.remotePort, new Error().stack.split("\n").slice(2)]));
}

function newFunction() {
  const source = `(function number${++count}(socket, then) { then(socket); })`;
  return vm.runInThisContext(source, { filename: "number.js" });
}

function collect() {
  const others = [(it) => [it], () => kept, function other() {}, () => others];
  for (let round = 0; round < 3; round++) {
    gc({ type: (count + round) % 8 ? "minor" : "major" });
    // New objects of functions, which begin at different distances from a multiple of their size.
    kept = Array.from({ length: 1000 + count % 8 }, (_, index) => [() => index, (it) => others[it]]);
  }
}

function hangUp(socket) {
  // Both calls are in one line, as V8 shows the first and tcpclose the second.
  say(socket); socket._handle.close();
  if (globalThis.gc) collect();
}

class Server {
  takes(socket) {
    const then = globalThis.gc ? newFunction() : (it, then) => then(it);
    [socket].forEach((it) => then(it, hangUp));
  }
}

const server = net.createServer((socket) => {
  socket.on("data", function onData() {
    new Server().takes(socket);
  });
});
server.listen(Number(process.argv[2]), "127.0.0.1", () => console.log("ready"));
