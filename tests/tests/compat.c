/* A 32-bit program that ends a connection by system calls of its own table: `compat PORT CALL`. It needs no library. */

static long call(long number, long first, long second, long third) {
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "0"(number), "b"(first), "c"(second), "d"(third) : "memory");
    return result;
}

enum { EXIT = 1, READ = 3, CLOSE = 6, DUP2 = 63, SOCKETCALL = 102, SHUTDOWN = 373 };
enum { SYS_SOCKET = 1, SYS_CONNECT = 3, SYS_SHUTDOWN = 13 };

static int is(const char *text, const char *other) {
    while (*text && *text == *other) {
        text++, other++;
    }
    return *text == *other;
}

__attribute__((used)) void run(long *stack) {
    char **arguments = (char **)(stack + 1);
    unsigned port = 0;
    for (const char *digit = arguments[1]; *digit; digit++) {
        port = port * 10 + (unsigned)(*digit - '0');
    }
    struct {
        unsigned short family, port;
        unsigned char address[4], zero[8];
    } server = {2, (unsigned short)(port >> 8 | port << 8), {127, 0, 0, 1}, {0}};
    long of_socket[] = {2, 1, 0};
    long fd = call(SOCKETCALL, SYS_SOCKET, (long)of_socket, 0);
    long of_connect[] = {fd, (long)&server, sizeof server};
    if (fd < 0 || call(SOCKETCALL, SYS_CONNECT, (long)of_connect, 0) < 0) {
        call(EXIT, 1, 0, 0);
    }
    long of_shutdown[] = {fd, 1};
    if (is(arguments[2], "socketcall")) {
        call(SOCKETCALL, SYS_SHUTDOWN, (long)of_shutdown, 0);
    } else if (is(arguments[2], "shutdown")) {
        call(SHUTDOWN, fd, 1, 0);
    } else if (is(arguments[2], "dup2")) {
        call(DUP2, 0, fd, 0);
    } else {
        call(CLOSE, fd, 0, 0);
    }
    /* The server closes then, and the socket is over before this program is. */
    char byte;
    call(READ, fd, (long)&byte, 1);
    call(EXIT, 0, 0, 0);
}

__asm__(".globl _start\n_start: mov %esp, %eax\n push %eax\n call run\n");
