/* {{ title }} of each plane. */
LAYER NAME({{ parameters }})
{
    for (int o = 0; o < outputs; o++, in += plane) {
        {{ sum }} v = {{ start }};
        {% for line in channel %}
        {{ line }}
        {% endfor %}
        for (int y = 0; y < height; y++)
            for (int x = 0; x < width; x++) {
                const {{ element }} u = in[(ptrdiff_t)y * pitch + x];
                {% if kind == "max" %}
                if (ABOVE(u, v))
                    v = u;
                {% else %}
                v += u;
                {% endif %}
            }
        {% if kind == "mean" and code != "q8" %}
        v /= (float)height * (float)width;
        {% endif %}
        {% for line in lines %}
        {{ line }}
        {% endfor %}
    }
}
