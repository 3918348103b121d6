r"""Smoothing with PDEs, the picture that explains the rest: what local entropy does to a landscape, and to SGD on it.

    python -m recipes.smoothing --out smoothing.png
    python -m recipes.smoothing --out mine.png --f "x**2 + 1.5*sin(2*pi*x)"
    python -m recipes.smoothing --out smoothing.png --animate smoothing.gif

Left: the landscape f of Deep Relaxation, u viscous (local entropy, beta = 1, t = 0.2) and u non-viscous (Hopf-Lax,
t = 0.1); below, where noisy descent from x = 2.5 ends after time 10 on f, and on u(., t) as t runs back to zero, all at
*the same* temperature 0.1. The slide this follows gave plain SGD 0.2, because its scheme blew up at 0.1.

Right: local entropy picks a wide valley over a deeper narrow one; steered and unsteered particles; a double well whose
density is stationary while its mass circulates.

The modules: `expression` reads a landscape, `talk` has the set-up and its numbers, `picture` draws them and `film`
animates them.
"""
