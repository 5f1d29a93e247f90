/* Runs {{ name }} once, on zeros. */
#include "{{ name }}.h"

static {{ upper }}_INPUT_TYPE input[{{ upper }}_INPUT_SIZE];
static {{ upper }}_OUTPUT_TYPE output[{{ upper }}_OUTPUT_SIZE];
static float arena[({{ upper }}_ARENA_BYTES + sizeof(float) - 1) / sizeof(float) + 1]; /* floats align it */

int main(void)
{
    int best = 0;
    {{ name }}_run(input, output, arena);
    for (int i = 1; i < {{ upper }}_OUTPUT_SIZE; i++)
        if (output[i] > output[best])
            best = i;
    return best;
}
