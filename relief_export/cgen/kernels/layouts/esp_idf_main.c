/* {{ title }}
   Runs the network once, on zeros: put a sample into input. */
#include <inttypes.h>
#include <stdio.h>
#include "esp_timer.h"
#include "{{ name }}.h"

static {{ upper }}_INPUT_TYPE input[{{ upper }}_INPUT_SIZE];
static {{ upper }}_OUTPUT_TYPE output[{{ upper }}_OUTPUT_SIZE];
static uint8_t arena[{{ upper }}_ARENA_BYTES + 1] __attribute__((aligned(8)));

void app_main(void)
{
    const int64_t start = esp_timer_get_time();
    int best = 0;

    {{ name }}_run(input, output, arena);
    for (int i = 1; i < {{ upper }}_OUTPUT_SIZE; i++)
        if (output[i] > output[best])
            best = i;
    printf("%d after %" PRId64 " us\n", best, esp_timer_get_time() - start);
}
