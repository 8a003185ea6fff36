"""Exercise 2: drawing ids by inversion."""


def drawn(probs, uniforms):
    """losses.draw on a copy of both: ids [A,N]."""
    from losses import draw

    return draw(probs.clone(), uniforms.clone())
