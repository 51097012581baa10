/* A 32-bit program that ends a connection by system calls of its own table: `compat PORT CALL`. It needs no
   library, and does nothing without arguments. */

#ifdef __arm__
/* arch/arm/tools/syscall.tbl of the kernel. */
enum { EXIT = 1, READ = 3, CLOSE = 6, DUP2 = 63, SOCKET = 281, CONNECT = 283, SHUTDOWN = 293 };

static long call(long number, long first, long second, long third) {
    register long r0 __asm__("r0") = first;
    register long r1 __asm__("r1") = second;
    register long r2 __asm__("r2") = third;
    register long r7 __asm__("r7") = number;
    __asm__ volatile("svc 0" : "+r"(r0) : "r"(r1), "r"(r2), "r"(r7) : "memory");
    return r0;
}

__asm__(".globl _start\n_start: mov r0, sp\n bl run\n");
#else
/* arch/x86/entry/syscalls/syscall_32.tbl of the kernel. */
enum { EXIT = 1, READ = 3, CLOSE = 6, DUP2 = 63, SOCKETCALL = 102, SOCKET = 359, CONNECT = 362 };
enum { SHUTDOWN = 373, SYS_SHUTDOWN = 13 };

static long call(long number, long first, long second, long third) {
    long result;
    __asm__ volatile("int $0x80"
                     : "=a"(result)
                     : "0"(number), "b"(first), "c"(second), "d"(third)
                     : "memory");
    return result;
}

__asm__(".globl _start\n_start: mov %esp, %eax\n push %eax\n call run\n");
#endif

static int is(const char *text, const char *other) {
    while (*text && *text == *other) {
        text++, other++;
    }
    return *text == *other;
}

/* The number of arguments lies on the stack, and the arguments above it. */
__attribute__((used)) void run(long *stack) {
    char **arguments = (char **)(stack + 1);
    if (*stack < 3) {
        call(EXIT, 0, 0, 0);
    }
    unsigned port = 0;
    for (const char *digit = arguments[1]; *digit; digit++) {
        port = port * 10 + (unsigned)(*digit - '0');
    }
    struct {
        unsigned short family, port;
        unsigned char address[4], zero[8];
    } server = {2, (unsigned short)(port >> 8 | port << 8), {127, 0, 0, 1}, {0}};
    long fd = call(SOCKET, 2, 1, 0);
    if (fd < 0 || call(CONNECT, fd, (long)&server, sizeof server) < 0) {
        call(EXIT, 1, 0, 0);
    }
    if (is(arguments[2], "shutdown")) {
        call(SHUTDOWN, fd, 1, 0);
    } else if (is(arguments[2], "dup2")) {
        call(DUP2, 0, fd, 0);
#ifdef __i386__
    } else if (is(arguments[2], "socketcall")) {
        long of_shutdown[] = {fd, 1};
        call(SOCKETCALL, SYS_SHUTDOWN, (long)of_shutdown, 0);
#endif
    } else {
        call(CLOSE, fd, 0, 0);
    }
    /* The server closes then, and the socket is over before this program is. */
    char byte;
    call(READ, fd, (long)&byte, 1);
    call(EXIT, 0, 0, 0);
}
