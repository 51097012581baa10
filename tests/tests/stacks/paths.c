// Closes connections from 243 different call paths that have the same instruction pointer, the same stack pointer and the
// same return address at the top of the stack: five levels, each one of three functions with frames of the same size.
//
// paths PORT: for each number that it reads, makes and closes so many connections. The path follows from the client's
// port, so that whoever sees the connection knows it.
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define LEVELS 5

// The frame pointer is not kept, and the result is used, so that no call is a jump.
static __attribute__((noinline)) int leaf(int fd) { return close(fd) + 1; }

static int descend(unsigned path, int levels, int fd);

#define STEP(name, number)                                                                        \
    static __attribute__((noinline)) int name(unsigned path, int levels, int fd) {                \
        volatile int kept = number;                                                               \
        return descend(path / 3, levels - 1, fd) + kept;                                          \
    }
STEP(first, 1)
STEP(second, 2)
STEP(third, 3)

static inline __attribute__((always_inline)) int descend(unsigned path, int levels, int fd) {
    if (levels == 0)
        return leaf(fd);
    switch (path % 3) {
    case 0: return first(path, levels, fd) + 1;
    case 1: return second(path, levels, fd) + 2;
    default: return third(path, levels, fd) + 3;
    }
}

static void must(int is_good, const char *what) {
    if (!is_good) {
        perror(what);
        exit(1);
    }
}

static __attribute__((noinline)) int one(int listener, const struct sockaddr_in *server) {
    int client = socket(AF_INET, SOCK_STREAM, 0);
    must(connect(client, (const struct sockaddr *)server, sizeof *server) == 0, "connect");
    int accepted = accept(listener, NULL, NULL);
    must(accepted >= 0, "accept");
    struct sockaddr_in own;
    socklen_t length = sizeof own;
    must(getsockname(client, (struct sockaddr *)&own, &length) == 0, "getsockname");
    // A RST leaves no TIME_WAIT, so that there are enough ports.
    struct linger now = {1, 0};
    must(setsockopt(client, SOL_SOCKET, SO_LINGER, &now, sizeof now) == 0, "SO_LINGER");
    int result = descend(ntohs(own.sin_port) % 243, LEVELS, client);
    return close(accepted) + result;
}

int main(int argc, char **argv) {
    must(argc == 2, "usage: paths PORT");
    struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    must(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0, "SO_REUSEADDR");
    must(bind(listener, (struct sockaddr *)&server, sizeof server) == 0, "bind");
    must(listen(listener, 16) == 0, "listen");
    int sum = 0, count;
    while (scanf("%d", &count) == 1) {
        for (; count > 0; count--)
            sum += one(listener, &server);
        printf("done %d\n", sum);
        fflush(stdout);
    }
    return 0;
}
