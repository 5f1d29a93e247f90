/* Copy the input, row by row, to where there is a border around it. */
static void stage(const {{ type }} *in, {{ type }} *out, int outputs, int height, int width, int out_plane, int out_pitch)
{
    for (int o = 0; o < outputs; o++)
        for (int row = 0; row < height; row++, in += width)
            memcpy(out + (ptrdiff_t)o * out_plane + (ptrdiff_t)row * out_pitch, in, (size_t)width * sizeof *in);
}
