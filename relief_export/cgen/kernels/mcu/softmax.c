/* {% if logarithm %}Logarithm of the softmax{% else %}Softmax{% endif %} of rows of n numbers. */
LAYER NAME({{ parameters }})
{
    for (int o = 0; o < outputs; o++, in += width) {
        float most = in[0], total = 0;
        for (int i = 1; i < width; i++)
            if (in[i] > most)
                most = in[i];
        for (int i = 0; i < width; i++)
            total += expf(in[i] - most);
        {% if logarithm %}
        total = logf(total);
        {% endif %}
        for (int column = 0; column < width; column++) {
            const int row = 0;
            {% if logarithm %}
            float v = in[column] - most - total;
            {% else %}
            float v = expf(in[column] - most) / total;
            {% endif %}
            {% for line in lines %}
            {{ line }}
            {% endfor %}
        }
    }
}
