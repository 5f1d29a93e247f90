/* Runs a network over every sample in samples.bin and leaves, for each, its output and a count of instructions in
   results.bin; last comes the deepest stack. The files are the host's, read and written through the emulator. */
#include "harness.h"
#include NET_HEADER

#ifndef NET_INPUT_TYPE
#define NET_INPUT_TYPE float
#define NET_OUTPUT_TYPE float
#endif

static NET_INPUT_TYPE input[NET_INPUT_SIZE];
static NET_OUTPUT_TYPE output[NET_OUTPUT_SIZE];
static unsigned char arena[NET_ARENA_BYTES ? NET_ARENA_BYTES : 1] __attribute__((aligned(64)));

extern uint32_t stack_end[]; /* the lowest word, from the linker script */
enum { PAINT = 0x5AFEC0DE };

register uintptr_t stack_pointer __asm__("sp");

int main(void)
{
    const int samples = host_open("samples.bin", 0), results = host_open("results.bin", 1);
    uint64_t ticks;
    volatile uint32_t *lowest = stack_end;
    uint32_t deepest;

    /* The first sample runs once more for its stack alone, because the calls to the host have frames of their own. */
    host_read(host_open("samples.bin", 0), input, sizeof input);
    for (volatile uint32_t *word = stack_end; (uintptr_t)word < stack_pointer; word++)
        *word = PAINT;
    net_run(input, output, arena);
    while (*lowest == PAINT)
        lowest++;
    deepest = (uint32_t)(stack_pointer - (uintptr_t)lowest);
    while (host_read(samples, input, sizeof input)) {
        const uint64_t start = host_ticks();
        net_run(input, output, arena);
        ticks = host_ticks() - start;
        host_write(results, output, sizeof output);
        host_write(results, &ticks, sizeof ticks);
    }
    host_write(results, &deepest, sizeof deepest);
    return 0;
}
