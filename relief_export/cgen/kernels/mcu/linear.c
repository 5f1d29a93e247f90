/* Matrix times vector. {% if form == "dense" %}Every weight is there.{% elif form == "pairs" %}Output o has counts[o] connections. A byte is a gap from the one before and,
   times 16, the number of a centre; with a gap of 15 that number plus 1 says how often, and another byte follows.{% else %}Output o has counts[o] connections, each at a gap from the one before it; 255 skips on.{% endif %} */
LAYER NAME({{ parameters }})
{
    {% if code == "codebook16" and form != "pairs" %}
    size_t n = 0;
    {% endif %}
    for (int o = 0; o < outputs; o++) {
        const {{ element }} *at = in;
        {{ sum }} v = 0;
        {% if form == "dense" %}
        for (int k = inputs; k > 0; k--) {
            const {{ factor }} w = {{ fetch }};
            v += w * *at++;
        }
        {% else %}
        for (int k = {{ count }}(counts + o); k > 0; k--) {
            {% if form == "pairs" %}
            uint8_t pair;
            while (((pair = ROM_UINT8(values++)) & 15) == 15)
                at += 15 * ((pair >> 4) + 1);
            at += pair & 15;
            {% else %}
            uint8_t skip;
            while ((skip = ROM_UINT8(gaps++)) == 255)
                at += 255;
            at += skip;
            {% endif %}
            {
                const {{ factor }} w = {{ fetch }};
                v += w * *at;
            }
        }
        {% endif %}
        {% for line in channel %}
        {{ line }}
        {% endfor %}
        {% for line in lines %}
        {{ line }}
        {% endfor %}
    }
}
