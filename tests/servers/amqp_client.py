"""Clients of an AMQP broker that send heartbeats: `amqp_client.py PORT HEARTBEAT EVERY COUNT`.

They agree on a heartbeat of HEARTBEAT seconds. Each sends one every EVERY seconds from when it is connected,
which is not at the same time. It prints `ready` when all are. `close` closes the connections in order; `hush`
sends no more heartbeats. Any other order waits until the broker has ended all connections, as `hush` does.
"""

import socket
import struct
import sys
import threading
import time

HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"


class Client:
    def __init__(self, port, heartbeat, every):
        self.stream = socket.create_connection(("127.0.0.1", port))
        self.stream.sendall(b"AMQP\x00\x00\x09\x01")
        self.await_method(10, 10)
        self.send(10, 11, b"\0\0\0\0" + short("PLAIN") + long("\0guest\0guest") + short("en_US"))
        self.await_method(10, 30)
        self.send(10, 31, struct.pack(">HIH", 2047, 131072, heartbeat))
        self.send(10, 40, short("/") + short("") + b"\0")
        self.await_method(10, 41)
        self.hushed = threading.Event()
        threading.Thread(target=self.beat, args=(every,), daemon=True).start()

    def send(self, kind, method, arguments):
        body = struct.pack(">HH", kind, method) + arguments
        self.stream.sendall(struct.pack(">BHI", 1, 0, len(body)) + body + b"\xce")

    def read(self, length):
        data = b""
        while len(data) < length:
            more = self.stream.recv(length - len(data))
            if not more:
                raise ConnectionResetError
            data += more
        return data

    def await_method(self, kind, method):
        while True:
            of, _, length = struct.unpack(">BHI", self.read(7))
            body = self.read(length + 1)
            if of == 1 and struct.unpack(">HH", body[:4]) == (kind, method):
                return

    def beat(self, every):
        try:
            while not self.hushed.wait(every):
                self.stream.sendall(HEARTBEAT)
        except OSError:
            pass

    def close(self):
        self.hushed.set()
        self.send(10, 50, struct.pack(">H", 200) + short("") + b"\0\0\0\0")
        self.await_method(10, 51)
        self.stream.close()

    def is_ended(self):
        try:
            while True:
                self.read(1)
        except ConnectionResetError:
            self.stream.close()


def short(text):
    return bytes([len(text)]) + text.encode()


def long(text):
    return struct.pack(">I", len(text)) + text.encode()


port, heartbeat, every, count = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
clients = []
for _ in range(count):
    clients.append(Client(port, heartbeat, every))
    time.sleep(every / 3)
print("ready", flush=True)
for line in sys.stdin:
    if line.strip() == "hush":
        for client in clients:
            client.hushed.set()
    for client in clients:
        client.close() if line.strip() == "close" else client.is_ended()
    print("done", flush=True)
