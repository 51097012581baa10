"""A thousand processes with names that attack a terminal, JSON or metrics: `hostile.py PORT`.

Each process connects once to the port, on which nothing listens. It prints `done` at the end.
"""

import os
import random
import socket
import sys

PIECES = [
    b"\x1b[2J", b"\x1b]0;x\x07", b"\n", b"\r", b"\t", b"\x08", b"\x7f", b"\x9b31m", b"\xc2\x9b2J",
    b"\xff\xfe", b"\xe2\x80\xae", b'"', b"\\", b"{}", b"}\n", b",", b"\\u001b", b"%s", b"a", b"0", b" ", b"\xf0\x9f\x92\xa9"[:3],
]

port = int(sys.argv[1])
choice = random.Random(int(sys.argv[2]))
for number in range(1000):
    name = b"".join(choice.choice(PIECES) for _ in range(1 + number % 8))[:15]
    child = os.fork()
    if child == 0:
        with open("/proc/self/comm", "wb") as comm:
            comm.write(name.replace(b"\0", b"") or b"x")
        socket.socket().connect_ex(("127.0.0.1", port))
        os._exit(0)
    os.waitpid(child, 0)
print("done", flush=True)
