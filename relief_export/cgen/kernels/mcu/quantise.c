/* Floats to integers, halves to even; 12582912 = 1.5 * 2^23 rounds what it is added to. */
static void quantise(const float *in, {{ type }} *out, int outputs, int height, int width, int out_plane, int out_pitch)
{
    for (int o = 0; o < outputs; o++)
        for (int y = 0; y < height; y++)
            for (int x = 0; x < width; x++) {
                volatile float v = *in++ / {{ scale }};
                v = v < {{ low }} ? {{ low }} : v > {{ high }} ? {{ high }} : v;
                v = v + 12582912.0f;
                out[(ptrdiff_t)o * out_plane + (ptrdiff_t)y * out_pitch + x] = ({{ type }})((int)(v - 12582912.0f) + {{ zero }});
            }
}
