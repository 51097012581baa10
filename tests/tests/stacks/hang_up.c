// Closes a connection from a known place: main > serve > hang_up > close. Waits for a line before it does. With
// RING, its frame pointers form a ring then: the caller of serve seems to have the frame of hang_up.
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

__attribute__((noinline)) int hang_up(int fd) {
#ifdef RING
    // The word at a frame pointer is the caller's frame pointer, on x86-64 as on arm64.
    void **own = __builtin_frame_address(0);
    void *volatile *caller = *own;
    void *kept = *caller;
    *caller = own;
    int result = close(fd) + 1;
    *caller = kept;
    return result;
#else
    return close(fd) + 1;
#endif
}

__attribute__((noinline)) int serve(int fd, volatile int *kept) {
    int result = hang_up(fd);
    *kept = result;
    return result + 1;
}

int main(int argc, char **argv) {
    struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(atoi(argc > 1 ? argv[1] : "0"))};
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&server, sizeof server) != 0) {
        perror("connect");
        return 1;
    }
    puts("connected");
    fflush(stdout);
    getchar();
    volatile int kept = 0;
    return serve(fd, &kept) - 2;
}
