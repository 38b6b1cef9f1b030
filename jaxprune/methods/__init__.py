"""What the engines are applied to: a head's fused weight, a layer's ``W_Q`` and ``W_K``.

Arrays in, arrays out; no model is known here.
"""
