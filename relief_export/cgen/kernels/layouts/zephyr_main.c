/* {{ title }}
   Runs the network once, on zeros: put a sample into input. */
#include <zephyr/kernel.h>
#include <zephyr/sys/printk.h>
#include "{{ name }}.h"

static {{ upper }}_INPUT_TYPE input[{{ upper }}_INPUT_SIZE];
static {{ upper }}_OUTPUT_TYPE output[{{ upper }}_OUTPUT_SIZE];
static uint8_t arena[{{ upper }}_ARENA_BYTES + 1] __attribute__((aligned(8)));

int main(void)
{
    const uint32_t start = k_cycle_get_32();
    int best = 0;

    {{ name }}_run(input, output, arena);
    for (int i = 1; i < {{ upper }}_OUTPUT_SIZE; i++)
        if (output[i] > output[best])
            best = i;
    printk("%d after %u cycles\n", best, k_cycle_get_32() - start);
    return 0;
}
