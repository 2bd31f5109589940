"""The mathematics: rotations, codebooks, quantizers, key centring, and the bytes of a page."""
