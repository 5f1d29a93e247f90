/* A complete program: floats from standard input, as text, to the outputs.
   cc -O2 -march=native example.c {{ name }}.c{{ weights }} -o example && echo 0.5 0.25 ... | ./example */
#include <stdio.h>
#include "{{ name }}.h"

#ifdef __GNUC__
static char arena[{{ upper }}_ARENA_BYTES] __attribute__((aligned(64)));
#else
static union { char bytes[{{ upper }}_ARENA_BYTES]; double align; } memory;
#define arena memory.bytes
#endif

int main(void)
{
    static float input[{{ upper }}_INPUT_SIZE], output[{{ upper }}_OUTPUT_SIZE];
    int i;
    for (i = 0; i < {{ upper }}_INPUT_SIZE; i++)
        if (scanf("%f", &input[i]) != 1) {
            fprintf(stderr, "%d numbers wanted, %d given\n", {{ upper }}_INPUT_SIZE, i);
            return 1;
        }
    {{ name }}_run(input, output, arena);
    for (i = 0; i < {{ upper }}_OUTPUT_SIZE; i++)
        printf("%.9g\n", output[i]);
    return 0;
}
