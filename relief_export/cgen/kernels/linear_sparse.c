/* {{ title }}
   The weights that are not zero, row by row. */
static void {{ name }}(const float *RESTRICT in, float *RESTRICT out, const uint32_t *RESTRICT first,
    const {{ index }} *RESTRICT place, const float *RESTRICT weight, const float *RESTRICT bias{{ parameters }})
{
    int o;
    for (o = 0; o < {{ outputs }}; o++) {
        const uint32_t end = first[o + 1];
        uint32_t j = first[o];
        float a = 0, b = 0, c = 0, d = 0, v;
        {% for line in channel %}
        {{ line }}
        {% endfor %}
        for (; j + 4 <= end; j += 4) {
            a += weight[j] * in[place[j]];
            b += weight[j + 1] * in[place[j + 1]];
            c += weight[j + 2] * in[place[j + 2]];
            d += weight[j + 3] * in[place[j + 3]];
        }
        for (; j < end; j++)
            a += weight[j] * in[place[j]];
        v = bias[o] + ((a + b) + (c + d));
        {% for line in lines %}
        {{ line | replace("ROW", "0") | replace("COLUMN", "0") }}
        {% endfor %}
        out[o * {{ out_plane }}] = v;
    }
}
