/* Zeros around and between the rows of each plane, where convolutions read their padding. */
static void clear_borders(float *map, int planes, int plane, int origin, int height, int width, int pitch)
{
    int k, y, i;
    for (k = 0; k < planes; k++, map += plane) {
        for (i = 0; i < origin; i++)
            map[i] = 0.0f;
        for (y = 0; y < height - 1; y++)
            for (i = origin + y * pitch + width; i < origin + (y + 1) * pitch; i++)
                map[i] = 0.0f;
        for (i = origin + (height - 1) * pitch + width; i < plane; i++)
            map[i] = 0.0f;
    }
}
