/* {{ title }} */
static void {{ name }}(const float *RESTRICT in, float *RESTRICT out, const int32_t *RESTRICT place{{ parameters }})
{
    int o, y, x;
    for (o = 0; o < {{ outputs }}; o++) {
        const float *const from = place[o] < 0 ? 0 : in + place[o];
        float a = {{ "from ? from[0] : 0.0f" if kind == "max" else "0.0f" }}, v;
        {% for line in channel %}
        {{ line }}
        {% endfor %}
        for (y = 0; from && y < {{ height }}; y++)
            for (x = 0; x < {{ width }}; x++) {
                const float e = from[y * {{ pitch }} + x];
                {% if kind == "max" %}
                a = a > e ? a : e;
                {% else %}
                a += e;
                {% endif %}
            }
        v = a{{ " / %d.0f" % (height * width) if kind == "mean" }};
        {% for line in lines %}
        {{ line | replace("ROW", "0") | replace("COLUMN", "0") }}
        {% endfor %}
        out[o * {{ out_plane }}] = v;
    }
}
