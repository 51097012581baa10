// A library with the function NAME, which closes a descriptor. With OTHER it is at another place.
#include <unistd.h>

#ifdef OTHER
int OTHER(int fd) { return fd * fd + 7 / (fd + 1); }
#endif

int NAME(int fd) { return close(fd) + 1; }
