"""Tensors with chosen strides on any device."""


def moved(t, where):
    """On another device with the same strides; ``to`` makes them dense wherever elements leave gaps or overlap."""
    if not t.numel():
        return t.to(where)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((extent,), (1,)).to(where).as_strided(t.shape, t.stride())
