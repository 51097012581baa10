// Closes a connection in a destructor that is inlined into the function that owns it.
#include <cerrno>
#include <arpa/inet.h>
#include <cstdio>
#include <cstdlib>
#include <sys/socket.h>
#include <unistd.h>

namespace pool {
class Connection {
  public:
    explicit Connection(int fd) : fd(fd) {}
    __attribute__((always_inline)) ~Connection() { hang_up(); }

  private:
    __attribute__((always_inline)) void hang_up() { close(fd); }
    int fd;
};

__attribute__((noinline)) int serve(int fd) {
    Connection connection(fd);
    int answer;
    // A debugger that attaches may interrupt the call.
    do {
        std::clearerr(stdin);
        answer = std::getchar();
    } while (answer == EOF && errno == EINTR);
    return answer;
}
} // namespace pool

int main(int argc, char **argv) {
    sockaddr_in server{};
    server.sin_family = AF_INET;
    server.sin_port = htons(std::atoi(argc > 1 ? argv[1] : "0"));
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, reinterpret_cast<sockaddr *>(&server), sizeof server) != 0) {
        std::perror("connect");
        return 1;
    }
    std::puts("connected");
    std::fflush(stdout);
    return pool::serve(fd) == 0;
}
