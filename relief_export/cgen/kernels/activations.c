/* Activations, for vectors of at most CAP floats. A block begins with its name and what it needs.
   None of them needs the C library; each is within 2e-7 of the exact value, relative to the larger of it and 1. */

/* @exp */
/* e^v = 2^n e^r with n the integer next to v / ln 2, and e^r from its series; 12582912 = 1.5 * 2^23 rounds. */
INLINE vec_CAP exp_CAP(vec_CAP v)
{
    const vec_CAP magic = splat_CAP(12582912.0f);
    vec_CAP n, r, p;
    v = min_CAP(max_CAP(v, splat_CAP(-87.0f)), splat_CAP(88.0f));
    n = v * splat_CAP(1.44269504f) + magic;
    r = n - magic;
    r = (v - r * splat_CAP(0.693359375f)) + r * splat_CAP(2.12194440e-4f);
    p = splat_CAP(1.98756915e-4f);
    p = p * r + splat_CAP(1.39819995e-3f);
    p = p * r + splat_CAP(8.33345205e-3f);
    p = p * r + splat_CAP(4.16657962e-2f);
    p = p * r + splat_CAP(1.66666657e-1f);
    p = p * r + splat_CAP(5.00000000e-1f);
    p = p * r * r + r + splat_CAP(1.0f);
    return p * floats_CAP((bits_CAP(n) - bits_CAP(magic) + 127) << 23);
}

/* @log1p */
/* log(1 + v) for v from 0 to 1: twice the area tangent of v / (2 + v). */
INLINE vec_CAP log1p_CAP(vec_CAP v)
{
    const vec_CAP s = v / (v + splat_CAP(2.0f)), q = s * s;
    vec_CAP p = splat_CAP(1.0f / 15.0f);
    p = p * q + splat_CAP(1.0f / 13.0f);
    p = p * q + splat_CAP(1.0f / 11.0f);
    p = p * q + splat_CAP(1.0f / 9.0f);
    p = p * q + splat_CAP(1.0f / 7.0f);
    p = p * q + splat_CAP(1.0f / 5.0f);
    p = p * q + splat_CAP(1.0f / 3.0f);
    p = p * q + splat_CAP(1.0f);
    return splat_CAP(2.0f) * s * p;
}

/* @log: needs log1p */
/* log of a positive, normal v = 2^n m with m from 1 to 2. */
INLINE vec_CAP log_CAP(vec_CAP v)
{
    const ivec_CAP i = bits_CAP(v);
    const vec_CAP m = floats_CAP((i & 0x7fffff) | 0x3f800000), magic = splat_CAP(12582912.0f);
    const vec_CAP n = floats_CAP(bits_CAP(magic) + ((i >> 23) - 127)) - magic;
    return n * splat_CAP(0.693147181f) + log1p_CAP(m - splat_CAP(1.0f));
}

/* @Relu */
INLINE vec_CAP Relu_CAP(vec_CAP v)
{
    return floats_CAP(bits_CAP(v) & less_CAP(splat_CAP(0.0f), v));
}

/* @LeakyRelu */
INLINE vec_CAP LeakyRelu_CAP(vec_CAP v, float alpha)
{
    return choose_CAP(less_CAP(v, splat_CAP(0.0f)), v * splat_CAP(alpha), v);
}

/* @ThresholdedRelu */
INLINE vec_CAP ThresholdedRelu_CAP(vec_CAP v, float alpha)
{
    return floats_CAP(bits_CAP(v) & less_CAP(splat_CAP(alpha), v));
}

/* @Clip */
INLINE vec_CAP Clip_CAP(vec_CAP v, float low, float high)
{
    return min_CAP(max_CAP(v, splat_CAP(low)), splat_CAP(high));
}

/* @Sigmoid: needs exp */
INLINE vec_CAP Sigmoid_CAP(vec_CAP v)
{
    return splat_CAP(1.0f) / (splat_CAP(1.0f) + exp_CAP(-v));
}

/* @HardSigmoid: needs Clip */
INLINE vec_CAP HardSigmoid_CAP(vec_CAP v, float alpha, float beta)
{
    return Clip_CAP(v * splat_CAP(alpha) + splat_CAP(beta), 0.0f, 1.0f);
}

/* @HardSwish: needs HardSigmoid Clip */
INLINE vec_CAP HardSwish_CAP(vec_CAP v)
{
    return v * HardSigmoid_CAP(v, 1.0f / 6.0f, 0.5f);
}

/* @Tanh: needs exp */
INLINE vec_CAP Tanh_CAP(vec_CAP v)
{
    return splat_CAP(1.0f) - splat_CAP(2.0f) / (exp_CAP(v + v) + splat_CAP(1.0f));
}

/* @Elu: needs exp */
INLINE vec_CAP Elu_CAP(vec_CAP v, float alpha)
{
    const vec_CAP zero = splat_CAP(0.0f);
    return choose_CAP(less_CAP(v, zero), splat_CAP(alpha) * (exp_CAP(min_CAP(v, zero)) - splat_CAP(1.0f)), v);
}

/* @Celu: needs exp */
INLINE vec_CAP Celu_CAP(vec_CAP v, float alpha)
{
    const vec_CAP zero = splat_CAP(0.0f);
    const vec_CAP below = splat_CAP(alpha) * (exp_CAP(min_CAP(v, zero) / splat_CAP(alpha)) - splat_CAP(1.0f));
    return choose_CAP(less_CAP(v, zero), below, v);
}

/* @Selu: needs Elu exp */
INLINE vec_CAP Selu_CAP(vec_CAP v, float alpha, float gamma)
{
    return splat_CAP(gamma) * Elu_CAP(v, alpha);
}

/* @Softplus: needs exp log1p */
INLINE vec_CAP Softplus_CAP(vec_CAP v)
{
    const vec_CAP zero = splat_CAP(0.0f);
    return max_CAP(v, zero) + log1p_CAP(exp_CAP(min_CAP(v, -v)));
}

/* @Abs */
INLINE vec_CAP Abs_CAP(vec_CAP v)
{
    return floats_CAP(bits_CAP(v) & 0x7fffffff);
}

/* @Softsign: needs Abs */
INLINE vec_CAP Softsign_CAP(vec_CAP v)
{
    return v / (splat_CAP(1.0f) + Abs_CAP(v));
}

/* @Mish: needs exp */
/* tanh(log(1 + w)) = (w^2 + 2 w) / (w^2 + 2 w + 2) with w = e^v, which is 1 in float32 from v = 20. */
INLINE vec_CAP Mish_CAP(vec_CAP v)
{
    const vec_CAP w = exp_CAP(min_CAP(v, splat_CAP(20.0f))), q = w * w + w + w;
    return v * q / (q + splat_CAP(2.0f));
}

/* @Erf: needs exp Abs */
/* Abramowitz and Stegun, 7.1.26. */
INLINE vec_CAP Erf_CAP(vec_CAP v)
{
    const vec_CAP x = Abs_CAP(v), t = splat_CAP(1.0f) / (splat_CAP(1.0f) + x * splat_CAP(0.3275911f));
    vec_CAP p = splat_CAP(1.061405429f);
    p = p * t + splat_CAP(-1.453152027f);
    p = p * t + splat_CAP(1.421413741f);
    p = p * t + splat_CAP(-0.284496736f);
    p = p * t + splat_CAP(0.254829592f);
    p = splat_CAP(1.0f) - p * t * exp_CAP(-x * x);
    return choose_CAP(less_CAP(v, splat_CAP(0.0f)), -p, p);
}

/* @GeluErf: needs Erf exp Abs */
INLINE vec_CAP GeluErf_CAP(vec_CAP v)
{
    return splat_CAP(0.5f) * v * (splat_CAP(1.0f) + Erf_CAP(v * splat_CAP(0.707106781f)));
}

/* @GeluTanh: needs Tanh exp */
INLINE vec_CAP GeluTanh_CAP(vec_CAP v)
{
    const vec_CAP inner = v * (splat_CAP(0.797884561f) + splat_CAP(0.0356774081f) * v * v);
    return splat_CAP(0.5f) * v * (splat_CAP(1.0f) + Tanh_CAP(inner));
}

/* @Exp: needs exp */
INLINE vec_CAP Exp_CAP(vec_CAP v)
{
    return exp_CAP(v);
}

/* @Neg */
INLINE vec_CAP Neg_CAP(vec_CAP v)
{
    return -v;
}

/* @Reciprocal */
INLINE vec_CAP Reciprocal_CAP(vec_CAP v)
{
    return splat_CAP(1.0f) / v;
}
