"""Llama 3.2 in pure PyTorch: to read, to import, to bend.

Shapes are written with the same letters everywhere:

    B  sequences in a batch          H  query heads             V  vocabulary
    T  new tokens of a sequence      K  key and value heads     L  layers
    S  its tokens in context         D  size of a head          P  pages of the cache
    N  packed tokens of a step       R  rotary pairs, D / 2     C  token slots of a page
    E  width of the residual stream  F  width of the mlp
"""
