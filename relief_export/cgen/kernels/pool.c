/* {{ title }} */
static void {{ name }}(const float *RESTRICT in, float *RESTRICT out, const int32_t *RESTRICT place{{ parameters }})
{
    int o, y, x, i, j;
    for (o = 0; o < {{ outputs }}; o++) {
        const float *const from = place[o] < 0 ? 0 : in + place[o];
        float *const to = out + o * {{ out_plane }};
        {% for line in channel %}
        {{ line }}
        {% endfor %}
        for (y = 0; y < {{ height }}; y++)
            for (x = 0; x < {{ width }}; x++) {
                float v = {{ "-3.402823466e38f" if kind == "max" else "0.0f" }};
                {% if kind == "mean" %}
                int count = 0;
                {% endif %}
                for (i = y * {{ sy }} - {{ top }}; i <= y * {{ sy }} - {{ top }} + {{ (kh - 1) * dy }}; i += {{ dy }})
                    for (j = x * {{ sx }} - {{ left }}; j <= x * {{ sx }} - {{ left }} + {{ (kw - 1) * dx }}; j += {{ dx }})
                        if (i >= 0 && i < {{ in_height }} && j >= 0 && j < {{ in_width }}) {
                            const float e = from ? from[i * {{ pitch }} + j] : 0.0f;
                            {% if kind == "max" %}
                            v = v > e ? v : e;
                            {% else %}
                            v += e;
                            {% endif %}
                            {% if kind == "mean" %}
                            count++;
                            {% endif %}
                        }
                {% if kind == "mean" %}
                v /= (float)count;
                {% elif kind == "mean-padded" %}
                v /= {{ kh * kw }}.0f;
                {% endif %}
                {% for line in lines %}
                {{ line | replace("ROW", "y") | replace("COLUMN", "x") }}
                {% endfor %}
                to[y * {{ out_pitch }} + x] = v;
            }
    }
}
