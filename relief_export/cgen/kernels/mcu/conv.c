/* Convolution {{ kernel[0] }} x {{ kernel[1] }}{{ note }}. {% if dense %}Every kernel is there.{% else %}An output channel has counts[o] {{ unit }}, each at a gap from
   the one before it; 255 skips on.{% endif %} {% if pool %}The greatest of each 2 x 2 outputs is kept.{% else %}{{ rows * columns }} outputs are summed at once.{% endif %} */
LAYER NAME({{ parameters }})
{
    {% if code == "codebook16" %}
    size_t first = 0;
    {% endif %}
    {% if groups %}
    int member = 0;
    {% endif %}
    for (int o = 0; o < outputs; o++) {
        {% if not dense %}
        const int kept = {{ count }}(counts + o);
        const uint8_t *gap = gaps;
        {% endif %}
        {% if code == "codebook16" %}
        size_t n = first;
        {% else %}
        const {{ stored }} *value = values;
        {% endif %}
        {% for line in channel %}
        {{ line }}
        {% endfor %}
        for (int y = 0; y < height; y += {{ rows }}) {
            {% if rows > 1 and not pool %}
            const int top = y < height - {{ rows }} ? y : height - {{ rows }}; /* the last ones overlap */
            {% else %}
            const int top = y;
            {% endif %}
            for (int x = 0; x < width; x += {{ columns }}) {
                {% if columns > 1 and not pool %}
                const int left = x < width - {{ columns }} ? x : width - {{ columns }};
                {% else %}
                const int left = x;
                {% endif %}
                const {{ element }} *at = in + (ptrdiff_t)top * {{ strides[0] }} * pitch + left * {{ strides[1] }};
                {{ sum }} {{ sums }};
                {% if code == "codebook16" %}
                n = first;
                {% else %}
                value = values;
                {% endif %}
                {% if dense %}
                for (int k = inputs; k > 0; k--, at += plane) {
                {% else %}
                gap = gaps;
                for (int k = kept; k > 0; k--) {
                    uint8_t skip;
                    while ((skip = ROM_UINT8(gap++)) == 255)
                        at += (ptrdiff_t)255{{ times_plane }};
                    at += (ptrdiff_t)skip{{ times_plane }};
                {% endif %}
                    {% if kernel == (1, 1) %}
                    {
                        const {{ element }} *q = at;
                    {% else %}
                    const {{ element }} *q = at;
                    {% if kernel[0] > 1 %}
                    for (int i = 0; i < {{ kernel[0] }}; i++, q += {{ next_row }}) {
                    {% endif %}
                    for (int j = 0; j < {{ kernel[1] }}; j++, q += {{ dilations[1] }}) {
                    {% endif %}
                        const {{ factor }} w = {{ fetch }};
                        {% for name, offset in offsets %}
                        {{ name }} += w * {{ offset }};
                        {% endfor %}
                    }
                    {% if kernel[0] > 1 %}
                    }
                    {% endif %}
                }
                {% if pool %}
                if (b > a)
                    a = b;
                if (d > c)
                    c = d;
                if (c > a)
                    a = c;
                {
                    const int row = top / 2, column = left / 2;
                    {{ sum }} v = a;
                    {% for line in lines %}
                    {{ line }}
                    {% endfor %}
                }
                {% elif rows * columns == 1 %}
                {
                    const int row = top, column = left;
                    {{ sum }} v = a;
                    {% for line in lines %}
                    {{ line }}
                    {% endfor %}
                }
                {% else %}
                {
                    const {{ sum }} found[{{ rows * columns }}] = { {{ found }} };
                    for (int t = 0; t < {{ rows * columns }}; t++) {
                        const int row = top + t / {{ columns }}, column = left + t % {{ columns }};
                        {{ sum }} v = found[t];
                        {% for line in lines %}
                        {{ line }}
                        {% endfor %}
                    }
                }
                {% endif %}
            }
        }
        {% if not dense %}
        gaps = gap;
        {% endif %}
        {% if code == "codebook16" %}
        first = n;
        {% else %}
        values = value;
        {% endif %}
        {% if groups %}
        if (++member == members) {
            member = 0;
            in += group;
        }
        {% endif %}
    }
}
