/* What the emulated programs need of the machine they run on. */
#include <stdint.h>

int host_open(const char *name, int write);              /* a file in the emulator's folder */
int host_read(int file, void *to, unsigned bytes);       /* 1 where all bytes were there */
void host_write(int file, const void *from, unsigned bytes);
uint64_t host_ticks(void);                               /* grows with the instructions that were run */
