// A just-in-time compiler of the smallest kind: closes a connection from a function that it has compiled to
// anonymous memory, and ends at once. The function keeps a frame pointer, as those of V8 do; its only name is in
// /tmp/perf-PID.map.
//
// jit PORT early|late: the map is written before it connects, or after that. Waits for a line before it closes.
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#if defined(__x86_64__)
// push %rbp; mov %rsp,%rbp; call *%rsi; pop %rbp; ret
static const unsigned char code[] = {0x55, 0x48, 0x89, 0xe5, 0xff, 0xd6, 0x5d, 0xc3};
#elif defined(__aarch64__)
// stp x29,x30,[sp,#-16]!; mov x29,sp; blr x1; ldp x29,x30,[sp],#16; ret
static const unsigned char code[] = {0xfd, 0x7b, 0xbf, 0xa9, 0xfd, 0x03, 0x00, 0x91, 0x20, 0x00,
                                     0x3f, 0xd6, 0xfd, 0x7b, 0xc1, 0xa8, 0xc0, 0x03, 0x5f, 0xd6};
#endif

static void *compiled;

static void write_map(void) {
    char path[64];
    snprintf(path, sizeof path, "/tmp/perf-%d.map", getpid());
    FILE *map = fopen(path, "w");
    if (map == NULL) {
        perror(path);
        exit(1);
    }
    fprintf(map, "%lx %zx hangUp /app/server.js:12\n", (unsigned long)compiled, sizeof code);
    fclose(map);
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    int early = strcmp(argv[2], "early") == 0;
    compiled = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(compiled, code, sizeof code);
    mprotect(compiled, 4096, PROT_READ | PROT_EXEC);
    __builtin___clear_cache((char *)compiled, (char *)compiled + sizeof code);
    if (early)
        write_map();
    struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&server, sizeof server) != 0) {
        perror("connect");
        return 1;
    }
    puts("connected");
    fflush(stdout);
    getchar();
    if (!early)
        write_map();
    ((int (*)(int, int (*)(int)))compiled)(fd, close);
    _exit(0);
}
