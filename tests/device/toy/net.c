#include "net.h"
#include <stdint.h>
static const float weights[4][6] = {{0.5f, -1, 0, 0, 2, 0}, {0, 0, 0.25f, 0, 0, -3}, {1, 1, 1, 1, 1, 1}, {0, 0, 0, 4, 0, 0}};
static const float readout[3][4] = {{1, 0, 0, -1}, {0, 2, 0, 0.5f}, {0, 0, 1, 0}};
static void dense(const float *w, int rows, int columns, const float *in, float *out)
{
    for (int o = 0; o < rows; o++) {
        float sum = 0;
        for (int i = 0; i < columns; i++)
            sum += *w++ * in[i];
        out[o] = sum > 0 ? sum : 0;
    }
}
void net_run(const float *input, float *output, void *arena)
{
    dense(weights[0], 4, 6, input, arena);
    dense(readout[0], 3, 4, arena, output);
}
