/* {{ title }} of windows of {{ kernel[0] }} x {{ kernel[1] }}, as far as they lie inside. */
LAYER NAME({{ parameters }})
{
    for (int o = 0; o < outputs; o++, in += plane) {
        {% for line in channel %}
        {{ line }}
        {% endfor %}
        for (int row = 0; row < height; row++)
            for (int column = 0; column < width; column++) {
                {{ sum }} v = {{ start }};
                {% if kind == "mean" %}
                int count = 0;
                {% endif %}
                for (int i = 0; i < {{ kernel[0] }}; i++)
                    for (int j = 0; j < {{ kernel[1] }}; j++) {
                        const int y = row * {{ strides[0] }} + i * {{ dilations[0] }} - {{ pads[0] }}, x = column * {{ strides[1] }} + j * {{ dilations[1] }} - {{ pads[1] }};
                        if (y >= 0 && y < {{ size[0] }} && x >= 0 && x < {{ size[1] }}) {
                            const {{ element }} u = in[(ptrdiff_t)y * pitch + x];
                            {% if kind == "max" %}
                            if (ABOVE(u, v))
                                v = u;
                            {% else %}
                            v += u;
                            {% endif %}
                            {% if kind == "mean" %}
                            count++;
                            {% endif %}
                        }
                    }
                {% if kind == "mean" %}
                v /= (float)count;
                {% elif kind == "mean-padded" %}
                v *= {{ share }};
                {% endif %}
                {% for line in lines %}
                {{ line }}
                {% endfor %}
            }
    }
}
