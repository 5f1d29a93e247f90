/* pixels (1 x 1 x 28 x 28) -> scores (1 x 10)
   Runs the network once, on zeros: put a sample into input. */
#include <zephyr/kernel.h>
#include <zephyr/sys/printk.h>
#include "digits.h"

static DIGITS_INPUT_TYPE input[DIGITS_INPUT_SIZE];
static DIGITS_OUTPUT_TYPE output[DIGITS_OUTPUT_SIZE];
static uint8_t arena[DIGITS_ARENA_BYTES + 1] __attribute__((aligned(8)));

int main(void)
{
    const uint32_t start = k_cycle_get_32();
    int best = 0;

    digits_run(input, output, arena);
    for (int i = 1; i < DIGITS_OUTPUT_SIZE; i++)
        if (output[i] > output[best])
            best = i;
    printk("%d after %u cycles\n", best, k_cycle_get_32() - start);
    return 0;
}
