// Closes a connection from a known place: main > serve > hang_up > close. Waits for a line before it does.
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

__attribute__((noinline)) int hang_up(int fd) { return close(fd) + 1; }

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
