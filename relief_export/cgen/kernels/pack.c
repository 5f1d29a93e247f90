/* {{ title }}
   A plane is split into {{ phases | length }} parts by row and column modulo the strides, so that a strided convolution reads rows. */
static void {{ name }}(const float *RESTRICT in, float *RESTRICT out, const int32_t *RESTRICT place, int planes)
{
    int k, y, x;
    for (k = 0; k < planes; k++) {
        const float *const from = in + place[k];
        float *const to = out + k * {{ plane }};
        memset(to, 0, {{ plane }} * sizeof *to);
        {% for phase in phases %}
        for (y = {{ phase.y0 }}; y < {{ phase.y1 }}; y++)
            for (x = {{ phase.x0 }}; x < {{ phase.x1 }}; x += LANES_{{ phase.cap }}) {
                /* The last vector overlaps the one before it, where the length is no multiple. */
                const int left = x < {{ phase.x1 }} - LANES_{{ phase.cap }} ? x : {{ phase.x1 }} - LANES_{{ phase.cap }};
                const float *const p = from + (y * {{ sy }} + {{ phase.dy }}) * {{ from_pitch }} + left * {{ sx }} + {{ phase.dx }};
                store_{{ phase.cap }}(to + {{ phase.base }} + y * {{ pitch }} + left, {{ "evens" if sx == 2 else "load" }}_{{ phase.cap }}(p));
            }
        {% endfor %}
    }
}
