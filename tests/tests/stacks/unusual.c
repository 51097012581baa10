// Closes connections from stacks of unusual shape.
//
// unusual PORT SHAPE: connects to the port, says so, waits for a line, and closes.
//   signal     in a signal handler
//   altstack   in a signal handler that has a stack of its own
//   coroutine  in a function that runs on memory from malloc(), after swapcontext()
//   edge       the same on memory that ends right after the stack
//   mappings   with 10,000 more mappings
//   code       with 10,000 more mappings of code
// unusual PORT SHAPE orders: for each line "go COUNT" that it reads, makes and closes so many connections each way.
// Those to PORT are closed by first(), and those to PORT + 1 by second(). The libraries make one connection a line.
//   threads    two threads
//   switching  two coroutines, which switch after each connection
//   libraries  a library that is loaded for the connection, and unloaded before the next (A and B name the two)
//   unloaded   the same, but it is unloaded at once
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <ucontext.h>
#include <unistd.h>

#define STACK (256 << 10)

static int port, fd, count;

static void must(int is_good, const char *what) {
    if (!is_good) {
        perror(what);
        exit(1);
    }
}

static int connected(int to) {
    struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(to)};
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int client = socket(AF_INET, SOCK_STREAM, 0);
    must(connect(client, (struct sockaddr *)&server, sizeof server) == 0, "connect");
    // A RST leaves no TIME_WAIT, so that there are enough ports.
    struct linger now = {1, 0};
    must(setsockopt(client, SOL_SOCKET, SO_LINGER, &now, sizeof now) == 0, "SO_LINGER");
    return client;
}

__attribute__((noinline)) int hang_up(int client) { return close(client) + 1; }

static void on_signal(int number) {
    volatile int kept = hang_up(fd);
    kept += number;
}

static __attribute__((noinline)) int handle(int flags) {
    stack_t stack = {.ss_sp = malloc(STACK), .ss_size = STACK};
    must(sigaltstack(&stack, NULL) == 0, "sigaltstack");
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = flags};
    must(sigaction(SIGUSR1, &action, NULL) == 0, "sigaction");
    // Unlike raise(), it makes the system call itself, without a tail call of which gdb would make a frame.
    return kill(getpid(), SIGUSR1) + 1;
}

static ucontext_t outside, inside[2];

static void body(void) {
    volatile int kept = hang_up(fd);
    kept++;
}

static void make_on(void *stack, ucontext_t *context, void (*function)(void)) {
    must(getcontext(context) == 0, "getcontext");
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = STACK;
    context->uc_link = &outside;
    makecontext(context, function, 0);
}

static void make(ucontext_t *context, void (*function)(void)) { make_on(malloc(STACK), context, function); }

static __attribute__((noinline)) int coroutine(void) {
    make(&inside[0], body);
    return swapcontext(&outside, &inside[0]) + 1;
}

static __attribute__((noinline)) int edge(void) {
    char *memory = mmap(NULL, 2 * STACK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(memory != MAP_FAILED && mprotect(memory, STACK, PROT_READ | PROT_WRITE) == 0, "mmap");
    make_on(memory, &inside[0], body);
    return swapcontext(&outside, &inside[0]) + 1;
}

static __attribute__((noinline)) int mapped(int protection) {
    for (int i = 0; i < 10000; i++) {
        // Each other page has another protection, so that none is merged with the next one.
        int of_page = i % 2 ? PROT_READ : protection;
        must(mmap(NULL, 4096, of_page, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED, "mmap");
    }
    return hang_up(fd) + 1;
}

__attribute__((noinline)) int first(void) { return hang_up(connected(port)) + 1; }
__attribute__((noinline)) int second(void) { return hang_up(connected(port + 1)) + 2; }

static void *first_thread(void *none) {
    for (int i = 0; i < count; i++)
        first();
    return none;
}

static void *second_thread(void *none) {
    for (int i = 0; i < count; i++)
        second();
    return none;
}

static void threads(void) {
    pthread_t one, other;
    must(pthread_create(&one, NULL, first_thread, NULL) == 0, "pthread_create");
    must(pthread_create(&other, NULL, second_thread, NULL) == 0, "pthread_create");
    pthread_join(one, NULL);
    pthread_join(other, NULL);
}

static void first_coroutine(void) {
    for (int i = 0; i < count; i++) {
        first();
        swapcontext(&inside[0], &inside[1]);
    }
}

static void second_coroutine(void) {
    for (int i = 0; i < count; i++) {
        second();
        swapcontext(&inside[1], &inside[0]);
    }
}

static void switching(void) {
    make(&inside[0], first_coroutine);
    make(&inside[1], second_coroutine);
    swapcontext(&outside, &inside[0]);
}

// Prints where the function is.
static void libraries(int at_once) {
    static void *library;
    static int number;
    if (library != NULL)
        dlclose(library);
    library = dlopen(getenv(number % 2 ? "B" : "A"), RTLD_NOW);
    must(library != NULL, "dlopen");
    int (*function)(int) = (int (*)(int))dlsym(library, number % 2 ? "second" : "first");
    must(function != NULL, "dlsym");
    function(connected(port + number % 2));
    number++;
    printf("%p ", (void *)function);
    if (at_once) {
        dlclose(library);
        library = NULL;
    }
}

int main(int argc, char **argv) {
    must(argc >= 3, "usage");
    const char *shape = argv[2];
    port = atoi(argv[1]);
    if (argc == 3)
        fd = connected(port);
    puts("connected");
    fflush(stdout);
    char line[80];
    volatile int sum = 0;
    while (fgets(line, sizeof line, stdin) != NULL) {
        must(argc == 3 || sscanf(line, "go %d", &count) == 1, "an order");
        if (strcmp(shape, "signal") == 0)
            sum += handle(0);
        else if (strcmp(shape, "altstack") == 0)
            sum += handle(SA_ONSTACK);
        else if (strcmp(shape, "coroutine") == 0)
            sum += coroutine();
        else if (strcmp(shape, "edge") == 0)
            sum += edge();
        else if (strcmp(shape, "mappings") == 0)
            sum += mapped(PROT_READ | PROT_WRITE);
        else if (strcmp(shape, "code") == 0)
            sum += mapped(PROT_READ | PROT_EXEC);
        else if (strcmp(shape, "threads") == 0)
            threads();
        else if (strcmp(shape, "switching") == 0)
            switching();
        else if (strcmp(shape, "libraries") == 0)
            libraries(0);
        else if (strcmp(shape, "unloaded") == 0)
            libraries(1);
        puts("done");
        fflush(stdout);
    }
    return 0;
}
