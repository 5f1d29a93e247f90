/* Copy a table out of the flash. */
LAYER NAME(const {{ stored }} *values, {{ element }} *out, int outputs, int height, int width, int out_plane, int out_pitch)
{
    for (int o = 0; o < outputs; o++)
        for (int row = 0; row < height; row++)
            for (int column = 0; column < width; column++)
                out[(ptrdiff_t)o * out_plane + (ptrdiff_t)row * out_pitch + column] = {{ read }}(values++);
}
