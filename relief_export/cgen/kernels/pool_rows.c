/* The greatest of each 2 x 2 elements: `rows` rows of `width` elements. */
INLINE void pool_rows(const float *from, float *to, int rows, int width, int from_pitch, int to_pitch)
{
    int y, x;
    for (y = 0; y < rows; y++)
        for (x = 0; x < width; x++) {
            const float *const p = from + 2 * y * from_pitch + 2 * x;
            const float a = p[0] > p[1] ? p[0] : p[1], b = p[from_pitch] > p[from_pitch + 1] ? p[from_pitch] : p[from_pitch + 1];
            to[y * to_pitch + x] = a > b ? a : b;
        }
}
