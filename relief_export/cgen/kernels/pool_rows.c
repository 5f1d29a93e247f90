/* The greatest of each 2 x 2 elements: `rows` rows of `width` elements. */
INLINE void pool_rows(const float *from, float *to, int rows, int width, int from_pitch, int to_pitch)
{
    int y, x;
    for (y = 0; y < rows; y++, from += 2 * from_pitch, to += to_pitch)
        {% for cap in caps %}
        {{ "if" if loop.first else "else if" }} (width >= LANES_{{ cap }})
            for (x = 0; x < width; x += LANES_{{ cap }}) {
                /* The last vector overlaps the one before it, where the width is no multiple. */
                const int left = x < width - LANES_{{ cap }} ? x : width - LANES_{{ cap }};
                const float *const p = from + 2 * left, *const q = p + from_pitch;
                store_{{ cap }}(to + left, max_{{ cap }}(max_{{ cap }}(evens_{{ cap }}(p), odds_{{ cap }}(p)), max_{{ cap }}(evens_{{ cap }}(q), odds_{{ cap }}(q))));
            }
        {% endfor %}
}
