/* {{ title }} */
static void {{ name }}(const float *RESTRICT in, float *RESTRICT out, const int32_t *RESTRICT place{{ parameters }})
{
    int o, y, x;
    for (o = 0; o < {{ outputs }}; o++) {
        {% if kind == "planes" %}
        const float *const from = place[o] < 0 ? 0 : in + place[o];
        {% endif %}
        float *const to = out + o * {{ out_plane }};
        {% for line in channel %}
        {{ line }}
        {% endfor %}
        for (y = 0; y < {{ height }}; y++)
            for (x = 0; x < {{ width }}; x += LANES_{{ cap }}) {
                const int left = x < {{ width }} - LANES_{{ cap }} ? x : {{ width }} - LANES_{{ cap }};
                {% if kind == "planes" %}
                vec_{{ cap }} v = from ? {{ "evens" if step == 2 else "load" }}_{{ cap }}(from + y * {{ pitch }} + left * {{ step }}) : splat_{{ cap }}(0.0f);
                {% else %}
                const int32_t at = place[(o * {{ height }} + y) * {{ width }} + x];
                float v = at < 0 ? 0.0f : in[at];
                {% endif %}
                {% for line in lines %}
                {{ line | replace("ROW", "y") | replace("COLUMN", "left") }}
                {% endfor %}
                store_{{ cap }}(to + y * {{ out_pitch }} + left, v);
            }
    }
}
