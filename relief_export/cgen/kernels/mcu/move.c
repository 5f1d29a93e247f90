/* Copy {% if planes %}planes{% else %}single elements{% endif %}{% if zeros %}; the largest number stands for zeros{% endif %}. */
LAYER NAME({{ parameters }})
{
    for (int o = 0; o < outputs; o++) {
        {% if planes %}
        const {{ place }} start = {{ read }}(places + o);
        {% endif %}
        {% for line in channel %}
        {{ line }}
        {% endfor %}
        for (int row = 0; row < height; row++)
            for (int column = 0; column < width; column++) {
                {% if planes %}
                {{ sum }} v = {% if zeros %}start == ({{ place }})-1 ? {{ zero }} : {% endif %}in[start + (size_t)row * pitch + (size_t)column * step];
                {% else %}
                const {{ place }} start = {{ read }}(places++);
                {{ sum }} v = {% if zeros %}start == ({{ place }})-1 ? {{ zero }} : {% endif %}in[start];
                {% endif %}
                {% for line in lines %}
                {{ line }}
                {% endfor %}
            }
    }
}
