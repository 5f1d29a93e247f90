/* Arm's semihosting calls, which QEMU serves on Arm and RISC-V alike; the caller defines host_call(operation, block). */
#include "harness.h"

enum { SYS_OPEN = 1, SYS_WRITE = 5, SYS_READ = 6, SYS_EXIT = 0x18 };

static unsigned length(const char *text)
{
    unsigned n = 0;
    while (text[n])
        n++;
    return n;
}

int host_open(const char *name, int write)
{
    const uintptr_t block[3] = {(uintptr_t)name, write ? 5 /* "wb" */ : 1 /* "rb" */, length(name)};
    return (int)host_call(SYS_OPEN, block);
}

int host_read(int file, void *to, unsigned bytes)
{
    const uintptr_t block[3] = {(uintptr_t)file, (uintptr_t)to, bytes};
    return host_call(SYS_READ, block) == 0; /* how many bytes were not read */
}

void host_write(int file, const void *from, unsigned bytes)
{
    const uintptr_t block[3] = {(uintptr_t)file, (uintptr_t)from, bytes};
    host_call(SYS_WRITE, block);
}
